"""The same code on a real GPU as on the pretended one of tests/unit/test_pretended_gpu.py, and what only a real one can
show: the flash kernel itself, streams, bytes as the allocator counts them. Skipped where there is none."""

import warnings

import pytest
import torch
from gpu_cases import (
    ARCHITECTURES,
    SAMPLINGS,
    SHAPES,
    a_pack,
    decoded,
    loss_and_gradients,
    on_cpu,
    target_on,
    trainer_on,
)
from live_bytes import MINIMAX_M27, QWEN3_8B, as_on_cuda, step_bytes
from models import save_tiny_target, tiny_recipe, write_prompts

from draftsmith.decoding import flash
from draftsmith.decoding.sampling import Sampling
from draftsmith.drafts.eagle3.chain_attention import ChainAttention
from draftsmith.drafts.packing import make_pack
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run
from draftsmith.training.capture import PrefetchedCapture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_agree_with_the_cpu(architecture):
    expected, wanted = loss_and_gradients(on_cpu(architecture)[0], architecture, torch.float32, CPU)
    loss, gradients = loss_and_gradients(target_on(GPU, architecture), architecture, torch.float32, GPU)
    assert loss == pytest.approx(expected, rel=1e-3)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_is_lossless(architecture):
    target = target_on(GPU, architecture)
    plain = decoded(target, architecture, GPU, None, Sampling())
    for shape in SHAPES:
        for sampling in SAMPLINGS:
            ids = decoded(target, architecture, GPU, shape, sampling).ids
            assert ids == plain.ids if sampling.greedy else len(ids) == len(plain.ids)


@pytest.mark.parametrize("heads", [(4, 2, 8), (8, 2, 128), (4, 4, 256)], ids=str)
def test_the_flash_kernel_equals_plain_attention(heads):
    """Causal at the bottom right, segments that share keys, grouped heads, backward with merged log-sum-exps."""
    pack = a_pack()
    generator = torch.Generator().manual_seed(5)
    queries, keys, size = heads

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().to(GPU)

    chains, tokens = pack.chain_count, len(pack.ids_T)
    own = (3, chains, keys, size)
    inputs = leaf(chains, queries, size), leaf(tokens, keys, size), leaf(tokens, keys, size), leaf(*own), leaf(*own)
    assert flash.takes(inputs[0])
    upstream = leaf(chains, queries, size)
    found = []
    for kind in (torch.bfloat16, torch.float32):  # the second is no dtype of the flash kernel
        given = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = ChainAttention.apply(*given, pack.index(GPU))
        (out * upstream.to(kind)).sum().backward()
        found.append([x.float() for x in (out.detach(), *(x.grad for x in given))])
    for by_flash, plain in zip(*found, strict=True):
        assert (by_flash - plain).norm() < 0.01 * plain.norm()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_targets_packed_attention(architecture):
    documents = a_pack().documents
    got = target_on(GPU, architecture, torch.bfloat16).capture(documents, (1, 4)).last_TH.float().cpu()
    wanted = target_on(CPU, architecture, torch.bfloat16).capture(documents, (1, 4)).last_TH.float()
    assert (got - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("capture", ["online", "offline"])
def test_prefetched_packs_train_as_the_cpus(tmp_path, capture):
    """On a stream of their own: nothing is read before it is there or after it is given away."""
    changes = {"train.capture": capture, "train.epochs": 8}
    on, cpu = (
        trainer_on(t, tmp_path / str(i), **changes) for i, t in enumerate((target_on(GPU, "llama"), on_cpu("llama")[0]))
    )
    source = on._ahead(on._capture_source(), on._packs_to_come())
    assert isinstance(source, PrefetchedCapture)
    sources = source, cpu._capture_source()
    for step in on.steps:
        for trainer, states in zip((on, cpu), sources, strict=True):
            trainer._optimiser_step([make_pack([trainer.rows[i] for i in pack]) for pack in step], states)
            trainer.step += 1
    assert sum(m.loss for m in on.unlogged) == pytest.approx(sum(m.loss for m in cpu.unlogged), rel=1e-2)


def test_the_host_waits_once_a_training_step(tmp_path):
    run = trainer_on(target_on(GPU, "llama"), tmp_path, **{"train.capture": "offline"})
    source = run._ahead(run._capture_source(), run._packs_to_come())
    packs = [[make_pack([run.rows[i] for i in pack]) for pack in step] for step in run.steps[:2]]
    run._optimiser_step(packs[0], source)  # the first one sets libraries up
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            run._optimiser_step(packs[1], source)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) <= 1, [str(w.message) for w in waits]


@pytest.mark.parametrize("dimensions", [QWEN3_8B, MINIMAX_M27], ids=["Qwen3-8B", "MiniMax-M2.7"])
def test_bytes_as_counted(dimensions):
    with as_on_cuda():
        counted = step_bytes(dimensions, 4, 1024)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step_bytes(dimensions, 4, 1024, GPU)
    measured = torch.cuda.max_memory_allocated() - before
    assert measured == pytest.approx(counted.base + counted.peak, rel=0.1)


def test_a_whole_run(tmp_path):
    model = save_tiny_target(tmp_path / "model")
    changes = {"device": "cuda", "target.dtype": "bf16", "train.dtype": "bf16"}
    changes |= {"regenerate.engine": "embedded", "evaluate.engine": "embedded"}  # whether vLLM is installed or not
    recipe = tiny_recipe(model, write_prompts(tmp_path / "p.jsonl"), **changes)
    run = Run(recipe, tmp_path / "run", ["test"])
    run_pipeline(run)
    assert run.files.report.stat().st_size > 10_000
