"""Named evaluation sets: rows as their pages show them, all turns of each, measured apart."""

import json
import re
import shutil
import sys
from collections import Counter

import datasets
import pytest
from huggingface_hub import ModelCard
from models import WORDS, local_target, save_tiny_target, tiny_recipe, write_prompts

from draftsmith import cli
from draftsmith.core.errors import DataError, RecipeError
from draftsmith.core.recipe_file import dump_recipe, load_recipe
from draftsmith.core.records.base import write_rows
from draftsmith.core.records.data import EvaluationPrompts, Prompt
from draftsmith.core.records.evaluation import Comparison, Results
from draftsmith.core.run_files import RunFiles
from draftsmith.core.sources import EVALUATION_SETS, EvaluationSet
from draftsmith.data.sets import PLACEHOLDER, SETS, read_set
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.generation import Generation
from draftsmith.engines import ENGINES
from draftsmith.engines.base import Setup
from draftsmith.evaluation.acceptance import conversations, count, summarise
from draftsmith.evaluation.asking import Question
from draftsmith.evaluation.compare import pair_up
from draftsmith.evaluation.evaluate import Evaluation

# Rows as the sets' pages show them, shortened; the texts are ours.
ROWS = {
    "mt-bench": [
        {"prompt": ["Write a poem.", "Now shorter."], "reference": [], "category": "writing", "prompt_id": 81},
        {"prompt": ["2 + 2?", "And 3 + 3?"], "reference": ["4", "6"], "category": "math", "prompt_id": 111},
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": "\ndef half(x):\n    '''Half of x.'''\n",
            "canonical_solution": "    return x / 2\n",
            "test": "def check(candidate): assert candidate(4) == 2",
            "entry_point": "half",
        }
    ],
    "gsm8k": [{"question": "Ann has 3 pens and buys 2. How many?", "answer": "3 + 2 = 5\n#### 5"}],
    "math500": [
        {
            "problem": "Solve $x = 1$.",
            "solution": "$1$",
            "answer": "1",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/algebra/1.json",
        }
    ],
    "alpaca": [
        {"instruction": "Sum up.", "input": f"Text {i}" if i % 2 else "", "output": "Yes.", "text": "Below is ..."}
        for i in range(100)
    ],
    "spec-bench": [
        {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Now shorter."]},
        {"question_id": 91, "category": "roleplay", "turns": ["Play a pirate.", "Go on."]},
        {"question_id": 161, "category": "translation", "turns": ["Translate German to English: Guten Tag"]},
    ],
    "speed-bench": [
        {
            "question_id": "a1",
            "category": "coding",
            "sub_category": "python",
            "turns": ["Reverse a list.", "In place."],
            "source": "x",
            "src_id": "1",
            "difficulty": "easy",
            "multiturn": True,
        }
    ],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, name, rows, skip_bad=False, training=None, **options):
    path = write(tmp_path / "rows.jsonl", rows)
    chosen = EvaluationSet(name=name, path=path, **options)
    return read_set(chosen, training or tmp_path / "none", tmp_path / "sets", skip_bad)


def users(found):
    return [prompt.users for prompt in found.prompts]


def test_every_set_that_a_recipe_names_is_declared():
    assert set(SETS) == set(EVALUATION_SETS) == set(ROWS)
    pinned = [known.revision for known in SETS.values() if known.split]
    assert len(pinned) == 5
    assert all(len(revision) == 40 for revision in pinned)


