"""Starting and stopping engines; a small program stands in where only process control is at stake."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import WORDS, local_target, save_tiny_target, tiny_recipe, write_prompts
from servers import ENGINE, FaultyServer, drafting, serving, tiny_engine

from draftsmith.commands.tune import Tune
from draftsmith.core.errors import ServeError
from draftsmith.core.records.base import write_rows
from draftsmith.core.records.data import CompletionsSummary, Prompt
from draftsmith.core.records.run import Manifest
from draftsmith.core.run_files import SUMMARY
from draftsmith.decoding.sampling import Sampling
from draftsmith.engines import SERVERS
from draftsmith.engines.base import Setup
from draftsmith.engines.process import running
from draftsmith.evaluation.evaluate import Evaluation
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run


@pytest.fixture
def engine(tmp_path):
    """(recipe of a stand-in engine, file with the ids of its processes)"""
    script, pids = tmp_path / "engine.py", tmp_path / "pids"
    script.write_text(ENGINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def recipe(**changes):
        program = f"{sys.executable} {script} {pids}"
        return tiny_recipe("m", "p", serve={"program": program, "port": port, **changes})

    return recipe, pids


def launched(recipe, model, purpose, layers=()):
    """What starts the recipe's engine."""
    return SERVERS[recipe.serve.engine].launch(recipe, model, Path("d"), purpose, layers)


def alive(pids: Path) -> list[int]:
    """Those of the engine's processes that still run."""
    found = []
    for pid in map(int, pids.read_text().split()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(pid)
    return found


def gone(pids: Path) -> bool:
    deadline = time.monotonic() + 10
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)


