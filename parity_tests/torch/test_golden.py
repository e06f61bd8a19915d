"""osd_torch compared with trajectories of the published PyTorch code: `golden/`."""

from __future__ import annotations

import pytest

from parity_tests.support.golden_cases import GoldenCase, GoldenRun, golden_cases, golden_runs
from parity_tests.support.golden_in_torch import check_matrix, check_tiny_llama

pytest.importorskip("transformers")


@pytest.mark.parametrize("foreach", [False, True], ids=["alone", "in a stack"])
@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
def test_a_matrix_follows_the_release(case: GoldenCase, foreach: bool) -> None:
    check_matrix(case, foreach)


@pytest.mark.parametrize("run", golden_runs(), ids=lambda run: run.name)
def test_a_tiny_llama_trains_as_in_the_release(run: GoldenRun) -> None:
    check_tiny_llama(run)
