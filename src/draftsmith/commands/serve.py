"""`draftsmith serve RECIPE`."""

from typing import Literal

from draftsmith.commands.base import RecipeCommand, Run


class Serve(RecipeCommand):
    """Start vLLM or SGLang with the run's draft, and stop it on Ctrl-C."""

    purpose: Literal["draft", "plain", "capture", "last"] = "draft"
    """draft: what users run; plain: the target alone; capture: the target keeping hidden states for `train`; last:
    SGLang's other half of it."""
    print: bool = False
    """Print the command instead of running it."""

    def __call__(self, run: Run) -> int:
        from draftsmith.engines.process import serve

        launched = run.serving(self.purpose)
        if self.print:
            print(launched)
            return 0
        return serve(launched, run.recipe.serve.patience_s)
