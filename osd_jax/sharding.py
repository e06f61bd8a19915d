"""How arrays are laid out over a mesh of devices: weights, optimizer state, batches.

A mesh has three axes. Over `data` and `fsdp` the batch is split; over `fsdp` and `tensor` each
weight: one of its matrix axes over `fsdp`, to be gathered where it is used, the other over
`tensor`, as in Megatron. Optimizer state follows its weight: P is split as the axis that it
projects, R as the other one, and the rank axis is whole on every device.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from osd_jax.trees import KeyPath, boxed_like, path_name, unboxed

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

logger = logging.getLogger(__name__)


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `data=2,fsdp=2,tensor=2`; an axis left out is 1, one of -1 takes what is left.

    Raises:
      ValueError: for an unknown axis, one given twice, or a size that is neither a whole number
        of at least 1 nor the only -1.

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
        raise ValueError(f"mesh {_text(sizes)}: only one axis can be -1, which takes the rest")


def _text(sizes: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of all devices, or of those given, with axes that the compiler sees to (Auto).

    Args:
      data: Groups that each hold whole copies and a share of the batch. -1: as many as are left.
      fsdp: Members over which a weight's rows, or columns, and the batch are split. -1 likewise.
      tensor: Members over which a weight's other axis is split. -1 likewise.
      devices: None: all.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.

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
            f"mesh {_text(sizes)} is of {given} devices{' or a multiple' * (-1 in sizes.values())}"
            f", and there are {len(found)}: choose sizes that multiply to {len(found)}"
        )
    return jax.make_mesh(
        tuple(filled.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=found
    )


# ------------------------------------------------------------------------------ LLaMA's weights

# The mesh axes of a kernel's (input, output). A product whose input axis is split over `tensor`
# follows one whose output axis is, so that between the two nothing is exchanged.
_COLUMN = ("fsdp", "tensor")
_ROW = ("tensor", "fsdp")
_KERNELS = {
    "embedding": _ROW,  # (vocabulary, hidden)
    "head": _COLUMN,
    "layers/attention/query": _COLUMN,
    "layers/attention/key": _COLUMN,
    "layers/attention/value": _COLUMN,
    "layers/attention/output": _ROW,
    "layers/mlp/gate": _COLUMN,
    "layers/mlp/up": _COLUMN,
    "layers/mlp/down": _ROW,
}


def partition_specs(params: optax.Params, mesh: Mesh) -> Any:
    """How the weights of `osd_jax.llama` are split over a mesh from `make_mesh`.

    Args:
      params: The weights, or their shapes.
      mesh: Their mesh.

    Returns:
      A tree of `PartitionSpec`, one entry for each axis of an array. Norms are whole everywhere. So
      is an axis whose size the mesh axis does not divide, which is logged as a warning.

    Raises:
      ValueError: for a matrix that is not one of LLaMA's: give `state_sharding` your own specs.
    """

    def spec(path: tuple[Any, ...], array: Any) -> PartitionSpec:
        name = path_name(path)
        wanted: tuple[str | None, ...] = (None,) * array.ndim
        if name in _KERNELS:
            wanted = wanted[:-2] + _KERNELS[name]
        elif not name.endswith("norm"):
            raise ValueError(
                f"parameter '{name}' is none of osd_jax.llama's: write the PartitionSpecs of your "
                "own model, and give them to state_sharding"
            )
        return _where_divisible(name, array.shape, wanted, mesh)

    return jax.tree_util.tree_map_with_path(spec, params)


def _where_divisible(
    name: str, shape: tuple[int, ...], wanted: tuple[Any, ...], mesh: Mesh
) -> PartitionSpec:
    """The spec without the mesh axes that do not divide an array's axis, saying so."""
    spec = []
    for size, axes in zip(shape, wanted, strict=True):
        shards = _shards(mesh, axes)
        if size % shards:
            _warn_once(
                f"{name} {tuple(shape)}: {size} does not divide by {axes}={shards}, so each of "
                "them holds that axis whole"
            )
        spec.append(None if size % shards else axes)
    return PartitionSpec(*spec)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One entry of a `PartitionSpec` as the mesh axes that it names."""
    return (axes,) if isinstance(axes, str) else axes or ()


def _shards(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[name] for name in _names(axes))


# ------------------------------------------------------------------------------ optimizer state


def state_sharding(
    tx: optax.GradientTransformation, params: optax.Params, specs: Any, mesh: Mesh
) -> Any:
    """How the state of any Optax optimizer is split, given how its parameters are.

    `tx.init` is traced, without computing anything, on parameters whose types say how each axis is
    split (JAX's Explicit axes), and the types of its results are the answer: whatever the state
    is made of, each of its axes is split as the parameter's axis that it came from.

    Args:
      tx: From `make_optimizer`, `scale_by_subspace`, Optax, or composed of these.
      params: The parameters, or their shapes and dtypes.
      specs: A tree of `PartitionSpec` like `params`, with its boxes or without.
      mesh: Of any axes.

    Returns:
      A tree of `NamedSharding` like `tx.init(params)`, for `jax.jit(tx.init, out_shardings=...)`,
      and for the state in the train step's `in_shardings` and `out_shardings`.

    Raises:
      ValueError: where a parameter's axis does not divide by the mesh axes that it is split over.

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
            shards = _shards(mesh, axes)
            if size % shards:
                raise ValueError(
                    f"parameter '{path_name(path)}' of shape {array.shape} has {spec}, and {size} "
                    f"does not divide by {axes}={shards}: leave that axis out of its spec"
                )
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(typed, padded))

    shapes = jax.tree_util.tree_map_with_path(split, unboxed(params), unboxed(specs))
    with jax.sharding.use_abstract_mesh(typed):
        state = jax.eval_shape(tx.init, boxed_like(params, shapes))
    return jax.tree.map(
        lambda x: NamedSharding(mesh, x.sharding.spec if x.sharding else PartitionSpec()), state
    )


