"""Plans against arithmetic done by hand and against the recorded run of recipes/gemma3-270m-cpu.yaml."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from draftsmith.core.errors import DraftsmithError
from draftsmith.core.recipe_file import load_recipe, parse_recipe
from draftsmith.core.records.data import CompletionsSummary, Timing
from draftsmith.core.records.machine import Probe
from draftsmith.core.records.training import TrainingSummary
from draftsmith.core.run_files import SUMMARY, TIMING, RunFiles
from draftsmith.drafts.eagle3.config import Eagle3Config
from draftsmith.drafts.eagle3.shape import draft_config
from draftsmith.hardware import sizes
from draftsmith.hardware.cost_model import RooflineCosts
from draftsmith.hardware.presets import Machine, preset
from draftsmith.hardware.sizes import TargetSize
from draftsmith.runs.estimates import plan_of, roofline
from draftsmith.runs.plan import Sizes, against, page, page_against, plan
from draftsmith.runs.run import Run
from draftsmith.targets.configs import target_config

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
GEMMA = AutoConfig.for_model(  # of gemma3-270m, which need not be installed to plan for it
    "gemma3_text",
    vocab_size=262144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    tie_word_embeddings=True,
)


def planned(name="minimax-m2.7-eagle3", machine="h200-nvlink-8", trainer_gpus=None, completion_tokens=None, **changes):
    recipe = load_recipe(RECIPES / f"{name}.yaml").model_copy(update=changes)
    config = GEMMA if name.startswith("gemma") else target_config(recipe.target.model)
    target = TargetSize.of(config, recipe.target.dtype)
    text = config.get_text_config()
    draft = draft_config(recipe.draft, text, text.num_hidden_layers, recipe.vocab.size)
    chosen = machine if isinstance(machine, Machine) else preset(machine)
    if name.startswith("gemma"):
        costs = RooflineCosts(chosen, target, draft)
    else:
        run = Run(recipe, Path("nowhere"), [])
        costs = roofline(run, chosen)
        assert draft == costs.draft
    return plan(Sizes(recipe, chosen, target, draft, trainer_gpus, completion_tokens), costs)


def test_the_reference_run_is_that_of_a_quarter_billion_draft():
    told = planned()
    layer = 2 * 3072 * (6144 + 2 * 1024) + 6144 * 3072 + 3 * 3072 * 6144
    assert told.numbers["draft parameters"] == layer + 3 * 3072**2 + 32000 * 3072
    assert told.numbers["bytes per token"] == 4 * 3072 * 2
    assert told.numbers["all of them"] == pytest.approx(told.numbers["document tokens"] * 24576)
    assert told.numbers["target weights"] == pytest.approx(230e9, rel=0.02)  # fp8
    assert told.numbers["target weights"] / 8 < told.numbers["target"] < told.numbers["target weights"] / 4
    text = page(told)
    assert "sets the pace" in text
    assert "minutes on an H100 and an H200 are all that stands behind these hours" in text


def test_a_small_draft_on_a_gpu_waits_for_the_host():
    """Against the steps of an H100, which were timed beside other jobs: between the fastest and the usual one."""
    timed = json.loads((ROOT / "benchmarks" / "results" / "h100.json").read_text())["small_draft"]
    recipe = load_recipe(RECIPES / "smollm2-135m-gpu.yaml")
    run = Run(recipe, Path("nowhere"), [])
    told = plan_of(run, roofline(run, preset("h100-1")))
    assert 0.9 * timed["fastest_step_s"] < told.numbers["train"] / recipe.train.max_steps < timed["step_s"]
    assert "launching kernels sets the pace" in page(told)
    assert "the trainer sets the pace" in page(planned("qwen3-8b-eagle3", "h100-1"))


def test_what_does_not_fit_is_said_with_what_would():
    text = page(planned(machine="h100-1"))
    assert "DOES NOT FIT: 8 such would hold it" in text


def test_memory_of_a_target_in_this_process_is_what_it_allocates():
    """Every row of the cache as long as the longest text; eager steps; one copy of the target at a time."""
    told = planned("qwen3-8b-eagle3", "h100-1")
    row = 36 * 2 * 8 * 128 * 2
    assert told.numbers["target"] == pytest.approx(2 * 8.19e9 + 96 * (2048 + 1024) * row, rel=0.01)
    assert 4 * 8.19e9 < told.numbers["losslessness"] < 40e9
    text = page(told)
    assert "fits with 20.1 GB to spare, counted, not measured on a GPU" in text
    assert "in this process; 13" in text  # minutes by vLLM
    by_vllm = load_recipe(RECIPES / "qwen3-8b-eagle3.yaml").regenerate.model_copy(update={"engine": "vllm"})
    quick = planned("qwen3-8b-eagle3", "h100-1", regenerate=by_vllm)
    assert quick.numbers["regenerate"] < told.numbers["regenerate"] / 3
    longer = by_vllm.model_copy(
        update={"engine": "auto", "batch_size": 256, "max_prompt_tokens": 4096, "max_new_tokens": 4096}
    )
    text = page(planned("qwen3-8b-eagle3", "h100-1", regenerate=longer))
    assert (
        "cache of 256 sequences at most 309 GB; DOES NOT FIT: a smaller regenerate.batch_size, or target.engine" in text
    )


def test_more_trainers_and_a_slow_network():
    few, many = planned(trainer_gpus=1), planned(trainer_gpus=8)
    assert few.numbers["train"] > many.numbers["train"]
    assert "the trainer sets the pace" in page(few)
    assert "the network sets the pace" in page(many)


def test_a_limit_of_tokens_is_planned_within_a_batch():
    few = load_recipe(RECIPES / "smollm2-135m-quick.yaml").regenerate.model_copy(
        update={"max_tokens": 20000, "shard_prompts": 4096, "batch_size": 8, "max_new_tokens": 512}
    )
    told = planned("qwen3-8b-eagle3", "h100-1", regenerate=few)
    assert 20000 < told.numbers["completion tokens"] < 20000 + 8 * 512


def test_sets_that_are_not_counted_are_told():
    recipe = load_recipe(RECIPES / "qwen3-8b-eagle3.yaml", {"evaluate": {"sets": ["gsm8k", "mt-bench"]}})
    told = planned("qwen3-8b-eagle3", "h100-1", evaluate=recipe.evaluate)
    assert "evaluate.sets (gsm8k, mt-bench) are not counted in the evaluation" in told.assumptions
    assert not any("evaluate.sets" in line for line in planned().assumptions)


def test_known_lengths_replace_the_assumed_ones():
    assumed, told = planned(), planned(completion_tokens=600)
    assert assumed.numbers["completion tokens"] > told.numbers["completion tokens"]
    assert told.numbers["completion tokens"] == pytest.approx(600 * told.numbers["completions"])
    assert "a completion has 600 tokens; a prompt" in page(told)


def test_the_recorded_cpu_run_is_met_within_a_quarter():
    """Counts and bytes of that run (benchmarks/results/gemma3-270m-cpu.json); its prompts were more, of equal kinds."""
    told = planned("gemma3-270m-cpu", "h100-1")
    recorded = {
        "draft parameters": 13_029_760,
        "draft file": 26_388_912,
        "completions": 3_059,
        "completion tokens": 291_375,
        "training steps": 3_400,
        "tokens trained on": 3_120_564,
        "all of them": 2_428_927_912,
        "checkpoint": 125_234_116,
        "completions on disk": 3_046_974,
    }
    ratios = {what: told.numbers[what] / real for what, real in recorded.items()}
    assert all(0.75 < ratio < 1.25 for ratio in ratios.values()), ratios


def test_a_finished_run_is_set_beside_its_plan(tmp_path):
    told = planned()
    finished = RunFiles(tmp_path)
    TrainingSummary(
        steps=17_000,
        parameters=252_444_672,
        completions=1,
        held_out_completions=1,
        completions_left_out=0,
        completions_cut=0,
        tokens=500_000_000,
        quarantined=[],
        status="preview",
        tau_held_out=None,
        best=None,
        checkpoint="checkpoint-017000",
    ).save(finished.train / SUMMARY)
    CompletionsSummary(
        completion_tokens=12_000,
        completions=90,
        finish_reasons={},
        empty=0,
        prompts_too_long=0,
        prompts_refused=0,
        tokens_by_category={},
    ).save(finished.completions / SUMMARY)
    last_sitting = Timing(completion_tokens=3_000, seconds=60.0, tokens_per_s=50.0)
    last_sitting.save(finished.completions / TIMING)
    rows = against(told, finished)
    named = {what: real for what, _, real in rows}
    assert list(named) == ["draft parameters", "completion tokens", "training steps", "tokens trained on", "regenerate"]
    assert named["regenerate"] == 240.0, "of all tokens, not of those that the last sitting wrote"
    assert "1.00" in page_against(rows).splitlines()[1]
    assert against(told, RunFiles(tmp_path / "nothing")) == []


def test_the_preset_of_this_machine_is_near_its_probe():
    recorded = dict(Probe.load(RECIPES.parent / "benchmarks" / "results" / "probe-epyc-2.json").times.forward)
    target = TargetSize.of(GEMMA)
    draft = Eagle3Config(
        hidden_size=640,
        intermediate_size=2048,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
        draft_vocab_size=8192,
        taps=(2, 9, 15),
        rope_theta=1e6,
        max_position_embeddings=32768,
    )
    costs = RooflineCosts(preset("cpu-epyc-2"), target, draft)
    assert costs.forward_s(1, 1, 128) == pytest.approx(recorded[1], rel=0.15)
    assert costs.forward_s(4, 1, 128) == pytest.approx(recorded[4], rel=0.15)


def test_an_unknown_machine_is_refused():
    with pytest.raises(DraftsmithError, match="--hardware: 'h300' given; one of here, h100-nvlink-8"):
        preset("h300")


def test_a_target_of_experts_alone_is_planned_for(tmp_path, capsys):
    """Its config has no intermediate_size at all."""
    AutoConfig.for_model("qwen3_5_moe").save_pretrained(tmp_path)
    values = {"name": "x", "target": {"engine": "vllm", "model": str(tmp_path)}, "server": {"urls": ["http://h:1"]}}
    run = Run(parse_recipe(values, "test"), tmp_path / "run", ["test"])
    told = plan_of(run, roofline(run, preset("h100-1")))
    assert told.numbers["target weights"] == pytest.approx(2 * 34.7e9, rel=0.01)
    assert "intermediate_size 6144 of a dense draft" in capsys.readouterr().err


def test_what_could_not_be_counted_is_said(monkeypatch):
    monkeypatch.setattr(sizes, "_build", lambda config: None)
    monkeypatch.setattr(sizes, "_KNOWN", {})
    assert "transformers cannot build minimax_m2 here" in page(planned())


def test_capturing_layers_of_an_unknown_target_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "of_tomorrow"}')
    recipe = parse_recipe({"name": "x", "target": {"model": str(tmp_path)}}, "test")
    with pytest.raises(DraftsmithError, match="is of type of_tomorrow"):
        _ = Run(recipe, tmp_path / "run", ["test"]).captured_layers
    reference = Run(load_recipe(RECIPES / "minimax-m2.7-eagle3.yaml"), tmp_path / "run", ["test"])
    assert reference.captured_layers == (2, 31, 59, 62)


def test_a_loss_on_prompts_costs_the_trainer_more_and_the_target_nothing():
    train = load_recipe(RECIPES / "gemma3-270m-cpu.yaml").train
    usual, more = (
        planned("gemma3-270m-cpu", "cpu-epyc-2", train=train.model_copy(update={"on_prompts": on})).numbers
        for on in (False, True)
    )
    assert more["train"] > 1.1 * usual["train"]
    assert {key for key in usual if usual[key] != more[key]} == {"train", "all"}
