"""What an error says to do is done, as it is written there, and then the command that failed works."""

import errno
import html
import importlib.util
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from models import save_tiny_target, tiny_recipe, write_prompts
from outcomes import read

from draftsmith import cli
from draftsmith.core import lock as lock_module
from draftsmith.core.files import read_json, write_json
from draftsmith.core.lock import RunLock
from draftsmith.core.recipe_file import dump_recipe, load_recipe
from draftsmith.core.records.machine import Probe, Tried, Tuned
from draftsmith.core.shape import Shape
from draftsmith.data.licences import licence_of
from draftsmith.hardware import interconnect
from draftsmith.publishing.card import base_model, write_card
from draftsmith.runs import probing as probe
from draftsmith.runs import tuning
from draftsmith.runs.estimates import card_prediction
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run

RECIPES = Path(__file__).parents[2] / "recipes"
ADVISED = re.compile(r"(?:run|anew|with|or): draftsmith (\w+) (RECIPE|\S+)((?: --[\w-]+(?: \w+)?)*)")
NAMED = {"card.base_model": "owner/tiny", "card.licence": "mit", "card.repo": "owner/draft"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with a recipe, its target and its whole run with a card."""
    out = tmp_path_factory.mktemp("finished")
    recipe = tiny_recipe(save_tiny_target(out / "model"), write_prompts(out / "prompts.jsonl"), **NAMED)
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    run = Run(recipe, out / "run", ["test"])
    run_pipeline(run)
    write_card(run, card_prediction(run))
    return out


@pytest.fixture
def world(finished, tmp_path, monkeypatch):
    """A copy of the run, in the directory that commands run in."""
    shutil.copytree(finished, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    quick = {"ROUNDS": 1, "WIDTHS": (1, 2, 3, 4, 8), "CONTEXT": 16, "LONG_CONTEXT": 48, "LOOP_TOKENS": 8}
    for name, value in quick.items():
        monkeypatch.setattr(probe, name, value)
    monkeypatch.setattr(interconnect, "all_reduce_latency", lambda *_: ())  # of two processes, which take long to start
    return tmp_path / "world"


@pytest.fixture
def call(world, monkeypatch, capsys):
    """`call(*words)` is (exit code, last line of stderr) of a command; `call.out` and `call.err` have all of them."""

    def called(command, *words):
        where = [] if "recipe.yaml" not in words or "--out" in words else ["--out", "run"]
        monkeypatch.setattr(sys, "argv", ["draftsmith", command, *map(str, words), *where])
        code = cli.main()
        called.out, called.err = capsys.readouterr()
        return code, (called.err.splitlines() or [""])[-1]

    return called


def without(*parts):
    """A run that has not got that far, or lost it."""

    def prepare(world):
        for part in parts:
            path = world / "run" / part
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def flipped(name):
    def prepare(world):
        path = world / "run" / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return prepare


def unnamed_taps(world):
    config = world / "run" / "export" / "draft" / "config.json"
    write_json(config, {k: v for k, v in read_json(config).items() if k != "draftsmith"})


STAGES = ["prompts", "completions", "vocab", "train", "export", "evaluate"]
SHORT = ["--evaluate.prompts", "3", "--evaluate.max-new-tokens", "8", "--evaluate.shapes", "3/1/4"]
SHORT += ["--evaluate.lossless-prompts", "1", "--evaluate.speed-prompts", "1"]
WEIGHTS = "export/draft/model.safetensors"
COMMANDS = {
    "no results": (without("evaluate"), ["card", "recipe.yaml"], "no results"),
    "no accept length": (without("evaluate"), ["predict", "recipe.yaml", "--hardware", "h100-1"], "no accept length"),
    "no draft to serve": (without("export"), ["serve", "recipe.yaml", "--print"], "no draft"),
    "no draft to publish": (without("export"), ["publish", "recipe.yaml"], ""),
    "no card": (without("export/draft/README.md"), ["publish", "recipe.yaml"], "README.md is missing"),
    "a damaged draft": (
        flipped("export/draft/model.safetensors"),
        ["serve", "recipe.yaml", "--print"],
        "changed since",
    ),
    "a damaged draft to publish": (flipped(WEIGHTS), ["publish", "recipe.yaml"], ""),
    "no taps": (unnamed_taps, ["serve", "recipe.yaml", "--print"], ""),
    "no probe": (without(), ["predict", "recipe.yaml"], "no probe"),
    "no checkpoints": (without("train"), ["export", "recipe.yaml"], ""),
    "nothing before it": (without(*STAGES[:4]), ["train", "recipe.yaml"], ""),
    "no prompts to compare": (without("prompts"), ["compare", "recipe.yaml", *SHORT, "--drafts", "theirs"], "missing"),
    "other prompts": (without(), ["train", "recipe.yaml", "--prompts.held-out", "3"], "`prompts` has to run before it"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_that_is_advised_mends_it(world, call, case):
    prepare, words, message = COMMANDS[case]
    shutil.copytree(world / "run" / "export" / "draft", world / "theirs")
    prepare(world)
    flags = words[2:] if "--prompts.held-out" in words else []
    code, told = call(*words)
    assert code == 2
    assert message in told
    for _ in range(4):
        advised = ADVISED.search(told)
        assert advised, told
        command, _, more = advised.groups()
        code, told = call(command, "recipe.yaml", *shlex.split(more), *flags)
        assert code == 0, told
        code, told = call(*words)
        if code == 0:
            break
    assert code == 0, told


KEYS = {
    "a row that cannot be read": (["run", "recipe.yaml", "--prompts.sources", "bad.jsonl"], ["--prompts.skip-bad"]),
    "no repository": (["publish", "recipe.yaml", "--card.repo", ""], ["--repo", "owner/name"]),
    "no such repository": (["publish", "recipe.yaml", "--repo", "name"], ["--repo", "owner/name"]),
    "a tau beyond its shape": (
        ["predict", "recipe.yaml", "--hardware", "h100-1", "--tau", "5", "--shape", "3/4/8"],
        ["--tau", "2.6", "--shape", "3/4/8"],
    ),
    "no accept length": (
        ["predict", "recipe.yaml", "--hardware", "h100-1", "--out", "new"],
        ["--tau", "2.6", "--shape", "3/4/8"],
    ),
    "an unknown machine": (["predict", "recipe.yaml", "--hardware", "h1000"], ["--hardware", "h100-1"]),
    "a temperature that was not measured": (
        ["predict", "recipe.yaml", "--hardware", "h100-1", "--temperature", "0.5"],
        ["--tau", "2.6"],
    ),
    "no repository in the recipe": (["publish", "recipe.yaml", "--card.repo", ""], ["--card.repo", "owner/name"]),
    "a target of no name": (["card", "recipe.yaml", "--card.base-model", "none"], ["--card.base-model", "owner/name"]),
    "a target of no licence": (["card", "recipe.yaml", "--card.licence", "none"], ["--card.licence", "other"]),
    "a place that is none": (["prompts", "recipe.yaml", "--out", "prompts.jsonl/x"], ["--out", "new"]),
    "one draft to compare": (["compare", "recipe.yaml", *SHORT], ["--drafts", "theirs"]),
    "data that are not there": (
        ["init", "model", "--out", "made.yaml", "--data", "none.jsonl"],
        ["--data", "prompts.jsonl"],
    ),
    "a place that cannot be written": (
        ["predict", "recipe.yaml", "--hardware", "h100-1", "--tau", "2.2", "--out", "blocked"],
        ["--out", "new"],
    ),
    "its own draft to go on from": (
        ["run", "recipe.yaml", "--from", "run/export/draft", "--out", "run"],
        ["--out", "new"],
    ),
    "trees on vLLM": (
        ["serve", "recipe.yaml", "--print", "--serve.engine", "vllm", "--serve.shape", "3/4/8"],
        ["--serve.shape", "3/1/4"],
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_the_key_that_is_named_mends_it(world, call, case):
    words, mended = KEYS[case]
    (world / "bad.jsonl").write_text((world / "prompts.jsonl").read_text() + "{}\n")
    shutil.copytree(world / "run" / "export" / "draft", world / "theirs")
    (world / "blocked").mkdir()
    (world / "blocked" / "predict").touch()
    code, told = call(*words)
    assert code == 2
    named = mended[0].removeprefix("--").replace("-", "_")
    assert mended[0] in told or named in told.replace("-", "_"), told
    for flag in mended[::2]:
        if flag in words:
            at = words.index(flag)
            words = words[:at] + words[at + 2 :]
    code, told = call(*words, *mended)
    assert code == 0, told


def test_of_two_taps_lists_in_one_draft_one_may_be_said_to_be_right(world, call):
    config = world / "run" / "export" / "draft" / "config.json"
    values = read_json(config)
    inputs = values["eagle_aux_hidden_state_layer_ids"] = [1, 3, 4]
    values["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [2, 3, 4]}
    values.pop("draftsmith")
    write_json(config, values)
    draft = world / "theirs"
    shutil.copytree(config.parent, draft)
    words = ["compare", "recipe.yaml", "--drafts", str(draft)]
    code, told = call(*words)
    assert (code, "--taps inputs" in told) == (2, True), (inputs, told)
    code, told = call(*words, "--taps", "inputs")
    assert code == 0, told
    words = ["run", "recipe.yaml", "--from", str(draft), "--out", "after"]
    code, told = call(*words)
    assert (code, "delete the wrong ones" in told) == (2, True), told
    values.pop("eagle_config")
    write_json(draft / "config.json", values)
    code, told = call(*words)
    assert code == 0, told


def test_an_existing_recipe_is_kept_and_another_place_is_taken(world, call):
    before = (world / "recipe.yaml").read_text()
    code, told = call("init", "model", "--out", "recipe.yaml")
    assert (code, "give another --out" in told) == (2, True), told
    assert call("init", "model", "--out", "other.yaml") == (0, call("init", "model", "--out", "third.yaml")[1])
    assert (world / "recipe.yaml").read_text() == before


def test_a_stage_is_made_anew_by_the_command_that_is_told(world, call):
    before = (world / "run" / WEIGHTS).read_bytes()
    code, told = call("vocab", "recipe.yaml", "--redo", "export")
    command, _, more = ADVISED.search(told).groups()
    assert (code, call(command, "recipe.yaml", *more.split())[0]) == (2, 0), told
    assert (world / "run" / "export.redo" / "draft" / "model.safetensors").read_bytes() == before
    assert (world / "run" / WEIGHTS).read_bytes() == before


def test_a_damaged_draft_is_exported_again_as_the_check_says(world, call):
    """Damaged so that its size and time are as they were."""
    path = world / "run" / WEIGHTS
    status, before = path.stat(), path.read_bytes()
    flipped(WEIGHTS)(world)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert call("export", "recipe.yaml", "--check", "vllm", "--serve.program", sys.executable)[0] == 1
    command, _, more = ADVISED.search(call.err.replace("again:", "anew:")).groups()
    assert call(command, "recipe.yaml", *more.split())[0] == 0, call.err
    assert path.read_bytes() == before


def test_a_directory_that_is_written_is_waited_for_or_another_is_given(world, call):
    with RunLock(world / "run"):
        code, told = call("prompts", "recipe.yaml")
        flag = read(r"^draftsmith: (--\w+): .* by process \d+; wait for it, or give another --out$", told)
        assert code == 2
        assert call("prompts", "recipe.yaml", flag, "new")[0] == 0
    assert call("prompts", "recipe.yaml")[0] == 0


def test_a_file_system_that_cannot_lock_is_left_as_it_is_told(world, call, monkeypatch):
    lock = lock_module.fcntl.flock

    def flock(file, how):
        if Path(file.name).parent.name == "run":
            raise OSError(errno.ENOLCK, "No locks available")
        lock(file, how)

    monkeypatch.setattr(lock_module.fcntl, "flock", flock)
    code, told = call("prompts", "recipe.yaml")
    flag = read(r"^draftsmith: (--\w+): .*; give an --out on another$", told)
    assert (code, call("prompts", "recipe.yaml", flag, "new")[0]) == (2, 0)


def test_a_directory_that_was_taken_away_is_written_by_the_same_command(world, call, monkeypatch):
    def taken(self):
        (self.root / ".lock").unlink()
        monkeypatch.undo()
        monkeypatch.chdir(world)
        return self.require()

    monkeypatch.setattr(RunLock, "require", taken)
    command = ["prompts", "recipe.yaml", "--prompts.held-out", "3"]
    code, told = call(*command)
    assert read(r"was taken by another process meanwhile; run the (same) command again to go on$", told)
    assert (code, call(*command)[0]) == (2, 0)


def test_a_tracker_that_is_not_installed_is_left_out(world, call, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else find(name))
    code, told = call("train", "recipe.yaml", "--train.track", "trackio")
    key = read(r"^draftsmith: (train\.\w+): trackio given, .*, or leave it out$", told)
    assert (code, call("train", "recipe.yaml", f"--{key}", "none")[0]) == (2, 0)


def test_an_export_is_checked_with_the_target_that_is_told_to_be_given(world, call):
    words = ["export", "recipe.yaml", "--check", "vllm", "--serve.program", "no-such"]
    told = call(*words, "--target.engine", "vllm", "--server.urls", "http://127.0.0.1:9")[1]
    flag, value = read(r"where it fits, give (--\S+) (\w+), else use: draftsmith evaluate RECIPE$", told)
    assert call(*words, flag, value)[1].startswith("draftsmith: serve.program: 'no-such' is not on this machine")


def test_taps_that_an_engine_cannot_capture_serve_on_the_others(world, call):
    def made(first):
        for command in ("train", "export"):
            taps = ["--draft.taps", first, "3", "4", "--train.max-steps", "1"]
            assert call(command, "recipe.yaml", *taps)[0] == 0
        export = call.err
        return export, {e: call("serve", "recipe.yaml", "--print", "--serve.engine", e) for e in ("sglang", "vllm")}

    export, served = made("0")
    able, first = read(r"so the draft serves on (\w+) alone; taps from (\d) on serve on all", export)
    assert {engine for engine, (code, _) in served.items() if code == 0} == {able.lower()}
    assert served["sglang"][1].endswith(f"so the draft serves on {able}")
    assert {code for code, _ in made(first)[1].values()} == {0}


HELD = {  # key that what a stage holds at once grows with: (command, what asks for memory, how much of it there is)
    "regenerate.batch_size": ("regenerate", "draftsmith.targets.local.LocalTarget.generate", 2),
    "train.pack_tokens": ("train", "draftsmith.training.trainer.Trainer._optimiser_step", 64),
    "train.max_document_tokens": ("train", "draftsmith.training.trainer.Trainer._optimiser_step", 32),
}


@pytest.mark.parametrize("key", HELD)
def test_a_stage_without_memory_goes_on_where_the_key_that_is_named_is_smaller(world, call, monkeypatch, key):
    command, place, most = HELD[key]
    module, kind, name = place.rsplit(".", 2)
    owner = getattr(importlib.import_module(module), kind)
    whole = getattr(owner, name)

    def short(self, *arguments, **options):
        wanted = self.batch_size if key.startswith("regenerate") else getattr(self.settings, key.split(".")[1])
        if wanted > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(place, short)
    words = [command, "recipe.yaml", "--redo", command, "--train.max-steps", "2"]
    code, told = call(*words)
    assert code == 2
    assert told.startswith(f"draftsmith: {command}: CUDA out of memory")
    lower = dict(re.findall(r"([a-z]+\.[a-z_]+) \(now (\d+)\)", told))
    assert int(lower[key]) > most
    code, told = call(command, "recipe.yaml", "--train.max-steps", "2", f"--{key}", str(most))
    assert code == 0, told


def test_data_whose_licence_is_not_stated_is_given_one(world, call):
    code, told = call("card", "recipe.yaml")
    source, key = read(r"^card: the licence of (\S+) is not stated; set (card\.\w+)$", told)
    code, told = call("card", "recipe.yaml", f"--{key}", f"{{{source}: mit}}")
    assert (code, "not stated" in told) == (0, False), told
    assert "not stated" not in (world / "run" / "export" / "draft" / "README.md").read_text()


def test_a_temperature_is_added_as_it_is_told(world, call):
    words = ["predict", "recipe.yaml", "--hardware", "h100-1", "--temperature", "0.5"]
    key = read(r"or add it to (evaluate\.\w+)$", call(*words)[1])
    assert call("evaluate", "recipe.yaml", *SHORT, f"--{key}", "0", "0.5")[0] == 0
    code, told = call(*words)
    assert code == 0, told


def test_an_evaluation_of_another_draft_is_moved_away_as_it_is_told(world, call):
    shutil.copytree(world / "run" / "evaluate", world / "run" / "evaluate-vllm")
    path = world / "run" / "evaluate-vllm" / "results.json"
    values = read_json(path)
    values["settings"]["draft"] = "0" * 16
    write_json(path, values)
    assert call("card", "recipe.yaml")[0] == 0
    other = read(r"(\S+) is of another draft and left out; evaluate it again, or move its directory away", call.err)
    (world / other).parent.rename(world / "away")
    assert call("card", "recipe.yaml")[0] == 0
    assert "another draft" not in call.err


def test_a_probe_is_made_as_it_is_told(world, call):
    write_json(world / "x.json", {"a": 1})
    code, told = call("predict", "recipe.yaml", "--hardware", "x.json")
    assert (code, ADVISED.search(told)[1]) == (2, "probe"), told
    assert call("probe", "recipe.yaml")[0] == 0
    made = world / "run" / "probe.json"
    assert call("predict", "recipe.yaml", "--hardware", made)[0] == 0
    # of a server: no machine to plan for
    known = Probe.load(made)
    known.model_copy(update={"rates": None}).save(world / "x.json")
    code, told = call("plan", "recipe.yaml", "--hardware", "x.json")
    flag = read(r"^draftsmith: (--\w+): a plan needs a probe of a machine, not of .*; or one by name$", told)
    for machine in (made, "h100-1"):
        assert call("plan", "recipe.yaml", flag, machine)[0] == 0


def test_tuning_is_given_the_time_or_the_length_that_it_is_told_to_be_given(world, call, monkeypatch):
    words = ["tune", "recipe.yaml", *SHORT, "--evaluate.prompts", "1"]
    for wrong in (["--budget-s", "0.001"], ["--evaluate.max-new-tokens", "2"]):
        code, told = call(*words, *wrong)
        flag, key, least = read(r"; raise (--\S+), or (evaluate\.\w+), as answers of less than (\d+) tokens", told)
        assert code == 2
        assert wrong[0] in (flag, f"--{key.replace('_', '-')}")
    monkeypatch.setattr(tuning, "FIRST_PROMPTS", 1)
    code, told = call(*words, flag, "10", f"--{key}", str(2 * int(least)))
    assert code == 0, told
    # what was tuned is of another draft, or not wanted
    path = world / "run" / "tune-embedded.json"
    tuned, fast = Tuned.load(path), Tried(shape=Shape(2, 1, 3), speedup=9.0, prompts=64)
    serve = ["serve", "recipe.yaml", "--print"]
    tuned.model_copy(update={"tried": [fast], "best": fast}).save(path)
    assert call(*serve)[0] == 0
    assert '"num_speculative_tokens": 2' in call.out
    flag, shape = read(r"; (--\S+) keeps (\S+)", call.err)
    assert call(*serve, flag)[0] == 0
    assert f'"num_speculative_tokens": {shape[0]}' in call.out
    tuned.model_copy(update={"draft": "another"}).save(path)
    assert call(*serve)[0] == 0
    assert ADVISED.search(call.err)[1] == "tune", call.err
    assert call(*words, "--budget-s", "10", f"--{key}", str(2 * int(least)))[0] == 0
    assert call(*serve)[0] == 0
    assert "another draft" not in call.err


def test_a_step_that_cannot_be_dealt_out_is_given_as_it_is_told(world, call):
    words = ["plan", "recipe.yaml", "--hardware", "h100-1", "--trainer-gpus", "3", "--train.accumulate", "4"]
    assert call(*words)[0] == 0
    flag, count = read(r"cannot be dealt out to 3 trainers: give (--\S+) (\d+), as planned here", call.out)
    assert call(*words[:-2], flag, count)[0] == 0
    assert "cannot be dealt out" not in call.out


def test_a_draft_that_no_card_can_be_of_is_inspected_as_it_is_told(world, call):
    config = world / "run" / "export" / "draft" / "config.json"
    write_json(config, read_json(config) | {"num_hidden_layers": 2})
    code, told = call("card", "recipe.yaml")
    assert code == 2
    problem, command = read(r": (num_hidden.*); see: draftsmith (.*)$", told)
    assert call(*command.split())[0] == 1
    assert f"problem: {problem}" in call.out


LARGE = ["plan", str(RECIPES / "qwen3-8b-eagle3.yaml"), "--hardware", "h100-1"]


@pytest.mark.parametrize("wrong", ["--regenerate.batch-size", "--train.pack-tokens"])
def test_what_does_not_fit_fits_where_the_key_that_is_named_is_smaller(world, call, wrong):
    assert call(*LARGE, wrong, "1000000")[0] == 0
    key = read(r"DOES NOT FIT: a smaller ([\w.]+)", call.out)
    assert f"--{key.replace('_', '-')}" == wrong
    assert call(*LARGE, f"--{key}", "8")[0] == 0
    assert "DOES NOT FIT" not in call.out


def test_the_commands_that_init_and_the_report_print_are_commands(world, call):
    assert call("init", "model", "--out", "made.yaml")[0] == 0
    for line in read(r"next:   (.*)\n        (.*)", call.out):
        for command in line.split(" && "):
            words = shlex.split(command)
            assert words[0] == "draftsmith"
            if words[1] in ("probe", "plan"):
                words += ["--out", "made", "--regenerate.max-prompt-tokens", "90"]
                assert call(*words[1:])[0] == 0, call.err
            else:
                assert cli.parse(words[1:])[1].target.model == "model"
    # what its comments offer for the card makes one
    text = (world / "made.yaml").read_text()
    offered = re.search(r"^# card:\n(#   .*\n)+", text, re.MULTILINE)[0]
    (world / "made.yaml").write_text(text + re.sub("^# ", "", offered, flags=re.MULTILINE))
    made = load_recipe(world / "made.yaml")
    assert licence_of(base_model(made), made.card.licence)
    page = html.unescape((world / "run" / "report.html").read_text())
    commands = re.findall(r"draftsmith (\w+ \S+recipe\.yaml --out \S+ --train[^<\n]*)", page)
    assert commands
    for words in map(shlex.split, commands):
        assert cli.parse(words)[1].train.epochs > load_recipe(world / "recipe.yaml").train.epochs
