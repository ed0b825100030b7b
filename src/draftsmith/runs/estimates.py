"""What a run's files and a machine's name tell before anything runs: costs of a step, accept lengths, plans."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from draftsmith.core import history
from draftsmith.core.errors import DataError, RecipeError
from draftsmith.core.progress import say
from draftsmith.core.records.base import Decodes
from draftsmith.core.records.evaluation import ComparedDraft, Results
from draftsmith.core.records.machine import Predictions, Probe
from draftsmith.core.run_files import DECODERS, WEIGHTS
from draftsmith.core.shape import DraftSampling
from draftsmith.drafts import METHODS
from draftsmith.drafts.directories import inspect_draft
from draftsmith.drafts.method import DraftConfig
from draftsmith.engines import ENGINES, SERVERS
from draftsmith.hardware.accept_length import AcceptLength, from_results
from draftsmith.hardware.cost_model import Costs, MeasuredCosts, RooflineCosts
from draftsmith.hardware.predict import predict_all, where_it_pays
from draftsmith.hardware.presets import CPU, PRESETS, Machine, preset
from draftsmith.hardware.sizes import TargetSize
from draftsmith.runs.plan import Plan, Sizes, plan
from draftsmith.runs.probing import as_machine
from draftsmith.runs.run import Run


def roofline(run: Run, machine: Machine, draft: DraftConfig | None = None) -> RooflineCosts:
    """`draft`: another one than the recipe's."""
    target = TargetSize.of(run.target_config, run.recipe.target.dtype)
    return RooflineCosts(machine, target, draft or run.draft_config)


def current_draft(run: Run) -> DraftConfig:
    """The exported draft, or the one that the recipe describes before there is one."""
    exported = inspect_draft(run.files.draft).draft if (run.files.draft / WEIGHTS).exists() else None
    return exported or run.draft_config


def own_probe(run: Run, draft: DraftConfig | None = None, engines: Sequence[Decodes] = DECODERS) -> Costs | None:
    """The run's own probe, of this machine before one of a server. One of another target, or not of `draft`, is left
    out and named."""
    for engine in engines:
        path = run.files.probe(engine)
        if not path.exists():
            continue
        costs = _read_probe(run, path, draft)
        if not isinstance(costs, str):
            return costs
        again = f"draftsmith probe RECIPE{' --url URL' if engine in SERVERS else ''}"
        say(f"{path} {costs}, so it is left out; run: {again}")
    return None


def costs_of(run: Run, hardware: str | None, draft: DraftConfig | None = None) -> Costs:
    """A preset's name, a probe's file, or None for the run's own probe; `draft`: what a probe has to be of, too."""
    if hardware in PRESETS:
        return roofline(run, preset(hardware))
    if hardware is not None:
        path = Path(hardware)
        costs = _read_probe(run, path, draft)
        if isinstance(costs, str):
            raise RecipeError(f"--hardware: {path} {costs}; make one of this target with: draftsmith probe RECIPE")
        return costs
    own = own_probe(run, draft)
    if own is None:
        raise DataError(
            f"--hardware: no probe of this target in {run.files.root}; run: draftsmith probe RECIPE, or name one of "
            + ", ".join(PRESETS)
        )
    return own


def _read_probe(run: Run, path: Path, draft: DraftConfig | None) -> Costs | str:
    """What its times cost; or in words what else they are of, another target, or not `draft`, where anybody tells."""
    try:
        probe = Probe.load(path)
    except OSError:
        raise RecipeError(
            f"--hardware: {str(path)!r} given; a probe's JSON file or one of {', '.join(PRESETS)}"
        ) from None
    except DataError:
        raise RecipeError(f"--hardware: {path} is not a probe; make one with: draftsmith probe RECIPE") from None
    if probe.times is None and probe.rates is not None:  # a machine alone is good for any target
        return roofline(run, as_machine(probe.machine, probe.rates))
    target = run.recipe.target
    for key, was, asked in (("model", probe.target, target.model), ("dtype", probe.dtype, target.dtype)):
        if was not in (None, asked):
            return f"measured target.{key} {was}, not {asked}"
    if probe.draft is not None and draft is not None:
        timed = METHODS[run.recipe.draft.method].read_config(probe.draft)
        if timed.parameters != draft.parameters:  # those that weigh the same take the same time
            return f"timed a draft of {timed.parameters:,.0f} parameters, not one of {draft.parameters:,.0f}"
    return MeasuredCosts(probe)


