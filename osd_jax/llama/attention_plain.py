"""Causal attention in plain JAX: all scores of a row at once, or blocks of them.

Arguments and results are those of `osd_jax.llama.attention.attend`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

HIDDEN = -1e30
"""The score of a hidden key. Finite: a later real score erases what such keys add to a block."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays with a float32 result, as input of a softmax.

    Its gradient is rounded to the inputs' dtype before it is multiplied: JAX's own rule would
    multiply it in float32 with a bfloat16 array, at float32's speed.
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


def causal_bias(length: int, segments: jax.Array | None = None) -> jax.Array:
    """The bias for attention scores that hides later keys and those of other segments.

    Args:
        length: S, the length of the sequence.
        segments: Integers (B, S); None: all tokens are of one segment.

    Returns:
        Float32, (S, S) or (B, 1, 1, S, S): the last two axes are the query's and the key's
        position.
    """
    seen = jnp.tril(jnp.ones((length, length), bool))
    if segments is not None:
        seen = seen & same_segment(segments, segments)
    return jnp.where(seen, 0.0, HIDDEN).astype(jnp.float32)


def same_segment(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Whether a query and a key are of one segment: (B, S), (B, T) -> (B, 1, 1, S, T)."""
    return queries[:, None, None, :, None] == keys[:, None, None, None, :]


def written_out(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None = None
) -> jax.Array:
    """`attend` with all scores at once.

    Written explicitly, with the heads axis moved before the positions: on a CPU a training step of
    the quickstart's shape took a tenth longer with `jax.nn.dot_product_attention`, and even longer
    with products that keep the order of the axes.
    """
    groups, key, value = _heads_first(query, key, value)
    scores = wide_einsum("bkgsd,bktd->bkgst", groups, key)
    bias = causal_bias(query.shape[1], segments)
    weights = jax.nn.softmax(scores * query.shape[3] ** -0.5 + bias, axis=-1).astype(value.dtype)
    return _joined(jnp.einsum("bkgst,bktd->bkgsd", weights, value))


def _heads_first(
    query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query (B, K, N / K, S, D), key and value (B, K, S, D)."""
    batch, length, _, size = query.shape
    groups = query.reshape(batch, length, key.shape[2], -1, size).transpose(0, 2, 3, 1, 4)
    return groups, key.swapaxes(1, 2), value.swapaxes(1, 2)


def _joined(groups: jax.Array) -> jax.Array:
    """(B, K, N / K, S, D) -> (B, S, N * D)."""
    batch, _, _, length, _ = groups.shape
    return groups.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)


# -------------------------------------------------------------------------------- blockwise
def blockwise(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None = None
) -> jax.Array:
    """`attend` in blocks of queries and keys; blocks above the diagonal are not computed.

    The backward pass recomputes the weights of a block from the logarithm of each query's sum of
    exponentials. The largest arrays are those of the inputs' size.
    """
    length = query.shape[1]
    # Measured on a CPU: small blocks skip more above the diagonal, large ones loop less.
    block = min(128 if length < 2048 else 256, length)
    query, key, value, segments = padded(block, query, key, value, segments)
    return _joined(_by_blocks(*_heads_first(query, key, value), segments, block))[:, :length]


