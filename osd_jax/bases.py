"""Basis rules, which set and move P: online PCA, Oja, SVD, random, Gaussian.

The clock of a `BasisRule` determines when a gradient sets P and when P moves after a step of W.
Online PCA reads only the small `Sketch` of a gradient and computes no SVD after the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from osd_jax.basis_rule import BasisRule, Clock, Each
from osd_jax.numerics import (
    accumulator_dtype,
    check_number,
    check_period,
    contract,
    has_direction,
    known_zero,
    replicated,
    written_transpose,
)
from osd_jax.sketch import CORRELATION, SQUARED_NORM, Basis, Needs, Sketch, TwoSided
from osd_jax.stacks import decomposed, map_own_matrices
from osd_names import (
    MOVE_PROJECTOR,
    PROJECTOR_INITS,
    Order,
    ProjectorInit,
    ResolvedSide,
    check_choice,
)


def online_pca(
    optimizer: optax.GradientTransformation,
    *,
    penalty: float = 0.0,
    init: ProjectorInit = "svd",
    order: Order = "after",
    every: int = 1,
) -> BasisRule:
    """Moves P by one optimizer step on the online PCA loss after each step of W.

        L  = ||P P^T Gn - Gn||_F^2 + penalty ||P^T P - I||_F^2,   Gn = G / ||G||_F
        P <- P + optimizer(dL/dP)

    `online_pca_gradient` has the closed form of dL/dP. The first nonzero gradient sets P, which
    does not move at that step; afterwards `optimizer` takes one step per update, or one every
    `every` updates. P stays unchanged if a gradient is zero or its squared norm overflows.

    Args:
      optimizer: Any Optax optimizer, including its learning rate; it may read P as its parameters
        (weight decay). It counts its own steps: the first is the first at which any P moves, which
        is step `every` of W, counted from 0, unless a gradient is zero.
      penalty: Lambda, the weight of the orthogonality penalty (0.1 in the paper, 0 in the release).
      init: "svd": the leading singular vectors of the first gradient (as in the release). "qr": an
        orthonormal basis of a random sketch of its range (Halko et al. 2011, algorithm 4.1), which
        avoids the SVD, which takes minutes to compile for TPUs.
      order: "before": P moves before W's step, and R is recomputed with the new P.
      every: P moves at steps `every`, 2 `every`, ... with the gradient of that step. At all other
        steps P and its optimizer's state stay unchanged, and neither A nor ||G||_F^2 is computed.

    Returns:
      A `BasisRule`.

    Raises:
      ValueError: The penalty is negative, `init` or `order` is unknown, or the period is below 1.

    References:
      arXiv 2408.12857, equation 8.

    Example:
      >>> import optax, osd_jax
      >>> rule = osd_jax.online_pca(optax.adam(5e-3), penalty=0.1, every=5)
      >>> rule.clock
      Clock(refresh_every=None, move_every=5)
    """
    check_number("penalty", penalty)
    check_choice("order", order, MOVE_PROJECTOR)
    check_period(every)
    if init not in PROJECTOR_INITS:
        raise ValueError(f"init is {init!r}: expected one of {', '.join(PROJECTOR_INITS)}")

    def fresh(matrix: jax.Array, old: Basis, side: ResolvedSide, key: jax.Array, each: Each) -> Any:
        if init == "svd":
            return leading_singular_vectors(matrix, old, side, each)
        assert not isinstance(old, TwoSided)
        return _random_range(key, matrix, old, each)

    needs = Needs(
        (CORRELATION, SQUARED_NORM),
        "at a refresh",
        "the first P is set from a gradient",
    )
    if order == "before":
        needs = needs._replace(
            gradient="always",
            reason="move_projector is 'before', which recomputes R from the gradient after P has "
            "moved",
            remedy="move_projector='after'",
        )
    return BasisRule(
        clock=Clock(move_every=every),
        fresh=fresh,
        needs=needs,
        gradient=lambda basis, sketch: online_pca_gradient(basis, sketch, penalty),
        optimizer=optimizer,
        order=order,
    )


def oja(
    optimizer: optax.GradientTransformation,
    *,
    init: ProjectorInit = "svd",
    order: Order = "after",
    every: int = 1,
) -> BasisRule:
    """Moves P by Oja's rule: `P <- QR(P + eta A / ||G||_F^2)`, `A = G G^T P`.

    The columns stay orthonormal and keep their order and signs. With a large step size, a step is
    one of subspace iteration. Each move costs a QR of (p, r) per matrix and two of the five
    products that `online_pca` computes for P.

    Args:
      optimizer: The optimizer of P, which receives `-A / ||G||_F^2`; for `optax.sgd(1.0)` the
        learning rate is eta.
      init: See `online_pca`.
      order: See `online_pca`.
      every: See `online_pca`.

    Returns:
      A `BasisRule`.

    Raises:
      ValueError: See `online_pca`.

    References:
      Oja (1992), Principal components, minor components, and linear neural networks.

    Example:
      >>> import optax, osd_jax
      >>> tx = osd_jax.osd_adamw(1e-2, rank=4, basis=osd_jax.oja(optax.sgd(0.5)))
    """
    rule = online_pca(optimizer, init=init, order=order, every=every)
    return rule._replace(gradient=oja_gradient, retract=orthonormalized)


def oja_gradient(basis: jax.Array, sketch: Sketch) -> jax.Array:
    """`-A / s`, (..., p, r); zero if the squared norm s is zero or overflows."""
    a, s = sketch.statistics[CORRELATION.name], sketch.statistics[SQUARED_NORM.name]
    usable = has_direction(s)
    factor = -1 / jnp.where(usable, s, 1)
    return factor[..., None, None] * jnp.where(usable[..., None, None], a, 0)


def orthonormalized(basis: jax.Array) -> jax.Array:
    """The Q of P's QR decomposition, (p, r), with signs such that R's diagonal is positive."""
    q, r = decomposed(jnp.linalg.qr, basis)
    return q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)


def online_pca_gradient(basis: jax.Array, sketch: Sketch, penalty: float = 0.0) -> jax.Array:
    """Gradient of the online PCA loss in closed form.

        (2 / s) (P (P^T A) + A (P^T P) - 2 A) + 4 penalty P (P^T P - I),   s = ||G||_F^2

    It equals autograd's gradient of `||P P^T Gn - Gn||_F^2 + penalty ||P^T P - I||_F^2`, without a
    p x p matrix or a second p x q matrix.

    Args:
      basis: P, (..., p, r).
      sketch: The sketch of the gradient for this P, with `CORRELATION` and `SQUARED_NORM`. If the
        squared norm is zero or overflows, the first term is zero.
      penalty: Lambda.

    Returns:
      The gradient, (..., p, r).
    """
    a, s = sketch.statistics[CORRELATION.name], sketch.statistics[SQUARED_NORM.name]
    transpose = written_transpose(basis)
    gram = contract("rp,ps->rs", transpose, basis)
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    usable = has_direction(s)
    factor = 2 / jnp.where(usable, s, 1)

    def scaled(x: jax.Array) -> jax.Array:
        return factor[..., None, None] * jnp.where(usable[..., None, None], x, 0)

    # The factors of A are small, so they are scaled instead of A.
    inner = scaled(contract("rp,ps->rs", transpose, a))
    if not known_zero(penalty):
        inner += 4 * penalty * (gram - identity)
    off = scaled(contract("pr,rs->ps", a, gram - 2 * identity))
    return contract("pr,rs->ps", basis, inner) + off


def svd(every: int) -> BasisRule:
    """Sets P to the leading singular vectors of G at steps 0, `every`, 2 `every`, ... (GaLore).

    A matrix whose gradient is zero at such a step keeps its P until its next nonzero gradient sets
    it.

    Args:
      every: The number of steps between refreshes.

    Returns:
      A `BasisRule`.

    Raises:
      ValueError: The period is below 1.

    References:
      arXiv 2403.03507.

    Example:
      >>> import optax, osd_jax
      >>> galore = osd_jax.scale_by_subspace(optax.scale_by_adam(), osd_jax.svd(200), rank=4)
    """
    check_period(every)

    def fresh(matrix: jax.Array, old: Basis, side: ResolvedSide, key: jax.Array, each: Each) -> Any:
        return leading_singular_vectors(matrix, old, side, each)

    needs = Needs((), "at a refresh", "svd sets P from the gradient's singular vectors")
    return BasisRule(Clock(refresh_every=every), fresh, needs, two_sided=True)


def random(every: int) -> BasisRule:
    """Sets P to the singular vectors of a Gaussian matrix at steps 0, `every`, 2 `every`, ...

    A matrix whose gradient is zero at such a step keeps its P; its next nonzero gradient draws a
    new one.

    Args:
      every: The number of steps between refreshes.

    Returns:
      A `BasisRule`.

    Raises:
      ValueError: The period is below 1.

    Example:
      >>> import optax, osd_jax
      >>> tx = osd_jax.scale_by_subspace(optax.scale_by_adam(), osd_jax.random(200), rank=4)
    """
    check_period(every)
    left = lambda matrix: jnp.linalg.svd(matrix, full_matrices=False)[0]

    def draw(key: jax.Array, old: jax.Array, each: Each) -> jax.Array:
        def one(gaussian: jax.Array) -> jax.Array:
            return decomposed(left, gaussian).astype(old.dtype)

        return each(one, jax.random.normal(key, old.shape, accumulator_dtype(old.dtype)))

    def fresh(matrix: jax.Array, old: Basis, side: ResolvedSide, key: jax.Array, each: Each) -> Any:
        if isinstance(old, TwoSided):
            keys = jax.random.split(key)
            return TwoSided(*(draw(key, one, each) for key, one in zip(keys, old, strict=True)))
        return draw(key, old, each)

    return BasisRule(Clock(refresh_every=every), fresh, two_sided=True)


def gaussian(every: int) -> BasisRule:
    """Draws the entries of P from N(0, 1 / r) at steps 0, `every`, 2 `every`, ... (APOLLO).

    The columns are not orthonormal; `P P^T` is the identity in expectation, so R has the norms of M
    in expectation. Use it with lifts that read norms, such as `gradient_only`. A matrix whose
    gradient is zero at such a step keeps its P; its next nonzero gradient draws a new one.

    Args:
      every: The number of steps between refreshes.

    Returns:
      A `BasisRule`.

    Raises:
      ValueError: The period is below 1.

    References:
      arXiv 2412.05270.

    Example:
      >>> import osd_jax
      >>> tx = osd_jax.osd_adamw(
      ...     1e-2, rank=4, basis=osd_jax.gaussian(200), lift=osd_jax.gradient_only())
    """
    check_period(every)

    def draw(key: jax.Array, old: jax.Array) -> jax.Array:
        normal = jax.random.normal(key, old.shape, accumulator_dtype(old.dtype))
        return (normal / math.sqrt(old.shape[-1])).astype(old.dtype)

    def fresh(matrix: jax.Array, old: Basis, side: ResolvedSide, key: jax.Array, each: Each) -> Any:
        if isinstance(old, TwoSided):
            keys = jax.random.split(key)
            return TwoSided(*(draw(key, one) for key, one in zip(keys, old, strict=True)))
        return draw(key, old)

    return BasisRule(Clock(refresh_every=every), fresh, two_sided=True)


def each_matrix(wanted: jax.Array, function: Callable[..., Any], *arrays: Any) -> Any:
    """Applies `function` to each wanted matrix of some stacks, one at a time.

    Under a mesh this gathers one matrix at a time, not the stack; inside
    `osd_jax.stacks.moving_whole_matrices` each device takes its own matrices, and of a stack of one
    `function` itself copies what it decomposes to every device. On a CPU it also avoids a deadlock:
    LAPACK's batched routines wait for threads of the pool that runs the devices, and 8 virtual
    devices can wait for each other forever.

    Args:
      wanted: bool (batch...), True for at least one matrix. Where it is False, `function` does not
        run and the result is zero.
      function: (arrays of one matrix) -> arrays, such as its P.
      *arrays: Trees of arrays (batch..., ...), such as M and P.

    Returns:
      The results of `function` with leading batch axes, replicated on every device, or each on the
      device that has its matrix.
    """

    def nothing(*arrays: Any) -> Any:
        shapes = jax.eval_shape(function, *arrays)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def each(wanted: jax.Array, *arrays: Any) -> Any:
        if wanted.ndim:
            return jax.lax.map(lambda one: each(*one), (wanted, *arrays))
        return if_wanted(wanted, *arrays)

    if_wanted = lambda wanted, *own: jax.lax.cond(wanted, function, nothing, *own)
    if (found := map_own_matrices(if_wanted, wanted, *arrays)) is not None:
        return found
    wanted, *whole = jax.tree.map(replicated, (wanted, *arrays))
    # A single matrix is always wanted. A `cond` would copy it if it is a transposed view.
    return each(wanted, *whole) if wanted.ndim else function(*whole)


def leading_singular_vectors(
    matrix: jax.Array, old: Basis, side: ResolvedSide, each: Each
) -> Basis:
    """The leading singular vectors of a gradient on one or both sides, like `old`.

    Args:
      matrix: M, (..., p, q), in any float dtype; decomposed in float32 (float64 for float64).
      old: P, (..., p, r), or the bases of both sides if M is (..., input, output).
      side: The side of p.
      each: See `BasisRule`.
    """

    def one(matrix: jax.Array) -> Basis:
        left, right = decomposed(_signed_svd, matrix if side == "output" else matrix.mT)

        def take(vectors: jax.Array, old: jax.Array) -> jax.Array:
            return vectors[:, : old.shape[-1]].astype(old.dtype)

        if isinstance(old, TwoSided):
            return TwoSided(output=take(left, old.output), input=take(right, old.input))
        return take(left if side == "output" else right, old)

    return each(one, matrix.astype(accumulator_dtype(matrix.dtype)))


def _signed_svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Singular vectors U (..., m, k) and V (..., n, k) of G (..., m, n), k = min(m, n).

    The sign of a singular vector is arbitrary, but it matters: moments are kept when P is
    refreshed, so W depends on the sign of each new column relative to the old one. The release has
    the signs of PyTorch's LAPACK on a CPU, which starts with a QR for tall matrices with an aspect
    ratio of at least 3/2, and never for wide ones. JAX's LAPACK uses another threshold, 11/6 for
    both; rows of zeros keep a wide matrix below it. On other devices the signs are those of the
    device.
    """
    m, n = matrix.shape[-2:]
    if 2 * m >= 3 * n:
        q, r = jnp.linalg.qr(matrix)
        u, _, vt = jnp.linalg.svd(r, full_matrices=False)
        return q @ u, vt.mT
    rows = max(m, -(-5 * n // 9))
    padding = [(0, 0)] * (matrix.ndim - 2) + [(0, rows - m), (0, 0)]
    u, _, vt = jnp.linalg.svd(jnp.pad(matrix, padding), full_matrices=False)
    return u[..., :m, :m], vt[..., :m, :].mT


def _random_range(key: jax.Array, matrix: jax.Array, old: jax.Array, each: Each) -> jax.Array:
    """An orthonormal basis of M @ Gaussian (q, r), by QR: the range of M without an SVD."""
    wide = matrix.astype(accumulator_dtype(matrix.dtype))
    gaussian = jax.random.normal(key, (matrix.shape[-1], old.shape[-1]), wide.dtype)

    def one(matrix: jax.Array) -> jax.Array:
        return decomposed(jnp.linalg.qr, matrix @ gaussian)[0].astype(old.dtype)

    return each(one, wide)
