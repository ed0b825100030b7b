"""probe, predict, tune, compare, card and publish on a tiny run, as a user types them."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from models import save_tiny_target, tiny_recipe, write_prompts

import draftsmith
from draftsmith import cli
from draftsmith.core.errors import RecipeError
from draftsmith.core.recipe_file import dump_recipe
from draftsmith.core.records.evaluation import Comparison, Results
from draftsmith.core.records.machine import Predictions, Probe, Tried, Tuned
from draftsmith.core.run_files import RunFiles
from draftsmith.core.shape import Shape
from draftsmith.data.licences import data_licences, licence_of
from draftsmith.runs import probing as probe

EXAMPLE = Path(__file__).parents[2] / "examples" / "from_python.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished tiny run, probed."""
    out = tmp_path_factory.mktemp("world")
    model = save_tiny_target(out / "model")
    reference = {"evaluate.top_p": 0.95, "evaluate.top_k": 40}  # as MiniMax-M2.7 is served
    recipe = tiny_recipe(model, write_prompts(out / "prompts.jsonl"), **reference)
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    patch = pytest.MonkeyPatch()
    patch.setattr(probe, "ROUNDS", 2)
    patch.setattr(probe, "WIDTHS", (1, 2, 3, 4, 8))
    patch.setattr(probe, "CONTEXT", 16)
    patch.setattr(probe, "LONG_CONTEXT", 48)
    patch.setattr(probe, "LOOP_TOKENS", 8)
    for command in ("run", "probe"):
        patch.setattr(sys, "argv", ["draftsmith", command, str(out / "recipe.yaml"), "--out", str(out / "run")])
        assert cli.main() == 0
    patch.undo()
    return out


def run(monkeypatch, capsys, world, command, *flags):
    arguments = [command, world / "recipe.yaml", "--out", world / "run", *flags]
    monkeypatch.setattr(sys, "argv", ["draftsmith", *map(str, arguments)])
    code = cli.main()
    return code, capsys.readouterr()


def files(world):
    return RunFiles(world / "run")


def test_predict_tells_of_the_probed_machine(monkeypatch, capsys, world):
    code, told = run(monkeypatch, capsys, world, "predict")
    assert code == 0, told.err
    result = Predictions.load(files(world).prediction("probe"))
    assert {row.batch for row in result.rows} == {1}
    assert result.sentence
    assert result.sentence in told.out
    assert (world / "run" / "predict" / "probe.svg").read_text().lstrip().startswith("<?xml")


def test_predict_tells_of_a_named_machine_and_a_published_tau(monkeypatch, capsys, world):
    flags = ("--hardware", "h100-1", "--tau", "2.2", "--shape", "3/1/4", "--batches", "1", "64")
    code, told = run(monkeypatch, capsys, world, "predict", *flags)
    assert code == 0, told.err
    rows = Predictions.load(files(world).prediction("h100-1")).rows
    assert [row.tau for row in rows if row.shape == Shape(3, 1, 4)] == pytest.approx([2.2, 2.2], abs=1e-4)
    assert {row.batch for row in rows} == {1, 64}


