"""The card says what the run's files say, in every state that a run directory can be in."""

import re

import pytest
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from models import tiny_draft, tiny_target

from draftsmith.core import run_files
from draftsmith.core.errors import CheckpointError, DataError
from draftsmith.core.files import read_json, write_json
from draftsmith.core.recipe_file import parse_recipe
from draftsmith.core.records.data import CompletionsSummary, Coverage, PromptsSummary
from draftsmith.core.records.evaluation import (
    Acceptance,
    Difference,
    EvaluationSettings,
    Lossless,
    Results,
    Speed,
    Tau,
)
from draftsmith.core.records.machine import Prediction, Predictions
from draftsmith.core.records.run import Hardware, Provenance
from draftsmith.core.records.training import Best, TrainingSummary
from draftsmith.drafts.directories import write_draft
from draftsmith.publishing.card import as_text, make_card, write_card
from draftsmith.runs.estimates import results_of
from draftsmith.runs.run import Run

NOTHING = Predictions(rows=[])
MADE_BY = Provenance(
    command="draftsmith run r.yaml",
    commit="abc1234",
    versions={},
    seed=1,
    hardware=Hardware(cpu="Test CPU", cores=2, gpus=(), system="Test"),
)
SETTINGS = EvaluationSettings(
    engine="embedded",
    prompts=180,
    prompts_available=180,
    max_new_tokens=128,
    top_p=1.0,
    top_k=0,
    target="tiny",
    dtype="bf16",
)


def tau(value):
    low, high = (None, None) if value is None else (value - 0.137, value + 0.141)
    return Tau(tau=value, low=low, high=high, prompts=60, steps=2402)


def acceptance(shape, temperature, value):
    return Acceptance(
        shape=shape,
        temperature=temperature,
        all=tau(value),
        by_category={"chat": tau(value - 0.466), "code": tau(None)},
        acceptance_by_depth=[0.5749, 0.6459, None],
        looping_share=0.2814,
        tau_with_loops=value + 0.2011,
        tokens=7945,
        prompts=[],
    )


def results(**changes):
    found = Results(
        created_with=MADE_BY,
        settings=SETTINGS,
        acceptance=[acceptance("3/1/4", 0.0, 2.2015), acceptance("3/4/8", 1.0, 1.6641)],
        lossless=Lossless(
            dtype="fp32",
            prompts=51,
            tokens_per_prompt=128,
            tokens=6480,
            shapes=("3/1/4", "3/4/8"),
            differences=[],
        ),
        speed=[
            Speed(
                shape="3/1/4",
                batch=1,
                prompts=12,
                tokens=399,
                plain_tokens_per_s=16.1686,
                drafted_tokens_per_s=30.3628,
                speedup=1.7205,
                tau=2.4483,
                dtype="bf16",
            )
        ],
    )
    return found.model_copy(update=changes)


def save(run, engine, found):
    """As `evaluate` does on that engine."""
    found.save(run.files.stage("evaluate", engine) / run_files.RESULTS)


def save_training(files, vocabulary):
    """What the stages before `export` tell of themselves."""
    PromptsSummary(
        prompts=18385,
        evaluation_prompts=180,
        duplicates_dropped=0,
        contaminated_dropped=0,
        bad_rows_skipped=0,
        rows_without_prompt=0,
        left_out={},
        by_category={},
        by_source={"gsm8k": 7473, "ours": 10912},
    ).save(files.stage("prompts") / run_files.SUMMARY)
    CompletionsSummary(
        completion_tokens=291375,
        completions=3059,
        finish_reasons={},
        empty=0,
        prompts_too_long=0,
        prompts_refused=0,
        tokens_by_category={},
        greedy_tokens=99068,
    ).save(files.completions / run_files.SUMMARY)
    Coverage(
        name="v",
        sizes=[vocabulary],
        coverage={"all": [0.9966]},
        distinct_tokens=60,
        loss_tokens=291375,
        chosen_size=vocabulary,
        chosen={"all": 0.9966},
    ).save(files.coverage)
    TrainingSummary(
        steps=3400,
        parameters=1,
        completions=3025,
        held_out_completions=32,
        completions_left_out=0,
        completions_cut=0,
        tokens=3120564,
        quarantined=[],
        status="preview",
        tau_held_out=2.3,
        best=None,
        checkpoint="checkpoint-003400",
    ).save(files.train / run_files.SUMMARY)


