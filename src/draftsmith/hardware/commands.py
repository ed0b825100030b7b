"""The commands around a run: probe, predict, tune. Each prints, and writes a JSON file into the run directory."""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from draftsmith import files
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.tree import Shape
from draftsmith.errors import DataError, RecipeError
from draftsmith.hardware.accept_length import AcceptLength, from_results, published
from draftsmith.hardware.configs import target_config
from draftsmith.hardware.cost_model import Costs, MeasuredCosts, RooflineCosts
from draftsmith.hardware.plan import size
from draftsmith.hardware.predict import advice, candidate_shapes, describe, heat_map, table, to_dict, where_it_pays
from draftsmith.hardware.presets import CPU, PRESETS, Machine, preset
from draftsmith.hardware.sizes import DraftSize, TargetSize
from draftsmith.progress import say
from draftsmith.recipe import DraftShape, Recipe

if TYPE_CHECKING:
    from draftsmith.decoding.speculate import Eagle3Drafter
    from draftsmith.hardware.plan import Plan
    from draftsmith.hardware.tune import Tried
    from draftsmith.run import Run
    from draftsmith.targets.servers import ServedTarget

PROBE_PROMPTS = 24
SERVED_SHAPES, SERVED_PROMPTS = 4, 6  # of `tune` on an engine


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
    from draftsmith.recipe import PromptsRecipe

    with tempfile.TemporaryDirectory() as scratch:
        held_out = run.path("prompts", "evaluation.jsonl")
        if not held_out.exists():
            gather(run.recipe.model_copy(update={"prompts": PromptsRecipe()}), Path(scratch))
            held_out = Path(scratch) / "evaluation.jsonl"
        chosen = balanced(list(files.read_jsonl(held_out)), count)
    wish = run.recipe.target
    chat = ChatFormat(run.tokenizer, wish.template, wish.template_options)
    return [c.ids for c in open_conversations(chosen, chat, run.recipe.regenerate.max_prompt_tokens)]


def _any_drafter(run: "Run") -> "Eagle3Drafter":
    """The run's draft, or an untrained one of the recipe's shape: a step takes the same time."""
    import torch

    from draftsmith.decoding.speculate import Eagle3Drafter
    from draftsmith.drafts.eagle3 import Eagle3Draft
    from draftsmith.evaluation.evaluate import drafter_for
    from draftsmith.targets.ends import DTYPES
    from draftsmith.training.shape import draft_config

    recipe, target = run.recipe, run.target
    if (run.draft_directory / "model.safetensors").exists():
        return drafter_for(target, run.draft_directory, recipe.target.dtype)
    rows = min(recipe.vocab.size, target.identity.vocab_size)
    draft = Eagle3Draft(draft_config(recipe, target.config, target.identity.num_layers, rows))
    draft = draft.to(target.device, DTYPES[recipe.target.dtype])
    return Eagle3Drafter(draft, torch.arange(rows), target.embedding_rows())


def probe(run: "Run", url: str | None, draft_url: str | None) -> dict[str, Any]:
    """Measure and write probe.json, or probe-ENGINE.json for a server.

    Without a server and without a target in this process the machine alone is measured, its links included; a
    prediction for it is then a roofline over what was measured.
    """
    if draft_url is not None and url is None:
        raise RecipeError("--draft-url: give --url too, a server of the target alone to compare it with")
    from draftsmith.hardware import probe as probing

    recipe = run.recipe
    machine = run.created_with["hardware"]
    name = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    if url is not None:
        engine = recipe.serve.engine
        chosen = run.serving_shape(engine)
        s = Shape(chosen.steps, chosen.topk, chosen.draft_tokens)
        prompts = _prompts(run, PROBE_PROMPTS)
        parts = probing.probe_server(url, engine, prompts, recipe.server.api_key_env, draft_url, s)
        out, where = run.path(f"probe-{engine}.json"), f"{engine} at {url}"
    else:
        from draftsmith.targets.ends import DTYPES, resolve_device

        if recipe.target.engine == "transformers":
            drafter, prompts = _any_drafter(run), _prompts(run, 3)
            wish = recipe.regenerate
            sampling = Sampling(wish.temperature, wish.top_p, wish.top_k)
            parts = probing.probe_embedded(run.target, drafter, max(prompts, key=len), sampling)
        else:
            parts = dict(probing.NO_MODEL)  # its target runs on servers: --url measures those
        parts |= probing.measure_machine(resolve_device(run.world.device(recipe.device)), DTYPES[recipe.target.dtype])
        out, where = run.path("probe.json"), name
    parts = {**parts, "machine": where, "created_with": run.created_with}
    files.write_json(out, parts)
    print(f"{probing.describe(parts)}\n\nprobe: {out}")
    return parts


