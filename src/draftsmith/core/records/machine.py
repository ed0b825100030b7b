"""What is measured and told of machines."""

from draftsmith.core.files import JsonObject
from draftsmith.core.records.base import Decodes, Number, Points, Record
from draftsmith.core.records.run import Provenance
from draftsmith.core.shape import DraftSampling, Shape


class Link(Record):
    """How a pair of GPUs is joined."""

    pair: tuple[int, int]
    peer_access: bool
    nvlink: bool | None
    """null without the NVML bindings."""


class MachineRates(Record):
    """The machine alone."""

    gpus: int
    memory_bytes: int
    bandwidth_bytes_s: float
    """Of a copy: reading and writing."""
    flops_s: float
    launch_s: float
    """The smallest kernel."""
    all_reduce: Points
    """(bytes, seconds)."""
    topology: list[Link]


class DraftTimes(Record):
    """Of drafting; either the parts of a step, or what a server's steps take by requests at once."""

    extend: Points = ()
    """(verified tokens, seconds) of reading them."""
    first_s: float = 0.0
    """The first guess."""
    step: Points = ()
    """(top-k, seconds) of each further one."""
    by_batch: Points = ()
    """(requests at once, seconds of one draft step)."""


class ModelTimes(Record):
    context: int
    """Cached tokens while it was measured."""
    context_s: float
    """Seconds more per further token."""
    forward: Points
    """(tokens, seconds) of one forward of the target, head included."""
    draft: DraftTimes | None
    overhead_plain_s: float = 0.0
    """Of a decoding step beside the models."""
    overhead_drafted: Points = ((1.0, 0.0),)
    """(verified tokens, seconds)."""
    batched: Points = ()
    """(sequences, seconds) of one step of regeneration, sampling included."""


class Probe(Record):
    """probe.json, probe-ENGINE.json: what a speed-up depends on, measured. Needs no trained draft."""

    engine: Decodes | None
    """null for a machine alone."""
    machine: str
    created_with: Provenance | None = None
    rates: MachineRates | None = None
    times: ModelTimes | None = None
    target: str | None = None
    """The model that the times are of; null where there are none, or nobody tells."""
    dtype: str | None = None
    """Of that model."""
    draft: JsonObject | None = None
    """Configuration of the draft that was timed in this process."""


class Tried(Record):
    """A shape with its drafts taken in one way."""

    shape: Shape
    drafts: DraftSampling = "greedy"
    speedup: float
    """Median over prompts."""
    prompts: int

    def __str__(self) -> str:
        """`3/1/4, sampled drafts`"""
        return f"{self.shape}{', sampled drafts' if self.drafts == 'sampled' else ''}"


class Tuned(Record):
    """tune-ENGINE.json, which `serve` reads."""

    engine: Decodes
    draft: str | None
    """Digest of its weights."""
    temperature: float = 0.0
    """Of the texts, with evaluate.top_p and top_k; at 0 the ways of taking drafts are one."""
    best: Tried | None
    """The fastest on this engine; null where plain decoding is faster. Another engine takes the fastest that it can."""
    tried: list[Tried]
    created_with: Provenance


class Prediction(Record):
    """One shape at one batch; times are those of one step."""

    machine: str
    shape: Shape
    batch: int
    context: int
    tau: float
    decode_s: float
    verify_s: Number
    draft_s: float
    overhead_s: float
    c: Number
    """A step's cost in plain decoding steps."""
    speedup: Number
    """tau / c"""
    batches: str = ""
    """Where it pays, in words."""


class Predictions(Record):
    """predict/MACHINE.json, and predict/card.json of what the card shows."""

    sentence: str = ""
    rows: list[Prediction]
