"""The commands around a run: probe, predict, tune. Each prints, and writes a JSON file into the run directory."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from draftsmith import files
from draftsmith.decoding.tree import Shape
from draftsmith.errors import DataError, RecipeError
from draftsmith.hardware.accept_length import AcceptLength, from_results, published
from draftsmith.hardware.cost_model import Costs, MeasuredCosts, RooflineCosts
from draftsmith.hardware.predict import advice, candidate_shapes, describe, heat_map, table, to_dict
from draftsmith.hardware.presets import PRESETS, Machine, preset
from draftsmith.hardware.sizes import DraftSize, TargetSize, target_config
from draftsmith.progress import say
from draftsmith.recipe import DraftShape, Recipe

if TYPE_CHECKING:
    from draftsmith.decoding.speculate import Eagle3Drafter
    from draftsmith.hardware.plan import Plan
    from draftsmith.hardware.tune import Tried
    from draftsmith.pipeline import Run
    from draftsmith.targets.servers import ServedTarget

PROBE_PROMPTS = 24


def parse_shape(text: str) -> Shape:
    """`3/4/8` as users write it; raises `RecipeError`."""
    try:
        steps, topk, tokens = (int(part) for part in text.split("/"))
        DraftShape(steps=steps, topk=topk, draft_tokens=tokens)
    except ValueError as error:
        why = str(error).splitlines()
        told = f": {why[2].strip().removeprefix('Value error, ').split(' [')[0]}" if len(why) > 2 else ""
        raise RecipeError(f"--shape: {text!r} given; write steps/topk/draft_tokens, such as 3/4/8{told}") from None
    return Shape(steps, topk, tokens)


# --- probe -----------------------------------------------------------------------------------------------------------


def _prompts(run: "Run", count: int) -> list[list[int]]:
    """Prompts as the target reads them: the run's evaluation prompts, or those of the package before there is a run."""
    from draftsmith.data.prompts import gather
    from draftsmith.data.regenerate import open_conversations
    from draftsmith.data.templates import ChatFormat
    from draftsmith.evaluation.evaluate import balanced

    held_out = run.path("prompts", "evaluation.jsonl")
    if not held_out.exists():
        gather(run.recipe, held_out.parent)
    chosen = balanced(list(files.read_jsonl(held_out)), count)
    chat = ChatFormat(run.tokenizer, run.recipe.target.template)
    return [c.ids for c in open_conversations(chosen, chat, run.recipe.regenerate.max_prompt_tokens)]


def _any_drafter(run: "Run") -> "Eagle3Drafter":
    """The run's draft, or an untrained one of the recipe's shape: a step takes the same time."""
    import torch

    from draftsmith.decoding.speculate import Eagle3Drafter
    from draftsmith.drafts.eagle3 import Eagle3Draft
    from draftsmith.evaluation.evaluate import drafter_for
    from draftsmith.targets.ends import DTYPES
    from draftsmith.training.trainer import draft_config

    recipe, target = run.recipe, run.target
    if (run.draft_directory / "model.safetensors").exists():
        return drafter_for(target, run.draft_directory, recipe.target.dtype)
    size = min(recipe.vocab.size, target.identity.vocab_size)
    draft = Eagle3Draft(draft_config(recipe, target.config, target.identity.num_layers, size))
    draft = draft.to(target.device, DTYPES[recipe.target.dtype])
    return Eagle3Drafter(draft, torch.arange(size), target.embedding_rows())


