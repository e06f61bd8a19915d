"""Files of a run: written whole or not at all, and read back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when all is written and on the disk.

    A reader sees the old file or the new one, never a part.

    Args:
        path: Of the file.

    Yields:
        Where to write; its suffix is that of `path`.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def telling(path: Path) -> Iterator[None]:
    """Says which file could not be written, and what to do.

    Raises:
        OSError: inside; with the file's name.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the log {path} cannot be written: {error.strerror or error}; make room there, and go "
            "on from the newest checkpoint by the same command and --resume"
        ) from error


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line cut short by a crash is left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected the directory of a run")
    return list(records_of(path.read_text(encoding="utf-8").splitlines()))


def records_of(lines: list[str]) -> Iterator[dict[str, Any]]:
    """The records of lines of JSON, up to the first that is damaged."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return  # all that follows a damaged line is younger than the checkpoint
