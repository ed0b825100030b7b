"""Successive halving on made-up shapes whose true speed-up is known."""

import contextlib
import itertools

from draftsmith.core.records.machine import Tried, Tuned
from draftsmith.core.records.run import Hardware, Provenance
from draftsmith.core.shape import Shape
from draftsmith.hardware import tune
from draftsmith.hardware.tune import Candidate, fastest, halve, sentence

TRUE = {Shape(1, 1, 2): 1.2, Shape(3, 1, 4): 1.7, Shape(5, 1, 6): 1.5, Shape(3, 4, 8): 1.9}


def tuned(candidates):
    """As `tune` writes it."""
    hardware = Hardware(cpu="c", cores=2, gpus=(), system="s")
    return Tuned(
        engine="embedded",
        draft=None,
        shape=fastest(candidates),
        chain=fastest(candidates, chains_only=True),
        tried=[Tried(shape=c.shape, speedup=c.speedup, prompts=len(c.ratios)) for c in candidates],
        created_with=Provenance(command="", commit=None, versions={}, seed=0, hardware=hardware),
    )


def made_up(true, opened=None, short=()):
    @contextlib.contextmanager
    def session(shape):
        if opened is not None:
            opened.append(shape)
        noise = itertools.cycle([-0.05, 0.05, 0.0])
        yield lambda number: None if number in short else true[shape] + next(noise)

    return session


def test_the_fastest_is_found_and_the_losers_are_measured_less():
    tried = halve(list(TRUE), made_up(TRUE), 64, 60)
    assert tried[0].shape == Shape(3, 4, 8)
    assert len(tried[0].ratios) > len(tried[-1].ratios)
    result = tuned(tried)
    assert (result.shape, result.chain) == (Shape(3, 4, 8), Shape(3, 1, 4))
    assert sentence(result) == "3/4/8: 1.90x over 64 prompts on embedded"


def test_nothing_is_recommended_that_does_not_beat_plain_decoding():
    slow = dict.fromkeys(TRUE, 0.97)
    result = tuned(halve(list(slow), made_up(slow), 16, 60))
    assert result.shape is None
    assert result.chain is None
    assert sentence(result).startswith("nothing beats plain decoding here")


def test_a_shape_that_was_dropped_early_is_not_recommended():
    lucky = [Candidate(Shape(3, 4, 8), [1.01] * 32), Candidate(Shape(1, 1, 2), [1.3, 1.3])]
    assert fastest(lucky) is None
    assert fastest(lucky, chains_only=True) is None
    tried = halve(list(TRUE), made_up(TRUE | {Shape(3, 2, 6): 1.8}), 64, 60)
    assert [len(t.ratios) for t in tried[:2]] == [64, 64]
    assert {t.shape for t in tried[:2]} == {Shape(3, 4, 8), Shape(3, 1, 4)}


def test_the_time_given_is_kept(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(tune.time, "monotonic", lambda: float(next(clock)))
    tried = halve(list(TRUE), made_up(TRUE), 64, 5)
    assert 0 < sum(len(t.ratios) for t in tried) <= 5


def test_answers_too_short_to_time_are_left_out():
    tried = halve(list(TRUE), made_up(TRUE, short={0, 1, 5}), 8, 60)
    assert tried[0].shape == Shape(3, 4, 8)
    assert len(tried[0].ratios) == 5
    assert halve(list(TRUE), made_up(TRUE, short=set(range(8))), 8, 60) == []