# --- predict ---------------------------------------------------------------------------------------------------------


def draft_size(recipe: Recipe, config: Any) -> DraftSize:
    from draftsmith.training.shape import draft_config

    text = config.get_text_config()
    rows = min(recipe.vocab.size, text.vocab_size)
    return DraftSize.of(draft_config(recipe, text, text.num_hidden_layers, rows))


def roofline(recipe: Recipe, machine: Machine, correlation: float = 0.0) -> RooflineCosts:
    wish = recipe.target
    config = target_config(wish.model, wish.revision, wish.trust_remote_code)
    target = TargetSize.of(wish.model, config, wish.dtype)
    return RooflineCosts(machine, target, draft_size(recipe, config), correlation)


PROBES = ("probe.json", "probe-vllm.json", "probe-sglang.json")
RESULTS = ("evaluate", "evaluate-sglang", "evaluate-vllm")


def probed(run: "Run") -> Path | None:
    """The run's own probe, of this machine before one of a server."""
    return next((path for name in PROBES if (path := run.path(name)).exists()), None)


def costs_of(run: "Run", hardware: str | None, correlation: float) -> MeasuredCosts | RooflineCosts:
    """A preset's name, a probe's file, or None for the run's own probe."""
    if hardware in PRESETS:
        return roofline(run.recipe, preset(hardware), correlation)
    path = Path(hardware) if hardware else probed(run)
    if path is None:
        raise DataError(
            f"--hardware: no probe in {run.directory}; run: draftsmith probe RECIPE, or name one of "
            + ", ".join(PRESETS)
        )
    return read_probe(run, path, correlation)


def read_probe(run: "Run", path: Path, correlation: float = 0.0) -> MeasuredCosts | RooflineCosts:
    try:
        parts = files.read_json(path)
    except (OSError, ValueError):
        raise RecipeError(
            f"--hardware: {str(path)!r} given; a probe's JSON file or one of {', '.join(PRESETS)}"
        ) from None
    if not isinstance(parts, dict) or "forward" not in parts:
        raise RecipeError(f"--hardware: {path} is not a probe; make one with: draftsmith probe RECIPE")
    if parts["forward"] is None:
        from draftsmith.hardware.probe import as_machine

        return roofline(run.recipe, as_machine(parts), correlation)
    return MeasuredCosts(parts)


def results_of(run: "Run") -> dict[str, Any] | None:
    """What `evaluate` measured: on the embedded engine, else on a real one."""
    found = next((path for name in RESULTS if (path := run.path(name, "results.json")).exists()), None)
    return files.read_json(found) if found else None


def accept_of(run: "Run", tau: float | None, shape: str) -> AcceptLength:
    if tau is not None:
        return published(tau, parse_shape(shape))
    results = results_of(run)
    if results is None:
        raise DataError(
            f"no accept length in {run.directory}; run: draftsmith evaluate RECIPE, or let predict take a published "
            "one: --tau 2.6 --shape 3/4/8"
        )
    return from_results(results)


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
    engine = costs.parts["engine"] if isinstance(costs, MeasuredCosts) else None
    if isinstance(costs, MeasuredCosts) and costs.parts["draft"] is None:
        raise RecipeError(f"--hardware: the probe of {costs.name} holds no draft's times; probe again with --draft-url")
    if engine == "embedded" and max(batches) > 1:
        say("predict: the embedded engine decodes one sequence at a time; only batch 1 is told")
        batches = [1]
    if engine in ("vllm", "sglang"):
        say(f"predict: {costs.name} was measured at its own prompts' lengths; --context {context} changes nothing")
    if isinstance(costs, RooflineCosts) and not costs.fits:
        say(
            f"predict: {size(costs.target.bytes)} of weights do not fit {costs.machine.gpus} x "
            f"{size(costs.machine.memory_bytes)} of {costs.name}; the figures hold as if they did"
        )
    rows = table(costs, accept, candidate_shapes(accept.deepest, engine != "vllm"), batches, context)
    if math.isnan(rows[0][0].speedup):
        raise RecipeError(
            f"--batches: {batches[0]} given; {costs.name} was measured up to {costs.reach / 2:.0f} tokens"
        )
    told = advice(rows, costs, accept)
    result = to_dict(rows, told, costs, context)
    name = hardware if hardware in PRESETS else (Path(hardware) if hardware else probed(run) or Path("probe")).stem
    out = run.path("predict", f"{name}.json")
    files.write_json(out, result)
    files.write_atomic(out.with_suffix(".svg"), heat_map(rows, f"{run.recipe.target.model} on {costs.name}"))
    print(f"{describe(rows)}\n\n{told}\n\npredict: {out}, {out.with_suffix('.svg')}")
    return result