def results_of(run: Run) -> Results | None:
    """What `evaluate` measured: on the embedded engine, else on a real one, first one that drafts trees, too."""
    found = history.results_of(run.files)
    trees_first = sorted(found, key=lambda name: not ENGINES[name].drafts_trees)
    return next((found[name] for name in trees_first), None)


def accept_of(run: Run, temperature: float = 0.0, drafts: DraftSampling = "greedy") -> AcceptLength:
    """As `evaluate` measured it."""
    results = results_of(run)
    if results is None:
        raise DataError(
            f"no accept length in {run.files.root}; run: draftsmith evaluate RECIPE, or let predict take a published "
            "one: --tau 2.6 --shape 3/4/8"
        )
    if temperature:
        results = results.model_copy(update={"profile": results.sampled_profile})
    return from_results(results, temperature, drafts)


def plan_of(
    run: Run,
    costs: Costs,
    trainer_gpus: int | None = None,
    completion_tokens: int | None = None,
    network_gbit: float | None = None,
) -> Plan:
    """The plan of a run on the machine that the costs are of."""
    if isinstance(costs, RooflineCosts):
        machine = costs.machine
    elif costs.probe.rates is not None:
        machine = as_machine(costs.name, costs.probe.rates)
    else:
        raise RecipeError(f"--hardware: a plan needs a probe of a machine, not of {costs.name}; or one by name")
    if network_gbit is not None:
        machine = replace(machine, network_bytes_s=network_gbit * 1e9 / 8)
    note = METHODS[run.recipe.draft.method].config_note(run.recipe.draft, run.target_config.get_text_config())
    if note and run.recipe.train.from_draft is None:  # an earlier draft has its own shape
        say(note)
    target = TargetSize.of(run.target_config, run.recipe.target.dtype)
    return plan(Sizes(run.recipe, machine, target, run.draft_config, trainer_gpus, completion_tokens), costs)


def speeds_of(run: Run, draft: ComparedDraft) -> dict[str, float]:
    """Predicted speed-up of the best measured shape, by machine: here, if it was probed, and on one named GPU."""
    config = METHODS[run.recipe.draft.method].read_config(draft.config)
    machines: list[Costs] = [roofline(run, preset("h100-1"), config)]
    machines += filter(None, [own_probe(run, config, DECODERS[:1])])
    try:
        accept = from_results(draft)
    except RecipeError:  # nothing greedy was long enough
        return {}
    shapes = [shape for shape in dict.fromkeys(e.shape for e in draft.acceptance) if shape.steps <= accept.deepest]
    return {costs.name: predict_all(costs, accept, shapes, [1], 512)[0][0].speedup for costs in machines if shapes}


def card_prediction(run: Run) -> Predictions:
    """What the card tells of realised speed-up: the evaluated shapes at batch 1 on every preset that holds the target,
    and on this machine where it was probed."""
    results = results_of(run)
    if results is None:
        raise DataError(f"card: no results in {run.files.root}; run: draftsmith evaluate RECIPE")
    try:
        accept = from_results(results)
    except RecipeError:  # nothing greedy was measured, so nothing can be told
        return Predictions(rows=[])
    shapes = [shape for shape in dict.fromkeys(e.shape for e in results.acceptance) if shape.steps <= accept.deepest]
    single = roofline(run, preset("h100-1")).fits
    presets = [roofline(run, m) for m in PRESETS.values() if m is not CPU and (m.gpus == 1) == single]
    machines: list[Costs] = [costs for costs in presets if costs.fits]
    machines += filter(None, [own_probe(run, current_draft(run), DECODERS[:1])])
    rows = []
    for costs in machines:
        for (prediction,) in predict_all(costs, accept, shapes, [1], 512):
            alone = isinstance(costs, MeasuredCosts)  # of one sequence at a time
            pays = "only batch 1 was probed" if alone else where_it_pays(costs, prediction)
            rows.append(prediction.model_copy(update={"batches": pays}))
    predictions = Predictions(rows=rows)
    predictions.save(run.files.prediction("card"))
    return predictions
