"""The accept profile against decoding: same text, same draft, no target forward in the prediction."""

import pytest
import torch
from models import VOCAB, tiny_target, trained_draft

from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder, Eagle3Drafter
from draftsmith.decoding.tree import Shape
from draftsmith.evaluation.profile import DEPTH, accept_profile, rank_table, rank_walks
from draftsmith.hardware.accept_length import MeasuredProfile
from draftsmith.hardware.cost_model import MeasuredCosts, predict
from draftsmith.hardware.probe import describe, probe_embedded

GENERATOR = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(1, VOCAB, (11 + i,), generator=GENERATOR).tolist() for i in range(8)]


def decoded(target, draft, ids, shape, tokens=60):
    decoder = Decoder(target, Eagle3Drafter(draft, ids, target.embedding_rows()))
    return [decoder.generate(prompt, Sampling(), tokens, shape) for prompt in PROMPTS]


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_chains_accept_length_is_exactly_that_of_decoding(steps):
    target, draft, ids = trained_draft()
    shape = Shape(steps, 1, steps + 1)
    made = decoded(target, draft, ids, shape)
    walks = rank_walks(target, draft, ids, [(p, d.ids) for p, d in zip(PROMPTS, made, strict=True)])
    counted = [step for d in made for step in d.counted_steps(steps)]
    real = 1 + sum(step.accepted for step in counted) / len(counted)
    assert real > 1.02, "a draft that is never right proves nothing"
    assert MeasuredProfile(walks).tau(shape) == pytest.approx(real, abs=1e-9)


def test_a_trees_accept_length_is_near_that_of_decoding():
    target, draft, ids = trained_draft()
    shape = Shape(3, 4, 8)
    made = decoded(target, draft, ids, shape)
    walks = rank_walks(target, draft, ids, [(p, d.ids) for p, d in zip(PROMPTS, made, strict=True)])
    counted = [step for d in made for step in d.counted_steps(3)]
    real = 1 + sum(step.accepted for step in counted) / len(counted)
    profile = MeasuredProfile(walks)
    assert profile.tau(shape) == pytest.approx(real, rel=0.15)  # a static tree for a dynamic one
    assert profile.tau(shape) > profile.tau(Shape(3, 1, 4))


def test_the_profile_of_results_has_a_share_for_every_depth_and_rank():
    target, draft, ids = trained_draft()
    profile = accept_profile(target, draft, ids, PROMPTS, 60)
    assert profile["prompts"] == len(PROMPTS)
    assert profile["positions"] == sum(len(walk) for walk in profile["walks"])
    assert 1 <= len(profile["table"]) <= DEPTH
    assert all(0 <= share <= 1 and sum(row) <= 1 + 1e-9 for row in profile["table"] for share in row)


def test_ranks_count_where_the_choices_before_were_right():
    walks = [["112", "120", "2"], ["111"]]
    table = rank_table(walks)
    assert table[0][:2] == [3 / 4, 1 / 4]
    assert table[1][:2] == [2 / 3, 1 / 3]
    assert table[2][:2] == [1 / 2, 1 / 2]


def test_a_probe_tells_the_time_of_a_step():
    target, draft, ids = trained_draft()
    drafter = Eagle3Drafter(draft, ids, target.embedding_rows())
    told_s, real_s = [], []
    for _ in range(3):  # other work on the machine only ever slows: the fastest of each is compared
        parts = {**probe_embedded(target, drafter, PROMPTS[1]), "machine": "here"}
        told = predict(MeasuredCosts(parts), MeasuredProfile([["111"] * 20]), Shape(3, 1, 4))
        told_s.append(told.verify_s + told.draft_s + told.overhead_s)
        made = decoded(tiny_target(), draft, ids, Shape(3, 1, 4))
        real_s.append(min(d.seconds / len(d.steps) for d in made))
    assert [tokens for tokens, _ in parts["forward"]][:3] == [1, 2, 3]
    assert all(seconds > 0 for _, seconds in parts["forward"])
    assert min(told_s) == pytest.approx(min(real_s), rel=0.6)
    assert "forward ms" in describe(parts)
