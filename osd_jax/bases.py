"""The rules that move P: online PCA, SVD, random, Gaussian.

A `BasisRule` says by a clock when P is set from a gradient and when it moves after a step of W.
Online PCA needs three small things of a gradient, its `Sketch`, and no SVD after the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
from osd_jax.sketch import (
    CORRELATION,
    SQUARED_NORM,
    Basis,
    Needs,
    Sketch,
    TwoSided,
)
from osd_names import MOVE_PROJECTOR, PROJECTOR_INITS, check_choice

ResolvedSide = Literal["input", "output", "both"]
Order = Literal["after", "before"]
NOT_SET = -1  # in ProjectorState.set_at
NOTHING, REFRESH, MOVE = 0, 1, 2  # what a clock says

Each = Callable[..., Any]  # (function, *arrays) -> what it gives, matrix by matrix
Fresh = Callable[[jax.Array, Any, ResolvedSide, jax.Array, Each], Any]


class ProjectorState(NamedTuple):
    """The bases P, the state of the optimizer that moves them, and when each P was set.

    Attributes:
      basis: P, a tree like the parameters; zeros before it is set for the first time.
      optimizer: State of the optimizer that moves P.
      set_at: A tree like the parameters of int32 (batch...), one number a matrix: the count of the
        step at which its P was set, or `NOT_SET` while it waits for a gradient with a direction.
    """

    basis: Any
    optimizer: optax.OptState
    set_at: Any


class Clock(NamedTuple):
    """When P is set from a gradient, and when it moves.

    Attributes:
      refresh_every: P is set at the steps whose count is a multiple of it; None: at step 0 only.
      move_every: P moves at the steps whose count is a multiple of it, where no refresh is due.
        None: never.

    Example:
      >>> from osd_jax.bases import Clock
      >>> [int(Clock(refresh_every=4, move_every=2).event(step)) for step in range(6)]
      [1, 0, 2, 0, 1, 0]
    """

    refresh_every: int | None = None
    move_every: int | None = None

    def event(self, step: jax.typing.ArrayLike) -> jax.Array:
        """`NOTHING`, `REFRESH` or `MOVE` at the step with this count, from 0: int32."""
        step = jnp.asarray(step)
        refreshes = step == 0 if self.refresh_every is None else step % self.refresh_every == 0
        otherwise = jnp.int32(NOTHING)
        if self.move_every is not None:
            otherwise = jnp.where(step % self.move_every == 0, jnp.int32(MOVE), otherwise)
        return jnp.where(refreshes, jnp.int32(REFRESH), otherwise)


class BasisRule(NamedTuple):
    """A rule for P, as pure functions. P never moves at the step that set it.

    Attributes:
      clock: When P is set, and when it moves. A matrix whose gradient has no direction when P is to
        be set waits for the next gradient that has one.
      fresh: (M (..., p, q), old P, the side p is, key, each) -> P, of the old one's shape and
        dtype. `key` is a random key of this parameter and step. `each(function, *arrays)` applies
        a function of one matrix's arrays to those of each matrix that is to be set, one after the
        other, and takes stacks (..., a, b). Matrices that are not to be set keep the old P,
        whatever this returns.
      needs: The statistics that `gradient` reads, and when the rule reads the gradient.
      gradient: (P, Sketch) -> the gradient of P's loss, (..., p, r). None: P does not move.
      optimizer: What turns that gradient into a step of P, with its learning rate; it may read P as
        its parameters (weight decay). None where P does not move.
      two_sided: Whether the rule serves side="both".
      order: Whether P moves "after" W's step, or "before" it, which costs one more product with the
        gradient: then `needs.gradient` is "always".
      retract: (one P (p, r), float32 or float64) -> P after a step of its optimizer, such as
        `orthonormalized`. None: as the optimizer leaves it.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> def fixed(matrix, old, side, key, each):
      ...     return jnp.broadcast_to(jnp.eye(*old.shape[-2:], dtype=old.dtype), old.shape)
      >>> rule = osd_jax.BasisRule(osd_jax.Clock(), fixed)
      >>> tx = osd_jax.scale_by_subspace(optax.scale_by_adam(), rule, rank=2)
    """

    clock: Clock
    fresh: Fresh
    needs: Needs = Needs()
    gradient: Callable[[Any, Sketch], Any] | None = None
    optimizer: optax.GradientTransformation | None = None
    two_sided: bool = False
    order: Order = "after"
    retract: Callable[[jax.Array], jax.Array] | None = None


def check_rule(rule: BasisRule) -> None:
    """Raises ValueError for a rule whose parts contradict each other."""
    for every in rule.clock:
        if every is not None:
            check_period(every)
    check_choice("order", rule.order, MOVE_PROJECTOR)
    moves = (rule.clock.move_every, rule.gradient, rule.optimizer)
    if any(part is None for part in moves) != all(part is None for part in moves):
        raise ValueError(
            f"the rule for P has clock.move_every={rule.clock.move_every!r}, and its gradient and "
            "its optimizer are "
            + " and ".join("None" if part is None else "given" for part in moves[1:])
            + ": a P that moves has all three, one that does not has none"
        )
    if rule.order == "before" and rule.needs.gradient != "always":
        raise ValueError(
            "the rule for P has order='before', which takes the sketch again from the gradient "
            "after P has moved: expected needs.gradient='always', with this as its reason"
        )


def online_pca(
    optimizer: optax.GradientTransformation,
    *,
    penalty: float = 0.0,
    init: str = "svd",
    order: Order = "after",
    every: int = 1,
) -> BasisRule:
    """P follows the gradients by one optimizer step on the online PCA loss after each step of W.

    The loss is `||P P^T Gn - Gn||_F^2 + penalty ||P^T P - I||_F^2`, `Gn = G / ||G||_F`
    (arXiv 2408.12857, equation 8); see `online_pca_gradient` for its closed form. The first
    gradient with a direction sets P, which does not move at that step; from then on `optimizer`
    takes one step a time, or one every `every`. Where a gradient is zero, or its squared norm
    overflows, P stays.

    Args:
      optimizer: Any Optax optimizer, with its learning rate; it may read P as its parameters
        (weight decay). It counts its own steps: its first is the first at which any P moves, which
        is step `every` of W, from 0, where no gradient is zero.
      penalty: Lambda of the orthogonality penalty (the paper uses 0.1, the release none).
      init: "svd": the leading singular vectors of the first gradient (the release). "qr": an
        orthonormal basis of a random sketch of its range, which needs no SVD, for TPUs, where one
        compiles for minutes (Halko et al. 2011, algorithm 4.1).
      order: "before": P moves before W's step, and R is taken again with the new P.
      every: P moves at steps `every`, 2 `every`, ... with that step's gradient. At all others P and
        its optimizer's state stay, and neither A nor ||G||_F^2 is computed.

    Raises:
      ValueError: for a negative penalty, an unknown `init`, or a period below 1.

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
        return random_range(key, matrix, old, each)

    needs = Needs(
        (CORRELATION, SQUARED_NORM),
        "at a refresh",
        "online PCA finds its first P from a gradient",
    )
    if order == "before":
        needs = needs._replace(
            gradient="always",
            reason="move_projector is 'before', which takes R again from the gradient after P has "
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
    init: str = "svd",
    order: Order = "after",
    every: int = 1,
) -> BasisRule:
    """Oja's rule: P follows the gradients by `P <- QR(P + eta A / ||G||_F^2)`, `A = G G^T P`.

    The columns stay orthonormal, in their order and with their signs. With a large step size a step
    is one of subspace iteration. A QR of (p, r) a move, one matrix at a time, and two of the five
    products that `online_pca` takes for P.

    Source: Oja (1992), Principal components, minor components, and linear neural networks.

    Args:
      optimizer: Of P, given `-A / ||G||_F^2`, such as `optax.sgd(1.0)`: its learning rate is eta.
      init: See `online_pca`.
      order: See `online_pca`.
      every: See `online_pca`.

    Raises:
      ValueError: as `online_pca`.

    Example:
      >>> import optax, osd_jax
      >>> tx = osd_jax.osd_adamw(1e-2, rank=4, basis=osd_jax.oja(optax.sgd(0.5)))
    """
    rule = online_pca(optimizer, init=init, order=order, every=every)
    return rule._replace(gradient=oja_gradient, retract=orthonormalized)


