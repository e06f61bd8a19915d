"""Layer-by-layer updates: a layer's gradient lives only until its own weights have been updated.

The train step runs the layers forward and stores the input of each layer. Then it iterates over
them in reverse: it recomputes a layer from its input, computes that layer's gradient, passes it to
the optimizer with that layer's slice of the optimizer's state, and writes weights and state back in
place. Only the gradients of one layer are alive, where a plain step holds those of all layers.

With micro-batches or clipping a step must wait for the whole update: a layer's gradient becomes a
sketch, which is held (`osd_jax.accumulation`), and a second pass takes the steps.

An optimizer can be applied layer by layer if it treats each layer independently: without a norm
over all parameters inside it. The state is that of the plain step, so a checkpoint of either
resumes with the other.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from osd_jax import llama
from osd_jax.accumulation import (
    Held,
    check_sketch_suffices,
    hold,
    nothing_held,
    scaled,
    squared_norm_held,
)
from osd_jax.guard import all_finite
from osd_jax.llama.train import (
    Batch,
    Metrics,
    TrainState,
    TrainStep,
    clipping_factor,
    mean_factor,
    measured,
    skipped_metrics,
)
from osd_jax.numerics import accumulator_dtype
from osd_jax.parts import parted
from osd_jax.selection import of_a_part

Key = tuple[str, ...]  # the keys of one parameter, from the root
Visit = Callable[["_Layers", jax.Array, dict[Key, jax.Array]], tuple["_Layers", Any]]


# ----------------------------------------------------------------- an optimizer's state in parts


def _named(tree: Any) -> dict[str, Any]:
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
    whole, like = _named(state), _state_shapes(tx, part)
    for name, shape in _named(like).items():
        if name not in whole or whole[name].ndim != shape.ndim:
            raise ValueError(
                f"the optimizer's state has {name} for a part of the parameters but not for all "
                "of them: it cannot be updated layer by layer"
            )
    leaves = [whole[name] for name in _named(like)]
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


class _Layers(NamedTuple):
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


def _take(tree: Any, index: jax.typing.ArrayLike) -> Any:
    """Layer `index`, with its axis kept at length 1, so that it is sharded like the whole."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), tree)


def _put(tree: Any, layer: Any, index: jax.typing.ArrayLike) -> Any:
    def one(x: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), index, 0)

    return jax.tree.map(one, tree, layer)


def _by_key(tree: Any) -> dict[Key, Any]:
    """Nested dicts as one, of arrays or sketches."""
    return flatten_dict(tree, is_leaf=lambda keys, x: not isinstance(x, dict))


def _moved(layers: _Layers, index: jax.typing.ArrayLike, part: optax.Params) -> _Layers:
    """`layers` with new weights for one layer, whose axis has length 1."""
    new = {key: _put(layers.weights[key], x, index) for key, x in flatten_dict(part).items()}
    return layers._replace(weights=layers.weights | new)


