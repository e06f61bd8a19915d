"""Trains a LLaMA with Online Subspace Descent in JAX.

    python -m launch.train_jax --model_config configs/llama_60m.json --batch_size 32 \
        --optimizer galore_adamw --proj_type continuous --rank 128 --lr 0.01 --dataset builtin

Options are checked before anything is loaded; `--help` lists them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any

from launch import training
from launch.options import Options, UsageError, run_cli, user_errors


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    options = Options.parse(argv, prog="python -m launch.train_jax").check()
    refuse_torch_only(options)
    training.set_up_logging()
    # Orbax tells of every file it misses; what matters comes as an exception.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return train(options)


def refuse_torch_only(options: Options) -> None:
    """Refuses what only the PyTorch trainer does, with the reason.

    Raises:
        UsageError: such an option is given.
    """
    if options.optimizer != options.base_optimizer:
        raise UsageError(
            f"--optimizer: {options.optimizer} updates layer by layer, which the JAX side does not "
            f"do yet; use {options.base_optimizer}"
        )
    reasons = {
        "per_layer": "the JAX side does not update layer by layer yet",
        "fsdp": "the JAX side runs on one device yet",
        "compress_gradients": "the JAX side runs in one process yet, with nothing to reduce",
        "compile": "the JAX side compiles always",
    }
    for name, reason in reasons.items():
        if getattr(options, name):
            raise UsageError(f"--{name}: {reason}; leave it out, or use launch.train_torch")


def train(options: Options) -> int:
    """Trains as the options say, from the start or from a checkpoint; returns the exit code."""
    import jax
    import jax.numpy as jnp
    import optax

    import osd_jax
    from launch.run_log import RunLog
    from osd_jax import llama
    from osd_jax.checkpoint import Checkpoints
    from osd_jax.optimizers import SIDES_BY_PROJ_TYPE
    from osd_jax.train import (
        TrainState,
        init_state,
        learning_rate_schedule,
        make_eval_step,
        make_train_step,
        sample,
    )

    # Data and model. All that can be wrong with them shows here, before anything is compiled.
    with user_errors():
        config = llama.LlamaConfig.from_hf_dict({"model_type": "llama", **options.model()})
        weights = training.hugging_face_weights(options)
        if weights:
            found = llama.LlamaConfig.load(weights / "config.json")
            training.check_alike(weights, dataclasses.asdict(found), dataclasses.asdict(config))
        tokenizer, data = training.open_text(options, config.vocab_size)
        config = dataclasses.replace(config, **training.special_tokens(tokenizer))
    batches = data.train(options.batch_size, workers=options.workers)

    # Optimizer and steps.
    schedule = learning_rate_schedule(options.scheduler, **training.schedule_options(options))
    with user_errors():
        tx = osd_jax.make_optimizer(
            options.optimizer,
            options.proj_type,
            learning_rate=options.lr,
            schedule=schedule,
            select=llama.is_projected,
            dimension_numbers=llama.dimension_numbers,
            **training.optimizer_options(options),
        )
    train_step = make_train_step(
        config,
        tx,
        side=SIDES_BY_PROJ_TYPE[options.proj_type],
        grad_clipping=options.grad_clipping,
        remat=options.activation_checkpointing,
    )
    eval_step = make_eval_step(config)

    # The state to start from: a checkpoint, Hugging Face weights, or fresh ones.
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")

    def fresh(params: optax.Params) -> TrainState:
        return init_state(jax.tree.map(lambda x: x.astype(dtype), params), tx)

    like = jax.eval_shape(lambda: fresh(llama.init(config, options.seed)))
    with user_errors():
        source, steps = training.checkpoints_to_read(options, Checkpoints)
        if steps:
            restore = functools.partial(source.restore, like=like)
            start, state, place = training.restore_newest(options, source.directory, steps, restore)
            batches.set_state(place)
        else:
            start, params = 0, llama.load_hf(weights)[1] if weights else None
    if not steps:
        state = fresh(params or llama.init(config, options.seed))
    training.check_not_beyond(options, start, source.directory)
    micro_batches = training.stacked(batches, options.gradient_accumulation)
    about = describe(options, config, state, start)
    with (
        training.claimed(options),
        training.StopSignal() as stop,
        RunLog(options, resume_step=start or None) as log,
    ):
        checkpoints = Checkpoints(options.save_path / "checkpoints", options.keep)
        checkpoints.set_aside_after(start)  # damaged, or younger than the one that was asked for
        log.note(about)

        def update(measure: bool) -> dict[str, Any]:
            nonlocal state
            state, metrics = train_step(state, next(micro_batches), jnp.asarray(measure))
            return jax.device_get(metrics)

        def save(step: int) -> None:
            checkpoints.save(step, state, training.extra(options, batches.get_state()))

        trainer = training.Trainer(
            update=update,
            eval_step=lambda batch: eval_step(state.params, batch),
            save=save,
            sample=lambda prompt, length: sample(
                state.params, config, prompt, length=length, seed=options.seed
            ),
            save_model=lambda directory: llama.save_hf(directory, config, state.params),
        )
        run = (options, data, tokenizer, log, checkpoints, trainer)
        with checkpoints:
            return training.train(*run, start=start, schedule=schedule, stop=stop)


def describe(options: Options, config: Any, state: Any, step: int) -> str:
    """What is about to run, in a few lines."""
    import jax

    from osd_jax import llama

    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    return training.describe(
        options,
        parameters=llama.num_parameters(config),
        dtype=str(state.params["embedding"].dtype),
        device=jax.devices()[0].device_kind,
        state_bytes=size(state.opt_state),
        weight_bytes=size(state.params),
        step=step,
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
