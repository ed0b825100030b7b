"""The report shows what the run directory holds, trusts none of its text, and asks the network for nothing."""

import math
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from draftsmith.core import run_files
from draftsmith.core.recipe import Recipe
from draftsmith.core.recipe_file import dump_recipe, load_recipe
from draftsmith.core.records.base import Decodes, write_rows
from draftsmith.core.records.data import Completion, CompletionsSummary, Coverage, PromptsSummary, Timing
from draftsmith.core.records.evaluation import (
    Acceptance,
    Difference,
    EvaluationSettings,
    Lossless,
    Results,
    Speed,
    Tau,
)
from draftsmith.core.records.run import Hardware, Provenance
from draftsmith.core.records.training import Best, HeldOut, MetricsRow, StepTiming, TrainingSummary
from draftsmith.core.run_files import RunFiles
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.evaluation.report import write_report
from draftsmith.evaluation.report_sections import Course, sample_completions, token_texts

PIECES = ["<bos>", "Say", " hi", "<script>alert(1)</script>", " & more", "é", "!", " rare"]
UNKNOWN_BYTE = "\ufffd"


class FakeTokenizer:
    """Ids 100 and 101 are the two bytes of one character; every other id is a piece of text."""

    def decode(self, ids: list[int]) -> str:
        raw = b"".join({100: b"\xc3", 101: b"\xbc"}.get(i) or PIECES[i].encode() for i in ids)
        return raw.decode("utf-8", errors="replace")


def completion(name: str, category: str) -> Completion:
    return Completion(
        id=name,
        category=category,
        source="test",
        ids=[0, 1, 2, 3, 4, 7],
        spans=[(3, 6)],
        finish_reason="stop",
        sampling=(0.8, 0.95, 64),
    )


def tau(value: float) -> Tau:
    return Tau(tau=value, low=value - 0.1, high=value + 0.1, prompts=9, steps=400)


def acceptance(shape: str, temperature: float, value: float) -> Acceptance:
    return Acceptance(
        shape=shape,
        temperature=temperature,
        all=tau(value),
        by_category={"chat": tau(value - 0.2), "code": tau(value + 0.2)},
        acceptance_by_depth=[0.61, 0.52, None],
        looping_share=0.0625,
        tau_with_loops=value + 0.03,
        tokens=1152,
        prompts=[],
    )


def speed(shape: str, drafted: float, speedup: float, tau: float, differences: list[Difference]) -> Speed:
    return Speed(
        shape=shape,
        batch=1,
        prompts=6,
        tokens=768,
        plain_tokens_per_s=20.0,
        drafted_tokens_per_s=drafted,
        speedup=speedup,
        tau=tau,
        dtype="bf16",
        differences=differences,
    )


LOSSLESS = Lossless(
    dtype="fp32", prompts=50, tokens_per_prompt=128, tokens=6400, shapes=("3/1/4", "3/4/8"), differences=[]
)
SETTINGS = EvaluationSettings(
    engine="embedded",
    prompts=9,
    prompts_available=9,
    max_new_tokens=128,
    top_p=1.0,
    top_k=0,
    target="tiny",
    dtype="bf16",
    threads=1,
)


def results(**changes: object) -> Results:
    chain_warm = acceptance("3/1/4", 1.0, 1.71).model_copy(update={"oracle": tau(2.66), "share_of_oracle": 0.43})
    tie = Difference(id="tied-prompt", shape="3/1/4", token=57, plain=4, drafted=None, logit_gap=0.0625)
    found = Results(
        created_with=Provenance(
            command="draftsmith run r.yaml",
            commit="abc1234",
            versions={},
            seed=0,
            hardware=Hardware(cpu="Test CPU", cores=2, gpus=(), system="Test"),
        ),
        settings=SETTINGS,
        acceptance=[acceptance("3/1/4", 0.0, 1.91), acceptance("3/4/8", 0.0, 2.27), chain_warm],
        lossless=LOSSLESS,
        speed=[speed("3/1/4", 24.6, 1.23, 1.9, [tie]), speed("3/4/8", 27.4, 1.37, 2.3, [])],
    )
    return found.model_copy(update=changes)


