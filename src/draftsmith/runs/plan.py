"""`draftsmith plan`: what a run will weigh, hold and last, before anything runs.

Bytes, memory and disk follow from the recipe alone (`Sizes`); hours follow from a machine (hardware/cost_model.py) and
a few shares that were measured once. Every assumption is printed with the plan. GB is 1e9 bytes.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from draftsmith.core import run_files
from draftsmith.core.errors import RecipeError
from draftsmith.core.progress import short_duration as duration
from draftsmith.core.recipe import Recipe
from draftsmith.core.records.data import CompletionsSummary, Timing
from draftsmith.core.records.run import Manifest
from draftsmith.core.records.training import StepTiming, TrainingSummary
from draftsmith.core.run_files import RunFiles
from draftsmith.core.sources import Source
from draftsmith.core.tables import table
from draftsmith.data.prompts import Tally, prompts_of
from draftsmith.data.sources import hub_source
from draftsmith.drafts.method import DraftConfig
from draftsmith.evaluation.evaluate import PROFILE_PROMPTS
from draftsmith.hardware.cost_model import FLOPS_SHARE, Costs, RooflineCosts
from draftsmith.hardware.presets import Machine
from draftsmith.hardware.quantisation import BYTES
from draftsmith.hardware.sizes import TargetSize
from draftsmith.training.capture import hidden_state_bytes

# rows and user turns of the hub sets, and their mean prompt in tokens (their hub pages; ours to assume where unstated)
HUB_SETS = {
    "ultrachat": (207_865, 3, 150),
    "opencodeinstruct": (5_000_000, 1, 250),
    "codealpaca": (20_022, 1, 40),
    "gsm8k": (7_473, 1, 60),
    "hendrycks-math": (7_500, 1, 80),
}
CHARACTERS_PER_TOKEN = 4.0
HUB_SAMPLE = 200  # prompts read of a hub set that is not among them
TEMPLATE_TOKENS = 12
COMPLETION_SHARE = 0.43  # mean completion of max_new_tokens; runs of gemma3-270m-cpu: 95 of 224
PACK_WASTE = 0.68  # room lost in a pack, in mean documents: 0.104 of 1024 tokens there, 0.121 of 512 in the quick run
COMPLETION_BYTES = 6.5  # of JSON per token of a document; the same run
ROOM = 0.9  # of a device's memory
GPU_FLOPS_S = 5e13  # more than any CPU's
# Of a device's matrix peak: calibrated on runs of the quick recipe on two quiet cores; GPUs are assumed alike.
TRAIN_SHARE = 0.55
# This process launches some 45 kernels a layer and step one by one, where engines replay a graph.
EAGER_LAYER_S = 0.6e-3
# A GPU waits for the host where a pack is small: launches of one depth, forward and backward (benchmarks/results/
# h100.json, small_draft: its step less the target's layers, by depths).
DEPTH_S = 6e-3
REFILL = 0.88  # of a batch's rows that write: a quarter of them ends before new prompts are read
# An evaluation: speed-up of drafted greedy decoding (none at temperatures above 0), answers as shares of
# max_new_tokens, and the time to read the weights in two formats and warm up; runs of the two Gemma recipes.
DRAFTED, GREEDY_SHARE, SAMPLED_SHARE, START_S = 1.3, 0.5, 0.85, 15.0


@dataclass
class Plan:
    """Values by what they are of, sections of (what, the value in words), and the assumptions in words."""

    numbers: dict[str, float] = field(default_factory=dict)
    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    def put(self, section: str, what: str, value: float, text: str) -> None:
        self.numbers[what] = value
        self.sections.setdefault(section, []).append((what, text))


def size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def source_size(source: Source, max_turns: int) -> tuple[int, float, float]:
    """(conversations, user turns of each, mean tokens of a prompt)."""
    if source.name in HUB_SETS:
        known, turns, length = HUB_SETS[source.name]
        return min(known, source.limit or known), float(min(turns, max_turns)), float(length)
    on_hub = hub_source(source) is not None
    if on_hub and source.limit is None:
        raise RecipeError(f"prompts.sources: the size of {source.name} is not known here; give it a limit to plan with")
    sample = source.model_copy(update={"limit": HUB_SAMPLE if on_hub else None})
    conversations = users = characters = 0
    for prompt in prompts_of(sample, max_turns, True, 0, Tally()):
        texts = prompt.users
        conversations, users, characters = conversations + 1, users + len(texts), characters + sum(map(len, texts))
    count = source.limit if on_hub and source.limit else min(conversations, source.limit or conversations)
    return count, users / conversations, max(8.0, characters / users / CHARACTERS_PER_TOKEN)


@dataclass
class Sizes:
    """Counts and bytes of a run, from its recipe. `machine`: of a replica of the target; `trainer_gpus`: those that
    train, of the same kind, else all of a replica's; `completion_tokens`: mean answer, else COMPLETION_SHARE tells."""

    recipe: Recipe
    machine: Machine
    target: TargetSize
    draft: DraftConfig
    trainer_gpus: int | None = None
    completion_tokens: float | None = None

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.served = recipe.target.engine != "transformers"
        if not self.served:  # the target in this process runs on one device
            self.machine = dataclasses.replace(self.machine, gpus=1)
        self.trainers = self.trainer_gpus or self.machine.gpus
        self.gpu = self.machine.gpus > 1 or self.machine.flops_s > GPU_FLOPS_S
        self.decodes_here = not self.served and recipe.regenerate.engine in ("auto", "embedded")
        self.replicas = max(1, len(recipe.server.urls)) if self.served else 1
        self._texts()
        self._decoding()
        self._training()

    def _texts(self) -> None:
        """Mean tokens of a prompt, an answer and a document; how many of them."""
        prompts, settings, train = self.recipe.prompts, self.recipe.regenerate, self.recipe.train
        sources = [source_size(source, prompts.max_turns) for source in prompts.sources]
        conversations = sum(rows for rows, _, _ in sources)
        self.turns = sum(rows * turns for rows, turns, _ in sources) / max(1, conversations)
        self.prompt = sum(rows * tokens for rows, _, tokens in sources) / max(1, conversations)
        self.answer = self.completion_tokens or COMPLETION_SHARE * settings.max_new_tokens
        if not prompts.evaluation:
            conversations = max(1, conversations - 3 * prompts.held_out)
        every = conversations * self.turns
        self.answers = min(every, (settings.max_tokens or float("inf")) / self.answer)
        if not self.served:  # of the batch in which max_tokens is reached every answer is finished
            self.answers = min(every, self.answers + min(settings.batch_size, settings.shard_prompts) / 2)
        self.written = self.answers * self.answer
        self.document = min(self.turns * (self.prompt + TEMPLATE_TOKENS + self.answer), train.max_document_tokens)
        answered = self.answers / self.turns
        # tokens of all documents that are trained on
        self.epoch = (answered - min(train.held_out, answered / 2)) * self.document

    def _decoding(self) -> None:
        recipe, target, settings = self.recipe, self.target, self.recipe.regenerate
        products = 2 * (target.body.parameters + target.head.parameters)
        # beside fp32 weights on a CPU: those that it multiplies with (decoding/products.py)
        self.packed = products if recipe.target.dtype == "fp32" and not (self.served or self.gpu) else 0.0
        self.batch = recipe.server.concurrency if self.served else min(settings.batch_size, settings.shard_prompts)
        # cached tokens of a sequence that is being answered, on average
        self.length = self.prompt + TEMPLATE_TOKENS + self.answer / 2
        self.cache = self.batch * target.cache_bytes(self.length)
        if self.decodes_here:  # engines page it; here every row is as long as the longest text of a batch can be
            columns = min(settings.max_prompt_tokens + settings.max_new_tokens, self.draft.max_position_embeddings)
            self.cache = self.batch * columns * target.kv_bytes_per_token
        # the proof: the target in fp32, on a card in place of the one that is served, with its cache and the draft
        length = self.prompt + TEMPLATE_TOKENS + recipe.evaluate.lossless_tokens
        cache = min(recipe.evaluate.lossless_prompts, 64) * length * target.kv_bytes_per_token
        self.proof = 4 * (target.parameters + self.draft.parameters) + cache * 4 / BYTES[recipe.target.dtype]
        if not self.gpu:
            self.proof = self.proof + products + target.bytes + self.packed

    def _training(self) -> None:
        train, target = self.recipe.train, self.target
        self.fill = max(0.5, 1 - PACK_WASTE * self.document / train.pack_tokens)
        self.accumulate = math.ceil(train.accumulate / self.trainers) * self.trainers  # dealt out to all trainers
        step_tokens = train.pack_tokens * self.fill * self.accumulate
        steps = max(1.0, train.epochs * self.epoch // step_tokens)
        self.steps = min(steps, train.max_steps or steps)
        self.trained = self.steps * step_tokens
        # hidden states: of one token, of all, and of the packs that wait beside the one that is trained on
        taps, width = len(self.draft.taps), self.draft.hidden_size
        self.token_bytes = hidden_state_bytes(1, taps, width, self.recipe.target.dtype)
        self.states = self.epoch * self.token_bytes
        self.packs_ahead = self.recipe.server.packs_ahead if self.served else int(self.gpu)
        self.ahead = self.packs_ahead * train.pack_tokens * self.token_bytes
        # weights in fp32 and bf16, gradients, moments
        self.optimiser = self.draft.optimiser_bytes(train)
        self.trainer_state = 10 * self.draft.parameters + self.optimiser
        self.activations = self.draft.activation_bytes(train, self.gpu)
        # What the trainer has of the target: all of it and what one of its layers makes of a pack, or both its ends;
        # with them the draft's rows of the head, and where the teacher takes all of them a second copy.
        ends = target.embedding.parameters + (0.0 if target.tied else target.head.parameters)
        full = train.full_teacher and self.draft.head < target.head.parameters
        rows = 2 * (self.draft.head + (target.head.parameters if full else 0.0))
        made = 2 * train.pack_tokens * target.active_body / (target.layers * target.hidden)
        self.target_beside = rows + (2 * ends if self.served else target.bytes + self.packed + made)
        self.trainer = self.trainer_state + self.activations + self.ahead + self.target_beside


def plan(sizes: Sizes, costs: Costs) -> Plan:
    """`costs` are those of one target replica."""
    out = Plan()
    _put_data(out, sizes)
    _put_memory(out, sizes)
    needed = _put_hours(out, sizes, costs)
    _put_disk(out, sizes, needed)
    out.assumptions = _assumptions(sizes) + out.assumptions
    return out


def _put_data(out: Plan, s: Sizes) -> None:
    parameters, target = s.draft.parameters, s.target
    weights = f"{target.parameters / 1e9:.3g} B parameters, {size(target.bytes)} as served"
    out.put("draft", "draft parameters", parameters, f"{parameters / 1e6:.4g} M")
    out.put("draft", "draft file", 2 * parameters, f"{size(2 * parameters)}, bf16")
    out.put("draft", "target weights", target.bytes, weights)
    out.put("data", "completions", s.answers, f"{s.answers:,.0f}")
    out.put("data", "completion tokens", s.written, f"{s.written:,.0f}")
    out.put("data", "document tokens", s.epoch, f"{s.epoch:,.0f}, prompts included")
    out.put("data", "training steps", s.steps, f"{s.steps:,.0f}")
    out.put("data", "tokens trained on", s.trained, f"{s.trained:,.0f}, {s.trained / s.epoch:.2g} epochs")
    taps = f"{size(s.token_bytes)} ({len(s.draft.taps)} taps and the last)"
    out.put("hidden states", "bytes per token", s.token_bytes, taps)
    out.put("hidden states", "all of them", s.states, f"{size(s.states)} on disk with train.capture: offline")
    out.put("hidden states", "in flight", s.ahead, f"{size(s.ahead)} per trainer, online, packs ahead: {s.packs_ahead}")


def _put_memory(out: Plan, s: Sizes) -> None:
    machine, room, recipe = s.machine, ROOM * s.machine.memory_bytes, s.recipe
    each = (s.target.bytes + s.packed + s.cache) / machine.gpus
    device = f"{size(machine.memory_bytes)} per {'GPU' if s.gpu else 'machine'}"

    def fits(needed: float, mend: str) -> str:
        if needed >= room:
            return f"DOES NOT FIT: {mend}"
        spare = f"{size(machine.memory_bytes - needed)} to spare"
        return f"fits with {spare}, counted, not measured on a GPU" if s.gpu else f"fits with {spare}"

    parts = (
        f"weights {size(s.target.bytes / machine.gpus)}, cache of {s.batch} sequences "
        f"{'at most ' if s.decodes_here else ''}{size(s.cache / machine.gpus)}"
    )
    many = f"{2 ** math.ceil(math.log2((s.target.bytes + s.cache) / room))} such would hold it"
    mend = many if s.served else f"a smaller regenerate.batch_size, or target.engine vllm, where {many}"
    out.put("memory", "target", each, f"{size(each)} of {device}: {parts}; {fits(each, mend)}")
    parts = (
        f"weights, gradients and optimiser {size(s.trainer_state)}, activations at most {size(s.activations)}, of the "
        f"target {size(s.target_beside)}"
    )
    shard = "train.shard" if recipe.train.optimizer == "adamw" else "train.optimizer adamw and train.shard"
    mend = f"a smaller train.pack_tokens or train.max_document_tokens, or {shard}"
    out.put("memory", "trainer", s.trainer, f"{size(s.trainer)} of {device}: {parts}; {fits(s.trainer, mend)}")
    if not s.served and recipe.target.dtype != "fp32":
        what = (
            f"{size(s.proof)}: the target in fp32 {'in place of' if s.gpu else 'beside'} its {recipe.target.dtype} copy"
        )
        mend = "it is left out, or tested on vLLM as it is served (evaluate.engine)"
        out.put("memory", "losslessness", s.proof, f"{what}; {fits(s.proof, mend)}")


def _put_hours(out: Plan, s: Sizes, costs: Costs) -> float:
    """Add the hours and their assumptions; returns the bytes a second that keep target and trainers busy."""
    machine = s.machine
    rate = _rate(s, costs, s.decodes_here)
    reading_s = 2 * s.target.active_body / (machine.flops_s * FLOPS_SHARE * machine.gpus)  # a token, in large batches
    regenerate_s = s.written / rate + s.answers * s.prompt * reading_s / s.replicas
    how = f"{rate:,.0f} tokens/s from {s.replicas} replica(s), {s.batch} sequences at once"
    if s.decodes_here and s.gpu:
        how += f", in this process; {duration(s.written / _rate(s, costs, False))} by vLLM where it is installed"
    out.put("hours", "regenerate", regenerate_s, f"{duration(regenerate_s)}: {how}")

    captured = s.epoch if s.recipe.train.capture == "offline" else s.trained
    capture_s = captured * reading_s / s.replicas
    share = 1.0 if s.recipe.train.on_prompts else min(1.0, s.turns * s.answer / s.document)
    flops = s.draft.training_flops(s.recipe.train, s.steps, s.trained, s.trained * share)
    compute_s = flops / (machine.flops_s * TRAIN_SHARE * s.trainers)
    network_s = s.trained * s.token_bytes / machine.network_bytes_s if s.served else 0.0
    limits = {"the trainer": compute_s, "the target": capture_s, "the network": network_s}
    # servers work while the trainer does; in one process they take turns
    train_s = max(limits.values()) if s.served else compute_s + capture_s
    slowest = max(limits, key=lambda name: limits[name])
    # for which a GPU would wait in a training without arithmetic
    pack_s = DEPTH_S * s.recipe.train.ttt_steps + EAGER_LAYER_S * (0 if s.served else s.target.layers)
    launches_s = s.steps * s.accumulate / s.trainers * pack_s if s.gpu else 0.0
    if launches_s > train_s:
        train_s, slowest = launches_s, "launching kernels"
    parts = f"trainer alone {duration(compute_s)}, hidden states {duration(capture_s)}"
    pace = f"{s.trained / train_s:,.0f} tokens/s; {slowest} sets the pace ({parts})"
    out.put("hours", "train", train_s, f"{duration(train_s)}: {pace}")

    evaluate_s = _evaluation_s(s, costs, rate, reading_s)
    out.put("hours", "evaluate", evaluate_s, f"{duration(evaluate_s)} on one replica")
    total = regenerate_s + train_s + evaluate_s
    out.put("hours", "all", total, duration(total))
    if s.served or machine.gpus > 1:
        gpus = machine.gpus * s.replicas
        hours = (gpus * total + s.trainers * train_s) / 3600
        who = f"{gpus} target GPUs throughout, {s.trainers} that train"
        out.put("hours", "GPU hours", hours, f"{hours:,.0f} ({who})")

    peak = f"{machine.flops_s / 1e12:.3g} TFLOP/s"
    out.assumptions += [
        f"in the evaluation greedy answers have {GREEDY_SHARE:.0%} of max_new_tokens, sampled ones "
        f"{SAMPLED_SHARE:.0%}, and greedy drafting gains {DRAFTED}x",
        f"products of many tokens reach {FLOPS_SHARE:.0%} of {peak}, training {TRAIN_SHARE:.0%}",
    ]
    if s.gpu and not s.served:
        out.assumptions.append(f"steps in this process take {EAGER_LAYER_S * 1e3} ms a layer more than a graph's")
    if machine.flops_s > GPU_FLOPS_S:
        out.assumptions.append(
            "minutes on an H100 and an H200 are all that stands behind these hours: take them as the least"
        )
    return s.token_bytes * s.trained / max(compute_s, capture_s)


def _step_s(s: Sizes, costs: Costs, batch: int, here: bool) -> float:
    """One plain decoding step; `here`: in this process, whose launches a probe of it measured already."""
    eager = EAGER_LAYER_S * s.target.layers if here and s.gpu and isinstance(costs, RooflineCosts) else 0.0
    return costs.decode_s(batch, round(s.length)) + eager


def _rate(s: Sizes, costs: Costs, here: bool) -> float:
    """Tokens a second that all replicas write; `here`: this process."""
    occupancy = 1.0
    if here:  # a shard ends with its longest answers, in ever smaller batches
        settings = s.recipe.regenerate
        full = settings.shard_prompts / s.batch * s.answer
        occupancy = REFILL * full / (full + (settings.max_new_tokens - s.answer) / 2)
    return s.replicas * s.batch * occupancy / _step_s(s, costs, s.batch, here)


def _evaluation_s(s: Sizes, costs: Costs, rate: float, reading_s: float) -> float:
    settings, prompts = s.recipe.evaluate, s.recipe.prompts
    asked = settings.prompts or sum(source_size(e, 1)[0] for e in prompts.evaluation) or 3 * prompts.held_out
    shapes = len(settings.shapes)
    sampled = sum(temperature > 0 for temperature in settings.temperatures)
    decode_s = _step_s(s, costs, 1, not s.served)
    drafted_s = decode_s / DRAFTED
    answer, longer = GREEDY_SHARE * settings.max_new_tokens, SAMPLED_SHARE * settings.max_new_tokens
    a_shape_s = (len(settings.temperatures) - sampled) * answer * drafted_s + sampled * longer * decode_s
    both = sum(shape.topk == 1 for shape in settings.shapes) if s.recipe.serve.draft_sampling == "auto" else 0
    again_s = both * sampled * longer * decode_s  # chains with sampled drafts
    seconds = asked * (shapes * a_shape_s + again_s) / (s.batch if s.served else 1)
    seconds += settings.speed_prompts * shapes * answer * (decode_s + drafted_s)
    # The proof's plain side is one batch where it runs here; its fp32 weights are read at the bytes they have.
    proof = min(settings.lossless_prompts, asked) * settings.lossless_tokens
    proof_s = shapes * drafted_s + (decode_s if s.served else 0.0)
    seconds += proof * proof_s * (1 if s.served else 4 / BYTES[s.recipe.target.dtype])
    if not s.served:
        texts = answer + (longer if sampled else 0.0)
        seconds += min(PROFILE_PROMPTS, asked) * (texts / rate + (s.prompt + texts) * reading_s) + START_S
    return seconds


def _put_disk(out: Plan, s: Sizes, needed: float) -> None:
    """needed: bytes a second from the target to the trainers that keep both busy."""
    train, offline = s.recipe.train, s.recipe.train.capture == "offline"
    text = s.answers * (s.prompt + TEMPLATE_TOKENS + s.answer) * COMPLETION_BYTES
    checkpoint = 4 * s.draft.parameters + s.optimiser
    disk = text + train.keep_checkpoints * checkpoint + 2 * s.draft.parameters + (s.states if offline else 0.0)
    name = "disk and network"
    out.put(name, "completions on disk", text, size(text))
    out.put(name, "checkpoint", checkpoint, f"{size(checkpoint)}, {train.keep_checkpoints} kept")
    out.put(name, "disk in all", disk, size(disk) + ("" if offline else ", hidden states never among it"))
    if s.served:
        between = f"{size(needed)}/s to keep both busy; {size(s.machine.network_bytes_s)}/s between machines"
        out.put(name, "engine to trainer", needed, between)


def _assumptions(s: Sizes) -> list[str]:
    share = (
        "" if s.completion_tokens else f", {COMPLETION_SHARE:.0%} of regenerate.max_new_tokens (--completion-tokens)"
    )
    lines = [
        f"a completion has {s.answer:.0f} tokens{share}; a prompt has {s.prompt:.0f}",
        f"packs are {s.fill:.0%} full; documents are cut at {s.recipe.train.max_document_tokens} tokens",
        f"replicas: {s.replicas} of {s.machine.gpus} x {s.machine.name}; more in server.urls share the work"
        if s.served
        else f"target and trainer share {s.machine.name} and take turns",
    ]
    if sets := s.recipe.evaluate.sets:
        lines.append(f"evaluate.sets ({', '.join(each.name for each in sets)}) are not counted in the evaluation")
    if s.accumulate != s.recipe.train.accumulate:
        lines.append(
            f"train.accumulate {s.recipe.train.accumulate} cannot be dealt out to {s.trainers} trainers: give "
            f"--train.accumulate {s.accumulate}, as planned here"
        )
    if s.target.experts:
        lines.append("experts are chosen independently: a batch of many tokens reads all of them")
    return lines + ([s.target.assumption] if s.target.assumption else [])


def page(plan: Plan) -> str:
    """The plan as text for a terminal."""
    lines = []
    for section, rows in plan.sections.items():
        lines += [section, table((f"  {what}", text) for what, text in rows)]
    return "\n".join([*lines, "assumed", *(f"  {line}" for line in plan.assumptions)])


def against(plan: Plan, run: RunFiles) -> list[tuple[str, float, float]]:
    """(what, planned, real) for everything that a finished run tells."""

    def bytes_of(paths: Iterable[Path]) -> list[int]:
        return [path.stat().st_size for path in paths]

    real: dict[str, float] = {}
    if written := CompletionsSummary.found(run.completions / run_files.SUMMARY):
        real["completion tokens"] = written.completion_tokens
    if trained := TrainingSummary.found(run.train / run_files.SUMMARY):
        real |= {"draft parameters": trained.parameters, "training steps": trained.steps}
        real |= {"tokens trained on": trained.tokens}
    kept = [sum(bytes_of(checkpoint.iterdir())) for checkpoint in run.train.glob("checkpoint-*")]
    real |= {"checkpoint": max(kept, default=0), "draft file": sum(bytes_of(run.draft.glob("model.safetensors")))}
    real |= {"completions on disk": sum(bytes_of(run_files.shards(run.completions)))}
    real |= {"all of them": sum(bytes_of((run.train / run_files.HIDDEN_STATES).rglob("*.safetensors")))}
    # of a stage that was skipped or went on, the manifest knows only the last sitting
    if manifest := Manifest.found(run.manifest):
        real |= {name: stage.seconds for name, stage in manifest.stages.items() if stage.ran}
    if written and (decoded := Timing.found(run.completions / run_files.TIMING)):
        real["regenerate"] = written.completion_tokens / decoded.tokens_per_s
    if (run.train / run_files.STEP_TIMING).exists():
        stepped = sum(row.seconds for row in StepTiming.read_rows(run.train / run_files.STEP_TIMING))
        real["train"] = max(real.get("train", 0.0), stepped)
    return [(what, planned, float(real[what])) for what, planned in plan.numbers.items() if real.get(what)]


def page_against(rows: list[tuple[str, float, float]]) -> str:
    cells = [(what, f"{a:,.0f}", f"{b:,.0f}", f"{a / b:.2f}") for what, a, b in rows]
    return table(cells, ("", "planned", "real", "ratio"), (1, 2, 3))
