"""Tokens per second of the embedded engine on a CPU, and where a step goes: target, draft, host.

    python benchmarks/decode.py recipes/smollm2-135m-cpu.yaml [--vllm --serve.program ...]

Needs a finished run of the recipe. Plain and drafted decoding (batch 1) take turns on the same evaluation prompts, and
so do the temperatures; then the training prompts are answered in batches as `regenerate` does, with the recipe's
sampling. A step is split by the clock around what the models compute: target is its layers and head, draft all of the
draft's products; what is left is the host. Seconds of decoding only, the prompt's own forward left out, but for
regeneration, where prompts belong to the work. `--vllm` starts vLLM on the same target, plain, and asks for the same
at batch 1 and `--batch`. Results go to benchmarks/results/decode.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.core.allocator import keep_freed_memory

OUT = Path(__file__).parent / "results" / "decode.json"


@dataclass
class Clock:
    """Seconds inside wrapped functions, by part; a function called by a wrapped one counts once."""

    seconds: dict[str, float] = field(default_factory=dict)
    _inside: bool = False

    def wrap(self, owner: Any, names: Sequence[str], part: str) -> None:
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, started = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

        return timed


class AfterPrompt:
    """Ends nothing before its length; the first token is where decoding begins, for `Generation.seconds`, too."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def reason(self, ids: list[int], room: int) -> str | None:
        if len(ids) == 1:
            self.clock.seconds.clear()
        return "length" if len(ids) >= room else None


def batch_one(run: Any, prompts: list[list[int]], shapes: list[str], tokens: int) -> list[dict]:
    """Plain and every shape in turn on each prompt, at temperature 0 and 1."""
    from draftsmith.core.shape import Shape
    from draftsmith.decoding.sampling import Sampling
    from draftsmith.decoding.speculate import Decoder
    from draftsmith.drafts.directories import ready_draft

    target, ready, clock = run.target, ready_draft(run.target, run.files.draft), Clock()
    clock.wrap(target.decoder, ["forward"], "target")
    clock.wrap(target, ["logits"], "target")
    clock.wrap(ready.draft, ["fuse", "step", "logits"], "draft")
    plain, drafted = Decoder(target), Decoder(target, ready.drafter(), draft_sampling="sampled")
    asked = [None, *(Shape.parse(name) for name in shapes)]
    settings = [(shape, sampling) for sampling in (Sampling(), Sampling(1.0, 0.95)) for shape in asked]
    rows = {setting: {"tokens": 0, "steps": 0, "seconds": 0.0, "target": 0.0, "draft": 0.0} for setting in settings}
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first time warms up
        for shape, sampling in settings:
            ends = AfterPrompt(clock)
            made = (drafted if shape else plain).generate(prompt, sampling, tokens, shape, ends=ends)
            if number:
                row = rows[shape, sampling]
                row["tokens"] += len(made.ids) - 1
                row["steps"] += len(made.verified) or len(made.ids) - 1
                row["seconds"] += made.seconds
                for part, seconds in clock.seconds.items():
                    row[part] += seconds
    told = []
    for (shape, sampling), row in rows.items():
        per_step = {f"{part}_ms": 1e3 * row[part] / row["steps"] for part in ("target", "draft")}
        step_ms = 1e3 * row["seconds"] / row["steps"]
        host_ms = step_ms - sum(per_step.values())
        told.append(
            {
                "shape": str(shape) if shape else "plain",
                "temperature": sampling.temperature,
                "tokens_per_s": row["tokens"] / row["seconds"],
                "tau": row["tokens"] / row["steps"],
                "step_ms": step_ms,
                **per_step,
                "host_ms": host_ms,
                "host_share": host_ms / step_ms,
            }
        )
    return told


def regeneration(session: Any, prompts: list[list[int]], sampling: Any, tokens: int, rounds: int) -> float:
    """Median completion tokens per second, prompts included."""
    rates = []
    for seed in range(rounds):
        started = time.perf_counter()
        made = sum(len(answer.ids) for _, answer in session.generate(prompts, sampling, tokens, (), seed))
        rates.append(made / (time.perf_counter() - started))
    return statistics.median(rates)


