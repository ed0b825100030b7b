"""What a run directory holds is checked, not trusted; what was done is what is told."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from models import save_tiny_target, tiny_lm, tiny_recipe, write_prompts
from pydantic import ValidationError
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
from draftsmith.runs import api, probing
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


SERVED = {"target.engine": "vllm", "server.urls": ["http://127.0.0.1:9"]}
BY_VLLM = {"evaluate.engine": "vllm", "evaluate.shapes": ["3/1/4"]}
SGLANG = {"evaluate.engine": "sglang", "serve.engine": "sglang"}
AT_A_SERVER = BY_VLLM | {"evaluate.url": "http://127.0.0.1:9"}
LATE = [
    ("regenerate", {"target.engine": "vllm"}, "server.urls: none given; target.engine vllm needs"),
    ("regenerate", {"device": "cuda"}, "device: cuda asked for"),
    ("regenerate", SERVED | {"regenerate.engine": "embedded"}, "regenerate.engine: embedded needs the target in this"),
    ("vocab", {"vocab.size": 10**6}, "vocab.size: 1000000 is larger than the target's vocabulary of"),
    ("vocab", {"vocab.size": 1}, "vocab.size: 1 is too small for the target's"),
    ("train", {"draft.taps": [99]}, "draft.taps: 99 given; the target has layers 0..5"),
    ("train", {"draft.num_attention_heads": 3}, "draft.num_attention_heads: 3 is no multiple of num_key_value_heads 2"),
    ("train", {"train.accumulate": 3}, "train.accumulate: 3 packs a step cannot be dealt out to 2 processes"),
    ("train", {"train.shard": True, "train.optimizer": "muon"}, "train.shard: not with Muon"),
    ("train", {"train.from_draft": "/nowhere"}, "/nowhere: no config.json"),
    ("train", {"train.from_draft": "DRAFT", "draft.head_dim": 6}, "draft.head_dim: 6 given, but DRAFT has 8"),
    ("train", SERVED | {"target.engine": "sglang"}, "server.last_urls: none given, but SGLang returns the taps or"),
    (
        "train",
        SERVED | {"server.last_urls": ["http://127.0.0.1:8"]},
        "server.last_urls: given, but vLLM keeps",
    ),
    ("evaluate", {"evaluate.url": "http://127.0.0.1:9"}, "evaluate.url: given, but the embedded engine decodes"),
    ("evaluate", {"evaluate.plain_url": "http://127.0.0.1:9"}, "evaluate.plain_url: given, but the embedded engine"),
    ("evaluate", {"evaluate.sets": [{"name": "own", "path": "/nowhere"}]}, "evaluate.sets: own: /nowhere is no file"),
    ("evaluate", BY_VLLM | {"evaluate.shapes": ["3/4/8"]}, "evaluate.shapes: 3/4/8 given, none that vLLM can draft"),
    (
        "evaluate",
        BY_VLLM | {"serve.engine": "sglang", "serve.extra": "--x"},
        "serve.program and serve.extra: given",
    ),
    ("evaluate", BY_VLLM | {"serve.extra": "--api-key $NOPE"}, "serve.extra: $NOPE is not set in the environment"),
    ("evaluate", SGLANG | {"draft.taps": [0, 3, 4]}, "draft.taps: SGLang cannot capture all of them"),
    ("evaluate", AT_A_SERVER | {"evaluate.shapes": ["3/1/4", "2/1/3"]}, "evaluate.shapes: 3/1/4, 2/1/3 given, but"),
    (
        "evaluate",
        AT_A_SERVER,
        "serve.draft_sampling: auto given, but the server of evaluate.url takes drafts in",
    ),
]


def changed_recipe(recipe, changes):
    given = recipe.model_dump(exclude_unset=True)
    for name, value in changes.items():
        *parts, last = name.split(".")
        place = given
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    return Recipe.model_validate(given)


def test_completions_of_another_rule_for_greedy_ones_are_written_anew(tmp_path):
    (stage,) = [stage for stage in STAGES if stage.name == "regenerate"]

    def keys(**changes):
        run = Run(tiny_recipe("m", "p", **changes), tmp_path, [])
        return stage.key(run), stage.resume_key(run)

    for key in keys(**{"regenerate.greedy_share": 0.3}):
        assert key["greedy"] == "by name"
    served = {"target.engine": "vllm", "server.urls": ["http://a:1"]}
    for changes in ({}, {"regenerate.greedy_share": 0.3, **served}):  # servers have always done so
        assert not any("greedy" in key for key in keys(**changes))
    assert keys(**{"regenerate.max_tokens": 5})[1] == keys()[1] != keys()[0]


@pytest.mark.parametrize(("stage", "changes", "words"), LATE)
def test_what_a_late_stage_cannot_do_is_told_before_the_first(finished, tmp_path, monkeypatch, stage, changes, words):
    recipe, directory = finished
    draft = str(directory / "export" / "draft")
    monkeypatch.setenv("WORLD_SIZE", "2")
    changes = {"train.accumulate": 2} | {key: draft if value == "DRAFT" else value for key, value in changes.items()}
    run = Run(changed_recipe(recipe, changes), tmp_path / "run", ["test"])
    words = words.replace("DRAFT", draft)
    [line] = [line for line in explain(run, GROUPS["its stages"]).splitlines() if line.startswith(f"{stage:<11} stop")]
    assert words in line
    with pytest.raises(DraftsmithError, match=re.escape(words)):
        run_pipeline(run)
    with pytest.raises(DraftsmithError, match=re.escape(words)):
        api.run(run.recipe, tmp_path / "run")
    assert not list(tmp_path.glob("run/*/*")), "nothing ran"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("draft.head_dim", 7),
        ("draft.taps", []),
        ("draft.rope_theta", 0.0),
        ("train.betas", [0.9, 1.0]),
        ("evaluate.shapes", []),
        ("evaluate.temperatures", []),
        ("evaluate.batches", []),
        ("server.urls", ["http://127.0.0.1:9"]),
        ("server.last_urls", ["http://127.0.0.1:9"]),
    ],
)
def test_what_no_run_can_do_is_no_recipe(finished, key, value):
    with pytest.raises(ValidationError):
        changed_recipe(finished[0], {key: value})


def test_a_training_that_goes_on_reads_what_the_earlier_draft_reads(finished, tmp_path):
    """A capturing server is told the layers by the run, and left out taps are not the default ones then."""
    recipe, directory = finished
    (tmp_path / "model").mkdir()
    config = json.loads((Path(recipe.target.model) / "config.json").read_text()) | {"num_hidden_layers": 8}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    changes = {"target.model": str(tmp_path / "model"), "draft": {}}
    goes_on = changes | {"train.from_draft": str(directory / "export" / "draft")}
    own, later = (Run(changed_recipe(recipe, given), tmp_path / "run", ["test"]) for given in (changes, goes_on))
    assert own.captured_layers == (2, 4, 5, 8)
    assert later.captured_layers == (1, 3, 4, 8)
    assert later.draft_config.intermediate_size == 40


def test_a_probe_before_training_times_the_draft_that_training_goes_on_from(finished, tmp_path):
    recipe, directory = finished
    goes_on = {"vocab.size": 36, "train.from_draft": str(directory / "export" / "draft")}
    with contextlib.closing(Run(changed_recipe(recipe, goes_on), tmp_path / "run", ["test"])) as run:
        timed = probing._any_draft(run)
    assert len(timed.ids_D) == timed.draft.config.draft_vocab_size == 40


def test_another_engine_or_device_measures_anew(finished, tmp_path):
    recipe, directory = finished
    stage = next(stage for stage in STAGES if stage.name == "evaluate")
    served = {"server.urls": ["http://127.0.0.1:9"], "serve.draft_sampling": "greedy"}
    others = [{}, {"device": "cuda:0"}, served | {"target.engine": "vllm"}, served | {"target.engine": "sglang"}]
    others.append(others[2] | {"serve.peer_to_peer": False})
    runs = [Run(changed_recipe(recipe, changes), directory, ["test"]) for changes in others]
    assert len({stage_key(run, stage) for run in runs}) == len(runs)
    assert len({str(stage.resume_key(run)) for run in runs}) == len(runs)


def test_a_dry_run_knows_what_is_asked_for_anew(finished):
    recipe, directory = finished
    told = explain(Run(recipe, directory, ["test"]), GROUPS["its stages"], redo="train").splitlines()
    state = {line.split()[0]: line for line in told if line[:1].isalpha()}
    assert "skip" in state["vocab"]
    assert "train       run" in state["train"]
    assert "asked for anew" in state["train"]
    assert "unless `train` makes the same files again" in state["export"]


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


def test_a_training_goes_on_from_an_earlier_draft(copied, tmp_path, capsys):
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
    assert f"vocab: the 40 tokens of {earlier}; vocab.size 30 is for new drafts" in capsys.readouterr().err
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
