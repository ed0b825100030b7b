"""What training writes."""

from typing import Literal

from draftsmith.core.files import JsonObject
from draftsmith.core.records.base import Record
from draftsmith.core.records.run import TargetIdentity


class HeldOut(Record):
    """Teacher-forced on completions that are never trained on; lists are by depth."""

    match: list[float]
    """Share of first choices that the target wrote."""
    alpha: list[float]
    """Mean of sum min(p, q), the chance that a sampled draft is accepted. p is the target's own with train.objective
    lk_* or train.true_probabilities; renormalised over the draft vocabulary, as it is otherwise, it makes alpha too
    high."""
    tau: dict[int, float]
    """Of a chain of so many steps along the written text."""
    verifications: int


class MetricsRow(Record):
    """A row of train/metrics.jsonl; the same for the same recipe and data."""

    step: int
    loss: float | None = None
    gradient_norm: float | None = None
    learning_rate: float | None = None
    alpha: list[float] | None = None
    held_out: HeldOut | None = None


class StepTiming(Record):
    """A row of train/timing.jsonl."""

    step: int
    tokens: int
    seconds: float
    cpu_seconds: float | None = None
    """Of all threads of the process that writes."""


class Best(Record):
    """The highest held-out tau so far."""

    step: int
    tau_held_out: float


class Belongs(Record):
    """What a checkpoint must agree on to be continued."""

    method: str
    draft: JsonObject
    """The method's own configuration."""
    vocabulary: str
    target: TargetIdentity
    train: JsonObject
    """The recipe's part, without what is only watched or kept."""
    seed: int
    data: str
    start: str | None = None
    """Content of the draft that it went on from."""


class TrainingState(Record):
    """train/checkpoint-NNNNNN/state.json and train/best/state.json"""

    belongs: Belongs
    step: int
    status: Literal["preview", "converged"] = "preview"
    taus: list[float] = []
    """Held-out, of every evaluation so far."""
    quarantined: list[str] = []
    """Documents with NaN or Inf in their hidden states."""
    best: Best | None = None


class TrainingSummary(Record):
    """train/summary.json"""

    steps: int
    parameters: int
    completions: int
    held_out_completions: int
    completions_left_out: int
    """Without any loss token within train.max_document_tokens."""
    completions_cut: int
    tokens: int
    quarantined: list[str]
    status: Literal["preview", "converged"]
    tau_held_out: float | None
    best: Best | None
    checkpoint: str
