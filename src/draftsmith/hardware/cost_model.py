"""Speed-up of speculative decoding, from an accept length and the costs of one step (docs/speedup-model.md).

    S = tau / c,    c = (T_verify(w, B) + T_draft + T_overhead) / T_decode(B)

One step verifies w tokens of each of B sequences and yields tau of them; plain decoding pays T_decode for one. The
costs come from a probe of the machine itself, or from a preset and the sizes of the two models (a roofline).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.core.records.machine import ModelTimes, Prediction, Probe
from draftsmith.core.shape import Shape
from draftsmith.drafts.method import DraftConfig
from draftsmith.hardware.presets import Machine
from draftsmith.hardware.sizes import TargetSize

# Batches that break-even is looked for at: all up to 64, then six to each doubling, up to 1024.
GRID = (*range(1, 65), *(int(64 * 2 ** (i / 6)) for i in range(1, 25)))
BEYOND = 2.0  # times the largest measured forward: as far as its last straight line is trusted


def interpolate(points: Sequence[Sequence[float]], x: float) -> float:
    """Straight lines between measured points; beyond the last, the line of the last two goes on."""
    if len(points) == 1 or x <= points[0][0]:
        return points[0][1]
    right = next((i for i, point in enumerate(points) if point[0] >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class MeasuredCosts:
    """What a probe measured (runs/probing.py).

    Costs are seconds; `tokens` are per sequence, `batch` counts sequences, `context` is cached tokens of each.
    A forward of B sequences with w tokens each costs what one of B * w tokens does: weights are read once either way.
    """

    probe: Probe

    @property
    def name(self) -> str:
        return self.probe.machine

    @property
    def times(self) -> ModelTimes:
        assert self.probe.times is not None, "a probe of a machine alone is read as a roofline"
        return self.probe.times

    @property
    def reach(self) -> float:
        """Most tokens of a forward that anything is known of."""
        return BEYOND * self.times.forward[-1][0]

    def _beyond_s(self, batch: int, context: int) -> float:
        return max(0, context - self.times.context) * batch * self.times.context_s

    def forward_s(self, tokens: int, batch: int, context: int) -> float:
        """One forward of the target, head included."""
        return interpolate(self.times.forward, tokens * batch) + self._beyond_s(batch, context)

    def decode_s(self, batch: int, context: int) -> float:
        """One plain decoding step of `batch` sequences."""
        if batch > 1 and self.times.batched:  # rows with caches of their own, and their sampling
            return interpolate(self.times.batched, batch) + self._beyond_s(batch, context)
        return self.forward_s(1, batch, context) + self.times.overhead_plain_s

    def draft_s(self, shape: Shape, tau: float, batch: int, context: int) -> float:
        """All of a step's drafting: reading the tau verified tokens, then `steps` guesses deep."""
        draft = self.times.draft
        assert draft is not None, "the probe measured no draft"
        if draft.by_batch:
            return shape.steps * max(0.0, interpolate(draft.by_batch, batch))
        alone = interpolate(draft.extend, tau) + draft.first_s + (shape.steps - 1) * interpolate(draft.step, shape.topk)
        # A draft grows with the batch as its target does: both are a few matrices that every token passes.
        return alone * interpolate(self.times.forward, batch) / interpolate(self.times.forward, 1)

    def overhead_s(self, shape: Shape) -> float:
        """What one drafted step costs beside the two models."""
        return max(0.0, interpolate(self.times.overhead_drafted, shape.draft_tokens))


# Served engines replay CUDA graphs, so a layer costs what its kernels take at least, whatever they read. Calibrated on
# published single-stream rates: Llama-3.1-8B bf16 on one H100 (about 140 tokens/s), MiniMax-M2.5 FP8 on four H200 (109
# tokens/s, the baseline of thoughtworks' M2.5 draft).
MOE_LAUNCHES = 4.0  # router, top-k, sorting and two grouped products beside a dense layer's kernels
DRAFT_LAUNCHES = 4.0  # fc, layer, head and top-k
DRAFT_ALL_REDUCES, DRAFT_ALL_GATHERS = 3, 1  # of a draft forward under tensor parallelism
STEP_OVERHEAD_S = 0.8e-3  # verification, cache bookkeeping and scheduling that plain decoding overlaps
# A tree's step sorts, gathers and masks on the way: what the published mean of 5/3/6 trees (1.72x over 59 cells of
# SpecBundle) costs beyond the chains beside it.
TREE_STEP_S = 0.37e-3
FLOPS_SHARE = 0.5  # of the peak that few-token products reach


