"""Where prompts come from, as a recipe names it. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, model_validator

from draftsmith.core.recipe_model import Model, Positive, path_part

Column = Literal[
    "prompt",
    "messages",
    "conversations",
    "turns",
    "instruction",
    "input",
    "question",
    "problem",
    "system",
    "tools",
    "id",
    "category",
    "source",
]


class Source(Model):
    """One source of prompts; its name alone where nothing else is said of it."""

    name: str
    """`bundled` (495 prompts), `bundled-train` (6,000), `bundled-dev` (180); ultrachat, opencodeinstruct, codealpaca,
    gsm8k or hendrycks-math; a path to .json, .jsonl, .csv, .tsv, .parquet, .arrow or .txt, plain or packed (.gz, .bz2,
    .xz, .zst); a folder of such files; or any data set on the hub as owner/name[:config][:split]."""
    columns: dict[Column, str] = {}
    """Where rows have keys that are not known: ours to theirs, such as {prompt: my_question, system: my_persona}.
    Known without it are prompt, messages, conversations, turns, instruction with input, question and problem, beside
    them system, tools, id, category and source."""
    category: str | None = None
    """Category of rows that carry none."""
    limit: Positive | None = None
    """Take at most this many prompts, chosen by the recipe's seed."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


EVALUATION_SETS = ("mt-bench", "humaneval", "gsm8k", "math500", "alpaca", "spec-bench", "speed-bench")


class EvaluationSet(Source):
    """Prompts that are measured apart, all turns of each."""

    name: Annotated[str, AfterValidator(path_part)]
    """`mt-bench`, `humaneval`, `gsm8k`, `math500`, `alpaca`, `spec-bench` or `speed-bench`; or a name of yours."""
    path: Path | None = None
    """File or folder with the set, as prompts.sources takes them; left out: the hub's."""
    limit: Positive | None = None
    """Prompts used, an equal number per category; left out: evaluate.prompts."""

    @model_validator(mode="after")
    def _known(self) -> "EvaluationSet":
        if self.path is None and self.name not in EVALUATION_SETS:
            raise ValueError(
                f"{self.name!r} given; known are {', '.join(EVALUATION_SETS)}, or give yours a path: "
                f"{{name: {self.name}, path: FILE}}"
            )
        if self.path is None and self.name == "speed-bench":
            raise ValueError(
                "speed-bench has no path; its licence lets nobody pass it on, so prepare it (NVIDIA Model-Optimizer, "
                "examples/specdec_bench: python prepare_data.py --config qualitative) and give {name: speed-bench, "
                "path: data/speed/qualitative}"
            )
        return self
