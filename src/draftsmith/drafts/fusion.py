"""Chains of element-wise operations as few GPU kernels, by torch.compile.

A GPU reads and writes its memory once for each operation of eager PyTorch; the logits of a step are larger than all
else that it touches. The functions that are marked stand as plain PyTorch and run so everywhere else.
"""

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from draftsmith.core.progress import say

P = ParamSpec("P")
R = TypeVar("R")

BACKEND = "inductor"
_failed = False


def compiles(x: Any) -> bool:
    """Whether functions of this argument are compiled."""
    return not _failed and isinstance(x, Tensor) and x.is_cuda


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """The function, compiled where its first argument is on a CUDA device and this machine's compilers can.

    What it changes in place it must make itself: after a compiler failed it is called again.
    """

    @cache
    def compiled() -> Any:
        _prepare()
        return torch.compile(function, dynamic=True, backend=BACKEND)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not compiles(args[0]):
            return function(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException

        try:
            return compiled()(*args, **kwargs)
        except TorchDynamoException as error:
            _give_up(error)
            return function(*args, **kwargs)

    return run


@cache
def _prepare() -> None:
    logging.getLogger("torch.utils._sympy.interp").setLevel(logging.ERROR)  # of bounds, nobody's fault
    say("compiling for this GPU, half a minute once")


def _give_up(error: Exception) -> None:
    global _failed
    _failed = True
    reason = getattr(error, "inner_exception", None) or error.__cause__ or error
    lines = str(reason).strip().splitlines()
    say(f"train: torch.compile fails here ({lines[0] if lines else type(reason).__name__}); going on without it")
