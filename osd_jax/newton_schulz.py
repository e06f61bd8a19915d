"""Muon's lift: an update with all singular values close to 1, by Newton-Schulz."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from osd_jax.lift import Lift, Lifted, Seen
from osd_jax.numerics import (
    contract,
    float32_or_more,
    like_sharding,
    safe_sqrt,
    squared_norm,
    whole_columns,
)
from osd_names import MUON_SCALES, MuonScale, ResolvedSide, check_choice

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(
    inner: Lift,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    dtype: jax.typing.DTypeLike | None = None,
    scale: MuonScale = "adamw",
) -> Lift:
    """Orthogonalizes the update of another lift as Muon does: all singular values become about 1.

    Args:
      inner: Another lift, such as `add_gradient()`.
      steps: Number of Newton-Schulz steps.
      coefficients: (a, b, c) of `X <- a X + (b X X^T + c (X X^T)^2) X`.
      dtype: Dtype of the iteration. None: the update's, float32 or float64; bfloat16 is faster on a
        GPU or TPU.
      scale: "adamw" multiplies by 0.2 sqrt(max(m, n)), so that AdamW's learning rates carry over;
        "muon" by sqrt(max(1, m / n)) for an (m, n) = (output, input) matrix; or "none".

    Returns:
      A `Lift` with the needs of `inner`.

    Raises:
      ValueError: An argument is out of range.

    References:
      Jordan et al. (2024), Muon; the "adamw" scale: Moonlight, arXiv 2502.16982.

    Example:
      >>> import osd_jax
      >>> osd_jax.orthogonalized(osd_jax.add_gradient()).name
      'orthogonalized(add_gradient(), steps=5, scale=adamw)'
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps is {steps!r}: expected a whole number of at least 1")
    check_choice("scale", scale, MUON_SCALES)
    if len(coefficients) != 3:
        raise ValueError(f"coefficients are {coefficients!r}: expected three numbers")
    known = map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float64))
    if dtype is not None and jnp.dtype(dtype) not in known:
        raise ValueError(f"dtype is {dtype!r}: expected None, float32, bfloat16 or float64")
    options: dict[str, Any] = {
        "steps": steps, "coefficients": tuple(coefficients), "dtype": dtype, "scale": scale,
    }  # fmt: skip
    return inner._replace(
        apply=functools.partial(_orthogonalized, inner, options),
        name=f"orthogonalized({inner.name}, steps={steps}, scale={scale})",
        linear=False,
    )


def _orthogonalized(
    inner: Lift, options: dict[str, Any], direction: jax.Array, seen: Seen
) -> Lifted:
    lifted = inner.apply(direction, seen)

    def then(update: jax.Array) -> jax.Array:
        update = update if lifted.then is None else lifted.then(update)
        return orthogonalize(update, seen.side, **options)

    return lifted._replace(then=then)


def orthogonalize(
    update: jax.Array,
    side: ResolvedSide,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    dtype: jax.typing.DTypeLike | None = None,
    scale: MuonScale = "adamw",
) -> jax.Array:
    """Applies `newton_schulz` to matrices and multiplies by their `scale`.

    Args:
      update: (..., p, q), where p is the `side` of the weight, "output" or "input".
      side: See above.
      steps: See `orthogonalized`.
      coefficients: See `orthogonalized`.
      dtype: See `orthogonalized`.
      scale: See `orthogonalized`.

    Example:
      >>> import jax.numpy as jnp
      >>> orthogonalize(jnp.ones((4, 3)), "input").shape
      (4, 3)
    """
    found = newton_schulz(update, steps=steps, coefficients=coefficients, dtype=dtype)
    return found * muon_scale(update.shape, side, scale)


def muon_scale(shape: tuple[int, ...], side: ResolvedSide, scale: MuonScale) -> float:
    """The factor of a `scale`; see `orthogonalized`.

    Args:
      shape: Shape of M, (..., p, q).
      side: The side of p; see `Seen`.
      scale: One of `osd_names.MUON_SCALES`.
    """
    n_out, n_in = shape[-2:] if side == "output" else shape[:-3:-1]
    return {
        "adamw": 0.2 * math.sqrt(max(n_out, n_in)),
        "muon": math.sqrt(max(1, n_out / n_in)),
        "none": 1.0,
    }[scale]


def newton_schulz(
    matrix: jax.Array,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Approximates U V^T of each matrix U S V^T, (..., m, n): singular values move close to 1.

    After a division by the Frobenius norm, each step applies the odd polynomial `a s + b s^3 + c
    s^5` to all singular values. With Muon's coefficients and 5 steps, values above 0.002 of that
    norm end in [0.68, 1.21]. A step has 3 products of the shorter side: 2 min^2 (max + min / 2)
    multiplications. Under a mesh with Explicit axes only the longer side is sharded, and a step
    all-reduces the product of the shorter side, min^2 numbers.

    Optax's implementation, inside `optax.contrib.muon`, adds 1e-8 to the norm, which changes small
    matrices, and merges batch axes, which fails under meshes with Explicit axes if they are
    sharded.

    Args:
      matrix: float32 or float64.
      steps: Number of iterations.
      coefficients: a, b, c.
      dtype: Dtype of the iteration. None: the dtype of the matrix.

    Returns:
      (..., m, n), with the matrix's dtype; zeros for zeros, and if the squared norm overflows.

    Example:
      >>> import jax.numpy as jnp
      >>> update = newton_schulz(jnp.diag(jnp.array([3.0, 0.5])))
      >>> bool(jnp.all(jnp.abs(jnp.diagonal(update) - 1) < 0.35))
      True
    """
    a, b, c = coefficients
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = whole_columns(matrix.mT if is_tall else matrix)
    norm = safe_sqrt(squared_norm(x))[..., None, None]
    # If the squared norm underflowed, values above 1 would remain and diverge.
    x = (x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny ** 0.5)).astype(dtype or x.dtype)
    for _ in range(steps):  # products and sums in float32 or float64, each rounded once
        gram = contract("pq,sq->ps", x, x).astype(x.dtype)
        odd = b * float32_or_more(gram) + c * contract("ps,st->pt", gram, gram)
        step = contract("ps,sq->pq", odd.astype(x.dtype), x)
        x = (a * float32_or_more(x) + step).astype(x.dtype)
    return like_sharding((x.mT if is_tall else x).astype(matrix.dtype), matrix)
