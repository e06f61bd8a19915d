"""Documents -> batches {"tokens": int32 (B, S), "mask": bool (B, S)}.

The mask is False for tokens that are not predicted: padding, and with `separate` the first token of
a document. Batches then also have "segments", int32 (B, S): the number of each token's document in
its row, from 1, and 0 for padding.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.data.common import DataError, check_separate, is_packed
from launch.data.corpus import full_name, open_corpus, open_tokens, spread
from launch.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
READ_AHEAD = 64  # documents
UNIGRAM_DOCUMENTS = 4_000


def open_data(
    dataset: str,
    tokenizer: Tokenizer,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_length: int = 256,
    pack: bool | None = None,
    separate: bool = False,
    seed: int = 0,
    validation_fraction: float = 0.05,
    text_column: str = "text",
) -> "Data":
    """Opens a data set for training and validation.

    Args:
        dataset: `builtin`, `c4`, `tfds:NAME`, `text:GLOB`, `tokens:PATH` or `hf:NAME`; see
            `corpus.py`.
        tokenizer: From `load_tokenizer`.
        data_dir: Folder of TFDS data sets or C4's own files; None: TFDS's own default.
        cache_dir: None: `$OSD_CACHE` or ~/.cache/online_subspace_descent.
        max_length: Tokens per row.
        pack: True: documents are joined, each ended by the end-of-text token, and cut into rows.
            False: one document per row, truncated or padded, as the published runs used C4. None:
            True for `builtin`, `text:` and `tokens:`, False for the others.
        separate: Whether packed rows keep their documents separate, by "segments".
        seed: Seed of the shuffle.
        validation_fraction: Share to hold out if the data set has no validation split.
        text_column: The key or column with the text in the files of `text:`.

    Raises:
        DataError: The data are unknown, missing, empty or unsuitable.
    """
    if max_length < 2:
        raise DataError(
            f"max_length {max_length}: a row needs at least 2 tokens, to predict one from the other"
        )
    kind, _, path = full_name(dataset).partition(":")
    if separate:
        check_separate(kind, pack)
    pack = is_packed(kind, pack)
    if kind == "tokens":
        if not pack:
            raise DataError(
                f"{dataset} has no documents, only rows of max_length tokens: leave out --no-pack"
            )
        corpus = open_tokens(path, max_length, tokenizer.vocab_size, validation_fraction)
        train, validation = corpus.train, corpus.validation
    else:
        corpus = open_corpus(dataset, data_dir, cache_dir, validation_fraction, text_column)
        train = corpus.train.map(tokenizer.encode_document)
        validation = corpus.validation.map(tokenizer.encode_document)
    data = Data(
        train,
        validation,
        tokenizer.vocab_size,
        tokenizer.pad_id,
        max_length,
        pack,
        seed,
        corpus.identity,
        separate,
    )
    if not any(batch["mask"][:, 1:].any() for batch in data.validation(1)):
        raise DataError(
            f"the held-out part of {dataset} has no text to predict: every document there is "
            "blank or a single token; give more text, or another validation split"
        )
    return data


@dataclass(frozen=True)
class Data:
    """A tokenized data set. Created by `open_data`.

    Attributes:
        train_documents: Random access to int32 ids of shape (length of the document,).
        validation_documents: As `train_documents`.
        vocab_size: Ids are smaller than this.
        pad_id: Id at masked positions.
        max_length: S, tokens per row.
        pack: Whether rows join documents.
        seed: Seed of the shuffle.
        identity: Identity of the corpus.
        separate: Whether batches have "segments".
    """

    train_documents: "grain.MapDataset[np.ndarray]"
    validation_documents: "grain.MapDataset[np.ndarray]"
    vocab_size: int
    pad_id: int
    max_length: int
    pack: bool
    seed: int
    identity: str
    separate: bool = False

    def train(
        self, batch_size: int, process_index: int = 0, process_count: int = 1, workers: int = 0
    ) -> "TrainBatches":
        """An endless iterator over this process's share, reshuffled every epoch.

        Args:
            batch_size: Rows in this process's batches.
            process_index: Index of this process.
            process_count: Number of processes over which the documents are distributed; in an epoch
                each document goes to one of them.
            workers: Number of worker processes that tokenize; 0: a thread does. The batches do not
                depend on it.
        """
        return TrainBatches(self, batch_size, process_index, process_count, workers)

    def validation(
        self,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        tokens: int | None = None,
    ) -> Iterator[Batch]:
        """This process's share of the held-out rows: over all processes, each row once.

        Every process gets the same number of batches of the same shape: missing rows at the end are
        padding.

        Args:
            batch_size: Rows per batch.
            process_index: Index of this process.
            process_count: Number of processes over which the rows are distributed.
            tokens: Limits the rows to the first ones that hold this many tokens, including padding,
                and at least one; None: all.
        """
        rows: Iterator[Any]
        rows = self._packed_rows() if self.pack else iter(range(len(self.validation_documents)))
        if tokens is not None:
            rows = islice(rows, max(1, tokens // self.max_length))
        while group := list(islice(rows, batch_size * process_count)):
            mine: list[Any] = group[process_index::process_count]
            if not self.pack:
                mine = [[self.validation_documents[index]] for index in mine]
            yield self.collate(mine, batch_size)

    def collate(self, rows: list[list[np.ndarray]], batch_size: int) -> Batch:
        """Truncates and pads rows, each the ids of its documents, to one batch."""
        tokens = np.full((batch_size, self.max_length), self.pad_id, np.int32)
        mask = np.zeros((batch_size, self.max_length), bool)
        segments = np.zeros((batch_size, self.max_length), np.int32)
        for index, documents in enumerate(rows):
            kept = np.concatenate(documents)[: self.max_length]
            tokens[index, : len(kept)] = kept
            mask[index, : len(kept)] = True
            if self.separate:
                lengths = [len(document) for document in documents]
                segments[index, : len(kept)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
                mask[index, np.cumsum(lengths[:-1], dtype=int)] = False
        batch = {"tokens": tokens, "mask": mask}
        return batch | {"segments": segments} if self.separate else batch

    def unigram_perplexity(self, tokens: int | None = None) -> float:
        """Perplexity of a model that only knows the frequency of each token.

        The frequencies are those of at most `UNIGRAM_DOCUMENTS` training documents, evenly spread,
        with one added to each token's count. The perplexity is that of the held-out tokens that a
        language model predicts: all but the first of each row.

        Args:
            tokens: Number of tokens of the rows, as for `validation`.
        """
        counts = np.ones(self.vocab_size)
        for document in spread(self.train_documents, UNIGRAM_DOCUMENTS):
            counts += np.bincount(document, minlength=self.vocab_size)
        predicted = np.zeros(self.vocab_size)
        for batch in self.validation(16, tokens=tokens):
            shown = batch["tokens"][:, 1:][batch["mask"][:, 1:]]
            predicted += np.bincount(shown, minlength=self.vocab_size)
        log_frequency = np.log(counts) - math.log(counts.sum())
        return math.exp(-float(predicted @ log_frequency) / predicted.sum())

    def _packed_rows(self) -> Iterator[list[np.ndarray]]:
        """The held-out documents in order, joined and cut; the last row may be short."""
        row: list[np.ndarray] = []
        missing = self.max_length
        for index in range(len(self.validation_documents)):
            left = self.validation_documents[index]
            while len(left):
                row.append(left[:missing])
                left = left[missing:]
                missing -= len(row[-1])
                if not missing:
                    yield row
                    row, missing = [], self.max_length
        if row:
            yield row


class TrainBatches(Iterator[Batch]):
    """Endless training batches of one process; `set_state` continues exactly.

    The documents of all epochs form one endless sequence; process p of P takes numbers p, p + P,
    p + 2P, ... Workers only tokenize; this class forms the rows, in order.
    """

    def __init__(
        self, data: Data, batch_size: int, process_index: int, process_count: int, workers: int
    ) -> None:
        """See `Data.train`."""
        if not 0 <= process_index < process_count:
            raise DataError(f"process_index {process_index}: expected 0 to {process_count - 1}")
        self._data = data
        self._batch_size = batch_size
        self._process = (process_index, process_count)
        self._workers = workers
        self._documents: Any = None  # grain's iterator
        self._taken = 0  # documents taken from it, counted from the start of training
        self._offset = 0  # tokens of the last one that are already in rows
        self._left = np.empty(0, np.int32)  # its remaining tokens

    def __next__(self) -> Batch:
        """The next batch; see the description of this module."""
        rows = [
            self._packed_row() if self._data.pack else [self._take()]
            for _ in range(self._batch_size)
        ]
        return self._data.collate(rows, self._batch_size)

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch, and what it depends on; JSON."""
        started = len(self._left) > 0
        return {
            "document": self._taken - started,
            "offset": self._offset if started else 0,
            "seed": self._data.seed,
            "process_count": self._process[1],
            "pack": self._data.pack,
            "corpus": self._data.identity,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at the position of the iterator that returned `state`.

        Raises:
            DataError: The state belongs to another corpus, seed, packing or number of processes.
        """
        for key, here in self.get_state().items():
            if key not in ("document", "offset") and state.get(key) != here:
                raise DataError(
                    f"the checkpoint's position in the data has {key} {state.get(key)!r}, but "
                    f"this run has {here!r}: use the same, or restart the data"
                )
        self.close()
        self._taken, self._offset = int(state["document"]), 0
        self._left = self._left[:0]
        if state["offset"]:
            document = self._take()
            self._offset = int(state["offset"])
            self._left = document[self._offset :]

    def close(self) -> None:
        """Ends worker processes and threads; the next batch restarts them."""
        if self._documents is not None:
            self._documents.close()
            self._documents = None

    def _take(self) -> np.ndarray:
        """The next document."""
        if self._documents is None:
            self._documents = self._open()
        document = next(self._documents)
        self._taken += 1
        return document

    def _packed_row(self) -> list[np.ndarray]:
        """The next `max_length` tokens, by document."""
        parts = []
        missing = self._data.max_length
        while missing:
            if not len(self._left):
                self._left, self._offset = self._take(), 0
            part = self._left[:missing]
            self._left = self._left[len(part) :]
            self._offset += len(part)
            missing -= len(part)
            if len(part):
                parts.append(part)
        return parts

    def _open(self) -> Any:
        """This process's documents from number `self._taken` on."""
        import grain
        from absl import flags

        index, count = self._process
        # Hashed, because grain shuffles epoch e of seed s like epoch e + 1 of seed s - 1.
        seed = int(np.random.SeedSequence(self._data.seed).generate_state(1)[0])
        everything = self._data.train_documents.shuffle(seed=seed).repeat()
        mine = everything[index + count * self._taken :: count]
        # One thread: several only hinder each other while they tokenize.
        documents = mine.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
        )
        if self._workers:
            # grain passes absl flags to its workers, which only absl's own main parses.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            documents = documents.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers), _end_with_parent
            )
        return iter(documents)


