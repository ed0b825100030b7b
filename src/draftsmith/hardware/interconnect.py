"""What GPUs (or, to try the code, processes) need to agree: all-reduce latency and the topology behind it."""

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from draftsmith.core.records.base import Points
from draftsmith.core.records.machine import Link

SIZES = tuple(4096 * 4**i for i in range(5))  # 4 KB to 1 MB
ROUNDS = 30


def clock(device: torch.device) -> float:
    """Seconds, with all work of the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _worker(rank: int, processes: int, backend: str, directory: str) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{directory}/meet", rank=rank, world_size=processes)
    lines = []
    for size in SIZES:
        data = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
        for _ in range(5):
            dist.all_reduce(data)
        seconds = []
        for _ in range(ROUNDS):
            started = clock(device)
            dist.all_reduce(data)
            seconds.append(clock(device) - started)
        lines.append(f"{size} {sorted(seconds)[ROUNDS // 2]}")
    if rank == 0:
        Path(directory, "times").write_text("\n".join(lines))
    dist.barrier()
    dist.destroy_process_group()


def all_reduce_latency(processes: int, backend: str) -> Points:
    """(bytes, seconds) of one all-reduce of bf16 values, the median of 30, for 4 KB to 1 MB.

    backend: nccl (a GPU for each process) or gloo. Seconds include the launch; inside a CUDA graph it is less.
    """
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_worker, (processes, backend, directory), nprocs=processes)  # type: ignore[attr-defined]
        rows = Path(directory, "times").read_text().splitlines()
    return tuple((float(size), float(seconds)) for size, seconds in map(str.split, rows))


def topology() -> list[Link]:
    """How each pair of GPUs is joined."""
    gpus = torch.cuda.device_count()
    pairs = [(i, j) for i in range(gpus) for j in range(i + 1, gpus)]
    linked = _nvlink_pairs(pairs) if pairs else None  # without a GPU there may be no driver to ask
    return [
        Link(pair=(i, j), peer_access=torch.cuda.can_device_access_peer(i, j), nvlink=linked[i, j] if linked else None)
        for i, j in pairs
    ]


def _nvlink_pairs(pairs: list[tuple[int, int]]) -> dict[tuple[int, int], bool] | None:
    """Whether NVML can reach each pair over NVLink, switches included. GPUs go by UUID, as NVML knows nothing of
    CUDA_VISIBLE_DEVICES."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    pynvml.nvmlInit()
    uuids = [torch.cuda.get_device_properties(gpu).uuid for gpu in range(torch.cuda.device_count())]
    handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
    link = pynvml.NVML_P2P_CAPS_INDEX_NVLINK
    return {
        (i, j): pynvml.nvmlDeviceGetP2PStatus(handles[i], handles[j], link) == pynvml.NVML_P2P_STATUS_OK
        for i, j in pairs
    }


def in_words(links: list[Link]) -> str:
    """By the worst pair."""
    if not links:
        return "a single device"
    if all(link.nvlink for link in links):
        return "NVLink"
    if all(link.peer_access for link in links):
        return "NVLink or PCIe, peer to peer" if links[0].nvlink is None else "PCIe, peer to peer"
    return "PCIe, through the host (no peer access)"
