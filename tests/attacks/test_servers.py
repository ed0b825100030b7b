"""Servers that answer nonsense, never end, want a key, or stand behind proxies and certificates."""

import contextlib
import copy
import functools
import gzip
import json
import os
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import tiny_recipe
from servers import ENGINE, FaultyServer, serving, tiny_engine

from draftsmith.core.errors import DraftsmithError, ServeError, TargetError
from draftsmith.core.shape import Shape
from draftsmith.decoding.sampling import Sampling
from draftsmith.engines import SERVERS
from draftsmith.engines.pool import Pool, _pause_asked_for
from draftsmith.engines.process import running
from draftsmith.engines.served import ServedTarget
from draftsmith.runs.probing import probe_server
from draftsmith.runs.run import Run

ONE_AT_A_TIME = threading.Lock()
TAPS, PROMPT, LENGTH, VOCABULARY = (1, 3, 4), [1, 5, 9], 3, 64


def recipe_for(model, urls, engine="vllm", **changes):
    server = {"urls": urls, "concurrency": 3, "deadline_s": 2.0, "attempts": 1, "backoff_s": 0.01, **changes}
    return tiny_recipe(model, "unused", **{"target.engine": engine, "server": server})


@contextlib.contextmanager
def asked(model, urls, engine="vllm", **changes):
    """The target behind servers."""
    recipe = recipe_for(model, urls, engine, **changes)
    with contextlib.closing(ServedTarget(recipe.target, recipe.server, SERVERS[engine], "cpu")) as served:
        yield served


def write(served):
    return dict(served.generate([PROMPT], Sampling(), LENGTH))[0]


def kind(path, body):
    """What a request is for."""
    if path in ("/v1/models", "/tokenize"):
        return path
    if "prompt_logprobs" in body or body.get("return_logprob"):
        return "probe"
    length = body.get("max_tokens") or body["sampling_params"]["max_new_tokens"]
    return "completion" if length == LENGTH else "capture"


KINDS = ("/v1/models", "/tokenize", "probe", "completion", "capture")


def honest_engine(target, name, keep=None):
    """`tiny_engine` that computes everything once; as SGLang it returns taps, or with `keep` "last" the last states."""
    plain = tiny_engine(target, name)
    stored = tiny_engine(target, name, (keep, TAPS)) if isinstance(keep, Path) else plain

    @functools.cache
    def known(path, text):
        body = json.loads(text)
        status, answer = plain(path, body, "")
        if body.get("return_hidden_states"):
            states = target.capture([body["input_ids"]], TAPS)
            rows = states.last_TH if keep == "last" else states.taps_TKH.flatten(1)
            answer["meta_info"]["hidden_states"] = [rows.tolist()]
        return status, answer

    def answer(path, body, request):
        with ONE_AT_A_TIME:  # the target is one
            if path == "/v1/completions" and keep and "prompt_logprobs" not in body:
                return stored(path, body, request)
            return copy.deepcopy(known(path, json.dumps(body)))

    return answer


# --- nonsense -----------------------------------------------------------------------------------------------------


