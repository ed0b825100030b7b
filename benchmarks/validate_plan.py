"""Planned against real bytes, counts and hours of finished runs on this machine.

    draftsmith run recipes/gemma3-270m-quick.yaml && draftsmith probe recipes/gemma3-270m-quick.yaml
    python benchmarks/validate_plan.py runs/gemma3-270m-quick [RUN ...]

A plan sees the recipe and the probe alone. Results go to benchmarks/results/plan-validation.json.
"""

import argparse
import sys
from pathlib import Path

from draftsmith.cli import quiet_libraries
from draftsmith.core import files
from draftsmith.core.recipe_file import load_recipe
from draftsmith.core.records.run import Manifest
from draftsmith.runs import plan as planning
from draftsmith.runs.estimates import costs_of, plan_of
from draftsmith.runs.run import Run

OUT = Path(__file__).parent / "results" / "plan-validation.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = []
    for directory in parser.parse_args().runs:
        quiet_libraries()
        run = Run(load_recipe(directory / "recipe.yaml"), directory, sys.argv)
        rows = planning.against(plan_of(run, costs_of(run, None)), run.files)
        command = Manifest.load(run.files.manifest).created_with.command
        told = [{"what": what, "planned": a, "real": b, "ratio": a / b} for what, a, b in rows]
        made = run.created_with.model_dump(mode="json")
        runs.append({"run": directory.name, "command": command, "rows": told, "created_with": made})
    files.write_json(OUT, {"runs": runs})
    for one in runs:
        worst = max(one["rows"], key=lambda row: abs(row["ratio"] - 1))
        print(f"{one['run']}: {len(one['rows'])} figures, the worst {worst['what']} at {worst['ratio']:.2f}")


if __name__ == "__main__":
    main()
