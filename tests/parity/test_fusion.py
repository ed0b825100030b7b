"""What is compiled on a GPU is what plain PyTorch computes; by a compiler that makes those graphs and no code."""

import pytest
import torch
from gpu_cases import loss_and_gradients, on_cpu
from torch import Tensor

from draftsmith.drafts import fusion

pytestmark = pytest.mark.filterwarnings("default")  # those of torch's compiler
CPU = torch.device("cpu")


@pytest.fixture
def compiling(monkeypatch):
    """Everything that is marked is compiled, from scratch and afterwards no more."""
    torch.compiler.reset()
    monkeypatch.setattr(fusion, "_failed", False)
    monkeypatch.setattr(fusion, "compiles", lambda x: isinstance(x, Tensor) and not fusion._failed)
    monkeypatch.setattr(fusion, "BACKEND", "aot_eager")
    yield
    torch.compiler.reset()


def test_a_compiled_step_is_the_plain_one(monkeypatch, compiling):
    """Loss within 1e-3 is asked for; in fp32 it is the same but for the order of sums."""
    compiled = []
    kept = fusion.torch.compile
    monkeypatch.setattr(
        fusion.torch, "compile", lambda function, **how: compiled.append(function.__name__) or kept(function, **how)
    )
    loss, gradients = loss_and_gradients(on_cpu("llama")[0], "llama", torch.float32, CPU)
    assert {"weighted", "merged", "own_gradients", "rotate", "gated"} <= set(compiled)
    monkeypatch.setattr(fusion, "compiles", lambda x: False)
    expected, wanted = loss_and_gradients(on_cpu("llama")[0], "llama", torch.float32, CPU)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_a_compiler_that_fails_is_told_once_and_done_without(monkeypatch, compiling, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no working C compiler")

    monkeypatch.setattr(fusion, "BACKEND", broken)
    double, half = fusion.fused(lambda x: x * 2 + 1), fusion.fused(lambda x: x / 2 + 1)
    assert double(torch.ones(3)).tolist() == [3, 3, 3]
    assert half(torch.ones(2)).tolist() == [1.5, 1.5]
    told = capsys.readouterr().err
    assert told.count("torch.compile fails here") == 1
    assert "no working C compiler" in told
