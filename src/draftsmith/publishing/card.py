"""The model card: README.md for the hub. Every figure on it is read from the run's own files."""

import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from draftsmith.core import files, run_files
from draftsmith.core.errors import CheckpointError, DataError, RecipeError
from draftsmith.core.history import recipe_that_ran, results_of
from draftsmith.core.progress import say
from draftsmith.core.recipe import Recipe, RegenerateRecipe
from draftsmith.core.records.data import CompletionsSummary, Coverage, PromptsSummary
from draftsmith.core.records.evaluation import Results
from draftsmith.core.records.machine import Predictions
from draftsmith.core.records.training import TrainingSummary
from draftsmith.data.licences import UNSTATED, Licence, data_licences, hub_name, licence_of
from draftsmith.data.sources import HUB
from draftsmith.drafts import METHODS
from draftsmith.drafts.directories import inspect_draft
from draftsmith.engines import ENGINES, SERVERS
from draftsmith.engines.server import ServerEngine
from draftsmith.evaluation.lossless import lossless_verdict
from draftsmith.runs.run import Run


class Verbatim(str):
    """Markdown of our own."""


def as_text(value: Any) -> str:
    """A value of a file or recipe as Markdown that shows it as it is: one line, no markup, no end of a table's cell."""
    if isinstance(value, Verbatim):
        return value
    plain = re.sub(r"\s+", " ", str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = re.sub(r"([\\`*|\[\]#~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", plain)
    return re.sub(r"^( ?\d*)([-+.)])(?= )", r"\1\\\2", plain)  # where a list would begin


def _fenced(text: str, language: str = "") -> Verbatim:
    """A block of code that nothing in it can close."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return Verbatim(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def base_model(recipe: Recipe) -> str:
    """The target's name on the hub; raises `RecipeError` for a directory that is not named."""
    name = recipe.card.base_model or hub_name(recipe.target.model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
        raise RecipeError(
            f"card.base_model: target.model {recipe.target.model!r} is no hub name, and the card links to the target; "
            "set card.base_model to owner/name"
        )
    return name


def _public_recipe(recipe: Recipe) -> str:
    """Without what belongs to this machine: servers, their flags and keys, directories."""
    values = recipe.model_dump(mode="json", exclude={"server", "serve", "device", "card"})
    values["evaluate"] = {k: v for k, v in values["evaluate"].items() if k not in ("engine", "url", "plain_url")}
    values["target"]["model"] = base_model(recipe)
    if start := recipe.train.from_draft:
        values["train"]["from_draft"] = Path(start).name
    for chosen in values["evaluate"]["sets"]:
        chosen["path"] = chosen["path"] and Path(chosen["path"]).name
    for source in (*values["prompts"]["sources"], *values["prompts"]["evaluation"]):
        source["name"] = Path(source["name"]).name
    return yaml.safe_dump(values, sort_keys=False, width=120)


def _losslessness(found: Iterable[tuple[str, Results]]) -> list[str]:
    words = {"yes": "Lossless", "ties": "Lossless up to ties", "no": "NOT lossless"}
    verdicts = [(engine, lossless_verdict(results.lossless)) for engine, results in found]
    lines = [f"{words[v.state]} on {engine}: {v.detail}." for engine, v in verdicts if v.state != "untested"]
    return lines or ["Losslessness was not measured."]


def _command(run: Run, engine: ServerEngine) -> dict[str, str]:
    """What `serve` runs, with the hub's names instead of this machine's paths, and what there is to say of it."""
    repo = run.recipe.card.repo or f"OWNER/{run.recipe.name}"
    launched = run.serving(engine=engine.name, elsewhere=(base_model(run.recipe), Path(repo)))
    words = list(launched.command)
    if words[0] == sys.executable:
        words[0] = "python"
    environment = dict(launched.environment)
    note = ""
    if "PYTHONPATH" in environment and engine.models:
        environment["PYTHONPATH"] = f"$DRAFTSMITH/{engine.models.parent.name}/{engine.models.name}"
        note = engine.models_note
    line = " ".join([*(f"{k}={v}" for k, v in environment.items()), *map(shlex.quote, words)])
    title = engine.title if engine.drafts_trees else f"{engine.title} (chains only)"
    return {"title": title, "line": _fenced(line.replace(" --", " \\\n    --")), "note": Verbatim(note)}


def _head(recipe: Recipe, target: str, licence: Licence, found: list[Results]) -> ModelCardData:
    """The card's front matter, as the hub reads it."""
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=name or "prompts",
            dataset_name=name or f"{results.settings.prompts} prompts held out of training",
            metric_type="accept_length",
            metric_name=f"tau at {entry.setting}, on {ENGINES[results.settings.engine].title}",
            metric_value=round(entry.all.tau, 3),
        )
        for results in found
        for name, entry in results.entries
        if entry.all.tau is not None
    ]
    return ModelCardData(
        base_model=target,
        license=licence.id,
        license_name=licence.name if licence.id == "other" else None,
        license_link=licence.link if licence.id == "other" else None,
        pipeline_tag="text-generation",
        tags=[recipe.draft.method, "speculative-decoding", "draft-model", *sorted(SERVERS)],
        datasets=sorted({HUB[s.name].path for s in recipe.prompts.sources if s.name in HUB}) or None,
        model_name=(recipe.card.repo or recipe.name).split("/")[-1] if measured else None,
        eval_results=measured or None,
        ignore_metadata_errors=False,
    )


