"""probe, predict, tune and compare on a tiny run, as a user types them."""

import json
import shutil
import sys

import pytest
from models import save_tiny_target, tiny_recipe, write_prompts

from draftsmith import cli
from draftsmith.files import read_json, write_json
from draftsmith.hardware import probe
from draftsmith.recipe import dump_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished tiny run, probed."""
    out = tmp_path_factory.mktemp("world")
    model = save_tiny_target(out / "model")
    recipe = tiny_recipe(model, write_prompts(out / "prompts.jsonl"))
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    patch = pytest.MonkeyPatch()
    patch.setattr(probe, "ROUNDS", 2)
    patch.setattr(probe, "WIDTHS", (1, 2, 3, 4, 8))
    patch.setattr(probe, "CONTEXT", 16)
    patch.setattr(probe, "LONG_CONTEXT", 48)
    patch.setattr(probe, "LOOP_TOKENS", 8)
    for command in ("run", "probe"):
        patch.setattr(sys, "argv", ["draftsmith", command, str(out / "recipe.yaml"), "--out", str(out / "run")])
        assert cli.main() == 0
    patch.undo()
    return out


def run(monkeypatch, capsys, world, command, *flags):
    arguments = [command, world / "recipe.yaml", "--out", world / "run", *flags]
    monkeypatch.setattr(sys, "argv", ["draftsmith", *map(str, arguments)])
    code = cli.main()
    return code, capsys.readouterr()


def test_predict_tells_of_the_probed_machine(monkeypatch, capsys, world):
    code, told = run(monkeypatch, capsys, world, "predict")
    assert code == 0, told.err
    result = read_json(world / "run" / "predict" / "probe.json")
    assert {row["batch"] for row in result["rows"]} == {1}
    assert result["sentence"] in told.out
    assert (world / "run" / "predict" / "probe.svg").read_text().lstrip().startswith("<?xml")


def test_predict_tells_of_a_named_machine_and_a_published_tau(monkeypatch, capsys, world):
    flags = ("--hardware", "h100-1", "--tau", "2.2", "--shape", "3/1/4", "--batches", "1", "64")
    code, told = run(monkeypatch, capsys, world, "predict", *flags)
    assert code == 0, told.err
    rows = read_json(world / "run" / "predict" / "h100-1.json")["rows"]
    assert [row["tau"] for row in rows if row["shape"] == "3/1/4"] == pytest.approx([2.2, 2.2], abs=1e-4)
    assert {row["batch"] for row in rows} == {1, 64}


def test_tune_measures_and_serve_takes_it(monkeypatch, capsys, world):
    code, told = run(monkeypatch, capsys, world, "tune", "--budget-s", "30")
    assert code == 0, told.err
    path = world / "run" / "tune-embedded.json"
    result = read_json(path)
    assert result["tried"]
    best = max(row["speedup"] for row in result["tried"])
    assert (result["shape"] is None) == (best < 1.02) or result["shape"] in {r["shape"] for r in result["tried"]}
    write_json(path, {**result, "shape": "5/4/16", "chain": "5/1/6"})
    _, served = run(monkeypatch, capsys, world, "serve", "--print")
    assert '"num_speculative_tokens": 5' in served.out
    _, served = run(monkeypatch, capsys, world, "serve", "--print", "--serve.engine", "sglang")
    assert "--speculative-num-draft-tokens 16" in served.out
    _, served = run(monkeypatch, capsys, world, "serve", "--print", "--serve.no-tuned")
    assert '"num_speculative_tokens": 3' in served.out
    asked = ("--serve.shape.steps", "2", "--serve.shape.draft-tokens", "3")
    _, served = run(monkeypatch, capsys, world, "serve", "--print", *asked)
    assert '"num_speculative_tokens": 2' in served.out
    write_json(path, {**result, "shape": None, "chain": None})
    _, served = run(monkeypatch, capsys, world, "serve", "--print")
    assert "nothing beat plain decoding" in served.err
    assert '"num_speculative_tokens": 3' in served.out


def test_compare_sets_drafts_side_by_side(monkeypatch, capsys, world):
    own = world / "run" / "export" / "draft"
    own = own if own.exists() else world / "run" / "export" / "sglang"
    shutil.copytree(own, world / "other", dirs_exist_ok=True)
    code, told = run(monkeypatch, capsys, world, "compare", "--drafts", world / "other")
    assert code == 0, told.err
    rows = read_json(world / "run" / "compare" / "compare.json")["drafts"]
    assert len(rows) == 2
    assert rows[0]["acceptance"][0]["all"] == rows[1]["acceptance"][0]["all"]  # the same draft twice
    assert 0 < rows[0]["coverage"] <= 1
    assert "M parameters" in told.out
    code, told = run(monkeypatch, capsys, world, "compare")
    assert code == 2
    assert "give others with --drafts" in told.err


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("predict", ("--hardware", "h200"), "--hardware: 'h200' given; a probe's JSON file or one of h100-nvlink-8"),
        ("predict", ("--tau", "9"), "--tau: 9 given; between 1 and"),
        ("predict", ("--tau", "2", "--shape", "3-1"), "--shape: '3-1' given; write steps/topk/draft_tokens"),
        ("predict", ("--batches", "0"), "--batches and --context: whole numbers of at least 1"),
        ("predict", ("--correlation", "2"), "--correlation: 2 given; between 0"),
        ("probe", ("--url", "http://127.0.0.1:9"), "--url: http://127.0.0.1:9 does not answer as vllm does"),
        ("publish", (), "publish: no repository given; set card.repo or give --repo owner/name"),
    ],
)
def test_wrong_input_is_one_line(monkeypatch, capsys, world, command, flags, message):
    code, told = run(monkeypatch, capsys, world, command, *flags)
    assert code == 2
    lines = [line for line in told.err.splitlines() if line.startswith("draftsmith: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_file_that_is_no_probe_is_refused(monkeypatch, capsys, world, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    code, told = run(monkeypatch, capsys, world, "predict", "--hardware", tmp_path / "x.json")
    assert code == 2
    assert "is not a probe" in told.err
