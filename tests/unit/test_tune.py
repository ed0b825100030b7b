"""Successive halving on made-up ways to draft whose true speed-up is known."""

import contextlib
import itertools

from draftsmith.core.records.machine import Tried, Tuned
from draftsmith.core.records.run import Hardware, Provenance
from draftsmith.core.shape import Shape
from draftsmith.runs import tuning
from draftsmith.runs.run import fastest
from draftsmith.runs.tuning import Way, halve, sentence

TREE = Way(Shape(3, 4, 8))
TRUE = {Way(Shape(1, 1, 2)): 1.2, Way(Shape(3, 1, 4)): 1.7, Way(Shape(5, 1, 6)): 1.5, TREE: 1.9}


def chain(tried):
    return tried.shape.topk == 1


def tuned(tried, temperature=0.0):
    """As `tune` writes it."""
    hardware = Hardware(cpu="c", cores=2, gpus=(), system="s")
    return Tuned(
        engine="embedded",
        draft=None,
        temperature=temperature,
        best=fastest(tried),
        tried=tried,
        created_with=Provenance(command="", commit=None, versions={}, seed=0, hardware=hardware),
    )


def made_up(true, opened=None, short=()):
    @contextlib.contextmanager
    def session(way):
        if opened is not None:
            opened.append(way)
        noise = itertools.cycle([-0.05, 0.05, 0.0])
        yield lambda number: None if number in short else true[way] + next(noise)

    return session


def test_the_fastest_is_found_and_the_losers_are_measured_less():
    tried = halve(list(TRUE), made_up(TRUE), 64, 60)
    assert tried[0].shape == Shape(3, 4, 8)
    assert tried[0].prompts > tried[-1].prompts
    result = tuned(tried)
    assert (result.best.shape, fastest(tried, chain).shape) == (Shape(3, 4, 8), Shape(3, 1, 4))
    assert sentence(result) == "3/4/8: 1.90x over 64 prompts on embedded at T=0"


def test_nothing_is_recommended_that_does_not_beat_plain_decoding():
    slow = dict.fromkeys(TRUE, 0.97)
    result = tuned(halve(list(slow), made_up(slow), 16, 60))
    assert result.best is None
    assert fastest(result.tried, chain) is None
    assert sentence(result).startswith("nothing beats plain decoding here")


def test_a_way_that_was_dropped_early_is_not_recommended():
    lucky = [Tried(shape=s, speedup=x, prompts=n) for s, x, n in ((TREE.shape, 1.01, 32), (Shape(1, 1, 2), 1.3, 2))]
    assert fastest(lucky) is None
    assert fastest(lucky, chain) is None
    tried = halve(list(TRUE), made_up(TRUE | {Way(Shape(3, 2, 6)): 1.8}), 64, 60)
    assert [t.prompts for t in tried[:2]] == [64, 64]
    assert {t.shape for t in tried[:2]} == {Shape(3, 4, 8), Shape(3, 1, 4)}


def test_the_faster_way_to_take_drafts_wins_and_the_best_greedy_chain_goes_on_for_engines_that_cannot():
    sampled = {Way(way.shape, "sampled"): gain + 0.4 for way, gain in TRUE.items() if way.shape.topk == 1}
    tried = halve([*TRUE, *sampled], made_up(TRUE | sampled), 64, 60)
    assert str(tried[0]) == "3/1/4, sampled drafts"
    greedy = fastest(tried, lambda t: chain(t) and t.drafts == "greedy")
    assert (greedy.shape, greedy.prompts) == (Shape(3, 1, 4), 64)
    assert sentence(tuned(tried, 1.0)) == "3/1/4, sampled drafts: 2.10x over 64 prompts on embedded at T=1"
    assert fastest(halve([*TRUE, *sampled], made_up(TRUE | dict.fromkeys(sampled, 1.1)), 64, 60)).drafts == "greedy"


def test_the_time_given_is_kept(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(tuning.time, "monotonic", lambda: float(next(clock)))
    tried = halve(list(TRUE), made_up(TRUE), 64, 5)
    assert 0 < sum(t.prompts for t in tried) <= 5


def test_answers_too_short_to_time_are_left_out():
    tried = halve(list(TRUE), made_up(TRUE, short={0, 1, 5}), 8, 60)
    assert tried[0].shape == Shape(3, 4, 8)
    assert tried[0].prompts == 5
    assert halve(list(TRUE), made_up(TRUE, short=set(range(8))), 8, 60) == []
