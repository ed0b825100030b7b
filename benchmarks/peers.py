"""Train an EAGLE-3 draft with a peer's own classes, and time it. Run on CPUs so far; --device cuda has yet to be tried.

Run with the environment of install_peers.sh:

    peers.py --peer specforge|speculators --dtype bf16|fp32 --batch 4 --seq 512 --steps 5 \\
             --data DATA.safetensors --target DIR [--train-tokens M] [--save DIR]

One step = target forward, the peer's collation, its EAGLE-3 forward and loss, backward, clip and
AdamW. One more step runs first, untimed. The last line on stdout is one JSON object.

Data file: input_ids int64 [N, S], loss_mask bool or int [N, S], d2t int64 [D] (offsets: target
id = draft id + d2t), t2d bool [V].

The peers run as shipped, SpecForge's @torch.compile included; what a CPU forced is marked "CPU:".
"""

import argparse
import json
import math
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

TAPS = (2, 9, 15)
TTT_LENGTH = 7
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DRAFT_LAYER = dict(
    hidden_size=640, intermediate_size=2048, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
    num_hidden_layers=1, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=10000.0,
    pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip


class Capture(NamedTuple):
    """What the peers' data pipelines carry from the target to the trainer."""

    input_ids_BT: torch.Tensor
    loss_mask_BT: torch.Tensor
    taps_BTK: torch.Tensor  # K = taps * hidden
    raw_last_BTH: torch.Tensor  # before the final norm: vLLM's, so speculators'
    last_BTH: torch.Tensor  # after the final norm: SGLang's, so SpecForge's


Peer = tuple[torch.nn.Module, Callable[[Capture], float]]  # the draft, one training step -> its loss


def draft_config(data: dict[str, torch.Tensor]) -> LlamaConfig:
    return LlamaConfig(
        **DRAFT_LAYER,
        rope_parameters={"rope_type": "default", "rope_theta": DRAFT_LAYER["rope_theta"]},
        vocab_size=data["t2d"].numel(),
        draft_vocab_size=data["d2t"].numel(),
        architectures=["LlamaForCausalLMEagle3"],
    )


@torch.no_grad()
def capture(target: PreTrainedModel, input_ids_BT: torch.Tensor, loss_mask_BT: torch.Tensor) -> Capture:
    """Tap t is hidden_states[t], the residual stream entering decoder layer t."""
    body, seen = target.model, {}
    watched = {**{tap: body.layers[tap] for tap in TAPS}, "norm": body.norm}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, key=key: seen.__setitem__(key, inputs[0]))
        for key, module in watched.items()
    ]
    last_BTH = body(input_ids=input_ids_BT, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    taps_BTK = torch.cat([seen[tap] for tap in TAPS], dim=-1)
    return Capture(input_ids_BT, loss_mask_BT, taps_BTK, seen["norm"], last_BTH)


def specforge(args: argparse.Namespace, target: PreTrainedModel, data: dict[str, torch.Tensor]) -> Peer:
    from specforge.algorithms.eagle3 import model as eagle3
    from specforge.algorithms.eagle3.data import build_server_collator, normalize_offline_sample
    from specforge.core.loss import _compute_loss
    from specforge.modeling.auto import AutoDraftModel
    from specforge.modeling.target.target_head import TargetHead
    from specforge.optimizer import BF16Optimizer
    from specforge.runtime.contracts import TrainBatch
    from specforge.training.strategies.base import Eagle3TrainStrategy

    attention = "flex_attention"
    if args.device == "cpu":
        # CPU: their loss is a Triton kernel with no CPU path; this is the reference they ship beside it.
        eagle3.LogSoftmaxLoss = SimpleNamespace(apply=_compute_loss)
        attention = "sdpa"  # CPU: their option, as flex attention has no CPU backward.

    dtype = DTYPES[args.dtype]
    draft = AutoDraftModel.from_config(draft_config(data), torch_dtype=dtype, attention_backend=attention)
    draft.load_state_dict({name: data[name] for name in ("t2d", "d2t")}, strict=False)
    draft.load_embedding(args.target)
    draft.freeze_embedding()
    model = eagle3.OnlineEagle3Model(draft, length=TTT_LENGTH, attention_backend=attention).to(args.device, dtype)

    # TargetHead.from_pretrained wants a sharded checkpoint with an untied head, which Gemma-3-270m
    # is not. Sharing the target's matrix saves SpecForge a copy.
    with torch.device("meta"):
        head = TargetHead(args.target)
    head.fc.weight = target.lm_head.weight

    strategy = Eagle3TrainStrategy(model, target_head=head)
    # Not wrapped in FSDP: their backend's own path for one process, and the same arithmetic.
    optimizer = BF16Optimizer(draft, lr=args.lr or 1e-4, total_steps=args.steps + 1)
    collate = build_server_collator()

    def step(seen: Capture) -> float:
        names = ("input_ids", "loss_mask", "aux_hidden_state", "raw", "hidden_state")
        samples = [
            normalize_offline_sample(dict(zip(names, row, strict=False)), args.seq) for row in zip(*seen, strict=False)
        ]
        batch = TrainBatch([], "eagle3", collate(samples), {"target_repr": "hidden_state"})
        loss = strategy.forward_loss(batch).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return draft, step


def speculators(args: argparse.Namespace, target: PreTrainedModel, data: dict[str, torch.Tensor]) -> Peer:
    from speculators.models.eagle3 import Eagle3DraftModel
    from speculators.models.eagle3.data import shift_batch
    from speculators.train.data import CollateFn
    from speculators.train.optimizers import build_optimizers
    from speculators.train.trainer import TrainerConfig
    from transformers import get_linear_schedule_with_warmup

    dtype, on_cpu = DTYPES[args.dtype], args.device == "cpu"
    draft = Eagle3DraftModel.from_training_args(
        draft_config(data),
        **{name: data[name] for name in ("t2d", "d2t")},
        draft_vocab_size=data["d2t"].numel(),
        target_layer_ids=list(TAPS),
        verifier_name_or_path=args.target,
        norm_before_residual=False,  # the layer SGLang and SpecForge have
        ttt_steps=TTT_LENGTH,
        **({"draft_attn_impl": "sdpa"} if on_cpu else {}),  # CPU: their option for hardware without flex attention
    )
    draft = draft.to(args.device).train()
    if args.gemma_norm:  # their EAGLE-3 applies the gain w where Gemma's norm has 1 + w: a wrong teacher
        draft.verifier_norm.weight.data += 1
    call_kwargs, _ = Eagle3DraftModel.get_trainer_kwargs(
        loss_fn="kl_div",
        loss_implementation="eager" if on_cpu else "fused",  # CPU: their option; "fused" is Triton
        ttt_steps=TTT_LENGTH,
        ttt_step_loss_decay=1.0,
    )
    # AdamW is their option; their command line's default is Muon.
    config = TrainerConfig(lr=args.lr or 1e-3, num_epochs=1, save_path="", optimizer="adamw")
    optimizer = build_optimizers(draft, config)[0]
    scheduler = get_linear_schedule_with_warmup(optimizer, (args.steps + 1) // 100, args.steps + 1)
    # Documents are packed into one row and told apart by their document mask.
    collate = CollateFn(args.batch * args.seq, draft.hidden_size, len(TAPS), dtype, preprocess=shift_batch)

    def step(seen: Capture) -> float:
        names = ("input_ids", "loss_mask", "hidden_states", "verifier_last_hidden_states")
        added = {"lengths": torch.tensor([args.seq]), "position_ids": torch.arange(args.seq)}
        batch = collate([dict(zip(names, row, strict=False)) | added for row in zip(*seen, strict=False)])
        batch = {name: x.to(args.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        # CPU: their Trainer's step, without the Trainer, which needs an accelerator.
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
            _, loss, _ = draft(**batch, **call_kwargs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        return loss.item()

    return draft, step


PEERS = {"specforge": specforge, "speculators": speculators}


def save_sglang(draft: torch.nn.Module, config: LlamaConfig, directory: Path) -> None:
    """SGLang's EAGLE-3 layout; SpecForge's names are that already, speculators' differ in the layer."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in draft.state_dict().items():
        if not name.startswith(("embed_tokens.", "verifier_")):
            name = re.sub(r"^layers\.0\.", "midlayer.", name)
            tensors[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
    save_file(tensors, directory / "model.safetensors")
    fields = {**config.to_dict(), "rope_theta": DRAFT_LAYER["rope_theta"], "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def batches(data: dict[str, torch.Tensor], args: argparse.Namespace) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(args.steps + 1):
        rows = torch.arange(step * args.batch, (step + 1) * args.batch) % len(data["input_ids"])
        chosen = data["input_ids"][rows, : args.seq], data["loss_mask"][rows, : args.seq].long()
        yield tuple(x.to(args.device) for x in chosen)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the target and the peer's compute")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layer", type=json.loads, help="JSON: keys of DRAFT_LAYER, and taps, of another target")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one warm-up step")
    parser.add_argument("--train-tokens", type=int, help="train on this many tokens instead of --steps")
    parser.add_argument("--data", required=True, help="safetensors file; read from its start again when it ends")
    parser.add_argument("--target", required=True, help="Hugging Face directory of the target")
    parser.add_argument("--lr", type=float, help="default: the peer's own (1e-4 SpecForge, 1e-3 speculators)")
    parser.add_argument("--save", type=Path, help="write the trained draft here in SGLang's layout")
    parser.add_argument("--gemma-norm", action="store_true", help="speculators: correct its teacher's final norm")
    args = parser.parse_args()
    if args.train_tokens:
        args.steps = math.ceil(args.train_tokens / (args.batch * args.seq)) - 1
    if args.steps < 1:
        parser.error("at least one step is needed after the warm-up step")
    args.target = str(Path(args.target).expanduser())
    return args


def main() -> None:
    global TAPS
    args = parse_args()
    if args.layer:
        TAPS = tuple(args.layer.pop("taps"))
        DRAFT_LAYER.update(args.layer)
    torch.manual_seed(0)
    data = load_file(args.data)
    if data["input_ids"].shape[1] < args.seq:
        sys.exit(f"--seq {args.seq}: the data file's rows have {data['input_ids'].shape[1]} tokens")
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=DTYPES[args.dtype])
    target.eval().requires_grad_(False).to(args.device)
    for weight in target.parameters():
        weight.sum()  # a bf16 checkpoint is mapped, not read: unread pages would not count as resident
    after_target_load = resident_bytes()

    draft, step = PEERS[args.peer](args, target, data)
    before_first_step = resident_bytes()
    target_s, draft_s = [], []
    for number, (input_ids_BT, loss_mask_BT) in enumerate(batches(data, args)):
        start = time.perf_counter()
        seen = capture(target, input_ids_BT, loss_mask_BT)
        captured = time.perf_counter()
        loss = step(seen)
        target_s.append(captured - start)
        draft_s.append(time.perf_counter() - captured)
        print(f"step {number} loss {loss:.4f} {target_s[-1] + draft_s[-1]:.2f} s", file=sys.stderr)

    if args.save:
        save_sglang(draft, draft_config(data), args.save)
    step_s = [a + b for a, b in zip(target_s[1:], draft_s[1:], strict=False)]
    result = {name: getattr(args, name) for name in ("peer", "dtype", "batch", "seq", "steps")} | {
        "version": version(args.peer),
        "threads": torch.get_num_threads(),
        "tokens_per_s": round(args.batch * args.seq / statistics.median(step_s), 2),
        "target_s": round(statistics.median(target_s[1:]), 4),
        "draft_s": round(statistics.median(draft_s[1:]), 4),
        "rss_after_target_load_bytes": after_target_load,
        "rss_before_first_step_bytes": before_first_step,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if args.device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