class _LayerOptimizer:
    """One update of an optimizer, applied one parameter of one layer at a time.

    Args:
      tx: The optimizer.
      params: All weights.
      state: The optimizer's state before the update.

    Attributes:
      start: The initial `_Layers`, before the first layer.
    """

    def __init__(
        self, tx: optax.GradientTransformation, params: optax.Params, state: optax.OptState
    ) -> None:
        weights = flatten_dict({"layers": params["layers"]})
        self._like: dict[Key, Any] = {}
        self._before: dict[str, jax.Array] = {}
        stacked = {}
        for key, array in weights.items():
            leaves = _named(state_of_part(tx, unflatten_dict({key: array}), state))
            of_one, of_two = (
                jax.ShapeDtypeStruct((layers, *array.shape[1:]), array.dtype) for layers in (1, 2)
            )
            self._like[key] = _state_shapes(tx, unflatten_dict({key: of_one}))
            # The shapes for two layers reveal which arrays have an axis of layers, also if there is
            # one layer.
            two_layers = _named(_state_shapes(tx, unflatten_dict({key: of_two})))
            for name, shape in _named(self._like[key]).items():
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
        self.start = _Layers(weights, stacked, shared, {})

    def state(self, layers: _Layers, index: jax.typing.ArrayLike, key: Key) -> optax.OptState:
        """The state of one parameter of a layer: its slices, and the shared part as it was."""
        like = self._like[key]
        leaves = [
            _take(layers.stacked[name], index) if name in layers.stacked else self._before[name]
            for name in _named(like)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def store(
        self, layers: _Layers, index: jax.typing.ArrayLike, old: optax.OptState, new: optax.OptState
    ) -> _Layers:
        """Stores a new state; leaves unchanged from `old` are not written."""
        before = _named(old)
        changed = {name: x for name, x in _named(new).items() if x is not before[name]}
        stacked = {
            k: _put(layers.stacked[k], x, index) for k, x in changed.items() if k in layers.stacked
        }
        shared = {
            k: _combined([layers.shared[k], x]) for k, x in changed.items() if k in layers.shared
        }
        return layers._replace(stacked=layers.stacked | stacked, shared=layers.shared | shared)


# ------------------------------------------------------------------------------- the train step


def make_layerwise_train_step(
    config: llama.LlamaConfig,
    tx: optax.GradientTransformation,
    *,
    grad_clipping: float = 0.0,
) -> TrainStep:
    """Builds a jitted train step that updates layer by layer; see the description of this module.

    Its losses and weights equal those of `osd_jax.llama.train.make_train_step` with `remat`: up to
    rounding with one micro-batch, clipped or not; with several, those of that step with
    `accumulate="sketches"`.

    The optimizer receives the layer's index as the extra argument `layer`, with which stochastic
    rounding draws the bits of the plain step.

    If the step does not wait, a non-finite gradient skips only its own parameter of a layer; those
    of earlier layers are mostly non-finite too, but later layers have already been updated. If it
    waits, or if the loss is not finite, everything is skipped. Either way it counts as one skipped
    step.

    Args:
      config: The model's shape.
      tx: From `make_optimizer`, with `llama.dimension_numbers`; or any optimizer that treats each
        layer independently.
      grad_clipping: Maximum norm; 0 does not clip. With one micro-batch the norm of the whole
        gradient, with several that of what is applied (`osd_jax.accumulation.squared_norm_held`).

    Returns:
      As `make_train_step`: a function (state, batch, measure) -> (state, metrics). Its first call
      raises ValueError if the optimizer cannot be applied layer by layer.

    Example:
      >>> import jax, osd_jax
      >>> from osd_jax import llama
      >>> from osd_jax.llama.train import init_state
      >>> config = llama.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24,
      ...                            num_hidden_layers=2, num_attention_heads=2)
      >>> tx = osd_jax.make_optimizer(
      ...     "galore_adamw", "continuous", learning_rate=0.01, rank=4,
      ...     select=llama.is_projected, dimension_numbers=llama.dimension_numbers)
      >>> step = make_layerwise_train_step(config, tx)
      >>> state = init_state(llama.init(config, 0), tx)
      >>> tokens = jax.random.randint(jax.random.key(0), (1, 2, 8), 0, 64)
      >>> state, metrics = step(state, {"tokens": tokens, "mask": tokens >= 0}, False)
      >>> round(float(metrics["loss"]))
      4
    """
    parts = parted(tx)
    after_layers = ("norm", "embedding" if config.tie_word_embeddings else "head")

    def forward(params: optax.Params, micro: Batch) -> Forward:
        """The layers' inputs, and the gradients of all that follows them, for the mean loss."""
        tokens, mask = micro["tokens"], micro["mask"]
        place = llama.positions(config, tokens.shape[1])

        def layer(x: jax.Array, weights: optax.Params) -> tuple[jax.Array, jax.Array]:
            return llama.layer(weights, config, x, *place), x

        def top(params: optax.Params, x: jax.Array) -> jax.Array:
            return llama.loss_of_output(params, config, x, tokens, mask)[0]

        x, inputs = jax.lax.scan(layer, llama.embed(params["embedding"], tokens), params["layers"])
        after = {name: params[name] for name in after_layers}
        loss, pullback = jax.vjp(top, after, x)
        factor = mean_factor(loss, llama.num_predicted(tokens, mask))
        return Forward(loss, inputs, *pullback(factor.astype(loss.dtype)))

    def backward(layers: _Layers, run: Forward, tokens: jax.Array, visit: Visit) -> Any:
        """Passes each layer's gradients to `visit`.

        Returns:
          The `layers` after all visits, the gradients of all other parameters, and what `visit`
          found.
        """
        place = llama.positions(config, tokens.shape[1])

        def one(carry: Any, index_and_input: Any) -> Any:
            (layers, gradient), (index, x) = carry, index_and_input
            weights = {key: _take(w, index)[0] for key, w in layers.weights.items()}
            weights = unflatten_dict(weights)["layers"]
            pullback = jax.vjp(lambda w, x: llama.layer(w, config, x, *place), weights, x)[1]
            grads, gradient = pullback(gradient)
            grads = flatten_dict({"layers": jax.tree.map(lambda g: g[None], grads)})
            layers, found = visit(layers, index, grads)
            return (layers, gradient), found

        indices = jnp.arange(config.num_hidden_layers)
        (layers, gradient), found = jax.lax.scan(
            one, (layers, run.gradient), (indices, run.inputs), reverse=True
        )
        embedding = run.after_layers.get("embedding")
        if embedding is None:
            embedding = jnp.zeros((config.vocab_size, config.hidden_size), gradient.dtype)
        embedding = embedding.at[tokens].add(gradient)
        return layers, run.after_layers | {"embedding": embedding}, found

    def at_once(state: TrainState, micro: Batch, measure: jax.Array) -> Any:
        """One micro-batch without clipping: updates each layer within the backward pass."""
        optimizer = _LayerOptimizer(tx, state.params, state.opt_state)
        update = optax.with_extra_args_support(tx).update

        def step(
            part: optax.Params, grads: optax.Params, part_state: optax.OptState, **extra_args: Any
        ) -> Any:
            updates, part_state = update(grads, part_state, part, **extra_args)
            return optax.apply_updates(part, updates), part_state

        def visit(layers: _Layers, index: jax.Array, grads: dict[Key, jax.Array]) -> Any:
            found: Metrics = {}
            squares = _squared_norm(grads)
            for key, g in grads.items():
                old = optimizer.state(layers, index, key)
                part = unflatten_dict({key: _take(layers.weights[key], index)})
                g = unflatten_dict({key: g})
                found |= measured(measure, g, old)
                part, new = step(part, g, old, layer=index)
                layers = _moved(optimizer.store(layers, index, old, new), index, part)
            return layers, (squares, found)

        def moved(name: str, gradient: jax.Array) -> tuple[optax.Params, Any, jax.Array]:
            """(new weights, leaves of their state by name, the gradient's squared norm)."""
            part = {name: state.params[name]}
            squares = _squared_norm(gradient)
            part, new = step(part, {name: gradient}, state_of_part(tx, part, state.opt_state))
            return part, _named(new), squares

        run = forward(state.params, micro)
        outer = [moved(name, g) for name, g in run.after_layers.items() if name != "embedding"]
        # The backward pass waits for these; otherwise the head's gradient would be alive throughout
        # it.
        gradient, outer = jax.lax.optimization_barrier((run.gradient, outer))
        layers, outer_grads, (layer_squares, found) = backward(
            optimizer.start, run._replace(gradient=gradient), micro["tokens"], visit
        )
        outer.append(moved("embedding", outer_grads["embedding"]))
        moved_weights, states, squares = zip(*outer, strict=True)
        params = functools.reduce(operator.or_, moved_weights, unflatten_dict(layers.weights))
        opt_state = state_of_parts(state.opt_state, [layers.shared | layers.stacked, *states])
        norm = jnp.sqrt(jnp.sum(layer_squares) + sum(squares))
        loss = run.loss / llama.num_predicted(micro["tokens"], micro["mask"])
        return params, opt_state, loss, norm, found

    def after_all(state: TrainState, batch: Batch, measure: jax.Array) -> Any:
        """Micro-batches or clipping: holds sketches, and updates the layers at the end."""
        check_sketch_suffices(parts)
        optimizer = _LayerOptimizer(parts, state.params, state.opt_state)
        outer = {name: x for name, x in state.params.items() if name != "layers"}
        outer_state = state_of_part(parts, outer, state.opt_state)
        held = nothing_held(parts, state.params, state.opt_state)
        outer_held = {name: held[name] for name in outer}
        layers = optimizer.start._replace(held=_by_key({"layers": held["layers"]}))
        total = llama.num_predicted(batch["tokens"], batch["mask"])

        def one(carry: Any, number_and_micro: Any) -> Any:
            (layers, outer_held, outer_state), (number, micro) = carry, number_and_micro
            is_first = number == 0
            share = llama.num_predicted(micro["tokens"], micro["mask"]) / total

            def visit(layers: _Layers, index: jax.Array, grads: dict[Key, jax.Array]) -> Any:
                found: Metrics = {}
                squares = _squared_norm(grads)
                for key, g in grads.items():
                    old, g = optimizer.state(layers, index, key), unflatten_dict({key: g})
                    found |= measured(measure, g, old)
                    new = parts.refresh(g, old, is_first)
                    layers = optimizer.store(layers, index, old, new)
                    sketch = _by_key(parts.project(g, new))[key]
                    held = hold(_take(layers.held[key], index), sketch, share)
                    held = _put(layers.held[key], held, index)
                    layers = layers._replace(held=layers.held | {key: held})
                return layers, (squares, found)

            run = forward(state.params, micro)
            layers, grads, (squares, found) = backward(layers, run, micro["tokens"], visit)
            outer_state = parts.refresh(grads, outer_state, is_first)
            outer_held = hold(outer_held, parts.project(grads, outer_state), share)
            squares = jnp.sum(squares) + _squared_norm(grads)
            return (layers, outer_held, outer_state), (run.loss, squares, found)

        micro_batches = batch["tokens"].shape[0]
        (layers, outer_held, outer_state), (losses, squares, found) = jax.lax.scan(
            one, (layers, outer_held, outer_state), (jnp.arange(micro_batches), batch)
        )
        held = (layers.held, outer_held)
        norm = jnp.sqrt(squares[0] if micro_batches == 1 else squared_norm_held(held))
        factor = clipping_factor(norm, grad_clipping)
        factor = jnp.where(all_finite(held), factor, jnp.nan)

        def apply(layers: _Layers, index: jax.Array) -> tuple[_Layers, None]:
            for key, stacked in layers.weights.items():
                old = optimizer.state(layers, index, key)
                part = unflatten_dict({key: _take(stacked, index)})
                held = unflatten_dict({key: scaled(_take(layers.held[key], index), factor)})
                updates, new = parts.apply(held, old, part, layer=index)
                part = optax.apply_updates(part, updates)
                layers = _moved(optimizer.store(layers, index, old, new), index, part)
            return layers, None

        layers, _ = jax.lax.scan(apply, layers, jnp.arange(config.num_hidden_layers))
        updates, outer_state = parts.apply(scaled(outer_held, factor), outer_state, outer)
        params = unflatten_dict(layers.weights) | optax.apply_updates(outer, updates)
        states = [layers.shared | layers.stacked, _named(outer_state)]
        opt_state = state_of_parts(state.opt_state, states)
        return params, opt_state, jnp.sum(losses) / total, norm, found

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState, batch: Mapping[str, jax.Array], measure: jax.Array
    ) -> tuple[TrainState, Metrics]:
        if batch["tokens"].shape[0] == 1 and not grad_clipping:
            one = {name: x[0] for name, x in batch.items()}
            params, opt_state, loss, norm, found = at_once(state, one, measure)
        else:
            params, opt_state, loss, norm, found = after_all(state, batch, measure)
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            **skipped_metrics(opt_state),
            **jax.tree.map(jnp.mean, found),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


class Forward(NamedTuple):
    """The results of a forward pass that the backward pass needs.

    Attributes:
      loss: The sum of the tokens' losses.
      inputs: The input of each layer, (L, B, S, H).
      after_layers: The gradients of the parameters after the layers: of the final norm, and of the
        head or the embedding that is tied to it.
      gradient: The gradient of the last layer's output, (B, S, H).
    """

    loss: jax.Array
    inputs: jax.Array
    after_layers: optax.Params
    gradient: jax.Array


def _squared_norm(grads: optax.Params) -> jax.Array:
    wide = jax.tree.map(lambda g: g.astype(accumulator_dtype(g.dtype)), grads)
    return optax.tree.norm(wide, squared=True)
