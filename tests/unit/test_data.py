"""Prompts, templates, regeneration, vocabulary, packing, loops."""

import gzip
import itertools
import json
import math
from collections import Counter
from random import Random
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from models import (
    VOCAB,
    WORDS,
    local_target,
    read_source,
    save_tiny_target,
    tiny_lm,
    tiny_recipe,
    tiny_target,
    tiny_tokenizer,
    write_prompts,
)

from draftsmith.core.errors import CheckpointError, DataError
from draftsmith.core.files import save_tensors
from draftsmith.core.recipe import Template
from draftsmith.core.records.data import Completion, CompletionsSummary, Prompt
from draftsmith.core.sources import Source
from draftsmith.data.prompts import gather
from draftsmith.data.regenerate import Regeneration, longest_prompt, loss_tokens, read_completions, summarise
from draftsmith.data.rows import read_row
from draftsmith.data.sources import BUNDLED, HUB
from draftsmith.data.templates import ChatFormat
from draftsmith.data.vocabulary import DraftVocabulary, choose, coverage_of
from draftsmith.decoding.stopping import loop_onset, loops
from draftsmith.drafts.packing import epoch_packs, make_pack, on_prompts

USER = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": " hello "}, USER),
        ({"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]}, USER),
        ({"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "x"}]}, USER),
        (
            {"conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hello"}]},
            [{"role": "system", "content": "be kind"}, *USER],
        ),
        ({"messages": [*USER, {"role": "assistant", "content": "x"}, *USER, *USER]}, USER * 2),
    ],
)
def test_three_forms_give_the_same_turns(row, expected):
    assert read_row(row, max_turns=2)[0] == expected


@pytest.mark.parametrize(
    "row",
    [
        {"text": "x"},
        {"prompt": ""},
        {"prompt": 3},
        {"messages": [{"role": "robot", "content": "x"}]},
        7,
        {},
        {"messages": None},
    ],
)
def test_rows_without_a_prompt_are_refused(row):
    with pytest.raises(DataError):
        read_row(row, max_turns=1)


def test_a_bad_line_names_file_line_and_reason(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": \n{"text": "x"}\n{"prompt": "two"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2: not JSON.*--prompts\.skip-bad"):
        read_source(Source(name=str(path)), 1, False, 0)
    prompts, bad = read_source(Source(name=str(path)), 1, True, 0)
    assert ([p.users[0] for p in prompts], bad) == (["one", "two"], 2)


def test_parquet_is_read_like_jsonl(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["one", "two"]}), tmp_path / "p.parquet")
    prompts, _ = read_source(Source(name=str(tmp_path / "p.parquet"), category="chat"), 1, False, 0)
    assert [(p.users[0], p.category) for p in prompts] == [("one", "chat"), ("two", "chat")]


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        ("ultrachat", {"messages": USER, "prompt_id": "7"}, "hello"),
        ("opencodeinstruct", {"input": "write it", "output": "x"}, "write it"),
        ("codealpaca", {"instruction": "sort", "input": "3 1", "output": "1 3"}, "sort\n\n3 1"),
        ("gsm8k", {"question": "how many", "answer": "#### 3"}, "how many"),
        ("hendrycks-math", {"problem": "find x", "solution": "1"}, "find x"),
    ],
)
def test_hub_columns_are_mapped(monkeypatch, name, row, text):
    """The hub itself is not reachable from tests; what is tested is which data set and columns are asked for."""
    asked = []

    def load(path, config, split, revision, streaming):
        assert revision is None  # as it is there today
        asked.append((path, config, split))
        return datasets.Dataset.from_list([row]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    prompts, _ = read_source(Source(name=name, limit=1), 1, False, 0)
    assert prompts[0].users == [text]
    assert prompts[0].category == HUB[name].category
    assert asked[0][0] == HUB[name].path


def test_duplicates_and_evaluation_prompts_are_dropped(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in ["A cat.", "a  CAT .", "A dog.", "A bird."])
    )
    (tmp_path / "dev.jsonl").write_text(json.dumps({"prompt": "a dog."}) + "\n")
    recipe = tiny_recipe(
        "m", str(tmp_path / "train.jsonl"), **{"prompts.evaluation": [{"name": str(tmp_path / "dev.jsonl")}]}
    )
    summary = gather(recipe, tmp_path / "out")
    assert (summary.prompts, summary.duplicates_dropped, summary.contaminated_dropped) == (2, 1, 1)
    kept = {prompt.users[0].casefold().split()[1] for prompt in Prompt.read_rows(tmp_path / "out" / "prompts.jsonl")}
    assert {word.rstrip(".") for word in kept} == {"cat", "bird"}


