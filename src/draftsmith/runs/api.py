"""draftsmith from Python: a run's stages, a draft, and decoding with it. See examples/from_python.py."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from draftsmith.core.recipe import Recipe
from draftsmith.core.recipe_file import load_recipe
from draftsmith.core.records.evaluation import Results
from draftsmith.core.run_files import RESULTS
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.drafts.directories import load_draft, ready_draft
from draftsmith.runs.pipeline import run_pipeline, stage_directory
from draftsmith.runs.run import Run
from draftsmith.targets.local import LocalTarget

__all__ = ["decode", "evaluate", "load_draft", "run", "train"]


def _run(recipe: Recipe | Path | str, out: Path | None, last: str) -> Run:
    """All stages up to this one; finished ones are skipped."""
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    finished = Run(chosen, out or Path("runs") / chosen.name, ["python"])
    with closing(finished):
        run_pipeline(finished, last=last)
    return finished


def run(recipe: Recipe | Path | str, out: Path | None = None) -> Path:
    """Prompts to report, as `draftsmith run`; returns the report's path. Raises `DraftsmithError` of one line."""
    return _run(recipe, out, "report").files.report


def train(recipe: Recipe | Path | str, out: Path | None = None) -> Path:
    """Prompts to exported draft; returns the directory that engines and `load_draft` read."""
    return _run(recipe, out, "export").files.draft


def evaluate(recipe: Recipe | Path | str, out: Path | None = None) -> Results:
    """Prompts to measured draft; returns what `evaluate/results.json` holds."""
    finished = _run(recipe, out, "evaluate")
    return Results.load(stage_directory(finished, "evaluate") / RESULTS)


def decode(
    target: LocalTarget,
    prompt: Sequence[int],
    draft: Path | None = None,
    shape: Shape | str = "3/1/4",
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    draft_sampling: DraftSampling = "greedy",
) -> Generation:
    """One completion: token ids, finish reason, draft tokens accepted by every verification step, seconds of decoding.

    Without a `draft` (a directory) the target decodes alone; greedy where `sampling` is left out. `draft_sampling`: how
    drafts are taken above temperature 0, greedy or sampled.
    """
    chosen = Shape.parse(shape) if isinstance(shape, str) else shape
    drafter = ready_draft(target, draft).drafter() if draft else None
    decoder = Decoder(target, drafter, draft_sampling=draft_sampling)
    return decoder.generate(list(prompt), sampling or Sampling(), max_new_tokens, chosen if draft else None, seed=seed)
