"""Converts a prepared TFDS data set from TFRecord to array_record, without TensorFlow.

    python -m launch.data.convert DATA_DIR NAME NEW_DATA_DIR

For example `python -m launch.data.convert ~/tensorflow_datasets c4/en:3.1.0 ~/array_record`. The
examples are copied unchanged; only the file format changes.
"""

import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from launch.data.common import DataError, prepare_once


def records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length (8 bytes), its checksum (4), data, checksum (4).

    Raises:
        DataError: The file ends inside a record.
    """
    with open(path, "rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            data = file.read(length + 4)
            if len(header) < 12 or len(data) < length + 4:
                raise DataError(f"{path} ends inside a record: prepare the data set again")
            yield data[:-4]


def convert(data_dir: str, name: str, new_data_dir: str) -> Path:
    """Copies the data set `name` under `data_dir` to the same location under `new_data_dir`.

    Raises:
        DataError: There is no such data set, or it is not in TFRecord form.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    data_dir = os.path.expanduser(data_dir)
    try:
        source = Path(tfds.builder(name, data_dir=data_dir).data_dir)
        metadata = json.loads((source / "dataset_info.json").read_text(encoding="utf-8"))
    except (ValueError, OSError, ImportError) as error:
        why = str(error).partition("\n")[0]
        raise DataError(f"no data set {name!r} is prepared under {data_dir} ({why})") from error
    if metadata.get("fileFormat", "tfrecord") != "tfrecord":
        raise DataError(f"{source} is in {metadata['fileFormat']} form: expected tfrecord")

    def build(directory: Path) -> None:
        for path in source.iterdir():
            if ".tfrecord" not in path.name:
                shutil.copy(path, directory)
                continue
            target = directory / path.name.replace(".tfrecord", ".array_record")
            writer = ArrayRecordWriter(str(target), "group_size:1")
            for record in records(path):
                writer.write(record)
            writer.close()
        text = json.dumps(metadata | {"fileFormat": "array_record"}, indent=2)
        text = text.replace(".tfrecord", ".array_record")  # file names in older metadata
        (directory / "dataset_info.json").write_text(text, encoding="utf-8")

    target = Path(new_data_dir).expanduser() / os.path.relpath(source, data_dir)
    return prepare_once(target, f"{name} in array_record form", build)


def main() -> None:
    """Runs the command."""
    if len(sys.argv) != 4:
        sys.exit((__doc__ or "").strip())
    try:
        print(convert(*sys.argv[1:]))
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
