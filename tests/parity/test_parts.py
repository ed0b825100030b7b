"""A target whose layers were never loaded lends the same rows as the whole one."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from models import BUILDERS, COMMON, local_target, save_tiny_target, tiny_tokenizer
from safetensors.torch import load_file, save_file

from draftsmith.core.errors import TargetError
from draftsmith.core.recipe import TargetRecipe
from draftsmith.targets.local import LocalTarget
from draftsmith.targets.parts import context_of
from draftsmith.targets.weights import WeightsOnlyTarget


def ends_of(model, device="cpu"):
    return WeightsOnlyTarget(TargetRecipe(model=str(model), dtype="fp32"), device)


@pytest.mark.parametrize("architecture", BUILDERS)
def test_loose_ends_equal_the_whole_model(architecture, tmp_path):
    model = save_tiny_target(tmp_path, architecture)
    whole, ends = local_target(model), ends_of(model)
    assert ends.identity == whole.identity
    assert (ends.eos_ids, ends.logit_softcap) == (whole.eos_ids, whole.logit_softcap)
    ids = torch.tensor([3, 0, 63])
    hidden = torch.randn(5, whole.identity.hidden_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ends.head_rows(ids), whole.head_rows(ids))
    assert torch.equal(ends.embedding_rows(), whole.embedding_rows())
    assert torch.equal(ends.norm_gain(), whole.norm_gain())
    assert torch.equal(ends.final_norm(hidden), whole.final_norm(hidden))


def test_tied_and_sharded_weights_are_found(tmp_path):
    lm = BUILDERS["qwen3"]()
    lm.config.tie_word_embeddings = True
    lm.tie_weights()
    lm.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    ends = ends_of(tmp_path)
    everything = torch.arange(64)
    assert torch.equal(ends.head_rows(everything), ends.embedding_rows())
    assert torch.equal(ends.embedding_rows(), lm.get_input_embeddings().weight)


def test_a_config_of_another_model_is_refused(tmp_path):
    model = save_tiny_target(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(TargetError, match="its config belongs to another model"):
        ends_of(model).embedding_rows()


BESIDE = {  # tensors that checkpoints hold beside the decoder's own
    "a multi-token layer": ["model.layers.6.embed_tokens.weight", "model.layers.6.shared_head.norm.weight"],
    "a head of a multi-token layer": ["model.layers.6.shared_head.lm_head.weight"],
    "an mtp module": ["mtp.norm.weight", "mtp.layers.0.input_layernorm.weight", "mtp.embed_tokens.weight"],
    "a vision tower": ["model.visual.merger.norm.weight", "vision_tower.norm.weight", "model.vision_model.norm.weight"],
    "a projector": ["multi_modal_projector.norm.weight", "audio_tower.embed_tokens.weight"],
}


@pytest.mark.parametrize("what", BESIDE)
def test_the_decoders_own_ends_are_taken(what, tmp_path):
    model = save_tiny_target(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    extra = {name: torch.full((64, 32), 7.0) for name in BESIDE[what]}
    save_file({**stored, **extra}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ends = ends_of(model)
    assert torch.equal(ends.head_rows(torch.arange(64)), stored["lm_head.weight"])
    assert torch.equal(ends.embedding_rows(), stored["model.embed_tokens.weight"])
    torch.testing.assert_close(ends.norm_gain(), stored["model.norm.weight"], rtol=1e-3, atol=1e-3)


VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def gemma3_wrapper(text_tied, top_tied):
    text = {**COMMON, "tie_word_embeddings": text_tied, "sliding_window": 8}
    vision = {**VISION, "image_size": 14, "patch_size": 14}
    config = tf.Gemma3Config(
        text_config=text, vision_config=vision, tie_word_embeddings=top_tied, mm_tokens_per_image=1
    )
    return tf.Gemma3ForConditionalGeneration(config)


def qwen3_vl(tied=False):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
    text = {**COMMON, "rope_parameters": rope, "tie_word_embeddings": tied}
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return tf.Qwen3VLForConditionalGeneration(config)


def mistral3():
    vision = {**VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 8}
    text = {**COMMON, "model_type": "mistral"}
    return tf.Mistral3ForConditionalGeneration(tf.Mistral3Config(text_config=text, vision_config=vision))


WRAPPERS = {
    "gemma3, untied": lambda: gemma3_wrapper(False, False),
    "gemma3, tied": lambda: gemma3_wrapper(True, True),
    "gemma3, tied in its text alone": lambda: gemma3_wrapper(True, False),
    "qwen3-vl": qwen3_vl,
    "qwen3-vl, tied": lambda: qwen3_vl(True),
    "mistral3": mistral3,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_lend_what_they_store_and_run_in_process(name, tmp_path):
    torch.manual_seed(0)
    lm = WRAPPERS[name]().eval()
    lm.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    embedding = next(tensor for key, tensor in stored.items() if key.endswith("embed_tokens.weight"))
    head = next((tensor for key, tensor in stored.items() if key.endswith("lm_head.weight")), embedding)
    ends, whole = ends_of(tmp_path, "auto"), local_target(tmp_path)
    everything = torch.arange(64)
    for target in (ends, whole):
        assert torch.equal(target.head_rows(everything), head)
        assert torch.equal(target.embedding_rows(), embedding)
        assert (target.identity.hidden_size, target.identity.num_layers) == (32, 6)
    ids = [3, 9, 20, 7, 5, 8, 30, 11, 2, 40, 41, 42]
    with torch.inference_mode():
        wanted = lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        got = whole.logits(whole.capture([ids], (2,)).last_TH)
    assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.3.mlp.down_proj.weight", "model.norm.weight"])
def test_a_lost_tensor_is_named_and_never_random(lost, tmp_path):
    model = save_tiny_target(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match=f"lacks weights that its config asks for: {lost}"):
        local_target(model)
    if "layers" not in lost:
        with pytest.raises(TargetError, match="has no tensor named"):
            ends_of(model).head_rows(torch.arange(3))


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [(63, 63, {0, 63}), (0, None, {0}), ([5, 6], 7, {0, 5, 6, 7}), (None, [0, 9], {0, 9}), (None, None, {0})],
)
def test_everything_that_engines_stop_at_ends_a_text(config, generation, ends, tmp_path):
    """The tokenizer's own end token is 0."""
    model = save_tiny_target(tmp_path)
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        path = tmp_path / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": value}))
    assert local_target(model).eos_ids == ends
    assert ends_of(model).eos_ids == ends


