"""Corpus -> tokens -> batches, as NumPy arrays, for a trainer of any framework.

A corpus (`corpus.py`) is two random-access sequences of documents: one to train on, one held out.
A tokenizer (`tokenizer.py`) turns each document into int32 ids that end with the end-of-text
token. Batches (`batches.py`) either join documents and cut rows of `max_length` (`pack=True`), or
put one document in a row, truncated, padded and masked. grain reshuffles every epoch, shares
the documents out over processes and tokenizes them ahead of time, in a thread or in worker
processes; rows are formed after that, so what step t sees depends on (seed, t, process) alone. A
training iterator's state is a document count and an offset: small, JSON, the same for any number
of workers. Whatever takes time (`builtin` passages, text files, trained tokenizers) is prepared
once under the cache directory, `$OSD_CACHE` or ~/.cache/online_subspace_descent, complete or not
at all. A user's mistake raises `DataError`.
"""

from launch.data.batches import Data, TrainBatches, is_exact, open_data, reshard
from launch.data.common import DataError
from launch.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Data",
    "DataError",
    "Tokenizer",
    "TrainBatches",
    "is_exact",
    "load_tokenizer",
    "open_data",
    "reshard",
]