def save(run: RunFiles, found: Results, engine: Decodes = "embedded") -> None:
    """As `evaluate` does on that engine."""
    found.save(run.stage("evaluate", engine) / run_files.RESULTS)


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    files = RunFiles(tmp_path)
    recipe = Recipe.model_validate({"name": "tiny-run", "target": {"model": "tiny"}, "train": {"epochs": 3}})
    files.recipe.write_text(dump_recipe(recipe))
    PromptsSummary(
        prompts=1234,
        evaluation_prompts=9,
        duplicates_dropped=17,
        contaminated_dropped=5,
        bad_rows_skipped=2,
        rows_without_prompt=0,
        left_out={},
        by_category={"chat": 700, "code": 534},
        by_source={"test": 1234},
    ).save(files.stage("prompts") / run_files.SUMMARY)
    rows = [completion(f"{c}-{i}", c) for c in ("chat", "code") for i in "ab"]
    write_rows(files.completions / "00000.jsonl", rows)
    CompletionsSummary(
        completion_tokens=12,
        completions=4,
        finish_reasons={"eos": 0, "stop": 3, "length": 0, "loop": 1},
        empty=0,
        prompts_too_long=0,
        prompts_refused=0,
        turns_left_out={"too long": 3},
        tokens_by_category={"chat": 6, "code": 6},
    ).save(files.completions / run_files.SUMMARY)
    Timing(completion_tokens=12, seconds=3.0, tokens_per_s=4.0).save(files.completions / run_files.TIMING)
    vocabulary = DraftVocabulary(torch.arange(7), 128)
    vocabulary.save(files.vocabulary)
    Coverage(
        name=vocabulary.name,
        sizes=[1024, 2048],
        coverage={"all": [0.875, 0.96], "chat": [0.8, 0.9], "code": [0.9, 1.0]},
        distinct_tokens=4000,
        loss_tokens=12,
        chosen_size=1024,
        chosen={"all": 0.875, "chat": 0.8, "code": 0.9},
    ).save(files.coverage)
    held_out = HeldOut(match=[0.6, 0.5], alpha=[0.58, 0.49], tau={2: 1.77}, verifications=300)
    logged = [MetricsRow(step=s, loss=5.0 / s, alpha=[0.1 * s, 0.05 * s]) for s in (1, 2, 3)]
    write_rows(files.train / run_files.METRICS, [*logged, MetricsRow(step=3, held_out=held_out)])
    steps = [StepTiming(step=s, tokens=500, seconds=2.0) for s in (1, 2, 3)]
    write_rows(files.train / run_files.STEP_TIMING, steps)
    TrainingSummary(
        steps=3,
        parameters=13_000_000,
        completions=3,
        held_out_completions=1,
        completions_left_out=0,
        completions_cut=0,
        tokens=1500,
        quarantined=[],
        status="preview",
        tau_held_out=1.77,
        best=None,
        checkpoint="checkpoint-000003",
    ).save(files.train / run_files.SUMMARY)
    save(files, results())
    return files


def report(run: RunFiles) -> str:
    return write_report(run, FakeTokenizer(), {"vllm": "vllm serve tiny --spec", "sglang": "sglang it"}).read_text()


def test_the_figures_are_there(run: RunFiles) -> None:
    page = report(run)
    assert "13.0 M parameters" in page
    assert "<b>2.27</b>" in page, "tau of the fastest shape"
    assert "interval 2.17 to 2.37" in page
    assert "Later user turns that were not asked: 3 too long." in page
    assert "<b>1.37\N{MULTIPLICATION SIGN}</b>" in page
    assert "identical greedy output on 50 prompts (6,400 tokens, at most 128 each) in fp32" in page
    for figure in (
        "17 duplicates",
        "5 that occur in the evaluation set",
        "loop 1 (25.0%)",
        "87.50%",
        "1.91 [1.81, 2.01]",
    ):
        assert figure in page
    for figure in ("2.66 [2.56, 2.76]", "43%", "6.2%", "0.36", "tied-prompt", "0.0625", "abc1234", "Test CPU"):
        assert figure in page
    assert page.count("<svg") == page.count("</svg>") == 7
    assert page.count("<details>") == 5, "four answers and the whole recipe"
    assert "tau</b> = 1 + accepted draft tokens / verification steps" in page


