"""Layer-by-layer updates: a layer's gradient lives only until its own weights have been updated.

The train step runs the layers forward and stores the input of each layer. Then it iterates over
them in reverse: it recomputes a layer from its input, computes that layer's gradient, passes it to
the optimizer with that layer's slice of the optimizer's state, and writes weights and state back in
place. Only the gradients of one layer are alive, where a plain step holds those of all layers.

With micro-batches or clipping a step must wait for the whole update: a layer's gradient becomes a
sketch, which is held (`osd_jax.accumulation`), and a second pass takes the steps.

An optimizer can be applied layer by layer if it treats each layer independently: without a norm
over all parameters inside it. The state has the arrays of the plain step's, so a checkpoint of
either resumes with the other; on a mesh it is split so that each device has a part of each layer's.

On a mesh, each weight is sharded as in the plain step and all-gathered one layer at a time, before
its products or within them; a layer's gradient is reduced to the shards of its weight before the
next layer's is computed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, PartitionSpec

from osd_jax import llama
from osd_jax.accumulation import (
    check_sketch_suffices,
    hold,
    nothing_held,
    scaled,
    squared_norm_held,
)
from osd_jax.guard import all_finite
from osd_jax.llama.layer_state import (
    Key,
    LayerOptimizer,
    Layers,
    by_key,
    leaves_by_name,
    put,
    state_of_part,
    state_of_parts,
    take,
    with_weights,
)
from osd_jax.llama.partition import add_rows, like_weights, mean_over_data, on, split_batch
from osd_jax.llama.train import (
    Batch,
    Metrics,
    TrainState,
    TrainStep,
    clipping_factor,
    mean_factor,
    measured,
    skipped_metrics,
    train_state_sharding,
)
from osd_jax.numerics import accumulator_dtype
from osd_jax.parts import parted

Visit = Callable[[Layers, jax.Array, dict[Key, jax.Array]], tuple[Layers, Any]]


def make_layerwise_train_step(
    config: llama.LlamaConfig,
    tx: optax.GradientTransformation,
    *,
    grad_clipping: float = 0.0,
    mesh: Mesh | None = None,
    compress_gradients: bool = False,
    offload_inputs: bool = False,
    attention: str = "auto",
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
      mesh: From `make_mesh`, for a state sharded by `train_state_sharding` with `layerwise`, like
        the new state, and batches sharded by `batch_sharding`.
      compress_gradients: Whether a layer's gradients stay on the devices of the mesh's `data` axis
        and their sketches are reduced over it, as in `make_train_step`; here also with several
        micro-batches, whose sketches are reduced one by one.
      offload_inputs: Whether the layers' inputs, B S H numbers each, wait in the host's memory
        between the forward and the backward pass.
      attention: How attention is computed, as in `llama.forward`.

    Returns:
      As `make_train_step`: a function (state, batch, measure) -> (state, metrics). Its first call
      raises ValueError if the optimizer cannot be applied layer by layer.

    Raises:
      ValueError: `compress_gradients` is given without a mesh, or sketches do not suffice for the
        optimizer.

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
    if compress_gradients:
        if mesh is None:
            raise ValueError(
                "compress_gradients reduces sketches over a mesh's data axis: give mesh"
            )
        check_sketch_suffices(parts)
    members = mesh.shape["data"] if mesh is not None and compress_gradients else 1
    reduce = mean_over_data(mesh) if mesh is not None and members > 1 else None

    def optimizer_of(state: TrainState) -> LayerOptimizer:
        """The optimizer of one layer's parameters at a time, before the first layer."""
        layout = None
        if mesh is not None:
            layout = train_state_sharding(tx, state.params, mesh, layerwise=True).opt_state
        return LayerOptimizer(parts, state.params, state.opt_state, layout)

    def total(x: Any) -> Any:
        """The sum over the devices that have gradients of their own."""
        return x if reduce is None else jax.lax.psum(x, "data")

    def tokens_of(batch: Batch) -> jax.Array:
        return total(llama.num_predicted(batch["tokens"], batch["mask"]))

    def forward(params: optax.Params, micro: Batch) -> Forward:
        """The layers' inputs, and the gradients of all that follows them, for the mean loss."""
        tokens, mask = micro["tokens"], micro["mask"]
        place = llama.positions(config, tokens.shape[1], segments=micro.get("segments"))

        def layer(x: jax.Array, weights: optax.Params) -> tuple[jax.Array, jax.Array]:
            kept = jax.device_put(x, jax.memory.Space.Host) if offload_inputs else x
            return llama.layer(weights, config, x, *place, attention), kept

        def top(params: optax.Params, x: jax.Array) -> jax.Array:
            return llama.loss_of_output(params, config, x, tokens, mask)[0]

        x, inputs = jax.lax.scan(layer, llama.embed(params["embedding"], tokens), params["layers"])
        after = {name: params[name] for name in after_layers}
        loss, pullback = jax.vjp(top, after, x)
        factor = members * mean_factor(total(loss), tokens_of(micro))
        grads, gradient = pullback(factor.astype(loss.dtype))
        return Forward(total(loss), inputs, like_weights(grads, mesh), split_batch(gradient))

    def backward(layers: Layers, run: Forward, micro: Batch, visit: Visit) -> Any:
        """Passes each layer's gradients to `visit`.

        Returns:
          The `layers` after all visits, the gradients of all other parameters, and what `visit`
          found.
        """
        tokens = micro["tokens"]
        place = llama.positions(config, tokens.shape[1], segments=micro.get("segments"))

        def one(carry: Any, index_and_input: Any) -> Any:
            (layers, gradient), (index, x) = carry, index_and_input
            if offload_inputs:
                x = jax.device_put(x, jax.memory.Space.Device)
            weights = unflatten_dict({key: take(w, index)[0] for key, w in layers.weights.items()})[
                "layers"
            ]
            again = lambda w, x: llama.layer(w, config, x, *place, attention)
            pullback = jax.vjp(again, weights, x)[1]
            grads, gradient = pullback(gradient)
            grads = {"layers": jax.tree.map(lambda g: g[None], grads)}
            layers, found = visit(layers, index, flatten_dict(like_weights(grads, mesh)))
            return (layers, split_batch(gradient)), found

        indices = jnp.arange(config.num_hidden_layers)
        (layers, gradient), found = jax.lax.scan(
            one, (layers, run.gradient), (indices, run.inputs), reverse=True
        )
        embedding = run.after_layers.get("embedding")
        if embedding is None:
            embedding = jnp.zeros((config.vocab_size, config.hidden_size), gradient.dtype)
        of_embedding = {"embedding": add_rows(embedding, tokens, gradient)}
        return layers, run.after_layers | like_weights(of_embedding, mesh), found

    def at_once(state: TrainState, micro: Batch, measure: jax.Array) -> Any:
        """One micro-batch without clipping: updates each layer within the backward pass."""
        optimizer = optimizer_of(state)

        def step(
            part: optax.Params, grads: optax.Params, part_state: optax.OptState, **extra_args: Any
        ) -> Any:
            """(new weights, their new state, the squared norm of what was applied)."""
            if reduce is None:
                squares = _squared_norm(grads)
                updates, part_state = parts.update(grads, part_state, part, **extra_args)
            else:
                part_state = parts.refresh(grads, part_state, True, reduce)
                sketches = parts.project(grads, part_state, reduce)
                squares = squared_norm_held(sketches)
                updates, part_state = parts.apply(sketches, part_state, part, **extra_args)
            return optax.apply_updates(part, updates), part_state, squares

        def visit(layers: Layers, index: jax.Array, grads: dict[Key, jax.Array]) -> Any:
            found: Metrics = {}
            squares = []
            for key, g in grads.items():
                old = optimizer.state(layers, index, key)
                part = unflatten_dict({key: take(layers.weights[key], index)})
                g = unflatten_dict({key: g})
                found |= measured(measure, g, old, reduce)
                part, new, square = step(part, g, old, layer=index)
                layers = with_weights(optimizer.store(layers, index, old, new), index, part)
                squares.append(square)
            return layers, (sum(squares), found)

        def moved(name: str, gradient: jax.Array) -> tuple[optax.Params, Any, jax.Array]:
            """(new weights, leaves of their state by name, the gradient's squared norm)."""
            part = {name: state.params[name]}
            old = state_of_part(parts, part, state.opt_state)
            part, new, squares = step(part, {name: gradient}, old)
            return part, leaves_by_name(new), squares

        run = forward(state.params, micro)
        outer = [moved(name, g) for name, g in run.after_layers.items() if name != "embedding"]
        # The backward pass waits for these; otherwise the head's gradient would be alive throughout
        # it.
        gradient, outer = jax.lax.optimization_barrier((run.gradient, outer))
        layers, outer_grads, (layer_squares, found) = backward(
            optimizer.start, run._replace(gradient=gradient), micro, visit
        )
        outer.append(moved("embedding", outer_grads["embedding"]))
        moved_weights, states, squares = zip(*outer, strict=True)
        params = functools.reduce(operator.or_, moved_weights, unflatten_dict(layers.weights))
        opt_state = state_of_parts(state.opt_state, [layers.shared | layers.stacked, *states])
        norm = jnp.sqrt(jnp.sum(layer_squares) + sum(squares))
        return params, opt_state, run.loss / tokens_of(micro), norm, found

    def after_all(state: TrainState, batch: Batch, measure: jax.Array) -> Any:
        """Micro-batches or clipping: holds sketches, and updates the layers at the end."""
        check_sketch_suffices(parts)
        optimizer = optimizer_of(state)
        outer = {name: x for name, x in state.params.items() if name != "layers"}
        outer_state = state_of_part(parts, outer, state.opt_state)
        held = nothing_held(parts, state.params, state.opt_state)
        outer_held = {name: held[name] for name in outer}
        layers = optimizer.start._replace(held=by_key({"layers": held["layers"]}))
        tokens = tokens_of(batch)

        def one(carry: Any, number_and_micro: Any) -> Any:
            (layers, outer_held, outer_state), (number, micro) = carry, number_and_micro
            is_first = number == 0
            share = tokens_of(micro) / tokens

            def visit(layers: Layers, index: jax.Array, grads: dict[Key, jax.Array]) -> Any:
                found: Metrics = {}
                squares = _squared_norm(grads)
                for key, g in grads.items():
                    old, g = optimizer.state(layers, index, key), unflatten_dict({key: g})
                    found |= measured(measure, g, old, reduce)
                    new = parts.refresh(g, old, is_first, reduce)
                    layers = optimizer.store(layers, index, old, new)
                    sketch = by_key(parts.project(g, new, reduce))[key]
                    held = hold(take(layers.held[key], index), sketch, share)
                    held = put(layers.held[key], held, index)
                    layers = layers._replace(held=layers.held | {key: held})
                return layers, (squares, found)

            run = forward(state.params, micro)
            layers, grads, (squares, found) = backward(layers, run, micro, visit)
            outer_state = parts.refresh(grads, outer_state, is_first, reduce)
            outer_held = hold(outer_held, parts.project(grads, outer_state, reduce), share)
            squares = jnp.sum(squares) + _squared_norm(grads)
            return (layers, outer_held, outer_state), (run.loss, squares, found)

        micro_batches = batch["tokens"].shape[0]
        (layers, outer_held, outer_state), (losses, squares, found) = jax.lax.scan(
            one, (layers, outer_held, outer_state), (jnp.arange(micro_batches), batch)
        )
        held = (layers.held, outer_held)
        is_whole = micro_batches == 1 and reduce is None
        norm = jnp.sqrt(squares[0] if is_whole else squared_norm_held(held))
        factor = clipping_factor(norm, grad_clipping)
        factor = jnp.where(all_finite(held), factor, jnp.nan)

        def apply(layers: Layers, index: jax.Array) -> tuple[Layers, None]:
            for key, stacked in layers.weights.items():
                old = optimizer.state(layers, index, key)
                part = unflatten_dict({key: take(stacked, index)})
                held = unflatten_dict({key: scaled(take(layers.held[key], index), factor)})
                updates, new = parts.apply(held, old, part, layer=index)
                part = optax.apply_updates(part, updates)
                layers = with_weights(optimizer.store(layers, index, old, new), index, part)
            return layers, None

        layers, _ = jax.lax.scan(apply, layers, jnp.arange(config.num_hidden_layers))
        updates, outer_state = parts.apply(scaled(outer_held, factor), outer_state, outer)
        params = unflatten_dict(layers.weights) | optax.apply_updates(outer, updates)
        states = [layers.shared | layers.stacked, leaves_by_name(outer_state)]
        opt_state = state_of_parts(state.opt_state, states)
        return params, opt_state, jnp.sum(losses) / tokens, norm, found

    def step_of_member(state: TrainState, batch: Batch, measure: jax.Array) -> Any:
        if batch["tokens"].shape[0] == 1 and not grad_clipping:
            return at_once(state, {name: x[0] for name, x in batch.items()}, measure)
        return after_all(state, batch, measure)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState, batch: Mapping[str, jax.Array], measure: jax.Array
    ) -> tuple[TrainState, Metrics]:
        step = step_of_member
        if reduce is not None:
            whole, split = PartitionSpec(), PartitionSpec(None, "data")
            step = jax.shard_map(
                step, mesh=mesh, axis_names={"data"}, in_specs=(whole, split, whole),
                out_specs=whole, check_vma=False,  # gradients stay unreduced
            )  # fmt: skip
        with on(mesh):
            params, opt_state, loss, norm, found = step(state, batch, measure)
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            **skipped_metrics(opt_state),
            **jax.tree.map(jnp.mean, found),
        }
        state = TrainState(state.step + 1, params, opt_state)
        if mesh is not None:
            layout = train_state_sharding(tx, params, mesh, layerwise=True)
            state = jax.lax.with_sharding_constraint(state, layout)
        return state, metrics

    return train_step


class Forward(NamedTuple):
    """The results of a forward pass that the backward pass needs.

    Attributes:
      loss: The sum of the tokens' losses.
      inputs: The input of each layer, (L, B, S, H), on the device or in the host's memory.
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
