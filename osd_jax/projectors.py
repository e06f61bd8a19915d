"""The rules that move P: online PCA, SVD, random.

A `Projector` says when P is set anew from a gradient, and how it moves after a step of W. Online
PCA needs three small things of a gradient, its `Sketch`, and no SVD after the first step.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Sketch(NamedTuple):
    """All that a step asks of a gradient M (..., p, q) with P (..., p, r).

    Attributes:
      low_rank: R = P^T M, (..., r, q); two-sided: P_in^T M P_out, (..., r, r).
      correlation: A = M R^T, (..., p, r), or None where the projector does not read it.
      squared_norm: s = ||M||_F^2, (...,), or None likewise.

    All float32 (float64 for float64 gradients). R of a sum of gradients is the sum of their R's
    while P is fixed; A is exact if every part uses the final R.
    """

    low_rank: jax.Array
    correlation: jax.Array | None
    squared_norm: jax.Array | None


class TwoSided(NamedTuple):
    """The bases of a matrix that is projected on both sides: (..., m, r) and (..., n, r)."""

    output: jax.Array
    input: jax.Array


Basis = jax.Array | TwoSided
ResolvedSide = Literal["input", "output", "both"]
FreshBasis = Callable[[jax.Array, jax.Array, Basis, ResolvedSide, jax.Array], Basis]
PROJECTOR_INITS = ("svd", "qr")
Reduce = Callable[[jax.Array], jax.Array]
MakeSketch = Callable[[Basis, jax.Array, Reduce | None, bool], Sketch]
NOT_SET = -1  # in ProjectorState.set_at


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


class Projector(NamedTuple):
    """A rule for P, as pure functions.

    Attributes:
      is_due: (count) -> whether P is set from the gradient at this step, before projecting. A
        matrix whose gradient has no direction then waits for the next gradient that has one.
      fresh_basis: (key, M (..., p, q), old P, the side p is, wanted (...)) -> P, of the old one's
        shape and dtype. Matrices where `wanted` is False keep the old P, whatever this returns.
      sketch: (P, M, reduce, moves) -> Sketch; `reduce` is None, or the mean over devices of which
        each has a part of M; `moves`: whether P moves at this step, or else only R need be right.
      init: (bases) -> the state of P's optimizer.
      move: (bases, sketches, optimizer state, moves) -> (bases, optimizer state), of the steps at
        which P moves, after that of W. `moves` is a tree of bool (...): at a matrix where it is
        False, P stays and its optimizer sees a gradient of zero. None: P is set, and does not move.
      two_sided: Whether it serves side="both".
      moves_first: Whether P moves before W's step, which costs one more product with the gradient.
      every: P moves at the steps whose count is a multiple of `every`, and not before the step
        after the one that set it.
    """

    is_due: Callable[[jax.Array], jax.Array]
    fresh_basis: FreshBasis
    sketch: MakeSketch
    init: Callable[[Any], optax.OptState]
    move: Callable[[Any, Any, optax.OptState, Any], tuple[Any, optax.OptState]] | None
    two_sided: bool = False
    moves_first: bool = False
    every: int = 1

    def moves_at(self, count: jax.Array, set_at: Any) -> jax.Array:
        """Whether any P moves at the step with this count, from 0."""
        return (count % self.every == 0) & any_of(set_before(set_at, count))


def online_pca(
    optimizer: optax.GradientTransformation,
    *,
    penalty: float = 0.0,
    init: str = "svd",
    moves_first: bool = False,
    every: int = 1,
) -> Projector:
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
      moves_first: P moves before W's step, and R is taken again with the new P.
      every: P moves at steps `every`, 2 `every`, ... with that step's gradient. At all others P and
        its optimizer's state stay, and neither A nor ||G||_F^2 is computed.

    Raises:
      ValueError: for a negative penalty, an unknown `init`, or a period below 1.
    """
    check_number("penalty", penalty)
    check_static("moves_first", moves_first)
    check_period(every)
    if init not in PROJECTOR_INITS:
        raise ValueError(f"init is {init!r}: expected one of {', '.join(PROJECTOR_INITS)}")

    def fresh_basis(
        key: jax.Array, matrix: jax.Array, old: Basis, side: ResolvedSide, wanted: jax.Array
    ) -> Basis:
        assert not isinstance(old, TwoSided)
        if init == "svd":
            return leading_singular_vectors(matrix, old, side, wanted)
        return random_range(key, matrix, old, wanted)

    def sketch(
        basis: Basis, matrix: jax.Array, reduce: Reduce | None = None, moves: bool = True
    ) -> Sketch:
        assert not isinstance(basis, TwoSided)
        low_rank = low_rank_gradient(basis, matrix)
        if not moves:
            # Zeros in place of A and s, laid out as they are: a `lax.cond` chooses between the two.
            nothing = jnp.zeros_like(basis, low_rank.dtype)
            low_rank = low_rank if reduce is None else reduce(low_rank)
            return Sketch(low_rank, nothing, jnp.sum(nothing, axis=(-2, -1)))
        if reduce is not None:
            return reduced_sketch(matrix, low_rank, reduce)
        return Sketch(low_rank, correlation(matrix, low_rank), squared_norm(matrix))

    def init_state(bases: Any) -> optax.OptState:
        return optimizer.init(jax.tree.map(_float32_or_more, bases))

    def move(
        bases: Any, sketches: Any, state: optax.OptState, moves: Any
    ) -> tuple[Any, optax.OptState]:
        def gradient(basis: jax.Array, sketch: Sketch, moves: jax.Array) -> jax.Array:
            found = online_pca_gradient(basis, sketch, penalty)
            return jnp.where(moves[..., None, None], found, 0)

        def step(
            old: jax.Array, basis: jax.Array, step: jax.Array, sketch: Sketch, moves: jax.Array
        ) -> jax.Array:
            assert sketch.squared_norm is not None
            moves &= has_direction(sketch.squared_norm)
            return jnp.where(moves[..., None, None], (basis + step).astype(old.dtype), old)

        wide = jax.tree.map(_float32_or_more, bases)
        gradients = jax.tree.map(gradient, wide, sketches, moves)
        steps, new_state = optimizer.update(gradients, state, wide)
        return jax.tree.map(step, bases, wide, steps, sketches, moves), new_state

    return Projector(
        is_due=lambda count: count == 0,
        fresh_basis=fresh_basis,
        sketch=sketch,
        init=init_state,
        move=move,
        moves_first=moves_first,
        every=every,
    )