def test_no_sentence_runs_into_the_next(run: RunFiles) -> None:
    page = report(run)
    assert "3 too long. Speed: 4 tokens/s over 3 s.</p>" in page
    text = re.sub(r"<(style|script|svg|pre)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.findall(r"\w+\.[A-Z]\w+", re.sub(r"<[^>]+>", "|", text))


def test_what_to_run_next_fits_the_run(run: RunFiles) -> None:
    page = report(run)
    assert "--train.epochs 6" in page, "a preview trains longer"
    assert "<p>Serve on vLLM:</p>\n<pre>vllm serve tiny --spec</pre>" in page
    assert "<p>Serve on SGLang:</p>\n<pre>sglang it</pre>" in page


def test_a_preview_says_whether_tau_rose_or_nobody_could_know(run: RunFiles) -> None:
    seldom = "tau on held-out text was measured too seldom (1) to tell whether it had stopped rising"
    assert report(run).count(seldom) == 3, "above, beside the status, and where it says what to run"
    held_out = HeldOut(match=[0.6], alpha=[0.58], tau={2: 1.77}, verifications=300)
    write_rows(run.train / run_files.METRICS, [MetricsRow(step=s, held_out=held_out) for s in range(1, 7)])
    assert "PREVIEW: tau on held-out text was still rising when training ended" in report(run)


def test_both_keys_that_end_a_training_are_raised(run: RunFiles) -> None:
    recipe = load_recipe(run.recipe)
    for most, flags in (
        (3, "--train.epochs 6 --train.max-steps 6"),
        (5, "--train.epochs 6 --train.max-steps 6"),
        (6, "--train.epochs 6"),
    ):
        train = recipe.train.model_copy(update={"max_steps": most})
        run.recipe.write_text(dump_recipe(recipe.model_copy(update={"train": train})))
        assert f"{flags}</pre>" in report(run)


def test_the_step_whose_weights_are_exported_is_told(run: RunFiles) -> None:
    assert "The draft is that of step" not in report(run)
    path = run.train / run_files.SUMMARY
    TrainingSummary.load(path).model_copy(update={"best": Best(step=2, tau_held_out=1.81)}).save(path)
    assert "at the end. The draft is that of step 2, whose tau was the highest: 1.81." in report(run)


def test_speed_names_its_batch_and_the_machine_that_it_was_measured_on(run: RunFiles) -> None:
    many = [entry.model_copy(update={"batch": 8, "speedup": 3.0}) for entry in results().speed]
    save(run, results(speed=[*many, *results().speed]))
    page = report(run)
    assert ", batch 8, 6 prompts; the fastest of 4 measured; Test CPU, 2 cores, 1 threads" in page
    assert page.count('<tr class="chosen"><th>3/1/4</th><td>8</td>') == 1
    assert "<td>1.23\N{MULTIPLICATION SIGN}</td><td>3/4/8</td>" in page, "tree against chain at the smallest batch"
    elsewhere = SETTINGS.model_copy(update={"engine": "vllm", "threads": None})
    save(run, results(settings=elsewhere))
    assert "servers whose hardware is not recorded" in report(run)


def test_what_an_engine_left_out_is_told_wherever_it_was_measured(run: RunFiles) -> None:
    save(run, results(left_out=[1.0]))
    assert "<p>Nothing at T=1.0: this server drafts greedily at any temperature" in report(run)


def test_the_greedy_share_is_told_where_it_was_counted(run: RunFiles) -> None:
    assert "of them greedily" not in report(run)
    path = run.completions / run_files.SUMMARY
    CompletionsSummary.load(path).model_copy(update={"greedy_tokens": 3}).save(path)
    assert "12 tokens (25.0% of them greedily) in 4 completions" in report(run)


def test_text_of_the_run_is_escaped(run: RunFiles) -> None:
    page = report(run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 5, "the mask and four answers"


def test_a_hostile_category_reaches_neither_page_nor_plots_raw(run: RunFiles) -> None:
    hostile = {"by_category": {"_<script>$x^2$ $": tau(1.5)}}
    save(run, results(acceptance=[entry.model_copy(update=hostile) for entry in results().acceptance]))
    assert "<script" not in report(run)


def test_nothing_is_loaded_from_elsewhere(run: RunFiles) -> None:
    page = report(run)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert not re.search(r"<(?:script|link|img|iframe)\b", page)


def test_the_mask_tells_prompt_loss_and_outside_tokens_apart(run: RunFiles) -> None:
    page = report(run)
    assert '<span class="prompt" title="2"> hi</span>' in page
    assert '<span class="loss" title="4"> &amp; more</span>' in page
    assert '<span class="loss outside" title="7"> rare</span>' in page
    run.vocabulary.unlink()
    assert '<span class="loss" title="7"> rare</span>' in report(run)


def test_a_loss_on_prompts_is_told(run: RunFiles) -> None:
    told = "Prompts carry the loss, too"
    assert told not in report(run)
    recipe = load_recipe(run.recipe, {"train": {"on_prompts": True}})
    run.recipe.write_text(dump_recipe(recipe))
    page = report(run)
    assert told in page
    assert "3 epochs, on prompts, too, " in page


def test_a_partial_evaluation_says_so_loudly(run: RunFiles) -> None:
    assert "PARTIAL" not in report(run)
    save(run, results(settings=SETTINGS.model_copy(update={"prompts_available": 180})))
    assert "PARTIAL EVALUATION: only 9 prompts" in report(run)


def test_what_engines_measured_stands_beside_the_embedded_figures(run: RunFiles) -> None:
    assert "draftsmith evaluate RECIPE --evaluate.engine vllm" in report(run)
    parted = Difference(shape="3/1/4", id="far", token=3, logit_gap=0.8)
    served = results(
        settings=SETTINGS.model_copy(update={"engine": "vllm"}),
        acceptance=[acceptance("3/1/4", 0.0, 1.87)],
        speed=[results().speed[0].model_copy(update={"batch": 4, "speedup": 1.19})],
        lossless=LOSSLESS.model_copy(update={"differences": [parted, parted], "dtype": "bf16"}),
    )
    save(run, served, "vllm")
    served.save(run.root / "evaluate-vllm.0123abcd" / run_files.RESULTS)  # kept aside, of another recipe
    page = report(run)
    assert page.count("<th>vllm (bf16), 3/1/4, T=0</th><td>1.87 [") == 1
    assert "<th>vllm, 3/1/4</th><td>4</td><td>20.0</td><td>24.6</td><td>1.19\N{MULTIPLICATION SIGN}</td>" in page
    assert (
        "vllm: NOT lossless; 2 differences in greedy output on 50 prompts (6,400 tokens, at most 128 each) in bf16"
        in page
    )


def test_sampled_drafts_stand_beside_greedy_ones(run: RunFiles) -> None:
    sampled = acceptance("3/1/4", 1.0, 1.93).model_copy(update={"drafts": "sampled"})
    save(run, results(acceptance=[*results().acceptance, sampled]))
    page = report(run)
    assert "<th>3/1/4, T=1</th><td>1.71 [" in page
    assert "<th>3/1/4, T=1, sampled drafts</th><td>1.93 [" in page


def test_temperatures_at_which_an_engine_does_not_draw_are_told(run: RunFiles) -> None:
    save(run, results(settings=SETTINGS.model_copy(update={"engine": "sglang"}), left_out=[0.7]), "sglang")
    assert "sglang: nothing at T=0.7; this server drafts greedily at any temperature" in report(run)


def test_a_difference_turns_the_verdict(run: RunFiles) -> None:
    difference = Difference(shape="3/4/8", id="broken-prompt", token=3, plain=1, drafted=2, logit_gap=4.5)
    save(run, results(lossless=LOSSLESS.model_copy(update={"differences": [difference]})))
    page = report(run)
    assert '<div class="card bad"><span class="label">Lossless</span><b>NO</b>' in page
    assert "broken-prompt" in page
    assert "Do not serve this draft" in page


@pytest.mark.parametrize(
    ("difference", "cell"),
    [
        ({"plain": None, "drafted": None, "logit_gap": None}, "<td>-</td><td>-</td><td>one text ended</td>"),
        ({"logit_gap": 0.125}, "<td>-</td><td>-</td><td>0.125</td>"),
        ({"plain": 7, "drafted": 9, "logit_gap": 2e-4}, "<td>7</td><td>9</td><td>0.0002</td>"),
    ],
    ids=["a text that ended", "a served run", "a tie"],
)
def test_differences_of_every_kind_are_shown(run: RunFiles, difference: dict, cell: str) -> None:
    parted = Difference(shape="3/1/4", id="parted", token=3, **difference)
    save(run, results(lossless=LOSSLESS.model_copy(update={"differences": [parted]})))
    page = report(run)
    assert cell in page
    assert ("<b>up to ties</b>" in page) == (difference["logit_gap"] == 2e-4)


def test_a_server_of_others_without_losslessness_makes_a_page(run: RunFiles) -> None:
    save(run, results(lossless=None, speed=[]))
    page = report(run)
    assert "<b>not tested</b>" in page
    assert "no output was compared with plain decoding" in page


def test_stages_that_have_not_run_take_one_line_each(run: RunFiles, tmp_path_factory: pytest.TempPathFactory) -> None:
    run.results["embedded"].unlink()
    page = report(run)
    assert "stage evaluate has not run" in page
    assert "draftsmith evaluate" in page
    assert "Training loss" in page
    begun = RunFiles(tmp_path_factory.mktemp("begun"))
    shutil.copy(run.recipe, begun.recipe)  # a stage that runs writes it first
    empty = report(begun)
    for stage in ("prompts", "regenerate", "vocab", "train", "evaluate"):
        assert f"stage {stage} has not" in empty


def test_the_same_run_gives_the_same_page(run: RunFiles) -> None:
    assert report(run) == report(run)


def test_answers_come_evenly_from_the_categories() -> None:
    rows = [completion(f"chat-{i}", "chat") for i in range(500)] + [completion(f"code-{i}", "code") for i in range(30)]
    rows += [completion("math-0", "math"), completion("math-1", "math").model_copy(update={"spans": []})]
    chosen = sample_completions(iter(rows), 20, seed=0)
    assert Counter(row.category for row in chosen) == {"chat": 10, "code": 9, "math": 1}
    assert len({row.id for row in chosen}) == 20
    assert max(int(row.id.split("-")[1]) for row in chosen) > 100, "not just the beginning"


def test_a_character_of_two_tokens_stands_at_the_second() -> None:
    texts = token_texts([1, 100, 101, 6], FakeTokenizer())
    assert texts == ["Say", "", "ü", "!"]
    assert token_texts([1, 100], FakeTokenizer()) == ["Say", UNKNOWN_BYTE]


def test_twice_the_tokens_is_told_by_the_slope_of_the_late_measurements():
    def measured(step, tau):
        held = HeldOut(match=[0.5], alpha=[0.5], tau={1: 1.2, 3: tau}, verifications=9)
        return MetricsRow(step=step, held_out=held)

    timing = [StepTiming(step=step, tokens=1000, seconds=1.0) for step in range(1, 65)]
    late = [measured(step, 1.5 + 0.1 * math.log2(step)) for step in (16, 32, 64)]
    early = [measured(step, 1.0) for step in (1, 2, 8)]  # steeper, and long ago
    assert Course([*early, *late], timing).gain_of_doubling == pytest.approx(0.1)
    assert Course(late[1:], timing).gain_of_doubling is None
    assert Course(late, []).gain_of_doubling is None
    assert Course([], timing).gain_of_doubling is None
