"""Stage `report`: one HTML file that shows what a run made and whether to trust it.

The sections' contents come from `report_sections.py`, their words from the template `report.html`, which says in one
line where a stage has not run.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from draftsmith.data.regenerate import read_completions
from draftsmith.evaluation.acceptance import tau_text
from draftsmith.evaluation.lossless import lossless_verdict
from draftsmith.evaluation.report_sections import (
    View,
    answer_view,
    data_view,
    engines_view,
    evaluation_view,
    mask_view,
    sample_completions,
    training_view,
    vocabulary_view,
)
from draftsmith.files import read_json, read_jsonl, write_atomic
from draftsmith.progress import short_duration
from draftsmith.recipe import Recipe, dump_recipe, load_recipe

ANSWERS = 20
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}


@dataclass(frozen=True)
class Run:
    """What a run directory holds."""

    directory: Path
    recipe: Recipe | None
    manifest: View | None
    prompts: View | None
    completions: View | None
    regenerate_timing: View | None
    coverage: View | None
    metrics: list[View]
    step_timing: list[View]
    training: View | None
    results: View | None
    engine_results: list[View]

    @classmethod
    def read(cls, directory: Path) -> "Run":
        def optional(*parts: str) -> View | None:
            path = directory.joinpath(*parts)
            return read_json(path) if path.exists() else None

        def lines(*parts: str) -> list[View]:
            path = directory.joinpath(*parts)
            return list(read_jsonl(path)) if path.exists() else []

        recipe = directory / "recipe.yaml"
        return cls(
            directory,
            load_recipe(recipe) if recipe.exists() else None,
            optional("manifest.json"),
            optional("prompts", "summary.json"),
            optional("completions", "summary.json"),
            optional("completions", "timing.json"),
            optional("vocab", "coverage.json"),
            lines("train", "metrics.jsonl"),
            lines("train", "timing.jsonl"),
            optional("train", "summary.json"),
            optional("evaluate", "results.json"),
            [
                read_json(path)
                for path in sorted(directory.glob("evaluate-*/results.json"))
                if "." not in path.parent.name
            ],
        )

    @property
    def target(self) -> str:
        if self.recipe:
            return self.recipe.target.model
        return self.results["settings"]["target"] if self.results else "an unnamed target"

    @property
    def created_with(self) -> View:
        """Provenance of the measurements if there are any, else of the run."""
        return (self.results or {}).get("created_with") or self.manifest or {}


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


# --- headline -----------------------------------------------------------------------------------------------------


def fastest(results: View) -> View | None:
    return max(results["speed"], key=lambda entry: entry["speedup"], default=None)


def headline_entry(results: View) -> View | None:
    """The coolest acceptance of the fastest shape; of the first shape where no speed was measured."""
    best = fastest(results)
    same = [e for e in results["acceptance"] if best is None or e["shape"] == best["shape"]]
    return min(same or results["acceptance"], key=lambda entry: entry["temperature"], default=None)


VERDICTS = {
    "yes": ("good", "yes"),
    "ties": ("good", "up to ties"),
    "no": ("bad", "NO"),
    "untested": ("unknown", "not tested"),
}


def verdict(results: View | None) -> View:
    told = lossless_verdict((results or {}).get("lossless"))
    state, word = VERDICTS[told.state]
    return {"state": state, "word": word, "detail": told.detail}


def headline(run: Run) -> View:
    results, training = run.results, run.training
    return {
        "target": run.target,
        "parameters": training["parameters"] if training else None,
        "vocabulary": run.coverage["chosen_size"] if run.coverage else None,
        "status": training["status"] if training else None,
        "entry": headline_entry(results) if results else None,
        "speed": fastest(results) if results else None,
        "shapes": len(results["speed"]) if results else 0,
        "lossless": verdict(results),
        "partial": bool(results and results["partial"]),
        "prompts": results["settings"]["prompts"] if results else None,
        "machine": machine(run),
    }


def machine(run: Run) -> str:
    """Processor and accelerators, without the operating system's version."""
    hardware = {k: v for k, v in run.created_with.get("hardware", {}).items() if k != "system" and v not in ([], None)}
    threads = (run.results or {}).get("settings", {}).get("threads")
    return plain(hardware | ({"threads": threads} if threads else {})) or "unknown machine"


# --- recipe -------------------------------------------------------------------------------------------------------


