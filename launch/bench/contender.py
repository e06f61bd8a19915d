"""What is timed on one matrix: a case, the common input arrays, and a contender."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from launch.bench.timing import Step

GAP = 200
"""Steps between two SVDs of GaLore, and 1 / P's step size of online PCA."""
LR, SCALE = 1e-3, 0.25


class Case(NamedTuple):
    """A matrix from a model of this size, in PyTorch's orientation."""

    model: str
    shape: tuple[int, int]
    rank: int


class Arrays(NamedTuple):
    """The common input of all contenders, NumPy: W and G of a case, and an orthonormal P."""

    weight: np.ndarray
    gradient: np.ndarray
    basis: np.ndarray


class Built(NamedTuple):
    """A contender, ready to run.

    Attributes:
        step: One step, or a period of different steps.
        refresh: What it does additionally once every `GAP` steps, alone.
        period: The number of steps in `step`.
    """

    step: Step
    refresh: Step | None = None
    period: int = 1


class Contender(NamedTuple):
    """A program to time.

    Attributes:
        framework: "torch" or "jax".
        build: (case, arrays, device, dtype) -> `Built`.
        package: A dependency that may be missing.
    """

    framework: str
    build: Callable[[Case, Arrays, str, str], Built]
    package: str | None = None


def arrays(case: Case, seed: int = 0) -> Arrays:
    """W, G and P of a case, float32; G has the rank of the case plus noise, like real gradients."""
    m, n = case.shape
    p = min(m, n)
    draw = np.random.default_rng(seed).standard_normal
    low = draw((m, case.rank), np.float32) @ draw((case.rank, n), np.float32)
    gradient = 1e-3 * (low / case.rank**0.5 + draw((m, n), np.float32))
    basis = np.linalg.qr(draw((p, case.rank), np.float32))[0]
    return Arrays(0.02 * draw((m, n), np.float32), gradient, basis.astype(np.float32))


def period_of(step: Step, every: int) -> Built:
    """All steps from one move of P to the next."""

    def period() -> None:
        for _ in range(every):
            step()

    return Built(period if every > 1 else step, period=every)


def scale_of(optimizer: str) -> dict[str, Any]:
    """The factor on the lifted update, for the optimizers that read it."""
    return {"scale": SCALE} if optimizer.startswith("galore") else {}
