"""What a drafting method is to the rest of draftsmith. A folder beside this file holds one (docs/architecture.md).

Shapes: T tokens, R chains, K taps, H hidden, V target vocabulary, D draft vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from draftsmith.core.files import JsonObject
from draftsmith.core.recipe import DraftRecipe, TrainRecipe
from draftsmith.core.records.base import Record
from draftsmith.core.shape import Shape
from draftsmith.core.taps import Taps
from draftsmith.decoding.speculate import Drafter
from draftsmith.drafts.packing import Pack
from draftsmith.drafts.tensors import Shapes

Reading = Literal["auto", "inputs", "outputs"]
"""How layer ids of a draft that others made are meant: of layer inputs, of layer outputs, or by the key they have."""


class DraftConfig(Record, ABC):
    """What every draft has, whatever its method; what it weighs, and what its steps and its training cost, in bf16 as
    it is served."""

    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    taps: Taps
    max_position_embeddings: int
    target_hidden_size: int | None = None
    """Width of the taps where it is not the draft's own."""

    @property
    def tap_size(self) -> int:
        return self.target_hidden_size or self.hidden_size

    @property
    def needs(self) -> str:
        """What its card tells of engines that cannot serve it; nothing where those of any age can."""
        return ""

    @property
    def head(self) -> float:
        """Parameters of the output head."""
        return float(self.draft_vocab_size) * self.hidden_size

    @property
    @abstractmethod
    def parameters(self) -> float:
        """Without the few thousand of the norms."""

    @property
    @abstractmethod
    def kv_bytes_per_token(self) -> float: ...

    @abstractmethod
    def forwards(self, shape: Shape) -> list[tuple[int, float]]:
        """(tokens of each sequence, weights that they pass) of every forward that drafting this shape once takes;
        engines run the first over all verified tokens, right or wrong."""

    @abstractmethod
    def optimiser_bytes(self, train: TrainRecipe) -> float:
        """Its moments, in fp32."""

    @abstractmethod
    def activation_bytes(self, train: TrainRecipe, gpu: bool) -> float:
        """The most that one pack holds, its inputs included, above weights, gradients and optimiser; where every token
        of it is trained on."""

    @abstractmethod
    def training_flops(self, train: TrainRecipe, steps: float, tokens: float, loss_tokens: float) -> float:
        """Of its matrix products, forward and backward, and of the teacher's."""

    @abstractmethod
    def attention_flops(self, train: TrainRecipe, pairs: float) -> float:
        """Of attention, forward and backward, where queries see `pairs` keys of the target's tokens in all."""


class Example(NamedTuple):
    """Of guesses of the target's next state. taps [T, K, H] of some tokens; embeds [T, H] of the tokens after them;
    last [T, H]: the head's inputs at those."""

    taps: Tensor
    embeds: Tensor
    last: Tensor


class Draft(nn.Module):
    """Its parameters are what is trained; their names are those of the checkpoint file."""

    method: ClassVar[str]
    """Its name in recipes."""
    config: DraftConfig
    head: ClassVar[str] = "lm_head"
    """Prefix of the output head's parameters."""

    def initialise(self, head_rows_DH: Tensor, norm_gain_H: Tensor, generator: torch.Generator) -> None:
        """Start from the target's own head rows and the gain of its final norm."""
        raise NotImplementedError

    @property
    def fits(self) -> bool:
        """Whether anything is solved for before it is trained."""
        return False

    def fit(self, examples: Iterable[Example], norm_gain_H: Tensor, softcap: float | None = None) -> None:
        """Solve for it, once it is initialised. `softcap`: of target logits."""
        raise NotImplementedError

    def logits(self, output: Tensor) -> Tensor:
        """Draft logits [..., D] from an output [..., H] of `Method.guesses`."""
        raise NotImplementedError


@dataclass
class DraftReport:
    """What a draft directory holds, and everything wrong with it. Lines that start with `note:` are harmless.

    Of a method that draftsmith does not read only `method`, `config` and the tensors' shapes and dtypes are told.
    """

    directory: Path
    method: str
    """In words, such as EAGLE-3."""
    config: JsonObject
    shapes: Shapes
    dtypes: dict[str, str]
    parameters: int = 0
    taps: list[int] | None = None
    draft: DraftConfig | None = None
    ids_D: Tensor | None = None
    problems: list[str] = field(default_factory=list)
    serving: list[str] = field(default_factory=list)
    """Those of the problems that spoil serving alone; the draft itself is whole."""

    def blocking(self, lenient: bool = False) -> list[str]:
        """Problems without notes; `lenient` leaves out those of serving."""
        return [p for p in self.problems if not p.startswith("note:") and not (lenient and p in self.serving)]


@dataclass(frozen=True)
class Method:
    """What a method's folder offers. Its drafts and configurations are classes of its own, which nobody else names."""

    name: str
    """In recipes: draft.method."""
    title: str
    architecture: str
    """The class that engines serve it with."""

    config: Callable[[DraftRecipe, Any, int, int], DraftConfig]
    """(recipe, the target's `transformers` text config, its layers, draft vocabulary) -> the draft's configuration."""
    config_note: Callable[[DraftRecipe, Any], str | None]
    """(recipe, text config) -> one line where the shape is neither the recipe's nor the target's own; else None."""
    read_config: Callable[[JsonObject], DraftConfig]
    """Of a training checkpoint."""

    build: Callable[[Any], Draft]
    loss: Callable[[Any, TrainRecipe], nn.Module]
    """A module: (PackInputs, weight of a scored row at every depth) -> (loss, alpha of each depth's scored rows)."""
    guesses: Callable[[Any, Pack, Tensor, Tensor, int], list[Tensor]]
    """(draft, pack, taps [T, K, H], embeddings [T, H], depths) -> outputs [R, H] of every depth, as serving would
    compute them; row r of depth i guesses token chains[r] + 2 + i."""
    drafter: Callable[[Any, Tensor, Tensor], Drafter]
    """(draft, target ids [D] of its rows, embeddings [V, H]) -> what decoding drives."""

    files: Callable[[Any, Tensor, int, JsonObject], tuple[JsonObject, dict[str, Tensor]]]
    """(draft, target ids [D], the target's layers, provenance) -> (config.json, tensors) as every engine loads them."""
    inspect: Callable[[DraftReport], None]
    """Fill in what only a draft of this method has, and name everything wrong with it."""
    taps: Callable[[DraftReport, int, Reading], Taps]
    """(report, the target's layers, reading) -> the taps of a draft that others made."""
    facts: Callable[[DraftReport], list[tuple[str, str]]]
    """What `inspect` shows of it."""
