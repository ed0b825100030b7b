"""Target directories that are odd, broken or hostile: `init`, `plan` and what loads a target tell so."""

import contextlib
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import local_target, save_tiny_target
from outcomes import FUZZED, ODD, copied, fuzzed, one_gigabyte, outcome, put, refused

from draftsmith import cli
from draftsmith.core.errors import TargetError
from draftsmith.core.recipe import TargetRecipe
from draftsmith.engines.server import is_gemma3
from draftsmith.hardware.presets import preset
from draftsmith.runs.init import choose, read_facts, render
from draftsmith.targets.parts import load_tokenizer
from draftsmith.targets.weights import WeightsOnlyTarget

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += ("head_dim", "vocab_size")
OTHERS = ["rope_scaling", "rope_parameters", "quantization_config", "text_config", "num_local_experts", "num_experts"]
OTHERS += ["num_experts_per_tok", "sliding_window", "layer_types", "kv_lora_rank", "qk_rope_head_dim", "auto_map"]
OTHERS += ["moe_intermediate_size", "attention_chunk_size", "final_logit_softcapping", "n_positions", "vision_config"]
OTHERS += ["model_type", "architectures", "eos_token_id", "tie_word_embeddings", "dtype", "max_position_embeddings"]
OTHERS += ["rope_theta", "rms_norm_eps", "hidden_act", "first_k_dense_replace", "linear_num_value_heads"]
KEYS = [*SIZES, *OTHERS, "rope_type"]
QUANTISED = [{"bits": "x"}, {"bits": 4, "group_size": "x"}, {"config_groups": {"a": 5}}, {"config_groups": [1]}]
QUANTISED += [{"quantized_layers": {"a": 1}}, {"quant_method": "fp8", "ignore": ["re:("]}, {"quant_method": ["fp8"]}]
QUANTISED += [{"quant_method": "fp8", "modules_to_not_convert": 5}, {"quant_method": "fp8", "ignore": [None]}]
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")