def test_the_bundled_set_is_large_varied_and_clean():
    rows = [json.loads(line) for line in gzip.decompress(BUNDLED["bundled"].read_bytes()).splitlines()]
    assert min(Counter(row["category"] for row in rows).values()) >= 150
    assert set(Counter(row["category"] for row in rows)) == {"chat", "code", "math"}
    words = [set(row["prompt"].lower().split()) for row in rows]
    overlap = max(len(a & b) / len(a | b) for a, b in itertools.combinations(words, 2))
    assert overlap < 0.7


def test_a_tokenizer_without_template_asks_for_one():
    with pytest.raises(DataError, match=r"target\.template"):
        ChatFormat(tiny_tokenizer(chat_template=None), None)


@pytest.fixture
def regenerated(tmp_path):
    """(recipe, target, chat, prompts file, directory) after one whole regeneration."""
    recipe = tiny_recipe("m", write_prompts(tmp_path / "p.jsonl"), **{"regenerate.greedy_share": 0.5})
    gather(recipe, tmp_path)
    target = tiny_target(batch_size=4)
    target.tokenizer = tiny_tokenizer()
    arguments = (recipe, target, ChatFormat(target.tokenizer, None), tmp_path / "prompts.jsonl")
    Regeneration(*arguments, tmp_path / "completions").run()
    return arguments, tmp_path / "completions"


def test_stored_ids_are_what_the_target_generated(regenerated):
    (_, target, chat, prompts), out = regenerated
    by_id = {p.id: p for p in Prompt.read_rows(prompts)}
    rows = list(read_completions(out))
    assert {row.id for row in rows} == set(by_id)
    lm = tiny_lm()
    greedy = [row for row in rows if row.sampling[0] == 0]
    assert 0 < len(greedy) < len(rows)
    for row in greedy:
        start = row.spans[0][0]
        assert row.ids[:start] == chat.first_turn(by_id[row.id].users[0])
        expected = lm.generate(torch.tensor([row.ids[:start]]), max_new_tokens=24, do_sample=False)[0].tolist()
        assert row.ids == expected
    assert target.identity.vocab_size == VOCAB


def test_an_interrupted_regeneration_ends_with_the_same_files(regenerated, tmp_path):
    arguments, out = regenerated
    again = tmp_path / "again"
    again.mkdir()
    (again / "00000.jsonl").write_bytes((out / "00000.jsonl").read_bytes())
    (again / ".00001.jsonl.tmp").write_bytes(b'{"id": "torn')  # what a kill leaves of the file in flight
    Regeneration(*arguments, again).run()
    names = sorted(p.name for p in out.glob("0*.jsonl"))
    assert names == sorted(p.name for p in again.glob("0*.jsonl"))
    for name in [*names, "summary.json"]:
        assert (again / name).read_bytes() == (out / name).read_bytes()


def asked_for(recipe, out, max_tokens):
    """Files of a regeneration that was asked for that many tokens."""
    target = local_target(recipe.target.model, batch_size=recipe.regenerate.batch_size)
    settings = recipe.regenerate.model_copy(update={"max_tokens": max_tokens})
    recipe = recipe.model_copy(update={"regenerate": settings})
    Regeneration(recipe, target, ChatFormat(target.tokenizer, None), out.parent / "prompts.jsonl", out).run()
    return {path.name: path.read_bytes() for path in sorted(out.glob("[0-9]*.jsonl"))}


def written(files):
    rows = [json.loads(line) for content in files.values() for line in content.splitlines()]
    return sum(end - start for row in rows for start, end in row["spans"])


