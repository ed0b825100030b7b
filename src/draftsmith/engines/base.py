"""What an engine is to draftsmith: what it can do, and sessions in which it decodes.

Another engine is one more file with a class of these (docs/architecture.md); a served one derives from
engines/server.py. Engines are asked through sessions alone, so that what is measured is measured alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from draftsmith.core.errors import DataError, TargetError
from draftsmith.core.progress import say
from draftsmith.core.recipe import Recipe
from draftsmith.core.records.base import Decodes
from draftsmith.core.shape import Shape
from draftsmith.drafts.method import Reading
from draftsmith.targets.base import Target
from draftsmith.targets.local import LocalTarget


@dataclass(frozen=True)
class Setup:
    """What sessions decode with: a run's recipe and draft, and the target where it runs in this process."""

    recipe: Recipe
    draft: Path
    logs: Path
    """Folder for the logs of engines that are started."""
    target: LocalTarget | None = None
    reading: Reading | None = None
    """How to take the taps of a draft that others made."""
    groups: Sequence[str] = ()
    """Cards (CUDA_VISIBLE_DEVICES) of each server that is started; none: one server that sees whatever there is."""


class Engine(ABC):
    """One engine's facts, and its sessions."""

    name: ClassVar[Decodes]
    title: ClassVar[str]
    drafts_trees: ClassVar[bool]
    in_process: ClassVar[bool] = False
    """Whether a session without a draft can lie beside one with it: its target is the one of this process."""
    always_draws: ClassVar[bool] = True
    """False where some of its builds verify greedily at any temperature."""
    tells_of_stopped: ClassVar[bool] = True
    """Whether it tells of its drafting, too, where a stop text ended the answer."""
    tells_with: ClassVar[str] = ""
    """What a server has to be started with before it tells of its drafting."""

    def serves(self, taps: Sequence[int]) -> bool:
        """Whether it can capture at these taps (HF hidden_states)."""
        return True

    @abstractmethod
    def open(self, setup: Setup, shape: Shape | None, url: str | None = None) -> AbstractContextManager[Target]:
        """A session: a target that decodes, with the draft where a shape is given. `url`: a server that was started
        already."""

    def drafts(self, shape: Shape) -> bool:
        return shape.topk == 1 or self.drafts_trees

    def greedy_because(self, shape: Shape, draft: Path) -> str | None:
        """Why it cannot sample this draft at this shape; None where it can."""
        return None

    def draftable(self, shapes: Sequence[Shape], setup: Setup) -> list[Shape]:
        """Those of the shapes that it can draft; says which it cannot, and an error if that is all."""
        target = setup.target if self.in_process else None
        library = target.library if target else None
        if target and library and not library.can_cut_back:
            raise TargetError(
                f"evaluate.engine: {target.identity.architecture} keeps a state that cannot be cut back, so only an "
                "engine verifies its drafts; give --evaluate.engine vllm or sglang"
            )
        who = "transformers' own forward" if library else self.title
        kept = [shape for shape in shapes if self.drafts(shape) and (shape.topk == 1 or not library)]
        if left_out := [str(shape) for shape in shapes if shape not in kept]:
            say(f"evaluate: {', '.join(left_out)} left out; {who} drafts chains only")
        if not kept:
            raise DataError(f"evaluate.shapes: none that {who} can draft; add 3/1/4")
        return kept