@pytest.fixture
def make(tmp_path):
    """Makes a finished run of a target."""

    def made(target="Qwen/Qwen3-8B", norms=(), **card):
        draft, ids = tiny_draft(tiny_target(), **dict.fromkeys(norms, True))
        provenance = {
            "version": "0.1.0",
            "commit": "abc1234",
            "target": {"model": target, "dtype": "bf16", "num_layers": 6},
            "status": "preview",
        }
        recipe = {
            "name": "small",
            "target": {"model": target},
            "prompts": {"sources": [{"name": "gsm8k"}, {"name": "/data/ours.jsonl"}]},
            "card": {"repo": "me/small", **card},
        }
        run = Run(parse_recipe(recipe, "test"), tmp_path, [])
        write_draft(run.files.draft, draft, ids, 6, provenance)
        save_training(run.files, len(ids))
        save(run, "embedded", results())
        return run

    return made


def front_matter(card):
    return yaml.safe_load(REGEX_YAML_BLOCK.search(card).group(2))  # as the hub tells it from the rest


def quality(card):
    return card[card.index("## Measured quality") : card.index("## Before you deploy")]


def row(card, *cells):
    """The one table row that begins with these cells."""
    (line,) = [line for line in card.splitlines() if line.startswith("| " + " | ".join(cells) + " |")]
    return line


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_speed_is_told_of_the_gpus_that_it_was_measured_on(make):
    run = make()
    gpus = Hardware(cpu="Test CPU", cores=2, gpus=("A100",) * 8, system="Test")
    for together, named in ((2, "A100, A100"), (None, ", ".join(gpus.gpus))):
        settings = SETTINGS.model_copy(update={"speed_gpus": together})
        found = results(settings=settings, created_with=MADE_BY.model_copy(update={"hardware": gpus}))
        save(run, "embedded", found)
        assert f"Measured on: {named}.\n" in make_card(run, NOTHING)


def test_every_figure_is_the_rounding_of_one_in_the_results(make):
    run = make()
    settings = SETTINGS.model_copy(update={"engine": "vllm", "prompts": 24, "dtype": "fp32"})
    engine = results(acceptance=[acceptance("3/1/4", 0.0, 2.2524)], settings=settings)
    save(run, "vllm", engine)
    told = re.findall(r"(?<![\w/.])\d+\.\d+", quality(make_card(run, NOTHING)))
    known = {
        f"{number:.{digits}f}"
        for number in numbers([found.model_dump(mode="json") for found in (results(), engine)])
        for digits in (1, 2)
    }
    assert len(told) > 20
    assert set(told) - known == set()


def test_each_setting_has_its_own_figures(make):
    run = make()
    sampled = acceptance("3/1/4", 1.0, 1.9174).model_copy(update={"drafts": "sampled"})
    save(run, "embedded", results(acceptance=[*results().acceptance, sampled]))
    card = make_card(run, NOTHING)
    chain = "| draftsmith | bf16 | 3/1/4 | 0 | greedy | 2.20 | 2.06 to 2.34 | 1.74 | - | - | 0.57 / 0.65 / - |"
    assert row(card, "draftsmith", "bf16", "3/1/4", "0") == chain
    assert " 1.66 | 1.53 to 1.81 | 1.20 | - |" in row(card, "draftsmith", "bf16", "3/4/8", "1", "greedy")
    assert " 1.92 | 1.78 to 2.06 | 1.45 | - |" in row(card, "draftsmith", "bf16", "3/1/4", "1", "sampled")
    speed = "| draftsmith | bf16 | 3/1/4 | 1 | 12 (399) | 16.2 | 30.4 | 1.72x | 2.45 |"
    assert row(card, "draftsmith", "bf16", "3/1/4", "1", "12 (399)") == speed


