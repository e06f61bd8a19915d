"""Matrices in other shapes: equal numbers to the (input, output) matrices that they represent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from osd_jax import SubspaceDimensionNumbers, make_optimizer
from parity_tests.support.arrays import normal


class Kernel(NamedTuple):
    """A parameter in its own shape, and how to read it as a list of (input, output) matrices."""

    shape: tuple[int, ...]
    numbers: SubspaceDimensionNumbers
    matrices: Callable[[np.ndarray], list[np.ndarray]]


# 64 x 72 or 72 x 64: large enough for 8-bit state.
KERNELS = {
    "attention query (embed, heads, head_dim)": Kernel(
        (64, 8, 9), SubspaceDimensionNumbers(0, (1, 2)), lambda w: [w.reshape(64, 72)]
    ),
    "attention output (heads, head_dim, embed)": Kernel(
        (8, 9, 64), SubspaceDimensionNumbers((0, 1), 2), lambda w: [w.reshape(72, 64)]
    ),
    "convolution (h, w, in, out)": Kernel(
        (2, 4, 9, 64), SubspaceDimensionNumbers((0, 1, 2), 3), lambda w: [w.reshape(72, 64)]
    ),
    "PyTorch's order (out, in)": Kernel((64, 72), SubspaceDimensionNumbers(1, 0), lambda w: [w.T]),
    "stacked layers": Kernel((2, 64, 72), SubspaceDimensionNumbers(-2, -1), list),
    "stacked attention queries": Kernel(
        (2, 64, 8, 9),
        SubspaceDimensionNumbers(1, (2, 3)),
        lambda w: [x.reshape(64, 72) for x in w],
    ),
    "a batch axis between": Kernel(
        (64, 2, 72), SubspaceDimensionNumbers(0, 2), lambda w: [w[:, 0], w[:, 1]]
    ),
}
STEPS = 3


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return normal(seed, shape)


def compiled(optimizer: str, proj_type: str, dimension_numbers: Any) -> Callable[..., Any]:
    """(params, gradients of each step) -> params after the last, as one compiled scan."""
    tx = make_optimizer(
        optimizer,
        proj_type,
        learning_rate=0.1,
        rank=60 if "8bit" in optimizer else 3,
        update_proj_gap=2,
        weight_decay=0.1,
        beta1=0.9 if "adafactor" in optimizer else None,
        dimension_numbers=dimension_numbers,
        select=lambda *_: True,
    )

    def step(carry: Any, grads: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads)[0][0])


@functools.cache
def drawn() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    params = {name: draw(kernel.shape, 0) for name, kernel in KERNELS.items()}
    return params, {name: draw((STEPS, *kernel.shape), 1) for name, kernel in KERNELS.items()}


@pytest.mark.parametrize(
    ("optimizer", "proj_type"),
    [
        ("galore_adamw", "full"),
        ("galore_adamw", "continuous"),
        ("galore_lion", "reverse_std"),
        ("galore_adafactor", "continuous_adafactor"),
        ("galore_adamw8bit", "left"),
        ("adafactor", "std"),
        ("adam8bit", "std"),
    ],
)
def test_kernels_are_the_matrices_they_stand_for(optimizer: str, proj_type: str) -> None:
    """All of them in one tree, against each of their matrices on its own."""
    params, gradients = drawn()
    numbers = {name: kernel.numbers for name, kernel in KERNELS.items()}
    after = compiled(optimizer, proj_type, numbers)(params, gradients)
    alone = compiled(optimizer, proj_type, None)
    # The same sums in another order: a code of 8-bit state, or a sign of Lion's, may differ. So may
    # Adam's step in `full`, where the R of a refresh is diagonal up to rounding, and Adam divides
    # that rounding error by its own size: steps of full size with either sign until later gradients
    # outweigh it.
    is_exact = optimizer in ("galore_adamw", "galore_adafactor", "adafactor")
    tolerance = 1e-3 if is_exact and proj_type != "full" else 1e-2
    for name, kernel in KERNELS.items():
        steps = [kernel.matrices(g) for g in gradients[name]]
        for index, start in enumerate(kernel.matrices(params[name])):
            expected = alone(start, np.stack([matrices[index] for matrices in steps]))
            actual = kernel.matrices(np.asarray(after[name]))[index]
            error = np.linalg.norm(actual - expected) / np.linalg.norm(expected - start)
            assert error < tolerance, (name, error)
