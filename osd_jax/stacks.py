"""Stacks of matrices over a mesh: each device has whole matrices of a stack while P is at work.

FSDP splits the rows or the columns of a weight. R, A and the lift of a split matrix need sums or
copies over all devices, of as many numbers as R and P have. Whole matrices need none: an all-to-all
moves the gradient's shards of a stack (layers, p, q) to the devices that have these layers, and the
update's shards back, and a device sends only its own shard. If the number of devices divides that
of layers, the state is stored with the layers; if there are fewer layers than devices, some have
none. A stack of one, as in a layerwise step, has whole columns on each device instead: R then needs
no sum, and each device has all of P. So has a stack whose matrices are stored on the members of a
mesh axis, such as `data`: within a member, the devices share each of its matrices.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from osd_jax.sharding import FSDP, TENSOR

_FREE = PartitionSpec.UNCONSTRAINED
# The mesh axes over which stacks are stored, if whole matrices move; None: nothing moves.
_stored_over = contextvars.ContextVar[tuple[str, ...] | None]("stored_over", default=None)


@contextlib.contextmanager
def moving_whole_matrices(stored_over: Sequence[str] = ()) -> Iterator[None]:
    """Inside this context, what is traced moves whole matrices over the mesh axis `fsdp`.

    For meshes with axes as of `osd_jax.sharding.make_mesh`, as in `osd_jax.llama.partition.on`.

    Args:
      stored_over: The mesh axes over which the stack axis of weights and state is split if they
        divide it.
    """
    token = _stored_over.set(tuple(stored_over))
    try:
        yield
    finally:
        _stored_over.reset(token)


def _auto_axes() -> dict[str, int]:
    """The sizes of the mesh axes over which the compiler partitions, if matrices move.

    Empty if there is no axis over which they could, or if JAX's types carry the sharding over an
    axis (Explicit).
    """
    stored_over = _stored_over.get()
    mesh = jax.sharding.get_abstract_mesh()
    kinds = list(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if stored_over is None or any(
        kind == AxisType.Explicit and mesh.shape[name] > 1 for name, kind in kinds
    ):
        return {}
    sizes = {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}
    return sizes if any(sizes.get(name, 1) > 1 for name in (FSDP, *stored_over)) else {}


def _stack_axes(count: int) -> tuple[str, ...]:
    """The mesh axes over which a stack of `count` matrices is stored."""
    sizes = _auto_axes()
    names = tuple(name for name in _stored_over.get() or () if sizes.get(name, 1) > 1)
    return () if count % math.prod(sizes[name] for name in names) else names


def _constrained(array: jax.Array, spec: Mapping[int, Any]) -> jax.Array:
    """Splits some of the axes as in a `PartitionSpec`; the compiler chooses for the others."""
    if not isinstance(array, jax.core.Tracer) or not _auto_axes():
        return array
    entries = [spec.get(i, _FREE) for i in range(array.ndim)]
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*entries))


def whole_matrices(array: jax.Array, axis: int | None = 0, columns: int | None = -1) -> jax.Array:
    """Splits a stack of matrices over the mesh axis `fsdp`, and no matrix.

    Of a stack of one, and of one that is stored over a mesh axis, it splits the columns over
    `fsdp`. Outside `moving_whole_matrices`, without such axes, or if JAX's types carry the sharding
    (Explicit axes), it does nothing.

    Args:
      array: A stack, (layers, ..., a, b), or a parameter or a gradient that holds one.
      axis: The axis of the stack. None: the array is one matrix, and nothing happens.
      columns: The axis that is split where no whole matrix moves: that of q. None: such a stack
        stays as it is.
    """
    if axis is None or array.ndim < 3:
        return array
    stack_axes = _stack_axes(array.shape[axis])
    if array.shape[axis] > 1 and not stack_axes:
        return _constrained(array, {axis: FSDP})
    if columns is None:
        return array
    # Of a weight that `tensor` splits along p, too, it splits q here.
    names = tuple(name for name in (TENSOR, FSDP) if name in _auto_axes())
    stack = {axis: stack_axes} if stack_axes else {}
    return _constrained(array, stack | {columns % array.ndim: names})


def columns_of_stored(array: jax.Array) -> jax.Array:
    """R (layers, ..., r, q) split like the columns of M, of a stack stored over a mesh axis.

    The compiler would gather M where R's moments are split along the rank axis.
    """
    return whole_matrices(array) if array.ndim > 2 and _stack_axes(array.shape[0]) else array


def bases_of_whole(bases: Any) -> Any:
    """Each P (layers, ..., p, r) on the device of its M, or on all that share M's columns."""

    def one(basis: jax.Array) -> jax.Array:
        if basis.ndim > 2 and basis.shape[0] == 1:
            return on_every_device(basis)
        return whole_of_stored(whole_matrices(basis, columns=None))

    return jax.tree.map(one, bases)


