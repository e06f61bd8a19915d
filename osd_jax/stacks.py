"""Stacks of matrices over a mesh: each device has whole matrices of a stack while P is at work.

FSDP splits the rows or the columns of a weight. R, A and the lift of a split matrix need sums or
copies over all devices, of as many numbers as R and P have. Whole matrices need none: an all-to-all
moves the gradient's shards of a stack (layers, p, q) to the devices that have these layers, and the
update's shards back, and a device sends only its own shard. If there are fewer layers than devices,
some have none. A stack of one, as in a layerwise step, has whole columns on each device instead: R
then needs no sum, and each device has all of P.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from osd_jax.sharding import FSDP, TENSOR

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


def _constrained(array: jax.Array, spec: Mapping[int, Any]) -> jax.Array:
    """Splits some of the axes as in a `PartitionSpec`; the compiler chooses for the others."""
    if not isinstance(array, jax.core.Tracer) or not _auto_axes():
        return array
    entries = [spec.get(i, _FREE) for i in range(array.ndim)]
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*entries))


def whole_matrices(array: jax.Array, axis: int | None = 0, columns: int | None = -1) -> jax.Array:
    """Splits a stack of matrices over the mesh axis `fsdp`, and no matrix; of one, the columns.

    Outside `moving_whole_matrices`, without an axis `fsdp`, or if JAX's types carry the sharding
    (Explicit axes), it does nothing.

    Args:
      array: A stack, (layers, ..., a, b), or a parameter or a gradient that holds one.
      axis: The axis of the stack. None: the array is one matrix, and nothing happens.
      columns: The axis that is split in a stack of one: that of q. None: a stack of one stays as it
        is.
    """
    if axis is None or array.ndim < 3:
        return array
    if array.shape[axis] > 1:
        return _constrained(array, {axis: FSDP})
    if columns is None:
        return array
    # Of a weight that `tensor` splits along p, too, it splits q here.
    names = tuple(name for name in (TENSOR, FSDP) if name in _auto_axes())
    return _constrained(array, {columns % array.ndim: names})


def bases_of_whole(bases: Any) -> Any:
    """Each P (layers, ..., p, r) on the device of its M, and of a stack of one on every device."""

    def one(basis: jax.Array) -> jax.Array:
        is_one = basis.ndim > 2 and basis.shape[0] == 1
        return on_every_device(basis) if is_one else whole_matrices(basis)

    return jax.tree.map(one, bases)


def split_matrices(array: jax.Array, axis: int | None = 0) -> jax.Array:
    """The inverse of `whole_matrices`: the compiler splits the matrices as it splits the weight.

    Args:
      array: See `whole_matrices`.
      axis: See `whole_matrices`.
    """
    if axis is None or array.ndim < 3 or array.shape[axis] == 1:
        return array
    return _constrained(array, {axis: None})


def on_every_device(array: jax.Array) -> jax.Array:
    """Copies a small array, such as one number per matrix, to every device of the mesh."""
    return _constrained(array, dict.fromkeys(range(array.ndim)))


def decomposed(function: Callable[[jax.Array], Any], matrix: jax.Array) -> Any:
    """`function(matrix)`, such as a QR, of a whole matrix on every device.

    The compiler may not partition `function`. The matrix is all-gathered from shards of its rows,
    so that a product that results in it is computed in these shards. Where `whole_matrices` does
    nothing, this is only a call.

    Args:
      function: (p, q) -> arrays.
      matrix: (p, q).
    """
    sizes, whole = _auto_axes(), PartitionSpec()
    if not sizes:
        return function(matrix)
    return jax.shard_map(
        function, axis_names=set(sizes), in_specs=whole, out_specs=whole, check_vma=False
    )(_constrained(matrix, {0: FSDP}))


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
