"""Sizes against the models themselves, and against what their makers publish."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MiniMaxM2Config, Qwen3MoeConfig

from draftsmith.core.errors import TargetError
from draftsmith.drafts.eagle3.config import Eagle3Config
from draftsmith.drafts.eagle3.model import Eagle3Draft
from draftsmith.hardware import sizes
from draftsmith.hardware.quantisation import Quantisation
from draftsmith.hardware.sizes import TargetSize
from draftsmith.targets.configs import target_config

SMALL = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16
)
WIDE = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=False,
    pad_token_id=0,
)
LATENT = dict(q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
ROUTED = dict(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=64)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    shared_expert_intermediate_size=64,
)
MAMBA = dict(mamba_n_heads=16, mamba_d_head=32, mamba_d_state=16)
# A tiny config of every kind: what it has beside WIDE.
KINDS = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"tie_word_embeddings": True},
    "gemma4_text": {
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 512,
        "global_head_dim": 64,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    },
    "minimax_m2": {"num_local_experts": 16, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **LATENT,
        "num_key_value_heads": 8,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 3,
    },
    "llama4_text": {
        "intermediate_size_mlp": 1280,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    },
    "qwen3_moe": {**ROUTED, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "qwen3_next": {**ROUTED, **LINEAR},
    "qwen3_5_moe_text": {**ROUTED, **LINEAR},
    "gpt_oss": {"num_local_experts": 16, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 2,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "MEM*EM-E",
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 128,
        "mamba_num_heads": 16,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
    },
    "granitemoehybrid": {
        **MAMBA,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 128,
        "layer_types": ["mamba", "mamba", "mamba", "attention"] * 2,
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "cohere2": {"tie_word_embeddings": True},
}


def small(kind: str):
    values = {**WIDE, **KINDS[kind]}
    if kind in ("nemotron_h", "deepseek_v3"):  # of them the number of layers follows from the pattern, the width from
        values.pop("num_hidden_layers" if kind == "nemotron_h" else "head_dim")  # latent attention
    return AutoConfig.for_model(kind, **values)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_model(kind):
    config = small(kind)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    weights = dict(lm.named_parameters())
    size = TargetSize.of(config)
    assert size.parameters == pytest.approx(sum(w.numel() for w in weights.values()), rel=0.02)
    routed = sum(w.numel() for name, w in weights.items() if ".experts." in name)
    assert (size.experts, bool(size.sparse_layers)) == ((16, True) if routed else (0, False))
    idle = (1 - size.experts_per_token / size.experts) * routed if routed else 0
    looked_up = sum(w.numel() for name, w in weights.items() if "embed" in name.split(".")[1] and w.ndim == 2)
    used = sum(w.numel() for w in weights.values()) - idle - looked_up + size.head.parameters * size.tied
    assert size.active_parameters == pytest.approx(used, rel=0.02)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False),
        LlamaConfig(**SMALL, num_key_value_heads=4, tie_word_embeddings=True),
        MiniMaxM2Config(**SMALL, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2),
        Qwen3MoeConfig(**SMALL, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48),
    ],
    ids=["llama", "tied", "minimax_m2", "qwen3_moe"],
)
def test_only_norms_and_biases_are_left_out_and_the_formula_agrees(config, monkeypatch):
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    matrices = sum(p.numel() for p in lm.parameters() if p.ndim > 1)
    counted = TargetSize.of(config)
    assert counted.parameters == matrices
    assert counted.assumption is None
    monkeypatch.setattr(sizes, "_build", lambda config: None)
    monkeypatch.setattr(sizes, "_KNOWN", {})
    told = TargetSize.of(config)
    assert (told.parameters, told.active_parameters) == (counted.parameters, counted.active_parameters)
    assert told.cache == counted.cache
    assert "cannot build" in told.assumption


PUBLISHED = {  # billions of parameters, all and active, as their makers tell them
    "deepseek_v3": ({}, 671, 37),
    "gpt_oss": ({}, 116.8, 5.1),
    "llama4_text": ({}, 109, 17),
    "qwen3_moe": (
        dict(
            hidden_size=4096,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            moe_intermediate_size=1536,
            num_experts=128,
            num_experts_per_tok=8,
            vocab_size=151936,
        ),
        235,
        22,
    ),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_sizes_are_met(kind):
    values, everything, active = PUBLISHED[kind]
    size = TargetSize.of(AutoConfig.for_model(kind, **values))
    assert size.parameters == pytest.approx(everything * 1e9, rel=0.02)
    assert size.active_parameters == pytest.approx(active * 1e9, rel=0.06)  # makers differ in counting the embedding


def test_minimax_is_known_without_a_network():
    size = TargetSize.of(target_config("MiniMaxAI/MiniMax-M2.7"))
    assert size.parameters == pytest.approx(229e9, rel=0.01)
    assert size.active_parameters == pytest.approx(10e9, rel=0.05)
    assert size.bytes == pytest.approx(230e9, rel=0.02)  # fp8


def test_experts_touched_are_those_of_independent_routing():
    size = TargetSize.of(target_config("MiniMaxAI/MiniMax-M2.7"))
    ratios = [size.distinct_experts(w) / size.distinct_experts(1) for w in (4, 6, 8)]
    assert ratios == pytest.approx([3.82, 5.55, 7.18], abs=0.01)
    assert size.distinct_experts(8, correlation=1.0) == pytest.approx(8)
    assert size.read_bytes(1e6) == pytest.approx(size.bytes - size.embedding.bytes)


# --- caches ----------------------------------------------------------------------------------------------------------


def test_a_window_holds_no_more_than_it_is_wide():
    size = TargetSize.of(AutoConfig.for_model("gemma3_text", **WIDE, sliding_window=8, sliding_window_pattern=4))
    row = 2 * 2 * 32 * 2
    assert size.kv_bytes_per_token == 8 * row
    assert size.cache_bytes(8) == 8 * 8 * row
    assert size.cache_bytes(1000) == 2 * 1000 * row + 6 * 8 * row


def test_latent_attention_caches_one_row_for_all_heads():
    assert TargetSize.of(small("deepseek_v3")).kv_bytes_per_token == 8 * (32 + 8) * 2


def test_linear_attention_holds_a_state():
    size = TargetSize.of(small("qwen3_next"))
    state = 6 * 4 * 32 * 32 * 4
    assert size.cache_bytes(100) == 100 * 2 * (2 * 2 * 32) * 2 + state
    assert TargetSize.of(small("granitemoehybrid")).state_bytes == 6 * 16 * 32 * 16 * 4


def test_layers_have_heads_of_their_own_and_borrow_keys():
    """Of eight Gemma layers the last two use others' keys; full-attention heads are twice as wide."""
    rows = [row for row, _ in TargetSize.of(small("gemma4_text")).cache]
    assert rows == [2 * 2 * 32 * 2, 2 * 2 * 64 * 2] * 3 + [0, 0]