def whole_of_stored(array: jax.Array) -> jax.Array:
    """A (layers, ..., p, r) on all devices that share M's columns, if M is stored over a mesh axis.

    The compiler would otherwise split the product over the layers as whatever reads it is split,
    and on a mesh of three axes it gave zeros for some of them (JAX 0.10.2).
    """
    stack_axes = _stack_axes(array.shape[0]) if array.ndim > 2 else ()
    if not stack_axes:
        return array
    return _constrained(array, dict.fromkeys(range(array.ndim)) | {0: stack_axes})


def split_matrices(array: jax.Array, axis: int | None = 0) -> jax.Array:
    """The inverse of `whole_matrices`: the compiler splits the matrices as it splits the weight.

    Args:
      array: See `whole_matrices`.
      axis: See `whole_matrices`.
    """
    if axis is None or array.ndim < 3 or array.shape[axis] == 1:
        return array
    return _constrained(array, {axis: _stack_axes(array.shape[axis]) or None})


def is_stored_by_matrices(count: int, devices: int) -> bool:
    """Whether the state of a stack of `count` matrices is split over `fsdp` by matrices.

    Each device then stores the state of the whole matrices that it has, and only their gradient and
    their update move. Otherwise the state is split like R and P, and moves too.

    Args:
      count: The number of matrices.
      devices: The size of the mesh axis `fsdp`.
    """
    return count > 1 and devices > 1 and count % devices == 0


def as_stored(array: jax.Array) -> jax.Array:
    """P or its gradient (layers, ..., p, r) as the state is stored."""
    if array.ndim < 3 or _stack_axes(array.shape[0]):
        return split_matrices(array)
    is_by_matrices = is_stored_by_matrices(array.shape[0], _auto_axes().get(FSDP, 1))
    return _constrained(array, {0: FSDP}) if is_by_matrices else split_matrices(array)


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
    batch, stack_axes = wanted.shape, _stack_axes(wanted.shape[0])
    members = math.prod(sizes[name] for name in stack_axes)
    each, over = wanted.size // members, sizes.get(FSDP, 1)
    own_axes = (*stack_axes, FSDP) if FSDP in sizes else stack_axes
    others = {name for name, size in sizes.items() if name not in own_axes and size > 1}

    def as_rows(x: jax.Array) -> jax.Array:
        """A row for each matrix, and as many for each device of a member."""
        x = _constrained(x, {0: stack_axes}) if stack_axes else x
        x = x.reshape(members, each, *x.shape[len(batch) :])
        x = jnp.pad(x, [(0, 0), (0, -each % over)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(-1, *x.shape[2:])

    def as_stack(x: jax.Array) -> jax.Array:
        x = x.reshape(members, -1, *x.shape[1:])[:, :each]
        return x.reshape(*batch, *x.shape[2:])

    def one(own: Any) -> Any:
        if not others:
            return function(*own)
        # Gathers one matrix over them. The compiler must not partition `function`, because a device
        # without a matrix runs its other branch and would not answer.
        whole = PartitionSpec()
        return jax.shard_map(
            function, axis_names=others, in_specs=whole, out_specs=whole, check_vma=False
        )(*jax.lax.with_sharding_constraint(own, whole))

    by_stack = PartitionSpec(own_axes)
    found = jax.shard_map(
        lambda *own: jax.lax.map(one, own),
        axis_names=sizes.keys() - others,
        in_specs=by_stack,
        out_specs=by_stack,
        check_vma=False,  # LAPACK-like routines run on each device for itself
    )(*jax.tree.map(as_rows, (wanted, *arrays)))
    return jax.tree.map(as_stack, found)