def oja_gradient(basis: jax.Array, sketch: Sketch) -> jax.Array:
    """`-A / s`, (..., p, r); zero where the squared norm s is zero or overflows."""
    a, s = sketch.statistics[CORRELATION.name], sketch.statistics[SQUARED_NORM.name]
    usable = has_direction(s)
    factor = -1 / jnp.where(usable, s, 1)
    return factor[..., None, None] * jnp.where(usable[..., None, None], a, 0)


def orthonormalized(basis: jax.Array) -> jax.Array:
    """The Q of P's QR decomposition, (p, r), with the signs that make R's diagonal positive."""
    q, r = jnp.linalg.qr(basis)
    return q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)


def online_pca_gradient(basis: jax.Array, sketch: Sketch, penalty: float = 0.0) -> jax.Array:
    """Gradient of the online PCA loss in closed form.

    `(2 / s) (P (P^T A) + A (P^T P) - 2 A) + 4 penalty P (P^T P - I)`, which is what autograd gives
    for `||P P^T Gn - Gn||_F^2 + penalty ||P^T P - I||_F^2` without a p x p or second p x q matrix.

    Args:
      basis: P, (..., p, r).
      sketch: Of the gradient by this P, with its `CORRELATION` and `SQUARED_NORM`. Where its
        squared norm is zero or overflows, the first term is zero.
      penalty: Lambda.

    Returns:
      (..., p, r).
    """
    a, s = sketch.statistics[CORRELATION.name], sketch.statistics[SQUARED_NORM.name]
    transpose = written_transpose(basis)
    gram = contract("rp,ps->rs", transpose, basis)
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    usable = has_direction(s)
    factor = 2 / jnp.where(usable, s, 1)

    def scaled(x: jax.Array) -> jax.Array:
        return factor[..., None, None] * jnp.where(usable[..., None, None], x, 0)

    # What A is multiplied with is small, and so is scaled in its place.
    inner = scaled(contract("rp,ps->rs", transpose, a))
    if not known_zero(penalty):
        inner += 4 * penalty * (gram - identity)
    off = scaled(contract("pr,rs->ps", a, gram - 2 * identity))
    return contract("pr,rs->ps", basis, inner) + off


