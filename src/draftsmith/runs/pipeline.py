"""The steps as stages that meet through files: run what is missing or changed, skip the rest.

A stage is a function from files to files in a directory of its own. `stage.json` in that directory holds the key of
the last finished run: a digest of the code's format version, the stage's part of the recipe and the content of its
inputs. An unchanged key skips the stage; another key moves the old directory aside, so that nothing produced is lost.
"""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from draftsmith.core import files, run_files
from draftsmith.core.allocator import return_freed_memory
from draftsmith.core.errors import CheckpointError, DataError, MemoryShortage, RecipeError, out_of_memory, shortage
from draftsmith.core.files import JsonObject
from draftsmith.core.history import changed, outputs_of, target_part
from draftsmith.core.progress import say
from draftsmith.core.recipe import BOOKKEEPING
from draftsmith.core.recipe_file import dump_recipe
from draftsmith.core.records.run import Manifest, StageRun, StageState
from draftsmith.core.secrets import masked
from draftsmith.core.sources import Source
from draftsmith.runs.run import Run, commit

FORMAT = 3  # raise when a stage's output changes meaning


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
    always: bool = False
    """Tells of more than its inputs, so it is made anew each time, and of whatever is there."""
    memory: tuple[str, ...] = ()
    """Keys of the recipe that what it holds at once grows with."""


def _source_files(run: Run) -> list[Path]:
    from draftsmith.data.sources import data_files

    return [path for s in (*run.recipe.prompts.sources, *run.recipe.prompts.evaluation) for path in data_files(s)]


def _prompts(run: Run, out: Path) -> None:
    from draftsmith.data.prompts import gather

    gather(run.recipe, out)


def _regenerate(run: Run, out: Path) -> None:
    from draftsmith.data.regenerate import Regeneration
    from draftsmith.data.templates import ChatFormat

    with run.answering(out) as target:
        chat = ChatFormat.of(run.recipe, target)
        Regeneration(run.recipe, target, chat, run.files.training_prompts, out).run()


def _vocab(run: Run, out: Path) -> None:
    from draftsmith.data.vocabulary import build_vocabulary

    size = run.target.identity.vocab_size
    build_vocabulary(run.recipe, run.files.completions, size, run.special_tokens, run.files)


def _train(run: Run, out: Path) -> None:
    import torch

    from draftsmith.data.vocabulary import DraftVocabulary
    from draftsmith.hardware.presets import peak_flops_s
    from draftsmith.training.trainer import Trainer

    recipe, vocabulary = run.recipe, DraftVocabulary.load(run.files.vocabulary)
    on_gpu = recipe.device != "cpu" and recipe.train.dtype == "bf16" and torch.cuda.is_available()
    peak = peak_flops_s(torch.cuda.get_device_name()) if on_gpu else None
    target, completions = run.target, run.files.completions
    Trainer(recipe, target, target.config, completions, vocabulary, out, run.processes, peak).train()


def _export(run: Run, out: Path) -> None:
    from draftsmith.data.vocabulary import DraftVocabulary
    from draftsmith.training.export import export

    provenance = {"version": version("draftsmith"), "commit": commit()}
    export(run.files.train, DraftVocabulary.load(run.files.vocabulary), run.files.draft, provenance)


def _evaluate(run: Run, out: Path) -> None:
    from draftsmith.engines import ENGINES, SERVERS
    from draftsmith.evaluation.evaluate import Evaluation

    sets = run.evaluation_sets()  # first, as nothing may be lost to a set that cannot be read
    run.tell_engine("evaluate")
    name = run.evaluation_engine
    stuck = name == "embedded" and run.target.library is not None and not run.target.library.can_cut_back
    if stuck and run.recipe.evaluate.engine == "auto":
        name = run.recipe.serve.engine
        say(f"evaluate: this target's cache cannot be cut back in this process, so {name} verifies its drafts")
    if name in SERVERS and run.recipe.evaluate.url is None:
        run.release_target()
    setup = run.setup(name, out)
    Evaluation(ENGINES[name], setup, run.files.evaluation_prompts, out, sets).run(run.created_with)


def _report(run: Run, out: Path) -> None:
    from draftsmith.evaluation.report import write_report

    write_report(run.files, run.tokenizer, run.serve_commands)


def _completion_files(run: Run) -> list[Path]:
    return run_files.shards(run.files.completions)


