"""What a draft solves for before it is trained."""

import pytest
import torch
from models import tiny_draft, tiny_target

from draftsmith.core.records.data import Completion
from draftsmith.decoding.cache import StaticCache
from draftsmith.drafts.eagle3.model import Eagle3Draft, sureness
from draftsmith.drafts.method import Example
from draftsmith.drafts.packing import make_pack
from draftsmith.targets.base import Capture
from draftsmith.training.processes import ProcessGroup
from draftsmith.training.start import FIT_TOKENS, fit

TARGET = tiny_target()
HIDDEN, TAPS = TARGET.identity.hidden_size, 3
GAIN = 0.3 + 3 * torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1))
NO_EMBEDDING, ITS_OWN = 0.0, 1.5  # what the embedding says, beside the taps


def world(
    tokens: int, seed: int = 0, huge: int = 0, embedding: float = NO_EMBEDDING, noise: float = 0.0, ways: int = 4
) -> Example:
    """The head's inputs are linear in taps and embeddings, these in few directions; the first taps are huge."""
    generator, rules = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(7)
    taps = torch.randn(tokens, TAPS, HIDDEN, generator=generator)
    # with much in common, as embeddings have, and not independent of the taps
    embeds = 1.0 + torch.randn(tokens, HIDDEN, generator=generator) + 2 * taps[:, 0]
    rule = torch.randn(TAPS * HIDDEN, HIDDEN, generator=rules) / (TAPS * HIDDEN) ** 0.5
    few = torch.randn(HIDDEN, ways, generator=rules) @ torch.randn(ways, HIDDEN, generator=rules)
    few /= (ways * HIDDEN) ** 0.5
    after = taps.flatten(1) @ rule + embedding * torch.nn.functional.rms_norm(embeds, (HIDDEN,)) @ few
    after = after + noise * torch.randn(tokens, HIDDEN, generator=generator)
    taps[:huge] *= 1e4
    return Example(taps, embeds, after / after.square().mean(-1, keepdim=True).sqrt() * GAIN)


@torch.no_grad()
def guesses(draft: Eagle3Draft, example: Example) -> torch.Tensor:
    """Outputs [T, H] of the draft as it serves, each token after all those before it."""
    count = len(example.taps)
    visible = torch.ones(count, count, dtype=torch.bool).tril()
    features = draft.fuse(example.taps)
    return draft.step(example.embeds, features, torch.arange(count), StaticCache(1, count), 0, visible)


def alike(outputs: torch.Tensor, example: Example) -> float:
    return float(torch.nn.functional.cosine_similarity(outputs, example.last / GAIN, dim=-1).mean())


@pytest.mark.parametrize("norm", [{"norm_before_fc": True}, {"fc_norm": True}])
def test_a_fitted_draft_guesses_what_is_linear_in_its_taps(norm):
    draft, ids = tiny_draft(TARGET, **norm)
    draft.fit((world(256, seed, huge=2) for seed in range(4)), GAIN)
    unseen = world(64, seed=9)
    outputs = guesses(draft, unseen)
    assert alike(outputs, unseen) > 0.93
    assert outputs.square().mean().sqrt() == pytest.approx(1.0, abs=0.25)
    with torch.no_grad():
        logits, wanted = draft.logits(outputs), TARGET.logits(unseen.last)[:, ids]
    assert torch.minimum(logits.softmax(-1), wanted.softmax(-1)).sum(-1).mean() > 0.85


