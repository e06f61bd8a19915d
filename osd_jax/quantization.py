"""8-bit optimizer state: the moments of any Optax transformation in bitsandbytes' blockwise format.

Each block of 256 values along an array's last axis shares one float32 scale, its largest absolute
value. Each value is one of the 256 dynamic-exponent numbers of a code book (Dettmers et al.,
arXiv 2110.02861). The codes have the array's shape and are sharded like it. If the last axis is
sharded into whole blocks, a step needs no communication.
"""

from __future__ import annotations

import functools
import math
from importlib import resources
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from osd_jax.numerics import check_static, explicit_sharding, like_sharding
from osd_jax.sharding import takes_shapes
from osd_jax.state import Quantized
from osd_jax.trees import boxed_like, promotes, unboxed

BLOCK_SIZE = 256
MIN_8BIT_SIZE = 4096
Rounding = Literal["table", "nearest"]

# Moments that are never negative, by Optax's field names: their code book spends no codes on a
# sign.
UNSIGNED_FIELDS = frozenset({"nu", "nu_max", "v", "v_row", "v_col", "sum_of_squares"})


@functools.cache
def code_book(signed: bool) -> np.ndarray:
    """The 256 sorted float32 values of the codes, as in bitsandbytes."""
    with resources.files("osd_jax").joinpath("code_books.npz").open("rb") as file:
        return np.load(file)["signed" if signed else "unsigned"]


@functools.cache
def _midpoints(signed: bool) -> np.ndarray:
    book = code_book(signed)
    return (book[1:] + book[:-1]) / 2


@functools.cache
def _rounding_table(signed: bool) -> np.ndarray:
    """bitsandbytes' CPU rounding: entry i is the code of the value -1 + 2 i / 65535.

    Computed in float32 throughout: the exact value of one entry lies on the other side of a
    midpoint.
    """
    grid = np.float32(-1) + np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535)
    return np.searchsorted(_midpoints(signed), grid, side="left").astype(np.uint8)


# Jitted, so that moments of equal shapes are traced once.
@functools.partial(jax.jit, static_argnames=("signed", "block", "rounding"), inline=True)
@promotes
def quantize(
    array: jax.Array, *, signed: bool, block: int = BLOCK_SIZE, rounding: Rounding = "table"
) -> Quantized:
    """Quantizes float (..., n) in blocks along the last axis; the last block may be partial.

    Args:
      array: Any float dtype; read in float32.
      signed: Which code book.
      block: Number of values that share a scale.
      rounding: "table" is bitsandbytes' CPU rounding, a table of 65,536 entries whose coarse grid
        never maps a small value to zero. "nearest" is the nearest code, the lower one of a tie, as
        on CUDA (where bitsandbytes also keeps small negative values from becoming zero). TPUs
        always compute the nearest code, because table lookups are very slow there.
    """
    blocks = _to_blocks(array.astype(jnp.float32), block)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    unit = blocks / jnp.where(scales > 0, scales, 1)[..., None]

    def looked_up(unit: jax.Array) -> jax.Array:
        if rounding == "nearest":
            return _count_below(_midpoints(signed), unit)
        index = ((unit + 1) / 2 * 65535 + 0.5).astype(jnp.int32)
        return _look_up(_rounding_table(signed), index)

    calculated = functools.partial(nearest_codes, signed=signed)
    codes = jax.lax.platform_dependent(unit, tpu=calculated, default=looked_up)
    codes = jnp.where(scales[..., None] > 0, codes, jnp.uint8(0))
    return Quantized(like_sharding(_from_blocks(codes, array.shape), array), scales)


@functools.partial(jax.jit, static_argnames=("signed", "block"), inline=True)
@promotes
def dequantize(quantized: Quantized, *, signed: bool, block: int = BLOCK_SIZE) -> jax.Array:
    """Dequantizes `Quantized` -> float32 (..., n)."""
    looked_up = functools.partial(_look_up, code_book(signed))
    calculated = functools.partial(values_of_codes, signed=signed)
    values = jax.lax.platform_dependent(quantized.codes, tpu=calculated, default=looked_up)
    blocks = _to_blocks(values, block) * quantized.scales[..., None]
    return like_sharding(_from_blocks(blocks, values.shape), values)


def _look_up(table: np.ndarray, index: jax.Array) -> jax.Array:
    """`table[index]`, under Explicit axes sharded like the index."""
    return jnp.asarray(table).at[index].get(mode="clip", out_sharding=explicit_sharding(index))


def _count_below(sorted_255: np.ndarray, values: jax.Array) -> jax.Array:
    """The number of 255 sorted numbers below each value, by bisection: uint8."""
    count = jnp.zeros_like(values, jnp.uint8)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        last = _look_up(sorted_255, count + jnp.uint8(step - 1))
        count += jnp.where(last < values, jnp.uint8(step), jnp.uint8(0))
    return count