def test_an_engines_partial_run_is_marked_on_its_row_alone(make):
    run = make()
    save(run, "sglang", results(settings=SETTINGS.model_copy(update={"engine": "sglang", "prompts": 60})))
    card = make_card(run, NOTHING)
    assert row(card, "SGLang (60 of 180 prompts)", "bf16", "3/1/4", "0")
    assert row(card, "draftsmith", "bf16", "3/1/4", "0")
    assert "A partial evaluation" not in card


def test_temperatures_at_which_an_engine_does_not_draw_are_told(make):
    run = make()
    save(run, "sglang", results(settings=SETTINGS.model_copy(update={"engine": "sglang"}), left_out=[0.7, 1.0]))
    card = make_card(run, NOTHING)
    assert "\nSGLang: nothing at T=0.7, 1.0, as the server drafted greedily at any temperature.\n" in card
    assert "draftsmith: nothing at" not in card


def test_the_hub_is_told_what_was_measured(make):
    (model,) = front_matter(make_card(make(), NOTHING))["model-index"]
    told = {metric["name"]: metric["value"] for result in model["results"] for metric in result["metrics"]}
    assert told == pytest.approx(
        {"tau at 3/1/4, T=0, on draftsmith": 2.2015, "tau at 3/4/8, T=1, on draftsmith": 1.6641}, abs=6e-4
    )


def test_predictions_rest_on_an_engine_that_drafts_trees_before_one_that_does_not(make):
    run = make()
    for engine in ("vllm", "sglang"):
        save(run, engine, results(settings=SETTINGS.model_copy(update={"engine": engine})))
    assert results_of(run).settings.engine == "embedded"
    run.files.results["embedded"].unlink()
    assert results_of(run).settings.engine == "sglang"


def test_a_set_aside_evaluation_is_not_told(make):
    run = make()
    results().save(run.files.root / "evaluate-vllm.a95163c3" / run_files.RESULTS)
    assert "| vLLM" not in make_card(run, NOTHING)


def test_what_was_not_measured_is_said(make):
    run = make()
    save(run, "embedded", results(lossless=None, speed=[]))
    card = make_card(run, NOTHING)
    assert "Losslessness was not measured." in card
    assert "Lossless on" not in card
    assert "No speed was measured." in card
    assert "tokens/s" not in card
    assert "Nothing was predicted for other machines." in card


def test_a_difference_is_told_and_never_called_lossless(make):
    run = make()
    parted = Difference(id="a", shape="3/1/4", token=1, logit_gap=0.7)
    proof = results().lossless.model_copy(update={"differences": [parted] * 2})
    save(run, "embedded", results(lossless=proof))
    card = make_card(run, NOTHING)
    assert "NOT lossless on draftsmith: 2 differences in greedy output on 51 prompts" in card
    assert "Lossless on" not in card


def test_predictions_are_rows_of_their_own_and_called_so(make):
    told = Prediction(
        machine="h100-1",
        shape="3/4/8",
        batch=1,
        context=512,
        tau=1.4844,
        decode_s=1.0,
        verify_s=1.1,
        draft_s=0.4,
        overhead_s=0.004,
        c=1.504,
        speedup=0.987,
        batches="no batch gains",
    )
    card = make_card(make(), Predictions(rows=[told]))
    assert row(card, "h100-1", "3/4/8") == "| h100-1 | 3/4/8 | 1.50 | 0.99x | no batch gains |"
    assert card.index("not measured (`predict/card.json`):") < card.index("| h100-1")


