"""Hugging Face's LLaMA: built from a config, and its loss.

The model is transformers' own `LlamaForCausalLM` with PyTorch's scaled dot product attention, so
everything that works with one works with this. Only the loss is ours: a sum and a count, in
float32, which never holds all logits at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

LOGITS_BYTES = 256 * 2**20
"""Default size in bytes of the float32 logits that `loss` holds at once.

If a batch has more, they are computed in slices of the tokens, and recomputed in the backward pass,
which costs a third product with the head. Few slices are better, because the gradient of the head
is summed over them in its own dtype.
"""

REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
SIZES = (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
_ROPE_TYPES = ("default", "linear", "llama3")
_ROPE_VALUES = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip
# Fields of a config that change the model, and the only value that both libraries support.
_ONLY = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
KINDS = {
    "self_attn.q_proj.weight": "attention/query",
    "self_attn.k_proj.weight": "attention/key",
    "self_attn.v_proj.weight": "attention/value",
    "self_attn.o_proj.weight": "attention/output",
    "mlp.gate_proj.weight": "mlp/gate",
    "mlp.up_proj.weight": "mlp/up",
    "mlp.down_proj.weight": "mlp/down",
}


# ---------------------------------------------------------------------------- configuration
def config_from_dict(values: Mapping[str, Any]) -> LlamaConfig:
    """Parses a Hugging Face `config.json`, of transformers 5 or older, given as a dictionary.

    Args:
        values: The contents of the file.

    Returns:
        The config.

    Raises:
        ValueError: It is not a LLaMA, a size is missing or not a positive integer, sizes are not
            divisible, or it uses an option that JAX's model does not support.
    """
    if values.get("model_type") != "llama":
        raise ValueError(f"model_type is {values.get('model_type')!r}: expected 'llama'")
    _check_supported(values)
    if missing := [name for name in REQUIRED if values.get(name) is None]:
        raise ValueError(f"the LLaMA config lacks {', '.join(missing)}")
    known = dict(values)
    # The published LLaMA configs use another name for the maximum sequence length.
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
    # The published configs use -1 for none, which transformers interprets as an index.
    pad = known.get("pad_token_id")
    if pad is not None and not 0 <= pad < known["vocab_size"]:
        known["pad_token_id"] = None
    try:
        config = LlamaConfig(**known)
    except Exception as error:  # huggingface_hub's own types, for a field of another type
        raise ValueError(f"the LLaMA config cannot be read: {' '.join(str(error).split())}") from (
            error
        )
    if int(config.head_dim or 0) % 2:
        raise ValueError(f"head_dim is {config.head_dim}: rotary embedding needs an even one")
    return config


def _check_supported(values: Mapping[str, Any]) -> None:
    """Rejects options of a config that only one of the two libraries' models would support."""
    architectures = values.get("architectures") or ["LlamaForCausalLM"]
    if "LlamaForCausalLM" not in architectures:
        raise ValueError(f"architectures is {architectures!r}: expected 'LlamaForCausalLM'")
    # transformers 5 writes rope_parameters; older versions write rope_scaling.
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = values.get(key) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{key} is {given!r}: expected an object, or none")
        rope |= given
    for key, only in _ONLY.items():
        if (value := {**values, **rope}.get(key, only)) not in (only, None):
            raise ValueError(f"{key} is {value!r}: this model supports only {only!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        raise ValueError(
            f"rope_type is {rope_type!r}: this model supports only "
            f"{', '.join(map(repr, _ROPE_TYPES))}"
        )
    needed = {"linear": _ROPE_VALUES[:1], "llama3": _ROPE_VALUES}.get(rope_type, ())
    for name in needed:
        number: Any = rope.get(name)
        if type(number) not in (int, float) or number <= 0:
            raise ValueError(
                f"rope_type {rope_type!r} has {name} {number!r}: expected a positive number"
            )


def load_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """Reads a config file, such as `configs/llama_60m.json`.

    Args:
        path: Path of the file.

    Returns:
        The config.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON, or not the config of a LLaMA; the message names the file.
    """
    try:
        return config_from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def compared(config: LlamaConfig) -> dict[str, Any]:
    """The fields of a config that determine its model, for comparison with another's.

    Args:
        config: The model's config.

    Returns:
        The values by field name.
    """
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
    """A model with new weights, drawn as in transformers.

    Kernels and embedding are normal with standard deviation `initializer_range`, norms one.

    Args:
        config: Its shape.
        seed: Seed of the draws, which depend on the device and dtype. The caller's random state is
            unchanged.
        dtype: Dtype of the weights.
        device: Device on which they are created.

    Returns:
        The model, ready for training.
    """
    device = torch.device(device)
    padding, config.pad_token_id = config.pad_token_id, None  # see `finished`
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    config.pad_token_id = padding
    return finished(model, config)


