"""Muon's 8-bit momentum, at full rank and in a subspace, in both libraries."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import osd_jax
import osd_torch

MOMENTUM_STEPS = 6
IN_8_BITS = {"second_moment": "row", "first_moment": "8bit"}


def muon_in_torch(optimizer: str, resume_at: int = 0, **options: Any) -> tuple[Any, Any]:
    """W (80, 128) after some steps, and the optimizer, rebuilt and loaded at `resume_at`."""
    start, grads = muon_problem()
    param = torch.nn.Parameter(torch.tensor(start))
    make = lambda: osd_torch.make_optimizer(
        [("mlp", param)], optimizer, "oja", lr=0.01, rank=64, momentum=0.8, **options
    )
    built = make()
    for step, grad in enumerate(grads):
        if step and step == resume_at:
            saved = copy.deepcopy(built.state_dict())
            built = make()
            built.load_state_dict(saved)
        param.grad = torch.tensor(grad)
        built.step()
    return param.detach().numpy(), built.state[param]


def muon_in_jax(optimizer: str, **options: Any) -> tuple[Any, Any]:
    """The same in JAX, and the state."""
    start, grads = muon_problem()
    params = {"mlp": jnp.asarray(start.T)}
    tx = osd_jax.make_optimizer(
        optimizer, "oja", learning_rate=0.01, rank=64, momentum=0.8, **options
    )
    state = tx.init(params)
    update = jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"mlp": jnp.asarray(grad.T)}, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["mlp"]).T, state


def muon_problem() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0).standard_normal
    return draw((80, 128)).astype(np.float32), draw((MOMENTUM_STEPS, 80, 128)).astype(np.float32)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("muon", {}), ("osd_muon", {}), ("osd_muon", {"transport_moments": True})],
)
def test_muons_momentum_in_8_bits(optimizer: str, options: dict[str, Any]) -> None:
    """Close to the float32 momentum in both libraries, and bit for bit equal after resuming.

    A value within a tenth of its block's largest is off by at most 1/128 of itself, and smaller
    ones by less than 1/128 of a tenth: 1 % of m's norm, which Newton-Schulz may amplify a few times
    in its smaller singular directions.
    """
    start = muon_problem()[0]
    runs = {"torch": muon_in_torch, "jax": muon_in_jax}
    for name, run in runs.items():
        wide = run(optimizer, **options)[0]
        narrow = run(optimizer, **IN_8_BITS, **options)[0]
        off = np.linalg.norm(narrow - wide) / np.linalg.norm(wide - start)
        assert 0 < off < 0.05, name  # 0: it would not have been in 8 bits
    moved, state = muon_in_torch(optimizer, **IN_8_BITS, **options)
    assert state["exp_avg"].dtype == torch.uint8
    again, other = muon_in_torch(optimizer, resume_at=3, **IN_8_BITS, **options)
    np.testing.assert_array_equal(moved, again)
    assert all(torch.equal(x, other[key]) for key, x in state.items())
    in_jax, jax_state = muon_in_jax(optimizer, **IN_8_BITS, **options)
    assert np.linalg.norm(in_jax - moved) < 0.05 * np.linalg.norm(moved - start)
    assert any(x.dtype == jnp.uint8 for x in jax.tree.leaves(jax_state))
