"""Prompts from data as people have it: forms of rows, formats of files, what is left out, duplicates, ids."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from models import read_source, tiny_recipe

from draftsmith.core.errors import DataError, RecipeError
from draftsmith.core.records.data import Prompt, PromptsSummary
from draftsmith.core.sources import Source
from draftsmith.data.prompts import gather
from draftsmith.data.rows import NothingToAsk, map_columns, read_row
from draftsmith.data.sources import data_files, hub_source
from draftsmith.runs.plan import source_size

ASKED = "weather in Oslo?"
USER = {"role": "user", "content": ASKED}
MORE = {"role": "user", "content": "and in Bergen?"}
HUMAN = {"from": "human", "value": ASKED}
ANSWER = {"role": "assistant", "content": "12 C"}
SYSTEM = {"role": "system", "content": "Be short."}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def text(content):
    return {"type": "text", "text": content}


FORMS = {
    "prompt": {"prompt": f" {ASKED}\r\n"},
    "prompt as messages": {"prompt": [USER, ANSWER]},
    "prompt as ShareGPT turns": {"prompt": [HUMAN]},
    "prompt as parts": {"prompt": [text(ASKED)]},
    "messages": {"messages": [USER, ANSWER]},
    "messages as JSON text": {"messages": json.dumps([USER, ANSWER])},
    "messages before prompt": {"prompt": "another", "messages": [USER]},
    "null messages beside a prompt": {"messages": None, "prompt": ASKED},
    "no messages beside a prompt": {"messages": [], "prompt": ASKED},
    "blank prompt beside turns": {"prompt": "", "turns": [ASKED]},
    "conversation": {"conversation": [USER, ANSWER]},
    "ShareGPT": {"conversations": [HUMAN, {"from": "gpt", "value": "12 C"}]},
    "ShareGPT with null role and content": {"conversations": [{**HUMAN, "role": None, "content": None}]},
    "other names": {"conversations": [{"from": "User", "value": ASKED}, {"from": "chatgpt", "value": "12 C"}]},
    "bard and bing": {"conversations": [HUMAN, {"from": "bard", "value": "x"}, {"from": "bing", "value": "y"}]},
    "ShareGPT function call": {"conversations": [HUMAN, {"from": "function_call", "value": "f"}]},
    "SpecForge": {"conversations": [USER, ANSWER]},
    "texts in turn": {"conversations": [ASKED, "12 C"]},
    "MT-bench": {"question_id": 81, "turns": [ASKED], "reference": [""]},
    "turns as dicts": {"turns": [USER]},
    "turns without roles": {"turns": [{"content": ASKED}]},
    "Alpaca": {"instruction": "weather", "input": "in Oslo?", "output": "x"},
    "question": {"question": ASKED, "answer": "x"},
    "problem": {"problem": ASKED, "solution": "x"},
    "HumanEval": {"task_id": "HumanEval/0", "prompt": ASKED, "canonical_solution": "x"},
    "text parts": {"messages": [{"role": "user", "content": [text(ASKED)]}]},
    "texts as parts": {"messages": [{"role": "user", "content": [ASKED]}]},
    "one part": {"messages": [{"role": "user", "content": text(ASKED)}]},
    "parts with null keys": {"messages": [{"role": "user", "content": [{**text(ASKED), "image_url": None}]}]},
    "input parts": {"messages": [{"role": "user", "content": [{"type": "input_text", "text": ASKED}]}]},
    "answer without text": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
    "answer without content": {"messages": [USER, {"role": "assistant"}]},
    "tool turn": {"messages": [USER, {"role": "tool", "content": "12"}, MORE]},
    "malformed turn later": {"messages": [USER, 7]},
    "unknown role later": {"messages": [USER, {"role": "robot", "content": "x"}]},
    "user turn of null later": {"messages": [USER, {"role": "user", "content": None}]},
    "image later": {"messages": [USER, {"role": "user", "content": [text("this?"), IMAGE]}, MORE]},
    "assistant first": {"messages": [ANSWER, USER]},
    "empty user turn first": {"messages": [{"role": "user", "content": " "}, ANSWER, USER]},
    "empty system prompt": {"system": "", "messages": [{"role": "system", "content": " "}, USER]},
    "no images": {"images": [], "image": None, "prompt": ASKED},
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_rows(name):
    messages, _, _ = read_row(FORMS[name], 4)
    if name == "Alpaca":
        assert messages == [{"role": "user", "content": "weather\n\nin Oslo?"}]
    else:
        assert messages == [USER]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be short.", "conversations": [HUMAN]},
        {"system_prompt": "Be short.", "question": ASKED},
        {"system": [text("Be short.")], "instruction": ASKED, "input": None},
        {"messages": [SYSTEM, USER]},
        {"system": "Be short.", "messages": [SYSTEM, USER]},
        {"messages": [{"role": "developer", "content": "Be short."}, USER]},
        {"messages": [ANSWER, SYSTEM, USER]},
        {"conversations": [{"from": "system", "value": "Be short."}, HUMAN]},
    ],
)
def test_system_prompts_are_kept(row):
    assert read_row(row, 1)[0] == [SYSTEM, USER]


def test_two_system_prompts_are_joined():
    row = {"system": "Be kind.", "messages": [SYSTEM, USER]}
    assert read_row(row, 1)[0][0]["content"] == "Be kind.\n\nBe short."


def test_turns_are_kept_up_to_the_limit_and_rounds_before_an_instruction():
    assert read_row({"messages": [USER, ANSWER, MORE, USER]}, 2)[0] == [USER, MORE]
    assert read_row({"turns": [ASKED, MORE["content"]]}, 1)[0] == [USER]
    assert read_row({"instruction": MORE["content"], "history": [[ASKED, "12 C"]]}, 2)[0] == [USER, MORE]


@pytest.mark.parametrize(
    ("row", "reasons"),
    [
        ({"messages": [USER, ANSWER, MORE]}, set()),
        ({"messages": [USER, {"role": "tool", "content": "12"}, MORE]}, {"tool turn"}),
        ({"conversations": [HUMAN, {"from": "observation", "value": "12"}]}, {"tool turn"}),
        ({"messages": [USER, SYSTEM, MORE]}, {"system turn after the first user turn"}),
        ({"messages": [ANSWER, USER]}, {"assistant turn before the first user turn"}),
        ({"messages": [USER, {"role": "user", "content": ""}, MORE]}, {"empty user turn"}),
        ({"messages": [USER, {"role": "user", "content": [text("what?"), IMAGE]}]}, {"image_url in a user turn"}),
        ({"messages": [USER, {"role": "user"}]}, {"malformed turn"}),
        ({"system": 7, "prompt": ASKED}, {"system prompt that is no text"}),
        ({"tools": "none", "prompt": ASKED}, {"tools that are no list of objects"}),
        ({"messages": [USER, ANSWER, MORE, {"role": "tool", "content": "12"}]}, set()),  # nothing after it is wanted
    ],
)
def test_what_is_left_out_is_named(row, reasons):
    assert read_row(row, 2)[2] == reasons


@pytest.mark.parametrize(
    ("row", "reasons"),
    [
        ({"prompt": ""}, {"empty prompt"}),
        ({"prompt": None}, {"empty prompt"}),
        ({"messages": []}, {"empty messages"}),
        ({"messages": [ANSWER]}, {"assistant turn before the first user turn"}),
        ({"messages": [{"role": "user", "content": ""}]}, {"empty user turn"}),
        ({"messages": [{"role": "user", "content": [IMAGE]}, ANSWER, USER]}, {"image_url in a user turn"}),
        ({"messages": [{"role": "user", "content": [{"image": "x", "text": None}]}]}, {"image in a user turn"}),
        ({"image": "x.png", "conversations": [HUMAN]}, {"image beside the text"}),
        ({"images": ["x.png"], "prompt": ASKED}, {"images beside the text"}),
    ],
)
def test_rows_with_nothing_to_ask_are_told_from_malformed_ones(row, reasons):
    with pytest.raises(NothingToAsk) as caught:
        read_row(row, 1)
    assert caught.value.reasons == reasons


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, "not an object"),
        ([USER], "not an object"),
        ({}, "none of the keys .*found: none"),
        ({"text": "x", "n": 1}, "found: text, n.*columns"),
        ({"prompt": 3}, "lacks a text"),
        ({"messages": "hello"}, "no list of turns"),
        ({"messages": USER}, "no list of turns"),
        ({"messages": [7]}, "neither an object nor a text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role is 'robot'; known are user"),
        ({"messages": [{"content": "x"}]}, "role is None"),
        ({"messages": [{"role": "user", "content": None}, USER]}, "lacks a text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "text part without a text"),
    ],
)
def test_malformed_rows_say_why(row, message):
    with pytest.raises(DataError, match=message) as caught:
        read_row(row, 1)
    assert not isinstance(caught.value, NothingToAsk)


@pytest.mark.parametrize(
    ("tools", "kept"),
    [
        ([TOOL], [TOOL]),
        (json.dumps([TOOL]), [TOOL]),
        ([json.dumps(TOOL)], [TOOL]),
        ([{**TOOL, "strict": None}], [TOOL]),  # as a table fills it
        ([], []),
        ("", []),
        ("[]", []),
        (None, []),
        (["weather"], []),
        ({"n": 2**70}, []),
    ],
)
def test_tools_are_kept_as_objects(tools, kept):
    assert read_row({"tools": tools, "prompt": ASKED}, 1)[1] == kept


def test_halves_of_surrogate_pairs_are_mended():
    assert read_row({"prompt": "a\ud83d\ude00b\ud83d"}, 1)[0][0]["content"] == "a\U0001f600b\ufffd"


# --- sources ---------------------------------------------------------------------------------------------------------


def gathered(tmp_path, *sources, **settings):
    """(summary, training rows); sources as paths or mappings."""
    sources = [source if isinstance(source, dict) else {"name": str(source)} for source in sources]
    changes = {"prompts.sources": sources, "prompts.held_out": 1}
    recipe = tiny_recipe("m", "p", **changes, **{f"prompts.{key}": value for key, value in settings.items()})
    summary = gather(recipe, tmp_path / "out")
    assert summary == PromptsSummary.load(tmp_path / "out" / "summary.json")
    return summary, list(Prompt.read_rows(tmp_path / "out" / "prompts.jsonl"))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = [{"conversations": [{"from": "human", "value": f"Who built house {i}?"}]} for i in range(4)]
TABLE = [{"prompt": f"Who built house {i}?", "n": i} for i in range(4)]
CSV = "prompt,n\r\n" + "".join(f'"Who built house {i}?",{i}\r\n' for i in range(4))


def parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def zst(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "a.jsonl": lines(ROWS),
    "a.ndjson": lines(ROWS),
    "a.json": lines(ROWS),
    "A.JSONL": lines(ROWS),
    "no suffix": lines(ROWS),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "array-in-a-line.json": json.dumps(ROWS).encode(),
    "array-called-lines.jsonl": b"\n " + json.dumps(ROWS).encode() + b"\n",
    "indented-objects.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(ROWS),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "crlf.jsonl": lines(ROWS).replace(b"\n", b"\r\n") + b"\r\n",
    "no-end.jsonl": lines(ROWS).strip(),
    "a.jsonl.gz": gzip.compress(lines(ROWS)),
    "two-members.jsonl.gz": gzip.compress(lines(ROWS[:2])) + gzip.compress(lines(ROWS[2:])),
    "packed-without-saying.jsonl": gzip.compress(lines(ROWS)),
    "array.json.gz": gzip.compress(json.dumps(ROWS, indent=1).encode()),
    "a.jsonl.bz2": bz2.compress(lines(ROWS)),
    "a.jsonl.xz": lzma.compress(lines(ROWS)),
    "a.jsonl.zst": zst(lines(ROWS)),
    "two-frames.jsonl.zst": zst(lines(ROWS[:2])) + zst(lines(ROWS[2:])),
    "array.json.zst": zst(json.dumps(ROWS).encode()),
    "a.csv": CSV.encode(),
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "a[1]*.csv": CSV.encode(),
    "a.tsv": CSV.replace(",", "\t").encode(),
    "a.csv.gz": gzip.compress(CSV.encode()),
    "a.csv.zst": zst(CSV.encode()),
    "a.parquet": parquet(TABLE),
    "nested.parquet": parquet([{**ROWS[0], "prompt": None}, *ROWS[1:]]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_files(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FORMATS[name])
    prompts, bad = read_source(Source(name=str(path)), 1, False, 0)
    assert [p.users[0] for p in prompts] == [f"Who built house {i}?" for i in range(4)]
    assert bad == 0
    assert source_size(Source(name=str(path)), 1) == (4, 1.0, 8.0)


def test_a_long_array_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("draftsmith.data.sources._CHUNK", 7)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    assert len(read_source(Source(name=str(tmp_path / "a.json")), 1, False, 0)[0]) == 4
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=2)[:-40])
    with pytest.raises(DataError, match=r"b\.json:30: not JSON: Expecting value"):
        read_source(Source(name=str(tmp_path / "b.json")), 1, False, 0)


MIXED = [
    {"id": 1, "prompt": "one"},
    {"id": "b", "messages": [{"role": "user", "content": "two"}], "tools": [TOOL]},
    {"messages": [{"role": "user", "content": [text("three")]}], "tools": json.dumps([TOOL])},
    {"id": 4.5, "conversations": [{"from": "human", "value": "four"}], "system": None},
    {"id": "1", "source": "s", "model": "m", "system_prompt": "p", "messages": [{"role": "user", "content": "five"}]},
    {"prompt": "six", "score": float("nan")},
    {"prompt": "se\x00ven\ud83d"},
]


@pytest.mark.parametrize("array", [False, True])
def test_rows_of_many_shapes_in_one_file(array, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(MIXED).encode() if array else lines(MIXED))
    summary, kept = gathered(tmp_path, path, evaluation=[{"name": "bundled-dev"}])
    texts = {row.messages[-1]["content"]: row for row in kept}
    assert set(texts) == {"one", "two", "three", "four", "five", "six", "se\x00ven\ufffd"}
    assert texts["one"].tools == []
    assert texts["two"].tools == texts["three"].tools == [TOOL]
    assert summary.bad_rows_skipped == 0


def test_a_key_that_comes_late_is_read(tmp_path):
    """`datasets` takes the columns from the first 10 MB."""
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": f"{i} {'x' * 999}"} for i in range(11_000)])
    with path.open("a") as file:
        file.write(json.dumps({"messages": [USER]}) + "\n")
    assert read_source(Source(name=str(path)), 1, False, 0)[0][-1].messages == [USER]


def test_a_cell_is_a_text(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,category\nNA,x\n12,x\nnull\n")
    prompts, _ = read_source(Source(name=str(tmp_path / "a.csv")), 1, False, 0)
    assert [(p.users[0], p.category) for p in prompts] == [
        ("NA", "x"),
        ("12", "x"),
        ("null", "other"),
    ]
    (tmp_path / "numbers.csv").write_text("id,prompt\n007,00123\n008,4.50\n")
    prompts, _ = read_source(Source(name=str(tmp_path / "numbers.csv")), 1, False, 0)
    assert [(p.id, p.users[0]) for p in prompts] == [("007", "00123"), ("008", "4.50")]


def test_a_folder_is_its_files(tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    jsonl(folder / "b.jsonl", [{"prompt": "two"}])
    (folder / "data" / "a.parquet").write_bytes(parquet([{"prompt": "three"}]))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines([{"prompt": "one"}])))
    (folder / "README.md").write_text("no rows")
    (folder / "dataset_info.json").write_text("{}")
    source = Source(name=str(folder))
    assert [path.name for path in data_files(source.name)] == ["a.jsonl.gz", "b.jsonl", "a.parquet"]
    assert [p.users[0] for p in read_source(source, 1, False, 0)[0]] == ["one", "two", "three"]


BROKEN = {
    "empty.jsonl": (b"", "holds no prompts"),
    "empty.json": (b"", "holds no prompts"),
    "blank.jsonl": (b"\n\n", "holds no prompts"),
    "none.json": (b"[]", "holds no prompts"),
    "empty.csv": (b"", "cannot be read"),
    "empty.parquet": (b"", "cannot be read"),
    "no.parquet": (b"prompt", "cannot be read"),
    "empty.jsonl.gz": (b"", "holds no prompts"),
    "torn.jsonl.gz": (gzip.compress(lines(ROWS))[:-12], "cannot be read"),
    "torn.jsonl.zst": (zst(lines(ROWS))[:-3], "cannot be read"),
    "latin.csv": ("prompt\ncafé\n".encode("latin-1"), "cannot be read"),
    "utf16.jsonl": (lines(ROWS).decode().encode("utf-16"), "is UTF-16"),
    "latin.jsonl": (b'{"prompt": "caf\xe9"}\n', r"latin\.jsonl:1: not JSON"),
    "nul.jsonl": (lines(ROWS[:1]) + b"\0" * 8, r"nul\.jsonl:2: not JSON"),
    "deep.jsonl": (b"\n" + b"[" * 10 + b"\n", r"deep\.jsonl:\d: not JSON"),
    "deeper.jsonl": (lines(ROWS[:1]) + b"[" * 100_000 + b"\n", r"deeper\.jsonl:2: not JSON"),
    "torn.json": (b'[\n{"prompt": "one"},\n{"prompt"', r"torn\.json:3: not JSON"),
    "comma.json": (b'[\n{"prompt": "one"},\n{"prompt": }]', r"comma\.json:3: not JSON"),
    "more.json": (b'[{"prompt": "one"}]\n[]', r"more\.json:2: not JSON"),
    "item.json": (b'[{"prompt": "one"}, 7]', r"item\.json item 2: not an object"),
    "key.json": (b'{\n "prompt": \n', r"key\.json:\d: not JSON"),
    "wide.csv": (b"prompt,category\nhello, you,chat\n", "its first row has more cells than its header"),
    "keys.csv": (b"text,n\na,1\n", r"keys\.csv row 1: has none of the keys .*found: text, n"),
    "lines.txt": (b"hello\n", r"lines\.txt row 1: .*found: text"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_line(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_source(Source(name=str(tmp_path / name)), 1, False, 0)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_bad_rows_are_skipped_where_asked_and_prompts_before_and_after_stay(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS[:2]) + b'{"prompt": \n{"text": "x"}\n{"prompt": 3}\n' + lines(ROWS[2:]))
    prompts, bad = read_source(Source(name=str(path)), 1, True, 0)
    assert (len(prompts), bad) == (4, 3)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=r"holds no prompts \(1 bad rows; the first .*b\.jsonl:1: has none"):
        read_source(Source(name=str(tmp_path / "b.jsonl")), 1, True, 0)


def test_rows_with_nothing_to_ask_are_counted_by_reason(tmp_path, capsys):
    rows = [
        *ROWS,
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        {"messages": [{"role": "user", "content": [IMAGE]}, ANSWER]},
        {"messages": [USER, {"role": "tool", "content": "x"}]},
        {"prompt": " "},
    ]
    summary, kept = gathered(tmp_path, jsonl(tmp_path / "a.jsonl", rows), max_turns=2)
    assert len(kept) == 4
    assert summary.left_out == {"image_url in a user turn": 2, "tool turn": 1, "empty user turn": 1}
    assert (summary.rows_without_prompt, summary.bad_rows_skipped) == (3, 0)
    assert "prompts: left out, in rows: image_url in a user turn: 2, " in capsys.readouterr().err
    with pytest.raises(
        DataError, match=r"2 rows without a prompt \(image_url in a user turn: 2\); keys found: messages"
    ):
        gathered(tmp_path, jsonl(tmp_path / "b.jsonl", rows[4:6]))


# --- columns ---------------------------------------------------------------------------------------------------------


def test_columns_name_what_is_not_known(tmp_path):
    rows = [{"q": f"Who built house {i}?", "prompt": "no", "who": "Be short.", "nr": i, "kind": "x"} for i in range(3)]
    columns = {"prompt": "q", "system": "who", "id": "nr", "category": "kind"}
    prompts, _ = read_source(Source(name=str(jsonl(tmp_path / "a.jsonl", rows)), columns=columns), 1, False, 0)
    messages = [SYSTEM, {"role": "user", "content": "Who built house 0?"}]
    assert prompts[0] == Prompt(id="0", category="x", source="a", messages=messages)


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ({}, {"prompt": "a"}, {"prompt": "a"}),
        ({"prompt": "q"}, {"q": "a", "messages": "b", "id": 1}, {"q": "a", "prompt": "a", "id": 1}),
        ({"messages": "chat"}, {"chat": [USER], "prompt": "b"}, {"chat": [USER], "messages": [USER]}),
        ({"system": "who"}, {"prompt": "a"}, {"prompt": "a"}),
        (
            {"instruction": "a", "input": "b"},
            {"a": "x", "b": "y"},
            {"a": "x", "b": "y", "instruction": "x", "input": "y"},
        ),
        ({"prompt": "q"}, 7, 7),
    ],
)
def test_a_mapped_text_is_the_only_one(columns, row, expected):
    assert map_columns(row, columns) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "qq"}, r"a\.jsonl:1: columns: prompt: 'qq' is no column \(found: q, n\)"),
        ({"prompt": "q", "system": "who"}, r"columns: system: 'who' is no column; found are q, n"),
    ],
)
def test_unknown_columns_are_named_beside_those_found(columns, message, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"q": "one", "n": 1}, {"q": "two", "n": 2}])
    with pytest.raises(DataError, match=message):
        read_source(Source(name=str(path), columns=columns), 1, False, 0)


def test_our_own_name_of_a_column_is_checked():
    with pytest.raises(RecipeError, match=r"columns\.promt.*input should be 'prompt'"):
        tiny_recipe("m", "p", **{"prompts.sources": [{"name": "x", "columns": {"promt": "q"}}]})


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/set", ("owner/set", None, None)),
        ("owner/set:main", ("owner/set", "main", None)),
        ("owner/set:train_sft", ("owner/set", None, "train_sft")),
        ("owner/set:main:test[:10%]", ("owner/set", "main", "test[:10%]")),
        ("owner/set::all", ("owner/set", None, "all")),
    ],
)
def test_any_set_on_the_hub_is_a_source(name, asked, monkeypatch):
    calls = []

    def load(path, config, split, streaming, revision):
        calls.append((path, config, split))
        rows = datasets.Dataset.from_list([{"question": f"{i}?", "category": "math"} for i in range(9)])
        rows = rows.to_iterable_dataset()
        return rows if split else datasets.IterableDatasetDict({"train": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    prompts, _ = read_source(Source(name=name, limit=3), 1, False, 0)
    assert calls == [asked]
    assert [(p.category, p.source) for p in prompts] == [("math", "set")] * 3
    assert source_size(Source(name=name, limit=1000), 1)[0] == 1000
    with pytest.raises(RecipeError, match="give it a limit"):
        source_size(Source(name=name), 1)


def test_splits_to_choose_from_and_a_hub_that_does_not_answer_are_one_line(monkeypatch):
    rows = datasets.Dataset.from_list([{"question": "1?"}]).to_iterable_dataset()
    splits = datasets.IterableDatasetDict({"easy": rows, "hard": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    with pytest.raises(DataError, match="has the splits easy, hard; name one, as in owner/set::easy"):
        read_source(Source(name="owner/set"), 1, False, 0)

    def away(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(DataError, match="owner/set from the hub: cannot be read: no route;"):
        read_source(Source(name="owner/set"), 1, False, 0)


@pytest.mark.parametrize("name", ["none.jsonl", "data/none.jsonl", "data/none.json.gz", "/no/such", "./a/b", "nowhere"])
def test_a_file_that_is_not_there_is_no_set_on_the_hub(name):
    assert hub_source(Source(name=name)) is None
    with pytest.raises(DataError, match=rf"prompts\.sources: '{name}' is no file; allowed are bundled"):
        read_source(Source(name=name), 1, False, 0)


# --- duplicates, evaluation prompts, ids -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "dropped"),
    [
        ([{"messages": [USER, {"role": "user", "content": f"and {i}?"}]} for i in range(4)], 0),
        (
            [{"messages": [USER, {"role": "assistant", "content": f"{i}"}, MORE]} for i in range(4)]
            + [{"prompt": "x"}],
            3,
        ),
        ([{"system": f"{i}", "prompt": ASKED} for i in range(4)], 0),
        ([{"system": word, "prompt": ASKED} for word in ("Be  short.", "be SHORT.", "Be long.", "Be fair.")], 1),
        ([{"tools": [{"name": f"{i}"}], "prompt": ASKED} for i in range(4)], 0),
        ([{"tools": tools, "prompt": ASKED} for tools in ([{"a": 1, "b": 2}], [{"b": 2, "a": 1}], [], [TOOL])], 1),
    ],
)
def test_duplicates_agree_in_all_that_is_asked(rows, dropped, tmp_path):
    summary, kept = gathered(tmp_path, jsonl(tmp_path / "a.jsonl", rows), max_turns=2)
    assert summary.duplicates_dropped == dropped
    assert len(kept) == len(rows) - dropped - 1


def test_turns_that_are_not_kept_do_not_tell_prompts_apart(tmp_path):
    rows = [{"messages": [{"role": "user", "content": word}, MORE]} for word in ("one", "one ", "two")]
    rows[1]["messages"][1] = USER
    assert gathered(tmp_path, jsonl(tmp_path / "a.jsonl", rows), max_turns=1)[0].duplicates_dropped == 1


def test_conversations_that_begin_with_an_evaluation_question_are_dropped(tmp_path):
    rows = [{"system": "x", "messages": [USER, MORE]}, {"messages": [MORE, USER]}, {"prompt": "Weather, in Oslo?"}]
    evaluation = jsonl(tmp_path / "dev.jsonl", [{"prompt": "WEATHER in  Oslo ?"}, {"prompt": ASKED}])
    summary, kept = gathered(tmp_path, jsonl(tmp_path / "a.jsonl", rows), evaluation=[{"name": str(evaluation)}])
    assert (summary.contaminated_dropped, summary.evaluation_prompts) == (1, 1)
    assert {row.messages[0]["content"] for row in kept} == {MORE["content"], "Weather, in Oslo?"}


def test_what_is_held_out_begins_as_nothing_else_where_that_can_be(tmp_path):
    rows = [{"messages": [USER, {"role": "user", "content": f"{i}?"}]} for i in range(9)] + [{"messages": [MORE, USER]}]
    gathered(tmp_path, jsonl(tmp_path / "a.jsonl", rows), max_turns=2)
    assert [row.messages for row in Prompt.read_rows(tmp_path / "out" / "evaluation.jsonl")] == [[MORE, USER]]


def test_ids_that_clash_are_made_unique_the_same_way_each_time(tmp_path):
    one = jsonl(
        tmp_path / "one.jsonl", [{"id": 0, "prompt": f"one {i}"} for i in range(2)] + [{"id": "x", "prompt": "x"}]
    )
    two = jsonl(tmp_path / "two.jsonl", [{"id": i, "prompt": f"two {i}"} for i in range(2)])
    dev = [{"name": str(jsonl(tmp_path / "dev.jsonl", [{"id": 0, "prompt": f"dev {i}"} for i in range(2)]))}]
    _, kept = gathered(tmp_path, one, two, evaluation=dev)
    ids = {row.messages[0]["content"]: row.id for row in kept}
    assert len(set(ids.values())) == 5
    assert (ids["x"], ids["two 1"], ids["two 0"]) == ("x", "1", "two-0")
    assert ids["one 0"].startswith("one-0-")
    assert [row.id[:6] for row in Prompt.read_rows(tmp_path / "out" / "evaluation.jsonl")] == ["dev-0-"] * 2
    assert {row.messages[0]["content"]: row.id for row in gathered(tmp_path, two, one, evaluation=dev)[1]} == ids


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"id": "a"}, "a"),
        ({"id": 0}, "0"),
        ({"question_id": 81}, "81"),
        ({"id": None, "task_id": "HumanEval/0"}, "HumanEval/0"),
        ({"id": ["a"]}, None),
        ({"id": ""}, None),
        ({"id": True}, None),
        ({}, None),
    ],
)
def test_ids_are_the_rows_own_or_a_digest(row, name, tmp_path):
    path = jsonl(tmp_path / "set.jsonl", [{**row, "prompt": ASKED}])
    (prompt,), _ = read_source(Source(name=str(path)), 1, False, 0)
    assert prompt.id == name if name else prompt.id.startswith("set-")


def test_limit_chooses_among_all_rows_of_a_file(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": f"{i}?"} for i in range(100)])
    chosen = [p.users[0] for p in read_source(Source(name=str(path), limit=5), 1, False, 0)[0]]
    assert len(set(chosen)) == 5
    assert chosen != [f"{i}?" for i in range(5)]
    assert source_size(Source(name=str(path), limit=5), 1)[0] == 5