def svd(every: int) -> BasisRule:
    """P is the gradient's leading singular vectors at steps 0, `every`, 2 `every`, ... (GaLore).

    A matrix whose gradient has no direction at such a step keeps its P, and the next gradient that
    has one sets it.

    Raises:
      ValueError: for a period below 1.

    Example:
      >>> import optax, osd_jax
      >>> galore = osd_jax.scale_by_subspace(optax.scale_by_adam(), osd_jax.svd(200), rank=4)
    """
    check_period(every)

    def fresh(matrix: jax.Array, old: Basis, side: ResolvedSide, key: jax.Array, each: Each) -> Any:
        return leading_singular_vectors(matrix, old, side, each)

    needs = Needs((), "at a refresh", "P is the gradient's singular vectors")
    return BasisRule(Clock(refresh_every=every), fresh, needs, two_sided=True)


def random(every: int) -> BasisRule:
    """P is a Gaussian matrix's singular vectors, drawn at steps 0, `every`, 2 `every`, ...

    A matrix whose gradient has no direction at such a step keeps its P, and a new one is drawn at
    the next step whose gradient has one.

    Raises:
      ValueError: for a period below 1.

    Example:
      >>> import optax, osd_jax
      >>> tx = osd_jax.scale_by_subspace(optax.scale_by_adam(), osd_jax.random(200), rank=4)
    """
    check_period(every)

    def draw(key: jax.Array, old: jax.Array, each: Each) -> jax.Array:
        def one(gaussian: jax.Array) -> jax.Array:
            return jnp.linalg.svd(gaussian, full_matrices=False)[0].astype(old.dtype)

        return each(one, jax.random.normal(key, old.shape, accumulator_dtype(old.dtype)))

    def fresh(matrix: jax.Array, old: Basis, side: ResolvedSide, key: jax.Array, each: Each) -> Any:
        if isinstance(old, TwoSided):
            keys = jax.random.split(key)
            return TwoSided(*(draw(key, one, each) for key, one in zip(keys, old, strict=True)))
        return draw(key, old, each)

    return BasisRule(Clock(refresh_every=every), fresh, two_sided=True)


