"""Chat templates that do not end, flood, fail or reach out: one line names them, soon, and the next one renders."""

import contextlib
import os
import subprocess
import sys

import psutil
import pytest
from models import CHAT_TEMPLATE, tiny_tokenizer
from outcomes import outcome

from draftsmith.core.errors import DataError
from draftsmith.data.rendering import SECONDS
from draftsmith.data.templates import RENDERER, ChatFormat

DOUBLED = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}"
LOOPS = "{% for a in range(99999) %}" * 3 + "BODY" + "{% endfor %}" * 3
ENDLESS = {
    "a loop of 10^15": LOOPS.replace("BODY", ""),
    "a loop that writes": LOOPS.replace("BODY", "x"),
    "a product of numbers": "{{ 9 ** (9 ** 9) }}",
    "a long product": "{{ ((10 ** 200000) ** 40) % 7 }}",
    "a text of a number": "{{ (10 ** 4000) ** 4000 }}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "sorting": "{% for a in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "a range of ranges": "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
}
FLOODS = {
    "a product": "{{ 'x' * 10 ** 10 }}",
    "a list": "{{ [0] * 10 ** 10 }}",
    "doubling": DOUBLED,
    "ten gigabytes in pieces": "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "padding": "{{ 'x'.ljust(10 ** 10) }}",
    "centre": "{{ 'x' | center(10 ** 10) }}",
    "indent": "{{ 'x\\ny' | indent(10 ** 10) }}",
    "format": "{{ '%010000000000d' % 1 }}",
    "another format": "{{ '{:>10000000000}'.format('x') }}",
    "replacing": "{{ ('x' * 10 ** 5).replace('x', 'y' * 10 ** 6) }}",
    "joining": "{{ ('x' * 10 ** 6).join(['a'] * 10 ** 5) }}",
    "json": "{{ messages | tojson(indent=10 ** 10) }}",
    "bytes": "{{ (1).to_bytes(10 ** 10) }}",
    "expanding tabs": "{{ '\\t'.expandtabs(10 ** 10) }}",
    "filling": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "two million letters": "{{ 'x' * 2000000 }}",
}
FAILING = {
    "raise": "{{ raise_exception('no\nsystem \x1b[31m role') }}",
    "undefined": "{{ nothing.at.all }}",
    "zero": "{{ 1 // 0 }}",
    "type": "{{ 'x' + 1 }}",
    "syntax": "{% if %}",
    "unclosed": "{{ a",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "no template": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch /tmp/escaped') }}",
    "mutation": "{{ messages.append(1) }}",
    "attr": "{{ messages | attr('__class__') | attr('__base__') }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "an encoding": "{{ 'x'.encode('rot13') }}",
}


def told(template, **options):
    chat = ChatFormat(tiny_tokenizer(chat_template=template), None, options)
    before = psutil.Process().memory_info().rss
    text = outcome(lambda: chat.first_turn("the a"), 5 * SECONDS)
    assert psutil.Process().memory_info().rss < before + (256 << 20)
    return text


@pytest.fixture(autouse=True, scope="module")
def _warm():
    assert told(CHAT_TEMPLATE)


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_does_not_end_is_ended(kind):
    line = told(ENDLESS[kind])
    assert line.startswith("target.template: the tokenizer's chat template ")


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_is_not_made(kind):
    line = told(FLOODS[kind])
    assert line.startswith("target.template: the tokenizer's chat template ")


@pytest.mark.parametrize("kind", FAILING)
def test_what_fails_is_one_line(kind):
    try:
        line = str(ChatFormat(tiny_tokenizer(chat_template=FAILING[kind]), None).first_turn("the a"))
    except DataError as error:
        line = str(error)
        assert line.startswith("target.template: the tokenizer's chat template refuses a conversation: ")
    assert not {"\n", "\x1b"} & set(line)
    assert not os.path.exists("/tmp/escaped")


@pytest.mark.parametrize("template", [5, ["x"], {"a": "x"}, {}, {"default": 5}, "\ud800"])
def test_what_is_no_template_is_one_line(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    try:
        line = outcome(lambda: ChatFormat(tokenizer, None).first_turn("the a"))
    except TypeError as error:  # which the library's own setter would have told
        pytest.fail(str(error))
    assert line.startswith("target.template: ")


def test_the_next_one_renders_after_each(attacks):
    attacks(3)
    for broken in (FLOODS["doubling"], ENDLESS["a product of numbers"], FAILING["syntax"]):
        told(broken)
        assert "<user> the a <end> <assistant>" in tiny_tokenizer().decode(
            ChatFormat(tiny_tokenizer(), None).first_turn("the a")
        )


def test_a_renderer_that_is_killed_is_started_again():
    told(CHAT_TEMPLATE)
    RENDERER._process.kill()
    assert "ended the process that rendered it" in told(CHAT_TEMPLATE)
    assert "[" in told(CHAT_TEMPLATE)


def test_nothing_is_left_of_it_when_its_owner_is_killed():
    code = (
        "import sys, os, signal; sys.path[:0] = sys.argv[1:]\n"
        "from models import tiny_tokenizer; from draftsmith.data.templates import ChatFormat, RENDERER\n"
        "ChatFormat(tiny_tokenizer(), None).first_turn('the a')\n"
        "print(RENDERER._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, *filter(None, sys.path)], capture_output=True, text=True)
    pid = int(done.stdout)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(5)
    assert not psutil.pid_exists(pid)


def test_as_transformers_renders(attacks):
    """What a sound template makes of odd texts is what `apply_chat_template` makes of it."""
    texts = [
        "the a",
        "",
        "  ",
        "a\nb\r\nc",
        "\x00\x1b",
        "é👍中",
        "{{ 7 * 7 }}",
        "{% raw %}",
        "\u2028",
        "<script>",
        '"\\"',
        "x" * 99_999,
    ]
    attacks(len(texts))
    tokenizer = tiny_tokenizer()
    for text in texts:
        ours = ChatFormat(tokenizer, None).first_turn(text, "be it")
        messages = [{"role": "system", "content": "be it"}, {"role": "user", "content": text}]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert list(ours) == theirs
