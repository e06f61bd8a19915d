"""Causal attention: one function, and an implementation for each kind of hardware.

    written_out   all scores of a row at once: short rows on a CPU, and what the others are tested
                  against
    blockwise     blocks of keys with a running maximum (Dao, FlashAttention-2, 2023), in JAX
    cudnn         cuDNN's flash attention, on a GPU in bfloat16 or float16
    splash        the Pallas kernel that JAX ships for TPUs

All take query (B, S, N, D) and key and value (B, S, K, D), where each of the K key heads serves N /
K neighbouring query heads without being repeated, and return (B, S, N * D). Only `written_out`
holds scores of S x S entries per head. A token sees itself and the earlier tokens of its own
segment; padding is a segment of its own, so that every token sees at least itself.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from osd_jax.llama.attention_plain import blockwise, padded, same_segment, written_out
from osd_jax.sharding import BATCH_AXES
from osd_names import ATTENTIONS

BLOCKWISE_FROM = 512
"""Length of a row from which `auto` computes blockwise: at 256 both take the same time on a CPU."""

_LANES = 128  # of a TPU's registers: splash attention needs a multiple of it
_CUDNN_HEAD_DIM = 128  # the largest head that every GPU supports


def select_attention(
    name: str, backend: str, *, length: int, head_dim: int, dtype: DTypeLike
) -> str:
    """The implementation for a backend; "auto" becomes one of the others.

    Args:
        name: One of `osd_names.ATTENTIONS`.
        backend: As from `jax.default_backend()`: "cpu", "gpu" or "tpu".
        length: S, the length of a row.
        head_dim: D, the size of a head.
        dtype: Dtype of queries and keys.

    Returns:
        "written_out", "blockwise", "cudnn" or "splash".

    Raises:
        ValueError: The name is unknown, or the backend cannot run it.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention is {name!r}: expected one of {', '.join(ATTENTIONS)}")
    half = jnp.dtype(dtype).itemsize == 2
    fits_cudnn = half and head_dim % 8 == 0 and head_dim <= _CUDNN_HEAD_DIM
    if name == "cudnn" and not (backend == "gpu" and fits_cudnn):
        raise ValueError(
            "attention is 'cudnn': it needs a GPU, bfloat16 and heads of a multiple of 8, at most "
            f"{_CUDNN_HEAD_DIM} entries, but this is a {backend} with {jnp.dtype(dtype)} and heads "
            f"of {head_dim}; use 'auto'"
        )
    if name == "splash" and backend != "tpu":
        raise ValueError(
            f"attention is 'splash': it needs a TPU, but this is a {backend}; use 'auto'"
        )
    if name != "auto":
        return name
    if backend == "gpu" and fits_cudnn:
        return "cudnn"
    if backend == "tpu" and length >= _LANES:
        return "splash"
    return "blockwise" if length >= BLOCKWISE_FROM else "written_out"


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Causal softmax attention.

    Args:
        query: (B, S, N, D).
        key: (B, S, K, D).
        value: (B, S, K, D).
        segments: Integers (B, S): a token sees only tokens with the same one; None: all are alike.
        implementation: One of `osd_names.ATTENTIONS`; see `select_attention`.

    Returns:
        (B, S, N * D) in the dtype of `value`.

    Raises:
        ValueError: JAX's default backend cannot run this implementation.
    """
    if implementation == "auto":
        length, head_dim = query.shape[1], query.shape[3]
        implementation = select_attention(
            "auto", jax.default_backend(), length=length, head_dim=head_dim, dtype=query.dtype
        )
    return _IMPLEMENTATIONS[implementation](query, key, value, segments)


# ------------------------------------------------------------------------------------ a GPU
def cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None = None
) -> jax.Array:
    """`attend` by cuDNN's flash attention; segments are a mask of S x S entries for all heads."""
    length = query.shape[1]
    query, key, value, segments = padded(2, query, key, value, segments)
    mask = None if segments is None else same_segment(segments, segments)[:, 0]
    attended = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, implementation="cudnn"
    )
    return attended[:, :length].reshape(*query.shape[:1], length, -1)


# ------------------------------------------------------------------------------------ a TPU
def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attend` by the splash attention kernel, one device's rows and heads at a time.

    A compiler cannot split a kernel over a mesh. Under `osd_jax.llama.partition.on` or
    `jax.set_mesh` the batch is split over the axes `data` and `fsdp` and the heads over `tensor`;
    an axis whose devices do not divide them computes the same on all its devices.

    Args:
        query: (B, S, N, D).
        key: (B, S, K, D).
        value: (B, S, K, D).
        segments: Integers (B, S), or None.
        interpret: Whether to run the kernel's steps without a TPU.
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    run = functools.partial(_splash_on_one, interpret=interpret)
    if not auto:
        return run(query, key, value, segments)

    def split(names: tuple[str, ...], *sizes: int) -> tuple[str, ...] | None:
        found = tuple(name for name in names if name in auto)
        shards = math.prod(mesh.shape[name] for name in found)
        return None if any(size % shards for size in sizes) else found

    rows = split(BATCH_AXES, query.shape[0])
    heads = split(("tensor",), query.shape[2], key.shape[2])
    by_head = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(
        run,
        mesh=mesh,
        axis_names=auto,
        in_specs=(by_head, by_head, by_head, PartitionSpec(rows, None)),
        out_specs=PartitionSpec(rows, None, heads),
        check_vma=False,
    )(query, key, value, segments)


def _splash_on_one(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention

    batch, length, heads, size = query.shape
    # The kernel does not scale the scores.
    query = (query.astype(jnp.float32) * size**-0.5).astype(query.dtype)
    query, key, value, segments = padded(_LANES, query, key, value, segments)
    whole = query.shape[1]
    block = next(block for block in (512, 256, _LANES) if whole % block == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((whole, whole))] * heads)
    kernel = splash_attention.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    rows = [x.swapaxes(1, 2) for x in (query, key, value)]
    if segments is None:
        attended = jax.vmap(kernel)(*rows)
    else:
        attended = jax.vmap(kernel)(*rows, splash_attention.SegmentIds(segments, segments))
    return attended.swapaxes(1, 2)[:, :length].reshape(batch, length, -1)


_IMPLEMENTATIONS = {
    "written_out": written_out,
    "blockwise": blockwise,
    "cudnn": cudnn,
    "splash": splash,
}
