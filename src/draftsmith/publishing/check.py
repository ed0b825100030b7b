"""`draftsmith export --check ENGINE`: does an engine read the exported directory as we mean it?

Two looks. The directory is compared with what the newest checkpoint exports to, which names any damage. Then the engine
decodes a few prompts with it, and so does the embedded engine with the checkpoint's own weights: greedy tokens and the
acceptance at every depth have to agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoded, Decoder, Eagle3Drafter
from draftsmith.decoding.tree import Shape
from draftsmith.errors import TargetError
from draftsmith.evaluation.acceptance import PromptAcceptance, count, summarise
from draftsmith.evaluation.lossless import first_difference
from draftsmith.evaluation.served import Prompt, ServedEvaluation, count_served
from draftsmith.progress import say
from draftsmith.publishing.export import damages, trained_draft
from draftsmith.recipe import Recipe
from draftsmith.serving.launch import Engine
from draftsmith.targets.base import Generation
from draftsmith.targets.ends import DTYPES
from draftsmith.targets.local import LocalTarget

NOISE = 3.0  # standard errors of the paired difference between the two engines
LEAST_NOISE = (
    0.1  # of tau and of a depth's share: rounding moves a few steps, and SGLang counts those that the end cuts short
)
PROMPTS, TOKENS = 6, 48


@dataclass
class Verdict:
    """What the two engines made of the same prompts."""

    engine: str
    shape: str
    prompts: int
    same_tokens: int  # prompts whose greedy outputs are identical
    engine_tau: float
    embedded_tau: float
    tolerance: float
    engine_depths: list[float | None]
    embedded_depths: list[float | None]
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def depths(values: list[float | None]) -> str:
            return " ".join("-" if v is None else f"{v:.2f}" for v in values)

        return (
            f"{self.engine} {self.shape}: tau {self.engine_tau:.2f} ({depths(self.engine_depths)}), embedded "
            f"{self.embedded_tau:.2f} ({depths(self.embedded_depths)}), noise {self.tolerance:.2f}; greedy tokens "
            f"identical on {self.same_tokens} of {self.prompts} prompts"
        )


def compare_engines(
    engine: str,
    shape: Shape,
    prompts: Sequence[Prompt],
    decoded: Sequence[Decoded],
    generations: Sequence[Generation],
) -> Verdict:
    """Paired over prompts; where greedy texts part (bf16 ties) the prompt still counts, as both are on-policy."""
    ours = [count(name, c, d, shape.steps) for (name, c, _), d in zip(prompts, decoded, strict=True)]
    theirs = [count_served(name, c, g, shape.steps) for (name, c, _), g in zip(prompts, generations, strict=True)]
    same = [first_difference(d.ids, g.ids) is None for d, g in zip(decoded, generations, strict=True)]
    summaries = [_all_text(summarise(rows)) for rows in (theirs, ours)]
    tolerance = _noise(ours, theirs)
    (engine_tau, engine_depths), (embedded_tau, embedded_depths) = summaries
    verdict = Verdict(
        engine,
        str(shape),
        len(prompts),
        sum(same),
        engine_tau,
        embedded_tau,
        tolerance,
        engine_depths,
        embedded_depths,
    )
    if abs(engine_tau - embedded_tau) > tolerance:
        verdict.problems.append(
            f"{engine} accepts tau {engine_tau:.2f} where the trained draft has {embedded_tau:.2f} "
            f"(noise {tolerance:.2f}): it reads the directory differently"
        )
    for depth, (a, b, noise) in enumerate(_by_depth(theirs, ours, shape.steps), 1):
        if abs(a - b) > noise:
            verdict.problems.append(
                f"at depth {depth} {engine} accepts {a:.0%} where the trained draft has {b:.0%} (noise {noise:.0%})"
            )
    if sum(same) * 2 < len(prompts):
        verdict.problems.append(
            f"greedy tokens of {engine} and the embedded engine agree on only {sum(same)} of {len(prompts)} prompts: "
            "another target, revision or dtype"
        )
    return verdict


def _all_text(summary: dict[str, Any]) -> tuple[float, list[float | None]]:
    """Loops count here: they flatter both engines alike."""
    return summary["tau_with_loops"], summary["acceptance_by_depth"]


def _noise(ours: Sequence[PromptAcceptance], theirs: Sequence[PromptAcceptance]) -> float:
    def taus(rows: Sequence[PromptAcceptance]) -> list[float]:
        return [1 + (r.accepted + r.looping_accepted) / max(1, r.steps + r.looping_steps) for r in rows]

    difference = np.subtract(taus(theirs), taus(ours))
    return max(LEAST_NOISE, NOISE * float(difference.std(ddof=1)) / len(difference) ** 0.5)


def _by_depth(
    theirs: Sequence[PromptAcceptance], ours: Sequence[PromptAcceptance], steps: int
) -> list[tuple[float, float, float]]:
    """(engine's acceptance, embedded one's, noise of their difference) of every depth that both reached."""
    rows = []
    for depth in range(steps):
        counts = [
            (sum(r.accepted_at[depth] for r in side), sum(r.reached[depth] for r in side)) for side in (theirs, ours)
        ]
        if not all(reached for _, reached in counts):
            break
        (a, n), (b, m) = counts
        pooled = (a + b) / (n + m)
        noise = max(LEAST_NOISE, NOISE * (pooled * (1 - pooled) * (1 / n + 1 / m)) ** 0.5)
        rows.append((a / n, b / m, noise))
    return rows


def check(
    recipe: Recipe, engine: Engine, directory: Path, checkpoints: Path, vocabulary: DraftVocabulary, out: Path
) -> bool:
    """True if the directory is whole and the engine serves it as the embedded engine does; says what is wrong."""
    found = damages(directory, checkpoints, vocabulary)
    for problem in found:
        say(f"check: {directory}: {problem}")
    if found:
        say("check: the directory is damaged; export again: draftsmith export RECIPE")
        return False
    say(f"check: {directory} is what {checkpoints} exports to")
    verdict = judge(recipe, engine, directory, checkpoints, vocabulary, out)
    say(f"check: {verdict}")
    for problem in verdict.problems:
        say(f"check: {problem}")
    return not verdict.problems


def judge(
    recipe: Recipe, engine: Engine, directory: Path, checkpoints: Path, vocabulary: DraftVocabulary, out: Path
) -> Verdict:
    """Start the engine with the directory and compare it with the embedded engine and the checkpoint's own weights."""
    wish = recipe.target
    if wish.engine != "transformers":
        raise TargetError(
            "export --check: compares with the embedded engine, which needs the target in this process; where it "
            "fits, give --target.engine transformers, else use: draftsmith evaluate RECIPE"
        )
    shape = next((s for s in recipe.evaluate.shapes if s.topk == 1 or engine == "sglang"), recipe.serve.shape)
    short = recipe.evaluate.model_copy(
        update={
            "engine": engine,
            "prompts": PROMPTS,
            "max_new_tokens": TOKENS,
            "shapes": (shape,),
        }
    )
    served = ServedEvaluation(
        recipe.model_copy(update={"evaluate": short}), engine, directory, out / "prompts" / "evaluation.jsonl", out
    )
    with served.server(None, shape) as drafted:
        prompts = served.open_prompts(drafted)
        generations = served.complete(drafted, prompts, f"check {shape} on {engine}", Sampling(), TOKENS, 1)
    target = LocalTarget(wish.model, wish.revision, wish.dtype, recipe.device, wish.trust_remote_code)
    draft = trained_draft(checkpoints, vocabulary)[0].to(DTYPES[wish.dtype]).to(target.device).eval()
    decoder = Decoder(target, Eagle3Drafter(draft, vocabulary.ids_D, target.embedding_rows()))
    own = Shape(shape.steps, shape.topk, shape.draft_tokens)
    decoded = [decoder.generate(ids, Sampling(), TOKENS, own) for _, _, ids in prompts]
    return compare_engines(engine, own, prompts, decoded, generations)
