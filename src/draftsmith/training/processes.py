"""The processes that train one draft together, as `torchrun` starts them; alone, every operation does nothing.

Every step's packs are dealt out to the ranks and the gradients summed, so the mathematics is that of one process at
any number of them. Only rank 0 writes.
"""

import contextlib
import datetime
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from draftsmith.core.errors import DataError, TrainingError
from draftsmith.core.recipe import TrainRecipe

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # the others wait while rank 0 regenerates
START = datetime.timedelta(minutes=10)  # until all are there
# NCCL ends a process without a word of ours, so gloo, which is waited in at every step as well, is to notice first.
AFTER_GLOO = datetime.timedelta(minutes=2)


class Groups(NamedTuple):
    """The same processes three times, as a group has one patience; the default group is for the beginning alone."""

    alone: Any
    """Outside training: the others wait for rank 0, which works alone, and it never long for them."""
    numbers: Any
    """Small ones, in training."""
    gradients: Any


class ProcessGroup:
    """`timeout_min`: how long they wait for one another while they train."""

    def __init__(self, timeout_min: float = 15.0) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.timeout_min, self._lost = timeout_min, False

    def require_possible(self, settings: TrainRecipe) -> None:
        """Raises `DataError` where so many processes cannot train like this."""
        if settings.accumulate % self.size:
            raise DataError(
                f"train.accumulate: {settings.accumulate} packs a step cannot be dealt out to {self.size} "
                f"processes; give a multiple of {self.size}"
            )
        if settings.shard and self.size > 1 and settings.optimizer == "muon":
            raise DataError(
                "train.shard: not with Muon, and AdamW wants rates of its own (train.learning_rate 1e-4 and "
                "train.head_rate 1 in published recipes); give train.optimizer adamw or train.shard false"
            )

    @property
    def main(self) -> bool:
        return self.rank == 0

    @cached_property
    def _groups(self) -> Groups:
        timeout = datetime.timedelta(minutes=self.timeout_min)
        gloo_and_nccl = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(self.local_rank)
            dist.init_process_group(gloo_and_nccl, timeout=max(timeout, START))
        return Groups(
            alone=dist.new_group(backend="gloo", timeout=timeout if self.main else PATIENCE),
            numbers=dist.new_group(backend="gloo", timeout=timeout),
            gradients=dist.new_group(backend=gloo_and_nccl, timeout=timeout + AFTER_GLOO * torch.cuda.is_available()),
        )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A process that died, or says nothing for too long, ends the others in one line."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not re.search("gloo|nccl", str(error), re.IGNORECASE):
                raise
            self._lost = True
            silent = re.search("tim(ed|e) ?out", str(error), re.IGNORECASE)
            what = f"says nothing for {self.timeout_min:g} min (train.timeout_min)" if silent else "ended"
            raise TrainingError(
                f"train: another process {what}; what is finished is kept, go on with: {_same_again()}"
            ) from None

    def device(self, asked: str) -> str:
        """`auto` with several GPUs means each rank's own."""
        return f"cuda:{self.local_rank}" if self.size > 1 and asked == "auto" and torch.cuda.is_available() else asked

    def wait(self) -> None:
        """Outside training: until rank 0 has done what it does alone, however long that takes."""
        if self.size > 1:
            with self.together():
                dist.barrier(self._groups.alone)

    def meet(self) -> None:
        """In training: all have come here."""
        if self.size > 1:
            dist.barrier(self._groups.numbers)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.rank :: self.size]

    def sum(self, values: Sequence[float]) -> list[float]:
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._groups.numbers)
        return total.tolist()

    def first(self, values: Tensor) -> Tensor:
        """The first process's, on the CPU."""
        values = values.cpu()
        if self.size > 1:
            dist.broadcast(values, 0, group=self._groups.numbers)
        return values

    def union(self, names: Sequence[str]) -> list[str]:
        if self.size == 1:
            return list(names)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, list(names), group=self._groups.numbers)
        return sorted({name for part in gathered for name in part})

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every rank's gradient becomes the sum over ranks; a rank that had no pack adds nothing."""
        for parameter in parameters if self.size > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self._groups.gradients)

    def shard(self, module: nn.Module, dtype: torch.dtype) -> None:
        """FSDP2: parameters, gradients and optimiser states lie in parts on the ranks; gradients are averaged."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        device = next(module.parameters()).device.type
        mesh = DeviceMesh.from_group(self._groups.gradients, device)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy)

    def leave(self) -> None:
        if dist.is_initialized() and not self._lost:  # one that is lost cannot be taken leave of
            dist.destroy_process_group()


def _same_again() -> str:
    """The command that started all of them, as far as one process knows it."""
    here, everywhere = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if here != everywhere:
        return "the same torchrun command on every machine"
    program = Path(sys.argv[0])
    started = ["-m", "draftsmith"] if program.parent.name == "draftsmith" else [str(program)]
    return shlex.join(["torchrun", "--nproc-per-node", str(here), *started, *sys.argv[1:]])