@dataclass(frozen=True)
class RooflineCosts:
    """A preset machine: the longer of reading and computing, plus launches and all-reduces. Units: `MeasuredCosts`.

    The target is shared by all GPUs of the machine (tensor parallel). `correlation`: see TargetSize.distinct_experts.
    """

    machine: Machine
    target: TargetSize
    draft: DraftConfig
    correlation: float = 0.0

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def reach(self) -> float:
        return math.inf

    @property
    def fits(self) -> bool:
        """Whether the target's weights leave a fifth of the memory for caches."""
        return self.target.bytes < 0.8 * self.machine.memory_bytes * self.machine.gpus

    def _seconds(self, read_bytes: float, flops: float) -> float:
        machine = self.machine
        reading = read_bytes / machine.gpus / (machine.bandwidth_bytes_s * machine.efficiency)
        return max(reading, flops / machine.gpus / (machine.flops_s * FLOPS_SHARE))

    def all_reduce_s(self, tokens: float, hidden: int) -> float:
        return interpolate(self.machine.all_reduce, tokens * hidden * 2) if self.machine.all_reduce else 0.0

    def forward_s(self, tokens: int, batch: int, context: int) -> float:
        every, target = tokens * batch, self.target
        cache = batch * target.cache_bytes(context)
        reading = target.read_bytes(every, self.correlation) + cache
        launches = (target.layers + (MOE_LAUNCHES - 1) * target.sparse_layers) * self.machine.launch_s
        collectives = 2 * target.layers * self.all_reduce_s(every, target.hidden)
        return self._seconds(reading, 2 * target.active_parameters * every) + launches + collectives

    def decode_s(self, batch: int, context: int) -> float:
        return self.forward_s(1, batch, context)

    def draft_s(self, shape: Shape, tau: float, batch: int, context: int) -> float:
        draft = self.draft
        cache = batch * context * draft.kv_bytes_per_token

        def forward(tokens: int, parameters: float) -> float:
            collectives = (DRAFT_ALL_REDUCES + DRAFT_ALL_GATHERS) * self.all_reduce_s(tokens, draft.hidden_size)
            launches = DRAFT_LAUNCHES * self.machine.launch_s
            return self._seconds(2 * parameters + cache, 2 * parameters * tokens) + launches + collectives

        return sum(forward(tokens * batch, parameters) for tokens, parameters in draft.forwards(shape))

    def overhead_s(self, shape: Shape) -> float:
        return STEP_OVERHEAD_S + (TREE_STEP_S * shape.steps if shape.topk > 1 else 0.0)


Costs = MeasuredCosts | RooflineCosts


def predict(costs: Costs, shape: Shape, tau: float, batch: int = 1, context: int = 512) -> Prediction:
    """Beyond the costs' reach times and speed-up are nan: a straight line through a few points is no measurement."""
    decode_s = costs.decode_s(batch, context)
    known = shape.draft_tokens * batch <= costs.reach
    verify_s = costs.forward_s(shape.draft_tokens, batch, context) if known else math.nan
    draft_s, overhead_s = costs.draft_s(shape, tau, batch, context), costs.overhead_s(shape)
    c = (verify_s + draft_s + overhead_s) / decode_s
    return Prediction(
        machine=costs.name,
        shape=shape,
        batch=batch,
        context=context,
        tau=tau,
        decode_s=decode_s,
        verify_s=verify_s,
        draft_s=draft_s,
        overhead_s=overhead_s,
        c=c,
        speedup=tau / c,
    )


def paying_batches(costs: Costs, shape: Shape, tau: float, context: int = 512) -> tuple[list[tuple[int, int]], int]:
    """([first, last] batch of every range in which drafting pays, the largest batch looked at).

    The gain need not fall all the way: once a batch touches every expert anyway, verifying more tokens is cheap again.
    """
    gains = ((batch, predict(costs, shape, tau, batch, context).speedup) for batch in GRID)
    known = list(itertools.takewhile(lambda one: not math.isnan(one[1]), gains))
    paying = [[batch for batch, _ in run] for pays, run in itertools.groupby(known, lambda one: one[1] > 1) if pays]
    return [(run[0], run[-1]) for run in paying], known[-1][0] if known else 0
