"""Stacks of matrices over a mesh: each device has whole matrices of a stack while P is at work.

A weight is split along its rows or columns. R, A and the lift of a split matrix need sums or copies
over all devices, of as many numbers as R and P have. Whole matrices need none: an all-to-all moves
the gradient's shards of a stack (layers, p, q) to the devices that have these layers, and the
update's shards back, and a device sends only its own shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from osd_jax.sharding import WEIGHT_AXES


def _mesh_axes() -> tuple[set[str], tuple[str, ...]]:
    """The axes that the compiler partitions (Auto), and those of them over which weights are."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = {name for name, kind in kinds if kind == AxisType.Auto}
    return auto, tuple(name for name in WEIGHT_AXES if name in auto and mesh.shape[name] > 1)


def whole_matrices(array: jax.Array, axis: int | None = 0) -> jax.Array:
    """Splits a stack of matrices along the stack alone, over the mesh axes of the weights.

    The mesh is that of `jax.set_mesh`, or of `osd_jax.llama.partition.on`. Without its axes `fsdp`
    and `tensor`, or if JAX's types carry the sharding (Explicit axes), it does nothing.

    Args:
      array: A stack, (layers, ..., a, b), or a parameter or a gradient that holds one.
      axis: The axis of the stack. None, or if there are no other than the matrices' own: nothing.
    """
    axes = _mesh_axes()[1]
    if axis is None or array.ndim < 3 or not axes:
        return array
    spec = [axes if i == axis else None for i in range(array.ndim)]
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*spec))


def split_matrices(array: jax.Array, axis: int | None = 0) -> jax.Array:
    """The inverse of `whole_matrices`: the compiler splits the matrices' own axes, as the weight's.

    Args:
      array: See `whole_matrices`.
      axis: See `whole_matrices`.
    """
    if axis is None or array.ndim < 3 or not _mesh_axes()[1]:
        return array
    free = PartitionSpec.UNCONSTRAINED
    spec = [None if i == axis else free for i in range(array.ndim)]
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*spec))


def map_on_own_device(function: Callable[..., Any], wanted: jax.Array, *arrays: Any) -> Any | None:
    """`function(wanted, *arrays)` of one stack, each device with its part of the matrices.

    Args:
      function: (bool (n,), trees of arrays (n, ...)) -> a tree of arrays (n, ...), for any n, each
        matrix by itself. It does not communicate.
      wanted: bool (batch...).
      *arrays: Trees of arrays (batch..., ...).

    Returns:
      The results with leading batch axes; None without a mesh as in `whole_matrices`.
    """
    auto, axes = _mesh_axes()
    if not axes or not wanted.ndim:
        return None
    batch, count = wanted.shape, wanted.size
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axes)

    def as_row(x: jax.Array) -> jax.Array:
        x = x.reshape(count, *x.shape[len(batch) :])
        return jnp.pad(x, [(0, -count % devices)] + [(0, 0)] * (x.ndim - 1))

    spec = PartitionSpec(axes)
    found = jax.shard_map(
        function, axis_names=auto, in_specs=spec, out_specs=spec, check_vma=False
    )(*jax.tree.map(as_row, (wanted, *arrays)))
    return jax.tree.map(lambda x: x[:count].reshape(*batch, *x.shape[1:]), found)
