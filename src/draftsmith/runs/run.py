"""A run directory and the recipe that fills it: its target, its draft, what serves it."""

import gc
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from draftsmith.core import run_files
from draftsmith.core.errors import DataError, TargetError
from draftsmith.core.history import changed, draft_digest, results_of, target_part
from draftsmith.core.lock import RunLock
from draftsmith.core.progress import say
from draftsmith.core.recipe import DEFAULT_SHAPE, DecoderName, EngineName, Recipe
from draftsmith.core.records.base import Decodes
from draftsmith.core.records.data import EvaluationPrompts, IdentityCheck
from draftsmith.core.records.machine import Tried, Tuned
from draftsmith.core.records.run import Hardware, Provenance, StageState
from draftsmith.core.run_files import RunFiles
from draftsmith.core.secrets import masked
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.data.sets import read_set
from draftsmith.drafts import METHODS
from draftsmith.drafts.directories import exported_taps
from draftsmith.drafts.method import DraftConfig
from draftsmith.engines import ENGINES, SERVERS
from draftsmith.engines.base import Setup
from draftsmith.engines.process import Launch
from draftsmith.engines.served import ServedTarget
from draftsmith.engines.server import Purpose
from draftsmith.evaluation.draft_sampling import more_accepted
from draftsmith.hardware.sizes import TargetSize
from draftsmith.targets.configs import target_config
from draftsmith.targets.identity import require_same_logprobs, template_hash, tokenizer_hash, weights_hash
from draftsmith.targets.local import LocalTarget
from draftsmith.targets.parts import card_room, load_tokenizer, resolve_device, resolve_model
from draftsmith.training.processes import ProcessGroup
from draftsmith.training.start import earlier_draft

SURE = 1.02  # the least measured gain that is recommended: less is within a measurement's noise
PACKAGES = ("draftsmith", "torch", "transformers", "safetensors", "pydantic", "numpy")


