"""Where the engines of this tier come from, and small targets that they can run."""

import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from models import tiny_tokenizer
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROOT = Path(__file__).parents[2]
TOOLS = Path(os.environ.get("DRAFTSMITH_ENGINE_TOOLS", ROOT.parent / "shared" / "tools"))
VOCAB = 64
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    initializer_range=0.12,
    eos_token_id=0,
    bos_token_id=1,
    tie_word_embeddings=False,
)
BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **(SHAPE | {"tie_word_embeddings": True}),  # as SGLang takes for granted
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"] * 4,
            query_pre_attn_scalar=64,
        )
    ),
    "minimax_m2": lambda: MiniMaxM2ForCausalLM(
        MiniMaxM2Config(
            **SHAPE,
            num_local_experts=4,
            num_experts_per_tok=2,
            rotary_dim=32,
            # keys of the real model's config.json, which the engines read and transformers does not
            scoring_func="sigmoid",
            use_routing_bias=True,
            use_qk_norm=True,
            qk_norm_type="per_layer",
        )
    ),
}


def engine_python(engine: str) -> Path:
    """Python of the engine's environment, installed on first use; skips where it cannot be."""
    named = os.environ.get(f"DRAFTSMITH_{engine.upper()}_VENV")
    venv = Path(named) if named else ROOT / f".venv-{engine}"
    python = venv / "bin" / "python"
    if not (venv / ".installed").exists() and not named:
        installer = TOOLS / f"{engine}_cpu" / "install.sh"
        if not installer.exists():
            pytest.skip(f"{engine} is not installed and {installer} is not there")
        done = subprocess.run(["bash", installer, venv], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{engine} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        (venv / ".installed").touch()
    return python


def engine_environment(python: Path) -> dict[str, str]:
    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    openmp = python.parents[1] / "lib" / "libiomp5.so"
    return {**environment, "LD_PRELOAD": str(openmp)} if openmp.exists() else environment


def engine_program(engine: str) -> str:
    """Value for `serve.program`."""
    python = engine_python(engine)
    environment = [f"{key}={value}" for key, value in engine_environment(python).items()]
    if engine == "vllm":
        command = [str(python.with_name("vllm")), "serve"]
    else:
        command = [str(python), str(Path(__file__).with_name("sglang_server.py"))]
    return shlex.join(["env", *environment, *command])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def save_target(directory: Path, architecture: str = "llama", eos: bool = True) -> str:
    """A small random target in a shape that both engines run."""
    torch.manual_seed(0)
    lm = BUILDERS[architecture]().eval()
    if not eos:
        lm.config.eos_token_id = lm.generation_config.eos_token_id = None
    lm.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)