def probe(run: "Run", url: str | None, draft_url: str | None) -> dict[str, Any]:
    """Measure and write probe.json, or probe-ENGINE.json for a server."""
    from draftsmith.hardware import probe as probing

    recipe = run.recipe
    machine = run.created_with["hardware"]
    name = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    if url is not None:
        engine = recipe.serve.engine
        wish = run.serving_shape(engine)
        s = Shape(wish.steps, wish.topk, wish.draft_tokens)
        prompts = _prompts(run, PROBE_PROMPTS)
        parts = probing.probe_server(url, engine, prompts, recipe.server.api_key_env, draft_url, s)
        out = run.path(f"probe-{engine}.json")
        where = f"{engine} at {url}"
    else:
        if recipe.target.engine != "transformers":
            raise DataError(
                "probe: the target runs on servers, so give --url; or predict for a machine by name: --hardware NAME"
            )
        from draftsmith.targets.ends import DTYPES

        drafter, prompts = _any_drafter(run), _prompts(run, 3)
        parts = probing.probe_embedded(run.target, drafter, max(prompts, key=len))
        parts |= probing.measure_machine(run.target.device, DTYPES[recipe.target.dtype])
        out, where = run.path("probe.json"), name
    parts = {**parts, "machine": where, "created_with": run.created_with}
    files.write_json(out, parts)
    print(f"{probing.describe(parts)}\n\nprobe: {out}")
    return parts


# --- predict ---------------------------------------------------------------------------------------------------------


def draft_size(recipe: Recipe, config: Any) -> DraftSize:
    from draftsmith.training.trainer import draft_config

    text = config.get_text_config()
    size = min(recipe.vocab.size, text.vocab_size)
    return DraftSize.of(draft_config(recipe, text, text.num_hidden_layers, size))


def roofline(recipe: Recipe, machine: Machine, correlation: float = 0.0) -> RooflineCosts:
    wish = recipe.target
    config = target_config(wish.model, wish.revision, wish.trust_remote_code)
    target = TargetSize.of(wish.model, config, wish.dtype)
    return RooflineCosts(machine, target, draft_size(recipe, config), correlation)


def costs_of(run: "Run", hardware: str | None, correlation: float) -> Costs:
    """A preset's name, a probe's file, or None for the run's own probe.json."""
    if hardware in PRESETS:
        return roofline(run.recipe, preset(hardware), correlation)
    path = Path(hardware) if hardware else run.path("probe.json")
    if not path.is_file():
        if hardware:
            raise RecipeError(f"--hardware: {hardware!r} given; a probe's JSON file or one of {', '.join(PRESETS)}")
        raise DataError(
            f"--hardware: {path} is missing; run: draftsmith probe RECIPE, or name one of {', '.join(PRESETS)}"
        )
    parts = files.read_json(path)
    if not isinstance(parts, dict) or "forward" not in parts:
        raise RecipeError(f"--hardware: {path} is not a probe; make one with: draftsmith probe RECIPE")
    if parts["draft"] is None:
        raise RecipeError(f"--hardware: {path} holds no draft's times; probe again with --draft-url")
    return MeasuredCosts(parts)


def accept_of(run: "Run", tau: float | None, shape: str) -> AcceptLength:
    if tau is not None:
        return published(tau, parse_shape(shape))
    results = run.path("evaluate", "results.json")
    if not results.exists():
        raise DataError(f"predict: {results} is missing; give a published accept length: --tau 2.6 --shape 3/4/8")
    return from_results(files.read_json(results))


def predict(
    run: "Run",
    hardware: str | None,
    tau: float | None,
    shape: str,
    batches: Sequence[int],
    context: int,
    correlation: float,
) -> dict[str, Any]:
    """Print the table and one sentence; write predict/NAME.json and the heat map beside it."""
    if not 0 <= correlation <= 1:
        raise RecipeError(f"--correlation: {correlation:g} given; between 0 (independent experts) and 1 (the same)")
    if min(batches, default=0) < 1 or context < 1:
        raise RecipeError("--batches and --context: whole numbers of at least 1")
    costs, accept = costs_of(run, hardware, correlation), accept_of(run, tau, shape)
    chains_only = isinstance(costs, MeasuredCosts) and costs.parts["engine"] == "vllm"
    if isinstance(costs, MeasuredCosts) and max(batches) > costs.batches:
        say("predict: the embedded engine decodes one sequence at a time; only batch 1 is told")
        batches = [1]
    rows = table(costs, accept, candidate_shapes(accept.deepest, not chains_only), batches, context)
    told = advice(rows, costs, accept)
    result = to_dict(rows, told, costs, context)
    name = hardware if hardware in PRESETS else Path(hardware or "probe.json").stem
    out = run.path("predict", f"{name}.json")
    files.write_json(out, result)
    files.write_atomic(out.with_suffix(".svg"), heat_map(rows, f"{run.recipe.target.model} on {costs.name}"))
    print(f"{describe(rows)}\n\n{told}\n\npredict: {out}, {out.with_suffix('.svg')}")
    return result


