"""Stand-ins that speak like vLLM and SGLang, and the faults that real servers do not show on demand."""

import contextlib
import itertools
import json
import socket
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from models import tiny_recipe
from safetensors.torch import save_file

from draftsmith.decoding.sampling import Sampling
from draftsmith.targets.local import LocalTarget

CONTEXT = 200
# Of path, body and request id: a status and JSON, or the bytes of a whole response as they are.
Answer = Callable[[str, dict, str], tuple[int, dict] | bytes]

# A program that is started as an engine is: it listens where it is told to, tells its own command line as engines do,
# and has a worker that outlives it if it can.
ENGINE = """
import http.server, os, signal, socket, subprocess, sys
host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
print("engine log line", sys.argv, flush=True)
if "--crash" in sys.argv:
    sys.exit(3)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(f"{os.getpid()} {worker.pid}")
if "--stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
http.server.HTTPServer((host, int(port)), Health).serve_forever()
"""


class FaultyServer(ThreadingHTTPServer):
    """Answers requests, except where `fault(n)` of the n-th POST for text names one: an HTTP status, `drop`
    (connection closed in mid-answer), `torn` (half of the JSON), `abort` (the engine gave up and says so) or `late`
    (`late_s` seconds too late)."""

    daemon_threads = True

    def __init__(
        self,
        answer: Answer,
        fault: Callable[[int], int | str | None] = lambda n: None,
        late_s: float = 1.0,
        host: str = "127.0.0.1",
    ):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), _Handler)
        self.answer, self.fault, self.late_s = answer, fault, late_s
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.counting = threading.Lock()
        self.dead = False

    @property
    def url(self) -> str:
        host, port, *_ = self.server_address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def handle_error(self, request, client_address):
        """A client that went away is part of the play."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve({})

    def do_POST(self):
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body: dict) -> None:
        fault = None
        self.server.keys.append(self.headers["Authorization"])
        if self.path in ("/v1/completions", "/generate") and "prompt_logprobs" not in str(body):
            with self.server.counting:
                self.server.asked.append(body)
                fault = self.server.fault(len(self.server.asked))
        if self.server.dead:
            self.close_connection = True
            self.connection.close()
            return
        made = (
            (fault, {"error": "made up"})
            if isinstance(fault, int)
            else self.server.answer(self.path, body, self.headers.get("X-Request-Id", ""))
        )
        if isinstance(made, bytes):
            self.wfile.write(made)
            self.close_connection = True
            return
        status, answer = made
        content = json.dumps(answer).encode()
        if fault == "abort":  # as vLLM and SGLang end what they had in flight when they are told to stop
            content = content.replace(b'"length"', b'"abort"').replace(b'"stop"', b'"abort"')
        if fault == "late":
            time.sleep(self.server.late_s)
        if fault == "torn":
            content = content[: len(content) // 2]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:10] if fault == "drop" else content)
        self.close_connection = fault == "drop"


@contextlib.contextmanager
def serving(*servers: FaultyServer) -> Iterator[list[str]]:
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield [server.url for server in servers]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def forward(url: str) -> Answer:
    """Answers of a real server, for faults between it and us."""

    def answer(path: str, body: dict, name: str) -> tuple[int, dict]:
        data = json.dumps(body).encode() if body else None
        headers = {"Content-Type": "application/json"} | ({"X-Request-Id": name} if name else {})
        request = urllib.request.Request(url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    return answer


def tiny_engine(target: LocalTarget, name: str, keep: tuple[Path, tuple[int, ...]] | None = None) -> Answer:
    """Answers of a tiny target in both engines' words; with `keep` it writes hidden states as vLLM's connector does."""
    one_at_a_time = threading.Lock()

    def states(ids: list[int], name: str) -> dict:
        folder, taps = keep
        raw = []
        hook = target.decoder.layers[-1].register_forward_hook(lambda _m, _a, out: raw.append(out))
        kept = target.capture([ids], taps).taps_TKH
        hook.remove()
        path = folder / f"cmpl-{name or uuid.uuid4().hex}-0.safetensors"
        path.with_name(f"{path.name}.lock").touch()
        hidden = torch.cat([kept, raw[0][0][:, None]], 1)
        save_file({"hidden_states": hidden.contiguous(), "token_ids": torch.tensor(ids)}, path)
        return {"kv_transfer_params": {"hidden_states_path": str(path)}}

    def logprobs(ids: list[int]) -> list[float]:
        logits = target.logits(target.capture([ids], ()).last_TH).float().log_softmax(-1)
        return [logits[i, token].item() for i, token in enumerate(ids[1:])]

    def write(ids: list[int], settings: dict, length: int, seed: int) -> tuple[list[int], str]:
        sampling = Sampling(settings["temperature"], settings.get("top_p", 1.0), max(0, settings.get("top_k", 0)))
        ((_, generation),) = target.generate([ids], sampling, length, tuple(settings.get("stop", ())), seed)
        return generation.ids, "length" if generation.finish_reason == "length" else "stop"

    def answer(path: str, body: dict, request_id: str) -> tuple[int, dict]:
        with one_at_a_time, torch.inference_mode():
            if path == "/v1/models":
                return 200, {"data": [{"id": name, "root": name, "max_model_len": CONTEXT}]}
            if path == "/server_info":  # of a stock SGLang
                return 200, {"json_model_override_args": "{}"}
            if path == "/tokenize":
                return 200, {"tokens": target.tokenizer(body["prompt"]).input_ids}
            ids = body.get("prompt") or body["input_ids"]
            if len(ids) > CONTEXT:
                return 400, {"message": f"this model's maximum context length is {CONTEXT} tokens"}
            if path == "/v1/completions" and "prompt_logprobs" in body:
                rows = [{str(t): {"logprob": x}} for t, x in zip(ids[1:], logprobs(ids), strict=True)]
                return 200, {"choices": [{"prompt_token_ids": ids, "prompt_logprobs": [None, *rows]}]}
            if path == "/v1/completions":
                written, reason = write(ids, body, body["max_tokens"], body.get("seed", 0))
                kept = states(ids, request_id) if keep else {}
                choice = {"token_ids": written, "finish_reason": reason}
                return 200, {"choices": [choice], **kept}
            settings = body["sampling_params"]
            if body.get("return_logprob"):
                rows = [[x, t, None] for t, x in zip(ids[1:], logprobs(ids), strict=True)]
                return 200, {"meta_info": {"input_token_logprobs": [[None, ids[0], None], *rows]}}
            written, reason = write(ids, settings, settings["max_new_tokens"], settings.get("sampling_seed", 0))
            return 200, {"output_ids": written, "meta_info": {"finish_reason": {"type": reason}}}

    return answer


def steps_of(length, depth=3):
    """Accepted draft tokens of every step of a made-up draft, whose chains are right for 3, 0 and 1 tokens in turn."""
    steps, left = [], length - 1  # the first token is the prompt's
    for right in itertools.cycle((depth, 0, 1)):
        if left <= 0:
            return steps
        steps.append(min(right, left - 1))
        left -= steps[-1] + 1


def drafting(engine, changed=lambda ids: ids):
    """A stand-in that drafts, told as vLLM and SGLang tell it; `changed`: what becomes of its answers."""

    def answer(path, body, name):
        status, told = engine(path, body, name)
        if "choices" in told and "prompt_logprobs" not in body:
            choice = told["choices"][0]
            choice["token_ids"] = changed(choice["token_ids"])
            steps = steps_of(len(choice["token_ids"]))
            told["metrics"] = {"speculative_decoding": {"per_step_accepted": steps}}
        if "output_ids" in told:
            told["output_ids"] = changed(told["output_ids"])
            steps = steps_of(len(told["output_ids"]))
            told["meta_info"]["spec_correct_drafts_histogram"] = [steps.count(n) for n in range(4)]
        return status, told

    return answer


def recipe_for(model, urls, engine="vllm", **changes):
    server = {"urls": urls, "concurrency": 3, "deadline_s": 5.0, "attempts": 6, "backoff_s": 0.01, **changes}
    return tiny_recipe(model, "unused", **{"target.engine": engine, "server": server, "regenerate.max_new_tokens": 12})
