"""The hours of a plan: an estimate, from a probe or a named machine's published rates and shares measured once."""

from draftsmith.core.progress import short_duration as duration
from draftsmith.evaluation.evaluate import PROFILE_PROMPTS
from draftsmith.hardware.cost_model import FLOPS_SHARE, Costs, RooflineCosts
from draftsmith.hardware.quantisation import BYTES
from draftsmith.runs.plan import GPU_FLOPS_S, Plan, Sizes, source_size

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


def put_hours(out: Plan, s: Sizes, costs: Costs) -> float:
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
    loss_tokens = s.trained * min(1.0, s.turns * s.answer / s.document)
    flops = s.draft.training_flops(s.recipe.train, s.steps, s.trained, loss_tokens)
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
        out.assumptions.append("minutes on one H100 are all that stands behind these hours: take them as the least")
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
