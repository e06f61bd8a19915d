"""osd_jax compared with trajectories of the published PyTorch code: `golden/`."""

from __future__ import annotations

import pytest

from parity_tests.support.golden_cases import GoldenCase, GoldenRun, golden_cases, golden_runs
from parity_tests.support.golden_in_jax import check_matrix, check_tiny_llama


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
def test_a_matrix_follows_the_release(case: GoldenCase) -> None:
    check_matrix(case, transposed=True)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in golden_cases()
        if (case.optimizer, case.proj_type, case.beta1)
        in {
            ("galore_adamw", "continuous", None),
            ("galore_adamw", "full", None),
            ("galore_lion", "reverse_std", None),
            ("galore_adafactor", "std", 0.9),
            ("galore_adamw8bit", "std", None),
        }
    ],
    ids=lambda case: case.name,
)
def test_a_matrix_kept_in_pytorchs_orientation_follows_too(case: GoldenCase) -> None:
    """By `SubspaceDimensionNumbers`: kernels are (output, input) and say so."""
    check_matrix(case, transposed=False)


@pytest.mark.parametrize("run", golden_runs(), ids=lambda run: run.name)
def test_a_tiny_llama_trains_as_in_the_release(run: GoldenRun) -> None:
    check_tiny_llama(run)
