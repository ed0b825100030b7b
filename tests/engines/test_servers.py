"""Real vLLM and SGLang servers as targets, with a network between that fails."""

import contextlib
from pathlib import Path

import pytest
import torch
from engine import BUILDERS, engine_program, free_port, save_target
from models import local_target, tiny_recipe, write_prompts
from servers import FaultyServer, forward, serving

from draftsmith.core import run_files
from draftsmith.core.errors import TargetError
from draftsmith.core.files import read_json, write_json
from draftsmith.core.records.data import Prompt
from draftsmith.core.records.training import MetricsRow
from draftsmith.core.shape import Shape
from draftsmith.data.regenerate import Regeneration, read_completions
from draftsmith.data.templates import ChatFormat
from draftsmith.engines import SERVERS
from draftsmith.engines.process import running
from draftsmith.engines.served import ServedTarget
from draftsmith.runs import probing
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.probing import probe_server
from draftsmith.runs.run import Run
from draftsmith.runs.stages import STAGES

pytestmark = pytest.mark.engines
TAPS = (2, 4, 5)
EXTRA = {"vllm": "--enforce-eager --max-num-seqs 16", "sglang": "--log-level warning"}


@contextlib.contextmanager
def started(engine: str, model: str, purpose: str, folder: Path):
    """URL of a real server."""
    serve = {"engine": engine, "program": engine_program(engine), "port": free_port(), "context": 512}
    serve |= {"extra": EXTRA[engine], "states": str(folder), "patience_s": 300.0}
    launched = SERVERS[engine].launch(tiny_recipe(model, "p", serve=serve), model, Path("none"), purpose, (*TAPS, 8))
    log = folder / f"{engine}.log"
    with running(launched, 300.0, log):
        yield launched.url


def recipe_for(model: str, prompts: str, urls: list[str], engine: str, **changes):
    changes = {
        "prompts.sources": [{"name": prompts}],
        "target.engine": engine,
        "draft.taps": list(TAPS),
        "draft.head_dim": 64,
        "server": {"urls": urls, "concurrency": 8, "attempts": 16, "backoff_s": 0.05, "deadline_s": 60.0},
    } | changes
    return tiny_recipe(model, prompts, **changes)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_real_server_behind_a_bad_network_regenerates_all_and_nothing_twice(engine, tmp_path):
    model, prompts = save_target(tmp_path / "model"), write_prompts(tmp_path / "prompts.jsonl", 40)

    def fault(n):
        return {1: 503, 3: "drop", 5: "torn"}.get(n % 7)

    def die(n):
        replicas[1].dead = n >= 6

    with started(engine, model, "plain", tmp_path) as url:
        replicas = [FaultyServer(forward(url), fault), FaultyServer(forward(url), die)]
        with serving(*replicas) as urls:
            recipe = recipe_for(model, prompts, urls, engine, **{"regenerate.temperature": 0.0})
            with contextlib.closing(Run(recipe, tmp_path / "run", ["test"])) as run:
                for stage in ("prompts", "regenerate", "vocab"):
                    run_pipeline(run, stage)
        assert replicas[1].dead
        sampled = recipe_for(model, prompts, [url], engine, **{"regenerate.greedy_share": 0.5})
        with contextlib.closing(Run(sampled, tmp_path / "sampled", ["test"])) as drawn:
            for stage in ("prompts", "regenerate"):
                run_pipeline(drawn, stage)
    rows = list(read_completions(run.files.completions))
    asked = run.files.training_prompts
    assert sorted(r.id for r in rows) == sorted(prompt.id for prompt in Prompt.read_rows(asked))
    target = local_target(model)
    Regeneration(recipe, target, ChatFormat(target.tokenizer, None), asked, tmp_path / "wanted").run()
    wanted = {r.id: r for r in read_completions(tmp_path / "wanted")}
    assert rows == [wanted[r.id] for r in rows]  # ids, spans and finish reasons
    assert {r.finish_reason for r in rows} == {"eos", "length"}
    some = list(read_completions(drawn.files.completions))
    greedy = [r for r in some if r.sampling[0] == 0.0]
    assert 0 < len(greedy) < len(some)
    assert greedy == [wanted[r.id] for r in greedy]
    assert any(r.ids != wanted[r.id].ids for r in some)