@pytest.mark.parametrize("name", ROWS)
def test_a_set_is_read_from_its_own_rows_and_from_question_files(tmp_path, name):
    found = read(tmp_path, name, ROWS[name])
    first = found.prompts[0]
    expected = {
        "mt-bench": ("81", "writing", ["Write a poem.", "Now shorter."]),
        "humaneval": ("HumanEval/0", "code", ["def half(x):\n    '''Half of x.'''"]),
        "gsm8k": ("gsm8k-0", "math", ["Ann has 3 pens and buys 2. How many?"]),
        "math500": ("test/algebra/1.json", "Algebra", ["Solve $x = 1$."]),
        "alpaca": ("alpaca-0", "chat", ["Sum up."]),
        "spec-bench": ("81", "mt-bench", ["Write a poem.", "Now shorter."]),
        "speed-bench": ("a1", "coding", ["Reverse a list.", "In place."]),
    }
    assert (first.id, first.category, first.users) == expected[name]
    assert found.licence == SETS[name].licence
    told = read(tmp_path, name, [{"question_id": 7, "category": "a", "turns": ["One?", "Two?"]}])
    assert [(p.id, p.category, p.users) for p in told.prompts] == [("7", "a", ["One?", "Two?"])]


def test_alpaca_is_its_first_eighty_and_spec_bench_tells_mt_bench_as_one(tmp_path):
    assert len(read(tmp_path, "alpaca", ROWS["alpaca"]).prompts) == 80
    assert len(read(tmp_path, "alpaca", ROWS["alpaca"], limit=90).prompts) == 90
    assert users(read(tmp_path, "alpaca", ROWS["alpaca"]))[1] == ["Sum up.\n\nText 1"]
    found = read(tmp_path, "spec-bench", ROWS["spec-bench"])
    assert [prompt.category for prompt in found.prompts] == ["mt-bench", "mt-bench", "translation"]


def test_prompts_that_were_trained_on_are_left_out_and_counted(tmp_path, capsys):
    message = {"role": "user", "content": "write  a POEM ."}
    prompt = Prompt(id="t", category="", source="", messages=[message])
    (tmp_path / "training.jsonl").write_bytes(prompt.line())
    found = read(tmp_path, "mt-bench", ROWS["mt-bench"], training=tmp_path / "training.jsonl")
    assert (found.trained_on, users(found)) == (1, [["2 + 2?", "And 3 + 3?"]])
    assert "left out: 1 that were trained on" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"mt-bench: nothing to ask .1 prompts that were trained on"):
        read(tmp_path, "mt-bench", ROWS["mt-bench"][:1], training=tmp_path / "training.jsonl")


def test_two_prompts_of_one_id_are_two(tmp_path):
    rows = [{"id": "x", "q": "One?"}, {"id": "x", "q": "Two?"}]
    found = read(tmp_path, "mine", rows, columns={"question": "q"}, category="ours")
    assert [(p.id, p.category) for p in found.prompts] == [("x", "ours"), ("x-1", "ours")]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("mt-bench", ROWS["gsm8k"], "is no row of mt-bench: it has question, answer, wanted are prompt_id, category, "),
        ("gsm8k", [5], r"rows.jsonl:1: not an object"),
        ("gsm8k", [{}], "it has no columns, wanted are question, answer or question_id, category, turns"),
        ("mine", [{"a": 1}], "has none of the keys"),
        (
            "speed-bench",
            [{"question_id": "a", "category": "qa", "turns": [f"{PLACEHOLDER} FROM THE SOURCE USING SPECDEC_BENCH"]}],
            "holds a placeholder in the place of its text; prepare the set",
        ),
        ("mine", [], "mine: nothing to ask .no rows"),
    ],
)
def test_a_file_in_another_layout_is_one_line(tmp_path, name, rows, message):
    with pytest.raises(DataError, match=message) as refused:
        read(tmp_path, name, rows)
    assert str(refused.value).startswith(f"evaluate.sets: {name}: ")
    assert "\n" not in str(refused.value)


def test_rows_that_are_none_are_counted_where_that_is_allowed(tmp_path):
    found = read(tmp_path, "gsm8k", [*ROWS["gsm8k"], {"other": 1}], skip_bad=True)
    assert (len(found.prompts), found.left_out) == (1, {"malformed row": 1})


