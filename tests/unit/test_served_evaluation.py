"""Evaluation and probing of servers, by stand-ins that draft."""

import itertools
import time

import pytest
from models import tiny_recipe
from servers import FaultyServer, drafting, recipe_for, serving, steps_of, tiny_engine

from draftsmith.core.errors import TargetError
from draftsmith.core.records.base import write_rows
from draftsmith.core.records.data import Prompt
from draftsmith.core.records.evaluation import Results
from draftsmith.core.shape import Shape
from draftsmith.data.regenerate import open_conversations
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.sampling import Sampling
from draftsmith.engines import SERVERS
from draftsmith.engines.base import Setup
from draftsmith.evaluation.evaluate import Evaluation
from draftsmith.evaluation.lossless import lossless_verdict
from draftsmith.runs import probing as probe
from draftsmith.runs.probing import probe_server
from draftsmith.runs.run import Run


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_that_never_draws_is_noticed(model, target, prompts, tmp_path, monkeypatch, engine):
    """SGLang verifies greedily at any temperature where it lacks its sampling kernel: such a tau is none at T=1."""
    assert not SERVERS["sglang"].always_draws
    monkeypatch.setattr(type(SERVERS[engine]), "always_draws", False)
    honest = tiny_engine(target, model)

    def deaf(path, body, request_id):
        """The first token is drawn, as it is the prompt's; then greedily on."""
        settings = body.get("sampling_params", body)
        length = settings.get("max_new_tokens") or settings.get("max_tokens", 1)
        if settings.get("temperature", 0.0) == 0.0 or length == 1:
            return honest(path, body, request_id)
        key = "prompt" if "prompt" in body else "input_ids"
        one = {"max_tokens": 1, "max_new_tokens": 1}
        status, first = honest(path, body | one | {"sampling_params": {**settings, **one}}, request_id)
        ids = first["choices"][0]["token_ids"] if "choices" in first else first["output_ids"]
        rest = {"temperature": 0.0, "max_tokens": length - 1, "max_new_tokens": length - 1}
        asked = body | rest | {"sampling_params": {**settings, **rest}, key: [*body[key], *ids]}
        status, answer = honest(path, asked, request_id)
        written = answer["choices"][0]["token_ids"] if "choices" in answer else answer["output_ids"]
        written[:0] = ids
        return status, answer

    with serving(FaultyServer(honest), FaultyServer(deaf)) as urls:
        for url, draws in zip(urls, (True, False), strict=True):
            setup = Setup(recipe_for(model, [url], engine), tmp_path, tmp_path)
            evaluation = Evaluation(SERVERS[engine], setup, prompts, tmp_path)
            with SERVERS[engine].open(setup, None, url) as session:
                questions = evaluation.questions(session)
                assert evaluation.draws(session, questions, 1.0) == draws
                assert evaluation.draws(session, questions, 0.1), "a low temperature may well draw the greedy text"


def evaluated(model, engine, urls, prompts_file, out, **changes):
    """What `evaluate` makes of a server that drafts and one of the target alone."""
    recipe = recipe_for(model, urls, engine)
    asked = {"url": urls[0], "plain_url": urls[1], "shapes": (Shape.chain(3),), **changes}
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=asked)})
    evaluation = Evaluation(SERVERS[engine], Setup(recipe, out / "no-draft", out), prompts_file, out)
    written = evaluation.run(Run(recipe, out, ["test"]).created_with)
    assert Results.load(out / "results.json") == written
    return written


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_that_drafts_is_evaluated(model, target, prompts, tmp_path, engine):
    """tau from what it tells of its steps, speed and losslessness against the target alone."""
    whole = tiny_engine(target, model)
    with serving(FaultyServer(drafting(whole)), FaultyServer(whole)) as urls:
        results = evaluated(model, engine, urls, prompts, tmp_path, batches=(1, 2, 64))
    greedy, drawn = results.acceptance
    assert (results.settings.engine, results.settings.prompts, results.partial) == (engine, 20, False)
    assert [(str(entry.shape), entry.temperature) for entry in results.acceptance] == [("3/1/4", 0.0), ("3/1/4", 1.0)]
    chat = ChatFormat(target.tokenizer, None)
    opened = list(open_conversations(Prompt.read_rows(prompts), chat, 200))
    lengths = {
        opened[number].prompt.id: len(answer.ids)
        for number, answer in target.generate([c.ids for c in opened], Sampling(), 12)
    }
    steps = []
    for length in lengths.values():
        roots = itertools.accumulate((accepted + 1 for accepted in steps_of(length)), initial=0)
        told = zip(roots, steps_of(length), strict=False)  # SGLang tells no order, so there all of them count
        steps += [accepted for root, accepted in told if engine == "sglang" or root + 3 < length]
    assert {row.id: row.tokens for row in greedy.prompts} == lengths
    assert greedy.all.tau == pytest.approx(1 + sum(steps) / len(steps))
    assert greedy.all.steps == len(steps)
    assert greedy.all.low < greedy.all.tau < greedy.all.high
    assert set(greedy.by_category) == {"chat", "code", "math"}
    assert drawn.all.tau > 1
    assert drawn.oracle is None, "servers do not tell of the target's first choices"
    assert results.left_out == []
    assert [(speed.batch, speed.prompts) for speed in results.speed] == [(1, 2), (2, 2)], "20 prompts make no 64"
    for speed in results.speed:
        assert speed.tau > 1
        assert min(speed.plain_tokens_per_s, speed.drafted_tokens_per_s, speed.speedup) > 0
    assert lossless_verdict(results.lossless).state == "yes"
    assert (results.lossless.prompts, results.lossless.shapes) == (2, (Shape(3, 1, 4),))
    assert results.profile is None


