"""Any decoder that `transformers` runs is a target in this process: states, completions, decoding are the model's."""

import pytest
import torch
import transformers as tf
from models import COMMON, tiny_draft

from draftsmith.core.errors import TargetError
from draftsmith.core.shape import Shape
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.drafts.eagle3.drafter import Eagle3Drafter
from draftsmith.targets.local import LocalTarget

HYBRID = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
MIXED = dict(layer_types=["linear_attention", "full_attention"] * 3)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
WITHOUT_HEAD_DIM = {key: value for key, value in COMMON.items() if key != "head_dim"}
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
)
ROUTED = dict(
    num_experts_per_tok=2,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=2,
    moe_intermediate_size=16,
)
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[8.0] * 4, factor=32.0,
    original_max_position_embeddings=24,
)  # fmt: skip
STATE_SPACE = dict(
    hybrid_override_pattern="M*M-M*", mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=16
)  # fmt: skip
TOKENS = {
    key: COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
}
NO_WAY_BACK = ("qwen3_next", "lfm2", "qwen3_5_text", "nemotron_h", "mamba2")  # states forget nothing
MODELS = {  # name: (class, config, whether our packed attention is right for it)
    "gpt_oss": ("GptOss", dict(COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=8), False),
    "gemma2": ("Gemma2", dict(COMMON, sliding_window=8, query_pre_attn_scalar=8, attn_logit_softcapping=5.0), False),
    "granite": ("Granite", dict(WITHOUT_HEAD_DIM, logits_scaling=8.0, attention_multiplier=0.3), True),
    "cohere": ("Cohere", dict(WITHOUT_HEAD_DIM, logit_scale=0.25), True),
    "cohere2": ("Cohere2", dict(COMMON, logit_scale=0.25, sliding_window=8), True),
    "deepseek_v3": ("DeepseekV3", dict(WITHOUT_HEAD_DIM | LATENT | ROUTED), False),
    "qwen3_next": ("Qwen3Next", dict(COMMON, **HYBRID, **MIXED, **EXPERTS), False),
    "lfm2": ("Lfm2", dict(COMMON, layer_types=["conv", "full_attention"] * 3), False),
    "mistral": ("Mistral", dict(COMMON, sliding_window=8), True),
    "longrope": ("Phi3", dict(WITHOUT_HEAD_DIM, rope_parameters=LONGROPE, original_max_position_embeddings=24), False),
    "olmo2": ("Olmo2", dict(WITHOUT_HEAD_DIM), True),
    "qwen3_5": ("Qwen3_5", dict(COMMON, **HYBRID, **MIXED), False),
    "nemotron_h": ("NemotronH", dict(COMMON, **STATE_SPACE), False),
    "mamba2": ("Mamba2", dict(TOKENS, hidden_size=32, num_hidden_layers=6, num_heads=8, head_dim=8, state_size=8,
                              n_groups=1, chunk_size=16), False),
    "bloom": ("Bloom", dict(TOKENS, hidden_size=32, n_layer=6, n_head=4), False),
}  # fmt: skip
LLAMA4 = dict(COMMON, intermediate_size_mlp=48, num_local_experts=2, interleave_moe_layer_step=2)
PROMPTS = [[3, 9, 20, 7, 5], [(7 * i) % 60 + 1 for i in range(40)], [8, 30, 11, 2]]


def lm_of(name):
    torch.manual_seed(0)
    kind, config, _ = MODELS[name]
    model = getattr(tf, f"{kind}ForCausalLM")
    return model(model.config_class(**config)).eval()


@pytest.fixture(params=MODELS)
def target(request):
    made = LocalTarget.from_model(lm_of(request.param))
    assert (made.library is None) == MODELS[request.param][2]
    made.eos_ids = frozenset()
    made.untouched = lm_of(request.param)  # the library's own, with its own attention
    return made


