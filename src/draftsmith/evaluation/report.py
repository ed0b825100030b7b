"""Stage `report`: one HTML file that shows what a run made and whether to trust it.

Words come from the template `report.html`, which says in one line where a stage has not run.
"""

import shlex
from collections.abc import Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from draftsmith.core import run_files
from draftsmith.core.files import write_atomic
from draftsmith.core.history import recipe_that_ran, results_of
from draftsmith.core.progress import short_duration
from draftsmith.core.recipe import EngineName
from draftsmith.core.recipe_file import dump_recipe, load_recipe
from draftsmith.core.records.data import CompletionsSummary, Coverage, PromptsSummary, Timing
from draftsmith.core.records.evaluation import Acceptance, Speed
from draftsmith.core.records.run import Manifest, Provenance
from draftsmith.core.records.training import MetricsRow, StepTiming, TrainingSummary
from draftsmith.core.run_files import RunFiles
from draftsmith.core.tables import by_reason
from draftsmith.data.regenerate import read_completions
from draftsmith.drafts import METHODS
from draftsmith.engines import ENGINES
from draftsmith.evaluation.lossless import LosslessVerdict, lossless_verdict
from draftsmith.evaluation.report_sections import (
    MASK_TOKENS,
    Course,
    as_text,
    categories_of,
    depth_plot,
    loss_mask,
    sample_completions,
    size_label,
    tau_plot,
    trees_and_chains,
    vocabulary_plot,
)

ANSWERS = 20


class Findings:
    """What a run directory holds; None of a stage that has not run."""

    def __init__(self, run: RunFiles):
        found = results_of(run)
        self.files = run
        self.recipe = recipe_that_ran(run, load_recipe(run.recipe))
        self.manifest = Manifest.found(run.manifest)
        self.prompts = PromptsSummary.found(run.stage("prompts") / run_files.SUMMARY)
        self.completions = CompletionsSummary.found(run.completions / run_files.SUMMARY)
        self.timing = Timing.found(run.completions / run_files.TIMING)
        self.coverage = Coverage.found(run.coverage)
        metrics, timing = run.train / run_files.METRICS, run.train / run_files.STEP_TIMING
        self.metrics = list(MetricsRow.read_rows(metrics)) if metrics.exists() else []
        self.step_timing = list(StepTiming.read_rows(timing)) if timing.exists() else []
        self.course = Course(self.metrics, self.step_timing)
        self.training = TrainingSummary.found(run.train / run_files.SUMMARY)
        self.results = found.pop("embedded", None)
        self.elsewhere = list(found.values())  # what other engines measured

    @property
    def method(self) -> str:
        return METHODS[self.recipe.draft.method].title

    @property
    def created_with(self) -> Provenance | None:
        """Of the measurements if there are any, else of the run."""
        known = self.results or self.manifest
        return known.created_with if known else None

    @cached_property
    def fastest(self) -> Speed | None:
        return max(self.results.speed, key=lambda entry: entry.speedup, default=None) if self.results else None

    @property
    def headline(self) -> Acceptance | None:
        """The coolest acceptance of the fastest shape; of the first shape where no speed was measured."""
        entries = self.results.acceptance if self.results else []
        same = [e for e in entries if self.fastest is None or e.shape == self.fastest.shape]
        return min(same or entries, key=lambda entry: entry.temperature, default=None)

    @property
    def course_in_words(self) -> str:
        """How tau on held-out text went, once training ended."""
        known = sum(row.held_out is not None for row in self.metrics)
        if self.training and self.training.status == "converged":
            return "tau on held-out text had stopped rising"
        if known <= self.recipe.train.patience:
            return f"tau on held-out text was measured too seldom ({known}) to tell whether it had stopped rising"
        return "tau on held-out text was still rising"

    @property
    def verdict(self) -> LosslessVerdict:
        return lossless_verdict(self.results.lossless if self.results else None)


