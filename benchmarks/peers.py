"""Train an EAGLE-3 draft with a peer's own classes, and time it. On a CPU, or with --device cuda.

Run with the environment of install_peers.sh:

    peers.py --peer specforge|speculators --dtype bf16|fp32 --batch 4 --seq 512 --steps 5 \\
             --data DATA.safetensors --target DIR
    peers.py ... --seconds 480 --save DIR   # train for so many CPU seconds (arena.py), with drafts on the way

One step = target forward, the peer's collation, its EAGLE-3 forward and loss, backward, clip and
the optimiser. One more step runs first, untimed. The last line on stdout is one JSON object.

Data file: input_ids int64 [N, S], loss_mask bool or int [N, S], d2t int64 [D] (offsets: target
id = draft id + d2t), t2d bool [V]. With lengths int64 [N] every row is a document of its own,
padded to S: they come in an order of the seed, as many to a step as --batch times --seq tokens hold,
for SpecForge --batch of them.

With --gate what compiles for minutes can do so beside other work, and is timed once that is stopped: see wait_at.

The peers run as shipped, SpecForge's @torch.compile included; what a CPU forced is marked "CPU:".
"""

import argparse
import itertools
import json
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


newton_schulz = torch.optim._muon._zeropower_via_newtonschulz


class Capture(NamedTuple):
    """What the peers' data pipelines carry of one document from the target to the trainer."""

    input_ids_T: torch.Tensor
    loss_mask_T: torch.Tensor
    taps_TK: torch.Tensor  # K = taps * hidden
    raw_last_TH: torch.Tensor  # before the final norm: vLLM's, so speculators'
    last_TH: torch.Tensor  # after the final norm: SGLang's, so SpecForge's


Documents = list[tuple[torch.Tensor, torch.Tensor]]  # (input_ids_T, loss_mask_T) of each
Peer = tuple[torch.nn.Module, Callable[[list[Capture]], float]]  # the draft, one training step -> its loss


def draft_config(data: dict[str, torch.Tensor]) -> LlamaConfig:
    return LlamaConfig(
        **DRAFT_LAYER,
        rope_parameters={"rope_type": "default", "rope_theta": DRAFT_LAYER["rope_theta"]},
        vocab_size=data["t2d"].numel(),
        draft_vocab_size=data["d2t"].numel(),
        architectures=["LlamaForCausalLMEagle3"],
    )


def capture(target: PreTrainedModel, documents: Documents) -> list[Capture]:
    """Documents of one length in one forward, any others one by one."""
    if len({len(ids) for ids, _ in documents}) > 1:
        return [row for document in documents for row in capture(target, [document])]
    input_ids_BT, loss_mask_BT = (torch.stack(parts) for parts in zip(*documents, strict=True))
    return [Capture(*row) for row in zip(*capture_batch(target, input_ids_BT, loss_mask_BT), strict=True)]