def talks(tmp_path, max_turns):
    """The recipe of a run that has prompts of so many user turns."""
    model = save_tiny_target(tmp_path / "m")
    prompts = tmp_path / "asked.jsonl"
    turns = [{"role": "user", "content": f"{WORDS[i % 9]} w{i}"} for i in range(90)]
    rows = [{"id": f"p{i}", "messages": turns[i : i + max_turns]} for i in range(60)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"prompts.held_out": 1, "prompts.max_turns": max_turns, "regenerate.shard_prompts": 40}
    recipe = tiny_recipe(model, str(prompts), **changes)
    gather(recipe, tmp_path)
    return recipe


@pytest.mark.parametrize("max_turns", [1, 3])
def test_max_tokens_is_kept_within_a_batch_and_a_continued_run_ends_with_the_same_files(tmp_path, max_turns):
    recipe = talks(tmp_path, max_turns)
    batch = recipe.regenerate.batch_size * recipe.regenerate.max_new_tokens
    whole = asked_for(recipe, tmp_path / "whole", None)
    few = asked_for(recipe, tmp_path / "few", 150)
    assert 150 <= written(few) < 150 + batch
    more = asked_for(recipe, tmp_path / "more", 300)
    assert written(few) < written(more) < 300 + batch
    assert written(more) < written(whole)
    # an earlier run's end is not this one's: the shard it stopped in is written again
    assert asked_for(recipe, tmp_path / "few", 300) == more
    assert asked_for(recipe, tmp_path / "few", None) == whole
    assert asked_for(recipe, tmp_path / "few", 150) == asked_for(recipe, tmp_path / "again", 150)
    assert all(row["ids"][row["spans"][-1][1] :] == [] for row in map(json.loads, more["00000.jsonl"].splitlines()))


def test_talks_that_a_limit_ended_go_on_where_it_is_raised(tmp_path):
    """All of a shard's prompts had an answer by then, so it was taken for complete."""
    recipe = talks(tmp_path, 3)
    whole = asked_for(recipe, tmp_path / "whole", None)
    first = [row for row in Completion.read_rows(tmp_path / "whole" / "00000.jsonl") if row.document == 0]
    asked_for(recipe, tmp_path / "few", 1 + sum(row.spans[0][1] - row.spans[0][0] for row in first))
    few = list(Completion.read_rows(tmp_path / "few" / "00000.jsonl"))
    assert {row.id for row in first} <= {row.id for row in few}
    assert any("past regenerate.max_tokens" in row.turns_left_out for row in few)
    assert asked_for(recipe, tmp_path / "few", None) == whole


@pytest.mark.parametrize("shard", [30, 60])
def test_few_shards_hold_the_share_of_greedy_answers(tmp_path, shard, capsys):
    """Shards were greedy or drawn as a whole, so a run of one or two of them had none of its third."""
    model, prompts = save_tiny_target(tmp_path / "m"), write_prompts(tmp_path / "p.jsonl", 62)
    changes = {"prompts.held_out": 1, "regenerate.shard_prompts": shard, "regenerate.greedy_share": 0.34}
    recipe = tiny_recipe(model, prompts, **changes)
    gather(recipe, tmp_path)
    batch = recipe.regenerate.batch_size * recipe.regenerate.max_new_tokens
    assert recipe.regenerate.max_prompt_tokens > local_target(model).context
    for max_tokens in (None, 300):
        out = tmp_path / str(max_tokens)
        asked_for(recipe, out, max_tokens)
        rows = list(read_completions(out))
        greedy = loss_tokens(row for row in rows if row.sampling[0] == 0)
        assert CompletionsSummary.load(out / "summary.json").greedy_tokens == greedy
        assert abs(greedy - 0.34 * loss_tokens(rows)) < batch
        assert 0 < greedy < loss_tokens(rows) < (max_tokens or math.inf) + batch
    assert f"prompts may have {local_target(model).context - 1} tokens, as an answer needs" in capsys.readouterr().err


def test_a_template_that_stops_at_once_is_an_error(tmp_path):
    model = save_tiny_target(tmp_path / "m")
    template = {"user": "{content}", "assistant": " <assistant>", "stop": list("abcdefghijklmnopqrstuvwxyz<")}
    recipe = tiny_recipe(model, write_prompts(tmp_path / "p.jsonl"), **{"target.template": template})
    gather(recipe, tmp_path)
    target = local_target(model)
    target.eos_ids = frozenset()
    with pytest.raises(DataError, match="no loss tokens"):
        Regeneration(
            recipe,
            target,
            ChatFormat(target.tokenizer, Template(**template)),
            tmp_path / "prompts.jsonl",
            tmp_path / "completions",
        ).run()


