"""What goes to the hub, what never does, and what is refused before anything is asked."""

import base64
import http.server
import json
import threading

import pytest
from models import tiny_draft, tiny_target

from draftsmith.core.errors import CheckpointError, DataError, PublishError, RecipeError
from draftsmith.drafts.directories import write_draft
from draftsmith.publishing.publish import publish

TOKEN = "hf_secret"


class Hub(http.server.BaseHTTPRequestHandler):
    """Stands in for the hub during one upload; `server.status` other than 200 refuses everything."""

    def do_GET(self):
        self._answer({"id": "me/draft", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        if self.server.status != 200:
            self._answer({"error": "Invalid credentials in Authorization header"})
        elif self.path.endswith("/repos/create"):
            self._answer({"url": f"{self.server.url}/me/draft", "name": "me/draft", "id": "me/draft"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        else:
            self._answer({"commitUrl": f"{self.server.url}/me/draft/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.status, server.url = [], 200, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def make(tmp_path):
    """Makes a draft directory with a card and some files that have no business on the hub."""

    def made():
        draft, ids = tiny_draft(tiny_target())
        target = {"model": "tiny", "dtype": "fp32", "num_layers": 6}
        root = tmp_path / "export" / "draft"
        write_draft(root, draft, ids, 6, {"version": "0", "commit": None, "target": target})
        (root / "optimizer.pt").write_bytes(b"pickle")
        (root / ".env").write_text("HF_TOKEN=other")
        (root / "README.md").write_text("# card\n")
        (root.parent / "stage.json").write_text("{}")
        return root

    return made


def committed(hub):
    """{path: content} of the one commit."""
    (body,) = (body for path, _, body in hub.seen if "/commit/" in path)
    lines = [json.loads(line) for line in body.splitlines()]
    assert {line["key"] for line in lines} == {"header", "file"}
    return {f["value"]["path"]: base64.b64decode(f["value"]["content"]) for f in lines if f["key"] == "file"}


def test_a_dry_run_lists_the_files_and_asks_nobody(make, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    first, *lines = publish(make(), "me/draft", really=False).splitlines()
    assert first == "would upload to me/draft (private, if it is new; give --really to do it):"
    assert [line.split()[-1] for line in lines] == ["README.md", "config.json", "model.safetensors"]
    assert hub.seen == []


def test_exactly_the_draft_and_its_card_are_committed(make, hub):
    draft = make()
    told = publish(draft, "me/draft", really=True)
    assert told.startswith(f"uploaded to {hub.url}/me/draft/commit/")
    sent = committed(hub)
    assert set(sent) == {"README.md", "config.json", "model.safetensors"}
    assert all(content == (draft / name).read_bytes() for name, content in sent.items())
    assert {authorisation for _, authorisation, _ in hub.seen} == {f"Bearer {TOKEN}"}
    assert TOKEN not in told


def test_without_a_token_nothing_is_asked(make, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match="HF_TOKEN is not set"):
        publish(make(), "me/draft", really=True)
    assert hub.seen == []


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_refuses_is_one_line_without_the_token(make, hub, status):
    hub.status = status
    with pytest.raises(PublishError, match="me/draft was not uploaded: ") as refused:
        publish(make(), "me/draft", really=True)
    assert "\n" not in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert not [path for path, _, _ in hub.seen if "/commit/" in path]


def test_a_damaged_draft_never_leaves(make, hub):
    draft = make()
    config = draft / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "draft_vocab_size": 7}))
    with pytest.raises(CheckpointError, match="see: draftsmith inspect"):
        publish(draft, "me/draft", really=True)
    assert hub.seen == []


def test_a_draft_without_a_card_never_leaves(make, hub):
    draft = make()
    (draft / "README.md").unlink()
    with pytest.raises(DataError, match="run: draftsmith card RECIPE"):
        publish(draft, "me/draft", really=True)
    assert hub.seen == []


@pytest.mark.parametrize("repo", ["draft", "a/b/c", "../x", "me/", "me/draft\n"])
def test_a_repository_is_owner_and_name(make, hub, repo):
    with pytest.raises(RecipeError, match="write owner/name"):
        publish(make(), repo, really=True)
    assert hub.seen == []


def test_there_has_to_be_a_draft(tmp_path):
    with pytest.raises(DataError, match="run: draftsmith run RECIPE"):
        publish(tmp_path / "draft", "me/draft", really=False)
