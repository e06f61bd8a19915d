"""The train step, the eval step, the learning rate schedule, and text sampling.

Each is one jitted function that compiles once per run: what changes between steps (the step number,
whether to measure the subspace) is data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from osd_jax import llama
from osd_jax.accumulation import (
    check_sketch_suffices,
    hold,
    nothing_held,
    scaled,
    squared_norm_held,
)
from osd_jax.diagnostics import projected_paths, subspace_diagnostics
from osd_jax.guard import skipped_steps
from osd_jax.llama.partition import (
    gathered,
    like_weights,
    mean_over_data,
    moved_to_state,
    on,
    scattered,
    shards_over_data,
    specs_by_matrices,
    stored_specs,
)
from osd_jax.numerics import accumulator_dtype
from osd_jax.parts import parted
from osd_jax.sharding import state_sharding
from osd_jax.sketch import Reduce
from osd_jax.trees import path_name

Metrics = dict[str, jax.Array]
ACCUMULATE = ("gradients", "sketches")


class TrainState(NamedTuple):
    """Everything that a train step changes.

    Attributes:
      step: int32 scalar, number of attempted updates, including those with a non-finite gradient,
        which changed nothing.
      params: As from `llama.init`.
      opt_state: State of the optimizer.
    """

    step: jax.Array
    params: optax.Params
    opt_state: optax.OptState


Batch = Mapping[str, Any]  # "tokens", "mask" and, if documents are separate, "segments"
TrainStep = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]
EvalStep = Callable[[optax.Params, Batch], tuple[jax.Array, jax.Array]]


def learning_rate_schedule(
    scheduler: str,
    *,
    num_training_steps: int,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.1,
    cycle_length: int | None = None,
    restart_warmup_steps: int = 0,
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """The learning rate as a fraction of its peak: (step, from 0) -> factor in [0, 1].

    All schedules rise linearly from 0 over `warmup_steps`. As in the release, the cosines end at
    `min_lr_ratio` and "linear" at 0.

    Args:
      scheduler: "linear" or "cosine" decay; "cosine_restarts" is the cosine, reset to 0 every
        `cycle_length` steps, from which it rises linearly over `restart_warmup_steps`.
      num_training_steps: Number of steps of the run.
      warmup_steps: Number of steps of the first warmup.
      min_lr_ratio: The final factor of a cosine.
      cycle_length: Number of steps between restarts; only read for "cosine_restarts".
      restart_warmup_steps: Number of warmup steps after a restart.

    Raises:
      ValueError: The scheduler is unknown, or restarts have no cycle length.

    Example:
      >>> schedule = learning_rate_schedule("cosine", num_training_steps=100, warmup_steps=10)
      >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 55, 100)]
      [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    if scheduler not in ("linear", "cosine", "cosine_restarts"):
        raise ValueError(f"scheduler is {scheduler!r}: expected linear, cosine or cosine_restarts")
    if scheduler == "cosine_restarts" and not cycle_length:
        raise ValueError(f"cycle_length is {cycle_length!r}: cosine_restarts needs at least 1")
    cycle = cycle_length or num_training_steps

    def decay(step: jax.Array) -> jax.Array:
        done = (step - warmup_steps) / max(1, num_training_steps - warmup_steps)
        done = jnp.clip(done, 0, 1)
        if scheduler == "linear":
            return 1 - done
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * done))

    def factor(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count)
        rate = jnp.where(step < warmup_steps, step / max(1, warmup_steps), decay(step))
        if scheduler != "cosine_restarts" or not restart_warmup_steps:
            return rate
        into = step % cycle
        peak = decay(step - into + restart_warmup_steps)
        restarting = (step >= cycle) & (into < restart_warmup_steps)
        return jnp.where(restarting, into / restart_warmup_steps * peak, rate)

    return factor


def init_state(
    params: optax.Params,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    shard_over_data: bool = False,
    layerwise: bool = False,
) -> TrainState:
    """The state before the first step; one compiled call creates the optimizer's arrays.

    Args:
      params: The weights.
      tx: The optimizer.
      mesh: The mesh over which to shard all of it, as in `train_state_sharding`; None: on the
        devices of the weights.
      shard_over_data: See `train_state_sharding`.
      layerwise: See `train_state_sharding`.
    """
    layout = None
    if mesh is not None:
        layout = train_state_sharding(tx, params, mesh, shard_over_data, layerwise)
        params = jax.device_put(params, layout.params)
    start = jax.jit(
        _start,
        static_argnums=0,
        out_shardings=None if layout is None else (layout.step, layout.opt_state),
    )
    step, opt_state = start(tx.init, params)
    return TrainState(step, params, opt_state)


