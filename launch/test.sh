#!/usr/bin/env bash
# Installs what the tests need and runs them:  bash launch/test.sh [arguments for pytest]
# TEST_WORKERS says how many run at once (2). On Linux, pip takes the CUDA build of PyTorch unless it
# is set up to find the smaller CPU build; the tests need the CPU only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/_setup.sh

set_up jax torch train test
exec .venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