def test_vocabulary_is_the_most_frequent_tokens():
    vocabulary = choose(Counter({5: 9, 7: 3, 9: 3, 11: 1}), 4, 20, always={0})
    assert vocabulary.ids_D.tolist() == [0, 5, 7, 9]
    assert vocabulary.d2t.tolist() == [0, 4, 5, 6]
    assert vocabulary.t2d.nonzero().flatten().tolist() == [0, 5, 7, 9]
    assert choose(Counter({5: 1}), 3, 20, {0}).ids_D.tolist() == [0, 1, 5]
    table = coverage_of(vocabulary, {"a": Counter({5: 3, 7: 1})}, {0})
    assert table.coverage["a"][0] == 1.0
    assert (table.loss_tokens, table.distinct_tokens, table.chosen) == (4, 2, {"all": 1.0, "a": 1.0})
    with pytest.raises(DataError, match="larger than the target's vocabulary"):
        choose(Counter(), 21, 20, set())


def test_a_vocabulary_is_checked_when_read(tmp_path):
    vocabulary = choose(Counter({5: 9, 7: 3}), 3, 20, {0})
    vocabulary.save(tmp_path / "v.safetensors")
    assert DraftVocabulary.load(tmp_path / "v.safetensors").name == vocabulary.name
    d2t, t2d = vocabulary.d2t, vocabulary.t2d
    for wrong in ((d2t, t2d.roll(1)), (d2t.flip(0), t2d), (d2t[:-1], t2d), (d2t, t2d[:5])):
        save_tensors(tmp_path / "w.safetensors", dict(zip(("d2t", "t2d"), wrong, strict=True)))
        with pytest.raises(CheckpointError, match="name different tokens"):
            DraftVocabulary.load(tmp_path / "w.safetensors")
    save_tensors(tmp_path / "w.safetensors", {"d2t": d2t})
    with pytest.raises(CheckpointError, match="cannot read the draft vocabulary: 't2d'"):
        DraftVocabulary.load(tmp_path / "w.safetensors")


def test_chains_are_where_serving_drafts():
    pack = make_pack([Completion(id="a", ids=list(range(10)), spans=[[4, 10]])])
    # the first completion token, 4, comes from the prompt's forward; drafting starts beside it and predicts token 5
    assert pack.chains_R.tolist() == [3, 4, 5, 6, 7]
    assert pack.step_rows(0).tolist() == [0, 1, 2, 3, 4]
    assert pack.step_rows(2).tolist() == [0, 1, 2]
    assert pack.step_rows(6).tolist() == []
    cut = make_pack([Completion(id="a", ids=list(range(7)), spans=[[4, 10]])])
    assert (len(cut.ids_T), cut.chains_R.tolist()) == (7, [3, 4])
    for beyond in ([6, 9], [7, 9], [9, 12]):  # a later turn, of which the cut leaves one token or none
        turns = make_pack([Completion(id="a", ids=list(range(7)), spans=[[2, 6], beyond])])
        assert turns.chains_R.tolist() == [1, 2, 3]


def test_the_loss_falls_on_prompts_but_for_what_every_text_begins_with():
    rows = [
        Completion(id="a", ids=[1, 2, 3, 4, 5, 6, 7], spans=[(4, 7)]),
        Completion(id="b", ids=[1, 2, 9, 4, 5], spans=[(3, 4), (4, 5)]),
        Completion(id="c", ids=[1, 2, 9, 8, 5], spans=[(4, 5)]),
    ]
    assert [row.spans for row in on_prompts(rows)] == [[(2, 7)], [(2, 5)], [(2, 5)]]
    assert [row.ids for row in on_prompts(rows)] == [row.ids for row in rows]
    assert make_pack(on_prompts(rows)[:1]).chains_R.tolist() == [1, 2, 3, 4]
    # alike up to an answer: that much is still trained on; nothing in common: the first token has no feature before it
    assert on_prompts(rows[:1])[0].spans == [(4, 7)]
    assert on_prompts([rows[0], Completion(id="d", ids=[5, 2], spans=[(1, 2)])])[0].spans == [(1, 7)]


