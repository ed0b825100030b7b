"""Recipes that are bombs, riddles or nonsense: a recipe or one line, soon, within a gigabyte."""

import itertools
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from outcomes import FUZZED, ODD, fuzzed, one_gigabyte, outcome, put, refused

from draftsmith import cli
from draftsmith.core.errors import RecipeError
from draftsmith.core.files import digest
from draftsmith.core.recipe import Recipe
from draftsmith.core.recipe_file import dump_recipe, load_recipe, parse_recipe

HEAD = "name: x\ntarget: {model: m}\n"


def laughs(first, again):
    """Nine names, each ten times the one before."""
    letters = "abcdefghi"
    lines = [f"a: &a {first}"]
    for before, name in itertools.pairwise(letters):
        lines.append(f"{name}: &{name} " + again.replace("*", ", ".join([f"*{before}"] * 10)))
    return "\n".join(lines)


BOMBS = {
    "laughs": laughs("[x, x, x]", "[*]"),
    "laughs in keys": laughs("{x: 1}", "{<<: [*]}"),
    "laughs in a value": HEAD
    + "server:\n  urls: &u ["
    + ", ".join(["x"] * 90)
    + "]\n  last_urls: ["
    + "*u, " * 900
    + "]",
    "itself": "a: &a [*a]",
    "itself in a mapping": "a: &a {b: *a}",
    "itself as a key": "&a {*a : 1}",
    "deep lists": "a: " + "[" * 100_000,
    "deep mappings": "{a: " * 50_000,
    "deep blocks": "- " * 100_000,
    "deep questions": "? " * 100_000,
    "deep indentation": "\n".join(" " * i + "a:" for i in range(700)),
    "many values": "a: [" + "1," * 100_000 + "]",
    "many keys": "\n".join(f"k{i}: 1" for i in range(20_000)),
    "a long number": HEAD + "seed: " + "9" * 200_000,
    "a number of base 60": HEAD + "seed: 1" + ":59" * 80_000,
    "a float of base 60": HEAD + "seed: 1" + ":59" * 80_000 + ".5",
    "a long text": HEAD + "device: " + "x" * 1_000_000,
    "a gigabyte": None,
    "tags": "!" * 200_000,
    "anchors": "&a " * 80_000,
    "comments": "#\n" * 120_000,
    "escapes": '"' + "\\n" * 120_000 + '"',
}
RIDDLES = {
    "a key twice": HEAD + "name: y",
    "a key twice inside": "name: x\ntarget: {model: m, model: n}",
    "a key twice in quotes": HEAD + '"name": y',
    "python": "!!python/object/apply:os.system ['true']",
    "a set": "!!set {a, b}",
    "pairs": "!!omap [a: 1]",
    "a date that is none": HEAD + "seed: 2024-13-45",
    "a number that is none": HEAD + "seed: 0b_",
    "two documents": HEAD + "---\n" + HEAD,
    "a list as key": "[1]: 2",
    "a number as key": HEAD + "1: 2",
    "null as key": HEAD + "~: 2",
    "a line end in a key": HEAD + '"a\\nb": 1',
    "a colour in a key": HEAD + '"\\e[31m": 1',
    "half a pair": HEAD + 'device: "\\ud800"',
    "nothing": "",
    "null": "~",
    "a text": "x",
    "no end of a list": "a: [",
    "a tab": "\tname: x",
    "an unknown alias": "a: *b",
    "a merge of a number": "<<: 5",
}
NAMES = [
    "",
    ".",
    "..",
    "a/b",
    "/etc",
    "../x",
    "a\0b",
    "a\nb",
    "\x1b[31m",
    "x" * 300,
    "\ud800",
    "é" * 150,
    "\t",
    "\u202eabc",
]
NAMES += [5, None, True, ["x"]]


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_one_line(tmp_path, kind):
    path = tmp_path / "r.yaml"
    if BOMBS[kind] is None:
        with path.open("wb") as file:
            file.truncate(1 << 30)
    else:
        path.write_text(BOMBS[kind])
    with one_gigabyte():
        assert refused(lambda: load_recipe(path)).startswith(str(path))


@pytest.mark.parametrize("kind", RIDDLES)
def test_a_riddle_is_one_line(tmp_path, kind):
    path = tmp_path / "r.yaml"
    path.write_text(RIDDLES[kind])
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    assert str(refused.value).startswith(str(path))
    assert not {"\n", "\x1b"} & set(str(refused.value))


