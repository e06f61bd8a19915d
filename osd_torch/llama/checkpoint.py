"""Saves and restores everything that a run needs to continue as if it had not stopped.

A checkpoint is a directory named by its step:

    model/          config.json and model.safetensors, as transformers reads them
    optimizer.pt    the optimizer's state by parameter name; `torch.load(weights_only=True)`
    sharded/        instead of these two if weights are sharded: `torch.distributed.checkpoint`
    random.pt       PyTorch's random state of each process
    state.json      the caller's data, such as the position in the data
    manifest.json   size and checksum of every other file

It is written under another name, flushed to disk and renamed when it is complete, so a run that is
killed while saving resumes from the previous checkpoint. If `torch.distributed` is initialized, all
processes call `save` and `restore` together, and see the same directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaForCausalLM

from osd_torch import llama
from osd_torch.guard import SkipsNonFinite, saved_counts
from osd_torch.sharding import gathered, is_first_process, process_count, process_index
from osd_torch.state import named_parameters

CHUNK = 2**24  # bytes read at a time
DAMAGED = "is damaged and cannot be read"
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a run, in numbered directories.

    Args:
        directory: The parent directory; created by the first save.
        keep: Number of newest checkpoints to keep. None: read only, which changes nothing there.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int | None = None) -> None:
        self.directory = Path(directory).absolute()
        self._keep = keep

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, newest first."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def save(
        self,
        step: int,
        model: LlamaForCausalLM,
        optimizer: torch.optim.Optimizer,
        extra: dict[str, Any],
    ) -> None:
        """Saves; when this returns the checkpoint is complete and on disk.

        Args:
            step: Number of updates; nothing is saved if a checkpoint of it exists.
            model: The LLaMA, sharded or not.
            optimizer: The optimizer of its parameters, between two updates.
            extra: JSON data; that of the first process is saved.

        Raises:
            OSError: It cannot be written. Partial files are removed; older checkpoints remain.
        """
        if gathered(step in self.steps())[0]:
            return
        temporary = self.directory / f"{step}.tmp"
        random = gathered(_random_state())

        def begin() -> None:
            for left in self.directory.glob("*.tmp"):
                shutil.rmtree(left)
            temporary.mkdir(parents=True)

        def write() -> None:
            (temporary / "model").mkdir()
            _write_json(temporary / "model" / "config.json", llama.hf_config(model))
            llama.write_safetensors(
                temporary / "model" / "model.safetensors", llama.hf_tensors(model)
            )
            _write_tensors(temporary / "optimizer.pt", optimizer_state(model, optimizer))

        def complete() -> None:
            _write_tensors(temporary / "random.pt", random)
            _write_json(
                temporary / "state.json",
                {
                    "step": step,
                    "skipped_steps": getattr(optimizer, "skipped", (0, 0)),
                    "extra": extra,
                    "made_with": made_with(model, optimizer),
                },
            )
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            manifest = {
                path.relative_to(temporary).as_posix(): {
                    "bytes": path.stat().st_size,
                    "crc32": _checksum(path),
                }
                for path in files
            }
            _write_json(temporary / "manifest.json", manifest)
            for path in (*temporary.rglob("*"), temporary):
                _flush(path)
            temporary.rename(self.directory / str(step))
            _flush(self.directory)
            for old in self.steps()[self._keep :]:
                shutil.rmtree(self.directory / str(old))

        try:
            _on_first(begin)
            if isinstance(model, FSDPModule):
                parts = _together(lambda: _sharded_state(model, optimizer))
                _together(lambda: _save_sharded(temporary / "sharded", parts))
            else:
                _on_first(write)
            _on_first(complete)
        except OSError as error:
            size = (size_in_bytes(model) + size_in_bytes(optimizer)) / 2**20
            if is_first_process():
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {step}, about {size:,.0f} MiB, cannot be written to "
                f"{self.directory}: {error}; free space there, or save elsewhere"
            ) from error

    def restore(
        self, step: int, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Restores a model, its optimizer and the random state from a checkpoint, bit for bit.

        It restores the optimizer's state; the optimizer's options, such as the weight decay, remain
        those that it was built with.

        Args:
            step: The step of the checkpoint.
            model: A model of the same shape and dtype, sharded or not as the saved one; a sharded
                checkpoint can also be loaded into an unsharded model.
            optimizer: An optimizer of its parameters, built alike.

        Returns:
            The saved `extra`.

        Raises:
            ValueError: The checkpoint belongs to another model or optimizer. Nothing is changed.
            OSError: It is damaged, or a process cannot read it: all processes raise, so that all
                can resume from another one. Nothing is changed, unless a read of sharded weights
                fails midway.
        """
        directory = self.directory / str(step)
        _on_first(lambda: _verify(directory))

        def read(load: Callable[[Path], Any], name: str) -> Any:
            with _reading(directory):
                return load(directory / name)

        saved = _together(lambda: read(_read_json, "state.json"))
        random = _together(lambda: read(_read_tensors, "random.pt"))
        _together(lambda: _check_alike(directory, saved["made_with"], made_with(model, optimizer)))
        if (directory / "sharded").is_dir():
            _together(lambda: _load_sharded(directory, model, optimizer))
        elif isinstance(model, FSDPModule):
            raise ValueError(
                f"{directory} holds unsharded weights, but this run shards them: resume without "
                f"--fsdp, or start from the weights in {directory / 'model'}"
            )
        else:
            weights = _together(lambda: read(load_file, "model/model.safetensors"))
            state = _together(lambda: read(_read_tensors, "optimizer.pt"))
            load_weights(model, weights)
            load_optimizer_state(optimizer, model, state)
        if isinstance(optimizer, SkipsNonFinite):
            optimizer.skipped = saved_counts(saved)
        if (rank := process_index()) < len(random):
            _set_random_state(random[rank])
        return saved["extra"]

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps to N.set-aside, so that step N can be saved again.

        For a run that restarts from an earlier checkpoint, or past one that it could not read but
        another attempt might.
        """
        if not self.directory.is_dir() or not is_first_process():
            return
        for path in self.directory.iterdir():
            if path.name.isdigit() and int(path.name) > step:
                aside = path.with_name(f"{path.name}.set-aside")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    def wait(self) -> None:
        """Returns when the last save is complete, which it is when `save` returns."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()


