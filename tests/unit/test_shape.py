"""What a draft takes from its target, and what it is given where the target has nothing fitting."""

import pytest
from transformers import AutoConfig

from draftsmith.core.recipe_file import parse_recipe
from draftsmith.drafts.eagle3.shape import draft_config, shape_note


def shape(config, **changes):
    """(intermediate_size, heads, key heads, head_dim), and the line that is printed."""
    recipe = parse_recipe({"name": "x", "target": {"model": "m"}, "draft": changes}, "test").draft
    text = config.get_text_config()
    draft = draft_config(recipe, text, 36, 32000)
    widths = draft.intermediate_size, draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim
    return widths, shape_note(recipe, text)


@pytest.mark.parametrize(
    ("kind", "values", "widths"),
    [
        ("llama", {}, (11008, 32, 32, 128)),
        ("qwen3", {"head_dim": 64}, (22016, 32, 32, 64)),
        ("gemma3_text", {}, (9216, 8, 4, 256)),
    ],
)
def test_a_plain_dense_target_gives_its_own_widths(kind, values, widths):
    assert shape(AutoConfig.for_model(kind, **values)) == (widths, None)


@pytest.mark.parametrize(
    ("kind", "values", "widths"),
    [
        ("minimax_m2", {}, (9216, 48, 8, 128)),
        ("gpt_oss", {}, (8704, 64, 8, 64)),
        ("deepseek_v2", {"hidden_size": 5120}, (15360, 40, 8, 128)),
        ("deepseek_v3", {}, (21504, 56, 8, 128)),
        ("qwen3_5_moe", {}, (6144, 16, 2, 256)),
        ("qwen3_moe", {"num_key_value_heads": 32}, (6144, 32, 8, 64)),
        ("llama4_text", {}, (15360, 40, 8, 128)),
        ("gemma4_text", {}, (9216, 16, 8, 128)),
        ("gemma3n_text", {}, (6144, 8, 2, 256)),
        ("nemotron_h", {}, (12288, 32, 8, 128)),
        ("kimi_linear", {}, (6912, 16, 8, 128)),
        ("deepseek_v4", {}, (12288, 32, 8, 128)),
        ("bloom", {}, (192, 8, 8, 8)),
        ("mamba", {}, (1536, 8, 8, 64)),
    ],
)
def test_a_dense_draft_where_the_target_has_nothing_fitting(kind, values, widths):
    found, note = shape(AutoConfig.for_model(kind, **values))
    assert found == widths
    assert "of a dense draft" in note
    assert "draft.* changes them" in note
    assert "\n" not in note


def test_the_note_names_whose_value_is_whose():
    _, note = shape(AutoConfig.for_model("minimax_m2"))
    assert note == (
        "draft: intermediate_size 9216 of a dense draft, as the target has experts; num_attention_heads 48, "
        "num_key_value_heads 8, head_dim 128 as the target; draft.* changes them"
    )


def test_the_recipe_has_the_last_word():
    config = AutoConfig.for_model("deepseek_v3")
    assert shape(config, intermediate_size=40960, head_dim=64)[0] == (40960, 112, 8, 64)
    changes = dict(intermediate_size=640, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    assert shape(config, **changes) == ((640, 8, 2, 64), None)


def test_small_models_have_small_drafts():
    config = AutoConfig.for_model("deepseek_v3", hidden_size=32)
    assert shape(config)[0] == (96, 4, 4, 8)
