"""Equal trajectories across settings that must not matter, and exact resumption."""

import shutil

import pytest
import torch
from models import local_target, save_tiny_target, tiny_draft, tiny_recipe, write_prompts
from safetensors.torch import load_file

from draftsmith.core.errors import CheckpointError, TrainingError
from draftsmith.core.files import read_json, write_json
from draftsmith.core.records.training import Best, MetricsRow
from draftsmith.core.run_files import RunFiles
from draftsmith.data.prompts import gather
from draftsmith.data.regenerate import Regeneration
from draftsmith.data.templates import ChatFormat
from draftsmith.data.vocabulary import build_vocabulary
from draftsmith.drafts.directories import write_draft
from draftsmith.drafts.eagle3.model import Eagle3Draft
from draftsmith.training.capture import OnlineCapture
from draftsmith.training.checkpoints import load_state, tidy
from draftsmith.training.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(directory, target, vocabulary) with completions of a tiny target."""
    out = tmp_path_factory.mktemp("data")
    model = save_tiny_target(out / "model")
    recipe = tiny_recipe(model, write_prompts(out / "p.jsonl", 30))
    gather(recipe, out)
    target = local_target(model, batch_size=4)
    target.eos_ids = frozenset()  # long completions
    Regeneration(recipe, target, ChatFormat(target.tokenizer, None), out / "prompts.jsonl", out / "completions").run()
    vocabulary = build_vocabulary(recipe, out / "completions", target.identity.vocab_size, {0, 1}, RunFiles(out))
    return out, target, vocabulary


def trainer(data, out, **changes) -> Trainer:
    directory, target, vocabulary = data
    recipe = tiny_recipe(target.identity.model, "p", **changes)
    return Trainer(recipe, target, directory / "completions", vocabulary, out)


def losses(out) -> list[float]:
    return [row.loss for row in MetricsRow.read_rows(out / "metrics.jsonl") if row.loss is not None]


def weights(out) -> dict[str, torch.Tensor]:
    return load_file(sorted(out.glob("checkpoint-*"))[-1] / "draft.safetensors")


def test_loss_falls_and_acceptance_rises(data, tmp_path):
    summary = trainer(data, tmp_path, **{"train.epochs": 8, "draft.fc_norm": False}).train()  # from nothing learned
    curve = losses(tmp_path)
    assert curve[-1] < 0.8 * curve[0]
    held_out = [row.held_out for row in MetricsRow.read_rows(tmp_path / "metrics.jsonl") if row.held_out]
    # of four completions tau is a matter of luck, the chance to be accepted is not
    assert all(last > 1.1 * first for first, last in zip(held_out[0].alpha, held_out[-1].alpha, strict=True))
    assert summary.tau_held_out == held_out[-1].tau[3]


def test_a_loss_on_prompts_trains_on_more_of_the_same_text_and_is_judged_on_completions(data, tmp_path):
    usual, more = trainer(data, tmp_path / "a"), trainer(data, tmp_path / "b", **{"train.on_prompts": True})
    assert [c.ids for c in more.rows] == [c.ids for c in usual.rows]
    assert more.heldout == usual.heldout
    prompt = [
        (c.spans[0][0] - m.spans[0][0], c.spans[-1][1] - m.spans[0][1])
        for c, m in zip(usual.rows, more.rows, strict=True)
    ]
    assert min(prompt)[0] > 0
    assert {end for _, end in prompt} == {0}
    more.train()
    curve = losses(tmp_path / "b")
    assert curve[-1] < curve[0]


def test_lk_losses_see_the_whole_distribution(data, tmp_path):
    """What is told as accepted is that of the target's own probabilities, and no draft can have the rest."""
    settings = {"lk": {"train.objective": "lk_lambda"}, "true": {"train.true_probabilities": True}, "part": {}}
    alphas = {}
    for name, changes in settings.items():
        trainer(data, tmp_path / name, **changes, **{"train.max_steps": 1}).train()
        alphas[name] = next(row.alpha for row in MetricsRow.read_rows(tmp_path / name / "metrics.jsonl") if row.alpha)
    assert alphas["lk"] == pytest.approx(alphas["true"], rel=1e-4)
    assert alphas["lk"][0] < 0.99 * alphas["part"][0]