def test_a_server_whose_drafting_changes_the_text_is_not_lossless(model, target, prompts, tmp_path):
    def changed(ids):
        return [*ids[:3], (ids[3] + 1) % 64, *ids[4:]] if len(ids) > 3 else ids

    whole = tiny_engine(target, model)
    with serving(FaultyServer(drafting(whole, changed)), FaultyServer(whole)) as urls:
        results = evaluated(model, "vllm", urls, prompts, tmp_path, temperatures=(0.0,), prompts=3)
    found = results.lossless.differences
    assert [difference.token for difference in found] == [3, 3]
    for difference in found:
        assert difference.drafted == (difference.plain + 1) % 64
        assert difference.logit_gap > 0
    assert lossless_verdict(results.lossless).state == "no"


def test_servers_are_probed_by_requests_at_once(model, target, prompts, tmp_path, monkeypatch):
    """One that takes as long for many requests as for one, and another that drafts; as many at once as there are."""
    for name, value in {"AT_ONCE": (1, 2, 40), "DRAFTED_AT": (1, 4), "SERVER_ROUNDS": 1}.items():
        monkeypatch.setattr(probe, name, value)
    whole, at_once, most = tiny_engine(target, model), [], []

    def steady(path, body, name):
        """Of so many tokens as asked for, whatever would end them, in 3 ms each."""
        if path != "/v1/completions" or "prompt_logprobs" in body:
            return whole(path, body, name)
        assert body["ignore_eos"]
        at_once.append(name)
        most.append(len(at_once))
        time.sleep(0.003 * body["max_tokens"])
        at_once.pop()
        return 200, {"choices": [{"token_ids": [5] * body["max_tokens"], "finish_reason": "length"}]}

    run = Run(tiny_recipe(model, "unused", **{"target.engine": "vllm"}), tmp_path, ["test"])
    assert run.recipe.server.concurrency < 40
    write_rows(run.files.evaluation_prompts, list(Prompt.read_rows(prompts)))
    with serving(FaultyServer(steady), FaultyServer(drafting(steady))) as (alone, drafts):
        found = probe_server(run, "vllm", alone, None, Shape(3, 1, 4))
        assert (found.engine, found.machine, found.times.draft) == ("vllm", f"vllm at {alone}", None)
        assert [tokens for tokens, _ in found.times.forward] == [1, 2, 40]
        seconds = [seconds for _, seconds in found.times.forward]
        assert seconds == sorted(seconds)
        assert 0.0015 < seconds[0] < 0.03
        assert max(most) == 40
        monkeypatch.setattr(probe, "AT_ONCE", (1,))
        draft = probe_server(run, "vllm", alone, drafts, Shape(3, 1, 4)).times.draft
        assert [batch for batch, _ in draft.by_batch] == [1, 4]
        assert all(0 <= step_s < 0.1 for _, step_s in draft.by_batch)
        with pytest.raises(TargetError, match="--draft-url: the server tells nothing of drafting"):
            probe_server(run, "vllm", alone, alone, Shape(3, 1, 4))


def test_a_server_of_another_shape_or_of_none_is_refused(model, target, prompts, tmp_path):
    whole = tiny_engine(target, model)
    with serving(FaultyServer(drafting(whole)), FaultyServer(whole)) as urls:
        few = {"prompts": 3, "plain_url": None}
        with pytest.raises(TargetError, match=r"evaluate\.shapes: 1/1/2 given, but the server accepted 3 draft tokens"):
            evaluated(model, "vllm", urls, prompts, tmp_path / "other", shapes=(Shape(1, 1, 2),), **few)
        with pytest.raises(TargetError, match=r"tells nothing of drafting .* --per-request-spec-decode-metrics"):
            evaluated(model, "vllm", urls[::-1], prompts, tmp_path / "none", **few)