def card_prediction(run: "Run") -> dict[str, Any]:
    """What the card tells of realised speed-up, and predict/card.json: the evaluated shapes at batch 1 on every preset
    that holds the target, and on this machine where it was probed."""
    results = results_of(run)
    if results is None:
        raise DataError(f"card: no results in {run.directory}; run: draftsmith evaluate RECIPE")
    try:
        accept = from_results(results)
    except RecipeError:  # nothing greedy was measured, so nothing can be told
        return {"rows": []}
    shapes = [parse_shape(name) for name in dict.fromkeys(e["shape"] for e in results["acceptance"])]
    shapes = [shape for shape in shapes if shape.steps <= accept.deepest]
    single = roofline(run.recipe, preset("h100-1")).fits
    presets = [roofline(run.recipe, m) for m in PRESETS.values() if m is not CPU and (m.gpus == 1) == single]
    machines: list[Costs] = [costs for costs in presets if costs.fits]
    if run.path("probe.json").exists():
        machines.append(read_probe(run, run.path("probe.json")))
    rows = []
    for costs in machines:
        for row in table(costs, accept, shapes, [1], 512):
            told = where_it_pays(costs, accept, row[0])
            if isinstance(costs, MeasuredCosts):  # of one sequence at a time
                told = "only batch 1 was probed"
            rows.append({"machine": costs.name, **row[0].to_dict(), "batches": told})
    files.write_json(run.path("predict", "card.json"), {"rows": rows})
    return {"rows": rows}


# --- tune ------------------------------------------------------------------------------------------------------------


def _seeds(run: "Run", count: int, engine: str) -> list[Shape]:
    """The shapes that `predict` thinks best, two chains among them; without a probe of drafting, those of one GPU."""
    accept, own = accept_of(run, None, ""), run.path(f"probe-{engine}.json")
    path = own if own.exists() else probed(run)
    costs: Costs = read_probe(run, path) if path else roofline(run.recipe, preset("h100-1"))
    if isinstance(costs, MeasuredCosts) and costs.parts["draft"] is None:
        costs = roofline(run.recipe, preset("h100-1"))
    rows = table(costs, accept, candidate_shapes(accept.deepest, engine != "vllm"), [1], 512)
    shapes = [row[0].shape for row in rows]
    chains = [shape for shape in shapes if shape.topk == 1][:2]  # vLLM drafts nothing else
    return [shape for shape in shapes if shape not in chains][: count - len(chains)] + chains


def tune(run: "Run", engine: Literal["auto", "embedded", "vllm", "sglang"], budget_s: float) -> dict[str, Any]:
    """Measure, print the verdict and write tune-ENGINE.json, which `serve` reads."""
    from draftsmith.hardware import tune as tuning

    own = run.recipe.target.engine
    if engine == "auto":
        engine = "embedded" if own == "transformers" else own
    accept_of(run, None, "")  # without an evaluation there is nothing to start from
    if engine == "embedded":
        if own != "transformers":
            raise RecipeError(f"--engine: embedded given; the target runs on servers, so give {own}, or leave it out")
        tried = _tune_embedded(run, budget_s)
    else:
        tried = _tune_served(run, engine, budget_s)
    if not tried:
        raise DataError("tune: no shape could be measured in the time given; raise --budget-s")
    result = tuning.verdict(tried, engine, run.created_with["hardware"], run.draft_digest)
    out = run.path(f"tune-{engine}.json")
    files.write_json(out, {**result, "created_with": run.created_with})
    for row in result["tried"]:
        print(f"{row['shape']:>9} {row['speedup']:5.2f}x  {row['prompts']} prompts")
    print(f"\n{tuning.sentence(result)}\n\ntune: {out}")
    return result


def _tune_embedded(run: "Run", budget_s: float) -> list["Tried"]:
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

    return halve(_seeds(run, 8, "embedded"), session, len(evaluation.prompts), budget_s)


