"""`draftsmith plan RECIPE`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from draftsmith.commands.base import RecipeCommand, Run
from draftsmith.core.errors import DataError
from draftsmith.core.recipe_model import Positive


class Plan(RecipeCommand):
    """Bytes, memory, hours and machines of a run, before anything runs."""

    hardware: str | None = None
    """A machine by name (h100-1, h100-nvlink-8, h200-1, h200-nvlink-4, h200-nvlink-8, a100-1, rtx4090-1, pcie-p2p-8,
    pcie-host-8, cpu-epyc-2), or a probe's JSON file; left out: the run's probe.json."""
    trainer_gpus: Positive | None = None
    """GPUs that train; left out: those of one machine."""
    completion_tokens: Positive | None = None
    """Mean length of the target's answers; left out: 43 % of regenerate.max_new_tokens."""
    network_gbit: Annotated[float, Field(gt=0)] | None = None
    """Network between target and trainer, in Gbit/s; left out: 25."""
    against: Path | None = None
    """A finished run directory: print what was planned beside what it really took."""

    def __call__(self, run: Run) -> int:
        from draftsmith.core.run_files import RunFiles
        from draftsmith.runs.estimates import costs_of, plan_of
        from draftsmith.runs.plan import against, page, page_against

        costs = costs_of(run, self.hardware)
        plan = plan_of(run, costs, self.trainer_gpus, self.completion_tokens, self.network_gbit)
        print(f"{run.recipe.name} on {costs.name}\n\n{page(plan)}")
        if self.against is not None:
            rows = against(plan, RunFiles(self.against))
            if not rows:
                raise DataError(f"--against: {self.against} holds no finished run")
            print(f"\n{page_against(rows)}")
        return 0
