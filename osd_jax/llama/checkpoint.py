"""Saves and restores everything that a run needs to continue as if it had not stopped.

Orbax writes each checkpoint into a temporary directory and renames it when it is complete, so a run
that is killed while saving resumes from the previous checkpoint. With several processes, each
writes its part of the arrays into the same directory, which all must see; all of them make the same
calls. A checkpoint can be read by a different number of devices or processes than wrote it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from osd_jax.llama.old_checkpoints import as_saved
from osd_jax.llama.train import TrainState
from osd_jax.trees import path_name


class Restored(NamedTuple):
    """The result of `Checkpoints.restore`: the state, and the JSON that was saved with it."""

    state: TrainState
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, in numbered directories.

    Args:
      directory: The parent directory; created by the first save.
      keep: Number of newest checkpoints to keep. None: read only, which changes nothing there.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int | None = None) -> None:
        self.directory = Path(directory).absolute()
        self._keep = keep

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        writes = self._keep is not None
        return ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "extra": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
                create=writes,
                cleanup_tmp_directories=writes,
            ),
        )

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, newest first."""
        exists = self.directory.is_dir()
        return sorted(self._manager.all_steps(), reverse=True) if exists else []

    def save(self, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Saves in the background; the state's arrays are copied before this returns.

        Args:
          step: Number of updates; nothing is saved unless it exceeds that of the newest checkpoint.
          state: Any pytree of arrays.
          extra: JSON data, such as the position in the data.

        Raises:
          OSError: This checkpoint, or the previous one, cannot be written. Older checkpoints
            remain.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra)
        )
        with self._writing():
            self._manager.save(step, args=items)

    def restore(self, step: int, like: TrainState) -> Restored:
        """Reads a checkpoint back, bit for bit.

        A checkpoint of an earlier version is converted; see `osd_jax.llama.old_checkpoints`.

        Args:
          step: The step of the checkpoint.
          like: A state with the same structure, shapes and dtypes; arrays or
            `jax.ShapeDtypeStruct`. The result has its sharding, on the first device if it has none,
            independent of the sharding when the checkpoint was saved.

        Raises:
          ValueError: The checkpoint has another structure, other shapes or dtypes: it belongs to
            another model or optimizer.
          OSError: The checkpoint is damaged.
        """
        abstract = jax.tree.map(_with_sharding, like)
        with self._reading(step):
            saved = self._manager.item_metadata(step)["state"].tree
        there, converted = as_saved(saved, abstract)
        self._check_alike(step, saved, there)
        with self._reading(step):
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(there), extra=ocp.args.JsonRestore()
                ),
            )
        return Restored(converted(found["state"]), found["extra"])

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Converts the various errors of Orbax and TensorStore into an OSError."""
        try:
            yield
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            # Interrupted reads print pages of messages when they are garbage-collected.
            hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
            gc.collect()
            sys.unraisablehook = hook
            path = self.directory / str(step)
            reason = str(error).partition("\n")[0]
            raise OSError(f"{path} is damaged and cannot be read: {reason}") from error

    def _check_alike(self, step: int, saved: Any, wanted: Any) -> None:
        def arrays(tree: Any) -> dict[str, str]:
            return {
                path_name(path): f"{x.dtype}{list(x.shape)}"
                for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
            }

        there, here = arrays(saved), arrays(wanted)
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{self.directory / str(step)} is of another model or optimizer: {name} is "
                    f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} in this "
                    "run; use the options that it was trained with, and the version of this "
                    "library that saved it"
                )

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps to N.set-aside, so that step N can be saved again.

        For a run that restarts from an earlier checkpoint, or past one that it could not read but
        another attempt might.
        """
        if not self.directory.is_dir():
            return
        if jax.process_index() == 0:
            for path in self.directory.iterdir():
                if path.name.isdigit() and int(path.name) > step:
                    aside = path.with_name(f"{path.name}.set-aside")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")
        self._manager.reload()

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
          OSError: It cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Converts the various errors of Orbax and TensorStore into an OSError."""
        try:
            yield
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise OSError(
                f"a checkpoint cannot be written to {self.directory}: {reason}; free space there, "
                "or save elsewhere, and resume from the previous one"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # A save is complete when all processes have written. After an error they may no longer
        # exist.
        if kind is None or jax.process_count() == 1:
            self._manager.close()


def _with_sharding(x: Any) -> jax.ShapeDtypeStruct:
    x = ocp.utils.to_shape_dtype_struct(x)
    if x.sharding is not None:
        return x
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first)


def whole(tree: Any) -> Any:
    """All-gathers arrays that may be sharded over several processes, for the first to write.

    If an array has an axis of layers, one layer at a time: a device then holds at most one full
    layer. All processes call it together.

    Args:
      tree: A pytree of arrays; in arrays with three or more axes the first is the axis of layers.

    Returns:
      The tree of NumPy arrays on the first process, None on the others.

    Example:
      >>> import jax.numpy as jnp
      >>> whole({"w": jnp.arange(3)})
      {'w': array([0, 1, 2], dtype=int32)}
    """
    is_first = jax.process_index() == 0

    def on_host(array: jax.Array) -> np.ndarray | None:
        if array.is_fully_addressable:
            return np.asarray(array) if is_first else None
        assert isinstance(array.sharding, jax.sharding.NamedSharding)
        everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
        if array.ndim < 3:
            copy = jax.jit(lambda x: x, out_shardings=everywhere)(array)
            return np.asarray(copy) if is_first else None
        layer = jax.jit(lambda x, index: x[index], out_shardings=everywhere)
        found = np.empty(array.shape, array.dtype) if is_first else None
        for index in range(array.shape[0]):
            copy = layer(array, np.int32(index))
            if found is not None:
                found[index] = np.asarray(copy)
        return found

    found = jax.tree.map(on_host, tree)
    return found if is_first else None
