"""`export --check` and `evaluate` on real engines: what they serve is what was trained, and damage shows."""

import contextlib
import json
import os
import shutil
import subprocess

import pytest
from engine import engine_environment, engine_program, engine_python, free_port, save_target
from models import tiny_draft, tiny_recipe, tiny_target, write_prompts
from safetensors.torch import load_file, save_file

from draftsmith.core.files import read_json, write_json
from draftsmith.core.history import outputs_of
from draftsmith.core.records.base import write_rows
from draftsmith.core.records.data import Prompt
from draftsmith.core.records.evaluation import Results
from draftsmith.core.records.run import StageState
from draftsmith.core.run_files import STATE
from draftsmith.core.shape import Shape
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.drafts.directories import write_draft
from draftsmith.drafts.eagle3.config_file import IDS
from draftsmith.runs.check import agreements_with, check
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run

pytestmark = pytest.mark.engines
SHAPES = {"vllm": "3/1/4", "sglang": "3/4/8"}
EXTRA = {"vllm": "--enforce-eager --max-num-seqs 8", "sglang": "--log-level warning"}


# The default taps are named to no engine, others to each in its own way; one directory serves both.
DRAFTS = {"default": {"draft.taps": [2, 4, 5], "draft.fc_norm": False}, "own-taps": {"draft.taps": [1, 3, 6]}}


@pytest.fixture(scope="module", params=DRAFTS)
def trained(request, tmp_path_factory):
    """(recipe maker, run directory) of a small target and a draft that learned some of its greedy text."""
    out = tmp_path_factory.mktemp("checked")
    model, prompts = save_target(out / "model"), write_prompts(out / "prompts.jsonl", 40)

    def recipe(engine, **changes):
        serve = {"engine": engine, "program": engine_program(engine), "port": free_port(), "context": 512}
        values = {
            "prompts.sources": [{"name": prompts}],
            "prompts.held_out": 4,
            "regenerate.temperature": 0.0,
            "regenerate.max_new_tokens": 48,
            **DRAFTS[request.param],
            "draft.head_dim": 64,
            "vocab.size": 56,
            "draft.intermediate_size": 192,
            "train.epochs": 200,
            "train.pack_tokens": 512,
            "train.learning_rate": 2e-3,
            "train.evaluate_every": 1000,
            "train.checkpoint_every": 1000,
            "evaluate.shapes": [SHAPES[engine]],
            "evaluate.temperatures": [0.0],
            "evaluate.max_new_tokens": 32,
            "evaluate.lossless_prompts": 4,
            "serve": {**serve, "extra": EXTRA[engine], "patience_s": 300.0, "shape": SHAPES[engine]},
        }
        return tiny_recipe(model, prompts, **(values | changes))

    run = Run(recipe("vllm"), out / "run", ["test"])
    for stage in ("prompts", "regenerate", "vocab", "train", "export"):
        run_pipeline(run, stage)
    # Random text cannot be foreseen: judge by texts that the draft learned by heart, so that much is accepted.
    learned = sorted(Prompt.read_rows(run.files.training_prompts), key=lambda prompt: prompt.id)[:12]
    write_rows(run.files.evaluation_prompts, learned)
    place = run.files.stage("prompts")
    state = StageState.load(place / STATE)
    state.model_copy(update={"outputs": outputs_of(place)}).save(place / STATE)  # as if it had written them
    return recipe, out / "run"


def key_of(engine):
    """The key that holds the engine's ids in config.json."""
    return "eagle_config" if engine == "sglang" else IDS


VLLM_READS = """
import json, sys
from types import SimpleNamespace as Told

from transformers import AutoConfig
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

told = Told(draft_model_config=Told(hf_config=AutoConfig.from_pretrained(sys.argv[1])))
of_v1 = GPUModelRunner._get_eagle3_aux_layers_from_config(Told(speculative_config=told))
print(json.dumps([get_eagle3_aux_layers_from_config(told), of_v1]))
"""


