"""The stages of a run: what each of them does, and what decides that it has to be done again."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from draftsmith.core import files, run_files
from draftsmith.core.errors import CheckpointError, DataError, RecipeError, ServeError, TargetError
from draftsmith.core.files import JsonObject
from draftsmith.core.history import target_part
from draftsmith.core.progress import say
from draftsmith.core.recipe import BOOKKEEPING, MEASURED_WITH
from draftsmith.data.prompts import gather
from draftsmith.data.regenerate import Regeneration
from draftsmith.data.sets import local_files
from draftsmith.data.sources import data_files
from draftsmith.data.templates import ChatFormat
from draftsmith.data.vocabulary import DraftVocabulary, build_vocabulary, require_size
from draftsmith.drafts.directories import files_of, inspect_draft
from draftsmith.engines import ENGINES, SERVERS
from draftsmith.engines.base import Setup
from draftsmith.evaluation.evaluate import Evaluation
from draftsmith.hardware.presets import peak_flops_s
from draftsmith.runs.run import Run
from draftsmith.targets.parts import resolve_device
from draftsmith.training.export import export
from draftsmith.training.tracking import require_tracker
from draftsmith.training.trainer import Trainer


@dataclass(frozen=True)
class Stage:
    """`key` and `inputs` decide whether it runs; `resume_key` whether its directory can be continued."""

    name: str
    key: Callable[["Run"], Any]
    inputs: Callable[["Run"], list[Path]]
    run: Callable[["Run", Path], Any]
    resume_key: Callable[["Run"], Any] | None = None
    always: bool = False
    """Tells of whatever is there, so it is made anew each time, and needs no key."""
    memory: tuple[str, ...] = ()
    """Keys of the recipe that what it holds at once grows with."""
    require_possible: Callable[["Run"], None] = lambda run: None
    """Raises what speaks against it already where the stages before it, hours of work, have not run."""


def _source_files(run: Run) -> list[Path]:
    return [path for s in (*run.recipe.prompts.sources, *run.recipe.prompts.evaluation) for path in data_files(s.name)]


def _regenerate(run: Run, out: Path) -> None:
    """This run's target is asked, or servers that are started on all GPUs."""
    name = run.tell_engine("regenerate")
    with contextlib.ExitStack() as stack:
        if name == "embedded" or name == run.recipe.target.engine:
            target = run.target
        else:
            run.release_target()
            setup = Setup(run.recipe, Path(), out, groups=run.card_groups)
            target = stack.enter_context(SERVERS[name].open(setup, None))
        chat = ChatFormat.of(run.recipe, target)
        Regeneration(run.recipe, target, chat, run.files.training_prompts, out).run()


def _vocab(run: Run, out: Path) -> None:
    size = run.target.identity.vocab_size
    # what a draft vocabulary never leaves out, as far as the target has rows for it
    special = {token for token in {*run.tokenizer.all_special_ids, *run.target.eos_ids} if token < size}
    build_vocabulary(run.recipe, run.files.completions, size, special, run.files)


def _train(run: Run, out: Path) -> None:
    recipe, vocabulary = run.recipe, DraftVocabulary.load(run.files.vocabulary)
    on_gpu = recipe.device != "cpu" and recipe.train.dtype == "bf16" and torch.cuda.is_available()
    peak = peak_flops_s(torch.cuda.get_device_name()) if on_gpu else None
    Trainer(recipe, run.target, run.files.completions, vocabulary, out, run.processes, peak).train()


def _export(run: Run, out: Path) -> None:
    provenance = {"version": version("draftsmith"), "commit": run.created_with.commit}
    export(run.files.train, DraftVocabulary.load(run.files.vocabulary), run.files.draft, provenance)


def _evaluate(run: Run, out: Path) -> None:
    sets = run.evaluation_sets()  # first, as nothing may be lost to a set that cannot be read
    name = run.tell_engine("evaluate")
    stuck = name == "embedded" and run.target.library is not None and not run.target.library.can_cut_back
    if stuck and run.recipe.evaluate.engine == "auto":
        name = run.recipe.serve.engine
        say(f"evaluate: this target's cache cannot be cut back in this process, so {name} verifies its drafts")
    if name in SERVERS and run.recipe.evaluate.url is None:
        run.release_target()
    setup = replace(run.setup(name, out), groups=run.card_groups)
    Evaluation(ENGINES[name], setup, run.files.evaluation_prompts, out, sets).run(run.created_with)


def _report(run: Run, out: Path) -> None:
    from draftsmith.evaluation.report import write_report

    write_report(run.files, run.tokenizer, run.serve_commands)


def starting_draft(run: Run) -> list[Path]:
    """The draft that training goes on from: its content decides, not its place."""
    start = run.recipe.train.from_draft
    if start is None:
        return []
    if start.resolve() == run.files.draft.resolve():
        raise RecipeError(f"train.from_draft: {start} is this run's own draft; give the new one another --out")
    for problem in inspect_draft(start).blocking(lenient=True):
        raise CheckpointError(f"train.from_draft: {start}: {problem}; run: draftsmith inspect {start}")
    return files_of(start)


def _require_vocabulary(run: Run) -> None:
    if run.recipe.train.from_draft is None:
        special = len(set(run.tokenizer.all_special_ids))
        require_size(run.recipe.vocab.size, run.target_config.get_text_config().vocab_size, special)


