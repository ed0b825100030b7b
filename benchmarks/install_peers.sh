#!/usr/bin/env bash
# Make the environment in which peers.py runs: bash benchmarks/install_peers.sh [VENV]
#
# PyPI's newest SpecForge is 0.2.0; the upper bound lets a later 0.3 in. Both peers go in with
# --no-deps: SpecForge would pull SGLang and CUDA, speculators torchvision and torchaudio, none of
# which their training classes import. transformers is SpecForge's own pin, inside speculators' range.
set -euo pipefail

venv="${1:-.peers-venv}"
python3 -m venv "$venv"
install=("$venv/bin/python" -m pip install --quiet)

"${install[@]}" torch==2.13.0   # first: everything after finds it present
"${install[@]}" transformers==5.8.1 safetensors "numpy<=2.5.4" huggingface-hub pydantic \
    pydantic-settings rich "tqdm>=4.66.3,<=4.70.1" "loguru>=0.7.2,<=0.7.3" click "typer>=0.12" \
    httpx aiohttp "openai>=2" "datasets>=4,<=5.1" psutil pyyaml requests protobuf
# triton: SpecForge's loss module imports it at the top; nothing of it runs on a CPU.
"${install[@]}" --no-deps "specforge>=0.2,<0.4" "speculators==0.9.*" "hs-connectors==0.9.*" triton

"$venv/bin/python" - <<'PY'
from importlib.metadata import version
import torch

assert torch.version.cuda is None, f"a CUDA build of torch was installed: {torch.__version__}"
print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "specforge", "speculators")), sep="\n")
PY
