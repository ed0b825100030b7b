"""What a probe of this machine measures with: the run's target, a draft and prompts, before there is a run, too."""

import contextlib
import tempfile
from pathlib import Path

import torch

from draftsmith.core import run_files
from draftsmith.core.errors import TargetError
from draftsmith.core.recipe import EngineName, PromptsRecipe
from draftsmith.core.records.data import Prompt
from draftsmith.core.records.machine import Probe
from draftsmith.core.run_files import RunFiles
from draftsmith.core.shape import Shape
from draftsmith.data.prompts import gather
from draftsmith.data.regenerate import open_conversations
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.sampling import Sampling
from draftsmith.drafts import METHODS
from draftsmith.drafts.directories import ReadyDraft, ready_draft
from draftsmith.engines import SERVERS
from draftsmith.engines.base import Setup
from draftsmith.evaluation.asking import balanced
from draftsmith.hardware import probe as probing
from draftsmith.runs.run import Run
from draftsmith.targets.parts import DTYPES, resolve_device

SERVER_PROMPTS = 24


def probe_here(run: Run) -> Probe:
    """This machine, with the target and a draft where the target runs in this process."""
    recipe, settings = run.recipe, run.recipe.regenerate
    times = None
    if recipe.target.engine == "transformers" and run.target.library is None:
        ready, prompts = _any_draft(run), prompts_to_read(run, 3)
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k)
        times = probing.embedded_times(run.target, ready.drafter(), max(prompts, key=len), sampling)
    device = resolve_device(run.processes.device(recipe.device))
    rates = probing.machine_rates(device, DTYPES[recipe.target.dtype])
    return Probe(
        engine="embedded" if times else None,
        machine=str(run.created_with.hardware),
        created_with=run.created_with,
        rates=rates,
        times=times,
    )


def probe_server(run: Run, engine: EngineName, url: str, draft_url: str | None, shape: Shape) -> Probe:
    """A running server of the target alone, and one that drafts for it."""
    server = run.recipe.server
    enough = server.model_copy(update={"concurrency": max(server.concurrency, *probing.AT_ONCE)})
    setup = Setup(run.recipe.model_copy(update={"server": enough}), Path(), run.files.root)
    prompts = prompts_to_read(run, SERVER_PROMPTS)
    try:
        with contextlib.ExitStack() as stack:
            alone = stack.enter_context(SERVERS[engine].open(setup, None, url))
            drafted = stack.enter_context(SERVERS[engine].open(setup, shape, draft_url)) if draft_url else None
            times = probing.server_times(alone, drafted, prompts, shape)
    except TargetError as error:  # here the URLs came by flags
        text = str(error).removeprefix("server.urls: ")
        raise TargetError(text if text.startswith("--") else f"--url: {text}") from None
    return Probe(engine=engine, machine=f"{engine} at {url}", created_with=run.created_with, times=times)


def prompts_to_read(run: Run, count: int) -> list[list[int]]:
    """Prompts as the target reads them: the run's evaluation prompts, or those of the package before there is a run."""
    with tempfile.TemporaryDirectory() as scratch:
        held_out = run.files.evaluation_prompts
        if not held_out.exists():
            held_out = RunFiles(Path(scratch)).evaluation_prompts
            gather(run.recipe.model_copy(update={"prompts": PromptsRecipe()}), held_out.parent)
        chosen = balanced(list(Prompt.read_rows(held_out)), count)
    settings = run.recipe.target
    chat = ChatFormat(run.tokenizer, settings.template, settings.template_options)
    return [c.ids for c in open_conversations(chosen, chat, run.recipe.regenerate.max_prompt_tokens)]


def _any_draft(run: Run) -> ReadyDraft:
    """The run's draft, or an untrained one of the recipe's shape: a step takes the same time."""
    recipe, target = run.recipe, run.target
    if (run.files.draft / run_files.WEIGHTS).exists():
        return ready_draft(target, run.files.draft)
    rows, method = min(recipe.vocab.size, target.identity.vocab_size), METHODS[recipe.draft.method]
    draft = method.build(method.config(recipe.draft, target.config, target.identity.num_layers, rows))
    return ReadyDraft(draft.to(target.device, DTYPES[recipe.target.dtype]), torch.arange(rows), target.embedding_rows())
