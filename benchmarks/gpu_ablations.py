"""One switch each where minutes are millions of tokens: drafts trained on a GPU, judged by tau on held-out completions.

    draftsmith run recipes/smollm2-135m-gpu.yaml --out RUN      # or its stages up to vocab
    python benchmarks/gpu_ablations.py RUN --steps 600 [--only NAME ...] [--work DIR]

Every cell trains anew, by the train stage's own trainer, on the run's completions and draft vocabulary, for --steps
steps with a whole schedule; the same completions are held out of all. Tau is that of chains of three (a prefix of the
text is accepted as decoding accepts it), alpha the chance by depth that a sampled draft token is accepted: by the
target's own distribution with lk_* and true_probabilities, else by the one renormalised over the draft vocabulary,
which is a little too high. Several processes may work on one --work: whoever makes NAME.begun first has the cell (to
try one again that was cut off, delete that file), and what is measured already is kept, of cells that were cut off,
too. The result: benchmarks/results/gpu-ablations.json.
"""

import argparse
import time
from pathlib import Path

import torch
from arena_switches import unfitted

from draftsmith.cli import quiet_libraries
from draftsmith.core import files, run_files
from draftsmith.core.files import JsonObject
from draftsmith.core.recipe_file import load_recipe
from draftsmith.core.records.data import Completion
from draftsmith.core.records.training import MetricsRow
from draftsmith.core.run_files import RunFiles
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.runs.run import commit
from draftsmith.targets.local import LocalTarget
from draftsmith.training.capture import CaptureSource
from draftsmith.training.trainer import Trainer

HERE = Path(__file__).parent
RECIPE, RESULT = HERE.parent / "recipes" / "smollm2-135m-gpu.yaml", HERE / "results" / "gpu-ablations.json"
HELD_OUT = 256
OBJECTIVE = "soft_ce"  # of the first cells; the recipe has the winner's
ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3}
CELLS: dict[str, JsonObject] = {  # keys of the recipe; `random`: a random start; `text`: of the completions, one in n
    "nothing": {},
    "adamw": {"train": ADAMW},
    "lk_lambda": {"train": {"objective": "lk_lambda"}},
    "quarter": {"text": 4},
    "random": {"random": True},
    "ttt-7": {"train": {"ttt_steps": 7}},
    "adamw-1e-4": {"train": {**ADAMW, "learning_rate": 1e-4}},
    "lr-2e-3": {"train": {"learning_rate": 2e-3}},
    "true-teacher": {"train": {"true_probabilities": True}},
    "adamw-random": {"train": ADAMW, "random": True},
    "sixteenth": {"text": 16},
    "lk_alpha": {"train": {"objective": "lk_alpha"}},
    "no-fc-norm": {"draft": {"fc_norm": False}},
    "wide": {"draft": {"intermediate_size": 6144}},
    "lr-8e-3": {"train": {"learning_rate": 8e-3}},
    "taps-late": {"draft": {"taps": [9, 19, 29]}},
    "on-prompts": {"train": {"on_prompts": True}},
    "decay-0.8": {"train": {"step_decay": 0.8}},
    "weight-decay": {"train": {"weight_decay": 0.5}},
    "adamw-1e-4-random": {"train": {**ADAMW, "learning_rate": 1e-4}, "random": True},
}


class Cell(Trainer):
    """Tells what it has measured at every evaluation, so that a loan that ends takes no more than what came after."""

    one_in = 1
    name: str
    planned_steps: int

    def _split(self, every: list[Completion]) -> tuple[list[Completion], list[Completion]]:
        held_out, rows = super()._split(every)
        return held_out, rows[: len(rows) // self.one_in]

    def _evaluate(self, source: CaptureSource) -> None:
        super()._evaluate(source)
        self.tell(None)

    def tell(self, seconds: float | None) -> None:
        """`seconds`: of the whole training; None where it is not at its end."""
        rows = MetricsRow.read_rows(self.out / run_files.METRICS)
        held_out = {row.step: row.held_out for row in rows if row.held_out}
        last = max(held_out)
        read = (self.rows[i].ids for step in self.steps[:last] for pack in step for i in pack)
        told = {
            "name": self.name,
            "changed": CELLS[self.name],
            "steps": last,
            "planned_steps": self.planned_steps,
            "seconds": seconds,
            "text_tokens": sum(len(row.ids) for row in self.rows),
            "read_tokens": sum(map(len, read)),
            "parameters": sum(p.numel() for p in self.draft.parameters()),
            "tau": {step: row.tau[3] for step, row in held_out.items()},
            "match": held_out[last].match,
            "alpha": held_out[last].alpha,
        }
        files.write_json(self.out.parent / f"{self.name}.json", told)


def train(name: str, run: RunFiles, target: LocalTarget, steps: int, work: Path) -> None:
    changed = dict(CELLS[name])
    random, Cell.one_in = changed.pop("random", False), changed.pop("text", 1)
    every = max(1, steps // 3)
    length = {"objective": OBJECTIVE, "max_steps": steps, "epochs": 20, "held_out": HELD_OUT, "evaluate_every": every}
    given = {**changed, "train": {**length, "checkpoint_every": steps, **changed.get("train", {})}}
    trainer = Cell(
        load_recipe(RECIPE, given), target, run.completions, DraftVocabulary.load(run.vocabulary), work / name
    )
    trainer.name, trainer.planned_steps = name, len(trainer.steps)
    if random:
        unfitted(trainer)
    started = time.perf_counter()
    trainer.train()
    trainer.tell(time.perf_counter() - started)


def write_result(options: argparse.Namespace, target: LocalTarget) -> None:
    told = [path for name in CELLS if (path := options.work / f"{name}.json").exists()]
    about = {
        "device": torch.cuda.get_device_name() if target.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "command": f"python benchmarks/gpu_ablations.py RUN --steps {options.steps}",
    }
    files.write_json(options.result, {**about, "cells": [files.read_json(path) for path in told]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run that has completions and a draft vocabulary")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-ablations"))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    quiet_libraries()
    options.work.mkdir(parents=True, exist_ok=True)
    target = LocalTarget(load_recipe(RECIPE).target)
    for name in options.only:
        try:
            (options.work / f"{name}.begun").touch(exist_ok=False)
        except FileExistsError:
            continue
        train(name, RunFiles(options.run), target, options.steps, options.work)
        write_result(options, target)
        told = files.read_json(options.work / f"{name}.json")
        print(f"{name}: tau " + " ".join(f"{tau:.3f}" for tau in told["tau"].values()), flush=True)
    write_result(options, target)  # what others began and did not end, too


if __name__ == "__main__":
    main()
