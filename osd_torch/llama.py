"""Hugging Face's LLaMA: built from a config, its weights read and written, and its loss.

The model is transformers' own `LlamaForCausalLM` with PyTorch's scaled dot product attention, so
that all that works with one works with this. Only the loss is ours: a sum and a count, in float32,
which never holds all logits at once.
"""

from __future__ import annotations

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
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from osd_torch.sharding import is_first_process, whole

LOGITS_BYTES = 256 * 2**20
"""Float32 logits that `loss` holds at once, in bytes, by default.

Where a batch has more, they are made in slices of the tokens, and made again in the backward pass,
which costs a third product with the head. Few slices, since the gradient of the head is summed over
them in its own dtype.
"""

REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
SIZES = (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
KINDS = {
    "self_attn.q_proj.weight": "attention/query",
    "self_attn.k_proj.weight": "attention/key",
    "self_attn.v_proj.weight": "attention/value",
    "self_attn.o_proj.weight": "attention/output",
    "mlp.gate_proj.weight": "mlp/gate",
    "mlp.up_proj.weight": "mlp/up",
    "mlp.down_proj.weight": "mlp/down",
}

WEIGHTS = (
    "*.safetensors", "pytorch_model*", "*.pth", "*.pt", "model.ckpt*", "tf_model*", "flax_model*",
    "*.gguf",
)  # fmt: skip
"""What weights are called, in forms that `weight_files` reads and in those that it does not."""

# ---------------------------------------------------------------------------- configuration


def config_from_dict(values: Mapping[str, Any]) -> LlamaConfig:
    """Reads a Hugging Face `config.json`, of transformers 5 or older, as a dictionary.

    Raises:
        ValueError: not a LLaMA, a size is missing or no positive integer, or sizes do not divide.
    """
    if values.get("model_type") != "llama":
        raise ValueError(f"model_type is {values.get('model_type')!r}: expected 'llama'")
    if missing := [name for name in REQUIRED if values.get(name) is None]:
        raise ValueError(f"the LLaMA config lacks {', '.join(missing)}")
    known = dict(values)
    # The published LLaMA configs call the longest sequence by another name.
    longest = known.pop("max_sequence_length", None)
    if longest is not None:
        known.setdefault("max_position_embeddings", longest)
    for name in SIZES:
        size = known.get(name)
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{name} is {size!r}: expected a positive integer")
    heads = known["num_attention_heads"]
    for name, divisor in (("hidden_size", heads), ("num_attention_heads", _key_heads(known))):
        if known[name] % divisor:
            raise ValueError(
                f"{name} {known[name]} is not a multiple of "
                f"{'num_attention_heads' if divisor is heads else 'num_key_value_heads'} {divisor}"
            )
    # The published ones have -1 for none, which transformers takes for an index.
    pad = known.get("pad_token_id")
    if pad is not None and not 0 <= pad < known["vocab_size"]:
        known["pad_token_id"] = None
    try:
        config = LlamaConfig(**known)
    except Exception as error:  # huggingface_hub's own kinds, for a field of another type
        raise ValueError(f"the LLaMA config cannot be read: {' '.join(str(error).split())}") from (
            error
        )
    if int(config.head_dim or 0) % 2:
        raise ValueError(f"head_dim is {config.head_dim}: rotary embedding needs an even one")
    return config


def load_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """Reads a config file, such as `configs/llama_60m.json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not the config of a LLaMA; the message names the file.
    """
    try:
        return config_from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def compared(config: LlamaConfig) -> dict[str, Any]:
    """What makes a config's model what it is, by field, to compare it with another's."""
    names = (
        *SIZES, "rms_norm_eps", "initializer_range", "rope_parameters", "tie_word_embeddings",
        "hidden_act", "attention_bias", "mlp_bias",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def _key_heads(values: Mapping[str, Any]) -> int:
    return values.get("num_key_value_heads") or values["num_attention_heads"]


# ------------------------------------------------------------------------------- the model


def build(
    config: LlamaConfig,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """A model with fresh weights, drawn as transformers draws them.

    Kernels and embedding are normal with standard deviation `initializer_range`, norms one.

    Args:
        config: Its shape.
        seed: Of the draws, which are those of the device and dtype. The caller's random state is
            left as it is.
        dtype: Of the weights.
        device: Where they are made.
    """
    device = torch.device(device)
    padding, config.pad_token_id = config.pad_token_id, None  # see `_finished`
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    config.pad_token_id = padding
    return _finished(model, config)


def weight_files(directory: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a model: `model.safetensors`, or the shards that its index names.

    Reads their headers only, so that a run can refuse a folder before it does any work.

    Args:
        directory: of the model.

    Raises:
        OSError: there is none, or a shard is missing; the message names what is there instead.
        ValueError: the index or a file is damaged.
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
            f"{folder} has neither {whole.name} nor {index.name}"
            f"{', only ' + ', '.join(there[:3]) if there else ''}: load the model with "
            "transformers and write it by save_pretrained, which writes safetensors"
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
        OSError: one is missing.
        ValueError: it is no index of safetensors files.
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
            f"{index} names {len(files)} shards, of which {len(lost)} are not there, {lost[0]} "
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
    """Reads a LLaMA that transformers saved: `config.json` and safetensors, whole or in shards.

    Args:
        directory: Where they are.
        config: In place of the one in the directory, from which it differs only in token ids and
            the like.
        dtype: Of the weights; None: as in the file.
        device: Where they go.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the config is not a LLaMA's, or the tensors are not those it asks for; the
            message names the tensor.
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
        ignore_mismatched_sizes=True,  # told below, with the others
    )
    config.pad_token_id = padding
    model, found = loaded
    for problem, names in (
        ("lacks", found["missing_keys"]),
        ("has, and a LLaMA of this config has not,", found["unexpected_keys"]),
    ):
        if names:
            raise ValueError(f"{folder} {problem} {len(names)} tensors, {min(names)} first")
    for name, there, here in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{folder}: {name} has shape {tuple(there)}, the config asks for {tuple(here)}"
        )
    return _finished(model.to(device=device), config)


def _finished(model: LlamaForCausalLM, config: LlamaConfig) -> LlamaForCausalLM:
    """Ready to train, without a cache of keys.

    And without `padding_idx`, which zeroes the gradient of an embedding: the padding token is often
    the end-of-text token too, which has much to learn. What is padding says the mask.
    """
    model.config.pad_token_id = config.pad_token_id
    model.config.use_cache = False
    model.model.embed_tokens.padding_idx = None
    return model.train()


def prepare(
    model: LlamaForCausalLM, *, activation_checkpointing: bool = False, compile_layers: bool = False
) -> None:
    """Sets how a model computes; call it before it is sharded.

    Args:
        model: Changed in place.
        activation_checkpointing: Keep only each layer's input for the backward pass.
        compile_layers: Compile each layer; they share what is compiled.
    """
    if activation_checkpointing:
        # transformers renames it.
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    if compile_layers:
        for layer in model.model.layers:
            layer.compile()


def save_hf(directory: str | os.PathLike[str], model: LlamaForCausalLM) -> None:
    """Writes `config.json` and `model.safetensors`, as transformers' `from_pretrained` reads them.

    The weights keep their dtype. Each file appears whole or not at all, the config last. Sharded
    weights are gathered one by one; every process has to call this, and the first one writes.

    Raises:
        OSError: the directory cannot be made or written.
    """
    writes = is_first_process()
    tensors = hf_tensors(model, keep=writes)
    if not writes:
        return
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "model.safetensors", lambda to: write_safetensors(to, tensors))
    text = json.dumps(hf_config(model), indent=2) + "\n"
    _replace(folder / "config.json", lambda to: to.write_text(text, encoding="utf-8"))


def hf_tensors(model: LlamaForCausalLM, keep: bool = True) -> dict[str, Tensor]:
    """The weights by their Hugging Face names, on the CPU and whole; a tied head is left out.

    Args:
        model: Sharded or not.
        keep: Whether to keep them; a process that only helps to gather them does not.
    """
    tensors = {}
    for name, param in model.named_parameters():  # names a tied weight once
        gathered = whole(param.detach())
        if keep:
            tensors[name] = gathered.cpu().contiguous()
    return tensors


def hf_config(model: LlamaForCausalLM) -> dict[str, Any]:
    """The `config.json` from which transformers 5 and older build the same model."""
    values = model.config.to_dict()
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    theta = values["rope_parameters"]["rope_theta"]
    names = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    types = {"dtype": dtype, "torch_dtype": dtype, "rope_theta": theta}
    return {**values, **names, **types, "use_cache": True}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors to a new file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        # transformers refuses a file that does not say which framework's layout it has.
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name} cannot be written: {error}") from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `path`, then puts the finished file in its place."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        written = Path(scratch) / path.name
        write(written)
        os.replace(written, path)


# -------------------------------------------------------------------------------- the loss


def loss(
    model: LlamaForCausalLM,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of each token given those before it, summed over the batch.

    A sum and a count, not their quotient, so that parts of a batch can be added exactly.

    Args:
        model: The LLaMA.
        tokens: Integers (B, S): inputs, and one place to the left the labels.
        mask: Booleans (B, S), False where a token is no label to be learned. Padding on the right
            needs no other mask, since attention is causal.
        logits_bytes: Float32 logits to hold at once.

    Returns:
        The sum, float32, and how many tokens it is over, an integer; both 0-dimensional.
    """
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    # The last position predicts nothing: it keeps its place, with no weight, so that the arrays
    # keep their even shape.
    labels = torch.roll(tokens, -1, dims=1)
    weights = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    weights = torch.roll(weights, -1, dims=1)
    weights[:, -1] = False

    hidden, labels, weights = hidden.flatten(0, 1), labels.flatten(), weights.flatten()
    rows = max(1, logits_bytes // (4 * model.config.vocab_size))
    if len(labels) <= rows:
        return _token_losses(model.lm_head, hidden, labels, weights), weights.sum()
    parts = zip(hidden.split(rows), labels.split(rows), weights.split(rows), strict=True)
    losses = [
        checkpoint(_token_losses, model.lm_head, *part, use_reentrant=False) for part in parts
    ]
    return torch.stack(losses).sum(), weights.sum()


def _token_losses(head: torch.nn.Module, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum of -log softmax(head(hidden))[label] where `weights`, float32."""
    losses = functional.cross_entropy(head(hidden).float(), labels.long(), reduction="none")
    # A product, so that a factor on the loss that is not a number reaches every gradient.
    return (losses * weights).sum()


def is_projected(name: str, param: Tensor) -> bool:
    """Whether a parameter is projected by default: the kernels of attention and MLP.

    Args:
        name: From `named_parameters()`: "model.layers.0.self_attn.q_proj.weight".
        param: The parameter; a norm's vector or a bias is not a kernel.
    """
    return param.ndim == 2 and kind(name) is not None


def kind(name: str) -> str | None:
    """What a kernel is, whatever its layer, as "attention/query"; None for other parameters."""
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)
