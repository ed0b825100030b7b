"""The .safetensors files of a draft directory, by one spelling of the names that engines accept."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftsmith.core import files
from draftsmith.core.errors import CheckpointError

FLOATS = {"bfloat16", "float16", "float32", "float64"}
WHOLE = {"int64", "int32", "int16", "int8", "uint8"}
DTYPES = {  # of a safetensors header, in torch's words
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2"},
}
EMBEDDING = "embed_tokens.weight"
Shapes = dict[str, tuple[int, ...]]


def canonical(name: str) -> str:
    """One spelling for the names that engines accept."""
    name = name.removeprefix("model.")
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name


def weight_files(directory: Path) -> list[Path]:
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        pickles = [*directory.glob("*.bin"), *directory.glob("*.pt")]
        hint = f" ({pickles[0].name} is pickled, which draftsmith does not load)" if pickles else ""
        raise CheckpointError(f"{directory}: no .safetensors file{hint}")
    for path in found:
        if why := files.refusal(path, directory):
            raise CheckpointError(f"{path}: {why}")
    return found


def read_header(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} as the files have them; reads no weight. Of a weight that is there twice, nobody knows
    which one an engine takes."""
    header: dict[str, tuple[str, tuple[int, ...]]] = {}
    seen: set[str] = set()
    for path in weight_files(directory):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    dtype = part.get_dtype()
                    if canonical(name) in seen:
                        raise CheckpointError(f"{path}: {name} is stored twice")
                    seen.add(canonical(name))
                    header[name] = DTYPES.get(dtype, dtype.lower()), tuple(part.get_shape())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    return header


def read_tensors(directory: Path, names: set[str] | None = None) -> dict[str, Tensor]:
    """Tensors by canonical name; all of them, or some."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    key = canonical(name)
                    if key in tensors:
                        raise CheckpointError(f"{path}: {name} is stored twice")
                    if names is None or key in names:
                        tensors[key] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    return tensors
