"""What a run's stages were made of: their recipes as they ran, and the files they wrote as they were written."""

from pathlib import Path

from draftsmith.core.files import JsonObject, digest
from draftsmith.core.progress import say
from draftsmith.core.recipe import Recipe
from draftsmith.core.recipe_file import parse_recipe
from draftsmith.core.records.base import Decodes
from draftsmith.core.records.evaluation import Results
from draftsmith.core.records.run import Output, StageState
from draftsmith.core.run_files import STATE, WEIGHTS, RunFiles

PARTS = {  # of the recipe, that a stage decides
    "prompts": ("prompts",),
    "regenerate": ("target", "regenerate", "seed"),
    "vocab": ("vocab",),
    "train": ("draft", "train"),
    "evaluate": ("evaluate",),
}
# What others add later, what may be thrown away, and what goes on growing.
NOT_OUTPUT = {"stage.json", "README.md", "parts", "hidden_states", "tracking"}


def recipe_that_ran(run: RunFiles, recipe: Recipe) -> Recipe:
    """The recipe with every part as its stage ran with it: what was done, not what was typed last."""
    values = recipe.model_dump(mode="json")
    for stage, parts in PARTS.items():
        state = StageState.readable(run.stage(stage) / STATE)
        if state is not None and state.finished:
            values |= {part: state.recipe[part] for part in parts if part in state.recipe}
    return parse_recipe(values, str(run.root))


def target_part(recipe: JsonObject) -> JsonObject:
    """What a recipe says of its target; who runs it does not change what it is."""
    return {key: value for key, value in recipe["target"].items() if key != "engine"}


def draft_digest(draft: Path) -> str | None:
    """Content of an exported draft's weights."""
    return digest(draft / WEIGHTS) if (draft / WEIGHTS).is_file() else None


def results_of(run: RunFiles) -> dict[Decodes, Results]:
    """What `evaluate` measured of the exported draft, by the engine that was asked for, the embedded one first.

    Measurements of another draft, trained before, are left out and named.
    """
    draft = draft_digest(run.draft)
    standing: dict[Decodes, Results] = {}
    for engine, path in run.results.items():
        found = Results.readable(path)
        if found is None:
            continue
        if None not in (draft, found.settings.draft) and found.settings.draft != draft:
            say(f"{path} is of another draft and left out; evaluate it again, or move its directory away")
            continue
        standing[engine] = found
    return standing


def outputs_of(directory: Path) -> dict[str, Output]:
    """Every file that a finished stage answers for."""
    found = {}
    for path in sorted(directory.rglob("*")):
        place = path.relative_to(directory)
        hidden = any(part.startswith(".") or part in NOT_OUTPUT for part in place.parts)
        if path.is_file() and not hidden and path.suffix not in (".log", ".unused"):
            status = path.stat()
            found[str(place)] = Output(size=status.st_size, mtime_ns=status.st_mtime_ns, digest=digest(path))
    return found


def changed(directory: Path, outputs: dict[str, Output]) -> list[str]:
    """Files that are missing or not as they were written. One of the same size and time is taken for the same."""

    def same(path: Path, known: Output) -> bool:
        if not path.is_file() or path.stat().st_size != known.size:
            return False
        return path.stat().st_mtime_ns == known.mtime_ns or digest(path) == known.digest

    return [name for name, known in outputs.items() if not same(directory / name, known)]
