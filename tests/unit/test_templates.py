"""Every answer is asked for as a server's chat endpoint would ask for it, and what it wrote is kept as ids."""

import time
from collections import Counter

import pytest
from models import local_target, save_tiny_target, tiny_recipe, tiny_target, tiny_tokenizer

from draftsmith.core.errors import DataError
from draftsmith.core.recipe import TargetRecipe, Template
from draftsmith.core.recipe_file import parse_recipe
from draftsmith.core.records.base import write_rows
from draftsmith.core.records.data import Prompt
from draftsmith.data import rendering
from draftsmith.data.regenerate import Conversation, Regeneration, open_conversations, read_completions
from draftsmith.data.templates import ChatFormat, Rendered
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.sampling import Sampling
from draftsmith.targets.weights import WeightsOnlyTarget

TURN = (
    "{% for m in messages %}<{{ m.role }}> BODY <turn_end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> OPEN{% endif %}"
)
PLAIN = TURN.replace("BODY", "{{ m.content }}").replace("OPEN", "")
STRIPS = TURN.replace("BODY", "{{ m.content.split('</think>')[-1].strip() }}")
SHOWS = TURN.replace(
    "BODY",
    "{% if m.reasoning_content is defined %}<think> {{ m.reasoning_content }} </think> {% endif %}{{ m.content }}",
)
SPECIALS = ["<turn_end>", "<return>", "<think>", "</think>", "<user>", "<assistant>", "<system>"]


SAMPLING = Sampling(1.0)


def prompt_of(name, *users, system=None):
    """A prompt of user turns, which the target will answer."""
    before = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": user} for user in users]
    return Prompt(id=name, category="chat", source="s", messages=before + turns)


def tokenizer_with(template, specials=SPECIALS):
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    return tokenizer


def second_turn(template, written, reason="eos", **options):
    """(conversation after its first answer, the tokenizer)."""
    tokenizer = tokenizer_with(template)
    chat = ChatFormat(tokenizer, None, options)
    talk = Conversation(prompt_of("p", "the a", system="be it"), ["of to"], chat.first_turn("the a", "be it"))
    ids = tokenizer(written, add_special_tokens=False).input_ids
    assert talk.extend(Generation(ids, reason), chat, 200) == talk.ids
    return talk, tokenizer


