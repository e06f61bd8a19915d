"""LLaMA in Flax NNX, with the layers stacked and scanned, and its Hugging Face weights.

The module classes say what the network is; everything a trainer calls is a pure function of
`params`, a plain nested dict of arrays. With L layers, hidden size H, intermediate size F,
vocabulary V, N query heads and K key heads of D entries each:

    embedding                (V, H)
    layers/attention_norm    (L, H)
    layers/attention/query   (L, H, N*D)     key, value: (L, H, K*D)     output: (L, N*D, H)
    layers/mlp_norm          (L, H)
    layers/mlp/gate, up      (L, H, F)       down: (L, F, H)
    norm                     (H,)
    head                     (H, V), absent when the embedding is tied

Kernels are (input, output). Matrix products run in `dtype`; norms, rotary angles, softmax and the
loss are float32.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from osd_jax.sharding import look_up, split_batch
from osd_jax.subspace import SubspaceDimensionNumbers

Params = dict[str, Any]
Tokens = jax.Array | np.ndarray

LOGITS_BYTES = 64 * 2**20
"""Float32 logits that `loss` holds at once, in bytes, by default.

Below this the whole logits fit beside the activations of the same batch, and one slice spares the
second product with the head that recomputation costs (a quarter of the head's work). Above it
the logits would be the largest array of the step.
"""

MIN_VOCABULARY_SLICE = 1024
"""Columns of the head in one slice, at least: narrower products leave the hardware idle."""


# ---------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA; the fields are named as in Hugging Face's `LlamaConfig`.

    Frozen and hashable, so that it can be a static argument of a jitted function. `head_dim` and
    `num_key_value_heads` may be left out and are then filled in.

    Raises:
        ValueError: a size that is not a positive integer, or sizes that do not divide.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Fills in what was left out, and checks the sizes."""
        heads = self.num_attention_heads
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", heads)
        if not self.head_dim and isinstance(heads, int) and heads > 0:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{heads}: change one, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} is {value!r}: expected a positive integer")
            if field.type is float and (type(value) not in (int, float) or value <= 0):
                raise ValueError(f"{field.name} is {value!r}: expected a positive number")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} is {value!r}: expected true or false")
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary embedding needs an even one")

    @classmethod
    def from_hf_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face `config.json`, of transformers 5 or older, as a dictionary.

        Raises:
            ValueError: not a LLaMA, a size is missing, or an option that this model lacks.
        """
        if values.get("model_type") != "llama":
            raise ValueError(f"model_type is {values.get('model_type')!r}: expected 'llama'")
        for key, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if values.get(key, only) != only:
                raise ValueError(f"{key} is {values[key]!r}: this model has only {only!r}")
        # transformers 5 writes rope_parameters; older versions rope_theta beside rope_scaling.
        rope = {"rope_theta": values.get("rope_theta") or cls.rope_theta}
        for key in ("rope_scaling", "rope_parameters"):
            given = values.get(key) or {}
            if not isinstance(given, Mapping):
                raise ValueError(f"{key} is {given!r}: expected an object, or none")
            rope |= given
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"rope_type is {rope_type!r}: this model has only 'default'")
        # null stands for "work it out" in sizes, and for "none" in token ids.
        known = {
            field.name: values[field.name]
            for field in dataclasses.fields(cls)
            if values.get(field.name) is not None
            or (field.name in values and field.name.endswith("_token_id"))
        }
        known["rope_theta"] = rope["rope_theta"]
        # The published LLaMA configs call the longest sequence by another name.
        if "max_sequence_length" in values:
            known.setdefault("max_position_embeddings", values["max_sequence_length"])
        if isinstance(known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(known["eos_token_id"])
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in known]
        if missing:
            raise ValueError(f"the LLaMA config lacks {', '.join(missing)}")
        return cls(**known)

    def to_hf_dict(self) -> dict[str, Any]:
        """The `config.json` from which transformers 5 and older build the same model."""
        values = dataclasses.asdict(self)
        theta = values.pop("rope_theta")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **values,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a config file, such as `configs/llama_60m.json`.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not JSON, or not the config of a LLaMA; the message names the file.
        """
        try:
            return cls.from_hf_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


# ------------------------------------------------------------------------------- the network


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis: float32 inside, `x`'s dtype outside."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * weight.astype(jnp.float32)).astype(x.dtype)