@pytest.mark.parametrize("taps", [(1, 3, 4), (0, 2, 5), (2, 3, 3)])
def test_both_runners_of_vllm_read_our_taps(tmp_path, taps):
    """Its GPU runner (V2), which no CPU starts, is asked by its own function."""
    draft, ids = tiny_draft(tiny_target())
    draft.config = draft.config.model_copy(update={"taps": taps})
    named = None if taps == (2, 3, 3) else list(taps)  # the engines' default goes unsaid
    write_draft(tmp_path / "draft", draft, ids, 6, {"target": {"num_layers": 6}})
    python = engine_python("vllm")
    environment = {**os.environ, **engine_environment(python)}
    command = [str(python), "-c", VLLM_READS, str(tmp_path / "draft")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [named, named]


@pytest.mark.parametrize("engine", SHAPES)
def test_an_engine_serves_what_was_trained_and_damage_shows(trained, engine, tmp_path, capsys):
    recipe, directory = trained
    vocabulary = DraftVocabulary.load(directory / "vocab" / "vocab.safetensors")
    run = Run(recipe(engine), directory, ["test"])
    exported = run.draft_for(engine)
    assert check(run, engine)
    assert "greedy tokens identical on 6 of 6 prompts" in capsys.readouterr().err
    damaged = tmp_path / "draft"
    shutil.copytree(exported, damaged)
    config = read_json(damaged / "config.json")
    if IDS in config:
        holder = config["eagle_config"] if engine == "sglang" else config
        holder[IDS] = [i + 1 for i in holder[IDS]]
        write_json(damaged / "config.json", config)
        assert not check(run, engine, damaged)
        assert f"trained with {read_json(exported / 'config.json')[key_of(engine)]}" in capsys.readouterr().err
        (_, problems), *_ = agreements_with(run, engine, vocabulary, damaged)
        assert "it reads the directory differently" in problems[0]
        return
    tensors = load_file(damaged / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"].roll(128, 1)  # the taps in another order
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    assert not check(run, engine, damaged)
    assert "fc.weight is not the trained one" in capsys.readouterr().err
    (_, problems), *_ = agreements_with(run, engine, vocabulary, damaged)
    assert "it reads the directory differently" in problems[0]


@pytest.mark.parametrize("engine", SHAPES)
def test_an_engine_measures_what_the_embedded_one_measures(trained, engine):
    recipe, directory = trained
    if IDS in read_json(directory / "export" / "draft" / "config.json"):
        pytest.skip("measured once, on the default taps")
    for judging in ("embedded", engine):
        with contextlib.closing(Run(recipe(engine, **{"evaluate.engine": judging}), directory, ["test"])) as run:
            run_pipeline(run, "evaluate")
    own, theirs = (Results.load(run.files.results[name]) for name in ("embedded", engine))
    ((a, b),) = zip(own.acceptance, theirs.acceptance, strict=True)
    assert a.tau_with_loops > 1.3
    assert b.tau_with_loops == pytest.approx(a.tau_with_loops, abs=0.1)
    assert theirs.lossless.differences == []
    assert theirs.lossless.prompts == 4
    assert theirs.speed[0].plain_tokens_per_s > 0


def test_vllm_accepts_at_every_position_what_the_embedded_engine_accepts_greedy_and_sampled(trained):
    """At T = 1, both ways in one evaluation each; draws differ, so shares of many steps are compared."""
    recipe, directory = trained
    if IDS in read_json(directory / "export" / "draft" / "config.json"):
        pytest.skip("measured once, on the default taps")
    changes = {"evaluate.temperatures": [1.0], "evaluate.max_new_tokens": 160, "evaluate.speed_prompts": 1}
    for judging in ("embedded", "vllm"):
        values = {**changes, "evaluate.engine": judging, "evaluate.lossless_prompts": 1}
        with contextlib.closing(Run(recipe("vllm", **values), directory, ["test"])) as run:
            run_pipeline(run, "evaluate")
            assert run.better_drafts(Shape(3, 1, 4)) == "sampled"
            assert "probabilistic" in str(run.serving())
    own, theirs = (Results.load(run.files.results[name]).acceptance for name in ("embedded", "vllm"))
    assert [entry.drafts for entry in own] == [entry.drafts for entry in theirs] == ["greedy", "sampled"]
    assert own[1].tau_with_loops > own[0].tau_with_loops + 0.05
    assert None not in (*own[1].acceptance_by_depth, *theirs[1].acceptance_by_depth)
    for a, b in zip(own, theirs, strict=True):
        for depth, (ours, vllms) in enumerate(zip(a.acceptance_by_depth, b.acceptance_by_depth, strict=True)):
            steps = [sum(row.reached[depth] for row in entry.prompts) for entry in (a, b)]
            if not all(steps):  # first choices are hardly ever drawn from text as random as this one's
                continue
            share = (ours * steps[0] + vllms * steps[1]) / sum(steps)
            noise = 4 * (share * (1 - share) * sum(1 / n for n in steps)) ** 0.5
            assert vllms == pytest.approx(ours, abs=noise), f"{a.how}, depth {depth + 1}"
