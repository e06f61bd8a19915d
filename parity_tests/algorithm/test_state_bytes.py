"""Bytes of optimizer state, measured on the arrays' shapes, compared with the formula."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from osd_jax import llama, make_optimizer
from osd_names import FULL_RANK_OPTIMIZERS, PROJ_TYPES, PROJECTIONS, SUBSPACE_OPTIMIZERS
from parity_tests.support.state_bytes import RANKS, load, state_bytes


def measured_bytes(
    optimizer: str,
    proj_type: str,
    size: str,
    *,
    beta1: bool = False,
    dtype: Any = jnp.float32,
    basis_dtype: Any = None,
) -> int:
    """The bytes of every array in the state; its scalars are a few counters."""
    _, params, numbers = load(size)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    tx = make_optimizer(
        optimizer, proj_type, learning_rate=0.01, rank=RANKS[size],
        beta1=0.9 if beta1 else None, dimension_numbers=numbers, basis_dtype=basis_dtype,
    )  # fmt: skip
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    assert sum(x.dtype.itemsize for x in leaves if x.ndim == 0) <= 64
    return sum(x.size * x.dtype.itemsize for x in leaves if x.ndim > 0)


@pytest.mark.parametrize("optimizer", SUBSPACE_OPTIMIZERS)
@pytest.mark.parametrize("size", RANKS)
def test_subspace_state_has_the_bytes_of_the_formula(size: str, optimizer: str) -> None:
    config = load(size)[0]
    full_rank = measured_bytes("adamw", "std", size)
    for proj_type in PROJ_TYPES:
        for beta1 in (False, True) if optimizer == "galore_adafactor" else (False,):
            measured = measured_bytes(optimizer, proj_type, size, beta1=beta1)
            assert measured == state_bytes(optimizer, proj_type, config, RANKS[size], beta1=beta1)
            if PROJECTIONS[proj_type].side in ("shorter", "both"):
                assert measured < full_rank


@pytest.mark.parametrize("optimizer", FULL_RANK_OPTIMIZERS)
@pytest.mark.parametrize("size", RANKS)
def test_full_rank_state_has_the_bytes_of_the_formula(size: str, optimizer: str) -> None:
    assert measured_bytes(optimizer, "std", size) == state_bytes(optimizer, "std", load(size)[0], 1)


def test_full_rank_adamw_is_two_floats_a_parameter() -> None:
    for size in RANKS:
        assert measured_bytes("adamw", "std", size) == 8 * llama.num_parameters(load(size)[0])


@pytest.mark.parametrize("optimizer", SUBSPACE_OPTIMIZERS)
def test_bfloat16_parameters_have_the_same_state(optimizer: str) -> None:
    sizes = {measured_bytes(optimizer, "continuous", "60m", dtype=t) for t in ("f4", jnp.bfloat16)}
    assert len(sizes) == 1


def test_a_bfloat16_basis_is_half_as_large() -> None:
    """Its optimizer's state stays float32."""
    expected = state_bytes("galore_adamw", "continuous", load("60m")[0], 128, basis_bytes=2)
    measured = measured_bytes("galore_adamw", "continuous", "60m", basis_dtype=jnp.bfloat16)
    assert measured == expected
