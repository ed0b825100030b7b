import pytest

from draftsmith.core.records.data import Prompt
from draftsmith.core.records.evaluation import Acceptance, Difference, Lossless, PromptCounts
from draftsmith.core.shape import Shape
from draftsmith.decoding.generation import Generation
from draftsmith.evaluation.acceptance import bootstrap_tau, count, oracle_walk, paired_difference, summarise
from draftsmith.evaluation.asking import balanced
from draftsmith.evaluation.draft_sampling import more_accepted
from draftsmith.evaluation.lossless import first_difference, lossless_verdict
from draftsmith.training.metrics import converged

CHAIN, TREE = Shape(3, 1, 4), Shape(3, 4, 8)


def decoded(accepted: list[int], ids: list[int] | None = None) -> Generation:
    length = sum(accepted) + len(accepted) + 10
    return Generation(ids or list(range(length)), "length", tuple(accepted))


def test_tau_counts_the_bonus_and_not_the_prefill_token():
    row = count("p", "chat", decoded([3, 0, 1]), 3)
    summary = summarise([row], CHAIN, 0.0)
    assert summary.all.tau == pytest.approx(1 + 4 / 3)
    assert summary.acceptance_by_depth == [2 / 3, 1 / 2, 1 / 1]


def test_steps_cut_short_by_the_end_are_left_out():
    row = count("p", "chat", decoded([3, 0, 1], ids=list(range(7))), 3)
    assert (row.steps, row.accepted) == (1, 3)  # the root of the second step is token 4 of 7: only two could follow


def test_looping_text_is_left_out_but_reported():
    text = list(range(20)) + [7] * 60
    row = count("p", "chat", decoded([0] * 18 + [3] * 12, ids=text), 3)
    assert row.looping_tokens == 80 - 21
    assert row.steps == 18
    summary = summarise([row], CHAIN, 0.0)
    assert summary.all.tau == 1.0
    assert summary.tau_with_loops > 2
    assert summary.looping_share == pytest.approx(59 / 80)


def test_steps_that_are_told_without_order_count_whole_completions():
    """SGLang's histogram: steps cut short by the end count, and a completion that loops is left out."""
    row = count("p", "chat", Generation(list(range(7)), "length", (0, 1, 3), in_order=False), 3)
    assert (row.steps, row.accepted, row.looping_steps) == (3, 4, 0)
    looping = count("p", "chat", Generation([7] * 60, "length", (1, 3), in_order=False), 3)
    assert (looping.steps, looping.looping_steps, looping.looping_accepted) == (0, 2, 4)


def test_interval_holds_the_value_and_shrinks_with_prompts():
    few = bootstrap_tau([3, 9, 6, 2] * 3, [5, 6, 5, 5] * 3)
    many = bootstrap_tau([3, 9, 6, 2] * 48, [5, 6, 5, 5] * 48)
    assert few.tau == many.tau == 1 + 20 / 21
    assert few.low < few.tau < few.high
    assert many.high - many.low < 0.3 * (few.high - few.low)
    assert bootstrap_tau([0], [0]).tau is None


def test_under_ten_prompts_no_interval_is_told():
    nine = bootstrap_tau([3] * 9 + [0], [5] * 9 + [0])  # the tenth was too short to count
    assert (nine.low, nine.high, nine.prompts) == (None, None, 9)
    assert str(nine) == "1.60"
    assert str(bootstrap_tau([3] * 10, [5] * 10)) == "1.60 [1.60, 1.60]"
    assert str(bootstrap_tau([], [])) == "-"


def counts(name: str, accepted: int, steps: int) -> PromptCounts:
    return PromptCounts(id=name, category="chat", tokens=0, looping_tokens=0, steps=steps, accepted=accepted)


def test_a_paired_difference_is_sharper_than_two_intervals():
    """Prompts differ far more than the two drafts: only the pairs tell that the second is better."""
    steps, easy = [20] * 40, [i % 4 for i in range(40)]
    ours = [counts(str(i), 10 * e, s) for i, (e, s) in enumerate(zip(easy, steps, strict=True))]
    others = [counts(row.id, row.accepted + 2, row.steps) for row in reversed(ours)]
    paired = paired_difference(ours, others)
    assert (paired.difference, paired.prompts) == (pytest.approx(0.1), 40)
    assert paired.low == pytest.approx(0.1)
    assert paired.high == pytest.approx(0.1)
    alone = bootstrap_tau([row.accepted for row in ours], steps)
    assert alone.high - alone.low > 0.3
    few = paired_difference(ours[:9], others)
    assert (few.low, few.prompts) == (None, 9)
    assert paired_difference(ours, [counts("else", 1, 1)]).difference is None


