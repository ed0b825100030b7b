"""Named machines for predictions and plans, where the machine that will serve is not at hand to be measured.

Bandwidths and peaks are the vendors' (dense bf16), `efficiency` what served decoding reaches of them; all-reduce
latencies are published measurements (vLLM and SGLang threads on one-shot and NCCL all-reduce; docs/speedup-model.md
names them). A measured probe beats every preset.
"""

from dataclasses import dataclass

from draftsmith.errors import RecipeError

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """What a speed-up depends on; per GPU where nothing else is said.

    `all_reduce`: points (bytes, seconds) of one all-reduce over all GPUs, ascending; empty for a single device.
    `launch_s`: fixed time of one decoder layer that no bandwidth explains (launches, synchronisation, small kernels).
    """

    name: str
    gpus: int
    memory_bytes: float
    bandwidth_bytes_s: float
    flops_s: float
    launch_s: float
    all_reduce: tuple[tuple[float, float], ...] = ()
    efficiency: float = 0.7
    interconnect: str = "none"
    network_bytes_s: float = 3e9  # to other machines, 25 Gbit/s Ethernet


_NVLINK = ((4e3, 5e-6), (16e3, 6e-6), (128e3, 12e-6), (1e6, 35e-6))
_PCIE_P2P = ((4e3, 19e-6), (16e3, 22e-6), (128e3, 52e-6), (1e6, 190e-6))
_PCIE_HOST = ((4e3, 200e-6), (16e3, 210e-6), (128e3, 320e-6), (1e6, 900e-6))

PRESETS = {
    machine.name: machine
    for machine in (
        Machine("h100-nvlink-8", 8, 80 * GB, 3.35e12, 0.99e15, 8e-6, _NVLINK, interconnect="NVLink"),
        Machine("h200-nvlink-8", 8, 141 * GB, 4.8e12, 0.99e15, 8e-6, _NVLINK, interconnect="NVLink"),
        Machine("h200-nvlink-4", 4, 141 * GB, 4.8e12, 0.99e15, 8e-6, _NVLINK, interconnect="NVLink"),
        Machine("pcie-p2p-8", 8, 96 * GB, 1.6e12, 0.25e15, 8e-6, _PCIE_P2P, interconnect="PCIe, peer to peer"),
        Machine("pcie-host-8", 8, 96 * GB, 1.6e12, 0.25e15, 8e-6, _PCIE_HOST, interconnect="PCIe, through the host"),
        Machine("h100-1", 1, 80 * GB, 3.35e12, 0.99e15, 8e-6),
        Machine("h200-1", 1, 141 * GB, 4.8e12, 0.99e15, 8e-6),
        Machine("a100-1", 1, 80 * GB, 2.0e12, 0.312e15, 8e-6),
        Machine("rtx4090-1", 1, 24 * GB, 1.0e12, 0.165e15, 8e-6),
    )
}


def preset(name: str) -> Machine:
    if name not in PRESETS:
        raise RecipeError(f"--hardware: {name!r} given; one of here, {', '.join(PRESETS)}")
    return PRESETS[name]
