"""The accept profile against decoding: same text, same draft, no target forward in the prediction."""

import pytest
import torch
from models import VOCAB, tiny_target, trained_draft

from draftsmith.core.records.machine import Probe
from draftsmith.core.shape import Shape
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.decoding.stopping import Ends
from draftsmith.drafts.directories import ReadyDraft
from draftsmith.evaluation.acceptance import count
from draftsmith.evaluation.profile import DEPTH, accept_profile, rank_table, walks_of
from draftsmith.hardware.accept_length import MeasuredProfile, SampledProfile
from draftsmith.hardware.cost_model import MeasuredCosts, predict
from draftsmith.hardware.probe import embedded_times, page

GENERATOR = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(1, VOCAB, (11 + i,), generator=GENERATOR).tolist() for i in range(8)]


def ready(target, draft, ids):
    return ReadyDraft(draft, ids, target.embedding_rows())


def real_tau(answers, steps):
    """As decoding counts it, loops included."""
    rows = [count("", "", answer, steps) for answer in answers]
    return 1 + sum(r.accepted + r.looping_accepted for r in rows) / sum(r.steps + r.looping_steps for r in rows)


def decoded(target, draft, ids, shape, tokens=60):
    decoder = Decoder(target, ready(target, draft, ids).drafter())
    return [decoder.generate(prompt, Sampling(), tokens, shape) for prompt in PROMPTS]


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_chains_accept_length_is_exactly_that_of_decoding(steps):
    target, draft, ids = trained_draft()
    shape = Shape(steps, 1, steps + 1)
    answers = decoded(target, draft, ids, shape)
    texts = [(p, answer.ids) for p, answer in zip(PROMPTS, answers, strict=True)]
    walks, _ = walks_of(target, ready(target, draft, ids), texts)
    real = real_tau(answers, steps)
    assert real > 1.02, "a draft that is never right proves nothing"
    assert MeasuredProfile(walks).tau(shape) == pytest.approx(real, abs=1e-9)


def test_a_chains_sampled_accept_length_is_near_that_of_decoding():
    target, draft, ids = trained_draft()
    shape, sampling = Shape(3, 1, 4), Sampling(0.8, 0.95, 40)
    taus = {}
    for drafts in ("greedy", "sampled"):
        decoder = Decoder(target, ready(target, draft, ids).drafter(), draft_sampling=drafts)
        answers = [decoder.generate(p, sampling, 120, shape, seed, Ends(frozenset())) for seed, p in enumerate(PROMPTS)]
        texts = [(p, answer.ids) for p, answer in zip(PROMPTS, answers, strict=True)]
        ranks, chances = walks_of(target, ready(target, draft, ids), texts, sampling)
        taus[drafts] = real_tau(answers, 3)
        if drafts == "greedy":  # ranks are exact: what was drawn is what was accepted
            assert MeasuredProfile(ranks).tau(shape) == pytest.approx(taus[drafts], abs=1e-9)
        else:
            assert SampledProfile(chances).tau(shape) == pytest.approx(taus[drafts], abs=0.03)
    assert taus["sampled"] > taus["greedy"] + 0.06, "alike, so nothing was tested"


def test_a_trees_accept_length_is_near_that_of_decoding():
    target, draft, ids = trained_draft()
    shape = Shape(3, 4, 8)
    answers = decoded(target, draft, ids, shape)
    texts = [(p, answer.ids) for p, answer in zip(PROMPTS, answers, strict=True)]
    walks, _ = walks_of(target, ready(target, draft, ids), texts)
    real = real_tau(answers, 3)
    profile = MeasuredProfile(walks)
    assert profile.tau(shape) == pytest.approx(real, rel=0.15)  # a static tree for a dynamic one
    assert profile.tau(shape) > profile.tau(Shape(3, 1, 4))


def test_the_profile_of_results_has_a_share_for_every_depth_and_rank():
    target, draft, ids = trained_draft()
    profile = accept_profile(target, ready(target, draft, ids), PROMPTS, 60)
    assert profile.prompts == len(PROMPTS)
    assert profile.positions == sum(len(walk) for walk in profile.walks)
    assert 1 <= len(profile.table) <= DEPTH
    assert all(0 <= share <= 1 and sum(row) <= 1 + 1e-9 for row in profile.table for share in row)


def test_ranks_count_where_the_choices_before_were_right():
    walks = [["112", "120", "2"], ["111"]]
    table = rank_table(walks)
    assert table[0][:2] == [3 / 4, 1 / 4]
    assert table[1][:2] == [2 / 3, 1 / 3]
    assert table[2][:2] == [1 / 2, 1 / 2]


def test_a_probe_tells_the_time_of_a_step():
    target, draft, ids = trained_draft()
    drafter = ready(target, draft, ids).drafter()
    predicted_s, real_s = [], []
    for _ in range(3):  # other work on the machine only ever slows: the fastest of each is compared
        probe = Probe(engine="embedded", machine="here", times=embedded_times(target, drafter, PROMPTS[1]))
        step = predict(MeasuredCosts(probe), MeasuredProfile([["111"] * 20]), Shape(3, 1, 4))
        predicted_s.append(step.verify_s + step.draft_s + step.overhead_s)
        answers = decoded(tiny_target(), draft, ids, Shape(3, 1, 4))
        real_s.append(min(answer.seconds / len(answer.verified) for answer in answers))
    assert [tokens for tokens, _ in probe.times.forward][:3] == [1, 2, 3]
    assert all(seconds > 0 for _, seconds in probe.times.forward)
    assert min(predicted_s) == pytest.approx(min(real_s), rel=0.6)
    assert "forward ms" in page(probe)
