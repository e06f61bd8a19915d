"""Stacks of matrices over a mesh: each device has whole matrices of a stack while P is at work.

FSDP splits the rows or the columns of a weight. R, A and the lift of a split matrix need sums or
copies over all devices, of as many numbers as R and P have. Whole matrices need none: an all-to-all
moves the gradient's shards of a stack (layers, p, q) to the devices that have these layers, and the
update's shards back, and a device sends only its own shard. If there are fewer layers than devices,
some have none.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from osd_jax.sharding import FSDP

_FREE = PartitionSpec.UNCONSTRAINED
_moves = contextvars.ContextVar("moves", default=False)


@contextlib.contextmanager
def moving_whole_matrices() -> Iterator[None]:
    """Inside this context, what is traced moves whole matrices over the mesh axis `fsdp`.

    For meshes with axes as of `osd_jax.sharding.make_mesh`, and weights whose stack axis is whole,
    as in `osd_jax.llama.partition.on`.
    """
    token = _moves.set(True)
    try:
        yield
    finally:
        _moves.reset(token)


def _auto_axes() -> dict[str, int]:
    """The sizes of the mesh axes over which the compiler partitions, if matrices move over `fsdp`.

    Empty if JAX's types carry the sharding over an axis (Explicit).
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = list(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if not _moves.get() or any(
        kind == AxisType.Explicit and mesh.shape[name] > 1 for name, kind in kinds
    ):
        return {}
    sizes = {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}
    return sizes if sizes.get(FSDP, 1) > 1 else {}


def _constrained(array: jax.Array, axis: int | None, of_stack: str | None) -> jax.Array:
    is_one = axis is None or array.ndim < 3 or array.shape[axis] == 1
    if is_one or not isinstance(array, jax.core.Tracer) or not _auto_axes():
        return array
    spec = [of_stack if i == axis else _FREE for i in range(array.ndim)]
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*spec))


def whole_matrices(array: jax.Array, axis: int | None = 0) -> jax.Array:
    """Splits a stack of matrices over the mesh axis `fsdp`, and no matrix.

    Outside `moving_whole_matrices`, without an axis `fsdp`, or if JAX's types carry the sharding
    (Explicit axes), it does nothing.

    Args:
      array: A stack, (layers, ..., a, b), or a parameter or a gradient that holds one.
      axis: The axis of the stack. None: the array is one matrix, and nothing happens; nor with a
        stack of one, whose matrix all devices share.
    """
    return _constrained(array, axis, FSDP)


def split_matrices(array: jax.Array, axis: int | None = 0) -> jax.Array:
    """The inverse of `whole_matrices`: the compiler splits the matrices as it splits the weight.

    Args:
      array: See `whole_matrices`.
      axis: See `whole_matrices`.
    """
    return _constrained(array, axis, None)


def on_every_device(array: jax.Array) -> jax.Array:
    """Copies a small array, such as one number per matrix, to every device of the mesh."""
    if not isinstance(array, jax.core.Tracer) or not _auto_axes():
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec())


def map_own_matrices(function: Callable[..., Any], wanted: jax.Array, *arrays: Any) -> Any | None:
    """`function(wanted, *arrays)` of each matrix of a stack, one at a time, on its own device.

    Args:
      function: (bool (), the arrays of one matrix) -> arrays.
      wanted: bool (batch...).
      *arrays: Trees of arrays (batch..., ...).

    Returns:
      The results with leading batch axes; None for one matrix, and where `whole_matrices` does
      nothing.
    """
    sizes = _auto_axes()
    if not sizes or wanted.size == 1:
        return None
    batch, count = wanted.shape, wanted.size
    others = {name for name, size in sizes.items() if name != FSDP and size > 1}

    def as_row(x: jax.Array) -> jax.Array:
        x = x.reshape(count, *x.shape[len(batch) :])
        return jnp.pad(x, [(0, -count % sizes[FSDP])] + [(0, 0)] * (x.ndim - 1))

    def one(own: Any) -> Any:
        if others:  # gathers one matrix over them
            own = jax.lax.with_sharding_constraint(own, PartitionSpec())
        return function(*own)

    by_stack = PartitionSpec(FSDP)
    found = jax.shard_map(
        lambda *own: jax.lax.map(one, own),
        axis_names=sizes.keys() - others,
        in_specs=by_stack,
        out_specs=by_stack,
        check_vma=False,  # LAPACK-like routines run on each device for itself
    )(*jax.tree.map(as_row, (wanted, *arrays)))
    return jax.tree.map(lambda x: x[:count].reshape(*batch, *x.shape[1:]), found)
