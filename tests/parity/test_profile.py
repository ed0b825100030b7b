"""The accept profile against decoding: same text, same draft, no target forward in the prediction."""

import pytest
import torch
from models import VOCAB, trained_draft

from draftsmith.core.records.machine import Probe
from draftsmith.core.shape import Shape
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.decoding.stopping import Ends
from draftsmith.drafts.directories import ReadyDraft
from draftsmith.drafts.eagle3.drafter import Eagle3Drafter
from draftsmith.evaluation.acceptance import count
from draftsmith.evaluation.profile import DEPTH, accept_profile, rank_table, walks_of
from draftsmith.hardware.accept_length import MeasuredProfile, SampledProfile
from draftsmith.hardware.cost_model import MeasuredCosts
from draftsmith.runs.probing import embedded_times, page
from draftsmith.targets.local import LocalTarget

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


def test_a_probe_tells_the_time_of_a_step(monkeypatch):
    """On a clock that only the parts move on, as another program may take any of the machine's own time."""
    now = [0.0]

    def takes(owner, name, seconds_of):
        work = getattr(owner, name)

        def timed(*given):
            now[0] += seconds_of(*given)
            return work(*given)

        monkeypatch.setattr(owner, name, timed)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    takes(LocalTarget, "verify", lambda _, cache, length, ids, *rest: 10e-3 + 1e-3 * len(ids) + 10e-6 * length)
    takes(Decoder, "_verify", lambda *given: 2e-3)  # what a loop adds
    takes(Eagle3Drafter, "extend", lambda _, taps, next_ids: 2e-3 + 0.5e-3 * len(next_ids))
    takes(Eagle3Drafter, "propose", lambda _, root, shape, *rest: 1e-3 + (shape.steps - 1) * shape.topk * 3e-3)
    target, draft, ids = trained_draft()
    shape, length = Shape(3, 1, 4), 60
    probe = Probe(
        engine="embedded",
        machine="here",
        times=embedded_times(target, ready(target, draft, ids).drafter(), PROMPTS[1]),
    )
    answers = decoded(target, draft, ids, shape, length)
    steps = sum(len(answer.verified) for answer in answers)
    tau = 1 + sum(sum(answer.verified) for answer in answers) / steps
    costs = MeasuredCosts(probe)
    assert costs.draft_s(shape, tau, 1, 128) == pytest.approx(2e-3 + 0.5e-3 * tau + 1e-3 + 2 * 3e-3)
    assert costs.forward_s(4, 1, 128) == pytest.approx(14e-3 + 128 * 10e-6)
    assert costs.overhead_s(shape) == pytest.approx(2e-3, rel=0.05)
    # a context below the probe's is told as the probe's
    beyond = 128 * 10e-6 - sum(10e-6 * (len(p) + length / 2) for p in PROMPTS) / len(PROMPTS)
    step = costs.forward_s(4, 1, 128) + costs.draft_s(shape, tau, 1, 128) + costs.overhead_s(shape)
    assert step - beyond == pytest.approx(sum(answer.seconds for answer in answers) / steps, rel=0.01)
    assert costs.forward_s(4, 1, 1128) - costs.forward_s(4, 1, 128) == pytest.approx(1000 * 10e-6)
    assert "forward ms" in page(probe)
