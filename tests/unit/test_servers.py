"""Regeneration against servers, with every fault a network and an engine can have."""

import contextlib
import itertools
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from models import local_target, save_tiny_target, tiny_recipe, tiny_target, write_prompts
from safetensors.torch import load_file, save_file
from servers import FaultyServer, recipe_for, serving, tiny_engine

from draftsmith.core import run_files
from draftsmith.core.errors import DraftsmithError, TargetError
from draftsmith.core.records.base import write_rows
from draftsmith.core.records.data import CompletionsSummary, Coverage, Prompt
from draftsmith.core.records.training import MetricsRow
from draftsmith.core.run_files import RunFiles
from draftsmith.data.regenerate import Regeneration, read_completions
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.stopping import Ends
from draftsmith.drafts.packing import Pack
from draftsmith.engines import SERVERS
from draftsmith.engines.served import ServedTarget
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run
from draftsmith.targets.parts import load_tokenizer
from draftsmith.training.capture import PrefetchedCapture


def names(prompts):
    return sorted(prompt.id for prompt in Prompt.read_rows(prompts))


def target_of(recipe):
    """The target behind the recipe's servers, until the block ends."""
    return contextlib.closing(ServedTarget(recipe.target, recipe.server, SERVERS[recipe.target.engine], "cpu"))


def regenerate(recipe, prompts, out):
    with target_of(recipe) as served:
        Regeneration(recipe, served, ChatFormat(served.tokenizer, None), prompts, out).run()
    return list(read_completions(out)), served


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_rows_are_what_the_target_writes_whatever_the_replicas(model, target, prompts, tmp_path, engine):
    servers = [FaultyServer(tiny_engine(target, model)) for _ in range(3)]
    with serving(*servers) as urls:
        rows, served = regenerate(recipe_for(model, urls, engine), prompts, tmp_path / "three")
        alone, _ = regenerate(recipe_for(model, urls[:1], engine), prompts, tmp_path / "one")
    assert rows == alone
    assert sorted(r.id for r in rows) == names(prompts)
    by_body = {str(b.get("prompt") or b["input_ids"]): b for s in servers for b in s.asked}
    for row in rows:
        start, end = row.spans[0]
        body = by_body[str(row.ids[:start])]
        seed = body.get("seed") or body["sampling_params"]["sampling_seed"]
        ((_, wanted),) = target.generate([row.ids[:start]], Sampling(1.0), 12, (), seed)
        assert row.ids[start:end] == wanted.ids
        assert row.finish_reason == wanted.finish_reason
    answered = [r.answered for r in served.pool.replicas]
    assert max(answered) - min(answered) <= 3  # fair


@pytest.mark.parametrize("fault", [500, 503, 429, "drop", "torn", "late", "abort"])
def test_faults_change_nothing_but_time(model, target, prompts, tmp_path, fault):
    sound = FaultyServer(tiny_engine(target, model))

    def sometimes(n):  # ten times at two replicas, so that nobody can meet it as often as it may ask
        return fault if n % 3 == 1 and n < 15 else None

    sick = [FaultyServer(tiny_engine(target, model), sometimes, 2.0) for _ in range(2)]
    with serving(sound, *sick) as urls:
        wanted, _ = regenerate(recipe_for(model, urls[:1]), prompts, tmp_path / "sound")
        rows, served = regenerate(recipe_for(model, urls[1:], deadline_s=1.5, attempts=12), prompts, tmp_path / "sick")
    assert rows == wanted
    assert sum(len(s.asked) for s in sick) > len(rows)
    assert sum(r.answered for r in served.pool.replicas) == len(rows)


def test_a_replica_that_dies_loses_and_doubles_nothing(model, target, prompts, tmp_path, capsys):
    def die(n):
        servers[1].dead = n >= 3

    servers = [FaultyServer(tiny_engine(target, model)), FaultyServer(tiny_engine(target, model), die)]
    with serving(*servers) as urls:
        rows, served = regenerate(recipe_for(model, urls), prompts, tmp_path / "out")
    assert sorted(r.id for r in rows) == names(prompts)
    assert [r.answered for r in served.pool.replicas] == [len(rows) - 2, 2]
    assert f"server {urls[1]}: " in capsys.readouterr().err


