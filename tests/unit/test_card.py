"""The card says what the run's files say, in every state that a run directory can be in."""

import re

import pytest
import yaml
from models import tiny_draft, tiny_target

from draftsmith.drafts.checkpoint import write_draft
from draftsmith.errors import DataError
from draftsmith.files import read_json, write_json
from draftsmith.publishing.card import make_card, write_card
from draftsmith.recipe import parse_recipe
from draftsmith.run import Run

NOTHING = {"sentence": "", "rows": []}


def tau(value):
    low, high = (None, None) if value is None else (value - 0.137, value + 0.141)
    return {"tau": value, "low": low, "high": high, "prompts": 60, "steps": 2402}


def acceptance(shape, temperature, value):
    return {
        "shape": shape,
        "temperature": temperature,
        "all": tau(value),
        "by_category": {"chat": tau(value - 0.466), "code": tau(None)},
        "acceptance_by_depth": [0.5749, 0.6459, None],
        "looping_share": 0.2814,
        "tau_with_loops": value + 0.2011,
        "tokens": 7945,
        "prompts": [],
    }


def results(**changes):
    return {
        "schema": 1,
        "created_with": {"commit": "abc1234", "hardware": {"cpu": "Test CPU", "cores": 2, "gpus": []}},
        "settings": {"prompts": 180, "prompts_available": 180, "max_new_tokens": 128, "dtype": "bf16"},
        "acceptance": [acceptance("3/1/4", 0.0, 2.2015), acceptance("3/4/8", 1.0, 1.6641)],
        "lossless": {
            "dtype": "fp32",
            "prompts": 51,
            "tokens_per_prompt": 128,
            "tokens": 6480,
            "shapes": ["3/1/4", "3/4/8"],
            "differences": [],
            "identical": True,
        },
        "speed": [
            {
                "shape": "3/1/4",
                "prompts": 12,
                "tokens": 399,
                "plain_tokens_per_s": 16.1686,
                "drafted_tokens_per_s": 30.3628,
                "speedup": 1.7205,
                "tau": 2.4483,
                "dtype": "bf16",
                "differences": [],
            }
        ],
        "partial": False,
        **changes,
    }


@pytest.fixture
def make(tmp_path):
    """Makes a finished run of a target."""

    def made(target="Qwen/Qwen3-8B", **card):
        draft, ids = tiny_draft(tiny_target())
        provenance = {
            "version": "0.1.0",
            "commit": "abc1234",
            "target": {"model": target, "dtype": "bf16", "num_layers": 6},
            "status": "preview",
        }
        write_draft(tmp_path / "export" / "draft", draft, ids, [1, 3, 4], provenance)
        prompts = {"prompts": 18385, "by_source": {"gsm8k": 7473, "ours": 10912}}
        write_json(tmp_path / "prompts" / "summary.json", prompts)
        write_json(tmp_path / "completions" / "summary.json", {"completions": 3059, "completion_tokens": 291375})
        write_json(tmp_path / "vocab" / "coverage.json", {"sizes": [len(ids)], "coverage": {"all": [0.9966]}})
        trained = {"status": "preview", "steps": 3400, "tokens": 3120564, "completions": 3025}
        write_json(tmp_path / "train" / "summary.json", trained)
        write_json(tmp_path / "evaluate" / "results.json", results())
        recipe = {
            "name": "small",
            "target": {"model": target},
            "prompts": {"sources": [{"name": "gsm8k"}, {"name": "/data/ours.jsonl"}]},
            "card": {"repo": "me/small", **card},
        }
        return Run(parse_recipe(recipe, "test"), tmp_path, [])

    return made


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


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


def test_every_figure_is_the_rounding_of_one_in_the_results(make):
    run = make()
    engine = results(
        acceptance=[acceptance("3/1/4", 0.0, 2.2524)],
        settings={"prompts": 24, "prompts_available": 180, "max_new_tokens": 128, "dtype": "fp32"},
        partial=True,
    )
    write_json(run.path("evaluate-vllm", "results.json"), engine)
    told = re.findall(r"(?<![\w/.])\d+\.\d+", quality(make_card(run, NOTHING)))
    known = {f"{number:.{digits}f}" for number in numbers([results(), engine]) for digits in (1, 2)}
    assert len(told) > 20
    assert set(told) - known == set()