def places(value, path=()):
    """Paths to every part of a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*path, key))


def replaced(answer, where, change):
    """The answer with `change` of the part at one of its places."""
    found = list(places(answer))
    *parents, last = ("answer", *found[where % len(found)])
    whole = {"answer": answer}
    place = functools.reduce(lambda part, key: part[key], parents, whole)
    place[last] = change(place[last])
    return whole["answer"]


def response(content, *headers, status=200, length=None):
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content) if length is None else length}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + content


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["\n\x1b[31m", "../../../etc/passwd", "/dev/zero", "x\0y", "9" * 400, "draftsmith-.safetensors"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
CHANGES = st.one_of(
    st.tuples(st.just("part"), st.integers(0, 10**6), VALUES),
    st.tuples(st.just("part"), st.integers(0, 10**6), VALUES),
    st.tuples(st.just("many"), st.integers(0, 10**6), st.integers(2, 3000)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.none()),
    st.tuples(st.just("body"), st.binary(max_size=40) | st.sampled_from([b"[" * 10**5, b"NaN", b"1e999"]), st.none()),
    st.tuples(st.just("packed"), st.sampled_from(["gzip", "deflate", "gzip, gzip", "br", "zstd", "x"]), st.booleans()),
    st.tuples(st.just("status"), st.sampled_from([201, 204, 301, 400, 401, 404, 429, 500, 503, 599]), VALUES),
    st.tuples(st.just("head"), st.binary(max_size=40) | st.just(b"HTTP/1.1 200 OK\r\n" * 3), st.none()),
    st.tuples(st.just("length"), st.integers(-5, 10**12), st.none()),
)


def spoiled(answer, change):
    what, a, b = change
    text = json.dumps(answer).encode()
    if what == "part":
        return response(json.dumps(replaced(answer, a, lambda _: b)).encode())
    if what == "many":
        return response(json.dumps(replaced(answer, a, lambda old: [old] * b)).encode())
    if what == "cut":
        return response(text[: int(a * len(text))])
    if what == "body":
        return response(a)
    if what == "packed":
        return response(gzip.compress(text) if b else text, f"Content-Encoding: {a}")
    if what == "status":
        return response(json.dumps(b).encode(), "Location: http://127.0.0.1:9/", "Retry-After: 99999", status=a)
    return a if what == "head" else response(text, length=a)


def test_a_thousand_nonsensical_answers_end_in_a_line_or_in_what_is_right(model, target, tmp_path, attacks, capfd):
    """No other exception, no wait, nothing kept that is no token of the vocabulary, nobody's file deleted."""
    attacks(1000)
    now = {}

    def fuzzed(honest):
        def answer(path, body, request):
            status, told = honest(path, body, request)
            return spoiled(told, now["change"]) if kind(path, body) == now["kind"] else (status, told)

        return answer

    (tmp_path / "states").mkdir()
    servers = [
        FaultyServer(fuzzed(honest_engine(target, model, tmp_path / "states"))),
        FaultyServer(fuzzed(honest_engine(target, model, "taps"))),
        FaultyServer(honest_engine(target, model, "last")),
    ]
    wanted, ends = target.capture([PROMPT], TAPS), {"right": 0, "line": 0}
    told = []
    with (
        serving(*servers) as (vllm, sglang, last),
        asked(model, [vllm]) as one,
        asked(model, [sglang], "sglang", last_urls=[last]) as two,
    ):
        groups = {"vllm": one, "sglang": two}

        def attack(engine, wrong, change, capture=False):
            served = groups[engine]
            now.update(kind=wrong, change=change)
            served.pool.close()
            served.pool = Pool(served.settings, served._identify)
            served.identity_logprobs.clear()
            served._proven, started = False, time.monotonic()
            try:
                if capture:
                    states = served.capture([PROMPT], TAPS)
                    assert states.taps_TKH.shape == wanted.taps_TKH.shape
                    assert states.last_TH.shape == wanted.last_TH.shape
                else:
                    written = write(served)
                    assert len(written.ids) <= LENGTH
                    assert all(type(token) is int and 0 <= token < VOCABULARY for token in written.ids)
                ends["right"] += 1
            except DraftsmithError as error:
                ends["line"] += 1
                told.append(str(error))
            assert time.monotonic() - started < 5

        for engine in groups:
            attack(engine, "nothing", None)
            attack(engine, "nothing", None, capture=True)
        assert ends == {"right": 4, "line": 0}

        @settings(
            max_examples=1000,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.sampled_from(["vllm", "sglang"]), st.sampled_from(KINDS), CHANGES)
        def every(engine, wrong, change):
            attack(engine, wrong, change, wrong == "capture")

        every()
    assert ends["right"] > 20
    assert ends["line"] > 500
    assert [line for line in told if not line.isprintable() or len(line) > 2500] == []
    assert "Traceback" not in capfd.readouterr().err


def endless(piece, pause_s=0.0):
    """A server whose answer has no end."""

    class Endless(FaultyServer):
        def finish_request(self, request, client_address):
            with contextlib.suppress(OSError):
                request.recv(65536)
                request.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                while True:
                    request.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                    time.sleep(pause_s)

    return Endless(None)


