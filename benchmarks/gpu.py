"""Training on this machine's GPU, at the draft shapes of Qwen3-8B and MiniMax-M2.7, beside SpecForge and speculators.

    python benchmarks/gpu.py --out gpu.json [--peers .peers-venv]

The target is a stub of the right widths (random weights, four thin layers), so what is timed is a trainer's own step:
capture, teacher, forward, backward, clip, AdamW. Rows are random tokens whose first fifth is a prompt. Every setting
runs in a process of its own; one that fails is told with its last line. MFU (docs/gpu.md) is told for draftsmith where
the peak of the GPU is known. The peers (benchmarks/install_peers.sh, but with a CUDA build of torch) run by peers.py
and compile for minutes before their first step; without --peers they are left out, and the file says so.

benchmarks/results/h100.json and h200.json are what one of each gave: please send yours.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

DRAFT_VOCAB, TTT_STEPS, TAPS, WARM_UP = 32000, 7, (1, 2, 3), 2
LAYERS = {
    "Qwen3-8B": dict(
        hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, vocab_size=151936
    ),
    "MiniMax-M2.7": dict(
        hidden_size=3072, intermediate_size=6144, num_attention_heads=48, num_key_value_heads=8, vocab_size=200064
    ),
}
SYSTEMS = ("draftsmith", "specforge", "speculators")
PACKS = ((16, 512), (4, 2048), (1, 8192), (1, 16384))  # documents, tokens of each


def stub(layer: dict, device: str):
    """The target: a Llama with the draft's widths outside and almost nothing inside."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    thin = {**layer, "intermediate_size": 256}
    config = LlamaConfig(**thin, head_dim=128, num_hidden_layers=4, max_position_embeddings=32768)
    with torch.device(device):
        return LlamaForCausalLM(config).bfloat16().eval()


