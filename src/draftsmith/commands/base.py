"""What all commands are: pydantic models whose fields are their flags, called to run."""

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from draftsmith.runs.run import Run


class Command(BaseModel):
    """The string under each field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    positional: ClassVar[str] = "recipe"


class FreeCommand(Command):
    """A command that needs no recipe; returns the exit code."""

    @abstractmethod
    def __call__(self) -> int: ...


class RecipeCommand(Command):
    """A command about a run; returns the exit code. Every key of the recipe is one of its flags, too."""

    recipe: Path
    """YAML file, for example recipes/smollm2-135m-quick.yaml."""
    out: Path | None = None
    """Run directory; left out: runs/NAME."""

    @property
    def writes(self) -> bool:
        """Whether it writes into the run directory, so that nobody else may meanwhile."""
        return True

    @abstractmethod
    def __call__(self, run: "Run") -> int: ...
