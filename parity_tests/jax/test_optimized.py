"""The release's trajectories with XLA's default optimizations, as in a user's program.

The other tests are compiled without most optimizations (see `conftest.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys

from parity_tests.support import ROOT

TESTS = (
    "test_a_matrix_follows_the_release[galore_adamw-wide-continuous]",
    "test_a_matrix_follows_the_release[galore_lion-tall-std]",
    "test_a_matrix_follows_the_release[galore_adafactor-square-full]",
    "test_a_tiny_llama_trains_as_in_the_release[galore_adamw-continuous]",
)


def test_the_release_is_followed_with_optimizations() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--optimized", "-p", "no:cacheprovider"]
    unset = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "PYTEST_ADDOPTS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [*command, *(f"parity_tests/jax/test_golden.py::{test}" for test in TESTS)],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(TESTS)} passed" in done.stdout
