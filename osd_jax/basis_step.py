"""The steps of P: bases set from gradients, and bases moved by their optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from osd_jax.bases import each_matrix
from osd_jax.basis_rule import BasisRule, check_fresh
from osd_jax.cond import cond_once
from osd_jax.layout import MatrixLayout
from osd_jax.numerics import float32_or_more, has_direction, like_sharding, squared_norm
from osd_jax.sketch import SQUARED_NORM, Basis, Reduce, Sketch, is_two_sided
from osd_jax.stacks import as_stored, whole_matrices
from osd_jax.state import NOT_SET
from osd_jax.trees import KeyPath, by_path, path_of, traced_once, unboxed, unzip


def _set_wanted(
    rule: BasisRule,
    layout: MatrixLayout,
    count: jax.Array,
    draw: jax.Array,
    key_data: jax.Array,
    wanted: jax.Array,
    grad: jax.Array,
    basis: Basis,
    set_at: jax.Array,
) -> tuple[Basis, jax.Array]:
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), count)
    key = jax.random.fold_in(key, draw)
    each = functools.partial(each_matrix, wanted)
    new = rule.fresh(layout.to_matrix(grad), basis, layout.side, key, each)

    def pick(new: jax.Array, old: jax.Array) -> jax.Array:
        check_fresh(layout.name, new, old)
        new = like_sharding(new, old)
        return jnp.where(wanted[..., None, None], new, old)

    return jax.tree.map(pick, new, basis), jnp.where(wanted, count, set_at)


def _set_waiting(
    rule: BasisRule,
    reduce: Reduce | None,
    layout: MatrixLayout,
    count: jax.Array,
    draw: jax.Array,
    key_data: jax.Array,
    grad: jax.Array,
    basis: Basis,
    set_at: jax.Array,
) -> tuple[Basis, jax.Array]:
    # Reduced before the check for a zero gradient, so that every device decides alike.
    grad = grad if reduce is None else reduce(grad)
    grad = whole_matrices(grad, layout.stack_axis, columns=None)
    has_one = has_direction(squared_norm(layout.to_matrix(grad)))
    wanted = (set_at == NOT_SET) & has_one
    return cond_once(
        jnp.any(wanted),
        functools.partial(_set_wanted, rule, layout),
        lambda count, draw, key_data, wanted, grad, basis, set_at: (basis, set_at),
        *(count, draw, key_data, wanted, grad, basis, set_at),
    )


def set_basis(
    rule: BasisRule,
    layouts: Callable[[Any], Any],
    reduce: Reduce | None,
    due: jax.Array,
    count: jax.Array,
    key_data: jax.Array,
    grads: optax.Updates,
    bases: Any,
    set_at: Any,
) -> tuple[Any, Any]:
    """Sets each P that is due or waits from its gradient if that is nonzero.

    Args:
      rule: The rule of P.
      layouts: (gradients) -> their `MatrixLayout`s.
      reduce: The mean over devices, if each has its own gradients.
      due: Whether a refresh is due at this step, bool ().
      count: Count of the step, int32 ().
      key_data: Of the random key from which draws are folded.
      grads: Gradients, a tree.
      bases: P by parameter, (..., p, r) each.
      set_at: See `ProjectorState`.

    Returns:
      (bases, set_at).
    """

    @functools.partial(traced_once, static_argnums=0)
    def one(
        layout: MatrixLayout, draw: jax.Array, grad: jax.Array, basis: Basis, set_at: jax.Array
    ) -> tuple[Basis, jax.Array]:
        set_at = jnp.where(due, NOT_SET, set_at)
        return cond_once(
            jnp.any(set_at == NOT_SET),
            functools.partial(_set_waiting, rule, reduce, layout),
            lambda count, draw, key_data, grad, basis, set_at: (basis, set_at),
            *(count, draw, key_data, grad, basis, set_at),
        )

    tree = layouts(grads)
    draws = jax.tree.map(lambda layout: np.uint32(layout.draw), tree)
    return unzip(tree, jax.tree.map(one, tree, draws, unboxed(grads), bases, set_at))


def restarted(
    rule: BasisRule, bases: Any, optimizer: optax.OptState, is_new: Any
) -> optax.OptState:
    """The state of P's optimizer, reset for each matrix whose P is new."""
    assert rule.optimizer is not None
    masks = by_path(is_new)

    def one(path: KeyPath, kept: jax.Array, first: jax.Array) -> jax.Array:
        keys = path_of(path)
        parts = (keys[i:j] for i in range(len(keys) + 1) for j in range(len(keys), i - 1, -1))
        mask = next((masks[part] for part in parts if part in masks), None)
        if mask is None or kept.ndim <= mask.ndim or kept.shape[: mask.ndim] != mask.shape:
            return kept  # shared by all matrices, such as a count
        mask = mask.reshape(mask.shape + (1,) * (kept.ndim - mask.ndim))
        return jnp.where(mask, first, kept)

    first = rule.optimizer.init(jax.tree.map(float32_or_more, bases))
    return jax.tree_util.tree_map_with_path(one, optimizer, first)


def move_basis(
    rule: BasisRule,
    bases: Any,
    here: Any,
    sketches: Any,
    optimizer: optax.OptState,
    moves: Any,
    age: Any,
) -> Any:
    """One step of P's optimizer -> (bases, its state), for the P where `moves` (...) is True.

    `here` are the bases as the sketches lie (`bases_of_whole`). `age` is the number of this step by
    each matrix's own count; P's optimizer receives it as an extra argument of `update`.
    """
    assert rule.gradient is not None and rule.optimizer is not None
    gradient_of = rule.gradient

    @traced_once
    def gradient(basis: Any, sketch: Sketch, moves: jax.Array) -> Any:
        pick = lambda x: jnp.where(moves[..., None, None], x, 0)
        # P's optimizer meets the gradient where P is stored.
        return jax.tree.map(lambda x: as_stored(pick(x)), gradient_of(basis, sketch))

    @traced_once
    def stepped(old: Any, basis: Any, step: Any, sketch: Sketch, moves: jax.Array) -> Any:
        norm = sketch.statistics.get(SQUARED_NORM.name)
        moves &= has_direction(squared_norm(sketch.low_rank) if norm is None else norm)

        def pick(old: jax.Array, basis: jax.Array, step: jax.Array) -> jax.Array:
            new = basis + step
            if rule.retract is not None:
                new = like_sharding(each_matrix(moves, rule.retract, new), new)
            return jnp.where(moves[..., None, None], new.astype(old.dtype), old)

        return jax.tree.map(pick, old, basis, step)

    each = functools.partial(jax.tree.map, is_leaf=is_two_sided)
    wide, wide_here = jax.tree.map(float32_or_more, (bases, here))
    steps, new = optax.with_extra_args_support(rule.optimizer).update(
        each(gradient, wide_here, sketches, moves), optimizer, wide, age=age
    )
    return each(stepped, bases, wide, steps, sketches, moves), new
