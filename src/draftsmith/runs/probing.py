"""Measure what a speed-up depends on: this machine, the engine of this process, or a server from outside.

No trained draft is needed: an untrained one of the same shape takes the same time. What a probe holds is told by
core/records/ (`Probe`), what is made of it by hardware/cost_model.py.
"""

import contextlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from draftsmith.core import run_files
from draftsmith.core.errors import TargetError
from draftsmith.core.progress import Meter
from draftsmith.core.recipe import EngineName
from draftsmith.core.records.data import Prompt
from draftsmith.core.records.machine import DraftTimes, MachineRates, ModelTimes, Probe
from draftsmith.core.shape import Shape
from draftsmith.core.sources import Source
from draftsmith.core.tables import table
from draftsmith.data.prompts import Tally, prompts_of
from draftsmith.data.regenerate import open_conversations
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.cache import StaticCache
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder, Drafter
from draftsmith.decoding.stopping import Ends
from draftsmith.decoding.tree import DraftTree
from draftsmith.drafts import METHODS
from draftsmith.drafts.directories import ReadyDraft, ready_draft
from draftsmith.engines import SERVERS
from draftsmith.engines.base import Setup
from draftsmith.evaluation.asking import balanced, time_group
from draftsmith.evaluation.profile import GREEDY
from draftsmith.hardware import interconnect
from draftsmith.hardware.cost_model import MeasuredCosts, interpolate
from draftsmith.hardware.presets import LAYER_S, Machine
from draftsmith.runs.run import Run
from draftsmith.targets.base import Target
from draftsmith.targets.local import LocalTarget
from draftsmith.targets.parts import DTYPES, resolve_device

WIDTHS = (*range(1, 17), 24, 32, 64, 96)
CONTEXT, LONG_CONTEXT = 128, 640
ROUNDS = 7
TOPKS = (1, 2, 4, 8)
REFERENCE, WIDE = Shape(3, 1, 4), Shape(3, 4, 16)  # whose real loops tell the overhead
LOOP_TOKENS = 24
SHORT, LONG = 8, 32  # tokens of two answers to the same prompt; the difference leaves the prompt out
BATCH_ROUNDS, BATCH_CONTEXT, BATCH_LENGTHS = 2, 16, (4, 20)
AT_ONCE = (1, 2, 4, 8, 16, 24, 32, 64)  # requests to a server
DRAFTED_AT = (1, 8, 24)  # requests at once at which a drafting server is measured
SERVER_ROUNDS, SERVER_PROMPTS = 3, 24
KERNELS_PER_LAYER = 12  # launched one by one; served engines replay graphs, as presets.LAYER_S has it


def _medians(work: Sequence[Callable[[], object]], device: torch.device, what: str) -> list[float]:
    """Median seconds of each piece. They take turns, so that a busy moment of the machine hits all of them alike."""
    seconds: list[list[float]] = [[] for _ in work]
    with Meter(what, ROUNDS * len(work), "pieces") as meter:
        for number in range(ROUNDS + 1):
            for piece, spent in zip(work, seconds, strict=True):
                started = interconnect.clock(device)
                piece()
                if number:  # the first round warms up
                    spent.append(interconnect.clock(device) - started)
                    meter.advance(1)
    return [statistics.median(spent) for spent in seconds]


# --- the machine alone --------------------------------------------------------------------------------------------


def machine_rates(device: torch.device, dtype: torch.dtype) -> MachineRates:
    """Memory bandwidth (of a copy: reading and writing), matrix product peak, smallest kernel, all-reduce."""
    big = torch.ones(64 << 20, dtype=torch.float32, device=device)
    other = torch.empty_like(big)
    size = 4096 if device.type == "cuda" else 1024
    square = torch.randn(size, size, device=device).to(dtype)
    tiny = torch.zeros(1, device=device)
    copy_s, product_s, launches_s = _medians(
        [lambda: other.copy_(big), lambda: square @ square, lambda: [tiny.add_(1) for _ in range(100)]],
        device,
        "machine",
    )
    if device.type == "cuda":
        gpus, memory = torch.cuda.device_count(), torch.cuda.get_device_properties(device).total_memory
        reduced = interconnect.all_reduce_latency(gpus, "nccl") if gpus > 1 else ()
    else:
        gpus, memory = 0, psutil.virtual_memory().total
        reduced = interconnect.all_reduce_latency(2, "gloo") if device.type == "cpu" else ()
    return MachineRates(
        gpus=gpus,
        memory_bytes=memory,
        bandwidth_bytes_s=2 * big.numel() * 4 / copy_s,
        flops_s=2 * size**3 / product_s,
        launch_s=launches_s / 100,
        all_reduce=reduced,
        topology=interconnect.topology(),
    )


