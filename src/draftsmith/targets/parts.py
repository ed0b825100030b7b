"""Reading a model: its directory, its tokenizer, and where a draft reads in it; all errors are lines."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from draftsmith.core.errors import TargetError, out_of_memory
from draftsmith.core.files import JsonObject
from draftsmith.core.progress import say
from draftsmith.targets import embedded
from draftsmith.targets.configs import value_of

LONGEST_JSON = 1 << 28  # bytes; the largest vocabularies have a tenth of it
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def resolve_model(model: str) -> str:
    """Path or hub name to load; an embedded target is converted on first use.

    Of a directory nothing is read that has no end: a `TargetError` names pipes, devices and endless configurations.
    """
    if model in embedded.EMBEDDED:
        return str(embedded.materialise(model))
    for path in (*Path(model).glob("*"), *Path(model).glob("additional_chat_templates/*")):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise TargetError(f"target.model: {path} is no plain file")
        if path.suffix == ".json" and path.exists() and path.stat().st_size > LONGEST_JSON:
            raise TargetError(f"target.model: {path} has {path.stat().st_size:,} bytes; no model's is that long")
    return model


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TargetError(f"device: {device} asked for, but torch {torch.__version__} sees no GPU; use auto or cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise TargetError(f"device: {device!r} given; allowed are auto, cpu, cuda and cuda:N") from None


def card_room(device: torch.device) -> tuple[int, int] | None:
    """(free, all) bytes of a card, once what is kept for reuse is given back; None where the device is no card."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


def tell_slow_products(device: torch.device, dtype: str, key: str = "target.dtype") -> None:
    """Many CPUs widen bf16 number by number: ten times slower than fp32, and nothing else would say why."""
    capabilities: JsonObject = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    if device.type == "cpu" and dtype == "bf16" and capabilities.get("architecture") == "x86_64" and not native:
        say(
            f"{key}: this CPU has no bf16 products, so they take about ten times as long as fp32 ones; give "
            "--target.dtype fp32 --train.dtype fp32"
        )


UNUSUAL = "Wörter, 言葉 and \u2603 7"


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    path = resolve_model(model)
    with on_guard(f"no tokenizer in {model!r}"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    with on_guard(f"the tokenizer of {model!r} cannot read text"):  # some are found out by what they do not know only
        tokenizer.decode(tokenizer(UNUSUAL).input_ids)
    if model in embedded.EMBEDDED:
        embedded.check_tokenizer(model, tokenizer)
    return tokenizer


def first_line(error: BaseException) -> str:
    """Of its text, with the next where the first only announces it; Python's own errors have their name before it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    told = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    bare = isinstance(error, TypeError | LookupError | AttributeError | ArithmeticError)
    return f"{type(error).__name__}: {told}" if bare else told


@contextlib.contextmanager
def on_guard(what: str) -> Iterator[None]:
    """A model's own code, the libraries that read it, and files that are not as they expect raise what they like: all
    of it is a `TargetError` of one line, but for a machine that is too small."""
    try:
        yield
    except TargetError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise TargetError(f"target.model: {what}: {first_line(error)}") from None


def complaint_of(attempt: Callable[[], object]) -> str | None:
    """The line that an attempt fails with, whatever it raises; None where it works. Raises on a machine too small."""
    try:
        attempt()
    except Exception as error:
        if out_of_memory(error):
            raise
        return first_line(error)
    return None


def auto_class(config: Any) -> Any:
    """The first auto class that knows the model: wrappers of a vision tower and a decoder have their own."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping or auto.__name__ in (getattr(config, "auto_map", None) or ()):
            return auto
    return AutoModelForCausalLM  # says what it does not know


def empty_model(config: Any, dtype: str, trust_remote_code: bool) -> Any:
    """Its class without its numbers."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)


def check_amount(place: str, config: Any, trust_remote_code: bool) -> None:
    """Before memory is asked for: a config that wants more numbers than its files can hold belongs to another model."""
    if not Path(place).is_dir():
        return
    lm = empty_model(config, "fp32", trust_remote_code)
    asked = sum(tensor.numel() for tensor in (*lm.parameters(), *lm.buffers()))
    held = sum(path.stat().st_size for path in Path(place).glob("*.safetensors"))
    if asked > NUMBERS_PER_BYTE * held + UNSTORED:
        raise TargetError(
            f"target.model: config.json of {place!r} asks for {asked:,} numbers, but its .safetensors files have "
            f"{held:,} bytes; it belongs to another model"
        )


NUMBERS_PER_BYTE, UNSTORED = 8, 1 << 27  # of the tightest quantisation; masks and tables that no file has
UNBOUNDED = 1 << 30  # positions of a model that counts none (Mamba, ALiBi)
# What configs call the positions that a model was made for, and classes the last norm
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_seq_length")
NORMS = ("norm", "final_layernorm", "embedding_norm", "norm_f", "final_layer_norm", "ln_f", "final_norm")


def find_decoder(lm: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.ModuleList]:
    """(decoder, its input embedding, its final norm, its layers), inside whatever wraps it; raises `TargetError`."""
    embedding = lm.get_input_embeddings()
    for module in lm.modules():
        if embedding is None or not any(embedding is child for child in module.children()):
            continue
        norm = next((getattr(module, name) for name in NORMS if hasattr(module, name)), None)
        stacks = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        if norm is not None and stacks and lm.get_output_embeddings() is not None:
            return module, embedding, norm, max(stacks, key=len)
    raise TargetError(
        f"target.model: {type(lm).__name__} has no decoder with layers, an input embedding, a final norm and a head, "
        "which is where a draft reads"
    )


def end_ids(tokenizer: Any, *configs: Any) -> frozenset[int]:
    """Everything that engines stop at: the end tokens of the tokenizer, generation_config.json and config.json."""
    found: set[int] = set()
    for holder in (tokenizer, *configs):
        named = getattr(holder, "eos_token_id", None)
        found |= {named} if isinstance(named, int) else set(named or ())
    return frozenset(found)


def rope_of(config: Any) -> JsonObject:
    """The parameters of RoPE, those of full attention where layers differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope) if isinstance(rope, dict) else rope
    numbers = ("factor", "rope_theta", "original_max_position_embeddings")
    if not isinstance(rope, dict) or not all(isinstance(rope.get(key) or 0, int | float) for key in numbers):
        raise TargetError(f"target.model: rope_parameters of its config.json are {rope!r}; wanted numbers by name")
    return rope


def context_of(config: Any) -> int:
    """Positions that a text may have, as engines derive it; stretched RoPE reaches further."""
    length = next((n for name in LENGTHS if (n := value_of(config, name))), UNBOUNDED)
    rope = rope_of(config)
    kind, factor = rope.get("rope_type"), float(rope.get("factor") or 1.0)
    if kind in ("linear", "dynamic"):
        return int(length * factor)
    if kind == "yarn" and (original := rope.get("original_max_position_embeddings")):
        return max(length, int(original * factor))
    return length


def logit_scale(config: Any) -> float:
    """What a model multiplies its logits with: Cohere's logit_scale, Falcon-H1's multiplier, Granite's divisor."""
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return float(scale) / float(getattr(config, "logits_scaling", None) or 1.0)