def test_tune_measures_and_serve_takes_it(monkeypatch, capsys, world):
    code, told = run(monkeypatch, capsys, world, "tune", "--budget-s", "30")
    assert code == 0, told.err
    path = files(world).tuned("embedded")
    result = Tuned.load(path)
    assert result.temperature == 1
    chains = {drafts for tried in result.tried if tried.shape.topk == 1 for drafts in [tried.drafts]}
    assert chains == {"greedy", "sampled"}, "both ways are measured"
    assert result.best is None or result.best in result.tried
    assert "T=1" in told.out or "nothing beats plain decoding" in told.out

    def serve(*flags):
        code, told = run(monkeypatch, capsys, world, "serve", "--print", *flags)
        assert code == 0, told.err
        return told.out + told.err

    tree, greedy, sampled = (
        Tried(shape=Shape.parse(shape), drafts=drafts, speedup=speedup, prompts=8)
        for shape, drafts, speedup in (("5/4/16", "greedy", 1.5), ("4/1/5", "greedy", 1.3), ("5/1/6", "sampled", 1.6))
    )
    result.model_copy(update={"best": sampled, "tried": [sampled, tree, greedy]}).save(path)
    drawn = '"num_speculative_tokens": 5, "draft_sample_method": "probabilistic"'
    assert drawn in serve()
    assert drawn in serve("--serve.draft-sampling", "sampled")
    told = serve("--serve.draft-sampling", "greedy")
    assert '"num_speculative_tokens": 4}' in told
    told = serve("--serve.engine", "sglang")  # whose draft vocabulary is to be whole
    assert "--speculative-num-draft-tokens 16" in told
    assert "rejection" not in told
    assert '"num_speculative_tokens": 3' in serve("--no-serve.tuned")
    assert '"num_speculative_tokens": 2' in serve("--serve.shape", "2/1/3")
    # whichever way evaluate saw accepted more
    faster = greedy.model_copy(update={"speedup": 1.7})
    result.model_copy(update={"best": faster, "tried": [faster, sampled]}).save(path)
    assert '"num_speculative_tokens": 4}' in serve()
    # at temperature 0 the shape alone is measured
    cold = [tried.model_copy(update={"drafts": "greedy"}) for tried in (sampled, tree, greedy)]
    result.model_copy(update={"temperature": 0.0, "best": cold[0], "tried": cold}).save(path)
    assert drawn in serve("--serve.draft-sampling", "sampled")
    result.model_copy(update={"best": None, "tried": [greedy.model_copy(update={"speedup": 0.9})]}).save(path)
    told = serve()
    assert "nothing beat plain decoding" in told
    assert '"num_speculative_tokens": 3' in told