def measured_ways(shape: Shape, temperature: float, greedy: float, sampled: float | None) -> list[Acceptance]:
    depths = {"reached": [100] * shape.steps, "accepted_at": [0] * shape.steps}
    rows = [counts("p", round(100 * (tau - 1)), 100).model_copy(update=depths) for tau in (greedy, sampled) if tau]
    return [summarise([r], shape, temperature, d) for r, d in zip(rows, ("greedy", "sampled"), strict=False)]


def test_drafts_are_served_as_they_are_accepted_more():
    chain, longer = measured_ways(CHAIN, 1.0, 1.3, 1.5), measured_ways(Shape(5, 1, 6), 1.0, 1.6, 1.4)
    tree, cold = measured_ways(TREE, 1.0, 1.7, 1.6), measured_ways(CHAIN, 0.0, 2.0, None)
    entries = [*cold, *chain, *longer, *tree]
    assert more_accepted(entries, CHAIN) == "sampled"
    assert more_accepted(entries, Shape(5, 1, 6)) == "greedy"
    assert more_accepted([*chain, *tree], Shape(2, 1, 3)) == "sampled"
    assert more_accepted([*chain, *tree], Shape(5, 2, 6)) == "greedy"
    assert more_accepted([*cold, *tree, *measured_ways(CHAIN, 1.0, 1.3, None)], CHAIN) is None


def test_the_oracle_accepts_runs_of_first_choices():
    hits = [False, True, True, True, True, False, True, True, True, True, True, True]
    # roots at 0 (1, 2, 3 accepted; 4 is the bonus), 4 (none; 5 is the bonus), 5 (6, 7, 8; bonus 9)
    assert oracle_walk(hits, 3, 12) == (6, 3)
    assert oracle_walk(hits, 3, 6) == (3, 1)


def test_a_few_prompts_are_as_many_of_each_category():
    prompts = [Prompt(id=str(i), category="a" if i < 6 else "b", source="s", messages=[]) for i in range(8)]
    assert [p.id for p in balanced(prompts, 5)] == ["0", "6", "1", "7", "2"]
    assert len(balanced(prompts, None)) == 8


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


def test_the_stop_rule():
    assert not converged([1.0, 1.5, 1.9, 2.2], patience=2)
    assert not converged([2.2, 2.2], patience=2)
    assert converged([1.0, 2.2, 2.205, 2.19, 2.21], patience=3)
    assert not converged([1.04, 1.041, 1.042, 1.045], patience=3)  # an untrained draft that has begun to learn


PROOF = {"prompts": 9, "tokens_per_prompt": 64, "tokens": 512, "shapes": (CHAIN, CHAIN, TREE)}


@pytest.mark.parametrize(
    ("dtype", "gaps", "verdict"),
    [
        ("bf16", [], "lossless: yes; identical greedy output on 9 prompts (512 tokens, at most 64 each) in bf16"),
        ("bf16", [0.0, 0.125], "lossless: up to ties; 2 differences in greedy output on 9 prompts"),
        ("bf16", [0.125, 0.9], "lossless: NO; 2 differences"),
        ("bf16", [0.1, None], "lossless: NO; 2 differences"),  # one of the texts ended
        ("fp32", [None], "lossless: NO; 1 differences"),
        ("fp32", [9e-4], "lossless: up to ties; 1 differences"),
        ("fp32", [9e-4, 1.1e-3], "lossless: NO; 2 differences"),
    ],
)
def test_only_ties_within_what_a_dtype_rounds_are_excused(dtype, gaps, verdict):
    differences = [Difference(shape=CHAIN, id="p", token=3, logit_gap=gap) for gap in gaps]
    proof = Lossless(**PROOF, dtype=dtype, differences=differences)
    assert str(lossless_verdict(proof)).startswith(verdict)
    assert str(lossless_verdict(proof.model_copy(update={"tokens": 0}))).startswith("lossless: not tested")
    assert str(lossless_verdict(None)).startswith("lossless: not tested")
