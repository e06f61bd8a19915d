"""Sharding of LLaMA's weights and batches over a mesh."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from osd_jax.sharding import BATCH_AXES, FSDP, mesh_axes, shard_count, spec_of, unpadded
from osd_jax.stacks import is_stored_by_matrices, moving_whole_matrices
from osd_jax.trees import path_name

logger = logging.getLogger(__name__)


# The axis of a kernel (input, output) that `tensor` splits. A product whose input axis is split
# follows one whose output axis is, so nothing is communicated between the two.
_INPUT, _OUTPUT = -2, -1
_OTHER = {_INPUT: _OUTPUT, _OUTPUT: _INPUT}
_KERNELS = {
    "embedding": _INPUT,  # (vocabulary, hidden)
    "head": _OUTPUT,
    "layers/attention/query": _OUTPUT,
    "layers/attention/key": _OUTPUT,
    "layers/attention/value": _OUTPUT,
    "layers/attention/output": _INPUT,
    "layers/mlp/gate": _OUTPUT,
    "layers/mlp/up": _OUTPUT,
    "layers/mlp/down": _INPUT,
}


def partition_specs(params: optax.Params, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of the weights of `osd_jax.llama` over a mesh from `make_mesh`.

    Args:
      params: The weights, or their shapes.
      mesh: Their mesh.

    Returns:
      A tree of `PartitionSpec`, one entry for each axis of an array. Norms and biases are
      replicated. An axis whose size is not divisible by the mesh axis is replicated too, with a
      logged warning.

    Raises:
      ValueError: A matrix is not one of LLaMA's: give `state_sharding` your own specs.
    """

    def spec(path: tuple[Any, ...], array: Any) -> PartitionSpec:
        name = path_name(path)
        wanted: list[str | None] = [None] * array.ndim
        if name in _KERNELS:
            wanted[_KERNELS[name]] = "tensor" if mesh.shape["tensor"] > 1 else None
            wanted[_fsdp_axis(name, array.shape, mesh)] = "fsdp"
        elif not name.endswith(("norm", "_bias")):
            raise ValueError(
                f"parameter '{name}' does not belong to osd_jax.llama: write the PartitionSpecs "
                "of your own model, and pass them to state_sharding"
            )
        return _where_divisible(name, array.shape, tuple(wanted), mesh)

    return jax.tree_util.tree_map_with_path(spec, params)


