"""What an error of a stage, a draft, a server or an engine says to do is done, and then it works."""

import contextlib
import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import save_tiny_target, tiny_draft, tiny_recipe, write_prompts
from outcomes import read, told
from servers import ENGINE, FaultyServer, serving, tiny_engine

from draftsmith import cli
from draftsmith.core.files import read_json, write_json
from draftsmith.core.recipe_file import dump_recipe
from draftsmith.core.shape import Shape
from draftsmith.data.prompts import gather
from draftsmith.data.regenerate import Regeneration, longest_prompt
from draftsmith.data.templates import ChatFormat
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.decoding.sampling import Sampling
from draftsmith.drafts.directories import inspect_draft, load_draft, write_draft
from draftsmith.engines import ENGINES, SERVERS
from draftsmith.engines.base import Setup
from draftsmith.engines.embedded import EmbeddedSession
from draftsmith.engines.process import launch, running
from draftsmith.engines.served import ServedTarget
from draftsmith.evaluation.evaluate import Evaluation
from draftsmith.hardware.accept_length import MeasuredProfile
from draftsmith.runs.run import Run
from draftsmith.targets.local import LocalTarget
from draftsmith.training.start import first_draft
from draftsmith.training.trainer import Trainer

# --- stages, each as a function ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_target(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def target(model):
    return LocalTarget(model, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def gathered(model, tmp_path_factory):
    """A directory with prompts and completions."""
    out = tmp_path_factory.mktemp("gathered")
    gather(tiny_recipe(model, write_prompts(out / "rows.jsonl")), out)
    return out


def regenerated(gathered, target, out, **changes):
    recipe = tiny_recipe(target.identity.model, "p", **{"regenerate.max_new_tokens": 8} | changes)
    chat = ChatFormat.of(recipe, target)
    return Regeneration(recipe, target, chat, gathered / "prompts.jsonl", out).run()


def test_prompts_that_are_all_too_long_are_asked_where_that_is_told_to_allow_it(gathered, target, tmp_path):
    line = told(regenerated, gathered, target, tmp_path / "a", **{"regenerate.max_prompt_tokens": 2})
    lost, key = read(r"\((\d+) longer than .*\); raise (regenerate\.\w+) where ", line)
    assert regenerated(gathered, target, tmp_path / "b", **{key: 50}).completions == int(lost)


def test_a_template_that_stops_at_once_is_changed_as_it_is_told(gathered, target, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "eos_ids", frozenset())
    letters = {"user": "{content}", "assistant": " <assistant>", "stop": list("abcdefghijklmnopqrstuvwxyz<")}
    line = told(regenerated, gathered, target, tmp_path / "a", **{"target.template": letters})
    key = read(r"check (target\.\w+) \(does a stop text come at once\?\)$", line)
    assert regenerated(gathered, target, tmp_path / "b", **{key: letters | {"stop": []}}).completion_tokens


def test_documents_that_are_all_cut_away_are_trained_on_where_that_is_told_to_allow_it(gathered, target, tmp_path):
    regenerated(gathered, target, tmp_path / "completions")
    vocabulary = DraftVocabulary(torch.arange(40), 64)

    def split(**changes):
        recipe = tiny_recipe(target.identity.model, "p", **changes)
        return Trainer(recipe, target, target.config, tmp_path / "completions", vocabulary, tmp_path / "train").rows

    line = told(split, **{"train.max_document_tokens": 3})
    assert len(split(**{read(r"; raise (train\.\w+) or add prompts$", line): 64})) > 2


def test_a_disk_without_room_for_hidden_states_is_done_without(gathered, target, tmp_path, monkeypatch):
    regenerated(gathered, target, tmp_path / "completions")
    monkeypatch.setattr("draftsmith.training.capture.shutil.disk_usage", lambda _: SimpleNamespace(free=100))

    def trained(**changes):
        changes = {"train.max_steps": 1, "train.held_out": 2} | changes
        recipe, vocabulary = tiny_recipe(target.identity.model, "p", **changes), DraftVocabulary(torch.arange(40), 64)
        Trainer(recipe, target, target.config, tmp_path / "completions", vocabulary, tmp_path / "train").train()

    key, other = read(r"^(train\.\w+): offline needs .*; use (\w+)$", told(trained, **{"train.capture": "offline"}))
    trained(**{key: other})


def test_evaluation_asks_where_it_is_told_to_raise_what_is_asked(gathered, model, target):
    def questions(**changes):
        setup = Setup(tiny_recipe(model, "p", **changes), gathered, gathered, target)
        evaluation = Evaluation(ENGINES["embedded"], setup, gathered / "evaluation.jsonl", gathered)
        return evaluation.questions(EmbeddedSession(target))

    key = read(r"; raise (regenerate\.\w+) where ", told(questions, **{"regenerate.max_prompt_tokens": 2}))
    assert len(questions(**{key: 50})) == 6


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
    section, name = key.split(".")
    assert write(longest_prompt(getattr(tiny_recipe("m", "p"), section), 256))
    assert name == "max_prompt_tokens"


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
        return Run(tiny_recipe("m", "p", **changes), tmp_path, ["test"]).evaluation_engine

    url = {"evaluate.url": "http://127.0.0.1:9"}
    assert engine(**url, **{read(r"give --(\S+) too$", told(engine, **url)): "vllm"}) == "vllm"


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


def test_inspecting_a_directory_as_it_is_told_names_the_problem(exported, monkeypatch, capsys):
    write_json(exported / "config.json", read_json(exported / "config.json") | {"num_hidden_layers": 2})
    problem, command = read(r"^\S+: (.*); run: draftsmith (.*)$", told(load_draft, exported))
    monkeypatch.setattr(sys, "argv", ["draftsmith", *command.split()])
    assert cli.main() == 1
    assert f"problem: {problem}" in capsys.readouterr().out


def test_a_directory_without_a_draft_is_another(exported):
    assert read(r"no config.json; give the directory of a (\w+)$", told(load_draft, exported.parent)) == "draft"
    assert load_draft(exported)


# --- drafts to go on from ---------------------------------------------------------------------------------------------

MISFITS = {  # (the recipe's draft, what is read out of the error, what is left of it)
    "other taps": ({"draft.taps": [1, 2, 4]}, r"^(draft\.\w+): .*; leave the key out, or (train\.\w+)$"),
    "a norm": ({"draft.taps": None, "draft.fc_norm": True}, r"^(draft\.\w+): .*; leave the key out, or (train\.\w+)$"),
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
    default = False if left_out == "draft.fc_norm" else None
    assert (first(wrong | {left_out: default}) is None) == bool(leave)


# --- servers ----------------------------------------------------------------------------------------------------------


def recipe_for(model, urls, **changes):
    server = {"urls": urls, "deadline_s": 5.0, "attempts": 1, "backoff_s": 0.01}
    named = {f"server.{name}": value for name, value in server.items()}
    return tiny_recipe(model, "unused", **{"target.engine": "vllm", "regenerate.max_new_tokens": 4} | named | changes)


def answered(model, urls, **changes):
    """Token ids of an answer as `regenerate` asks for it."""
    recipe = recipe_for(model, urls, **changes)
    with contextlib.closing(ServedTarget(recipe.target, recipe.server, SERVERS[recipe.target.engine], "cpu")) as served:
        (answer,) = served.generate([[1, 5, 9]], Sampling(), recipe.regenerate.max_new_tokens)
    return answer[1].ids


def captured(model, urls, **changes):
    """Shape of the hidden states that training asks for."""
    recipe = recipe_for(model, urls, **changes)
    document = [5] * min(250, recipe.train.max_document_tokens)
    with contextlib.closing(ServedTarget(recipe.target, recipe.server, SERVERS[recipe.target.engine], "cpu")) as served:
        return list(served.capture([document], recipe.draft.taps).taps_TKH.shape)


@pytest.fixture
def states(tmp_path):
    (tmp_path / "states").mkdir()
    return tmp_path / "states"


def test_a_url_is_given_where_there_is_none(model, target):
    key, engine = read(
        r"^(server\.\w+): none given; target\.engine (\w+) needs at least one URL$", told(answered, model, [])
    )
    with serving(FaultyServer(tiny_engine(target, model))) as urls:
        assert answered(model, [], **{key: urls, "target.engine": engine})


def test_a_server_has_the_name_that_it_is_told_to_be_started_with(model, target):
    with serving(FaultyServer(tiny_engine(target, "else"))) as urls:
        flag, name = read(r"; give another URL, or start it with (--\S+) (\S+)$", told(answered, model, urls))
    assert flag == "--served-model-name"  # of both engines
    with serving(FaultyServer(tiny_engine(target, name))) as urls:
        assert answered(model, urls)


def test_a_server_of_the_other_engine_is_called_so(model, target):
    whole = tiny_engine(target, model)

    def sglang(path, body, name):
        return (200, {}) if path == "/v1/completions" else whole(path, body, name)

    with serving(FaultyServer(sglang)) as urls:
        key = read(r"as the engine of (target\.\w+) does; is it another one\?$", told(answered, model, urls))
        assert answered(model, urls, **{key: "sglang"})


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_request_has_room_where_its_key_is_lowered(model, target, number, states):
    """regenerate's, evaluate's and train's."""
    with serving(FaultyServer(tiny_engine(target, model, (states, (1, 3, 4))))) as urls:
        if number == 2:
            line = told(captured, model, urls, **{"train.max_document_tokens": 250})
            key, other = read(r"takes 200 tokens, .*; give a smaller (train\.\w+), or .* larger (serve\.\w+)$", line)
            assert captured(model, urls, **{key: 64})[0] == 64
        else:
            line = told(answered, model, urls, **{"regenerate.max_new_tokens": 250})
            *keys, other = read(r"; give a smaller (\w+\.\w+) or (\w+\.\w+), or .* larger (serve\.\w+)$", line)
            assert keys == ["regenerate.max_new_tokens", "evaluate.max_new_tokens"]
            assert answered(model, urls, **{keys[0]: 4})
    flags = SERVERS["vllm"].arguments(recipe_for(model, [], **{other: 300}), model, Path(), "plain", ())[0]
    assert flags[flags.index("--max-model-len") + 1] == "300"


def test_a_key_is_put_where_it_is_told(model, target, monkeypatch):
    server = FaultyServer(tiny_engine(target, model))
    honest = server.answer

    def locked(path, body, name):
        return honest(path, body, name) if server.keys[-1] == "Bearer secret" else (401, {"error": "no key"})

    server.answer = locked
    with serving(server) as urls:
        for settings in ({}, {"server.api_key_env": "OUR_KEY"}):
            line = told(answered, model, urls, **settings)
            variable, key = read(r"; put the key into the environment variable (\w+) \((server\.\w+)\)$", line)
            monkeypatch.setenv(variable, "secret")
            assert answered(model, urls, **{**settings, **({key: variable} if settings else {})})


def test_hidden_states_are_kept_by_a_server_that_is_started_as_it_is_told(model, target, states):
    with serving(FaultyServer(tiny_engine(target, model))) as urls:
        line = told(captured, model, urls)
    command, key, value = read(r"start it with `draftsmith (serve .*)`, or train with (target\.\w+) (\w+)$", line)
    assert Run(recipe_for(model, [], **{key: value}), states, ["test"]).target.capture([[5]], ()).last_TH.shape
    layers = layers_kept(command, model, states)
    with serving(FaultyServer(tiny_engine(target, model, (states, layers)))) as urls:
        assert captured(model, urls)[1:] == [3, 32]


def layers_kept(command, model, states):
    """Taps that the server of this command keeps."""
    path = states / "recipe.yaml"
    path.write_text(dump_recipe(recipe_for(model, [], **{"serve.states": str(states)})))
    command, recipe = cli.parse(command.replace("RECIPE", str(path)).split())
    words = Run(recipe, states, ["test"]).serving(command.purpose).command
    speculative = json.loads(words[words.index("--speculative-config") + 1])
    *taps, last = speculative["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
    assert last == 6, "the last layer's output is kept as well"
    return tuple(taps)


def test_a_server_keeps_the_layers_that_it_is_told_to_be_started_with(model, target, states):
    with serving(FaultyServer(tiny_engine(target, model, (states, (1, 3))))) as urls:
        key, command = read(
            r"^(draft\.\w+): .*; start it with the layers that `draftsmith (serve .*)` names$",
            told(captured, model, urls),
        )
    assert key == "draft.taps"
    with serving(FaultyServer(tiny_engine(target, model, (states, layers_kept(command, model, states))))) as urls:
        assert captured(model, urls)[1:] == [3, 32]


def test_hidden_states_are_found_in_the_folder_that_is_told_to_be_given(model, target, states, tmp_path):
    whole = tiny_engine(target, model, (states, (1, 3, 4)))

    def elsewhere(path, body, name):
        """As a server on another machine names them."""
        status, answer = whole(path, body, name)
        if "kv_transfer_params" in answer:
            kept = Path(answer["kv_transfer_params"]["hidden_states_path"])
            answer["kv_transfer_params"]["hidden_states_path"] = f"/elsewhere/{kept.name}"
        return status, answer

    with serving(FaultyServer(elsewhere)) as urls:
        key, where, purpose = read(
            r"^(server\.\w+): .* in (\S+), which .*, a server of `serve --purpose (\w+)`$", told(captured, model, urls)
        )
        assert where == "/elsewhere"
        assert captured(model, urls, **{key: str(states)})
        assert told(answered, model, urls).startswith(key)
        assert answered(model, urls, **{key: str(states)})
    flags = SERVERS["vllm"].arguments(recipe_for(model, []), model, Path(), purpose, ())[0]
    assert "--kv-transfer-config" not in flags
    with serving(FaultyServer(tiny_engine(target, model))) as urls:
        assert answered(model, urls)


def test_an_answer_is_waited_for_as_long_as_the_key_that_is_named_says(model, target):
    with serving(FaultyServer(tiny_engine(target, model), lambda n: "late" if n == 1 else None, 0.7)) as urls:
        line = told(answered, model, urls, **{"server.deadline_s": 0.5})
        key = read(r"no answer within 0\.5 s \((server\.\w+)\)", line)
        attempts = read(r"^(server\.\w+): 1 attempts failed, ", line)
    with serving(FaultyServer(tiny_engine(target, model), lambda n: "late" if n == 1 else None, 0.7)) as urls:
        assert answered(model, urls, **{key: 10})
    with serving(FaultyServer(tiny_engine(target, model), lambda n: "late" if n == 1 else None, 0.7)) as urls:
        assert answered(model, urls, **{"server.deadline_s": 0.5, attempts: 3})


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """`started(**serve)` starts a stand-in for an engine, waits until it is healthy and stops it."""
    (tmp_path / "engine.py").write_text(ENGINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    usual = {"serve.program": f"{sys.executable} {tmp_path / 'engine.py'} {tmp_path / 'pids'}", "serve.port": port}

    @contextlib.contextmanager
    def alive(**changes):
        recipe = tiny_recipe("m", "p", **usual | changes)
        with running(launch(SERVERS["vllm"], recipe, "m", Path("d"), "plain", ()), recipe.serve.patience_s) as process:
            yield process.poll() is None

    def start(**changes):
        with alive(**changes) as lives:
            return lives

    start.alive, start.program = alive, usual["serve.program"]
    return start


def test_an_engine_is_named_as_it_is_told(started):
    flag, example = read(
        r'; install the engine or name it, for example --(\S+) "(.*)"$',
        told(started, **{"serve.program": "no-such serve"}),
    )
    assert example.split()[1] == "serve"
    assert started(**{flag: started.program})


def test_another_port_is_given_as_it_is_told(started):
    with started.alive(), socket.socket() as free:
        flag = read(r"; stop it, or give another --(\S+)$", told(started))
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        assert started(**{flag: port})
    assert started()


def test_a_variable_is_exported_as_it_is_told(started, monkeypatch):
    extra = {"serve.extra": "--api-key $OUR_KEY"}
    variable = read(r"^serve\.extra: \$(\w+) is not set in the environment; export it$", told(started, **extra))
    monkeypatch.setenv(variable, "secret")
    assert started(**extra)


def test_an_engine_is_given_the_time_that_it_is_told_to_be_given(started):
    wrong = {"serve.patience_s": 0.001}
    key = read(
        r"^(serve\.\w+): the engine did not answer within .*; give it more or see its log$", told(started, **wrong)
    )
    assert started(**{key: 30})


def test_a_purpose_that_an_engine_has_is_taken(model, tmp_path):
    run = Run(tiny_recipe(model, "p"), tmp_path, ["test"])
    purpose = read(r"; use --purpose (\w+)$", told(run.serving, "last"))
    assert run.serving(purpose).command


def test_another_engines_own_program_is_given_as_it_is_told(model, target, tmp_path):
    wrong = {"serve.engine": "vllm", "serve.extra": "--x", "evaluate.engine": "sglang"}

    def opened(changes):
        setup = Setup(tiny_recipe(model, "p", **changes), tmp_path, tmp_path)
        with SERVERS["sglang"].open(setup, None):
            return True

    flag, name = read(r"; give --(\S+) (\w+) and its own$", told(opened, wrong))
    assert told(opened, wrong | {flag: name, "serve.program": "no-such"}).startswith("serve.program: cannot start")
