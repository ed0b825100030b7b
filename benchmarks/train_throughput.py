"""Training throughput and memory beside SpecForge and speculators, on the same data, target and draft shape.

    python benchmarks/train_throughput.py --completions runs/gemma3-270m-cpu/completions --peers .peers-venv

Every setting runs in a process of its own, all systems in turn, `--rounds` times; medians are reported. Rows are 512
tokens of real conversations laid end to end, with the loss on what the target wrote (`--loss all`: on every token).
The peers are installed by benchmarks/install_peers.sh and get the allocator settings that draftsmith gives itself,
which make them faster than as shipped. Share of peak: floating-point operations of draftsmith's own matrix products
(counted by torch) over its step time, beside the best 2048-cubed product in the same dtype. `--batches 1 2 4 8 --loss
all` without peers shows that time is linear in tokens. The last line is JSON.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

SEQUENCE, DRAFT_VOCAB, TTT_STEPS, TAPS = 512, 8192, 7, (2, 9, 15)


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def make_data(completions: Path, loss: str, path: Path, rows: int = 64) -> None:
    import torch
    from safetensors.torch import save_file

    from draftsmith.data.regenerate import read_completions
    from draftsmith.data.vocabulary import choose

    every = sorted(read_completions(completions), key=lambda c: c.id)
    random.Random(0).shuffle(every)
    counts = Counter(token for c in every for token in c.loss_tokens)
    vocabulary = choose(counts, DRAFT_VOCAB, 262144, {0, 1, 2, 3})
    ids, mask = [], []
    for completion in every:
        own = [0] * len(completion.ids)
        for start, end in completion.spans:
            own[start:end] = [1] * (end - start)
        ids += completion.ids
        mask += own if loss == "completions" else [1] * len(own)
        if len(ids) >= rows * SEQUENCE:
            break
    rows = len(ids) // SEQUENCE
    save_file(
        {
            "input_ids": torch.tensor(ids[: rows * SEQUENCE]).view(rows, SEQUENCE),
            "loss_mask": torch.tensor(mask[: rows * SEQUENCE]).view(rows, SEQUENCE),
            "d2t": vocabulary.d2t,
            "t2d": vocabulary.t2d,
        },
        path,
    )


def spans_of(mask: list[int]) -> list[tuple[int, int]]:
    """Half-open runs of ones that begin after the first token."""
    spans, start = [], None
    for i, value in enumerate([*mask, 0]):
        if value and start is None:
            start = max(i, 1)
        elif not value and start is not None:
            spans.append((start, i))
            start = None
    return spans


def run_ours(data: Path, dtype: str, batch: int, steps: int) -> dict:
    """The trainer's own step (capture, forward, backward, clip, AdamW) on the data file; prints like peers.py."""
    from draftsmith.core.allocator import keep_freed_memory

    keep_freed_memory()
    import torch
    from safetensors.torch import load_file
    from torch.utils.flop_counter import FlopCounterMode

    from draftsmith.core.recipe import TargetRecipe
    from draftsmith.core.recipe_file import parse_recipe
    from draftsmith.core.records.base import write_rows
    from draftsmith.core.records.data import Completion
    from draftsmith.data.vocabulary import DraftVocabulary
    from draftsmith.drafts.packing import make_pack
    from draftsmith.targets.local import LocalTarget
    from draftsmith.training.trainer import Trainer

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    tensors = load_file(data)
    target = LocalTarget(TargetRecipe(model="gemma3-270m", dtype=dtype))
    for parameter in target.lm.parameters():
        parameter.sum()  # weights are memory-mapped: touch them, so that they count as the target's
    after_target = status_bytes("VmRSS")
    scratch = Path(f"/tmp/draftsmith-throughput-{os.getpid()}")
    rows = [
        Completion(id=str(i), category="x", source="x", ids=ids, spans=spans_of(mask))
        for i, (ids, mask) in enumerate(zip(tensors["input_ids"].tolist(), tensors["loss_mask"].tolist(), strict=True))
    ]
    write_rows(scratch / "completions" / "00000.jsonl", rows)
    recipe = parse_recipe(
        {
            "name": "throughput",
            "target": {"model": "gemma3-270m", "dtype": dtype},
            "vocab": {"size": DRAFT_VOCAB},
            "draft": {"taps": list(TAPS)},
            "train": {"ttt_steps": TTT_STEPS, "pack_tokens": batch * SEQUENCE, "dtype": dtype, "held_out": 1},
        },
        "benchmark",
    )
    vocabulary = DraftVocabulary.load(data)
    trainer = Trainer(recipe, target, scratch / "completions", vocabulary, scratch / "train")
    capture = trainer._capture_source()
    seconds = []
    flops = []
    for step in range(steps + 1):
        chosen = [rows[(step * batch + i) % len(rows)] for i in range(batch)]
        started = time.perf_counter()
        trainer._optimiser_step([make_pack(chosen)], capture)
        seconds.append(time.perf_counter() - started)
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for step in range(1, steps + 1):  # the timed steps' operations, counted apart because counting takes time
        chosen = [rows[(step * batch + i) % len(rows)] for i in range(batch)]
        with FlopCounterMode(display=False) as counter:
            trainer._optimiser_step([make_pack(chosen)], capture)
        flops.append(counter.get_total_flops())
    return {
        "peer": "draftsmith",
        "dtype": dtype,
        "batch": batch,
        "seq": SEQUENCE,
        "steps": steps,
        "tokens_per_s": batch * SEQUENCE / statistics.median(seconds[1:]),
        "gflops": sum(flops) / sum(seconds[1:]) / 1e9,
        "rss_after_target_load_bytes": after_target,
        "peak_rss_bytes": peak_rss,
        "threads": torch.get_num_threads(),
    }