def test_some_heads_look_at_their_own_position_and_tell_of_its_embedding():
    draft, _ = tiny_draft(TARGET, fc_norm=True)
    before = {name: weight.clone() for name, weight in draft.state_dict().items()}
    draft.fit((world(1024, seed, embedding=ITS_OWN, noise=2.0) for seed in range(8)), GAIN)
    unseen = world(200, seed=9, embedding=ITS_OWN)
    outputs = guesses(draft, unseen)
    shuffled = guesses(draft, unseen._replace(embeds=unseen.embeds.roll(5, 0)))
    assert alike(outputs, unseen) > 0.9
    assert outputs.square().mean().sqrt() == pytest.approx(1.0, abs=0.15)
    assert alike(shuffled, unseen) < 0.85
    attention, dim = draft.midlayer.self_attn, draft.config.head_dim
    own = dim * (attention.num_kv_heads // 2)  # the other key heads are as they were
    for name in ("k_proj", "v_proj"):
        rows, was = getattr(attention, name).weight, before[f"midlayer.self_attn.{name}.weight"]
        assert torch.equal(rows[own:], was[own:])
        assert not torch.equal(rows[:own], was[:own])
    queries = own * attention.num_heads // attention.num_kv_heads
    assert torch.equal(attention.q_proj.weight[queries:], before["midlayer.self_attn.q_proj.weight"][queries:])
    assert torch.equal(attention.o_proj.weight[:, queries:], before["midlayer.self_attn.o_proj.weight"][:, queries:])


def test_a_draft_that_cannot_guess_is_not_sure_of_it():
    draft, _ = tiny_draft(TARGET, fc_norm=True)
    example = world(1024)
    draft.fit([example._replace(last=example.last[torch.randperm(1024)])], GAIN)
    with torch.no_grad():
        feature = draft.fuse(example.taps)
        assert feature.square().mean().sqrt() == pytest.approx(1.0, abs=0.2)
        spread = draft.logits(feature).std(-1).mean()
        assert spread < 0.5 * TARGET.logits(example.last).std(-1).mean()


def test_a_softcap_of_the_target_makes_the_guess_less_sure():
    gains = []
    for softcap in (None, 0.5):
        draft, _ = tiny_draft(TARGET, fc_norm=True)
        draft.fit([world(512)], 10 * GAIN, softcap)
        gains.append(draft.norm.weight.norm())
    assert gains[1] < 0.5 * gains[0]


def test_a_last_pack_with_a_single_guess_decides_nothing():
    drafts = [tiny_draft(TARGET, fc_norm=True)[0] for _ in range(2)]
    for draft, more in zip(drafts, ([], [Example(*(part[:1] for part in world(4, seed=5)))]), strict=True):
        draft.fit([world(512, embedding=ITS_OWN), *more], GAIN)
    for one, other in zip(*(draft.state_dict().values() for draft in drafts), strict=True):
        assert float(one.norm()) == pytest.approx(float(other.norm()), rel=0.1)


def test_without_an_example_a_draft_stays_as_it_is():
    draft, _ = tiny_draft(TARGET, fc_norm=True)
    before = {name: weight.clone() for name, weight in draft.state_dict().items()}
    draft.fit([], GAIN)
    assert all(torch.equal(weight, before[name]) for name, weight in draft.state_dict().items())


def test_taps_that_nothing_norms_are_left_to_training():
    made = [tiny_draft(TARGET, **({norm: True} if norm else {}))[0] for norm in ("", "fc_norm", "norm_before_fc")]
    assert [draft.fits for draft in made] == [False, True, True]


def test_fewer_examples_than_inputs_are_enough_for_numbers():
    draft, _ = tiny_draft(TARGET, fc_norm=True)
    draft.fit([world(10)], GAIN)
    attention = draft.midlayer.self_attn
    for weight in (draft.fc.weight, attention.v_proj.weight, attention.o_proj.weight):
        assert weight.square().mean().sqrt() < 0.5  # of other states it makes nothing wild either
    assert alike(guesses(draft, world(10)), world(10)) > 0.7


@pytest.mark.parametrize(
    "heads", [{"num_key_value_heads": 1, "num_attention_heads": 1, "head_dim": 64}, {"head_dim": 32}]
)
def test_heads_wider_than_the_draft_are_filled_as_far_as_it_goes(heads):
    draft, _ = tiny_draft(TARGET, fc_norm=True, **heads)
    draft.fit([world(512, embedding=ITS_OWN)], GAIN)
    unseen = world(24, seed=9, embedding=ITS_OWN)
    assert alike(guesses(draft, unseen), unseen) > 0.8


def test_a_gain_of_zero_takes_part_in_nothing():
    gain = GAIN.clone()
    gain[3] = 0
    draft, _ = tiny_draft(TARGET, fc_norm=True)
    example = world(512)
    example.last[:, 3] = 0
    draft.fit([example], gain)
    assert all(weight.isfinite().all() for weight in draft.state_dict().values())


@pytest.mark.parametrize("scale", [0.05, 0.7, 1.6])
def test_sureness_is_the_scale_that_the_wanted_distributions_were_made_with(scale):
    logits = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)) * 3
    assert sureness(logits, (logits * scale).softmax(-1)) == pytest.approx(scale, rel=1e-3)


