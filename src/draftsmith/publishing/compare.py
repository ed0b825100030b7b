"""`draftsmith compare`: several drafts of one target on the same prompts, side by side with intervals."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith import files
from draftsmith.drafts.checkpoint import Reading, inspect_draft, load_draft
from draftsmith.drafts.eagle3 import Eagle3Config
from draftsmith.errors import DataError, RecipeError, TargetError
from draftsmith.evaluation.acceptance import paired_difference, tau_text
from draftsmith.evaluation.evaluate import Evaluation, measured_once
from draftsmith.evaluation.plots import interval_plot
from draftsmith.hardware.accept_length import from_results
from draftsmith.hardware.commands import parse_shape, read_probe, roofline
from draftsmith.hardware.cost_model import Costs, predict
from draftsmith.hardware.presets import preset
from draftsmith.hardware.sizes import DraftSize
from draftsmith.progress import say

if TYPE_CHECKING:
    from draftsmith.run import Run


def coverage(ids: set[int], completions: Sequence[list[int]]) -> float | None:
    """Share of the target's own tokens that the draft can propose at all."""
    total = sum(len(c) for c in completions)
    return sum(token in ids for c in completions for token in c) / total if total else None


def measure(run: "Run", directory: Path, out: Path, reading: Reading) -> dict[str, Any]:
    """One draft's row: greedy acceptance at every shape of `evaluate.shapes`, its profile, coverage and size."""
    report = inspect_draft(directory)
    prompts, recipe = run.path("prompts", "evaluation.jsonl"), run.recipe
    evaluation = Evaluation(recipe, run.target, directory, prompts, reading)
    key = files.digest(
        *sorted(directory.glob("*.safetensors")),
        directory / "config.json",
        prompts,
        recipe.evaluate.model_dump(mode="json"),
        recipe.target.model_dump(mode="json"),
        recipe.seed,
        reading,
    )
    parts = out / key[:12]
    taps = evaluation.drafter.draft.config.taps
    say(f"compare: {directory}: reads HF hidden_states {list(taps)}")
    for problem in report.serving:
        say(f"compare: {directory}: {problem}; measured all the same")
    acceptance = [
        measured_once(parts, f"tau-{shape}", lambda shape=shape: evaluation.acceptance(shape, 0.0))  # type: ignore[misc]
        for shape in evaluation.shapes
    ]
    profile = measured_once(parts, "profile", evaluation.profile)
    # Of what the target writes to the evaluation prompts: none of the drafts was made for them.
    written = measured_once(parts, "answers", evaluation.answers)
    return {
        "draft": str(directory),
        "parameters": report.parameters,
        "bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        "coverage": coverage(set(evaluation.drafter.ids), written),
        "acceptance": acceptance,
        "profile": profile,
        "draft_config": evaluation.drafter.draft.config.to_dict(),
    }


def with_speed(run: "Run", row: dict[str, Any]) -> list[tuple[str, float]]:
    """(machine, predicted speed-up of the best measured shape) here, if it was probed, and on one named GPU."""
    draft = DraftSize.of(Eagle3Config.from_dict(row["draft_config"]))
    machines: list[Costs] = [replace(roofline(run.recipe, preset("h100-1")), draft=draft)]
    if run.path("probe.json").exists():
        machines.append(read_probe(run, run.path("probe.json")))
    try:
        accept = from_results(row)
    except RecipeError:  # nothing greedy was long enough
        return []
    shapes = [parse_shape(entry["shape"]) for entry in row["acceptance"]]
    known = [shape for shape in shapes if shape.steps <= accept.deepest]
    if not known:
        return []
    return [(costs.name, max(predict(costs, accept, shape).speedup for shape in known)) for costs in machines]


