"""Sharding over a mesh of devices: the mesh, and the optimizer state.

A mesh has three axes. The batch is sharded over `data` and `fsdp`. Each weight is sharded over
`fsdp` and `tensor`: one of its matrix axes over `fsdp`, all-gathered where it is used, the other
over `tensor`, as in Megatron. Optimizer state follows its weight: P is sharded like the axis that
it projects, R's moments like the other axis, and both along the rank axis over the mesh axes that
are left. On TPUs, an axis of P or R whose shards would be padded stays whole, and the other one is
split. The plain train step of `osd_jax.llama` stores the state of whole layers on one device each
where it can (`osd_jax.llama.train.train_state_sharding`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from osd_jax.state import Quantized
from osd_jax.trees import KeyPath, boxed_like, path_name, promotes, unboxed

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
FSDP, TENSOR = "fsdp", "tensor"
# Arrays of fewer values than this, and than this part of the largest one, stay whole: each split
# costs a collective.
SMALL, SMALL_PART = 2**18, 0.01
# A shard counts as padded if a TPU stores more than this many times the bytes of its values.
MOST_PADDING = 1.1


def parse_mesh(text: str) -> dict[str, int]:
    """Parses `data=2,fsdp=2,tensor=2`; an omitted axis is 1, -1 takes the remaining devices.

    Raises:
      ValueError: An axis is unknown or given twice, or a size is neither a whole number of at least
        1 nor the only -1.

    Example:
      >>> parse_mesh("fsdp=4,data=-1")
      {'data': -1, 'fsdp': 4, 'tensor': 1}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in MESH_AXES or name in sizes:
            raise ValueError(
                f"mesh {text!r} has {part!r}: expected each of {', '.join(MESH_AXES)} at most "
                "once, as in data=2,fsdp=4"
            )
        try:
            sizes[name] = int(size)
        except ValueError:
            raise ValueError(f"mesh {text!r} has {part!r}: expected a whole number") from None
    _check_sizes(sizes)
    return {name: sizes.get(name, 1) for name in MESH_AXES}


def _check_sizes(sizes: dict[str, int]) -> None:
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {_text(sizes)}: expected sizes of at least 1, or -1 for the rest")
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(
            f"mesh {_text(sizes)}: only one axis can be -1, which takes the remaining devices"
        )


