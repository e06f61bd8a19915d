"""A run's directories: held by one process at a time, and emptied by `--overwrite`."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from launch.trainer.cli import UsageError, user_errors
from launch.trainer.options import Options


@contextlib.contextmanager
def claimed(options: Options) -> Iterator[None]:
    """Holds the run's directories for this process alone; with `--overwrite` it empties them.

    Raises:
        UsageError: another process has one of them, or they cannot be written to.
    """
    import fcntl

    with contextlib.ExitStack() as files:
        with user_errors():
            for directory in {options.run.path, options.run.save_path}:
                directory.mkdir(parents=True, exist_ok=True)
                lock = files.enter_context((directory / ".lock").open("w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UsageError(
                        f"--name: another process is writing to {directory}; wait for its end, or "
                        "use another --name"
                    ) from None
            if options.run.overwrite:
                remove_run(options.run.save_path)
        yield


def remove_run(directory: Path) -> None:
    """Deletes what an earlier run left: its checkpoints and its model, and no other files."""
    for path in (directory / "checkpoints").glob("[0-9]*"):
        shutil.rmtree(path, ignore_errors=True)
    model = directory / "model"
    for pattern in ("config.json", "*.safetensors*", "tokenizer*", "special_tokens_map.json"):
        for path in model.glob(pattern):
            path.unlink()
    if model.is_dir() and not any(model.iterdir()):
        model.rmdir()
