"""Drafts that others made: scaled RoPE, other widths, quantised weights, other methods, and odd config files."""

import json
import os
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from models import tiny_target
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from draftsmith import cli
from draftsmith.commands.inspect import page as describe
from draftsmith.core.errors import CheckpointError
from draftsmith.core.shape import Shape
from draftsmith.decoding.cache import StaticCache
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.drafts.directories import inspect_draft, load_draft, ready_draft
from draftsmith.drafts.eagle3.config_file import IDS
from draftsmith.evaluation.profile import walks_of

H, INNER, HEADS, KV, HEAD, V, D = 32, 40, 4, 2, 8, 64, 40
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 131072,
    "vocab_size": V,
    "draft_vocab_size": D,
    "tie_word_embeddings": False,
}
TAPS = {IDS: [1, 3, 4], "eagle_config": {IDS: [0, 2, 3]}}
LAYER = {k: v for k, v in CONFIG.items() if k not in ("architectures", "draft_vocab_size")}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64},
    "yarn with its own gain": {
        **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
        **{"mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
    },
}
PLACES = {
    "rope_scaling": lambda scaling: CONFIG | {"rope_scaling": scaling},
    "old spelling": lambda scaling: (
        CONFIG
        | {"rope_scaling": {"type": scaling["rope_type"]} | {k: v for k, v in scaling.items() if k != "rope_type"}}
    ),
    "rope_parameters": lambda scaling: CONFIG | {"rope_parameters": {**scaling, "rope_theta": 10000.0}},
    "speculators": lambda scaling: speculators("eagle3", "Eagle3Speculator", rope_scaling=scaling),
}


def speculators(kind, architecture, **layer):
    return {
        "architectures": [architecture],
        "speculators_model_type": kind,
        "draft_vocab_size": D,
        "norm_before_residual": False,
        "transformer_layer_config": LAYER | layer,
    }


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) / shape[-1] ** 0.5


def layer(name, wide=2 * H, **more):
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, wide),
        "self_attn.k_proj": (KV * HEAD, wide),
        "self_attn.v_proj": (KV * HEAD, wide),
        "self_attn.o_proj": (H, HEADS * HEAD),
        "mlp.gate_proj": (INNER, H),
        "mlp.up_proj": (INNER, H),
        "mlp.down_proj": (H, INNER),
        "input_layernorm": (H,),
        "post_attention_layernorm": (H,),
        **more,
    }
    return {f"{name}.{key}.weight": rows(*shape) for key, shape in shapes.items()}


def eagle3(fused=3 * H, name="midlayer", **others):
    ids = torch.arange(D) + torch.arange(D) // 2
    return {
        **{"fc.weight": rows(H, fused), "norm.weight": rows(H), "lm_head.weight": rows(D, H)},
        **layer(name, hidden_norm=(H,)),
        **{"d2t": ids - torch.arange(D), "t2d": torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True)},
        **others,
    }


@pytest.fixture
def write(tmp_path):
    """Writes a draft directory."""

    def written(config, tensors):
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return written


# --- RoPE ------------------------------------------------------------------------------------------------------------