def padded(
    multiple: int, query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The same with rows of a multiple of some length; no real token sees what is added."""
    missing = -query.shape[1] % multiple
    pad = lambda x: jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
    return pad(query), pad(key), pad(value), None if segments is None else pad(segments)


def _block_of(x: jax.Array, number: jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)


def _block_scores(
    query: jax.Array,
    key: jax.Array,
    segments: jax.Array | None,
    row: jax.Array,
    column: jax.Array,
) -> jax.Array:
    """Masked float32 scores (B, K, G, C, C) of a block of C queries and a block of C keys.

    Args:
        query: The block of queries, (B, K, G, C, D).
        key: The block of keys, (B, K, C, D).
        segments: All segments, (B, S).
        row: Number of the queries' block.
        column: Number of the keys' block.
    """
    size = query.shape[3]
    index = jnp.arange(size)
    seen = (row * size + index)[:, None] >= column * size + index
    if segments is not None:
        seen &= same_segment(
            _block_of(segments, row, size, 1), _block_of(segments, column, size, 1)
        )
    scores = jnp.einsum("bkgsd,bktd->bkgst", query, key, preferred_element_type=jnp.float32)
    return jnp.where(seen, scores * query.shape[4] ** -0.5, HIDDEN)


def _blocks_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, size: int
) -> tuple[jax.Array, jax.Array]:
    """Output (B, K, G, S, D), and the log of each query's sum of exponentials, (B, K, G, S)."""

    def of_queries(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        mine = _block_of(query, row, size, 3)

        def add(column: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            output, largest, total = carry
            theirs, values = (_block_of(x, column, size, 2) for x in (key, value))
            scores = _block_scores(mine, theirs, segments, row, column)
            new = jnp.maximum(largest, scores.max(axis=-1))
            weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
            output = output * kept[..., None] + _wide(
                "bkgst,bktd->bkgsd", weights.astype(value.dtype), values
            )
            return output, new, total * kept + weights.sum(axis=-1)

        zeros = jnp.zeros_like(mine[..., 0], jnp.float32)
        start = (jnp.zeros_like(mine, jnp.float32), zeros + HIDDEN, zeros)
        output, largest, total = jax.lax.fori_loop(0, row + 1, add, start)
        return (output / total[..., None]).astype(value.dtype), largest + jnp.log(total)

    rows = jnp.arange(query.shape[3] // size)
    output, logs = jax.lax.map(of_queries, rows)
    return _rejoined(output, 3), _rejoined(logs, 3)


def _wide(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _rejoined(blocks: jax.Array, axis: int) -> jax.Array:
    """Blocks along a leading axis -> one array with them side by side along `axis`."""
    moved = jnp.moveaxis(blocks, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, size: int
) -> jax.Array:
    return _blocks_forward(query, key, value, segments, size)[0]


def _by_blocks_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, size: int
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    output, logs = _blocks_forward(query, key, value, segments, size)
    return output, (query, key, value, segments, output, logs)


def _by_blocks_backward(
    size: int, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array | None, ...]:
    query, key, value, segments, output, logs = saved
    # The gradient of a softmax subtracts the mean of the weights' gradients, which is <dO, O>.
    means = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1)

    def of_keys(d_query: jax.Array, column: jax.Array) -> tuple[jax.Array, Any]:
        theirs, values = (_block_of(x, column, size, 2) for x in (key, value))

        def add(row: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_query, d_key, d_value = carry
            mine, d_out, log, mean = (
                _block_of(x, row, size, 3) for x in (query, gradient, logs, means)
            )
            scores = _block_scores(mine, theirs, segments, row, column)
            weights = jnp.exp(scores - log[..., None])
            d_weights = _wide("bkgsd,bktd->bkgst", d_out, values)
            d_scores = weights * (d_weights - mean[..., None]) * query.shape[4] ** -0.5
            d_scores, weights = d_scores.astype(query.dtype), weights.astype(value.dtype)
            moved = _block_of(d_query, row, size, 3) + _wide("bkgst,bktd->bkgsd", d_scores, theirs)
            return (
                jax.lax.dynamic_update_slice_in_dim(d_query, moved, row * size, 3),
                d_key + _wide("bkgst,bkgsd->bktd", d_scores, mine),
                d_value + _wide("bkgst,bkgsd->bktd", weights, d_out),
            )

        zeros = jnp.zeros_like(theirs, jnp.float32)
        start = (d_query, zeros, zeros)
        d_query, *found = jax.lax.fori_loop(column, query.shape[3] // size, add, start)
        return d_query, [x.astype(key.dtype) for x in found]

    d_query, found = jax.lax.scan(
        of_keys, jnp.zeros_like(query, jnp.float32), jnp.arange(key.shape[2] // size)
    )
    return d_query.astype(query.dtype), *(_rejoined(x, 2) for x in found), None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)
