"""What an error of a server or an engine says to do is done, and then it works."""

import contextlib
import json
import shlex
import shutil
import socket
import sys
from pathlib import Path

import pytest
from models import save_tiny_target, tiny_recipe, write_prompts
from outcomes import read, told
from servers import ENGINE, FaultyServer, serving, tiny_engine

from draftsmith import cli
from draftsmith.core.recipe_file import dump_recipe
from draftsmith.core.shape import Shape
from draftsmith.data.prompts import gather
from draftsmith.decoding.sampling import Sampling
from draftsmith.engines import SERVERS
from draftsmith.engines.base import Setup
from draftsmith.engines.process import running
from draftsmith.engines.served import ServedTarget
from draftsmith.evaluation.evaluate import Evaluation
from draftsmith.runs import probing as probe
from draftsmith.runs.run import Run

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


@pytest.mark.parametrize("part", ["regenerate", "train"])
def test_a_request_has_room_where_its_key_is_lowered(model, target, part, states):
    with serving(FaultyServer(tiny_engine(target, model, (states, (1, 3, 4))))) as urls:
        if part == "train":
            wrong = {"train.max_document_tokens": 250}
            line = told(captured, model, urls, **wrong)
            key, other = read(r"takes 200 tokens, .*; give a smaller (train\.\w+), or .* larger (serve\.\w+)$", line)
            assert captured(model, urls, **wrong | {key: 64})[0] == 64
        else:
            wrong = {"regenerate.max_new_tokens": 250}
            line = told(answered, model, urls, **wrong)
            *keys, other = read(r"; give a smaller (\w+\.\w+) or (\w+\.\w+), or .* larger (serve\.\w+)$", line)
            assert keys == ["regenerate.max_new_tokens", "evaluate.max_new_tokens"]
            assert answered(model, urls, **wrong | {keys[0]: 4})
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
    wrong = {"server.deadline_s": 1}

    def ask(**changes):
        late = FaultyServer(tiny_engine(target, model), lambda n: "late" if n == 1 else None, 1.3)
        with serving(late) as urls:
            return answered(model, urls, **wrong | changes)

    line = told(ask)
    attempts, key = read(r"^(server\.\w+): 1 attempts failed, .*: no answer within 1 s \((server\.\w+)\)", line)
    assert ask(**{key: 30})
    assert ask(**{attempts: 20})


# --- servers that draft -----------------------------------------------------------------------------------------------