@pytest.mark.parametrize("extra", ["", "--stubborn"])
def test_an_engine_is_healthy_inside_and_gone_outside(engine, monkeypatch, extra):
    monkeypatch.setattr("draftsmith.engines.process.STOP_S", 0.5)
    recipe, pids = engine
    with running(launched(recipe(extra=extra), "m", "plain"), 20):
        assert len(alive(pids)) == 2
    assert gone(pids)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_takes_its_engine_with_it(engine, tmp_path, signal_number):
    recipe, pids = engine
    file = tmp_path / "recipe.yaml"
    file.write_text(f"name: x\ntarget: {{model: m}}\nserve: {{program: {recipe().serve.program}}}\n")
    command = [sys.executable, "-m", "draftsmith", "serve", str(file), "--purpose", "plain"]
    command += ["--serve.port", str(recipe().serve.port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "ready at" in line:
            break
    engine_pid, worker = map(int, pids.read_text().split())
    os.kill(process.pid, signal_number)
    if signal_number == signal.SIGKILL:  # nobody is left to stop the engine's workers, but the engine itself is told
        deadline = time.monotonic() + 10
        while engine_pid in alive(pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine_pid not in alive(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert "engine log line" in out
    if signal_number != signal.SIGKILL:
        assert process.returncode == 0
        assert "serve: stopped" in err
        assert gone(pids)


def test_what_cannot_start_is_told_in_one_line(engine):
    recipe, _ = engine
    cases = {
        "serve: the engine stopped with exit code 3": recipe(extra="--crash"),
        "serve.program: cannot start 'no-such-engine'": recipe(program="no-such-engine serve"),
        "serve.patience_s: the engine did not answer within 0.5 s": recipe(
            program="sh -c 'sleep 60' engine", patience_s=0.5
        ),
    }
    for wanted, given in cases.items():
        with pytest.raises(ServeError) as caught, running(launched(given, "m", "plain"), given.serve.patience_s):
            pass
        assert wanted in str(caught.value)
        assert "\n" not in str(caught.value)
    started = launched(recipe(), "m", "plain")
    with (
        running(started, 20),
        pytest.raises(ServeError, match=r"serve\.port: something already answers at http"),
        running(started, 20),
    ):
        pass


def test_an_engine_that_dies_at_work_is_told_with_its_log_at_once(engine, model, tmp_path):
    """Its server was asked again and again for minutes, and the last word was that nobody answered."""
    recipe, pids = engine
    given = recipe()
    given = given.model_copy(update={"target": given.target.model_copy(update={"model": model})})
    setup = Setup(given, tmp_path / "draft", tmp_path / "logs")
    with SERVERS["vllm"].open(setup, None) as session:
        os.kill(int(pids.read_text().split()[0]), signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(ServeError) as caught:
            list(session.generate([[5, 6]], Sampling(), 4))
    assert time.monotonic() - started < 15
    log = tmp_path / "logs" / "vllm-plain.log"
    assert str(caught.value) == f"serve: the engine stopped with exit code -9; {log} says why"
    assert "engine log line" in log.read_text()


def test_commands_are_the_engines_own():
    sglang = {"engine": "sglang", "shape": "3/4/8", "tensor_parallel": 8, "port": 30000, "peer_to_peer": False}
    command = str(launched(tiny_recipe("m", "p", serve=sglang), "org/model", "draft"))
    assert command.startswith("NCCL_P2P_DISABLE=1 ")
    assert command.endswith(
        "-m sglang.launch_server --model-path org/model --tp-size 8 --speculative-algorithm EAGLE3 "
        "--speculative-draft-model-path d --speculative-num-steps 3 --speculative-eagle-topk 4 "
        "--speculative-num-draft-tokens 8 --speculative-draft-model-quantization unquant --host 127.0.0.1 "
        "--port 30000 --dtype float32 --disable-custom-all-reduce"
    )
    linked = {**sglang, "peer_to_peer": True, "pcie": True}
    cards = launched(tiny_recipe("m", "p", serve=linked), "org/model", "plain")
    assert "--enable-p2p-check" in cards.command
    assert cards.environment == {"SGLANG_ENABLE_PCIE_IPC_ALLREDUCE": "1"}
    gemma = launched(tiny_recipe("m", "p", serve=sglang), "google/gemma-3-1b-it", "draft")
    assert gemma.environment["SGLANG_EXTERNAL_MODEL_PACKAGE"] == "draftsmith_sglang"
    assert (Path(gemma.environment["PYTHONPATH"].split(":")[0]) / "draftsmith_sglang" / "gemma3.py").exists()
    assert '{"draftsmith_residual": true}' in gemma.command
    plain = launched(tiny_recipe("m", "p", serve=sglang), "google/gemma-3-1b-it", "plain")
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE" not in plain.environment
    chat = launched(tiny_recipe("m", "p"), "unsloth/gemma-3-1b-it", "draft")
    assert "--model-impl transformers" in str(chat)
    own = launched(tiny_recipe("m", "p", serve={"extra": "--model-impl vllm"}), "google/gemma-3-1b-it", "draft")
    assert "transformers" not in str(own)
    chain = launched(tiny_recipe("m", "p", serve={"context": 4096}), "org/model", "draft")
    assert chain.url == "http://127.0.0.1:8000"
    assert '{"method": "eagle3", "model": "d", "num_speculative_tokens": 3}' in chain.command
    sampled = launched(tiny_recipe("m", "p", serve={"draft_sampling": "sampled"}), "org/model", "draft")
    assert '"num_speculative_tokens": 3, "draft_sample_method": "probabilistic"}' in str(sampled)
    drawn = {"engine": "sglang", "draft_sampling": "sampled"}
    assert "--speculative-use-rejection-sampling" in launched(tiny_recipe("m", "p", serve=drawn), "m", "draft").command
    capture = launched(tiny_recipe("m", "p"), "org/model", "capture", (2, 31, 59, 62))
    assert any('"eagle_aux_hidden_state_layer_ids": [2, 31, 59, 62]' in part for part in capture.command)
    with pytest.raises(ServeError, match="3/4/8 is a tree, and vLLM drafts chains; give 3/1/4"):
        launched(tiny_recipe("m", "p", serve={"shape": "3/4/8"}), "org/model", "draft")


IN_FRONT = """
import http.server, json, os, sys, urllib.request
port = sys.argv[sys.argv.index("--port") + 1]
with open(sys.argv[1], "a") as notes:
    notes.write(os.environ.get("CUDA_VISIBLE_DEVICES", "all") + "\\n")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(None)
    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))
    def answer(self, body):
        content = b""
        if body and b'"max_tokens"' in body and b"prompt_logprobs" not in body:
            with open(sys.argv[1] + ".asked", "a") as notes:
                notes.write(f"{port} {json.loads(body)['max_tokens']}\\n")
        if self.path != "/health":
            with urllib.request.urlopen(urllib.request.Request(sys.argv[2] + self.path, body)) as answer:
                content = answer.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


def two_free_ports() -> int:
    while True:
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", one.getsockname()[1] + 1))
            return one.getsockname()[1]


def test_gpus_answer_by_vllm_where_it_is_installed(tmp_path, monkeypatch, capsys):
    """`auto` starts one server on each group of cards, and takes the target of this process off the card first."""
    model, notes, script = save_tiny_target(tmp_path / "model"), tmp_path / "notes", tmp_path / "engine.py"
    script.write_text(IN_FRONT)
    target = local_target(model)

    def run(program, directory, **changes):
        serve = {"program": program, "port": two_free_ports(), "tensor_parallel": 2}
        recipe = tiny_recipe(model, write_prompts(tmp_path / "p.jsonl"), device="auto", serve=serve, **changes)
        return Run(recipe, tmp_path / directory, ["test"])

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "a card")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6,7")
    with serving(FaultyServer(tiny_engine(target, model))) as (url,):
        served = run(f"{sys.executable} {script} {notes} {url}", "run")
        assert served.target is served.target
        for stage in ("prompts", "regenerate"):
            run_pipeline(served, stage)
        assert "target" not in served.__dict__
        assert sorted(notes.read_text().split()) == ["3,4", "5,6"]  # the fifth card makes no pair
        written = CompletionsSummary.load(served.files.completions / SUMMARY)
        assert written.completions == 14
        assert served.engine_of("evaluate") == "vllm"
        assert "regenerate: vLLM decodes; --regenerate.engine embedded" in capsys.readouterr().err
        before = Manifest.load(served.files.manifest).stages["regenerate"]
        changed = run(f"{sys.executable} {script} {notes} {url}", "run", **{"regenerate.engine": "embedded"})
        run_pipeline(changed, "regenerate")  # whoever answers: the answers stand
        assert Manifest.load(served.files.manifest).stages["regenerate"].seconds == before.seconds
    without = run("no-such-vllm serve", "without")
    assert (without.tell_engine("regenerate"), without.engine_of("evaluate")) == ("embedded", "embedded")
    assert "on one of 5 GPUs" in (told := capsys.readouterr().err)
    assert "--serve.program '/opt/vllm/bin/vllm serve'" in told
    one = run("sh", "one", **{"evaluate.engine": "embedded"})
    assert (one.tell_engine("regenerate"), one.tell_engine("evaluate")) == ("vllm", "embedded")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert run("no-such-vllm serve", "single").tell_engine("regenerate") == "embedded"
    assert "decodes on the GPU," in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run("sh", "none").tell_engine("regenerate") == "embedded"
    assert "GPUs" not in capsys.readouterr().err


def test_records_name_the_cards_that_a_run_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    monkeypatch.setattr(Run, "draft_for", lambda self, engine: tmp_path)
    every = ("card 0", "card 1", "card 2")
    for device, named, cards in (
        ("cpu", (), []),
        ("cuda:1", ("card 1",), ["6"]),
        ("cuda", every, ["5", "6", "7"]),
        ("auto", every, ["5", "6", "7"]),
    ):
        run = Run(tiny_recipe("m", "p", device=device), tmp_path, ["test"])
        assert run.created_with.hardware.gpus == named
        assert run.cards == cards
        alone = run.setup("vllm", tmp_path).groups  # of tune, which starts one server at a time
        assert alone == (cards if device == "cuda:1" else [])
    assert str(run.created_with.hardware.first(2)) == "card 0, card 1"
    assert run.created_with.hardware.first(None).gpus == every


def test_tune_times_what_evaluate_decodes_with(tmp_path, monkeypatch):
    asked = []

    def measured(run, engine, budget_s):
        asked.append(engine)
        raise InterruptedError

    monkeypatch.setattr("draftsmith.runs.tuning.tune", measured)
    for cards, flags in ((2, {}), (0, {}), (0, {"evaluate.engine": "sglang"})):
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
        recipe = tiny_recipe("m", "p", device="auto", serve={"program": "sh"}, **flags)
        with pytest.raises(InterruptedError):
            Tune(recipe=tmp_path)(Run(recipe, tmp_path, ["test"]))
    assert asked == ["vllm", "embedded", "sglang"]


def test_a_recorded_command_can_be_typed_again(tmp_path):
    typed = ["draftsmith", "evaluate", "r.yaml", "--serve.program", "env A=1 /opt/vllm serve", "--serve.extra=--x 1"]
    assert shlex.split(Run(tiny_recipe("m", "p"), tmp_path, typed).created_with.command) == typed


def test_evaluation_asks_servers_on_all_cards_and_times_one(tmp_path):
    model, notes, script = save_tiny_target(tmp_path / "model"), tmp_path / "notes", tmp_path / "engine.py"
    script.write_text(IN_FRONT)
    engine = tiny_engine(local_target(model), model)
    with serving(FaultyServer(drafting(engine))) as (url,):
        serve = {"program": f"{sys.executable} {script} {notes} {url}", "port": (first := two_free_ports())}
        prompts = write_prompts(tmp_path / "p.jsonl", 20)
        asked = {"evaluate.temperatures": [0.0], "evaluate.speed_prompts": 4, "evaluate.batches": [4], "serve": serve}
        recipe = tiny_recipe(model, prompts, **asked)
        rows = tmp_path / "rows.jsonl"
        write_rows(
            rows,
            [
                Prompt(id=str(i), category="c", source="s", messages=[{"role": "user", "content": WORDS[i]}])
                for i in range(12)
            ],
        )
        setup = Setup(recipe, tmp_path / "no-draft", tmp_path, groups=["0", "1"])
        results = Evaluation(SERVERS["vllm"], setup, rows, tmp_path).run(Run(recipe, tmp_path, ["test"]).created_with)
    cards = notes.read_text().split()  # of the target alone, then with the draft; two servers load side by side
    assert [sorted(cards[:2]), sorted(cards[2:])] == [["0", "1"], ["0", "1"]]
    lines = [tuple(map(int, line.split())) for line in notes.with_suffix(".asked").read_text().splitlines()]
    assert {port for port, length in lines if length == recipe.evaluate.max_new_tokens} == {first, first + 1}
    assert {port for port, length in lines if length in (1, 8)} == {first}  # before what is timed
    assert results.speed[0].batch == 4
    assert results.settings.speed_gpus == recipe.serve.tensor_parallel


def test_addresses_and_secrets_stand_in_commands_as_shells_and_urls_have_them(monkeypatch):
    for host, wanted in {
        "::1": "http://[::1]:8000",
        "[::]": "http://[::1]:8000",
        "0.0.0.0": "http://127.0.0.1:8000",
        "node-a": "http://node-a:8000",
    }.items():
        started = launched(tiny_recipe("m", "p", serve={"host": host}), "m", "plain")
        assert started.url == wanted
        assert started.command[started.command.index("--host") + 1] == host.strip("[]")
    monkeypatch.setenv("OUR_KEY", "sk-secret")
    keyed = launched(tiny_recipe("m", "p", serve={"extra": "--api-key $OUR_KEY --hf-token=$OTHER"}), "m", "plain")
    assert str(keyed).endswith('--api-key "$OUR_KEY" --hf-token="$OTHER"')
    with pytest.raises(ServeError, match=r"serve\.extra: \$OTHER is not set"), running(keyed, 5):
        pass