# The code book in closed form. Its positive numbers form seven groups of 1, 2, 4, ... 64 (twice as
# many without a sign), each evenly spaced over a power of ten: with k the integer part of log2 n,
# the n-th number, from 1, is 10^(k - 6) (0.9 (n + 1/2) / 2^k - 0.8); without a sign, k - 7 and n
# from 2. 1 is above them, 0 below them. The lists here have one entry per group.


def _groups(signed: bool) -> list[tuple[int, float]]:
    """(first n, power of ten) of each group."""
    return [(2 ** (k if signed else k + 1), 10.0 ** (k - 6)) for k in range(7)]


def values_of_codes(codes: jax.Array, *, signed: bool) -> jax.Array:
    """Computes the values of codes: uint8 (...) -> float32 (...), to 1e-6 relative."""
    code = codes.astype(jnp.float32)
    n = jnp.abs(code - 127) if signed else code + 1
    value = jnp.zeros_like(n)
    for first, power in _groups(signed):
        value = jnp.where(n >= first, power * (0.9 / first * (n + 0.5) - 0.8), value)
    value = jnp.where(n >= 2 * first, 1.0, value)
    return jnp.where(code < 127, -value, value) if signed else value


def nearest_codes(unit: jax.Array, *, signed: bool) -> jax.Array:
    """Computes the codes nearest to float32 values in [-1, 1]: uint8 (...)."""
    book, size = code_book(signed), jnp.abs(unit)
    positive = book[book > 0].astype(np.float64)
    n = jnp.zeros_like(size) if signed else jnp.ones_like(size)
    for first, power in _groups(signed):
        # Halfway between the last number of the previous group and the first number of this one.
        index = np.searchsorted(positive, power * 0.1)
        start = (positive[index] + (positive[index - 1] if index else 0)) / 2
        nearest = jnp.round((size / power + 0.8) * (first / 0.9) - 0.5)
        n = jnp.where(size > start, jnp.clip(nearest, first, 2 * first - 1), n)
    code = jnp.where(unit < 0, 127 - n, 127 + n) if signed else n - 1
    return jnp.where(unit > (positive[-1] + positive[-2]) / 2, 255, code).astype(jnp.uint8)