def rotary_of(scaling):
    shape = {key: LAYER[key] for key in ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")}
    return LlamaRotaryEmbedding(LlamaConfig(**shape, rope_parameters={**scaling, "rope_theta": 10000.0}))


def forward_of_transformers(draft, rotary, embeds, features):
    """The draft's layer with rotary embedding and attention as transformers' Llama has them."""
    middle, attn, width = draft.midlayer, draft.midlayer.self_attn, len(embeds)
    x = torch.cat([middle.input_layernorm(embeds), middle.hidden_norm(features)], dim=-1)
    query, key, value = (
        projection(x).view(1, width, -1, HEAD).transpose(1, 2) for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary(x, torch.arange(width)[None]))
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return draft.finish(features, attended[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_scaled_rope_is_that_of_transformers(write, kind, place):
    directory, rotary, width = write(PLACES[place](SCALINGS[kind]), eagle3()), rotary_of(SCALINGS[kind]), 300
    report = inspect_draft(directory)
    assert report.blocking() == []
    assert f"10000.0, {SCALINGS[kind]['rope_type']}, " in describe(report)
    draft, _ = load_draft(directory, torch.float32)
    assert draft.config.rope_scaling == SCALINGS[kind]
    frequencies, gain = draft._rope
    assert torch.allclose(frequencies.float(), rotary.inv_freq, rtol=1e-6)
    assert gain == rotary.attention_scaling
    draft.midlayer.self_attn.q_proj.weight *= 200  # attention sharp enough for positions to matter
    embeds, features = rows(width, H), rows(width + 1, H)[1:]
    visible = torch.ones(width, width, dtype=torch.bool).tril()
    ours = draft.step(embeds, features, torch.arange(width), StaticCache(1, width), 0, visible)
    assert (ours - forward_of_transformers(draft, rotary, embeds, features)).abs().max() < 1e-3
    plain = rotary_of({"rope_type": "default"})
    assert (ours - forward_of_transformers(draft, plain, embeds, features)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic' is not computed here"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]}}, "RoPE scaling 'longrope'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "RoPE scaling 'proportional'"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}}, "RoPE scaling ['yarn']"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "RoPE scaling yarn: factor is None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "RoPE scaling linear: factor is '4'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "RoPE scaling linear: factor is 0"),
        ({"rope_scaling": SCALINGS["llama3"] | {"high_freq_factor": None}}, "llama3: high_freq_factor is None"),
        ({"rope_scaling": SCALINGS["yarn"] | {"original_max_position_embeddings": 0}}, "no finite frequencies"),
        ({"rope_scaling": SCALINGS["yarn"], "rope_theta": 1}, "no finite frequencies"),
        (
            {"rope_scaling": SCALINGS["yarn"], "rope_parameters": SCALINGS["linear"]},
            "RoPE is 'yarn' in rope_scaling but 'linear' in rope_parameters",
        ),
        ({"partial_rotary_factor": 0.5}, "RoPE over a part of the head (partial_rotary_factor 0.5)"),
    ],
)
def test_a_rope_that_is_not_computed_is_refused_by_name(write, change, message):
    directory = write(CONFIG | change, eagle3())
    assert any(message in problem for problem in inspect_draft(directory).blocking())
    with pytest.raises(CheckpointError, match="RoPE"):
        load_draft(directory, layers=6, reading="auto")


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"partial_rotary_factor": 1.0},
    ],
)
def test_a_plain_rope_stays_plain(write, change):
    report = inspect_draft(write(CONFIG | change, eagle3()))
    assert (report.blocking(), report.draft.rope_scaling) == ([], None)


# --- a draft narrower than its target --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fc_norm": True}, {"norm_before_fc": True}])
def test_a_narrow_draft_decodes_with_embeddings_of_its_own(write, options):
    wide = 80
    norms = {f"fc_norm.{i}.weight": torch.ones(wide) for i in range(3)} if "fc_norm" in options else {}
    norms |= {"input_norm.weight": torch.ones(3 * wide)} if "norm_before_fc" in options else {}
    config, tensors = CONFIG | {"target_hidden_size": wide} | options, eagle3(3 * wide, **norms)
    directory = write(config, tensors)
    assert inspect_draft(directory).blocking() == []
    assert "32, of a target with 80" in describe(inspect_draft(directory))
    draft, _ = load_draft(directory, torch.float32)
    assert draft.fuse(torch.randn(5, 3, wide)).shape == (5, H)