# --- text ---------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def share(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def plain(value: Any) -> str:
    """A value of a recipe or manifest on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "none"
    return "-" if value is None else str(value)


def recipe_rows(run: Findings) -> list[tuple[str, str]]:
    """What decides the outcome; the whole recipe stands below the table."""
    r = run.recipe
    train, regenerate, draft = r.train, r.regenerate, r.draft
    passes = f"{train.epochs} epochs" + (f", at most {train.max_steps} steps" if train.max_steps else "")
    passes += ", on prompts, too" if train.on_prompts else ""
    sampling = f"T={regenerate.temperature:g}, top-p {regenerate.top_p:g}, top-k {regenerate.top_k or 'off'}"
    sampling += f", {share(regenerate.greedy_share, 0)} greedy"
    packs = f"packs of at most {train.pack_tokens:,} tokens, {train.accumulate} a step"
    taps = plain(list(draft.taps)) if draft.taps else "2, L//2, L-3"
    norm = "before fc" if draft.norm_before_fc else "per tap" if draft.fc_norm else "none before fc"
    shape = f"taps {taps}, norm {norm}, {r.vocab.size:,} tokens"
    if train.from_draft is not None:  # has its own
        shape = f"goes on from {train.from_draft}"
    return [
        ("target", f"{r.target.model}, {r.target.dtype}, on {r.target.engine}"),
        ("prompts", plain([f"{s.name}{f' (at most {s.limit:,})' if s.limit else ''}" for s in r.prompts.sources])),
        ("answers", f"{sampling}; at most {regenerate.max_new_tokens} tokens"),
        ("draft", f"{run.method}, {shape}"),
        ("training", f"{passes}, {train.ttt_steps} TTT steps, {train.objective}, {train.optimizer}, {train.dtype}"),
        ("step", f"{packs}, peak learning rate {train.learning_rate:g}"),
        ("evaluation", f"shapes {plain(r.evaluate.shapes)}; T {plain(r.evaluate.temperatures)}"),
        ("seed", str(r.seed)),
    ]


# --- what to run next ---------------------------------------------------------------------------------------------


def train_longer(run: Findings, steps: int) -> tuple[str, str]:
    gain = run.course.gain_of_doubling
    promise = f"; twice the tokens: about {gain:+.2f}" if gain and gain >= 0.005 else ""
    words = f"{run.course_in_words}: train longer (or raise regenerate.max_tokens for more data){promise}"
    train = run.recipe.train
    flags = [f"--train.epochs {2 * train.epochs}"]  # either key ends a training
    if train.max_steps and train.max_steps < 2 * steps:
        flags.append(f"--train.max-steps {2 * steps}")
    return words, " ".join([own_command(run, "run"), *flags])


def own_command(run: Findings, stage: str) -> str:
    return shlex.join(["draftsmith", stage, str(run.files.recipe), "--out", str(run.files.root)])


def next_steps(run: Findings, serve: Mapping[EngineName, str]) -> list[tuple[str, str | None]]:
    """(what, exact command), the most urgent first; `serve`: the command of every engine that can serve the draft."""
    steps: list[tuple[str, str | None]] = []
    if run.verdict.state == "no":
        steps.append(("Do not serve this draft before the differences listed above are explained.", None))
    if run.training is None:
        return [*steps, ("The draft is not trained; finish the run", own_command(run, "run"))]
    if run.training.status == "preview":
        steps.append(train_longer(run, run.training.steps))
    if run.results is None:
        steps.append(("Measure before you serve", own_command(run, "evaluate")))
    if run.fastest and run.fastest.speedup <= 1:
        steps.append(("Drafting does not pay on this machine; measure on the one that will serve.", None))
    return [*steps, *((f"Serve on {ENGINES[engine].title}", command) for engine, command in serve.items())]


def write_report(files_of_run: RunFiles, tokenizer: Any, serve: Mapping[EngineName, str]) -> Path:
    """Write report.html; sections whose stage has not run say so. `serve`: see `next_steps`."""
    run = Findings(files_of_run)
    rows = sample_completions(read_completions(run.files.completions), ANSWERS, run.recipe.seed)
    masked = min(rows, key=lambda row: abs(len(row.ids) - MASK_TOKENS // 2), default=None)  # nearest to readable
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters.update(number=number, share=share, plain=plain, duration=short_duration)
    page.filters.update(size_label=size_label, by_reason=by_reason)
    template = page.from_string((files("draftsmith.evaluation") / "report.html").read_text("utf-8"))
    entries = run.results.acceptance if run.results else []
    text = template.render(
        run=run,
        recipe_rows=recipe_rows(run),
        recipe_text=dump_recipe(run.recipe),
        vocabulary_plot=vocabulary_plot(run.coverage) if run.coverage else None,
        masked=masked,
        mask=loss_mask(masked, tokenizer, run.files.vocabulary) if masked else [],
        answers=[(row, *as_text(row, tokenizer)) for row in rows],
        entries=entries,
        categories=categories_of(entries),
        depth=max((len(entry.acceptance_by_depth) for entry in entries), default=0),
        contexts=sorted({edge for _, e in run.results.entries for edge in e.by_context}) if run.results else [],
        evaluation_plots=[tau_plot(entries), depth_plot(entries)] if entries else [],
        pairs=trees_and_chains(entries),
        speedups={s.shape: s.speedup for s in sorted(run.results.speed, key=lambda s: -s.batch)} if run.results else {},
        engine_categories=categories_of(e for results in run.elsewhere for e in results.acceptance),
        verdict_of=lossless_verdict,
        next_steps=next_steps(run, serve),
    )
    write_atomic(run.files.report, text)
    return run.files.report
