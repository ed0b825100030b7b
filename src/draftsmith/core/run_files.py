"""Where the files of a run lie; what is in them is told by core/records/.

RUN/
    recipe.yaml manifest.json report.html
    prompts/      prompts.jsonl evaluation.jsonl summary.json
    completions/  00000.jsonl ... summary.json timing.json identity.json
    vocab/        vocab.safetensors coverage.json
    train/        checkpoint-NNNNNN/ best/ hidden_states/ tracking/ metrics.jsonl timing.jsonl summary.json
    export/draft/ what engines load, and the model card
    evaluate/     results.json parts/; evaluate-ENGINE/ beside it where another engine was asked for
    sets/         NAME-KEY.json: a named evaluation set as it was read
    compare/ predict/ probe.json probe-ENGINE.json tune-ENGINE.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from draftsmith.core.recipe import EngineName
from draftsmith.core.records.base import Decodes

DECODERS: tuple[Decodes, ...] = ("embedded", *get_args(EngineName))


def shards(completions: Path) -> list[Path]:
    """The files of completions in a directory, in order."""
    return sorted(completions.glob("[0-9]*.jsonl"))


def stage_state(directory: Path) -> Path:
    return directory / "stage.json"


def summary(directory: Path) -> Path:
    """What a stage says of its output."""
    return directory / "summary.json"


def timing(completions: Path) -> Path:
    return completions / "timing.json"


def identity_check(completions: Path) -> Path:
    return completions / "identity.json"


def metrics(train: Path) -> Path:
    return train / "metrics.jsonl"


def step_timing(train: Path) -> Path:
    return train / "timing.jsonl"


def weights(draft: Path) -> Path:
    return draft / "model.safetensors"


def results(evaluation: Path) -> Path:
    return evaluation / "results.json"


@dataclass(frozen=True)
class RunFiles:
    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def stage(self, name: str, engine: Decodes = "embedded") -> Path:
        """The directory of a stage; of `evaluate` the engine's own."""
        if name == "evaluate" and engine != "embedded":
            return self.root / f"evaluate-{engine}"
        return self.root / {"regenerate": "completions"}.get(name, name)

    @property
    def training_prompts(self) -> Path:
        return self.stage("prompts") / "prompts.jsonl"

    @property
    def evaluation_prompts(self) -> Path:
        return self.stage("prompts") / "evaluation.jsonl"

    @property
    def completions(self) -> Path:
        return self.stage("regenerate")

    @property
    def vocabulary(self) -> Path:
        return self.stage("vocab") / "vocab.safetensors"

    @property
    def coverage(self) -> Path:
        return self.stage("vocab") / "coverage.json"

    @property
    def train(self) -> Path:
        return self.stage("train")

    @property
    def draft(self) -> Path:
        """The exported draft, for every engine."""
        return self.stage("export") / "draft"

    @property
    def card(self) -> Path:
        return self.draft / "README.md"

    @property
    def results(self) -> dict[Decodes, Path]:
        """Of every engine that evaluated, the embedded one first."""
        found = {engine: results(self.stage("evaluate", engine)) for engine in DECODERS}
        return {engine: path for engine, path in found.items() if path.exists()}

    def probe(self, engine: Decodes = "embedded") -> Path:
        return self.root / ("probe.json" if engine == "embedded" else f"probe-{engine}.json")

    def tuned(self, engine: Decodes) -> Path:
        return self.root / f"tune-{engine}.json"

    def prediction(self, name: str) -> Path:
        return self.root / "predict" / f"{name}.json"

    @property
    def sets(self) -> Path:
        return self.root / "sets"

    @property
    def comparison(self) -> Path:
        return self.root / "compare" / "compare.json"
