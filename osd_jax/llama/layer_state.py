"""An optimizer's state in parts: for some of the parameters, and for one layer at a time."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from osd_jax.accumulation import Held
from osd_jax.selection import of_a_part

Key = tuple[str, ...]  # the keys of one parameter, from the root


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """The leaves of an optimizer's state by their paths, which end in the parameter's path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _state_shapes(tx: optax.GradientTransformation, params: optax.Params) -> Any:
    with warnings.catch_warnings(), of_a_part():
        # Whether these parameters are projected does not describe the whole model.
        warnings.simplefilter("ignore")
        return jax.eval_shape(tx.init, params)


def state_of_part(
    tx: optax.GradientTransformation, part: optax.Params, state: optax.OptState
) -> optax.OptState:
    """The part of the optimizer's state that belongs to some of the parameters.

    Args:
      tx: The optimizer.
      part: A subtree of the parameters: the same nested dict with fewer keys.
      state: The state for all parameters.

    Raises:
      ValueError: The state is not organized by parameter.
    """
    whole, like = leaves_by_name(state), _state_shapes(tx, part)
    for name, shape in leaves_by_name(like).items():
        if name not in whole or whole[name].ndim != shape.ndim:
            raise ValueError(
                f"the optimizer's state has {name} for a part of the parameters but not for all "
                "of them: it cannot be updated layer by layer"
            )
    leaves = [whole[name] for name in leaves_by_name(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _combined(values: list[jax.Array]) -> jax.Array:
    """Combines the values of a number that several parts share, such as a count of steps.

    Each part has counted the same step, or skipped it. A step counts if any part took it, a skipped
    one if any part skipped it, and a boolean says that all succeeded.
    """
    first = values[0]
    if jnp.issubdtype(first.dtype, jax.dtypes.extended):  # a random key: the same for all
        return first
    return functools.reduce(jnp.logical_and if first.dtype == bool else jnp.maximum, values)


def _neutral(x: jax.Array) -> jax.Array:
    """The identity element of `_combined`."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    if x.dtype == bool:
        return jnp.ones_like(x)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.full_like(x, -jnp.inf if is_float else jnp.iinfo(x.dtype).min)


def state_of_parts(state: optax.OptState, parts: Sequence[dict[str, Any]]) -> optax.OptState:
    """The optimizer's state for all parameters, from the new leaves of all parts, by name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (
            _combined([part[name] for part in parts if name in part])
            if any((name := jax.tree_util.keystr(path)) in part for part in parts)
            else x
        ),
        state,
    )


class Layers(NamedTuple):
    """The layers' weights and optimizer state, between the updates of two layers.

    Attributes:
      weights: By key; stacked.
      stacked: The leaves of their state that have an axis of layers, by name.
      shared: The other leaves, such as counts, after the updates of the layers so far.
      held: The layers' sketches by key, stacked, if the step waits.
    """

    weights: dict[Key, jax.Array]
    stacked: dict[str, jax.Array]
    shared: dict[str, jax.Array]
    held: dict[Key, Held]


def take(tree: Any, index: jax.typing.ArrayLike) -> Any:
    """Layer `index`, with its axis kept at length 1, so that it is sharded like the whole."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), tree)


def put(tree: Any, layer: Any, index: jax.typing.ArrayLike) -> Any:
    """`tree` with its layer `index` replaced by `layer`, whose axis of layers has length 1."""

    def one(x: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), index, 0)

    return jax.tree.map(one, tree, layer)


def by_key(tree: Any) -> dict[Key, Any]:
    """Nested dicts as one, of arrays or sketches."""
    return flatten_dict(tree, is_leaf=lambda keys, x: not isinstance(x, dict))


def with_weights(layers: Layers, index: jax.typing.ArrayLike, part: optax.Params) -> Layers:
    """`layers` with new weights for one layer, whose axis has length 1."""
    new = {key: put(layers.weights[key], x, index) for key, x in flatten_dict(part).items()}
    return layers._replace(weights=layers.weights | new)


class LayerOptimizer:
    """One update of an optimizer, applied one parameter of one layer at a time.

    Args:
      tx: The optimizer.
      params: All weights.
      state: The optimizer's state before the update.
      layout: The sharding of the state, a tree of `NamedSharding` like it. A layer's slices have it
        too, except along the axis of the stack; without it the compiler may gather whole stacks.
        None: one device.

    Attributes:
      start: The initial `_Layers`, before the first layer.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: optax.Params,
        state: optax.OptState,
        layout: Any = None,
    ) -> None:
        self._specs = {name: x.spec for name, x in leaves_by_name(layout).items()}
        weights = flatten_dict({"layers": params["layers"]})
        self._like: dict[Key, Any] = {}
        self._before: dict[str, jax.Array] = {}
        stacked = {}
        for key, array in weights.items():
            leaves = leaves_by_name(state_of_part(tx, unflatten_dict({key: array}), state))
            of_one, of_two = (
                jax.ShapeDtypeStruct((layers, *array.shape[1:]), array.dtype) for layers in (1, 2)
            )
            self._like[key] = _state_shapes(tx, unflatten_dict({key: of_one}))
            # The shapes for two layers reveal which arrays have an axis of layers, also if there is
            # one layer.
            two_layers = leaves_by_name(_state_shapes(tx, unflatten_dict({key: of_two})))
            for name, shape in leaves_by_name(self._like[key]).items():
                if name not in leaves or name not in two_layers:
                    raise ValueError(
                        f"the optimizer's state has {name} for one layer but not for all of them: "
                        "it cannot be updated layer by layer"
                    )
                leaf, two = leaves[name], two_layers[name]
                if leaf.shape == shape.shape == two.shape:
                    self._before[name] = leaf
                elif two.shape[:1] == (2,) and leaf.shape[1:] == shape.shape[1:] == two.shape[1:]:
                    stacked[name] = leaf
                else:
                    raise ValueError(
                        f"the optimizer's state has {name} of shape {leaf.shape} for all layers "
                        f"but {shape.shape} for one: it cannot be updated layer by layer"
                    )
        shared = {name: _neutral(x) for name, x in self._before.items()}
        self.start = Layers(weights, stacked, shared, {})

    def state(self, layers: Layers, index: jax.typing.ArrayLike, key: Key) -> optax.OptState:
        """The state of one parameter of a layer: its slices, and the shared part before it."""
        like = self._like[key]
        leaves = [
            self._sharded(name, take(layers.stacked[name], index))
            if name in layers.stacked
            else self._before[name]
            for name in leaves_by_name(like)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def store(
        self, layers: Layers, index: jax.typing.ArrayLike, old: optax.OptState, new: optax.OptState
    ) -> Layers:
        """Stores a new state; leaves unchanged from `old` are not written."""
        before = leaves_by_name(old)
        changed = {name: x for name, x in leaves_by_name(new).items() if x is not before[name]}
        stacked = {
            k: put(layers.stacked[k], self._sharded(k, x), index)
            for k, x in changed.items()
            if k in layers.stacked
        }
        shared = {
            k: _combined([layers.shared[k], x]) for k, x in changed.items() if k in layers.shared
        }
        return layers._replace(stacked=layers.stacked | stacked, shared=layers.shared | shared)

    def _sharded(self, name: str, slices: jax.Array) -> jax.Array:
        """Slices of a stack, sharded like the stack except for its own axis."""
        if name not in self._specs:
            return slices
        spec = PartitionSpec(None, *self._specs[name][1:])
        return jax.lax.with_sharding_constraint(slices, spec)
