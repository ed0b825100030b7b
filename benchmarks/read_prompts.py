"""Time and memory of gathering many prompts, and whether the time is linear in them.

    python benchmarks/read_prompts.py --rows 1000000

Writes synthetic conversations of two user turns to a temporary folder and gathers them in a process of their own, once
with 100,000 rows and once with all. The last line is JSON: rows,
seconds, peak_rss_bytes, and ratio: seconds per row of all rows over those of the fewer.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [f"word{i}" for i in range(5000)]


def write_rows(path: Path, rows: int) -> None:
    """About 600 bytes a row; one in twenty repeats an earlier one, one in fifty shows an image."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            seed = draw.randrange(number) if number and draw.random() < 0.05 else number
            texts = random.Random(seed)
            asked, answer, more = (" ".join(texts.choices(WORDS, k=count)) for count in (25, 30, 10))
            content = [{"type": "image"}] if number % 50 == 49 else f"Question {seed}: {asked}?"
            turns = [("user", content), ("assistant", answer), ("user", more)]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"id": f"row-{number}", "category": "chat", "messages": messages}) + "\n")


def gather_once(path: Path) -> None:
    """In a process of its own, so that the peak of memory is its own."""
    import resource

    from draftsmith.core.recipe_file import parse_recipe
    from draftsmith.data.prompts import gather

    values = {"name": "benchmark", "target": {"model": "none"}}
    recipe = parse_recipe({**values, "prompts": {"sources": [{"name": str(path)}], "max_turns": 2}}, "benchmark")
    begun = time.monotonic()
    summary = gather(recipe, path.parent / "out")
    seconds = time.monotonic() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak, "prompts": summary.prompts}))


def measured(rows: int) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        write_rows(path, rows)
        command = [sys.executable, __file__, "--gather", str(path)]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ.copy()).stdout
    return {"rows": rows, **json.loads(told.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--gather", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gather:
        gather_once(options.gather)
        return
    few = measured(min(options.rows, 100_000))
    many = measured(options.rows)
    for result in (few, many):
        print(
            f"{result['rows']:,} rows: {result['seconds']:.1f} s, {result['peak_rss_bytes'] / 1e9:.2f} GB, "
            f"{result['prompts']:,} prompts"
        )
    ratio = (many["seconds"] / many["rows"]) / (few["seconds"] / few["rows"])
    print(json.dumps({**many, "seconds": round(many["seconds"], 2), "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
