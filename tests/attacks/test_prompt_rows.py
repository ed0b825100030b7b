"""Rows and files of prompts that are odd, endless or broken: prompts, a count of what was left out, or one line."""

import bz2
import gzip
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_recipe
from outcomes import FUZZED, KINDS, ODD, fuzzed, one_gigabyte, outcome, put

from draftsmith.core.records.data import Prompt
from draftsmith.core.sources import Source
from draftsmith.data.prompts import Tally, gather, prompts_of
from draftsmith.data.rows import DIALOGUES, IDS, MEDIA, ROLES, TEXTS

GOOD = b'{"prompt": "the a of"}\n'


def deep(levels, inner="x"):
    return '{"a":' * levels + json.dumps(inner) + "}" * levels


def told(path, skip=True, **source):
    """What a source gives: prompts and a count, which survive being written and read again."""
    tally = Tally()

    def read():
        found = prompts_of(Source(name=str(path), **source), 3, skip, 0, tally)
        prompts = [Prompt.model_validate_json(prompt.line()) for prompt in found]
        return f"{len(prompts)} prompts, {tally.bad} bad, {tally.empty} empty"

    return outcome(read, 20)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("link that leaves", "sparse terabyte")])
@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet", "p.jsonl.gz", "p.txt"])
def test_a_source_that_is_no_such_file_is_one_line(tmp_path, kind, name):
    path = tmp_path / name
    path.write_bytes(GOOD)
    put(kind, path)
    with one_gigabyte():
        assert told(path).startswith((f"prompts.sources: '{path}' is no", str(path), f"prompts.sources: {path}"))


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.jsonl.gz", "p.parquet"])
def test_a_terabyte_of_nothing_stops_at_its_first_row(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(GOOD)
    put("sparse terabyte", path)
    with one_gigabyte():
        assert told(path, skip=False).startswith((str(path), f"prompts.sources: {path}"))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("head", [b"", b'{"prompt": "', b"[", b'[{"prompt": "', b"{\n", b'[{"a": 1}, '])
def test_a_packed_bomb_is_not_unpacked_whole(tmp_path, pack, head):
    path = tmp_path / "p.jsonl"
    path.write_bytes(pack(head + b"a" * (1 << 29)))
    with one_gigabyte():
        assert told(path).startswith((str(path), "prompts.sources: "))


def test_a_row_without_an_end_costs_that_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD + b'{"prompt": "' + b"a" * (1 << 25) + b'"}\n' + GOOD)
    assert told(path) == "2 prompts, 1 bad, 0 empty"


@pytest.mark.parametrize(
    "key", [*DIALOGUES, *TEXTS, *MEDIA, *IDS, "system", "tools", "category", "source", "input", "history"]
)
def test_deep_rows_are_read_or_counted(tmp_path, attacks, key):
    path = tmp_path / "p.jsonl"
    attacks(6)
    rows = [f'{{"prompt": "the a", "{key}": {deep(levels)}}}' for levels in (10, 500, 900, 1015, 5000)]
    rows.append('{"prompt": "the a", "' + key + '": ' + "[" * 1000 + "]" * 1000 + "}")
    path.write_text("\n".join(rows) + "\n" + GOOD.decode())
    prompts, bad, empty = (int(part.split()[0]) for part in told(path).split(", "))
    assert prompts + bad + empty == len(rows) + 1
    assert prompts >= 1


FIELDS = [
    *DIALOGUES,
    *TEXTS,
    *MEDIA,
    *IDS,
    "system",
    "system_prompt",
    "tools",
    "category",
    "source",
    "input",
    "history",
]
PART = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "image", 5]), "text": st.sampled_from(ODD) | st.text()}
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from([*ROLES, "x", 5, None]),
        "from": st.sampled_from([*ROLES, "", []]),
        "content": st.sampled_from(ODD)
        | st.text()
        | st.lists(
            st.fixed_dictionaries(
                {}, optional={"type": st.sampled_from(["text", "image", 5]), "text": st.sampled_from(ODD) | st.text()}
            ),
            max_size=3,
        ),
        "value": st.sampled_from(ODD) | st.text(),
    },
)
values = st.recursive(
    st.sampled_from(ODD) | st.text() | st.integers() | st.floats() | TURN | st.lists(TURN, max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
rows = st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=5)


@fuzzed
@given(found=st.lists(rows | values, min_size=1, max_size=4), array=st.booleans(), columns=st.booleans())
def fuzz_rows(path, found, array, columns):
    text = json.dumps(found) if array else "\n".join(map(json.dumps, found))
    path.write_text(text)
    told(path, columns={"prompt": "question", "system": "input"} if columns else {})


@fuzzed
@given(data=st.binary(max_size=200), at=st.integers(0, 60))
def fuzz_bytes(path, data, at):
    text = GOOD * 2 + b'{"messages": [{"role": "user", "content": "a"}]}\n'
    path.write_bytes(text[:at] + data + text[at:])
    told(path)


def test_fuzzed_rows(tmp_path, attacks):
    attacks(2 * FUZZED)
    with one_gigabyte():
        fuzz_rows(tmp_path / "p.json")
        fuzz_bytes(tmp_path / "p.jsonl")


@fuzzed
@given(found=st.lists(rows, min_size=1, max_size=6))
def fuzz_stage(path, out, found):
    path.write_bytes(GOOD + "\n".join(map(json.dumps, found)).encode() + b'\n{"prompt": "of the"}')
    recipe = tiny_recipe("m", str(path), **{"prompts.skip_bad": True, "prompts.held_out": 1, "prompts.max_turns": 3})
    outcome(lambda: gather(recipe, out))


def test_fuzzed_rows_through_the_stage(tmp_path, attacks):
    attacks(FUZZED)
    with one_gigabyte():
        fuzz_stage(tmp_path / "p.jsonl", tmp_path / "out")