def _fsdp_axis(name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> int:
    """The axis of a kernel that `fsdp` splits.

    On a mesh without `tensor`, it is the longer axis of a layer's kernel, the output axis if both
    are equal, if `fsdp` divides it: by default P projects the other one, so that R and the update
    are split like the weight. Of the embedding and the head it is the hidden axis, because
    cross-entropy reads slices of the vocabulary.
    """
    if mesh.shape["tensor"] > 1 or not name.startswith("layers/"):
        return _OTHER[_KERNELS[name]]
    longer = _INPUT if shape[_INPUT] > shape[_OUTPUT] else _OUTPUT
    return _OTHER[longer] if shape[longer] % mesh.shape["fsdp"] else longer


def stored_specs(
    params: optax.Params, mesh: Mesh | AbstractMesh, shard_over_data: bool = False
) -> Any:
    """The sharding of the weights and of their state between two steps.

    It is that of `scattered_specs`, except on TPUs with `shard_over_data` and without a `tensor`
    axis: there `fsdp` splits the embedding and the head by tokens of the vocabulary if shards of
    the hidden axis would be padded, such as 12 values per device.

    Args:
      params: The weights, or their shapes.
      mesh: Their mesh.
      shard_over_data: See `scattered_specs`.

    Returns:
      A tree of `PartitionSpec`, one entry for each axis of an array.
    """
    specs = scattered_specs(params, mesh, shard_over_data)
    if not shard_over_data:
        return specs

    def stored(path: tuple[Any, ...], array: Any, spec: PartitionSpec) -> PartitionSpec:
        if path_name(path).startswith("layers/") or array.ndim < 2:
            return spec
        return unpadded(array.shape, spec, mesh, (FSDP,), beside=("data",))

    return jax.tree_util.tree_map_with_path(stored, params, specs)


def scattered_specs(
    params: optax.Params, mesh: Mesh | AbstractMesh, shard_over_data: bool = False
) -> Any:
    """`partition_specs`, with each array split over the mesh's `data` axis too if so asked.

    Gradients are reduce-scattered to these shards, and weights are all-gathered from them.

    A stack of layers is split by layers if `data` divides their number, any other array along the
    first axis that it divides, whole ones first; norms and biases too. If it divides no axis, the
    array stays whole over it.

    Args:
      params: The weights, or their shapes.
      mesh: Their mesh.
      shard_over_data: Whether to split over `data` what `partition_specs` leaves whole over it.

    Returns:
      A tree of `PartitionSpec`, one entry for each axis of an array.
    """
    specs = partition_specs(params, mesh)
    if not shard_over_data or mesh.shape["data"] == 1:
        return specs

    def split(array: Any, spec: PartitionSpec) -> PartitionSpec:
        entries = [mesh_axes(axes) for axes in spec]
        axes = [
            (shard_count(mesh, entry) > 1, axis)
            for axis, entry in enumerate(entries)
            if array.shape[axis] % shard_count(mesh, (*entry, "data")) == 0
        ]
        if not axes:
            return spec
        entries[min(axes)[1]] += ("data",)
        return spec_of(entries)

    return jax.tree.map(split, params, specs)


def scattered(
    params: optax.Params, mesh: Mesh | AbstractMesh | None, shard_over_data: bool
) -> optax.Params:
    """Weights split as in `scattered_specs`, from where they are all-gathered.

    Args:
      params: The weights, split as in `stored_specs`.
      mesh: Their mesh; None: one device.
      shard_over_data: See `stored_specs`. If False, nothing moves.
    """
    if mesh is None or not shard_over_data:
        return params
    return jax.lax.with_sharding_constraint(params, scattered_specs(params, mesh, shard_over_data))


def specs_by_matrices(
    specs: Any, params: optax.Params, names: Collection[str], mesh: Mesh | AbstractMesh
) -> Any:
    """The specs of weights that determine how their state is split in a plain step.

    R, P and all that belongs to them are where the whole matrices are (`osd_jax.stacks`): split
    over `fsdp` by matrices, if it divides their number in the stack. The state of other weights is
    split like their gradients.

    Args:
      specs: From `stored_specs`.
      params: The weights, or their shapes.
      names: The names of the projected weights.
      mesh: The mesh.
    """

    def one(path: tuple[Any, ...], array: Any, spec: PartitionSpec) -> PartitionSpec:
        is_stack = path_name(path) in names and array.ndim > 2 and spec[0] is None
        if not is_stack or not is_stored_by_matrices(array.shape[0], mesh.shape[FSDP]):
            return spec
        rest = [tuple(name for name in mesh_axes(axes) if name != FSDP) for axes in spec[1:]]
        return spec_of([(FSDP,), *rest])

    return jax.tree_util.tree_map_with_path(one, params, specs)


def moved_to_state(
    grads: optax.Updates, names: Collection[str], mesh: Mesh, shard_over_data: bool = False
) -> optax.Updates:
    """Moves gradients to the devices that store the state of their weights.

    Args:
      grads: The gradients in the weights' dtypes, split as in `scattered_specs`.
      names: See `specs_by_matrices`.
      mesh: From `make_mesh`.
      shard_over_data: See `stored_specs`.
    """
    found = scattered_specs(grads, mesh, shard_over_data)
    stored = stored_specs(grads, mesh, shard_over_data)
    moved = specs_by_matrices(stored, grads, names, mesh)

    def one(grad: jax.Array, before: PartitionSpec, after: PartitionSpec) -> jax.Array:
        grad = jax.lax.with_sharding_constraint(grad, before)
        if before == after:
            return grad
        # Without a barrier, XLA would move it before it is rounded, in float32.
        return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(grad), after)

    return jax.tree.map(one, grads, found, moved)