def _starting_draft(run: Run) -> list[Path]:
    """The draft that training goes on from: its content decides, not its place."""
    from draftsmith.drafts.directories import files_of, inspect_draft

    start = run.recipe.train.from_draft
    if start is None:
        return []
    if start.resolve() == run.files.draft.resolve():
        raise RecipeError(f"train.from_draft: {start} is this run's own draft; give the new one another --out")
    for problem in inspect_draft(start).blocking(lenient=True):
        raise CheckpointError(f"train.from_draft: {start}: {problem}; run: draftsmith inspect {start}")
    return files_of(start)


def _part(*names: str) -> Callable[[Run], Any]:
    """Key made of these parts of the recipe."""

    def key(run: Run) -> JsonObject:
        recipe = run.recipe.model_dump(mode="json")
        return {name: target_part(recipe) if name == "target" else recipe[name] for name in names}

    return key


def _evaluation_key(run: Run, *without: str) -> list[Any]:
    from draftsmith.data.sources import data_files

    serve = {"draft_sampling"} if run.evaluation_engine == "embedded" else SERVED
    local = [Source(name=str(chosen.path)) for chosen in run.recipe.evaluate.sets if chosen.path and not without]
    return [
        [files.digest(*data_files(source)) for source in local],
        _part("target", "seed")(run),
        run.recipe.evaluate.model_dump(mode="json", exclude=set(without)),
        run.recipe.regenerate.max_prompt_tokens,
        run.recipe.serve.model_dump(mode="json", include=serve),
    ]


# of `serve`, what an evaluation depends on
SERVED = {"draft_sampling", "extra", "tensor_parallel", "context", "draft_quantization"}
STAGES = (
    Stage(
        "prompts", "gather, de-duplicate and decontaminate prompts", _part("prompts", "seed"), _source_files, _prompts
    ),
    Stage(
        "regenerate",
        "let the target answer them",
        lambda run: {
            **_part("target", "seed")(run),
            "regenerate": run.recipe.regenerate.model_dump(mode="json", exclude={"engine"}),  # whoever answers for it
        },
        lambda run: [run.files.training_prompts],
        _regenerate,
        # More tokens of the same run continue it.
        lambda run: {
            **_part("target", "seed")(run),
            "regenerate": run.recipe.regenerate.model_dump(mode="json", exclude={"max_tokens", "engine"}),
        },
        memory=("regenerate.batch_size",),
    ),
    Stage(
        "vocab",
        "choose the draft vocabulary",
        _part("target", "vocab"),
        lambda run: [*_completion_files(run), *_starting_draft(run)],
        _vocab,
    ),
    Stage(
        "train",
        "train the draft",
        lambda run: {
            **_part("target", "draft", "seed")(run),
            "train": run.recipe.train.model_dump(mode="json", exclude={"from_draft"}),
        },
        lambda run: [*_completion_files(run), run.files.vocabulary, *_starting_draft(run)],
        _train,
        # What is only watched or kept does not restart a training.
        lambda run: [
            _part("target", "draft", "seed")(run),
            run.recipe.train.model_dump(mode="json", exclude=BOOKKEEPING),
        ],
        memory=("train.pack_tokens", "train.max_document_tokens"),
    ),
    Stage(
        "export",
        "write the engine directory",
        lambda run: {},
        lambda run: [
            run_files.summary(run.files.train),
            *sorted(run.files.train.glob("checkpoint-*/draft.safetensors")),
            *run.files.train.glob("best/draft.safetensors"),
        ],
        _export,
    ),
    Stage(
        "evaluate",
        "measure accept length, speed and losslessness",
        _evaluation_key,
        lambda run: [run_files.weights(run.files.draft), run.files.evaluation_prompts],
        _evaluate,
        # Sets are measured one by one, so another one continues it.
        lambda run: _evaluation_key(run, "sets"),
        memory=("evaluate.lossless_prompts", "regenerate.batch_size"),
    ),
    Stage(
        "report",
        "write report.html",
        lambda run: {},
        lambda run: [
            path for path in (*run.files.results.values(), run_files.metrics(run.files.train)) if path.exists()
        ],
        _report,
        always=True,
    ),
)