def rotary_angles(length: int, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of positions 0 to length - 1: two float32 (length, 1, head_dim / 2)."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns (B, S, heads, D) by its positions' angles; entry i is paired with entry i + D / 2."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays with a float32 result, for a softmax to follow.

    Its gradient is rounded to the inputs' dtype before it is multiplied: JAX's own rule would
    multiply it as float32 with a bfloat16 array, at float32's speed.
    """
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _wide_einsum_forward(
    subscripts: str, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return wide_einsum(subscripts, x, y), (x, y)


def _wide_einsum_backward(
    subscripts: str, inputs: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    pullback = jax.vjp(functools.partial(jnp.einsum, subscripts), *inputs)[1]
    return pullback(gradient.astype(inputs[0].dtype))


wide_einsum.defvjp(_wide_einsum_forward, _wide_einsum_backward)


def causal_bias(length: int, mask: Tokens | None = None) -> jax.Array:
    """What to add to attention's scores, so that no query sees later keys or padding.

    Finite, so that a query that may see nothing, on left padding, gives no NaN.

    Args:
        length: S, of the sequence.
        mask: booleans (B, S), False where a key is padding.

    Returns:
        Float32, (S, S) or (B, 1, 1, S, S): last the query's position, then the key's.
    """
    seen = jnp.tril(jnp.ones((length, length), bool))
    if mask is not None:
        seen = seen & mask[:, None, None, None, :].astype(bool)
    return jnp.where(seen, 0.0, -1e30).astype(jnp.float32)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    """Softmax attention; each of the K key heads serves N / K neighbouring query heads.

    Written out, with heads moved before positions first: on a CPU a training step of the
    quickstart's shape took a tenth longer with `jax.nn.dot_product_attention`, and more with
    products that leave the heads where they are.

    Args:
        query: (B, S, N, D).
        key: (B, S, K, D).
        value: (B, S, K, D).
        bias: see `causal_bias`.

    Returns:
        (B, S, N * D) in the dtype of `value`.
    """
    batch, length, _, size = query.shape
    groups = query.reshape(batch, length, key.shape[2], -1, size).transpose(0, 2, 3, 1, 4)
    scores = wide_einsum("bkgsd,bktd->bkgst", groups, key.swapaxes(1, 2))
    weights = jax.nn.softmax(scores * size**-0.5 + bias, axis=-1).astype(value.dtype)
    attended = jnp.einsum("bkgst,bktd->bkgsd", weights, value.swapaxes(1, 2))
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)


def _normal(config: LlamaConfig, rngs: nnx.Rngs, *shape: int) -> nnx.Param[jax.Array]:
    return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape))


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key and value heads."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        """Draws the four kernels."""
        hidden, size = config.hidden_size, config.head_dim
        self.head_dim = size
        self.query = _normal(config, rngs, hidden, config.num_attention_heads * size)
        self.key = _normal(config, rngs, hidden, config.num_key_value_heads * size)
        self.value = _normal(config, rngs, hidden, config.num_key_value_heads * size)
        self.output = _normal(config, rngs, config.num_attention_heads * size, hidden)

    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], bias: jax.Array
    ) -> jax.Array:
        """(B, S, H) -> (B, S, H), given `rotary_angles` and `causal_bias`."""

        def heads(kernel: nnx.Param[jax.Array]) -> jax.Array:
            return _dot(x, kernel).reshape(*x.shape[:2], -1, self.head_dim)

        query, key = rotate(heads(self.query), angles), rotate(heads(self.key), angles)
        return _dot(attend(query, key, heads(self.value), bias), self.output)


class Mlp(nnx.Module):
    """Gated feed-forward layer with SiLU."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        """Draws the three kernels."""
        self.gate = _normal(config, rngs, config.hidden_size, config.intermediate_size)
        self.up = _normal(config, rngs, config.hidden_size, config.intermediate_size)
        self.down = _normal(config, rngs, config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, S, H) -> (B, S, H)."""
        return _dot(jax.nn.silu(_dot(x, self.gate)) * _dot(x, self.up), self.down)


class Block(nnx.Module):
    """One layer: attention and MLP, each on the normed input and added to it."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        """Draws the kernels; norms start at one."""
        self.eps = config.rms_norm_eps
        self.attention_norm = nnx.Param(jnp.ones(config.hidden_size))
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.Param(jnp.ones(config.hidden_size))
        self.mlp = Mlp(config, rngs)

    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], bias: jax.Array
    ) -> jax.Array:
        """(B, S, H) -> (B, S, H), arguments as in `Attention`."""
        x = x + self.attention(rms_norm(x, self.attention_norm[...], self.eps), angles, bias)
        return split_batch(x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps)))


class Llama(nnx.Module):
    """The whole network. Its layers are one `Block` whose arrays have a leading layer axis.

    Weights start as in Hugging Face's `LlamaForCausalLM`: kernels and embedding normal with
    standard deviation `initializer_range`, norms one.
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        """Draws all weights in float32."""
        self.config = config
        self.embedding = _normal(config, rngs, config.vocab_size, config.hidden_size)
        self.layers = nnx.vmap(lambda layer: Block(config, layer))(
            rngs.split(config.num_hidden_layers)
        )
        self.norm = nnx.Param(jnp.ones(config.hidden_size))
        if not config.tie_word_embeddings:
            self.head = _normal(config, rngs, config.hidden_size, config.vocab_size)

    def hidden(
        self,
        tokens: Tokens,
        mask: Tokens | None = None,
        *,
        dtype: DTypeLike | None = None,
        remat: bool = False,
    ) -> jax.Array:
        """Output of the last layer, (B, S, H) in `dtype`; arguments as in `forward`."""
        x = embed(self.embedding[...], tokens, dtype)
        angles, bias = positions(self.config, tokens.shape[1], mask)
        graph, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, weights)(x, angles, bias), None

        # What the backward pass finds ready: the outputs of the linear layers, or nothing. Scores
        # and all that is elementwise are cheaper to make again than to store, also on a CPU.
        # A scan's body needs no barrier against common subexpressions.
        kept = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(layer, prevent_cse=False, policy=kept)
        return jax.lax.scan(body, x, stacked)[0]