def _require_regeneration(run: Run) -> None:
    recipe = run.recipe
    run.engine_of("regenerate")
    resolve_device(run.processes.device(recipe.device))
    if recipe.target.engine != "transformers" and not recipe.server.urls:
        raise TargetError(f"server.urls: none given; target.engine {recipe.target.engine} needs at least one URL")
    ChatFormat(run.tokenizer, recipe.target.template, recipe.target.template_options)


def _require_training(run: Run) -> None:
    recipe = run.recipe
    require_tracker(recipe.train.track)
    starting_draft(run)
    _ = run.draft_config
    run.processes.require_possible(recipe.train)
    if recipe.target.engine == "transformers":
        run.require_room()
    else:
        SERVERS[recipe.target.engine].require_capture(recipe)


def _require_evaluation(run: Run) -> None:
    recipe, settings, name = run.recipe, run.recipe.evaluate, run.engine_of("evaluate")
    for chosen in settings.sets:
        local_files(chosen)
    if name not in SERVERS:
        return
    server, shapes = SERVERS[name], ", ".join(map(str, settings.shapes))
    if not any(map(server.drafts, settings.shapes)):
        raise DataError(f"evaluate.shapes: {shapes} given, none that {server.title} can draft; add 3/1/4")
    if settings.url is not None:
        if len(settings.shapes) > 1:
            raise RecipeError(
                f"evaluate.shapes: {shapes} given, but the server of evaluate.url drafts one of them; name it, as in "
                "--evaluate.shapes 3/1/4"
            )
        if recipe.serve.draft_sampling == "auto" and any(settings.temperatures):
            raise RecipeError(
                "serve.draft_sampling: auto given, but the server of evaluate.url takes drafts in one way; name it: "
                "--serve.draft-sampling greedy or sampled"
            )
        return
    server.require_settings(recipe)
    if run.cards and recipe.serve.tensor_parallel > len(run.cards):
        raise ServeError(f"serve.tensor_parallel: {recipe.serve.tensor_parallel} given; {len(run.cards)} GPUs are here")
    if not server.serves(run.draft_config.taps):
        raise DataError(f"draft.taps: {server.title} cannot capture all of them; give others, or another engine")


def _part(*names: str, **without: set[str]) -> Callable[[Run], Any]:
    """Key made of these parts of the recipe, some of them without some of their keys."""

    def key(run: Run) -> JsonObject:
        recipe = run.recipe.model_dump(mode="json", exclude=without)
        return {name: target_part(recipe) if name == "target" else recipe[name] for name in (*names, *without)}

    return key


def _regeneration_key(*without: str) -> Callable[[Run], Any]:
    part = _part("target", "seed", regenerate={"engine", *without})  # whoever answers for it

    def key(run: Run) -> JsonObject:
        # once whole files of this process were greedy, so that a run of few of them had another share than it was asked
        by_name = run.recipe.regenerate.greedy_share and run.engine_of("regenerate") == "embedded"
        return part(run) | ({"greedy": "by name"} if by_name else {})

    return key


def _evaluation_key(run: Run, *without: str) -> list[Any]:
    name = run.engine_of("evaluate")
    serve = {"draft_sampling"} if name == "embedded" else MEASURED_WITH
    local = [chosen.path for chosen in run.recipe.evaluate.sets if chosen.path and not without]
    return [
        [files.digest(*data_files(path)) for path in local],
        [name, run.recipe.device],
        _part("target", "seed")(run),
        run.recipe.evaluate.model_dump(mode="json", exclude=set(without)),
        run.recipe.regenerate.max_prompt_tokens,
        run.recipe.serve.model_dump(mode="json", include=serve),
    ]


STAGES = (
    Stage("prompts", _part("prompts", "seed"), _source_files, lambda run, out: gather(run.recipe, out)),
    Stage(
        "regenerate",
        _regeneration_key(),
        lambda run: [run.files.training_prompts],
        _regenerate,
        # More tokens of the same run continue it.
        _regeneration_key("max_tokens"),
        memory=("regenerate.batch_size",),
        require_possible=_require_regeneration,
    ),
    Stage(
        "vocab",
        _part("target", "vocab"),
        lambda run: [*run_files.shards(run.files.completions), *starting_draft(run)],
        _vocab,
        require_possible=_require_vocabulary,
    ),
    Stage(
        "train",
        _part("target", "draft", "seed", train={"from_draft"}),
        lambda run: [*run_files.shards(run.files.completions), run.files.vocabulary, *starting_draft(run)],
        _train,
        # What is only watched or kept does not restart a training.
        lambda run: [
            _part("target", "draft", "seed")(run),
            run.recipe.train.model_dump(mode="json", exclude=BOOKKEEPING),
        ],
        memory=("train.pack_tokens", "train.max_document_tokens"),
        require_possible=_require_training,
    ),
    Stage(
        "export",
        lambda run: {},
        lambda run: [
            run.files.train / run_files.SUMMARY,
            *sorted(run.files.train.glob("checkpoint-*/draft.safetensors")),
            *run.files.train.glob("best/draft.safetensors"),
        ],
        _export,
    ),
    Stage(
        "evaluate",
        _evaluation_key,
        lambda run: [run.files.draft / run_files.WEIGHTS, run.files.evaluation_prompts],
        _evaluate,
        # Sets are measured one by one, so another one continues it.
        lambda run: _evaluation_key(run, "sets"),
        memory=("evaluate.lossless_prompts", "regenerate.batch_size"),
        require_possible=_require_evaluation,
    ),
    Stage("report", lambda run: {}, lambda run: [], _report, always=True),
)
