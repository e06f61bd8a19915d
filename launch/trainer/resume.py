"""How a run goes on: which checkpoint it reads, and whether that is one of this run."""

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
    """Where to restore from, and the steps to try in turn; no steps: start from the beginning.

    `--continue_from` names a run, its directory of checkpoints, or one checkpoint; with `--resume`
    it says where the run started, and the run's own checkpoints come first.

    Args:
        options: Checked options.
        open_: Opens a directory of checkpoints, only to read.
        trainer: Which one reads, of `WRITES`.

    Raises:
        UsageError: it names nothing of these, nor a Hugging Face model; the other trainer wrote
            them; the run to resume has lost them.
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
    """Refuses a checkpoint of the other trainer, whose format is another one.

    Raises:
        UsageError: that one wrote it.
    """
    for writer, file in WRITES.items():
        if (checkpoint / file).exists() and not (checkpoint / WRITES[trainer]).exists():
            model = checkpoint.parent.parent / "model"
            raise UsageError(
                f"--resume, --continue_from: {checkpoint} was written by {writer}; go on with "
                f"{writer}, or start from the model that the run leaves at its end, by "
                f"--continue_from {model} under another --name"
            )


def check_not_lost(options: Options) -> None:
    """Refuses to start from the beginning by `--resume` where the run has saved checkpoints.

    A cluster's script always passes --resume; where a disk is not mounted, this saves its user from
    training from the start without a word.

    Raises:
        UsageError: it kept them in another directory, or its log shows that there were some.
    """
    run = options.run
    kept = (read_record(run.path) or {"options": options.values()})["options"]
    before, now = (Path(place or run.path) for place in (kept["save_dir"], run.save_dir))
    if before.resolve() != now.resolve():
        remedy = f"give --save_dir {before}" if kept["save_dir"] else "leave --save_dir out"
        raise UsageError(
            f"--save_dir: the run in {run.path} kept its checkpoints in {before}, and there are "
            f"none in {now}; {remedy}, or move them"
        )
    if not (run.path / "metrics.jsonl").exists():
        return
    lines = read_metrics(run.path)
    done = [record["step"] for record in lines if record["kind"] == "train"]
    if not done:
        return
    saves = [step for step in range(min(done), max(done)) if step % kept["save_every"] == 0]
    # A save ends before the next one begins, and before the run does.
    if len(saves) > 1 or lines[-1]["kind"] == "final":
        raise UsageError(
            f"--resume: the log in {run.path} is of {max(done)} updates, and there is no "
            f"checkpoint in {now / 'checkpoints'}; give their place as --save_dir if they were "
            "moved, or start again by --overwrite, which deletes the log"
        )


def restore_newest(
    options: Options,
    directory: Path,
    steps: Sequence[int],
    restore: Callable[[int], tuple[T, dict[str, Any]]],
) -> tuple[int, T, Any]:
    """The first of `steps` that can be read, the state in it, and the place in the data.

    Args:
        options: Checked options.
        directory: Of the checkpoints.
        steps: To try in turn.
        restore: Reads one of them, the state and what `extra` made; OSError where it is damaged.

    Raises:
        UsageError: all are damaged, or it is of a run with other options.
        ValueError: it is of another model or optimizer.
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
        f"no checkpoint in {directory} can be read; if the disk is at fault, try again when it is "
        "mended; else start anew under another --name, or by --overwrite, which deletes them"
    )


def skipped_documents(before: int, now: int) -> str:
    """What to say where `launch.data.reshard` is not exact."""
    return (
        f"trained until here by {in_words(before)}, and now by {now}: a few documents are skipped, "
        "and none comes twice"
    )


def go_on(
    options: Options,
    processes: Processes,
    directory: Path,
    steps: Sequence[int],
    restore: Callable[[int], tuple[T, dict[str, Any]]],
    batches: TrainBatches,
) -> tuple[int, T, str | None]:
    """Restores the newest checkpoint that can be read, and the place in the data.

    Args:
        options: Checked options.
        processes: Of the run.
        directory: Of the checkpoints.
        steps: To try in turn.
        restore: As in `restore_newest`.
        batches: Of this process; they go on from the checkpoint's place.

    Returns:
        The updates done, the state, and what there is to say of documents that are skipped.

    Raises:
        UsageError: as `restore_newest`; or the checkpoint is beyond the run's end.
        ValueError: as `restore_newest`.
    """
    from launch.data import is_exact, reshard

    step, state, places = restore_newest(options, directory, steps, restore)
    batches.set_state(reshard(places, processes.count)[processes.index])
    check_not_beyond(options, step, directory)
    if is_exact(places, processes.count):
        return step, state, None
    return step, state, skipped_documents(len(places), processes.count)


def check_not_beyond(options: Options, start: int, directory: Path) -> None:
    """Refuses to go on from a checkpoint that is beyond the run's end.

    Raises:
        UsageError: it has done more updates than the run is to have.
    """
    steps = options.optimizer.num_training_steps
    if start > steps:
        raise UsageError(
            f"--num_training_steps: {steps} is less than the {start} updates that "
            f"{directory} has done; raise it"
        )


def extra(options: Options, place: Any) -> dict[str, Any]:
    """What a checkpoint holds beside the state, as JSON: the run's record and place in the data."""
    return {"run": options.record(), "data": place}
