"""Secrets in URLs, flags and variables: refused where a file would keep them, masked where a line could show them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import local_target, save_tiny_target, tiny_recipe, write_prompts
from servers import ENGINE, FaultyServer, serving, tiny_engine

from draftsmith.core import secrets
from draftsmith.core.errors import DraftsmithError, RecipeError
from draftsmith.core.recipe_file import dump_recipe, load_recipe, parse_recipe
from draftsmith.engines import SERVERS
from draftsmith.engines.process import running

SECRET = "hunter2-Xyz"
FLAGS = ["--api-key", "--api_key", "--admin-api-key", "--hf-token", "--hf_token", "--token", "--ssl-keyfile-password"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Directory with a tiny target, prompts and a recipe that runs."""
    out = tmp_path_factory.mktemp("world")
    recipe = tiny_recipe(save_tiny_target(out / "model"), write_prompts(out / "prompts.jsonl"))
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    return out


def command(world, *arguments, **environment):
    words = [sys.executable, "-m", "draftsmith", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(words, capture_output=True, text=True, cwd=world, env=environment, timeout=600)


def assert_nowhere(secret, root, *texts):
    for text in texts:
        assert secret not in text
    for path in root.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


def refused_values():
    url = f"http://user:{SECRET}@127.0.0.1:8000"
    for key in ("server.urls", "server.last_urls"):
        yield key, [url]
        yield key, url  # of the wrong type, too
        yield key, [f"https://{SECRET}@host"]
    for key in ("evaluate.url", "evaluate.plain_url", "target.model", "target.revision", "card.author", "serve.host"):
        yield key, url
    yield "prompts.sources", [{"name": url}]
    yield "server.api_key_env", f"sk-{SECRET}"
    for flag in FLAGS:
        yield "serve.extra", f"--port 1 {flag} {SECRET} --x"
        yield "serve.extra", f"{flag}={SECRET}"
        yield "serve.extra", f"{flag} '{SECRET}'"
        yield "serve.program", f"vllm serve {flag} {SECRET}"
    yield "serve.extra", f"--api-key $ONE {SECRET}"
    yield "serve.extra", ["--api-key", SECRET]
    yield "serve.extra", {"--api-key": SECRET}
    yield "serve.program", f"env VLLM_API_KEY={SECRET} vllm serve"
    yield "serve.program", f"env HF_TOKEN='{SECRET}' vllm serve"


def test_a_recipe_that_holds_a_secret_is_refused_in_one_line_without_it(tmp_path, attacks):
    cases = list(refused_values())
    attacks(len(cases))
    for key, value in cases:
        values = {"name": "x", "target": {"model": "m"}}
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
        with pytest.raises(RecipeError) as caught:
            parse_recipe(values, "r.yaml")
        assert SECRET not in str(caught.value), (key, value)
        assert str(caught.value).isprintable()
        assert parents[0] in str(caught.value)
    with pytest.raises(RecipeError, match="No closing quotation"):
        parse_recipe({"name": "x", "target": {"model": "m"}, "serve": {"extra": "--flag 'x"}}, "r.yaml")


@pytest.mark.parametrize(
    "flags",
    [
        ["--server.urls", f"http://user:{SECRET}@127.0.0.1:8000"],
        ["--evaluate.url", f"http://user:{SECRET}@127.0.0.1:8000"],
        [f"--serve.extra=--api-key {SECRET}"],
        [f"--serve.extra=--api-key={SECRET}"],
        ["--api-key", SECRET],
        [f"--token={SECRET}"],
        ["--hf-token", SECRET],
        ["--server.api-key-env", f"sk-{SECRET}"],
    ],
)
def test_a_command_that_holds_a_secret_writes_nothing(world, tmp_path, flags):
    done = command(world, "run", "recipe.yaml", "--out", tmp_path / "run", *flags)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert_nowhere(SECRET, tmp_path, done.stdout, done.stderr)


def test_no_file_of_a_run_and_no_line_holds_a_key(world, tmp_path):
    """A run whose servers want a key, say it back in their errors, and whose engine tells its own command line."""
    target = local_target(world / "model")
    honest, seen = tiny_engine(target, str(world / "model")), []

    def telling(path, body, request):
        seen.append(path)
        if len(seen) % 9 == 0:
            return 503, {"error": f"who is {SECRET}?"}
        return honest(path, body, request)

    out = tmp_path / "run"
    flags = ["--target.engine", "vllm", "--server.api-key-env", "OUR_KEY", "--server.backoff-s", "0.01"]
    flags += ["--serve.extra=--api-key $OUR_KEY", "--regenerate.max-new-tokens", "8", "--out", out]
    server = FaultyServer(telling)
    with serving(server) as (url,):
        for stage in ("prompts", "regenerate", "vocab"):
            done = command(
                world, stage, "recipe.yaml", "--server.urls", url, *flags, OUR_KEY=SECRET, HF_TOKEN="hf_" + SECRET
            )
            assert done.returncode == 0, done.stderr
            assert_nowhere(SECRET, out, done.stdout, done.stderr)
        assert f"Bearer {SECRET}" in server.keys
        server.answer = lambda *_: (401, {"error": f"bad key {SECRET}"})
        flags += ["--regenerate.temperature", "0.5"]
        done = command(world, "regenerate", "recipe.yaml", "--server.urls", url, *flags, OUR_KEY=SECRET)
        assert done.returncode == 2
        assert "bad key ***" in done.stderr
        assert_nowhere(SECRET, out, done.stdout, done.stderr)
    manifest = json.loads((out / "manifest.json").read_text())
    assert "$OUR_KEY" in manifest["stages"]["vocab"]["command"]
    # The same recipe is read again, and its command line is one for a shell that has the key.
    assert load_recipe(out / "recipe.yaml").serve.extra == "--api-key $OUR_KEY"
    done = command(world, "serve", out / "recipe.yaml", "--purpose", "plain", "--print", OUR_KEY=SECRET)
    assert done.stdout.rstrip().endswith('--api-key "$OUR_KEY"')


def test_a_whole_run_with_its_report_and_card_holds_no_secret(world, tmp_path):
    out = tmp_path / "run"
    extra = [
        "--serve.extra=--api-key $OUR_KEY --hf-token=$HF_TOKEN",
        "--card.base-model",
        "a/b",
        "--card.licence",
        "mit",
    ]
    done = command(
        world, "run", "recipe.yaml", "--out", out, *extra, OUR_KEY=SECRET, HF_TOKEN=SECRET, DRAFTSMITH_API_KEY=SECRET
    )
    assert done.returncode == 0, done.stderr
    assert (out / "export" / "draft" / "README.md").exists()
    assert_nowhere(SECRET, out, done.stdout, done.stderr)
    assert '--api-key "$OUR_KEY" --hf-token="$HF_TOKEN"' in done.stdout


def test_an_engine_is_given_its_key_and_its_log_is_not(tmp_path, monkeypatch):
    (tmp_path / "engine.py").write_text(ENGINE)
    program = f"{sys.executable} {tmp_path / 'engine.py'} {tmp_path / 'pids'}"
    serve = {"program": program, "extra": "--api-key $OUR_KEY --hf-token=${OTHER}", "port": 47113}
    launched = SERVERS["vllm"].launch(tiny_recipe("m", "p", serve=serve), "m", Path("d"), "plain", ())
    monkeypatch.setenv("OUR_KEY", SECRET)
    with pytest.raises(DraftsmithError, match=r"serve\.extra: \$OTHER is not set"), running(launched, 20):
        pass
    monkeypatch.setenv("OTHER", f"{SECRET}-2")
    log = tmp_path / "engine.log"
    with running(launched, 20, log) as process:
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode().split("\0")
    assert f"--hf-token={SECRET}-2" in words
    assert words[words.index("--api-key") + 1] == SECRET
    assert "'--api-key', '***'" in log.read_text()
    assert_nowhere(SECRET, tmp_path, str(launched))


WORD = st.text("abcdefgh0123456789._-+!#%", min_size=4, max_size=12).filter(lambda w: not w.startswith("-"))


def test_whatever_stands_around_a_secret_it_is_masked(attacks, monkeypatch):
    attacks(300)
    flag = st.sampled_from(FLAGS)

    @settings(max_examples=300, derandomize=True, deadline=None, database=None)
    @given(WORD.map(lambda w: f"S3{w}"), flag, st.sampled_from(["=", " ", "  ", "', '", '", "']), WORD)
    def every(secret, flag, between, other):
        monkeypatch.setenv("HF_TOKEN", f"{secret}+value")
        for text in (
            f"{other} {flag}{between}{secret} {other}",
            f"http://{other}:{secret}@{other}:8000/{other}",
            f"{other}{secret}+value{other}",
        ):
            assert secret not in secrets.masked(text), text
        for kept in (f"--train.pack-tokens {secret}", f"--tokenizer {secret}", f"http://h:80/{secret}", f"a@{secret}"):
            assert secrets.masked(kept) == kept

    every()


def test_what_users_write_down_is_left_as_it_is(world):
    """No false alarm: every recipe that comes along, and flags that only look like secrets."""
    for path in Path(__file__).parents[2].glob("recipes/*.yaml"):
        load_recipe(path)
    extra = "--max-num-batched-tokens 4096 --tokenizer-mode slow --served-model-name key=value"
    values = yaml.safe_load((world / "recipe.yaml").read_text()) | {"serve": {"extra": extra}}
    assert parse_recipe(values, "r").serve.extra == extra