def _start(init: optax.TransformInitFn, params: optax.Params) -> tuple[jax.Array, optax.OptState]:
    """The step and the optimizer's state; JAX finds a program of the same `init` again."""
    return jnp.zeros([], jnp.int32), init(params)


def make_train_step(
    config: llama.LlamaConfig,
    tx: optax.GradientTransformation,
    *,
    grad_clipping: float = 0.0,
    remat: bool = False,
    reshard_after_forward: bool = True,
    accumulate: str = "gradients",
    mesh: Mesh | None = None,
    compress_gradients: bool = False,
    shard_over_data: bool = False,
    attention: str = "auto",
) -> TrainStep:
    """Builds the jitted train step. The state is donated.

    Args:
      config: The model's shape.
      tx: From `make_optimizer`, with `llama.dimension_numbers`.
      grad_clipping: Maximum norm of the whole gradient; 0 does not clip.
      remat: Whether to save only each layer's input for the backward pass.
      reshard_after_forward: Whether weights split over the mesh's `fsdp` axis are gathered a layer
        at a time, in the forward and again in the backward pass. False gathers layers and head once
        per update: a device then holds them whole during both passes, and fewer bytes are sent,
        about those of data parallelism.
      accumulate: What is accumulated over micro-batches: "gradients", exactly, or "sketches" of the
        projected ones, which need (p + q) r numbers per matrix instead of p q; see
        `osd_jax.accumulation`. With several micro-batches of sketches, the clipped norm is that of
        what is applied.
      mesh: From `make_mesh`, for a state sharded by `train_state_sharding`, like the new state, and
        batches sharded by `batch_sharding`.
      compress_gradients: Whether gradients of projected weights stay on the devices of the mesh's
        `data` axis and their sketches are reduced over it: R, then A, exactly. `||G||^2`, which P's
        step size reads, is estimated (`reduced_sketch`), and full gradients are reduced only on the
        steps that set P from them or measure it. The clipped norm, "gradient_norm", is that of what
        is reduced: R of a projected weight, the gradient of any other. No effect if the `data` axis
        has size one.
      shard_over_data: Whether the state is split over the mesh's `data` axis too, as in
        `train_state_sharding` with this option (ZeRO, arXiv 1910.02054). Weights are
        all-gathered over `data` once per update, and gradients are reduce-scattered, so that a
        device sends the bytes of data parallelism's all-reduce. Until then they are whole over
        `data`, over several micro-batches in float32. Each device updates its own shards.
      attention: How attention is computed, as in `llama.forward`.

    Raises:
      ValueError: `accumulate` is unknown, sketches do not suffice for the optimizer,
        `compress_gradients` is given without a mesh or with accumulated sketches, or
        `shard_over_data` without a mesh or with `compress_gradients`.

    Returns:
      A function (state, batch, measure) -> (state, metrics).

      `batch` has "tokens", int32 (K, B, S), and "mask", bool (K, B, S), False for tokens that are
      not labels, such as padding; "segments", int32 (K, B, S), as in `llama.forward`, is optional.
      The model processes the K micro-batches one by one; the gradient is that of the mean loss over
      all their tokens.

      `measure` is a bool: whether to measure the subspace, which costs one more product of each
      gradient.

      `metrics` contains float32 scalars: "loss" (mean over predicted tokens, nats, before the
      update), "gradient_norm" (before clipping), "skipped" and "skipped_in_a_row" (int32, updates
      with a non-finite gradient) and, for measured steps (otherwise NaN), "energy/KIND", the
      fraction of the gradient's squared norm that P captures, and "orthonormality/KIND", `||P^T P -
      I||_F / sqrt(r)`, each a mean over the layers of a kind such as "attention/query".
    """
    if accumulate not in ACCUMULATE:
        raise ValueError(f"accumulate is {accumulate!r}: expected one of {', '.join(ACCUMULATE)}")
    parts = parted(tx)
    if accumulate == "sketches" or compress_gradients:
        check_sketch_suffices(parts)
    if compress_gradients and (mesh is None or accumulate == "sketches"):
        raise ValueError(
            "compress_gradients reduces the sketches of whole gradients over a mesh's data axis: "
            "give mesh, and accumulate='gradients'"
        )
    if shard_over_data and (mesh is None or compress_gradients):
        raise ValueError(
            "shard_over_data splits weights and state over a mesh's data axis: give mesh, and no "
            "compress_gradients, which keeps them whole there"
        )

    def used_weights(params: optax.Params) -> optax.Params:
        """What an update's forward and backward passes read."""
        if shard_over_data:
            params = like_weights(params, mesh)
        if reshard_after_forward:
            return params
        # The embedding stays split: `look_up` moves the tokens' rows, which are fewer bytes.
        return params | gathered({k: x for k, x in params.items() if k != "embedding"}, mesh)

    def gradient(params: optax.Params, micro: Batch) -> Any:
        def total(params: optax.Params) -> tuple[jax.Array, jax.Array]:
            return _batch_loss(params, config, micro, remat=remat, attention=attention)

        (loss, count), grads = jax.value_and_grad(total, has_aux=True)(params)
        return loss, count, like_weights(grads, mesh)

    def accumulated(params: optax.Params, batch: Mapping[str, jax.Array]) -> Any:
        """Sums of loss, tokens and gradients over the micro-batches, the gradients in float32."""
        used = used_weights(params)
        if batch["tokens"].shape[0] == 1:
            return gradient(used, {name: x[0] for name, x in batch.items()})

        def add(sums: Any, micro: Mapping[str, jax.Array]) -> Any:
            loss, count, grads = gradient(used, micro)
            return optax.tree.add(sums, grads), (loss, count)

        zeros = jax.tree.map(lambda x: jnp.zeros_like(_wide(x)), params)
        grads, (losses, counts) = jax.lax.scan(add, zeros, batch)
        return jnp.sum(losses), jnp.sum(counts), grads

    def sharded(params: optax.Params, batch: Batch) -> Any:
        """`accumulated`, with each gradient's shards over `data` on their devices."""
        assert mesh is not None  # checked above
        scatter, specs = shards_over_data(mesh, params)

        def member(params: optax.Params, batch: Batch) -> Any:
            total, count, grads = accumulated(params, batch)
            return *jax.lax.psum((total, count), "data"), scatter(grads)

        whole, split = PartitionSpec(), PartitionSpec(None, "data")
        return jax.shard_map(
            member,
            mesh=mesh,
            axis_names={"data"},
            in_specs=(whole, split),
            out_specs=(whole, whole, specs),
            check_vma=False,  # gradients stay unreduced, and the kernel of attention needs it
        )(scattered(params, mesh, shard_over_data), batch)

    def by_gradients(state: TrainState, batch: Batch, measure: jax.Array) -> Any:
        is_split = mesh is not None and mesh.shape["data"] > 1
        sums = sharded if shard_over_data and is_split else accumulated
        total, count, grads = sums(state.params, batch)
        loss = total / count
        norm = optax.tree.norm(jax.tree.map(_wide, grads)) / count
        factor = mean_factor(loss, count) * clipping_factor(norm, grad_clipping)
        grads = jax.tree.map(lambda g, p: (g * factor).astype(p.dtype), grads, state.params)
        if mesh is not None:  # once, for the update and for the measurement
            names = _projected_names(tx, state.params)
            grads = moved_to_state(grads, names, mesh, shard_over_data)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return loss, norm, updates, opt_state, measured(measure, grads, state.opt_state)

    def by_sketches(state: TrainState, batch: Batch, measure: jax.Array) -> Any:
        assert mesh is not None  # checked above
        mean = mean_over_data(mesh)

        def member(state: TrainState, batch: Batch, measure: jax.Array) -> Any:
            """The computation of one member of the `data` axis, and its reduced results."""
            total, count, grads = accumulated(state.params, batch)
            total, count = jax.lax.psum((total, count), "data")
            loss = total / count
            factor = jax.lax.axis_size("data") * mean_factor(loss, count)
            grads = jax.tree.map(lambda g, p: (g * factor).astype(p.dtype), grads, state.params)
            opt_state = parts.refresh(grads, state.opt_state, reduce=mean)
            sketches = parts.project(grads, opt_state, mean)
            found = measured(measure, grads, state.opt_state, mean)
            return loss, sketches, opt_state, found

        split = PartitionSpec(None, "data")
        loss, sketches, opt_state, found = jax.shard_map(
            member,
            mesh=mesh,
            axis_names={"data"},
            in_specs=(PartitionSpec(), split, PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,  # gradients stay unreduced, and the kernel of attention needs it
        )(state, batch, measure)
        norm = jnp.sqrt(squared_norm_held(sketches))
        sketches = scaled(sketches, clipping_factor(norm, grad_clipping))
        updates, opt_state = parts.apply(sketches, opt_state, state.params)
        return loss, norm, updates, opt_state, found

    def of_micro_batches(state: TrainState, batch: Batch, measure: jax.Array) -> Any:
        """The update from the mean of the micro-batches' sketches."""
        params = state.params
        used = used_weights(scattered(params, mesh, shard_over_data))
        tokens = llama.num_predicted(batch["tokens"], batch["mask"])

        def add(carry: Any, number_and_micro: Any) -> Any:
            (held, opt_state), (number, micro) = carry, number_and_micro
            loss, count, grads = gradient(used, micro)
            factor = mean_factor(loss, count)
            grads = jax.tree.map(lambda g, p: (g * factor).astype(p.dtype), grads, params)
            opt_state = parts.refresh(grads, opt_state, number == 0)
            held = hold(held, parts.project(grads, opt_state), count / tokens)
            return (held, opt_state), (loss, measured(measure, grads, opt_state))

        start = (nothing_held(parts, params, state.opt_state), state.opt_state)
        numbers = jnp.arange(batch["tokens"].shape[0])
        (held, opt_state), (losses, found) = jax.lax.scan(add, start, (numbers, batch))
        norm = jnp.sqrt(squared_norm_held(held))
        held = scaled(held, clipping_factor(norm, grad_clipping))
        updates, opt_state = parts.apply(held, opt_state, params)
        found = jax.tree.map(jnp.mean, found)
        return jnp.sum(losses) / tokens, norm, updates, opt_state, found

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState, batch: Mapping[str, jax.Array], measure: jax.Array
    ) -> tuple[TrainState, Metrics]:
        alone = mesh is None or mesh.shape["data"] == 1
        step = by_sketches if compress_gradients and not alone else by_gradients
        if accumulate == "sketches" and batch["tokens"].shape[0] > 1:
            step = of_micro_batches
        with on(mesh, shard_over_data):
            loss, norm, updates, opt_state, found = step(state, batch, measure)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            **skipped_metrics(opt_state),
            **found,
        }
        state = TrainState(state.step + 1, params, opt_state)
        if mesh is not None:
            layout = train_state_sharding(tx, params, mesh, shard_over_data)
            state = jax.lax.with_sharding_constraint(state, layout)
        return state, metrics

    return train_step