def card_prediction(run: "Run") -> dict[str, Any]:
    """What the card tells of realised speed-up: the evaluated shapes at batch 1 on every preset that holds the target,
    and on this machine where it was probed."""
    places = [run.path(name, "results.json") for name in ("evaluate", "evaluate-sglang", "evaluate-vllm")]
    found = next((path for path in places if path.exists()), None)
    if found is None:
        raise DataError(f"card: no results in {run.directory}; run: draftsmith evaluate RECIPE")
    results = files.read_json(found)
    try:
        accept = from_results(results)
    except RecipeError:  # nothing greedy was measured, so nothing can be told
        return {"sentence": "", "rows": []}
    shapes = [parse_shape(name) for name in dict.fromkeys(e["shape"] for e in results["acceptance"])]
    size = roofline(run.recipe, preset("h100-1")).target
    single = size.bytes < 0.6 * preset("h100-1").memory_bytes
    machines: list[Costs] = [
        roofline(run.recipe, machine)
        for machine in PRESETS.values()
        if (machine.gpus == 1) == single and size.bytes < 0.8 * machine.memory_bytes * machine.gpus
    ]
    if run.path("probe.json").exists():
        machines.append(MeasuredCosts(files.read_json(run.path("probe.json"))))
    told = [(costs, table(costs, accept, shapes, [1], 512)) for costs in machines]
    return {
        "sentence": "; ".join(advice(rows, costs, accept) for costs, rows in told),
        "rows": [{"machine": costs.name, **p.to_dict()} for costs, rows in told for row in rows for p in row],
    }


# --- tune ------------------------------------------------------------------------------------------------------------


def _seeds(run: "Run", count: int, chains_only: bool) -> list[Shape]:
    """The shapes that `predict` thinks best; without a probe, by this machine's nearest likeness: a single GPU."""
    accept = accept_of(run, None, "")
    probed = run.path("probe.json")
    costs: Costs = MeasuredCosts(files.read_json(probed)) if probed.exists() else roofline(run.recipe, preset("h100-1"))
    rows = table(costs, accept, candidate_shapes(accept.deepest, not chains_only), [1], 512)
    return [row[0].shape for row in rows[:count]]


def tune(run: "Run", engine: Literal["embedded", "vllm", "sglang"], budget_s: float) -> dict[str, Any]:
    """Measure, print the verdict and write tune-ENGINE.json, which `serve` reads."""
    from draftsmith.hardware import tune as tuning

    if engine == "embedded":
        tried = _tune_embedded(run, budget_s)
    else:
        tried = _tune_served(run, engine, budget_s)
    if not tried:
        raise DataError("tune: no shape could be measured in the time given; raise --budget-s")
    result = tuning.verdict(tried, engine, run.created_with["hardware"])
    out = run.path(f"tune-{engine}.json")
    files.write_json(out, {**result, "created_with": run.created_with})
    for row in result["tried"]:
        print(f"{row['shape']:>9} {row['speedup']:5.2f}x  {row['prompts']} prompts")
    print(f"\n{tuning.sentence(result)}\n\ntune: {out}")
    return result