def test_compare_sets_drafts_side_by_side(monkeypatch, capsys, world):
    shutil.copytree(files(world).draft, world / "other", dirs_exist_ok=True)
    code, told = run(monkeypatch, capsys, world, "compare", "--drafts", world / "other")
    assert code == 0, told.err
    rows = Comparison.load(files(world).comparison).drafts
    assert len(rows) == 2
    assert rows[0].acceptance[0].all == rows[1].acceptance[0].all  # the same draft twice
    assert 0 < rows[0].coverage <= 1
    assert "M parameters" in told.out
    kept = {path.parent for path in files(world).comparison.parent.glob("*/parts")}
    for flags in (("--regenerate.max-prompt-tokens", "500"), ("--serve.context", "100")):  # nothing old is told as new
        assert run(monkeypatch, capsys, world, "compare", "--drafts", world / "other", *flags)[0] == 0
        every = {path.parent for path in files(world).comparison.parent.glob("*/parts")}
        assert len(every) > len(kept)
        kept = every
    code, told = run(monkeypatch, capsys, world, "compare")
    assert code == 2
    assert "give others with --drafts" in told.err
    code, told = run(monkeypatch, capsys, world, "compare", "--drafts", world / "model")
    assert code == 2
    assert "no draft but a whole model" in told.err
    assert "tau 3/1/4" not in told.err, "told before any draft is measured"


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("predict", ("--hardware", "h200"), "--hardware: 'h200' given; a probe's JSON file or one of h100-nvlink-8"),
        ("predict", ("--tau", "9"), "--tau: 9 given; above 1 and below 4"),
        (
            "predict",
            ("--tau", "2", "--shape", "3-1"),
            "flags: --shape: '3-1' is no shape; write steps/topk/",
        ),
        ("predict", ("--batches", "0"), "flags: --batches.0: '0' given; input should be greater than 0"),
        ("predict", ("--correlation", "2"), "flags: --correlation: '2' given; input should be less than or equal to 1"),
        ("probe", ("--url", "http://127.0.0.1:9"), "--url: no server answers; http://127.0.0.1:9: "),
        ("probe", ("--draft-url", "http://127.0.0.1:9"), "--draft-url: give --url too"),
        ("tune", ("--target.engine", "vllm", "--engine", "embedded"), "--engine: embedded given; the target runs on"),
        (
            "compare",
            ("--target.engine", "vllm", "--drafts", "other"),
            "server.urls: none given; target.engine vllm needs at least one URL",
        ),
        (
            "plan",
            ("--prompts.sources", "/no.jsonl"),
            "prompts.sources: '/no.jsonl' is no file; allowed are",
        ),
        ("plan", ("--network-gbit", "0"), "flags: --network-gbit: '0' given; input should be greater than 0"),
        ("evaluate", ("--evaluate.url", "http://127.0.0.1:9"), "evaluate.url: given, but the embedded engine decodes"),
        ("publish", (), "publish: no repository given; set card.repo or give --repo owner/name"),
    ],
)
def test_wrong_input_is_one_line(monkeypatch, capsys, world, command, flags, message):
    code, told = run(monkeypatch, capsys, world, command, *flags)
    assert code == 2
    lines = [line for line in told.err.splitlines() if line.startswith("draftsmith: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(("command", "flags"), [("compare", ("--drafts", "other")), ("tune", ("--engine", "embedded"))])
def test_commands_that_decode_in_several_ways_say_that_no_server_is_asked(monkeypatch, capsys, world, command, flags):
    served = ("--target.engine", "vllm", "--evaluate.url", "http://127.0.0.1:9")
    code, told = run(monkeypatch, capsys, world, command, *served, *flags)
    assert code == 2, "no engine is started in this test"
    assert f"{command}: evaluate.url is not asked" in told.err


def test_a_machine_alone_is_probed_where_the_target_runs_on_servers(monkeypatch, capsys, world, tmp_path):
    for command, flags in (("probe", ()), ("predict", ("--tau", "2.2"))):
        arguments = [command, world / "recipe.yaml", "--out", tmp_path, "--target.engine", "vllm", *flags]
        monkeypatch.setattr(sys, "argv", ["draftsmith", *map(str, arguments)])
        assert cli.main() == 0
    told = capsys.readouterr().out
    assert re.search(r"target +runs on servers: give --url to measure one", told)
    alone = Probe.load(RunFiles(tmp_path).probe())
    assert alone.times is None
    assert alone.rates.bandwidth_bytes_s > 1e8
    assert {row.machine for row in Predictions.load(RunFiles(tmp_path).prediction("probe")).rows} == {alone.machine}


def test_serve_takes_drafts_as_they_are_accepted_more(monkeypatch, capsys, world):
    path = files(world).results["embedded"]
    measured = Results.load(path)
    greedy = next(e for e in measured.acceptance if e.shape == Shape(3, 1, 4) and e.how == "T=1")

    def served(sampled_tau: float, *flags: str) -> str:
        """What `serve --print` says where the chain's sampled drafts have this tau, greedy ones 1.5."""
        taus = {"greedy": 1.5, "sampled": sampled_tau}
        entries = [
            greedy.model_copy(update={"drafts": way, "all": greedy.all.model_copy(update={"tau": tau})})
            for way, tau in taus.items()
        ]
        measured.model_copy(update={"acceptance": entries}).save(path)
        code, told = run(monkeypatch, capsys, world, "serve", "--print", "--no-serve.tuned", *flags)
        assert code == 0, told.err
        return told.out + told.err

    try:
        assert "probabilistic" in served(1.6)
        assert "probabilistic" not in served(1.4)
        assert "probabilistic" in served(1.4, "--serve.draft-sampling", "sampled")
        assert "probabilistic" not in served(1.6, "--serve.draft-sampling", "greedy")
        assert "rejection" not in served(1.6, "--serve.engine", "sglang")
        refused = served(1.6, "--serve.engine", "sglang", "--serve.draft-sampling", "sampled")
        assert "rejection" not in refused
        assert "sampled given, but SGLang samples whole vocabularies only, and the draft's is 40 of 64" in refused
        tree = served(1.6, "--serve.engine", "sglang", "--serve.draft-sampling", "sampled", "--serve.shape", "3/4/8")
        assert "sampled given, but SGLang samples chains only" in tree
    finally:
        measured.save(path)


def test_predict_tells_of_warm_requests(monkeypatch, capsys, world):
    flags = ("predict", "--hardware", "h100-1", "--temperature", "1", "--serve.draft-sampling")
    code, told = run(monkeypatch, capsys, world, *flags, "sampled")
    assert code == 0, told.err
    assert "at T=1, top-p 0.95, top-k 40, sampled drafts" in told.out
    rows = Predictions.load(files(world).prediction("h100-1")).rows
    assert {row.shape.topk for row in rows} == {1}
    measured = Results.load(files(world).results["embedded"]).acceptance
    chain = next(e for e in measured if e.how == "T=1, sampled drafts")
    told_chain = next(row for row in rows if row.shape == chain.shape)
    assert told_chain.tau == pytest.approx(chain.all.tau)
    code, told = run(monkeypatch, capsys, world, *flags, "greedy", "--temperature", "0.3")
    assert code == 2
    assert "no tau at temperature 0.3, greedy drafts" in told.err


def test_a_tuned_shape_of_another_draft_is_left_out(monkeypatch, capsys, world):
    path = files(world).tuned("embedded")
    kept = Tuned.load(path)
    try:
        fast = Tried(shape=Shape(5, 1, 6), speedup=2.0, prompts=8)
        kept.model_copy(update={"tried": [fast], "draft": "another"}).save(path)
        _, served = run(monkeypatch, capsys, world, "serve", "--print")
        assert "of another draft or machine, so left out" in served.err
        assert '"num_speculative_tokens": 3' in served.out
    finally:
        kept.save(path)


def test_a_file_that_is_no_probe_is_refused(monkeypatch, capsys, world, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    code, told = run(monkeypatch, capsys, world, "predict", "--hardware", tmp_path / "x.json")
    assert code == 2
    assert "is not a probe" in told.err


def test_a_probe_of_another_target_or_draft_is_never_taken(monkeypatch, capsys, world, tmp_path):
    path = files(world).probe()
    made = Probe.load(path)
    assert (made.target, made.dtype) == (str(world / "model"), "fp32")
    assert made.draft["draft_vocab_size"]
    bf16 = ("--target.dtype", "bf16")
    code, told = run(monkeypatch, capsys, world, "predict", "--hardware", path, *bf16)
    assert code == 2
    assert f"--hardware: {path} measured target.dtype fp32, not bf16; make one of this target with: draft" in told.err
    code, told = run(monkeypatch, capsys, world, "predict", *bf16)
    assert code == 2
    assert "measured target.dtype fp32, not bf16, so it is left out; run: draftsmith probe RECIPE\n" in told.err
    assert "--hardware: no probe of this target in " in told.err
    try:
        wider = made.draft | {"draft_vocab_size": made.draft["draft_vocab_size"] + 1}
        for other in ({"target": "another"}, {"draft": wider}):
            made.model_copy(update=other).save(path)
            assert run(monkeypatch, capsys, world, "predict")[0] == 2
            code, told = run(monkeypatch, capsys, world, "card", *OURS)
            assert code == 0, told.err
            assert f"{path} {'timed a draft' if 'draft' in other else 'measured target.model another'}" in told.err
            assert made.machine not in {row.machine for row in Predictions.load(files(world).prediction("card")).rows}
        assert run(monkeypatch, capsys, world, "plan")[0] == 0, "which no draft's times go into"
        made.model_copy(update={"target": None, "dtype": None, "draft": None}).save(path)  # nobody tells
        assert run(monkeypatch, capsys, world, "predict", *bf16)[0] == 0
        made.model_copy(update={"times": None, "target": "another"}).save(path)  # the machine alone is good for all
        assert run(monkeypatch, capsys, world, "predict")[0] == 0
    finally:
        made.save(path)
        files(world).card.unlink(missing_ok=True)


# --- card ------------------------------------------------------------------------------------------------------------


def card_of(world):
    return files(world).card.read_text()


def test_a_target_of_unknown_licence_gets_no_card(monkeypatch, capsys, world):
    code, told = run(monkeypatch, capsys, world, "card")
    assert code == 2
    assert "card.base_model: target.model" in told.err
    code, told = run(monkeypatch, capsys, world, "card", "--card.base-model", "me/tiny")
    assert code == 2
    assert "card.licence: the licence of" in told.err
    assert not list((world / "run" / "export").rglob("README.md"))
    code, told = run(monkeypatch, capsys, world, "run")
    assert code == 0
    assert "card:   none yet; card.base_model" in told.out


OURS = ("--card.licence", "mit", "--card.base-model", "me/tiny")


@pytest.mark.parametrize(
    ("target", "identifier", "words"),
    [
        ("MiniMaxAI/MiniMax-M2.7", "other", "Built with MiniMax M2.7"),
        ("gemma3-270m", "gemma", "Gemma Terms of Use"),
        ("google/gemma-3-4b-it", "gemma", "ai.google.dev/gemma/terms"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1", "Built with Llama"),
        ("Qwen/Qwen3-8B", "apache-2.0", ""),
        ("deepseek-ai/DeepSeek-R1", "mit", ""),
    ],
)
def test_licences_are_inherited(target, identifier, words):
    licence = licence_of(target)
    assert licence.id == identifier
    assert words in " ".join(licence.notices)
    assert licence.commercial == (identifier != "other")


def test_the_minimax_card_names_its_terms():
    licence = licence_of("MiniMaxAI/MiniMax-M2.7")
    assert "api@minimax.io" in " ".join(licence.notices)
    with pytest.raises(RecipeError, match=r"card\.licence"):
        licence_of("somebody/some-model")
    assert licence_of("somebody/some-model", "mit").id == "mit"
    with pytest.raises(RecipeError, match="which a draft inherits: leave it out"):
        licence_of("MiniMaxAI/MiniMax-M2.7", "apache-2.0")
    assert "Gemma Terms of Use" in " ".join(licence_of("unsloth/gemma-3-4b-it", "gemma").notices)
    with pytest.raises(RecipeError):
        licence_of("mistralai/Mistral-Small-Instruct-2409")


def test_data_licences_are_listed_and_gaps_named():
    rows = data_licences(["gsm8k", "ours", "gsm8k"], {"ours": "cc0-1.0"})
    assert rows == [("gsm8k", "openai/gsm8k", "mit"), ("ours", "", "cc0-1.0")]
    assert data_licences(["theirs"], {}) == [("theirs", "", "not stated")]


# --- publish ---------------------------------------------------------------------------------------------------------


def test_publish_says_what_it_would_do(monkeypatch, capsys, world):
    assert run(monkeypatch, capsys, world, "card", *OURS)[0] == 0
    assert card_of(world).startswith("---\nbase_model: me/tiny\nlicense: mit\n")
    rows = Predictions.load(files(world).prediction("card")).rows
    assert {str(row.shape) for row in rows} == {"3/1/4", "3/4/8"}
    code, told = run(monkeypatch, capsys, world, "publish", "--repo", "me/draft")
    assert code == 0, told.err
    assert "would upload to me/draft" in told.out
    assert "model.safetensors" in told.out
    assert "stage.json" not in told.out


@pytest.mark.parametrize("repo", ["draft", "a/b/c", "../x", "me/"])
def test_a_wrong_repository_is_one_line(monkeypatch, capsys, world, repo):
    code, told = run(monkeypatch, capsys, world, "publish", "--repo", repo)
    assert code == 2
    assert "write owner/name" in told.err


def test_the_same_from_python(world):
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    text, tau = example.main(str(world / "recipe.yaml"), "w9 w20 w7", world / "run")
    assert text
    assert 1 <= tau <= 4
    results = draftsmith.evaluate(world / "recipe.yaml", world / "run")
    assert results == Results.load(files(world).results["embedded"])
    assert draftsmith.run(world / "recipe.yaml", world / "run").exists()
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        draftsmith.tune  # noqa: B018
