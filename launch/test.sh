#!/usr/bin/env bash
# Installs the dependencies of the tests and runs them:  bash launch/test.sh [arguments for pytest]
# TEST_WORKERS is the number of processes (2). On Linux, pip installs the CUDA build of PyTorch unless
# it is configured to find the smaller CPU build; the tests only need the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/_setup.sh

set_up jax torch train test
exec .venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
