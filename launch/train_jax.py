"""Trains a LLaMA with Online Subspace Descent in JAX.

    python -m launch.train_jax --model_config configs/llama_60m.json --batch_size 32 \
        --optimizer galore_adamw --proj_type continuous --rank 128 --lr 0.01 --dataset builtin

Options are checked before anything is loaded; `--help` lists them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from launch.options import Options, UsageError, run_cli, user_errors

if TYPE_CHECKING:
    import numpy as np

    from launch.data import Data, Tokenizer
    from launch.run_log import RunLog
    from osd_jax.checkpoint import Checkpoints, Restored
    from osd_jax.llama import LlamaConfig
    from osd_jax.train import EvalStep, TrainState

MAX_SKIPPED_IN_A_ROW = 10

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    options = Options.parse(argv, prog="python -m launch.train_jax").check()
    if options.per_layer:
        raise UsageError(
            f"--optimizer: {options.optimizer} updates layer by layer, which the JAX side does not "
            f"do yet; use {options.optimizer.removesuffix('_per_layer')}"
        )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("launch").setLevel(logging.INFO)
    # Orbax tells of every file it misses; what matters comes as an exception.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return train(options)


def train(options: Options) -> int:
    """Trains as the options say, from the start or from a checkpoint; returns the exit code."""
    import jax
    import jax.numpy as jnp
    import optax

    import osd_jax
    from launch.data import load_tokenizer, open_data
    from launch.run_log import RunLog
    from osd_jax import llama
    from osd_jax.checkpoint import Checkpoints
    from osd_jax.optimizers import SIDES_BY_PROJ_TYPE
    from osd_jax.train import init_state, learning_rate_schedule, make_eval_step, make_train_step

    # Data and model. All that can be wrong with them shows here, before anything is compiled.
    with user_errors():
        config = llama.LlamaConfig.from_hf_dict({"model_type": "llama", **options.model()})
        weights = hugging_face_weights(options)
        if weights:
            check_alike(weights, llama.LlamaConfig.load(weights / "config.json"), config)
        tokenizer = load_tokenizer(
            options.tokenizer,
            options.dataset,
            options.data_dir,
            options.cache_dir,
            vocab_size=config.vocab_size,
        )
        config = with_special_tokens(config, tokenizer)
        data = open_data(
            options.dataset,
            tokenizer,
            data_dir=options.data_dir,
            cache_dir=options.cache_dir,
            max_length=options.max_length,
            pack=options.pack,
            seed=options.seed,
        )
    batches = data.train(options.batch_size, workers=options.workers)

    # Optimizer and steps.
    schedule = learning_rate_schedule(
        options.scheduler,
        num_training_steps=options.num_training_steps,
        warmup_steps=options.warmup_steps,
        min_lr_ratio=options.min_lr_ratio,
        cycle_length=options.cycle_length,
        restart_warmup_steps=options.restart_warmup_steps or 0,
    )
    with user_errors():
        tx = osd_jax.make_optimizer(
            options.optimizer,
            options.proj_type,
            learning_rate=options.lr,
            schedule=schedule,
            rank=options.rank,
            update_proj_gap=options.update_proj_gap,
            scale=options.galore_scale,
            weight_decay=options.weight_decay,
            beta1=options.beta1 or None,
            select=llama.is_projected,
            dimension_numbers=llama.dimension_numbers,
            seed=options.seed,
            penalty=options.penalty,
            projector_lr_multiple=options.projector_lr_multiple,
            projector_weight_decay=options.projector_weight_decay,
            lion_sign=options.lion_sign,
            move_projector=options.move_projector,
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

    if options.overwrite:
        remove_run(options)
    like = jax.eval_shape(lambda: fresh(llama.init(config, options.seed)))
    with user_errors():
        source, steps = checkpoints_to_read(options)
        if steps:
            start, (state, extra) = restore_newest(source, steps, like)
            batches.set_state(extra["data"])
        else:
            start, params = 0, llama.load_hf(weights)[1] if weights else None
    if not steps:
        state = fresh(params or llama.init(config, options.seed))
    if start > options.num_training_steps:
        raise UsageError(
            f"--num_training_steps: {options.num_training_steps} is less than the {start} updates "
            f"that {source.directory} has done; raise it"
        )
    checkpoints = Checkpoints(options.save_path / "checkpoints", options.keep)
    checkpoints.remove_after(start)  # damaged ones, or younger than the one that was asked for

    micro_batches = stacked(batches, options.gradient_accumulation)
    with StopSignal() as stop, RunLog(options, resume_step=start or None) as log, checkpoints:
        log.note(describe(options, config, state, start))

        def save(step: int) -> None:
            checkpoints.save(step, state, {"data": batches.get_state()})

        def evaluate(step: int) -> float:
            loss = validation_loss(eval_step, state.params, data, options)
            log.eval(step, step * options.tokens_per_update, loss=loss)
            return loss

        due = start % options.eval_every == 0 and 0 < start < options.num_training_steps
        if due and not log.has("eval", start):  # a stop does not wait for an evaluation
            evaluate(start)
        failed = stopped = False
        step = start
        while step < options.num_training_steps and not (failed or stopped):
            step += 1
            is_last = step == options.num_training_steps
            is_eval = step % options.eval_every == 0 or is_last
            # P is set at the first step, so there is nothing to measure before the second.
            measure = jnp.asarray(is_eval and step > 1)
            state, metrics = train_step(state, next(micro_batches), measure)
            if step % options.log_every == 0 or is_eval:
                metrics = jax.device_get(metrics)
                failed = metrics["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW
                # What was not measured is NaN, and left out.
                known = {k: v for k, v in metrics.items() if k == "loss" or v == v}
                # An update that was skipped does not count in the schedule.
                rate = options.lr * float(schedule(step - 1 - metrics["skipped"]))
                log.train(step, step * options.tokens_per_update, **known, learning_rate=rate)
            stopped = stop.asked and not is_last
            if is_eval and not (is_last or failed or stopped):
                evaluate(step)
            if step % options.save_every == 0 or is_last or failed or stopped:
                save(step)
        checkpoints.wait()
        if failed:
            log.note(
                f"stopped at step {step}: the last {metrics['skipped_in_a_row']} updates were "
                "skipped, since their loss or gradient is not finite. The last good state is "
                f"saved in {checkpoints.directory}; lower --lr, or set --grad_clipping"
            )
            return 1
        if stopped:
            log.note(f"stopped at step {step}; go on with the same command and --resume")
            return 0
        finish(options, config, state.params, data, tokenizer, evaluate(step), log)
    return 0


def finish(
    options: Options,
    config: LlamaConfig,
    params: Any,
    data: Data,
    tokenizer: Tokenizer,
    loss: float,
    log: RunLog,
) -> None:
    """Writes the model, a sample of its text, and how it compares to token frequencies alone."""
    from osd_jax import llama

    unigram = data.unigram_perplexity()
    text = sample_of_text(options, config, params, tokenizer)
    log.write(
        "final",
        options.num_training_steps,
        options.num_training_steps * options.tokens_per_update,
        loss=loss,
        unigram_perplexity=unigram,
        sample=text,
    )
    directory = options.save_path / "model"
    tokenizer.save(directory)
    llama.save_hf(directory, config, params)  # its config.json comes last and says: complete
    log.note(
        f"\nValidation perplexity {math.exp(loss):,.1f}; from token frequencies alone it would be "
        f"{unigram:,.1f}."
    )
    if text is not None:
        log.note(f"A sample of its text:\n\n    {text}\n")
    log.note(f"The model is in {directory}, in Hugging Face's format.")


def sample_of_text(
    options: Options, config: LlamaConfig, params: Any, tokenizer: Tokenizer
) -> str | None:
    """The prompt as the model goes on with it; None where there is nothing to go on with."""
    from launch.data.tokenizer import NoTokenizer
    from osd_jax.train import sample

    if not options.sample_tokens or isinstance(tokenizer, NoTokenizer):
        return None
    prompt = tokenizer.encode_batch([options.prompt])[0]
    if not len(prompt):
        return None
    length = min(options.max_length, len(prompt) + options.sample_tokens)
    return tokenizer.decode(sample(params, config, prompt, length=length, seed=options.seed))


def validation_loss(eval_step: EvalStep, params: Any, data: Data, options: Options) -> float:
    """Mean loss over the held-out tokens, at most `eval_tokens` of them, in nats."""
    total, count, seen = 0.0, 0, 0
    for batch in data.validation(options.batch_size):
        loss, tokens = eval_step(params, batch)
        total, count = total + float(loss), count + int(tokens)
        seen += batch["tokens"].size
        if seen >= options.eval_tokens:
            break
    return total / count


def stacked(batches: Any, micro_batches: int) -> Iterator[Mapping[str, np.ndarray]]:
    """Batches (B, S) joined to (K, B, S), the micro-batches of an update."""
    import numpy as np

    while True:
        parts = [next(batches) for _ in range(micro_batches)]
        yield {name: np.stack([part[name] for part in parts]) for name in parts[0]}


class StopSignal:
    """Turns SIGTERM and the first SIGINT into a flag, so that the run ends with a checkpoint."""

    def __enter__(self) -> Self:
        self.asked = False
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, signal.default_int_handler)
        print("\nstopping after this update, with a checkpoint", file=sys.stderr)


def hugging_face_weights(options: Options) -> Path | None:
    """The Hugging Face directory that `--continue_from` names, if it names one.

    Raises:
        UsageError: it is this run's own model, whose place in the run is gone.
    """
    directory = Path(options.continue_from) if options.continue_from else None
    if directory is None or not (directory / "config.json").is_file():
        return None
    if options.continues_itself:
        raise UsageError(
            f"--continue_from: {directory} is this run's own model, with weights only; go on with "
            "the run by --resume, or train the model further under another --name"
        )
    return directory


def check_alike(directory: Path, found: LlamaConfig, wanted: LlamaConfig) -> None:
    """Refuses weights that are of another model than `--model_config` describes.

    Raises:
        UsageError: two configs differ in what the weights or the computation depend on.
    """
    for field in dataclasses.fields(wanted):
        old, new = getattr(found, field.name), getattr(wanted, field.name)
        free = ("max_position_embeddings", "initializer_range")
        if old != new and field.name not in free and not field.name.endswith("_token_id"):
            raise UsageError(
                f"--continue_from: {directory} holds another model: its {field.name} is {old}, and "
                f"--model_config has {new}; give its own config.json as --model_config"
            )


def with_special_tokens(config: LlamaConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """The config with the tokenizer's ids: the published ones are those of another tokenizer."""
    from launch.data.tokenizer import NoTokenizer

    if isinstance(tokenizer, NoTokenizer):
        return config
    return dataclasses.replace(
        config,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )


