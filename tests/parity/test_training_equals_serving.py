"""The packed training forward and the cached serving forward compute one function."""

import pytest
import torch

from draftsmith.core.records.data import Completion
from draftsmith.decoding.cache import StaticCache
from draftsmith.drafts.eagle3 import chain_attention
from draftsmith.drafts.eagle3.config import Eagle3Config
from draftsmith.drafts.eagle3.model import Eagle3Draft
from draftsmith.drafts.eagle3.ttt import ttt_outputs
from draftsmith.drafts.packing import make_pack

STEPS = 7


def tiny_draft(**options) -> Eagle3Draft:
    values = dict(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        vocab_size=50,
        draft_vocab_size=20,
        taps=(1, 2, 3),
        rope_theta=10000.0,
        max_position_embeddings=64,
    )
    draft = Eagle3Draft(Eagle3Config(**{**values, **options}))
    generator = torch.Generator().manual_seed(0)
    draft.initialise(torch.randn(20, 24, generator=generator), torch.rand(24, generator=generator) + 0.5, generator)
    with torch.no_grad():  # gains away from one, so that a swapped norm shows
        for _name, parameter in draft.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return draft


def completions():
    generator = torch.Generator().manual_seed(3)

    def row(name, length, spans):
        return Completion(id=name, ids=torch.randint(0, 50, (length,), generator=generator).tolist(), spans=spans)

    # a prompt, a document of one completion from its second token, a two-turn conversation, a one-token completion
    return [row("a", 17, [[6, 17]]), row("b", 9, [[1, 9]]), row("c", 25, [[4, 11], [15, 25]]), row("d", 6, [[5, 6]])]


@pytest.fixture(params=["cpu", "plain", "plain, 3 rows"])
def attention_path(request, monkeypatch):
    """Devices without a flash kernel of their own take plain PyTorch, whose chunks of queries must not show."""
    if request.param != "cpu":
        plain = chain_attention._plain_forward, chain_attention._plain_backward
        monkeypatch.setattr(chain_attention, "_way", lambda query: plain)
    if "3" in request.param:
        monkeypatch.setattr(chain_attention, "PLAIN_ROWS", 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fc_norm": True},
        {"norm_before_fc": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "taps": (0, 1, 2, 4, 5)},
    ],
    ids=str,
)
def test_every_step_of_every_chain(options, attention_path):
    draft = tiny_draft(**options)
    pack = make_pack(completions())
    total = len(pack.ids_T)
    taps = torch.randn(total, len(draft.config.taps), 24, generator=torch.Generator().manual_seed(1))
    embeddings = torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        outputs = ttt_outputs(draft, pack, taps, embeddings[pack.ids_T], STEPS)
        checked = 0
        row = 0
        for segment in pack.segments:
            for chain in range(segment.first, segment.last):
                cache = StaticCache(1, 8)
                prefix = torch.arange(segment.document, chain + 1)
                feature = draft.fuse(taps[prefix])
                count = len(prefix)
                visible = torch.ones(count, count, dtype=torch.bool).tril()
                out = draft.step(
                    embeddings[pack.ids_T[prefix + 1]], feature, prefix - segment.document, cache, 0, visible
                )[-1:]
                for step in range(STEPS):
                    if chain + 2 + step >= segment.last + 2:
                        break  # never scored
                    torch.testing.assert_close(outputs[step][row], out[0], atol=1e-4, rtol=1e-4)
                    checked += 1
                    following = chain + 2 + step
                    position = torch.tensor([chain + 1 + step - segment.document])
                    out = draft.step(embeddings[pack.ids_T[following]][None], out, position, cache, count + step, None)
                row += 1
    assert checked > 100


@pytest.mark.parametrize("norm", [None, "fc_norm", "norm_before_fc"])
def test_fc_reads_the_taps_in_their_order_each_through_its_own_norm(norm):
    """As engines load it: fc's columns are the first tap's, then the second's."""
    draft = tiny_draft(**({norm: True} if norm else {}))
    taps = torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(1))
    eps, parts = draft.config.rms_norm_eps, list(taps.unbind(1))
    if norm == "fc_norm":
        gains = [draft.get_parameter(f"fc_norm.{tap}.weight") for tap in range(3)]
        parts = [torch.nn.functional.rms_norm(part, (24,), gain, eps) for part, gain in zip(parts, gains, strict=True)]
    together = torch.cat(parts, dim=-1)
    if norm == "norm_before_fc":
        together = torch.nn.functional.rms_norm(together, (72,), draft.input_norm.weight, eps)
    torch.testing.assert_close(draft.fuse(taps), together @ draft.fc.weight.T)


def test_gradients_equal_those_of_a_dense_mask(attention_path):
    """Merged-block backward against autograd through one softmax over all visible keys."""
    pack = make_pack(completions())
    chains, total, steps = pack.chain_count, len(pack.ids_T), 3
    generator = torch.Generator().manual_seed(5)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32).requires_grad_()

    query, key0, value0 = leaf(chains, 4, 10), leaf(total, 2, 10), leaf(total, 2, 10)
    own_keys, own_values = leaf(steps, chains, 2, 10), leaf(steps, chains, 2, 10)
    upstream = torch.randn(chains, 4, 10, generator=generator)
    inputs = (query, key0, value0, own_keys, own_values)
    out = chain_attention.ChainAttention.apply(*inputs, pack.index(query.device))
    gradients = torch.autograd.grad((out * upstream).sum(), inputs)

    visible = torch.zeros(chains, total, dtype=torch.bool)
    row = 0
    for segment in pack.segments:
        for chain in range(segment.first, segment.last):
            visible[row, segment.document : chain + 1] = True
            row += 1
    k0, v0, ko, vo = (x.repeat_interleave(2, dim=-2) for x in inputs[1:])
    scores = torch.einsum("rnd,tnd->rnt", query, k0).masked_fill(~visible[:, None], float("-inf"))
    scores = torch.cat([scores, torch.einsum("rnd,irnd->rni", query, ko)], dim=-1) * 10**-0.5
    weights = scores.softmax(-1)
    dense = torch.einsum("rnt,tnd->rnd", weights[..., :total], v0) + torch.einsum(
        "rni,irnd->rnd", weights[..., total:], vo
    )
    expected = torch.autograd.grad((dense * upstream).sum(), inputs)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-4)
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
