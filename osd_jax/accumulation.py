"""Gradient accumulation in sketches: (p + q) r numbers per matrix instead of its p q.

The parts of an update are its micro-batches. The accumulator is the mean of their sketches,
weighted by their shares of the update. Its R is exact, because P does not change within an update.
The mean of the parts' own A and squared norm replaces the exact value: it has the same expected
second moment, not the same value. Gradients that are not projected are accumulated whole, exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax.numerics import accumulator_dtype, check_static
from osd_jax.parts import parted
from osd_jax.sharding import takes_shapes
from osd_jax.sketch import is_sketch
from osd_jax.subspace import SubspaceTransformation
from osd_jax.trees import promotes

Held = Any  # a tree like the gradients, with a Sketch for each projected gradient


def check_sketch_suffices(tx: SubspaceTransformation) -> None:
    """Raises ValueError, with the reason, if a step reads more of a gradient than its sketch."""
    needs = tx.needs_gradient
    if needs is not None:
        raise ValueError(
            f"{needs.reason}, but only its sketch is kept here (accumulated or reduced sketches, "
            f"or layer-by-layer updates with micro-batches or clipping): use {needs.remedy}, or "
            "keep whole gradients"
        )


@promotes
def nothing_held(tx: SubspaceTransformation, grads: optax.Updates, state: optax.OptState) -> Held:
    """An accumulator of zeros.

    Args:
      tx: The optimizer.
      grads: Gradients, parameters, or their shapes.
      state: State of the optimizer, or its shapes.
    """

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(x.shape, accumulator_dtype(x.dtype))

    return jax.tree.map(zeros, jax.eval_shape(tx.project, grads, state))


@promotes
def hold(held: Held, sketches: Held, share: jax.typing.ArrayLike) -> Held:
    """Adds one part to the accumulator.

    Args:
      held: The accumulator.
      sketches: From `tx.project`, for the part's own mean gradient.
      share: The part's share of the update, such as its share of the tokens; the shares sum to 1.
    """
    return jax.tree.map(lambda total, x: total + share * x, held, sketches)


@promotes
def squared_norm_held(held: Held) -> jax.Array:
    """Sum of squares of what is applied: R for projected gradients, the gradient otherwise.

    The norm of the whole gradient cannot be computed from its parts.
    """
    leaves = jax.tree.leaves(held, is_leaf=is_sketch)
    applied = [x.low_rank if is_sketch(x) else x for x in leaves]
    return sum((jnp.sum(jnp.square(x)) for x in applied), jnp.float32(0))


@promotes
def scaled(held: Held, factor: jax.typing.ArrayLike) -> Held:
    """Multiplies the sketches of the gradients by a factor."""
    one = lambda x: x.scaled(factor) if is_sketch(x) else x * factor
    return jax.tree.map(one, held, is_leaf=is_sketch)


class AccumulationState(NamedTuple):
    """State of `accumulate_sketches`.

    Attributes:
      mini_step: int32 scalar, the number of accumulated parts.
      held: The mean of their sketches so far.
      inner: State of the optimizer.
    """

    mini_step: jax.Array
    held: Held
    inner: optax.OptState


def accumulate_sketches(
    tx: optax.GradientTransformation, every_k: int
) -> optax.GradientTransformationExtraArgs:
    """Applies one update of `tx` every `every_k` calls, for the mean gradient; zeros between.

    Like `optax.MultiSteps`, but it accumulates sketches instead of gradients. When P is due, the
    first of the `every_k` gradients sets it.

    Args:
      tx: From `make_optimizer` or `scale_by_subspace`, or a composition around one, as returned by
        `in_parts`.
      every_k: Number of calls per update.

    Returns:
      An Optax transformation with state `AccumulationState`.

    Raises:
      ValueError: `every_k` is below 1, or the optimizer needs the gradient itself. `init` raises if
        the optimizer hides its subspace.

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> params = {"mlp": jnp.ones((16, 24))}
      >>> tx = osd_jax.accumulate_sketches(osd_jax.make_optimizer(
      ...     "galore_adamw", "continuous", learning_rate=0.01, rank=4), every_k=2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)  # held: nothing moves
      >>> bool(jnp.any(updates["mlp"]))
      False
      >>> updates, state = tx.update(params, state, params)
      >>> bool(jnp.all(updates["mlp"] < 0))
      True
    """
    check_static("every_k", every_k)
    if type(every_k) is not int or every_k < 1:
        raise ValueError(f"every_k is {every_k!r}: expected a whole number of at least 1")
    parts = parted(tx)
    check_sketch_suffices(parts)

    @takes_shapes
    def init(params: optax.Params) -> AccumulationState:
        inner = parts.init(params)
        return AccumulationState(
            jnp.zeros([], jnp.int32), nothing_held(parts, params, inner), inner
        )

    @promotes
    def update(
        grads: optax.Updates,
        state: AccumulationState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulationState]:
        inner = parts.refresh(grads, state.inner, when=state.mini_step == 0)
        held = hold(state.held, parts.project(grads, inner), 1 / every_k)

        def step(held: Held, inner: optax.OptState) -> Any:
            updates, inner = parts.apply(
                held, inner, grads if params is None else params, **extra_args
            )
            return updates, optax.tree.zeros_like(held), inner

        def wait(held: Held, inner: optax.OptState) -> Any:
            # With the dtypes of the updates, which differ from the gradients' with stochastic
            # rounding.
            like = jax.eval_shape(step, held, inner)[0]
            return jax.tree.map(lambda g, u: jnp.zeros_like(g, u.dtype), grads, like), held, inner

        is_last = state.mini_step == every_k - 1
        updates, held, inner = jax.lax.cond(is_last, step, wait, held, inner)
        mini_step = jnp.where(is_last, 0, state.mini_step + 1)
        return updates, AccumulationState(mini_step, held, inner)

    return optax.GradientTransformationExtraArgs(init, update)
