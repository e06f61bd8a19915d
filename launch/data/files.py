"""Text files -> documents: which files a pattern matches, and their contents.

    .txt                     prose, cut into passages
    .json, .jsonl            one JSON object per line, with the text under one key
    .parquet                 a table with a column of text

The first two may be compressed as .gz or .zst. Every file is read as a stream. Errors name the file
and the line.
"""

import glob
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from launch.data.common import DataError

COMPRESSED = ("", ".gz", ".zst")
SUFFIXES = (*(f".{kind}{c}" for c in COMPRESSED for kind in ("txt", "json", "jsonl")), ".parquet")
READABLE = ", ".join(SUFFIXES)
# Files that Hugging Face's `datasets` writes next to the data that they describe.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
TFDS_C4 = "c4/en/3.1.0"
C4_SPLITS = ("train", "validation")
PASSAGE = 2_000  # characters; C4's documents have 2,200 on average
LONGEST_LINE = 16_000  # characters
STRINGS = ("string", "large_string", "string_view", "binary", "large_binary")  # pyarrow's names
SHOWN = 3  # names in a message
POINTER, POINTER_BYTES = b"version https://git-lfs", 1_000
DAMAGED = "the file is damaged or does not match its suffix: fetch or write it again"

log = logging.getLogger(__name__)


# ---- which files


def text_files(pattern: str) -> list[Path]:
    """The files that `text:` reads, shards in the order of their numbers.

    A folder stands for all files in it and its subfolders. Hidden files and files of other kinds
    are skipped, and a line of the log names them.

    Args:
        pattern: A file, a folder or a glob pattern.

    Returns:
        The files; empty if the pattern matches no file.

    Raises:
        DataError: No file has a known suffix; or one is empty, a broken link or a Git LFS pointer,
            or is present twice.
    """
    pattern = os.path.expanduser(pattern)
    found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = [path for path in found if not os.path.isdir(path)]
    named = files or [
        path
        for folder in found
        for path in _files_in(folder)
        if os.path.basename(path) not in DESCRIPTIONS
    ]
    there = files or [path for folder in found for path in _files_in(folder, hidden=True)]
    kept = [path for path in named if _is_readable(path)]
    left = sorted(set(there) - set(kept))
    if left and not kept:
        raise DataError(
            f"text:{pattern} matches {_names(left)}: expected {READABLE}; give another pattern"
        )
    if left:
        reason = f"hidden, a description of the data, or not {READABLE}"
        log.info("text:%s leaves out %d file(s), %s: %s", pattern, len(left), reason, _names(left))
    return _checked(kept)


def c4_files(data_dir: str | os.PathLike[str] | None) -> dict[str, list[Path]] | None:
    """C4's own files, `en/c4-train.*.json.gz` and `en/c4-validation.*.json.gz`, by split.

    Args:
        data_dir: The folder `en`, or one that contains `en/` or `c4/en/`.

    Returns:
        The files of the splits `train` and `validation`; None if there is no such file, or if the
        folder has TFDS's layout.

    Raises:
        DataError: One of the splits is missing, or `text_files` would reject a file.
    """
    if data_dir is None:
        return None
    root = Path(data_dir).expanduser()
    if (root / TFDS_C4).is_dir():
        return None
    for folder in (root / "en", root, root / "c4" / "en"):
        splits = {
            split: [str(p) for p in folder.glob(f"c4-{split}.*") if _is_readable(p)]
            for split in C4_SPLITS
        }
        if not any(splits.values()):
            continue
        for split, files in splits.items():
            if not files:
                raise DataError(
                    f"{folder} has no c4-{split}.*.json.gz: add C4's {split} files, or train with "
                    f"--dataset 'text:{folder}', which holds out a part of the documents"
                )
        return {split: _checked(files) for split, files in splits.items()}
    return None


def _files_in(folder: str, hidden: bool = False) -> list[str]:
    """The files in a folder and its subfolders; a file with several links counts once."""
    pattern = os.path.join(glob.escape(folder), "**")
    found = glob.glob(pattern, recursive=True, include_hidden=hidden)
    files: dict[str, str] = {}
    for path in sorted(found, key=lambda path: (path.count(os.sep), path)):
        target = os.path.realpath(path)
        if not os.path.isdir(target):
            files.setdefault(target, path)
    return list(files.values())


def _is_readable(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).endswith(SUFFIXES)