def _tune_served(run: "Run", engine: Literal["vllm", "sglang"], budget_s: float) -> list["Tried"]:
    """The target alone first, then a server for every shape, one at a time: each takes the whole machine.

    Starts cost more than measurements, so every shape is started once and measured on the same few prompts.
    """
    from draftsmith.evaluation.served import ServedEvaluation
    from draftsmith.hardware.probe import SHORT, Server
    from draftsmith.hardware.tune import halve

    started, out = time.monotonic(), run.path(f"tune-{engine}")
    out.mkdir(parents=True, exist_ok=True)
    served = ServedEvaluation(run.recipe, engine, run.draft_for(engine), run.path("prompts", "evaluation.jsonl"), out)
    seeds = _seeds(run, SERVED_SHAPES, engine)
    length, key = max(2 * SHORT, run.recipe.evaluate.max_new_tokens), run.recipe.server.api_key_env

    def timer(target: "ServedTarget", prompts: list[list[int]]) -> Callable[[int], float]:
        server = Server(target.replicas[0].url, engine, key)
        server.decode(prompts[:1], SHORT, 2 * SHORT)  # warm
        return lambda number: server.decode(prompts[number : number + 1], SHORT, length)[0]

    with served.server(None, None) as target:
        prompts = [ids for _, _, ids in served.open_prompts(target)[:SERVED_PROMPTS]]
        alone = timer(target, prompts)
        plain_s = [alone(number) for number in range(len(prompts))]

    @contextlib.contextmanager
    def session(shape: Shape) -> Iterator[Callable[[int], float | None]]:
        wish = DraftShape(steps=shape.steps, topk=shape.topk, draft_tokens=shape.draft_tokens)
        with served.server(None, wish) as drafted:
            per_token = timer(drafted, prompts)
            yield lambda number: plain_s[number] / per_token(number)

    left_s = budget_s - (time.monotonic() - started)
    return halve(seeds, session, len(prompts), left_s, first=len(prompts))


# --- plan ------------------------------------------------------------------------------------------------------------


def plan_of(
    run: "Run",
    costs: MeasuredCosts | RooflineCosts,
    trainer_gpus: int | None = None,
    completion_tokens: int | None = None,
    network_gbit: float | None = None,
) -> "Plan":
    """The plan of a run on the machine that the costs are of."""
    from draftsmith.hardware import plan as planning
    from draftsmith.hardware.probe import as_machine
    from draftsmith.training.shape import draft_config, shape_note

    recipe, wish = run.recipe, run.recipe.target
    config = target_config(wish.model, wish.revision, wish.trust_remote_code)
    if isinstance(costs, RooflineCosts):
        machine = costs.machine
    elif "flops_s" in costs.parts:
        machine = as_machine(costs.parts)
    else:
        raise RecipeError(f"--hardware: a plan needs a probe of a machine, not of {costs.name}; or one by name")
    if network_gbit is not None:
        machine = replace(machine, network_bytes_s=network_gbit * 1e9 / 8)
    text = config.get_text_config()
    draft = draft_config(recipe, text, text.num_hidden_layers, min(recipe.vocab.size, text.vocab_size))
    if note := shape_note(recipe, text):
        say(note)
    target = TargetSize.of(wish.model, config, wish.dtype)
    return planning.plan(recipe, costs, machine, target, draft, trainer_gpus, completion_tokens)


def plan(
    run: "Run",
    hardware: str | None,
    trainer_gpus: int | None,
    against: Path | None,
    completion_tokens: int | None = None,
    network_gbit: float | None = None,
) -> "Plan":
    """Print the plan; with `against`, a finished run's figures beside it."""
    from draftsmith.hardware import plan as planning

    for flag, given in (
        ("--trainer-gpus", trainer_gpus),
        ("--completion-tokens", completion_tokens),
        ("--network-gbit", network_gbit),
    ):
        if given is not None and given <= 0:
            raise RecipeError(f"{flag}: {given:g} given; more than 0")
    costs = costs_of(run, hardware, 0.0)
    told = plan_of(run, costs, trainer_gpus, completion_tokens, network_gbit)
    print(f"{run.recipe.name} on {costs.name}\n\n{planning.describe(told)}")
    if against is not None:
        rows = planning.against(told, against)
        if not rows:
            raise DataError(f"--against: {against} holds no finished run")
        print(f"\n{planning.describe_against(rows)}")
    return told
