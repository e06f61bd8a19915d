"""LLaMA in Flax NNX, with the layers stacked and scanned.

The module classes say what the network is; everything a trainer calls is a pure function of
`params`, a plain nested dict of arrays. With L layers, hidden size H, intermediate size F,
vocabulary V, N query heads and K key heads of D entries each:

    embedding                (V, H)
    layers/attention_norm    (L, H)
    layers/attention/query   (L, H, N*D)     key, value: (L, H, K*D)     output: (L, N*D, H)
    layers/mlp_norm          (L, H)
    layers/mlp/gate, up      (L, H, F)       down: (L, F, H)
    layers/*/*_bias          (L, ...): of the kernel's output, with attention_bias or mlp_bias
    norm                     (H,)
    head                     (H, V), absent when the embedding is tied

Kernels are (input, output). Matrix products run in `dtype`; norms, rotary angles, softmax and the
loss are float32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from osd_jax.layout import SubspaceDimensionNumbers
from osd_jax.llama.attention import attend
from osd_jax.llama.attention_plain import wide_einsum
from osd_jax.llama.config import LlamaConfig
from osd_jax.llama.partition import for_products, look_up, split_batch
from osd_jax.llama.rotary import rotary_angles, rotate, token_positions

Params = dict[str, Any]
Tokens = jax.Array | np.ndarray
Angles = tuple[jax.Array, jax.Array]


# ------------------------------------------------------------------------------- the network
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis: `x / sqrt(mean(x^2) + eps) * weight`.

    Args:
        x: (..., n).
        weight: (n,).
        eps: Added to the mean of the squares.

    Returns:
        (..., n) in `x`'s dtype, computed in float32.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * weight.astype(jnp.float32)).astype(x.dtype)


def _normal(config: LlamaConfig, rngs: nnx.Rngs, *shape: int) -> nnx.Param[jax.Array]:
    return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape))


def _add_biases(module: nnx.Module, *names: str) -> None:
    """Adds a bias of zeros for each of a module's kernels, named `NAME_bias`."""
    for name in names:
        setattr(module, f"{name}_bias", nnx.Param(jnp.zeros(getattr(module, name).shape[1])))


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key and value heads."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        """Draws the four kernels; biases are initialized to zero."""
        hidden, size = config.hidden_size, config.head_dim
        self.head_dim = size
        self.query = _normal(config, rngs, hidden, config.num_attention_heads * size)
        self.key = _normal(config, rngs, hidden, config.num_key_value_heads * size)
        self.value = _normal(config, rngs, hidden, config.num_key_value_heads * size)
        self.output = _normal(config, rngs, config.num_attention_heads * size, hidden)
        if config.attention_bias:
            _add_biases(self, "query", "key", "value", "output")

    def __call__(
        self, x: jax.Array, angles: Angles, segments: jax.Array | None, attention: str
    ) -> jax.Array:
        """(B, S, H) -> (B, S, H), given `rotary_angles`; the rest as in `attend`."""

        def heads(name: str) -> jax.Array:
            return _linear(self, name, x).reshape(*x.shape[:2], -1, self.head_dim)

        query, key = rotate(heads("query"), angles), rotate(heads("key"), angles)
        attended = attend(query, key, heads("value"), segments, attention)
        return _linear(self, "output", attended)


class Mlp(nnx.Module):
    """Gated feed-forward layer with SiLU."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        """Draws the three kernels; biases are initialized to zero."""
        self.gate = _normal(config, rngs, config.hidden_size, config.intermediate_size)
        self.up = _normal(config, rngs, config.hidden_size, config.intermediate_size)
        self.down = _normal(config, rngs, config.intermediate_size, config.hidden_size)
        if config.mlp_bias:
            _add_biases(self, "gate", "up", "down")

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, S, H) -> (B, S, H)."""
        gated = jax.nn.silu(_linear(self, "gate", x)) * _linear(self, "up", x)
        return _linear(self, "down", gated)


