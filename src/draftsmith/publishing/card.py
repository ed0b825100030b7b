"""The model card: README.md for the hub. Every figure on it is read from the run's own files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from draftsmith import files
from draftsmith.drafts.checkpoint import inspect_draft
from draftsmith.errors import DataError
from draftsmith.publishing.licences import data_licences, hub_name, licence_of
from draftsmith.recipe import dump_recipe
from draftsmith.serving.launch import SGLANG_MODELS, Engine, launch

if TYPE_CHECKING:
    from draftsmith.pipeline import Run

ENGINES = {"evaluate": "draftsmith", "evaluate-vllm": "vLLM", "evaluate-sglang": "SGLang"}


def _quality(engine: str, entry: dict[str, Any], categories: Sequence[str], partial: str) -> dict[str, Any]:
    def short(value: dict[str, Any] | None) -> str:
        return "-" if value is None or value["tau"] is None else f"{value['tau']:.2f}"

    whole = entry["all"]
    return {
        "engine": engine + partial,
        "shape": entry["shape"],
        "temperature": f"{entry['temperature']:g}",
        "tau": short(whole),
        "interval": "-" if whole["tau"] is None else f"{whole['low']:.2f} to {whole['high']:.2f}",
        "by_category": {name: short(entry["by_category"].get(name)) for name in categories},
        "depths": " / ".join("-" if share is None else f"{share:.2f}" for share in entry["acceptance_by_depth"]),
    }


def _losslessness(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, results in found.items():
        proof, engine = results["lossless"], ENGINES[name]
        if proof is None:
            continue
        shapes = ", ".join(dict.fromkeys(proof["shapes"]))
        asked = f"{proof['prompts']} prompts x {proof['tokens_per_prompt']} tokens in {proof['dtype']}, shapes {shapes}"
        if proof["identical"]:
            lines.append(f"Lossless on {engine}: greedy output identical with and without the draft on {asked}.")
        else:
            lines.append(
                f"On {engine} greedy output differs in {len(proof['differences'])} places with the draft ({asked}); "
                "in bf16 that happens at near ties of the target's own logits, in fp32 it should not."
            )
    return "\n\n".join(lines) or "Losslessness was not measured."


def _command(run: "Run", engine: Engine) -> str:
    """What `serve` runs, with the hub's names instead of this machine's paths."""
    target = hub_name(run.recipe.target.model)
    settings = run.recipe.serve.model_copy(
        update={"engine": engine, "shape": run.serving_shape(engine), "program": "", "extra": "", "port": 8000}
    )
    repo = run.recipe.card.repo or f"OWNER/{run.recipe.name}"
    both = run.path("export", "draft").exists()
    draft = Path(repo if both else f"{repo.split('/')[-1]}/{engine}")
    if engine == "vllm" and settings.shape.topk != 1:
        from draftsmith.recipe import DEFAULT_SHAPE

        settings = settings.model_copy(update={"shape": DEFAULT_SHAPE})
    launched = launch(run.recipe.model_copy(update={"serve": settings}), target, draft, "draft", ())
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
    licence = licence_of(recipe.target.model, recipe.card.licence)
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
    if licence.id == "other" and licence.name:
        licence_lines += [f"license_name: {licence.name}", f"license_link: {licence.link}"]
    commands = {engine: _command(run, engine) for engine in ("sglang", "vllm")}  # type: ignore[arg-type]
    hardware = first["created_with"]["hardware"]
    sampling = recipe.regenerate
    temperatures = [e["temperature"] for r in found.values() for e in r["acceptance"]]
    return (
        Environment(loader=PackageLoader("draftsmith.publishing", "."), undefined=StrictUndefined)
        .get_template("card.md.j2")
        .render(
            target=hub_name(recipe.target.model),
            title=(recipe.card.repo or recipe.name).split("/")[-1],
            licence=licence,
            licence_lines=licence_lines,
            data_sets=[hub for _, hub, _ in data if hub],
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
            dtype=settings.get("dtype", recipe.target.dtype),
            categories=categories,
            quality=[
                _quality(
                    ENGINES[name],
                    entry,
                    categories,
                    f" ({r['settings']['prompts']} of {r['settings']['prompts_available']} prompts)"
                    if r["partial"]
                    else "",
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
                    "plain": f"{s['plain_tokens_per_s']:.1f}",
                    "drafted": f"{s['drafted_tokens_per_s']:.1f}",
                    "speedup": f"{s['speedup']:.2f}x",
                    "tau": f"{s['tau']:.2f}" if s["tau"] else "-",
                }
                for name, r in found.items()
                for s in r["speed"]
            ],
            hardware=", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores",
            predicted=[
                {**row, "c": f"{row['c']:.2f}", "speedup": f"{row['speedup']:.2f}x"} for row in prediction["rows"]
            ],
            sglang=commands["sglang"],
            vllm=commands["vllm"],
            plugin="SGLANG_EXTERNAL_MODEL_PACKAGE" in commands["sglang"],
            directories=[] if run.path("export", "draft").exists() else ["sglang", "vllm"],
            training_prompts=prompts["prompts"],
            sources=sources,
            completions=written["completions"],
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
            recipe=dump_recipe(recipe),
            hottest=f"T={max(temperatures):g}" if temperatures and max(temperatures) else "",
            data=data,
            author=recipe.card.author,
        )
    )


def write_card(run: "Run", prediction: dict[str, Any]) -> Path:
    """Write it where `publish` takes it from: beside the draft, or above the two engines' directories."""
    both = run.path("export", "draft")
    path = (both if both.exists() else run.path("export")) / "README.md"
    files.write_atomic(path, make_card(run, prediction))
    return path
