"""The error of this package, and a cache with atomic entries."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PACKED = ("builtin", "text", "tokens")
"""Kinds of data sets whose rows join documents by default."""

_SCRATCH = ".building-"
_ABANDONED_SECONDS = 24 * 3600

log = logging.getLogger(__name__)


class DataError(ValueError):
    """A data set, tokenizer or file that cannot be used; the message says what to do."""


def is_packed(kind: str, pack: bool | None) -> bool:
    """Whether rows join documents.

    Args:
        kind: The data set's name up to the colon.
        pack: As in `open_data`.
    """
    return kind in PACKED if pack is None else pack


def check_separate(kind: str, pack: bool | None) -> None:
    """Rejects documents that are kept separate in rows that do not join any.

    Args:
        kind: The data set's name up to the colon.
        pack: As in `open_data`.

    Raises:
        DataError: A row is one document, or the data set has none.
    """
    if kind == "tokens":
        raise DataError("tokens: has no documents to separate, only rows of ids; leave it out")
    if not is_packed(kind, pack):
        raise DataError(
            "each row is one document already, and only --pack joins several; add --pack, or leave "
            "it out"
        )


def cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The given cache directory, else `$OSD_CACHE`, else one in the user's home."""
    default = os.environ.get("OSD_CACHE") or Path.home() / ".cache" / "online_subspace_descent"
    return Path(cache_dir or default).expanduser()


def prepare_once(target: Path, what: str, build: Callable[[Path], None]) -> Path:
    """Returns the directory `target`, built on the first call.

    `build(directory)` fills an empty directory next to `target`, which is then renamed: a process
    that is killed leaves no incomplete `target`, and of several processes that build at the same
    time the first one wins. Leftovers of a killed process are deleted after a day.

    Args:
        target: The directory to return.
        what: A short description for the log.
        build: Fills the given directory.

    Returns:
        `target`.
    """
    if target.exists():
        return target
    log.info("Preparing %s once, in %s", what, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{_SCRATCH}*"):
        if left.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_SCRATCH) as scratch:
        made = Path(scratch) / target.name
        made.mkdir()
        build(made)
        try:
            os.rename(made, target)
        except OSError:
            if not target.exists():
                raise
    return target
