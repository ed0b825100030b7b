"""The speed-up model: accept lengths, costs, break-even, and the figures that others published."""

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from draftsmith.core.errors import RecipeError
from draftsmith.core.records.evaluation import Acceptance, Tau
from draftsmith.core.records.machine import DraftTimes, Link, ModelTimes, Probe
from draftsmith.core.shape import Shape
from draftsmith.drafts.eagle3.config import Eagle3Config
from draftsmith.hardware.accept_length import (
    Calibrated,
    GeometricProfile,
    MeasuredProfile,
    SampledProfile,
    best_tree,
    from_results,
    published,
)
from draftsmith.hardware.cost_model import GRID, MeasuredCosts, RooflineCosts, interpolate, paying_batches, predict
from draftsmith.hardware.interconnect import SIZES, all_reduce_latency, in_words, topology
from draftsmith.hardware.predict import advice, candidate_shapes, heat_map, page, predict_all, where_it_pays
from draftsmith.hardware.presets import PRESETS, preset
from draftsmith.hardware.sizes import TargetSize
from draftsmith.targets.configs import target_config

CHAIN, TREE = Shape(3, 1, 4), Shape(3, 4, 8)
FORWARD = ((1, 0.010), (4, 0.012), (16, 0.030), (64, 0.110))


def measured_costs(*forward: tuple[float, float]) -> MeasuredCosts:
    """Of a probe with these forwards, or those of FORWARD."""
    times = ModelTimes(
        context=128,
        context_s=1e-6,
        forward=forward or FORWARD,
        draft=DraftTimes(extend=((1, 0.001),), first_s=0.0, step=((1, 0.001),)),
        overhead_plain_s=0.0,
        overhead_drafted=((1, 0.001),),
    )
    return MeasuredCosts(Probe(engine="vllm", machine="made up", times=times))


def eagle3(hidden: int, wide: int, heads: int, vocabulary: int, taps: tuple[int, ...], theta: float) -> Eagle3Config:
    return Eagle3Config(
        hidden_size=hidden,
        intermediate_size=wide,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=vocabulary,
        draft_vocab_size=32000,
        taps=taps,
        rope_theta=theta,
        max_position_embeddings=4096,
    )


def minimax(machine: str, correlation: float = 0.0) -> RooflineCosts:
    target = TargetSize.of(target_config("MiniMaxAI/MiniMax-M2.7"))
    draft = eagle3(3072, 6144, 48, 200064, (2, 31, 59), 5e6)
    return RooflineCosts(preset(machine), target, draft, correlation)


def llama_8b() -> RooflineCosts:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    )
    draft = eagle3(4096, 14336, 32, 128256, (2, 16, 29), 5e5)
    return RooflineCosts(preset("h100-1"), TargetSize.of(config), draft)


def test_a_chain_walks_the_text_as_decoding_does():
    # position 0 accepts two and jumps to 3, which accepts none; 4 accepts three and jumps beyond the end
    walk = ["110", "100", "011", "200", "111", "111", "111"]
    assert MeasuredProfile([walk]).tau(CHAIN) == 1 + (2 + 0 + 3) / 3
    assert MeasuredProfile([walk]).tau(Shape(1, 1, 2)) == 1 + (1 + 0 + 0 + 1 + 1) / 5


def test_sampled_drafts_walk_by_chance():
    ranks = ["110", "100", "011", "200", "111", "111", "111"]
    certain = [digits.replace("2", "0").replace("1", "99").replace("0", "00") for digits in ranks]
    assert SampledProfile([certain]).tau(CHAIN) == pytest.approx(MeasuredProfile([ranks]).tau(CHAIN))
    # 0 accepts with 1/3: 1 is a root in 2/3 of the walks; 2 in 1/3 + 2/3 * 2/3, of those from 0 and from 1
    thirds = SampledProfile([["33", "33", "33"]])
    steps = 1 + 2 / 3 + (1 / 3 + 2 / 3 * 2 / 3)
    assert thirds.tau(Shape(1, 1, 2)) == pytest.approx(1 + steps / 3 / steps)
    uneven = SampledProfile([["99", "00", "33", "66"]])  # roots 0, 2 and, in 2/3 of the walks, 3
    assert uneven.tau(Shape(1, 1, 2)) == pytest.approx(1 + (1 + 1 / 3 + 2 / 3 * 2 / 3) / (2 + 2 / 3))
    assert thirds.deepest == 1


def test_a_tree_holds_its_most_frequent_nodes():
    frequency = {(1,): 0.6, (2,): 0.2, (1, 1): 0.4, (1, 2): 0.1, (2, 1): 0.15, (3,): 0.05}
    assert best_tree(lambda path: frequency.get(path, 0.0), Shape(2, 2, 5)) == {(1,), (1, 1), (2,), (2, 1)}
    tree, often = Shape(2, 2, 4), [["11"]] * 3  # holds (1), (1, 1) and (2)
    assert MeasuredProfile([*often, ["11"]]).tau(tree) == 1 + (3 * 2 + 2) / 4
    assert MeasuredProfile([*often, ["21"]]).tau(tree) == 1 + (3 * 2 + 1) / 4
    assert MeasuredProfile([*often, ["01"]]).tau(tree) == 1 + (3 * 2 + 0) / 4


