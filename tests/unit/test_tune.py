"""Successive halving on made-up shapes whose true speed-up is known."""

import contextlib
import itertools

from draftsmith.decoding.tree import Shape
from draftsmith.hardware import tune
from draftsmith.hardware.tune import Tried, halve, sentence, verdict

TRUE = {Shape(1, 1, 2): 1.2, Shape(3, 1, 4): 1.7, Shape(5, 1, 6): 1.5, Shape(3, 4, 8): 1.9}


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
    told = verdict(tried, "embedded", {}, None)
    assert (told["shape"], told["chain"]) == ("3/4/8", "3/1/4")
    assert sentence(told) == "3/4/8: 1.90x over 64 prompts on embedded"


def test_nothing_is_recommended_that_does_not_beat_plain_decoding():
    slow = dict.fromkeys(TRUE, 0.97)
    told = verdict(halve(list(slow), made_up(slow), 16, 60), "embedded", {}, None)
    assert told["shape"] is None
    assert told["chain"] is None
    assert sentence(told).startswith("nothing beats plain decoding here")


def test_a_shape_that_was_dropped_early_is_not_recommended():
    lucky = [Tried(Shape(3, 4, 8), [1.01] * 32), Tried(Shape(1, 1, 2), [1.3, 1.3])]
    assert verdict(lucky, "embedded", {}, None)["shape"] is None
    assert verdict(lucky, "embedded", {}, None)["chain"] is None
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