@pytest.mark.parametrize("what", ["flood", "drip", "bomb", "bomb in a bomb"])
def test_an_answer_without_an_end_is_cut_off(model, what):
    zeros = gzip.compress(bytes(10**9 if what == "bomb" else 10**7), 9)
    packed = {
        "bomb": response(zeros, "Content-Encoding: gzip"),
        "bomb in a bomb": response(gzip.compress(gzip.compress(bytes(5 * 10**8))), "Content-Encoding: gzip, gzip"),
    }
    server = {
        "flood": lambda: endless(b"[" * 65536),
        "drip": lambda: endless(b" ", 0.05),
    }.get(what, lambda: FaultyServer(lambda *_: packed[what]))()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with (
        serving(server) as urls,
        asked(model, urls) as served,
        pytest.raises(TargetError, match=r"more than 64 MB|no answer within 2 s|no JSON"),
    ):
        write(served)
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KB


def test_a_histogram_of_more_steps_than_tokens_costs_an_attempt_and_no_memory(model, target):
    honest, seen = honest_engine(target, model), []

    def boasting(path, body, request):
        status, answer = honest(path, body, request)
        if kind(path, body) == "completion":
            seen.append(path)
            if len(seen) == 1:
                answer["meta_info"]["spec_correct_drafts_histogram"] = [10**12]
        return status, answer

    with serving(FaultyServer(boasting)) as urls, asked(model, urls, "sglang", attempts=3) as served:
        assert write(served).ids
    assert len(seen) == 2


def test_a_server_that_names_somebody_elses_file_has_it_neither_read_nor_deleted(model, target, tmp_path):
    precious = [tmp_path / "thesis.safetensors", tmp_path / "notes.txt"]
    honest = tiny_engine(target, model, (tmp_path, TAPS))
    for path in precious:
        path.write_text("years of work")
        path.with_name(f"{path.name}.lock").touch()

        def evil(route, body, request, path=path):
            status, answer = honest(route, body, request)
            if "kv_transfer_params" in answer:
                answer["kv_transfer_params"]["hidden_states_path"] = str(path)
            return status, answer

        with serving(FaultyServer(evil)) as urls, asked(model, urls) as served:
            for work in (write, lambda served: served.capture([PROMPT], TAPS)):
                with pytest.raises(TargetError, match=f"{path.name}, which is no file of our request"):
                    work(served)
        assert path.read_text() == "years of work"


# --- keys and pauses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("wrong", KINDS)
def test_a_missing_key_is_named_whatever_is_asked(model, target, tmp_path, monkeypatch, status, wrong):
    monkeypatch.setenv("OUR_KEY", "sk-very-secret")
    honest = honest_engine(target, model, tmp_path)

    def locked(path, body, request):
        refused = kind(path, body) == wrong
        return (status, {"error": "bad key 'sk-very-secret'"}) if refused else honest(path, body, request)

    with serving(FaultyServer(locked)) as urls:
        with (
            asked(model, urls, api_key_env="OUR_KEY") as served,
            pytest.raises(TargetError, match=rf"HTTP {status}: .*OUR_KEY \(server\.api_key_env\)") as caught,
        ):
            served.capture([PROMPT], TAPS) if wrong == "capture" else write(served)
        assert "sk-very-secret" not in str(caught.value)
        run = Run(recipe_for(model, [], api_key_env="OUR_KEY"), tmp_path / "run", ["test"])
        if wrong in ("/v1/models", "/tokenize", "probe"):
            with pytest.raises(TargetError, match=rf"^--url: .*HTTP {status}: .*\(server\.api_key_env\)"):
                probe_server(run, "vllm", urls[0], None, Shape(3, 1, 4))


def test_a_key_goes_to_servers_as_a_bearers_or_as_it_is(model, target, monkeypatch):
    server = FaultyServer(honest_engine(target, model))
    with serving(server) as urls:
        for value, wanted in {"abc-d": "Bearer abc-d", "Basic dTpw\n": "Basic dTpw", "": None}.items():
            monkeypatch.setenv("OUR_KEY", value)
            server.keys.clear()
            with asked(model, urls, api_key_env="OUR_KEY") as served:
                write(served)
            assert set(server.keys) == {wanted}
        monkeypatch.setenv("OUR_KEY", "two\nlines")
        with (
            asked(model, urls, api_key_env="OUR_KEY") as served,
            pytest.raises(TargetError, match="the key in OUR_KEY"),
        ):
            write(served)


