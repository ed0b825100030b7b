"""docs/results.md and README's tables are what the recorded files and `plan` say."""

import importlib
from pathlib import Path

import pytest

from draftsmith.core import run_files
from draftsmith.core.files import read_json
from draftsmith.core.records.data import CompletionsSummary, Timing
from draftsmith.core.records.evaluation import Acceptance, EvaluationSettings, Lossless, Profile, Results, Speed, Tau
from draftsmith.core.records.run import Hardware, Manifest, Provenance, StageRun
from draftsmith.core.records.training import TrainingSummary
from draftsmith.core.run_files import RunFiles

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(monkeypatch):
    """benchmarks/results.py"""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("results")


def finished(run: RunFiles) -> None:
    """The files of a run that was evaluated on the embedded engine and on SGLang."""
    made_by = Provenance(
        command="draftsmith run r.yaml",
        commit="abc1234",
        versions={},
        seed=0,
        hardware=Hardware(cpu="Test CPU", cores=2, gpus=(), system="Test"),
    )
    tau = Tau(tau=2.2015, low=2.0651, high=2.3428, prompts=60, steps=2402)
    few = tau.model_copy(update={"prompts": 9})
    for engine in ("embedded", "sglang"):
        Results(
            created_with=made_by,
            settings=EvaluationSettings(
                engine=engine,
                prompts=60,
                prompts_available=180,
                max_new_tokens=128,
                top_p=1.0,
                top_k=0,
                target="tiny",
                dtype="bf16",
            ),
            acceptance=[
                Acceptance(
                    shape="3/4/8",
                    temperature=0.0,
                    all=tau,
                    by_category={"chat": few},
                    acceptance_by_depth=[0.5, None],
                    looping_share=0.2814,
                    tau_with_loops=2.4026,
                    tokens=7945,
                    prompts=[],
                )
            ],
            lossless=Lossless(
                dtype="fp32", prompts=51, tokens_per_prompt=128, tokens=6480, shapes=("3/4/8",), differences=[]
            ),
            speed=[
                Speed(
                    shape="3/4/8",
                    batch=4,
                    prompts=12,
                    tokens=399,
                    plain_tokens_per_s=16.17,
                    drafted_tokens_per_s=30.36,
                    speedup=1.7205,
                    tau=2.4,
                    dtype="bf16",
                )
            ],
            profile=Profile(prompts=1, positions=1, table=[[1.0]], walks=[["1"]]),
        ).save(run.stage("evaluate", engine) / run_files.RESULTS)
    TrainingSummary(
        steps=3400,
        parameters=13_029_760,
        completions=3025,
        held_out_completions=32,
        completions_left_out=0,
        completions_cut=0,
        tokens=3_120_564,
        quarantined=[],
        status="converged",
        tau_held_out=2.3,
        best=None,
        checkpoint="checkpoint-003400",
    ).save(run.train / run_files.SUMMARY)
    CompletionsSummary(
        completion_tokens=291375,
        completions=3059,
        finish_reasons={},
        empty=0,
        prompts_too_long=0,
        prompts_refused=0,
        tokens_by_category={},
    ).save(run.completions / run_files.SUMMARY)
    Timing(completion_tokens=100, seconds=2.0, tokens_per_s=50.0).save(run.completions / run_files.TIMING)
    stages = {"train": StageRun(ran=True, why="no output yet", seconds=236.2)}
    Manifest(created_with=made_by, stages=stages).save(run.manifest)


def test_the_docs_are_what_the_files_say(results):
    assert (ROOT / "docs" / "results.md").read_text() == results.document()
    readme = (ROOT / "README.md").read_text()
    assert f"<!-- results -->\n{results.first_table()}\n<!-- end results -->" in readme
    assert f"<!-- cases -->\n{results.cases_table()}\n<!-- end cases -->" in readme
    assert f"<!-- arena -->\n{results.arena_block()}\n<!-- end arena -->" in readme
    assert (ROOT / "docs" / "arena.svg").read_text() == results.arena_plot()
    ablations = ROOT / "docs" / "ablations.md"
    assert ablations.read_text() == results.ablations()
    assert len(readme.split("\n---\n")[0].split()) < 700, "the first screen stays short, tables included"


def test_a_collected_run_can_be_rendered(results, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    run = RunFiles(tmp_path / "small")
    finished(run)
    told = read_json(results.collect(run.root))
    assert list(told) == ["embedded", "sglang", "training", "completions", "timing", "stages"]
    assert told["embedded"]["profile"] is told["embedded"]["sampled_profile"] is None, "as large as all the rest"
    assert told["stages"]["train"]["seconds"] == 236.2
    lines = results.section("small", told)
    assert "13.0 M parameters, 3,400 steps over 3,120,564 tokens, status converged." in lines
    for engine in ("draftsmith", "SGLang"):
        cells = "bf16 | 3/4/8 | 0 | greedy | 60 | 2.20 [2.07, 2.34] | 2.20 | 2.40 | 28% | - |"
        assert f"| {engine} | {cells}" in lines, "no interval over nine prompts"
        assert f"| {engine} | bf16 | 3/4/8 | 4 | 12 | 16.2 | 30.4 | 1.72x |" in lines
        assert f"- {engine}: commit abc1234, Test CPU, 2 cores: `draftsmith run r.yaml`" in lines
