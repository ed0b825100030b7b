"""Make glibc keep freed memory instead of giving it back to the kernel after every large tensor.

Logits over a 262,144-token vocabulary are tens of megabytes a step; by default each is mapped, zeroed page by page
and unmapped again, which costs about as much as the matrix product that fills it.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """No effect where the C library is not glibc."""
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
