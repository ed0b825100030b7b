"""What a run directory holds is checked, not trusted; what was done is what is told."""

import contextlib
import re
import shutil

import pytest
import torch
from models import save_tiny_target, tiny_lm, tiny_recipe, write_prompts
from safetensors.torch import load_file, save_file

from draftsmith.commands import GROUPS
from draftsmith.core.errors import DataError, DraftsmithError, RecipeError, TargetError
from draftsmith.core.history import results_of
from draftsmith.core.recipe import Recipe
from draftsmith.core.records.evaluation import Results
from draftsmith.core.records.training import MetricsRow
from draftsmith.core.run_files import RunFiles
from draftsmith.data.regenerate import read_completions
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.drafts.directories import load_draft
from draftsmith.publishing.card import make_card
from draftsmith.runs.estimates import card_prediction
from draftsmith.runs.pipeline import explain, reason_to_run, run_pipeline, stage_key
from draftsmith.runs.run import Run
from draftsmith.runs.stages import STAGES


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(recipe, directory) of a whole run."""
    out = tmp_path_factory.mktemp("finished")
    model = save_tiny_target(out / "model")
    changes = {"card": {"base_model": "a/b", "licence": "mit"}, "train.checkpoint_every": 2}
    recipe = tiny_recipe(model, write_prompts(out / "p.jsonl"), **changes)
    with contextlib.closing(Run(recipe, out / "run", ["test"])) as run:
        run_pipeline(run)
    return recipe, out / "run"


@pytest.fixture
def copied(finished, tmp_path):
    recipe, directory = finished
    shutil.copytree(directory, tmp_path / "run")
    return recipe, tmp_path / "run"


def why(run, name):
    stage = next(stage for stage in STAGES if stage.name == name)
    return reason_to_run(run, stage, stage_key(run, stage))


def again(recipe, directory, only=None, redo=None):
    with contextlib.closing(Run(recipe, directory, ["test"])) as run:
        run_pipeline(run, only, redo)


def weights(directory):
    return (directory / "export" / "draft" / "model.safetensors").read_bytes()


DAMAGES = {
    "completions/00001.jsonl": lambda path: path.write_bytes(path.read_bytes().split(b"\n", 1)[1]),  # a row is gone
    "train/checkpoint-000006/draft.safetensors": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "train/checkpoint-000006/state.json": lambda path: path.unlink(),
    "train/metrics.jsonl": lambda path: path.unlink(),
    "export/draft/model.safetensors": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "export/draft/config.json": lambda path: path.unlink(),
    "prompts/evaluation.jsonl": lambda path: path.write_bytes(b""),
    "vocab/coverage.json": lambda path: path.unlink(),
}
STAGE = {"completions": "regenerate"}


def flipped(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_output_is_named_and_made_again(copied, name):
    recipe, directory = copied
    wanted = {path: (directory / path).read_bytes() for path in (name, "export/draft/model.safetensors")}
    folder, _, rest = name.partition("/")
    stage = STAGE.get(folder, folder)
    run = Run(recipe, directory, ["test"])
    assert why(run, stage) is None
    DAMAGES[name](directory / name)
    assert why(run, stage) == f"{rest} changed since `{stage}` wrote it"
    assert f"{stage:<11} run " in explain(run, GROUPS["its stages"]), "a dry run says what the stage would do"
    again(recipe, directory)
    assert why(Run(recipe, directory, ["test"]), stage) is None
    for path, content in wanted.items():
        assert (directory / path).read_bytes() == content, path
    assert weights(directory) == wanted["export/draft/model.safetensors"]


LATE = {
    "draft.taps": ([99], "train", "draft.taps: 99 given; the target has layers 0..5"),
    "draft.num_attention_heads": (3, "train", "draft.num_attention_heads: 3 is no multiple of num_key_value_heads 2"),
    "vocab.size": (10**6, "vocab", "vocab.size: 1000000 is larger than the target's vocabulary of"),
    "train.accumulate": (3, "train", "train.accumulate: 3 packs a step cannot be dealt out to 2 processes"),
    "train.shard": (True, "train", "train.shard: not with Muon"),
    "train.from_draft": ("/nowhere", "train", "/nowhere: no config.json"),
    "evaluate.url": ("http://127.0.0.1:9", "evaluate", "evaluate.url: given, but the embedded engine decodes"),
    "evaluate.sets": ([{"name": "own", "path": "/nowhere"}], "evaluate", "evaluate.sets: own: /nowhere is no file"),
}


@pytest.mark.parametrize("key", LATE)
def test_what_a_late_stage_cannot_do_is_told_before_the_first(finished, tmp_path, monkeypatch, key):
    (value, stage, words), (recipe, _) = LATE[key], finished
    monkeypatch.setenv("WORLD_SIZE", "2")
    changes = {"train.optimizer": "muon", "train.accumulate": 2, key: value}
    given = recipe.model_dump(exclude_unset=True)
    for name, changed in changes.items():
        part, _, rest = name.partition(".")
        given.setdefault(part, {})[rest] = changed
    run = Run(Recipe.model_validate(given), tmp_path / "run", ["test"])
    [line] = [line for line in explain(run, GROUPS["its stages"]).splitlines() if line.startswith(f"{stage:<11} stop")]
    assert words in line
    with pytest.raises(DraftsmithError, match=re.escape(words)):
        run_pipeline(run)
    assert not list(tmp_path.iterdir()), "nothing ran"


def test_files_that_were_only_copied_stand(copied):
    recipe, directory = copied
    for path in directory.rglob("*"):
        if path.is_file():
            path.touch()
    assert all(why(Run(recipe, directory, ["test"]), stage.name) is None for stage in STAGES if stage.name != "report")


def test_torn_records_count_as_no_output(copied, capsys):
    recipe, directory = copied
    (directory / "vocab" / "stage.json").write_bytes(b"")
    (directory / "manifest.json").write_bytes(b'{"created')
    (directory / "tune-embedded.json").write_bytes(b"")
    run = Run(recipe, directory, ["test"])
    assert why(run, "vocab") == "no output yet"
    again(recipe, directory)
    assert (directory / "vocab.unknown").is_dir(), "nobody knows what made it"
    assert run.serving_shape("vllm") == (recipe.serve.shape, None)
    said = capsys.readouterr().err
    assert "manifest.json: is no Manifest" in said
    assert "tune-embedded.json: is no Tuned" in said
    assert "Traceback" not in said


def test_the_card_tells_of_what_ran_not_of_what_was_typed_last(copied):
    recipe, directory = copied
    values = recipe.model_dump(mode="json")
    values["train"] |= {"ttt_steps": 7, "optimizer": "muon", "learning_rate": 0.5}
    run = Run(Recipe.model_validate(values), directory, ["test"])
    card = make_card(run, card_prediction(run))
    assert "Training-time test of 3 steps, objective soft_ce, adamw, learning rate 0.003" in card
    assert "muon" not in card


def test_a_refused_command_writes_nothing(copied):
    recipe, directory = copied
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}
    shutil.rmtree(directory / "vocab")
    before = {path: content for path, content in before.items() if path.exists()}
    changed = recipe.model_copy(update={"seed": 5})
    with pytest.raises(ValueError, match="`prompts` has to run before it"):
        again(changed, directory, "train")
    after = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def answered(directory):
    return [row.id for row in read_completions(directory / "completions")]


def test_a_stage_is_made_anew_on_request(copied):
    recipe, directory = copied
    rows = answered(directory)
    again(recipe, directory, redo="regenerate")
    assert (directory / "completions.redo").is_dir()
    assert answered(directory) == rows


def test_a_stage_that_does_not_run_is_not_made_anew(copied):
    recipe, directory = copied
    with pytest.raises(RecipeError, match="--redo: train given, but only vocab runs here"):
        again(recipe, directory, "vocab", redo="train")
    assert not (directory / "train.redo").exists()


def test_a_file_that_is_damaged_twice_is_kept_twice(copied):
    recipe, directory = copied
    path = directory / "completions" / "00001.jsonl"
    content = path.read_bytes()
    for wrong in (b"first", b"second"):
        path.write_bytes(wrong)
        again(recipe, directory)
        assert path.read_bytes() == content
    kept = sorted(path.parent.glob(".damaged-*"))
    assert [path.read_bytes() for path in kept] == [b"first", b"second"]


def test_another_model_under_the_same_name_stops_the_run(copied, tmp_path):
    recipe, directory = copied
    model = tmp_path / "model"
    shutil.copytree(recipe.target.model, model)
    there = recipe.model_copy(update={"target": recipe.target.model_copy(update={"model": str(model)})})
    again(there, directory)
    tiny_lm(seed=1).save_pretrained(model)
    with pytest.raises(TargetError, match=r"has other weights than the target that wrote .*--redo regenerate"):
        again(there, directory)


def test_results_of_another_draft_are_left_out(copied, capsys):
    _, directory = copied
    files = RunFiles(directory)
    path = files.results["embedded"]
    old = Results.load(path)
    shutil.copytree(path.parent, directory / "evaluate-vllm")
    other = old.settings.model_copy(update={"draft": "0" * 16})
    old.model_copy(update={"settings": other}).save(files.results["vllm"])
    assert list(results_of(files)) == ["embedded"]
    assert "evaluate-vllm/results.json is of another draft and left out" in capsys.readouterr().err


def test_a_training_goes_on_from_an_earlier_draft(copied, tmp_path):
    """With its vocabulary, shape and weights; what is in it decides whether anything is made anew, not where it is."""
    recipe, directory = copied
    earlier = shutil.copytree(directory / "export" / "draft", tmp_path / "earlier")

    def going_on(start, **changes):
        train = recipe.train.model_copy(update={"from_draft": start, **changes})
        return recipe.model_copy(update={"train": train, "vocab": recipe.vocab.model_copy(update={"size": 30})})

    def trained(start):
        again(going_on(start), directory, "vocab")
        again(going_on(start), directory, "train")
        return next(MetricsRow.read_rows(directory / "train" / "metrics.jsonl")).loss

    before = next(MetricsRow.read_rows(directory / "train" / "metrics.jsonl")).loss
    with pytest.raises(DataError, match=f"`vocab` has to run .* draftsmith vocab RECIPE --from {earlier}"):
        again(going_on(earlier), directory, "train")
    assert trained(earlier) < before
    assert torch.equal(DraftVocabulary.load(RunFiles(directory).vocabulary).ids_D, load_draft(earlier)[1])
    moved = shutil.move(earlier, tmp_path / "moved")
    with contextlib.closing(Run(going_on(moved), directory, ["test"])) as run:
        assert (why(run, "vocab"), why(run, "train")) == (None, None)
        path = moved / "model.safetensors"
        save_file(load_file(path) | {"norm.weight": torch.ones(32, dtype=torch.bfloat16)}, path)
        assert why(run, "train") == "its inputs or its part of the recipe changed"
    own = directory / "export" / "draft"
    with pytest.raises(RecipeError, match="is this run's own draft"):
        again(going_on(own), directory, "train")
