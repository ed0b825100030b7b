#!/usr/bin/env bash
# Lint, types and tests. `scripts/test.sh engines` runs the tier that needs vLLM and SGLang, each in a virtual environment of its own;
# `scripts/test.sh attacks` the one that attacks runs, servers, input and disks (docs/reliability.md).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh && setup
if [ "${1:-}" = engines ]; then
  exec .venv/bin/python -m pytest tests/engines -m engines "${@:2}"
fi
if [ "${1:-}" = attacks ]; then
  exec .venv/bin/python -m pytest tests/attacks "${@:2}"
fi
.venv/bin/ruff format --check -q .
.venv/bin/ruff check -q .
.venv/bin/mypy
.venv/bin/lint-imports
# Two processes of one thread each: nothing here is large enough for two threads, and those of two processes would fight.
# A file stays in one process (tests/gpu is one), and the longest come first.
export OMP_NUM_THREADS=1
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/golden tests/parity tests/unit tests/gpu "$@"