def test_aliases_that_people_write_are_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        HEAD + "prompts:\n  sources: &s [{name: a, limit: 5}, {name: b}]\n  evaluation: *s\n"
        "train: {<<: {epochs: 2}, epochs: 3}\n"
    )
    recipe = load_recipe(path)
    assert recipe.prompts.evaluation == recipe.prompts.sources
    assert recipe.train.epochs == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_part_of_a_path(name):
    with pytest.raises(RecipeError, match=r"^r: name: "):
        parse_recipe({"name": name, "target": {"model": "m"}}, "r")


@pytest.mark.parametrize(
    "kind", ["directory", "link to itself", "link to nothing", "device", "noise", "sparse terabyte"]
)
def test_a_recipe_that_is_no_file_is_one_line(tmp_path, kind):
    path = tmp_path / "r.yaml"
    path.write_text(HEAD)
    put(kind, path)
    with one_gigabyte():
        assert str(path) in refused(lambda: load_recipe(path))


@pytest.mark.parametrize(
    "flag",
    [
        *("--target.template={a", "--target.template={user: [" + "[" * 2000, "--card.data-licences={a: &a [*a]}"),
        *("--target.template-options={a: 1, a: 2}", "--name=..", "--seed=" + "9" * 5000, "--seed=1e400"),
        *("--train.learning-rate=nan", "--train.learning-rate=inf", "--evaluate.shapes=9/9", "--device=\udcff"),
        *("--seed=99999999999999999999", "--target.template-options={a: " + "9" * 5000 + "}", "--name=a\nb"),
    ],
)
def test_a_flag_of_nonsense_is_one_line(tmp_path, monkeypatch, capsys, flag):
    (tmp_path / "r.yaml").write_text(HEAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["draftsmith", "run", "r.yaml", flag, "--dry-run"])
    assert cli.main() == 2
    told = capsys.readouterr()
    assert told.err.startswith("draftsmith: ")
    assert told.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# --- nonsense ----------------------------------------------------------------------------------------------------


def keys_of(model, found):
    for name, field in model.model_fields.items():
        found.add(name)
        for inner in getattr(field.annotation, "__args__", (field.annotation,)):
            if hasattr(inner, "model_fields"):
                keys_of(inner, found)
    return found


YAML = "{}[]&*!|>'\"%@`#,?:-<~ \n\t\\0aeb_."
KEYS = sorted(keys_of(Recipe, set()))
values = st.recursive(
    st.sampled_from([*ODD, "3/1/4", "vllm", "bf16", "${HOME}", "~", "/", 3, 64, float("nan"), float("inf")])
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.dates()
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=4),
    max_leaves=12,
)


def kept(recipe):
    """What a run does with a recipe before anything else: it writes it down and makes keys of it."""
    digest(recipe.model_dump(mode="json"))
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "again") == recipe


@fuzzed
@given(changes=st.dictionaries(st.sampled_from(list(Recipe.model_fields)) | st.text(), values, min_size=1, max_size=4))
def fuzz_values(path, changes):
    path.write_text(yaml.dump({"name": "x", "target": {"model": "m"}, **changes}, Dumper=yaml.SafeDumper))
    outcome(lambda: kept(load_recipe(path)))


@fuzzed
@given(data=st.data(), base=st.sampled_from([HEAD, laughs("[x]", "[*]"), RIDDLES["a date that is none"]]))
def fuzz_text(path, data, base):
    at = data.draw(st.integers(0, len(base)))
    inserted = data.draw(
        st.text(st.sampled_from("{}[]&*!|>'\"%@`#,?:-<~ \n\t\\0aeb_."), max_size=12) | st.binary(max_size=4)
    )
    middle = inserted.encode() if isinstance(inserted, str) else inserted
    path.write_bytes(base[:at].encode() + middle + base[at + data.draw(st.integers(0, 3)) :].encode())
    outcome(lambda: kept(load_recipe(path)))


def test_fuzzed_recipes(tmp_path, attacks):
    attacks(2 * FUZZED)
    with one_gigabyte():
        fuzz_values(tmp_path / "r.yaml")
        fuzz_text(tmp_path / "r.yaml")
