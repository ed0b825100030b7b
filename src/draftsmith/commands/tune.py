"""`draftsmith tune RECIPE`."""

from typing import Annotated

from pydantic import Field

from draftsmith.commands.base import RecipeCommand, Run
from draftsmith.core.errors import RecipeError
from draftsmith.core.recipe import DecoderName


class Tune(RecipeCommand):
    """Find the fastest shape, and the faster way to take drafts, by measuring at the highest of evaluate.temperatures;
    `serve` takes what is found."""

    engine: DecoderName = "auto"
    """What decodes: the embedded engine, or servers started as `serve` does; auto: what `evaluate` decodes with."""
    budget_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds after which the best so far is taken; starts of engines count."""

    def __call__(self, run: Run) -> int:
        """Measure, print the verdict and write tune-ENGINE.json, which `serve` reads."""
        from draftsmith.core.tables import table
        from draftsmith.runs.tuning import sentence, tune

        run.tell_unasked_url("tune")
        own = run.recipe.target.engine
        engine = run.engine_of("evaluate") if self.engine == "auto" else self.engine
        if engine == "embedded" and own != "transformers":
            raise RecipeError(f"--engine: embedded given; the target runs on servers, so give {own}, or leave it out")
        tuned, out = tune(run, engine, self.budget_s), run.files.tuned(engine)
        tuned.save(out)
        rows = [(str(tried), f"{tried.speedup:.2f}x", f"{tried.prompts} prompts") for tried in tuned.tried]
        print(f"{table(rows, right=(0, 1))}\n\n{sentence(tuned)}\n\ntune: {out}")
        return 0
