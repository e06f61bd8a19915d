"""Finds, reads and writes LLaMA's weights in Hugging Face's format."""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from osd_jax.llama.config import LlamaConfig
from osd_jax.llama.model import Params, abstract

_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_TOP_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
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
            with safe_open(path, "numpy"):
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
    directory: str | os.PathLike[str], shardings: Params | None = None
) -> tuple[LlamaConfig, Params]:
    """Reads a LLaMA saved by transformers: `config.json` and safetensors, in one file or in shards.

    Weights keep the dtype of the file.

    Args:
        directory: Folder of the model.
        shardings: The `jax.sharding.Sharding` of each parameter: each device then receives only its
            own part. None: everything on the default device.

    Returns:
        (config, weights).

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: The config is not a LLaMA's, or the tensors do not match it; the message names
            the tensor.
    """
    folder = Path(directory)
    config = LlamaConfig.load(folder / "config.json")
    specs = abstract(config)[1]
    expected = {name for path, spec in _named_leaves(specs) for name in _hf_names(path, spec)}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in weight_files(folder):
            file = stack.enter_context(safe_open(path, "numpy"))
            files |= dict.fromkeys(file.keys(), file)
        # Old files contain the rotary frequencies, and sometimes a tied head a second time.
        ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")}
        if config.tie_word_embeddings:
            ignored.add("lm_head.weight")
        for problem, names in (
            ("lacks", expected - files.keys()),
            (
                "contains tensors that a LLaMA of this config lacks:",
                files.keys() - expected - ignored,
            ),
        ):
            if names:
                raise ValueError(f"{folder} {problem} {len(names)} tensors, {min(names)} first")

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            tensor = files[name].get_tensor(name)
            if tensor.shape != shape:
                raise ValueError(
                    f"{folder}: {name} has shape {tensor.shape}, but the config expects {shape}"
                )
            return tensor

        def load(
            path: tuple[Any, ...],
            spec: jax.ShapeDtypeStruct,
            sharding: jax.sharding.Sharding | None = None,
        ) -> jax.Array:
            key = _key(path)
            names, stacked = _hf_names(key, spec), key.startswith("layers/")
            shape = spec.shape[stacked:]
            if _is_transposed(key, len(shape)):
                tensors = [read(name, shape[::-1]).T for name in names]
            else:
                tensors = [read(name, shape) for name in names]
            whole = np.stack(tensors) if stacked else tensors[0]
            if sharding is None:
                return jnp.asarray(whole)
            return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

        layout = () if shardings is None else (shardings,)
        return config, jax.tree_util.tree_map_with_path(load, specs, *layout)


def save_hf(
    directory: str | os.PathLike[str],
    config: LlamaConfig,
    params: Params,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `config.json` and the weights, as transformers' `from_pretrained` reads them.

    The weights keep their dtype, and lie in `model.safetensors`, or in several files and their
    index. Each file is written atomically, the config last.

    Args:
        directory: Folder of the model; created if it does not exist.
        config: The model's shape.
        params: The weights.
        shard_bytes: Maximum number of bytes of tensors per file.

    Raises:
        OSError: The directory cannot be created or written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in _named_leaves(params):
        host = np.asarray(leaf)
        for name, array in zip(
            _hf_names(path, leaf), host if path.startswith("layers/") else [host], strict=True
        ):
            tensors[name] = np.ascontiguousarray(
                array.T if _is_transposed(path, array.ndim) else array
            )
    dtype = str(params["embedding"].dtype)
    text = json.dumps({**config.to_hf_dict(), "dtype": dtype, "torch_dtype": dtype}, indent=2)

    def write(names: list[str], path: Path) -> None:
        # transformers rejects a file that does not name its framework's layout.
        save_file({name: tensors[name] for name in names}, path, {"format": "pt"})

    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    _write_files(folder, sizes, shard_bytes, write)
    _replace(folder / "config.json", lambda to: to.write_text(text + "\n", encoding="utf-8"))


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


def _key(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named_leaves(params: Params) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield _key(path), leaf


def _hf_names(path: str, leaf: Any) -> list[str]:
    """Hugging Face's names for one parameter, one per layer if it is stacked."""
    if path.startswith("layers/"):
        kernel = path.removeprefix("layers/").removesuffix("_bias")
        suffix = _LAYER_NAMES[kernel] + (".bias" if path.endswith("_bias") else ".weight")
        return [f"model.layers.{layer}.{suffix}" for layer in range(leaf.shape[0])]
    return [f"{_TOP_NAMES[path]}.weight"]


def _is_transposed(path: str, ndim: int) -> bool:
    """PyTorch's linear weights are (output, input); its embedding has the same layout as ours."""
    return ndim == 2 and path != "embedding"