def test_all_dead_stops_and_the_same_command_goes_on(model, target, prompts, tmp_path):
    def die(n):
        server.dead = n > 7

    server = FaultyServer(tiny_engine(target, model), die)
    with serving(server) as urls:
        recipe, out = recipe_for(model, urls), tmp_path / "out"
        with pytest.raises(TargetError, match=r"server\.attempts: .*, the last .*http"):
            regenerate(recipe, prompts, out)
        kept = list(read_completions(out))
        assert 1 <= len(kept) <= 7
        torn = out / "00000.jsonl"
        torn.write_bytes(torn.read_bytes() + b'{"id": "p3", "ids": [1, 2')
        server.dead, server.fault, server.asked = False, lambda n: None, []
        rows, _ = regenerate(recipe, prompts, out)
        assert len(server.asked) == len(rows) - len(kept)
        assert sorted(r.id for r in rows) == names(prompts)
        assert [r for r in rows if r.id in {k.id for k in kept}] == sorted(kept, key=lambda r: rows.index(r))
        whole, _ = regenerate(recipe, prompts, tmp_path / "whole")
    assert rows == whole, "an interrupted run ends with the completions of one that ran through"


def test_a_stop_text_is_found_afterwards_where_a_decoder_would_have_stopped(target):
    prompts, stop = [[1, 5 + i, 9] for i in range(24)], ("w7", "to in", "the")
    ends = Ends(target.eos_ids, target.tokenizer, stop)
    for (_, free), (_, stopped) in zip(
        sorted(target.generate(prompts, Sampling(), 24)),
        sorted(target.generate(prompts, Sampling(), 24, stop)),
        strict=True,
    ):
        assert ends.of_answer(free.ids, free.finish_reason) == (stopped.ids, stopped.finish_reason)


def test_enough_tokens_is_enough(model, target, prompts, tmp_path):
    with serving(FaultyServer(tiny_engine(target, model))) as urls:
        recipe = recipe_for(model, urls)
        few = recipe.model_copy(update={"regenerate": recipe.regenerate.model_copy(update={"max_tokens": 40})})
        some, _ = regenerate(few, prompts, tmp_path / "out")
        more, _ = regenerate(recipe, prompts, tmp_path / "out")
    assert CompletionsSummary.load(tmp_path / "out" / "summary.json").completion_tokens >= 40
    assert len(some) < len(more) == 20


def test_several_turns_are_those_of_the_target_in_process(model, target, tmp_path):
    talk = [{"role": "user", "content": c} for c in ("the of", "to in w3", "is it")]
    begun = [[{"role": "system", "content": f"w{i}"}, *talk] for i in range(6)]
    prompts = tmp_path / "prompts.jsonl"
    write_rows(prompts, [Prompt(id=f"t{i}", category="chat", source="t", messages=m) for i, m in enumerate(begun)])
    with serving(FaultyServer(tiny_engine(target, model))) as urls:
        recipe = recipe_for(model, urls)
        greedy = recipe.model_copy(update={"regenerate": recipe.regenerate.model_copy(update={"temperature": 0.0})})
        served, _ = regenerate(greedy, prompts, tmp_path / "out")
    chat = ChatFormat(load_tokenizer(model), None)
    Regeneration(greedy, target, chat, prompts, tmp_path / "wanted").run()
    assert sorted(read_completions(tmp_path / "wanted"), key=lambda r: r.id) == served
    assert sum(len(r.spans) for r in served) > 6, "later turns were answered too"


def test_talks_that_a_limit_ended_are_asked_to_their_end_where_it_is_raised(model, target, tmp_path):
    """They stayed as the first limit had left them: a third of a talk, though more was asked for."""
    talk = [{"role": "user", "content": c} for c in ("the of", "to in w3", "is it")]
    begun = [[{"role": "system", "content": f"w{i}"}, *talk] for i in range(6)]
    prompts = tmp_path / "prompts.jsonl"
    write_rows(prompts, [Prompt(id=f"t#{i}", category="chat", source="t", messages=m) for i, m in enumerate(begun)])

    def asked_for(most, out):
        settings = recipe.regenerate.model_copy(update={"max_tokens": most, "temperature": 0.0})
        rows, _ = regenerate(recipe.model_copy(update={"regenerate": settings}), prompts, tmp_path / out)
        return rows

    with serving(FaultyServer(tiny_engine(target, model))) as urls:
        recipe = recipe_for(model, urls, concurrency=4)
        whole = asked_for(None, "whole")
        some = asked_for(20, "some")
        ended = [row for row in some if row.turns_left_out == {"past regenerate.max_tokens": 2}]
        assert ended
        assert asked_for(20, "some") == some
        assert asked_for(10, "some") == some, "what is written stays"
        assert asked_for(None, "some") == whole


