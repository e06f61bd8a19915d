"""`jax.enable_x64` has no effect on float32 and bfloat16 parameters: all dtypes are explicit."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import osd_jax
from osd_jax.diagnostics import subspace_diagnostics
from osd_jax.llama.train import learning_rate_schedule
from parity_tests.support.arrays import normal

STEPS = 300
SHAPES = {"mlp": {"up": (8, 12), "down": (72, 64)}, "norm": (8,)}  # one large enough for 8 bits
OPTIMIZERS: list[tuple[str, str, dict[str, Any]]] = [
    ("galore_adamw", "continuous", {"penalty": 0.1}),
    ("galore_adamw", "std", {}),
    ("galore_adamw", "random", {}),
    ("galore_adamw8bit", "continuous_sgd", {"projector_init": "qr"}),
    ("galore_lion", "continuous_adafactor", {}),
    ("galore_adafactor", "full", {"beta1": 0.9}),
    ("adamw", "std", {}),
]
Tree = Any


def draw(seed: int, dtype: Any) -> Tree:
    return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), normal(seed, SHAPES))


def trained(name: tuple[str, str, dict[str, Any]], dtype: Any, steps: int, x64: bool) -> Tree:
    """(parameters, the optimizer's state) after some steps, and (path, dtype, weak) of all."""
    optimizer, proj_type, more = name
    with jax.enable_x64(x64):
        schedule = learning_rate_schedule("cosine", num_training_steps=2 * STEPS, warmup_steps=9)
        tx = osd_jax.make_optimizer(
            optimizer, proj_type, learning_rate=1e-2, schedule=schedule, rank=4, weight_decay=0.1,
            update_proj_gap=100, **more,
        )  # fmt: skip

        @jax.jit
        def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = draw(0, dtype), tx.init(draw(0, dtype))
        for number in range(steps):
            params, state = step(params, state, draw(1 + number % 5, dtype))
        kinds = [
            (jax.tree_util.keystr(path), x.dtype, x.weak_type)
            for path, x in jax.tree_util.tree_leaves_with_path((params, state))
        ]
        return jax.device_get(params), kinds


@pytest.mark.parametrize("name", OPTIMIZERS, ids=lambda name: f"{name[0]}-{name[1]}")
def test_float32_parameters_take_the_same_steps(name: tuple[str, str, dict[str, Any]]) -> None:
    (found, kinds), (wanted, expected) = (
        trained(name, jnp.float32, STEPS, x64) for x64 in (True, False)
    )
    assert kinds == expected
    for one, other, start in zip(
        *map(jax.tree.leaves, (found, wanted, draw(0, jnp.float32))), strict=True
    ):
        off, moved = np.linalg.norm(one - other), np.linalg.norm(other - start)
        print(f"{off / moved:.1e}")
        assert off <= 1e-4 * moved


@pytest.mark.parametrize("name", OPTIMIZERS, ids=lambda name: f"{name[0]}-{name[1]}")
def test_bfloat16_parameters_have_the_same_state(name: tuple[str, str, dict[str, Any]]) -> None:
    kinds, expected = (trained(name, jnp.bfloat16, 2, x64)[1] for x64 in (True, False))
    assert kinds == expected
    assert {dtype for path, dtype, _ in kinds if ".count" in path} == {np.dtype("int32")}


def test_diagnostics_are_float32() -> None:
    with jax.enable_x64(True):
        params = draw(0, jnp.float32)
        tx = osd_jax.make_optimizer("galore_adamw", "continuous", learning_rate=1e-2, rank=4)
        state = jax.eval_shape(tx.init, params)
        measure = functools.partial(subspace_diagnostics, params)
        found = jax.eval_shape(measure, state)
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float32")}
