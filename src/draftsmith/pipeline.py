"""The steps as stages that meet through files: run what is missing or changed, skip the rest.

A stage is a function from files to files in a directory of its own. `stage.json` in that directory holds the key of
the last finished run: a digest of the code's format version, the stage's part of the recipe and the content of its
inputs. An unchanged key skips the stage; another key moves the old directory aside, so that nothing produced is lost.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from draftsmith import files
from draftsmith.allocator import return_freed_memory
from draftsmith.errors import DataError
from draftsmith.progress import say
from draftsmith.recipe import BOOKKEEPING, dump_recipe
from draftsmith.run import Run, commit

FORMAT = 2  # raise when a stage's output changes meaning


def _peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Stage:
    """`key` and `inputs` decide whether it runs; `resume_key` whether its directory can be continued."""

    name: str
    what: str
    key: Callable[["Run"], Any]
    inputs: Callable[["Run"], list[Path]]
    run: Callable[["Run", Path], Any]
    resume_key: Callable[["Run"], Any] | None = None


def _source_files(run: Run) -> list[Path]:
    from draftsmith.data.sources import data_files

    return [path for s in (*run.recipe.prompts.sources, *run.recipe.prompts.evaluation) for path in data_files(s)]


def _prompts(run: Run, out: Path) -> None:
    from draftsmith.data.prompts import gather

    gather(run.recipe, out)


def _regenerate(run: Run, out: Path) -> None:
    from draftsmith.data.regenerate import regenerate
    from draftsmith.data.templates import ChatFormat

    chat = ChatFormat.of(run.recipe, run.target)
    prompts = run.path("prompts", "prompts.jsonl")
    if run.recipe.target.engine == "transformers":
        regenerate(run.recipe, run.target, chat, prompts, out)
    else:
        from draftsmith.data.regenerate_served import ServedRegeneration

        ServedRegeneration(run.recipe, run.target, chat, prompts, out).run()


def _vocab(run: Run, out: Path) -> None:
    from draftsmith.data.vocabulary import build_vocabulary

    size = run.target.identity.vocab_size
    build_vocabulary(run.recipe, run.path("completions"), size, run.special_tokens, out)


def _train(run: Run, out: Path) -> None:
    from draftsmith.data.vocabulary import DraftVocabulary
    from draftsmith.training.trainer import Trainer

    vocabulary = DraftVocabulary.load(run.path("vocab", "vocab.safetensors"))
    Trainer(run.recipe, run.target, run.target.config, run.path("completions"), vocabulary, out, run.world).train()


def _export(run: Run, out: Path) -> None:
    from draftsmith.data.vocabulary import DraftVocabulary
    from draftsmith.publishing.export import export

    vocabulary = DraftVocabulary.load(run.path("vocab", "vocab.safetensors"))
    provenance = {"version": version("draftsmith"), "commit": commit()}
    export(run.path("train"), vocabulary, out, provenance)


def _evaluate(run: Run, out: Path) -> None:
    prompts, engine = run.path("prompts", "evaluation.jsonl"), run.judge
    library = run.target.library if engine == "embedded" else None
    if library is not None and not library.can_cut_back and run.recipe.evaluate.engine == "auto":
        engine = run.recipe.serve.engine
        say(f"evaluate: this target's cache cannot be cut back in this process, so {engine} verifies its drafts")
    if engine == "embedded":
        from draftsmith.evaluation.evaluate import evaluate

        evaluate(run.recipe, run.target, run.draft_directory, prompts, out, run.created_with)
    else:
        from draftsmith.evaluation.served import ServedEvaluation

        ServedEvaluation(run.recipe, engine, run.draft_for(engine), prompts, out).run(run.created_with)


def _report(run: Run, out: Path) -> None:
    from draftsmith.evaluation.report import write_report

    write_report(run.directory, run.tokenizer, run.serve_commands)


def _part(*names: str) -> Callable[[Run], Any]:
    """Key made of these parts of the recipe."""
    return lambda run: {name: run.recipe.model_dump(mode="json")[name] for name in names}


SERVED = {"extra", "tensor_parallel", "context", "draft_quantization"}  # of `serve`, what an evaluation depends on
STAGES = (
    Stage(
        "prompts", "gather, de-duplicate and decontaminate prompts", _part("prompts", "seed"), _source_files, _prompts
    ),
    Stage(
        "regenerate",
        "let the target answer them",
        _part("target", "regenerate", "seed"),
        lambda run: [run.path("prompts", "prompts.jsonl")],
        _regenerate,
        # More tokens of the same run continue it.
        lambda run: {
            "target": run.recipe.target.model_dump(mode="json"),
            "regenerate": run.recipe.regenerate.model_dump(mode="json", exclude={"max_tokens"}),
            "seed": run.recipe.seed,
        },
    ),
    Stage("vocab", "choose the draft vocabulary", _part("target", "vocab"), lambda run: run.completion_files, _vocab),
    Stage(
        "train",
        "train the draft",
        _part("target", "draft", "train", "seed"),
        lambda run: [*run.completion_files, run.path("vocab", "vocab.safetensors")],
        _train,
        # What is only watched or kept does not restart a training.
        lambda run: [
            _part("target", "draft", "seed")(run),
            run.recipe.train.model_dump(mode="json", exclude=BOOKKEEPING),
        ],
    ),
    Stage(
        "export",
        "write the engine directory",
        lambda run: {},
        lambda run: [
            run.path("train", "summary.json"),
            *sorted(run.path("train").glob("checkpoint-*/draft.safetensors")),
            *run.path("train").glob("best/draft.safetensors"),
        ],
        _export,
    ),
    Stage(
        "evaluate",
        "measure accept length, speed and losslessness",
        lambda run: [
            _part("target", "evaluate", "seed")(run),
            run.recipe.regenerate.max_prompt_tokens,
            run.recipe.serve.model_dump(mode="json", include=SERVED) if run.judge != "embedded" else None,
        ],
        lambda run: [run.draft_directory / "model.safetensors", run.path("prompts", "evaluation.jsonl")],
        _evaluate,
    ),
    Stage(
        "report",
        "write report.html",
        lambda run: {},
        lambda run: [
            p for p in (run.path("evaluate", "results.json"), run.path("train", "metrics.jsonl")) if p.exists()
        ],
        _report,
    ),
)
DIRECTORY = {"regenerate": "completions"}  # the others are named like their stage


def stage_directory(run: Run, stage: Stage) -> Path:
    if stage.name == "evaluate" and run.recipe.evaluate.engine not in ("auto", "embedded"):
        return run.path(f"evaluate-{run.judge}")  # beside what the embedded engine measured
    return run.path(DIRECTORY.get(stage.name, stage.name))


def stage_key(run: Run, stage: Stage) -> str:
    missing = [path for path in stage.inputs(run) if not path.exists()]
    if missing or (stage.name in ("vocab", "train") and not run.completion_files):
        lacking = missing[0] if missing else run.path("completions")
        raise DataError(f"{stage.name}: {lacking} is missing; run the stages before it, or: draftsmith run RECIPE")
    return files.digest(FORMAT, stage.key(run), *stage.inputs(run))


def reason_to_run(run: Run, stage: Stage, key: str) -> str | None:
    """Why the stage has to run, or None if its output stands."""
    record = stage_directory(run, stage) / "stage.json"
    if not record.exists():
        return "no output yet"
    state = files.read_json(record)
    if not state["finished"]:
        return "was interrupted"
    return None if state["key"] == key else "its inputs or its part of the recipe changed"


def run_stage(run: Run, stage: Stage, force: bool = False) -> dict[str, Any]:
    """Run one stage if it has to; returns its entry in the manifest."""
    key, out = stage_key(run, stage), stage_directory(run, stage)
    why = "asked for" if force else reason_to_run(run, stage, key)
    if why is None:
        run.world.wait()
        say(f"{stage.name}: up to date")
        return {"ran": False, "why": "inputs, recipe and format unchanged", "seconds": 0.0}
    continued = files.digest(FORMAT, stage.resume_key(run), *stage.inputs(run)) if stage.resume_key else key
    record = out / "stage.json"
    if record.exists():
        old = files.read_json(record)
        if old["resume_key"] != continued:
            aside = out.with_name(f"{out.name}.{old['key'][:8]}")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}x")
            out.rename(aside)
            say(f"{stage.name}: the recipe or inputs changed; the old output is kept in {aside}")
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(record, {"key": key, "resume_key": continued, "finished": False})
    run.world.wait()
    started = time.monotonic()
    stage.run(run, out)
    return_freed_memory()
    files.write_json(record, {"key": key, "resume_key": continued, "finished": True})
    return {
        "ran": True,
        "why": why,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": _peak_memory(),  # of this process so far
        "commit": commit(),
        "command": " ".join(run.command),
    }


def run_pipeline(run: Run, only: str | None = None) -> Path:
    """All stages, or one of them; returns the report's path.

    Under torchrun the first process does everything and the others join it in training.
    """
    chosen = [stage for stage in STAGES if only in (None, stage.name)]
    if not run.world.main:
        for stage in chosen:
            run.world.wait()  # until the stage's directory is ready
            if stage.name == "train" and _unfinished(run, stage):
                stage.run(run, stage_directory(run, stage))
            run.world.wait()
        return run.path("report.html")
    run.directory.mkdir(parents=True, exist_ok=True)
    files.write_atomic(run.path("recipe.yaml"), dump_recipe(run.recipe))
    manifest_file = run.path("manifest.json")
    earlier = files.read_json(manifest_file)["stages"] if manifest_file.exists() else {}
    stages = dict(earlier)
    for stage in chosen:
        entry = run_stage(run, stage, force=stage.name == "report")
        if not entry["ran"] and stage.name in earlier:
            entry = {**earlier[stage.name], **entry, "seconds": earlier[stage.name]["seconds"]}
        stages[stage.name] = entry
        files.write_json(manifest_file, {**run.created_with, "stages": stages})
        run.world.wait()
    return run.path("report.html")


def _unfinished(run: Run, stage: Stage) -> bool:
    return not files.read_json(stage_directory(run, stage) / "stage.json")["finished"]


def explain(run: Run) -> str:
    """What `--dry-run` prints: the resolved recipe and what every stage would do and why."""
    lines = [dump_recipe(run.recipe), f"run directory: {run.directory}"]
    upstream_runs = False
    for stage in STAGES:
        if upstream_runs:
            why: str | None = "a stage before it runs"
        else:
            try:
                why = reason_to_run(run, stage, stage_key(run, stage))
            except DataError as error:
                why = str(error)
        upstream_runs = upstream_runs or why is not None
        lines.append(f"{stage.name:<11} {'run ' if why else 'skip'}  {stage.what} ({why or 'up to date'})")
    return "\n".join(lines)


def command_line() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