def test_a_folder_of_folders_is_not_a_set(tmp_path):
    (tmp_path / "speed" / "qualitative").mkdir(parents=True)
    chosen = EvaluationSet(name="speed-bench", path=tmp_path / "speed")
    with pytest.raises(DataError, match=r"is no file, and no folder that has .json.*the folder of one configuration"):
        read_set(chosen, tmp_path / "none", tmp_path / "sets", False)
    rows = datasets.Dataset.from_list(ROWS["speed-bench"])
    rows.to_parquet(str(tmp_path / "speed" / "qualitative" / "test.parquet"))
    chosen = EvaluationSet(name="speed-bench", path=tmp_path / "speed" / "qualitative")
    assert users(read_set(chosen, tmp_path / "none", tmp_path / "sets", False)) == [["Reverse a list.", "In place."]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mtbench", r"evaluate.sets.0: 'mtbench' given; known are mt-bench, humaneval, .*path: FILE"),
        ("speed-bench", "evaluate.sets.0: speed-bench has no path; its licence lets nobody pass it on"),
        ({"name": "a/b", "path": "x"}, "evaluate.sets.0.name: 'a/b' given"),
    ],
)
def test_an_unknown_set_is_refused_with_the_recipe(given, message):
    with pytest.raises(RecipeError, match=message):
        tiny_recipe("m", "p", **{"evaluate.sets": [given]})


def test_a_set_stands_once():
    with pytest.raises(RecipeError, match=r"evaluate\.sets: gsm8k is given twice"):
        tiny_recipe("m", "p", **{"evaluate.sets": ["gsm8k", {"name": "gsm8k", "path": "x"}]})


