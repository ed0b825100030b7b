"""Everything that touches a device, on a pretended GPU: the CPU's own numbers come out, no tensor of the CPU meets one
of the device, and the host waits for the device no oftener than is said here. tests/gpu has the same on a real one."""

import re

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
    step_on,
    target_on,
    trainer_on,
)
from live_bytes import MINIMAX_M27, QWEN3_8B, draft_config, long_pack, step_bytes
from pretended_gpu import NAME, DeviceMix, PretendedGPU
from torch.utils.flop_counter import FlopCounterMode

from draftsmith.core import progress
from draftsmith.core.recipe import TrainRecipe
from draftsmith.decoding import flash
from draftsmith.drafts.eagle3.chain_attention import ChainAttention
from draftsmith.drafts.packing import make_pack
from draftsmith.hardware.presets import peak_flops_s

CPU = torch.device("cpu")
GIGABYTE = 1e9


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(flash, "takes", lambda query: query.device.type == NAME and query.dtype == torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operators this small are slower on two
    with PretendedGPU() as gpu:
        yield gpu
    torch.set_num_threads(threads)


def test_the_pretended_gpu_refuses_and_counts(gpu):
    on = torch.arange(6.0).to(gpu.device)
    with pytest.raises(DeviceMix):
        on + torch.arange(6.0)
    with pytest.raises(DeviceMix):
        torch.cat([on, torch.zeros(1)])
    with gpu.counted():
        assert (on * 2 + torch.tensor(1.0)).sum().cpu() == 36  # a number of the CPU may meet it
        assert gpu.kernels >= 3
        assert gpu.waits == 1
    with gpu.counted():
        assert on[on > 3].tolist() == [4, 5]
        assert torch.zeros(2).to(gpu.device, non_blocking=True).shape == (2,)
        assert sorted(line.split(" at ")[0] for line in gpu.where) == ["a boolean index", "tolist"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_and_decoding_give_the_cpus_numbers(gpu, architecture):
    cpu, on = on_cpu(architecture)[0], target_on(gpu.device, architecture)
    assert on.library is None
    loss, gradients = loss_and_gradients(on, architecture, torch.float32, gpu.device)
    expected, wanted = loss_and_gradients(cpu, architecture, torch.float32, CPU)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4, rtol=1e-4)
    turn = ARCHITECTURES.index(architecture) % 2
    for shape, sampling in zip(SHAPES, SAMPLINGS[::-1] if turn else SAMPLINGS, strict=True):
        with gpu.counted():
            on_device = decoded(on, architecture, gpu.device, shape, sampling)
            steps = 2 + len(on_device.verified)
            assert gpu.kernels <= 900 * steps
            if architecture != "minimax_m2":  # transformers' loop over experts asks for each
                assert gpu.waits <= 18 * steps, gpu.where
        assert on_device.ids == decoded(cpu, architecture, CPU, shape, sampling).ids


@pytest.mark.parametrize(
    ("capture", "optimizer", "objective"),
    [("online", "adamw", "soft_ce"), ("offline", "muon", "lk_lambda"), ("offline", "muon", "lk_alpha")],
)
def test_the_host_waits_once_a_training_step(gpu, tmp_path, capture, optimizer, objective):
    changes = {"train.capture": capture, "train.optimizer": optimizer, "train.objective": objective}
    on = trainer_on(target_on(gpu.device, "llama"), tmp_path / "gpu", **changes)
    cpu = trainer_on(on_cpu("llama")[0], tmp_path / "cpu", **changes)
    sources = on._capture_source(), cpu._capture_source()
    for step in range(2):
        packs = [make_pack([on.rows[i] for i in indices]) for indices in on.steps[step]]
        with gpu.counted():
            on._optimiser_step(packs, sources[0])
            # the target's token ids go to the device with every pack that it captures
            assert gpu.waits == (1 + len(packs) if capture == "online" else 1), gpu.where
        cpu._optimiser_step([make_pack([cpu.rows[i] for i in indices]) for indices in cpu.steps[step]], sources[1])
        assert on.unlogged[-1].loss == pytest.approx(cpu.unlogged[-1].loss, rel=1e-4)
    assert on.unlogged[-1].gradient_norm == pytest.approx(cpu.unlogged[-1].gradient_norm, rel=1e-3)


def test_flash_and_plain_attention_agree(gpu):
    """In bf16, whose own rounding is the tolerance, for segments that share keys and for grouped heads."""
    pack = a_pack()
    generator = torch.Generator().manual_seed(5)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().to(gpu.device).requires_grad_()

    chains, tokens = pack.chain_count, len(pack.ids_T)
    inputs = leaf(chains, 4, 8), leaf(tokens, 2, 8), leaf(tokens, 2, 8), leaf(3, chains, 2, 8), leaf(3, chains, 2, 8)
    upstream = torch.randn(chains, 4, 8, generator=generator).bfloat16().to(gpu.device)
    found = []
    for kind in (torch.bfloat16, torch.float32):  # the second is no dtype of the flash kernel
        given = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = ChainAttention.apply(*given, pack.index(gpu.device))
        (out * upstream.to(kind)).sum().backward()
        found.append([x.float().cpu() for x in (out.detach(), *(x.grad for x in given))])
    for flash_, plain in zip(*found, strict=True):
        assert (flash_ - plain).norm() < 0.01 * plain.norm()


def test_a_flash_step_launches_as_much_for_many_documents_as_for_few(gpu):
    kernels = []
    for count in (2, 8):
        pack = a_pack(count)
        with gpu.counted():
            step_on(gpu.device, on_cpu("llama")[0], pack, torch.bfloat16)
            assert gpu.waits == 0, gpu.where
            kernels.append(gpu.kernels)
    assert kernels[0] == kernels[1] < 1500


def test_the_targets_packed_attention_is_one_launch(gpu):
    """bf16 logits by the flash kernel equal those by one product for each document; gemma3 has windows."""
    on, cpu = target_on(gpu.device, "gemma3", torch.bfloat16), target_on(CPU, "gemma3", torch.bfloat16)
    assert on.library is None
    documents = a_pack().documents
    with gpu.counted():
        got = on.capture(documents, (1, 4)).last_TH
        together = gpu.kernels
    got = got.float().cpu()
    wanted = cpu.capture(documents, (1, 4)).last_TH.float()
    assert (got - wanted).norm() < 0.03 * wanted.norm()
    with gpu.counted():
        on.capture(documents[:1], (1, 4))
        assert gpu.kernels == together - (len(documents) - 1)  # one `arange` of positions for each document


@pytest.mark.parametrize(
    ("dimensions", "by_flash", "length", "most"),
    [(QWEN3_8B, False, 16384, 40), (MINIMAX_M27, True, 32768, 60)],
    ids=["Qwen3-8B", "MiniMax-M2.7"],
)
def test_bytes_of_a_real_step(monkeypatch, dimensions, by_flash, length, most):
    """Parameters and their gradients in fp32, moments and the target come on top. Scores of all queries at once would
    take 128 and 654 GB."""
    monkeypatch.setattr(flash, "takes", lambda query: by_flash)
    assert step_bytes(dimensions, 1, length).peak < most * GIGABYTE


def test_the_arithmetic_of_mfu_is_what_torch_counts(monkeypatch):
    monkeypatch.setattr(flash, "takes", lambda query: True)
    with FlopCounterMode(display=False) as counter:
        step_bytes(QWEN3_8B, 2, 1024)
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "flash" not in str(op))
    pack, size = long_pack(2, 1024), draft_config(QWEN3_8B, 1024)
    assert size.training_flops(TrainRecipe(), 1, len(pack.ids_T), pack.chain_count) == pytest.approx(products, rel=0.02)
    [segment] = long_pack(1, 1024).segments
    assert segment.pairs == sum(chain + 1 for chain in range(segment.first, segment.last))
    assert size.attention_flops(TrainRecipe(), 10.0) == 12 * 7 * 10 * 32 * 128


def test_the_share_of_the_peak_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(progress, "QUIET_S", 0)
    run = trainer_on(on_cpu("llama")[0], tmp_path)
    run.peak_flops_s = 1e6
    run.train()
    assert re.search(r"train: .* loss \d+\.\d+, \d+% MFU in", capsys.readouterr().err)
    assert peak_flops_s("NVIDIA H100 80GB HBM3") == 0.99e15
    assert peak_flops_s("NVIDIA H100 PCIe") == 0.756e15
    assert peak_flops_s("NVIDIA GeForce GTX 1080") is None
