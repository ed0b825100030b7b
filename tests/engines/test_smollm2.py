"""The embedded instruct model on real engines: its own chat template, stock classes, one directory for both."""

import contextlib
from pathlib import Path

import pytest
from engine import ROOT, engine_program, free_port

from draftsmith.core.recipe_file import load_recipe, parse_recipe
from draftsmith.core.records.evaluation import Results
from draftsmith.evaluation.lossless import lossless_verdict
from draftsmith.publishing.card import write_card
from draftsmith.runs.estimates import card_prediction
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run
from draftsmith.targets.embedded import EMBEDDED

pytestmark = pytest.mark.engines
EXTRA = {"vllm": "--enforce-eager --max-num-seqs 8", "sglang": "--log-level warning"}
NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def recipe():
    """Makes the demo's recipe, cut short, for an engine."""
    values = load_recipe(ROOT / "recipes" / "smollm2-135m-quick.yaml").model_dump(mode="json")
    values["regenerate"] |= {"max_tokens": 3000, "max_new_tokens": 64}
    values["train"] |= {"epochs": 8}
    values["evaluate"] |= {"prompts": 6, "max_new_tokens": 48, "temperatures": [0.0], "lossless_prompts": 3}
    values["evaluate"]["shapes"] = ["3/1/4"]

    def made(engine: str):
        serve = {"engine": engine, "program": engine_program(engine), "port": free_port(), "context": 512}
        return parse_recipe({**values, "serve": {**serve, "extra": EXTRA[engine], "patience_s": 300.0}}, "test")

    return made


@pytest.fixture(scope="module")
def directory(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "run"
    with contextlib.closing(Run(recipe("vllm"), out, ["test"])) as run:
        run_pipeline(run)
    return out


@pytest.mark.parametrize("engine", EXTRA)
def test_an_instruct_models_draft_serves_as_it_was_measured(recipe, directory, engine):
    chosen = recipe(engine)
    judged = chosen.model_copy(update={"evaluate": chosen.evaluate.model_copy(update={"engine": engine})})
    with contextlib.closing(Run(judged, directory, ["test"])) as run:
        assert run.draft_engines == ("vllm", "sglang")
        run_pipeline(run, "evaluate")
    own, theirs = (Results.load(run.files.results[name]) for name in ("embedded", engine))
    assert lossless_verdict(own.lossless).state == "yes"
    assert lossless_verdict(theirs.lossless).state == "yes"
    a, b = own.acceptance[0], theirs.acceptance[0]
    assert a.tau_with_loops > 1.15
    # SGLang counts the step that the end of a text cuts short
    assert b.tau_with_loops == pytest.approx(a.tau_with_loops, abs=0.03 if engine == "vllm" else 0.12)
    with contextlib.closing(Run(chosen, directory, ["test"])) as run:
        assert EMBEDDED[NAME].hub_name in write_card(run, card_prediction(run)).read_text()
