"""What an error of a stage or of a draft says to do is done, and then it works."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import tiny_draft, tiny_recipe, write_prompts
from outcomes import read, told
from safetensors.torch import load_file, save_file

from draftsmith import cli
from draftsmith.core.files import read_json, write_json
from draftsmith.core.shape import Shape
from draftsmith.core.sources import EvaluationSet
from draftsmith.data.prompts import gather
from draftsmith.data.regenerate import Regeneration, longest_prompt
from draftsmith.data.sets import PLACEHOLDER, read_set
from draftsmith.data.templates import ChatFormat
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.decoding.sampling import Sampling
from draftsmith.drafts.directories import inspect_draft, load_draft, require_fit, write_draft
from draftsmith.engines import ENGINES
from draftsmith.engines.base import Setup
from draftsmith.evaluation.evaluate import Evaluation
from draftsmith.hardware.accept_length import MeasuredProfile
from draftsmith.publishing.publish import publish
from draftsmith.runs.run import Run
from draftsmith.runs.stages import starting_draft
from draftsmith.training.processes import ProcessGroup
from draftsmith.training.start import first_draft
from draftsmith.training.trainer import Trainer

# --- stages, each as a function ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gathered(model, tmp_path_factory):
    """A directory with prompts and completions."""
    out = tmp_path_factory.mktemp("gathered")
    gather(tiny_recipe(model, write_prompts(out / "rows.jsonl")), out)
    return out


def test_a_source_that_cannot_be_read_is_another(model, tmp_path):
    (tmp_path / "torn.jsonl.gz").write_bytes(b"\x1f\x8b torn")
    line = told(gather, tiny_recipe(model, str(tmp_path / "torn.jsonl.gz")), tmp_path / "out")
    assert read(r"; give another (source)$", line)
    gather(tiny_recipe(model, write_prompts(tmp_path / "rows.jsonl")), tmp_path / "out")
    assert (tmp_path / "out" / "prompts.jsonl").stat().st_size


def regenerated(gathered, target, out, **changes):
    recipe = tiny_recipe(target.identity.model, "p", **{"regenerate.max_new_tokens": 8} | changes)
    chat = ChatFormat.of(recipe, target)
    return Regeneration(recipe, target, chat, gathered / "prompts.jsonl", out).run()


def test_prompts_that_are_all_too_long_are_asked_where_that_is_told_to_allow_it(gathered, target, tmp_path):
    wrong = {"regenerate.max_prompt_tokens": 2}
    line = told(regenerated, gathered, target, tmp_path / "a", **wrong)
    lost, key = read(r"\((\d+) longer than .*\); raise (regenerate\.\w+) where ", line)
    assert regenerated(gathered, target, tmp_path / "b", **wrong | {key: 50}).completions == int(lost)


def test_a_template_that_stops_at_once_is_changed_as_it_is_told(gathered, target, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "eos_ids", frozenset())
    letters = {"user": "{content}", "assistant": " <assistant>", "stop": list("abcdefghijklmnopqrstuvwxyz<")}
    line = told(regenerated, gathered, target, tmp_path / "a", **{"target.template": letters})
    key = read(r"check (target\.\w+) \(does a stop text come at once\?\)$", line)
    assert regenerated(
        gathered, target, tmp_path / "b", **{"target.template": letters} | {key: letters | {"stop": []}}
    ).completion_tokens


def test_documents_that_are_all_cut_away_are_trained_on_where_that_is_told_to_allow_it(gathered, target, tmp_path):
    regenerated(gathered, target, tmp_path / "completions")
    vocabulary = DraftVocabulary(torch.arange(40), 64)

    def split(**changes):
        recipe = tiny_recipe(target.identity.model, "p", **changes)
        return Trainer(recipe, target, tmp_path / "completions", vocabulary, tmp_path / "train").rows

    wrong = {"train.max_document_tokens": 3}
    key = read(r"; raise (train\.\w+) or add prompts$", told(split, **wrong))
    assert len(split(**wrong | {key: 64})) > 2


def test_a_disk_without_room_for_hidden_states_is_done_without(gathered, target, tmp_path, monkeypatch):
    regenerated(gathered, target, tmp_path / "completions")
    monkeypatch.setattr("draftsmith.training.capture.shutil.disk_usage", lambda _: SimpleNamespace(free=100))

    def trained(**changes):
        changes = {"train.max_steps": 1, "train.held_out": 2} | changes
        recipe, vocabulary = tiny_recipe(target.identity.model, "p", **changes), DraftVocabulary(torch.arange(40), 64)
        Trainer(recipe, target, tmp_path / "completions", vocabulary, tmp_path / "train").train()

    key, other = read(r"^(train\.\w+): offline needs .*; use (\w+)$", told(trained, **{"train.capture": "offline"}))
    trained(**{"train.capture": "offline"} | {key: other})


def test_evaluation_asks_where_it_is_told_to_raise_what_is_asked(gathered, model, target):
    def questions(**changes):
        setup = Setup(tiny_recipe(model, "p", **changes), gathered, gathered, target)
        evaluation = Evaluation(ENGINES["embedded"], setup, gathered / "evaluation.jsonl", gathered)
        return evaluation.questions(target.session())

    wrong = {"regenerate.max_prompt_tokens": 2}
    key = read(r"; raise (regenerate\.\w+) where ", told(questions, **wrong))
    assert len(questions(**wrong | {key: 50})) == 6


@pytest.mark.parametrize("engine", ["vllm", "sglang", "embedded"])
def test_a_shape_that_an_engine_can_draft_is_added(model, target, monkeypatch, engine):
    if engine == "embedded":  # as where the library's own forward decodes
        monkeypatch.setattr(target, "library", SimpleNamespace(can_cut_back=True))

    def draftable(*shapes):
        recipe = tiny_recipe(model, "p", **{"evaluate.shapes": shapes})
        return ENGINES[engine].draftable(recipe.evaluate.shapes, Setup(recipe, Path(), Path(), target))

    if engine == "sglang":
        assert draftable("3/4/8") == [Shape(3, 4, 8)]
        return
    key, shape = read(r"^(evaluate\.\w+): none that .*; add (\S+)$", told(draftable, "3/4/8"))
    assert key == "evaluate.shapes"
    assert [str(kept) for kept in draftable("3/4/8", shape)] == [shape]


def test_fewer_steps_are_told_where_a_profile_is_short():
    profile = MeasuredProfile([["11", "1"]])
    steps = int(read(r"long enough for (\d) steps; give fewer$", told(profile.tau, Shape.chain(3))))
    assert profile.tau(Shape.chain(steps - 1)) > 1


def test_a_context_that_is_full_is_left_free_by_the_key_that_is_named(target):
    def write(longest):
        return list(target.generate([[5] * longest], Sampling(), 4))

    key = read(r"give a smaller (\S+)$", told(write, 300))
    assert write(longest_prompt(tiny_recipe("m", "p", **{key: 200}), target, 4)) == write(200)


def test_a_tap_beyond_the_targets_layers_is_one_of_them(target):
    config = tiny_draft(target)[0].config

    def fit(*taps):
        known = target.identity
        shape = known.model, known.hidden_size, known.vocab_size, known.num_layers
        require_fit(Path("draft"), config.model_copy(update={"taps": taps}), *shape)

    fit(*[int(layer) for layer in read(r"^draft: reads layer 6, but .* has layers (\d)\.\.(\d)$", told(fit, 6))])


def test_a_set_is_prepared_as_it_is_told(tmp_path):
    def asked(text):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"question_id": 1, "category": "qa", "turns": [text]}))
        return read_set(EvaluationSet(name="speed-bench", path=path), tmp_path / "no", tmp_path / "sets", False).prompts

    assert read(r"; (prepare) the set as its page says; ", told(asked, f"{PLACEHOLDER} FROM THE SOURCE"))
    assert asked("1 + 1?")[0].users == ["1 + 1?"]


ENGINE_OF = {
    "embedded without a target here": (
        {"target.engine": "vllm", "regenerate.engine": "embedded"},
        r"give --(target\.engine) (transformers), else leave (regenerate\.engine) out and vllm decodes$",
        "regenerate",
    ),
    "the same of evaluation": (
        {"target.engine": "sglang", "evaluate.engine": "embedded"},
        r"give --(target\.engine) (transformers), else leave (evaluate\.engine) out and sglang decodes$",
        "evaluate",
    ),
}


@pytest.mark.parametrize("case", ENGINE_OF)
def test_what_decodes_is_chosen_as_it_is_told(tmp_path, case):
    wrong, pattern, stage = ENGINE_OF[case]

    def engine(changes):
        return Run(tiny_recipe("m", "p", **changes), tmp_path, ["test"]).engine_of(stage)

    key, value, other = read(pattern, told(engine, wrong))
    assert engine(wrong | {key: value}) == "embedded"
    assert engine({k: v for k, v in wrong.items() if k != other}) == wrong["target.engine"]


def test_a_server_to_evaluate_is_asked_by_the_engine_that_is_told_to_be_given(tmp_path):
    def engine(**changes):
        return Run(tiny_recipe("m", "p", **changes), tmp_path, ["test"]).engine_of("evaluate")

    url = {"evaluate.url": "http://127.0.0.1:9"}
    assert engine(**url, **{read(r"give --(\S+) too$", told(engine, **url)): "vllm"}) == "vllm"


def test_what_engines_alone_verify_is_given_to_one_as_it_is_told(target, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "library", SimpleNamespace(can_cut_back=False))
    setup = Setup(tiny_recipe("m", "p"), tmp_path, tmp_path, target)
    flag, *names = read(
        r"; give --(evaluate\.engine) (\w+) or (\w+)$", told(ENGINES["embedded"].draftable, [Shape(3, 1, 4)], setup)
    )
    for name in names:
        run = Run(tiny_recipe("m", "p", **{flag: name}), tmp_path, ["test"])
        assert ENGINES[run.engine_of("evaluate")].draftable([Shape(3, 1, 4)], setup) == [Shape(3, 1, 4)]


def trained(gathered, target, out, processes=None, **changes):
    if not (gathered / "completions").exists():
        regenerated(gathered, target, gathered / "completions")
    recipe = tiny_recipe(target.identity.model, "p", **changes)
    vocabulary = DraftVocabulary(torch.arange(40), 64)
    return Trainer(recipe, target, gathered / "completions", vocabulary, out, processes)


def test_another_training_goes_where_it_is_told_to(gathered, target, tmp_path):
    trained(gathered, target, tmp_path / "a").train()
    other = {"train.learning_rate": 1e-3}
    assert read(
        r"; give another --(\w+), or train anew", told(trained(gathered, target, tmp_path / "a", **other).train)
    )
    assert trained(gathered, target, tmp_path / "b", **other).train().steps > 0
    assert trained(gathered, target, tmp_path / "a").train().steps > 0, "nothing there was lost"


def test_weights_in_parts_are_trained_as_it_is_told(gathered, target, tmp_path):
    """Of several processes only their number is asked for here; tests/golden trains with them."""
    sharded = []
    several = SimpleNamespace(size=2, main=True, shard=lambda *parts: sharded.append(parts))
    several.require_possible = partial(ProcessGroup.require_possible, several)
    wrong = {"train.shard": True, "train.optimizer": "muon", "train.accumulate": 2}
    line = told(trained, gathered, target, tmp_path, several, **wrong)
    one, adamw, other, false = read(r"; give (train\.\w+) (\w+) or (train\.\w+) (\w+)$", line)
    assert trained(gathered, target, tmp_path, several, **wrong | {one: adamw}).sharded
    assert not trained(gathered, target, tmp_path, several, **wrong | {other: json.loads(false)}).sharded
    assert len(sharded) == 1


# --- drafts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(target, tmp_path):
    """A draft's directory."""
    draft, ids = tiny_draft(target)
    write_draft(tmp_path / "draft", draft, ids, 6, {})
    return tmp_path / "draft"


