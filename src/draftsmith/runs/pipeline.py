"""The steps as stages that meet through files: run what is missing or changed, skip the rest.

A stage is a function from files to files in a directory of its own. `stage.json` in that directory holds the key of
the last finished run: a digest of the code's format version, the stage's part of the recipe and the content of its
inputs. An unchanged key skips the stage; another key moves the old directory aside, so that nothing produced is lost.
"""

import re
import resource
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from draftsmith.core import files, run_files
from draftsmith.core.allocator import return_freed_memory
from draftsmith.core.errors import DataError, DraftsmithError, MemoryShortage, RecipeError, out_of_memory, shortage
from draftsmith.core.history import changed, outputs_of
from draftsmith.core.progress import say
from draftsmith.core.recipe_file import dump_recipe
from draftsmith.core.records.run import Manifest, StageRun, StageState
from draftsmith.runs.run import Run
from draftsmith.runs.stages import STAGES, Stage

FORMAT = 4  # raise when a stage's output changes meaning


def stage_directory(run: Run, name: str) -> Path:
    asked = run.recipe.evaluate.engine not in ("auto", "embedded")  # beside what the embedded engine measured
    return run.files.stage(name, run.engine_of("evaluate") if name == "evaluate" and asked else "embedded")


def stage_key(run: Run, stage: Stage) -> str:
    missing = [path for path in stage.inputs(run) if not path.exists()]
    if missing or (stage.name in ("vocab", "train") and not run_files.shards(run.files.completions)):
        lacking = missing[0] if missing else run.files.completions
        raise DataError(f"{stage.name}: {lacking} is missing; run the stages before it, or: draftsmith run RECIPE")
    return files.digest(FORMAT, stage.key(run), *stage.inputs(run))


def reason_to_run(run: Run, stage: Stage, key: str | None) -> str | None:
    """Why the stage has to run, or None if its output stands. Without a key, as far as its own directory tells."""
    if stage.always:
        return "always written anew"
    out = stage_directory(run, stage.name)
    state = StageState.readable(out / run_files.STATE)
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
            mend = "give the flags that it ran with; or " if why.endswith("of the recipe changed") else ""
            flags = f" --from {shlex.quote(str(start))}" if start else ""
            raise DataError(
                f"{stage.name}: `{earlier.name}` has to run before it ({why}); {mend}run: draftsmith run "
                f"RECIPE{flags}, or: draftsmith {earlier.name} RECIPE{flags}"
            )


def _set_aside(out: Path, key: str) -> Path:
    """Nothing that was produced is lost: an output that is made anew is kept beside the new one."""
    return out.rename(_free(out.with_name(f"{out.name}.{key[:8]}")))


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


def _work(run: Run, stage: Stage, out: Path) -> None:
    """A card or host without memory left is one line that names what to lower."""
    try:
        stage.run(run, out)
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
    key, out = stage_key(run, stage), stage_directory(run, stage.name)
    why = reason_to_run(run, stage, key)
    if why is None:
        run.require_same_target()
        run.processes.wait()
        say(f"{stage.name}: up to date")
        return StageRun(ran=False, why="inputs, recipe and format unchanged", seconds=0.0)
    continued = files.digest(FORMAT, stage.resume_key(run), *stage.inputs(run)) if stage.resume_key else key
    path = out / run_files.STATE
    old = StageState.readable(path)
    if old is None and path.exists():
        say(f"{stage.name}: nobody knows what made the old output; it is kept in {_set_aside(out, 'unknown')}")
    elif old is not None and old.resume_key != continued and not stage.always:
        aside = _set_aside(out, old.key)
        say(f"{stage.name}: the recipe or inputs changed; the old output is kept in {aside}")
        if (states := aside / run_files.HIDDEN_STATES).exists():  # large, dear, and used again where they are the same
            out.mkdir()
            states.rename(out / run_files.HIDDEN_STATES)
    elif old is not None and old.finished and not stage.always:
        _mend(stage, out, old)
    run.require_same_target()
    out.mkdir(parents=True, exist_ok=True)
    run.lock.require()
    files.write_atomic(run.files.recipe, dump_recipe(run.recipe))  # of a stage that runs, never of a command refused
    state = StageState(key=key, resume_key=continued, finished=False, recipe=run.recipe.model_dump(mode="json"))
    state.save(path)
    run.processes.wait()
    started = time.monotonic()
    _work(run, stage, out)
    return_freed_memory()
    run.lock.require()
    state.model_copy(update={"finished": True, "outputs": outputs_of(out)}).save(path)
    unit = 1 if sys.platform == "darwin" else 1024
    return StageRun(
        ran=True,
        why=why,
        seconds=round(time.monotonic() - started, 1),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        commit=run.created_with.commit,
        command=run.created_with.command,
    )


def run_pipeline(run: Run, only: str | None = None, redo: str | None = None, last: str = "report") -> None:
    """All stages up to the `last`, or one of them. `redo`: a stage whose output is made anew.

    Under torchrun the first process does everything and the others join it in training.
    """
    end = [stage.name for stage in STAGES].index(last) + 1
    chosen = [stage for stage in STAGES[:end] if only in (None, stage.name)]
    if redo is not None and redo not in [stage.name for stage in chosen]:
        raise RecipeError(
            f"--redo: {redo} given, but only {only} runs here; redo it with: draftsmith run RECIPE --redo {redo}"
        )
    for stage in chosen:
        stage.require_possible(run)
    if not run.processes.main:
        for stage in chosen:
            run.processes.wait()  # until the stage's directory is ready
            out = stage_directory(run, stage.name)
            if stage.name == "train" and not StageState.load(out / run_files.STATE).finished:
                _work(run, stage, out)
                run.release_target()
            run.processes.wait()
        return
    with run.lock:
        if only is not None:
            _require_past(run, chosen[0])
        for stage in STAGES:
            if stage.name == redo and (out := stage_directory(run, stage.name)).exists():
                say(f"{stage.name}: asked for anew; the old output is kept in {_set_aside(out, 'redo')}")
        manifest = Manifest.readable(run.files.manifest)
        stages = dict(manifest.stages) if manifest else {}
        for stage in chosen:
            entry = run_stage(run, stage)
            if not entry.ran and stage.name in stages:
                entry = stages[stage.name].model_copy(update={"ran": False, "why": entry.why})
            stages[stage.name] = entry
            Manifest(created_with=run.created_with, stages=stages).save(run.files.manifest)
            run.processes.wait()


def explain(run: Run, does: Mapping[str, str], only: str | None = None, redo: str | None = None) -> str:
    """What `--dry-run` prints: the resolved recipe and what every stage `does` (by its name), or why it would not."""
    lines = [dump_recipe(run.recipe), f"run directory: {run.files.root}"]
    before: str | None = None  # a stage that runs first
    for stage in STAGES:
        if only not in (None, stage.name):
            continue
        what = "run "
        try:
            stage.require_possible(run)
            if only is not None:
                _require_past(run, stage)
            why = reason_to_run(run, stage, stage_key(run, stage) if before is None else None)
            if stage.name == redo:
                why = "asked for anew"
            if why is None and before is not None:
                why = f"unless `{before}` makes the same files again"
        except DraftsmithError as error:
            what, why = "stop", str(error)
        if why is not None and not stage.always:
            before = before or stage.name
        lines.append(f"{stage.name:<11} {what if why else 'skip'}  {does[stage.name]} ({why or 'up to date'})")
    return "\n".join(lines)
