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

from pathlib import Path
from typing import get_args

from draftsmith.core.recipe import EngineName
from draftsmith.core.records.base import Decodes

STATE = "stage.json"  # of every stage
SUMMARY = "summary.json"  # what a stage says of its output
TIMING, IDENTITY = "timing.json", "identity.json"  # of completions
METRICS, STEP_TIMING = "metrics.jsonl", "timing.jsonl"  # of training
HIDDEN_STATES = "hidden_states"  # of training, captured offline
WEIGHTS = "model.safetensors"  # of a draft
RESULTS = "results.json"  # of an evaluation
DECODERS: tuple[Decodes, ...] = ("embedded", *get_args(EngineName))


def shards(completions: Path) -> list[Path]:
    """The files of completions in a directory, in order."""
    return sorted(completions.glob("[0-9]*.jsonl"))


class RunFiles:
    def __init__(self, root: Path):
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.manifest = root / "manifest.json"
        self.report = root / "report.html"
        self.training_prompts = self.stage("prompts") / "prompts.jsonl"
        self.evaluation_prompts = self.stage("prompts") / "evaluation.jsonl"
        self.completions = self.stage("regenerate")
        self.vocabulary = self.stage("vocab") / "vocab.safetensors"
        self.coverage = self.stage("vocab") / "coverage.json"
        self.train = self.stage("train")
        self.draft = self.stage("export") / "draft"  # for every engine
        self.card = self.draft / "README.md"
        self.sets = root / "sets"
        self.comparison = root / "compare" / "compare.json"

    def stage(self, name: str, engine: Decodes = "embedded") -> Path:
        """The directory of a stage; of `evaluate` the engine's own."""
        if name == "evaluate" and engine != "embedded":
            return self.root / f"evaluate-{engine}"
        return self.root / {"regenerate": "completions"}.get(name, name)

    @property
    def results(self) -> dict[Decodes, Path]:
        """Of every engine that evaluated, the embedded one first."""
        found = {engine: self.stage("evaluate", engine) / RESULTS for engine in DECODERS}
        return {engine: path for engine, path in found.items() if path.exists()}

    def probe(self, engine: Decodes = "embedded") -> Path:
        return self.root / ("probe.json" if engine == "embedded" else f"probe-{engine}.json")

    def tuned(self, engine: Decodes) -> Path:
        return self.root / f"tune-{engine}.json"

    def prediction(self, name: str) -> Path:
        return self.root / "predict" / f"{name}.json"
