"""`draftsmith predict RECIPE`."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from draftsmith.commands.base import RecipeCommand, Run
from draftsmith.core import files
from draftsmith.core.errors import RecipeError
from draftsmith.core.progress import say
from draftsmith.core.recipe import DEFAULT_SHAPE
from draftsmith.core.recipe_model import Positive, Share
from draftsmith.core.shape import Shape


class Predict(RecipeCommand):
    """Tell the speed-up of every shape and batch size, here or on a named machine, before anyone trains or rents."""

    hardware: str | None = None
    """A machine by name (`plan --help` has them), or a probe's JSON file; left out: the run's probe.json."""
    tau: float | None = None
    """A published accept length instead of the run's own profile; 1 + accepted / steps."""
    shape: Shape = DEFAULT_SHAPE
    """The shape that --tau was measured at: steps/top-k/draft tokens."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Of the requests; above 0 one that `evaluate` measured, with drafts taken as serve.draft_sampling says (of sampled
    ones only chains are told)."""
    batches: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8, 16, 32, 64)
    """Sequences decoded at once."""
    context: Positive = 512
    """Cached tokens of each."""
    correlation: Share = 0.0
    """MoE only: 0 neighbouring tokens choose experts independently, 1 they share them all."""

    def __call__(self, run: Run) -> int:
        """Print the table and one sentence; write predict/NAME.json and the heat map beside it."""
        from draftsmith.core.records.machine import Predictions
        from draftsmith.engines import ENGINES
        from draftsmith.hardware.accept_length import published
        from draftsmith.hardware.cost_model import MeasuredCosts, RooflineCosts
        from draftsmith.hardware.predict import advice, candidate_shapes, heat_map, page, predict_all
        from draftsmith.runs.estimates import accept_of, costs_of, current_draft, results_of
        from draftsmith.runs.plan import size

        costs = costs_of(run, self.hardware, current_draft(run))
        drafts = run.better_drafts(self.shape) if self.temperature else "greedy"
        accept = accept_of(run, self.temperature, drafts) if self.tau is None else published(self.tau, self.shape)
        batches, engine = self.batches, None
        if isinstance(costs, MeasuredCosts):
            engine = ENGINES[costs.probe.engine] if costs.probe.engine else None
            if costs.times.draft is None:
                raise RecipeError(
                    f"--hardware: the probe of {costs.name} holds no draft's times; probe again with --draft-url"
                )
        if engine and engine.in_process and max(batches) > 1:
            say("predict: the embedded engine decodes one sequence at a time; only batch 1 is told")
            batches = (1,)
        elif engine and not engine.in_process:
            say(
                f"predict: {costs.name} was measured at its own prompts' lengths; --context {self.context} changes "
                "nothing"
            )
        if isinstance(costs, RooflineCosts):
            costs = replace(costs, correlation=self.correlation)
            if not costs.fits:
                say(
                    f"predict: {size(costs.target.bytes)} of weights do not fit {costs.machine.gpus} x "
                    f"{size(costs.machine.memory_bytes)} of {costs.name}; the figures hold as if they did"
                )
        shapes = candidate_shapes(accept.deepest, drafts == "greedy" and (engine is None or engine.drafts_trees))
        rows = predict_all(costs, accept, shapes, batches, self.context)
        if math.isnan(rows[0][0].speedup):
            raise RecipeError(
                f"--batches: {batches[0]} given; {costs.name} was measured up to {costs.reach / 2:.0f} tokens"
            )
        sentence = advice(rows, costs)
        if self.temperature and self.tau is None:
            measured = results_of(run)
            sentence += f"; at T={self.temperature:g}{measured.settings.filters if measured else ''}, {drafts} drafts"
        own = run.files.probe(engine.name if engine else "embedded")
        out = run.files.prediction(Path(self.hardware or own).stem)
        Predictions(sentence=sentence, rows=[prediction for row in rows for prediction in row]).save(out)
        picture = out.with_suffix(".svg")
        files.write_atomic(picture, heat_map(rows, f"{run.recipe.target.model} on {costs.name}"))
        print(f"{page(rows)}\n\n{sentence}\n\npredict: {out}, {picture}")
        return 0