# --- drafts, files and quantisation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target_hidden_size", [None, 160])
def test_draft_parameters_are_those_of_the_draft(target_hidden_size):
    config = Eagle3Config(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        draft_vocab_size=32,
        taps=(0, 1, 2),
        rope_theta=1e4,
        max_position_embeddings=512,
        target_hidden_size=target_hidden_size,
    )
    matrices = sum(p.numel() for p in Eagle3Draft(config).parameters() if p.ndim > 1)
    assert config.parameters == matrices


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, r"target.model: no config.json of"),
        ("{", r"target.model: config.json of .* cannot be read: "),
        ({"model_type": "of_tomorrow"}, r"is of type of_tomorrow, which transformers \d+\.\S+ does not know"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "a.B"}},
            r"code of its own \(own\).*target.trust_remote_code",
        ),
        ({"model_type": "llama", "hidden_size": "wide"}, r"target.model: config.json of .* cannot be read: "),
    ],
    ids=["missing", "not json", "unknown", "custom code", "bad value"],
)
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, config, told):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(TargetError, match=told) as caught:
        target_config(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4.125),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        (
            {
                "quant_method": "modelopt",
                "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}},
            },
            6.25,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
            },
            4.5,
        ),
    ],
)
def test_quantised_weights_count_their_bits(scheme, bits):
    config = AutoConfig.for_model("llama", **SMALL, quantization_config=scheme)
    assert Quantisation.of(config, "bf16").weight_bytes == bits / 8


def test_excluded_modules_stay_in_dtype():
    """gpt-oss-120b quantises its experts alone: 65 GB on the hub."""
    excluded = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    scheme = {"quant_method": "mxfp4", "modules_to_not_convert": excluded}
    size = TargetSize.of(AutoConfig.for_model("gpt_oss", quantization_config=scheme))
    assert size.bytes == pytest.approx(65.2e9, rel=0.01)
    scheme = {"quant_method": "fp8", "ignore": ["re:.*mlp.*", "model.layers.1.self_attn*"]}
    llama = LlamaConfig(**{**SMALL, "num_hidden_layers": 12}, num_key_value_heads=4, quantization_config=scheme)
    attention, mlp = 4 * 64 * 64, 3 * 64 * 96
    assert TargetSize.of(llama).body.bytes == 11 * attention + 2 * attention + 12 * 2 * mlp


@pytest.mark.parametrize(("algorithm", "each"), [("FP8", 1.0), ("NVFP4", 0.5625)])
def test_modelopt_tells_its_scheme_beside_the_config(algorithm, each, tmp_path):
    LlamaConfig(**SMALL, num_key_value_heads=2).save_pretrained(tmp_path)
    told = {"quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(told))
    assert Quantisation.of(target_config(str(tmp_path)), "bf16").weight_bytes == each
