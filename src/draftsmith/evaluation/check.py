"""Whether an engine and the embedded one made the same of a draft, prompt by prompt, within noise."""

from collections.abc import Sequence

import numpy as np

from draftsmith.core.records.evaluation import Acceptance, PromptCounts
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.decoding.generation import Generation
from draftsmith.evaluation.acceptance import count, summarise, total
from draftsmith.evaluation.asking import Question
from draftsmith.evaluation.lossless import first_difference

NOISE = 3.0  # standard errors of the paired difference between the two engines
# of tau and of a depth's share: rounding moves a few steps, and SGLang counts those that the end cuts short
LEAST_NOISE = 0.1


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
    for depth, (a, b, noise) in enumerate(_by_depth(others, own), 1):
        if abs(a - b) > noise:
            problems.append(
                f"at depth {depth} {engine} accepts {a:.0%} where the trained draft has {b:.0%} (noise {noise:.0%})"
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


def _by_depth(theirs: Sequence[PromptCounts], ours: Sequence[PromptCounts]) -> list[tuple[float, float, float]]:
    """(engine's acceptance, embedded one's, noise of their difference) of every depth that both reached."""
    rows, them, us = [], total(theirs), total(ours)
    for a, n, b, m in zip(them.accepted_at, them.reached, us.accepted_at, us.reached, strict=True):
        if not (n and m):
            break
        pooled = (a + b) / (n + m)
        noise = max(LEAST_NOISE, NOISE * (pooled * (1 - pooled) * (1 / n + 1 / m)) ** 0.5)
        rows.append((a / n, b / m, noise))
    return rows