def run_ours(
    layer: dict, documents: int, length: int, steps: int, device: str = "cuda", gate: Path | None = None
) -> dict:
    import torch
    from peers import wait_at

    from draftsmith.core.recipe_file import parse_recipe
    from draftsmith.core.records.base import write_rows
    from draftsmith.core.records.data import Completion
    from draftsmith.data.vocabulary import DraftVocabulary
    from draftsmith.drafts.packing import make_pack
    from draftsmith.hardware.presets import peak_flops_s
    from draftsmith.targets.local import LocalTarget
    from draftsmith.training.metrics import step_flops
    from draftsmith.training.trainer import Trainer

    target = LocalTarget.from_model(stub(layer, device), name="stub")
    packs = steps + WARM_UP
    spans = [(length // 5, length)]
    ids = torch.randint(layer["vocab_size"], (packs * documents + 1, length)).tolist()
    rows = [Completion(id=str(i), ids=row, spans=spans) for i, row in enumerate(ids)]
    train = {"ttt_steps": TTT_STEPS, "pack_tokens": documents * length, "max_document_tokens": length}
    settings = {
        "name": "gpu",
        "target": {"model": "stub"},
        "draft": {"taps": list(TAPS), "intermediate_size": layer["intermediate_size"]},
        "train": {**train, "dtype": "bf16", "accumulate": 1, "held_out": 1, "epochs": 1},
    }
    with tempfile.TemporaryDirectory() as scratch:
        write_rows(Path(scratch) / "completions" / "00000.jsonl", rows)
        vocabulary = DraftVocabulary(torch.arange(DRAFT_VOCAB), layer["vocab_size"])
        recipe = parse_recipe(settings, "benchmark")
        trainer = Trainer(recipe, target, Path(scratch) / "completions", vocabulary, Path(scratch))
        capture = trainer._ahead(trainer._capture_source(), trainer._packs_to_come())
        seconds, flops = [], []
        for [indices] in trainer.steps:
            if trainer.step == WARM_UP:
                wait_at(gate)
            pack = make_pack([trainer.rows[i] for i in indices])
            started = time.perf_counter()
            trainer._optimiser_step([pack], capture)  # ends with a look at the loss: the GPU has done it by then,
            seconds.append(time.perf_counter() - started)  # but for the optimiser, which the next step waits for
            trainer.step += 1
            flops.append(step_flops(trainer.draft, trainer.settings, [pack]))
        told = {"loss": trainer.unlogged[-1].loss}
        if device == "cuda":
            told["kernels"] = launched(lambda: trainer._optimiser_step([pack], capture))
    step_s = statistics.median(seconds[WARM_UP:])
    told |= {"tokens_per_s": documents * length / step_s, "flops": flops[-1]}
    if device == "cuda":
        told["peak_bytes"] = torch.cuda.max_memory_allocated()
        peak = peak_flops_s(torch.cuda.get_device_name())
        told["mfu"] = flops[-1] / step_s / peak if peak else None
    return told


def launched(step: Callable[[], None]) -> int:
    """Kernels of a step, copies and fills among them; its packs are captured on the spot."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
    return sum(event.device_type.name == "CUDA" for event in profiled.events())


def write_peers_data(layer: dict, documents: int, length: int, steps: int, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    rows = documents * (steps + WARM_UP)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[:, : length // 5] = 0
    t2d = torch.arange(layer["vocab_size"]) < DRAFT_VOCAB
    ids = torch.randint(layer["vocab_size"], (rows, length))
    tensors = {"input_ids": ids, "loss_mask": mask, "d2t": torch.zeros(DRAFT_VOCAB, dtype=torch.long), "t2d": t2d}
    save_file(tensors, path)


def one(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["no word"]
    return {"failed": lines[-1][:500]} if done.returncode else json.loads(lines[-1])


def pack_of(text: str) -> tuple[int, int]:
    documents, length = map(int, text.split("x"))
    return documents, length


def peers(options: argparse.Namespace, name: str, scratch: Path) -> list[dict]:
    """SpecForge and speculators on the stub, if it can be written and they are there."""
    layer, target = LAYERS[name], scratch / "stub"
    stub(layer, "cuda").save_pretrained(target)
    shape = {key: value for key, value in layer.items() if key != "vocab_size"}
    shape |= {"head_dim": 128, "taps": list(TAPS)}
    rows = []
    for documents, length in options.pack:
        write_peers_data(layer, documents, length, options.steps, scratch / "data.safetensors")
        for peer in [system for system in options.system if system != "draftsmith"]:
            found = one(
                [
                    str(options.peers / "bin" / "python"),
                    str(Path(__file__).parent / "peers.py"),
                    *("--peer", peer, "--device", "cuda", "--layer", json.dumps(shape), "--target", str(target)),
                    *("--data", str(scratch / "data.safetensors"), "--batch", str(documents), "--seq", str(length)),
                    *("--steps", str(options.steps)),
                    *(("--gate", str(options.gate)) if options.gate else ()),
                ]
            )
            rows.append({"system": peer, "draft": name, "documents": documents, "length": length, **found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--peers", type=Path, help="virtual environment in which the peers are installed")
    parser.add_argument("--system", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--draft", nargs="+", choices=LAYERS, default=list(LAYERS), help="shapes of the draft")
    parser.add_argument(
        "--pack", nargs="+", type=pack_of, default=list(PACKS), metavar="DOCUMENTSxLENGTH", help="tokens of a step"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each setting")
    parser.add_argument(
        "--ours", nargs=3, metavar=("DRAFT", "DOCUMENTS", "LENGTH"), help="one setting, in this process"
    )
    parser.add_argument("--gate", type=Path, help="file to wait for between compiling and timing (peers.py)")
    options = parser.parse_args()
    if options.gate and not options.ours and max(map(len, (options.system, options.draft, options.pack))) > 1:
        parser.error("--gate is for one setting: one --system, --draft and --pack")
    import torch

    from draftsmith.runs.run import commit

    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: no CUDA device")
    if options.ours:
        name, documents, length = options.ours
        print(json.dumps(run_ours(LAYERS[name], int(documents), int(length), options.steps, gate=options.gate)))
        return
    rows = []
    for name in options.draft:
        for documents, length in options.pack if "draftsmith" in options.system else ():
            command = [sys.executable, __file__, "--steps", str(options.steps)]
            command += ["--gate", str(options.gate)] if options.gate else []
            found = one([*command, "--ours", name, str(documents), str(length)])
            rows.append({"system": "draftsmith", "draft": name, "documents": documents, "length": length, **found})
        if options.peers:
            with tempfile.TemporaryDirectory() as scratch:
                rows += peers(options, name, Path(scratch))
    for row in rows:
        share = f", {row['mfu']:.0%} MFU" if row.get("mfu") else ""
        told = row.get("failed") or f"{row['tokens_per_s']:,.0f} tokens/s, {row['peak_bytes'] / 1e9:.1f} GB{share}"
        print(f"{row['system']:<12} {row['draft']:<13} {row['documents']:>2} x {row['length']:<5} {told}")
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "draftsmith": version("draftsmith")}
    about |= {"commit": commit(), "command": " ".join(["python", *sys.argv])}
    about["peers"] = "timed" if options.peers else "not installed here: no --peers"
    options.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    print(f"written to {options.out}: please send it")


if __name__ == "__main__":
    main()
