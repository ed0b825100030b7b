"""Sizes against the models themselves."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MiniMaxM2Config, Qwen3MoeConfig

from draftsmith.drafts.eagle3 import Eagle3Config, Eagle3Draft
from draftsmith.errors import TargetError
from draftsmith.hardware.sizes import DraftSize, TargetSize, target_config

SMALL = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16
)


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
def test_parameters_are_those_of_the_model_but_for_norms_and_biases(config):
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    matrices = sum(p.numel() for p in lm.parameters() if p.ndim > 1)
    assert TargetSize.of("m", config).parameters == matrices


def test_minimax_is_known_without_a_network():
    size = TargetSize.of("m", target_config("MiniMaxAI/MiniMax-M2.7"))
    assert size.parameters == pytest.approx(229e9, rel=0.01)
    assert size.active_parameters == pytest.approx(10e9, rel=0.05)
    assert size.bytes == pytest.approx(230e9, rel=0.02)  # fp8


def test_experts_touched_are_those_of_independent_routing():
    size = TargetSize.of("m", target_config("MiniMaxAI/MiniMax-M2.7"))
    ratios = [size.distinct_experts(w) / size.distinct_experts(1) for w in (4, 6, 8)]
    assert ratios == pytest.approx([3.82, 5.55, 7.18], abs=0.01)
    assert size.distinct_experts(8, correlation=1.0) == pytest.approx(8)


def test_draft_parameters_are_those_of_the_draft():
    config = Eagle3Config(64, 96, 4, 2, 16, 128, 32, (0, 1, 2), 1e4, 512)
    matrices = sum(p.numel() for p in Eagle3Draft(config).parameters() if p.ndim > 1)
    assert DraftSize.of(config).parameters == matrices


def test_an_unknown_model_is_one_line(tmp_path):
    with pytest.raises(TargetError, match=r"target.model: no config.json of"):
        target_config(str(tmp_path))


def test_quantised_weights_count_their_bits():
    config = AutoConfig.for_model("llama", **SMALL, quantization_config={"quant_method": "awq", "bits": 4})
    assert TargetSize.of("m", config).weight_bytes == 0.5