def test_a_published_tau_is_met_at_its_own_shape():
    for shape in (CHAIN, TREE, Shape(5, 1, 6)):
        assert published(2.3, shape).tau(shape) == pytest.approx(2.3, abs=1e-4)
    chain = published(2.3, CHAIN)
    assert chain.tau(Shape(2, 1, 3)) < 2.3 < chain.tau(Shape(5, 1, 6))
    alpha = published(1.5, Shape(1, 1, 2)).alpha
    assert alpha == pytest.approx(0.5, abs=1e-5)
    assert GeometricProfile(0.5).tau(CHAIN) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    for tau, shape in ((3.52, CHAIN), (5.3, Shape(7, 1, 8)), (3.9, TREE)):  # published ones are that high
        high = published(tau, shape)
        assert high.tau(shape) == pytest.approx(tau, abs=1e-4)
        assert sum(high.share(rank) for rank in range(1, 20)) <= 1 + 1e-9


@pytest.mark.parametrize("tau", [1.0, 0.5, 4.0, 9.0])
def test_an_impossible_tau_is_refused(tau):
    with pytest.raises(RecipeError, match=r"--tau: .* given; above 1 and below 4"):
        published(tau, CHAIN)


def test_measured_taus_correct_the_profile_by_kind():
    profile = MeasuredProfile([["111", "120", "211", "000", "111", "110", "111", "111"]])
    corrected = Calibrated(profile, {TREE: 1 + 1.1 * (profile.tau(TREE) - 1)})
    assert corrected.tau(TREE) == pytest.approx(1 + 1.1 * (profile.tau(TREE) - 1))
    assert corrected.tau(CHAIN) == profile.tau(CHAIN)


def test_results_without_a_profile_give_a_geometric_one():
    entry = Acceptance(
        shape=CHAIN,
        temperature=0.0,
        all=Tau(tau=2.2, prompts=1, steps=5),
        by_category={},
        acceptance_by_depth=[],
        looping_share=0.0,
        tau_with_loops=2.2,
        tokens=11,
        prompts=[],
    )
    results = SimpleNamespace(acceptance=[entry], profile=None)
    assert from_results(results).tau(CHAIN) == pytest.approx(2.2, abs=1e-4)
    with pytest.raises(RecipeError, match="no tau at temperature 0, greedy drafts"):
        from_results(SimpleNamespace(acceptance=[], profile=None))


def test_speedup_is_tau_over_c():
    costs = measured_costs()
    told = predict(costs, CHAIN, 1.875, 1, 128)
    c = (0.012 + 3 * 0.001 + 0.001) / 0.010
    assert told.c == pytest.approx(c)
    assert told.speedup == pytest.approx(1.875 / c)
    assert predict(costs, CHAIN, 1.875, 1, 1128).decode_s == pytest.approx(0.011)


def test_break_even_is_where_drafting_stops_paying():
    costs = measured_costs(*FORWARD, (4096, 8.0))
    ((first, last),), largest = paying_batches(costs, CHAIN, 1.875, 128)
    assert (first, largest) == (1, 1024)
    after = GRID[GRID.index(last) + 1]
    assert predict(costs, CHAIN, 1.875, last, 128).speedup > 1 >= predict(costs, CHAIN, 1.875, after, 128).speedup
    flat = measured_costs((1, 0.01), (8192, 0.0101))
    assert paying_batches(flat, CHAIN, 2.176) == ([(1, 1024)], 1024)


def test_nothing_is_told_beyond_what_was_measured():
    costs, accept = measured_costs(), GeometricProfile(0.9)  # forwards of up to 64 tokens
    assert predict(costs, CHAIN, accept.tau(CHAIN), 32).speedup > 0
    assert math.isnan(predict(costs, CHAIN, accept.tau(CHAIN), 33).speedup)
    assert paying_batches(costs, CHAIN, accept.tau(CHAIN))[1] == 32
    rows = predict_all(costs, accept, [CHAIN, TREE], [1, 32], 128)
    assert page(rows).splitlines()[-1] == "-: beyond what was measured"
    flat = measured_costs((1, 0.0100), (64, 0.0105))
    assert where_it_pays(flat, rows[0][0]) == "no break-even up to batch 32, as far as is known"


def test_a_gain_that_comes_back_is_told():
    """Experts that a large batch reads anyway make verification cheap again."""
    ranges, largest = paying_batches(minimax("pcie-p2p-8"), TREE, 2.3)
    assert len(ranges) == 2
    assert ranges[0][0] == 1
    told = where_it_pays(minimax("pcie-p2p-8"), predict(minimax("pcie-p2p-8"), TREE, 2.3))
    assert re.fullmatch(r"pays only at batches 1 to \d+, \d+ to \d+", told), told
    assert largest == 1024


