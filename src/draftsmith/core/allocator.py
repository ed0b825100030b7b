"""Make glibc keep freed memory instead of giving it back to the kernel after every large tensor.

Logits over a 262,144-token vocabulary are tens of megabytes a step; by default each is mapped, zeroed page by page
and unmapped again, which costs about as much as the matrix product that fills it.
"""

import ctypes
import gc
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def keep_freed_memory() -> None:
    """No effect where the C library is not glibc."""
    if mallopt := _glibc("mallopt"):
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Give it back once, between two phases that need different sizes."""
    if malloc_trim := _glibc("malloc_trim"):
        gc.collect()
        malloc_trim(0)
