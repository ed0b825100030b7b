"""Bad input: one clear line, exit code 2, nothing lost. As a table."""

import errno
import sys

import pytest
import torch
import yaml
from models import save_tiny_target, tiny_recipe, write_prompts

from draftsmith import cli
from draftsmith.core.recipe_file import dump_recipe
from draftsmith.core.records.evaluation import Results
from draftsmith.core.records.run import Manifest
from draftsmith.evaluation.lossless import lossless_verdict
from draftsmith.runs import pipeline
from draftsmith.targets import local


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Directory with a tiny target, prompts and a recipe that runs."""
    out = tmp_path_factory.mktemp("world")
    model = save_tiny_target(out / "model")
    recipe = tiny_recipe(model, write_prompts(out / "prompts.jsonl"))
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    return out


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["draftsmith", *map(str, arguments)])
    code = cli.main()
    return code, capsys.readouterr().err


def edited(world, tmp_path, **changes):
    values = yaml.safe_load((world / "recipe.yaml").read_text())
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        place[last] = value
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "r.yaml"


def file_with(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


TABLE = {
    "missing recipe": (lambda w, t: ["run", t / "none.yaml"], "cannot read the recipe"),
    "empty recipe": (lambda w, t: ["run", file_with(t, "r.yaml", "")], "a recipe is a mapping"),
    "unknown key": (lambda w, t: ["run", edited(w, t, **{"train.epoch": 3})], "train.epoch: unknown key; did you mean"),
    "wrong type": (lambda w, t: ["run", edited(w, t, **{"vocab.size": "big"})], "vocab.size: 'big' given"),
    "bad flag value": (lambda w, t: ["run", w / "recipe.yaml", "--vocab.size", "0"], "vocab.size: '0' given"),
    "unknown flag": (
        lambda w, t: ["run", w / "recipe.yaml", "--train.epoch", "3"],
        "--train.epoch 3; did you mean --train.epochs?",
    ),
    "going on from nothing": (
        lambda w, t: ["run", w / "recipe.yaml", "--from", t],
        "no config.json; give the directory of a draft",
    ),
    "no recipe": (lambda w, t: ["run", "--dry-run"], "usage: draftsmith run RECIPE [flags]"),
    "prompts are a directory": (
        lambda w, t: ["run", edited(w, t, **{"prompts.sources": [{"name": str(t)}]})],
        "is no file",
    ),
    "unknown device": (lambda w, t: ["run", w / "recipe.yaml", "--device", "gpu"], "device: 'gpu' given"),
    "no command": (lambda w, t: ["rnu", w / "recipe.yaml"], "rnu: no such command; did you mean run?"),
    "missing prompts": (
        lambda w, t: ["run", edited(w, t, **{"prompts.sources": [{"name": "none.jsonl"}]})],
        "'none.jsonl' is no file; allowed are bundled",
    ),
    "empty prompts": (
        lambda w, t: ["run", edited(w, t, **{"prompts.sources": [{"name": file_with(t, "e.jsonl", "")}]})],
        "holds no prompts",
    ),
    "malformed prompts": (
        lambda w, t: ["run", edited(w, t, **{"prompts.sources": [{"name": file_with(t, "b.jsonl", '{"prompt"')}]})],
        "b.jsonl:1: not JSON",
    ),
    "tap beyond the layers": (
        lambda w, t: ["run", edited(w, t, **{"draft.taps": [1, 3, 99]})],
        "draft.taps: 99 given",
    ),
    "draft vocabulary too large": (
        lambda w, t: ["run", edited(w, t, **{"vocab.size": 65})],
        "vocab.size: 65 is larger than the target's vocabulary of 64",
    ),
    "no such target": (
        lambda w, t: ["run", edited(w, t, **{"target.model": str(t / "nothing")})],
        "target.model: no tokenizer in",
    ),
    "stage without its inputs": (
        lambda w, t: ["vocab", w / "recipe.yaml"],
        "`prompts` has to run before it (no output",
    ),
    "inspect without a draft": (lambda w, t: ["inspect", t], "no config.json"),
    "no GPU": (
        lambda w, t: ["run", w / "recipe.yaml", "--device", "cuda"],
        "device: cuda asked for, but torch",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name, world, tmp_path, monkeypatch, capsys):
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    arguments, message = TABLE[name]
    arguments = arguments(world, tmp_path)
    if arguments[0] != "inspect":
        arguments += ["--out", tmp_path / "run"]
    code, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("draftsmith: ")
    assert message in last
    assert "Traceback" not in err


def test_a_full_disk_and_control_c_keep_what_is_finished(world, tmp_path, monkeypatch, capsys):
    for error, wanted, message in [
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2, "No space left on device"),
        (OSError(errno.EFBIG, "File too large"), 2, "File too large; mend it or give another --out"),
        (KeyboardInterrupt(), 130, "interrupted; what is finished is kept"),
    ]:

        def fail(*_args, _error=error, **_kwargs):
            raise _error

        with monkeypatch.context() as patch:
            patch.setattr(local.LocalTarget, "generate", fail)
            patch.setattr(cli.terminal, "on_interrupt", lambda act: None)  # Ctrl-C in here is pytest's
            code, err = run(patch, capsys, "run", world / "recipe.yaml", "--out", tmp_path / "run")
        assert code == wanted
        assert message in err.strip().splitlines()[-1]
        assert (tmp_path / "run" / "prompts" / "prompts.jsonl").exists()
    code, err = run(monkeypatch, capsys, "regenerate", world / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 0
    assert (tmp_path / "run" / "completions" / "00000.jsonl").exists()


def test_a_run_a_skip_and_a_changed_recipe(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    code, _ = run(monkeypatch, capsys, "run", world / "recipe.yaml", "--out", out)
    assert code == 0
    assert (out / "report.html").stat().st_size > 10_000
    manifest = Manifest.load(out / "manifest.json")
    assert set(manifest.stages) == {stage.name for stage in pipeline.STAGES}
    assert manifest.created_with.versions["torch"] == torch.__version__
    results = Results.load(out / "evaluate" / "results.json")
    assert lossless_verdict(results.lossless).state == "yes"
    assert [(str(e.shape), e.how) for e in results.acceptance] == [
        *(("3/1/4", how) for how in ("T=0", "T=1", "T=1, sampled drafts")),
        *(("3/4/8", how) for how in ("T=0", "T=1")),
    ]
    assert (results.profile.temperature, results.sampled_profile.temperature) == (0, 1)

    code, err = run(monkeypatch, capsys, "run", world / "recipe.yaml", "--out", out)
    assert code == 0
    assert [line for line in err.splitlines() if "up to date" in line] == [
        f"{stage.name}: up to date" for stage in pipeline.STAGES[:-1]
    ]
    code, err = run(monkeypatch, capsys, "run", world / "recipe.yaml", "--out", out, "--train.epochs", "1")
    assert code == 0
    assert "vocab: up to date" in err
    assert "train: the recipe or inputs changed; the old output is kept in" in err
    assert list(out.glob("train.*/checkpoint-*"))


def test_hidden_states_are_captured_anew_only_where_they_are_others(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"

    def states_of(*flags):
        code, _ = run(
            monkeypatch, capsys, "run", world / "recipe.yaml", "--out", out, "--train.capture", "offline", *flags
        )
        assert code == 0
        found = sorted((out / "train" / "hidden_states").glob("*.safetensors"))
        return [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in found]

    first = states_of("--train.learning-rate", "0.001")
    assert first
    assert states_of("--train.learning-rate", "0.002") == first
    [aside] = out.glob("train.*")
    assert list(aside.glob("checkpoint-*"))
    assert not (aside / "hidden_states").exists()  # kept once
    stale = out / "train" / "hidden_states" / "00007.safetensors"
    stale.write_bytes(b"of a larger text")
    others = states_of("--train.max-document-tokens", "12")
    assert set(others).isdisjoint(first)
    assert not stale.exists()
    assert set(states_of("--train.max-document-tokens", "12", "--draft.taps", "0", "1", "2")).isdisjoint(others)


def test_dry_run_says_what_would_happen(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["draftsmith", "run", str(world / "recipe.yaml"), "--dry-run", "--seed", "9"])
    assert cli.main() == 0
    text = capsys.readouterr().out
    assert "seed: 9" in text
    assert "prompts     run   gather" in text
    assert "(no output yet)" in text