def test_a_narrow_draft_needs_embeddings_of_its_own(write):
    target, size = tiny_target(), H // 2  # the target is 32 wide
    config = CONFIG | {"hidden_size": size, "target_hidden_size": 32, **TAPS}
    narrow = {
        name: tensor[..., : tensor.shape[-1] // 2].clone() if name.endswith("_proj.weight") else tensor
        for name, tensor in eagle3().items()
    }
    narrow |= {name: rows(size) for name in eagle3() if "norm" in name}
    narrow |= {"midlayer.self_attn.o_proj.weight": rows(size, 32), "midlayer.mlp.down_proj.weight": rows(size, INNER)}
    narrow |= {"fc.weight": rows(size, 96), "lm_head.weight": rows(D, size)}
    directory = write(config, narrow)
    assert inspect_draft(directory).blocking() == []
    with pytest.raises(CheckpointError, match=r"embeddings 16 wide, but those of .* are 32 wide; it needs an embed"):
        ready_draft(target, directory, "auto")
    ready = ready_draft(target, write(config, narrow | {"embed_tokens.weight": rows(V, size)}), "auto")
    decoded = Decoder(target, ready.drafter()).generate([1, 5, 9], Sampling(), 24, Shape(3, 2, 6))
    plain = Decoder(target).generate([1, 5, 9], Sampling(), 24, None)
    assert decoded.ids == plain.ids
    assert walks_of(target, ready, [([1, 5, 9], plain.ids)])[0]
    wrong = write(config, narrow | {"embed_tokens.weight": rows(V, 32)})
    assert inspect_draft(wrong).blocking() == ["embed_tokens.weight has shape [64, 32] of float32, wanted [64, 16]"]


def test_a_draft_of_a_target_of_another_width_is_refused(write):
    directory = write(CONFIG | {"target_hidden_size": 80}, eagle3(240))
    with pytest.raises(CheckpointError, match="made for hidden size 80 and 64 tokens, but"):
        ready_draft(tiny_target(), directory, "auto")


# --- quantised weights -----------------------------------------------------------------------------------------------


def scaled(dtype):
    def change(name, weight):
        return {name: (weight * 10).to(dtype), name.replace(".weight", ".weight_scale"): torch.ones(1)}

    return change


def packed(name, weight):
    stem = name.removesuffix(".weight")
    packed = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int32)
    return {f"{stem}.weight_packed": packed, f"{stem}.weight_scale": torch.ones(weight.shape[0], 1)}


@pytest.mark.parametrize(
    ("change", "config", "told"),
    [
        (scaled(torch.float8_e4m3fn), {"quant_method": "modelopt"}, "modelopt: float8_e4m3fn"),
        (scaled(torch.float8_e5m2), None, "no method named: float8_e5m2"),
        (scaled(torch.int8), {"quant_method": "compressed-tensors"}, "compressed-tensors: int8"),
        (packed, {"quant_method": "compressed-tensors"}, "compressed-tensors: int32"),
        (lambda name, weight: {name: weight}, {"quant_method": "fp8"}, "fp8: plain"),
        (lambda name, weight: {name: weight}, [4], "by quantization_config: plain"),
    ],
)
def test_quantised_weights_are_named_and_not_computed(write, monkeypatch, capsys, change, config, told):
    tensors = {}
    for name, weight in eagle3().items():
        tensors |= change(name, weight) if name.endswith("_proj.weight") else {name: weight}
    directory = write(CONFIG | {"quantization_config": config}, tensors)
    (problem,) = inspect_draft(directory).blocking()
    assert problem.startswith(f"quantised weights ({told}): draftsmith computes bfloat16, float16, float32 alone")
    monkeypatch.setattr(sys, "argv", ["draftsmith", "inspect", str(directory)])
    assert cli.main() == 1
    assert told.split(": ")[1] in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="quantised weights") as refused:
        load_draft(directory, layers=6, reading="auto")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_plain_weights_of_any_width_are_computed(write, dtype):
    weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in eagle3().items()}
    assert inspect_draft(write(CONFIG, weights)).blocking() == []


# --- other methods ---------------------------------------------------------------------------------------------------