def checkpoints_to_read(options: Options) -> tuple[Checkpoints, list[int]]:
    """Where to restore from, and the steps to try in turn; no steps: start from the beginning.

    `--continue_from` names a run, its directory of checkpoints, or one checkpoint.

    Raises:
        UsageError: it names nothing of these, nor a Hugging Face model.
    """
    from osd_jax.checkpoint import Checkpoints

    if options.continue_from is None or hugging_face_weights(options):
        source = Checkpoints(options.save_path / "checkpoints")
        return source, source.steps()
    directory = Path(options.continue_from)
    if directory.name.isdigit():
        source, step = Checkpoints(directory.parent), int(directory.name)
        steps = [step] if step in source.steps() else []
    else:
        inside = directory / "checkpoints"
        source = Checkpoints(inside if inside.is_dir() else directory)
        steps = source.steps()
    if not steps:
        raise UsageError(
            f"--continue_from: {directory} has no complete checkpoint, and no config.json of a "
            "Hugging Face model; give the directory of a run, of a checkpoint or of a model"
        )
    return source, steps


def restore_newest(
    source: Checkpoints, steps: Sequence[int], like: TrainState
) -> tuple[int, Restored]:
    """The first of `steps` that can be read, and what it holds.

    Raises:
        UsageError: all are damaged.
        ValueError: it is of another model or optimizer.
    """
    for step in steps:
        try:
            return step, source.restore(step, like)
        except OSError as error:
            logger.warning("%s; passed over", error)
    raise UsageError(
        f"no checkpoint in {source.directory} can be read; start anew with --overwrite or under "
        "another --name"
    )


def remove_run(options: Options) -> None:
    """Deletes what an earlier run left: its checkpoints and its model."""
    for name in ("checkpoints", "model"):
        shutil.rmtree(options.save_path / name, ignore_errors=True)


def describe(options: Options, config: Any, state: Any, step: int) -> str:
    """What is about to run, in a few lines."""
    import jax

    from osd_jax import llama

    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree)) / 2**20
    start = f"going on from step {step:,}" if step else "from the start"
    return (
        f"{Path(options.model_config).stem}: {llama.num_parameters(config) / 1e6:.1f} M parameters "
        f"({state.params['embedding'].dtype}) on {jax.devices()[0].device_kind}, {start}\n"
        f"{options.optimizer}, {options.proj_type}, rank {options.rank}: optimizer state "
        f"{size(state.opt_state):,.1f} MiB, weights {size(state.params):,.1f} MiB\n"
        f"{options.num_training_steps:,} updates of {options.tokens_per_update:,} tokens; the run "
        f"is kept in {options.path}"
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
