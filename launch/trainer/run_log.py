"""What a run leaves behind and shows: metrics, TensorBoard events, a picture of the loss, progress.

A run's directory holds `options.json`, `metrics.jsonl` (one JSON object a line), TensorBoard's
event files and, at the end, `loss.png`; with `--wandb` the numbers go to Weights & Biases too.
Every line of the metrics has `kind` ("train", "eval", "final", ...), `step` (updates done) and
`tokens` (positions trained on so far). The keys in `TIMING` depend on the machine's speed; all else
follows from options and data, and is the same whether or not the run was interrupted. Numbers read
back exactly; one that is not finite is written as null.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat

from tqdm import tqdm

from launch.trainer.files import records_of, telling, write_atomic
from launch.trainer.options import Options

TIMING = ("seconds", "tokens_per_second")
_QUIET_SECONDS = 10.0  # between two lines of progress where there is no terminal


class RunLog:
    """The log of one run; use it as a context manager.

    Logging a step of a kind twice writes it once, so a run that goes on from its checkpoint may
    evaluate again what it had evaluated. Call `train` before `eval` for the same step, and both
    before the checkpoint of that step is written: then every line up to the checkpoint is kept.

    Args:
        options: checked options; `options.run.path` is the directory.
        resume_step: the checkpoint's step when the run goes on: younger lines are cut off. None
            starts anew: with `--resume` the metrics of a run that was killed before its first
            checkpoint are set aside, else what an earlier run's log left is removed.
        active: False on every process but the first; nothing is then written or shown.
    """

    def __init__(
        self, options: Options, *, resume_step: int | None = None, active: bool = True
    ) -> None:
        self.directory = options.run.path
        self._active = active
        self._resumes = options.run.resume
        self._total = options.optimizer.num_training_steps
        self._last: dict[str, int] = {}  # kind -> newest step written
        self._shown = -math.inf
        self._pace: tuple[int, float] | None = None  # step and time of this process's first line
        self._seconds_before = 0.0
        if not active:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with telling(self.directory / "metrics.jsonl"):
            kept = self._cut(resume_step) if resume_step is not None else self._clear()
        with telling(self.directory / "options.json"):
            text = json.dumps(options.record(), indent=2) + "\n"
            write_atomic(self.directory / "options.json", text)
        for record in kept:
            self._last[record["kind"]] = record["step"]
            self._seconds_before = record["seconds"]
        self._start = self._mark = time.monotonic()
        self._mark_tokens = (resume_step or 0) * options.data.tokens_per_update
        self._metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = _Events(self.directory, resume_step)
        self._wandb = _Wandb(options) if options.run.wandb else None
        self._bar = tqdm(
            total=self._total,
            initial=resume_step or 0,
            disable=not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}% {bar:8} {desc}",
            ncols=shutil.get_terminal_size().columns,  # 80 where a terminal does not say
        )

    def train(self, step: int, tokens: int, *, loss: SupportsFloat, **scalars: Any) -> None:
        """Logs an update and shows progress. A scalar named `skipped` counts non-finite updates.

        Args:
            step: updates done, this one included.
            tokens: positions trained on so far, over all processes.
            loss: mean over the update's tokens, in nats.
            **scalars: further numbers; a name may have slashes, as "energy/attention".
        """
        if not self._active:
            return
        now = time.monotonic()
        speed = (tokens - self._mark_tokens) / max(now - self._mark, 1e-9)
        self._mark, self._mark_tokens = now, tokens
        record = self.write("train", step, tokens, loss=loss, **scalars, tokens_per_second=speed)
        self._show(step, now, record)

    def eval(self, step: int, tokens: int, *, loss: SupportsFloat, **scalars: Any) -> None:
        """Logs an evaluation: `loss` is the mean over the held-out tokens, in nats."""
        if not self._active:
            return
        record = self.write("eval", step, tokens, loss=loss, **scalars)
        self.note(
            f"step {step:,}: validation loss {_short(record['loss'])}, "
            f"perplexity {_short(record['perplexity'])}"
        )
        self._mark = time.monotonic()  # the next update's speed does not count this evaluation

    def write(self, kind: str, step: int, tokens: int, **values: Any) -> dict[str, Any]:
        """Writes one line, and its numbers to TensorBoard under `kind`; returns what was written.

        Values are numbers (or arrays of one), text, or None. `loss` brings `perplexity` with it.
        """
        record: dict[str, Any] = {"kind": kind, "step": int(step), "tokens": int(tokens)}
        for name, value in values.items():
            record[name] = _plain(value)
            if name == "loss":
                record["perplexity"] = _plain(_exp(float(value)))
        if self._active and step > self._last.get(kind, -1):
            record["seconds"] = self._seconds_before + time.monotonic() - self._start
            self._last[kind] = step
            with telling(self.directory / "metrics.jsonl"):
                self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
                self._metrics.flush()
            with telling(self.directory):  # in which TensorBoard names its files
                self._events.write(record)
            if self._wandb:
                self._wandb.write(record)
        return record

    @property
    def active(self) -> bool:
        """Whether this process writes and shows."""
        return self._active

    def has(self, kind: str, step: int) -> bool:
        """Whether a line of this kind was written for this step or a later one."""
        return self._last.get(kind, -1) >= step

    def note(self, text: str) -> None:
        """Shows a line of text above the progress bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends the log and draws `loss.png`, if there is anything to draw."""
        if not self._active:
            return
        self._active = False
        self._bar.close()
        with contextlib.suppress(OSError):  # what it could not write before, and told
            self._metrics.close()
        try:
            self._events.close()
        except OSError as error:
            tqdm.write(f"TensorBoard's events are not complete: {error}", file=sys.stderr)
        if self._wandb:
            self._wandb.close()
        if "train" in self._last:
            from launch.trainer.picture import plot

            try:
                plot([self.directory], self.directory / "loss.png")
            except (OSError, ValueError) as error:  # a trained model is worth more than its picture
                tqdm.write(f"loss.png is not drawn: {error}", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _show(self, step: int, now: float, record: dict[str, Any]) -> None:
        if self._pace is None:
            self._pace = step, now  # from the first line on, so that compiling does not count
        line = f"{step:,}/{self._total:,}  loss {_short(record['loss'])}"
        line += f"  ppl {_short(record['perplexity'])}"
        if record.get("skipped"):
            line += f"  {record['skipped']} skipped"
        line += f"  {record['tokens_per_second']:,.0f} tokens/s"
        if step > self._pace[0]:
            left = (now - self._pace[1]) / (step - self._pace[0]) * (self._total - step)
            line += f"  {tqdm.format_interval(left)} left"
        if not self._bar.disable:
            self._bar.set_description_str(line, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._shown >= _QUIET_SECONDS or step == self._total:
            self._shown = now
            self.note(f"step {line}")

    def _cut(self, resume_step: int) -> list[dict[str, Any]]:
        """Keeps the lines of updates and evaluations up to the checkpoint, and returns them."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [
            record
            for record in records_of(lines)
            if record["kind"] in ("train", "eval") and record["step"] <= resume_step
        ]
        write_atomic(path, "".join(f"{json.dumps(record)}\n" for record in kept))
        return kept

    def _clear(self) -> list[dict[str, Any]]:
        metrics = self.directory / "metrics.jsonl"
        if self._resumes and metrics.exists():
            metrics.replace(self.directory / "metrics.jsonl.set-aside")
        for pattern in ("metrics.jsonl", "loss.png", "events.out.tfevents.*"):
            for path in self.directory.glob(pattern):
                path.unlink()
        return []


