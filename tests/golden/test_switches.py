"""What benchmarks/arena_switches.py does to a trainer."""

import importlib

import pytest
import torch
from models import save_tiny_target, tiny_recipe, write_prompts
from safetensors.torch import load_file

from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run
from draftsmith.training.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(recipe, run with completions and a vocabulary); the draft is as wide as the target's layers."""
    out = tmp_path_factory.mktemp("data")
    changes = {"draft": {"taps": [1, 3, 4]}, "train.max_steps": 3, "train.checkpoint_every": 3}
    recipe = tiny_recipe(save_tiny_target(out / "model"), write_prompts(out / "p.jsonl"), **changes)
    run = Run(recipe, out / "run", ["test"])
    for stage in ("prompts", "regenerate", "vocab"):
        run_pipeline(run, stage)
    return recipe, run


@pytest.fixture
def switches(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "benchmarks")
    return importlib.import_module("arena_switches")


def trained(data, out, prepare=None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before the first step and in the last checkpoint."""
    recipe, run = data
    trainer = Trainer(recipe, run.target, run.files.completions, DraftVocabulary.load(run.files.vocabulary), out)
    capture = run.target.capture
    if prepare:
        prepare(trainer)
    before = {name: weight.clone() for name, weight in trainer.draft.state_dict().items()}
    trainer.train()
    run.target.__dict__.pop("capture", None)  # what `noisy` put there
    assert run.target.capture == capture
    return before, load_file(out / "checkpoint-000003" / "draft.safetensors")


def test_every_switch_changes_what_it_is_named_after_and_trains(data, switches, tmp_path):
    start, end = trained(data, tmp_path / "plain")
    changed = {name: set() for name in ("averaged", "noise", "init-random", "head-frozen")}
    changed |= {"init-last-layer": {"fc", "q_proj", "down_proj"}}
    assert set(switches.SWITCHES) == set(changed)
    for name, (_, prepare) in switches.SWITCHES.items():
        before, after = trained(data, tmp_path / name, prepare)
        other = {key for key in before if not torch.equal(before[key], start[key])}
        assert all(any(part in key.split(".") for key in other) for part in changed[name]), name
        assert bool(other) == bool(changed[name]), name
        assert torch.equal(after["lm_head.weight"], before["lm_head.weight"]) == (name == "head-frozen"), name
        assert all(weight.isfinite().all() for weight in after.values()), name
        assert not torch.equal(after["midlayer.self_attn.q_proj.weight"], end["midlayer.self_attn.q_proj.weight"]), name


def test_averaged_weights_are_the_running_mean(data, switches, tmp_path):
    seen = []

    def prepare(trainer):
        step = trainer._optimiser_step

        def watched(*arguments):
            step(*arguments)
            seen.append(trainer.draft.fc.weight.detach().clone())

        trainer._optimiser_step = watched
        switches.averaged(trainer)

    _, after = trained(data, tmp_path / "mean", prepare)
    mean, decay = seen[0], switches.DECAY
    for weight in seen[1:]:
        mean = decay * mean + (1 - decay) * weight
    assert torch.allclose(after["fc.weight"], mean, atol=1e-6)
