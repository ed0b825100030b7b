"""Records survive their files, refuse what is no record of theirs in one line, and are what docs/files.md says."""

import math
from pathlib import Path

import pytest

from draftsmith.core.errors import DataError
from draftsmith.core.records.base import Record, write_rows
from draftsmith.core.records.data import Completion, Prompt
from draftsmith.core.records.evaluation import Difference, Lossless, PlainReference, Tau, TimedGroup
from draftsmith.core.records.machine import DraftTimes, ModelTimes, Prediction, Predictions, Probe, Tried, Tuned
from draftsmith.core.records.run import Hardware, Manifest, Provenance, StageRun, TargetIdentity
from draftsmith.core.records.training import Belongs, Best, HeldOut, MetricsRow, TrainingState
from draftsmith.core.shape import Shape

ROOT = Path(__file__).parents[2]
MADE_BY = Provenance(
    command="draftsmith run r.yaml",
    commit=None,
    versions={"torch": "2.13"},
    seed=1,
    hardware=Hardware(cpu="Test CPU", cores=2, gpus=("H100", "H100"), system="Test"),
)
IDENTITY = TargetIdentity(
    model="tiny",
    revision=None,
    dtype="fp32",
    architecture="LlamaForCausalLM",
    num_layers=6,
    hidden_size=32,
    vocab_size=64,
    max_position_embeddings=256,
    tokenizer_hash="a",
    template_hash="b",
    quantization=None,
)
PREDICTION = Prediction(
    machine="here",
    shape=Shape(3, 4, 8),
    batch=64,
    context=512,
    tau=2.2,
    decode_s=0.01,
    verify_s=math.nan,
    draft_s=0.003,
    overhead_s=0.0,
    c=math.nan,
    speedup=math.nan,
)
KINDS = [
    Prompt(id="a", category="chat", source="s", messages=[{"role": "user", "content": "é\n\u2028"}], tools=[{"f": 1}]),
    Completion(id="a", ids=[1, 2, 3], spans=[(1, 3)], finish_reason="eos", sampling=(0.8, 0.95, 64), document=1),
    Manifest(created_with=MADE_BY, stages={"train": StageRun(ran=True, why="asked for", seconds=1.5)}),
    MetricsRow(step=3, held_out=HeldOut(match=[0.5], alpha=[0.4], tau={1: 1.5, 3: 1.9}, verifications=7)),
    TrainingState(
        belongs=Belongs(
            method="eagle3",
            draft={"taps": [1, 3]},
            vocabulary="v",
            target=IDENTITY,
            train={"lr": 1e-4},
            seed=0,
            data="d",
        ),
        step=3,
        taus=[1.1, 0.1 + 0.2],
        best=Best(step=2, tau_held_out=1.1),
    ),
    Lossless(
        dtype="fp32",
        prompts=2,
        tokens_per_prompt=16,
        tokens=32,
        shapes=(Shape(3, 1, 4), Shape(3, 4, 8)),
        differences=[Difference(id="a", shape=Shape(3, 4, 8), token=3, plain=1, drafted=2, logit_gap=1e-4)],
    ),
    PlainReference(outputs=[[1, 2], []], timed={1: [TimedGroup(tokens=2, seconds=0.5)], 16: []}),
    Probe(
        engine="vllm",
        machine="made up",
        times=ModelTimes(context=128, context_s=0.0, forward=((1.0, 0.01),), draft=DraftTimes(by_batch=((8.0, 0.1),))),
    ),
    Tuned(
        engine="embedded",
        draft=None,
        temperature=1.0,
        best=None,
        tried=[Tried(shape=Shape(5, 1, 6), drafts="sampled", speedup=0.9, prompts=4)],
        created_with=MADE_BY,
    ),
    Predictions(sentence="do not", rows=[PREDICTION]),
]


def test_the_document_is_what_the_records_say(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from describe_files import document

    assert (ROOT / "docs" / "files.md").read_text() == document(), "python scripts/describe_files.py"


@pytest.mark.parametrize("record", KINDS, ids=lambda record: type(record).__name__)
def test_a_record_survives_its_file(tmp_path: Path, record: Record) -> None:
    record.save(tmp_path / "folder" / "record.json")
    loaded = type(record).load(tmp_path / "folder" / "record.json")
    assert repr(loaded) == repr(record), "NaN is not equal to itself, but reads alike"
    write_rows(tmp_path / "rows.jsonl", [record, record])
    assert list(map(repr, type(record).read_rows(tmp_path / "rows.jsonl"))) == [repr(record)] * 2


def test_shapes_are_text_and_unknown_numbers_null_in_files(tmp_path: Path) -> None:
    PREDICTION.save(tmp_path / "prediction.json")
    text = (tmp_path / "prediction.json").read_text()
    assert '"shape": "3/4/8"' in text
    assert '"speedup": null' in text
    loaded = Prediction.load(tmp_path / "prediction.json")
    assert loaded.shape == Shape(3, 4, 8)
    assert math.isnan(loaded.speedup)


def test_a_row_leaves_out_what_has_its_default() -> None:
    assert Completion(id="a", ids=[1], spans=[]).line() == b'{"id":"a","ids":[1],"spans":[]}\n'


@pytest.mark.parametrize("probe", sorted((ROOT / "benchmarks" / "results").glob("probe-*.json")), ids=lambda p: p.stem)
def test_recorded_probes_are_records(tmp_path: Path, probe: Path) -> None:
    Probe.load(probe).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == probe.read_bytes()


TAU = b'{"tau": 2.0, "prompts": 1, "steps": 1'


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "Invalid JSON"),
        (TAU, "Invalid JSON"),
        (b'{"tau": "\xff"}', "Invalid JSON"),
        (b"null", "should be an object"),
        (b'{"tau": 2.0}', "prompts: Field required"),
        (TAU + b', "prompts": "many"}', "prompts: Input should be a valid integer"),
        (TAU + b', "partial": false}', "partial: Extra inputs are not permitted"),
    ],
    ids=["empty", "cut off", "not UTF-8", "no object", "a key is missing", "a wrong type", "a key of another version"],
)
def test_what_is_no_record_is_one_line_that_names_the_file(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        Tau.load(path)
    assert str(caught.value).startswith(f"{path}: is no Tau (")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_row_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    path.write_bytes(Completion(id="a", ids=[1], spans=[]).line() + b'{"id": "b", "ids": [1')
    rows = Completion.read_rows(path)
    assert next(rows).id == "a"
    with pytest.raises(DataError) as caught:
        next(rows)
    assert str(caught.value).startswith(f"{path}:2: is no Completion (")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert Tau.found(tmp_path / "results.json") is None
