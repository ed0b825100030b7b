"""`draftsmith export --check ENGINE`: does an engine read the exported directory as we mean it?

Two looks. The directory is compared with what the best checkpoint exports to, which names any damage. Then the engine
decodes a few prompts with it, and so does the embedded engine with the checkpoint's own weights: greedy tokens and the
acceptance at every depth have to agree; where drafts are sampled, the acceptance at the highest temperature, too.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from draftsmith.core.errors import RecipeError, ServeError, TargetError
from draftsmith.core.progress import say
from draftsmith.core.recipe import EngineName
from draftsmith.core.records.evaluation import Acceptance, PromptCounts
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.sampling import Sampling
from draftsmith.drafts.directories import ReadyDraft
from draftsmith.engines import ENGINES, SERVERS
from draftsmith.engines.base import Setup
from draftsmith.evaluation.acceptance import count, summarise, total
from draftsmith.evaluation.asking import Question, complete
from draftsmith.evaluation.draft_sampling import taking
from draftsmith.evaluation.evaluate import Evaluation
from draftsmith.evaluation.lossless import first_difference
from draftsmith.runs.run import Run
from draftsmith.training.export import damages, trained_draft

PROMPTS, TOKENS = 6, 48
NOISE = 3.0  # standard errors of the paired difference between the two engines
# of tau and of a depth's share: rounding moves a few steps, and SGLang counts those that the end cuts short
LEAST_NOISE = 0.1


def require_check(run: Run, engine: EngineName, stage: str) -> None:
    """Raises what speaks against a check before anything runs."""
    if stage not in ("run", "export"):
        raise RecipeError(f"--check: given to {stage}; it follows an export: draftsmith export RECIPE --check {engine}")
    if run.recipe.target.engine != "transformers":
        raise TargetError(
            "--check: compares with the embedded engine, which needs the target in this process; where it fits, give "
            "--target.engine transformers, else use: draftsmith evaluate RECIPE"
        )
    server, program = SERVERS[engine], SERVERS[engine].program_of(run.recipe)
    server.require_settings(run.recipe)
    if shutil.which(program[0]) is None:
        raise ServeError(f"serve.program: {program[0]!r} is not on this machine; install the engine or name it")


def check(run: Run, engine: EngineName, directory: Path | None = None) -> bool:
    """True if the directory (the run's own export if none is given) is whole and the engine serves it as the embedded
    engine does; says what is wrong."""
    directory, checkpoints = directory or run.draft_for(engine), run.files.train
    vocabulary = DraftVocabulary.load(run.files.vocabulary)
    found = damages(directory, checkpoints, vocabulary)
    for problem in found:
        say(f"check: {directory}: {problem}")
    if found:
        say("check: the directory is damaged; export again: draftsmith run RECIPE --redo export")
        return False
    say(f"check: {directory} is what {checkpoints} exports to")
    agreements = agreements_with(run, engine, vocabulary, directory)
    for told, problems in agreements:
        say(f"check: {told}")
        for problem in problems:
            say(f"check: {problem}")
    return not any(problems for _, problems in agreements)


def agreements_with(
    run: Run, name: EngineName, vocabulary: DraftVocabulary, directory: Path
) -> list[tuple[str, list[str]]]:
    """Start the engine with the directory and compare it with the embedded engine and the checkpoint's own weights:
    (what the two made of it, what is wrong) at every temperature."""
    recipe, engine = run.recipe, ENGINES[name]
    shape = next(filter(engine.drafts, recipe.evaluate.shapes), recipe.serve.shape)
    changed = {"prompts": PROMPTS, "max_new_tokens": TOKENS, "shapes": (shape,)}
    short = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=changed)})
    drafts, hottest = run.serving_drafts(name, shape), max(recipe.evaluate.temperatures, default=0.0)
    setup = taking(Setup(short, directory, run.files.root, groups=run.named_card), drafts)
    evaluation = Evaluation(engine, setup, run.files.evaluation_prompts, run.files.root)
    with engine.open(setup, shape) as drafted:
        questions = evaluation.questions(drafted)
        warm = drafts == "sampled" and hottest and evaluation.draws(drafted, questions, hottest)
        samplings = [Sampling(), *([evaluation.sampling(hottest)] if warm else [])]
        theirs = [complete(drafted, questions, f"check {shape} on {name}", s, TOKENS, 1) for s in samplings]
    target = run.target
    with torch.no_grad():
        draft = trained_draft(run.files.train, vocabulary)[0].to(target.device, target.head.weight.dtype).eval()
    ready = ReadyDraft(draft, vocabulary.ids_D, target.embedding_rows())
    here = target.session(ready.drafter(), shape, drafts)
    ours = [complete(here, questions, f"check {shape} here", s, TOKENS, 1) for s in samplings]
    return [
        compare_engines(name, shape, questions, a, b, sampling.temperature)
        for sampling, a, b in zip(samplings, ours, theirs, strict=True)
    ]


def compare_engines(
    engine: str,
    shape: Shape,
    questions: Sequence[Question],
    ours: Sequence[Generation],
    theirs: Sequence[Generation],
    temperature: float = 0.0,
) -> tuple[str, list[str]]:
    """(what the two engines made of the same prompts, what is wrong with it), paired over prompts.

    Where greedy texts part (bf16 ties) the prompt still counts, as both are on-policy. Above temperature 0 drafts are
    sampled, and so are the texts. Loops count here: they flatter both alike.
    """
    own, others = (
        [count(q.id, q.category, answer, shape.steps) for q, answer in zip(questions, side, strict=True)]
        for side in (ours, theirs)
    )
    same = sum(first_difference(a.ids, b.ids) is None for a, b in zip(ours, theirs, strict=True))
    drafts: DraftSampling = "sampled" if temperature else "greedy"
    told, known = (summarise(rows, shape, temperature, drafts) for rows in (others, own))
    tau, trained, tolerance = told.tau_with_loops, known.tau_with_loops, _noise(own, others)
    summary = (
        f"{engine} {shape}, {told.how}: tau {tau:.2f} ({_depths(told)}), embedded {trained:.2f} ({_depths(known)}), "
        f"noise {tolerance:.2f}"
    )
    problems = []
    if abs(tau - trained) > tolerance:
        problems.append(
            f"{engine} accepts tau {tau:.2f} where the trained draft has {trained:.2f} (noise {tolerance:.2f}): it "
            "reads the directory differently"
        )
    them, us = total(others), total(own)
    counts = zip(them.accepted_at, them.reached, us.accepted_at, us.reached, strict=True)
    for depth, (a, n, b, m) in enumerate(counts, 1):
        if not (n and m):  # as far as both went
            break
        pooled = (a + b) / (n + m)
        noise = max(LEAST_NOISE, NOISE * (pooled * (1 - pooled) * (1 / n + 1 / m)) ** 0.5)
        if abs(a / n - b / m) > noise:
            problems.append(
                f"at depth {depth} {engine} accepts {a / n:.0%} where the trained draft has {b / m:.0%} "
                f"(noise {noise:.0%})"
            )
    if temperature:
        return summary, problems
    if same * 2 < len(questions):
        problems.append(
            f"greedy tokens of {engine} and the embedded engine agree on only {same} of {len(questions)} prompts: "
            "another target, revision or dtype"
        )
    return f"{summary}; greedy tokens identical on {same} of {len(questions)} prompts", problems


def _depths(entry: Acceptance) -> str:
    return " ".join("-" if share is None else f"{share:.2f}" for share in entry.acceptance_by_depth)


def _noise(ours: Sequence[PromptCounts], theirs: Sequence[PromptCounts]) -> float:
    def taus(rows: Sequence[PromptCounts]) -> list[float]:
        return [1 + (r.accepted + r.looping_accepted) / max(1, r.steps + r.looping_steps) for r in rows]

    difference = np.subtract(taus(theirs), taus(ours))
    return max(LEAST_NOISE, NOISE * float(difference.std(ddof=1)) / len(difference) ** 0.5)
