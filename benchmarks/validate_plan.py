"""Planned against real bytes, counts and hours of finished runs on this machine.

    draftsmith run recipes/gemma3-270m-quick.yaml && draftsmith probe recipes/gemma3-270m-quick.yaml
    python benchmarks/validate_plan.py runs/gemma3-270m-quick [RUN ...]

A plan sees the recipe and the probe alone. Results go to benchmarks/results/plan-validation.json.
"""

import argparse
from pathlib import Path

from draftsmith import files
from draftsmith.cli import _quiet_libraries
from draftsmith.hardware import plan as planning
from draftsmith.hardware.commands import plan
from draftsmith.pipeline import command_line
from draftsmith.recipe import load_recipe
from draftsmith.run import Run

OUT = Path(__file__).parent / "results" / "plan-validation.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = []
    for directory in parser.parse_args().runs:
        _quiet_libraries()
        run = Run(load_recipe(directory / "recipe.yaml"), directory, command_line())
        rows = planning.against(plan(run, None, None, directory), directory)
        command = files.read_json(directory / "manifest.json")["command"]
        told = [{"what": what, "planned": a, "real": b, "ratio": a / b} for what, a, b in rows]
        runs.append({"run": directory.name, "command": command, "rows": told, "created_with": run.created_with})
    files.write_json(OUT, {"runs": runs})
    for one in runs:
        worst = max(one["rows"], key=lambda row: abs(row["ratio"] - 1))
        print(f"{one['run']}: {len(one['rows'])} figures, the worst {worst['what']} at {worst['ratio']:.2f}")


if __name__ == "__main__":
    main()
