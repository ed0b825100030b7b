"""Real vLLM and SGLang servers as targets, with a network between that fails."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from engine import BUILDERS, engine_program, free_port, save_target
from models import tiny_recipe, write_prompts
from servers import FaultyServer, forward, serving

from draftsmith.data.regenerate import answer, open_conversations, read_completions
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.sampling import Sampling
from draftsmith.errors import TargetError
from draftsmith.files import read_json, read_jsonl, write_json
from draftsmith.hardware.probe import probe_server
from draftsmith.pipeline import run_pipeline
from draftsmith.run import Run
from draftsmith.serving.launch import launch, running
from draftsmith.targets.local import LocalTarget
from draftsmith.targets.servers import ServedTarget

pytestmark = pytest.mark.engines
TAPS = (2, 4, 5)
EXTRA = {"vllm": "--enforce-eager --max-num-seqs 16", "sglang": "--log-level warning"}


@contextlib.contextmanager
def started(engine: str, model: str, purpose: str, folder: Path):
    """URL of a real server."""
    serve = {"engine": engine, "program": engine_program(engine), "port": free_port(), "context": 512}
    serve |= {"extra": EXTRA[engine], "states": str(folder), "patience_s": 300.0}
    launched = launch(tiny_recipe(model, "p", serve=serve), model, Path("none"), purpose, (*TAPS, 8))
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
        with contextlib.closing(Run(sampled, tmp_path / "sampled", ["test"])) as run:
            for stage in ("prompts", "regenerate"):
                run_pipeline(run, stage)
    rows = list(read_completions(tmp_path / "run" / "completions"))
    asked = list(read_jsonl(tmp_path / "run" / "prompts" / "prompts.jsonl"))
    assert sorted(r["id"] for r in rows) == sorted(r["id"] for r in asked)
    target = LocalTarget(model, dtype="fp32", device="cpu")
    chat = ChatFormat(target.tokenizer, None)
    opened = open_conversations(asked, chat, recipe.regenerate.max_prompt_tokens)
    wanted = {r["id"]: r for _, r in answer(opened, target, chat, recipe.regenerate, Sampling(), 0) if r}
    assert rows == [wanted[r["id"]] for r in rows]  # ids, spans and finish reasons
    assert {r["finish_reason"] for r in rows} == {"eos", "length"}
    some = list(read_completions(tmp_path / "sampled" / "completions"))
    greedy = [r for r in some if r["sampling"][0] == 0.0]
    assert 0 < len(greedy) < len(some)
    assert greedy == [wanted[r["id"]] for r in greedy]
    assert any(r["ids"] != wanted[r["id"]]["ids"] for r in some)


def check_states(model: str, served_by) -> None:
    """What servers return is what transformers computes, and a tap off by one cannot pass."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(6, 64, (n,), generator=generator).tolist() for n in (40, 7, 130, 1, 64)]
    target = LocalTarget(model, dtype="fp32", device="cpu")
    with contextlib.closing(ServedTarget(served_by.target, served_by.server, "cpu")) as served:
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
    served = [json.loads(line) for line in (tmp_path / "run" / "train" / "metrics.jsonl").read_text().splitlines()]
    (tmp_path / "run" / "train").rename(tmp_path / "run" / "train-served")
    local = recipe_for(model, prompts, [], "transformers")
    run = Run(local, tmp_path / "run", ["test"])
    (tmp_path / "run" / "train").mkdir()
    from draftsmith.pipeline import _train

    _train(run, tmp_path / "run" / "train")
    own = [json.loads(line) for line in (tmp_path / "run" / "train" / "metrics.jsonl").read_text().splitlines()]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (served, own)]
    assert len(losses[0]) >= 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_is_probed_from_outside(engine, tmp_path):
    model = save_target(tmp_path / "model")
    with started(engine, model, "plain", tmp_path) as url:
        parts = probe_server(url, engine, [[5, 6, 7, 8], [9, 10, 11]], "", concurrencies=(1, 4), rounds=1)
        with pytest.raises(TargetError, match="tells nothing of drafting"):
            probe_server(url, engine, [[5, 6, 7, 8]], "", draft_url=url, concurrencies=(1,), rounds=1)
    assert [tokens for tokens, _ in parts["forward"]] == [1, 4]
    assert all(0 < seconds < 5 for _, seconds in parts["forward"])
    assert parts["draft"] is None
