"""Names of data sets -> documents with random access.

    builtin                  every State of the Union address (`builtin.py`)
    tfds:NAME                a prepared TFDS data set, such as tfds:c4/en:3.1.0
    c4                       that data set, or C4's own files (`files.c4_files`)
    text:GLOB                text files: a file, a folder or a pattern (`files.py`)
    hf:NAME                  a Hugging Face data set (needs the package `datasets`)
    tokens:PATH              token ids: a one-dimensional .npy of integers, or a raw .bin of uint16

If a data set has no validation split, its last part is held out: 5 % by default, and at most
`MAX_HELD_OUT` documents (for `tokens:`, rows).
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.data.common import DataError, cache_root, prepare_once
from launch.data.files import c4_files, file_texts, text_files

if TYPE_CHECKING:
    import grain

PUBLISHED = "tfds:c4/en:3.1.0"
KINDS = "builtin, c4, tfds:NAME, text:GLOB, tokens:PATH, hf:NAME"
MAX_HELD_OUT = 20_000
LOG_SECONDS = 30.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Training documents and held-out documents.

    Attributes:
        train: Texts (for `tokens:`, int32 rows of shape (max_length,)).
        validation: As `train`.
        identity: Changes with the contents; used as a key of caches and a check of checkpoints.
    """

    train: "grain.MapDataset[Any]"
    validation: "grain.MapDataset[Any]"
    identity: str


def full_name(dataset: str) -> str:
    """The data set's name with aliases resolved.

    Raises:
        DataError: This module does not know the kind.
    """
    name = PUBLISHED if dataset == "c4" else dataset
    kind, _, rest = name.partition(":")
    if name != "builtin" and (kind not in ("tfds", "text", "tokens", "hf") or not rest):
        raise DataError(f"unknown data set {dataset!r}: choose one of {KINDS}")
    return name


def open_corpus(
    dataset: str,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    validation_fraction: float = 0.05,
    text_column: str = "text",
) -> Corpus:
    """Opens a corpus of texts, and prepares it on first use.

    Args:
        dataset: `builtin`, `c4`, `tfds:NAME`, `text:GLOB` or `hf:NAME`.
        data_dir: Folder of TFDS data sets or C4's own files; None: TFDS's own default.
        cache_dir: See `common.cache_root`.
        validation_fraction: Share to hold out if the data set has no validation split.
        text_column: The key or column with the text in the files of `text:`.

    Raises:
        DataError: The data are unknown, missing, empty or unreadable.
    """
    kind, _, rest = full_name(dataset).partition(":")
    if dataset == "c4" and (files := c4_files(data_dir)):
        return _open_c4(files, cache_root(cache_dir))
    if kind == "builtin":
        from launch.data import builtin

        return _open_tfds(builtin.NAME, builtin.prepare(cache_root(cache_dir)), validation_fraction)
    if kind == "tfds":
        return _open_tfds(rest, data_dir, validation_fraction)
    if kind == "text":
        return _open_text(rest, text_column, cache_root(cache_dir), validation_fraction)
    if kind == "hf":
        return _open_hf(rest, data_dir, validation_fraction)
    raise DataError(f"data set {dataset!r} holds token ids and no text")