def reduced_sketch(matrix: jax.Array, low_rank: jax.Array, reduce: Reduce) -> Sketch:
    """The sketch of the mean M of the devices' parts M_i, which themselves are not reduced.

    R is the mean of the parts' R_i = P^T M_i, and A the mean of M_i R^T: both exact. ||M||_F^2 is
    not to be had from the parts. If the mean is shorter than its parts by as much outside the
    subspace as inside it, then it is `mean ||M_i||_F^2 * ||R||_F^2 / mean ||R_i||_F^2`.

    Args:
      matrix: M_i, (..., p, q).
      low_rank: R_i, (..., r, q).
      reduce: The mean over devices.
    """
    squares = reduce(jnp.stack([squared_norm(matrix), squared_norm(low_rank)]))
    low_rank = reduce(low_rank)
    usable = has_direction(squares[1])
    ratio = squared_norm(low_rank) / jnp.where(usable, squares[1], 1)
    norm = squares[0] * jnp.where(usable, ratio, 1)
    return Sketch(low_rank, reduce(correlation(matrix, low_rank)), norm)


def online_pca_gradient(basis: jax.Array, sketch: Sketch, penalty: float = 0.0) -> jax.Array:
    """Gradient of the online PCA loss in closed form.

    `(2 / s) (P (P^T A) + A (P^T P) - 2 A) + 4 penalty P (P^T P - I)`, which is what autograd gives
    for `||P P^T Gn - Gn||_F^2 + penalty ||P^T P - I||_F^2` without a p x p or second p x q matrix.

    Args:
      basis: P, (..., p, r).
      sketch: Of the gradient by this P. Where its squared norm is zero or overflows, the first term
        is zero.
      penalty: Lambda.

    Returns:
      (..., p, r).
    """
    a, s = sketch.correlation, sketch.squared_norm
    assert a is not None and s is not None
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