class Block(nnx.Module):
    """One layer: attention and MLP, each applied to the normalized input and added to it."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        """Draws the kernels; norms are initialized to one."""
        self.eps = config.rms_norm_eps
        self.attention_norm = nnx.Param(jnp.ones(config.hidden_size))
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.Param(jnp.ones(config.hidden_size))
        self.mlp = Mlp(config, rngs)

    def __call__(
        self, x: jax.Array, angles: Angles, segments: jax.Array | None, attention: str
    ) -> jax.Array:
        """(B, S, H) -> (B, S, H), arguments as in `Attention`."""
        normed = rms_norm(x, self.attention_norm[...], self.eps)
        # Without this constraint XLA computes wrong sums on some meshes over data, fsdp and tensor.
        x = split_batch(x + self.attention(normed, angles, segments, attention))
        return split_batch(x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps)))


class Llama(nnx.Module):
    """The whole network. Its layers are one `Block` whose arrays have a leading layer axis.

    Weights are initialized as in Hugging Face's `LlamaForCausalLM`: kernels and embedding normal
    with standard deviation `initializer_range`, norms one.
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
        segments: Tokens | None = None,
        dtype: DTypeLike | None = None,
        remat: bool = False,
        attention: str = "auto",
    ) -> jax.Array:
        """Output of the last layer, (B, S, H) in `dtype`; arguments as in `forward`."""
        x = embed(self.embedding[...], tokens, dtype)
        angles, segments = positions(self.config, tokens.shape[1], mask, segments)
        graph, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
            used = for_products({"layers": nnx.to_pure_dict(weights)})["layers"]
            return nnx.merge(graph, used)(x, angles, segments, attention), None

        # What the forward pass saves for the backward pass: the outputs of the linear layers, or
        # nothing. Scores and elementwise results are cheaper to recompute than to store, also on a
        # CPU. A scan's body needs no barrier against common subexpression elimination.
        kept = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(layer, prevent_cse=False, policy=kept)
        return jax.lax.scan(body, x, stacked)[0]


def _linear(module: nnx.Module, name: str, x: jax.Array) -> jax.Array:
    """`x` times a module's kernel, plus its bias if there is one."""
    kernel, bias = getattr(module, name), getattr(module, f"{name}_bias", None)
    # As a matrix, so that the kernel's gradient sums over one axis. Over two axes, XLA for CPUs
    # first transposes the output's gradient, which takes as long as the product.
    rows = x.reshape(-1, x.shape[-1])
    product = rows @ kernel[...].astype(x.dtype)
    if bias is not None:
        product += bias[...].astype(x.dtype)
    return product.reshape(*x.shape[:-1], -1)


def logits_of(x: jax.Array, head: jax.Array) -> jax.Array:
    """Float32 logits: (..., H), (H, V) -> (..., V)."""
    return wide_einsum("...h,hv->...v", x, head.astype(x.dtype))


# --------------------------------------------------------------------------- pure functions
@functools.cache
def abstract(config: LlamaConfig) -> tuple[nnx.GraphDef[Llama], Params]:
    """The structure of the module, and `params` as shapes."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


@functools.cache
def _abstract_layer(config: LlamaConfig) -> nnx.GraphDef[Block]:
    """The structure of one layer."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))[0]


def module_of(params: Params, config: LlamaConfig) -> Llama:
    """The module with these weights."""
    return nnx.merge(abstract(config)[0], params)


@functools.partial(jax.jit, static_argnums=0)
def init(config: LlamaConfig, seed: int | jax.Array) -> Params:
    """New float32 weights, drawn from an integer seed; see `Llama`."""
    return nnx.to_pure_dict(nnx.state(Llama(config, nnx.Rngs(jax.random.key(seed)))))


def forward(
    params: Params,
    config: LlamaConfig,
    tokens: Tokens,
    mask: Tokens | None = None,
    *,
    segments: Tokens | None = None,
    dtype: DTypeLike | None = None,
    remat: bool = False,
    attention: str = "auto",
) -> jax.Array:
    """Logits of the next token at every position.

    Args:
        params: The weights, from `init` or `load_hf`.
        config: Their shape.
        tokens: Integers (B, S), each below `vocab_size`.
        mask: Booleans (B, S), False for padding tokens, which must not be attended to. Padding on
            the right needs no mask, because attention is causal. The results of padding tokens have
            no meaning.
        segments: Integers (B, S), the document of each token of a packed row: a token sees only its
            own document, in which positions start at 0. None: a row is one document.
        dtype: Dtype of activations and matrix products, such as bfloat16; None: that of the
            embedding.
        remat: Whether to save only each layer's input for the backward pass and recompute the rest;
            otherwise the outputs of its seven linear layers are saved too.
        attention: How attention is computed, one of `osd_names.ATTENTIONS`; "auto" depends on the
            hardware and the length (`osd_jax.llama.attention.select_attention`).

    Returns:
        Float32 (B, S, V).
    """
    x = module_of(params, config).hidden(
        tokens, mask, segments=segments, dtype=dtype, remat=remat, attention=attention
    )
    return logits_of(rms_norm(x, params["norm"], config.rms_norm_eps), head_kernel(params, config))