def test_a_balancer_that_turns_to_another_model_is_found_out(model, target):
    other = tiny_target(seed=1, tokenizer=target.tokenizer)
    engines, asked = (tiny_engine(target, model), tiny_engine(other, model)), itertools.count()

    def balancer(path, body, name):
        return engines[next(asked) > 40](path, body, name)

    with serving(FaultyServer(balancer)) as urls, target_of(recipe_for(model, urls)) as served:
        answers = served.generate(([i % 50 + 2] for i in range(300)), Sampling(), 2)
        with pytest.raises(TargetError, match=r"asked again after \d+ answers, has other weights under"):
            list(answers)


def test_greedy_and_drawn_completions_share_the_budget(model, target, prompts, tmp_path):
    with serving(FaultyServer(tiny_engine(target, model))) as urls:
        recipe = recipe_for(model, urls, concurrency=1)
        half = {"max_tokens": 90, "greedy_share": 0.5, "max_new_tokens": 6}
        recipe = recipe.model_copy(update={"regenerate": recipe.regenerate.model_copy(update=half)})
        some, _ = regenerate(recipe, prompts, tmp_path / "a")
    greedy = [row for row in some if row.sampling == (0.0, 1.0, 0)]
    assert 90 <= sum(len(row.loss_tokens) for row in some) < 96
    assert 4 <= len(greedy) <= len(some) - 4
    for row in greedy:  # asked of the server at temperature 0
        start = row.spans[0][0]
        (_, answer), *_ = target.generate([row.ids[:start]], Sampling(), 6)
        assert row.ids[start:] == answer.ids


def test_what_cannot_be_right_is_refused_in_one_line(model, target, prompts, tmp_path):
    other = tiny_target(seed=1, tokenizer=target.tokenizer)

    def other_words(path, body, name):
        return (200, {"tokens": [1, 2]}) if path == "/tokenize" else tiny_engine(target, model)(path, body, name)

    def other_engine(path, body, name):
        return (200, {"meta_info": {}}) if path == "/v1/completions" else tiny_engine(target, model)(path, body, name)

    servers = [
        FaultyServer(tiny_engine(target, model)),
        FaultyServer(tiny_engine(target, "somebody/else")),
        FaultyServer(other_words),
        FaultyServer(tiny_engine(other, model)),
        FaultyServer(tiny_engine(target, model), lambda n: 404),
        FaultyServer(other_engine),
    ]
    with serving(*servers) as urls:
        good, elsewhere, words, weights, lost, alien = urls
        for number, (wanted, given) in enumerate(
            {
                "server.urls: none given; target.engine vllm needs at least one URL": [],
                "serves somebody/else, not target.model": [good, elsewhere],
                "has another tokenizer than": [words],
                "has other weights under the same name": [good, weights],
                "server.urls: no server answers; http://127.0.0.1:9: ": ["http://127.0.0.1:9"],
                "HTTP 404": [lost],
                "does not answer as the engine of target.engine does": [alien],
                "server.urls.0: 'localhost:8000' given; a server's URL is like http://HOST:PORT": ["localhost:8000"],
            }.items()
        ):
            with pytest.raises(DraftsmithError) as caught:
                regenerate(recipe_for(model, given), prompts, tmp_path / str(number))
            assert wanted in str(caught.value)
            assert "\n" not in str(caught.value)
        long = recipe_for(model, [good])
        for most, error in (
            (198, r"takes 200 tokens, .*; give a smaller regenerate.max_new_tokens"),
            (500, r"max_new_tokens: answers of 500 tokens leave no room for a prompt in the \d+ that servers take"),
        ):
            changed = long.model_copy(
                update={"regenerate": long.regenerate.model_copy(update={"max_new_tokens": most})}
            )
            with pytest.raises(DraftsmithError, match=error):
                regenerate(changed, prompts, tmp_path / f"long-{most}")
        # Weights that were changed between two runs are noticed by what the first one kept.
        regenerate(recipe_for(model, [good]), prompts, tmp_path / "kept")
        shutil.copytree(tmp_path / "kept", RunFiles(tmp_path / "run").completions)
        with (
            contextlib.closing(Run(recipe_for(model, [weights]), tmp_path / "run", ["test"])) as run,
            pytest.raises(TargetError, match="nats a token away"),
        ):
            run.target.logprobs([1, 2, 3])