def test_completions_count_that_were_read(data, tmp_path):
    """Those that there are stood on the card, however few the steps were."""
    run = trainer(data, tmp_path, **{"train.max_steps": 1})
    ((first,),) = run.steps
    assert run.train().completions == len(first) < len(run.rows)


def test_epochs_that_end_before_the_steps_are_told(data, tmp_path, capsys):
    run = trainer(data, tmp_path, **{"train.max_steps": 500})
    assert f"epochs end after {len(run.steps)} steps; max_steps is 500" in capsys.readouterr().err
    trainer(data, tmp_path, **{"train.max_steps": len(run.steps)})
    assert "max_steps is" not in capsys.readouterr().err


def test_only_a_new_draft_with_normed_taps_is_fitted_and_once(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Eagle3Draft, "fit", lambda self, examples, *_: asked.append(len(list(examples))))
    trainer(data, tmp_path / "raw", **{"train.max_steps": 1, "draft.fc_norm": False}).train()
    assert not asked
    trainer(data, tmp_path / "normed", **{"train.max_steps": 1}).train()
    assert len(asked) == 1
    assert asked[0] > 0
    trainer(data, tmp_path / "normed", **{"train.max_steps": 1}).train()
    assert len(asked) == 1


def test_a_fitted_draft_starts_further_than_a_random_one(data, tmp_path):
    alphas = []
    for fitted in (True, False):
        run = trainer(data, tmp_path / str(fitted), **{"train.max_steps": 1})
        if not fitted:
            run._fit = lambda capture: None
        run.train()
        alphas.append(
            next(row.alpha[0] for row in MetricsRow.read_rows(tmp_path / str(fitted) / "metrics.jsonl") if row.alpha)
        )
    assert alphas[0] > 1.2 * alphas[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_bit_identical(data, tmp_path, optimizer):
    changes = {"train.optimizer": optimizer}
    trainer(data, tmp_path / "whole", **changes).train()
    short = trainer(data, tmp_path / "cut", **changes)
    schedule = short.steps
    short.steps = schedule[:4]  # ends between two log lines and after the checkpoint of step 3
    real_rate = short._learning_rate

    def rate():  # the schedule of the whole run
        short.steps = schedule
        value = real_rate()
        short.steps = schedule[:4]
        return value

    short._learning_rate = rate
    short.train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-000004")
    trainer(data, tmp_path / "cut", **changes).train()
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accumulation_equals_one_larger_batch(data, tmp_path):
    """Four packs in one step, however they are grouped, give the gradient of their union."""
    from draftsmith.drafts.packing import make_pack

    whole, parts = trainer(data, tmp_path / "a"), trainer(data, tmp_path / "b")
    rows = whole.rows[:8]
    capture = whole._capture_source()
    for _ in range(3):
        whole._optimiser_step([make_pack(rows)], capture)
        parts._optimiser_step([make_pack(rows[i : i + 2]) for i in range(0, 8, 2)], capture)
    assert whole.unlogged[-1].loss == pytest.approx(parts.unlogged[-1].loss, rel=1e-5)
    for a, b in zip(whole.draft.parameters(), parts.draft.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_packs_that_make_no_whole_step_are_told(data, tmp_path, capsys):
    made = trainer(data, tmp_path / "a", **{"train.epochs": 3, "train.pack_tokens": 32})
    packs = len(made.steps)
    assert all(len(step) == 1 for step in made.steps)
    assert "left out" not in capsys.readouterr().err
    several = trainer(
        data, tmp_path / "b", **{"train.epochs": 3, "train.pack_tokens": 32, "train.accumulate": packs - 1}
    )
    assert [len(step) for step in several.steps] == [packs - 1]
    assert f"train: the last 1 of {packs} packs are left out; a step takes {packs - 1}" in capsys.readouterr().err


def test_offline_capture_gives_the_same_trajectory(data, tmp_path):
    trainer(data, tmp_path / "online").train()
    trainer(data, tmp_path / "offline", **{"train.capture": "offline"}).train()
    assert losses(tmp_path / "offline") == pytest.approx(losses(tmp_path / "online"), rel=1e-5)
    assert list((tmp_path / "offline" / "hidden_states").glob("*.safetensors"))


def test_bf16_follows_fp32(data, tmp_path):
    trainer(data, tmp_path / "fp32", **{"train.epochs": 4}).train()
    trainer(data, tmp_path / "bf16", **{"train.epochs": 4, "train.dtype": "bf16"}).train()
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.03)
    assert weights(tmp_path / "bf16")["fc.weight"].dtype == torch.float32


class Poisoned(OnlineCapture):
    """A target whose hidden states are not finite for some documents."""

    def __init__(self, target, bad_names, value):
        super().__init__(target, (1, 3, 4))
        self.bad, self.value = bad_names, value

    def __call__(self, pack):
        states, start = super().__call__(pack), 0
        for name, document in zip(pack.names, pack.documents, strict=True):
            if name in self.bad:
                states.taps_TKH[start + 2, 1, 0] = self.value
            start += len(document)
        return states


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_with_broken_hidden_states_are_quarantined(data, tmp_path, value):
    run = trainer(data, tmp_path)
    bad = [run.rows[0].id, run.rows[5].id]
    run._capture_source = lambda: Poisoned(data[1], bad, value)
    summary = run.train()
    assert sorted(summary.quarantined) == sorted(bad)
    assert all(loss == loss for loss in losses(tmp_path))


def test_a_gradient_that_is_not_finite_stops_with_the_samples(data, tmp_path):
    run = trainer(data, tmp_path)
    with torch.no_grad():
        run.draft.midlayer.mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite.*samples: p"):
        run.train()


def test_a_checkpoint_of_another_recipe_is_refused(data, tmp_path):
    trainer(data, tmp_path).train()
    with pytest.raises(CheckpointError, match="trained with another draft"):
        trainer(data, tmp_path, **{"draft.intermediate_size": 24}).train()
    with pytest.raises(CheckpointError, match="trained with another train"):
        trainer(data, tmp_path, **{"train.learning_rate": 1e-2}).train()


def test_checkpoints_know_where_they_came_from(data, tmp_path):
    trainer(data, tmp_path).train()
    state = load_state(sorted(tmp_path.glob("checkpoint-*"))[-1])
    assert state.belongs.target == data[1].identity
    assert state.belongs.vocabulary == data[2].name
    assert state.status in ("preview", "converged")
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_the_best_draft_is_kept_and_exported_not_the_newest(data, tmp_path, monkeypatch):
    """Accept length passes its peak while the loss still falls."""
    from draftsmith.drafts.directories import load_draft
    from draftsmith.training import trainer as module
    from draftsmith.training.export import export

    peaks = iter([1.5, 2.4, 2.4, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3])
    real = module.evaluate_heldout
    monkeypatch.setattr(module, "evaluate_heldout", lambda *a: real(*a).model_copy(update={"tau": {3: next(peaks)}}))
    at_step = {}
    running = trainer(
        data, tmp_path, **{"train.evaluate_every": 2, "train.checkpoint_every": 100, "train.max_steps": 8}
    )
    keep = running._evaluate

    def evaluate(capture):
        keep(capture)
        at_step[running.step] = {n: p.detach().clone() for n, p in running.draft.named_parameters()}

    running._evaluate = evaluate
    summary = running.train()
    assert sorted(at_step) == [2, 4, 6, 8]
    assert summary.best == Best(step=4, tau_held_out=2.4)
    assert summary.tau_held_out == 1.9
    best = load_file(tmp_path / "best" / "draft.safetensors")
    assert all(torch.equal(best[name], at_step[4][name]) for name in best)
    export(tmp_path, data[2], tmp_path / "draft", {"version": "0", "commit": None})
    draft, _ = load_draft(tmp_path / "draft", torch.float32, 6)
    assert torch.equal(draft.fc.weight, at_step[4]["fc.weight"].bfloat16().float())
    assert not torch.equal(draft.fc.weight, at_step[8]["fc.weight"].bfloat16().float())
    # killed between the two renames: the weights that were set aside are still the best
    (tmp_path / "best").rename(tmp_path / ".old-best")
    export(tmp_path, data[2], tmp_path / "again", {"version": "0", "commit": None})
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "draft" / name).read_bytes()