PAUSES = {
    "5": 5,
    " 5 ": 5,
    "1.5": 1.5,
    "0": 0,
    "-3": 0,
    "99999": 60,
    "9" * 400: 60,
    "inf": 60,
    "nan": 0,
    "": 0,
    "soon": 0,
    "Fri, 31 Dec 9999 23:59:59 GMT": 60,
    "Wed, 21 Oct 2015 07:28:00 GMT": 0,
    "Wed, 99 Oct 99999 07:28:00 GMT": 0,
    "Thu, 01 Jan 1970 00:00:00 +9999999": 0,
    "\x00": 0,
}


def test_a_pause_is_read_from_seconds_dates_and_nonsense(attacks):
    attacks(len(PAUSES) + 1)
    assert {text: _pause_asked_for(text) for text in PAUSES} == PAUSES
    assert 25 < _pause_asked_for(formatdate(time.time() + 30, usegmt=True)) <= 30


@pytest.mark.parametrize("wrong", ["/v1/models", "completion"])
def test_a_pause_that_a_server_asks_for_is_kept(model, target, wrong):
    honest, times = honest_engine(target, model), []

    def busy(path, body, request):
        if kind(path, body) == wrong:
            times.append(time.monotonic())
            if len(times) == 1:
                return response(b"{}", "Retry-After: 1", status=429)
        return honest(path, body, request)

    with serving(FaultyServer(busy)) as urls, asked(model, urls, attempts=3) as served:
        if wrong == "/v1/models":  # nobody answers at first, which is told at once
            with pytest.raises(TargetError, match=r"no server answers; .*: HTTP 429"):
                write(served)
        else:
            write(served)
            assert 1 <= times[1] - times[0] < 3


# --- the way there ------------------------------------------------------------------------------------------------

BAD_URLS = [
    "",
    "localhost:8000",
    "127.0.0.1",
    "ftp://127.0.0.1",
    "http://",
    "http://:8000",
    "http://127.0.0.1:99999",
    "http://127.0.0.1:0",
    "http://127.0.0.1:x",
    "http://[::1:8000",
    "http://[zz]:8000",
    "http://127.0.0.1:8000?key=abc",
    "http://127.0.0.1:8000#x",
    "http://a b:8000",
    "http://127.0.0.1:8000/\x01",
    "http://" + "a" * 300 + ".example:8000",
    "http://\u2603.\u2603\u2603:8000",
    "http://..:8000",
]


def test_a_url_that_is_none_is_one_line(model, attacks):
    attacks(len(BAD_URLS))
    for url in BAD_URLS:
        with pytest.raises(DraftsmithError) as caught, asked(model, [url]) as served:
            write(served)
        assert str(caught.value).isprintable()
        assert "server.urls" in str(caught.value)


def free_port(host="127.0.0.1"):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        free.bind((host, 0))
        return free.getsockname()[1]


PROXIES = [f"{name}_proxy" for name in ("http", "https", "all")]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "::", "0.0.0.0"])
def test_an_engine_is_found_at_once_wherever_it_listens_and_whatever_proxy_is_set(tmp_path, monkeypatch, host):
    (tmp_path / "engine.py").write_text(ENGINE)
    program = f"{sys.executable} {tmp_path / 'engine.py'} {tmp_path / 'pids'}"
    serve = {"program": program, "host": host, "port": free_port("::1" if ":" in host else "127.0.0.1")}
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    launched = SERVERS["vllm"].launch(tiny_recipe("m", "p", serve=serve), "m", Path("d"), "plain", ())
    with running(launched, 60):
        assert time.time() - (tmp_path / "pids").stat().st_mtime < 5  # seconds since it listens
    wanted = {"::": "[::1]", "::1": "[::1]", "0.0.0.0": "127.0.0.1"}.get(host, host)
    assert launched.url == f"http://{wanted}:{serve['port']}"


def test_servers_next_door_are_asked_without_a_proxy(model, target, monkeypatch):
    catch_all = FaultyServer(lambda *_: (500, {}))
    with serving(FaultyServer(honest_engine(target, model)), catch_all) as (url, proxy):
        for name in PROXIES:
            monkeypatch.setenv(name, proxy)
            monkeypatch.setenv(name.upper(), proxy)
        with asked(model, [url]) as served:
            assert write(served).ids
    assert not catch_all.asked


