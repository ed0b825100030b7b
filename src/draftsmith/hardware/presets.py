"""Named machines for predictions and plans, where the machine that will serve is not at hand to be measured.

Bandwidths and peaks are the vendors' (dense bf16), `efficiency` what served decoding reaches of the bandwidth;
all-reduce latencies are published measurements. docs/speedup-model.md says how far that carries. A measured probe
beats every preset.
"""

from dataclasses import dataclass

from draftsmith.core.errors import RecipeError

GB = 1e9
LAYER_S = 30e-6


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
    efficiency: float = 0.8
    network_bytes_s: float = 3e9  # to other machines, 25 Gbit/s Ethernet


# NVLink: one-shot kernels. PCIe P2P: NCCL in a CUDA graph, 4 ranks behind one switch (haohervchb/sglang-V100#2).
# Through the host: NCCL on 8 RTX 6000D, 45 us at 4 KB and 344 us at 64 KB (sgl-project/sglang#32479); the points at
# 1 MB are these lines' own slopes, carried on.
_NVLINK = ((4e3, 5e-6), (16e3, 6e-6), (128e3, 12e-6), (1e6, 35e-6))
_PCIE_P2P = ((4e3, 19.4e-6), (16e3, 22.3e-6), (128e3, 51.8e-6), (384e3, 83.5e-6), (1e6, 160e-6))
_PCIE_HOST = ((4e3, 45e-6), (64e3, 344e-6), (1e6, 5e-3))

# This project's own machine (benchmarks/results/probe-epyc-2.json): copies and products as the probe told,
# efficiency and layer time so that its forward of one token and its draft step come out.
CPU = Machine("cpu-epyc-2", 1, 25 * GB, 45e9, 0.9e12, 0.3e-3, efficiency=0.5, network_bytes_s=1e9)

PRESETS = {
    machine.name: machine
    for machine in (
        Machine("h100-nvlink-8", 8, 80 * GB, 3.35e12, 0.99e15, LAYER_S, _NVLINK),
        Machine("h200-nvlink-8", 8, 141 * GB, 4.8e12, 0.99e15, LAYER_S, _NVLINK),
        Machine("h200-nvlink-4", 4, 141 * GB, 4.8e12, 0.99e15, LAYER_S, _NVLINK),
        Machine("pcie-p2p-8", 8, 96 * GB, 1.6e12, 0.25e15, LAYER_S, _PCIE_P2P),
        Machine("pcie-host-8", 8, 96 * GB, 1.6e12, 0.25e15, LAYER_S, _PCIE_HOST),
        Machine("h100-1", 1, 80 * GB, 3.35e12, 0.99e15, LAYER_S),
        Machine("h200-1", 1, 141 * GB, 4.8e12, 0.99e15, LAYER_S),
        Machine("a100-1", 1, 80 * GB, 2.0e12, 0.312e15, LAYER_S),
        Machine("rtx4090-1", 1, 24 * GB, 1.0e12, 0.165e15, LAYER_S),
        CPU,
    )
}


def preset(name: str) -> Machine:
    if name not in PRESETS:
        raise RecipeError(f"--hardware: {name!r} given; one of here, {', '.join(PRESETS)}")
    return PRESETS[name]


# As CUDA names them; the first that fits. An H100 PCIe or NVL is not the SXM module of the presets.
_CHIPS = {
    "H100 PCIe": 0.756e15,
    "H100 NVL": 0.835e15,
    "H100": PRESETS["h100-1"].flops_s,
    "H200": PRESETS["h200-1"].flops_s,
    "A100": PRESETS["a100-1"].flops_s,
    "RTX 4090": PRESETS["rtx4090-1"].flops_s,
}


def peak_flops_s(device_name: str) -> float | None:
    """Dense bf16 peak of a whole GPU, None where it is not known."""
    if "MIG" in device_name:
        return None
    return next((peak for chip, peak in _CHIPS.items() if chip in device_name), None)