@pytest.mark.parametrize(
    ("target", "base", "licence", "words"),
    [
        ("gemma3-270m", "google/gemma-3-270m", {"license": "gemma"}, "found at ai.google.dev/gemma/terms."),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", {"license": "apache-2.0"}, "Apache License 2.0"),
        (
            "MiniMaxAI/MiniMax-M2.7",
            "MiniMaxAI/MiniMax-M2.7",
            {
                "license": "other",
                "license_name": "minimax-m2.7-non-commercial",
                "license_link": "https://huggingface.co/MiniMaxAI/MiniMax-M2.7/blob/main/LICENSE",
            },
            "api@minimax.io",
        ),
    ],
)
def test_the_head_is_what_the_hub_reads(make, target, base, licence, words):
    card = make_card(make(target), NOTHING)
    head = front_matter(card)
    assert head["base_model"] == base
    assert {key: value for key, value in head.items() if key.startswith("license")} == licence
    assert head["datasets"] == ["openai/gsm8k"]
    assert {"eagle3", "speculative-decoding", "sglang", "vllm"} <= set(head["tags"])
    assert words in card[card.index("## Licence and attribution") :]


def test_a_non_commercial_licence_stands_at_the_top(make):
    card = make_card(make("MiniMaxAI/MiniMax-M2.7"), NOTHING)
    assert "**Built with MiniMax M2.7.** Non-commercial use only" in card[: card.index("## What it is")]


def test_the_commands_name_the_hub_and_no_path_of_this_machine(make):
    run = make("gemma3-270m")
    card = make_card(run, NOTHING)
    use = card[card.index("## Use") : card.index("## How it was trained")]
    assert "--speculative-draft-model-path me/small \\" in use
    assert '"model": "me/small", "num_speculative_tokens": 3}' in use
    assert "google/gemma-3-270m" in use
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE=draftsmith_sglang" in use
    assert str(run.files.root) not in card
    assert "site-packages" not in use


def test_a_draft_of_tap_0_is_for_vllm_alone(make):
    run = make()
    assert run.draft_engines == ("vllm", "sglang")
    place = run.files.draft / "config.json"
    config = read_json(place)
    ids = {"eagle_aux_hidden_state_layer_ids": [0, 3, 4], "eagle_config": {"use_aux_hidden_state": True}}
    write_json(place, {**config, **ids, "draftsmith": {**config["draftsmith"], "taps": [0, 3, 4]}})
    use = make_card(run, NOTHING).split("## Use")[1].split("## How")[0]
    assert '"model": "me/small"' in use
    assert "SGLang" not in use
    assert set(run.serve_commands) == {"vllm"}
    with pytest.raises(DataError, match="SGLang cannot capture all of them, so the draft serves on vLLM"):
        run.draft_for("sglang")
    assert write_card(run, NOTHING) == run.files.root / "export" / "draft" / "README.md"


HOSTILE = "a|b <script>x</script> {{ 7 }} `c` [l](u) # h\n---\nlicense: mit"


def test_what_others_wrote_stays_text(make):
    run = make(licence=HOSTILE, author=HOSTILE, data_licences={"ours": HOSTILE})
    found = results()
    entry = found.acceptance[0].model_copy(update={"by_category": {HOSTILE: tau(1.5)}})
    save(run, "embedded", found.model_copy(update={"acceptance": [entry]}))
    card = make_card(run, NOTHING)
    assert front_matter(card)["license"] == HOSTILE
    body = card[REGEX_YAML_BLOCK.search(card).end() :]
    assert "<script>" not in body
    assert body.count(as_text(HOSTILE)) == 5  # the table's head, the limitations, the licence, the author, the data
    assert as_text("a|b\n<i>") == r"a\|b &lt;i&gt;"
    assert row(card, "draftsmith", "bf16", "3/1/4", "0").count("|") == 11


def test_a_draft_that_says_nothing_of_its_making_gets_no_card(make):
    run = make()
    place = run.files.draft / "config.json"
    config = read_json(place)
    for made_by in (None, {}, {"taps": config["draftsmith"]["taps"]}, [1]):
        write_json(place, {**config, "draftsmith": made_by})
        if not isinstance(made_by, dict) or not made_by:
            with pytest.raises(CheckpointError, match=r"does not say draftsmith\.taps"):
                list(run.serve_commands)
        with pytest.raises(CheckpointError, match="draftsmith") as refused:
            make_card(run, NOTHING)
        assert "\n" not in str(refused.value)


