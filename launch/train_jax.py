"""Trains a LLaMA with Online Subspace Descent in JAX, on all devices of one process or several.

    python -m launch.train_jax --model_config configs/llama_60m.json --batch_size 32 \
        --optimizer galore_adamw --proj_type continuous --rank 128 --lr 0.01 --dataset builtin

`--mesh` determines how devices share the work; `launch/trainer/jax_processes.py` describes how
processes connect. Options are checked before anything is loaded; `--help` lists them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.trainer import description, jax_processes, keywords, resume
from launch.trainer.cli import run_cli, set_up_logging
from launch.trainer.cpu import keep_lapack_to_one_thread, keep_memory
from launch.trainer.directory import claimed
from launch.trainer.jax_step import (
    attention_on,
    make_step,
    refuse_torch_only,
    weights_dtype,
)
from launch.trainer.loop import Batch, StopSignal, Trainer, run_updates, stacked
from launch.trainer.mesh import global_batch, make_mesh, mesh_text
from launch.trainer.options import Options
from launch.trainer.processes import Processes, check_same_options
from launch.trainer.start import (
    check_alike,
    goes_on,
    hugging_face_weights,
    open_text,
    special_tokens,
)

if TYPE_CHECKING:
    import optax
    from jax.sharding import Mesh

    from osd_jax.llama import LlamaConfig
    from osd_jax.llama.train import TrainState


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    options = Options.parse(argv, prog="python -m launch.train_jax")
    keep_lapack_to_one_thread()
    with jax_processes.joined(options) as processes:
        with processes.together():
            options = options.check(processes=processes.count)
            refuse_torch_only(options)
        check_same_options(options, processes)
        set_up_logging(shows=processes.is_first)
        # Orbax logs every missing file; relevant problems arrive as exceptions.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        return train(options, processes)


def train(options: Options, processes: Processes) -> int:
    """Trains by the options, from the start or from a checkpoint; returns the exit code."""
    import jax
    import numpy as np

    from launch.trainer.run_log import RunLog
    from osd_jax import llama
    from osd_jax.llama.checkpoint import Checkpoints, Restored, whole
    from osd_jax.llama.train import (
        init_state,
        learning_rate_schedule,
        make_eval_step,
        sample,
        train_state_sharding,
    )

    # Devices, data and model. Any problem with them is found here, before anything is compiled.
    with processes.together():
        mesh = make_mesh(options, processes.count)
    if jax.default_backend() == "cpu":
        keep_memory()
    with processes.together(in_turn=True):
        config = llama.LlamaConfig.from_hf_dict({"model_type": "llama", **options.model.config()})
        attention = attention_on(jax.default_backend(), options, config)
        weights = hugging_face_weights(options)
        if weights:
            found = llama.LlamaConfig.load(weights / "config.json")
            check_alike(weights, dataclasses.asdict(found), dataclasses.asdict(config))
            if not goes_on(options):
                llama.weight_files(weights)  # raises for a folder without weights, before any work
        tokenizer, data = open_text(options, config.vocab_size)
        config = dataclasses.replace(config, **special_tokens(tokenizer))
    batches = data.train(
        options.data.batch_size, processes.index, processes.count, workers=options.data.workers
    )

    # Optimizer and steps.
    schedule = learning_rate_schedule(
        options.optimizer.scheduler, **keywords.schedule_options(options)
    )
    with processes.together():
        tx, train_step = make_step(options, config, schedule, mesh, attention)
    eval_step = make_eval_step(config, attention, mesh, options.devices.shard_over_data)

    # The initial state: a checkpoint, Hugging Face weights, or new weights. On a mesh it is created
    # sharded, never whole on one device.
    dtype = weights_dtype(options, jax.default_backend())
    layout_options = options.devices.shard_over_data, options.devices.per_layer

    def fresh(params: optax.Params) -> TrainState:
        """The state before the first update."""
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return init_state(params, tx, mesh, *layout_options)

    like = jax.eval_shape(lambda: fresh(llama.init(config, options.run.seed)))
    layout = None
    if mesh:
        layout = train_state_sharding(tx, like.params, mesh, *layout_options)
        like = jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), like, layout
        )
    start, note = 0, None  # number of updates, and a message about them
    with processes.together():
        source, steps = resume.checkpoints_to_read(options, Checkpoints, "train_jax")
        if steps:

            def restore(step: int) -> Restored:
                return processes.read(lambda: source.restore(step, like))

            start, state, note = resume.go_on(
                options, processes, source.directory, steps, restore, batches
            )
        elif weights:
            state = fresh(llama.load_hf(weights, layout and layout.params)[1])
    if not (steps or weights):
        init = jax.jit(llama.init, static_argnums=0, out_shardings=layout and layout.params)
        state = fresh(init(config, options.run.seed))
    micro_batches = stacked(batches, options.data.gradient_accumulation)
    with (
        contextlib.ExitStack() as held,
        StopSignal(shows=processes.is_first) as stop,
    ):
        with processes.together():
            if processes.is_first:
                held.enter_context(claimed(options))
        about = describe(options, config, state, mesh, processes, start)
        log = held.enter_context(
            RunLog(options, resume_step=start or None, active=processes.is_first)
        )
        checkpoints = Checkpoints(options.run.save_path / "checkpoints", options.run.keep)
        checkpoints.set_aside_after(start)  # damaged, or later than the requested one
        log.note(about)
        if note:
            log.note(note)

        def update(measure: bool) -> dict[str, Any]:
            nonlocal state
            batch = global_batch(mesh, next(micro_batches))
            state, metrics = train_step(state, batch, np.asarray(measure))
            return jax.device_get(metrics)

        def evaluate(batch: Batch) -> tuple[Any, Any]:
            return eval_step(state.params, global_batch(mesh, batch))

        def save(step: int) -> None:
            places = processes.gathered(batches.get_state())
            checkpoints.save(step, state, resume.extra(options, places))

        def save_model(directory: Path) -> None:
            if (weights := whole(state.params)) is not None:
                llama.save_hf(directory, config, weights)

        trainer = Trainer(
            update=update,
            eval_step=evaluate,
            save=save,
            sample=lambda prompt, length: sample(
                state.params,
                config,
                prompt,
                length=length,
                seed=options.run.seed,
                mesh=mesh,
                shard_over_data=options.devices.shard_over_data,
            ),
            save_model=save_model,
        )
        run = (options, data, tokenizer, log, checkpoints, trainer, processes)
        with checkpoints:
            return run_updates(*run, start=start, schedule=schedule, stop=stop)


def describe(
    options: Options,
    config: LlamaConfig,
    state: TrainState,
    mesh: Mesh | None,
    processes: Processes,
    step: int,
) -> str:
    """Prints a few lines about the run."""
    import jax

    from osd_jax import llama

    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    device = jax.devices()[0].device_kind
    if mesh:
        device = f"{mesh.size} x {device} ({mesh_text(mesh)})"
    if processes.count > 1:
        device += f" in {processes.count} processes"
    return description.describe(
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
