"""The command that starts vLLM or SGLang for one of three purposes, and its life from start to stop.

draft     the target with our draft: what users run
plain     the target alone: answers for `regenerate`, the other side of a comparison
capture   the target keeping hidden states for `train` (vLLM's extract_hidden_states)
"""

import contextlib
import ctypes
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from draftsmith.errors import ServeError
from draftsmith.files import read_json
from draftsmith.progress import say
from draftsmith.recipe import Recipe
from draftsmith.targets.dialects import RESIDUAL

Engine = Literal["vllm", "sglang"]
Purpose = Literal["draft", "plain", "capture", "last"]
PROGRAMS = {"vllm": ("vllm", "serve"), "sglang": (sys.executable, "-m", "sglang.launch_server")}
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
SGLANG_MODELS = Path(__file__).parent / "sglang_models"
STOP_S = 30.0  # an engine is given this long to stop by itself
POLL_S = 0.5


@dataclass(frozen=True)
class Launch:
    """A command, what it adds to the environment, and where its server will answer."""

    command: tuple[str, ...]
    environment: dict[str, str]
    url: str

    def __str__(self) -> str:
        """A line for a shell."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.command)])


def launch(recipe: Recipe, model: str, draft: Path, purpose: Purpose, layers: Sequence[int]) -> Launch:
    """`model`: path or hub name; `draft`: directory of the engine; `layers`: taps and the last layer, for capture."""
    settings = recipe.serve
    arguments = (_vllm if settings.engine == "vllm" else _sglang)(recipe, model, draft, purpose, layers)
    program = shlex.split(settings.program) if settings.program else PROGRAMS[settings.engine]
    arguments += ["--host", settings.host, "--port", str(settings.port), "--dtype", DTYPES[recipe.target.dtype]]
    if recipe.target.revision:
        arguments += ["--revision", recipe.target.revision]
    if recipe.target.trust_remote_code:
        arguments += ["--trust-remote-code"]
    if recipe.target.template_options and settings.engine == "vllm":
        arguments += ["--default-chat-template-kwargs", json.dumps(recipe.target.template_options)]
    elif recipe.target.template_options:
        say(
            "serve: SGLang takes the chat template's options from each request: send chat_template_kwargs "
            + json.dumps(recipe.target.template_options)
        )
    environment: dict[str, str] = {}
    if settings.engine == "sglang" and purpose in ("draft", "capture") and is_gemma3(model):
        arguments += ["--json-model-override-args", json.dumps({RESIDUAL: True})]  # tells clients what runs here
        path = os.pathsep.join(filter(None, [str(SGLANG_MODELS), os.environ.get("PYTHONPATH")]))
        environment |= {"SGLANG_EXTERNAL_MODEL_PACKAGE": "draftsmith_sglang", "PYTHONPATH": path}
    if not settings.peer_to_peer:  # broken between PCIe cards more often than engines think
        arguments += ["--disable-custom-all-reduce"]
        environment["NCCL_P2P_DISABLE"] = "1"
    elif settings.engine == "sglang" and settings.tensor_parallel > 1:
        arguments += ["--enable-p2p-check"]  # SGLang takes for granted that it works
    if settings.pcie and settings.engine == "sglang":
        environment["SGLANG_ENABLE_PCIE_IPC_ALLREDUCE"] = "1"
    arguments += shlex.split(settings.extra)
    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    return Launch((*program, *arguments), environment, f"http://{host}:{settings.port}")


def is_gemma3(model: str) -> bool:
    """Whether engines need help with its taps (docs/engines.md); a hub name is not looked up."""
    config = Path(model) / "config.json"
    if config.exists():
        return read_json(config).get("model_type", "").startswith("gemma3")
    return re.search(r"gemma-?3", model, re.IGNORECASE) is not None


def _vllm(recipe: Recipe, model: str, draft: Path, purpose: Purpose, layers: Sequence[int]) -> list[str]:
    settings = recipe.serve
    arguments = [model, "--tensor-parallel-size", str(settings.tensor_parallel)]
    if settings.context:
        arguments += ["--max-model-len", str(settings.context)]
    if purpose == "draft":
        if settings.shape.topk != 1:
            raise ServeError(
                f"serve.shape: {settings.shape} is a tree, and vLLM drafts chains; give topk: 1, draft_tokens: "
                f"{settings.shape.steps + 1}"
            )
        speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": settings.shape.steps}
        arguments += ["--speculative-config", json.dumps(speculative)]
        arguments += ["--per-request-spec-decode-metrics", "detailed"]
    if purpose == "draft" and is_gemma3(model) and "--model-impl" not in settings.extra:
        arguments += ["--model-impl", "transformers"]  # vLLM's own Gemma-3 has no taps
    if purpose == "last":
        raise ServeError("serve: vLLM keeps the last layer beside the taps; use --purpose capture")
    if purpose == "capture":
        keep = {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}}
        speculative = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": keep}
        connector = {
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(settings.states)},
        }
        arguments += ["--no-enable-prefix-caching", "--speculative-config", json.dumps(speculative)]
        arguments += ["--kv-transfer-config", json.dumps(connector)]
    return arguments


def _sglang(recipe: Recipe, model: str, draft: Path, purpose: Purpose, layers: Sequence[int]) -> list[str]:
    settings = recipe.serve
    arguments = ["--model-path", model, "--tp-size", str(settings.tensor_parallel)]
    if settings.context:
        arguments += ["--context-length", str(settings.context)]
    if purpose == "draft":
        shape = settings.shape
        arguments += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft)]
        arguments += ["--speculative-num-steps", str(shape.steps), "--speculative-eagle-topk", str(shape.topk)]
        arguments += ["--speculative-num-draft-tokens", str(shape.draft_tokens)]
        if settings.draft_quantization != "inherit":
            arguments += ["--speculative-draft-model-quantization", "unquant"]
    if purpose == "capture":
        # An id names a layer whose output is captured: tap t is the output of layer t - 1.
        arguments += ["--enable-return-aux-hidden-states", "--speculative-algorithm", "EAGLE3"]
        arguments += ["--return-aux-hidden-state-layer-ids", *(str(tap - 1) for tap in layers[:-1])]
    if purpose == "last":
        arguments += ["--return-hidden-states-mode", "full"]
    if purpose in ("capture", "last"):
        arguments += ["--disable-radix-cache", "--chunked-prefill-size", "-1"]
    return arguments


@contextlib.contextmanager
def running(launched: Launch, patience_s: float, log: Path | None = None) -> Iterator[subprocess.Popen]:
    """The engine, healthy; its log goes to our own output or a file; stopped in every case, even if we are killed."""
    environment = {**os.environ, **launched.environment}
    _require_free(launched.url)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log else None
        try:
            process = subprocess.Popen(
                launched.command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop the engine in order
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise ServeError(
                f"serve.program: cannot start {launched.command[0]!r}: {error.strerror}; install the engine or "
                'name it, for example --serve.program "/opt/engine/bin/vllm serve"'
            ) from None
        try:
            _wait_until_healthy(process, launched.url, patience_s)
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """SIGTERM to the engine, and SIGKILL to all its processes if it does not go, or at a second Ctrl-C."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:
        with contextlib.suppress(ProcessLookupError):  # workers that outlived it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _require_free(url: str) -> None:
    """A server that is already there would answer in our engine's place."""
    place = urlsplit(url)
    with contextlib.suppress(OSError), socket.create_connection((place.hostname or "", place.port or 80), timeout=2):
        raise ServeError(f"serve.port: something already answers at {url}; stop it, or give another --serve.port")


def _die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_healthy(process: subprocess.Popen, url: str, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServeError(f"serve: the engine stopped with exit code {process.returncode}; its log says why")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
                if response.status == 200 and process.poll() is None:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass  # not up yet
        time.sleep(POLL_S)
    raise ServeError(
        f"serve.patience_s: the engine did not answer within {patience_s:g} s; give it more or see its log"
    )


def serve(launched: Launch, patience_s: float) -> int:
    """Run until the engine ends or Ctrl-C; returns the engine's exit code, 0 if we stopped it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    say(f"serve: {launched}")
    try:
        with running(launched, patience_s) as process:
            say(f"serve: ready at {launched.url}; Ctrl-C stops it")
            code = process.wait()
            say(f"serve: the engine ended with exit code {code}")
            return 0 if code == 0 else 1
    except KeyboardInterrupt:
        say("serve: stopped")
        return 0