class Known:
    """A target as far as a fit asks it."""

    logit_softcap = None

    def norm_gain(self) -> torch.Tensor:
        return GAIN

    def embedding_rows(self) -> torch.Tensor:
        return TARGET.embedding_rows()


def test_no_more_packs_are_asked_for_than_are_needed_and_broken_states_are_left_out():
    draft, _ = tiny_draft(TARGET, fc_norm=True)
    wanted = FIT_TOKENS * TAPS * HIDDEN
    rows = [Completion(id=str(n), ids=[1, 2, 3, 4] * 8, spans=[(4, 32)]) for n in range(200)]
    asked: list = []

    def capture(pack):
        asked.append(pack)
        taps, _, last = world(len(pack.ids_T), seed=len(asked))
        if len(asked) == 2:
            taps[9, 0, 0] = float("nan")
            last[20] = float("inf")
        return Capture(taps, last.roll(1, 0))

    packs = (make_pack(rows[n : n + 2]) for n in range(0, 200, 2))
    fit(draft, packs, capture, Known(), ProcessGroup())
    tokens = [pack.chain_count for pack in asked]
    assert sum(tokens) >= wanted > sum(tokens[:-1])
    assert all(weight.isfinite().all() for weight in draft.state_dict().values())
    assert alike(draft.fuse(world(64, seed=99).taps).detach(), world(64, seed=99)) > 0.9


def test_an_example_holds_the_embedding_and_the_state_of_the_token_after_its_taps(monkeypatch):
    draft, _ = tiny_draft(TARGET, fc_norm=True)
    seen = []
    monkeypatch.setattr(Eagle3Draft, "fit", lambda self, examples, gain, softcap: seen.extend(examples))
    pack = make_pack([Completion(id="a", ids=[5, 6, 7, 8, 9, 10], spans=[(2, 6)])])
    states = TARGET.capture(pack.documents, draft.config.taps)
    fit(draft, [pack], lambda pack: states, Known(), ProcessGroup())
    [(taps, embeds, last)] = seen
    assert torch.equal(taps, states.taps_TKH[1:4])
    assert torch.equal(embeds, TARGET.embedding_rows()[[7, 8, 9]])
    assert torch.equal(last, states.last_TH[2:5])


def test_large_states_in_half_precision_are_no_broken_ones(monkeypatch):
    draft, _ = tiny_draft(TARGET, fc_norm=True)
    seen = []
    monkeypatch.setattr(Eagle3Draft, "fit", lambda self, examples, gain, softcap: seen.extend(examples))
    pack = make_pack([Completion(id="a", ids=[5, 6, 7, 8, 9, 10], spans=[(2, 6)])])
    states = Capture(torch.full((6, TAPS, HIDDEN), 4000.0).half(), torch.ones(6, HIDDEN).half())
    fit(draft, [pack], lambda pack: states, Known(), ProcessGroup())
    assert [len(example.taps) for example in seen] == [3]


def test_what_the_kept_directions_leave_of_the_embedding_goes_to_the_taps_once():
    """Taps and embeddings say much of the same: solved for apart, it would be counted twice."""
    draft, _ = tiny_draft(TARGET, fc_norm=True)
    draft.fit((world(1024, seed, embedding=3.0, ways=HIDDEN) for seed in range(4)), GAIN)
    unseen = world(200, seed=9, embedding=3.0, ways=HIDDEN)
    attention, dim = draft.midlayer.self_attn, draft.config.head_dim
    groups = attention.num_heads // attention.num_kv_heads
    values = torch.nn.functional.rms_norm(unseen.embeds, (HIDDEN,)) @ attention.v_proj.weight[:dim, :HIDDEN].T
    own = values @ attention.o_proj.weight[:, : groups * dim].unflatten(1, (groups, dim)).sum(1).T
    assert alike((draft.fuse(unseen.taps) + own).detach(), unseen) > 0.96