def gaussian(every: int) -> BasisRule:
    """P's entries are drawn from N(0, 1 / r), new at steps 0, `every`, 2 `every`, ... (APOLLO).

    Its columns are not orthonormal; `P P^T` is the identity on average, so that R has the norms of
    M on average. For lifts that read norms, such as `gradient_only`. A matrix whose gradient has no
    direction at such a step keeps its P, and a new one is drawn at the next step whose gradient has
    one.

    Source: arXiv 2412.05270.

    Raises:
      ValueError: for a period below 1.

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
    """`function` of each matrix of some stacks that is wanted, one after the other.

    One is gathered from a mesh at a time, not the stack. And on a CPU, LAPACK's batches wait for
    threads of the pool that runs the devices: 8 virtual devices wait for each other for good.

    Args:
      wanted: bool (batch...), True for one of them at least. Where it is False, `function` does not
        run, and the result is zero.
      function: (one matrix's arrays) -> arrays, such as its P.
      *arrays: Trees of arrays (batch..., ...), such as M and P.

    Returns:
      What `function` returns, with the batch axes in front, whole on every device.
    """

    def nothing(*arrays: Any) -> Any:
        shapes = jax.eval_shape(function, *arrays)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def each(wanted: jax.Array, *arrays: Any) -> Any:
        if wanted.ndim:
            return jax.lax.map(lambda one: each(*one), (wanted, *arrays))
        return jax.lax.cond(wanted, function, nothing, *arrays)

    wanted, *whole = jax.tree.map(replicated, (wanted, *arrays))
    # A matrix on its own is wanted. A `cond` would write it out, where it is a transposed view.
    return each(wanted, *whole) if wanted.ndim else function(*whole)


def leading_singular_vectors(
    matrix: jax.Array, old: Basis, side: ResolvedSide, each: Each
) -> Basis:
    """The leading singular vectors of a gradient on one side or both, of `old`'s shape and dtype.

    Args:
      matrix: M, (..., p, q), in any float dtype; decomposed in float32 (float64 for float64).
      old: P, (..., p, r), or both sides' where M is (..., input, output).
      side: What p is.
      each: See `BasisRule`.
    """

    def one(matrix: jax.Array) -> Basis:
        left, right = signed_svd(matrix if side == "output" else matrix.mT)

        def take(vectors: jax.Array, old: jax.Array) -> jax.Array:
            return vectors[:, : old.shape[-1]].astype(old.dtype)

        if isinstance(old, TwoSided):
            return TwoSided(output=take(left, old.output), input=take(right, old.input))
        return take(left if side == "output" else right, old)

    return each(one, matrix.astype(accumulator_dtype(matrix.dtype)))


def signed_svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Singular vectors U (..., m, k) and V (..., n, k) of G (..., m, n), k = min(m, n).

    A singular vector's sign is free, yet it matters: moments are kept when P is refreshed, so W
    depends on the sign of each new column relative to the old. The release's signs are those of
    PyTorch's LAPACK on a CPU, which begins with a QR for tall matrices, from an aspect of 3/2 on,
    and never for wide ones. JAX's LAPACK has its thresholds elsewhere, at 11/6 for both, and rows
    of zeros keep a wide matrix below it. On other devices signs are the device's own.
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


def random_range(key: jax.Array, matrix: jax.Array, old: jax.Array, each: Each) -> jax.Array:
    """An orthonormal basis of M @ Gaussian (q, r), by QR: the range of M without an SVD."""
    wide = matrix.astype(accumulator_dtype(matrix.dtype))
    gaussian = jax.random.normal(key, (matrix.shape[-1], old.shape[-1]), wide.dtype)

    def one(matrix: jax.Array) -> jax.Array:
        return jnp.linalg.qr(matrix @ gaussian)[0].astype(old.dtype)

    return each(one, wide)
