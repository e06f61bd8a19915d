"""How a run resumes: which checkpoint it reads, and whether that belongs to this run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from launch.trainer.cli import UsageError
from launch.trainer.files import read_metrics
from launch.trainer.loop import Checkpoints
from launch.trainer.options import Options
from launch.trainer.options.record import check_same_run, read_record
from launch.trainer.processes import Processes, in_words
from launch.trainer.start import hugging_face_weights

if TYPE_CHECKING:
    from launch.data import TrainBatches

WRITES = {"train_jax": "_CHECKPOINT_METADATA", "train_torch": "manifest.json"}
"""A file in every complete checkpoint, by the trainer that writes it."""

logger = logging.getLogger(__name__)

T = TypeVar("T")
C = TypeVar("C", bound=Checkpoints)


def checkpoints_to_read(
    options: Options, open_: Callable[[Path], C], trainer: str
) -> tuple[C, list[int]]:
    """The directory to restore from, and the steps to try in order; no steps: a fresh start.

    `--continue_from` names a run, its directory of checkpoints, or one checkpoint; with `--resume`
    it names where the run started, and the run's own checkpoints take precedence.

    Args:
        options: Checked options.
        open_: Opens a directory of checkpoints for reading.
        trainer: The reading trainer, a key of `WRITES`.

    Raises:
        UsageError: It names none of these, nor a Hugging Face model; the other trainer wrote them;
            or the run to resume has lost them.
    """
    source, steps = _checkpoints_to_read(options, open_)
    for step in steps:
        check_written_by(trainer, source.directory / str(step))
    return source, steps


def _checkpoints_to_read(options: Options, open_: Callable[[Path], C]) -> tuple[C, list[int]]:
    own = open_(options.run.save_path / "checkpoints")
    if options.run.overwrite:
        return own, []
    if options.run.resume and own.steps():
        return own, own.steps()
    if options.run.resume:
        check_not_lost(options)
    if options.model.continue_from is None or hugging_face_weights(options):
        return own, [] if options.model.continue_from else own.steps()
    directory = Path(options.model.continue_from)
    inside = directory / "checkpoints"
    if directory.name.isdigit() and not inside.is_dir():
        source, step = open_(directory.parent), int(directory.name)
        steps = [step] if step in source.steps() else []
    else:
        source = open_(inside if inside.is_dir() else directory)
        steps = source.steps()
    if not steps:
        raise UsageError(
            f"--continue_from: {directory} has no complete checkpoint, and no config.json of a "
            "Hugging Face model; give the directory of a run, of a checkpoint or of a model"
        )
    return source, steps


def check_written_by(trainer: str, checkpoint: Path) -> None:
    """Rejects a checkpoint of the other trainer, whose format differs.

    Raises:
        UsageError: The other trainer wrote it.
    """
    for writer, file in WRITES.items():
        if (checkpoint / file).exists() and not (checkpoint / WRITES[trainer]).exists():
            model = checkpoint.parent.parent / "model"
            raise UsageError(
                f"--resume, --continue_from: {checkpoint} was written by {writer}; resume with "
                f"{writer}, or start from the model that the run saves at its end, with "
                f"--continue_from {model} under another --name"
            )


def check_not_lost(options: Options) -> None:
    """Rejects starting from the beginning with `--resume` if the run has saved checkpoints.

    A cluster script always passes --resume; if a disk is not mounted, this prevents training from
    silently restarting.

    Raises:
        UsageError: It saved them in another directory, or its log shows that there were some.
    """
    run = options.run
    kept = (read_record(run.path) or {"options": options.values()})["options"]
    before, now = (Path(place or run.path) for place in (kept["save_dir"], run.save_dir))
    if before.resolve() != now.resolve():
        remedy = f"give --save_dir {before}" if kept["save_dir"] else "leave --save_dir out"
        raise UsageError(
            f"--save_dir: the run in {run.path} saved its checkpoints in {before}, but there are "
            f"none in {now}; {remedy}, or move them"
        )
    if not (run.path / "metrics.jsonl").exists():
        return
    lines = read_metrics(run.path)
    done = [record["step"] for record in lines if record["kind"] == "train"]
    if not done:
        return
    saves = [step for step in range(min(done), max(done)) if step % kept["save_every"] == 0]
    # A save ends before the next one starts, and before the run ends.
    if len(saves) > 1 or lines[-1]["kind"] == "final":
        raise UsageError(
            f"--resume: the log in {run.path} has {max(done)} updates, but there is no checkpoint "
            f"in {now / 'checkpoints'}; give their folder as --save_dir if they were moved, or "
            "restart with --overwrite, which deletes the log"
        )


def restore_newest(
    options: Options,
    directory: Path,
    steps: Sequence[int],
    restore: Callable[[int], tuple[T, dict[str, Any]]],
) -> tuple[int, T, Any]:
    """The first of `steps` that can be read, its state, and its position in the data.

    Args:
        options: Checked options.
        directory: Directory of the checkpoints.
        steps: Steps to try in order.
        restore: Reads one of them: the state and the data of `extra`; OSError if it is damaged.

    Raises:
        UsageError: All are damaged, or it belongs to a run with other options.
        ValueError: It belongs to another model or optimizer.
    """
    for step in steps:
        try:
            state, kept = restore(step)
        except OSError as error:
            logger.warning("%s; passed over", error)
        else:
            check_same_run(kept["run"], options.record(), directory / str(step))
            return step, state, kept["data"]
    raise UsageError(
        f"no checkpoint in {directory} can be read; if the disk failed, try again once it is "
        "repaired; otherwise start a new run under another --name, or with --overwrite, which "
        "deletes them"
    )


def skipped_documents(before: int, now: int) -> str:
    """A message if `launch.data.reshard` is not exact."""
    return (
        f"trained until here by {in_words(before)}, and now by {now}: a few documents are "
        "skipped, and none is repeated"
    )


def go_on(
    options: Options,
    processes: Processes,
    directory: Path,
    steps: Sequence[int],
    restore: Callable[[int], tuple[T, dict[str, Any]]],
    batches: TrainBatches,
) -> tuple[int, T, str | None]:
    """Restores the newest readable checkpoint, and the position in the data.

    Args:
        options: Checked options.
        processes: Processes of the run.
        directory: Directory of the checkpoints.
        steps: Steps to try in order.
        restore: As in `restore_newest`.
        batches: Batches of this process; they continue from the checkpoint's position.

    Returns:
        The number of updates, the state, and a message about skipped documents.

    Raises:
        UsageError: As `restore_newest`; or the checkpoint is beyond the run's end.
        ValueError: As `restore_newest`.
    """
    from launch.data import is_exact, reshard

    step, state, places = restore_newest(options, directory, steps, restore)
    batches.set_state(reshard(places, processes.count)[processes.index])
    check_not_beyond(options, step, directory)
    if is_exact(places, processes.count):
        return step, state, None
    return step, state, skipped_documents(len(places), processes.count)


def check_not_beyond(options: Options, start: int, directory: Path) -> None:
    """Rejects a checkpoint that is beyond the run's end.

    Raises:
        UsageError: It has more updates than the run.
    """
    steps = options.optimizer.num_training_steps
    if start > steps:
        raise UsageError(
            f"--num_training_steps: {steps} is less than the {start} updates that "
            f"{directory} has done; raise it"
        )


def extra(options: Options, place: Any) -> dict[str, Any]:
    """The JSON data of a checkpoint: the run's record and position in the data."""
    return {"run": options.record(), "data": place}
