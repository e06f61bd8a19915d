"""Skips and counts steps with a non-finite gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from osd_jax.layout import check_dtype
from osd_jax.numerics import accumulator_dtype
from osd_jax.rounding import round_updates
from osd_jax.sharding import takes_shapes
from osd_jax.sketch import as_leaves, bare
from osd_jax.trees import flatten, path_name, promotes, unboxed


def all_finite(tree: Any) -> jax.Array:
    """Whether every number in a tree is finite."""
    # 0 * x is 0, or NaN if x is not finite: a sum of floats is faster than one of booleans.
    sums = [jnp.sum(0 * x, dtype=accumulator_dtype(x.dtype)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.isfinite(jnp.array(sums)))


def skipped_steps(opt_state: optax.OptState) -> tuple[jax.Array, jax.Array]:
    """Number of steps that `make_optimizer`'s optimizer skipped for a non-finite gradient.

    Args:
      opt_state: State of an optimizer of `make_optimizer` or of the aliases.

    Returns:
      (total, in a row), int32 scalars.

    Raises:
      ValueError: The state does not count skipped steps.

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> params = {"norm": jnp.ones(4)}
      >>> tx = osd_jax.make_optimizer("adamw", learning_rate=0.01)
      >>> _, state = tx.update({"norm": jnp.full(4, jnp.nan)}, tx.init(params), params)
      >>> [int(steps) for steps in osd_jax.skipped_steps(state)]
      [1, 1]
    """
    is_guard = lambda x: isinstance(x, optax.ApplyIfFiniteState)
    for leaf in jax.tree.leaves(unboxed(opt_state), is_leaf=is_guard):
        if is_guard(leaf):
            return leaf.total_notfinite, leaf.notfinite_count
    raise ValueError(
        "this optimizer state counts no skipped steps: expected the state of make_optimizer or "
        "of an alias"
    )


def guarded(
    tx: optax.GradientTransformation,
    announce: Callable[[optax.Params, optax.OptState], None] = lambda params, state: None,
    *,
    rounding_seed: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Checks dtypes, rounds the updates once at the end, and skips non-finite gradients.

    Like `optax.apply_if_finite`, which only accepts whole gradients; this also accepts sketches, so
    a composition wrapped with `osd_jax.in_parts` can train on sketches. `skipped_steps` returns the
    counts.

    Args:
      tx: The optimizer.
      announce: Reports what is projected, given the parameters and the state.
      rounding_seed: Rounds bfloat16 weights stochastically, through float32 updates
        (`round_updates`). None: rounds updates to nearest, and weights to nearest when updates are
        added.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> from osd_jax.guard import guarded
      >>> subspace = osd_jax.scale_by_subspace(optax.scale_by_adam(), osd_jax.svd(200), rank=4)
      >>> chained = optax.chain(subspace, optax.scale_by_learning_rate(0.1))
      >>> tx = osd_jax.in_parts(guarded(chained), subspace)
      >>> params = {"kernel": jnp.ones((16, 24))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.full((16, 24), jnp.nan)}, state, params)
      >>> int(osd_jax.skipped_steps(state)[0])
      1
    """
    rounds = rounding_seed is not None
    tx = optax.with_extra_args_support(
        optax.chain(tx, round_updates(rounding_seed)) if rounds else tx
    )

    def dtype_of(grad: Any, param: Any) -> Any:
        """Dtype of a parameter's update."""
        is_rounded = rounds and param.dtype == jnp.bfloat16
        return accumulator_dtype(grad.dtype) if is_rounded else grad.dtype

    @takes_shapes
    def init(params: optax.Params) -> optax.ApplyIfFiniteState:
        leaves = flatten(unboxed(params))
        for path, x in leaves:
            check_dtype(path_name(path), x)
        state = tx.init(params)
        announce(params, state)
        zero = lambda: jnp.zeros([], jnp.int32)  # two arrays, because a state may be donated
        return optax.ApplyIfFiniteState(zero(), jnp.array(True), zero(), state)

    @promotes
    def update(
        grads: optax.Updates,
        state: optax.ApplyIfFiniteState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.ApplyIfFiniteState]:
        def step(grads: optax.Updates, inner: optax.OptState) -> Any:
            updates, inner = tx.update(as_leaves(like, grads), inner, params, **extra_args)
            return jax.tree.map(lambda u, dtype: u.astype(dtype), updates, dtypes), inner

        def skip(grads: optax.Updates, inner: optax.OptState) -> Any:
            return jax.tree.map(jnp.zeros_like, like, dtypes), inner

        # Like `optax.apply_if_finite`, with a faster test for finite gradients.
        like, grads = grads, bare(grads)
        leaves, structure = jax.tree.flatten(like)
        weights = jax.tree.leaves(params) if rounds and params is not None else leaves
        dtypes = jax.tree.unflatten(structure, map(dtype_of, leaves, weights))
        finite = all_finite(grads)
        updates, inner = jax.lax.cond(finite, step, skip, grads, state.inner_state)
        one_more = optax.safe_increment
        return updates, optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, one_more(state.notfinite_count)),
            last_finite=finite,
            total_notfinite=jnp.where(
                finite, state.total_notfinite, one_more(state.total_notfinite)
            ),
            inner_state=inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)