def _kind(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The suffix of the contents of a readable file, and that of its compression or ""."""
    stem, suffix = os.path.splitext(path)
    return (os.path.splitext(stem)[1], suffix) if suffix in COMPRESSED else (suffix, "")


def _checked(files: Sequence[str]) -> list[Path]:
    """The files in order, shards by number; links are not resolved: names determine the kind."""
    by_number = lambda path: re.sub(r"\d+(?=-of-\d)", lambda number: number[0].zfill(12), path)
    paths = [Path(path).absolute() for path in sorted(files, key=by_number)]
    seen: dict[str, Path] = {}
    for path in paths:
        kind, compression = _kind(path)
        other = seen.setdefault(str(path).removesuffix(compression), path)
        if other is not path:
            raise DataError(f"{other} and {path.name} hold the same text: keep one of the two")
        if not path.is_file():
            raise DataError(f"{path} is a link to a file that is not there: fetch it, or delete it")
        size = path.stat().st_size
        # An empty .txt is a text without words; any other empty file is a failed download.
        if not size and (kind, compression) != (".txt", ""):
            raise DataError(f"{path} is empty: fetch it again, or delete it")
        if size < POINTER_BYTES and path.read_bytes().startswith(POINTER):
            raise DataError(
                f"{path} is only a pointer of Git LFS: fetch the file with git lfs pull"
            )
    return paths


def _names(paths: Sequence[str]) -> str:
    return ", ".join(paths[:SHOWN]) + (", ..." if len(paths) > SHOWN else "")


# ---- what is in them


def file_texts(path: Path, column: str) -> Iterator[str]:
    """The documents of a file, in order.

    Args:
        path: One of `text_files` or `c4_files`.
        column: The key or column with the text; not for .txt.

    Raises:
        DataError: The file cannot be read, or a line has no text.
    """
    kind, compression = _kind(path)
    if kind == ".parquet":
        yield from _parquet_texts(path, column)
        return
    openers: dict[str, Any] = {"": open, ".gz": gzip.open, ".zst": _open_zstd}
    number = 0
    try:
        with openers[compression](path, "rt", encoding="utf-8-sig", errors="replace") as file:
            if kind == ".txt":
                yield from passages(file)
                return
            for number, text in _json_texts(file, path, column):  # noqa: B007 told below
                if text.strip():
                    yield text
    except (OSError, EOFError, zlib.error) as error:
        where = f" after line {number}" if number else ""
        raise DataError(f"cannot read {path}{where}: {error}; {DAMAGED}") from error


def passages(file: TextIO) -> Iterator[str]:
    """Cuts a text into passages of at least `PASSAGE` characters, at blank lines if it has any.

    A text without blank lines is cut at the end of a line once it reaches twice that length, and a
    line longer than `LONGEST_LINE` characters is cut there. The last passage may be shorter.
    """
    lines: list[str] = []
    size = 0
    for line in iter(lambda: file.readline(LONGEST_LINE), ""):
        if size >= (2 * PASSAGE if line.strip() else PASSAGE):
            yield "".join(lines).strip()
            lines, size = [], 0
        if lines or line.strip():
            lines.append(line)
            size += len(line)
    if lines:
        yield "".join(lines).strip()


def _open_zstd(path: Path, mode: str, **text: Any) -> TextIO:
    """Like `gzip.open`; Python has its own codec since 3.14."""
    import pyarrow

    return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), **text)


def _json_texts(file: TextIO, path: Path, column: str) -> Iterator[tuple[int, str]]:
    """Line numbers and texts."""
    start = file.readline(LONGEST_LINE)  # a whole array may be on one line
    if start.lstrip().startswith("["):
        raise DataError(
            f"{path} holds one JSON array: expected one object per line; convert it, for example "
            "with: jq -c '.[]' OLD.json > NEW.jsonl"
        )
    if start and not start.endswith("\n"):
        start += file.readline()
    for number, line in enumerate(_with_first(start, file), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: expected a JSON object with a string {_quoted(column)} on one line, got "
                f"{line[:60]!r} ({error}); correct the line, or write the file again"
            ) from error
        if not isinstance(found, dict):
            raise DataError(
                f"{where}: expected a JSON object with a string {_quoted(column)}, got "
                f"{line[:60]!r}; correct the line, or delete it"
            )
        if column not in found:
            raise DataError(_no_column(where, column, list(found)))
        if not isinstance(found[column], str):
            raise DataError(_no_string(where, column, found[column]))
        yield number, found[column]


def _with_first(first: str, file: TextIO) -> Iterator[str]:
    yield first
    yield from file


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet, types

    row = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise DataError(_no_column(str(path), column, schema.names))
            kind = schema.field(column).type
            held = kind.value_type if types.is_dictionary(kind) else kind
            if str(held) not in STRINGS:
                raise DataError(
                    f"{path}: the column {_quoted(column)} holds {kind}, expected strings: name "
                    "another column by --text_column"
                )
            for batch in file.iter_batches(batch_size=1_000, columns=[column]):
                for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    if value is None:
                        raise DataError(_no_string(f"{path}, row {row}", column, value))
                    text = value.decode("utf-8", errors="replace")
                    if text.strip():
                        yield text
    except (OSError, pyarrow.ArrowException) as error:
        where = f" after row {row}" if row else ""
        raise DataError(f"cannot read {path}{where}: {error}; {DAMAGED}") from error


def _no_column(where: str, column: str, found: Sequence[str]) -> str:
    if not found:
        return f"{where}: no {_quoted(column)} there, and nothing else: expected a text per row"
    there = ", ".join(map(_quoted, found[:20]))
    return f"{where}: no {_quoted(column)} there, only {there}: name one of these by --text_column"


def _no_string(where: str, column: str, value: Any) -> str:
    shown = repr(value)[:60]
    return (
        f"{where}: {_quoted(column)} is {shown}, expected a string: correct or delete it, or name "
        "another by --text_column"
    )


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
