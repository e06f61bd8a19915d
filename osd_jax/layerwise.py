"""Updates layer by layer: a layer's gradient lives only until its own weights have moved.

The train step runs the layers forward and keeps each layer's input. Then it walks them backward:
it runs a layer again from its input, takes that layer's gradient, gives it to the optimizer with
that layer's slice of the optimizer's state, and writes weights and state back in place. So the
gradients of one layer are alive where a plain step holds those of all.

With micro-batches or clipping a step has to wait for the whole update: a layer's gradient becomes a
sketch, which is held (`osd_jax.accumulation`), and a second walk takes the steps.

An optimizer can be taken layer by layer if it does with each layer what it would do with all: no
norm over all parameters inside it. The state is that of the plain step, so that a checkpoint of one
goes on with the other.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax import llama
from osd_jax.accumulation import (
    Held,
    check_sketch_suffices,
    hold,
    nothing_held,
    scaled,
    squared_norm_held,
)
from osd_jax.optimizers import skipped_steps
from osd_jax.projectors import accumulator_dtype
from osd_jax.subspace import Side, SubspaceTransformation, all_finite, in_parts
from osd_jax.train import Batch, Metrics, TrainState, TrainStep, clipping_factor, measured

Visit = Callable[["_Layers", jax.Array, optax.Params], tuple["_Layers", Any]]


# ----------------------------------------------------------------- an optimizer's state in parts


def _by_path(tree: Any) -> dict[Any, Any]:
    return dict(jax.tree_util.tree_flatten_with_path(tree)[0])


def _state_shapes(tx: optax.GradientTransformation, params: optax.Params) -> Any:
    with warnings.catch_warnings():
        # That none of these parameters is projected says nothing of the whole.
        warnings.simplefilter("ignore")
        return jax.eval_shape(tx.init, params)


def state_of_part(
    tx: optax.GradientTransformation, part: optax.Params, state: optax.OptState
) -> optax.OptState:
    """The optimizer's state for some of the parameters, out of its state for all.

    Args:
      tx: The optimizer.
      part: A subtree of the parameters: the same nested dict with fewer keys.
      state: For all parameters.

    Raises:
      ValueError: if the state is not kept parameter by parameter.
    """
    leaves, whole = [], _by_path(state)
    like, tree = jax.tree_util.tree_flatten_with_path(_state_shapes(tx, part))
    for path, shape in like:
        if path not in whole or whole[path].ndim != shape.ndim:
            raise ValueError(
                f"the optimizer's state has {jax.tree_util.keystr(path)} for a part of the "
                "parameters and not for all of them: it cannot be updated layer by layer"
            )
        leaves.append(whole[path])
    return jax.tree_util.tree_unflatten(tree, leaves)


def _combined(values: list[jax.Array]) -> jax.Array:
    """What several parts leave of a number that they share, such as a count of steps.

    Each has counted the same step, or skipped it. A step counts if any part took it, a skipped one
    if any part skipped it, and a boolean says that all went well.
    """
    first = values[0]
    if jnp.issubdtype(first.dtype, jax.dtypes.extended):  # a random key: the same for all
        return first
    return functools.reduce(jnp.logical_and if first.dtype == bool else jnp.maximum, values)


def state_of_parts(state: optax.OptState, parts: Sequence[optax.OptState]) -> optax.OptState:
    """The optimizer's state for all parameters, out of the new states of all parts.

    Args:
      state: In its structure.
      parts: As `state_of_part` gives them. What they share is combined: a step counts if any part
        has taken it, a skipped one if any part has skipped it.
    """
    new = [_by_path(part) for part in parts]
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _combined([part[path] for part in new if path in part] or [x]), state
    )


class _Layers(NamedTuple):
    """The layers' weights and optimizer state, between the updates of two layers.

    Attributes:
      weights: {"layers": ...}, stacked.
      stacked: The leaves of their state that have an axis of layers, by path.
      shared: The other leaves, such as counts, as the layers updated so far have left them.
      held: The layers' sketches, stacked, where the step waits.
    """

    weights: optax.Params
    stacked: dict[str, jax.Array]
    shared: dict[str, jax.Array]
    held: Held = ()


def _take(tree: Any, index: jax.typing.ArrayLike) -> Any:
    """Layer `index`, its axis kept with length 1, so that it is laid out as all of them are."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), tree)