def _sampling(settings: RegenerateRecipe, written: CompletionsSummary) -> str:
    how = f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, top-k {settings.top_k or 'off'}"
    greedy = (written.greedy_tokens or 0) / written.completion_tokens
    return how + (f", {greedy:.0%} of them greedily" if settings.temperature and greedy else "")


def make_card(run: Run, prediction: Predictions) -> str:
    """The card's text; raises `RecipeError` where the target's licence is unknown, `DataError` unevaluated."""
    recipe = recipe_that_ran(run.files, run.recipe)
    target = base_model(recipe)
    licence = licence_of(target, recipe.card.licence)
    measured = results_of(run.files)
    found = list(measured.values())
    if not found:
        raise DataError(f"card: no results in {run.files.root}; run: draftsmith evaluate RECIPE")
    report = inspect_draft(run.files.draft)
    prompts = PromptsSummary.load(run.files.stage("prompts") / run_files.SUMMARY)
    written = CompletionsSummary.load(run.files.completions / run_files.SUMMARY)
    provenance = report.config.get("draftsmith") or {}
    told = {**provenance, **(provenance.get("target") or {})}
    lacking = [f"draftsmith.{key} is missing" for key in ("version", "commit", "taps", "num_layers") if key not in told]
    if problems := report.blocking() or lacking:
        raise CheckpointError(f"card: {run.files.draft}: {problems[0]}; see: draftsmith inspect {run.files.draft}")
    titled = [(ENGINES[results.settings.engine].title, results) for results in found]
    entries = [entry for results in found for entry in results.acceptance]
    sources = sorted(prompts.by_source.items(), key=lambda item: -item[1])
    terms = data_licences([name for name, _ in sources], recipe.card.data_licences)
    if unknown := [source for source, _, terms_of_use in terms if terms_of_use == UNSTATED]:
        say(f"card: the licence of {', '.join(unknown)} is not stated; set card.data_licences")
    method = METHODS[recipe.draft.method]
    template = Environment(
        loader=PackageLoader("draftsmith.publishing", "."), undefined=StrictUndefined, finalize=as_text
    )
    return template.get_template("card.md.j2").render(
        head=Verbatim(_head(recipe, target, licence, found).to_yaml()),
        title=(recipe.card.repo or recipe.name).split("/")[-1],
        target=target,
        licence=licence,
        method=method,
        recipe=recipe,
        recipe_text=_fenced(_public_recipe(recipe), "yaml"),
        report=report,
        provenance=provenance,
        coverage=Coverage.load(run.files.coverage),
        files=run.files,
        places=[run.files.results[engine] for engine in measured],
        named=lambda path: Verbatim(f"`{path.relative_to(run.files.root)}`"),
        first=found[0],
        results=titled,
        categories=sorted({name for entry in entries for name in entry.by_category}),
        sets=[(title, measured) for title, results in titled for measured in results.sets],
        unasked=[(title, name, row) for title, results in titled for name, row in results.entries if row.unasked],
        contexts=sorted({edge for results in found for _, entry in results.entries for edge in entry.by_context}),
        longest=max(entry.longest_context for results in found for _, entry in results.entries),
        hottest=max((entry.temperature for entry in entries), default=0.0),
        losslessness=_losslessness(titled),
        hardware="; ".join(dict.fromkeys(r.timed_on for r in found if r.speed)),
        predicted=prediction.rows,
        commands=[_command(run, SERVERS[name]) for name in sorted(run.draft_engines)],
        prompts=prompts,
        sources=sources,
        data=terms,
        completions=written,
        sampling=_sampling(recipe.regenerate, written),
        training=TrainingSummary.load(run.files.train / run_files.SUMMARY),
    )


def write_card(run: Run, prediction: Predictions) -> Path:
    """Write it where `publish` takes it from: beside the draft."""
    files.write_atomic(run.files.card, make_card(run, prediction))
    return run.files.card