def stage_directory(run: Run, stage: Stage) -> Path:
    asked = run.recipe.evaluate.engine not in ("auto", "embedded")  # beside what the embedded engine measured
    return run.files.stage(stage.name, run.evaluation_engine if stage.name == "evaluate" and asked else "embedded")


def stage_key(run: Run, stage: Stage) -> str:
    missing = [path for path in stage.inputs(run) if not path.exists()]
    if missing or (stage.name in ("vocab", "train") and not _completion_files(run)):
        lacking = missing[0] if missing else run.files.completions
        raise DataError(f"{stage.name}: {lacking} is missing; run the stages before it, or: draftsmith run RECIPE")
    return files.digest(FORMAT, stage.key(run), *stage.inputs(run))


def reason_to_run(run: Run, stage: Stage, key: str | None) -> str | None:
    """Why the stage has to run, or None if its output stands. Without a key, as far as its own directory tells."""
    if stage.always:
        return "always written anew"
    out = stage_directory(run, stage)
    state = StageState.readable(run_files.stage_state(out))
    if state is None:
        return "no output yet"
    if not state.finished:
        return "was interrupted"
    if key not in (None, state.key):
        return "its inputs or its part of the recipe changed"
    if damage := changed(out, state.outputs):
        more = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
        return f"{damage[0]}{more} changed since `{stage.name}` wrote it"
    return None


def _require_past(run: Run, stage: Stage) -> None:
    """A stage alone works with what `run` would give it; raises `DataError` where that is not there yet."""
    for earlier in () if stage.always else STAGES[: STAGES.index(stage)]:
        why = reason_to_run(run, earlier, None)
        if why is None and all(path.exists() for path in earlier.inputs(run)):  # or another machine has them
            why = reason_to_run(run, earlier, stage_key(run, earlier))
        if why is not None:
            start = run.recipe.train.from_draft
            flags = f" --from {start}" if start else ""
            raise DataError(
                f"{stage.name}: `{earlier.name}` has to run before it ({why}); run: draftsmith run RECIPE{flags}, or: "
                f"draftsmith {earlier.name} RECIPE{flags}"
            )


def _set_aside(out: Path, key: str) -> Path:
    """Nothing that was produced is lost: an output that is made anew is kept beside the new one."""
    aside = _free(out.with_name(f"{out.name}.{key[:8]}"))
    out.rename(aside)
    return aside


def _free(path: Path) -> Path:
    while path.exists():
        path = path.with_name(f"{path.name}x")
    return path


def _mend(stage: Stage, out: Path, state: StageState) -> None:
    """Take out what is not as the stage wrote it: files of completions and checkpoints one by one, as the stage goes on
    from the others; of any other stage, and of training for anything else, the whole output."""
    damage = changed(out, state.outputs)
    alone = {"regenerate": ".*", "train": r"checkpoint-\d+/.*"}.get(stage.name)
    if not damage or not out.exists():
        return
    if alone is None or not all(re.fullmatch(alone, name) for name in damage):
        aside = _set_aside(out, "damaged")
        say(f"{stage.name}: {damage[0]} changed since it was written; the old output is kept in {aside}")
        return
    for name in sorted({name.split("/")[0] for name in damage}):
        if (out / name).exists():
            (out / name).rename(_free(out / f".damaged-{name}"))