def _dot(x: jax.Array, kernel: nnx.Param[jax.Array]) -> jax.Array:
    # As a matrix: the kernel's gradient sums over one axis then. Over two, XLA for CPUs transposes
    # the output's gradient first, which takes as long as the product.
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ kernel[...].astype(x.dtype)).reshape(*x.shape[:-1], -1)


def _logits(x: jax.Array, head: jax.Array) -> jax.Array:
    return wide_einsum("...h,hv->...v", x, head.astype(x.dtype))


# --------------------------------------------------------------------------- pure functions


@functools.cache
def _abstract(config: LlamaConfig) -> tuple[nnx.GraphDef[Llama], Params]:
    """Structure of the module, and `params` as shapes."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


@functools.cache
def _abstract_layer(config: LlamaConfig) -> nnx.GraphDef[Block]:
    """Structure of one layer."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))[0]


def _module(params: Params, config: LlamaConfig) -> Llama:
    return nnx.merge(_abstract(config)[0], params)


@functools.partial(jax.jit, static_argnums=0)
def init(config: LlamaConfig, seed: int | jax.Array) -> Params:
    """Fresh weights, float32, drawn from an integer seed; see `Llama`."""
    return nnx.to_pure_dict(nnx.state(Llama(config, nnx.Rngs(jax.random.key(seed)))))


def forward(
    params: Params,
    config: LlamaConfig,
    tokens: Tokens,
    mask: Tokens | None = None,
    *,
    dtype: DTypeLike | None = None,
    remat: bool = False,
) -> jax.Array:
    """Logits of the next token at every position.

    Args:
        params: the weights, as `init` or `load_hf` give them.
        config: their shape.
        tokens: integers (B, S), each below `vocab_size`.
        mask: booleans (B, S), False where a token is padding and must not be attended to. Padding
            on the right needs none, since attention is causal.
        dtype: of activations and matrix products, such as bfloat16; None: that of the embedding.
        remat: keep only each layer's input for the backward pass and compute the rest again;
            otherwise the outputs of its seven linear layers are kept too.

    Returns:
        Float32 (B, S, V).
    """
    x = _module(params, config).hidden(tokens, mask, dtype=dtype, remat=remat)
    return _logits(rms_norm(x, params["norm"], config.rms_norm_eps), head_kernel(params, config))