def test_each_setting_has_its_own_figures(make):
    card = make_card(make(), NOTHING)
    chain = "| draftsmith | bf16 | 3/1/4 | 0 | 2.20 | 2.06 to 2.34 | 1.74 | - | 0.57 / 0.65 / - |"
    assert row(card, "draftsmith", "bf16", "3/1/4", "0") == chain
    assert " 1.66 | 1.53 to 1.81 | 1.20 | - |" in row(card, "draftsmith", "bf16", "3/4/8", "1")
    speed = "| draftsmith | bf16 | 3/1/4 | 1 | 12 (399) | 16.2 | 30.4 | 1.72x | 2.45 |"
    assert row(card, "draftsmith", "bf16", "3/1/4", "1") == speed


def test_an_engines_partial_run_is_marked_on_its_row_alone(make):
    run = make()
    engine = results(settings={**results()["settings"], "prompts": 60}, partial=True)
    write_json(run.path("evaluate-sglang", "results.json"), engine)
    card = make_card(run, NOTHING)
    assert row(card, "SGLang (60 of 180 prompts)", "bf16", "3/1/4", "0")
    assert row(card, "draftsmith", "bf16", "3/1/4", "0")
    assert "A partial evaluation" not in card


def test_a_set_aside_evaluation_is_not_told(make):
    run = make()
    write_json(run.path("evaluate-vllm.a95163c3", "results.json"), results())
    assert "| vLLM" not in make_card(run, NOTHING)


def test_what_was_not_measured_is_said(make):
    run = make()
    write_json(run.path("evaluate", "results.json"), results(lossless=None, speed=[]))
    card = make_card(run, NOTHING)
    assert "Losslessness was not measured." in card
    assert "Lossless on" not in card
    assert "No speed was measured." in card
    assert "tokens/s" not in card
    assert "Nothing was predicted for other machines." in card


def test_a_difference_is_told_and_never_called_lossless(make):
    run = make()
    proof = {
        **results()["lossless"],
        "identical": False,
        "differences": [{"id": "a", "token": 1, "logit_gap": 0.7}] * 2,
    }
    write_json(run.path("evaluate", "results.json"), results(lossless=proof))
    card = make_card(run, NOTHING)
    assert "NOT lossless on draftsmith: 2 differences in greedy output on 51 prompts" in card
    assert "Lossless on" not in card


def test_predictions_are_rows_of_their_own_and_called_so(make):
    rows = [
        {"machine": "h100-1", "shape": "3/4/8", "batch": 1, "c": 1.504, "speedup": 0.987, "batches": "no batch gains"}
    ]
    card = make_card(make(), {"sentence": "", "rows": rows})
    assert row(card, "h100-1", "3/4/8") == "| h100-1 | 3/4/8 | 1.50 | 0.99x | no batch gains |"
    assert card.index("not measured:") < card.index("| h100-1")


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
    assert str(run.directory) not in card
    assert "site-packages" not in use


def test_a_draft_of_tap_0_is_for_vllm_alone(make):
    run = make()
    assert run.draft_engines == ("vllm", "sglang")
    config = read_json(run.draft_directory / "config.json")
    ids = {"eagle_aux_hidden_state_layer_ids": [0, 3, 4], "eagle_config": {"use_aux_hidden_state": True}}
    write_json(
        run.draft_directory / "config.json",
        {**config, **ids, "draftsmith": {**config["draftsmith"], "taps": [0, 3, 4]}},
    )
    use = make_card(run, NOTHING).split("## Use")[1].split("## How")[0]
    assert '"model": "me/small"' in use
    assert "SGLang" not in use
    assert set(run.serve_commands) == {"vllm"}
    with pytest.raises(DataError, match="SGLang cannot capture tap 0"):
        run.draft_for("sglang")
    assert write_card(run, NOTHING) == run.path("export", "draft", "README.md")


def test_an_unmeasured_draft_gets_no_card(make):
    run = make()
    run.path("evaluate", "results.json").unlink()
    with pytest.raises(DataError, match="run: draftsmith evaluate RECIPE"):
        make_card(run, NOTHING)
