"""What tells a model from another one under the same name: its weights, its tokenizer, what it thinks of a text."""

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.core.errors import TargetError
from draftsmith.core.files import digest

PROBE = "The quick brown fox jumps over the lazy dog, and then it sleeps."
SAME_LOGPROB = 0.15  # nats a token: engines and machines that run one model differ by rounding only
SAMPLE_BYTES = 512
LONGEST_HEADER = 100_000_000  # bytes, as the library has it


def tokenizer_hash(tokenizer: Any) -> str:
    """Identity of the mapping from text to ids, by vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def template_hash(tokenizer: Any, options: Mapping[str, Any] | None) -> str:
    """Of the tokenizer's own chat template and the options that it is given."""
    return digest(getattr(tokenizer, "chat_template", None), dict(options or {}))


def weights_hash(place: str, revision: str | None = None) -> str | None:
    """Of the safetensors files of a model: their headers, and bytes from the middle of every tensor, so that a model of
    a terabyte is told from another one in seconds. None where there are none. Raises `TargetError` for a
    file that is no such file."""
    from huggingface_hub import try_to_load_from_cache

    directory = Path(place)
    if not directory.is_dir():
        cached = try_to_load_from_cache(place, "config.json", revision=revision)
        if not isinstance(cached, str):
            return None
        directory = Path(cached).parent
    status = [(path, path.stat()) for path in sorted(directory.glob("*.safetensors"))]
    return _hash_of(tuple((path, known.st_size, known.st_mtime_ns) for path, known in status)) if status else None


@functools.lru_cache(maxsize=4)
def _hash_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    total = hashlib.sha256()
    for path, size, _ in files:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > min(size, LONGEST_HEADER):
                    raise ValueError("its header is longer than itself, or than any")
                header = file.read(length)
                total.update(header)
                for name, tensor in json.loads(header).items():
                    if name != "__metadata__":
                        start, end = tensor["data_offsets"]
                        file.seek(8 + length + max(start, (start + end - SAMPLE_BYTES) // 2))
                        total.update(file.read(min(SAMPLE_BYTES, max(0, end - start))))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TargetError(f"target.model: {path} is no safetensors file ({error}); fetch it again") from None
    return total.hexdigest()[:16]


def nats_apart(known: Sequence[float], found: Sequence[float]) -> float:
    """Of a token, on average."""
    return sum(abs(a - b) for a, b in zip(known, found, strict=True)) / max(1, len(found))


def require_same_logprobs(known: Sequence[float], found: Sequence[float], whose: str) -> None:
    """Raises `TargetError` unless two models think the same of the probe text."""
    if not all(map(math.isfinite, (*known, *found))):
        raise TargetError(f"{whose} gives no numbers for a probe text; give a target.dtype of a wider range")
    if (away := nats_apart(known, found)) > SAME_LOGPROB:
        raise TargetError(
            f"{whose} has other weights under the same name: the log-probabilities of a probe text are {away:.2f} nats "
            "a token away from those seen first"
        )