def drafting(engine):
    """One that tells of its drafting, two accepted tokens in every step, and writes as many tokens as it is told to."""

    def answer(path, body, name):
        status, told = engine(path, body, name)
        if "choices" in told and "prompt_logprobs" not in body:
            choice = told["choices"][0]
            if body.get("ignore_eos"):
                choice |= {"token_ids": [5] * body["max_tokens"], "finish_reason": "length"}
            told["metrics"] = {
                "speculative_decoding": {"per_step_accepted": [2] * max(1, len(choice["token_ids"]) // 3)}
            }
        return status, told

    return answer


@pytest.fixture
def evaluated(model, tmp_path):
    """`evaluated(url, **changes)` is what `evaluate` measures of a server that drafts."""
    recipe = tiny_recipe(model, write_prompts(tmp_path / "rows.jsonl"))
    gather(recipe, tmp_path)

    def evaluate(url, **changes):
        short = {"evaluate.prompts": 3, "evaluate.max_new_tokens": 4, "evaluate.shapes": ["3/1/4"]}
        recipe = recipe_for(model, [], **{"evaluate.url": url} | short | changes)
        setup = Setup(recipe, tmp_path / "none", tmp_path)
        evaluation = Evaluation(SERVERS["vllm"], setup, tmp_path / "evaluation.jsonl", tmp_path)
        return evaluation.run(Run(recipe, tmp_path, ["test"]).created_with)

    return evaluate


def test_a_server_is_evaluated_once_it_is_started_as_it_is_told(model, target, evaluated):
    whole = tiny_engine(target, model)
    with serving(FaultyServer(whole), FaultyServer(drafting(whole))) as (plain, drafts):
        line = told(evaluated, plain)
        key, flag = read(r"^(evaluate\.\w+): .*; start it with a draft and (--\S+) detailed$", line)
        recipe = recipe_for(model, [])
        assert flag in SERVERS["vllm"].arguments(recipe, model, Path("draft"), "draft", ())[0]
        assert evaluated(None, **{key: drafts}).acceptance
        # of another shape
        line = told(evaluated, drafts, **{"evaluate.shapes": ["1/1/2"]})
        key, deepest = read(r"^(evaluate\.\w+): .* accepted (\d) draft tokens in one step; name the shape", line)
        shapes = {"evaluate.shapes": ["1/1/2"]} | {key: [str(Shape.chain(int(deepest)))]}
        assert evaluated(drafts, **shapes).acceptance


def test_a_temperature_at_which_a_server_draws_is_added(model, target, evaluated, monkeypatch):
    monkeypatch.setattr(Evaluation, "draws", lambda *_: False)
    with serving(FaultyServer(drafting(tiny_engine(target, model)))) as (url,):
        key, value = read(r"^(evaluate\.\w+): .*; add (\S+)$", told(evaluated, url, **{"evaluate.temperatures": [1]}))
        assert evaluated(url, **{"evaluate.temperatures": [1]} | {key: [1, float(value)]}).acceptance


def test_servers_are_probed_once_they_are_given_as_it_is_told(model, target, tmp_path, monkeypatch, capsys):
    for name, value in {"AT_ONCE": (1, 2), "DRAFTED_AT": (1,), "SERVER_ROUNDS": 1}.items():
        monkeypatch.setattr(probe, name, value)
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(dump_recipe(recipe_for(model, [])))

    def call(name, *flags):
        monkeypatch.setattr(sys, "argv", ["draftsmith", name, str(file), "--out", str(out), *flags])
        assert cli.main() in (0, 2)
        return ["", *capsys.readouterr().err.splitlines()][-1]

    whole = tiny_engine(target, model)
    with serving(FaultyServer(whole), FaultyServer(drafting(whole))) as (alone, drafts):
        drafted, url = read(r"^draftsmith: (--\S+): give (--\S+) too, ", call("probe", "--draft-url", drafts))
        call("probe", url, alone)
        predicted = ["predict", "--hardware", str(out / "probe-vllm.json"), "--tau", "2.2", "--batches", "1"]
        assert read(r"holds no draft's times; probe again with (--\S+)$", call(*predicted)) == drafted
        line = call("probe", url, alone, drafted, alone)
        assert cli.parse([*read(r"; start it with `draftsmith (\w+)`$", line).split(), str(file)])[0].purpose == "draft"
        line = call("probe", url, alone, drafted, drafts)
        assert not line.startswith("draftsmith: "), line
        line = call(*predicted)
        assert not line.startswith("draftsmith: "), line
        assert list(out.glob("predict/*.json"))


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
        with running(SERVERS["vllm"].launch(recipe, "m", Path("d"), "plain", ()), recipe.serve.patience_s) as process:
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
    assert started(**{"serve.program": "no-such serve"} | {flag: started.program})


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
    assert started(**wrong | {key: 30})


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


def test_a_gemma_is_served_as_it_is_told_to_be_started(tmp_path):
    gemma, sglang = save_tiny_target(tmp_path / "model", "gemma3"), SERVERS["sglang"]
    _, wanted, fault = sglang.capture_check("gemma3")
    command = read(r"start it with `draftsmith (serve .*)`$", fault)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_for(gemma, [], **{"serve.engine": "sglang"})))
    command, recipe = cli.parse(command.replace("RECIPE", str(tmp_path / "recipe.yaml")).split())
    words = Run(recipe, tmp_path, ["test"]).serving(command.purpose).command
    of_itself = words[words.index("--json-model-override-args") + 1]
    assert wanted in of_itself


@pytest.mark.parametrize("stage", ["regenerate", "evaluate"])
def test_what_decodes_on_gpus_is_chosen_by_the_flags_that_are_told(tmp_path, capsys, monkeypatch, stage):
    file, program = tmp_path / "recipe.yaml", tmp_path / "vllm"
    file.write_text(dump_recipe(tiny_recipe("m", "p", device="auto")))
    program.write_text("#!/bin/sh")
    program.chmod(0o755)

    def engine(*flags, installed=None):
        run = Run(cli.parse(["run", str(file), *flags])[1], tmp_path, ["test"])
        run.__dict__["cards"] = ["0", "1"]
        with monkeypatch.context() as patched:
            if installed is not None:
                patched.setattr(shutil, "which", lambda program: program if installed else None)
            return run.tell_engine(stage), capsys.readouterr().err

    name, line = engine(installed=True)
    assert name == "vllm"
    assert engine(*read(rf"{stage}: vLLM decodes; (--\S+ embedded): ", line).split(), installed=True)[0] == "embedded"
    name, line = engine(installed=False)
    assert name == "embedded"
    flags = shlex.split(read(r", then give (--serve.*)$", line.strip()).replace("/opt/vllm/bin/vllm", str(program)))
    assert engine(*flags)[0] == "vllm"