def check_states(model: str, served_by) -> None:
    """What servers return is what transformers computes, and a tap off by one cannot pass."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(6, 64, (n,), generator=generator).tolist() for n in (40, 7, 130, 1, 64)]
    target = local_target(model)
    engine = SERVERS[served_by.target.engine]
    with contextlib.closing(ServedTarget(served_by.target, served_by.server, engine, "cpu")) as served:
        got = served.capture(documents, TAPS)
        assert served.logprobs(documents[0]) == pytest.approx(target.logprobs(documents[0]), abs=1e-3)
    wanted = target.capture(documents, TAPS)
    scale = wanted.taps_TKH.abs().max()
    assert (got.taps_TKH - wanted.taps_TKH).abs().max() < 1e-4 * scale
    assert (got.last_TH - wanted.last_TH).abs().max() < 1e-4 * wanted.last_TH.abs().max()
    shifted = target.capture(documents, tuple(tap + 1 for tap in TAPS))
    assert (got.taps_TKH - shifted.taps_TKH).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("architecture", BUILDERS)
def test_states_from_a_stock_vllm_are_those_of_transformers(architecture, tmp_path):
    model = save_target(tmp_path / "model", architecture)
    with started("vllm", model, "capture", tmp_path) as url:
        check_states(model, recipe_for(model, "p", [url], "vllm"))
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("architecture", BUILDERS)
def test_states_from_two_sglangs_are_those_of_transformers(architecture, tmp_path):
    model = save_target(tmp_path / architecture, architecture)
    if architecture == "gemma3":  # the tier's stand-in kernels know no sliding window: one longer than every text
        config = Path(model) / "config.json"
        write_json(config, read_json(config) | {"sliding_window": 512})
    with started("sglang", model, "capture", tmp_path) as url, started("sglang", model, "last", tmp_path) as last:
        check_states(model, recipe_for(model, "p", [url], "sglang", **{"server.last_urls": [last]}))


def test_training_from_a_server_equals_training_in_process(tmp_path):
    model, prompts = save_target(tmp_path / "model"), write_prompts(tmp_path / "prompts.jsonl", 40)
    with started("vllm", model, "capture", tmp_path) as url:
        # A second replica that dies in mid-training: the same server behind a network that ends.
        def die(n):
            mortal.dead = n >= 30

        mortal = FaultyServer(forward(url), die)
        with serving(mortal) as urls:
            recipe = recipe_for(model, prompts, [url, *urls], "vllm")
            with contextlib.closing(Run(recipe, tmp_path / "run", ["test"])) as run:
                for stage in ("prompts", "regenerate", "vocab", "train", "export"):
                    run_pipeline(run, stage)
        assert mortal.dead
    assert not list(tmp_path.glob("*.safetensors"))
    served = run.files.train.rename(tmp_path / "run" / "train-served")
    alone = Run(recipe_for(model, prompts, [], "transformers"), tmp_path / "run", ["test"])
    alone.files.train.mkdir()
    next(stage for stage in STAGES if stage.name == "train").run(alone, alone.files.train)
    curves = [list(MetricsRow.read_rows(train / run_files.METRICS)) for train in (served, alone.files.train)]
    losses = [[row.loss for row in curve if row.loss is not None] for curve in curves]
    assert len(losses[0]) >= 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_is_probed_from_outside(engine, tmp_path, monkeypatch):
    for name, value in {"AT_ONCE": (1, 4), "DRAFTED_AT": (1,), "SERVER_ROUNDS": 1}.items():
        monkeypatch.setattr(probing, name, value)
    model, prompts = save_target(tmp_path / "model"), write_prompts(tmp_path / "prompts.jsonl", 40)
    with started(engine, model, "plain", tmp_path) as url:
        run = Run(recipe_for(model, prompts, [url], engine), tmp_path / "run", ["test"])
        probe = probe_server(run, engine, url, None, Shape(3, 1, 4))
        with pytest.raises(TargetError, match="tells nothing of drafting"):
            probe_server(run, engine, url, url, Shape(3, 1, 4))
    assert [tokens for tokens, _ in probe.times.forward] == [1, 4]
    assert all(0 < seconds < 5 for _, seconds in probe.times.forward)
    assert probe.times.draft is None