def held_out(number: int, fraction: float, what: str) -> int:
    """How many of `number` documents to hold out.

    Raises:
        DataError: There are fewer than two documents, or the fraction is outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction {fraction}: expected a number between 0 and 1")
    if number < 2:
        raise DataError(
            f"{what} has {number} document(s): expected at least two, one to train on and one to "
            "hold out; give more text"
        )
    return min(max(1, round(number * fraction)), MAX_HELD_OUT, number - 1)


def _split(
    documents: "grain.MapDataset[Any]", fraction: float, what: str
) -> tuple["grain.MapDataset[Any]", "grain.MapDataset[Any]"]:
    cut = len(documents) - held_out(len(documents), fraction, what)
    return documents[:cut], documents[cut:]


# ---- tfds


def _open_tfds(name: str, data_dir: str | os.PathLike[str] | None, fraction: float) -> Corpus:
    """A TFDS data set in array_record form, read without TensorFlow."""
    import grain
    import tensorflow_datasets as tfds

    place = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    splits: dict[str, int] = {}
    why = "nothing there"
    try:
        builder = tfds.builder(name, data_dir=place)
        splits = {split: info.num_examples for split, info in builder.info.splits.items()}
    except (ImportError, ValueError, AssertionError) as error:  # one of TFDS's various errors
        why = str(error).partition("\n")[0]
    if not splits:
        own = " or C4's own files, en/c4-train.*.json.gz" if f"tfds:{name}" == PUBLISHED else ""
        raise DataError(
            f"no data set {name!r} is prepared under {place} ({why}): point --data_dir at the "
            f"folder that holds {name.replace(':', '/')}/{own}, or prepare it first, on a machine "
            f"that has TensorFlow, with: tfds build {name} --file_format=array_record"
        )
    if "text" not in builder.info.features:
        raise DataError(
            f"{name} has the features {sorted(builder.info.features)}, but training needs one "
            "named 'text': choose another data set"
        )
    if builder.info.file_format.value != "array_record":
        raise DataError(
            f"{builder.data_dir} is in {builder.info.file_format.value} form, which has no random "
            f"access: convert it with python -m launch.data.convert {place} {name} NEW_DATA_DIR, "
            "and give --data_dir NEW_DATA_DIR"
        )
    if "train" not in splits or not splits["train"]:
        raise DataError(f"{name} under {place} has no training examples: its splits are {splits}")

    def documents(split: str) -> "grain.MapDataset[str]":
        return grain.MapDataset.source(builder.as_data_source(split)).map(_text_of)

    train = documents("train")
    if splits.get("validation"):
        validation = documents("validation")
    else:
        train, validation = _split(train, fraction, name)
    size = int(builder.info.splits["train"].num_bytes)
    identity = f"{builder.info.full_name} {len(train)}+{len(validation)} examples, {size} bytes"
    return Corpus(train, validation, identity)


def _text_of(example: dict[str, Any]) -> str:
    return _decode(example["text"])


def _decode(text: bytes | str) -> str:
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text


# ---- text files


def _open_text(pattern: str, column: str, cache: Path, fraction: float) -> Corpus:
    paths = text_files(pattern)
    if not paths:
        raise DataError(
            f"text:{pattern} matches no file: give a file, a folder, or a quoted pattern such as "
            "'text:books/*.txt'"
        )
    stamps: list[Any] = [_stamp(path) for path in paths]
    key = _digest(stamps if column == "text" else [column, *stamps])
    documents = _prepared(paths, column, key, f"text:{pattern}", cache)
    train, validation = _split(documents, fraction, f"text:{pattern}")
    return Corpus(train, validation, f"text {key} {len(train)}+{len(validation)} documents")


def _open_c4(files: dict[str, list[Path]], cache: Path) -> Corpus:
    """C4's own files. The identity does not depend on their location."""
    parts = {}
    for split, paths in files.items():
        key = _digest([_stamp(path) for path in paths])
        total = int(match[1]) if (match := re.search(r"-of-(\d+)", paths[0].name)) else len(paths)
        what = f"{len(paths)} of the {total} {split} files of C4"
        parts[split] = _prepared(paths, "text", key, what, cache)
    names = [(path.name, path.stat().st_size) for paths in files.values() for path in paths]
    numbers = "+".join(str(len(documents)) for documents in parts.values())
    return Corpus(**parts, identity=f"c4 files {_digest(names)} {numbers} documents")