def skipped_metrics(opt_state: optax.OptState) -> Metrics:
    """The train step's "skipped" and "skipped_in_a_row"."""
    total, in_a_row = skipped_steps(opt_state)
    return {"skipped": total, "skipped_in_a_row": in_a_row}


def mean_factor(loss: jax.Array, count: jax.Array) -> jax.Array:
    """1 / count, and non-finite if the loss is, so that the optimizer skips the step.

    A part without tokens has a loss of 0, a gradient of 0, and a factor of 1.
    """
    return jnp.where(jnp.isfinite(loss), 1 / jnp.maximum(count, 1), jnp.nan)


def clipping_factor(norm: jax.Array, max_norm: float) -> jax.Array:
    """The factor that scales a gradient to a norm of at most `max_norm`; 0 does not clip."""
    if not max_norm:
        return jnp.ones_like(norm)
    return jnp.minimum(1, max_norm / jnp.maximum(norm, 1e-30))


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(accumulator_dtype(array.dtype))


def measured(
    measure: jax.Array,
    grads: optax.Updates,
    opt_state: optax.OptState,
    reduce: Reduce | None = None,
) -> Metrics:
    """The subspace's diagnostics by kind of layer, or NaN for each; see `make_train_step`."""

    def real(grads: optax.Updates, opt_state: optax.OptState) -> Metrics:
        grads = grads if reduce is None else jax.tree.map(reduce, grads)
        found = subspace_diagnostics(grads, opt_state, dimension_numbers=llama.dimension_numbers)
        return {
            f"{what}/{name.removeprefix('layers/')}": jnp.mean(value)
            for name, both in found.items()
            for what, value in both._asdict().items()
        }

    def none(grads: optax.Updates, opt_state: optax.OptState) -> Metrics:
        shapes = jax.eval_shape(real, grads, opt_state)
        return {name: jnp.full(x.shape, jnp.nan, x.dtype) for name, x in shapes.items()}

    return jax.lax.cond(measure, real, none, grads, opt_state)