def test_stages_up_to_the_vocabulary_need_no_model_in_process(model, target, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    with serving(FaultyServer(tiny_engine(target, model))) as urls:
        run = served_run(model, prompts, urls, tmp_path / "run")
        for stage in ("prompts", "regenerate", "vocab"):
            run_pipeline(run, stage)
        run.close()
    assert run.target.lm.get_input_embeddings().weight.is_meta
    assert Coverage.load(run.files.coverage).coverage


def served_run(model, prompts, urls, out, **changes):
    changes = {"prompts.sources": [{"name": prompts}], "target.engine": "vllm", **changes}
    server = {"urls": urls, "concurrency": 3, "attempts": 6, "backoff_s": 0.01, "packs_ahead": 2}
    return Run(tiny_recipe(model, prompts, **changes, server=server), out, ["test"])


def test_training_from_servers_gives_the_loss_curve_of_training_in_process(model, target, tmp_path):
    """Two replicas that keep hidden states, one of which dies; nothing is left in their folder."""

    def die(n):
        servers[1].dead = n >= 20

    folder = tmp_path / "states"
    folder.mkdir()
    engine = tiny_engine(target, model, (folder, (1, 3, 4)))
    servers = [FaultyServer(engine), FaultyServer(engine, die)]
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    with serving(*servers) as urls, contextlib.closing(served_run(model, prompts, urls, tmp_path / "served")) as served:
        for stage in ("prompts", "regenerate", "vocab", "train", "export"):
            run_pipeline(served, stage)
    assert servers[1].dead
    assert not [p for p in folder.iterdir() if p.suffix == ".safetensors"]
    local = served_run(model, prompts, [], tmp_path / "local", **{"target.engine": "transformers"})
    for stage in ("prompts", "regenerate", "vocab"):  # who runs the target does not change what it wrote
        shutil.copytree(served.files.stage(stage), local.files.stage(stage))
    run_pipeline(local, "train")
    curves = [list(MetricsRow.read_rows(run.files.train / run_files.METRICS)) for run in (served, local)]
    losses = [[row.loss for row in curve if row.loss is not None] for curve in curves]
    assert len(losses[0]) >= 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    taus = [[row.held_out.tau[3] for row in curve if row.held_out] for curve in curves]
    assert taus[0]
    assert taus[0] == pytest.approx(taus[1], rel=1e-3)


@pytest.mark.parametrize("fault", [503, "drop", "late", "abort"])
def test_states_come_through_faults_and_leave_no_file(model, target, tmp_path, fault):
    engine = tiny_engine(target, model, (tmp_path, (1, 3, 4)))
    documents = [[1, 5 + i, 9, 7] for i in range(9)]
    wanted = target.capture(documents, (1, 3, 4))

    def sometimes(n):  # five times: fewer than `server.attempts`
        return fault if n % 4 == 2 and n < 20 else None

    with serving(FaultyServer(engine, sometimes, late_s=1.8)) as urls:
        recipe = recipe_for(model, urls, deadline_s=1.5)
        with target_of(recipe) as served:
            got = served.capture(documents, (1, 3, 4))
            time.sleep(0.5)  # what came late is written by then
    # a text alone and a pack of texts are products of other shapes, so they round otherwise
    assert torch.allclose(got.taps_TKH, wanted.taps_TKH, atol=1e-3)
    assert torch.allclose(got.last_TH, wanted.last_TH, atol=1e-3)
    assert not list(tmp_path.iterdir())


def test_a_file_that_never_comes_is_asked_for_again(model, target, tmp_path):
    whole = tiny_engine(target, model, (tmp_path, (1, 3, 4)))
    asked = []

    def full_disk(path, body, name):
        status, answer = whole(path, body, name)
        kept = answer.get("kv_transfer_params")
        if kept and "prompt_logprobs" not in body:
            asked.append(name)
            if len(asked) == 1:
                Path(kept["hidden_states_path"]).unlink()
        return status, answer

    with serving(FaultyServer(full_disk)) as urls:
        recipe = recipe_for(model, urls)
        with target_of(recipe) as served:
            assert served.capture([[1, 2, 3]], (1, 3, 4)).taps_TKH.shape == (3, 3, 32)
    assert len(asked) == 3  # the proof of the states comes first, and its file never came
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["norm", "head", "scale"])
def test_states_that_do_not_give_the_servers_own_probabilities_are_refused(model, target, tmp_path, wrong):
    """The same names and log-probabilities, but what the trainer would make of the states is another model."""
    other, folder = tmp_path / "other", tmp_path / "states"
    shutil.copytree(model, other)
    folder.mkdir()
    tensors = load_file(other / "model.safetensors")
    if wrong == "norm":
        tensors["model.norm.weight"] *= 2
    elif wrong == "head":
        tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with serving(FaultyServer(tiny_engine(target, str(other), (folder, (1, 3, 4))))) as urls:
        recipe = recipe_for(str(other), urls)
        with target_of(recipe) as served:
            served.logit_scale = 0.125 if wrong == "scale" else 1.0
            with pytest.raises(TargetError, match=r"server\.urls: the hidden states of .* nats a token"):
                served.capture([[1, 2, 3]], (1, 3, 4))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_served_target_does_what_one_in_process_does(model, target, engine):
    """As targets/base.py tells: completions, and what the model thinks of a text."""
    prompts = [[1, 5 + i, 9] for i in range(6)]
    with serving(FaultyServer(tiny_engine(target, model))) as urls:
        recipe = recipe_for(model, urls, engine)
        with target_of(recipe) as served:
            made = dict(served.generate(prompts, Sampling(), 8, at_once=2))
            assert {i: (g.ids, g.finish_reason) for i, g in made.items()} == {
                i: (g.ids, g.finish_reason) for i, g in target.generate(prompts, Sampling(), 8)
            }
            assert served.logprobs([1, 5, 9, 7]) == pytest.approx(target.logprobs([1, 5, 9, 7]), abs=1e-5)
            assert served.identity == target.identity.model_copy(update={"model": model})


