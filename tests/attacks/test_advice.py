"""What an error says to do is done, as it is written there, and then the command that failed works."""

import re
import shlex
import shutil
import sys

import pytest
from models import save_tiny_target, tiny_recipe, write_prompts

from draftsmith import cli
from draftsmith.core.files import read_json, write_json
from draftsmith.core.recipe_file import dump_recipe
from draftsmith.publishing.card import write_card
from draftsmith.runs.estimates import card_prediction
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run

ADVISED = re.compile(r"(?:run|anew|with|or): draftsmith (\w+) (RECIPE|\S+)((?: --[\w-]+(?: \w+)?)*)")
NAMED = {"card.base_model": "owner/tiny", "card.licence": "mit", "card.repo": "owner/draft"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with a recipe, its target and its whole run with a card."""
    out = tmp_path_factory.mktemp("finished")
    recipe = tiny_recipe(save_tiny_target(out / "model"), write_prompts(out / "prompts.jsonl"), **NAMED)
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    run = Run(recipe, out / "run", ["test"])
    run_pipeline(run)
    write_card(run, card_prediction(run))
    return out


@pytest.fixture
def world(finished, tmp_path, monkeypatch):
    """`call(*words)` is (exit code, last line of stderr) of a command on a copy of the run."""
    shutil.copytree(finished, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "world"


@pytest.fixture
def call(world, monkeypatch, capsys):
    def called(command, *words):
        where = [] if "recipe.yaml" not in words or "--out" in words else ["--out", "run"]
        monkeypatch.setattr(sys, "argv", ["draftsmith", command, *map(str, words), *where])
        code = cli.main()
        captured = capsys.readouterr()
        return code, (captured.err.splitlines() or [""])[-1]

    return called


def without(*parts):
    """A run that has not got that far, or lost it."""

    def prepare(world):
        for part in parts:
            path = world / "run" / part
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def flipped(name):
    def prepare(world):
        path = world / "run" / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return prepare


def unnamed_taps(world):
    config = world / "run" / "export" / "draft" / "config.json"
    write_json(config, {k: v for k, v in read_json(config).items() if k != "draftsmith"})


STAGES = ["prompts", "completions", "vocab", "train", "export", "evaluate"]
WEIGHTS = "export/draft/model.safetensors"
COMMANDS = {
    "no results": (without("evaluate"), ["card", "recipe.yaml"], "no results"),
    "no accept length": (without("evaluate"), ["predict", "recipe.yaml", "--hardware", "h100-1"], "no accept length"),
    "no draft to serve": (without("export"), ["serve", "recipe.yaml", "--print"], "no draft"),
    "no draft to publish": (without("export"), ["publish", "recipe.yaml"], ""),
    "no card": (without("export/draft/README.md"), ["publish", "recipe.yaml"], "README.md is missing"),
    "a damaged draft": (
        flipped("export/draft/model.safetensors"),
        ["serve", "recipe.yaml", "--print"],
        "changed since",
    ),
    "a damaged draft to publish": (flipped(WEIGHTS), ["publish", "recipe.yaml"], ""),
    "no taps": (unnamed_taps, ["serve", "recipe.yaml", "--print"], ""),
    "no probe": (without(), ["predict", "recipe.yaml"], "no probe"),
    "no checkpoints": (without("train"), ["export", "recipe.yaml"], ""),
    "nothing before it": (without(*STAGES[:4]), ["train", "recipe.yaml"], ""),
    "other prompts": (without(), ["train", "recipe.yaml", "--prompts.held-out", "3"], "`prompts` has to run before it"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_that_is_advised_mends_it(world, call, case):
    prepare, words, message = COMMANDS[case]
    prepare(world)
    flags = words[2:] if "--prompts.held-out" in words else []
    code, told = call(*words)
    assert code == 2
    assert message in told
    for _ in range(4):
        advised = ADVISED.search(told)
        assert advised, told
        command, _, more = advised.groups()
        code, told = call(command, "recipe.yaml", *shlex.split(more), *flags)
        assert code == 0, told
        code, told = call(*words)
        if code == 0:
            break
    assert code == 0, told


KEYS = {
    "a row that cannot be read": (["run", "recipe.yaml", "--prompts.sources", "bad.jsonl"], ["--prompts.skip-bad"]),
    "no repository": (["publish", "recipe.yaml", "--card.repo", ""], ["--repo", "owner/name"]),
    "no such repository": (["publish", "recipe.yaml", "--repo", "name"], ["--repo", "owner/name"]),
    "a tau beyond its shape": (
        ["predict", "recipe.yaml", "--hardware", "h100-1", "--tau", "5", "--shape", "3/4/8"],
        ["--tau", "2.6", "--shape", "3/4/8"],
    ),
    "no accept length": (
        ["predict", "recipe.yaml", "--hardware", "h100-1", "--out", "new"],
        ["--tau", "2.6", "--shape", "3/4/8"],
    ),
    "an unknown machine": (["predict", "recipe.yaml", "--hardware", "h1000"], ["--hardware", "h100-1"]),
    "trees on vLLM": (
        ["serve", "recipe.yaml", "--print", "--serve.engine", "vllm", "--serve.shape", "3/4/8"],
        ["--serve.shape", "3/1/4"],
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_the_key_that_is_named_mends_it(world, call, case):
    words, mended = KEYS[case]
    (world / "bad.jsonl").write_text((world / "prompts.jsonl").read_text() + "{}\n")
    code, told = call(*words)
    assert code == 2
    named = mended[0].removeprefix("--").replace("-", "_")
    assert mended[0] in told or named in told.replace("-", "_"), told
    for flag in mended[::2]:
        if flag in words:
            at = words.index(flag)
            words = words[:at] + words[at + 2 :]
    code, told = call(*words, *mended)
    assert code == 0, told


def test_of_two_taps_lists_in_one_draft_one_may_be_said_to_be_right(world, call):
    config = world / "run" / "export" / "draft" / "config.json"
    values = read_json(config)
    inputs = values["eagle_aux_hidden_state_layer_ids"] = [1, 3, 4]
    values["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [2, 3, 4]}
    values.pop("draftsmith")
    write_json(config, values)
    draft = world / "theirs"
    shutil.copytree(config.parent, draft)
    words = ["compare", "recipe.yaml", "--drafts", str(draft)]
    code, told = call(*words)
    assert (code, "--taps inputs" in told) == (2, True), (inputs, told)
    code, told = call(*words, "--taps", "inputs")
    assert code == 0, told
    words = ["run", "recipe.yaml", "--from", str(draft), "--out", "after"]
    code, told = call(*words)
    assert (code, "delete the wrong ones" in told) == (2, True), told
    values.pop("eagle_config")
    write_json(draft / "config.json", values)
    code, told = call(*words)
    assert code == 0, told


def test_an_existing_recipe_is_kept_and_another_place_is_taken(world, call):
    before = (world / "recipe.yaml").read_text()
    code, told = call("init", "model", "--out", "recipe.yaml")
    assert (code, "give another --out" in told) == (2, True), told
    assert call("init", "model", "--out", "other.yaml") == (0, call("init", "model", "--out", "third.yaml")[1])
    assert (world / "recipe.yaml").read_text() == before