def loss(
    params: Params,
    config: LlamaConfig,
    tokens: Tokens,
    loss_mask: Tokens | None = None,
    *,
    mask: Tokens | None = None,
    dtype: DTypeLike | None = None,
    remat: bool = False,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """Negative log likelihood of each token given those before it, summed over the batch.

    A sum and a count, not their quotient, so that parts of a batch can be added exactly.

    Args:
        params: the weights.
        config: their shape.
        tokens: integers (B, S): inputs, and one place to the left the labels.
        loss_mask: booleans (B, S), False where a token is no label to be learned.
        mask: padding on the left, as in `forward`.
        dtype: as in `forward`.
        remat: as in `forward`.
        logits_bytes: float32 logits to hold at once. Where all (B, S, V) of them take more, they
            are made in slices of the vocabulary, and made again in the backward pass.

    Returns:
        The sum, float32, and how many tokens it is over, int32.
    """
    x = _module(params, config).hidden(tokens, mask, dtype=dtype, remat=remat)
    return loss_of_output(params, config, x, tokens, loss_mask, logits_bytes=logits_bytes)


def head_kernel(params: Params, config: LlamaConfig) -> jax.Array:
    """Kernel of the output layer, (H, V)."""
    return params["embedding"].T if config.tie_word_embeddings else params["head"]


def embed(embedding: jax.Array, tokens: Tokens, dtype: DTypeLike | None = None) -> jax.Array:
    """The first layer's input: (V, H), (B, S) -> (B, S, H), in `dtype` or the embedding's."""
    return look_up(embedding, tokens).astype(dtype or embedding.dtype)


def positions(
    config: LlamaConfig, length: int, mask: Tokens | None = None
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """What every layer knows of the positions: `rotary_angles` and `causal_bias`."""
    angles = rotary_angles(length, config.head_dim, config.rope_theta)
    return angles, causal_bias(length, mask)


def layer(
    weights: Params,
    config: LlamaConfig,
    x: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    bias: jax.Array,
) -> jax.Array:
    """One layer: (B, S, H) -> (B, S, H).

    Args:
        weights: its part of `params["layers"]`, without the axis of the layers.
        config: the model's shape.
        x: the layer's input.
        angles: from `positions`.
        bias: from `positions`.
    """
    return nnx.merge(_abstract_layer(config), weights)(x, angles, bias)


def loss_of_output(
    params: Params,
    config: LlamaConfig,
    x: jax.Array,
    tokens: Tokens,
    loss_mask: Tokens | None = None,
    *,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """`loss` from the last layer's output on: the final norm, the head and the softmax.

    Args:
        params: the weights; only those of norm and head are read, or of norm and embedding where
            the embedding is tied.
        config: their shape.
        x: (B, S, H).
        tokens: as in `loss`.
        loss_mask: as in `loss`.
        logits_bytes: as in `loss`.
    """
    x = rms_norm(x, params["norm"], config.rms_norm_eps)
    head = head_kernel(params, config)
    # The last position predicts nothing: it keeps its place, with no weight, so that the arrays
    # keep their even shape.
    labels = jnp.roll(tokens, -1, axis=1)
    columns = max(MIN_VOCABULARY_SLICE, logits_bytes // (4 * tokens.size))
    losses = _token_losses(
        x.reshape(-1, config.hidden_size),
        head,
        labels.reshape(-1),
        slices=-(-config.vocab_size // columns),
    )
    weights = _is_predicted(tokens, loss_mask).reshape(-1)
    return jnp.sum(losses, where=weights), num_predicted(tokens, loss_mask)


def num_predicted(tokens: Tokens, loss_mask: Tokens | None = None) -> jax.Array:
    """The number of tokens (..., B, S) whose losses `loss` sums, int32."""
    return jnp.sum(_is_predicted(tokens, loss_mask), dtype=jnp.int32)


def _is_predicted(tokens: Tokens, loss_mask: Tokens | None) -> jax.Array:
    """Booleans (..., B, S): whether the next token's loss at a position counts."""
    weights = jnp.ones_like(tokens, bool) if loss_mask is None else loss_mask.astype(bool)
    return jnp.roll(weights, -1, axis=-1).at[..., -1].set(False)


def _token_losses(x: jax.Array, head: jax.Array, labels: jax.Array, slices: int) -> jax.Array:
    """-log softmax(x @ head)[label], float32 (T,), for x (T, H), head (H, V), labels (T,).

    The head is cut into `slices` of equal width. Each gives the log of its sum of exponentials
    and, where the label lies in it, the label's logit, so that the backward pass needs of it
    only two numbers a token.
    """
    hidden, vocab = head.shape
    width = -(-vocab // slices)

    def slice_terms(first: jax.Array | int, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _logits(x, part)
        column = first + jnp.arange(part.shape[1])
        if slices * width > vocab:
            logits = jnp.where(column < vocab, logits, -jnp.inf)
        is_label = column == labels[:, None]
        return jax.nn.logsumexp(logits, axis=1), jnp.sum(logits, axis=1, where=is_label)

    if slices == 1:
        total, label = slice_terms(0, head)
        return total - label
    padded = jnp.pad(head.astype(x.dtype), ((0, 0), (0, slices * width - vocab)))
    parts = padded.reshape(hidden, slices, width).swapaxes(0, 1)
    totals, label_logits = jax.lax.map(
        jax.checkpoint(lambda first_and_part: slice_terms(*first_and_part), prevent_cse=False),
        (width * jnp.arange(slices), parts),
    )
    return jax.nn.logsumexp(totals, axis=0) - jnp.sum(label_logits, axis=0)


def num_parameters(config: LlamaConfig) -> int:
    """Number of weights; nothing is allocated."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_abstract(config)[1]))


def is_projected(path: str, array: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a parameter is projected by default: the kernels of attention and MLP.

    Args:
        path: keys from the root of `params`, joined by slashes: "layers/attention/query".
        array: the parameter, or its shape; a norm's vector is not a kernel.
    """
    return array.ndim >= 2 and not {"attention", "mlp"}.isdisjoint(path.split("/"))


def dimension_numbers(params: Params) -> Params:
    """For each parameter, which axes are a kernel's input and output, in the tree of `params`.

    Other axes, the layers', are batch axes; a norm has no reduction axis.
    """

    def numbers(path: tuple[Any, ...], array: jax.Array) -> SubspaceDimensionNumbers:
        stacked = path[0].key == "layers"
        if array.ndim - stacked < 2:
            return SubspaceDimensionNumbers(reduction_axis=(), output_axis=int(stacked))
        return SubspaceDimensionNumbers(reduction_axis=int(stacked), output_axis=1 + stacked)

    return jax.tree_util.tree_map_with_path(numbers, params)


# ----------------------------------------------------------------------- Hugging Face weights

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
"""What weights are called, in forms that `weight_files` reads and in those that it does not."""


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
    directory: str | os.PathLike[str], shardings: Params | None = None
) -> tuple[LlamaConfig, Params]:
    """Reads a LLaMA that transformers saved: `config.json` and safetensors, whole or in shards.

    Weights keep the dtype of the file.

    Args:
        directory: of the model.
        shardings: for each parameter the `jax.sharding.Sharding` to lay it out by: each device is
            then given its own part only. None: all on the default device.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the config is not a LLaMA's, or the tensors are not those it asks for; the
            message names the tensor.
    """
    folder = Path(directory)
    config = LlamaConfig.load(folder / "config.json")
    specs = _abstract(config)[1]
    expected = {name for path, spec in _named_leaves(specs) for name in _hf_names(path, spec)}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in weight_files(folder):
            file = stack.enter_context(safe_open(path, "numpy"))
            files |= dict.fromkeys(file.keys(), file)
        # Old files carry the rotary frequencies, and sometimes a tied head a second time.
        ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")}
        if config.tie_word_embeddings:
            ignored.add("lm_head.weight")
        for problem, names in (
            ("lacks", expected - files.keys()),
            ("has, and a LLaMA of this config has not,", files.keys() - expected - ignored),
        ):
            if names:
                raise ValueError(f"{folder} {problem} {len(names)} tensors, {min(names)} first")

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            tensor = files[name].get_tensor(name)
            if tensor.shape != shape:
                raise ValueError(
                    f"{folder}: {name} has shape {tensor.shape}, the config asks for {shape}"
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


def save_hf(directory: str | os.PathLike[str], config: LlamaConfig, params: Params) -> None:
    """Writes `config.json` and `model.safetensors`, as transformers' `from_pretrained` reads them.

    The weights keep their dtype. Each file appears whole or not at all, the config last.

    Raises:
        OSError: the directory cannot be made or written.
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
    # transformers refuses a file that does not say which framework's layout it has.
    _replace(folder / "model.safetensors", lambda to: save_file(tensors, to, {"format": "pt"}))
    _replace(folder / "config.json", lambda to: to.write_text(text + "\n", encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `path`, then puts the finished file in its place."""
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
    """Hugging Face's names for one parameter, one for each layer if it is stacked."""
    if path.startswith("layers/"):
        suffix = _LAYER_NAMES[path.removeprefix("layers/")]
        return [f"model.layers.{layer}.{suffix}.weight" for layer in range(leaf.shape[0])]
    return [f"{_TOP_NAMES[path]}.weight"]


def _is_transposed(path: str, ndim: int) -> bool:
    """PyTorch's linear weights are (output, input); its embedding is laid out as ours."""
    return ndim == 2 and path != "embedding"