def test_interpolation_goes_through_its_points_and_on():
    points = [[1, 2.0], [3, 6.0], [4, 6.0]]
    assert [interpolate(points, x) for x in (0.5, 1, 2, 3, 3.5, 9)] == [2, 2, 4, 6, 6, 6]
    assert interpolate([[1, 5.0]], 77) == 5


# --- published figures (docs/speedup-model.md) -----------------------------------------------------------------------


def test_the_reference_card_gains_with_fast_links_and_breaks_even_without():
    # its tau, and about 2x with NVLink or PCIe P2P, break-even through the host
    gain = {m: predict(minimax(m), TREE, 2.6).speedup for m in ("h200-nvlink-8", "pcie-p2p-8", "pcie-host-8")}
    assert gain["h200-nvlink-8"] > gain["pcie-p2p-8"] > 1.3
    assert 1.6 < gain["h200-nvlink-8"] < 2.2
    assert gain["pcie-host-8"] < 1.1


def test_single_stream_rates_are_near_the_published_ones():
    assert 1 / minimax("h200-nvlink-4").forward_s(1, 1, 512) == pytest.approx(109, rel=0.15)  # thoughtworks, M2.5 FP8
    assert 1 / llama_8b().forward_s(1, 1, 512) == pytest.approx(140, rel=0.15)


def test_long_chains_beat_short_ones_and_chains_beat_trees_of_their_depth():
    accept = published(2.6, CHAIN)  # SpecBundle's means: 1.91, 2.06, 2.08; trees 1.72, 1.66
    gain = {
        name: predict(llama_8b(), Shape.parse(name), accept.tau(Shape.parse(name))).speedup
        for name in ("3/1/4", "5/1/6", "7/1/8", "5/3/6", "7/4/8")
    }
    assert gain["5/1/6"] > gain["3/1/4"] > gain["5/3/6"] > gain["7/4/8"]
    assert gain["7/1/8"] == pytest.approx(gain["5/1/6"], rel=0.03)


def test_shared_experts_make_verification_cheaper():
    apart, together = (predict(minimax("h200-nvlink-8", r), TREE, 2.6).speedup for r in (0.0, 0.8))
    assert together > apart * 1.05


def test_more_bandwidth_makes_plain_decoding_faster():
    assert minimax("h200-nvlink-8").forward_s(1, 1, 512) < minimax("h100-nvlink-8").forward_s(1, 1, 512)
    assert set(PRESETS) >= {"h100-nvlink-8", "pcie-p2p-8", "pcie-host-8", "h100-1"}


# --- what users see --------------------------------------------------------------------------------------------------


def test_the_table_and_the_sentence():
    costs, accept = minimax("h200-nvlink-8"), published(2.6, TREE)
    rows = predict_all(costs, accept, candidate_shapes(7), [1, 8, 64], 512)
    assert [row[0].speedup for row in rows] == sorted((row[0].speedup for row in rows), reverse=True)
    told = advice(rows, costs)
    assert re.match(r"\d+/\d+/\d+; expect 1\.\d\dx at batch 1 on h200-nvlink-8 \(accept length ", told)
    assert "; break-even above batch " in told
    assert page(rows).splitlines()[0].split() == ["shape", "tau", "c", "batch", "1", "batch", "8", "batch", "64"]
    picture = heat_map(rows, "a title")
    assert picture.count(f"{rows[0][0].speedup:.2f}") >= 1
    assert "a title" in picture


def test_a_machine_where_nothing_pays_is_told_so():
    costs, accept = measured_costs((1, 0.01), (64, 0.9)), GeometricProfile(0.4)
    assert advice(predict_all(costs, accept, candidate_shapes(3), [1], 128), costs).startswith("do not speculate on")


@pytest.mark.parametrize("text", ["3/4", "a/b/c", "3/1/9", "0/1/1", "3/4/99"])
def test_a_wrong_shape_is_one_line(text):
    with pytest.raises(ValueError, match=r"is no shape; write steps|a chain|at least|verify") as caught:
        Shape.parse(text)
    assert "\n" not in str(caught.value)


def test_processes_tell_their_all_reduce():
    points = all_reduce_latency(2, "gloo")
    assert [size for size, _ in points] == list(SIZES)
    assert all(seconds > 0 for _, seconds in points)
    json.dumps(points)


def test_topology_is_told_by_its_worst_pair():
    link = Link(pair=(0, 1), peer_access=True, nvlink=True)
    assert in_words([]) == "a single device"
    assert in_words([link]) == "NVLink"
    assert in_words([link, link.model_copy(update={"nvlink": False})]) == "PCIe, peer to peer"
    assert in_words([link, link.model_copy(update={"nvlink": False, "peer_access": False})]).startswith(
        "PCIe, through the host"
    )


def test_a_machine_without_gpus_needs_no_driver(monkeypatch):
    def no_driver():
        raise RuntimeError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=no_driver))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert topology() == []
