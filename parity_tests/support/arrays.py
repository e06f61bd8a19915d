"""Trees of normally distributed numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, shapes: Any, dtype: Any = np.float32) -> Any:
    """Replaces the shapes (tuples) of a tree by NumPy arrays, drawn in the order of its leaves."""
    rng = np.random.default_rng(seed)
    one = lambda shape: rng.standard_normal(shape).astype(dtype)
    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


def normal_jax(seed: int, shapes: Any, dtype: Any = jnp.float32) -> Any:
    """`normal` as arrays of JAX."""
    return jax.tree.map(jnp.asarray, normal(seed, shapes, dtype))
