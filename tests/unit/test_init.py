"""`init` writes a recipe that holds for the model, says why, and tells what it could not know."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from models import local_target, save_tiny_target, write_prompts
from transformers import AutoConfig

from draftsmith import cli
from draftsmith.core.errors import TargetError
from draftsmith.core.recipe_file import load_recipe
from draftsmith.runs.init import init


def model_of(tmp_path, generation=None, config=None, **tokenizer):
    """A tiny model's files; `config`: another model's, as `init` reads no weights."""
    model = tmp_path / "Tiny Model"
    save_tiny_target(model, **tokenizer)
    (model / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation))
    if config is not None:
        (model / "config.json").write_text(config.to_json_string(use_diff=False))
    return str(model)


def made(model, tmp_path, hardware=None, data=None):
    path, unknown = init(model, data, tmp_path / "made.yaml", hardware)
    return load_recipe(path), path.read_text(), " | ".join(unknown)


def test_the_models_own_sampling_and_template_are_taken(tmp_path):
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    recipe, text, unknown = made(model_of(tmp_path, settings), tmp_path)
    sampling = recipe.regenerate
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 0.95)
    served = recipe.evaluate
    assert (served.temperatures, served.top_k, served.top_p) == ((0.0, 0.6), 20, 0.95)
    assert "temperature: 0.6 # of its generation_config.json" in text
    assert recipe.target.template is None
    assert recipe.name == "tiny-model-eagle3"
    assert recipe.vocab.size == 64, "no more than the model has"
    assert recipe.draft.taps == (1, 3, 5), "six layers are too few for the engines' default"
    assert recipe.regenerate.max_prompt_tokens + recipe.regenerate.max_new_tokens <= 256, "the model's context"
    assert "sampling" not in unknown
    assert "licence" in unknown
    assert "base_model: owner/name" in text


@pytest.mark.parametrize(
    ("generation", "temperature", "assumed"),
    [(None, 1.0, True), ({"eos_token_id": 0}, 1.0, True), ({"do_sample": False}, 0.0, False)],
)
def test_what_is_not_told_is_assumed_and_said(tmp_path, generation, temperature, assumed):
    recipe, text, unknown = made(model_of(tmp_path, generation, chat_template=None), tmp_path)
    assert recipe.regenerate.temperature == temperature
    assert ("sampling settings" in unknown) == assumed
    assert ("temperature: 1.0 # assumed" in text) == assumed
    assert "{content}" in recipe.target.template.user
    assert "the prompt format" in unknown


def qwen3_8b():
    return AutoConfig.for_model(
        "qwen3",
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        vocab_size=151936,
        num_key_value_heads=8,
        head_dim=128,
    )


def test_sizes_and_engine_follow_the_machine(tmp_path):
    model = model_of(tmp_path, config=qwen3_8b())
    recipe, text, _ = made(model, tmp_path, "h100-1")
    assert (recipe.target.engine, recipe.target.dtype, recipe.vocab.size) == ("transformers", "bf16", 32000)
    assert (recipe.train.ttt_steps, recipe.train.capture) == (7, "online")
    published = load_recipe(Path(__file__).parents[2] / "recipes" / "qwen3-8b-eagle3.yaml").train
    for key in ("objective", "optimizer", "learning_rate", "head_rate"):
        assert getattr(recipe.train, key) == getattr(published, key)
    assert (published.objective, published.optimizer) == ("lk_lambda", "muon")
    assert "8.19 B parameters, 16.4 GB as served" in text
    (tmp_path / "made.yaml").unlink()
    recipe, text, unknown = made(model, tmp_path, "rtx4090-1")
    assert recipe.target.engine == "vllm"
    assert recipe.server.urls == ("http://127.0.0.1:8000",)
    assert "server.urls" in unknown
    large = AutoConfig.for_model("llama", num_hidden_layers=120, hidden_size=16384, intermediate_size=53248)
    (tmp_path / "made.yaml").unlink()
    recipe, _, unknown = made(model_of(tmp_path, config=large), tmp_path, "h100-nvlink-8")
    assert recipe.serve.tensor_parallel == 8
    assert "a machine that holds the target" in unknown


@pytest.mark.parametrize("machine", ["h100-1", None])
def test_the_rate_follows_the_width(tmp_path, machine):
    for width, rate in ((640, 0.004), (1024, 0.001)):
        config = AutoConfig.for_model("llama", hidden_size=width, num_hidden_layers=8, vocab_size=4096)
        recipe, text, _ = made(model_of(tmp_path / str(width), config=config), tmp_path / str(width), machine)
        assert recipe.train.learning_rate == rate
        assert ("not measured this wide" in text) == (rate == 0.001)


def test_own_data_is_trained_on_and_held_out(tmp_path):
    prompts = write_prompts(tmp_path / "mine.jsonl")
    path, _ = init(model_of(tmp_path), tmp_path / "mine.jsonl", tmp_path / "made.yaml", None)
    recipe = load_recipe(path)
    assert [s.name for s in recipe.prompts.sources] == [prompts]
    assert recipe.prompts.evaluation == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{model}", "--data", "nowhere.jsonl"], "--data: nowhere.jsonl is no file"),
        (["{model}", "--out", "{model}/config.json"], "exists; delete it or give another --out"),
        (["{model}", "--hardware", "h300"], "--hardware: 'h300' given"),
        (["{empty}"], "no config.json"),
        ([], "usage: draftsmith init MODEL"),
    ],
)
def test_what_init_cannot_do_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    places = {"model": model_of(tmp_path), "empty": tmp_path / "empty"}
    monkeypatch.setattr(sys, "argv", ["draftsmith", "init", *(a.format(**places) for a in arguments)])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main() == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error


def test_the_made_recipe_runs_to_a_report(tmp_path, monkeypatch, capsys):
    """The shortest way of a newcomer: init with his own data, then run."""
    write_prompts(tmp_path / "mine.jsonl", 40)
    monkeypatch.chdir(tmp_path)
    arguments = ["init", model_of(tmp_path), "--data", "mine.jsonl", "--out", "r.yaml"]
    monkeypatch.setattr(sys, "argv", ["draftsmith", *arguments])
    assert cli.main() == 0
    assert "next:   draftsmith probe r.yaml && draftsmith plan r.yaml" in capsys.readouterr().out
    values = yaml.safe_load((tmp_path / "r.yaml").read_text())
    short = ["--regenerate.max-new-tokens", "16", "--evaluate.max-new-tokens", "16", "--evaluate.lossless-prompts", "2"]
    monkeypatch.setattr(sys, "argv", ["draftsmith", "run", "r.yaml", *short, "--prompts.held-out", "2"])
    assert cli.main() == 0
    told = capsys.readouterr().out
    assert (tmp_path / "runs" / values["name"] / "report.html").exists()
    assert "serve it on vllm:\n  vllm serve" in told
    assert "serve it on sglang:\n  " in told
    assert "card:   none yet; card.base_model" in told


@pytest.mark.parametrize("module", [["-m", "draftsmith"], ["-c", "from draftsmith.cli import main; main()"]])
@pytest.mark.parametrize(("argument", "words"), [("--version", "draftsmith 0."), ("--help", "init        write a")])
def test_version_and_help_load_nothing_heavy(module, argument, words):
    probe = [sys.executable, "-X", "importtime", *module, argument]
    done = subprocess.run(probe, capture_output=True, text=True)
    assert done.returncode == 0
    assert words in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "datasets", "matplotlib"}


def test_an_unknown_command_names_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["draftsmith", "evalute", "r.yaml"])
    assert cli.main() == 2
    assert "evalute: no such command; did you mean evaluate?" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["draftsmith"])
    assert cli.main() == 2
    assert "usage: draftsmith COMMAND RECIPE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than any model has"),
        ({"vision_config": {"depth": 10**9}}, "depth is 1000000000, more than any model has"),
        ({"hidden_size": 0}, "hidden_size is 0, wanted a whole number of 1 or more"),
        ({"num_experts": {"a": 1}}, "num_experts of its config.json is {'a': 1}; wanted a number"),
        ({"quantization_config": {"bits": "x"}}, "quantization_config of its config.json is not understood"),
        ({"rope_parameters": {"full_attention": 5}}, "rope"),
        ({"text_config": "x"}, "config.json of "),
    ],
)
def test_an_odd_config_is_one_line(tmp_path, change, told):
    model = Path(model_of(tmp_path))
    (model / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | change))
    with pytest.raises(TargetError, match=r"^target\.model: ") as refused:
        made(str(model), tmp_path)
    assert told in str(refused.value)
    if "num_experts" in change:
        return  # which the library does not read for this architecture
    with pytest.raises(TargetError, match=r"^target\.model: "):
        local_target(model)


def test_a_config_that_asks_for_more_than_its_files_hold_is_refused(tmp_path):
    model = Path(model_of(tmp_path))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 2**14, "intermediate_size": 2**16}))
    with pytest.raises(TargetError, match=r"numbers, but its \.safetensors files have"):
        local_target(model)


def test_a_pipe_among_a_models_files_is_refused(tmp_path):
    model = Path(model_of(tmp_path))
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    with pytest.raises(TargetError, match=r"tokenizer\.json is no plain file"):
        made(str(model), tmp_path)