class _Events:
    """TensorBoard's event files, written without TensorFlow."""

    def __init__(self, directory: Path, resume_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(directory))
        if resume_step is not None:  # tells TensorBoard to drop what it has from here on
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=resume_step + 1, session_log=start))

    def write(self, record: dict[str, Any]) -> None:
        values = [
            self._summary.Value(tag=f"{record['kind']}/{name}", simple_value=value)
            for name, value in record.items()
            if _is_charted(name, value)
        ]
        event = self._event(
            step=record["step"], wall_time=time.time(), summary=self._summary(value=values)
        )
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """The same numbers under the same names, sent to Weights & Biases."""

    def __init__(self, options: Options) -> None:
        import wandb

        self._run = wandb.init(
            project="online-subspace-descent",
            name=options.run.name,
            dir=str(options.run.path),
            config=options.record(),
            tags=options.run.tags.split() if options.run.tags else None,
        )

    def write(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        values = {f"{kind}/{name}": x for name, x in record.items() if _is_charted(name, x)}
        self._run.log(values, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _is_charted(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and name != "step"


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _plain(value: Any) -> Any:
    """As JSON holds it: int, float, text or None; a number that is not finite becomes None."""
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "dtype") and value.dtype.kind in "iu":
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}" if value < 100 else f"{value:,.0f}"
