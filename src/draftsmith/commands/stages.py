"""`draftsmith run RECIPE`, and every stage as a command of its own."""

from typing import Literal

from draftsmith.commands import GROUPS
from draftsmith.commands.base import RecipeCommand, Run
from draftsmith.commands.card import Card
from draftsmith.core.errors import RecipeError
from draftsmith.core.recipe import EngineName


class Stages(RecipeCommand):
    """Make a draft model for speculative decoding.

    `run` goes through all stages; a stage's name runs that stage alone. Finished stages are skipped.
    """

    stage: str = "run"
    """run, or one stage."""
    dry_run: bool = False
    """Print the resolved recipe and what each stage would do, then stop."""
    redo: Literal["prompts", "regenerate", "vocab", "train", "export", "evaluate", "report"] | None = None
    """Make this stage's output anew; the old one is kept beside it."""
    check: EngineName | None = None
    """After export: start this engine and compare it with the embedded one, token by token and depth by depth."""

    def __call__(self, run: Run) -> int:
        from draftsmith.runs.check import check, require_check
        from draftsmith.runs.pipeline import explain, run_pipeline

        only = None if self.stage == "run" else self.stage
        if self.dry_run:
            print(explain(run, GROUPS["its stages"], only, self.redo))
            return 0
        if self.check:
            require_check(run, self.check, self.stage)
        run_pipeline(run, only, self.redo)
        if self.check and not check(run, self.check):
            return 1
        if self.stage == "report":
            print(f"report: {run.files.report}")
        if self.stage == "run" and run.processes.main:
            print(f"report: {run.files.report}\ndraft:  {run.files.draft}")
            try:
                Card(recipe=self.recipe)(run)
            except RecipeError as error:  # the draft is done; only its card has to wait
                print(f"card:   none yet; {error}")
            for engine, line in run.serve_commands.items():
                print(f"\nserve it on {engine}:\n  {line}")
        return 0
