"""What all commands are: models whose fields are their flags, called to run; a call returns the exit code."""

from pathlib import Path
from typing import ClassVar

from draftsmith.core.recipe_model import Model


class Command(Model):
    """The string under each field is its help text."""

    positional: ClassVar[str] = "recipe"


class RecipeCommand(Command):
    """A command about a run, which it is called with. Every key of the recipe is one of its flags, too."""

    recipe: Path
    """YAML file, for example recipes/smollm2-135m-quick.yaml."""
    out: Path | None = None
    """Run directory; left out: runs/NAME."""