def _text(sizes: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of all devices, or of the given ones, whose axes the compiler partitions (Auto).

    Args:
      data: Number of replicas, each with a share of the batch. -1: the remaining devices.
      fsdp: Number of devices over which a weight's rows or columns, and the batch, are sharded. -1:
        the remaining devices.
      tensor: Number of devices over which a weight's other axis is sharded. -1: the remaining
        devices.
      devices: None: all.

    Raises:
      ValueError: The product of the sizes is not the number of devices.

    Example:
      >>> dict(make_mesh(fsdp=-1).shape)["fsdp"] == jax.device_count()
      True
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    _check_sizes(sizes)
    given = math.prod(size for size in sizes.values() if size != -1)
    filled = {name: len(found) // given if n == -1 else n for name, n in sizes.items()}
    if math.prod(filled.values()) != len(found):
        raise ValueError(
            f"mesh {_text(sizes)} needs {given} "
            f"devices{' or a multiple' * (-1 in sizes.values())}, but there are {len(found)}: "
            f"choose sizes whose product is {len(found)}"
        )
    shape, kinds = tuple(filled.values()), (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=found)
    except NotImplementedError:  # 16 of a TPU's 4x8x8 chips are parts of its axes
        grid = mesh_utils.create_device_mesh(shape, found, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=kinds)


def mesh_axes(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a `PartitionSpec` names."""
    return (axes,) if isinstance(axes, str) else axes or ()


def shard_count(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """The number of shards of one entry of a `PartitionSpec`."""
    return math.prod(mesh.shape[name] for name in mesh_axes(axes))


def state_sharding(
    tx: optax.GradientTransformation,
    params: optax.Params,
    specs: Any,
    mesh: Mesh,
    share_over: Sequence[str] | None = None,
) -> Any:
    """The sharding of any Optax optimizer's state, given the sharding of its parameters.

    It traces `tx.init`, without computing anything, on parameters whose types carry their sharding
    (JAX's Explicit axes), and returns the types of the results: each axis of the state is sharded
    like the parameter's axis from which it derives, whatever the structure of the state. An array
    that is then whole over a mesh axis is split over it too, along another axis of its own that
    divides, such as the rank axis of R's moments. On TPUs, a mesh axis that splits a stack of P or
    of R's moments into shards of, say, 12 rows, which tiles of 8 x 128 values pad to 16, splits the
    other axis of its matrices instead, if that is whole and its shards are not padded; 8-bit state
    stays as it is.

    Args:
      tx: From `make_optimizer`, `scale_by_subspace`, Optax, or a composition of these.
      params: The parameters, or their shapes and dtypes.
      specs: A tree of `PartitionSpec` like `params`, with or without its boxes.
      mesh: A mesh with any axes.
      share_over: Mesh axes over which no array of the state stays whole, if one of its axes
        divides and it is not small: below 2^18 values and a hundredth of the largest. None: those
        over which a parameter is split, so not an axis of data parallelism; nothing under a mesh
        with Explicit axes, where operations determine the types. (): none, as in earlier versions.
        Where such an array is read, it is all-gathered; only the train steps of `osd_jax.llama`
        move whole matrices instead (`osd_jax.stacks`).

    Returns:
      A tree of `NamedSharding` like `tx.init(params)`, for `jax.jit(tx.init, out_shardings=...)`
      and for the state in the train step's `in_shardings` and `out_shardings`.

    Raises:
      ValueError: An axis of a parameter is not divisible by the mesh axes over which it is sharded.

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = make_mesh(fsdp=jax.device_count())
      >>> tx = osd_jax.make_optimizer("galore_adamw", "continuous", learning_rate=0.01, rank=4)
      >>> params, specs = {"mlp": jnp.ones((16, 24))}, {"mlp": P("fsdp", None)}
      >>> shardings = state_sharding(tx, params, specs, mesh)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> osd_jax.projectors(state)["mlp"].sharding.spec
      P('fsdp', None)
    """
    typed = mesh.abstract_mesh.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

    def split(path: KeyPath, array: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        padded = PartitionSpec(*spec, *[None] * (len(array.shape) - len(spec)))
        for size, axes in zip(array.shape, padded, strict=True):
            shards = shard_count(mesh, axes)
            if size % shards:
                raise ValueError(
                    f"parameter '{path_name(path)}' of shape {array.shape} has {spec}, but {size} "
                    f"is not divisible by {axes}={shards}: leave that axis out of its spec"
                )
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(typed, padded))

    shapes = jax.tree_util.tree_map_with_path(split, unboxed(params), unboxed(specs))
    with jax.sharding.use_abstract_mesh(typed):
        state = jax.eval_shape(tx.init, boxed_like(params, shapes))
    if share_over is None:
        leaves = jax.tree.leaves(unboxed(specs))
        used = {name for spec in leaves for axes in spec for name in mesh_axes(axes)}
        is_auto = AxisType.Explicit not in mesh.axis_types
        share_over = [name for name in mesh.axis_names if is_auto and name in used]
    largest = max((x.size for x in jax.tree.leaves(state)), default=0)
    least = min(SMALL_PART * largest, SMALL)

    # Arrays of a parameter's shape, such as the moments of Adam, are split like the parameter.
    like_params = {x.shape for x in jax.tree.leaves(shapes)}

    def sharding(x: Any) -> Any:
        size = sum(part.size for part in jax.tree.leaves(x))
        names = share_over if size >= least else ()
        found = _shared(x, mesh, names)
        if isinstance(x, Quantized) or x.shape in like_params or len(x.shape) < 3:
            return found
        return NamedSharding(mesh, unpadded(x.shape, found.spec, mesh, names))

    return jax.tree.map(sharding, state, is_leaf=lambda x: isinstance(x, Quantized))


def _shared(x: Any, mesh: Mesh, share_over: Sequence[str]) -> Any:
    """The sharding of a traced array, or of an 8-bit one, split over `share_over` too."""
    if not isinstance(x, Quantized):
        return NamedSharding(mesh, _split_further(x.shape, _spec(x), mesh, share_over))
    # Codes and scales are split alike, so that each device has whole blocks with their scales.
    codes, scales = before = _spec(x.codes), _spec(x.scales)
    if codes[-1] != scales[-1] and set(mesh_axes(codes[-1])) <= set(share_over):
        codes = PartitionSpec(*codes[:-1], None)
    if codes[-1] == scales[-1]:
        has_whole_blocks = x.codes.shape[-1] % x.scales.shape[-1] == 0
        shape = x.scales.shape if has_whole_blocks else x.scales.shape[:-1]
        codes = scales = _split_further(shape, scales, mesh, share_over)
    names = [{name for axes in spec for name in mesh_axes(axes)} for spec in (before[0], codes)]
    if not names[0] <= names[1]:  # no other axis divides: better split within blocks than whole
        codes, scales = before
    both: Any = NamedSharding(mesh, codes), NamedSharding(mesh, scales)
    return Quantized(*both)


def _spec(x: Any) -> PartitionSpec:
    """The spec of a traced array, with an entry for each axis."""
    found = tuple(x.sharding.spec) if x.sharding else ()
    return PartitionSpec(*found, *[None] * (len(x.shape) - len(found)))


def _split_further(
    shape: Sequence[int], spec: PartitionSpec, mesh: Mesh, share_over: Sequence[str]
) -> PartitionSpec:
    """A spec over the axes of `share_over` too, each along the first axis that it divides.

    A matrix's axes come before that of the stack (layers, a, b): a step moves its matrices between
    devices, and a layerwise step reads one at a time. Among a matrix's axes, whole ones come before
    split ones.

    Args:
      shape: The sizes of the axes that may be split; the spec may have more.
      spec: The spec before, with an entry for each axis.
      mesh: The mesh.
      share_over: Axes of the mesh.
    """
    entries = [mesh_axes(axes) for axes in spec]
    for name in share_over:
        if mesh.shape[name] == 1 or any(name in axes for axes in entries):
            continue
        shards = [shard_count(mesh, (*axes, name)) for axes in entries]
        divided = [i for i, size in enumerate(shape) if size % shards[i] == 0]
        if divided:
            is_split = lambda i: shard_count(mesh, entries[i]) > 1
            is_stack = lambda i: i == 0 and len(entries) > 2
            entries[min(divided, key=lambda i: (is_stack(i), is_split(i), i))] += (name,)
    return spec_of(entries)


def unpadded(
    shape: Sequence[int],
    spec: PartitionSpec,
    mesh: Mesh | AbstractMesh,
    names: Sequence[str],
    beside: Sequence[str] = (),
) -> PartitionSpec:
    """A spec where mesh axes split the other axis of matrices whose shards a TPU would pad.

    Args:
      shape: The shape of a matrix or a stack of matrices.
      spec: The spec before, with an entry for each axis.
      mesh: The mesh. Only TPUs store tiles.
      names: The mesh axes that may split the other axis, if its shards are not padded.
      beside: Mesh axes that may split the other axis already. Between other layouts with several
        mesh axes on one axis, the compiler may gather arrays to move them.
    """
    if not _has_tiles(mesh):
        return spec
    for name in names:
        entries = [mesh_axes(axes) for axes in spec]
        used = [i for i in (-2, -1) if name in entries[i]]
        if not used or not _is_padded(shape, entries, mesh):
            continue
        here, other = used[0], -3 - used[0]
        if set(entries[other]) <= set(beside):
            entries[here] = tuple(axis for axis in entries[here] if axis != name)
            entries[other] += (name,)
            is_divided = shape[other] % shard_count(mesh, entries[other]) == 0
            if is_divided and not _is_padded(shape, entries, mesh):
                spec = spec_of(entries)
    return spec


def _has_tiles(mesh: Mesh | AbstractMesh) -> bool:
    """Whether the devices store arrays in tiles, as TPUs do."""
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "tpu"


def _is_padded(
    shape: Sequence[int], entries: Sequence[tuple[str, ...]], mesh: Mesh | AbstractMesh
) -> bool:
    """Whether a shard is padded to fill whole tiles.

    A tile has 128 values along one axis and 8 along another, which the compiler chooses; 1, 2 or 4
    values along the other axis are not padded.
    """
    shard = [n // shard_count(mesh, axes) for n, axes in zip(shape, entries, strict=True)]
    whole = lambda n, tile: -(-n // tile) * tile
    rows = lambda n: n if n in (1, 2, 4) else whole(n, 8)
    return all(
        rows(a) * whole(b, 128) > MOST_PADDING * a * b for a, b in itertools.permutations(shard, 2)
    )


def spec_of(entries: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """A `PartitionSpec` from the mesh axes of each axis; the inverse of `mesh_axes` by entry."""
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in entries))


def takes_shapes(init: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes an `init` that also accepts the shapes of parameters.

    `jax.ShapeDtypeStruct` leaves represent zeros, which are never allocated. If they have
    shardings, over one mesh, the state is sharded by `osd_jax.sharding.state_sharding`.

    Args:
      init: The `init` of an Optax transformation.
    """

    @functools.wraps(init)
    @promotes
    def init_of_any(params: optax.Params) -> optax.OptState:
        is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
        shapes = [x for x in jax.tree.leaves(params) if is_shape(x)]
        if not shapes:
            return init(params)
        array = lambda x: jnp.zeros(x.shape, x.dtype) if is_shape(x) else x
        make = lambda: init(jax.tree.map(array, params))
        meshes = [x.sharding.mesh for x in shapes if hasattr(x.sharding, "mesh")]
        if not meshes:
            return jax.jit(make)()

        whole = jax.sharding.PartitionSpec()
        spec = lambda x: getattr(getattr(x, "sharding", None), "spec", whole)
        tx = optax.GradientTransformation(init, optax.identity().update)
        layout = state_sharding(tx, params, jax.tree.map(spec, params), meshes[0])
        return jax.jit(make, out_shardings=layout)()

    return init_of_any