def reshard(states: Sequence[dict[str, Any]], process_count: int) -> list[dict[str, Any]]:
    """Converts the positions in the data of P processes to another number of processes.

    If all processes have taken equally many whole documents, these are the first ones of the
    sequence, and the new processes continue right after them; this is the case if each row is a
    document, after any number of whole updates with the same total batch. Otherwise they continue
    after the furthest document that any process has started, and skip a few documents before it; no
    document is repeated.

    Args:
        states: Each process's `TrainBatches.get_state()`, in order.
        process_count: The new number.

    Returns:
        A state for each of the new processes. `is_exact` says whether documents are skipped.
    """
    if process_count == len(states):
        return list(states)
    begun = [state["document"] + (state["offset"] > 0) for state in states]
    furthest = (
        max(p + len(states) * (n - 1) for p, n in enumerate(begun) if n) if any(begun) else -1
    )
    document = -(-(furthest + 1) // process_count)
    place = {"document": document, "offset": 0, "process_count": process_count}
    return [{**states[0], **place} for _ in range(process_count)]


def is_exact(states: Sequence[dict[str, Any]], process_count: int) -> bool:
    """Whether `reshard` skips no document."""
    if process_count == len(states):
        return True
    first = states[0]["document"]
    alike = all(state["document"] == first and not state["offset"] for state in states)
    return alike and first * len(states) % process_count == 0


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    """Makes a worker process end when its parent is killed; grain's workers would survive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