def _stamp(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _prepared(
    paths: Sequence[Path], column: str, key: str, what: str, cache: Path
) -> "grain.MapDataset[str]":
    """Text files, copied once into one array_record file, which gives random access to all."""
    import grain
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    def build(directory: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        for path in paths:  # finds a wrong column or suffix before hours of work
            next(file_texts(path, column), None)
        writer = ArrayRecordWriter(str(directory / "documents.array_record"), "group_size:1")
        count, said = 0, time.monotonic()
        for number, path in enumerate(paths, 1):
            for text in file_texts(path, column):
                writer.write(text.encode("utf-8", errors="replace"))
                count += 1
            if time.monotonic() > said + LOG_SECONDS:
                log.info("%d documents in %d of %d files", count, number, len(paths))
                said = time.monotonic()
        writer.close()
        if not count:
            names = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
            raise DataError(f"{names} contain no text: give files with text")

    folder = prepare_once(cache / f"text-{key}", what, build)
    source = ArrayRecordDataSource(str(folder / "documents.array_record"))
    return grain.MapDataset.source(source).map(_decode)


# ---- Hugging Face


def _open_hf(name: str, data_dir: str | os.PathLike[str] | None, fraction: float) -> Corpus:
    """`hf:NAME` or `hf:NAME:CONFIG` of the package `datasets`."""
    import grain

    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data set hf:{name} needs the package 'datasets': install it (pip install datasets), "
            "or give --dataset tfds:NAME or text:GLOB"
        ) from error
    path, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(path, config or None, data_dir=data_dir and str(data_dir))
    except Exception as error:  # the package raises errors of many libraries
        raise DataError(f"cannot load hf:{name}: {type(error).__name__}: {error}") from error
    if "train" not in splits or "text" not in splits["train"].column_names:
        columns = {split: data.column_names for split, data in splits.items()}
        raise DataError(
            f"hf:{name} has the columns {columns}: training needs a split 'train' with a column "
            "'text'"
        )

    def documents(split: str) -> "grain.MapDataset[str]":
        return grain.MapDataset.source(splits[split]).map(_text_of)

    train = documents("train")
    if not len(train):
        raise DataError(f"hf:{name} has no training examples: choose another data set")
    if "validation" in splits and len(splits["validation"]):
        validation = documents("validation")
    else:
        train, validation = _split(train, fraction, f"hf:{name}")
    fingerprint = getattr(splits["train"], "_fingerprint", "")
    return Corpus(
        train, validation, f"hf {name} {fingerprint} {len(train)}+{len(validation)} examples"
    )


# ---- token arrays


@dataclass(frozen=True)
class _TokenRows:
    """Rows of a memory-mapped array; only the path is sent to worker processes."""

    path: Path
    first: int
    count: int
    length: int
    vocab_size: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> np.ndarray:
        start = (self.first + index) * self.length
        row = _token_array(self.path)[start : start + self.length]
        _check_ids(row, self.vocab_size, self.path)
        return row.astype(np.int32)


def _token_array(path: Path) -> np.ndarray:
    if path.suffix == ".bin":
        return np.memmap(path, dtype=np.uint16, mode="r")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _check_ids(ids: np.ndarray, vocab_size: int, path: Path) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"{path} holds the token id {low if low < 0 else high}, but the vocabulary has "
            f"{vocab_size}: give the model the vocabulary of the tokens, or create them again"
        )


def open_tokens(path: str, max_length: int, vocab_size: int, validation_fraction: float) -> Corpus:
    """Opens `tokens:PATH` as rows of `max_length` ids, the last of them held out.

    Tokens after the last whole row are not used.

    Args:
        path: A .npy file (one dimension, any integer type) or a .bin file (raw uint16, native byte
            order).
        max_length: Tokens per row.
        vocab_size: Ids must be smaller than this.
        validation_fraction: Share of the rows to hold out, from the end.

    Raises:
        DataError: The file is missing, empty, too short, of another type or shape, or has ids
            outside the vocabulary.
    """
    import grain

    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise DataError(f"tokens:{path}: there is no such file")
    if file.suffix not in (".npy", ".bin"):
        raise DataError(f"tokens:{path}: expected a .npy file of integers or a .bin file of uint16")
    if not file.stat().st_size:
        raise DataError(f"tokens:{path} is empty: give a file with token ids")
    try:
        array = _token_array(file)
    except (ValueError, OSError) as error:
        raise DataError(f"tokens:{path} cannot be read as {file.suffix}: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"tokens:{path} has shape {array.shape} and type {array.dtype}: expected one dimension "
            "and an integer type, as from numpy.save(path, ids.ravel().astype(numpy.uint16))"
        )
    rows = len(array) // max_length
    if rows < 2:
        raise DataError(
            f"tokens:{path} has {len(array)} tokens, fewer than two rows of {max_length}, one to "
            "train on and one to hold out: give more tokens or a smaller --max_length"
        )
    # Rows are also checked when they are read; this check finds a wrong vocabulary before anything
    # is compiled.
    _check_ids(array[: 2**27], vocab_size, file)
    cut = rows - held_out(rows, validation_fraction, f"tokens:{path}")
    stat = file.stat()
    return Corpus(
        grain.MapDataset.source(_TokenRows(file, 0, cut, max_length, vocab_size)),
        grain.MapDataset.source(_TokenRows(file, cut, rows - cut, max_length, vocab_size)),
        f"tokens {file} {stat.st_size} bytes {stat.st_mtime_ns} {cut}+{rows - cut} rows",
    )


def spread(documents: "grain.MapDataset[Any]", most: int) -> Iterable[Any]:
    """At most `most` documents, evenly spread over all of them."""
    step = max(1, -(-len(documents) // most))
    return (documents[index] for index in range(0, len(documents), step))
