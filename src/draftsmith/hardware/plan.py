"""`draftsmith plan`: what a run will weigh, hold and last, before anything runs.

Bytes and token counts follow from the recipe; hours follow from a machine (hardware/cost_model.py) and a few shares
that were measured once and stand here as constants. Every assumption is printed with the plan. GB is 1e9 bytes.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith import files
from draftsmith.data.prompts import Tally, prompts_of
from draftsmith.data.sources import hub_source
from draftsmith.drafts.eagle3 import Eagle3Config
from draftsmith.errors import RecipeError
from draftsmith.evaluation.evaluate import PROFILE_PROMPTS
from draftsmith.hardware.cost_model import FLOPS_SHARE, Costs
from draftsmith.hardware.presets import Machine
from draftsmith.hardware.sizes import BYTES, DraftSize, TargetSize
from draftsmith.recipe import Recipe, Source
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
NEWTON_SCHULZ = 5  # iterations of Muon, each of about 4 m m n + 2 m m m operations for an m x n matrix
# Of a device's matrix peak: calibrated on runs of the quick recipe on two quiet cores; GPUs are assumed alike.
TRAIN_SHARE = 0.55
REFILL = 0.88  # of a batch's rows that write: a quarter of them ends before new prompts are read
# An evaluation: speed-up of drafted greedy decoding (none at temperatures above 0), answers as shares of
# max_new_tokens, and the time to read the weights in two formats and warm up; runs of the two Gemma recipes.
DRAFTED, GREEDY_SHARE, SAMPLED_SHARE, START_S = 1.3, 0.5, 0.85, 15.0
COMPLETION_BYTES = 6.5  # of JSON per token of a document; the same run


@dataclass
class Plan:
    """Sections of (what, value, unit), and the assumptions in words."""

    numbers: dict[str, float] = field(default_factory=dict)
    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    def put(self, section: str, what: str, value: float, text: str) -> float:
        self.numbers[what] = value
        self.sections.setdefault(section, []).append((what, text))
        return value


def size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )


def _source(source: Source, max_turns: int) -> tuple[int, float, float]:
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
        texts = [m["content"] for m in prompt["messages"] if m["role"] == "user"]
        conversations, users, characters = conversations + 1, users + len(texts), characters + sum(map(len, texts))
    count = source.limit if on_hub and source.limit else min(conversations, source.limit or conversations)
    return count, users / conversations, max(8.0, characters / users / CHARACTERS_PER_TOKEN)


def plan(
    recipe: Recipe,
    costs: Costs,
    machine: Machine,
    target: TargetSize,
    config: Eagle3Config,
    trainer_gpus: int | None = None,
    completion_tokens: float | None = None,
) -> Plan:
    """`costs` and `machine` are those of one target replica.

    trainer_gpus: GPUs that train, of the same kind; completion_tokens: mean answer, COMPLETION_SHARE if left out.
    """
    told, train, regenerate = Plan(), recipe.train, recipe.regenerate
    draft, served = DraftSize.of(config), recipe.target.engine != "transformers"
    replicas = max(1, len(recipe.server.urls)) if served else 1
    if not served:  # the target in this process runs on one device
        machine = dataclasses.replace(machine, gpus=1)
    trainers = trainer_gpus or machine.gpus

    # --- draft and data
    parameters = told.put("draft", "draft parameters", draft.parameters, f"{draft.parameters / 1e6:.4g} M")
    told.put("draft", "draft file", 2 * parameters, f"{size(2 * parameters)}, bf16")
    told.put(
        "draft",
        "target weights",
        target.bytes,
        f"{target.parameters / 1e9:.3g} B parameters, {size(target.bytes)} as served",
    )

    sources = [_source(source, recipe.prompts.max_turns) for source in recipe.prompts.sources]
    conversations = sum(rows for rows, _, _ in sources)
    if not recipe.prompts.evaluation:
        conversations = max(1, conversations - 3 * recipe.prompts.held_out)
    turns = sum(rows * turns for rows, turns, _ in sources) / max(1, sum(rows for rows, _, _ in sources))
    prompt = sum(rows * tokens for rows, _, tokens in sources) / max(1, sum(rows for rows, _, _ in sources))
    mean = completion_tokens or COMPLETION_SHARE * regenerate.max_new_tokens
    wanted = min(conversations * turns, (regenerate.max_tokens or float("inf")) / mean)
    if not served:  # whole shards are decoded
        wanted = min(conversations * turns, math.ceil(wanted / regenerate.shard_prompts) * regenerate.shard_prompts)
    written = wanted * mean
    conversations_used = wanted / turns
    told.put("data", "completions", written / mean, f"{written / mean:,.0f}")
    told.put("data", "completion tokens", written, f"{written:,.0f}")
    document = min(turns * (prompt + TEMPLATE_TOKENS + mean), train.max_document_tokens)
    documents = conversations_used - min(train.held_out, conversations_used / 2)
    epoch = told.put("data", "document tokens", documents * document, f"{documents * document:,.0f}, prompts included")
    fill = max(0.5, 1 - PACK_WASTE * document / train.pack_tokens)
    accumulate = math.ceil(train.accumulate / trainers) * trainers  # packs are dealt out to all trainers
    a_step = train.pack_tokens * fill * accumulate
    steps = max(1.0, train.epochs * epoch // a_step)
    steps = told.put(
        "data", "training steps", min(steps, train.max_steps or steps), f"{min(steps, train.max_steps or steps):,.0f}"
    )
    trained = told.put(
        "data", "tokens trained on", steps * a_step, f"{steps * a_step:,.0f}, {steps * a_step / epoch:.2g} epochs"
    )
    loss = trained * min(1.0, turns * mean / document)

    # --- hidden states
    per_token = hidden_state_bytes(1, len(config.taps), config.hidden_size, recipe.target.dtype)
    told.put("hidden states", "bytes per token", per_token, f"{size(per_token)} ({len(config.taps)} taps and the last)")
    whole = told.put(
        "hidden states",
        "all of them",
        epoch * per_token,
        f"{size(epoch * per_token)} on disk with train.capture: offline",
    )
    ahead = recipe.server.packs_ahead if served else 1
    told.put(
        "hidden states",
        "in flight",
        ahead * train.pack_tokens * per_token,
        f"{size(ahead * train.pack_tokens * per_token)} per trainer, online",
    )

    # --- memory
    batch = recipe.server.concurrency if served else regenerate.batch_size
    length = prompt + TEMPLATE_TOKENS + mean / 2
    cache = batch * target.cache_bytes(length)
    each = (target.bytes + cache) / machine.gpus
    fits = each < 0.9 * machine.memory_bytes
    enough = 2 ** math.ceil(math.log2((target.bytes + cache) / (0.9 * machine.memory_bytes)))  # tensor parallel
    what = "GPU" if machine.gpus > 1 or machine.flops_s > 5e13 else "machine"
    told.put(
        "memory",
        "target",
        each,
        f"{size(each)} of {size(machine.memory_bytes)} per {what}: "
        f"weights {size(target.bytes / machine.gpus)}, cache of {batch} sequences {size(cache / machine.gpus)}"
        + ("" if fits else f"; DOES NOT FIT: {enough:.0f} such would hold it"),
    )
    optimiser = 8 * parameters if train.optimizer == "adamw" else 4 * (draft.layer + draft.fuse) + 8 * draft.head
    chunk = 2048.0 * config.draft_vocab_size * 4 * 3
    tokens = train.pack_tokens
    activations = tokens * config.hidden_size * 2 * (len(config.taps) + 2 + 14 * train.ttt_steps)
    activations += tokens * config.intermediate_size * 2 * 3 * train.ttt_steps
    ends = config.vocab_size * config.hidden_size * 2 + draft.head * 2
    trainer = 10 * parameters + optimiser + activations + chunk + (ends if served else target.bytes)
    room = "fits" if trainer < 0.9 * machine.memory_bytes else "DOES NOT FIT: smaller train.pack_tokens, or train.shard"
    told.put(
        "memory",
        "trainer",
        trainer,
        f"{size(trainer)} of {size(machine.memory_bytes)} per {what}: weights, "
        f"gradients and optimiser {size(10 * parameters + optimiser)}, activations {size(activations + chunk)}; {room}",
    )

    # --- hours
    occupancy = 1.0
    if not served:  # a shard ends with its longest answers, in ever smaller batches
        full = regenerate.shard_prompts / batch * mean
        occupancy = REFILL * full / (full + (regenerate.max_new_tokens - mean) / 2)
    rate = replicas * batch * occupancy / costs.decode_s(batch, round(length))
    # a token of a prompt, in large batches
    reading_s = 2 * target.active_body / (machine.flops_s * FLOPS_SHARE * machine.gpus)
    regenerate_s = written / rate + (written / mean) * prompt * reading_s / replicas
    told.put(
        "hours",
        "regenerate",
        regenerate_s,
        f"{duration(regenerate_s)}: {rate:,.0f} tokens/s from {replicas} replica(s), {batch} sequences at once",
    )
    captured = epoch if train.capture == "offline" else trained
    capture_s = captured * reading_s / replicas
    flops = trained * 6 * draft.fuse + loss * (6 * train.ttt_steps * (draft.layer + draft.head) + 2 * draft.head)
    if train.optimizer == "muon":
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        h, wide = config.hidden_size, config.intermediate_size
        shapes = [
            (q, 2 * h),
            (kv, 2 * h),
            (kv, 2 * h),
            (h, q),
            (wide, h),
            (wide, h),
            (h, wide),
            (h, len(config.taps) * h),
        ]
        sides = [(min(shape), max(shape)) for shape in shapes]
        flops += steps * NEWTON_SCHULZ * sum(4 * m * m * n + 2 * m**3 for m, n in sides)
    compute_s = flops / (machine.flops_s * TRAIN_SHARE * trainers)
    network = machine.network_bytes_s
    needed = per_token * trained / max(compute_s, capture_s)
    network_s = trained * per_token / network if served else 0.0
    limits = {"the trainer": compute_s, "the target": capture_s, "the network": network_s}
    # servers work while the trainer does; in one process they take turns
    train_s = max(limits.values()) if served else compute_s + capture_s
    slowest = max(limits, key=lambda name: limits[name])
    told.put(
        "hours",
        "train",
        train_s,
        f"{duration(train_s)}: {trained / train_s:,.0f} tokens/s; {slowest} sets the pace"
        f" (trainer alone {duration(compute_s)}, hidden states {duration(capture_s)})",
    )
    evaluation = recipe.evaluate
    asked = (
        evaluation.prompts or sum(_source(s, 1)[0] for s in recipe.prompts.evaluation) or 3 * recipe.prompts.held_out
    )
    sampled = sum(temperature > 0 for temperature in evaluation.temperatures)
    decode_s = costs.decode_s(1, round(length))
    answer, longer = GREEDY_SHARE * evaluation.max_new_tokens, SAMPLED_SHARE * evaluation.max_new_tokens
    drafted_s = decode_s / DRAFTED
    a_shape_s = (len(evaluation.temperatures) - sampled) * answer * drafted_s + sampled * longer * decode_s
    evaluate_s = asked * len(evaluation.shapes) * a_shape_s / (batch if served else 1)
    evaluate_s += evaluation.speed_prompts * len(evaluation.shapes) * answer * (decode_s + drafted_s)
    # The proof's plain side is one batch where it runs here; its fp32 weights are read at the bytes they have.
    proof = min(evaluation.lossless_prompts, asked) * evaluation.lossless_tokens
    proof_s = len(evaluation.shapes) * drafted_s + (decode_s if served else 0.0)
    evaluate_s += proof * proof_s * (1 if served else 4 / BYTES[recipe.target.dtype])
    if not served:
        evaluate_s += min(PROFILE_PROMPTS, asked) * (answer / rate + (prompt + answer) * reading_s) + START_S
    told.put("hours", "evaluate", evaluate_s, f"{duration(evaluate_s)} on one replica")
    total = regenerate_s + train_s + evaluate_s
    told.put("hours", "all", total, duration(total))
    if served or machine.gpus > 1:
        gpu_s = machine.gpus * replicas * total + trainers * train_s
        told.put(
            "hours",
            "GPU hours",
            gpu_s / 3600,
            f"{gpu_s / 3600:,.0f} ({machine.gpus * replicas} target GPUs throughout, {trainers} that train)",
        )

    # --- disk and network
    checkpoint = 4 * parameters + optimiser
    kept = train.keep_checkpoints * checkpoint
    text = written / mean * (prompt + TEMPLATE_TOKENS + mean) * COMPLETION_BYTES
    told.put("disk and network", "completions on disk", text, size(text))
    told.put("disk and network", "checkpoint", checkpoint, f"{size(checkpoint)}, {train.keep_checkpoints} kept")
    disk = text + kept + 2 * parameters + (whole if train.capture == "offline" else 0.0)
    told.put(
        "disk and network",
        "disk in all",
        disk,
        size(disk) + ("" if train.capture == "offline" else ", hidden states never among it"),
    )
    if served:
        told.put(
            "disk and network",
            "engine to trainer",
            needed,
            f"{size(needed)}/s to keep both busy; {size(network)}/s between machines",
        )

    told.assumptions = [
        f"a completion has {mean:.0f} tokens"
        + ("" if completion_tokens else f", {COMPLETION_SHARE:.0%} of regenerate.max_new_tokens (--completion-tokens)")
        + f"; a prompt has {prompt:.0f}",
        f"in the evaluation greedy answers have {GREEDY_SHARE:.0%} of max_new_tokens, sampled ones "
        f"{SAMPLED_SHARE:.0%}, and greedy drafting gains {DRAFTED}x",
        f"packs are {fill:.0%} full; documents are cut at {train.max_document_tokens} tokens",
        f"products of many tokens reach {FLOPS_SHARE:.0%} of {machine.flops_s / 1e12:.3g} TFLOP/s, "
        f"training {TRAIN_SHARE:.0%}",
        f"replicas: {replicas} of {machine.gpus} x {machine.name}; more in server.urls share the work"
        if served
        else f"target and trainer share {machine.name} and take turns",
    ]
    if accumulate != train.accumulate:
        told.assumptions.append(
            f"train.accumulate {train.accumulate} cannot be dealt out to {trainers} trainers: give --train.accumulate "
            f"{accumulate}, as planned here"
        )
    if machine.flops_s > 5e13:
        told.assumptions.append("no GPU run of draftsmith stands behind these hours yet: take them as the least")
    if target.experts:
        told.assumptions.append("experts are chosen independently: a batch of many tokens reads all of them")
    if target.assumption:
        told.assumptions.append(target.assumption)
    return told


def describe(told: Plan) -> str:
    lines = []
    for section, rows in told.sections.items():
        width = max(len(what) for what, _ in rows)
        lines += [section, *(f"  {what:<{width}}  {text}" for what, text in rows)]
    return "\n".join([*lines, "assumed", *(f"  {line}" for line in told.assumptions)])


def against(told: Plan, directory: Path) -> list[tuple[str, float, float]]:
    """(what, planned, real) for everything that a finished run tells."""

    def summary(*parts: str) -> dict[str, Any]:
        path = directory.joinpath(*parts)
        return files.read_json(path) if path.exists() else {}

    written, trained, manifest = (
        summary("completions", "summary.json"),
        summary("train", "summary.json"),
        summary("manifest.json"),
    )
    kept = [sum(p.stat().st_size for p in c.iterdir()) for c in (directory / "train").glob("checkpoint-*")]
    states = [p.stat().st_size for p in (directory / "train" / "hidden_states").rglob("*.safetensors")]
    drafts = [p.stat().st_size for p in (directory / "export").rglob("model.safetensors")][:1]
    texts = [p.stat().st_size for p in (directory / "completions").glob("*.jsonl")]
    # of a stage that was skipped or went on, the manifest knows only the last sitting
    seconds = {name: entry["seconds"] for name, entry in manifest.get("stages", {}).items() if entry.get("ran")}
    decoded = summary("completions", "timing.json")
    if decoded:
        seconds["regenerate"] = decoded["seconds"]
    steps = directory / "train" / "timing.jsonl"
    if steps.exists():
        stepped = sum(row["seconds"] for row in files.read_jsonl(steps))
        seconds["train"] = max(seconds.get("train", 0.0), stepped)

    real = {
        "draft parameters": trained.get("parameters", 0),
        "draft file": sum(drafts),
        "completions": written.get("completions", 0),
        "completions on disk": sum(texts),
        "completion tokens": written.get("completion_tokens", 0),
        "training steps": trained.get("steps", 0),
        "tokens trained on": trained.get("tokens", 0),
        "all of them": sum(states),
        "checkpoint": max(kept, default=0),
        "regenerate": seconds.get("regenerate", 0),
        "train": seconds.get("train", 0),
        "evaluate": seconds.get("evaluate", 0),
    }
    return [(what, told.numbers[what], float(value)) for what, value in real.items() if value and what in told.numbers]


def describe_against(rows: list[tuple[str, float, float]]) -> str:
    lines = [f"{'':<20} {'planned':>14} {'real':>14} {'ratio':>6}"]
    return "\n".join(lines + [f"{what:<20} {a:14,.0f} {b:14,.0f} {a / b:6.2f}" for what, a, b in rows])