def train_state_sharding(tx: optax.GradientTransformation, params: optax.Params, mesh: Mesh) -> Any:
    """How a LLaMA's `TrainState` is split over a mesh from `make_mesh`.

    Args:
      tx: The optimizer.
      params: The weights, or their shapes and dtypes.
      mesh: Their mesh.

    Returns:
      A `TrainState` of `NamedSharding`. What does not divide is logged; see `partition_specs`.
    """
    from osd_jax.train import TrainState  # which builds its step with this module

    specs = partition_specs(params, mesh)
    step: Any = NamedSharding(mesh, PartitionSpec())
    weights = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return TrainState(step, weights, state_sharding(tx, params, specs, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How (K, B, S) micro-batches are split: B over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None))


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Within it, `split_batch` in a function that is being traced knows its mesh."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext()


def split_batch(array: jax.Array) -> jax.Array:
    """Splits the first axis over `data` and `fsdp`, under a mesh that has these.

    The mesh is that of `on`, or of `jax.set_mesh`.
    Without one, or where the axis does not divide, nothing is done. The compiler, left to itself,
    may split the hidden axis of activations over `fsdp`, as the embedding's is, and exchange
    activations in every layer.
    """
    return _split(array, BATCH_AXES)


def look_up(table: jax.Array, tokens: jax.typing.ArrayLike) -> jax.Array:
    """`table[tokens]` as `split_batch` lays it out, (V, H), (B, S) -> (B, S, H).

    The table is split (tensor, fsdp), so B is split over `data` alone and H over `fsdp`, and then
    exchanged. Left to find the way itself, the compiler may gather the whole batch's rows on each
    device.
    """
    rows = table[_split(jnp.asarray(tokens), "data")]
    return split_batch(_split(rows, "data", None, "fsdp"))


def _split(array: jax.Array, *spec: Any) -> jax.Array:
    """Constrains leading axes, to the part of each entry that the mesh has and that divides."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    wanted = [tuple(name for name in _names(axes) if name in auto) for axes in spec]
    sizes = [math.prod(mesh.shape[name] for name in axes) for axes in wanted]
    if auto.isdisjoint(BATCH_AXES) or any(
        n % size for n, size in zip(array.shape, sizes, strict=False)
    ):
        return array
    return jax.lax.with_sharding_constraint(
        array, PartitionSpec(*(axes or None for axes in wanted))
    )
