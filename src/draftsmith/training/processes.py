"""The processes that train one draft together, as `torchrun` starts them; alone, every operation does nothing.

Every step's packs are dealt out to the ranks and the gradients summed, so the mathematics is that of one process at
any number of them. Only rank 0 writes.
"""

import datetime
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # the others wait while rank 0 regenerates
BUCKET = 64 * 2**20  # numbers summed at once: few messages, little extra memory


class ProcessGroup:
    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))

    @property
    def main(self) -> bool:
        return self.rank == 0

    @cached_property
    def _control(self) -> Any:
        """The group for waiting and small numbers; gradients go through the default group."""
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(self.local_rank)
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        return dist.new_group(backend="gloo", timeout=PATIENCE)

    def device(self, asked: str) -> str:
        """`auto` with several GPUs means each rank's own."""
        return f"cuda:{self.local_rank}" if self.size > 1 and asked == "auto" and torch.cuda.is_available() else asked

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier(self._control)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.rank :: self.size]

    def sum(self, values: Sequence[float]) -> list[float]:
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._control)
        return total.tolist()

    def union(self, names: Sequence[str]) -> list[str]:
        if self.size == 1:
            return list(names)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, list(names), group=self._control)
        return sorted({name for part in gathered for name in part})

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every rank's gradient becomes the sum over ranks; a rank that had no pack adds nothing."""
        if self.size == 1:
            return
        self._control  # noqa: B018 - makes sure that the processes know each other
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        bucket: list[Tensor] = []
        for parameter in parameters:
            bucket.append(parameter.grad)  # type: ignore[arg-type]
            if sum(g.numel() for g in bucket) >= BUCKET or parameter is parameters[-1]:
                flat = torch.cat([g.flatten() for g in bucket])
                dist.all_reduce(flat)
                for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    grad.copy_(part.view_as(grad))
                bucket = []

    def shard(self, module: nn.Module, dtype: torch.dtype) -> None:
        """FSDP2: parameters, gradients and optimiser states lie in parts on the ranks; gradients are averaged."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self._control  # noqa: B018
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mp_policy=policy)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