def _to_blocks(array: jax.Array, block: int) -> jax.Array:
    """(..., n) -> (..., ceil(n / block), block), padded with zeros."""
    n = array.shape[-1]
    count = -(-n // block)
    if n < block:
        return array[..., None, :]
    padding = [(0, 0)] * (array.ndim - 1) + [(0, count * block - n)]
    whole = _gather_split_blocks(array, block)
    return jnp.pad(whole, padding).reshape(*array.shape[:-1], count, block)


def _gather_split_blocks(array: jax.Array, block: int) -> jax.Array:
    """Under Explicit axes, all-gathers the last axis if a shard ends within a block."""
    sharding = explicit_sharding(array)
    if sharding is None or sharding.spec[-1] is None:
        return array
    *others, last = sharding.spec
    names = (last,) if isinstance(last, str) else last
    shards = math.prod(sharding.mesh.shape[name] for name in names)
    if array.shape[-1] % (shards * block) == 0:
        return array
    return jax.sharding.reshard(array, jax.sharding.PartitionSpec(*others, None))


def _from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return blocks.reshape(*shape[:-1], -1)[..., : shape[-1]]


def _paths(tree: Any) -> set[tuple[Any, ...]]:
    return {path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def quantize_state(
    tx: optax.GradientTransformation,
    *,
    block: int = BLOCK_SIZE,
    min_size: int = MIN_8BIT_SIZE,
    rounding: Rounding = "table",
    unsigned: frozenset[str] = UNSIGNED_FIELDS,
) -> optax.GradientTransformationExtraArgs:
    """Stores the moments of `tx` in blockwise 8 bits between its updates.

    A step dequantizes the moments, runs `tx` in full precision, and quantizes them again, so the
    update is computed from the new moments before rounding, as in bitsandbytes.

    Args:
      tx: Any transformation. Every float array of its state with at least `min_size` elements in
        its last two axes is stored in 8 bits, for any stack of matrices.
      block: Number of values that share a scale.
      min_size: Smaller arrays stay unchanged.
      rounding: See `quantize`.
      unsigned: Names of state fields that are never negative. Two of Optax's rules use these names
        for signed moments: pass `frozenset({"n"})` for adan, `frozenset({"mu"})` for sm3.

    Returns:
      An Optax transformation with the updates of `tx`, whose state holds `Quantized` arrays.

    Raises:
      ValueError: The block size or rounding is invalid.

    References:
      Dettmers et al., arXiv 2110.02861; bitsandbytes.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> tx = osd_jax.quantize_state(optax.scale_by_adam())
      >>> tx.init(jnp.zeros((64, 256))).mu.codes.dtype
      dtype('uint8')
    """
    check_static("block", block)
    check_static("min_size", min_size)
    if block < 1:
        raise ValueError(f"block is {block!r}: expected a whole number of at least 1")
    if rounding not in ("table", "nearest"):
        raise ValueError(f"rounding is {rounding!r}: expected 'table' or 'nearest'")
    tx = optax.with_extra_args_support(tx)
    is_quantized = lambda x: isinstance(x, Quantized)

    def is_signed(path: tuple[Any, ...], parameters: set[tuple[Any, ...]]) -> bool:
        # The path of a moment ends with its parameter's path, whose names do not determine the
        # sign.
        ends = range(len(path))
        end = next((i for i in ends if path[i:] in parameters), len(path))
        return not any(getattr(key, "name", None) in unsigned for key in path[:end])

    def compress(state: optax.OptState, params: optax.Params) -> optax.OptState:
        parameters = _paths(params)

        def one(path: tuple[Any, ...], x: Any) -> Any:
            is_moment = jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 0
            if not is_moment or np.prod(x.shape[-2:]) < min_size:
                return x
            signed = is_signed(path, parameters)
            return quantize(x, signed=signed, block=block, rounding=rounding)

        return jax.tree_util.tree_map_with_path(one, state)

    def expand(state: optax.OptState, params: optax.Params) -> optax.OptState:
        parameters = _paths(params)

        def one(path: tuple[Any, ...], x: Any) -> Any:
            if not is_quantized(x):
                return x
            return dequantize(x, signed=is_signed(path, parameters), block=block)

        return jax.tree_util.tree_map_with_path(one, state, is_leaf=is_quantized)

    @takes_shapes
    def init(params: optax.Params) -> optax.OptState:
        params = unboxed(params)
        return compress(tx.init(params), params)

    @promotes
    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        grads = unboxed(updates)
        new, state = tx.update(grads, expand(state, grads), unboxed(params), **extra_args)
        return boxed_like(updates, new), compress(state, grads)

    return optax.GradientTransformationExtraArgs(init, update)


def slice_by_slice(
    tx: optax.GradientTransformation, max_size: int
) -> optax.GradientTransformationExtraArgs:
    """Runs `tx` on large arrays slice by slice, so that its temporary copies are slices.

    Dequantizing 8-bit moments makes several float32 copies of an array; for an embedding of 131 M
    numbers these would be the largest arrays of a training step. Slices are along the first axis,
    the rows of a matrix or the layers of a stack, which should not be sharded.

    Args:
      tx: A rule that treats every row separately and needs no parameters. Its state is a tuple of
        scalars and of trees like the parameters.
      max_size: Maximum number of elements in a slice, if the axis divides accordingly.

    Raises:
      ValueError: `max_size` is an array.
    """
    check_static("max_size", max_size)

    def number_of_slices(x: jax.Array) -> int:
        if x.size <= max_size or x.ndim < 2:
            return 1
        if x.ndim > 2:
            return x.shape[0]
        # A slice too small for `quantize_state` would have another state than the whole array.
        counts = range(-(-x.size // max_size), min(x.shape[0] - 1, x.size // MIN_8BIT_SIZE) + 1)
        return next((c for c in counts if x.shape[0] % c == 0), 1)

    def split(x: jax.Array, count: int) -> jax.Array:
        return x if x.ndim > 2 else x.reshape(count, x.shape[0] // count, -1)

    def one(x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """The update of one array and its own part of the state."""
        count = number_of_slices(x)
        if count == 1:
            return tx.update(x, state)
        scalars, moments = jax.tree.map(lambda m: m.ndim == 0, state), jax.tree.leaves(state)

        def step(x_and_moments: Any) -> Any:
            x, moments = x_and_moments
            return tx.update(x, jax.tree.unflatten(jax.tree.structure(state), moments))

        spread = [jnp.broadcast_to(m, count) if m.ndim == 0 else split(m, count) for m in moments]
        update, new = jax.lax.map(step, (split(x, count), spread))
        join = lambda m: m.reshape(-1, m.shape[-1]) if x.ndim == 2 else m
        return join(update), jax.tree.map(lambda m, one: m[0] if one else join(m), new, scalars)

    @promotes
    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        leaves = jax.tree.leaves(updates)
        tree: Any = jax.tree.structure(unboxed(updates))
        is_scalar = [isinstance(field, jax.Array) and field.ndim == 0 for field in state]
        of_leaf = [
            [field] * len(leaves) if scalar else tree.flatten_up_to(field)
            for field, scalar in zip(state, is_scalar, strict=True)
        ]
        kind = type(state)
        found = [one(x, kind(*own)) for x, *own in zip(leaves, *of_leaf, strict=True)]
        if not found:
            return updates, state
        joined = [
            parts[0] if scalar else jax.tree.unflatten(tree, parts)
            for parts, scalar in zip(
                zip(*(new for _, new in found), strict=True), is_scalar, strict=True
            )
        ]
        return boxed_like(updates, [update for update, _ in found]), kind(*joined)

    init = takes_shapes(lambda params: tx.init(unboxed(params)))
    return optax.GradientTransformationExtraArgs(init, update)