def as_machine(name: str, rates: MachineRates) -> Machine:
    """The probed machine as a plan needs it: rates as measured, so nothing is discounted. Two processes that share a
    CPU's memory are no second device, so their all-reduce does not enter."""
    layer_s = KERNELS_PER_LAYER * rates.launch_s
    return Machine(
        name,
        max(1, rates.gpus),
        rates.memory_bytes,
        rates.bandwidth_bytes_s,
        rates.flops_s,
        min(LAYER_S, layer_s) if rates.gpus else layer_s,
        rates.all_reduce if rates.gpus > 1 else (),
        efficiency=1.0,
    )


# --- any engine, by requests at once ------------------------------------------------------------------------------


def by_requests(
    session: Target,
    prompts: list[list[int]],
    at_once: Sequence[int],
    rounds: int,
    what: str,
    sampling: Sampling = GREEDY,
    lengths: tuple[int, int] = (SHORT, LONG),
) -> list[tuple[float, float]]:
    """For each number of requests at once: median seconds (per token of each, per drafting step or 0) over rounds of
    different prompts. The prompts' own time cancels; they are asked once before, untimed, as a server that caches
    prefixes would spare only the longer request the prompt."""
    found = []
    with Meter(what, len(at_once) * rounds, "rounds") as meter:
        for number in at_once:
            times = []
            for start in range(0, number * rounds, number):
                chosen = [prompts[i % len(prompts)] for i in range(start, start + number)]
                _, brief, whole = (
                    time_group(session, chosen, length, (), sampling, ignore_end=True) for length in (1, *lengths)
                )
                spent, steps = whole.seconds - brief.seconds, whole.steps - brief.steps
                times.append((spent / (lengths[1] - lengths[0]), spent * number / steps if steps > 0 else 0.0))
                meter.advance(1)
            found.append((statistics.median(t for t, _ in times), statistics.median(s for _, s in times)))
    return found


def server_times(
    alone: Target, drafted: Target | None, prompts: list[list[int]], shape: Shape = REFERENCE
) -> ModelTimes:
    """The same curve from outside: n requests at once make forwards of n tokens.

    drafted: a server that drafts `shape` for the same target; what its steps take beyond a forward of w tokens of each
    request is the draft's, measured at several batches. Without one nothing is told of drafting there.
    """
    plain = by_requests(alone, prompts, AT_ONCE, SERVER_ROUNDS, "target")
    # more work never takes less time; what says so is noise
    highest = itertools.accumulate((seconds for seconds, _ in plain), max)
    forward = tuple(zip(map(float, AT_ONCE), highest, strict=True))
    draft = None
    if drafted is not None:
        steps = []
        measured = by_requests(drafted, prompts, DRAFTED_AT, 2 * SERVER_ROUNDS, "draft")
        for number, (_, step_s) in zip(DRAFTED_AT, measured, strict=True):
            if not step_s:
                raise TargetError("--draft-url: the server tells nothing of drafting; start it with `draftsmith serve`")
            verify_s = interpolate(forward, shape.draft_tokens * number)
            steps.append((float(number), max(0.0, step_s - verify_s) / shape.steps))
        draft = DraftTimes(by_batch=tuple(steps))
    return ModelTimes(context=CONTEXT, context_s=0.0, forward=forward, draft=draft)


# --- the engine of this process, piece by piece -------------------------------------------------------------------


