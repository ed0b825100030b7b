"""SGLang's own server on a CPU; run by the SGLang environment's Python with the server's flags.

SGLang lets only CPUs with AMX use the attention that EAGLE-3 needs; the tier's stand-in kernels need no AMX. This
stands at module level, because the engine's child processes import this file again.
"""

import os
import sys

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import sglang.srt.arg_groups.overrides as overrides

_get_platform = overrides.get_platform


class _PlatformWithAmx:
    has_amx = True

    def __init__(self, platform):
        self._platform = platform

    def __getattr__(self, name):
        return getattr(self._platform, name)


def _plain_norms() -> None:
    """MiniMax-M2 norms queries and keys with a Triton kernel, which needs a GPU; its own module does the same."""
    from sglang.srt.models import minimax_m2

    minimax_m2.MiniMaxM2QKRMSNorm._forward_naive = lambda self, q, k: (self._q_norm(q), self._k_norm(k))


if any("minimax" in word for word in sys.argv):
    _plain_norms()
overrides.get_platform = lambda: _PlatformWithAmx(_get_platform())

CPU = "--device cpu --attention-backend intel_amx --max-running-requests 4 --mem-fraction-static 0.3"
CPU += " --disable-cuda-graph --disable-overlap-schedule --disable-radix-cache --skip-server-warmup"

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args([*sys.argv[1:], *CPU.split()]))
