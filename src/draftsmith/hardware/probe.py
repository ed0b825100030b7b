"""Measure what a speed-up depends on: this machine with the embedded engine, or a server from outside.

A probe is plain JSON, which hardware/cost_model.py reads (`MeasuredCosts`); seconds and bytes throughout:
    engine, machine           embedded, vllm or sglang; what it ran on
    context                   cached tokens while it was measured; context_s: seconds more per further token
    forward [[tokens, s]]     one forward of the target, head included, over so many tokens
    draft                     extend [[tokens, s]], first_s, step [[topk, s]]: see `MeasuredCosts.draft_s`; of a
                              server by_batch [[requests, s of one draft step]]
    overhead_s                of a decoding step beside the models: plain, drafted [[verified tokens, s]]
    batched [[rows, s]]       embedded: one step of regeneration, sampling included, over so many sequences
    bandwidth_bytes_s, flops_s, launch_s, memory_bytes, all_reduce [[bytes, s]], topology    of the machine alone
No trained draft is needed: an untrained one of the same shape takes the same time.
"""

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx2 as httpx
import torch

from draftsmith.decoding.cache import StaticCache
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder, Eagle3Drafter
from draftsmith.decoding.tree import DraftTree, Shape
from draftsmith.errors import TargetError
from draftsmith.hardware import interconnect
from draftsmith.hardware.cost_model import MeasuredCosts, interpolate
from draftsmith.hardware.presets import LAYER_S, Machine
from draftsmith.progress import Meter
from draftsmith.targets.base import Generation
from draftsmith.targets.dialects import DIALECTS
from draftsmith.targets.local import LocalTarget

WIDTHS = (*range(1, 17), 24, 32, 64, 96)
CONTEXT, LONG_CONTEXT = 128, 640
ROUNDS = 7
TOPKS = (1, 2, 4, 8)
REFERENCE, WIDE = Shape(3, 1, 4), Shape(3, 4, 16)  # whose real loops tell the overhead
LOOP_TOKENS = 24
BATCH_ROUNDS, BATCH_STEPS, BATCH_CONTEXT = 2, (4, 20), 16
# Of a machine whose target runs elsewhere.
NO_MODEL: dict[str, Any] = {"engine": "none", "forward": None, "draft": None}
KERNELS_PER_LAYER = 12  # launched one by one; served engines replay graphs, as presets.LAYER_S has it


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _medians(work: Sequence[Callable[[], object]], device: torch.device, rounds: int, what: str) -> list[float]:
    """Median seconds of each piece. They take turns, so that a busy moment of the machine hits all of them alike."""
    seconds: list[list[float]] = [[] for _ in work]
    with Meter(what, rounds * len(work), "pieces") as meter:
        for number in range(rounds + 1):
            for piece, spent in zip(work, seconds, strict=True):
                started = _clock(device)
                piece()
                if number:  # the first round warms up
                    spent.append(_clock(device) - started)
                    meter.advance(1)
    return [statistics.median(spent) for spent in seconds]


def measure_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Memory bandwidth (of a copy: reading and writing), matrix product peak, smallest kernel, all-reduce."""
    big = torch.ones(64 << 20, dtype=torch.float32, device=device)
    other = torch.empty_like(big)
    size = 4096 if device.type == "cuda" else 1024
    square = torch.randn(size, size, device=device).to(dtype)
    tiny = torch.zeros(1, device=device)
    copy_s, product_s, launches_s = _medians(
        [lambda: other.copy_(big), lambda: square @ square, lambda: [tiny.add_(1) for _ in range(100)]],
        device,
        ROUNDS,
        "machine",
    )
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if gpus > 1:
        reduced = interconnect.all_reduce_latency(gpus, "nccl")
    else:
        reduced = interconnect.all_reduce_latency(2, "gloo") if device.type == "cpu" else []
    return {
        "gpus": gpus,
        "memory_bytes": memory,
        "bandwidth_bytes_s": 2 * big.numel() * 4 / copy_s,
        "flops_s": 2 * size**3 / product_s,
        "launch_s": launches_s / 100,
        "all_reduce": reduced,
        "topology": interconnect.topology(),
    }


def as_machine(parts: dict[str, Any]) -> Machine:
    """The probed machine as a plan needs it: rates as measured, so nothing is discounted. Two processes that share a
    CPU's memory are no second device, so their all-reduce does not enter."""
    return Machine(
        parts["machine"],
        max(1, parts["gpus"]),
        parts["memory_bytes"],
        parts["bandwidth_bytes_s"],
        parts["flops_s"],
        min(LAYER_S, KERNELS_PER_LAYER * parts["launch_s"]) if parts["gpus"] else KERNELS_PER_LAYER * parts["launch_s"],
        tuple((size, seconds) for size, seconds in parts["all_reduce"]) if parts["gpus"] > 1 else (),
        efficiency=1.0,
    )