def _where_divisible(
    name: str, shape: tuple[int, ...], wanted: tuple[Any, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The spec without the mesh axes that do not divide an array's axis, with a warning."""
    spec = []
    for size, axes in zip(shape, wanted, strict=True):
        shards = shard_count(mesh, axes)
        if size % shards:
            _warn_once(
                f"{name} {tuple(shape)}: {size} is not divisible by {axes}={shards}, so that axis "
                "is replicated"
            )
        spec.append(None if size % shards else axes)
    return PartitionSpec(*spec)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def like_weights(tree: Any, mesh: Mesh | AbstractMesh | None) -> Any:
    """Weights or gradients split as `partition_specs` says.

    A reduce-scatter sums gradients, whatever reads them; weights that are stored split over `data`
    too (`stored_specs`) are all-gathered over it.

    Args:
      tree: All weights or gradients, or some: the same nested dict with fewer keys.
      mesh: Their mesh; None: one device.
    """
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, partition_specs(tree, mesh))


def gathered(params: optax.Params, mesh: Mesh | AbstractMesh | None) -> optax.Params:
    """Weights all-gathered over `fsdp`, for one use or several; still split over `tensor`.

    Args:
      params: All weights, or some of them: the same nested dict with fewer keys. Those of a layer
        may lack the axis of the layers.
      mesh: Their mesh; None: one device.
    """
    if mesh is None:
        return params
    whole = lambda spec: PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
    is_spec = lambda x: isinstance(x, PartitionSpec)
    specs = jax.tree.map(whole, partition_specs(params, mesh), is_leaf=is_spec)
    return jax.lax.with_sharding_constraint(params, specs)


def for_products(params: optax.Params) -> optax.Params:
    """Weights as the model's products read them: all-gathered on a mesh with a `tensor` axis.

    On a mesh with `data`, `fsdp` and `tensor`, XLA may partition the product of a gradient and a
    kernel that is split over two axes wrongly: it exchanges rows of tokens between devices and does
    not exchange them back. Kernels that are gathered over `fsdp` beforehand avoid such products;
    their gradients are reduce-scattered. On other meshes XLA gathers a kernel within its product,
    piece by piece, beside the computation.

    Args:
      params: Weights, or some of them, as in `gathered`. The mesh is that of `on`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = _auto_axes(mesh)
    if not {"fsdp", "tensor"} <= auto or 1 in (mesh.shape["fsdp"], mesh.shape["tensor"]):
        return params

    @jax.custom_vjp
    def gather(params: optax.Params) -> optax.Params:
        return gathered(params, mesh)

    gather.defvjp(lambda w: (gathered(w, mesh), None), lambda _, g: (like_weights(g, mesh),))
    return gather(params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of (K, B, S) micro-batches: B over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None))


@contextlib.contextmanager
def on(mesh: Mesh | None, shard_over_data: bool = False) -> Iterator[None]:
    """Inside this context, what is traced knows its mesh: `split_batch`, `osd_jax.stacks`.

    Args:
      mesh: From `make_mesh`; None: one device.
      shard_over_data: Whether weights and state are stored as in `stored_specs`.
    """
    if mesh is None:
        yield
        return
    stored_over = ("data",) if shard_over_data else ()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), moving_whole_matrices(stored_over):
        yield


def mean_over_data(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Returns array -> its mean over the `data` axis, for use within `shard_map`.

    On CPU devices, 16-bit arrays are summed in float32. XLA's CPU compiler would do the same, but
    its pass (AllReducePromotion, JAX 0.10.2 to 0.12.0) ends the process at an all-reduce from
    `shard_map`.
    """

    def mean(array: jax.Array) -> jax.Array:
        return jax.lax.pmean(_summable(array, mesh), "data").astype(array.dtype)

    return mean


def shards_over_data(mesh: Mesh, grads: optax.Updates) -> tuple[Callable[[Any], Any], Any]:
    """The reduce-scatter of gradients over the `data` axis, for use within `shard_map`.

    Args:
      mesh: From `make_mesh`.
      grads: The gradients, or their shapes.

    Returns:
      (gradients of a member -> its shards of their sum; the specs of these over `data`). What
      `scattered_specs` leaves whole over `data` is summed whole. 16-bit arrays are summed as in
      `mean_over_data`.
    """
    is_split = lambda axes: "data" in mesh_axes(axes)
    data_specs = jax.tree.map(
        lambda spec: PartitionSpec(*("data" if is_split(axes) else None for axes in spec)),
        scattered_specs(grads, mesh, shard_over_data=True),
    )
    others = set(mesh.axis_names) - {"data"}

    def one(array: jax.Array, other_spec: PartitionSpec, data_spec: PartitionSpec) -> jax.Array:
        if "data" not in data_spec:
            return jax.lax.psum(_summable(array, mesh), "data").astype(array.dtype)
        axis = tuple(data_spec).index("data")

        def scatter(array: jax.Array) -> jax.Array:
            wide = _summable(array, mesh)
            if axis < array.ndim - 1:
                found = jax.lax.psum_scatter(wide, "data", scatter_dimension=axis, tiled=True)
            else:  # a TPU all-reduces what is scattered along the last axis
                shards = wide.reshape(*array.shape[:-1], mesh.shape["data"], -1)
                found = jax.lax.psum_scatter(jnp.moveaxis(shards, -2, 0), "data")
            return found.astype(array.dtype)

        if other_spec[axis] is not None:  # a member's shard consists of parts of several of these
            return scatter(array)
        # Otherwise XLA would all-gather the array over the other axes before the reduce-scatter.
        return jax.shard_map(
            scatter, axis_names=others, in_specs=other_spec, out_specs=other_spec, check_vma=False
        )(array)

    other_specs = partition_specs(grads, mesh)
    return lambda grads: jax.tree.map(one, grads, other_specs, data_specs), data_specs


def _summable(array: jax.Array, mesh: Mesh) -> jax.Array:
    """The array in a dtype that the mesh's devices sum within `shard_map`."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    is_16_bit = array.dtype in (jnp.bfloat16, jnp.float16)
    return array.astype(jnp.float32) if on_cpu and is_16_bit else array


def split_batch(array: jax.Array) -> jax.Array:
    """Shards the first axis over `data` and `fsdp`, under a mesh that has these.

    The mesh is that of `on`, or of `jax.set_mesh`. Without one, or if the axis is not divisible, it
    does nothing. Without this constraint the compiler may shard the hidden axis of activations over
    `fsdp`, like the embedding's, and communicate activations in every layer.
    """
    return _split(array, BATCH_AXES)


def look_up(table: jax.Array, tokens: jax.typing.ArrayLike) -> jax.Array:
    """`table[tokens]` sharded like `split_batch`, (V, H), (B, S) -> (B, S, H).

    The table is sharded (tensor, fsdp), so B is sharded over `data` alone and H over `fsdp`, and
    the result is then resharded. Without these constraints the compiler may gather the rows of the
    whole batch on each device.
    """
    rows = _whole_rows(table)[_split(jnp.asarray(tokens), "data")]
    return split_batch(_split(rows, "data", None, "fsdp"))


def add_rows(table: jax.Array, tokens: jax.typing.ArrayLike, rows: jax.Array) -> jax.Array:
    """`table.at[tokens].add(rows)`, sharded like the transpose of `look_up`."""
    rows = _split(split_batch(rows), "data", None, "fsdp")
    return _whole_rows(table).at[_split(jnp.asarray(tokens), "data")].add(rows)


def _whole_rows(table: jax.Array) -> jax.Array:
    """A (V, H) table split over `fsdp` alone, where `jax.shard_map` maps another mesh axis.

    There, the partitioner of JAX 0.11 aborts at a look-up in a table whose rows are split.
    """
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return _split(table, None, "fsdp") if AxisType.Manual in kinds else table


def _split(array: jax.Array, *spec: Any) -> jax.Array:
    """Constrains leading axes to the mesh axes of each entry that exist and divide the axis."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = _auto_axes(mesh)
    wanted = [tuple(name for name in mesh_axes(axes) if name in auto) for axes in spec]
    sizes = [math.prod(mesh.shape[name] for name in axes) for axes in wanted]
    if auto.isdisjoint(BATCH_AXES) or any(
        n % size for n, size in zip(array.shape, sizes, strict=False)
    ):
        return array
    return jax.lax.with_sharding_constraint(
        array, PartitionSpec(*(axes or None for axes in wanted))
    )


def _auto_axes(mesh: AbstractMesh) -> set[str]:
    """The axes over which the compiler shards."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Auto}
