"""What all commands about a run are; each command is a model whose fields are its flags, and a call returns the exit
code. The string under each field is its help text."""

from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.core.recipe_model import Model

if TYPE_CHECKING:
    from draftsmith.runs.run import Run as Run
else:
    Run = object  # it imports torch, and help and wrong flags are told without


class RecipeCommand(Model):
    """A command about a run, which it is called with. Every key of the recipe is one of its flags, too."""

    recipe: Path
    """YAML file, for example recipes/smollm2-135m-quick.yaml."""
    out: Path | None = None
    """Run directory; left out: runs/NAME."""