def head_kernel(params: Params, config: LlamaConfig) -> jax.Array:
    """The kernel of the output layer.

    Args:
        params: The weights.
        config: Their shape.

    Returns:
        (H, V); the transposed embedding if it is tied.
    """
    name = "embedding" if config.tie_word_embeddings else "head"
    kernel = for_products({name: params[name]})[name]
    return kernel.T if config.tie_word_embeddings else kernel


def embed(embedding: jax.Array, tokens: Tokens, dtype: DTypeLike | None = None) -> jax.Array:
    """The input of the first layer: the embeddings of the tokens.

    Args:
        embedding: (V, H).
        tokens: Integers (B, S).
        dtype: Dtype of the result; None: that of the embedding.

    Returns:
        (B, S, H).
    """
    return look_up(embedding, tokens).astype(dtype or embedding.dtype)


def positions(
    config: LlamaConfig, length: int, mask: Tokens | None = None, segments: Tokens | None = None
) -> tuple[Angles, jax.Array | None]:
    """What every layer needs to know of the tokens' places.

    Args:
        config: The model's shape.
        length: S, the length of the sequence.
        mask: As in `forward`.
        segments: As in `forward`.

    Returns:
        The result of `rotary_angles`, and the segments for `attend`, in which padding is a segment
        of its own.
    """
    if segments is not None:
        segments = jnp.asarray(segments, jnp.int32)
    angles = rotary_angles(config, token_positions(length, segments))
    if mask is not None:
        real = jnp.asarray(mask, bool)
        segments = jnp.where(real, 1 if segments is None else segments, -1).astype(jnp.int32)
    return angles, segments


def layer(
    weights: Params,
    config: LlamaConfig,
    x: jax.Array,
    angles: Angles,
    segments: jax.Array | None,
    attention: str = "auto",
) -> jax.Array:
    """Applies one layer.

    Args:
        weights: Its part of `params["layers"]`, without the axis of the layers.
        config: The model's shape.
        x: The layer's input, (B, S, H).
        angles: From `positions`.
        segments: From `positions`.
        attention: As in `forward`.

    Returns:
        The layer's output, (B, S, H).
    """
    used = for_products({"layers": weights})["layers"]
    return nnx.merge(_abstract_layer(config), used)(x, angles, segments, attention)


def num_parameters(config: LlamaConfig) -> int:
    """The number of weights; nothing is allocated.

    Args:
        config: The model's shape.

    Returns:
        The number of weights.
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)[1]))


def is_projected(path: str, array: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a parameter is projected by default: the kernels of attention and MLP.

    Args:
        path: Keys from the root of `params`, joined by slashes: "layers/attention/query".
        array: The parameter, or its shape; the vector of a norm or a bias is not a kernel.

    Returns:
        Whether it is projected.
    """
    inside = not {"attention", "mlp"}.isdisjoint(path.split("/"))
    return array.ndim >= 2 and inside and not path.endswith("_bias")


def dimension_numbers(params: Params) -> Params:
    """The input and output axes of each parameter's kernel.

    Other axes, those of the layers, are batch axes; a norm or a bias has no reduction axis.

    Args:
        params: The weights, or their shapes.

    Returns:
        A tree of `SubspaceDimensionNumbers` like `params`.
    """

    def numbers(path: tuple[Any, ...], array: jax.Array) -> SubspaceDimensionNumbers:
        stacked = path[0].key == "layers"
        if array.ndim - stacked < 2:
            return SubspaceDimensionNumbers(reduction_axis=(), output_axis=int(stacked))
        return SubspaceDimensionNumbers(reduction_axis=int(stacked), output_axis=1 + stacked)

    return jax.tree_util.tree_map_with_path(numbers, params)