def _chain(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    tree = DraftTree([0] * width, [-1, *range(width - 1)])
    return torch.tensor(tree.depths), tree.ancestors()


def batched_steps(target: LocalTarget, prompt: list[int], sampling: Sampling) -> list[list[float]]:
    """[rows, seconds] of one decoding step of `LocalTarget.generate`, up to its batch size."""
    ends, target.eos_ids = target.eos_ids, frozenset()  # all rows write to the end
    points = []
    try:
        most = target.batch_size
        counts = sorted({1, max(1, most // 4), most})
        with Meter("batches", len(counts) * BATCH_ROUNDS, "runs") as meter:
            for rows in counts:
                spent = []
                for _ in range(BATCH_ROUNDS):
                    times = []
                    for steps in BATCH_STEPS:
                        started = _clock(target.device)
                        list(target.generate([prompt] * rows, sampling, steps))
                        times.append(_clock(target.device) - started)
                    spent.append((times[1] - times[0]) / (BATCH_STEPS[1] - BATCH_STEPS[0]))
                    meter.advance(1)
                points.append([float(rows), min(spent)])
    finally:
        target.eos_ids = ends
    return points


@torch.inference_mode()
def probe_embedded(
    target: LocalTarget, drafter: Eagle3Drafter, prompt: list[int], sampling: Sampling | None = None
) -> dict[str, Any]:
    """T(w), the draft's parts, what a loop adds, and steps of whole batches.

    prompt: real text, of any length above a few tokens; sampling: of regeneration, greedy if left out.
    """
    taps, device = tuple(drafter.taps), target.device
    long = (prompt * (LONG_CONTEXT // len(prompt) + 1))[:LONG_CONTEXT]
    cache = StaticCache(1, LONG_CONTEXT + max(WIDTHS))
    target.prefill(cache, [0], [long], taps)

    def verify(width: int, context: int) -> Callable[[], object]:
        chain = _chain(width)
        ids = long[:width]
        return lambda: target.logits(target.verify(cache, context, ids, *chain, taps)[1])

    times = _medians([*(verify(w, CONTEXT) for w in WIDTHS), verify(1, LONG_CONTEXT)], device, ROUNDS, "target")
    forward = [[float(w), s] for w, s in zip(WIDTHS, times, strict=False)]

    states = target.capture([long[: CONTEXT + 1]], taps).taps_TKH
    drafter.start()
    drafter.extend(states[:-1], long[1 : CONTEXT + 1])
    extends = [1, 2, 4]
    shapes = [Shape(1, 1, 2), *(Shape(5, k, 6) for k in TOPKS)]
    parts = _medians(
        [
            *((lambda n=n: drafter.extend(states[:n], long[:n])) for n in extends),
            *((lambda shape=shape: drafter.propose(long[0], shape)) for shape in shapes),
        ],
        device,
        ROUNDS,
        "draft",
    )
    extend, (first, *deep) = parts[: len(extends)], parts[len(extends) :]
    context_s = max(0.0, (times[-1] - times[0]) / (LONG_CONTEXT - CONTEXT))
    result = {
        "engine": "embedded",
        "context": CONTEXT,
        "context_s": context_s,
        "forward": forward,
        "draft": {
            "extend": [[float(n), s] for n, s in zip(extends, extend, strict=True)],
            "first_s": first,
            "step": [[float(k), (s - first) / 4] for k, s in zip(TOPKS, deep, strict=True)],
        },
    }

    # The real loop: what it takes beyond its parts, plain, with a chain and with a wide tree.
    costs = MeasuredCosts({**result, "machine": ""})
    plain, drafting = Decoder(target), Decoder(target, drafter)
    loops: dict[Shape | None, list[float]] = {None: [], REFERENCE: [], WIDE: []}
    with Meter("loops", ROUNDS * len(loops), "loops") as meter:
        for _ in range(ROUNDS):
            for shape, beyond in loops.items():
                decoder = drafting if shape else plain
                made = decoder.generate(long[:CONTEXT], Sampling(), LOOP_TOKENS, shape)
                meter.advance(1)
                if not made.steps:
                    raise TargetError("probe: the target ended the text at once; give prompts that it goes on with")
                known = costs.forward_s(shape.draft_tokens if shape else 1, 1, CONTEXT)
                if shape:
                    tau = 1 + sum(step.accepted for step in made.steps) / len(made.steps)
                    known += costs.draft_s(shape, tau, 1, CONTEXT)
                beyond.append(made.seconds / len(made.steps) - known)
    rest = {shape: max(0.0, statistics.median(beyond)) for shape, beyond in loops.items()}
    drafted = [[float(shape.draft_tokens), rest[shape]] for shape in (REFERENCE, WIDE)]
    batched = batched_steps(target, long[:BATCH_CONTEXT], sampling or Sampling())
    for point in batched:  # told for the same context as the rest
        point[1] += (CONTEXT - BATCH_CONTEXT) * point[0] * context_s
    return {**result, "overhead_s": {"plain": rest[None], "drafted": drafted}, "batched": batched}


# --- a server, from outside ------------------------------------------------------------------------------------------

CONCURRENCIES = (1, 2, 4, 8, 16, 24, 32, 64)
DRAFTED_AT = (1, 8, 24)  # requests at once at which a drafting server is measured
SHORT, LONG = 8, 32  # tokens; the difference leaves the prompt out


class Server:
    """A running server, asked for a fixed number of tokens by so many requests at once."""

    def __init__(self, url: str, engine: str, api_key_env: str):
        self.url, self.engine, self.dialect = url.rstrip("/"), engine, DIALECTS[engine]
        key = os.environ.get(api_key_env, "")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def complete(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[Generation]]:
        """Seconds until all prompts, asked at once, have exactly so many tokens, and what was written."""

        async def every() -> tuple[float, list[Generation]]:
            async with httpx.AsyncClient(headers=self.headers, timeout=600, trust_env=False) as client:
                models = (await client.get(f"{self.url}/v1/models")).raise_for_status().json()
                name = models["data"][0]["id"]

                async def ask(number: int, ids: list[int]) -> Generation:
                    path, body = self.dialect.completion(name, ids, Sampling(), tokens, (), number)
                    body.get("sampling_params", body)["ignore_eos"] = True
                    answer = await client.post(self.url + path, json=body)
                    return self.dialect.read_completion(answer.raise_for_status().json())

                started = time.perf_counter()
                made = await asyncio.gather(*(ask(number, ids) for number, ids in enumerate(prompts)))
                return time.perf_counter() - started, made

        try:
            return asyncio.run(every())
        except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
            raise TargetError(f"--url: {self.url} does not answer as {self.engine} does: {error!r:.200}") from None

    def decode(self, prompts: list[list[int]], short: int, long: int) -> tuple[float, float, list[Generation]]:
        """(seconds per token of each, per drafting step or 0, the longer answers); the prompts' own time cancels.

        Asked once before, untimed: a server that caches prefixes would spare only the longer request the prompt.
        """
        self.complete(prompts, 1)
        brief_s, brief = self.complete(prompts, short)
        whole_s, whole = self.complete(prompts, long)
        spent, steps = whole_s - brief_s, sum(len(g.verified) for g in whole) - sum(len(g.verified) for g in brief)
        return spent / (long - short), spent * len(prompts) / steps if steps > 0 else 0.0, whole

    def measure(self, prompts: list[list[int]], at_once: Sequence[int], rounds: int) -> list[tuple[float, float]]:
        """For each number of requests at once: medians of `decode`'s two times over rounds of different prompts."""
        self.complete(prompts[:1], SHORT)  # warm
        everything = []
        with Meter(f"{self.engine} at {self.url}", len(at_once) * rounds, "rounds") as meter:
            for number in at_once:
                times = []
                for start in range(0, number * rounds, number):
                    chosen = [prompts[i % len(prompts)] for i in range(start, start + number)]
                    times.append(self.decode(chosen, SHORT, LONG))
                    meter.advance(1)
                everything.append((statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)))
        return everything


def probe_server(
    url: str,
    engine: str,
    prompts: list[list[int]],
    api_key_env: str,
    draft_url: str | None = None,
    shape: Shape = REFERENCE,
    concurrencies: Sequence[int] = CONCURRENCIES,
    rounds: int = 3,
) -> dict[str, Any]:
    """The same curve from outside: n requests at once make forwards of n tokens.

    draft_url: a server that drafts `shape` for the same target; what its steps take beyond a forward of w tokens of
    each request is the draft's, measured at several batches. Without one nothing is told of drafting there.
    """
    plain = Server(url, engine, api_key_env).measure(prompts, concurrencies, rounds)
    forward = [[float(n), s] for n, (s, _) in zip(concurrencies, plain, strict=True)]
    for left, right in itertools.pairwise(forward):
        right[1] = max(left[1], right[1])  # more work never takes less time; what says so is noise
    per_step: list[list[float]] = []
    if draft_url:
        drafting = Server(draft_url, engine, api_key_env).measure(prompts, DRAFTED_AT, 2 * rounds)
        for number, (_, step_s) in zip(DRAFTED_AT, drafting, strict=True):
            if not step_s:
                raise TargetError(
                    f"--draft-url: {draft_url} tells nothing of drafting; start it with `draftsmith serve`"
                )
            verify_s = interpolate(forward, shape.draft_tokens * number)
            per_step.append([float(number), max(0.0, step_s - verify_s) / shape.steps])
    return {
        "engine": engine,
        "context": CONTEXT,
        "context_s": 0.0,
        "forward": forward,
        "draft": {"by_batch": per_step} if draft_url else None,
        "overhead_s": {"plain": 0.0, "drafted": [[1.0, 0.0]]},
    }


def describe(parts: dict[str, Any]) -> str:
    """The probe as tables for a terminal."""
    lines = [f"machine    {parts['machine']}"]
    if "flops_s" in parts:
        lines += [
            f"memory     {parts['memory_bytes'] / 1e9:.0f} GB, {parts['bandwidth_bytes_s'] / 1e9:.1f} GB/s (copy)",
            f"products   {parts['flops_s'] / 1e12:.2f} TFLOP/s; smallest kernel {parts['launch_s'] * 1e6:.1f} us",
        ]
    if parts.get("all_reduce"):
        who = f"{parts['gpus']} GPUs, NCCL" if parts["gpus"] > 1 else "2 processes, gloo: no interconnect, only a check"
        sizes = ", ".join(f"{size / 1024:.0f} KB {seconds * 1e6:.0f} us" for size, seconds in parts["all_reduce"])
        lines.append(f"all-reduce {sizes} ({who})")
    if parts.get("topology"):
        lines.append(f"links      {interconnect.describe(parts['topology'])}")
    if parts["forward"] is None:
        return "\n".join([*lines, "", "the target runs on servers: give --url to measure one"])
    base = parts["forward"][0][1]
    lines += ["", f"{'tokens':>8} {'forward ms':>11} {'of one':>7}"]
    lines += [f"{tokens:8.0f} {seconds * 1e3:11.2f} {seconds / base:6.2f}x" for tokens, seconds in parts["forward"]]
    if (draft := parts["draft"]) and "by_batch" in draft:
        steps = ", ".join(f"{number:.0f} {seconds * 1e3:.2f}" for number, seconds in draft["by_batch"])
        lines += ["", f"draft ms   one step, by requests at once: {steps}"]
    elif draft:
        step = ", ".join(f"top-{k:.0f} {seconds * 1e3:.2f}" for k, seconds in draft["step"])
        extend = ", ".join(f"{n:.0f} {seconds * 1e3:.2f}" for n, seconds in draft["extend"])
        loop = ", ".join(f"{n:.0f} {seconds * 1e3:.2f}" for n, seconds in parts["overhead_s"]["drafted"])
        if "batched" in parts:
            steps = ", ".join(f"{rows:.0f} {seconds * 1e3:.1f}" for rows, seconds in parts["batched"])
            lines += ["", f"batch ms   a step of regeneration, by sequences: {steps}"]
        lines += [
            "",
            f"draft ms   reading n tokens: {extend}; first guess {draft['first_s'] * 1e3:.2f}; each further: {step}",
            f"loop ms    plain {parts['overhead_s']['plain'] * 1e3:.2f}; drafting, by verified tokens: {loop}",
        ]
    return "\n".join(lines)
