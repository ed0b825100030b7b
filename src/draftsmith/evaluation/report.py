"""Stage `report`: one HTML file that shows what a run made and whether to trust it.

The sections' contents come from `report_sections.py`, their words from the template `report.html`, which says in one
line where a stage has not run.
"""

import json
import shlex
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from draftsmith.data.regenerate import read_completions
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
from draftsmith.recipe import DraftShape, Recipe, dump_recipe, load_recipe
from draftsmith.targets import embedded

ANSWERS = 20
ENGINES = {"sglang": ("draft", "sglang"), "vllm": ("draft", "vllm")}  # export directories that each engine can load


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


def tau_text(value: View) -> str:
    return "-" if value["tau"] is None else f"{value['tau']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


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


def verdict(results: View | None) -> View:
    proof = (results or {}).get("lossless")
    if not proof or not proof["tokens"]:
        return {"state": "unknown", "word": "not tested", "detail": "no output was compared with plain decoding"}
    compared = (
        f"greedy output on {proof['prompts']} prompts x {proof['tokens_per_prompt']} tokens in {proof['dtype']}, "
        f"shapes {', '.join(proof['shapes'])}"
    )
    if proof["identical"]:
        return {"state": "good", "word": "yes", "detail": f"identical {compared}"}
    return {"state": "bad", "word": "NO", "detail": f"{len(proof['differences'])} differences in {compared}"}


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


def draft_directory(run: Run, engine: str) -> Path:
    candidates = [run.directory / "export" / name for name in ENGINES[engine]]
    return next((path for path in candidates if path.exists()), candidates[0])


def engine_model(run: Run) -> str:
    """What an engine can load: the embedded target's name means nothing to it, its converted directory does."""
    return str(embedded.cache_dir() / embedded.NAME) if run.target == embedded.NAME else run.target


def serve_commands(run: Run) -> list[tuple[str, str]]:
    """The engines' command lines, with the shapes that were measured to be fastest."""
    model = engine_model(run)
    order = [entry["shape"] for entry in sorted((run.results or {}).get("speed", []), key=lambda e: -e["speedup"])]
    shapes = list(run.recipe.evaluate.shapes) if run.recipe else []
    shapes.sort(key=lambda shape: order.index(str(shape)) if str(shape) in order else len(order))
    chain = next((s for s in shapes if s.topk == 1), DraftShape(steps=3, topk=1, draft_tokens=4))
    best = shapes[0] if shapes else DraftShape(steps=3, topk=4, draft_tokens=8)
    vllm, sglang = str(draft_directory(run, "vllm")), str(draft_directory(run, "sglang"))
    speculation = json.dumps({"method": "eagle3", "model": vllm, "num_speculative_tokens": chain.steps})
    launch = ["python", "-m", "sglang.launch_server", "--model-path", model, "--speculative-algorithm", "EAGLE3"]
    launch += ["--speculative-draft-model-path", sglang, "--speculative-num-steps", str(best.steps)]
    launch += ["--speculative-eagle-topk", str(best.topk), "--speculative-num-draft-tokens", str(best.draft_tokens)]
    return [
        ("Serve on vLLM", shlex.join(["vllm", "serve", model, "--speculative-config", speculation])),
        ("Serve on SGLang", shlex.join(launch)),
    ]


def train_longer(run: Run) -> tuple[str, str | None]:
    words = "tau was still rising: train longer (or raise regenerate.max_tokens for more data)"
    if run.recipe is None or run.training is None:
        return words, None
    train = run.recipe.train
    key, now = ("max-steps", train.max_steps) if train.max_steps == run.training["steps"] else ("epochs", train.epochs)
    return words, f"{own_command(run, 'run')} --train.{key} {2 * (now or 1)}"


def own_command(run: Run, stage: str) -> str:
    return shlex.join(["draftsmith", stage, str(run.directory / "recipe.yaml"), "--out", str(run.directory)])


def next_steps(run: Run) -> list[tuple[str, str | None]]:
    """(what, exact command), the most urgent first."""
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
    inspect = shlex.join(["draftsmith", "inspect", str(draft_directory(run, "vllm"))])
    return [*steps, ("Check the exported draft", inspect), *serve_commands(run)]


# --- the page -----------------------------------------------------------------------------------------------------


def environment() -> Environment:
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(number=number, share=share, tau=tau_text, plain=plain, duration=short_duration)
    return made


def write_report(run_dir: Path, tokenizer) -> Path:
    """Write RUN/report.html; sections whose stage has not run say so."""
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
            next_steps=next_steps(run),
            created_with=run.created_with,
            stages=(run.manifest or {}).get("stages", {}),
        ),
    )
    return path
