"""Reads checkpoints of earlier versions: the state as they saved it, and its conversion.

Before `ProjectorState.set_at` existed: every P counts as set at step 0, provided a step was taken.
Before declared vectors had Adam's state in `scale_by_adam_of_rows`: stacked norms (layers, n) had
one second moment per entry of the longer axis, which is repeated along the other axis, and possibly
an 8-bit first moment, which is dequantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from osd_jax.adam_of_rows import ScaleByAdamOfRowsState, axis_of_rows, scale_by_adam_of_rows
from osd_jax.quantization import Quantized, dequantize
from osd_jax.state import NOT_SET, ProjectorState, SubspaceState
from osd_jax.trees import path_name


def as_saved(saved: Any, wanted: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns the state as the version that saved it had it, and its conversion.

    Args:
      saved: The saved tree, of objects with a `shape`.
      wanted: The state of this version, of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      (a tree like the saved one, of shapes with shardings; a function from its arrays to the state
      of this version). For a checkpoint of this version they are `wanted` and the identity.
    """
    there, conversions = wanted, []
    for form in (_without_set_at, _with_shared_rows):
        older, convert = form(saved, there)
        conversions.append((convert, there))
        there = older

    def converted(state: Any) -> Any:
        for convert, like in reversed(conversions):
            state = convert(state, like)
        return state

    return there, converted


Form = tuple[Any, Callable[[Any, Any], Any]]


def _shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): tuple(x.shape) for path, x in leaves}


def _unchanged(state: Any, like: Any) -> Any:
    return state


# --------------------------------------------------------------- before `ProjectorState.set_at`


class _OldProjectorState(NamedTuple):
    basis: Any
    optimizer: optax.OptState


def _is_subspace(x: Any) -> bool:
    return isinstance(x, SubspaceState)


def _without_set_at(saved: Any, wanted: Any) -> Form:
    """The state without `set_at`, if the saved one has none."""
    names = _shapes_by_name(saved)
    ours = jax.tree_util.tree_flatten_with_path(wanted, is_leaf=_is_subspace)[0]
    set_at = {
        path_name((*path, *inner))
        for path, own in ours
        if _is_subspace(own)
        for inner, _ in jax.tree_util.tree_flatten_with_path(own)[0]
        if [getattr(key, "name", None) for key in inner[:2]] == ["projector", "set_at"]
    }
    if not set_at or not set_at.isdisjoint(names):
        return wanted, _unchanged

    def one(x: Any) -> Any:
        if not _is_subspace(x):
            return x
        return x._replace(projector=_OldProjectorState(x.projector.basis, x.projector.optimizer))

    return jax.tree.map(one, wanted, is_leaf=_is_subspace), _with_set_at


def _with_set_at(old: Any, like: Any) -> Any:
    """Every P was set at step 0 if a step was taken, and otherwise waits."""

    def one(x: Any, like: Any) -> Any:
        if not _is_subspace(x):
            return x
        value = 0 if np.asarray(x.count) > 0 else NOT_SET

        def filled(like: jax.ShapeDtypeStruct) -> jax.Array:
            whole = np.full(like.shape, value, like.dtype)
            return jax.make_array_from_callback(like.shape, like.sharding, whole.__getitem__)

        set_at = jax.tree.map(filled, like.projector.set_at)
        projector = ProjectorState(x.projector.basis, x.projector.optimizer, set_at)
        return x._replace(projector=projector)

    return jax.tree.map(one, old, like, is_leaf=_is_subspace)


# ------------------------------------- before declared vectors in `scale_by_adam_of_rows`


def _is_rows(x: Any) -> bool:
    return isinstance(x, ScaleByAdamOfRowsState)


def _with_shared_rows(saved: Any, wanted: Any) -> Form:
    """The state with stacked vectors as matrices, where the saved one has them so."""
    shapes = _shapes_by_name(saved)
    changed = False

    def one(path: Any, x: Any) -> Any:
        if not _is_rows(x):
            return x

        def older(inner: Any, nu: jax.ShapeDtypeStruct, mu: Any) -> ScaleByAdamOfRowsState:
            nonlocal changed
            at = lambda field: path_name((*path, jax.tree_util.GetAttrKey(field), *inner))
            if nu.ndim != 2 or len(shapes.get(at("nu"), nu.shape)) == 2:
                return ScaleByAdamOfRowsState(x.count, mu, nu)
            changed = True
            first_8bit = at("mu") not in shapes
            tx = scale_by_adam_of_rows(first_8bit=first_8bit)
            like = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(mu.shape, mu.dtype))
            like = jax.tree.map(lambda x: _replicated(x, mu.sharding), like)
            return like if first_8bit else like._replace(mu=mu)

        both = jax.tree_util.tree_map_with_path(older, x.nu, x.mu)
        field = lambda name: jax.tree.map(lambda x: getattr(x, name), both, is_leaf=_is_rows)
        return x._replace(mu=field("mu"), nu=field("nu"))

    there = jax.tree_util.tree_map_with_path(one, wanted, is_leaf=_is_rows)
    return (there, _with_rows_of_each) if changed else (wanted, _unchanged)


def _replicated(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _with_rows_of_each(old: Any, like: Any) -> Any:
    """Each vector of a stack has the first moment of its own and the shared second moment."""

    def first(like: Any, mu: Any) -> Any:
        if isinstance(like, Quantized) or not isinstance(mu, Quantized):
            return mu
        turn = lambda m: m.mT if axis_of_rows(like) == 1 else m
        read = lambda m: turn(dequantize(m, signed=True)).astype(like.dtype)
        return jax.jit(read, out_shardings=like.sharding)(mu)

    def second(like: Any, nu: jax.Array) -> jax.Array:
        if nu.ndim == like.ndim:
            return nu
        axis = axis_of_rows(like)
        assert axis is not None
        spread = lambda v: jnp.broadcast_to(jnp.expand_dims(v, 1 - axis), like.shape)
        return jax.jit(spread, out_shardings=like.sharding)(nu)

    def one(x: Any, like: Any) -> Any:
        if not _is_rows(x):
            return x
        is_quantized = lambda x: isinstance(x, Quantized)
        mu = jax.tree.map(first, like.mu, x.mu, is_leaf=is_quantized)
        return x._replace(mu=mu, nu=jax.tree.map(second, like.nu, x.nu))

    return jax.tree.map(one, old, like, is_leaf=_is_rows)
