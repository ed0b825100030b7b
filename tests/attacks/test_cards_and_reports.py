"""Whatever a recipe, a data set or a model calls itself stays text on the card, in the report and on the terminal."""

import json
import sys
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from models import WORDS, save_tiny_target, tiny_recipe
from outcomes import FUZZED, fuzzed

from draftsmith import cli
from draftsmith.core.recipe_file import dump_recipe
from draftsmith.core.records.evaluation import Tau
from draftsmith.core.tables import table
from draftsmith.evaluation.plots import interval_plot, line_plot
from draftsmith.publishing.card import as_text

HOSTILE = [
    "<script>alert(1)</script>",
    "a|b",
    "a\nb",
    "# heading",
    "- item",
    "1. item",
    "{{ 7 * 7 }}",
    "{% for a in range(9) %}",
    "[link](javascript:alert(1))",
    "![image](https://example.com/x.png)",
    "```",
    "`code`",
    "---",
    "</td></tr></table>",
    "&lt;b&gt;",
    "*bold* __bold__ _it_ ~~no~~",
    "$$x$$",
    "\\",
    "<!-- comment",
    "]]>",
    '" onmouseover="alert(1)',
    "\u202eright to left",
    "中文 👍",
    "x" * 500,
]
CARD_TAGS = {"h1", "h2", "p", "strong", "a", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "pre", "code"}
CARD_TAGS |= {"details", "summary"}
markdown = MarkdownIt("commonmark").enable("table")


class Page(HTMLParser):
    """Tags, attributes and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = set(), [], []
        self.feed(text)
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.texts.append(data)


def flat(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(card, report, what the terminal was told) of a run whose every name is hostile."""
    out = tmp_path_factory.mktemp("hostile")
    model = save_tiny_target(out / "model")
    with (out / "prompts.jsonl").open("w") as file:
        for number in range(4 * len(HOSTILE)):
            name = HOSTILE[number % len(HOSTILE)]
            prompt = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(3)) + f" w{number % 30}"
            row = {"id": f"{name} {number}", "category": name, "source": name, "prompt": prompt}
            file.write(json.dumps(row) + "\n")
    recipe = tiny_recipe(
        model,
        str(out / "prompts.jsonl"),
        **{
            "name": HOSTILE[0].replace("/", ""),
            "prompts.held_out": 1,
            "regenerate.max_new_tokens": 8,
            "train.epochs": 1,
            "train.evaluate_every": 100,
            "evaluate.shapes": ["2/1/3"],
            "evaluate.temperatures": [0.0],
            "evaluate.max_new_tokens": 4,
            "evaluate.speed_prompts": 1,
            "evaluate.lossless_prompts": 1,
            "card.base_model": "owner/target",
            "card.licence": " ".join(HOSTILE[:12]) + "\n---\nlicense: mit",
            "card.author": "".join(HOSTILE[:3]),
            "card.data_licences": {name: f"{name} too" for name in HOSTILE},
        },
    )
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["draftsmith", "run", str(out / "recipe.yaml"), "--out", str(out / "run")])
    assert cli.main() == 0
    patch.undo()
    card = (out / "run" / "export" / "draft" / "README.md").read_text()
    return card, (out / "run" / "report.html").read_text()


def parts(card: str) -> tuple[str, str]:
    """(front matter, what follows it) as the hub tells them apart."""
    block = REGEX_YAML_BLOCK.search(card)
    return block.group(2), card[block.end() :]


def test_the_card_is_made_of_our_markup_alone(finished, attacks):
    attacks(len(HOSTILE))
    head, body = parts(finished[0])
    told = yaml.safe_load(head)
    assert told["license"] == " ".join(HOSTILE[:12]) + "\n---\nlicense: mit"
    page = Page(markdown.render(body))
    assert page.tags <= CARD_TAGS
    assert {value.split("/")[2] for name, value in page.attributes if name == "href" and "://" in value} <= {
        "huggingface.co"
    }
    assert not {name for name, _ in page.attributes} - {"href", "class", "style"}
    for name in HOSTILE:
        assert flat(name) in page.text, name
        assert flat(f"{name} too") in page.text


def test_every_row_of_the_cards_tables_has_its_cells(finished):
    tokens = markdown.parse(parts(finished[0])[1])
    rows, widths = [], []
    for token in tokens:
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append(0)
        elif token.type in ("td_open", "th_open"):
            rows[-1] += 1
        elif token.type == "table_close":
            widths.append(set(rows))
    assert widths
    assert all(len(width) == 1 for width in widths)


def test_the_report_runs_nothing_and_loads_nothing(finished, attacks):
    attacks(len(HOSTILE))
    page = Page(finished[1])
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "link", "b2", "form", "base"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not [value for name, value in page.attributes if name in ("src", "href") and value and "javascript" in value]
    for name in HOSTILE:
        assert flat(name) in page.text, name


@fuzzed
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40))
def fuzz_cell(text):
    page = Page(markdown.render(f"| a | b |\n|---|---|\n| {as_text(text)} | end |\n"))
    assert page.tags <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.text == flat(f"a b {text} end")
    alone = Page(markdown.render(f"{as_text(text)}\n"))
    assert alone.tags <= {"p"}


def test_fuzzed_cells(attacks):
    attacks(FUZZED)
    fuzz_cell()


def tau(value, low, high):
    return Tau(tau=value, low=low, high=high, prompts=9, steps=90)


@pytest.mark.parametrize("name", [*HOSTILE, "\x00\x1b[2J", "$x^{", "a$b$c", "_hidden", "\ud800", "x" * 100_000])
def test_a_plot_has_its_labels_as_text(name):
    rows = interval_plot(name, ["all", name], {name: [tau(1, 1, 1), tau(2, 1, 3)], "b": [None, None]})
    lines = line_plot(name, ("a", name), {name: ([1, 2], [1, 2]), "o": ([1, 2], [2, 3])}, mark=(1, name))
    for svg in (rows, lines):
        page = Page(svg)
        assert page.tags <= {"svg", "defs", "style", "g", "path", "use", "text", "clippath", "rect", "tspan"}
        assert not {"\x00", "\x1b"} & set(svg)
        assert len(svg) < 50_000


def test_thousands_of_categories_make_a_plot_soon():
    names = [f"c{i}" for i in range(5000)]
    plot = interval_plot("tau", names, {"a": [tau(1, 1, 1)] * 5000})
    assert "the first 40 of 5,000" in plot
    assert len(line_plot("share", ("a", "b"), {name: ([1, 2], [1, 2]) for name in names})) < 200_000


@pytest.mark.parametrize("cell", ["a\nb", "\x1b[31m", "\u202e", "\r", "x" * 100_000, "[red]a[/red]", "\ud800"])
def test_a_terminals_table_has_a_line_for_each_row(cell):
    text = table([(cell, "b"), ("c", "d")])
    assert len(text.splitlines()) == 2
    assert not {"\x1b", "\u202e", "\r", "\ud800"} & set(text)
    assert len(text) < 10_000