def served(tokenizer, visible, thought=None):
    reply = {"role": "assistant", "content": visible} | ({"reasoning_content": thought} if thought else {})
    history = [{"role": "system", "content": "be it"}, {"role": "user", "content": "the a"}, reply]
    return tokenizer.apply_chat_template(
        [*history, {"role": "user", "content": "of to"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]


@pytest.mark.parametrize(
    ("template", "written", "visible", "thought", "documents"),
    [
        (PLAIN, "w1 w2 <turn_end>", "w1 w2", None, 0),  # goes on where it stands: one document
        (PLAIN, "w1 w2 <return>", "w1 w2", None, 1),  # generation ends otherwise than the template
        (PLAIN, "w1 w2 <end>", "w1 w2", None, 1),
        (STRIPS.replace("OPEN", ""), "<think> w9 w8 </think> w1 w2 <turn_end>", "w1 w2", None, 1),
        (STRIPS.replace("OPEN", "<think>"), "w9 w8 </think> w1 w2 <turn_end>", "w1 w2", None, 1),
        (SHOWS.replace("OPEN", ""), "<think> w9 w8 </think> w1 w2 <turn_end>", "w1 w2", "w9 w8", 0),
        (PLAIN, "<think> w9 </think> w3 <think> w8 </think> w1 <turn_end>", "w1", None, 1),
    ],
)
def test_the_next_turn_is_asked_as_served(template, written, visible, thought, documents):
    talk, tokenizer = second_turn(template, written)
    assert list(talk.ids) == served(tokenizer, visible, thought)
    assert len(talk.documents) == documents
    first = talk.rows(SAMPLING)[0]
    start, end = first.spans[0]
    assert tokenizer.decode(first.ids[start:end]) == written
    assert len(first.ids) == end, "a user turn that nobody answered is left out"


def test_a_stop_text_leaves_the_whole_answer():
    talk, tokenizer = second_turn(PLAIN, "w1 w2", reason="stop")
    assert list(talk.ids) == served(tokenizer, "w1 w2")


def test_each_turn_is_a_document_of_its_own_where_the_history_changes():
    talk, tokenizer = second_turn(STRIPS.replace("OPEN", ""), "<think> w9 </think> w1 <turn_end>")
    chat = ChatFormat(tokenizer, None)
    last = tokenizer("<think> w7 </think> w2 <turn_end>", add_special_tokens=False).input_ids
    assert not talk.extend(Generation(last, "length"), chat, 200)
    assert not talk.turns_left_out, "there was no other"
    rows = talk.rows(SAMPLING)
    assert [(r.id, r.document, r.finish_reason) for r in rows] == [("p", 0, "eos"), ("p#1", 1, "length")]
    for row, written in zip(
        rows, ("<think> w9 </think> w1 <turn_end>", "<think> w7 </think> w2 <turn_end>"), strict=True
    ):
        ((start, end),) = row.spans
        assert tokenizer.decode(row.ids[start:end]) == written
    assert "w9" not in tokenizer.decode(rows[1].ids)


def test_turns_are_regenerated_in_order(tmp_path):
    target = tiny_target(batch_size=2, tokenizer=tiny_tokenizer())
    target.eos_ids = frozenset(range(20))  # ends early, so that later turns happen
    chat = ChatFormat(target.tokenizer, None)
    users = ["the a", "of to in", "is it"]
    write_rows(tmp_path / "prompts.jsonl", [prompt_of("m", *users)])
    recipe = tiny_recipe("m", "p", **{"regenerate.temperature": 0.0})
    Regeneration(recipe, target, chat, tmp_path / "prompts.jsonl", tmp_path / "out").run()
    rows = list(read_completions(tmp_path / "out"))
    spans = [(row, span) for row in rows for span in row.spans]
    assert len(spans) == 3
    text = target.tokenizer.decode(rows[-1].ids)
    assert [text.index(u) for u in users] == sorted(text.index(u) for u in users)
    for row, (start, end) in spans:
        alone = dict(target.generate([row.ids[:start]], Sampling(), 24))[0]
        assert row.ids[start:end] == alone.ids


def test_a_recipes_own_template_joins_ids():
    template = Template(user="<user> {content} ", assistant="<assistant> ", close="<end> ", stop=("w9",))
    chat = ChatFormat(tiny_tokenizer(chat_template=None), template)
    asked = chat.first_turn("the a", "be it")
    assert chat.tokenizer.decode(asked) == "be it <user> the a <assistant>"
    following = chat.next_turn(asked, Generation([50, 51], "stop"), "of to", 100)
    assert following[: len(asked) + 2] == [*asked, 50, 51]
    assert chat.tokenizer.decode(following[len(asked) + 2 :]) == "<end> <user> of to <assistant>"


OPTIONS = "{% if effort is defined %}<system> {{ effort }} {% endif %}" + PLAIN


def test_options_and_tools_reach_the_template():
    with_tools = "{% for t in tools or [] %}{{ t.name }} {% endfor %}" + OPTIONS
    chat = ChatFormat(tokenizer_with(with_tools), None, {"effort": "w5"})
    ids = chat.first_turn("the a", None, [{"name": "w7"}])
    assert chat.tokenizer.decode(ids).startswith("w7 <system> w5 <user> the a")
    following = chat.next_turn(ids, Generation(chat.tokenizer("w1 <turn_end>").input_ids, "eos"), "of to", 100)
    assert chat.tokenizer.decode(following).startswith("w7 <system> w5 <user> the a")


def test_options_are_part_of_the_identity_and_take_no_recipe_template(tmp_path):
    model = save_tiny_target(tmp_path / "m")
    settings = [TargetRecipe(model=model, dtype="fp32", template_options=o) for o in ({}, {"effort": "w5"})]
    plain, with_options = (WeightsOnlyTarget(s, "cpu") for s in settings)
    assert plain.identity.template_hash != with_options.identity.template_hash
    assert with_options.identity == local_target(model, template_options={"effort": "w5"}).identity
    target = {"model": "m", "template_options": {"enable_thinking": False}}
    assert parse_recipe({"name": "x", "target": target}, "r").target.template_options["enable_thinking"] is False
    with pytest.raises(ValueError, match=r"target\.template_options: given beside target\.template"):
        parse_recipe({"name": "x", "target": {**target, "template": {}}}, "r")


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "broken",
    [
        "{{ 'x' + tools }}",
        "{{ messages[0].content[0] / 2 }}",
        "{{ 1 // 0 }}",
        "{% for t in tools %}{% endfor %}",
        "{{ a",
    ],
)
def test_whatever_a_template_raises_is_one_line(broken):
    with pytest.raises(DataError, match=r"^target\.template: .*refuses a conversation") as caught:
        ChatFormat(tiny_tokenizer(chat_template=broken), None).first_turn("the a")
    assert "\n" not in str(caught.value)


def test_an_endless_template_ends(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"^target\.template: .*did not end within 0\.3 s"):
        ChatFormat(tiny_tokenizer(chat_template=ENDLESS), None).first_turn("the a")
    assert time.monotonic() - started < 5


def test_a_flood_of_text_is_refused(monkeypatch):
    monkeypatch.setattr(rendering, "CHARACTERS", 1000)
    with pytest.raises(DataError, match=r"^target\.template: .*characters of one prompt"):
        ChatFormat(tiny_tokenizer(chat_template="{{ 'the ' * 999 }}"), None).first_turn("the a")


@pytest.mark.parametrize("greedy", ["{{ 'x' * 10 ** 10 }}", "{{ [0] * 10 ** 10 }}", "{{ 'x' | center(10 ** 10) }}"])
def test_memory_is_not_the_templates_to_take(greedy):
    with pytest.raises(DataError, match=r"^target\.template: .*takes more than 512 MB of memory"):
        ChatFormat(tiny_tokenizer(chat_template=greedy), None).first_turn("the a")
    assert ChatFormat(tiny_tokenizer(), None).first_turn("the a")


def test_a_product_that_never_ends_is_ended(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    with pytest.raises(DataError, match=r"did not end within 0\.3 s"):
        ChatFormat(tiny_tokenizer(chat_template="{{ 9 ** (9 ** 9) }}"), None).first_turn("the a")


STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN


def test_a_refused_row_is_named_or_counted():
    rows = [prompt_of("r1", "the", system="be"), prompt_of("r2", "the")]
    chat = ChatFormat(tokenizer_with(STRICT), None)
    with pytest.raises(DataError, match=r"^prompt 'r1': .*no system role.*--prompts\.skip-bad"):
        list(open_conversations(rows, chat, 100))
    counted = Counter()
    assert [c.prompt.id for c in open_conversations(rows, chat, 100, True, counted)] == ["r2"]
    assert counted == {"refused by the chat template": 1}
    rows[1] = prompt_of("r2", "the " * 200)
    assert list(open_conversations(rows, chat, 100, True, counted)) == []
    assert counted["longer than regenerate.max_prompt_tokens"] == 1


def test_a_template_that_refuses_a_later_turn_keeps_what_was_answered():
    refuses = "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + PLAIN
    tokenizer = tokenizer_with(refuses)
    chat = ChatFormat(tokenizer, None)
    talk = Conversation(prompt_of("p", "the a"), ["of to"], chat.first_turn("the a"))
    assert not talk.extend(Generation(tokenizer("w1 <turn_end>").input_ids, "eos"), chat, 200)
    (row,) = talk.rows(SAMPLING)
    assert len(row.spans) == 1
    assert row.turns_left_out == {"refused by the template": 1}


@pytest.mark.parametrize(
    ("users", "reason", "longest", "left_out"),
    [
        (["of to", "w3"], "length", 200, {"after an answer that was cut off": 2}),
        (["of to", "w3"], "loop", 200, {"after an answer that was cut off": 2}),
        (["of to", "w3"], "eos", 5, {"too long": 2}),
        (["of to", "w3"], "eos", 200, {"past regenerate.max_tokens": 2}),  # asked, and nobody answered
        ([], "length", 200, {}),
    ],
)
def test_user_turns_that_are_never_asked_are_counted(users, reason, longest, left_out):
    tokenizer = tokenizer_with(PLAIN)
    chat = ChatFormat(tokenizer, None)
    talk = Conversation(prompt_of("p", "the a"), users, chat.first_turn("the a"))
    talk.extend(Generation(tokenizer("w1 <turn_end>").input_ids, reason), chat, longest)
    assert [row.turns_left_out for row in talk.rows(SAMPLING)] == [left_out]


def test_a_token_without_a_row_is_refused_in_a_text_and_not_before():
    tokenizer = tokenizer_with(PLAIN, ["<turn_end>", "<image>"])
    rows = tokenizer.convert_tokens_to_ids("<image>")
    chat = ChatFormat(tokenizer, None, rows=rows)
    assert isinstance(chat.first_turn("the a"), Rendered)
    with pytest.raises(DataError, match=rf"holds the token <image> \({rows}\)"):
        chat.first_turn("the <image> a")
