"""A run directory and the recipe that fills it: its target, where its files lie, what serves its draft."""

import os
import platform
import subprocess
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from draftsmith import files
from draftsmith.errors import DataError, TargetError
from draftsmith.progress import say
from draftsmith.recipe import DEFAULT_SHAPE, DraftShape, Recipe

if TYPE_CHECKING:
    from draftsmith.serving.launch import Engine, Launch, Purpose

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
            wish.template_options,
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
        """Tokens that a draft vocabulary never leaves out, as far as the target has rows for them."""
        known = set(self.tokenizer.all_special_ids) | set(self.target.eos_ids)
        return {token for token in known if token < self.target.identity.vocab_size}

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
        from draftsmith.hardware.configs import target_config
        from draftsmith.targets.ends import default_taps

        wish = self.recipe.target
        config = target_config(wish.model, wish.revision, wish.trust_remote_code)
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
        """The exported draft, for every engine."""
        return self.path("export", "draft")

    @property
    def draft_engines(self) -> "tuple[Engine, ...]":
        """The engines that can serve the exported draft."""
        config = self.draft_directory / "config.json"
        if not config.exists():
            return ()
        return ("vllm",) if 0 in files.read_json(config)["draftsmith"]["taps"] else ("vllm", "sglang")

    def draft_for(self, engine: str) -> Path:
        if not self.draft_engines:
            raise DataError(f"serve: no draft in {self.path('export')}; run: draftsmith run RECIPE")
        if engine not in self.draft_engines:
            raise DataError("draft.taps: SGLang cannot capture tap 0, so this draft serves on vLLM alone")
        return self.draft_directory

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
        return {name: str(self.serving(engine=name)) for name in engines if name in self.draft_engines}
