"""Every error a user can cause. The command line prints them without a traceback and exits with code 2; anything else
is a bug."""

from draftsmith.core.secrets import line


class DraftsmithError(ValueError):
    """One line: what was given, what is allowed, which key or flag mends it; no secret in it."""

    def __init__(self, text: str):
        super().__init__(line(text))


class RecipeError(DraftsmithError):
    """A recipe or flag that cannot be run."""


class DataError(DraftsmithError):
    """Prompts, completions or a template that cannot be used."""


class TargetError(DraftsmithError):
    """A target or tokenizer that cannot be loaded or lacks a hook."""


class CheckpointError(DraftsmithError):
    """A checkpoint or draft directory that is damaged or belongs to another run."""


class TrainingError(DraftsmithError):
    """Training that had to stop (non-finite gradients, no loss tokens)."""


class MemoryShortage(DraftsmithError):
    """A card or machine that cannot hold what was asked of it."""


class ServeError(DraftsmithError):
    """An engine that cannot be started or does not answer."""


class PublishError(DraftsmithError):
    """A hub that does not take the draft."""


# How torch says it where it raises a plain RuntimeError: of the host, and of a product's workspace on the card.
_SHORT_OF_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch says that the card or the host has no memory left."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(text in str(error) for text in _SHORT_OF_MEMORY)


def shortage(error: BaseException) -> str:
    """What such an error tells of sizes, without its advice: `CUDA out of memory. Tried to allocate 2.00 GiB. ...`"""
    return ". ".join(" ".join(str(error).split()).split(". ")[:3]) or "out of memory"