def test_servers_that_keep_the_wrong_states_are_refused(model, target, tmp_path):
    folder = tmp_path / "states"
    folder.mkdir()
    servers = [
        FaultyServer(tiny_engine(target, model)),
        FaultyServer(tiny_engine(target, model, (folder, (1, 3)))),
        FaultyServer(tiny_engine(target, model, (folder, (1, 3, 4)))),
    ]
    with serving(*servers) as urls:
        for url, hidden_states, wanted in (
            (urls[0], None, "keeps no hidden states"),
            (urls[1], None, "draft.taps: the server keeps [3, 32] values a token, this run wants [4, 32]"),
            (urls[2], "/elsewhere", "keeps its hidden states in /elsewhere, which this machine does not see"),
        ):
            recipe = recipe_for(model, [url], hidden_states=hidden_states)
            with target_of(recipe) as served:
                with pytest.raises(TargetError) as caught:
                    served.capture([[1, 2, 3]], (1, 3, 4))
                assert wanted in str(caught.value)


def test_a_gemma_whose_sglang_leaves_the_residual_stream_out_is_refused(tmp_path):
    gemma = save_tiny_target(tmp_path, "gemma3")
    with serving(FaultyServer(tiny_engine(local_target(gemma), gemma))) as urls:
        recipe = recipe_for(gemma, urls, "sglang", last_urls=urls)
        with (
            target_of(recipe) as served,
            pytest.raises(TargetError, match="runs SGLang's own Gemma-3, which returns its taps without the residual"),
        ):
            served.capture([[1, 2]], (1, 3, 4))


