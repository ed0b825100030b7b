"""What a draft solves for before it is trained."""

import pytest
import torch
from models import tiny_draft, tiny_target

from draftsmith.core.records.data import Completion
from draftsmith.drafts.eagle3.model import Eagle3Draft, sureness
from draftsmith.drafts.packing import make_pack
from draftsmith.targets.base import Capture
from draftsmith.training.processes import ProcessGroup
from draftsmith.training.start import FIT_TOKENS, fit

TARGET = tiny_target()
HIDDEN, TAPS = TARGET.identity.hidden_size, 3
GAIN = 0.3 + 3 * torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1))


def linear_world(tokens: int, seed: int = 0, huge: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(taps, the head's inputs of the tokens after them), which are linear in each other; the first taps are huge."""
    generator = torch.Generator().manual_seed(seed)
    taps = torch.randn(tokens, TAPS, HIDDEN, generator=generator)
    rule = torch.randn(TAPS * HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(7))
    after = taps.flatten(1) @ rule
    taps[:huge] *= 1e4
    return taps, after / after.square().mean(-1, keepdim=True).sqrt() * GAIN


def guesses(draft: Eagle3Draft, taps: torch.Tensor) -> torch.Tensor:
    """[T, H], normed without the norm's gain."""
    feature = draft.fuse(taps)
    return feature / feature.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("norm", [{}, {"norm_before_fc": True}, {"fc_norm": True}])
def test_a_fitted_draft_guesses_what_is_linear_in_its_taps(norm):
    draft, ids = tiny_draft(TARGET, **norm)
    before = {name: weight.clone() for name, weight in draft.state_dict().items()}
    examples = [linear_world(256, seed, huge=2) for seed in range(4)]
    draft.fit(iter(examples), GAIN)
    taps, last = linear_world(64, seed=9)
    with torch.no_grad():
        alike = torch.nn.functional.cosine_similarity(guesses(draft, taps), last / GAIN, dim=-1)
        logits, wanted = draft.logits(draft.fuse(taps)), TARGET.logits(last)[:, ids]
        assert draft.fuse(taps).square().mean().sqrt() == pytest.approx(1.0, abs=0.2)
    assert alike.mean() > 0.95
    accepted = torch.minimum(logits.softmax(-1), wanted.softmax(-1)).sum(-1).mean()
    assert accepted > 0.85
    changed = {name for name, weight in draft.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"fc.weight", "norm.weight"}


def test_a_draft_that_cannot_guess_is_not_sure_of_it():
    draft, _ = tiny_draft(TARGET)
    taps, last = linear_world(1024)
    draft.fit([(taps, last[torch.randperm(len(last))])], GAIN)
    with torch.no_grad():
        assert draft.fuse(taps).square().mean().sqrt() == pytest.approx(1.0, abs=0.2)
        spread = draft.logits(draft.fuse(taps)).std(-1).mean()
        assert spread < 0.5 * TARGET.logits(last).std(-1).mean()


def test_without_an_example_a_draft_stays_as_it_is():
    draft, _ = tiny_draft(TARGET)
    before = draft.fc.weight.clone()
    draft.fit([], GAIN)
    assert torch.equal(draft.fc.weight, before)


def test_fewer_examples_than_inputs_are_enough_for_numbers():
    draft, _ = tiny_draft(TARGET)
    taps, last = linear_world(10)
    draft.fit([(taps, last)], GAIN)
    assert draft.fc.weight.square().mean().sqrt() < 0.5  # of other states it makes nothing wild either
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(guesses(draft, taps), last / GAIN, dim=-1).mean() > 0.8


def test_a_gain_of_zero_takes_part_in_nothing():
    gain = GAIN.clone()
    gain[3] = 0
    draft, _ = tiny_draft(TARGET)
    taps, last = linear_world(512)
    last[:, 3] = 0
    draft.fit([(taps, last)], gain)
    assert all(weight.isfinite().all() for weight in draft.state_dict().values())


@pytest.mark.parametrize("scale", [0.05, 0.7, 1.6])
def test_sureness_is_the_scale_that_the_wanted_distributions_were_made_with(scale):
    logits = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)) * 3
    assert sureness(logits, (logits * scale).softmax(-1)) == pytest.approx(scale, rel=1e-3)


def test_no_more_packs_are_asked_for_than_are_needed_and_broken_states_are_left_out():
    draft, _ = tiny_draft(TARGET)
    wanted = FIT_TOKENS * TAPS * HIDDEN
    rows = [Completion(id=str(n), ids=[1, 2, 3, 4] * 8, spans=[(4, 32)]) for n in range(200)]
    asked = []

    def capture(pack):
        asked.append(pack)
        taps, last = linear_world(len(pack.ids_T), seed=len(asked))
        if len(asked) == 2:
            taps[9, 0, 0] = float("nan")
            last[20] = float("inf")
        return Capture(taps, last.roll(1, 0))

    packs = (make_pack(rows[n : n + 2]) for n in range(0, 200, 2))
    fit(draft, packs, capture, GAIN, ProcessGroup())
    tokens = [len(pack.ids_T) for pack in asked]
    assert sum(tokens) >= wanted > sum(tokens[:-1])
    assert all(weight.isfinite().all() for weight in draft.state_dict().values())
    taps, last = linear_world(64, seed=99)
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(guesses(draft, taps), last / GAIN, dim=-1).mean() > 0.9