def test_a_run_that_gained_in_its_second_half_has_not_converged():
    from draftsmith.training.metrics import converged

    rising = [1.0, 1.5, 1.8, 2.0, 2.1, 2.15, 2.17, 2.18, 2.18, 2.18]  # the end of a cosine is flat
    assert not converged(rising, patience=4)
    assert converged([1.0, 1.9, 2.1, 2.16, 2.18, 2.18, 2.185, 2.18, 2.18, 2.185], patience=4)
    assert not converged([2.18, 2.18, 2.18], patience=4)  # too few to say


def test_what_a_kill_leaves_of_checkpoints_is_swept(tmp_path):
    for name in ("checkpoint-000001", "checkpoint-000002", ".old-checkpoint-000000", ".partial-000003", ".old-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    tidy(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoint-000002"]


MISFITS = {  # (what is changed of the draft, of the run, what is told)
    "taps": ({}, {"draft.taps": [1, 2, 4]}, r"draft.taps: .1, 2, 4. given, but .* has .1, 3, 4.; leave the key out"),
    "norms": ({"fc_norm": True}, {"draft.fc_norm": False}, "draft.fc_norm: False given, but .* has True"),
    "vocabulary": ({"draft_vocab": 39}, {}, "drafts 39 tokens, which are not the 40 .* vocab RECIPE --from"),
    "width": ({"hidden_size": 16}, {}, "made for hidden size 16"),
    "a narrower draft": ({"hidden_size": 16, "target_hidden_size": 32}, {}, "eagle3, 16 wide; .* 32 wide"),
    "depth": ({"taps": (1, 3, 6)}, {}, "reads layer 6, but .* has layers 0..5"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_draft_to_go_on_from_has_to_fit(data, tmp_path, name):
    _, target, vocabulary = data
    changes, run, told = MISFITS[name]
    ids = vocabulary.ids_D[: changes.pop("draft_vocab", 40)]
    config = tiny_draft(target)[0].config.model_copy(update={"draft_vocab_size": len(ids), **changes})
    write_draft(tmp_path / "draft", Eagle3Draft(config), ids, 9, {})
    with pytest.raises(CheckpointError, match=told):
        trainer(data, tmp_path / "out", **{"train.from_draft": str(tmp_path / "draft")}, **run)


def test_a_draft_of_others_is_gone_on_from_with_its_own_shape(data, tmp_path):
    """Named as others name it, without taps of ours, and too short for its target."""
    _, target, vocabulary = data
    draft, _ = tiny_draft(target)
    write_draft(tmp_path / "draft", draft, vocabulary.ids_D, 6, {})
    config = read_json(tmp_path / "draft" / "config.json")
    del config["draftsmith"]
    write_json(tmp_path / "draft" / "config.json", {**config, "max_position_embeddings": 16})
    changes = {"train.from_draft": str(tmp_path / "draft"), "draft": {"taps": [1, 3, 4]}}
    started = trainer(data, tmp_path / "out", **changes)
    assert started.draft.config.taps == (1, 3, 4)
    assert started.draft.config.intermediate_size == 40  # the target has 48
    assert started.draft.config.max_position_embeddings == 256
    assert torch.equal(started.draft.fc.weight, draft.fc.weight.bfloat16().float())