def has_direction(squared_norm: jax.Array) -> jax.Array:
    """Whether G / ||G||_F is a number: ||G||_F^2 is neither zero (nor subnormal) nor overflown."""
    return (squared_norm >= jnp.finfo(squared_norm.dtype).tiny) & jnp.isfinite(squared_norm)


def set_before(set_at: Any, count: jax.Array) -> Any:
    """Whether each P was set before the step with this count: a tree like `set_at`, of bool."""
    return jax.tree.map(lambda at: (at != NOT_SET) & (at != count), set_at)


def any_of(tree: Any) -> jax.Array:
    """Whether any boolean of a tree is True."""
    return functools.reduce(jnp.logical_or, map(jnp.any, jax.tree.leaves(tree)), jnp.array(False))


def svd(every: int) -> Projector:
    """P is the gradient's leading singular vectors at steps 0, `every`, 2 `every`, ... (GaLore).

    A matrix whose gradient has no direction at such a step keeps its P, and the next gradient that
    has one sets it.

    Raises:
      ValueError: for a period below 1.
    """

    def fresh_basis(
        key: jax.Array, matrix: jax.Array, old: Basis, side: ResolvedSide, wanted: jax.Array
    ) -> Basis:
        return leading_singular_vectors(matrix, old, side, wanted)

    return _periodic(every, fresh_basis)


def random(every: int) -> Projector:
    """P is a Gaussian matrix's singular vectors, drawn at steps 0, `every`, 2 `every`, ...

    A matrix whose gradient has no direction at such a step keeps its P, and a new one is drawn at
    the next step whose gradient has one.

    Raises:
      ValueError: for a period below 1.
    """

    def draw(key: jax.Array, old: jax.Array, wanted: jax.Array) -> jax.Array:
        def one(gaussian: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.linalg.svd(gaussian, full_matrices=False)[0].astype(old.dtype)

        gaussian = jax.random.normal(key, old.shape, accumulator_dtype(old.dtype))
        return each_matrix(one, gaussian, old, wanted)

    def fresh_basis(
        key: jax.Array, matrix: jax.Array, old: Basis, side: ResolvedSide, wanted: jax.Array
    ) -> Basis:
        if isinstance(old, TwoSided):
            keys = jax.random.split(key)
            return TwoSided(*(draw(key, one, wanted) for key, one in zip(keys, old, strict=True)))
        return draw(key, old, wanted)

    return _periodic(every, fresh_basis)


def _periodic(every: int, fresh_basis: FreshBasis) -> Projector:
    check_period(every)

    def sketch(
        basis: Basis, matrix: jax.Array, reduce: Reduce | None = None, moves: bool = True
    ) -> Sketch:
        low_rank = low_rank_gradient(basis, matrix)
        return Sketch(low_rank if reduce is None else reduce(low_rank), None, None)

    return Projector(
        is_due=lambda count: count % every == 0,
        fresh_basis=fresh_basis,
        sketch=sketch,
        init=lambda bases: optax.EmptyState(),
        move=None,
        two_sided=True,
    )


def check_static(name: str, value: Any, static_args: tuple[str, ...] | None = None) -> None:
    """Raises ValueError for an array where only a plain value will do.

    Args:
      name: The argument's.
      value: Of the argument.
      static_args: All arguments of its function that have to be plain. None: this one.
    """
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} is an array, which decides what is computed and so has to be a plain value: "
            "optax.inject_hyperparams makes arrays of numbers and of what functions return, except "
            f"for those that it is told, static_args={static_args or (name,)}"
        )


def check_period(every: int) -> None:
    """Raises ValueError unless `every` is a whole number of steps, at least 1."""
    check_static("every", every)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"the period of P is {every!r}: expected a whole number of at least 1")