# -------------------------------------------------------------------------------- the state


def optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """An optimizer's state by the names of the model's parameters."""
    state = optimizer.state_dict()["state"]
    return {name: state[i] for i, name in enumerate(_names(model, optimizer)) if i in state}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, state: dict[str, dict[str, Any]]
) -> None:
    """Loads a state from `optimizer_state` into an optimizer; its options remain."""
    by_index = {i: state[name] for i, name in enumerate(_names(model, optimizer)) if name in state}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})


@torch.no_grad()
def load_weights(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies tensors, by the names of a model's parameters, into these."""
    for name, param in model.named_parameters():
        param.copy_(tensors[name])


def made_with(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """What determines the shapes of weights and state, by name, in words."""
    found = {"the optimizer": type(optimizer).__name__}
    for name, param in model.named_parameters():
        found[name] = f"{str(param.dtype).removeprefix('torch.')}{list(param.shape)}"
    for group in optimizer.param_groups:
        if "beta1" in group:
            found["the first moment"] = "present" if group["beta1"] is not None else "absent"
        if group.get("rank") is not None:
            for name, _ in named_parameters(group):
                found[f"the subspace of {name}"] = f"{group['proj_type']} of rank {group['rank']}"
    return found


def _check_alike(directory: Path, there: dict[str, str], here: dict[str, str]) -> None:
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{directory} is of another model or optimizer: {name} is "
                f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} in this run; "
                "use the options that it was trained with"
            )


