"""The same code on a GPU: training gradients and decoding agree with the CPU. Skipped where there is none."""

import copy

import pytest
import torch
from models import tiny_lm, tiny_recipe, trained_draft, write_prompts

from draftsmith.core.records.data import Completion
from draftsmith.core.shape import Shape
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.drafts.eagle3.drafter import Eagle3Drafter
from draftsmith.drafts.eagle3.loss import TTTLoss
from draftsmith.drafts.objectives import Objective, pack_inputs
from draftsmith.drafts.packing import make_pack
from draftsmith.targets.local import LocalTarget

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def gradients(target, draft, ids, device):
    completions = [Completion(id="a", ids=list(range(1, 40)), spans=[[6, 39]])]
    pack = make_pack(completions, 512)
    states = target.capture(pack.documents, draft.config.taps)
    inputs = pack_inputs(
        pack,
        states.taps_TKH.clone(),
        states.last_TH.clone(),
        target.embedding_rows(),
        target.head_rows(ids),
        None,
        None,
        torch.float32,
    )
    draft = copy.deepcopy(draft).to(device).requires_grad_(True)
    loss, _ = TTTLoss(draft, 5, Objective())(inputs, [0.01] * 5)
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in draft.named_parameters()}


def test_gradients_agree_with_the_cpu():
    on_cpu, draft, ids = trained_draft("llama")
    on_gpu = LocalTarget.from_model(tiny_lm("llama").cuda())
    loss_cpu, expected = gradients(on_cpu, draft, ids, "cpu")
    loss_gpu, got = gradients(on_gpu, draft, ids, "cuda")
    assert loss_gpu == pytest.approx(loss_cpu, rel=1e-3)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("shape", [Shape(3, 1, 4), Shape(3, 4, 8)], ids=str)
def test_decoding_is_lossless(shape):
    _, draft, ids = trained_draft("gemma3")
    target = LocalTarget.from_model(tiny_lm("gemma3").cuda())
    decoder = Decoder(target, Eagle3Drafter(copy.deepcopy(draft).cuda(), ids, target.embedding_rows()))
    prompt = list(range(3, 17))
    plain = Decoder(target).generate(prompt, Sampling(), 40)
    assert decoder.generate(prompt, Sampling(), 40, shape).ids == plain.ids


def test_a_whole_run(tmp_path):
    from models import save_tiny_target

    from draftsmith.runs.pipeline import run_pipeline
    from draftsmith.runs.run import Run

    model = save_tiny_target(tmp_path / "model")
    changes = {"device": "cuda", "target.dtype": "bf16", "train.dtype": "bf16"}
    recipe = tiny_recipe(model, write_prompts(tmp_path / "p.jsonl"), **changes)
    report = run_pipeline(Run(recipe, tmp_path / "run", ["test"]))
    assert report.stat().st_size > 10_000