@torch.inference_mode()
def embedded_times(target: LocalTarget, drafter: Drafter, prompt: list[int], sampling: Sampling = GREEDY) -> ModelTimes:
    """T(w), the draft's parts, what a loop adds, and steps of whole batches.

    prompt: real text, of any length above a few tokens; sampling: of regeneration, greedy if left out.
    """
    taps, device = tuple(drafter.taps), target.device
    long = (prompt * (LONG_CONTEXT // len(prompt) + 1))[:LONG_CONTEXT]
    cache = StaticCache(1, LONG_CONTEXT + max(WIDTHS))
    target.prefill(cache, [0], [long], taps)

    def verify(width: int, context: int) -> Callable[[], object]:
        tree = DraftTree([0] * width, [-1, *range(width - 1)])
        chain = torch.tensor(tree.depths), tree.ancestors()
        return lambda: target.logits(target.verify(cache, context, long[:width], *chain, taps)[1])

    seconds = _medians([*(verify(w, CONTEXT) for w in WIDTHS), verify(1, LONG_CONTEXT)], device, "target")
    context_s = max(0.0, (seconds[-1] - seconds[0]) / (LONG_CONTEXT - CONTEXT))
    times = ModelTimes(
        context=CONTEXT,
        context_s=context_s,
        forward=tuple((float(w), s) for w, s in zip(WIDTHS, seconds, strict=False)),
        draft=_draft_times(target, drafter, long),
    )
    plain_s, drafted = _loops(target, drafter, MeasuredCosts(Probe(engine="embedded", machine="", times=times)), long)
    counts = sorted({1, max(1, target.batch_size // 4), target.batch_size})
    short = [long[:BATCH_CONTEXT]] * target.batch_size
    steps = by_requests(target.session(), short, counts, BATCH_ROUNDS, "batches", sampling, BATCH_LENGTHS)
    beyond = (CONTEXT - BATCH_CONTEXT) * context_s  # told for the same context as the rest
    batched = tuple((float(rows), s + rows * beyond) for rows, (s, _) in zip(counts, steps, strict=True))
    return times.model_copy(update={"overhead_plain_s": plain_s, "overhead_drafted": drafted, "batched": batched})


def _draft_times(target: LocalTarget, drafter: Drafter, text: list[int]) -> DraftTimes:
    """Reading verified tokens, the first guess, each further one by its top-k."""
    states = target.capture([text[: CONTEXT + 1]], tuple(drafter.taps)).taps_TKH
    drafter.start()
    drafter.extend(states[:-1], text[1 : CONTEXT + 1])
    counts = (1, 2, 4)
    shapes = [Shape(1, 1, 2), *(Shape(5, k, 6) for k in TOPKS)]
    seconds = _medians(
        [
            *((lambda n=n: drafter.extend(states[:n], text[:n])) for n in counts),
            *((lambda shape=shape: drafter.propose(text[0], shape)) for shape in shapes),
        ],
        target.device,
        "draft",
    )
    extend, (first, *deep) = seconds[: len(counts)], seconds[len(counts) :]
    return DraftTimes(
        extend=tuple(zip(map(float, counts), extend, strict=True)),
        first_s=first,
        step=tuple((float(k), (s - first) / 4) for k, s in zip(TOPKS, deep, strict=True)),
    )


def _loops(
    target: LocalTarget, drafter: Drafter, costs: MeasuredCosts, text: list[int]
) -> tuple[float, tuple[tuple[float, float], ...]]:
    """Seconds of a real step beyond its parts: plain, and by verified tokens of a chain and of a wide tree."""
    plain, drafting = Decoder(target), Decoder(target, drafter)
    loops: dict[Shape | None, list[float]] = {None: [], REFERENCE: [], WIDE: []}
    context = CONTEXT + LOOP_TOKENS // 2
    with Meter("loops", ROUNDS * len(loops), "loops") as meter:
        for _ in range(ROUNDS):
            for shape, beyond in loops.items():
                decoder, never = (drafting if shape else plain), Ends(frozenset())
                answer = decoder.generate(text[:CONTEXT], Sampling(), LOOP_TOKENS, shape, ends=never)
                meter.advance(1)
                steps = len(answer.verified) if shape else len(answer.ids) - 1
                assert answer.seconds is not None, "this decoder tells"
                known = costs.forward_s(shape.draft_tokens if shape else 1, 1, context)
                if shape:
                    known += costs.draft_s(shape, answer.tau, 1, context)
                beyond.append(answer.seconds / steps - known)
    rest = {shape: max(0.0, statistics.median(beyond)) for shape, beyond in loops.items()}
    return rest[None], tuple((float(shape.draft_tokens), rest[shape]) for shape in (REFERENCE, WIDE))


# --- a run's probe -------------------------------------------------------------------------------------------------


def probe_here(run: Run) -> Probe:
    """This machine, with the target and a draft where the target runs in this process."""
    recipe, settings = run.recipe, run.recipe.regenerate
    times = target = dtype = draft = None
    if recipe.target.engine == "transformers" and run.target.library is None:
        ready, prompts = _any_draft(run), prompts_to_read(run, 3)
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k)
        times = embedded_times(run.target, ready.drafter(), max(prompts, key=len), sampling)
        target, dtype, draft = recipe.target.model, recipe.target.dtype, ready.draft.config.model_dump(mode="json")
    device = resolve_device(run.processes.device(recipe.device))
    rates = machine_rates(device, DTYPES[recipe.target.dtype])
    return Probe(
        engine="embedded" if times else None,
        machine=str(run.created_with.hardware.first(1 if times else None)),
        created_with=run.created_with,
        rates=rates,
        times=times,
        target=target,
        dtype=dtype,
        draft=draft,
    )


def probe_server(run: Run, engine: EngineName, url: str, draft_url: str | None, shape: Shape) -> Probe:
    """A running server of the target alone, and one that drafts for it."""
    server = run.recipe.server
    enough = server.model_copy(update={"concurrency": max(server.concurrency, *AT_ONCE)})
    setup = Setup(run.recipe.model_copy(update={"server": enough}), Path(), run.files.root)
    prompts = prompts_to_read(run, SERVER_PROMPTS)
    try:
        with contextlib.ExitStack() as stack:
            alone = stack.enter_context(SERVERS[engine].open(setup, None, url))
            drafted = stack.enter_context(SERVERS[engine].open(setup, shape, draft_url)) if draft_url else None
            times = server_times(alone, drafted, prompts, shape)
    except TargetError as error:  # here the URLs came by flags
        text = str(error).removeprefix("server.urls: ")
        raise TargetError(text if text.startswith("--") else f"--url: {text}") from None
    return Probe(
        engine=engine,
        machine=f"{engine} at {url}",
        created_with=run.created_with,
        times=times,
        target=run.recipe.target.model,
        dtype=run.recipe.target.dtype,
    )


def prompts_to_read(run: Run, count: int) -> list[list[int]]:
    """Prompts as the target reads them: the run's evaluation prompts, or those of the package before there is a run."""
    held_out = run.files.evaluation_prompts
    bundled = prompts_of(Source(name="bundled"), 1, False, run.recipe.seed, Tally())
    chosen = balanced(list(Prompt.read_rows(held_out) if held_out.exists() else bundled), count)
    settings = run.recipe.target
    chat = ChatFormat(run.tokenizer, settings.template, settings.template_options)
    return [c.ids for c in open_conversations(chosen, chat, run.recipe.regenerate.max_prompt_tokens)]


def _any_draft(run: Run) -> ReadyDraft:
    """The run's draft, or an untrained one of the shape that it will have: a step takes the same time."""
    recipe, target = run.recipe, run.target
    if (run.files.draft / run_files.WEIGHTS).exists():
        return ready_draft(target, run.files.draft)
    draft, rows = METHODS[recipe.draft.method].build(run.draft_config), torch.arange(run.draft_config.draft_vocab_size)
    return ReadyDraft(draft.to(target.device, DTYPES[recipe.target.dtype]), rows, target.embedding_rows())


# --- for a terminal -----------------------------------------------------------------------------------------------


def page(probe: Probe) -> str:
    """What was measured, as text for a terminal."""
    rows = [("machine", probe.machine)]
    if rates := probe.rates:
        rows += [
            ("memory", f"{rates.memory_bytes / 1e9:.0f} GB, {rates.bandwidth_bytes_s / 1e9:.1f} GB/s (copy)"),
            ("products", f"{rates.flops_s / 1e12:.2f} TFLOP/s; smallest kernel {rates.launch_s * 1e6:.1f} us"),
        ]
        if rates.all_reduce:
            who = f"{rates.gpus} GPUs, NCCL" if rates.gpus > 1 else "2 processes, gloo: no interconnect, only a check"
            sizes = ", ".join(f"{size / 1024:.0f} KB {seconds * 1e6:.0f} us" for size, seconds in rates.all_reduce)
            rows.append(("all-reduce", f"{sizes} ({who})"))
        if rates.topology:
            rows.append(("links", interconnect.in_words(rates.topology)))
    if probe.times is None:
        rows.append(("target", "runs on servers: give --url to measure one"))
        return table(rows)
    return f"{table(rows)}\n\n{_times_page(probe.times)}"


def _times_page(times: ModelTimes) -> str:
    def curve(points: Sequence[tuple[float, float]], before: str = "") -> str:
        return ", ".join(f"{before}{x:.0f} {seconds * 1e3:.2f}" for x, seconds in points)

    base = times.forward[0][1]
    cells = [(f"{tokens:.0f}", f"{s * 1e3:.2f}", f"{s / base:.2f}x") for tokens, s in times.forward]
    rows = [("batch ms", f"a step of regeneration, by sequences: {curve(times.batched)}")] if times.batched else []
    if times.draft and times.draft.by_batch:
        rows.append(("draft ms", f"one step, by requests at once: {curve(times.draft.by_batch)}"))
    elif times.draft:
        each, first = curve(times.draft.step, "top-"), f"first guess {times.draft.first_s * 1e3:.2f}"
        loop = (
            f"plain {times.overhead_plain_s * 1e3:.2f}; drafting, by verified tokens: {curve(times.overhead_drafted)}"
        )
        rows += [
            ("draft ms", f"reading n tokens: {curve(times.draft.extend)}; {first}; each further: {each}"),
            ("loop ms", loop),
        ]
    return table(cells, ("tokens", "forward ms", "of one"), range(3)) + (f"\n\n{table(rows)}" if rows else "")