def _batch_loss(
    params: optax.Params, config: llama.LlamaConfig, micro: Batch, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """`llama.loss` of a batch's arrays (B, S); `options` are its keyword arguments."""
    segments = micro.get("segments")
    return llama.loss(params, config, micro["tokens"], micro["mask"], segments=segments, **options)


def make_eval_step(
    config: llama.LlamaConfig,
    attention: str = "auto",
    mesh: Mesh | None = None,
    shard_over_data: bool = False,
) -> EvalStep:
    """Builds the jitted eval step.

    Args:
      config: The model's shape.
      attention: How attention is computed, as in `llama.forward`.
      mesh: From `make_mesh`, for weights sharded by `train_state_sharding`; None: one device.
      shard_over_data: As in `train_state_sharding`.

    Returns:
      A function (params, batch) -> (sum of the tokens' losses in nats, float32; their number,
      int32), for a batch as of `make_train_step`, with arrays (B, S).
    """

    @jax.jit
    def eval_step(
        params: optax.Params, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        with on(mesh):
            params = like_weights(scattered(params, mesh, shard_over_data), mesh)
            return _batch_loss(params, config, batch, attention=attention)

    return eval_step


def sample(
    params: optax.Params,
    config: llama.LlamaConfig,
    prompt: np.ndarray,
    *,
    length: int,
    seed: int = 0,
    temperature: float = 0.8,
    mesh: Mesh | None = None,
    shard_over_data: bool = False,
) -> np.ndarray:
    """Continues a prompt by sampling.

    Args:
      params: The weights.
      config: Their shape.
      prompt: Token ids, at least one.
      length: Total number of tokens, including the prompt.
      seed: Seed of the draws.
      temperature: Divides the logits.
      mesh: As in `make_eval_step`.
      shard_over_data: As in `make_eval_step`.

    Returns:
      int32 (length,), or shorter if the end-of-text token is drawn.
    """
    prompt = np.asarray(prompt, np.int32)[:length]
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=everywhere)
    def write(params: optax.Params, tokens: jax.Array) -> jax.Array:
        def one(position: jax.Array, tokens: jax.Array) -> jax.Array:
            # Of few tokens, on any device and mesh.
            logits = llama.forward(params, config, tokens[None], attention="written_out")
            logits = logits[0, position - 1]
            key = jax.random.fold_in(jax.random.key(seed), position)
            drawn = jax.random.categorical(key, logits.astype(jnp.float32) / temperature)
            return tokens.at[position].set(drawn.astype(tokens.dtype))

        with on(mesh):
            params = like_weights(scattered(params, mesh, shard_over_data), mesh)
            return jax.lax.fori_loop(len(prompt), length, one, tokens)

    tokens = np.asarray(write(params, jnp.zeros(length, jnp.int32).at[: len(prompt)].set(prompt)))
    eos: Any = [] if config.eos_token_id is None else np.ravel(config.eos_token_id)
    ends = np.flatnonzero(np.isin(tokens[len(prompt) :], eos))
    return tokens[: len(prompt) + ends[0]] if ends.size else tokens


def train_state_sharding(
    tx: optax.GradientTransformation,
    params: optax.Params,
    mesh: Mesh,
    shard_over_data: bool = False,
    layerwise: bool = False,
) -> Any:
    """The sharding of a LLaMA's `TrainState` over a mesh from `make_mesh`.

    Args:
      tx: The optimizer.
      params: The weights, or their shapes and dtypes.
      mesh: Their mesh.
      shard_over_data: Whether weights and state are split over the mesh's `data` axis too, as in
        `osd_jax.llama.partition.stored_specs`.
      layerwise: Whether the state is for a layerwise step, which updates one layer at a time on all
        devices. For a plain step, the state of projected weights is split over `fsdp` by layers
        if `fsdp` divides the number of layers: each device then updates whole matrices.

    Returns:
      A `TrainState` of `NamedSharding`. Axes that do not divide are logged; see `partition_specs`.
    """
    specs = stored_specs(params, mesh, shard_over_data)
    step: Any = NamedSharding(mesh, PartitionSpec())
    weights = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    if not layerwise:
        specs = specs_by_matrices(specs, params, _projected_names(tx, params), mesh)
    return TrainState(step, weights, state_sharding(tx, params, specs, mesh))


def _projected_names(tx: optax.GradientTransformation, params: optax.Params) -> set[str]:
    """The names of the parameters that an optimizer projects."""
    return {path_name(path) for path in projected_paths(jax.eval_shape(tx.init, params))}