def describe(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["draft"]) for row in rows)
    lines = []
    for row in rows:
        for entry in row["acceptance"]:
            told = "too short" if entry["all"]["tau"] is None else tau_text(entry["all"])
            told += _against_first(entry["against_first"])
            depths = "/".join("-" if a is None else f"{a:.2f}" for a in entry["acceptance_by_depth"])
            by_category = ", ".join(
                f"{name} {value['tau']:.2f}" for name, value in entry["by_category"].items() if value["tau"]
            )
            lines.append(f"{row['draft']:<{width}}  {entry['shape']:>7}  {told}  depths {depths}  {by_category}")
        covered = "unknown" if row["coverage"] is None else f"{row['coverage']:.1%}"
        speeds = ", ".join(f"{gain:.2f}x on {machine}" for machine, gain in row["predicted"]) or "nothing"
        lines.append(
            f"{'':<{width}}  {row['parameters'] / 1e6:.1f} M parameters, {row['bytes'] / 1e6:.0f} MB, vocabulary "
            f"covers {covered}, predicted {speeds}"
        )
    return "\n".join(lines)


def _against_first(paired: dict[str, Any] | None) -> str:
    """`, +0.12 [+0.05, +0.19] against the first`"""
    if paired is None or paired["difference"] is None:
        return ""
    interval = "" if paired["low"] is None else f" [{paired['low']:+.2f}, {paired['high']:+.2f}]"
    return f", {paired['difference']:+.2f}{interval} against the first on {paired['prompts']} prompts"


def pair_up(rows: list[dict[str, Any]]) -> None:
    """Give every entry its paired difference to the first draft's at the same shape."""
    first = {entry["shape"]: entry["prompts"] for entry in rows[0]["acceptance"]}
    for row in rows:
        for entry in row["acceptance"]:
            paired = row is not rows[0]
            entry["against_first"] = paired_difference(first[entry["shape"]], entry["prompts"]) if paired else None


def _labels(drafts: Sequence[str]) -> list[str]:
    """A run's name or the directory's own; more of the path where that is not enough to tell them apart."""
    parts = [Path(draft).resolve().parts for draft in drafts]
    short = [p[-3] if p[-2] == "export" else p[-1] for p in parts]
    return short if len(set(short)) == len(short) else ["/".join(p[-3:]) for p in parts]


def plot(rows: list[dict[str, Any]]) -> str:
    """SVG: tau with its interval by category, one row per draft and shape."""
    names, columns = [], sorted({name for row in rows for e in row["acceptance"] for name in e["by_category"]})
    series: dict[str, list[tuple[float, float, float] | None]] = {name: [] for name in ("all", *columns)}
    for label, row in zip(_labels([row["draft"] for row in rows]), rows, strict=True):
        for entry in row["acceptance"]:
            names.append(f"{label} {entry['shape']}")
            for name, values in series.items():
                value = entry["all"] if name == "all" else entry["by_category"].get(name)
                told = value is not None and value["tau"] is not None
                values.append(
                    (value["tau"], value["low"] or value["tau"], value["high"] or value["tau"]) if told else None
                )
    return interval_plot("tau, 95 % intervals over prompts", "tau", names, series)


def compare(run: "Run", drafts: Sequence[Path], reading: Reading = "auto") -> list[dict[str, Any]]:
    """Print the table; write compare/compare.json and compare.svg."""
    if run.recipe.target.engine != "transformers":
        raise TargetError(
            "target.engine: compare decodes with the embedded engine; where the target fits into this process, give "
            "--target.engine transformers"
        )
    prompts = run.path("prompts", "evaluation.jsonl")
    if not prompts.exists():
        raise DataError(f"compare: {prompts} is missing; run: draftsmith prompts RECIPE")
    own = [run.draft_directory] if (run.draft_directory / "model.safetensors").exists() else []
    directories = list(dict.fromkeys([*own, *drafts]))
    if len(directories) < 2:
        raise DataError(f"compare: {len(directories)} draft found; give others with --drafts DIRECTORY [DIRECTORY ...]")
    for directory in directories:  # one that is no draft is told before any is measured
        load_draft(directory, layers=run.target.identity.num_layers, reading=reading)
    out = run.path("compare")
    rows = [measure(run, directory, out, reading) for directory in directories]
    for row in rows:
        row["predicted"] = with_speed(run, row)
    pair_up(rows)
    files.write_json(out / "compare.json", {"created_with": run.created_with, "drafts": rows})
    files.write_atomic(out / "compare.svg", str(plot(rows)))
    print(f"{describe(rows)}\n\ncompare: {out / 'compare.json'}, {out / 'compare.svg'}")
    return rows