def commit() -> str | None:
    """Commit of the checkout that this package runs from, with `+dirty` where files differ."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run([*describe, "--dirty=+dirty"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def used(gpus: Sequence[str], device: str) -> tuple[str, ...]:
    """Those of the machine's GPUs that a recipe's `device` lets a run use."""
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cuda"):
        return ()
    return tuple(gpus[int(number) : int(number) + 1] if number.isdecimal() else gpus)


def hardware(device: str = "auto") -> Hardware:
    """What a run on this device uses."""
    gpus = used([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())], device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    cpu = next(named, platform.processor())
    return Hardware(cpu=cpu, cores=os.cpu_count(), gpus=gpus, system=platform.platform())


def fastest(tried: Sequence[Tried], able: Callable[[Tried], bool] = lambda _: True) -> Tried | None:
    """The winner of the able ones; None where nothing beats plain decoding. Of what was measured longest alone: a rival
    that was dropped early may owe its gain to luck."""
    longest = max((one.prompts for one in tried), default=0)
    winner = max((one for one in tried if one.prompts == longest and able(one)), key=lambda t: t.speedup, default=None)
    return winner if winner and winner.speedup >= SURE else None


class Run:
    """A run directory and the recipe that fills it."""

    def __init__(self, recipe: Recipe, directory: Path, command: list[str]):
        self.recipe, self.files, self.command = recipe, RunFiles(directory), command
        self.lock = RunLock(directory)

    @cached_property
    def processes(self) -> ProcessGroup:
        return ProcessGroup(self.recipe.train.timeout_min)

    @cached_property
    def target(self) -> Any:
        """The target: in this process, or servers that answer for it."""
        settings, device = self.recipe.target, self.processes.device(self.recipe.device)
        if settings.engine != "transformers":
            served = ServedTarget(settings, self.recipe.server, SERVERS[settings.engine], device)
            if known := self._known_target():
                served.identity_logprobs.extend(known.logprobs)
            return served
        self.require_same_target()
        self.require_room()
        local = LocalTarget(settings, device, self.recipe.regenerate.batch_size)
        if known := self._known_target():
            require_same_logprobs(known.logprobs, local.identity_logprobs, f"target.model: {settings.model}")
        return local

    def _known_target(self) -> IdentityCheck | None:
        """Who wrote the completions; None where the recipe's target is another one, so that they are made anew."""
        state = StageState.readable(self.files.completions / run_files.STATE)
        if state is not None and target_part(state.recipe) != target_part(self.recipe.model_dump(mode="json")):
            return None
        return IdentityCheck.readable(self.files.completions / run_files.IDENTITY)

    def require_same_target(self) -> None:
        """Raises `TargetError` where another model, tokenizer or template lies by now under the name of the target that
        wrote the completions."""
        known, settings = self._known_target(), self.recipe.target
        if known is None:
            return
        kept: dict[str, tuple[str, str | None]] = {
            "tokenizer": (known.target.tokenizer_hash, tokenizer_hash(self.tokenizer)),
            "chat template": (known.target.template_hash, template_hash(self.tokenizer, settings.template_options)),
        }
        if settings.engine == "transformers" and known.weights_hash is not None:
            kept["weights"] = known.weights_hash, weights_hash(resolve_model(settings.model), settings.revision)
        for what, (was, found) in kept.items():
            if was != found:
                raise TargetError(
                    f"target.model: {settings.model} has other {what} than the target that wrote "
                    f"{self.files.completions}; put the old one back, or let the new one answer: draftsmith run RECIPE "
                    "--redo regenerate"
                )

    def require_room(self) -> None:
        """Raises `TargetError` where this process's card cannot hold the target, which may be there already."""
        if "target" in self.__dict__:
            return
        settings, card = self.recipe.target, resolve_device(self.processes.device(self.recipe.device))
        if (room := card_room(card)) is None:
            return
        needed = TargetSize.of(self.target_config, settings.dtype).bytes
        if needed > room[0]:
            raise TargetError(
                f"target.model: {settings.model} has {needed / 1e9:.1f} GB of weights in {settings.dtype}, and "
                f"{room[0] / 1e9:.1f} of {room[1] / 1e9:.1f} GB are free on {card}; give target.engine vllm, whose "
                "servers share it among GPUs: docs/large-targets.md"
            )

    def close(self) -> None:
        """Let go of other processes and servers, if there are any."""
        self.processes.leave()
        target = self.__dict__.get("target")  # only if it was ever asked for
        if target is not None and self.recipe.target.engine != "transformers":
            target.close()

    @cached_property
    def target_config(self) -> Any:
        settings = self.recipe.target
        return target_config(settings.model, settings.revision, settings.trust_remote_code)

    @cached_property
    def tokenizer(self) -> Any:
        settings = self.recipe.target
        return load_tokenizer(settings.model, settings.revision, settings.trust_remote_code)

    def evaluation_sets(self) -> list[EvaluationPrompts]:
        """Those of evaluate.sets, read where they were not before."""
        training, skip_bad = self.files.training_prompts, self.recipe.prompts.skip_bad
        return [read_set(chosen, training, self.files.sets, skip_bad) for chosen in self.recipe.evaluate.sets]

    def engine_of(self, stage: Literal["regenerate", "evaluate"]) -> Decodes:
        """What decodes in a stage: servers where the target runs on them; else what is asked for, and for `auto` an
        engine that takes over on GPUs, as it is several times faster than this process."""
        asked: DecoderName = getattr(self.recipe, stage).engine
        own, serve = self.recipe.target.engine, self.recipe.serve
        here = asked == "embedded" or (asked == "auto" and own == "transformers")
        if stage == "evaluate" and here:
            given = [key for key in ("url", "plain_url") if getattr(self.recipe.evaluate, key) is not None]
            for key in given:
                raise TargetError(f"evaluate.{key}: given, but the embedded engine decodes; give --evaluate.engine too")
        if asked == "embedded" and own != "transformers":
            raise TargetError(
                f"{stage}.engine: embedded needs the target in this process; where it fits, give --target.engine "
                f"transformers, else leave {stage}.engine out and {own} decodes"
            )
        if asked != "auto":
            return asked
        if own != "transformers":
            return own
        server = SERVERS[serve.engine]
        able = server.chosen_on_gpus and shutil.which(server.program_of(self.recipe)[0]) is not None
        return serve.engine if self.cards and able else "embedded"

    @cached_property
    def cards(self) -> list[str]:
        """The GPUs that this run may use, as CUDA_VISIBLE_DEVICES names them."""
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        return list(used(seen.split(",")[: torch.cuda.device_count()], self.recipe.device))

    def tell_engine(self, stage: Literal["regenerate", "evaluate"]) -> Decodes:
        """What decodes in a stage; on GPUs `auto` says what it chose, or what would be faster."""
        asked, name = getattr(self.recipe, stage).engine, self.engine_of(stage)
        if asked == "auto" and self.recipe.target.engine == "transformers" and self.cards:
            if name != "embedded":
                here = f"--{stage}.engine embedded: this process, several times slower"
                say(f"{stage}: {ENGINES[name].title} decodes; {here}")
            else:
                where = f"one of {len(self.cards)} GPUs" if len(self.cards) > 1 else "the GPU"
                say(
                    f"{stage}: this process decodes on {where}, without CUDA graphs and several times "
                    "slower than vLLM; python -m venv /opt/vllm && /opt/vllm/bin/pip install vllm, then give "
                    "--serve.engine vllm --serve.program '/opt/vllm/bin/vllm serve'"
                )
        return name

    @property
    def named_card(self) -> list[str]:
        """What `device: cuda:N` leaves a server that is started alone; none: it sees whatever there is."""
        return self.cards if ":" in self.recipe.device else []

    @property
    def card_groups(self) -> list[str]:
        """Cards of each server that this machine has room for, serve.tensor_parallel of them."""
        together = self.recipe.serve.tensor_parallel
        groups = [self.cards[i : i + together] for i in range(0, len(self.cards), together)]
        return [",".join(group) for group in groups if len(group) == together]

    def release_target(self) -> None:
        """Let go of a target on a card, as an engine that is started takes all of it."""
        if self.cards and self.recipe.target.engine == "transformers" and self.__dict__.pop("target", None):
            gc.collect()
            torch.cuda.empty_cache()

    def tell_unasked_url(self, command: str) -> None:
        """For commands that decode in several ways."""
        if self.recipe.evaluate.url is not None:
            say(f"{command}: evaluate.url is not asked, as its server drafts in one way, with one draft")

    def setup(self, engine: Decodes, logs: Path, draft: Path | None = None) -> Setup:
        """What a session of this engine decodes with; `draft`: another one than the run's own."""
        draft = draft or (self.draft_for(engine) if engine in SERVERS else self.files.draft)
        here = self.target if ENGINES[engine].in_process else None
        return Setup(self.recipe, draft, logs, here, groups=self.named_card)

    @cached_property
    def draft_config(self) -> DraftConfig:
        """Of the draft that this run trains: as the recipe describes it, or of the one that it goes on from."""
        text, recipe = self.target_config.get_text_config(), self.recipe
        layers, rows = text.num_hidden_layers, min(recipe.vocab.size, text.vocab_size)
        usual = METHODS[recipe.draft.method].config(recipe.draft, text, layers, rows)
        start = recipe.train.from_draft
        return earlier_draft(start, recipe, usual, layers)[0].config if start else usual

    @property
    def captured_layers(self) -> tuple[int, ...]:
        """What a capturing server has to keep: the taps, and the last layer's output for the teacher."""
        return (*self.draft_config.taps, self.target_config.get_text_config().num_hidden_layers)

    @cached_property
    def created_with(self) -> Provenance:
        return Provenance(
            command=masked(shlex.join(self.command)),
            commit=commit(),
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            seed=self.recipe.seed,
            hardware=hardware(self.recipe.device),
        )

    # --- the draft and what serves it -----------------------------------------------------------------------------

    @property
    def draft_engines(self) -> tuple[EngineName, ...]:
        """The engines that can serve the exported draft."""
        if not (self.files.draft / "config.json").exists():
            return ()
        taps = exported_taps(self.files.draft)
        return tuple(name for name, engine in SERVERS.items() if engine.serves(taps))

    def draft_for(self, engine: Decodes) -> Path:
        if not self.draft_engines:
            raise DataError(f"serve: no draft in {self.files.draft.parent}; run: draftsmith run RECIPE")
        if engine not in self.draft_engines:
            others = " and ".join(ENGINES[name].title for name in self.draft_engines)
            title = ENGINES[engine].title
            raise DataError(f"draft.taps: {title} cannot capture all of them, so the draft serves on {others}")
        return self.files.draft

    def require_whole_export(self) -> None:
        """Raises `DataError` where the exported draft is not as it was written."""
        state = StageState.readable(self.files.draft.parent / run_files.STATE)
        if state is not None and (damage := changed(self.files.draft.parent, state.outputs)):
            raise DataError(f"{damage[0]} changed since `export` wrote it; make it anew: draftsmith run RECIPE")

    def serving_shape(self, engine: EngineName) -> tuple[Shape, DraftSampling | None]:
        """The recipe's shape; where it is the default, what `tune` found fastest of all that this engine can, on itself
        or on the embedded one, and how drafts were taken there (None: nobody tells)."""
        settings = self.recipe.serve
        if not settings.tuned or settings.shape != DEFAULT_SHAPE:
            return settings.shape, None
        decoders: tuple[Decodes, ...] = (engine, "embedded")
        for path in map(self.files.tuned, decoders):
            tuned, here = Tuned.readable(path), hardware(self.recipe.device)
            if tuned is None:
                continue
            there = tuned.created_with.hardware
            if tuned.draft != draft_digest(self.files.draft) or (there.cpu, there.gpus) != (here.cpu, here.gpus):
                say(f"{path}: of another draft or machine, so left out; run: draftsmith tune RECIPE")
                continue
            best = fastest(tuned.tried, partial(self._can_serve, engine, tuned.temperature > 0))
            if best is None:
                say(f"{path}: nothing beat plain decoding there; the draft is served as the recipe says")
                return settings.shape, None
            say(f"shape {best}, measured by tune ({path}); --no-serve.tuned keeps {settings.shape}")
            return best.shape, best.drafts if tuned.temperature else None
        return settings.shape, None

    def _can_serve(self, engine: EngineName, warm: bool, tried: Tried) -> bool:
        """Whether the engine drafts so, and serve.draft_sampling lets it, which says nothing at temperature 0."""
        chosen, asked = SERVERS[engine], self.recipe.serve.draft_sampling
        able = chosen.greedy_because(tried.shape, self.files.draft) is None
        taken = not warm or (asked if able else "greedy") in ("auto", tried.drafts)
        return taken and chosen.drafts(tried.shape)

    def better_drafts(self, shape: Shape, engine: Decodes = "embedded") -> DraftSampling:
        """serve.draft_sampling; auto: what is accepted more, as this engine measured it, or else another."""
        asked = self.recipe.serve.draft_sampling
        if asked != "auto":
            return asked
        found = results_of(self.files)
        both = [r.acceptance for name, r in sorted(found.items(), key=lambda item: item[0] != engine)]
        return next((way for entries in both if (way := more_accepted(entries, shape))), "greedy")

    def serving_drafts(self, engine: EngineName, shape: Shape) -> DraftSampling:
        """The better ones where the engine can take them so."""
        drafts = self.better_drafts(shape, engine)
        why = SERVERS[engine].greedy_because(shape, self.files.draft) if drafts == "sampled" else None
        if why and self.recipe.serve.draft_sampling == "sampled":
            say(f"serve.draft_sampling: sampled given, but {why}; drafts are taken greedily")
        return "greedy" if why else drafts

    def serving(
        self,
        purpose: Purpose = "draft",
        engine: EngineName | None = None,
        elsewhere: tuple[str, Path] | None = None,
    ) -> Launch:
        """What `serve` runs, and what report, card and `run` print.

        `engine`: another one than serve.engine, without that one's program and extra flags; a tree becomes the chain of
        as many steps where it drafts chains only. `elsewhere`: where target and draft lie on somebody else's machine:
        the command is without this one's program, extra flags and port.
        """
        serve, (model, draft) = self.recipe.serve, elsewhere or (None, None)
        other = engine is not None and engine != serve.engine
        if other or elsewhere:
            serve = serve.model_copy(update={"engine": engine or serve.engine, "program": "", "extra": ""})
        if elsewhere:
            serve = serve.model_copy(update={"port": 8000, "host": "127.0.0.1"})
        if purpose == "draft":
            shape, drafts = self.serving_shape(serve.engine)
            if other and not SERVERS[serve.engine].drafts(shape):
                shape = Shape.chain(shape.steps)
            draft = draft or self.draft_for(serve.engine)
            self.require_whole_export()
            drafts = drafts or self.serving_drafts(serve.engine, shape)
            serve = serve.model_copy(update={"shape": shape, "draft_sampling": drafts})
        layers = self.captured_layers if purpose == "capture" else ()
        recipe = self.recipe.model_copy(update={"serve": serve})
        place = model or resolve_model(recipe.target.model)
        return SERVERS[serve.engine].launch(recipe, place, draft or Path(), purpose, layers)

    @property
    def serve_commands(self) -> dict[EngineName, str]:
        """The command of every engine that can serve the exported draft, the recipe's engine first."""
        own_first = sorted(self.draft_engines, key=lambda name: name != self.recipe.serve.engine)
        return {name: str(self.serving(engine=name)) for name in own_first}