def problems(directory):
    return inspect_draft(directory).blocking()


@pytest.mark.parametrize("place", ["top", "nested"])
def test_layer_ids_are_added_where_and_as_it_is_told(exported, place):
    config = read_json(exported / "config.json")
    config.pop("draftsmith")
    outer, inner = dict(config), dict(config, eagle_config={})
    del outer["eagle_aux_hidden_state_layer_ids"]
    kept = inner if place == "top" else outer
    write_json(exported / "config.json", kept)
    (problem,) = [line for line in problems(exported) if " add " in line]
    if place == "top":
        ids, key, name, less = read(r"^(\w+) at the top level .*; add (\w+)\.(\w+): each id less (\d)$", problem)
        kept[key][name] = [layer - int(less) for layer in kept[ids]]
    else:
        name, key, more = read(r"^(\w+) in (\w+) alone .*; add it at the top level: each id plus (\d)$", problem)
        kept[name] = [layer + int(more) for layer in kept[key][name]]
    write_json(exported / "config.json", kept)
    assert not [line for line in problems(exported) if "eagle_aux" in line or "taps" in line]


def test_a_draft_is_given_as_it_was_before_quantisation(exported):
    whole = read_json(exported / "config.json")
    write_json(exported / "config.json", whole | {"quantization_config": {"quant_method": "gptq"}})
    assert read(r"give the draft as it was (before) quantisation$", problems(exported)[0])
    write_json(exported / "config.json", whole)
    assert problems(exported) == []


