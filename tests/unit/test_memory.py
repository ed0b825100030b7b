"""Memory as it is held: a cache that grows, one copy of a target at a time, and one line where there is none left."""

from pathlib import Path

import pytest
import torch
from models import save_tiny_target, tiny_lm, tiny_recipe, tiny_target, write_prompts

from draftsmith import cli
from draftsmith.core.errors import MemoryShortage, TargetError
from draftsmith.decoding.cache import StaticCache
from draftsmith.decoding.sampling import Sampling
from draftsmith.engines.base import Setup
from draftsmith.engines.embedded import exact
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run
from draftsmith.runs.stages import STAGES
from draftsmith.targets import local
from draftsmith.targets.local import LocalTarget

ON_CARD = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.10 GiB of which 1.00 GiB is free. See docs"


def out_of_card(*_args, **_options):
    raise torch.OutOfMemoryError(ON_CARD)


def test_the_cache_of_a_batch_grows_with_its_answers(monkeypatch):
    """From the first prompts on; what is written does not depend on it, nor is more allocated than was ever needed."""
    target, held = tiny_target(batch_size=3), []

    def watched(*arguments):
        held.append(StaticCache(*arguments))
        return held[-1]

    monkeypatch.setattr(local, "StaticCache", watched)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, 64, (n,), generator=generator).tolist() for n in (4, 30, 7, 12, 60, 3, 9)]
    answers = {}
    for ahead in (256, 1):
        monkeypatch.setattr(local, "CACHE_AHEAD", ahead)
        answers[ahead] = sorted((n, a.ids) for n, a in target.generate(prompts, Sampling(1.0), 150, seed=5))
    assert answers[256] == answers[1]
    needed = max(len(prompts[n]) + len(ids) for n, ids in answers[1])
    whole, grown = (cache.capacity for cache in held)
    assert whole == 60 + 150  # prompts and max_new_tokens: never more, however far ahead
    assert needed - 1 <= grown < 1.5 * needed  # the last token is never read
    assert held[1].keys[0].shape[2] == grown


def tiny_run(tmp_path: Path, **changes) -> Run:
    model = save_tiny_target(tmp_path / "model")
    return Run(tiny_recipe(model, write_prompts(tmp_path / "p.jsonl"), **changes), tmp_path / "run", ["test"])


def test_a_stage_without_memory_names_its_keys(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, **{"train.epochs": 1, "evaluate.temperatures": [0.0]})
    stages = {
        "draftsmith.targets.local.LocalTarget.generate": "regenerate: give a smaller regenerate.batch_size (now 4)",
        "draftsmith.training.trainer.Trainer._optimiser_step": "train: give a smaller train.pack_tokens (now 96) or "
        "train.max_document_tokens (now 64)",
        "draftsmith.evaluation.evaluate.complete": "evaluate: give a smaller evaluate.lossless_prompts (now 2) or "
        "regenerate.batch_size (now 4)",
    }
    for place, told in stages.items():  # the same run goes on
        stage, keys = told.split(": ")
        with monkeypatch.context() as patched:
            patched.setattr(place, out_of_card)
            with pytest.raises(MemoryShortage) as caught:
                run_pipeline(run)
        text = str(caught.value)
        assert text.startswith(f"{stage}: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.10 GiB")
        assert f"{keys}, or target.engine vllm" in text
        assert "See docs" not in text


def test_a_host_without_memory_is_one_line_of_any_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["draftsmith", "inspect", str(tmp_path)])
    monkeypatch.setattr("draftsmith.commands.inspect.Inspect.__call__", lambda self: torch.empty(1 << 60))
    assert cli.main() == 2
    assert "DefaultCPUAllocator: can't allocate memory" in capsys.readouterr().err


def test_a_target_that_is_out_of_memory_is_not_called_another_kind(monkeypatch):
    monkeypatch.setattr(LocalTarget, "capture", out_of_card)
    with pytest.raises(torch.OutOfMemoryError):
        LocalTarget.from_model(tiny_lm())


def test_a_target_too_large_for_the_card_is_told_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15_000_000_000, 24_000_000_000))
    recipe = tiny_recipe(
        "Qwen/Qwen3-8B", "p", **{"device": "cuda:0", "target.dtype": "bf16"}
    )  # of which no file is here
    with pytest.raises(TargetError) as caught:
        _ = Run(recipe, tmp_path, ["test"]).target
    assert str(caught.value).startswith(
        "target.model: Qwen/Qwen3-8B has 16.4 GB of weights in bf16, and 15.0 of 24.0 GB are free on cuda:0; give "
        "target.engine vllm"
    )


def test_training_asks_for_room_before_the_stages_ahead_of_it_and_not_beside_the_target(tmp_path, monkeypatch):
    free = [15_000_000_000]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 24_000_000_000))
    run = Run(
        tiny_recipe("Qwen/Qwen3-8B", "p", **{"device": "cuda:0", "target.dtype": "bf16", "draft": {}}), tmp_path, ["t"]
    )
    require = next(stage.require_possible for stage in STAGES if stage.name == "train")
    with pytest.raises(TargetError, match=r"15\.0 of 24\.0 GB are free"):
        require(run)
    free[0] = 20_000_000_000
    require(run)
    free[0] = 4_000_000_000
    run.__dict__["target"] = object()  # what an earlier stage of this process loaded
    require(run)


def test_losslessness_holds_one_copy_of_the_target(tmp_path, monkeypatch, capsys):
    run = tiny_run(tmp_path, **{"target.dtype": "bf16"})
    target = run.target
    before = target.head.weight.clone()
    setup = Setup(run.recipe, tmp_path, tmp_path, target)
    with exact(setup) as proof:
        assert proof.target.identity.dtype == "fp32"
        in_fp32 = proof.target.lm
    assert all(weight.is_meta for weight in in_fp32.parameters())
    assert torch.equal(target.head.weight, before)
    monkeypatch.setattr("draftsmith.engines.embedded.card_room", lambda device: (100_000, 24_000_000_000))
    with exact(setup) as proof:
        assert proof is None
    assert "losslessness is not tested; in fp32 the target takes" in capsys.readouterr().err
