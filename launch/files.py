"""Files of a run: written whole or not at all, and read back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
