"""Finds, reads and writes LLaMA's weights in Hugging Face's format."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from osd_torch.llama.model import finished, hf_config, load_config
from osd_torch.sharding import is_first_process, whole

WEIGHTS = (
    "*.safetensors", "pytorch_model*", "*.pth", "*.pt", "model.ckpt*", "tf_model*", "flax_model*",
    "*.gguf",
)  # fmt: skip
"""File names of weights, in formats that `weight_files` supports and in those that it does not."""

SHARD_BYTES = 50 * 10**9
"""Default size in bytes of the largest file that `save_hf` writes, as in transformers 5."""

Write = Callable[[list[str], Path], object]


def weight_files(directory: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a model: `model.safetensors`, or the shards that its index names.

    It only reads their headers, so that a run can reject a folder before it does any work.

    Args:
        directory: Folder of the model.

    Returns:
        The paths of the files.

    Raises:
        OSError: There is none, or a shard is missing; the message names the files found instead.
        ValueError: The index or a file is damaged.
    """
    folder = Path(directory)
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        files = _shards(index)
    else:
        there = [path.name for kind in WEIGHTS for path in sorted(folder.glob(kind))]
        raise FileNotFoundError(
            f"{folder} has neither {whole.name} nor "
            f"{index.name}{', only ' + ', '.join(there[:3]) if there else ''}: load the model "
            "with transformers and save it with save_pretrained, which writes safetensors"
        )
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is not a readable safetensors file: {error}; fetch or save it again"
                f"{' (git lfs pull: it is a pointer of Git LFS)' if _is_pointer(path) else ''}"
            ) from error
    return files


def _shards(index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
        OSError: A file is missing.
        ValueError: It is not an index of safetensors files.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or not all(name.endswith(".safetensors") for name in names):
            raise ValueError(f"it names {names[:3]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index of safetensors shards: {error!r}; fetch or save it again"
        ) from error
    files = [index.parent / name for name in names]
    if lost := [path.name for path in files if not path.is_file()]:
        raise FileNotFoundError(
            f"{index} names {len(files)} shards, but {len(lost)} are missing, {lost[0]} "
            "first: fetch them, or save the model again"
        )
    return files


def _is_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def load_hf(
    directory: str | os.PathLike[str],
    *,
    config: LlamaConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """Reads a LLaMA saved by transformers: `config.json` and safetensors, in one file or in shards.

    Args:
        directory: Folder of the model.
        config: Replaces the config in the directory, from which it may differ only in fields such
            as token ids.
        dtype: Dtype of the weights; None: that of the file.
        device: Device of the weights.

    Returns:
        The model, ready for training.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: The config is not a LLaMA's, or the tensors do not match it; the message names
            the tensor.
    """
    folder = Path(directory)
    config = config or load_config(folder / "config.json")
    weight_files(folder)
    padding, config.pad_token_id = config.pad_token_id, None
    loaded: Any = LlamaForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype or "auto",
        attn_implementation="sdpa",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, with the others
    )
    config.pad_token_id = padding
    model, found = loaded
    for problem, names in (
        ("lacks", found["missing_keys"]),
        ("contains tensors that a LLaMA of this config lacks:", found["unexpected_keys"]),
    ):
        if names:
            raise ValueError(f"{folder} {problem} {len(names)} tensors, {min(names)} first")
    for name, there, here in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{folder}: {name} has shape {tuple(there)}, but the config expects {tuple(here)}"
        )
    return finished(model.to(device=device), config)


def save_hf(
    directory: str | os.PathLike[str], model: LlamaForCausalLM, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `config.json` and the weights, as transformers' `from_pretrained` reads them.

    The weights keep their dtype, and lie in `model.safetensors`, or in several files and their
    index. Each file is written atomically, the config last. Sharded weights are gathered one by
    one; every process must call this, and the first one writes.

    Args:
        directory: Folder of the model; created if it does not exist.
        model: The LLaMA, sharded or not.
        shard_bytes: Maximum number of bytes of tensors per file.

    Raises:
        OSError: The directory cannot be created or written.
    """
    writes = is_first_process()
    tensors = hf_tensors(model, keep=writes)
    if not writes:
        return
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)

    def write(names: list[str], path: Path) -> None:
        write_safetensors(path, {name: tensors[name] for name in names})

    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    _write_files(folder, sizes, shard_bytes, write)
    text = json.dumps(hf_config(model), indent=2) + "\n"
    _replace(folder / "config.json", lambda to: to.write_text(text, encoding="utf-8"))


def hf_tensors(model: LlamaForCausalLM, keep: bool = True) -> dict[str, Tensor]:
    """The weights by their Hugging Face names, on the CPU and unsharded; a tied head is omitted.

    Args:
        model: Sharded or not.
        keep: Whether to keep them; a process that only helps to gather them does not.

    Returns:
        The weights by name; empty without `keep`.
    """
    tensors = {}
    for name, param in model.named_parameters():  # yields a tied weight once
        gathered = whole(param.detach())
        if keep:
            tensors[name] = gathered.cpu().contiguous()
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors to a new file.

    Args:
        path: Path of the file.
        tensors: The tensors by name.

    Raises:
        OSError: It cannot be written.
    """
    try:
        # transformers rejects a file that does not name its framework's layout.
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name} cannot be written: {error}") from error


def _shard_names(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The tensors of each file, in order: as many as fit, and at least one.

    Args:
        sizes: Bytes of each tensor by name.
        limit: Maximum number of bytes per file.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_files(folder: Path, sizes: Mapping[str, int], limit: int, write: Write) -> None:
    """Writes `model.safetensors`, or shards and their index, and deletes those of an earlier model.

    Args:
        folder: Folder of the model.
        sizes: Bytes of each tensor by name.
        limit: Maximum number of bytes per file.
        write: Writes the tensors of these names to a new file.
    """
    shards = _shard_names(sizes, limit)
    files = {"model.safetensors": shards[0]}
    if len(shards) > 1:
        files = {
            f"model-{number:05}-of-{len(shards):05}.safetensors": names
            for number, names in enumerate(shards, start=1)
        }
    for file, names in files.items():
        _replace(folder / file, functools.partial(write, names))
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        where = {name: file for file, names in files.items() for name in names}
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        _replace(index, lambda to: to.write_text(text, encoding="utf-8"))
    else:
        index.unlink(missing_ok=True)
    for old in (folder / "model.safetensors", *folder.glob("model-*-of-*.safetensors")):
        if old.name not in files:
            old.unlink(missing_ok=True)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a temporary file next to `path`, then renames it to `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        written = Path(scratch) / path.name
        write(written)
        os.replace(written, path)