def recipe_rows(run: Run) -> list[tuple[str, str]]:
    """What decides the outcome; the whole recipe stands below the table."""
    if run.recipe is None:
        return []
    r = run.recipe
    train, regenerate, draft = r.train, r.regenerate, r.draft
    passes = f"{train.epochs} epochs" + (f", at most {train.max_steps} steps" if train.max_steps else "")
    sampling = f"T={regenerate.temperature:g}, top-p {regenerate.top_p:g}, top-k {regenerate.top_k or 'off'}"
    sampling += f", {share(regenerate.greedy_share, 0)} greedy"
    taps = plain(list(draft.taps)) if draft.taps else "2, L//2, L-3"
    norm = "before fc" if draft.norm_before_fc else "per tap" if draft.fc_norm else "none before fc"
    return [
        ("target", f"{r.target.model}, {r.target.dtype}, on {r.target.engine}"),
        ("prompts", plain([f"{s.name}{f' (at most {s.limit:,})' if s.limit else ''}" for s in r.prompts.sources])),
        ("answers", f"{sampling}; at most {regenerate.max_new_tokens} tokens"),
        ("draft", f"EAGLE-3, taps {taps}, norm {norm}, {r.vocab.size:,} tokens"),
        ("training", f"{passes}, {train.ttt_steps} TTT steps, {train.objective}, {train.optimizer}, {train.dtype}"),
        ("step", f"{train.pack_tokens * train.accumulate:,} tokens, peak learning rate {train.learning_rate:g}"),
        ("evaluation", f"shapes {plain(r.evaluate.shapes)}; T {plain(r.evaluate.temperatures)}"),
        ("seed", str(r.seed)),
    ]


# --- what to run next ---------------------------------------------------------------------------------------------


def train_longer(run: Run) -> tuple[str, str | None]:
    words = "tau was still rising: train longer (or raise regenerate.max_tokens for more data)"
    if run.recipe is None or run.training is None:
        return words, None
    train = run.recipe.train
    key, now = ("max-steps", train.max_steps) if train.max_steps == run.training["steps"] else ("epochs", train.epochs)
    return words, f"{own_command(run, 'run')} --train.{key} {2 * (now or 1)}"


def own_command(run: Run, stage: str) -> str:
    return shlex.join(["draftsmith", stage, str(run.directory / "recipe.yaml"), "--out", str(run.directory)])


def next_steps(run: Run, serve: Mapping[str, str]) -> list[tuple[str, str | None]]:
    """(what, exact command), the most urgent first; `serve`: the command of every engine that can serve the draft."""
    steps: list[tuple[str, str | None]] = []
    if verdict(run.results)["state"] == "bad":
        steps.append(("Do not serve this draft before the differences listed above are explained.", None))
    if run.training is None:
        return [*steps, ("The draft is not trained; finish the run", own_command(run, "run"))]
    if run.training["status"] == "preview":
        steps.append(train_longer(run))
    if run.results is None:
        steps.append(("Measure before you serve", own_command(run, "evaluate")))
    best = fastest(run.results) if run.results else None
    if best and best["speedup"] <= 1:
        steps.append(("Drafting does not pay on this machine; measure on the one that will serve.", None))
    return [*steps, *((f"Serve on {ENGINES[engine]}", command) for engine, command in serve.items())]


# --- the page -----------------------------------------------------------------------------------------------------


def environment() -> Environment:
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(number=number, share=share, tau=tau_text, plain=plain, duration=short_duration)
    return made


def write_report(run_dir: Path, tokenizer, serve: Mapping[str, str]) -> Path:
    """Write RUN/report.html; sections whose stage has not run say so. `serve`: see `next_steps`."""
    run = Run.read(run_dir)
    seed = run.recipe.seed if run.recipe else 0
    rows = sample_completions(read_completions(run_dir / "completions"), ANSWERS, seed)
    page = environment().from_string((files("draftsmith.evaluation") / "report.html").read_text("utf-8"))
    path = run_dir / "report.html"
    write_atomic(
        path,
        page.render(
            name=run.recipe.name if run.recipe else run_dir.name,
            headline=headline(run),
            recipe_rows=recipe_rows(run),
            recipe_text=dump_recipe(run.recipe) if run.recipe else "",
            data=data_view(run.prompts, run.completions, run.regenerate_timing),
            vocabulary=vocabulary_view(run.coverage),
            mask=mask_view(rows, tokenizer, run_dir / "vocab" / "vocab.safetensors"),
            answers=[answer_view(row, tokenizer) for row in rows],
            training=training_view(run.metrics, run.step_timing, run.training),
            evaluation=evaluation_view(run.results),
            engines=engines_view(run.engine_results),
            verdict=verdict(run.results),
            next_steps=next_steps(run, serve),
            created_with=run.created_with,
            stages=(run.manifest or {}).get("stages", {}),
        ),
    )
    return path