def _tune_embedded(run: "Run", budget_s: float) -> list["Tried"]:
    from draftsmith.decoding.sampling import Sampling
    from draftsmith.evaluation.evaluate import SHORTEST_TIMED, Evaluation
    from draftsmith.hardware.tune import halve

    evaluation = Evaluation(run.recipe, run.target, run.draft_directory, run.path("prompts", "evaluation.jsonl"))
    length = run.recipe.evaluate.max_new_tokens

    def per_token(shape: Shape | None, number: int) -> float | None:
        decoder = evaluation.speculative if shape else evaluation.plain
        made = decoder.generate(evaluation.prompts[number][2], Sampling(), length, shape, ends=evaluation.ends)
        return made.seconds / (len(made.ids) - 1) if len(made.ids) > SHORTEST_TIMED else None

    @contextlib.contextmanager
    def session(shape: Shape) -> Iterator[Callable[[int], float | None]]:
        def ratio(number: int) -> float | None:
            plain, drafted = per_token(None, number), per_token(shape, number)
            return plain / drafted if plain and drafted else None

        ratio(0)  # warm
        yield ratio

    return halve(_seeds(run, 8, False), session, len(evaluation.prompts), budget_s)


def _tune_served(run: "Run", engine: Literal["vllm", "sglang"], budget_s: float) -> list["Tried"]:
    """A server for every shape, beside one of the target alone; each start counts as time, so few shapes are tried."""
    from draftsmith.decoding.sampling import Sampling
    from draftsmith.evaluation.evaluate import SHORTEST_TIMED
    from draftsmith.evaluation.served import ServedEvaluation
    from draftsmith.hardware.tune import halve

    out = run.path(f"tune-{engine}")
    out.mkdir(parents=True, exist_ok=True)
    served = ServedEvaluation(run.recipe, engine, run.draft_for(engine), run.path("prompts", "evaluation.jsonl"), out)
    length = run.recipe.evaluate.max_new_tokens
    with served.server(None, None) as plain:
        prompts = served.open_prompts(plain)

        def per_token(target: "ServedTarget", number: int) -> float | None:
            started = time.perf_counter()
            (made,) = served.complete(target, prompts[number : number + 1], "tune", Sampling(), length, 1)
            spent = time.perf_counter() - started
            return spent / len(made.ids) if len(made.ids) > SHORTEST_TIMED else None

        @contextlib.contextmanager
        def session(shape: Shape) -> Iterator[Callable[[int], float | None]]:
            wish = DraftShape(steps=shape.steps, topk=shape.topk, draft_tokens=shape.draft_tokens)
            with served.server(None, wish) as drafted:

                def ratio(number: int) -> float | None:
                    one, other = per_token(plain, number), per_token(drafted, number)
                    return one / other if one and other else None

                ratio(0)  # warm
                yield ratio

        return halve(_seeds(run, 4, engine == "vllm"), session, len(prompts), budget_s)


# --- plan ------------------------------------------------------------------------------------------------------------


def plan(run: "Run", hardware: str | None, trainer_gpus: int | None, against: Path | None) -> "Plan":
    """Print the plan; with `against`, a finished run's figures beside it."""
    from draftsmith.hardware import plan as planning
    from draftsmith.hardware.probe import as_machine
    from draftsmith.training.trainer import draft_config

    recipe, wish = run.recipe, run.recipe.target
    costs = costs_of(run, hardware, 0.0)
    config = target_config(wish.model, wish.revision, wish.trust_remote_code)
    if isinstance(costs, MeasuredCosts):
        if "flops_s" not in costs.parts:
            raise RecipeError("--hardware: a plan needs a probe of a machine, not of a server; or one by name")
        machine = as_machine(costs.parts)
    else:
        machine = preset(hardware or "")
    if trainer_gpus is not None and trainer_gpus < 1:
        raise RecipeError(f"--trainer-gpus: {trainer_gpus} given; at least 1")
    text = config.get_text_config()
    draft = draft_config(recipe, text, text.num_hidden_layers, min(recipe.vocab.size, text.vocab_size))
    target = TargetSize.of(wish.model, config, wish.dtype)
    told = planning.plan(recipe, costs, machine, target, draft, trainer_gpus)
    print(f"{recipe.name} on {costs.name}\n\n{planning.describe(told)}")
    if against is not None:
        rows = planning.against(told, against)
        if not rows:
            raise DataError(f"--against: {against} holds no finished run")
        print(f"\n{planning.describe_against(rows)}")
    return told
