"""Packed weights and the lean layers that multiply with them are the model's own."""

import pytest
import torch
import transformers as tf
from models import COMMON
from test_decoding import OracleDrafter

from draftsmith.core.shape import Shape
from draftsmith.decoding.products import pack
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.targets.lean import LeanLayer
from draftsmith.targets.local import LocalTarget

WITHOUT_HEAD_DIM = {key: value for key, value in COMMON.items() if key != "head_dim"}
MODELS = {
    "llama": (tf.LlamaForCausalLM, dict(COMMON, attention_bias=True)),
    "mistral": (tf.MistralForCausalLM, dict(COMMON, sliding_window=8)),
    "qwen2": (tf.Qwen2ForCausalLM, WITHOUT_HEAD_DIM),
}
PROMPTS = [[3, 9, 20, 7, 5], [(7 * i) % 60 + 1 for i in range(40)], [8, 30, 11, 2]]


def lm_of(name, bf16=True):
    torch.manual_seed(1)
    kind, config = MODELS[name]
    lm = kind(kind.config_class(**config)).eval()
    for weight in lm.parameters():
        if weight.ndim == 1:
            weight.data.normal_(1.0, 0.3)  # norms and biases that leave nothing as it is
        if bf16:
            weight.data = weight.data.bfloat16().float()
    return lm


@pytest.mark.parametrize("name", MODELS)
def test_lean_layers_are_the_librarys(name):
    target, lm = LocalTarget.from_model(lm_of(name)), lm_of(name)
    assert all(isinstance(layer.forward, LeanLayer) for layer in target.layers)
    target.eos_ids = frozenset()
    states = target.capture(PROMPTS, (0, 4))
    made, start = dict(target.generate(PROMPTS, Sampling(), 10)), 0
    for number, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            own = lm(input_ids=torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
        part = slice(start, start := start + len(prompt))
        torch.testing.assert_close(target.logits(states.last_TH[part]), own.logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(states.taps_TKH[part, 1], own.hidden_states[4][0], atol=1e-3, rtol=1e-3)
        text = list(prompt)
        for _ in range(10):
            with torch.inference_mode():
                text.append(int(lm(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        assert made[number].ids == Decoder(target).generate(prompt, Sampling(), 10).ids == text[len(prompt) :]


@pytest.mark.parametrize("mode", ["always", "never", "sometimes"])
@pytest.mark.parametrize("name", MODELS)
def test_drafted_text_is_plain_text(name, mode):
    target = LocalTarget.from_model(lm_of(name))
    target.eos_ids = frozenset()
    for prompt in PROMPTS:
        text = Decoder(target).generate(prompt, Sampling(), 24).ids
        drafted = Decoder(target, OracleDrafter(text, mode)).generate(prompt, Sampling(), 24, Shape(3, 1, 4))
        assert drafted.ids == text
        assert any(drafted.verified) == (mode != "never")


def test_where_lean_layers_are_not_right_the_library_runs_its_own():
    kind, config = MODELS["llama"]
    torch.manual_seed(1)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    lm = kind(kind.config_class(**config, rope_parameters=rope)).eval().bfloat16().float()
    target = LocalTarget.from_model(lm)
    assert target.library is not None
    assert not any(isinstance(layer.forward, LeanLayer) for layer in target.layers)
    assert len(dict(target.generate(PROMPTS[:1], Sampling(), 4))[0].ids) == 4


def test_weights_that_fp16_would_change_stay_as_they_are():
    target = LocalTarget.from_model(lm_of("llama", bf16=False))
    assert not any(isinstance(layer.forward, LeanLayer) for layer in target.layers)
    linear = torch.nn.Linear(8, 4).requires_grad_(False)
    assert pack(linear) is None
    linear.weight.copy_(linear.weight.bfloat16())
    assert pack(linear) is not None
    linear.weight[0, 0] = 1e5  # past fp16's largest number
    assert pack(linear) is None


def test_products_of_several_weights_lie_side_by_side():
    first, second = torch.nn.Linear(64, 5), torch.nn.Linear(64, 3, bias=False)
    for linear in (first, second):
        linear.requires_grad_(False).weight.copy_(linear.weight.bfloat16())
    hidden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    got = pack(first, second)(hidden)
    torch.testing.assert_close(got, torch.cat([first(hidden), second(hidden)], -1), atol=1e-5, rtol=1e-5)
