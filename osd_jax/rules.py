"""Weight rules as Optax transformations.

Optax has most rules. This module has those that the release computes differently, and wrappers that
let rules that read matrices, such as Adafactor and 8-bit Adam, read stacks of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax.layout import DimensionNumbers, dimension_numbers_by_path, matrix_layout
from osd_jax.numerics import accumulator_dtype, bias_correction, known_zero
from osd_jax.sharding import takes_shapes
from osd_jax.transport import refuse_factored
from osd_jax.trees import KeyPath, boxed_like, path_name, promotes, unboxed

Schedule = Callable[[Any], Any]  # step, from 0 -> number


def _next_moments(
    updates: optax.Updates, state: optax.ScaleByAdamState, b1: float, b2: float
) -> optax.ScaleByAdamState:
    """Adam's moments and count after a gradient."""
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
    return optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)


def _adam_correction(count: jax.Array, b1: float, b2: float) -> jax.Array:
    """`sqrt(1 - b2^t) / (1 - b1^t)` after t = `count` steps."""
    return jnp.sqrt(bias_correction(count, b2)) / bias_correction(count, b1)


def scale_by_adam_uncorrected_eps(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> optax.GradientTransformation:
    """Adam as in the release: epsilon is added to sqrt(v) before bias correction.

    `u = m / (sqrt(v) + eps) * sqrt(1 - b2^t) / (1 - b1^t)`; `optax.scale_by_adam` corrects v first.
    """

    @promotes
    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        state = _next_moments(updates, state, b1, b2)
        factor = _adam_correction(state.count, b1, b2)
        updates = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps) * factor.astype(m.dtype), state.mu, state.nu
        )
        return updates, state

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def scale_by_raw_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> optax.GradientTransformation:
    """`m / (sqrt(v) + eps)`; `correct_adam_bias` applies the remaining factor after a lift.

    Together they equal `scale_by_adam_uncorrected_eps`.
    """

    @promotes
    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        state = _next_moments(updates, state, b1, b2)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), state.mu, state.nu), state

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def correct_adam_bias(b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """Multiplies by `sqrt(1 - b2^t) / (1 - b1^t)` at step t, from 1."""
    return optax.scale_by_schedule(lambda count: _adam_correction(count + 1, b1, b2))


def scale_by_adam_of_age(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` with bias correction by each matrix's own number of steps.

    The basis of a matrix whose first gradient is late has taken fewer steps than the others.
    `update` takes `age`, a tree like the updates of int32 (batch...): the number of steps of each
    matrix, including this one. None: the state's count.
    """

    @promotes
    def update(
        updates: optax.Updates,
        state: optax.ScaleByAdamState,
        params: optax.Params | None = None,
        *,
        age: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params, extra_args
        state = _next_moments(updates, state, b1, b2)

        def direction(m: jax.Array, v: jax.Array, age: jax.Array) -> jax.Array:
            short = lambda b: (1 - b**age).astype(m.dtype)[..., None, None]
            return m / short(b1) / (jnp.sqrt(v / short(b2)) + eps)

        steps = jax.tree.map(lambda _: state.count, state.mu) if age is None else age
        return jax.tree.map(direction, state.mu, state.nu, steps), state

    init = optax.scale_by_adam(b1, b2, eps).init
    return optax.GradientTransformationExtraArgs(init, update)


def interpolate_momentum(b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """Lion's direction before its sign: `b1 m + (1 - b1) g`, then `m <- b2 m + (1 - b2) g`."""

    @promotes
    def update(
        updates: optax.Updates, state: optax.ScaleByLionState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByLionState]:
        del params
        direction = optax.tree.update_moment(updates, state.mu, b1, 1)
        mu = optax.tree.update_moment(updates, state.mu, b2, 1)
        return direction, optax.ScaleByLionState(optax.safe_increment(state.count), mu)

    return optax.GradientTransformation(optax.scale_by_lion(b1, b2).init, update)


class FactoredSecondMomentState(NamedTuple):
    """Means of g^2 over the last axis, `v_row` (..., a), and the one before, `v_col` (..., b)."""

    count: jax.Array  # type: ignore[assignment]  # a field, as in Optax's states
    v_row: optax.Updates
    v_col: optax.Updates

    def transported(self, changes: Any) -> Any:
        """Raises for `transport_moments`: the factors do not determine it in another basis."""
        refuse_factored(f"Adafactor's {type(self).__name__}")


def scale_by_factored_second_moment(
    decay_rate: float = 0.8, eps: float = 1e-30
) -> optax.GradientTransformation:
    """Adafactor's scaling, with the last two axes as the matrix for any sizes.

    `optax.scale_by_factored_rms` factors the two largest axes of an array, which may include the
    stack axis. A vector (1, b) is scaled by its own second moment, as if not factored. `update`
    takes `age` like `scale_by_adam_of_age`.

    References:
      arXiv 1804.04235, algorithm 4, with `beta2_t = 1 - t^-decay_rate`.
    """

    @takes_shapes
    def init(params: optax.Params) -> FactoredSecondMomentState:
        return FactoredSecondMomentState(
            count=jnp.zeros([], jnp.int32),
            # A reduction instead of a slice also works on a sharded axis.
            v_row=jax.tree.map(lambda x: jnp.zeros_like(x.sum(-1)), params),
            v_col=jax.tree.map(lambda x: jnp.zeros_like(x.sum(-2)), params),
        )

    @promotes
    def update(
        updates: optax.Updates,
        state: FactoredSecondMomentState,
        params: optax.Params | None = None,
        *,
        age: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FactoredSecondMomentState]:
        del params, extra_args
        count = optax.safe_increment(state.count)
        steps = jax.tree.map(lambda _: count, updates) if age is None else age

        def average(axis: int) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
            def one(g: jax.Array, v: jax.Array, age: jax.Array) -> jax.Array:
                b2 = 1 - age.astype(v.dtype)[..., None] ** -decay_rate
                return b2 * v + (1 - b2) * jnp.mean(jnp.square(g) + eps, axis=axis)

            return one

        v_row = jax.tree.map(average(-1), updates, state.v_row, steps)
        v_col = jax.tree.map(average(-2), updates, state.v_col, steps)

        def rescale(g: jax.Array, row: jax.Array, col: jax.Array) -> jax.Array:
            row = jax.lax.rsqrt(row / jnp.mean(row, axis=-1, keepdims=True))
            return g * row[..., :, None] * jax.lax.rsqrt(col)[..., None, :]

        updates = jax.tree.map(rescale, updates, v_row, v_col)
        return updates, FactoredSecondMomentState(count, v_row, v_col)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_matrix_rms(threshold: float = 1.0) -> optax.GradientTransformation:
    """Divides each matrix (the last two axes) by max(1, its RMS / threshold)."""

    def clip(u: jax.Array) -> jax.Array:
        rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=(-2, -1), keepdims=True))
        return u / jnp.maximum(1, rms / threshold)

    return optax.stateless(promotes(lambda updates, params: jax.tree.map(clip, updates)))


def scale_by_adafactor(
    learning_rate: Schedule, beta1: float | None = None
) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235) with a given step size, as in Hugging Face's class.

    The learning rate is applied inside, because the first moment averages the scaled updates. The
    result is a step, to be subtracted.

    Args:
      learning_rate: (step, from 0) -> step size.
      beta1: Decay of the first moment. None: no first moment.
    """
    first_moment = optax.ema(beta1, debias=False) if beta1 is not None else optax.identity()
    return optax.chain(
        scale_by_factored_second_moment(),
        clip_by_matrix_rms(),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        first_moment,
    )


def decay_after_update(
    weight_decay: jax.typing.ArrayLike, learning_rate: Schedule | jax.typing.ArrayLike
) -> optax.GradientTransformation:
    """Decoupled weight decay after the update: `W <- (W + u)(1 - lr wd)`, as in the release."""
    return _decay(weight_decay, learning_rate, lambda u, p, rate: u - rate * (p + u))


def decay_before_update(
    weight_decay: jax.typing.ArrayLike, learning_rate: Schedule | jax.typing.ArrayLike
) -> optax.GradientTransformation:
    """Decoupled weight decay before the update: `W <- W (1 - lr wd) + u`."""
    return _decay(weight_decay, learning_rate, lambda u, p, rate: u - rate * p)


def _decay(
    weight_decay: jax.typing.ArrayLike,
    learning_rate: Schedule | jax.typing.ArrayLike,
    decay: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> optax.GradientTransformation:
    if known_zero(weight_decay):
        return optax.identity()

    @promotes
    def update(
        updates: optax.Updates,
        state: optax.ScaleByScheduleState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        if params is None:
            raise ValueError("weight decay needs update(grads, state, params): params is None")
        now = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate: Any = weight_decay * now
        updates = jax.tree.map(lambda u, p: decay(u, p.astype(u.dtype), rate), updates, params)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update
    )


def on_matrices(
    tx: optax.GradientTransformation, dimension_numbers: DimensionNumbers = None
) -> optax.GradientTransformationExtraArgs:
    """Runs `tx` on every parameter as matrices (..., input, output), on vectors as (..., 1, n).

    A rule that reads the last two axes as its matrix then treats attention kernels and stacked
    layers, including stacked norms, like the 2-D and 1-D parameters that they represent.
    """
    tx = optax.with_extra_args_support(tx)

    def convert(tree: optax.Updates, like: optax.Updates, *, back: bool) -> optax.Updates:
        numbers = dimension_numbers_by_path(dimension_numbers, like)

        def one(path: KeyPath, like: jax.Array, x: jax.Array) -> jax.Array:
            found = numbers(path) if like.ndim > 1 else None
            if like.ndim < 2 or (found is not None and found.reduction_axis == ()):
                matrix_shape = (*like.shape[:-1], 1, like.shape[-1] if like.ndim else 1)
                return x.reshape(like.shape if back else matrix_shape)
            layout = matrix_layout(path_name(path), like, found)
            return layout.from_matrix(x) if back else layout.to_matrix(x)

        return jax.tree_util.tree_map_with_path(one, like, tree)

    @takes_shapes
    def init(params: optax.Params) -> optax.OptState:
        params = unboxed(params)
        return tx.init(convert(params, params, back=False))

    @promotes
    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        like, params = unboxed(updates), unboxed(params)
        matrices = None if params is None else convert(params, params, back=False)
        new, state = tx.update(convert(like, like, back=False), state, matrices, **extra_args)
        return boxed_like(updates, convert(new, like, back=True)), state

    return optax.GradientTransformationExtraArgs(init, update)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs `tx` in float32 (float64 for float64), for both its moments and its updates."""
    tx = optax.with_extra_args_support(tx)
    widen = lambda tree: jax.tree.map(lambda x: x.astype(accumulator_dtype(x.dtype)), tree)

    @promotes
    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return tx.update(widen(updates), state, widen(params), **extra_args)

    init = takes_shapes(lambda params: tx.init(widen(params)))
    return optax.GradientTransformationExtraArgs(init, update)