REFUSED = {
    "load": load_draft,
    "publish": lambda directory: publish(directory, "owner/name", False, False),
    "go on from": lambda directory: starting_draft(
        Run(tiny_recipe("m", "p", **{"train.from_draft": str(directory)}), directory / "run", ["test"])
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inspecting_a_directory_as_it_is_told_names_the_problem(exported, monkeypatch, capsys, case):
    write_json(exported / "config.json", read_json(exported / "config.json") | {"num_hidden_layers": 2})
    problem, command = read(r"/draft: (.*); (?:run|see): draftsmith (.*)$", told(REFUSED[case], exported))
    monkeypatch.setattr(sys, "argv", ["draftsmith", *command.split()])
    assert cli.main() == 1
    assert f"problem: {problem}" in capsys.readouterr().out


def test_a_directory_without_a_draft_is_another(exported):
    assert read(r"no config.json; give the directory of a (\w+)$", told(load_draft, exported.parent)) == "draft"
    assert load_draft(exported)


# --- drafts to go on from ---------------------------------------------------------------------------------------------

WITHOUT_TAPS = {"draft.taps": None, "draft.fc_norm": False}
MISFITS = {  # (the recipe's draft, what is read out of the error, what is left of it)
    "other taps": ({"draft.taps": [1, 2, 4]}, r"^(draft\.\w+): .*; leave the key out, or (train\.\w+)$"),
    "a norm": (
        WITHOUT_TAPS | {"draft.norm_before_fc": True},
        r"^(draft\.\w+): .*; leave the key out, or (train\.\w+)$",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.parametrize("leave", [0, 1])
def test_a_draft_to_go_on_from_fits_where_the_key_is_left_out(exported, target, case, leave):
    wrong, pattern = MISFITS[case]
    wrong = {"draft.intermediate_size": None, "train.from_draft": str(exported)} | wrong
    ids, usual = load_draft(exported)[1], load_draft(exported)[0].config

    def first(changes):
        return first_draft(tiny_recipe("m", "p", **changes), target, usual, ids)[1]

    left_out = read(pattern, told(first, wrong))[leave]
    assert left_out in wrong
    default = False if left_out == "draft.norm_before_fc" else None
    assert (first(wrong | {left_out: default}) is None) == bool(leave)


def widen(directory, target):
    draft, ids = load_draft(directory)
    wide = type(draft)(draft.config.model_copy(update={"hidden_size": 64, "target_hidden_size": 32}))
    shutil.rmtree(directory)
    write_draft(directory, wide, ids, 6, {})


def give_an_embedding(directory, target):
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "embed_tokens.weight": torch.ones(64, 32)}, directory / "model.safetensors", {"format": "pt"})


OTHERS = {"of another width": widen, "with an embedding of its own": give_an_embedding}


@pytest.mark.parametrize("case", OTHERS)
def test_another_draft_to_go_on_from_is_taken(exported, target, tmp_path, case):
    ids, usual = load_draft(exported)[1], load_draft(exported)[0].config
    shutil.copytree(exported, tmp_path / "like")
    OTHERS[case](exported, target)

    def first(directory):
        changes = {"draft.intermediate_size": None, "draft.taps": None, "train.from_draft": str(directory)}
        return first_draft(tiny_recipe("m", "p", **changes), target, usual, ids)[1]

    assert read(r"; (go on from one like that|give another)$", told(first, exported))
    assert first(tmp_path / "like")