@pytest.mark.parametrize("name", [name for name, known in SETS.items() if known.split])
def test_the_hubs_rows_are_read_once_pinned_and_in_order(monkeypatch, tmp_path, name):
    calls = []

    def load(path, config, split, streaming, revision):
        calls.append((path, config, split, revision))
        return datasets.Dataset.from_list(ROWS[name]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    chosen, place = EvaluationSet(name=name), SETS[name]
    found = [read_set(chosen, tmp_path / "none", tmp_path / "sets", False) for _ in range(2)]
    assert calls == [(place.path, place.configs[0], place.split, place.revision)]
    assert found[0] == found[1] == EvaluationPrompts.load(next((tmp_path / "sets").iterdir()))
    assert place.path in found[0].source


@pytest.mark.parametrize("name", ["gsm8k", "spec-bench"])
def test_no_network_is_one_line_that_names_the_way_out(monkeypatch, tmp_path, name):
    def lost(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", lost)
    monkeypatch.setattr("httpx2.get", lost)
    with pytest.raises(DataError, match=f"{name}: .*cannot be read: no route; .*{{name: {name}, path: FILE}}"):
        read_set(EvaluationSet(name=name), tmp_path / "none", tmp_path / "sets", False)


# --- measured ---------------------------------------------------------------------------------------------------------


def test_turns_of_a_prompt_are_one_row_and_contexts_are_apart():
    first = count("a", "x", Generation(list(range(40)), "eos", (3, 0, 1)), 3, before=10)
    second = count("a", "x", Generation(list(range(40)), "eos", (2, 2)), 3, before=600)
    (row,) = conversations([first, second])
    assert (row.steps, row.accepted, row.tokens, row.context) == (5, 8, 80, 640)
    assert row.by_context == {512: (4, 3), 1024: (4, 2)}
    assert row.accepted_at == [4, 3, 1]
    other = count("b", "y", Generation(list(range(40)), "eos", (1,)), 3, before=2000)
    told = summarise([row, other], tiny_recipe("m", "p").evaluate.shapes[0], 0.0)
    assert told.macro == pytest.approx((1 + 8 / 5 + 2) / 2)
    assert told.all.tau == pytest.approx(1 + 9 / 6)
    taus = {edge: value.tau for edge, value in told.by_context.items()}
    assert taus == pytest.approx({512: 7 / 3, 1024: 3.0, 2048: 2.0})
    assert told.longest_context == 2040
    assert count("c", "x", Generation([1, 2], "eos", (0,), in_order=False), 3, before=9).by_context == {}


def test_the_next_turn_has_the_answer_before_it_as_a_server_would_see_it(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_target(tmp_path / "model"))
    chat, (a, b, c) = ChatFormat(tokenizer, None), WORDS[:3]
    asked = Question("1", "x", chat.first_turn(a), [c, a], longest=100)
    answer = Generation(tokenizer(b, add_special_tokens=False).input_ids, "length")
    left_out = Counter()
    following = asked.after(answer, chat, left_out)
    messages = [{"role": r, "content": t} for r, t in (("user", a), ("assistant", b), ("user", c))]
    assert following.ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    last = following.after(answer, chat, left_out)
    assert last.users == []
    assert last.after(answer, chat, left_out) is None, "there is no other turn"
    assert not left_out
    assert Question("1", "x", asked.ids, [c, a], longest=5).after(answer, chat, left_out) is None
    assert asked.after(Generation([], "eos"), chat, left_out) is None
    assert left_out == {"too long": 2, "after an empty answer": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished tiny run, and sets of prompts with two turns."""
    out = tmp_path_factory.mktemp("sets")
    recipe = tiny_recipe(
        save_tiny_target(out / "model"), write_prompts(out / "prompts.jsonl"), **{"evaluate.shapes": ["3/1/4"]}
    )
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    rows = [
        {"question_id": i, "category": ("writing", "math")[i % 2], "turns": [f"{WORDS[i]} w1", f"{WORDS[i]} w2"]}
        for i in range(4)
    ]
    write(out / "question.jsonl", rows)
    write(out / "later.jsonl", [{**row, "turns": [row["turns"][0], "w1 " * 400]} for row in rows])
    write(out / "long.jsonl", [*rows, {"question_id": 9, "category": "x", "turns": ["w1 " * 400]}])
    assert command(out, "run") == 0
    return out


def command(out, name, *flags):
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["draftsmith", name, str(out / "recipe.yaml"), "--out", str(out / "run"), *flags])
    try:
        return cli.main()
    finally:
        patch.undo()


def test_sets_are_measured_beside_the_own_prompts_and_what_was_measured_stands(world, capsys):
    files = RunFiles(world / "run")
    before, parts = Results.load(files.results["embedded"]), files.stage("evaluate") / "parts"
    made = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    mt_bench, long = (f"{{name: {n}, path: {world / f}}}" for n, f in (("mt-bench", "question"), ("long", "long")))
    mt_bench, long = mt_bench.replace("question}", "question.jsonl}"), long.replace("long}", "long.jsonl}")
    assert command(world, "evaluate", "--evaluate.sets", mt_bench, long) == 0
    told = capsys.readouterr().err
    results = Results.load(files.results["embedded"])
    assert results.acceptance == before.acceptance
    assert {path.name: path.stat().st_mtime_ns for path in parts.iterdir() if path.name in made} == made
    one, other = results.sets
    assert [(s.name, s.prompts, s.prompts_available) for s in results.sets] == [("mt-bench", 4, 4), ("long", 4, 5)]
    assert told.count("evaluate: long: 1 of 5 prompts left out: 1 longer than 244 tokens\n") == 1
    assert [e.how for e in one.acceptance] == ["T=0", "T=1", "T=1, sampled drafts"]
    first = one.acceptance[0]
    assert {row.category for row in first.prompts} == {"writing", "math"}
    assert max(row.tokens for row in first.prompts) > 12, "both turns count"
    assert first.macro == pytest.approx(sum(value.tau for value in first.by_category.values()) / 2)
    assert one.digest != other.digest
    assert results.settings.window == 256
    made = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert command(world, "evaluate", "--evaluate.sets", long) == 0
    assert [s.name for s in Results.load(files.results["embedded"]).sets] == ["long"]
    assert {path.name: path.stat().st_mtime_ns for path in parts.iterdir()} == made, "nothing is measured again"
    assert command(world, "report", "--evaluate.sets", long) == 0
    page = files.report.read_text()
    assert "long: 4 of 5 prompts, all turns of each" in page
    assert "The target reads 256 tokens at once" in page
    assert command(world, "card", "--card.licence", "mit", "--card.base-model", "a/b") == 0
    card = files.card.read_text()
    assert "| long | draftsmith | 3/1/4 | 0 | greedy |" in card
    assert "of the 256 that the target can read, and nothing is known beyond" in card
    assert "- long: long.jsonl (not stated)" in card
    assert str(world) not in card
    head = ModelCard(card).data.eval_results
    assert {(e.dataset_type, e.dataset_name) for e in head} == {
        ("prompts", "6 prompts held out of training"),
        ("long", "long"),
    }


def test_own_prompts_that_are_too_long_are_told_once(world, capsys):
    held_out = RunFiles(world / "run").evaluation_prompts
    prompts = list(Prompt.read_rows(held_out))
    prompts[0] = prompts[0].model_copy(update={"messages": [{"role": "user", "content": "w1 " * 300}]})
    write_rows(world / "held_out.jsonl", prompts)
    recipe = load_recipe(world / "recipe.yaml", {"evaluate": {"prompts": 4}})
    target = local_target(recipe.target.model)
    setup = Setup(recipe, RunFiles(world / "run").draft, world, target)
    evaluation = Evaluation(ENGINES["embedded"], setup, world / "held_out.jsonl", world / "none")
    for _ in range(2):
        assert len(evaluation.questions(target)) == 3
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert re.search(
        r"evaluate: own: 1 of 4 prompts left out: 1 longer than \d+ tokens; raise regenerate\.max_prompt_tokens", told
    )


def test_turns_that_cannot_be_asked_are_told(world, capsys):
    later = f"{{name: later, path: {world / 'later.jsonl'}}}"
    assert command(world, "evaluate", "--evaluate.sets", later) == 0
    told, unasked = capsys.readouterr().err, "4 of 8 turns asked: 4 too long"
    results = Results.load(RunFiles(world / "run").results["embedded"])
    assert all(entry.unasked == unasked for entry in results.sets[0].acceptance)
    assert [(e.turns, e.unasked) for e in results.acceptance] == [(6, "")] * 3
    assert f"; {unasked}" in told
    assert command(world, "report", "--evaluate.sets", later) == 0
    assert command(world, "card", "--card.licence", "mit", "--card.base-model", "a/b") == 0
    page, card = RunFiles(world / "run").report.read_text(), RunFiles(world / "run").card.read_text()
    assert "all turns" not in page + card
    assert f"later, 3/1/4, T=0: {unasked}." in page
    assert f"later, draftsmith, 3/1/4, T=0: {unasked}." in card
    capsys.readouterr()
    shutil.copytree(RunFiles(world / "run").draft, world / "twin")
    assert command(world, "compare", "--drafts", str(world / "twin"), "--evaluate.sets", later) == 0
    assert unasked in capsys.readouterr().out


def test_compare_has_the_sets_with_paired_differences(world, capsys):
    shutil.copytree(RunFiles(world / "run").draft, world / "other")
    mine = f"{{name: mine, path: {world / 'question.jsonl'}}}"
    assert command(world, "compare", "--drafts", str(world / "other"), "--evaluate.sets", mine) == 0
    drafts = Comparison.load(RunFiles(world / "run").comparison).drafts
    assert [s.name for s in drafts[1].sets] == ["mine"]
    hows = ["T=0", "T=1", "T=1, sampled drafts"]
    assert [(name, e.how) for name, e in drafts[1].entries] == [(name, how) for name in ("", "mine") for how in hows]
    assert [against.difference for against in drafts[1].against_first] == [0] * 6
    assert re.search(r"mine +3/1/4, T=1, sampled drafts +1\.", capsys.readouterr().out)
    wanting = drafts[0].model_copy(update={"acceptance": drafts[0].acceptance[:1], "sets": []})
    told = pair_up([wanting, drafts[1]])[1].against_first
    assert [against.difference for against in told] == [0] + [None] * 5, "only like is set beside like"