@torch.inference_mode()
def test_states_are_those_of_the_library(target):
    target_taps = (1, 3, 4)
    first = 1 if target.config.model_type == "mamba2" else 0  # its hidden_states begin after layer 0, others' before it
    got = target.capture(PROMPTS, target_taps)
    start = 0
    for prompt in PROMPTS:
        own = target.untouched(input_ids=torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
        wanted = torch.stack([own.hidden_states[t - first][0] for t in target_taps], dim=1)
        part = slice(start, start + len(prompt))
        start += len(prompt)
        scale = wanted.abs().max()
        assert (got.taps_TKH[part] - wanted).abs().max() < 1e-4 * scale
        logits = target.logits(got.last_TH[part])
        assert (logits - own.logits[0]).abs().max() < 1e-3 * own.logits.abs().max()
        again = target.lm.get_output_embeddings().weight @ got.last_TH[part].T
        if target.logit_softcap is None:  # the teacher is made of head rows and these states alone
            assert (again.T - own.logits[0]).abs().max() < 1e-3 * own.logits.abs().max()


def test_completions_are_those_of_the_library_and_no_neighbour_matters(target):
    made = dict(target.generate(PROMPTS, Sampling(), 10))
    for index, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for _ in range(10):
            with torch.inference_mode():
                logits = target.untouched(input_ids=torch.tensor([text]), use_cache=False).logits
            text.append(int(logits[0, -1].argmax()))
        assert made[index].ids == text[len(prompt) :]


def test_tokens_are_told_as_they_come(target):
    told = []
    for number, answer in target.generate(PROMPTS, Sampling(), 10, written=told.append):
        assert sum(told) >= len(answer.ids), "told no later than the answer ends"
        if number == 0 and target.library is None:
            assert len(told) >= len(answer.ids), "one by one, not answer by answer"
    assert sum(told) == sum(len(a.ids) for a in dict(target.generate(PROMPTS, Sampling(), 10)).values())


def test_chains_verify_where_the_cache_can_be_cut_back(target):
    draft, ids = tiny_draft(target)
    drafter = Eagle3Drafter(draft, ids, target.embedding_rows())
    shape = Shape(3, 1, 4)
    if target.library is not None and not target.library.can_cut_back:
        assert target.config.model_type in NO_WAY_BACK
        return
    assert target.config.model_type not in NO_WAY_BACK
    for prompt in PROMPTS[:1] + PROMPTS[2:]:
        plain = Decoder(target).generate(prompt, Sampling(), 12)
        drafted = Decoder(target, drafter).generate(prompt, Sampling(), 12, shape)
        assert drafted.ids == plain.ids == dict(target.generate([prompt], Sampling(), 12))[0].ids


def test_a_tree_on_the_librarys_forward_is_one_line():
    target = LocalTarget.from_model(lm_of("gpt_oss"))
    draft, ids = tiny_draft(target)
    drafter = Eagle3Drafter(draft, ids, target.embedding_rows())
    with pytest.raises(TargetError, match=r"evaluate\.shapes: .*verifies chains"):
        Decoder(target, drafter).generate(PROMPTS[0], Sampling(), 12, Shape(3, 4, 8))


def test_a_context_ends_every_text(target):

    target.identity = target.identity.model_copy(update={"max_position_embeddings": 12})
    made = dict(target.generate([PROMPTS[0], PROMPTS[2]], Sampling(), 40))
    assert [len(made[i].ids) for i in range(2)] == [7, 8]
    assert {g.finish_reason for g in made.values()} == {"length"}
    assert len(Decoder(target).generate(PROMPTS[0], Sampling(), 40).ids) == 7
    with pytest.raises(TargetError, match="fills the context"):
        list(target.generate([PROMPTS[1]], Sampling(), 4))


def test_llama4_and_wrappers_have_a_decoder():
    torch.manual_seed(0)
    lm = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**LLAMA4)).eval()
    target = LocalTarget.from_model(lm)
    assert target.identity.num_layers == 6
    logits = target.logits(target.capture([PROMPTS[0]], (2,)).last_TH)
    torch.manual_seed(0)
    untouched = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**LLAMA4)).eval()
    wanted = untouched(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits[0]
    assert (logits - wanted).abs().max() < 1e-3 * wanted.abs().max()
