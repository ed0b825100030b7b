import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import MiniMaxM2Config

from draftsmith.core.errors import RecipeError
from draftsmith.core.recipe_file import dump_recipe, load_recipe, parse_recipe
from draftsmith.drafts.eagle3.files import expected_shapes
from draftsmith.drafts.eagle3.shape import draft_config

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = {"name": "x", "target": {"model": "m"}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**MINIMAL, "trian": {}}, "trian: unknown key; did you mean 'train'?"),
        ({**MINIMAL, "train": {"learning_rte": 1}}, "train.learning_rte: unknown key; did you mean 'learning_rate'?"),
        (
            {**MINIMAL, "evaluate": {"shapes": ["3/1"]}},
            "evaluate.shapes.0: '3/1' is no shape; write steps/topk/draft_tokens, such as 3/4/8",
        ),
        ({"name": "x"}, "target: missing"),
        ({**MINIMAL, "vocab": {"size": "many"}}, "vocab.size: 'many' given"),
        ({**MINIMAL, "vocab": {"size": 0}}, "vocab.size: 0 given"),
        ({**MINIMAL, "train": {"objective": "mse"}}, "train.objective: 'mse' given"),
        ({**MINIMAL, "draft": {"taps": [5, 2]}}, "draft.taps: [5, 2] must be ascending"),
        ({**MINIMAL, "server": {"urls": ["http://u:pw@h"]}}, "server.urls.0: 'http://***@h' given; a name or password"),
        ({**MINIMAL, "server": {"urls": "http://u:pw@h"}}, "server.urls: 'http://***@h' given; input should be"),
        ({**MINIMAL, "server": {"api_key_env": "sk-pw"}}, "server.api_key_env: is to name an environment variable"),
        ({**MINIMAL, "serve": {"extra": "--api-key pw"}}, "serve.extra: --api-key: write $NAME"),
        ({**MINIMAL, "target": {"model": "m", "template": {"user": "hi"}}}, "does not contain {content}"),
        ({**MINIMAL, "evaluate": {"shapes": ["3/1/8"]}}, "a chain of 3 steps"),
        (
            {**MINIMAL, "evaluate": {"shapes": ["1/2/9"]}},
            "evaluate.shapes.0: 1/2/9: 1 steps of top-k 2 verify 2 to 3",
        ),
        ([], "a recipe is a mapping"),
    ],
)
def test_a_bad_value_gives_one_line_that_names_it(values, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, "r.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("r.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_recipe_survives_being_written_down(tmp_path):
    for path in RECIPES.glob("*.yaml"):
        recipe = load_recipe(path)
        (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
        assert load_recipe(tmp_path / "r.yaml") == recipe


def test_yaml_errors_name_the_line(tmp_path):
    (tmp_path / "r.yaml").write_text("name: x\ntarget: [\n")
    with pytest.raises(RecipeError, match=r"r\.yaml line 3: not YAML"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")


LAUGHS = "a: &a [x, x]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{b}'] * 10)}]\n" for b, n in pairwise("abcdefgh"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "too many values in its aliases"),
        ("a: &a [*a]", "too many values in its aliases"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("name: x\ntarget: {model: m}\nname: y", "line 3: not YAML: 'name' is given twice"),
        ("name: x\nseed: 1" + ":59" * 60_000, "a number without an end"),
        ("name: x\nseed: 2024-13-45", "not YAML: month must be in 1..12"),
        ("name: x\ntarget: {model: m}\ntrain: {learning_rate: .inf}", "train.learning_rate: inf given"),
        ("name: x\ntarget: {model: m}\nseed: 99999999999999999999", "seed: 99999999999999999999 given"),
        ('name: x\ntarget: {model: "m\\0"}', "target.model: 'm\\x00' given"),
        ("name: x\ntarget: {model: m}\ndevice: " + "x" * 300_000, "longer than 262,144 bytes"),
    ],
)
def test_yaml_without_an_end_or_a_meaning_is_one_line(tmp_path, text, told):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as refused:
        load_recipe(tmp_path / "r.yaml")
    assert told in str(refused.value)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "a\nb", "x" * 300])
def test_a_name_is_one_part_of_a_path(name):
    with pytest.raises(RecipeError, match="it names a directory"):
        parse_recipe(MINIMAL | {"name": name}, "r")


def test_the_recipe_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, draftsmith.core.recipe, draftsmith.core.errors; assert not {heavy} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_reference_card_draft_has_its_size():
    """MiniMax-M2.7-EAGLE3: about 0.25 B parameters and 0.5 GB without embeddings, taps [2, 31, 59]."""
    recipe = load_recipe(RECIPES / "minimax-m2.7-eagle3.yaml")
    target = MiniMaxM2Config(
        vocab_size=200064, hidden_size=3072, num_hidden_layers=62, num_attention_heads=48, num_key_value_heads=8
    )
    config = draft_config(recipe.draft, target, 62, recipe.vocab.size)
    assert config.taps == (2, 31, 59)
    assert config.rope_theta == 5e6
    shapes = expected_shapes(config)
    assert shapes["fc.weight"] == (3072, 9216)
    assert shapes["lm_head.weight"] == (32000, 3072)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert 0.24e9 < parameters < 0.26e9
    assert 0.48e9 < 2 * parameters < 0.52e9