def test_an_unmeasured_draft_gets_no_card(make):
    run = make()
    run.files.results["embedded"].unlink()
    with pytest.raises(DataError, match="run: draftsmith evaluate RECIPE"):
        make_card(run, NOTHING)


def test_the_greedy_share_that_was_written_is_told(make):
    assert "291,375 tokens, temperature 1, top-p 1, top-k off, 34% of them greedily (" in make_card(make(), NOTHING)


def test_a_loss_on_prompts_is_told(make):
    run = make()
    assert "on prompts, too" not in make_card(run, NOTHING)
    train = run.recipe.train.model_copy(update={"on_prompts": True})
    run.recipe = run.recipe.model_copy(update={"train": train})
    assert "documents of at most 2048 tokens, the loss on prompts, too" in make_card(run, NOTHING)


def test_the_step_that_the_weights_are_of_and_another_engines_length_are_told(make):
    run = make()
    assert "of which the weights" not in make_card(run, NOTHING)
    path = run.files.train / run_files.SUMMARY
    best = {"best": Best(step=1200, tau_held_out=2.4)}
    TrainingSummary.load(path).model_copy(update=best).save(path)
    longer = SETTINGS.model_copy(update={"engine": "vllm", "max_new_tokens": 512, "top_k": 20})
    save(run, "vllm", results(settings=longer))
    card = make_card(run, NOTHING)
    assert "3,120,564 tokens, of which the weights are those of step 1,200, with the highest accept length" in card
    assert "; at most 512 new tokens, top-k 20 here.\n" in card
    filtered = SETTINGS.model_copy(update={"top_p": 0.9})
    save(run, "embedded", results(settings=filtered))
    save(run, "vllm", results(settings=SETTINGS.model_copy(update={"engine": "vllm"})))
    assert "; at most 128 new tokens, neither top-p nor top-k here.\n" in make_card(run, NOTHING)


def test_servers_that_others_started_are_no_machine_of_ours(make):
    run = make()
    settings = SETTINGS.model_copy(update={"engine": "vllm", "speed_gpus": None})
    save(run, "vllm", results(settings=settings))
    assert "servers whose hardware is not recorded.\n" in make_card(run, NOTHING)


def test_an_earlier_draft_is_named_without_its_path(make):
    run = make()
    train = run.recipe.train.model_copy(update={"from_draft": "/home/alice/drafts/first"})
    run.recipe = run.recipe.model_copy(update={"train": train})
    card = make_card(run, NOTHING)
    assert "from_draft: first\n" in card
    assert "alice" not in card


@pytest.mark.parametrize("norm", [None, "fc_norm", "norm_before_fc"])
def test_norms_that_older_engines_pass_over_are_told(make, norm):
    limits = make_card(make(norms=[norm] if norm else []), NOTHING).split("## Limitations\n")[1]
    told = limits.startswith(f"- It needs an engine that reads {norm} (EAGLE-3.1)")
    assert told == bool(norm)
    assert limits.startswith("- Greedy accept length") != told


def test_every_number_names_the_record_that_it_was_read_from(make):
    run = make()
    save(run, "vllm", results(settings=SETTINGS.model_copy(update={"engine": "vllm"})))
    Predictions(rows=[]).save(run.files.prediction("card"))
    named = re.findall(r"`([\w/-]+/[\w.-]+\.json)`", make_card(run, NOTHING))
    assert named == [
        "vocab/coverage.json",
        "evaluate/results.json",
        "evaluate-vllm/results.json",
        "prompts/summary.json",
        "completions/summary.json",
        "train/summary.json",
    ]
    assert all((run.files.root / name).is_file() for name in named)
