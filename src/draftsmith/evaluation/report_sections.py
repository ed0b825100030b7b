"""What the report's sections show beside the records themselves: plots, sampled answers, pairs of shapes."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import linear_regression
from typing import Any

from markupsafe import Markup

from draftsmith.core.records.data import Completion, Coverage
from draftsmith.core.records.evaluation import Acceptance
from draftsmith.core.records.training import MetricsRow, StepTiming
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.evaluation.asking import balanced
from draftsmith.evaluation.plots import interval_plot, line_plot

PROMPT_END_CHARACTERS = 400
MASK_TOKENS = 500
PLOT_POINTS = 300
TRAINED = "tokens trained on"


def size_label(size: int) -> str:
    return f"{size // 1024}k" if size % 1024 == 0 else f"{size:,}"


# --- data ---------------------------------------------------------------------------------------------------------


def vocabulary_plot(coverage: Coverage) -> Markup:
    return line_plot(
        "Share of answer tokens inside the draft vocabulary",
        ("draft vocabulary (tokens)", "share covered"),
        {name: (coverage.sizes, shares) for name, shares in coverage.coverage.items()},
        ticks={size: size_label(size) for size in coverage.sizes},
        doubling=True,
        mark=(coverage.chosen_size, f"chosen: {size_label(coverage.chosen_size)}"),
    )


def sample_completions(rows: Iterable[Completion], count: int, seed: int) -> list[Completion]:
    """A random choice, as many of each category as of any other."""
    written = [row for row in rows if row.spans]
    random.Random(f"{seed}-report").shuffle(written)
    return balanced(sorted(written, key=lambda row: row.category), count)


def as_text(row: Completion, tokenizer: Any) -> tuple[str, str]:
    """(end of the prompt, answer) of a completion."""
    start = row.spans[0][0]
    prompt = tokenizer.decode(row.ids[:start])
    shown = ("…" if len(prompt) > PROMPT_END_CHARACTERS else "") + prompt[-PROMPT_END_CHARACTERS:]
    return shown, tokenizer.decode(row.ids[start:])


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Text that each token adds; a character made of several tokens stands at the last of them.

    Decoding a token alone would lose the space before it with some tokenizers.
    """
    wholes = [tokenizer.decode(ids[:end]).rstrip("\ufffd") for end in range(len(ids))]
    return [after[len(before) :] for before, after in pairwise([*wholes, tokenizer.decode(ids)])]


def loss_mask(row: Completion, tokenizer: Any, vocabulary_file: Path) -> list[tuple[int, str, str]]:
    """(id, text, how the page shows it) of a conversation's first tokens."""
    ids = row.ids[:MASK_TOKENS]
    known = DraftVocabulary.load(vocabulary_file).t2d.tolist() if vocabulary_file.exists() else None
    tokens = []
    for position, (token, text) in enumerate(zip(ids, token_texts(ids, tokenizer), strict=True)):
        loss = any(start <= position < end for start, end in row.spans)
        outside = known is not None and not known[token]
        tokens.append((token, text, ("loss" if loss else "prompt") + (" outside" if outside else "")))
    return tokens


@dataclass(frozen=True)
class Course:
    """A training against the tokens of its steps."""

    metrics: Sequence[MetricsRow]
    timing: Sequence[StepTiming]

    @cached_property
    def tokens(self) -> dict[int, int]:
        """Trained by the end of each step."""
        totals = accumulate(row.tokens for row in self.timing)
        return {row.step: total for row, total in zip(self.timing, totals, strict=True)}

    @cached_property
    def held_out(self) -> list[tuple[int, dict[int, float]]]:
        """(tokens, tau by the length of the chain)."""
        rows = [(self.tokens.get(row.step), row.held_out) for row in self.metrics]
        return [(tokens, found.tau) for tokens, found in rows if tokens and found]

    @property
    def gain_of_doubling(self) -> float | None:
        """What twice the tokens would add to tau: the slope of a line through tau of the longest chain against
        log2(tokens), from a quarter of the tokens on. None of fewer than three measurements."""
        late = [(math.log2(at), tau[max(tau)]) for at, tau in self.held_out if 4 * at >= self.held_out[-1][0]]
        return linear_regression(*zip(*late, strict=True)).slope if len(late) >= 3 else None

    def plots(self) -> list[Markup]:
        plots: list[Markup] = []
        logged = [row for row in self.metrics if row.loss is not None and row.step in self.tokens]
        if rows := logged[:: math.ceil(len(logged) / PLOT_POINTS) or 1]:
            at, depths = [self.tokens[row.step] for row in rows], range(len(rows[0].alpha or []))
            losses = {"loss": (at, [row.loss or 0.0 for row in rows])}
            alphas = {f"depth {d + 1}": (at, [(row.alpha or [])[d] for row in rows]) for d in depths}
            plots += [
                line_plot("Training loss", (TRAINED, "loss"), losses),
                line_plot("Acceptance per depth while training", (TRAINED, "alpha"), alphas, from_zero=True),
            ]
        if self.held_out:
            at = [tokens for tokens, _ in self.held_out]
            lengths = self.held_out[0][1]
            taus = {f"chain of {n}": (at, [tau[n] for _, tau in self.held_out]) for n in lengths}
            plots.append(line_plot("tau on held-out completions", (TRAINED, "tau"), taus))
        width = math.ceil(len(self.timing) / 60) or 1  # about sixty stretches: single steps vary with their packing
        if stretches := [self.timing[i : i + width] for i in range(0, len(self.timing), width)]:
            rates = [sum(row.tokens for row in stretch) / sum(row.seconds for row in stretch) for stretch in stretches]
            speeds = {"tokens/s": ([self.tokens[stretch[-1].step] for stretch in stretches], rates)}
            plots.append(line_plot("Throughput", (TRAINED, "tokens/s"), speeds, from_zero=True))
        return plots


# --- evaluation ---------------------------------------------------------------------------------------------------


def categories_of(entries: Iterable[Acceptance]) -> list[str]:
    return sorted({name for entry in entries for name in entry.by_category})


def tau_plot(entries: Sequence[Acceptance]) -> Markup:
    categories = categories_of(entries)
    series = {e.setting: [e.all, *(e.by_category.get(name) for name in categories)] for e in entries}
    return interval_plot("tau by category, 95 % intervals over prompts", ["all", *categories], series)


def depth_plot(entries: Sequence[Acceptance]) -> Markup:
    def line(shares: Sequence[float | None]) -> tuple[list[float], list[float]]:
        return list(range(1, len(shares) + 1)), [math.nan if value is None else value for value in shares]

    deepest = max(len(entry.acceptance_by_depth) for entry in entries)
    return line_plot(
        "Acceptance by depth, given that the depth was reached",
        ("depth", "share accepted"),
        {entry.setting: line(entry.acceptance_by_depth) for entry in entries},
        ticks={d: str(d) for d in range(1, deepest + 1)},
        from_zero=True,
    )


def trees_and_chains(entries: Sequence[Acceptance]) -> list[tuple[Acceptance, Acceptance]]:
    """(chain, tree) of as many steps, at the same temperature and with drafts taken alike."""
    chains = {(e.shape.steps, e.how): e for e in entries if e.shape.topk == 1}
    trees = [e for e in entries if e.shape.topk > 1 and (e.shape.steps, e.how) in chains]
    return [(chains[tree.shape.steps, tree.how], tree) for tree in trees]
