"""`export --check` and `evaluate` on real engines: what they serve is what was trained, and damage shows."""

import contextlib
import shutil

import pytest
from engine import engine_program, free_port, save_target
from models import tiny_recipe, write_prompts
from safetensors.torch import load_file, save_file

from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.files import read_json, read_jsonl, write_jsonl
from draftsmith.pipeline import Run, run_pipeline
from draftsmith.publishing.check import check, judge

pytestmark = pytest.mark.engines
SHAPES = {"vllm": (3, 1, 4), "sglang": (3, 4, 8)}
EXTRA = {"vllm": "--enforce-eager --max-num-seqs 8", "sglang": "--log-level warning"}


# The default taps make one directory for both engines; others make one for each.
DRAFTS = {"default": {"draft.taps": [2, 4, 5]}, "own-taps": {"draft.taps": [1, 3, 6], "draft.fc_norm": True}}


@pytest.fixture(scope="module", params=DRAFTS)
def trained(request, tmp_path_factory):
    """(recipe maker, run directory) of a small target and a draft that learned some of its greedy text."""
    out = tmp_path_factory.mktemp("checked")
    model, prompts = save_target(out / "model"), write_prompts(out / "prompts.jsonl", 40)

    def recipe(engine, **changes):
        steps, topk, draft_tokens = SHAPES[engine]
        shape = {"steps": steps, "topk": topk, "draft_tokens": draft_tokens}
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
            "evaluate.shapes": [shape],
            "evaluate.temperatures": [0.0],
            "evaluate.max_new_tokens": 32,
            "evaluate.lossless_prompts": 4,
            "serve": {**serve, "extra": EXTRA[engine], "patience_s": 300.0, "shape": shape},
        }
        return tiny_recipe(model, prompts, **values, **changes)

    run = Run(recipe("vllm"), out / "run", ["test"])
    for stage in ("prompts", "regenerate", "vocab", "train", "export"):
        run_pipeline(run, stage)
    # Random text cannot be foreseen: judge by texts that the draft learned by heart, so that there is much to accept.
    learned = sorted(read_jsonl(out / "run" / "prompts" / "prompts.jsonl"), key=lambda p: p["id"])[:12]
    write_jsonl(out / "run" / "prompts" / "evaluation.jsonl", learned)
    return recipe, out / "run"


@pytest.mark.parametrize("engine", SHAPES)
def test_an_engine_serves_what_was_trained_and_damage_shows(trained, engine, tmp_path, capsys):
    recipe, directory = trained
    vocabulary = DraftVocabulary.load(directory / "vocab" / "vocab.safetensors")
    arguments = directory / "train", vocabulary, directory
    with contextlib.closing(Run(recipe(engine), directory, ["test"])) as run:
        exported = run.draft_for(engine)
    assert check(recipe(engine), engine, exported, *arguments)
    assert "greedy tokens identical on 6 of 6 prompts" in capsys.readouterr().err
    if exported.name != "draft":
        other = "vllm" if engine == "sglang" else "sglang"
        verdict = judge(recipe(engine), engine, exported.with_name(other), *arguments)  # the other's layer ids
        assert "it reads the directory differently" in verdict.problems[0]
        return
    damaged = tmp_path / "draft"
    shutil.copytree(exported, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"].roll(128, 1)  # the taps in another order
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    assert not check(recipe(engine), engine, damaged, *arguments)
    assert "fc.weight is not the trained one" in capsys.readouterr().err
    verdict = judge(recipe(engine), engine, damaged, *arguments)
    assert "it reads the directory differently" in verdict.problems[0]


@pytest.mark.parametrize("engine", SHAPES)
def test_an_engine_measures_what_the_embedded_one_measures(trained, engine):
    recipe, directory = trained
    if not (directory / "export" / "draft").exists():
        pytest.skip("measured once, on the directory that both engines read")
    for judging in ("embedded", engine):
        with contextlib.closing(Run(recipe(engine, **{"evaluate.engine": judging}), directory, ["test"])) as run:
            run_pipeline(run, "evaluate")
    own = read_json(directory / "evaluate" / "results.json")
    theirs = read_json(directory / f"evaluate-{engine}" / "results.json")
    ((a, b),) = zip(own["acceptance"], theirs["acceptance"], strict=True)
    assert a["tau_with_loops"] > 1.3
    assert b["tau_with_loops"] == pytest.approx(a["tau_with_loops"], abs=0.1)
    assert theirs["lossless"]["identical"]
    assert theirs["lossless"]["prompts"] == 4
    assert theirs["speed"][0]["plain_tokens_per_s"] > 0
