"""Trains a LLaMA with Online Subspace Descent in JAX, on all devices of one process or several.

    python -m launch.train_jax --model_config configs/llama_60m.json --batch_size 32 \
        --optimizer galore_adamw --proj_type continuous --rank 128 --lr 0.01 --dataset builtin

`--mesh` says how the devices share the work, and `launch/hosts.py` how processes meet. Options are
checked before anything is loaded; `--help` lists them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from launch import hosts, training
from launch.cpu import keep_lapack_to_one_thread, keep_memory
from launch.trainer.cli import UsageError, run_cli
from launch.trainer.options import Options

if TYPE_CHECKING:
    import optax
    from jax.sharding import Mesh

    from osd_jax.llama import LlamaConfig
    from osd_jax.llama.train import TrainState, TrainStep
    from osd_jax.rules import Schedule

T = TypeVar("T")

# Numbers of an 8-bit array that a layer-by-layer step reads back at once: a sixteenth of the 7B
# model's embedding, the largest array there.
SLICE_SIZE = 2**23


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    options = Options.parse(argv, prog="python -m launch.train_jax")
    keep_lapack_to_one_thread()
    with hosts.joined(options) as processes:
        with processes.together():
            options = options.check(processes=processes.count)
            refuse_torch_only(options)
        hosts.check_same(options, processes)
        training.set_up_logging(shows=processes.is_first)
        # Orbax tells of every file it misses; what matters comes as an exception.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        return train(options, processes)


def refuse_torch_only(options: Options) -> None:
    """Refuses what only the PyTorch trainer does, with the reason.

    Raises:
        UsageError: such an option is given.
    """
    reasons = {
        "compile": "the JAX side compiles always",
        "timeout_minutes": "the JAX side has a time of its own, in launch/hosts.py",
    }
    for name, reason in reasons.items():
        if options.is_given(name):
            raise UsageError(f"--{name}: {reason}; leave it out, or use launch.train_torch")


def train(options: Options, processes: hosts.Processes) -> int:
    """Trains as the options say, from the start or from a checkpoint; returns the exit code."""
    import jax
    import numpy as np

    from launch.data import is_exact, reshard
    from launch.run_log import RunLog
    from osd_jax import llama
    from osd_jax.llama.checkpoint import Checkpoints, Restored, gathered
    from osd_jax.llama.partition import on
    from osd_jax.llama.train import (
        init_state,
        learning_rate_schedule,
        make_eval_step,
        sample,
        train_state_sharding,
    )

    # Devices, data and model. All that can be wrong with them shows here, before anything is
    # compiled.
    with processes.together():
        mesh = hosts.make_mesh(options, processes)
        refuse_layers_on(mesh, options)
    if jax.default_backend() == "cpu":
        keep_memory()
    with processes.together(in_turn=True):
        config = llama.LlamaConfig.from_hf_dict({"model_type": "llama", **options.model.config()})
        weights = training.hugging_face_weights(options)
        if weights:
            found = llama.LlamaConfig.load(weights / "config.json")
            training.check_alike(weights, dataclasses.asdict(found), dataclasses.asdict(config))
            if not training.goes_on(options):
                llama.weight_files(weights)  # refuses a folder without them before any work
        tokenizer, data = training.open_text(options, config.vocab_size)
        config = dataclasses.replace(config, **training.special_tokens(tokenizer))
    process = (processes.index, processes.count)
    batches = data.train(options.data.batch_size, *process, workers=options.data.workers)

    # Optimizer and steps.
    schedule = learning_rate_schedule(
        options.optimizer.scheduler, **training.schedule_options(options)
    )
    with processes.together():
        tx, train_step = make_step(options, config, schedule, mesh)
    eval_step = make_eval_step(config)

    # The state to start from: a checkpoint, Hugging Face weights, or fresh ones. On a mesh it is
    # made in parts, and never whole on one device.
    dtype = weights_dtype(options, jax.default_backend())

    def fresh(params: optax.Params) -> TrainState:
        """The state before the first update."""
        return init_state(jax.tree.map(lambda x: x.astype(dtype), params), tx, mesh)

    like = jax.eval_shape(lambda: fresh(llama.init(config, options.run.seed)))
    layout = None
    if mesh:
        layout = train_state_sharding(tx, like.params, mesh)
        like = jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), like, layout
        )
    start, note = 0, None
    with processes.together():
        source, steps = training.checkpoints_to_read(options, Checkpoints, "train_jax")
        if steps:

            def restore(step: int) -> Restored:
                return read_together(processes, lambda: source.restore(step, like))

            start, state, places = training.restore_newest(
                options, source.directory, steps, restore
            )
            batches.set_state(reshard(places, processes.count)[processes.index])
            training.check_not_beyond(options, start, source.directory)
            if not is_exact(places, processes.count):
                note = training.skipped_documents(len(places), processes.count)
        elif weights:
            state = fresh(llama.load_hf(weights, layout and layout.params)[1])
    if not (steps or weights):
        init = jax.jit(llama.init, static_argnums=0, out_shardings=layout and layout.params)
        state = fresh(init(config, options.run.seed))
    micro_batches = training.stacked(batches, options.data.gradient_accumulation)
    with (
        contextlib.ExitStack() as held,
        training.StopSignal(shows=processes.is_first) as stop,
    ):
        with processes.together():
            if processes.is_first:
                held.enter_context(training.claimed(options))
        about = describe(options, config, state, mesh, processes, start)
        log = held.enter_context(
            RunLog(options, resume_step=start or None, active=processes.is_first)
        )
        checkpoints = Checkpoints(options.run.save_path / "checkpoints", options.run.keep)
        checkpoints.set_aside_after(start)  # damaged, or younger than the one that was asked for
        log.note(about)
        if note:
            log.note(note)

        def update(measure: bool) -> dict[str, Any]:
            nonlocal state
            batch = hosts.global_batch(mesh, next(micro_batches))
            state, metrics = train_step(state, batch, np.asarray(measure))
            return jax.device_get(metrics)

        def evaluate(batch: training.Batch) -> tuple[Any, Any]:
            with on(mesh):
                return eval_step(state.params, hosts.global_batch(mesh, batch))

        def save(step: int) -> None:
            places = processes.gathered(batches.get_state())
            checkpoints.save(step, state, training.extra(options, places))

        def save_model(directory: Path) -> None:
            if (whole := gathered(state.params)) is not None:
                llama.save_hf(directory, config, whole)

        trainer = training.Trainer(
            update=update,
            eval_step=evaluate,
            save=save,
            sample=lambda prompt, length: sample(
                state.params, config, prompt, length=length, seed=options.run.seed
            ),
            save_model=save_model,
            process=process,
            any_process=processes.any,
        )
        run = (options, data, tokenizer, log, checkpoints, trainer)
        with checkpoints:
            return training.train(*run, start=start, schedule=schedule, stop=stop)


def refuse_layers_on(mesh: Mesh | None, options: Options) -> None:
    """Refuses layer-by-layer updates on several devices.

    Raises:
        UsageError: they are asked for.
    """
    if mesh and options.devices.per_layer:
        raise UsageError(
            f"--per_layer: in JAX layers are updated one by one on one device, and there are "
            f"{mesh.size}; add --single_gpu, or share the state out by --fsdp in place of it"
        )


def make_step(
    options: Options, config: LlamaConfig, schedule: Schedule, mesh: Mesh | None
) -> tuple[optax.GradientTransformation, TrainStep]:
    """The optimizer and the jitted train step that the options ask for.

    Args:
        options: Checked options.
        config: The model's shape.
        schedule: (step, from 0) -> factor on the learning rate.
        mesh: From `hosts.make_mesh`.

    Raises:
        ValueError: for options that do not go together.
    """
    import jax

    import osd_jax
    from osd_jax import llama
    from osd_jax.llama.layerwise import make_layerwise_train_step
    from osd_jax.llama.train import make_train_step
    from osd_jax.trees import paths_by_name

    weights = jax.eval_shape(lambda: llama.init(config, options.run.seed))
    training.check_words(options.optimizer.no_decay, paths_by_name(weights))
    tx = osd_jax.make_optimizer(
        options.optimizer.base,
        options.subspace.proj_type,
        learning_rate=options.optimizer.lr,
        schedule=schedule,
        select=llama.is_projected,
        dimension_numbers=llama.dimension_numbers,
        basis_dtype=options.subspace.basis_dtype,
        ns_dtype=options.optimizer.ns_dtype,
        projector_init=options.subspace.projector_init,
        slice_size=SLICE_SIZE if options.devices.per_layer else None,
        **training.optimizer_options(options),
    )
    clipping = options.optimizer.grad_clipping
    if options.devices.per_layer:
        return tx, make_layerwise_train_step(config, tx, grad_clipping=clipping)
    return tx, make_train_step(
        config,
        tx,
        grad_clipping=clipping,
        remat=options.model.activation_checkpointing,
        accumulate="sketches" if options.devices.accumulate_sketches else "gradients",
        mesh=mesh,
        compress_gradients=options.devices.compress_gradients,
    )


def weights_dtype(options: Options, backend: str) -> str:
    """Of weights and activations on a backend, as `jax.default_backend` names it."""
    return options.model.dtype or ("float32" if backend == "cpu" else "bfloat16")


def read_together(processes: hosts.Processes, read: Callable[[], T]) -> T:
    """What every process can read; where one finds damage, all do.

    Raises:
        OSError: on all of them.
    """
    found: list[T] = []
    damage = None
    try:
        found.append(read())
    except OSError as error:
        damage = str(error)
    for message in processes.gathered(damage):
        if message is not None:
            raise OSError(message)
    return found[0]


def describe(
    options: Options,
    config: LlamaConfig,
    state: TrainState,
    mesh: Mesh | None,
    processes: hosts.Processes,
    step: int,
) -> str:
    """What is about to run, in a few lines."""
    import jax

    from osd_jax import llama

    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    device = jax.devices()[0].device_kind
    if mesh:
        device = f"{mesh.size} x {device} ({hosts.mesh_text(mesh)})"
    if processes.count > 1:
        device += f" in {processes.count} processes"
    return training.describe(
        options,
        parameters=llama.num_parameters(config),
        dtype=str(state.params["embedding"].dtype),
        device=device,
        state_bytes=size(state.opt_state),
        weight_bytes=size(state.params),
        bytes_on_each=on_one if mesh else None,
        step=step,
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