def _put(tree: Any, layer: Any, index: jax.typing.ArrayLike) -> Any:
    def one(x: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), index, 0)

    return jax.tree.map(one, tree, layer)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


class _LayerOptimizer:
    """One update of an optimizer, taken a layer at a time.

    Args:
      tx: The optimizer.
      params: All weights.
      state: The optimizer's state before the update.

    Attributes:
      start: What the first layer finds.
    """

    def __init__(
        self, tx: optax.GradientTransformation, params: optax.Params, state: optax.OptState
    ) -> None:
        weights = {"layers": params["layers"]}
        leaves = jax.tree.leaves(state_of_part(tx, weights, state))
        shapes = _state_shapes(tx, jax.eval_shape(lambda: _take(weights, 0)))
        like, self._tree = jax.tree_util.tree_flatten_with_path(shapes)
        self._names = [jax.tree_util.keystr(path) for path, _ in like]
        stacked, self._before = {}, {}
        for name, (_, one), leaf in zip(self._names, like, leaves, strict=True):
            if leaf.shape == one.shape:
                self._before[name] = leaf
            elif one.shape[:1] == (1,) and leaf.shape[1:] == one.shape[1:]:
                stacked[name] = leaf
            else:
                raise ValueError(
                    f"the optimizer's state has {name} of shape {leaf.shape} for all layers and "
                    f"{one.shape} for one: it cannot be updated layer by layer"
                )
        self.start = _Layers(weights, stacked, {k: _neutral(v) for k, v in self._before.items()})

    def state(self, layers: _Layers, index: jax.typing.ArrayLike) -> optax.OptState:
        """Of one layer: its own slices, and what is shared as it was before the update."""
        return self._unflatten(self._before | _take(layers.stacked, index))

    def store(
        self, layers: _Layers, index: jax.typing.ArrayLike, old: optax.OptState, new: optax.OptState
    ) -> _Layers:
        """Puts a layer's new state in its place; what is as it was in `old` is not written."""
        leaves = zip(self._names, jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        changed = {name: after for name, before, after in leaves if after is not before}
        stacked = {k: _put(v, changed[k], index) for k, v in layers.stacked.items() if k in changed}
        shared = {k: _combined([v, changed[k]]) for k, v in layers.shared.items() if k in changed}
        return layers._replace(stacked=layers.stacked | stacked, shared=layers.shared | shared)

    def finish(self, layers: _Layers) -> optax.OptState:
        """The state of all layers."""
        return self._unflatten(layers.shared | layers.stacked)

    def _unflatten(self, leaves: dict[str, jax.Array]) -> optax.OptState:
        return jax.tree_util.tree_unflatten(self._tree, [leaves[name] for name in self._names])


def _neutral(x: jax.Array) -> jax.Array:
    """What `_combined` passes over."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    if x.dtype == bool:
        return jnp.ones_like(x)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.full_like(x, -jnp.inf if is_float else jnp.iinfo(x.dtype).min)


# ------------------------------------------------------------------------------- the train step


def make_layerwise_train_step(
    config: llama.LlamaConfig,
    tx: optax.GradientTransformation,
    *,
    side: Side = "shorter",
    grad_clipping: float = 0.0,
) -> TrainStep:
    """Builds a jitted train step that updates layer by layer; see this module's description.

    Same losses and weights as `osd_jax.train.make_train_step` with `remat`: to rounding with one
    micro-batch, clipped or not; with several, as that step with `accumulate="sketches"`.

    Where the step does not wait, a gradient that is not finite in one layer skips that layer and
    those before it, while those after it have moved; one whose loss is not finite skips all.

    Args:
      config: The model's shape.
      tx: From `make_optimizer`, with `llama.dimension_numbers`; or any that treats each layer on
        its own.
      side: The side that its projectors act on.
      grad_clipping: Largest norm; 0 does not clip. Of the whole gradient with one micro-batch, of
        what is applied with several (`osd_jax.accumulation.squared_norm_held`).

    Returns:
      As `make_train_step`: a function (state, batch, measure) -> (state, metrics). Its first call
      raises ValueError where the optimizer cannot be taken layer by layer.

    Example:
      >>> import jax, osd_jax
      >>> from osd_jax import llama
      >>> from osd_jax.train import init_state
      >>> config = llama.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24,
      ...                            num_hidden_layers=2, num_attention_heads=2)
      >>> tx = osd_jax.make_optimizer(
      ...     "galore_adamw", "continuous", learning_rate=0.01, rank=4,
      ...     select=llama.is_projected, dimension_numbers=llama.dimension_numbers)
      >>> step = osd_jax.make_layerwise_train_step(config, tx)
      >>> state = init_state(llama.init(config, 0), tx)
      >>> tokens = jax.random.randint(jax.random.key(0), (1, 2, 8), 0, 64)
      >>> state, metrics = step(state, {"tokens": tokens, "mask": tokens >= 0}, False)
      >>> round(float(metrics["loss"]), 1)
      4.2
    """
    parted = tx if isinstance(tx, SubspaceTransformation) else in_parts(tx, None)

    def forward(params: optax.Params, micro: Batch) -> Forward:
        """The layers' inputs, and the gradients of all that follows them, for the mean loss."""
        tokens, mask = micro["tokens"], micro["mask"]
        count = jnp.maximum(_count(micro), 1)
        place = llama.positions(config, tokens.shape[1])

        def layer(x: jax.Array, weights: optax.Params) -> tuple[jax.Array, jax.Array]:
            return llama.layer(weights, config, x, *place), x

        def top(params: optax.Params, x: jax.Array) -> jax.Array:
            return llama.loss_of_output(params, config, x, tokens, mask)[0]

        x, inputs = jax.lax.scan(layer, llama.embed(params["embedding"], tokens), params["layers"])
        outer = {name: x for name, x in params.items() if name != "layers"}
        loss, pullback = jax.vjp(top, outer, x)
        return Forward(loss, inputs, *pullback(_inverse(loss, count)))

    def backward(layers: _Layers, run: Forward, tokens: jax.Array, visit: Visit) -> Any:
        """Gives each layer's gradient to `visit`, and adds that of the embedding to `run`'s."""
        place = llama.positions(config, tokens.shape[1])

        def one(carry: Any, index_and_input: Any) -> Any:
            (layers, gradient), (index, x) = carry, index_and_input
            weights = _first(_take(layers.weights["layers"], index))
            pullback = jax.vjp(lambda w, x: llama.layer(w, config, x, *place), weights, x)[1]
            grads, gradient = pullback(gradient)
            layers, found = visit(layers, index, {"layers": jax.tree.map(lambda g: g[None], grads)})
            return (layers, gradient), found

        indices = jnp.arange(config.num_hidden_layers)
        (layers, gradient), found = jax.lax.scan(
            one, (layers, run.gradient), (indices, run.inputs), reverse=True
        )
        embedding = run.outer["embedding"]
        embedding += jnp.zeros_like(embedding).at[tokens].add(gradient.astype(embedding.dtype))
        return layers, run.outer | {"embedding": embedding}, found

    def at_once(state: TrainState, micro: Batch, measure: jax.Array) -> Any:
        """One micro-batch, not clipped: each layer moves within the backward pass."""
        optimizer = _LayerOptimizer(tx, state.params, state.opt_state)

        def step(part: optax.Params, grads: optax.Params, part_state: optax.OptState) -> Any:
            updates, part_state = tx.update(grads, part_state, part)
            return optax.apply_updates(part, updates), part_state

        def visit(layers: _Layers, index: jax.Array, grads: optax.Params) -> Any:
            old, weights = optimizer.state(layers, index), _take(layers.weights, index)
            weights, new = step(weights, grads, old)
            layers = optimizer.store(layers, index, old, new)
            layers = layers._replace(weights=_put(layers.weights, weights, index))
            return layers, (_squared_norm(grads), measured(measure, grads, old, side))

        run = forward(state.params, micro)
        layers, outer_grads, (squares, found) = backward(
            optimizer.start, run, micro["tokens"], visit
        )
        parts = [optimizer.finish(layers)]
        outer: optax.Params = {}
        for name, grads in outer_grads.items():
            part = {name: state.params[name]}
            part_state = state_of_part(tx, part, state.opt_state)
            part, part_state = step(part, {name: grads}, part_state)
            parts.append(part_state)
            outer |= part
        opt_state = state_of_parts(state.opt_state, parts)
        norm = jnp.sqrt(jnp.sum(squares) + _squared_norm(outer_grads))
        return layers.weights | outer, opt_state, run.loss / _count(micro), norm, found

    def after_all(state: TrainState, batch: Batch, measure: jax.Array) -> Any:
        """Micro-batches or clipping: sketches are held, and the layers move when all is known."""
        check_sketch_suffices(parted)
        optimizer = _LayerOptimizer(parted, state.params, state.opt_state)
        outer = {name: x for name, x in state.params.items() if name != "layers"}
        outer_state = state_of_part(parted, outer, state.opt_state)
        stacked = optimizer.start.weights
        layers = optimizer.start._replace(
            held=nothing_held(parted, stacked, state_of_part(parted, stacked, state.opt_state))
        )
        total = _count(batch)

        def one(carry: Any, number_and_micro: Any) -> Any:
            layers, outer_held, outer_state = carry
            number, micro = number_and_micro
            is_first, count = number == 0, _count(micro)

            def visit(layers: _Layers, index: jax.Array, grads: optax.Params) -> Any:
                old = optimizer.state(layers, index)
                new = parted.refresh(grads, old, is_first)
                layers = optimizer.store(layers, index, old, new)
                held = _take(layers.held, index)
                held = hold(held, parted.project(grads, new), count / total)
                layers = layers._replace(held=_put(layers.held, held, index))
                return layers, (_squared_norm(grads), measured(measure, grads, old, side))

            run = forward(state.params, micro)
            layers, grads, (squares, found) = backward(layers, run, micro["tokens"], visit)
            outer_state = parted.refresh(grads, outer_state, is_first)
            outer_held = hold(outer_held, parted.project(grads, outer_state), count / total)
            squares = jnp.sum(squares) + _squared_norm(grads)
            return (layers, outer_held, outer_state), (run.loss, squares, found)

        outer_held = nothing_held(parted, outer, outer_state)
        micro_batches = batch["tokens"].shape[0]
        (layers, outer_held, outer_state), (losses, squares, found) = jax.lax.scan(
            one, (layers, outer_held, outer_state), (jnp.arange(micro_batches), batch)
        )
        held = (layers.held, outer_held)
        norm = jnp.sqrt(squares[0] if micro_batches == 1 else squared_norm_held(held))
        factor = jnp.where(all_finite(held), clipping_factor(norm, grad_clipping), jnp.nan)

        def apply(layers: _Layers, index: jax.Array) -> tuple[_Layers, None]:
            old, weights = optimizer.state(layers, index), _take(layers.weights, index)
            held = scaled(_take(layers.held, index), factor)
            updates, new = parted.apply(held, old, weights)
            weights = optax.apply_updates(weights, updates)
            layers = optimizer.store(layers, index, old, new)
            return layers._replace(weights=_put(layers.weights, weights, index)), None

        layers, _ = jax.lax.scan(apply, layers, jnp.arange(config.num_hidden_layers))
        updates, outer_state = parted.apply(scaled(outer_held, factor), outer_state, outer)
        params = layers.weights | optax.apply_updates(outer, updates)
        opt_state = state_of_parts(state.opt_state, [optimizer.finish(layers), outer_state])
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
        skipped, in_a_row = skipped_steps(opt_state)
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "skipped": skipped,
            "skipped_in_a_row": in_a_row,
            **jax.tree.map(jnp.mean, found),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


class Forward(NamedTuple):
    """What a forward pass leaves for the walk back.

    Attributes:
      loss: The sum of the tokens' losses.
      inputs: Of each layer, (L, B, S, H).
      outer: The gradients of all parameters that are not the layers'; of the embedding, only what
        a tied head has.
      gradient: Of the last layer's output, (B, S, H).
    """

    loss: jax.Array
    inputs: jax.Array
    outer: optax.Params
    gradient: jax.Array


def _count(batch: Batch) -> jax.Array:
    return jnp.sum(llama.is_predicted(batch["tokens"], batch["mask"]), dtype=jnp.int32)


def _inverse(loss: jax.Array, count: jax.Array) -> jax.Array:
    """1 / count, and not finite where the loss is not, so that the optimizer skips the step."""
    return jnp.where(jnp.isfinite(loss), 1 / count, jnp.nan).astype(loss.dtype)


def _squared_norm(grads: optax.Params) -> jax.Array:
    wide = jax.tree.map(lambda g: g.astype(accumulator_dtype(g.dtype)), grads)
    return optax.tree.norm(wide, squared=True)