@torch.no_grad()
def capture_batch(target: PreTrainedModel, input_ids_BT: torch.Tensor, loss_mask_BT: torch.Tensor) -> tuple:
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
    return input_ids_BT, loss_mask_BT, taps_BTK, seen["norm"], last_BTH


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

    def step(seen: list[Capture]) -> float:
        names = ("input_ids", "loss_mask", "aux_hidden_state", "raw", "hidden_state")
        samples = [normalize_offline_sample(dict(zip(names, row, strict=True)), args.seq) for row in seen]
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
    from torch.optim import _muon
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
    if on_cpu:  # CPU: torch's Muon iterates in bf16, which a CPU without such products multiplies ten times slower
        _muon._zeropower_via_newtonschulz = in_own_dtype(newton_schulz)
    # Their command line's defaults; AdamW, which the timed steps have, is their option.
    rate = args.lr or 1e-3
    config = TrainerConfig(lr=rate, muon_lr=rate, num_epochs=1, save_path="", optimizer=args.optimizer)
    optimizers, total = build_optimizers(draft, config), args.steps + 1
    schedulers = [get_linear_schedule_with_warmup(optimizer, total // 100, total) for optimizer in optimizers]
    # Documents are packed into one row and told apart by their document mask.
    collate = CollateFn(args.batch * args.seq, draft.hidden_size, len(TAPS), dtype, preprocess=shift_batch)

    def sample(row: Capture) -> dict[str, torch.Tensor]:
        names = ("input_ids", "loss_mask", "hidden_states", "verifier_last_hidden_states")
        length = len(row.input_ids_T)
        added = {"lengths": torch.tensor([length]), "position_ids": torch.arange(length)}
        return dict(zip(names, row[:4], strict=True)) | added

    def step(seen: list[Capture]) -> float:
        batch = collate([sample(row) for row in seen])
        batch = {name: x.to(args.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        # CPU: their Trainer's step, without the Trainer, which needs an accelerator.
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
            _, loss, _ = draft(**batch, **call_kwargs)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        return loss.item()

    return draft, step


def in_own_dtype(orthogonalise: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(gradient: torch.Tensor, *rest: object) -> torch.Tensor:
        gradient = gradient.detach()
        gradient.bfloat16 = gradient.clone  # the one cast in it
        return orthogonalise(gradient, *rest)

    return run


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


def batches(data: dict[str, torch.Tensor], args: argparse.Namespace) -> Iterator[Documents]:
    """Without an end."""
    ids_NS, mask_NS = data["input_ids"].to(args.device), data["loss_mask"].long().to(args.device)
    rows = len(ids_NS)
    if "lengths" not in data:
        for start in itertools.count(0, args.batch):
            chosen = [i % rows for i in range(start, start + args.batch)]
            yield [(ids_NS[i, : args.seq], mask_NS[i, : args.seq]) for i in chosen]
    lengths = data["lengths"].clamp(max=args.seq).tolist()
    order = (i for epoch in itertools.count() for i in torch.randperm(rows, generator=seeded(args, epoch)).tolist())
    documents: Documents = []
    for i in order:
        together = sum(len(ids) for ids, _ in documents) + lengths[i]
        full = len(documents) == args.batch if args.peer == "specforge" else together > args.batch * args.seq
        if full:
            yield documents
            documents = []
        documents.append((ids_NS[i, : lengths[i]], mask_NS[i, : lengths[i]]))


def seeded(args: argparse.Namespace, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * args.seed + epoch)


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
    parser.add_argument("--seconds", type=float, help="train for about so many CPU seconds instead of --steps")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1.0], help="of the steps, after which --save writes"
    )
    parser.add_argument("--ttt-steps", type=int, default=TTT_LENGTH)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="speculators only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", required=True, help="safetensors file; read from its start again when it ends")
    parser.add_argument("--target", required=True, help="Hugging Face directory of the target")
    parser.add_argument("--lr", type=float, help="default: the peer's own (1e-4 SpecForge, 1e-3 speculators)")
    parser.add_argument("--save", type=Path, help="write SHARE/ here, the draft after that share, in SGLang's layout")
    parser.add_argument("--gate", type=Path, help="wait for this file after the warm-up step; GATE.ready says so")
    parser.add_argument("--gemma-norm", action="store_true", help="speculators: correct its teacher's final norm")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("at least one step is needed after the warm-up step")
    args.target = str(Path(args.target).expanduser())
    return args


class Timed(NamedTuple):
    """One step."""

    tokens: int
    target_s: float
    draft_s: float
    cpu_s: float
    """Of all threads."""


def timed(target: PreTrainedModel, step: Callable[[list[Capture]], float], documents: Documents) -> Timed:
    start, cpu = time.perf_counter(), time.process_time()
    seen = capture(target, documents)
    captured = time.perf_counter()
    loss = step(seen)
    end, tokens = time.perf_counter(), sum(len(ids) for ids, _ in documents)
    print(f"loss {loss:.4f}, {tokens} tokens, {end - start:.2f} s", file=sys.stderr)
    return Timed(tokens, captured - start, end - captured, time.process_time() - cpu)


def wait_at(gate: Path | None) -> None:
    """Say by a file GATE.ready that timing can begin, and wait for somebody to make GATE."""
    if gate is not None:
        gate.with_name(f"{gate.name}.ready").touch()
        while not gate.exists():
            time.sleep(0.05)


def affordable(args: argparse.Namespace, target: PreTrainedModel, data: dict[str, torch.Tensor]) -> int:
    """Steps that --seconds pay for, by a few on a draft that is thrown away."""
    _, step = PEERS[args.peer](args, target, data)
    tries = itertools.islice(batches(data, args), 5 if args.batch > 1 else 12)
    tried = [timed(target, step, documents) for documents in tries]
    return max(1, round(args.seconds / statistics.mean(one.cpu_s for one in tried[len(tried) // 2 :])) - 1)


def main() -> None:
    global TAPS, TTT_LENGTH
    args = parse_args()
    if args.layer:
        TAPS = tuple(args.layer.pop("taps"))
        DRAFT_LAYER.update(args.layer)
    TTT_LENGTH = args.ttt_steps
    torch.manual_seed(args.seed)
    data = load_file(args.data)
    if data["input_ids"].shape[1] < args.seq:
        sys.exit(f"--seq {args.seq}: the data file's rows have {data['input_ids'].shape[1]} tokens")
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=DTYPES[args.dtype])
    target.eval().requires_grad_(False).to(args.device)
    for weight in target.parameters():
        weight.sum()  # a bf16 checkpoint is mapped, not read: unread pages would not count as resident
    after_target_load = resident_bytes()

    if args.seconds:
        args.steps = affordable(args, target, data)
        torch.manual_seed(args.seed)
    draft, step = PEERS[args.peer](args, target, data)
    before_first_step = resident_bytes()
    steps: list[Timed] = []
    drafts = {max(1, round(share * (args.steps + 1))): share for share in args.shares} if args.save else {}
    for documents in itertools.islice(batches(data, args), args.steps + 1):
        if len(steps) == 1:
            wait_at(args.gate)
        steps.append(timed(target, step, documents))
        if len(steps) in drafts:
            save_sglang(draft, draft_config(data), args.save / str(drafts[len(steps)]))

    after_first = steps[1:]
    result = {name: getattr(args, name) for name in ("peer", "dtype", "batch", "seq", "steps")} | {
        "version": version(args.peer),
        "threads": torch.get_num_threads(),
        "tokens_per_s": statistics.median(one.tokens / (one.target_s + one.draft_s) for one in after_first),
        "target_s": round(statistics.median(one.target_s for one in after_first), 4),
        "draft_s": round(statistics.median(one.draft_s for one in after_first), 4),
        "drafts": [
            {"share": share, **{key: sum(getattr(one, key) for one in steps[:end]) for key in Timed._fields}}
            for end, share in drafts.items()
        ],
        "rss_after_target_load_bytes": after_target_load,
        "rss_before_first_step_bytes": before_first_step,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if args.device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