def on_vllm(run: Any, one: list[list[int]], many: list[list[int]], sampling: Any, own: argparse.Namespace) -> dict:
    """The same of vLLM's server: at batch 1 two lengths of an answer, whose difference leaves the prompt out."""
    from draftsmith.decoding.sampling import Sampling
    from draftsmith.engines import ENGINES

    scratch = run.files.root / "benchmark-vllm"
    scratch.mkdir(exist_ok=True)
    with ENGINES["vllm"].open(run.setup("vllm", scratch), None) as session:

        def seconds(prompt: list[int], length: int) -> float:
            started = time.perf_counter()
            list(session.generate([prompt], Sampling(), length, at_once=1, ignore_end=True))
            return time.perf_counter() - started

        seconds(one[0], 8)  # warm
        spent = sum(seconds(prompt, own.tokens) - seconds(prompt, 1) for prompt in one)
        return {
            "plain_tokens_per_s": len(one) * (own.tokens - 1) / spent,
            "regeneration_tokens_per_s": regeneration(session, many, sampling, own.new_tokens, own.rounds),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--shapes", nargs="+", default=["3/1/4", "3/4/8"])
    parser.add_argument("--prompts", type=int, default=6, help="at batch 1")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer at batch 1")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128, help="of each answer in a batch, at most")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--vllm", action="store_true")
    own, flags = parser.parse_known_args()
    keep_freed_memory()
    import torch

    from draftsmith.cli import parse, quiet_libraries
    from draftsmith.core.files import write_json
    from draftsmith.core.records.data import Prompt
    from draftsmith.core.tables import table
    from draftsmith.data.regenerate import open_conversations
    from draftsmith.data.templates import ChatFormat
    from draftsmith.decoding.sampling import Sampling
    from draftsmith.runs.run import Run

    quiet_libraries()
    command, recipe = parse(["evaluate", own.recipe, *flags])
    run = Run(recipe, command.out or Path("runs") / recipe.name, ["python", *sys.argv])
    wish, chat = recipe.regenerate, ChatFormat.of(recipe, run.target)

    def ids_of(path: Path, count: int) -> list[list[int]]:
        opened = open_conversations(Prompt.read_rows(path), chat, wish.max_prompt_tokens, True)
        return [list(conversation.ids) for conversation, _ in zip(opened, range(count), strict=False)]

    one, many = ids_of(run.files.evaluation_prompts, own.prompts), ids_of(run.files.training_prompts, 2 * own.batch)
    sampling = Sampling(wish.temperature, wish.top_p, wish.top_k)
    rows = batch_one(run, one, own.shapes, own.tokens)
    run.target.batch_size = own.batch
    rate = regeneration(run.target.session(), many, sampling, own.new_tokens, own.rounds)
    told = {"created_with": run.created_with.model_dump(mode="json"), "threads": torch.get_num_threads()}
    told |= {"steps": rows, "regeneration": {"batch": own.batch, "tokens_per_s": rate}}
    write_json(OUT, told)
    if own.vllm:
        told["vllm"] = on_vllm(run, one, many, sampling, own)
        write_json(OUT, told)
    head = ["shape", "T", "tokens/s", "tau", "step ms", "target", "draft", "host", "host share"]
    numbers = ("tau", "step_ms", "target_ms", "draft_ms", "host_ms")
    lines = [
        [r["shape"], f"{r['temperature']:g}", f"{r['tokens_per_s']:.1f}", *(f"{r[n]:.2f}" for n in numbers),
         f"{r['host_share']:.0%}"] for r in rows
    ]  # fmt: skip
    print(table(lines, head, range(2, len(head))))
    print(f"regeneration at batch {own.batch}: {rate:.0f} completion tokens/s")
    if own.vllm:
        print(
            "vLLM: {plain_tokens_per_s:.1f} plain, {regeneration_tokens_per_s:.0f} regenerating".format(**told["vllm"])
        )


if __name__ == "__main__":
    main()