def test_packs_hold_every_document_once():
    lengths = [5, 30, 12, 8, 35, 3]
    packs = epoch_packs(lengths, 40, seed=1, epoch=0)
    assert sorted(i for pack in packs for i in pack) == list(range(6))
    assert all(sum(lengths[i] for i in pack) <= 40 for pack in packs)
    assert packs == epoch_packs(lengths, 40, seed=1, epoch=0)
    assert packs != epoch_packs(lengths, 40, seed=1, epoch=1)


@pytest.mark.parametrize(
    ("ids", "onset"),
    [
        (list(range(100)), None),
        ([1, 2, 3] * 12, 3),
        (list(range(50)) + [7] * 40, 51),
        ([1, 2, 3] * 5 + list(range(40)), None),  # a short refrain
        (list(range(100, 130)) + list(range(20)) * 3, 50),
        (list(range(100, 130)) + list(range(20)) * 2, None),  # only twice
        ([], None),
        ([4], None),
    ],
)
def test_loops_are_found_where_they_begin(ids, onset):
    assert loop_onset(ids) == onset


def test_a_loop_is_seen_at_the_look_after_it_became_one():
    """The quick look against the whole one, on noisy loops of every period that is looked for, and one more."""
    random, found = Random(0), 0
    for case in range(300):
        period, at, letters = 1 + case % 65, random.randrange(150), random.choice([2, 5, 1000])
        base = [random.randrange(letters) for _ in range(period)]
        ids = [
            random.randrange(letters) if i < at or random.random() < 0.002 else base[(i - at) % period]
            for i in range(400)
        ]
        for end in range(16, len(ids) + 1, 16):
            whole = loop_onset(ids[:end]) is not None
            assert loops(ids[:end]) == whole
            if whole:
                found += 1
                break
    assert 150 < found < 300
    for after in range(16):  # one that ends as soon as it is one, so many tokens before a look
        for period in (1, 11, 12, 64):
            looping = [i % period for i in range(period + max(2 * period, 24))]
            before = list(range(1000, 1000 + (-len(looping) - after) % 16 + 16))
            ids = [*before, *looping, *range(2000, 2000 + after)]
            assert loops(ids)
            assert not loops([*before[:-1], 3000, *looping[1:], *range(2000, 2000 + after)])


def test_summary_counts_what_happened(regenerated):
    _, out = regenerated
    summary = CompletionsSummary.load(out / "summary.json")
    rows = list(read_completions(out))
    assert summary.completions == len(rows)
    assert summary.completion_tokens == sum(e - s for row in rows for s, e in row.spans)
    assert sum(summary.finish_reasons.values()) == len(rows)
    assert summary.turns_left_out == {}


def test_turns_that_were_never_asked_are_in_summary_and_line(tmp_path, capsys):
    rows = [Completion(id=str(i), ids=[1, 2], spans=[(1, 2)], finish_reason="length") for i in range(3)]
    rows[0] = rows[0].model_copy(update={"turns_left_out": {"too long": 1}})
    rows[2] = rows[2].model_copy(update={"turns_left_out": {"after an answer that was cut off": 2}})
    summary = summarise(rows, Counter())
    assert summary.turns_left_out == {"too long": 1, "after an answer that was cut off": 2}
    told = "; 3 later user turns were not asked: 2 after an answer that was cut off, 1 too long"
    assert told in capsys.readouterr().err
    summarise(rows[1:2], Counter())
    assert "later user turns" not in capsys.readouterr().err


def test_servers_keep_room_for_the_longest_answer():
    """They refuse a request that might not end; in this process an answer is cut where the context ends."""
    identity = SimpleNamespace(max_position_embeddings=256)
    here, served = (SimpleNamespace(identity=identity, independent=independent) for independent in (False, True))
    recipe = tiny_recipe("m", "p")
    assert longest_prompt(recipe, here, 24) == 255
    assert longest_prompt(recipe, served, 24) == 232
    assert longest_prompt(tiny_recipe("m", "p", **{"serve.context": 128}), served, 24) == 104
    assert longest_prompt(tiny_recipe("m", "p", **{"regenerate.max_prompt_tokens": 9}), served, 24) == 9
