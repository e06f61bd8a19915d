"""The loop over updates: it logs, evaluates and saves, and ends early where it has to.

Nothing here knows of JAX or PyTorch. A trainer hands in what is its own as functions: one update,
an evaluation, a save.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from launch.trainer.finish import finish
from launch.trainer.options import Options
from launch.trainer.processes import Processes

if TYPE_CHECKING:
    import numpy as np

    from launch.data import Data, Tokenizer
    from launch.trainer.run_log import RunLog

MAX_SKIPPED_IN_A_ROW = 10
STOPPED = 130
"""The exit code of a run that was asked to stop: what follows it in a script must not run."""

Batch = Mapping[str, Any]  # "tokens" int32 and "mask" bool, NumPy
Metrics = Mapping[str, Any]  # name -> number


class Checkpoints(Protocol):
    """What both libraries' `Checkpoints` offer here."""

    @property
    def directory(self) -> Path:
        """Where they are."""

    def steps(self) -> list[int]:
        """The steps of the checkpoints, newest first."""

    def wait(self) -> None:
        """Returns when the last save is complete."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """What is a framework's own in a run.

    Attributes:
        update: Does the next update and returns its metrics. Its argument says whether to measure
            the subspace.
        eval_step: A batch -> the sum of its tokens' losses and their number, over all processes.
        save: Saves a checkpoint after so many updates.
        sample: Continues a prompt, int32 (n,), to so many tokens.
        save_model: Writes the weights and then config.json, which says that the model is complete.
    """

    update: Callable[[bool], Metrics]
    eval_step: Callable[[Batch], tuple[Any, Any]]
    save: Callable[[int], None]
    sample: Callable[[np.ndarray, int], np.ndarray]
    save_model: Callable[[Path], None]


def run_updates(
    options: Options,
    data: Data,
    tokenizer: Tokenizer,
    log: RunLog,
    checkpoints: Checkpoints,
    trainer: Trainer,
    processes: Processes,
    *,
    start: int,
    schedule: Callable[[int], Any],
    stop: StopSignal,
) -> int:
    """Runs the updates that are left; logs, evaluates and saves as the options say.

    Args:
        options: Checked options.
        data: What to train on.
        tokenizer: Of the text.
        log: Of the run. A process whose log is not active takes part, and writes nothing itself.
        checkpoints: Where the trainer saves.
        trainer: What is the framework's own.
        processes: Of the run; what one of them decides, all must know.
        start: Updates done before.
        schedule: The learning rate's factor of an update that counts, from 0.
        stop: Says whether the run is to end after this update.

    Returns:
        The exit code; that of a run that ended early is not 0, and its reason is shown.
    """

    def evaluate(step: int) -> float:
        held_out = data.validation(
            options.data.batch_size, processes.index, processes.count, options.run.eval_tokens
        )
        loss = validation_loss(held_out, trainer.eval_step)
        log.eval(step, step * options.data.tokens_per_update, loss=loss)
        return loss

    due = start % options.run.eval_every == 0 and 0 < start < options.optimizer.num_training_steps
    # A stop does not wait for an evaluation.
    if processes.any(due and log.active and not log.has("eval", start)):
        evaluate(start)
    failed = stopped = False
    step = start
    while step < options.optimizer.num_training_steps and not (failed or stopped):
        step += 1
        is_last = step == options.optimizer.num_training_steps
        is_eval = step % options.run.eval_every == 0 or is_last
        # P is set at the first step, so there is nothing to measure before the second.
        metrics = trainer.update(is_eval and step > 1)
        failed = metrics["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW
        if step % options.run.log_every == 0 or is_eval or failed:
            # What was not measured is NaN, and left out.
            known = {k: v for k, v in metrics.items() if k == "loss" or v == v}
            # Updates that were skipped before this one do not count in the schedule.
            skipped = metrics["skipped"] - (metrics["skipped_in_a_row"] > 0)
            rate = options.optimizer.lr * float(schedule(step - 1 - skipped))
            log.train(step, step * options.data.tokens_per_update, **known, learning_rate=rate)
        stopped = processes.any(stop.asked and not is_last)
        if is_eval and not (is_last or failed or stopped):
            evaluate(step)
        if step % options.run.save_every == 0 or is_last or failed or stopped:
            trainer.save(step)
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
        return STOPPED
    finish(options, data, tokenizer, evaluate(step), log, trainer.sample, trainer.save_model)
    return 0


def validation_loss(
    batches: Iterable[Batch], eval_step: Callable[[Batch], tuple[Any, Any]]
) -> float:
    """Mean loss over the held-out tokens, in nats.

    Args:
        batches: This process's share of the held-out rows.
        eval_step: Sum of the losses of a batch and their number, over all processes.
    """
    total, count = 0.0, 0
    for batch in batches:
        loss, tokens = eval_step(batch)
        total, count = total + float(loss), count + int(tokens)
    return total / count


def stacked(batches: Any, micro_batches: int) -> Iterator[Mapping[str, np.ndarray]]:
    """Batches (B, S) joined to (K, B, S), the micro-batches of an update."""
    import numpy as np

    while True:
        parts = [next(batches) for _ in range(micro_batches)]
        yield {name: np.stack([part[name] for part in parts]) for name in parts[0]}


class StopSignal:
    """Turns SIGTERM and the first SIGINT into a flag, so that the run ends with a checkpoint.

    Args:
        shows: Whether this process says so.
    """

    def __init__(self, shows: bool = True) -> None:
        self._shows = shows

    def __enter__(self) -> Self:
        self.asked = False
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        is_first, self.asked = not self.asked, True
        signal.signal(number, signal.default_int_handler)
        if self._shows and is_first:  # torchrun adds its SIGTERM to a SIGINT
            print("\nstopping after this update, with a checkpoint", file=sys.stderr)
