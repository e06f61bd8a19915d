"""What both trainers share: the loop over updates, where a run starts, and how it ends.

Nothing here knows of JAX or PyTorch. A trainer hands in what is its own as functions: one update,
an evaluation, a save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from launch.trainer.cli import UsageError, user_errors
from launch.trainer.options import Options
from launch.trainer.options.record import changed_options, check_same_run, read_record

if TYPE_CHECKING:
    import numpy as np

    from launch.data import Data, Tokenizer
    from launch.run_log import RunLog

MAX_SKIPPED_IN_A_ROW = 10
WRITES = {"train_jax": "_CHECKPOINT_METADATA", "train_torch": "manifest.json"}
"""A file in every complete checkpoint, by the trainer that writes it."""
WEIGHTS = (".safetensors", ".bin", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
"""How the names of a model's weights end, but not those of a run's checkpoints."""
STOPPED = 130
"""The exit code of a run that was asked to stop: what follows it in a script must not run."""

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]  # "tokens" int32 and "mask" bool, NumPy
Metrics = Mapping[str, Any]  # name -> number
T = TypeVar("T")


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
        process: The number of this process, from 0, and how many there are.
        any_process: Whether any process says yes; what one process decides, all must know.
    """

    update: Callable[[bool], Metrics]
    eval_step: Callable[[Batch], tuple[Any, Any]]
    save: Callable[[int], None]
    sample: Callable[[np.ndarray, int], np.ndarray]
    save_model: Callable[[Path], None]
    process: tuple[int, int] = (0, 1)
    any_process: Callable[[bool], bool] = bool


C = TypeVar("C", bound=Checkpoints)


def set_up_logging(shows: bool = True) -> None:
    """Shows warnings, and what this package and its libraries say, as bare lines on stderr.

    Args:
        shows: False for a process whose messages are the first one's, too.
    """
    logging.basicConfig(level=logging.WARNING if shows else logging.ERROR, format="%(message)s")
    for package in ("launch", "osd_jax", "osd_torch"):
        logging.getLogger(package).setLevel(logging.INFO if shows else logging.ERROR)


@contextlib.contextmanager
def together(
    gathered: Callable[[Any], list[Any]], is_first: bool, in_turn: bool = False
) -> Iterator[None]:
    """What is the user's mistake in one process ends all of them, with the same message.

    A ValueError or OSError inside becomes a `UsageError`, as in `user_errors`.

    Args:
        gathered: What one process has -> what each has, in order.
        is_first: Whether this is the first process.
        in_turn: The first process goes first; the others wait, and find what it has prepared.

    Raises:
        UsageError: in this process or in another one.
    """

    def raise_together(mistake: str | None) -> None:
        for message in gathered(mistake):
            if message is not None:
                raise UsageError(message)

    if in_turn and not is_first:
        raise_together(None)
    mistake = None
    try:
        with user_errors():
            yield
    except UsageError as error:
        mistake = str(error)
    raise_together(mistake)
    if in_turn and is_first:
        raise_together(None)  # for the others


# ------------------------------------------------------------------------------- the loop