def _names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    names = {param: name for name, param in model.named_parameters()}
    return [names[param] for group in optimizer.param_groups for param in group["params"]]


def _sharded_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def _save_sharded(directory: Path, parts: dict[str, Any]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.save(parts, checkpoint_id=directory)
    except CheckpointException as error:  # of any process; all receive it
        raise OSError(_cause(error)) from error


def _load_sharded(
    directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_state_dict

    options = [dict(group) for group in optimizer.param_groups]
    parts = _sharded_state(model, optimizer)
    try:
        saved = dcp.FileSystemReader(directory / "sharded").read_metadata().state_dict_metadata
        if not any(key.endswith(".set_at") for key in saved):  # from an earlier version
            states = parts["optimizer"]["state"]
            for name, state in states.items():  # load_state_dict completes them
                states[name] = {key: x for key, x in state.items() if key != "set_at"}
        # Groups are those of this run.
        wanted = {"model": parts["model"], "optimizer": {"state": parts["optimizer"]["state"]}}
        dcp.load(wanted, checkpoint_id=directory / "sharded")
    except CheckpointException as error:
        raise OSError(f"{directory} {DAMAGED}: {_cause(error)}") from error
    set_state_dict(
        model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"]
    )
    for group, mine in zip(optimizer.param_groups, options, strict=True):
        group |= {key: value for key, value in mine.items() if key != "params"}


def _cause(error: Any) -> str:
    """The first failure of a `torch.distributed.checkpoint.api.CheckpointException`."""
    return str(next(iter(error.failures.values()))[0])


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def size_in_bytes(of: torch.nn.Module | torch.optim.Optimizer) -> int:
    """Size in bytes of the weights, or of the optimizer's state."""
    if isinstance(of, torch.nn.Module):
        return sum(param.nbytes for param in of.parameters())
    states = (state.values() for state in of.state.values())
    return sum(x.nbytes for values in states for x in values if isinstance(x, Tensor))


# ------------------------------------------------------------------------- files, processes


def _together(work: Callable[[], T]) -> T:
    """Runs a piece of work on every process; fails on all if it fails on one.

    Returns:
        The result on this process.

    Raises:
        OSError: A process could not write or read, or failed with another error, which is raised
            there.
        ValueError: The work raised it.
    """
    failure: tuple[type[Exception], str] | None = None
    fault = None
    try:
        result = work()
    except (OSError, RuntimeError) as error:  # torch.save raises either for a full disk
        failure = OSError, str(error)
    except ValueError as error:
        failure = ValueError, str(error)
    except Exception as error:
        failure = OSError, f"process {process_index()} failed: {type(error).__name__}: {error}"
        fault = error
    failures = gathered(failure)
    if fault is not None:
        raise fault
    for found in failures:
        if found is not None:
            kind, message = found
            raise kind(message)
    return result


def _on_first(work: Callable[[], object]) -> None:
    """`_together` for work that only the first process does."""
    _together(work if is_first_process() else lambda: None)


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """Converts the various errors of the file readers into an OSError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reader = f" (by process {process_index()})" if process_count() > 1 else ""
        raise OSError(f"{directory} {DAMAGED}{reader}: {error}") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tensors(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        torch.save(value, file)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _flush(path: Path) -> None:
    """Returns when a file or directory is on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _verify(directory: Path) -> None:
    """Raises OSError unless every file exists and matches the manifest."""
    damaged = f"{directory} {DAMAGED}"
    try:
        manifest = _read_json(directory / "manifest.json")
    except (OSError, ValueError) as error:
        raise OSError(damaged) from error
    for name, wanted in manifest.items():
        path = directory / name
        is_there = path.is_file() and path.stat().st_size == wanted["bytes"]
        if not is_there or _checksum(path) != wanted["crc32"]:
            raise OSError(f"{damaged}: {name}")
