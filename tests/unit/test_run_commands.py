"""probe, predict, tune, compare, card and publish on a tiny run, as a user types them."""

import base64
import http.server
import json
import re
import shutil
import sys
import threading

import pytest
from models import save_tiny_target, tiny_recipe, write_prompts

from draftsmith import cli
from draftsmith.errors import RecipeError
from draftsmith.files import read_json, write_json
from draftsmith.hardware import probe
from draftsmith.publishing.licences import data_licences, licence_of
from draftsmith.recipe import dump_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished tiny run, probed."""
    out = tmp_path_factory.mktemp("world")
    model = save_tiny_target(out / "model")
    recipe = tiny_recipe(model, write_prompts(out / "prompts.jsonl"))
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    patch = pytest.MonkeyPatch()
    patch.setattr(probe, "ROUNDS", 2)
    patch.setattr(probe, "WIDTHS", (1, 2, 3, 4, 8))
    patch.setattr(probe, "CONTEXT", 16)
    patch.setattr(probe, "LONG_CONTEXT", 48)
    patch.setattr(probe, "LOOP_TOKENS", 8)
    for command in ("run", "probe"):
        patch.setattr(sys, "argv", ["draftsmith", command, str(out / "recipe.yaml"), "--out", str(out / "run")])
        assert cli.main() == 0
    patch.undo()
    return out


def run(monkeypatch, capsys, world, command, *flags):
    arguments = [command, world / "recipe.yaml", "--out", world / "run", *flags]
    monkeypatch.setattr(sys, "argv", ["draftsmith", *map(str, arguments)])
    code = cli.main()
    return code, capsys.readouterr()


def test_predict_tells_of_the_probed_machine(monkeypatch, capsys, world):
    code, told = run(monkeypatch, capsys, world, "predict")
    assert code == 0, told.err
    result = read_json(world / "run" / "predict" / "probe.json")
    assert {row["batch"] for row in result["rows"]} == {1}
    assert result["sentence"] in told.out
    assert (world / "run" / "predict" / "probe.svg").read_text().lstrip().startswith("<?xml")


def test_predict_tells_of_a_named_machine_and_a_published_tau(monkeypatch, capsys, world):
    flags = ("--hardware", "h100-1", "--tau", "2.2", "--shape", "3/1/4", "--batches", "1", "64")
    code, told = run(monkeypatch, capsys, world, "predict", *flags)
    assert code == 0, told.err
    rows = read_json(world / "run" / "predict" / "h100-1.json")["rows"]
    assert [row["tau"] for row in rows if row["shape"] == "3/1/4"] == pytest.approx([2.2, 2.2], abs=1e-4)
    assert {row["batch"] for row in rows} == {1, 64}


def test_tune_measures_and_serve_takes_it(monkeypatch, capsys, world):
    code, told = run(monkeypatch, capsys, world, "tune", "--budget-s", "30")
    assert code == 0, told.err
    path = world / "run" / "tune-embedded.json"
    result = read_json(path)
    assert result["tried"]
    best = max(row["speedup"] for row in result["tried"])
    assert (result["shape"] is None) == (best < 1.02) or result["shape"] in {r["shape"] for r in result["tried"]}
    write_json(path, {**result, "shape": "5/4/16", "chain": "5/1/6"})
    _, served = run(monkeypatch, capsys, world, "serve", "--print")
    assert '"num_speculative_tokens": 5' in served.out
    _, served = run(monkeypatch, capsys, world, "serve", "--print", "--serve.engine", "sglang")
    assert "--speculative-num-draft-tokens 16" in served.out
    _, served = run(monkeypatch, capsys, world, "serve", "--print", "--serve.no-tuned")
    assert '"num_speculative_tokens": 3' in served.out
    asked = ("--serve.shape.steps", "2", "--serve.shape.draft-tokens", "3")
    _, served = run(monkeypatch, capsys, world, "serve", "--print", *asked)
    assert '"num_speculative_tokens": 2' in served.out
    write_json(path, {**result, "shape": None, "chain": None})
    _, served = run(monkeypatch, capsys, world, "serve", "--print")
    assert "nothing beat plain decoding" in served.err
    assert '"num_speculative_tokens": 3' in served.out


def test_compare_sets_drafts_side_by_side(monkeypatch, capsys, world):
    own = world / "run" / "export" / "draft"
    own = own if own.exists() else world / "run" / "export" / "sglang"
    shutil.copytree(own, world / "other", dirs_exist_ok=True)
    code, told = run(monkeypatch, capsys, world, "compare", "--drafts", world / "other")
    assert code == 0, told.err
    rows = read_json(world / "run" / "compare" / "compare.json")["drafts"]
    assert len(rows) == 2
    assert rows[0]["acceptance"][0]["all"] == rows[1]["acceptance"][0]["all"]  # the same draft twice
    assert 0 < rows[0]["coverage"] <= 1
    assert "M parameters" in told.out
    code, told = run(monkeypatch, capsys, world, "compare")
    assert code == 2
    assert "give others with --drafts" in told.err


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("predict", ("--hardware", "h200"), "--hardware: 'h200' given; a probe's JSON file or one of h100-nvlink-8"),
        ("predict", ("--tau", "9"), "--tau: 9 given; between 1 and"),
        ("predict", ("--tau", "2", "--shape", "3-1"), "--shape: '3-1' given; write steps/topk/draft_tokens"),
        ("predict", ("--batches", "0"), "--batches and --context: whole numbers of at least 1"),
        ("predict", ("--correlation", "2"), "--correlation: 2 given; between 0"),
        ("probe", ("--url", "http://127.0.0.1:9"), "--url: http://127.0.0.1:9 does not answer as vllm does"),
        ("publish", (), "publish: no repository given; set card.repo or give --repo owner/name"),
    ],
)
def test_wrong_input_is_one_line(monkeypatch, capsys, world, command, flags, message):
    code, told = run(monkeypatch, capsys, world, command, *flags)
    assert code == 2
    lines = [line for line in told.err.splitlines() if line.startswith("draftsmith: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_file_that_is_no_probe_is_refused(monkeypatch, capsys, world, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    code, told = run(monkeypatch, capsys, world, "predict", "--hardware", tmp_path / "x.json")
    assert code == 2
    assert "is not a probe" in told.err


# --- card ------------------------------------------------------------------------------------------------------------


def card_of(world):
    both = world / "run" / "export" / "draft" / "README.md"
    return (both if both.exists() else world / "run" / "export" / "README.md").read_text()


def values_in(value):
    """Every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in values_in(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_a_target_of_unknown_licence_gets_no_card(monkeypatch, capsys, world):
    code, told = run(monkeypatch, capsys, world, "card")
    assert code == 2
    assert "card.licence: the licence of" in told.err
    assert not list((world / "run" / "export").rglob("README.md"))
    code, told = run(monkeypatch, capsys, world, "run")
    assert code == 0
    assert "card:   none yet; card.licence" in told.out


def test_every_figure_of_the_card_is_in_the_results(monkeypatch, capsys, world):
    code, told = run(monkeypatch, capsys, world, "card", "--card.licence", "mit", "--card.repo", "me/draft")
    assert code == 0, told.err
    card = card_of(world)
    assert card.startswith("---\nbase_model: ")
    assert "license: mit\n" in card
    quality = card[card.index("## Measured quality") : card.index("## Before you deploy")]
    results = read_json(world / "run" / "evaluate" / "results.json")
    known = {f"{number:.{digits}f}" for number in values_in(results) for digits in (1, 2)}
    told_figures = re.findall(r"(?<![\w/.])\d+\.\d+", quality)
    assert len(told_figures) > 10
    assert [figure for figure in told_figures if figure not in known] == []


def test_a_partial_evaluation_is_marked(monkeypatch, capsys, world):
    path = world / "run" / "evaluate" / "results.json"
    whole = read_json(path)
    try:
        write_json(path, {**whole, "partial": True})
        code, _ = run(monkeypatch, capsys, world, "card", "--card.licence", "mit")
        assert code == 0
        told = f"{whole['settings']['prompts']} of {whole['settings']['prompts_available']} prompts"
        assert f"**A partial evaluation: {told}.**" in card_of(world)
    finally:
        write_json(path, whole)


@pytest.mark.parametrize(
    ("target", "identifier", "words"),
    [
        ("MiniMaxAI/MiniMax-M2.7", "other", "Built with MiniMax M2.7"),
        ("gemma3-270m", "gemma", "Gemma Terms of Use"),
        ("google/gemma-3-4b-it", "gemma", "ai.google.dev/gemma/terms"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1", "Built with Llama"),
        ("Qwen/Qwen3-8B", "apache-2.0", ""),
        ("deepseek-ai/DeepSeek-R1", "mit", ""),
    ],
)
def test_licences_are_inherited(target, identifier, words):
    licence = licence_of(target)
    assert licence.id == identifier
    assert words in " ".join(licence.notices)
    assert licence.commercial == (identifier != "other")


def test_the_minimax_card_names_its_terms():
    licence = licence_of("MiniMaxAI/MiniMax-M2.7")
    assert "api@minimax.io" in " ".join(licence.notices)
    with pytest.raises(RecipeError, match=r"card\.licence"):
        licence_of("somebody/some-model")
    assert licence_of("somebody/some-model", "mit").id == "mit"


def test_data_licences_are_listed_and_gaps_named():
    rows = data_licences(["gsm8k", "ours", "gsm8k"], {"ours": "cc0-1.0"})
    assert rows == [("gsm8k", "openai/gsm8k", "mit"), ("ours", "", "cc0-1.0")]
    assert "card.data_licences" in data_licences(["theirs"], {})[0][2]


# --- publish ---------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answers to one upload: create the repository, sort files by size, take a commit."""

    seen: list[tuple[str, str, bytes]]

    def _answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._answer({"id": "me/draft", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, self.headers.get("Authorization", ""), body))
        host = f"http://127.0.0.1:{self.server.server_port}"
        if self.path.endswith("/repos/create"):
            self._answer({"url": f"{host}/me/draft", "name": "me/draft", "id": "me/draft"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        else:
            self._answer({"commitUrl": f"{host}/me/draft/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_publish_says_what_it_would_do(monkeypatch, capsys, world, hub):
    assert run(monkeypatch, capsys, world, "card", "--card.licence", "mit")[0] == 0
    code, told = run(monkeypatch, capsys, world, "publish", "--repo", "me/draft")
    assert code == 0, told.err
    assert "would upload to me/draft" in told.out
    assert "model.safetensors" in told.out
    assert "stage.json" not in told.out
    assert hub.seen == []


def test_publish_uploads_the_draft_and_its_card(monkeypatch, capsys, world, hub):
    assert run(monkeypatch, capsys, world, "card", "--card.licence", "mit")[0] == 0
    monkeypatch.delenv("HF_TOKEN", raising=False)
    code, told = run(monkeypatch, capsys, world, "publish", "--repo", "me/draft", "--really")
    assert code == 2
    assert "HF_TOKEN is not set" in told.err
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, told = run(monkeypatch, capsys, world, "publish", "--repo", "me/draft", "--really")
    assert code == 0, told.err
    assert "uploaded to http://127.0.0.1" in told.out
    assert "hf_secret" not in told.out + told.err
    assert {authorisation for _, authorisation, _ in hub.seen} == {"Bearer hf_secret"}
    (commit,) = (body for path, _, body in hub.seen if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    root = world / "run" / "export"
    root = root / "draft" if (root / "draft").exists() else root
    assert "README.md" in sent
    assert all(content == (root / name).read_bytes() for name, content in sent.items())
    assert all(name.endswith(("README.md", "config.json", ".safetensors")) for name in sent)


@pytest.mark.parametrize("repo", ["draft", "a/b/c", "../x", "me/"])
def test_a_wrong_repository_is_one_line(monkeypatch, capsys, world, repo):
    code, told = run(monkeypatch, capsys, world, "publish", "--repo", repo)
    assert code == 2
    assert "write owner/name" in told.err
