#!/usr/bin/env bash
# From a fresh clone to a report: sets up .venv and runs the quick recipe on the embedded target.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh && setup
.venv/bin/draftsmith run recipes/smollm2-135m-quick.yaml "$@"