def test_servers_have_addresses_of_either_kind(model, target):
    server = FaultyServer(honest_engine(target, model), host="::1")
    with serving(server) as (url,), asked(model, [f"{url}/"]) as served:
        assert url.startswith("http://[::1]:")
        assert write(served).ids


def test_a_port_that_is_taken_is_told_on_either_kind_of_address(tmp_path):
    for host, family in {"::1": socket.AF_INET6, "::": socket.AF_INET6, "127.0.0.1": socket.AF_INET}.items():
        with socket.socket(family) as taken:
            taken.bind(("::1" if ":" in host else host, 0))
            taken.listen()
            recipe = tiny_recipe("m", "p", serve={"program": "false", "host": host, "port": taken.getsockname()[1]})
            launched = SERVERS["vllm"].launch(recipe, "m", Path("d"), "plain", ())
            with (
                pytest.raises(ServeError, match=r"serve\.port: something already answers at http"),
                running(launched, 5),
            ):
                pass


# --- certificates -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key) of 127.0.0.1, its own authority."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    out = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=us -addext subjectAltName=IP:127.0.0.1"
    made = [*command.split(), "-keyout", str(out / "key.pem"), "-out", str(out / "ca.pem")]
    subprocess.run(made, check=True, capture_output=True)
    return out / "ca.pem", out / "key.pem"


@pytest.fixture
def secure(model, target, certificate):
    """URL of a server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = FaultyServer(honest_engine(target, model))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server) as (url,):
        yield url.replace("http", "https")


def test_a_private_authority_is_believed_where_it_is_given(model, secure, certificate):
    with asked(model, [secure], ca_file=str(certificate[0])) as served:
        assert write(served).ids


def test_what_is_wrong_with_certificates_is_one_line(model, secure, certificate, tmp_path, attacks):
    (tmp_path / "empty.pem").touch()
    (tmp_path / "text.pem").write_text("no certificate")
    os.mkfifo(tmp_path / "pipe.pem")
    wrong = {
        None: rf"server\.urls: {secure}: .*certificate.*server\.ca_file",
        "none.pem": r"server\.ca_file: .*none\.pem: ",
        "empty.pem": r"server\.ca_file: .*empty\.pem: .*; give the authority's PEM file",
        "text.pem": r"server\.ca_file: .*text\.pem: .*; give the authority's PEM file",
        "pipe.pem": r"server\.ca_file: .*pipe\.pem: is no file",
        ".": r"server\.ca_file: .*: is no file",
        str(certificate[1]): r"server\.ca_file: .*key\.pem: ",
    }
    attacks(len(wrong) + 1)
    for name, message in wrong.items():
        with (
            pytest.raises(TargetError, match=message) as caught,
            asked(model, [secure], ca_file=name and str(tmp_path / name)) as served,
        ):
            write(served)
        assert str(caught.value).isprintable()
    elsewhere = secure.replace("127.0.0.1", "localhost")  # which the certificate does not name
    with (
        pytest.raises(TargetError, match="certificate"),
        asked(model, [elsewhere], ca_file=str(certificate[0])) as served,
    ):
        write(served)


def test_an_engine_that_is_started_with_a_certificate_is_found(tmp_path, certificate):
    program = ENGINE.replace(
        "http.server.HTTPServer((host, int(port)), Health).serve_forever()",
        "import ssl; server = http.server.HTTPServer((host, int(port)), Health)\n"
        "context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n"
        "context.load_cert_chain(*(sys.argv[sys.argv.index(f) + 1] for f in ('--ssl-certfile', '--ssl-keyfile')))\n"
        "server.socket = context.wrap_socket(server.socket, server_side=True); server.serve_forever()",
    )
    (tmp_path / "engine.py").write_text(program)
    settings = {
        "program": f"{sys.executable} {tmp_path / 'engine.py'} {tmp_path / 'pids'}",
        "extra": f"--ssl-certfile {certificate[0]} --ssl-keyfile {certificate[1]}",
        "port": free_port(),
    }
    launched = SERVERS["vllm"].launch(tiny_recipe("m", "p", serve=settings), "m", Path("d"), "plain", ())
    assert launched.url == f"https://127.0.0.1:{settings['port']}"
    with running(launched, 20):
        pass
