"""Draft directories that are odd, broken or hostile: `inspect`, `compare`, `export --check` and `publish` tell so."""

import contextlib
import json
import math
import struct
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_draft, tiny_target
from outcomes import FUZZED, KINDS, ODD, copied, fuzzed, one_gigabyte, outcome, put, refused

from draftsmith import cli
from draftsmith.commands.inspect import page
from draftsmith.core.records.training import Belongs, TrainingState
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.drafts.directories import inspect_draft, load_draft
from draftsmith.drafts.eagle3.config_file import IDS, ROPE_NUMBERS, RULES
from draftsmith.publishing.publish import publish
from draftsmith.training.checkpoints import save_checkpoint
from draftsmith.training.export import damages, export

FILES = ("config.json", "model.safetensors")
KEYS = sorted({part for path in RULES for part in path.split(".")} | ROPE_NUMBERS)
KEYS += ["rope_type", "type", "quantization_config", "transformer_layer_config", "dflash_config", "medusa_num_heads"]
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1}

NAMES = ["d2t", "t2d", "fc.weight", "norm.weight", "lm_head.weight", "midlayer.hidden_norm.weight"]
NAMES += ["midlayer.self_attn.q_proj.weight", "midlayer.mlp.down_proj.weight"]

json_values = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=4),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(draft directory with a card, checkpoints, vocabulary)"""
    out, target = tmp_path_factory.mktemp("exported"), tiny_target()
    draft, ids = tiny_draft(target)
    vocabulary = DraftVocabulary(ids, target.identity.vocab_size)
    belongs = Belongs(
        method="eagle3",
        draft=draft.config.model_dump(mode="json"),
        vocabulary=vocabulary.name,
        target=target.identity,
        train={},
        seed=0,
        data="",
    )
    state = TrainingState(belongs=belongs, step=1)
    save_checkpoint(out / "train", draft, [torch.optim.SGD(draft.parameters())], state, 1)
    export(out / "train", vocabulary, out / "draft", {"version": "test", "commit": None})
    (out / "draft" / "README.md").write_text("# card\n")
    return out / "draft", out / "train", vocabulary


@pytest.fixture
def looks(exported, tmp_path):
    """(a copy of the draft, everything that looks at one)"""
    place, (original, checkpoints, vocabulary) = tmp_path / "draft", exported
    copied(original, place)
    return place, {
        "inspect": lambda: page(inspect_draft(place)),
        "load": lambda: load_draft(place),
        "compare": lambda: load_draft(place, layers=6, reading="auto"),
        "check": lambda: "\n".join(damages(place, checkpoints, vocabulary)),
        "publish": lambda: publish(place, "me/draft", really=False),
    }


# --- files that are none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_plain_file_is_refused(looks, attacks, kind, name):
    place, commands = looks
    put(kind, place / name)
    attacks(len(commands))
    mapped = kind == "sparse terabyte" and name.endswith(".safetensors")  # which takes addresses, no memory
    with contextlib.nullcontext() if mapped else one_gigabyte():
        for work in commands.values():
            assert str(place) in refused(work)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "directory", "link that leaves"])
@pytest.mark.parametrize("name", ["README.md", "model-1.safetensors", "model.safetensors.index.json"])
def test_nothing_else_is_published(looks, kind, name):
    place, commands = looks
    (place / name).write_bytes(b"{}")
    put(kind, place / name)
    assert name in refused(commands["publish"])


def test_links_inside_a_directory_and_in_the_hubs_cache_are_followed(looks, tmp_path):
    place, commands = looks
    (place / "model.safetensors").rename(place / "weights")
    (place / "model.safetensors").symlink_to("weights")
    assert "no problems found" in commands["inspect"]()
    cache = tmp_path / "models--me--draft"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    place.rename(cache / "snapshots" / "abc")
    for name in FILES:
        blob = cache / "blobs" / name
        (cache / "snapshots" / "abc" / name).resolve().rename(blob)
        (cache / "snapshots" / "abc" / name).unlink(missing_ok=True)
        (cache / "snapshots" / "abc" / name).symlink_to(f"../../blobs/{name}")
    assert "no problems found" in page(inspect_draft(cache / "snapshots" / "abc"))


def test_a_weight_that_is_there_twice_is_named(looks):
    place, commands = looks
    (place / "more.safetensors").write_bytes((place / "model.safetensors").read_bytes())
    for work in commands.values():
        assert "is stored twice" in refused(work)


# --- config.json -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "[]", '"x"', "3", "{", "\ufeff{}", '{"a": NaN}', '{"a": 1} x'),
        *("[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, '{"hidden_act": ' + "[" * 1000 + "]" * 1000 + "}"),
    ],
)
def test_a_config_that_is_no_object_is_one_line(looks, attacks, text):
    place, commands = looks
    (place / "config.json").write_text(text)
    attacks(len(commands))
    for work in commands.values():
        assert "config.json: " in refused(work)


@pytest.mark.parametrize("key", sorted(RULES))
def test_sizes_beyond_any_draft_are_named_and_never_built(looks, attacks, key):
    place, commands = looks
    original = json.loads((place / "config.json").read_text())
    attacks(3 * len(ODD))
    with one_gigabyte():
        for value in ODD:
            config = json.loads(json.dumps(original))
            *parents, last = key.split(".")
            holder = config
            for parent in parents:
                holder = holder.setdefault(parent, {})
            holder[last] = value
            (place / "config.json").write_text(json.dumps(config))
            assert "EAGLE-3" in outcome(commands["inspect"])
            outcome(commands["compare"])
            outcome(commands["publish"])


@fuzzed
@given(changes=st.dictionaries(st.sampled_from(KEYS), json_values, min_size=1, max_size=4), layout=st.booleans())
def fuzz_config(place, original, commands, changes, layout):
    base = {"speculators_model_type": "eagle3", "transformer_layer_config": original} if layout else original
    (place / "config.json").write_text(json.dumps({**base, **changes}))
    for work in commands:
        outcome(work)


def test_fuzzed_configs(looks, attacks):
    place, commands = looks
    attacks(FUZZED)
    original = json.loads((place / "config.json").read_text())
    with one_gigabyte():
        fuzz_config(place, original, (lambda: inspect_draft(place).problems, commands["compare"]))


# --- what engines would read against what was trained ------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "nested", "named"),
    [
        ([7, 8, 9], [6, 7, 8], ("vLLM", "SGLang")),
        ([7, 8, 9], None, ("vLLM", "SGLang")),
        (None, [6, 7, 8], ("vLLM", "SGLang")),
        ([1, 3, 4], [1, 3, 4], ("SGLang",)),
        ([0, 2, 3], [0, 2, 3], ("vLLM",)),
        ([4, 3, 1], [0, 2, 3], ("vLLM",)),
        ([1, 3], [0, 2, 3], ("vLLM",)),
        ([1, 3, 4, 5], [0, 2, 3], ("vLLM",)),
        ([], [], ("vLLM", "SGLang")),
        (None, None, ("vLLM", "SGLang")),
        ("1,3,4", [0, 2, 3], ("vLLM",)),
    ],
)
@pytest.mark.parametrize("layers", [6, 12, None])
def test_taps_that_an_engine_would_read_otherwise_are_named(looks, top, nested, named, layers):
    place, commands = looks
    config = json.loads((place / "config.json").read_text())
    config[IDS], config["eagle_config"][IDS] = top, nested
    config["draftsmith"]["target"]["num_layers"] = layers
    (place / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    lines = [line for line in commands["inspect"]().splitlines() if "would capture taps" in line]
    assert tuple(line.split()[1] for line in lines) == named
    assert all(line.endswith("trained with [1, 3, 4]") for line in lines)
    assert "draftsmith inspect" in refused(commands["publish"])


def test_taps_that_the_target_does_not_have_are_named(looks):
    place, commands = looks
    config = json.loads((place / "config.json").read_text())
    config[IDS], config["eagle_config"][IDS], config["draftsmith"]["taps"] = [7, 8, 9], [6, 7, 8], [7, 8, 9]
    (place / "config.json").write_text(json.dumps(config))
    assert "problem: trained with taps [7, 8, 9], but its target has 6 layers" in commands["inspect"]()


# --- safetensors headers -----------------------------------------------------------------------------------------


def split(raw):
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header, body, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"\0" * 7, joined(b"{}", b"", 2**63), joined(b"{}", b"", 10**8), joined(b"[]", b""), joined(b"{", b"")),
        *(joined(b"{" * 50_000, b""), joined(b'{"a":' * 2000 + b"1" + b"}" * 2000, b""), joined(b"{}", b"\0" * 9)),
        joined({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\0" * 4),
        joined({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}, b"\0" * 4),
        joined({"a": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}, b""),
        joined({"a\n\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    ],
)
def test_headers_that_lie_are_one_line(looks, attacks, raw):
    place, commands = looks
    (place / "model.safetensors").write_bytes(raw)
    attacks(len(commands))
    with one_gigabyte():
        for work in commands.values():
            text = outcome(work)
            assert "no problems found" not in text
            assert "\x1b" not in text


changed_tensor = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*BYTES, "F4", "C64", "X", 5, None]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 7, 32, 64, 2**17, 10**9, 2**63]) | st.integers(), max_size=4),
        "name": st.sampled_from(["d2t", "t2d", "fc.weight", "model.fc.weight", "embed_tokens.weight", "a\nb", ""]),
        "data_offsets": st.lists(st.integers(0, 2**65), max_size=3) | st.sampled_from(ODD),
        "gone": st.just(True),
    },
)


def changed(header, body, changes, fitting):
    """`fitting`: with offsets and a body that go with the new shapes, so that more than the library's own check meets
    them."""
    out = {}
    for name, tensor in header.items():
        change = changes.get(name, {})
        if name != "__metadata__" and "gone" not in change:
            out[change.get("name", name)] = {**tensor, **{k: v for k, v in change.items() if k != "name"}}
    if not fitting:
        return joined(out, body)
    end = 0
    for tensor in out.values():
        size = math.prod(tensor["shape"]) * BYTES.get(tensor["dtype"], 1)
        tensor["data_offsets"] = [end, end + size]
        end += size
    return joined(out, bytes(end) if 0 <= end < 1 << 20 else b"")


@fuzzed
@given(changes=st.dictionaries(st.sampled_from(NAMES), changed_tensor, min_size=1, max_size=3), fitting=st.booleans())
def fuzz_header(place, original, commands, changes, fitting):
    (place / "model.safetensors").write_bytes(changed(*split(original.read_bytes()), changes, fitting))
    for work in commands:
        outcome(work)


def test_fuzzed_headers(exported, looks, attacks):
    place, commands = looks
    attacks(FUZZED)
    original = exported[0] / "model.safetensors"
    with one_gigabyte():
        fuzz_header(place, original, (lambda: inspect_draft(place).problems, commands["check"]))


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty directory", "/dev/zero", "/proc/self", "\0"])
def test_inspect_of_anything_is_one_line(tmp_path, monkeypatch, capsys, what):
    (tmp_path / "a file").write_text("x")
    (tmp_path / "an empty directory").mkdir()
    monkeypatch.setattr(sys, "argv", ["draftsmith", "inspect", str(tmp_path / what)])
    assert cli.main() == 2
    told = capsys.readouterr()
    assert told.err.startswith("draftsmith: ")
    assert (told.out, told.err.count("\n")) == ("", 1)