def train(
    options: Options,
    data: Data,
    tokenizer: Tokenizer,
    log: RunLog,
    checkpoints: Checkpoints,
    trainer: Trainer,
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
        start: Updates done before.
        schedule: The learning rate's factor of an update that counts, from 0.
        stop: Says whether the run is to end after this update.

    Returns:
        The exit code; that of a run that ended early is not 0, and its reason is shown.
    """

    def evaluate(step: int) -> float:
        held_out = data.validation(
            options.data.batch_size, *trainer.process, options.run.eval_tokens
        )
        loss = validation_loss(held_out, trainer.eval_step)
        log.eval(step, step * options.data.tokens_per_update, loss=loss)
        return loss

    due = start % options.run.eval_every == 0 and 0 < start < options.optimizer.num_training_steps
    # A stop does not wait for an evaluation.
    if trainer.any_process(due and log.active and not log.has("eval", start)):
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
        stopped = trainer.any_process(stop.asked and not is_last)
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
    finish(options, data, tokenizer, evaluate(step), log, trainer)
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


# --------------------------------------------------------------------- where a run starts


def open_text(options: Options, vocab_size: int) -> tuple[Tokenizer, Data]:
    """The tokenizer and the data that the options name.

    Args:
        options: Checked options.
        vocab_size: Of the model.

    Raises:
        DataError: they are missing, unsuitable, or do not fit the model.
    """
    from launch.data import load_tokenizer, open_data

    places: dict[str, Any] = {
        "data_dir": options.data.data_dir,
        "cache_dir": options.data.cache_dir,
        "text_column": options.data.text_column,
    }
    tokenizer = load_tokenizer(
        options.data.tokenizer, options.data.dataset, **places, vocab_size=vocab_size
    )
    data = open_data(
        options.data.dataset,
        tokenizer,
        **places,
        max_length=options.data.max_length,
        pack=options.data.pack,
        seed=options.run.seed,
    )
    return tokenizer, data


def schedule_options(options: Options) -> dict[str, Any]:
    """The keywords of either library's `learning_rate_schedule`."""
    return {
        "num_training_steps": options.optimizer.num_training_steps,
        "warmup_steps": options.optimizer.warmup_steps,
        "min_lr_ratio": options.optimizer.min_lr_ratio,
        "cycle_length": options.optimizer.cycle_length,
        "restart_warmup_steps": options.optimizer.restart_warmup_steps or 0,
    }


def optimizer_options(options: Options) -> dict[str, Any]:
    """The keywords that either library's `make_optimizer` takes, but the learning rate."""
    return {
        "rank": options.subspace.rank,
        "update_proj_gap": options.subspace.update_proj_gap,
        "update_proj_every": options.subspace.update_proj_every,
        "scale": options.subspace.galore_scale,
        "weight_decay": options.optimizer.weight_decay,
        "no_decay": has_words(options.optimizer.no_decay),
        "beta1": options.optimizer.beta1 or None,
        "beta2": options.optimizer.beta2,
        "eps": options.optimizer.eps,
        "full_lr": options.optimizer.full_lr,
        "momentum": options.optimizer.momentum,
        "nesterov": options.optimizer.nesterov,
        "muon_scale": options.optimizer.muon_scale,
        "residual": options.subspace.residual,
        "residual_scale": options.subspace.residual_scale,
        "growth_limiter": options.subspace.growth_limiter,
        "second_moment": options.optimizer.second_moment,
        "first_moment": options.optimizer.first_moment,
        "seed": options.run.seed,
        "penalty": options.subspace.penalty,
        "projector_lr_multiple": options.subspace.projector_lr_multiple,
        "projector_weight_decay": options.subspace.projector_weight_decay,
        "lion_sign": options.subspace.lion_sign,
        "move_projector": options.subspace.move_projector,
        "transport_moments": options.subspace.transport_moments,
        "stochastic_rounding": options.optimizer.stochastic_rounding,
    }


def check_words(words: str | None, names: Iterable[str]) -> None:
    """Raises UsageError for a word of `--no_decay` that no parameter's name has in it."""
    known = list(names)
    for word in map(str.strip, words.split(",") if words else ()):
        if not any(word in name for name in known):
            raise UsageError(
                f"--no_decay: no parameter has {word!r} in its name; they are such as "
                f"{', '.join(known[:3])} and {known[-1]}"
            )


def has_words(words: str | None) -> Callable[[str, Any], bool] | None:
    """(name, parameter) -> whether the name has one of some words in it; None for no words.

    Example:
        >>> has_words("norm,embed")("layers/input_norm", None)
        True
    """
    if words is None:
        return None
    found = [word.strip() for word in words.split(",")]
    return lambda name, parameter: any(word in name for word in found)


def hugging_face_weights(options: Options) -> Path | None:
    """The Hugging Face directory that `--continue_from` names, if it names one.

    Raises:
        UsageError: it is this run's own model, whose place in the run is gone, a model without
            `config.json`, or empty.
    """
    directory = Path(options.model.continue_from) if options.model.continue_from else None
    if directory is None:
        return None
    if not (directory / "config.json").is_file():
        if not goes_on(options):
            _check_may_be_a_run(directory)
        return None
    if options.continues_itself:
        raise UsageError(
            f"--continue_from: {directory} is this run's own model, with weights only; go on with "
            "the run by --resume, or train the model further under another --name"
        )
    return directory


def goes_on(options: Options) -> bool:
    """Whether `--resume` finds a checkpoint of this run, so that `--continue_from` is not read."""
    own = (options.run.save_path / "checkpoints").glob("*")
    return options.run.resume and any(path.name.isdigit() for path in own)


def _check_may_be_a_run(directory: Path) -> None:
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        raise UsageError(
            f"--continue_from: {directory} is empty; give the directory of a run, of a checkpoint "
            "or of a model"
        )
    weights = [name for name in names if name.endswith(WEIGHTS)]
    if weights:
        raise UsageError(
            f"--continue_from: {directory} has {weights[0]} and no config.json, which says what "
            "model it is of; put the model's config.json beside it"
        )


def check_alike(directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses weights that are of another model than `--model_config` describes.

    Args:
        directory: Of the weights.
        found: Their config, by field.
        wanted: `--model_config`, by field.

    Raises:
        UsageError: two configs differ in what the weights or the computation depend on.
    """
    for name, new in wanted.items():
        old = found[name]
        free = ("max_position_embeddings", "initializer_range")
        if old != new and name not in free and not name.endswith("_token_id"):
            raise UsageError(
                f"--continue_from: {directory} holds another model: its {name} is {old}, and "
                f"--model_config has {new}; give its own config.json as --model_config"
            )


def special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer's ids by the config's names: the published ones are another tokenizer's."""
    from launch.data.tokenizer import NoTokenizer

    if isinstance(tokenizer, NoTokenizer):
        return {}
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


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
    """Refuses to start a run anew by `--resume` where it has checkpoints, which are not found.

    Raises:
        UsageError: it kept them in another directory, or its log shows that there were some.
    """
    from launch.files import read_metrics

    kept = (read_record(options.run.path) or {"options": options.values()})["options"]
    before, now = (
        Path(place or options.run.path) for place in (kept["save_dir"], options.run.save_dir)
    )
    if before.resolve() != now.resolve():
        remedy = f"give --save_dir {before}" if kept["save_dir"] else "leave --save_dir out"
        raise UsageError(
            f"--save_dir: the run in {options.run.path} kept its checkpoints in {before}, and "
            f"there are none in {now}; {remedy}, or move them"
        )
    if not (options.run.path / "metrics.jsonl").exists():
        return
    lines = read_metrics(options.run.path)
    done = [record["step"] for record in lines if record["kind"] == "train"]
    if not done:
        return
    # All before the last update are complete, unless it was killed amid the first.
    saves = [step for step in range(min(done), max(done)) if step % kept["save_every"] == 0]
    unfinished = any((now / "checkpoints").glob("*tmp*"))
    if (saves and not unfinished) or lines[-1]["kind"] == "final":
        raise UsageError(
            f"--resume: the log in {options.run.path} is of {max(done)} updates, and there is no "
            f"checkpoint in {now / 'checkpoints'}; give their place as --save_dir if they were "
            "moved, or start anew by --overwrite, which deletes the log"
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
        f"trained until here by {several(before)}, and now by {now}: a few documents are skipped, "
        "and none comes twice"
    )


def several(processes: int) -> str:
    """A number of processes, in words."""
    return f"{processes} process" + "es" * (processes != 1)


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


@contextlib.contextmanager
def claimed(options: Options) -> Iterator[None]:
    """Holds the run's directories for this process alone; with `--overwrite` it empties them.

    Raises:
        UsageError: another process has one of them, or they cannot be written to.
    """
    import fcntl

    with contextlib.ExitStack() as files:
        with user_errors():
            for directory in {options.run.path, options.run.save_path}:
                directory.mkdir(parents=True, exist_ok=True)
                lock = files.enter_context((directory / ".lock").open("w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UsageError(
                        f"--name: another process is writing to {directory}; wait for its end, or "
                        "use another --name"
                    ) from None
            if options.run.overwrite:
                remove_run(options.run.save_path)
        yield


def remove_run(directory: Path) -> None:
    """Deletes what an earlier run left: its checkpoints and its model, and no other files."""
    for path in (directory / "checkpoints").glob("[0-9]*"):
        shutil.rmtree(path, ignore_errors=True)
    model = directory / "model"
    for pattern in ("config.json", "*.safetensors*", "tokenizer*", "special_tokens_map.json"):
        for path in model.glob(pattern):
            path.unlink()
    if model.is_dir() and not any(model.iterdir()):
        model.rmdir()


# ----------------------------------------------------------------------- what a run says


def describe(
    options: Options,
    *,
    parameters: int,
    dtype: str,
    device: str,
    weight_bytes: int,
    state_bytes: int | None = None,
    bytes_on_each: int | None = None,
    step: int,
) -> str:
    """What is about to run, in a few lines.

    `state_bytes` is left out where it is not yet known, and what each device holds of both where
    there is one.
    """
    state = "" if state_bytes is None else f"{optimizer_state(state_bytes)}, "
    start = f"going on from step {step:,}" if step else "from the start"
    optimizer, subspace = options.optimizer, options.subspace
    method = f"{optimizer.optimizer}, full rank"
    if optimizer.is_projected:
        method = f"{optimizer.optimizer}, {subspace.proj_type}, rank {subspace.rank}"
    share = "" if bytes_on_each is None else f", on each device {bytes_on_each / 2**20:,.1f} MiB"
    kept = read_record(options.run.path) if step else None
    changed = changed_options(kept, options.record()) if kept else []
    return (
        f"{Path(options.model.model_config).stem}: {parameters / 1e6:.1f} M parameters ({dtype}) "
        f"on {device}, {start}\n"
        f"{method}: {state}"
        f"weights {weight_bytes / 2**20:,.1f} MiB{share}\n"
        f"{optimizer.num_training_steps:,} updates of {options.data.tokens_per_update:,} tokens; "
        f"the run is kept in {options.run.path}"
    ) + "".join(f"\nchanged since it began: {change}" for change in changed)


def optimizer_state(size: int) -> str:
    """How large the optimizer's state is, in words."""
    return f"optimizer state {size / 2**20:,.1f} MiB"


def finish(
    options: Options, data: Data, tokenizer: Tokenizer, loss: float, log: RunLog, trainer: Trainer
) -> None:
    """Writes the model, a sample of its text, and how it compares to token frequencies alone.

    Args:
        options: Checked options.
        data: What it was trained on.
        tokenizer: Of the text; saved with the model.
        loss: The last evaluation's, in nats.
        log: Of the run.
        trainer: What samples and saves.
    """
    text = sample_of_text(options, tokenizer, trainer.sample)
    directory = options.run.save_path / "model"
    if log.active:
        unigram = data.unigram_perplexity(options.run.eval_tokens)
        log.write(
            "final",
            options.optimizer.num_training_steps,
            options.optimizer.num_training_steps * options.data.tokens_per_update,
            loss=loss,
            unigram_perplexity=unigram,
            sample=text,
        )
    with writing_model(options, directory):
        if log.active:
            tokenizer.save(directory)
        trainer.save_model(directory)
    if not log.active:
        return
    log.note(
        f"\nValidation perplexity {math.exp(loss):,.1f}; from token frequencies alone it would be "
        f"{unigram:,.1f}."
    )
    if text is not None:
        log.note(f"A sample of its text:\n\n    {text}\n")
    log.note(f"The model is in {directory}, in Hugging Face's format.")


@contextlib.contextmanager
def writing_model(options: Options, directory: Path) -> Iterator[None]:
    """Removes a new directory in which not all could be written, and says what is safe.

    Raises:
        OSError: inside.
    """
    is_new = not directory.exists()
    try:
        yield
    except OSError as error:
        if is_new:
            shutil.rmtree(directory, ignore_errors=True)
        raise OSError(
            f"the model cannot be written to {directory}: {error.strerror or error}; the trained "
            f"state is safe in {options.run.save_path / 'checkpoints'}: make room, and the same "
            "command and --resume write the model"
        ) from error


def sample_of_text(
    options: Options, tokenizer: Tokenizer, sample: Callable[[np.ndarray, int], np.ndarray]
) -> str | None:
    """The prompt as the model goes on with it; None where there is nothing to go on with."""
    from launch.data.tokenizer import NoTokenizer

    if not options.run.sample_tokens or isinstance(tokenizer, NoTokenizer):
        return None
    prompt = tokenizer.encode_batch([options.run.prompt])[0]
    if not len(prompt):
        return None
    length = min(options.data.max_length, len(prompt) + options.run.sample_tokens)
    return tokenizer.decode(sample(prompt, length))