def matmul_peak(dtype: str) -> float:
    """Best of several 2048-cubed products, in GFLOP/s: what this machine can do at most."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    a = torch.randn(2048, 2048).to(kind)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=Path)
    parser.add_argument("--peers", type=Path, help="virtual environment of the peers; left out: draftsmith alone")
    parser.add_argument("--loss", choices=["completions", "all"], default="completions")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("/tmp/draftsmith-throughput.safetensors"))
    parser.add_argument(
        "--ours", nargs=2, metavar=("DTYPE", "BATCH"), help="one setting of draftsmith, in this process"
    )
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(run_ours(options.data, options.ours[0], int(options.ours[1]), options.steps)))
        return
    make_data(options.completions, options.loss, options.data)
    from draftsmith.targets.embedded import materialise

    target = materialise("gemma3-270m")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),  # allocator.py's settings, for all systems
        "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    }
    here = Path(__file__).parent
    table = []
    for dtype in options.dtypes:
        peak = matmul_peak(dtype)
        for batch in options.batches:
            commands = {"draftsmith": [sys.executable, __file__, "--ours", dtype, str(batch)]}
            if options.peers:
                for peer in ("specforge", "speculators"):
                    commands[peer] = [
                        str(options.peers / "bin" / "python"),
                        str(here / "peers.py"),
                        *("--peer", peer, "--dtype", dtype, "--batch", str(batch)),
                        *("--seq", str(SEQUENCE), "--target", str(target)),
                    ]
            found: dict[str, list[dict]] = {name: [] for name in commands}
            for _ in range(options.rounds):
                for name, command in commands.items():
                    extra = ["--data", str(options.data), "--steps", str(options.steps)]
                    done = subprocess.run([*command, *extra], capture_output=True, text=True, env=environment)
                    if done.returncode:
                        sys.exit(f"{name} {dtype} batch {batch} failed:\n{done.stderr[-2000:]}")
                    found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            for name, runs in found.items():
                row = {
                    "system": name,
                    "version": runs[0].get("version", "this commit"),
                    "dtype": dtype,
                    "batch": batch,
                    "tokens_per_s": statistics.median(r["tokens_per_s"] for r in runs),
                    "above_target_bytes": statistics.median(
                        r["peak_rss_bytes"] - r["rss_after_target_load_bytes"] for r in runs
                    ),
                    "matmul_peak_gflops": peak,
                }
                share = ""
                if "gflops" in runs[0]:
                    row["share_of_matmul_peak"] = statistics.median(r["gflops"] for r in runs) / peak
                    share = f", {row['share_of_matmul_peak']:.0%} of this machine's matmul peak"
                table.append(row)
                print(
                    f"{name:<12} {dtype} batch {batch}: {row['tokens_per_s']:7.0f} tokens/s, "
                    f"{row['above_target_bytes'] / 1e9:5.2f} GB above the target{share}",
                    file=sys.stderr,
                    flush=True,
                )
    print(json.dumps({"loss": options.loss, "threads": os.cpu_count(), "rows": table}))


if __name__ == "__main__":
    main()