HEADLESS = {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": None}
DFLASH = {"fc.weight": rows(H, 3 * H), "hidden_norm.weight": rows(H), **layer("layers.0", H), **layer("layers.1", H)}
LATENT = {f"midlayer.self_attn.{n}.weight": rows(8, 2 * H) for n in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")}
WHOLE = {"embed_tokens.weight": rows(V, H), **layer("layers.0", H), **layer("layers.1", H), "norm.weight": rows(H)}
OTHERS = {
    "DFlash": [
        (speculators("dflash", "DFlashSpeculator", model_type="qwen3", num_hidden_layers=2), DFLASH),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {"target_layer_ids": [1, 3]}}, DFLASH),
        (CONFIG | HEADLESS, DFLASH),  # by its tensors alone
    ],
    "DSpark": [
        ({"architectures": ["Qwen3DSparkModel"]}, DFLASH | {"markov_head.markov_w1.weight": rows(V, 4)}),
        (speculators("dspark", "DSparkSpeculator"), DFLASH),
    ],
    "P-EAGLE": [
        (speculators("peagle", "PEagleSpeculator"), eagle3(name="layers.0", mask_hidden=rows(1, 1, 3 * H))),
        (CONFIG, eagle3(mask_hidden=rows(1, 1, 3 * H))),
    ],
    "EAGLE-1 or EAGLE-2": [
        (CONFIG | HEADLESS, {"embed_tokens.weight": rows(V, H), "fc.weight": rows(H, 2 * H), **layer("layers.0", H)}),
        ({"architectures": ["EagleLlamaForCausalLM"], "model_type": "eagle"}, {"fc.weight": rows(H, 2 * H)}),
        (speculators("eagle", "EagleSpeculator"), {"fusion_fc.weight": rows(H, 2 * H)}),
    ],
    "Medusa": [
        ({"model_type": "medusa", "medusa_num_heads": 1}, {"0.0.linear.weight": rows(H, H), "0.1.weight": rows(V, H)}),
        ({}, {"medusa_head.0.0.linear.weight": rows(H, H)}),
    ],
    "EAGLE with latent attention": [
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"], "kv_lora_rank": 8}, eagle3() | LATENT),
    ],
    "no draft but a whole model (Qwen3ForCausalLM)": [
        (LAYER | {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2}, WHOLE),
        (
            {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": [1, 2]},  # odd for a draft alone
            {f"model.{name}": t for name, t in WHOLE.items()},
        ),
    ],
    "none that draftsmith knows": [({}, {"weight": rows(4, 4)})],
}


@pytest.mark.parametrize(("method", "number"), [(m, i) for m, cases in OTHERS.items() for i in range(len(cases))])
def test_another_method_is_called_by_its_own_name(write, method, number):
    directory = write(*OTHERS[method][number])
    report = inspect_draft(directory)
    assert report.method.startswith(method)
    text = describe(report)
    (head,) = (line for line in text.splitlines() if line.startswith("method"))
    assert head.split(maxsplit=1)[1].startswith(method)
    assert text.count("problem: ") == 1
    assert "random numbers" not in text
    with pytest.raises(CheckpointError, match="draftsmith reads EAGLE-3 drafts alone"):
        load_draft(directory)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CONFIG | {"architectures": ["LlamaForCausalLM"]}, "midlayer"),  # SafeAILab's
        (CONFIG | {"architectures": ["Eagle3LlamaForCausalLM"]}, "layers.0"),
        ({k: v for k, v in CONFIG.items() if k != "architectures"}, "model.layers.0"),
        (speculators("eagle3", "Eagle3Speculator"), "layers.0"),
    ],
)
def test_eagle3_is_known_by_any_of_its_names(write, config, name):
    report = inspect_draft(write(config, eagle3(name=name)))
    assert report.method == "EAGLE-3"
    assert report.blocking(lenient=True) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"bias": True}, "bias is set"),
        ({"norm_output": True}, "norm_output feeds back"),
        ({"parallel_drafting": True}, "parallel_drafting is set"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"layer_types": ["sliding_attention"]}, "only full_attention is computed"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is false"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
    ],
)
def test_what_our_forward_does_not_do_is_refused(write, change, message):
    directory = write(CONFIG | change, eagle3())
    (problem,) = inspect_draft(directory).blocking()
    assert message in problem
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_draft(directory, layers=6, reading="auto")


def test_what_changes_nothing_is_no_problem(write):
    same = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": None, "logit_scale": 1.0, "norm_output": False}
    same |= {"layer_types": ["full_attention"], "eagle_config": None}
    assert inspect_draft(write(CONFIG | same, eagle3())).blocking() == []


# --- odd config files ------------------------------------------------------------------------------------------------

ODD = ["text", "", -1, 0, 0.5, 10**9, 10**30, True, [], [1, "x"], {}, {"a": None}, None]


