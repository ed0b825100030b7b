"""Completion tokens per second of regeneration beside `transformers`' own generate, at the same batch and sampling.

    python benchmarks/regenerate_throughput.py --batch 64

Both answer the same bundled prompts of the quick recipe, in turn, `--rounds` times; medians are printed, the last line
is JSON. `generate` gets left-padded prompts, bf16, its own cache and SDPA, and the same limit on new tokens; its rows
that have ended are padding and are not counted.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from draftsmith.core.allocator import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    import torch
    from transformers import AutoModelForCausalLM

    from draftsmith.core.recipe_file import load_recipe
    from draftsmith.core.sources import Source
    from draftsmith.data.prompts import Tally, chosen, prompts_of
    from draftsmith.data.templates import ChatFormat
    from draftsmith.decoding.sampling import Sampling
    from draftsmith.targets.local import LocalTarget
    from draftsmith.targets.parts import resolve_model

    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "gemma3-270m-quick.yaml")
    target = LocalTarget(recipe.target, batch_size=options.batch)
    reference = AutoModelForCausalLM.from_pretrained(resolve_model("gemma3-270m"), dtype=torch.bfloat16).eval()
    chat = ChatFormat(target.tokenizer, recipe.target.template)
    source = Source(name="bundled", limit=options.batch)
    prompts = chosen(prompts_of(source, 1, False, 0, Tally()), source, 0)
    ids = [chat.first_turn(p.users[0]) for p in prompts]
    wish = recipe.regenerate
    sampling = Sampling(wish.temperature, wish.top_p, wish.top_k)
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids])

    def ours(seed: int) -> float:
        started = time.perf_counter()
        made = sum(len(g.ids) for _, g in target.generate(ids, sampling, options.new_tokens, (), seed))
        return made / (time.perf_counter() - started)

    def theirs(seed: int) -> float:
        torch.manual_seed(seed)
        started = time.perf_counter()
        out = reference.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=options.new_tokens,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )[:, longest:]
        seconds = time.perf_counter() - started
        return int((out != 0).sum()) / seconds  # 0 pads rows that have ended

    rates: dict[str, list[float]] = {"draftsmith": [], "transformers": []}
    for seed in range(options.rounds):
        rates["draftsmith"].append(ours(seed))
        rates["transformers"].append(theirs(seed))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:<13} {value:6.0f} completion tokens/s")
    print(json.dumps({"batch": options.batch, "new_tokens": options.new_tokens, "cores": os.cpu_count(), **medians}))


if __name__ == "__main__":
    main()
