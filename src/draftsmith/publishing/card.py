"""The model card: README.md for the hub. Every figure on it is read from the run's own files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from draftsmith import files
from draftsmith.data.prompts import HUB
from draftsmith.drafts.checkpoint import inspect_draft
from draftsmith.errors import DataError, RecipeError
from draftsmith.evaluation.lossless import lossless_verdict
from draftsmith.progress import say
from draftsmith.publishing.licences import UNSTATED, data_licences, hub_name, licence_of
from draftsmith.recipe import Recipe
from draftsmith.serving.launch import SGLANG_MODELS, Engine

if TYPE_CHECKING:
    from draftsmith.run import Run

ENGINES = {"evaluate": "draftsmith", "evaluate-vllm": "vLLM", "evaluate-sglang": "SGLang"}


def _machine(results: dict[str, Any]) -> str:
    hardware = results["created_with"]["hardware"]
    return ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"


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
    told = recipe.model_dump(mode="json", exclude={"server", "serve", "device", "card"})
    told["evaluate"] = {k: v for k, v in told["evaluate"].items() if k not in ("engine", "url", "plain_url")}
    told["target"]["model"] = base_model(recipe)
    for source in (*told["prompts"]["sources"], *told["prompts"]["evaluation"]):
        source["name"] = Path(source["name"]).name
    return yaml.safe_dump(told, sort_keys=False, width=120)


def _quality(engine: str, entry: dict[str, Any], categories: Sequence[str], results: dict[str, Any]) -> dict[str, Any]:
    def short(value: dict[str, Any] | None) -> str:
        return "-" if value is None or value["tau"] is None else f"{value['tau']:.2f}"

    whole, settings = entry["all"], results["settings"]
    partial = f" ({settings['prompts']} of {settings['prompts_available']} prompts)" if results["partial"] else ""
    return {
        "engine": engine + partial,
        "dtype": settings["dtype"],
        "shape": entry["shape"],
        "temperature": f"{entry['temperature']:g}",
        "tau": short(whole),
        "interval": "-" if whole["low"] is None else f"{whole['low']:.2f} to {whole['high']:.2f}",
        "by_category": {name: short(entry["by_category"].get(name)) for name in categories},
        "depths": " / ".join("-" if share is None else f"{share:.2f}" for share in entry["acceptance_by_depth"]),
    }


def _losslessness(found: dict[str, dict[str, Any]]) -> str:
    words = {"yes": "Lossless", "ties": "Lossless up to ties", "no": "NOT lossless"}
    verdicts = {ENGINES[name]: lossless_verdict(results["lossless"]) for name, results in found.items()}
    lines = [f"{words[v.state]} on {engine}: {v.detail}." for engine, v in verdicts.items() if v.state != "untested"]
    return "\n\n".join(lines) or "Losslessness was not measured."


def _command(run: "Run", engine: Engine) -> str:
    """What `serve` runs, with the hub's names instead of this machine's paths."""
    serve = run.recipe.serve.model_copy(update={"program": "", "extra": "", "port": 8000, "host": "127.0.0.1"})
    public = type(run)(run.recipe.model_copy(update={"serve": serve}), run.directory, run.command)
    repo = run.recipe.card.repo or f"OWNER/{run.recipe.name}"
    launched = public.serving(engine=engine, model=base_model(run.recipe), draft=Path(repo))
    words = list(launched.command)
    if engine == "sglang":
        words[0] = "python"
    environment = dict(launched.environment)
    if "PYTHONPATH" in environment:
        environment["PYTHONPATH"] = f"$DRAFTSMITH/{SGLANG_MODELS.parent.name}/{SGLANG_MODELS.name}"
    line = " ".join([*(f"{k}={v}" for k, v in environment.items()), *(_quoted(word) for word in words)])
    return line.replace(" --", " \\\n    --")


def _quoted(word: str) -> str:
    return f"'{word}'" if any(c in word for c in ' {}"') else word


def make_card(run: "Run", prediction: dict[str, Any]) -> str:
    """The card's text; raises `RecipeError` where the target's licence is unknown, `DataError` unevaluated."""
    recipe = run.recipe
    target = base_model(recipe)
    licence = licence_of(target, recipe.card.licence)
    found = {
        name: files.read_json(path)
        for name in ENGINES
        if (path := run.path(name, "results.json")).exists()
    }  # fmt: skip
    if not found:
        raise DataError(f"card: no results in {run.directory}; run: draftsmith evaluate RECIPE")
    first = next(iter(found.values()))
    settings = first["settings"]
    categories = sorted({name for r in found.values() for e in r["acceptance"] for name in e["by_category"]})
    prompts, written, trained = (
        files.read_json(run.path(*parts))
        for parts in (("prompts", "summary.json"), ("completions", "summary.json"), ("train", "summary.json"))
    )
    report = inspect_draft(run.draft_directory)
    config, made = report.config, report.config["draftsmith"]
    coverage = files.read_json(run.path("vocab", "coverage.json"))
    shares = dict(zip(coverage["sizes"], coverage["coverage"]["all"], strict=True))
    share = shares.get(config["draft_vocab_size"])
    sources = sorted(prompts["by_source"].items(), key=lambda item: -item[1])
    data = data_licences([name for name, _ in sources], recipe.card.data_licences)
    licence_lines = [f"license: {licence.id}"]
    if licence.id == "other":
        licence_lines += [f"license_name: {licence.name}", f"license_link: {licence.link}"]
    commands = {name: _command(run, name) for name in sorted(run.draft_engines)}
    sampling = recipe.regenerate
    temperatures = [e["temperature"] for r in found.values() for e in r["acceptance"]]
    return (
        Environment(loader=PackageLoader("draftsmith.publishing", "."), undefined=StrictUndefined)
        .get_template("card.md.j2")
        .render(
            target=target,
            title=(recipe.card.repo or recipe.name).split("/")[-1],
            licence=licence,
            licence_lines=licence_lines,
            data_sets=sorted({HUB[s.name].path for s in recipe.prompts.sources if s.name in HUB}),
            status=trained["status"],
            parameters=report.parameters,
            size=f"{2 * report.parameters / 1e6:.0f} MB",
            taps=list(made["taps"]),
            layers=made["target"]["num_layers"],
            draft_vocabulary=config["draft_vocab_size"],
            vocabulary=config["vocab_size"],
            coverage=None if share is None else f"{share:.1%}",
            partial=first["partial"],
            prompts=settings["prompts"],
            prompts_available=settings["prompts_available"],
            max_new_tokens=settings["max_new_tokens"],
            target_dtype=recipe.target.dtype,
            categories=categories,
            quality=[
                _quality(
                    ENGINES[name],
                    entry,
                    categories,
                    r,
                )
                for name, r in found.items()
                for entry in r["acceptance"]
            ],
            losslessness=_losslessness(found),
            speed=[
                {
                    "engine": ENGINES[name],
                    "shape": s["shape"],
                    "batch": s.get("batch", 1),
                    "dtype": s["dtype"],
                    "prompts": s["prompts"],
                    "tokens": s["tokens"],
                    "plain": f"{s['plain_tokens_per_s']:.1f}",
                    "drafted": f"{s['drafted_tokens_per_s']:.1f}",
                    "speedup": f"{s['speedup']:.2f}x",
                    "tau": f"{s['tau']:.2f}" if s["tau"] else "-",
                }
                for name, r in found.items()
                for s in r["speed"]
            ],
            hardware="; ".join(dict.fromkeys(f"{_machine(r)}" for r in found.values() if r["speed"])),
            predicted=[
                {**row, "c": f"{row['c']:.2f}", "speedup": f"{row['speedup']:.2f}x"} for row in prediction["rows"]
            ],
            sglang=commands.get("sglang"),
            vllm=commands.get("vllm"),
            plugin="SGLANG_EXTERNAL_MODEL_PACKAGE" in commands.get("sglang", ""),
            training_prompts=prompts["prompts"],
            sources=sources,
            completions=written["completions"],
            trained_on=trained["completions"],
            completion_tokens=written["completion_tokens"],
            sampling=f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k or 'off'}"
            + (f", {sampling.greedy_share:.0%} of the shards greedy" if sampling.greedy_share else ""),
            ttt_steps=recipe.train.ttt_steps,
            objective=recipe.train.objective,
            optimizer=recipe.train.optimizer,
            learning_rate=f"{recipe.train.learning_rate:g}",
            steps=trained["steps"],
            tokens=trained["tokens"],
            max_document_tokens=recipe.train.max_document_tokens,
            version=made["version"],
            commit=made["commit"],
            seed=recipe.seed,
            recipe=_public_recipe(recipe),
            hottest=f"T={max(temperatures):g}" if temperatures and max(temperatures) else "",
            data=data,
            author=recipe.card.author,
        )
    )


def write_card(run: "Run", prediction: dict[str, Any]) -> Path:
    """Write it where `publish` takes it from: beside the draft."""
    path = run.draft_directory / "README.md"
    files.write_atomic(path, make_card(run, prediction))
    sources = files.read_json(run.path("prompts", "summary.json"))["by_source"]
    unknown = [s for s, _, terms in data_licences(sources, run.recipe.card.data_licences) if terms == UNSTATED]
    if unknown:
        say(f"card: the licence of {', '.join(unknown)} is not stated; set card.data_licences")
    return path