values = st.recursive(
    st.sampled_from([*ODD, *QUANTISED, "llama", "qwen3", "gemma3", "bert", "mamba", "t5", 2, 3, 7, 64, 4096])
    | st.integers()
    | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    cli.quiet_libraries()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_tiny_target(directory)
    return directory


@pytest.fixture
def model(saved, tmp_path):
    """A copy of a tiny target."""
    return copied(saved, tmp_path / "model")


def planned(model):
    """What `init` makes of it, `plan` included."""
    facts, machine = read_facts(str(model), None, False), preset("h100-1")
    needs_values, needs = choose(facts, machine, None, None, False)
    return render(needs_values, facts, needs, machine)


def loaded(model):
    return local_target(model).identity


def ends(model):
    target = WeightsOnlyTarget(TargetRecipe(model=str(model), dtype="fp32"), "cpu")
    return target.norm_gain(), target.embedding_rows().shape


def rewrite(model, name="config.json", **changes):
    path = model / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["pipe", "device", "terminal", "socket", "link to itself", "link to nothing", "noise"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_plain_file_ends_soon(model, attacks, kind, name):
    put(kind, model / name)
    attacks(3)
    with one_gigabyte():
        for work in (planned, loaded, ends):
            text = outcome(lambda work=work: work(model), 20)
            if kind in ("pipe", "device", "terminal", "socket"):
                assert "is no plain file" in text


@pytest.mark.parametrize("kind", ["sparse terabyte", "nothing in it", "directory"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_the_wrong_length_end_soon(model, attacks, kind, name):
    put(kind, model / name)
    attacks(3)
    mapped = kind == "sparse terabyte" and name == "model.safetensors"  # which takes addresses, no memory
    with contextlib.nullcontext() if mapped else one_gigabyte():
        for work in (planned, loaded, ends):
            outcome(lambda work=work: work(model), 20)


def test_a_pipe_among_the_templates_is_refused(model):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").touch()
    put("pipe", model / "additional_chat_templates" / "tool_use.jinja")
    assert "tool_use.jinja is no plain file" in outcome(lambda: load_tokenizer(str(model)))


@pytest.mark.parametrize("value", [0, -1, 2**20, 10**9, 10**30, 0.5, "32", [32], {"a": 1}, True, None])
@pytest.mark.parametrize("key", SIZES)
def test_sizes_are_held_against_the_weights(model, attacks, key, value):
    rewrite(model, **{key: value})
    attacks(3)
    with one_gigabyte():
        for work in (planned, loaded, ends):
            outcome(lambda work=work: work(model), 20)
    if isinstance(value, int) and value > 1:
        with pytest.raises(TargetError, match=r"^target\.model: "):
            loaded(model)


def test_a_config_that_wants_more_than_the_files_hold_is_refused_before_memory_is_asked_for(model):
    rewrite(model, hidden_size=1 << 13, intermediate_size=1 << 15, head_dim=None)
    with one_gigabyte():
        told = outcome(lambda: loaded(model), 20)
    assert "numbers, but its .safetensors files have" in told


@pytest.mark.parametrize("value", [*ODD, *QUANTISED])
@pytest.mark.parametrize("key", ["quantization_config", "rope_parameters", "num_experts", "layer_types", "text_config"])
def test_odd_values_end_in_a_plan_or_a_line(model, key, value):
    rewrite(model, **{key: value})
    with one_gigabyte():
        outcome(lambda: planned(model), 20)


@pytest.mark.parametrize("key", ["num_hidden_layers", "depth", "num_experts", "encoder_layers"])
def test_a_count_inside_another_config_is_seen(model, key):
    rewrite(model, vision_config={"model_type": "siglip_vision_model", "inner": [{key: 10**9}]})
    assert f"{key} is 1000000000, more than any model has" in outcome(lambda: planned(model))


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '"x"', "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "\xff"]
)
@pytest.mark.parametrize("name", [*FILES[:-1], "hf_quant_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_json_that_is_none_is_one_line(model, attacks, name, text):
    (model / name).write_text(text, encoding="latin-1")
    attacks(3)
    with one_gigabyte():
        for work in (planned, loaded, ends):
            outcome(lambda work=work: work(model), 20)


@pytest.mark.parametrize("text", ["[]", "{", "null", '{"model_type": ["gemma3"]}', "[" * 100_000])
def test_what_starts_an_engine_reads_it_on_guard(model, text):
    (model / "config.json").write_text(text)
    assert outcome(lambda: is_gemma3(str(model))).startswith(("target.model: ", "False"))


def test_init_of_an_odd_model_is_one_line(model, tmp_path, monkeypatch, capsys):
    rewrite(model, num_hidden_layers=10**9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["draftsmith", "init", str(model)])
    assert cli.main() == 2
    told = capsys.readouterr()
    assert told.err.startswith("draftsmith: target.model: config.json of ")
    assert told.err.count("\n") == 1


@fuzzed
@given(changes=st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=3))
def fuzz_config(model, original, changes):
    (model / "config.json").write_text(json.dumps({**original, **changes}))
    outcome(lambda: planned(model), 20)


def test_fuzzed_configs(model, attacks):
    attacks(FUZZED)
    with one_gigabyte():
        fuzz_config(model, json.loads((model / "config.json").read_text()))


@fuzzed
@given(data=st.data())
def fuzz_tokenizer(model, original, data):
    """A value somewhere in tokenizer.json is another one."""
    tree = json.loads(json.dumps(original))
    place, key = {"": tree}, ""
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 4)):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(values)
    (model / "tokenizer.json").write_text(json.dumps(tree))
    outcome(lambda: load_tokenizer(str(model))("the a of w1"), 20)


def test_a_tokenizer_that_fails_on_words_it_does_not_know_is_one_line(model):
    path = model / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["unk_token"] = "nowhere"
    path.write_text(json.dumps(tree))
    assert "cannot read text: WordLevel error: Missing [UNK]" in refused(lambda: load_tokenizer(str(model)))


def test_fuzzed_tokenizers(model, attacks):
    attacks(FUZZED)
    with one_gigabyte():
        fuzz_tokenizer(model, json.loads((model / "tokenizer.json").read_text()))
