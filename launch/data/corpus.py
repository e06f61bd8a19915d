"""Names of data sets -> documents with random access.

    builtin                  every State of the Union address (`builtin.py`)
    tfds:NAME                a prepared TFDS data set, such as tfds:c4/en:3.1.0; `c4` stands
                             for that one
    text:GLOB                .txt and .jsonl files, plain or .gz
    hf:NAME                  a Hugging Face data set (needs the package `datasets`)
    tokens:PATH              token ids: a one-dimensional .npy of integers, or a raw .bin of uint16

Where a data set has no validation split, the last part of it is held out: 5 % unless told
otherwise, and at most `MAX_HELD_OUT` documents (for `tokens:`, rows).
"""

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from launch.data.common import DataError, cache_root, prepare_once

if TYPE_CHECKING:
    import grain

PUBLISHED = "tfds:c4/en:3.1.0"
KINDS = "builtin, c4, tfds:NAME, text:GLOB, tokens:PATH, hf:NAME"
MAX_HELD_OUT = 20_000
PASSAGE = 2_000  # characters; C4's documents have 2,200 on average
LONGEST_LINE = 16_000  # characters


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out.

    Attributes:
        train: texts (for `tokens:`, int32 rows of shape (max_length,)).
        validation: as `train`.
        identity: changes with the contents; keys caches and guards checkpoints.
    """

    train: "grain.MapDataset[Any]"
    validation: "grain.MapDataset[Any]"
    identity: str


def full_name(dataset: str) -> str:
    """The data set's name with aliases resolved.

    Raises:
        DataError: not one of the kinds that this module knows.
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
) -> Corpus:
    """Opens a corpus of texts, preparing it if it is the first time.

    Args:
        dataset: `builtin`, `c4`, `tfds:NAME`, `text:GLOB` or `hf:NAME`.
        data_dir: where TFDS data sets lie; None: TFDS's own default.
        cache_dir: see `common.cache_root`.
        validation_fraction: share to hold out where the data set has no validation split.

    Raises:
        DataError: unknown, missing, empty or unreadable data.
    """
    kind, _, rest = full_name(dataset).partition(":")
    if kind == "builtin":
        from launch.data import builtin

        return _open_tfds(builtin.NAME, builtin.prepare(cache_root(cache_dir)), validation_fraction)
    if kind == "tfds":
        return _open_tfds(rest, data_dir, validation_fraction)
    if kind == "text":
        return _open_text(rest, cache_root(cache_dir), validation_fraction)
    if kind == "hf":
        return _open_hf(rest, data_dir, validation_fraction)
    raise DataError(f"data set {dataset!r} holds token ids and no text")


def held_out(number: int, fraction: float, what: str) -> int:
    """How many of `number` documents to hold out.

    Raises:
        DataError: fewer than two documents, or a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction {fraction}: expected a number between 0 and 1")
    if number < 2:
        raise DataError(
            f"{what} has {number} document(s), and it takes at least two, one to train on "
            "and one to hold out: give more text"
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
    except (ImportError, ValueError, AssertionError) as error:  # which one: TFDS's many ways
        why = str(error).partition("\n")[0]
    if not splits:
        raise DataError(
            f"no data set {name!r} is prepared under {place} ({why}): point --data_dir at the "
            f"folder that holds {name.replace(':', '/')}/, or prepare it first, on a machine that "
            f"has TensorFlow, with: tfds build {name} --file_format=array_record"
        )
    if "text" not in builder.info.features:
        raise DataError(
            f"{name} has the features {sorted(builder.info.features)}, and training needs one "
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


def passages(file: TextIO) -> Iterator[str]:
    """Cuts a text into passages of at least `PASSAGE` characters, at blank lines if it has any.

    A text without blank lines is cut at the end of a line once twice that is reached, and a line
    longer than `LONGEST_LINE` characters is cut there. The last passage is as short as it comes.
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


def _json_texts(file: TextIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise DataError(
                f'{path}, line {number}: expected a JSON object with a string "text", got '
                f"{line[:60]!r}"
            )
        if text.strip():
            yield text


def _file_texts(path: Path) -> Iterator[str]:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            yield from _json_texts(file, path) if suffixes[-1] == ".jsonl" else passages(file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _open_text(pattern: str, cache: Path, fraction: float) -> Corpus:
    """Text files, copied once into one array_record file, which gives random access to all."""
    import grain
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    paths = [Path(path).resolve() for path in found if os.path.isfile(path)]
    if not paths:
        raise DataError(
            f"text:{pattern} matches no file: give a path, or a quoted pattern such as "
            "'text:books/*.txt'"
        )
    for path in paths:
        if not path.name.endswith((".txt", ".jsonl", ".txt.gz", ".jsonl.gz")):
            raise DataError(
                f"{path}: expected .txt, .jsonl, .txt.gz or .jsonl.gz; narrow text:{pattern}"
            )
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]

    def build(directory: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(directory / "documents.array_record"), "group_size:1")
        count = 0
        for path in paths:
            for text in _file_texts(path):
                writer.write(text.encode("utf-8", errors="replace"))
                count += 1
        writer.close()
        if not count:
            names = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
            raise DataError(f"there is no text in {names}: give files that hold some")

    folder = prepare_once(cache / f"text-{key}", f"text:{pattern}", build)
    source = ArrayRecordDataSource(str(folder / "documents.array_record"))
    documents: grain.MapDataset[Any] = grain.MapDataset.source(source).map(_decode)
    train, validation = _split(documents, fraction, f"text:{pattern}")
    return Corpus(train, validation, f"text {key} {len(train)}+{len(validation)} documents")


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
    """Rows of a memory-mapped array; only the path travels to worker processes."""

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
            f"{path} holds the token id {low if low < 0 else high}, and the vocabulary has "
            f"{vocab_size}: give the model the vocabulary that the tokens were made with, or make "
            "them again"
        )


def open_tokens(path: str, max_length: int, vocab_size: int, validation_fraction: float) -> Corpus:
    """Opens `tokens:PATH` as rows of `max_length` ids, the last of them held out.

    What is left over after the last whole row is not used.

    Args:
        path: a .npy file (one dimension, any integer type) or a .bin file (raw uint16, native byte
            order).
        max_length: tokens in a row.
        vocab_size: ids must be smaller than this.
        validation_fraction: share of the rows to hold out, from the end.

    Raises:
        DataError: missing, empty, too short, of another type or shape, or with ids outside the
            vocabulary.
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
    # Rows are checked as they are read, too; this finds a wrong vocabulary before anything is
    # compiled.
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
