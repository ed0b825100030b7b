"""draftsmith: draft models for speculative decoding.

From Python: `run`, `train`, `evaluate`, `load_draft` and `decode` (runs/api.py); nothing is imported before it is used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing anything here takes time in which Ctrl-C is Python's, not ours
    from typing import Any

__all__ = ["decode", "evaluate", "load_draft", "run", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from draftsmith.runs import api

        return getattr(api, name)
    raise AttributeError(f"module 'draftsmith' has no attribute {name!r}")