def test_packs_are_fetched_ahead_within_bounds():
    asked, finish = set(), [threading.Event() for _ in range(10)]

    def slow(pack):
        number = pack.documents[0][0]
        asked.add(number)
        assert number == 99 or finish[number].wait(10)
        return number

    def pack(name, number):
        return Pack([name], [[number]], [], torch.tensor([number]))

    packs = [pack(str(i), i) for i in range(10)]
    capture = PrefetchedCapture(slow, iter(packs), 3, torch.device("cpu"))
    for i in range(10):
        finish[i].set()
        assert capture(packs[i]) == i
        assert max(asked) <= i + 3
        if i == 4:
            assert capture(pack("held out", 99)) == 99
            asked.remove(99)
    assert asked == set(range(10))


WRONG = {
    "null": None,
    "no list": 7,
    "text": "5 6",
    "texts": ["5", "6"],
    "halves": [5.5],
    "truths": [True],
    "negative": [-1],
    "beyond the vocabulary": [64],
    "too many": [5] * 13,
    "lists": [[5]],
}


@pytest.mark.parametrize(("what", "engine"), list(zip(WRONG, itertools.cycle(["vllm", "sglang"]), strict=False)))
def test_ids_that_are_none_cost_one_attempt_and_are_never_kept(model, target, prompts, tmp_path, engine, what):
    honest, asked = tiny_engine(target, model), []

    def once_wrong(path, body, request_id):
        status, answer = honest(path, body, request_id)
        place = answer["choices"][0] if "choices" in answer else answer
        key = "token_ids" if "token_ids" in place else "output_ids"
        if key in place:
            asked.append(path)
            if len(asked) == 1:
                place[key] = WRONG[what]
        return status, answer

    with serving(FaultyServer(once_wrong), FaultyServer(honest)) as urls:
        wanted, _ = regenerate(recipe_for(model, urls[1:], engine), prompts, tmp_path / "honest")
        rows, _ = regenerate(recipe_for(model, urls[:1], engine), prompts, tmp_path / "wrong")
    assert rows == wanted
    assert len(asked) == len(rows) + 1


def test_a_server_that_only_talks_nonsense_is_named_in_one_line(model, target, prompts, tmp_path):
    honest = tiny_engine(target, model)

    def changed(where, change):
        def answer(path, body, request_id):
            status, found = honest(path, body, request_id)
            return (status, change(found)) if path == where else (status, found)

        return answer

    def nan(found):
        for row in found["choices"][0].get("prompt_logprobs", [])[1:]:
            next(iter(row.values()))["logprob"] = None
        return found

    servers = {
        "does not answer as the engine": changed(
            "/v1/models", lambda found: {"data": [found["data"][0] | {"max_model_len": "x"}]}
        ),
        "does not answer as the engine ": changed("/v1/models", lambda found: []),
        "does not answer as the engine of": changed("/tokenize", lambda found: {"tokens": "all"}),
        "does not answer as the engine of target": changed("/v1/completions", nan),
        "an answer without token ids": changed(
            "/v1/completions", lambda f: f if "prompt_logprobs" in f["choices"][0] else {"choices": {}}
        ),
    }
    for number, (wanted, answer) in enumerate(servers.items()):
        with serving(FaultyServer(answer)) as urls, pytest.raises(DraftsmithError) as caught:
            regenerate(recipe_for(model, urls, attempts=2), prompts, tmp_path / str(number))
        assert wanted.strip() in str(caught.value)
        assert urls[0] in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DraftsmithError, match=r"server\.urls\.0: 'http://127\.0\.0\.1:99999' given; Port out"):
        regenerate(recipe_for(model, ["http://127.0.0.1:99999"]), prompts, tmp_path / "port")


def test_a_missing_key_is_named(model, target, prompts, tmp_path):
    wanted = r"HTTP 401: .*DRAFTSMITH_API_KEY \(server\.api_key_env\)"
    with (
        serving(FaultyServer(tiny_engine(target, model), lambda n: 401)) as urls,
        pytest.raises(DraftsmithError, match=wanted),
    ):
        regenerate(recipe_for(model, urls), prompts, tmp_path / "out")