def check_number(name: str, value: jax.typing.ArrayLike) -> None:
    """Raises ValueError unless `value` is a finite number of at least 0.

    An array passes unread: it may be traced, as the numbers of `optax.inject_hyperparams` are.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        return
    if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}: expected a number of at least 0")


def known_zero(value: jax.typing.ArrayLike) -> bool:
    """Whether `value` is a plain 0, whose term can be left out; a traced number never is."""
    return isinstance(value, numbers.Real) and value == 0


def each_matrix(
    function: Callable[[jax.Array, Any], Any], stack: jax.Array, old: Basis, wanted: jax.Array
) -> Any:
    """P of each matrix of a stack, one after the other: `function(matrix, P)` where it is wanted.

    One is gathered from a mesh at a time, not the stack. And on a CPU, LAPACK's batches wait for
    threads of the pool that runs the devices: 8 virtual devices wait for each other for good.

    Args:
      function: (a matrix (m, n), its P) -> P, of the same shape and dtype.
      stack: (..., m, n).
      old: P, with the same batch axes.
      wanted: bool (...), True for one of them at least. Where it is False, `function` does not
        run, and P stays.
    """

    def each(stack: jax.Array, old: Basis, wanted: jax.Array) -> Any:
        if stack.ndim == 2:
            return jax.lax.cond(wanted, function, lambda matrix, old: old, stack, old)
        return jax.lax.map(lambda one: each(*one), (stack, old, wanted))

    whole, old_whole, wanted = jax.tree.map(replicated, (stack, old, wanted))
    # A matrix on its own is wanted. A `cond` would write it out, where it is a transposed view.
    new = function(whole, old_whole) if stack.ndim == 2 else each(whole, old_whole, wanted)
    return jax.tree.map(like_sharding, new, old)


def leading_singular_vectors(
    matrix: jax.Array, old: Basis, side: ResolvedSide, wanted: jax.Array
) -> Basis:
    """The leading singular vectors of a gradient on one side or both, of `old`'s shape and dtype.

    Args:
      matrix: M, (..., p, q), in any float dtype; decomposed in float32 (float64 for float64).
      old: P, (..., p, r), or both sides' where M is (..., input, output).
      side: What p is.
      wanted: bool (...). Where it is False, there is no SVD, and P stays.
    """

    def one(matrix: jax.Array, old: Basis) -> Basis:
        left, right = signed_svd(matrix if side == "output" else matrix.mT)

        def take(vectors: jax.Array, old: jax.Array) -> jax.Array:
            return vectors[:, : old.shape[-1]].astype(old.dtype)

        if isinstance(old, TwoSided):
            return TwoSided(output=take(left, old.output), input=take(right, old.input))
        return take(left if side == "output" else right, old)

    return each_matrix(one, matrix.astype(accumulator_dtype(matrix.dtype)), old, wanted)


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


def random_range(key: jax.Array, matrix: jax.Array, old: jax.Array, wanted: jax.Array) -> jax.Array:
    """An orthonormal basis of M @ Gaussian (q, r), by QR: the range of M without an SVD."""
    wide = matrix.astype(accumulator_dtype(matrix.dtype))
    gaussian = jax.random.normal(key, (matrix.shape[-1], old.shape[-1]), wide.dtype)

    def one(matrix: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.linalg.qr(matrix @ gaussian)[0].astype(old.dtype)

    return each_matrix(one, wide, old, wanted)


def low_rank_gradient(basis: Basis, matrix: jax.Array) -> jax.Array:
    """R: (..., p, r), (..., p, q) -> (..., r, q); two-sided: (..., r, r), in float32 or float64."""
    if isinstance(basis, TwoSided):
        # The output side first, as in PyTorch: that basis is the one that bfloat16 rounds.
        half = contract("pq,qs->ps", matrix, basis.output)
        return contract("pr,ps->rs", basis.input, half)
    return contract("rp,pq->rq", written_transpose(basis), matrix)


def correlation(matrix: jax.Array, low_rank: jax.Array) -> jax.Array:
    """A = M R^T: (..., p, q), (..., r, q) -> (..., p, r), in float32 or float64."""
    return written_transpose(contract("rq,pq->rp", low_rank, matrix))


def squared_norm(matrix: jax.Array) -> jax.Array:
    """||M||_F^2: (..., p, q) -> (...,), in float32 or float64."""
    return jnp.sum(jnp.square(_float32_or_more(matrix)), axis=(-2, -1))


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> Any:
    """float32, or float64 for float64: what moments, norms and products are kept in."""
    return jnp.promote_types(dtype, jnp.float32)


def _float32_or_more(array: jax.Array) -> jax.Array:
    return array.astype(accumulator_dtype(array.dtype))


def contract(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of matrices, such as "pr,pq->rq", over any leading batch axes.

    Both inputs are read in the narrower of their dtypes and the products accumulated, and
    returned, in float32 (float64 for float64). Under a mesh with Explicit axes an output axis is
    sharded as the input axis of the same letter, which says what JAX cannot guess.
    """
    inputs, output = spec.split("->")
    a_axes, b_axes = inputs.split(",")
    batch = "uvwxyz"[: a.ndim - 2]
    narrow = min(a.dtype, b.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    return jnp.einsum(
        f"{batch}{a_axes},{batch}{b_axes}->{batch}{output}",
        a.astype(narrow),
        b.astype(narrow),
        preferred_element_type=accumulator_dtype(narrow),
        out_sharding=_sharding_by_letter({batch + a_axes: a, batch + b_axes: b}, batch + output),
    )


def written_transpose(array: jax.Array) -> jax.Array:
    """The transpose of (..., p, r) or (..., r, p): on a CPU made here, not within what reads it.

    A matrix M may be a transposed view of the array that holds it. XLA's products on CPUs take 2 to
    4 times as long where both factors are read against their layout, and its elementwise loops
    longer still; and into either it folds a transposition. This one is of a factor that is small
    beside M, and spares M's. Other devices read any layout alike.
    """

    def write(array: jax.Array) -> jax.Array:
        barrier = jax.lax.optimization_barrier
        return barrier(barrier(array).mT)

    return jax.lax.platform_dependent(array, cpu=write, default=lambda array: array.mT)


def zeros_of_axes(
    axes: str, matrix: jax.ShapeDtypeStruct | jax.Array, rank: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Zeros of shape (batch..., *axes), "p" and "q" being the matrix's and "r", "s" the rank's.

    Under Explicit axes, p and q are sharded as the matrix's are; the rank is on every device.
    """
    batch = "uvwxyz"[: len(matrix.shape) - 2]
    sizes = dict(zip(batch + "pq", matrix.shape, strict=True)) | {"r": rank, "s": rank}
    shape = tuple(sizes[letter] for letter in batch + axes)
    return jnp.zeros(
        shape, dtype, out_sharding=_sharding_by_letter({batch + "pq": matrix}, batch + axes)
    )


def explicit_sharding(array: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding | None:
    """How an array is sharded under a mesh with Explicit axes; None without one."""
    typed = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    sharding: Any = typed.sharding
    if sharding is None or jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding


def _sharding_by_letter(inputs: dict[str, Any], output: str) -> jax.sharding.NamedSharding | None:
    """Under Explicit axes: each output axis as the first input axis of the same letter."""
    by_letter: dict[str, Any] = {}
    mesh = None
    for axes, array in inputs.items():
        if (sharding := explicit_sharding(array)) is not None:
            mesh = sharding.mesh
            for letter, names in zip(axes, sharding.spec, strict=True):
                by_letter[letter] = by_letter.get(letter) or names
    if mesh is None:
        return None
    spec, used = [], set[str]()
    for letter in output:
        names = by_letter.get(letter)
        names_set = {names} if isinstance(names, str) else set(names or ())
        spec.append(None if names_set & used else names)
        used |= names_set
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def replicated(array: jax.Array) -> jax.Array:
    """Under Explicit axes, the array whole on every device, as LAPACK-like routines need it."""
    if explicit_sharding(array) is None:
        return array
    return jax.sharding.reshard(array, jax.sharding.PartitionSpec())


def like_sharding(array: jax.Array, like: jax.Array) -> jax.Array:
    """Under Explicit axes, `array` laid out as `like`."""
    sharding = explicit_sharding(like)
    return array if sharding is None else jax.sharding.reshard(array, sharding)