@contextlib.contextmanager
def _within_memory(run: Run, stage: Stage) -> Iterator[None]:
    """A card or host without memory left is one line that names what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        values = run.recipe.model_dump()
        lower = [f"{key} (now {values[part][name]})" for key in stage.memory for part, name in [key.split(".")]]
        mend = [f"a smaller {' or '.join(lower)}"] if lower else []
        if run.recipe.target.engine == "transformers":
            mend.append("target.engine vllm, which runs the target on servers")
        raise MemoryShortage(
            f"{stage.name}: {shortage(error)}; give {', or '.join(mend or ['it a larger machine'])}; what is finished "
            "is kept"
        ) from None


def run_stage(run: Run, stage: Stage) -> StageRun:
    """Run one stage if it has to."""
    key, out = stage_key(run, stage), stage_directory(run, stage)
    why = reason_to_run(run, stage, key)
    if why is None:
        run.require_same_target()
        run.processes.wait()
        say(f"{stage.name}: up to date")
        return StageRun(ran=False, why="inputs, recipe and format unchanged", seconds=0.0)
    continued = files.digest(FORMAT, stage.resume_key(run), *stage.inputs(run)) if stage.resume_key else key
    path = run_files.stage_state(out)
    old = StageState.readable(path)
    if old is None and path.exists():
        say(f"{stage.name}: nobody knows what made the old output; it is kept in {_set_aside(out, 'unknown')}")
    elif old is not None and old.resume_key != continued and not stage.always:
        aside = _set_aside(out, old.key)
        say(f"{stage.name}: the recipe or inputs changed; the old output is kept in {aside}")
    elif old is not None and old.finished and not stage.always:
        _mend(stage, out, old)
    run.require_same_target()
    out.mkdir(parents=True, exist_ok=True)
    run.lock.require()
    files.write_atomic(run.files.recipe, dump_recipe(run.recipe))  # of a stage that runs, never of a command refused
    recipe = run.recipe.model_dump(mode="json")
    StageState(key=key, resume_key=continued, finished=False, recipe=recipe).save(path)
    run.processes.wait()
    started = time.monotonic()
    with _within_memory(run, stage):
        stage.run(run, out)
    return_freed_memory()
    run.lock.require()
    outputs = outputs_of(out)
    StageState(key=key, resume_key=continued, finished=True, recipe=recipe, outputs=outputs).save(path)
    return StageRun(
        ran=True,
        why=why,
        seconds=round(time.monotonic() - started, 1),
        peak_memory_bytes=_peak_memory(),
        commit=commit(),
        command=masked(" ".join(run.command)),
    )


def run_pipeline(run: Run, only: str | None = None, redo: str | None = None) -> Path:
    """All stages, or one of them; returns the report's path. `redo`: a stage whose output is made anew.

    Under torchrun the first process does everything and the others join it in training.
    """
    chosen = [stage for stage in STAGES if only in (None, stage.name)]
    if only in (None, "train"):
        from draftsmith.training.tracking import require_tracker

        require_tracker(run.recipe.train.track)
    if redo is not None and redo not in [stage.name for stage in chosen]:
        raise RecipeError(f"--redo: {redo} given, but only {only} runs here; redo a stage with: draftsmith run RECIPE")
    if not run.processes.main:
        for stage in chosen:
            run.processes.wait()  # until the stage's directory is ready
            out = stage_directory(run, stage)
            if stage.name == "train" and not StageState.load(run_files.stage_state(out)).finished:
                with _within_memory(run, stage):
                    stage.run(run, out)
                run.release_target()
            run.processes.wait()
        return run.files.report
    _starting_draft(run)  # one that cannot be read is told before hours of work
    with run.lock:
        if only is not None:
            _require_past(run, chosen[0])
        for stage in STAGES:
            if stage.name == redo and (out := stage_directory(run, stage)).exists():
                say(f"{stage.name}: asked for anew; the old output is kept in {_set_aside(out, 'redo')}")
        return _run_stages(run, chosen)


def _run_stages(run: Run, chosen: list[Stage]) -> Path:
    manifest = Manifest.readable(run.files.manifest)
    earlier = manifest.stages if manifest else {}
    stages = dict(earlier)
    for stage in chosen:
        entry = run_stage(run, stage)
        if not entry.ran and stage.name in earlier:
            entry = earlier[stage.name].model_copy(update={"ran": False, "why": entry.why})
        stages[stage.name] = entry
        Manifest(created_with=run.created_with, stages=stages).save(run.files.manifest)
        run.processes.wait()
    return run.files.report


def explain(run: Run, only: str | None = None) -> str:
    """What `--dry-run` prints: the resolved recipe and what every stage would do and why."""
    lines = [dump_recipe(run.recipe), f"run directory: {run.files.root}"]
    before: str | None = None  # a stage that runs first
    for stage in STAGES:
        if only not in (None, stage.name):
            continue
        what = "run "
        try:
            if only is not None:
                _require_past(run, stage)
            why = reason_to_run(run, stage, stage_key(run, stage) if before is None else None)
            if why is None and before is not None:
                why = f"unless `{before}` makes the same files again"
        except DataError as error:
            what, why = "stop", str(error)
        if why is not None and not stage.always:
            before = before or stage.name
        lines.append(f"{stage.name:<11} {what if why else 'skip'}  {stage.what} ({why or 'up to date'})")
    return "\n".join(lines)


def command_line() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
