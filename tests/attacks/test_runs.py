"""Attacks on run directories: another model under the same name, damaged files, two writers, torn records."""

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import save_tiny_target, tiny_lm, tiny_recipe, tiny_tokenizer, write_prompts

from draftsmith.commands import GROUPS
from draftsmith.core.errors import DataError, DraftsmithError, TargetError
from draftsmith.core.recipe import Recipe
from draftsmith.core.recipe_file import dump_recipe
from draftsmith.core.records.data import Completion
from draftsmith.core.records.run import StageState
from draftsmith.core.records.training import MetricsRow
from draftsmith.data.regenerate import read_completions
from draftsmith.runs.pipeline import explain, run_pipeline
from draftsmith.runs.run import Run
from draftsmith.runs.stages import STAGES

NAMES = [stage.name for stage in STAGES]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(recipe, directory) of a whole run."""
    out = tmp_path_factory.mktemp("finished")
    model = save_tiny_target(out / "model")
    recipe = tiny_recipe(model, write_prompts(out / "p.jsonl"), **{"train.checkpoint_every": 2})
    again(recipe, out / "run")
    return recipe, out / "run"


@pytest.fixture
def copied(finished, tmp_path):
    """The same with a model and prompts of its own, which may be changed."""
    recipe, directory = finished
    shutil.copytree(directory, tmp_path / "run")
    return recipe, tmp_path / "run"


@pytest.fixture
def model(finished):
    """The target's directory; put back afterwards."""
    directory = Path(finished[0].target.model)
    kept = directory.with_name("kept")
    shutil.copytree(directory, kept)
    yield directory
    shutil.rmtree(directory)
    kept.rename(directory)


def again(recipe, directory, only=None, redo=None):
    with contextlib.closing(Run(recipe, directory, ["test"])) as run:
        run_pipeline(run, only, redo)


