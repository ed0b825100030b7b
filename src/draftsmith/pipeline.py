"""The steps as stages that meet through files: run what is missing or changed, skip the rest.

A stage is a function from files to files in a directory of its own. `stage.json` in that directory holds the key of
the last finished run: a digest of the code's format version, the stage's part of the recipe and the content of its
inputs. An unchanged key skips the stage; another key moves the old directory aside, so that nothing produced is lost.
"""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from draftsmith import files
from draftsmith.allocator import return_freed_memory
from draftsmith.errors import DataError, TargetError
from draftsmith.progress import say
from draftsmith.recipe import BOOKKEEPING, DEFAULT_SHAPE, DraftShape, Recipe, dump_recipe

if TYPE_CHECKING:
    from draftsmith.serving.launch import Engine, Launch, Purpose

FORMAT = 1  # raise when a stage's output changes meaning
PACKAGES = ("draftsmith", "torch", "transformers", "safetensors", "pydantic", "numpy")


def commit() -> str | None:
    """Commit of the checkout that this package runs from, with `+dirty` where files differ."""
    here = Path(__file__).parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return f"{head}+dirty" if head and git("status", "--porcelain", "--untracked-files=no") else head


def hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = (
        next(
            (
                line.split(":", 1)[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    return {"cpu": cpu, "cores": os.cpu_count(), "gpus": gpus, "system": platform.platform()}


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


class Run:
    """A run directory and the recipe that fills it."""

    def __init__(self, recipe: Recipe, directory: Path, command: list[str]):
        self.recipe, self.directory, self.command = recipe, directory, command

    @cached_property
    def world(self):
        from draftsmith.training.world import World

        return World()

    @cached_property
    def target(self):
        """The target: in this process, or servers that answer for it."""
        wish, device = self.recipe.target, self.world.device(self.recipe.device)
        if wish.engine != "transformers":
            from draftsmith.targets.servers import ServedTarget

            served = ServedTarget(wish, self.recipe.server, device)
            known = self.path("completions", "server.json")
            if known.exists():  # who wrote the completions is who they are trained with
                served.fingerprint.extend(files.read_json(known)["fingerprint"])
            return served
        from draftsmith.targets.local import LocalTarget

        return LocalTarget(
            wish.model,
            wish.revision,
            wish.dtype,
            device,
            wish.trust_remote_code,
            self.recipe.regenerate.batch_size,
        )

    def close(self) -> None:
        """Let go of other processes and servers, if there are any."""
        self.world.leave()
        target = self.__dict__.get("target")  # only if it was ever made
        if target is not None and self.recipe.target.engine != "transformers":
            target.close()

    @cached_property
    def tokenizer(self):
        from draftsmith.targets.ends import load_tokenizer

        wish = self.recipe.target
        return load_tokenizer(wish.model, wish.revision, wish.trust_remote_code)

    @property
    def special_tokens(self) -> set[int]:
        return set(self.tokenizer.all_special_ids) | set(self.target.eos_ids)

    def check_draft(self, engine: Literal["vllm", "sglang"]) -> bool:
        from draftsmith.data.vocabulary import DraftVocabulary
        from draftsmith.publishing.check import check

        vocabulary = DraftVocabulary.load(self.path("vocab", "vocab.safetensors"))
        return check(self.recipe, engine, self.draft_for(engine), self.path("train"), vocabulary, self.directory)

    @property
    def judge(self) -> Literal["embedded", "vllm", "sglang"]:
        """The engine that `evaluate` decodes with."""
        wish, own = self.recipe.evaluate.engine, self.recipe.target.engine
        if wish == "auto" and own != "transformers":
            return own
        if self.recipe.evaluate.url is not None and wish in ("auto", "embedded"):
            raise TargetError("evaluate.url: given, but the embedded engine decodes; give --evaluate.engine too")
        if wish == "auto":
            return "embedded"
        if wish == "embedded" and own != "transformers":
            raise TargetError(
                f"evaluate.engine: embedded needs the target in this process; where it fits, give --target.engine "
                f"transformers, else leave evaluate.engine out and {own} decodes"
            )
        return wish

    @property
    def captured_layers(self) -> tuple[int, ...]:
        """What a capturing server has to keep: the taps, and the last layer's output for the teacher."""
        from transformers import AutoConfig

        from draftsmith.targets.ends import default_taps, resolve_model

        wish = self.recipe.target
        config = AutoConfig.from_pretrained(
            resolve_model(wish.model), revision=wish.revision, trust_remote_code=wish.trust_remote_code
        )
        layers = config.get_text_config().num_hidden_layers
        return (*(self.recipe.draft.taps or default_taps(layers)), layers)

    @cached_property
    def created_with(self) -> dict[str, Any]:
        return {
            "command": " ".join(self.command),
            "commit": commit(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "seed": self.recipe.seed,
            "hardware": hardware(),
        }

    # Where things lie.
    def path(self, *parts: str) -> Path:
        return self.directory.joinpath(*parts)

    @property
    def completion_files(self) -> list[Path]:
        return sorted(self.path("completions").glob("[0-9]*.jsonl"))

    @property
    def draft_directory(self) -> Path:
        """The exported draft; where every engine has its own directory, the embedded engine reads any of them."""
        exported = [self.path("export", name) for name in ("draft", "sglang", "vllm")]
        return next((path for path in exported if path.exists()), exported[0])

    def draft_for(self, engine: str) -> Path:
        both, own = self.path("export", "draft"), self.path("export", engine)
        if self.path("export", "vllm").exists() and engine == "sglang" and not own.exists():
            raise DataError("draft.taps: SGLang cannot capture tap 0, so this draft serves on vLLM alone")
        if not both.exists() and not own.exists():
            raise DataError(f"serve: no draft in {self.path('export')}; run: draftsmith run RECIPE")
        return both if both.exists() else own

    @property
    def draft_digest(self) -> str | None:
        """Content of the exported draft."""
        weights = self.draft_directory / "model.safetensors"
        return files.digest(weights) if weights.exists() else None

    def serving_shape(self, engine: str) -> DraftShape:
        """The recipe's shape; where it is the default, what `tune` found fastest on that engine, or on the embedded
        one."""
        wish = self.recipe.serve
        if not wish.tuned or wish.shape != DEFAULT_SHAPE:
            return wish.shape
        for name in (engine, "embedded"):
            path = self.path(f"tune-{name}.json")
            if path.exists():
                told, here = files.read_json(path), hardware()
                if told["draft"] != self.draft_digest or any(told["hardware"][k] != here[k] for k in ("cpu", "gpus")):
                    say(f"{path}: of another draft or machine, so left out; run: draftsmith tune RECIPE")
                    continue
                best = told["chain" if engine == "vllm" else "shape"]
                if best is None:
                    say(f"{path}: nothing beat plain decoding there; the draft is served as the recipe says")
                    return wish.shape
                steps, topk, tokens = map(int, best.split("/"))
                say(f"shape {best}, measured by tune ({path}); --serve.no-tuned keeps {wish.shape}")
                return DraftShape(steps=steps, topk=topk, draft_tokens=tokens)
        return wish.shape

    def serving(
        self,
        purpose: "Purpose" = "draft",
        engine: "Engine | None" = None,
        model: str | None = None,
        draft: Path | None = None,
    ) -> "Launch":
        """What `serve` runs, and what report, card and `run` print.

        `engine`: another one than serve.engine, without that one's program and extra flags; a tree becomes the chain of
        as many steps where it drafts chains only. `model`, `draft`: other places of the target and the draft, for a
        command that others run.
        """
        from draftsmith.serving.launch import launch
        from draftsmith.targets.ends import resolve_model

        serve = self.recipe.serve
        other = engine is not None and engine != serve.engine
        if other:
            serve = serve.model_copy(update={"engine": engine, "program": "", "extra": ""})
        if purpose == "draft":
            shape = self.serving_shape(serve.engine)
            if other and engine == "vllm" and shape.topk > 1:
                shape = DraftShape(steps=shape.steps, topk=1, draft_tokens=shape.steps + 1)
            serve = serve.model_copy(update={"shape": shape})
            draft = draft or self.draft_for(serve.engine)
        layers = self.captured_layers if purpose == "capture" else ()
        recipe = self.recipe.model_copy(update={"serve": serve})
        return launch(recipe, model or resolve_model(recipe.target.model), draft or Path(), purpose, layers)

    @property
    def serve_commands(self) -> dict[str, str]:
        """The command of every engine that can serve the exported draft, the recipe's engine first."""
        first = self.recipe.serve.engine
        engines: list[Engine] = [first, "sglang" if first == "vllm" else "vllm"]
        exported = self.path("export", "draft").exists()
        return {
            name: str(self.serving(engine=name)) for name in engines if exported or self.path("export", name).exists()
        }


def _source_files(run: Run) -> list[Path]:
    names = [s.name for s in (*run.recipe.prompts.sources, *run.recipe.prompts.evaluation)]
    return [Path(name) for name in names if Path(name).is_file()]


def _prompts(run: Run, out: Path) -> None:
    from draftsmith.data.prompts import gather

    gather(run.recipe, out)


def _regenerate(run: Run, out: Path) -> None:
    from draftsmith.data.regenerate import regenerate
    from draftsmith.data.templates import ChatFormat

    chat = ChatFormat(run.tokenizer, run.recipe.target.template)
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