def test_more_ids_than_rows_are_no_obstacle(tmp_path):
    model = save_tiny_target(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    assert local_target(model).identity.vocab_size == ends_of(model).identity.vocab_size == 64


def test_a_head_with_a_bias_is_refused():
    lm = BUILDERS["llama"]()
    lm.lm_head = torch.nn.Linear(32, 64, bias=True)
    with pytest.raises(TargetError, match="the output head of LlamaForCausalLM has a bias"):
        LocalTarget.from_model(lm)
    torch.nn.init.zeros_(lm.lm_head.bias)
    assert LocalTarget.from_model(lm).identity.vocab_size == 64


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 256),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 512),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}, 256),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}, 512),
    ],
)
def test_a_context_is_what_engines_derive(rope, context):
    assert context_of(tf.LlamaConfig(**COMMON, rope_parameters=rope)) == context


OWN_CODE = """from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_runs_where_it_is_trusted_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tf.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, usual = Path(save_tiny_target(tmp_path / "own", "llama")), save_tiny_target(tmp_path / "usual", "llama")
    (model / "own.py").write_text(OWN_CODE)
    named = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads((model / "config.json").read_text()) | {"model_type": "own", "auto_map": named}
    (model / "config.json").write_text(json.dumps(config))
    settings = TargetRecipe(model=str(model), dtype="fp32")
    for target in (LocalTarget, WeightsOnlyTarget):
        with pytest.raises(TargetError, match=r"comes with code of its own \(own\), which target.trust_remote_code"):
            target(settings, "cpu")
    own = LocalTarget(settings.model_copy(update={"trust_remote_code": True}), "cpu")
    assert type(own.lm).__name__ == "OwnModel"
    ids = [5, 9, 21]
    assert torch.equal(own.capture([ids], (1,)).last_TH, local_target(usual).capture([ids], (1,)).last_TH)
