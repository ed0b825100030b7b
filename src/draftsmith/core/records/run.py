"""What made a run and its files."""

from draftsmith.core.files import JsonObject
from draftsmith.core.records.base import Record


class Hardware(Record):
    cpu: str
    cores: int | None
    gpus: tuple[str, ...]
    system: str

    def first(self, gpus: int | None) -> "Hardware":
        """With so many of its GPUs; None: all."""
        return self.model_copy(update={"gpus": self.gpus[:gpus]})

    def __str__(self) -> str:
        return ", ".join(self.gpus) or f"{self.cpu}, {self.cores} cores"


class Provenance(Record):
    """What made a file."""

    command: str
    commit: str | None
    versions: dict[str, str]
    seed: int
    hardware: Hardware


class TargetIdentity(Record):
    """What a draft belongs to."""

    model: str
    revision: str | None
    dtype: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    tokenizer_hash: str
    template_hash: str
    """Of the tokenizer's own chat template and the options that it is given."""
    quantization: str | None
    """The model's own, such as fp8."""


class Output(Record):
    """A file as its stage wrote it."""

    size: int
    mtime_ns: int
    digest: str


class StageState(Record):
    """STAGE/stage.json: what the stage's last run was made of."""

    key: str
    """Digest of the format version, the stage's part of the recipe and the content of its inputs."""
    resume_key: str
    """The same without what a run may change and still go on."""
    finished: bool
    recipe: JsonObject
    """The whole recipe that the stage ran with."""
    outputs: dict[str, Output] = {}
    """Of a finished stage, by name within its directory."""


class StageRun(Record):
    ran: bool
    why: str
    seconds: float
    peak_memory_bytes: int | None = None
    """Of the process so far."""
    commit: str | None = None
    command: str | None = None


class Manifest(Record):
    """manifest.json: when every stage ran last, and why."""

    created_with: Provenance
    stages: dict[str, StageRun]