def hf_config(model: LlamaForCausalLM) -> dict[str, Any]:
    """The `config.json` from which transformers 5 and older build the same model.

    Args:
        model: The LLaMA.

    Returns:
        The contents of the file.
    """
    values = model.config.to_dict()
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    rope = dict(values["rope_parameters"])
    theta = rope.pop("rope_theta")
    names = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    types: dict[str, Any] = {"dtype": dtype, "torch_dtype": dtype, "rope_theta": theta}
    if rope["rope_type"] != "default":
        types["rope_scaling"] = rope  # for transformers before 5
    return {**values, **names, **types, "use_cache": True}


# -------------------------------------------------------------------------------- the loss
def loss(
    model: LlamaForCausalLM,
    tokens: Tensor,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    *,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of each token given the preceding ones, summed over the batch.

    Returns a sum and a count instead of their quotient, so that parts of a batch add up exactly.

    Args:
        model: The LLaMA.
        tokens: Integers (B, S): the inputs, and shifted left by one the labels.
        mask: Booleans (B, S), False for tokens that are not labels. Padding on the right needs no
            other mask, because attention is causal.
        segments: Integers (B, S), the document of each token of a packed row: a token sees only its
            own document, in which positions start at 0. `mask` should exclude the first token of
            each document. None: a row is one document.
        logits_bytes: Float32 logits to hold at once.

    Returns:
        The sum, float32, and the number of tokens, an integer; both 0-dimensional.
    """
    places = {} if segments is None else within_documents(segments)
    hidden = model.model(input_ids=tokens, use_cache=False, **places).last_hidden_state
    # The last position predicts nothing: it stays, with weight zero, so that the arrays keep their
    # even shape.
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


def within_documents(segments: Tensor) -> dict[str, Tensor]:
    """The arguments of transformers' LLaMA that keep the documents of a packed row separate.

    Args:
        segments: Integers (B, S), the document of each token.

    Returns:
        "attention_mask", bool (B, 1, S, S), and "position_ids", int64 (B, S), which restart at 0
        where the segment changes.
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    seen = (segments[:, :, None] == segments[:, None, :]) & (index[:, None] >= index)
    is_start = segments != segments.roll(1, dims=1)
    is_start[:, 0] = True
    starts = torch.where(is_start, index, 0).cummax(dim=1).values
    return {"attention_mask": seen[:, None], "position_ids": index - starts}


def _token_losses(head: torch.nn.Module, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum of -log softmax(head(hidden))[label] where `weights`, float32."""
    losses = functional.cross_entropy(head(hidden).float(), labels.long(), reduction="none")
    # A product, so that a non-finite factor on the loss reaches every gradient.
    return (losses * weights).sum()


def is_projected(name: str, param: Tensor) -> bool:
    """Whether a parameter is projected by default: the kernels of attention and MLP.

    Args:
        name: From `named_parameters()`: "model.layers.0.self_attn.q_proj.weight".
        param: The parameter; the vector of a norm or a bias is not a kernel.

    Returns:
        Whether it is projected.
    """
    return param.ndim == 2 and kind(name) is not None


def kind(name: str) -> str | None:
    """The kind of a kernel, in any layer.

    Args:
        name: From `named_parameters()`.

    Returns:
        For example "attention/query"; None for other parameters.
    """
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)


def finished(model: LlamaForCausalLM, config: LlamaConfig) -> LlamaForCausalLM:
    """Prepares a model for training, without a key cache.

    It also removes `padding_idx`, which zeroes the gradient of an embedding: the padding token is
    often the end-of-text token too, which must be trained. The mask determines what is padding.
    """
    model.config.pad_token_id = config.pad_token_id
    model.config.use_cache = False
    model.model.embed_tokens.padding_idx = None
    return model.train()


def prepare(
    model: LlamaForCausalLM, *, activation_checkpointing: bool = False, compile_layers: bool = False
) -> None:
    """Sets how a model computes; call it before the model is sharded.

    Args:
        model: Modified in place.
        activation_checkpointing: Whether to save only each layer's input for the backward pass.
        compile_layers: Whether to compile each layer; all share the compiled code.
    """
    if activation_checkpointing:
        # transformers renames it.
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    if compile_layers:
        for layer in model.model.layers:
            layer.compile()