def files_of(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


def weights(directory):
    return (directory / "export" / "draft" / "model.safetensors").read_bytes()


def unfinish(directory, name):
    """As if the run had been stopped inside this stage."""
    path = directory / {"regenerate": "completions"}.get(name, name) / "stage.json"
    StageState.load(path).model_copy(update={"finished": False}).save(path)


# --- another target ---------------------------------------------------------------------------------------------------


def other_weights(directory):
    tiny_lm(seed=1).save_pretrained(directory)


def one_other_layer(directory):
    model = tiny_lm()
    model.model.layers[3].mlp.up_proj.weight.data.mul_(1.01)
    model.save_pretrained(directory)


def other_template(directory):
    path = next(directory.glob("chat_template.jinja"), None)
    if path:
        path.write_text(path.read_text() + " ")
    else:
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config["chat_template"] += " "
        (directory / "tokenizer_config.json").write_text(json.dumps(config))


def other_tokenizer(directory):
    tiny_tokenizer().save_pretrained(directory)
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    (first, a), (second, b) = list(vocabulary.items())[-2:]
    vocabulary[first], vocabulary[second] = b, a
    path.write_text(json.dumps(values))


SWAPS = [other_weights, one_other_layer, other_template, other_tokenizer]
MOMENTS = ["finished", *NAMES[1:6]]


@pytest.mark.parametrize(("swap", "moment"), [*itertools.product(SWAPS, MOMENTS)])
def test_another_target_under_the_same_name_stops_the_run(copied, model, swap, moment):
    recipe, directory = copied
    if moment != "finished":
        unfinish(directory, moment)
    swap(model)
    before = files_of(directory)
    with pytest.raises(TargetError, match=r"than the target that wrote .*--redo regenerate"):
        again(recipe, directory)
    assert files_of(directory) == before


def test_the_new_target_answers_where_that_is_asked_for(copied, model):
    recipe, directory = copied
    other_weights(model)
    again(recipe, directory, redo="regenerate")
    assert (directory / "completions.redo").is_dir()
    old, new = (
        list(Completion.read_rows(directory / name / "00000.jsonl")) for name in ("completions.redo", "completions")
    )
    assert [row.ids for row in old] != [row.ids for row in new]
    again(recipe, directory)


def test_a_target_without_numbers_answers_nothing(finished, model, tmp_path):
    lm = tiny_lm()
    lm.model.norm.weight.data.fill_(float("nan"))
    lm.save_pretrained(model)
    with pytest.raises(DraftsmithError, match=r"no numbers|cannot be driven"):
        again(finished[0], tmp_path / "run")


# --- damage -----------------------------------------------------------------------------------------------------------


def emptied(path):
    path.write_bytes(b"")


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def deleted(path):
    path.unlink()


WAYS = [emptied, halved, flipped, deleted]


def test_whatever_file_is_damaged_the_run_ends_with_the_same_draft(finished, tmp_path, attacks):
    """Every file of a run, each in one of four ways in turn."""
    recipe, whole = finished
    names = sorted(
        str(path.relative_to(whole))
        for path in whole.rglob("*")
        if path.is_file()
        and path.name not in (".lock", "report.html", "recipe.yaml", "manifest.json", "timing.jsonl")
        and path.parent.name != "parts"  # what an evaluation goes on from; a finished one needs none
    )
    wanted = weights(whole)
    # How long it took is not known any more; of checkpoints the newest is what training goes on from.
    lost = ("completions/timing.json", *(f"train/{c.name}" for c in sorted(whole.glob("train/checkpoint-*"))[:-1]))
    attacks(len(names))
    for name, damage in zip(names, itertools.cycle(WAYS), strict=False):
        directory = tmp_path / "run"
        shutil.copytree(whole, directory)
        if (directory / name).stat().st_size == 0:
            continue
        damage(directory / name)
        again(recipe, directory)
        assert weights(directory) == wanted, f"{name} {damage.__name__}"
        assert (directory / name).exists() or name.startswith(lost), f"{name} {damage.__name__}"
        shutil.rmtree(directory)


@pytest.mark.parametrize("name", ["manifest.json", "recipe.yaml", "report.html"])
@pytest.mark.parametrize("damage", WAYS)
def test_what_only_tells_of_a_run_does_not_stop_it(copied, name, damage):
    recipe, directory = copied
    damage(directory / name)
    again(recipe, directory)
    assert (directory / "report.html").stat().st_size > 1000


# --- stages know their past -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[1:6])
def test_a_stage_alone_stops_where_one_before_it_would_run(copied, name):
    recipe, directory = copied
    values = recipe.model_dump(mode="json")
    values["prompts"]["held_out"] = 3
    changed = Recipe.model_validate(values)
    before = files_of(directory)
    with pytest.raises(DataError, match=f"{name}: `prompts` has to run before it"):
        again(changed, directory, name)
    assert files_of(directory) == before
    told = explain(Run(changed, directory, ["test"]), GROUPS["its stages"], name)
    assert f"{name:<11} stop " in told


CHANGES = {
    "regenerate.temperature": 0.5,
    "vocab.size": 39,
    "train.learning_rate": 1e-3,
    "evaluate.max_new_tokens": 11,
}


@pytest.mark.parametrize("name", NAMES[:6])
@pytest.mark.parametrize("key", CHANGES)
def test_a_dry_run_and_the_stage_agree(copied, name, key):
    recipe, directory = copied
    values = recipe.model_dump(mode="json")
    part, last = key.split(".")
    values[part][last] = CHANGES[key]
    changed = Recipe.model_validate(values)
    told = explain(Run(changed, directory, ["test"]), GROUPS["its stages"], name).splitlines()[-1].split()[1]
    before = files_of(directory)
    try:
        again(changed, directory, name)
    except DataError:
        assert told == "stop"
    else:
        outputs = {p: c for p, c in files_of(directory).items() if p.name not in ("manifest.json", "recipe.yaml")}
        assert told == ("run" if any(before.get(p) != c for p, c in outputs.items()) else "skip")


# --- advice -----------------------------------------------------------------------------------------------------------


def test_torn_completions_are_made_again_and_no_other(copied, capsys):
    recipe, directory = copied
    wanted = weights(directory)
    unfinish(directory, "regenerate")
    path = directory / "completions" / "00001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"id": \n', *lines[3:]]))
    again(recipe, directory)
    assert "00001.jsonl:3: is no Completion" in capsys.readouterr().err
    assert path.read_bytes() == b"".join(lines)
    assert weights(directory) == wanted


@pytest.mark.parametrize("name", ["state.json", "draft.safetensors", "optimizer.safetensors"])
def test_a_torn_checkpoint_may_be_deleted(copied, name):
    recipe, directory = copied
    wanted, metrics = weights(directory), (directory / "train" / "metrics.jsonl").read_bytes()
    unfinish(directory, "train")
    newest = sorted((directory / "train").glob("checkpoint-*"))[-1]
    halved(newest / name)
    told = rf"^(.*/checkpoint-\d+): cannot read {name}: .*delete the directory to use the one before$"
    with pytest.raises(DraftsmithError, match=told) as caught:
        again(recipe, directory)
    shutil.rmtree(re.match(told, str(caught.value))[1])
    assert not newest.exists()
    again(recipe, directory)
    assert weights(directory) == wanted
    assert (directory / "train" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("name", NAMES)
def test_redo_makes_the_same_again_and_keeps_the_old(copied, name):
    recipe, directory = copied
    wanted = weights(directory)
    folder = {"regenerate": "completions"}.get(name, name)
    before = files_of(directory / folder)
    again(recipe, directory, redo=name)
    assert weights(directory) == wanted
    kept = directory / f"{folder}.redo"
    assert {p.relative_to(kept): c for p, c in files_of(kept).items()} == {
        p.relative_to(directory / folder): c for p, c in before.items()
    }


def test_a_damaged_export_is_not_served(copied):
    recipe, directory = copied
    wanted = weights(directory)
    flipped(directory / "export" / "draft" / "model.safetensors")
    with pytest.raises(DataError, match=r"model.safetensors changed since .*draftsmith run RECIPE"):
        Run(recipe, directory, ["test"]).serving()
    again(recipe, directory)
    assert weights(directory) == wanted
    assert Run(recipe, directory, ["test"]).serving().command


# --- two writers ------------------------------------------------------------------------------------------------------


def start(recipe_file, out, name="run"):
    command = [sys.executable, "-m", "draftsmith", name, str(recipe_file), "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_of_two_commands_at_once_one_writes(finished, tmp_path, attacks):
    """Sixteen pairs, the second command later each time, so that it meets another stage."""
    recipe, whole = finished
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    rows = list(MetricsRow.read_rows(whole / "train" / "metrics.jsonl"))
    answered = [row.id for row in read_completions(whole / "completions")]
    attacks(16)
    refused = 0
    for trial in range(16):
        out = tmp_path / f"run{trial}"
        first = start(tmp_path / "recipe.yaml", out)
        time.sleep(trial * 0.5)
        second = start(tmp_path / "recipe.yaml", out)
        told = {process: process.communicate(timeout=300)[1] for process in (first, second)}
        codes = sorted((first.returncode, second.returncode))
        assert codes in ([0, 2], [0, 0]), told
        if codes == [0, 2]:
            refused += 1
            writer, other = sorted((first, second), key=lambda process: process.returncode)
            assert f"is being written by process {writer.pid};" in told[other]
        assert list(MetricsRow.read_rows(out / "train" / "metrics.jsonl")) == rows
        assert weights(out) == weights(whole)
        assert [row.id for row in read_completions(out / "completions")] == answered
    assert refused >= 8