@pytest.mark.parametrize(
    "key",
    [
        *CONFIG,
        "target_hidden_size",
        "num_aux_hidden_states",
        "eagle_config",
        "draftsmith",
        "rope_scaling",
        "rope_parameters",
        "eagle_aux_hidden_state_layer_ids",
        "fc_norm",
        "transformer_layer_config",
        "speculators_model_type",
        "quantization_config",
    ],
)
def test_an_odd_value_ends_in_a_report(write, key):
    """Whatever it is: lines, no traceback, and no memory for sizes that no weight has."""
    for value in ODD:
        directory = write(CONFIG | {"fc_norm": False, key: value}, eagle3())
        try:
            report = inspect_draft(directory)
            text = describe(report)
        except CheckpointError as error:
            text, report = str(error), None
            assert "\n" not in text
        assert "EAGLE-3" in text, (key, value, text)
        if report is None or report.blocking(lenient=True):
            with pytest.raises(CheckpointError):
                load_draft(directory, layers=6, reading="auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size is '32'; wanted a whole number of 1 to 131072"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000; wanted a whole number of 1 to 131072"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000; wanted a whole number"),
        ({"num_aux_hidden_states": 10**9, "fc_norm": True}, "num_aux_hidden_states is 1000000000; wanted"),
        ({"draftsmith": {"taps": 3}}, "draftsmith.taps is 3; wanted a list of layer numbers"),
        ({"draftsmith": {"taps": [1], "target": {"num_layers": "6"}}}, "draftsmith.target.num_layers is '6'"),
        ({"eagle_config": {"norm_before_fc": "no"}}, "eagle_config.norm_before_fc is 'no'; wanted true or false"),
        ({"num_attention_heads": 3}, "3 heads with 2 key heads of 8: no attention has such a shape"),
        ({"head_dim": 7}, "4 heads with 2 key heads of 7: no attention has such a shape"),
    ],
)
def test_an_odd_value_is_named(write, change, message):
    assert any(problem.startswith(message) for problem in inspect_draft(write(CONFIG | change, eagle3())).blocking())


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "", "{", "\xff", "[" * 5000])
def test_a_config_that_is_no_object_is_one_line(write, text):
    with pytest.raises(CheckpointError, match=r"config\.json: (holds|cannot be read)") as refused:
        inspect_draft(write(text, eagle3()))
    assert "\n" not in str(refused.value)


def test_odd_maps_are_named(write):
    odd = {"d2t": torch.zeros(D), "t2d": torch.zeros(3, 3, dtype=torch.float8_e4m3fn)}
    assert any(
        "d2t has shape (40,) and dtype float32" in p for p in inspect_draft(write(CONFIG, eagle3(**odd))).problems
    )
    empty = {"d2t": torch.zeros(0, dtype=torch.int64)}
    assert any("d2t has shape (0,)" in p for p in inspect_draft(write(CONFIG, eagle3(**empty))).problems)
    float_t2d = eagle3(t2d=torch.ones(V))
    assert inspect_draft(write(CONFIG, float_t2d)).blocking() == ["t2d does not name the tokens that d2t names"]


# --- what is no file of the directory's own; taps that engines would read otherwise ----------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_only_plain_files_of_the_directory_are_read(write, tmp_path, name):
    path, other = write(CONFIG, eagle3()) / name, tmp_path.with_name(f"{tmp_path.name}-other")
    path.rename(other)
    for put, why in ((os.mkfifo, "is no plain file"), (lambda p: p.symlink_to(other), "is a link that leaves its")):
        put(path)
        with pytest.raises(CheckpointError, match=rf"{name}: {why}"):
            inspect_draft(tmp_path)
        path.unlink()


def test_a_weight_that_is_stored_twice_is_refused(write):
    with pytest.raises(CheckpointError, match=r"midlayer\.hidden_norm\.weight is stored twice"):
        inspect_draft(write(CONFIG, eagle3(**{"layers.0.hidden_norm.weight": rows(H)})))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({IDS: [7, 8, 9], "eagle_config": {IDS: [6, 7, 8]}}, "vLLM would capture taps [7, 8, 9]"),
        ({IDS: [1, 3, 4], "eagle_config": {IDS: [6, 7, 8]}}, "SGLang would capture taps [7, 8, 9]"),
        ({}, "vLLM would capture taps its default"),
        (TAPS | {"draftsmith": {"taps": [1, 3, 4], "target": {"num_layers": 4}}}, "its target has 4 layers"),
    ],
)
def test_the_taps_that_engines_read_are_those_that_were_trained(write, change, told):
    problems = inspect_draft(write(CONFIG | {"draftsmith": {"taps": [1, 3, 4]}} | change, eagle3())).blocking()
    assert any(told in problem and "trained with" in problem for problem in problems)
    assert inspect_draft(write(CONFIG | TAPS | {"draftsmith": {"taps": [1, 3, 4]}}, eagle3())).blocking() == []


def test_names_of_tensors_are_no_commands_to_the_terminal(write):
    text = describe(inspect_draft(write(CONFIG, eagle3(**{"a\nno problems found\x1b[2J": rows(H)}))))
    assert "\x1b" not in text
    assert "no problems found" not in text.splitlines()
