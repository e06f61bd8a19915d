"""8-bit optimizer state: any Optax transformation's moments in blocks, as bitsandbytes has them.

Each block of 256 values along an array's last axis shares one float32 scale, its largest absolute
value, and each value is one of the 256 in a code book of dynamic-exponent numbers (Dettmers et
al., arXiv 2110.02861). The codes have the array's own shape, so they are sharded as it is. Where
the last axis is sharded into whole blocks, a step needs no communication.
"""

from __future__ import annotations

import functools
import math
from importlib import resources
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from osd_jax.numerics import check_static, explicit_sharding, like_sharding
from osd_jax.sharding import takes_shapes
from osd_jax.trees import boxed_like, promotes, unboxed

BLOCK_SIZE = 256
MIN_SIZE = 4096
Rounding = Literal["table", "nearest"]

# Moments that are never negative, by the names that Optax gives them: their code book spends no
# codes on a sign.
UNSIGNED_FIELDS = frozenset({"nu", "nu_max", "v", "v_row", "v_col", "sum_of_squares"})


class Quantized(NamedTuple):
    """An array in blockwise 8 bits.

    Attributes:
      codes: uint8, the array's own shape (..., n).
      scales: float32, (..., ceil(n / block)): the largest absolute value of each block.
    """

    codes: jax.Array
    scales: jax.Array


@functools.cache
def code_book(signed: bool) -> np.ndarray:
    """The 256 sorted float32 values that a code stands for, as bitsandbytes ships them."""
    with resources.files("osd_jax").joinpath("code_books.npz").open("rb") as file:
        return np.load(file)["signed" if signed else "unsigned"]


@functools.cache
def _midpoints(signed: bool) -> np.ndarray:
    book = code_book(signed)
    return (book[1:] + book[:-1]) / 2


@functools.cache
def _rounding_table(signed: bool) -> np.ndarray:
    """bitsandbytes' CPU rounding: entry i is the code of the value -1 + 2 i / 65535.

    In float32 throughout: the exact value of one entry lies across a midpoint.
    """
    grid = np.float32(-1) + np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535)
    return np.searchsorted(_midpoints(signed), grid, side="left").astype(np.uint8)


@promotes
def quantize(
    array: jax.Array, *, signed: bool, block: int = BLOCK_SIZE, rounding: Rounding = "table"
) -> Quantized:
    """float (..., n) -> `Quantized`, in blocks along the last axis (the last one may be partial).

    Args:
      array: Of any float dtype; read in float32.
      signed: Which code book.
      block: Values that share a scale.
      rounding: "table" is bitsandbytes' on a CPU, a table of 65,536 entries whose coarse grid never
        maps a small value to zero; "nearest" is the nearest code, the lower of two as near, as on
        CUDA (where bitsandbytes also keeps a small negative value from becoming zero). On a TPU,
        which looks values up in a table very slowly, always the nearest, calculated.
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


@promotes
def dequantize(quantized: Quantized, *, signed: bool, block: int = BLOCK_SIZE) -> jax.Array:
    """`Quantized` -> float32 (..., n)."""
    looked_up = functools.partial(_look_up, code_book(signed))
    calculated = functools.partial(values_of_codes, signed=signed)
    values = jax.lax.platform_dependent(quantized.codes, tpu=calculated, default=looked_up)
    blocks = _to_blocks(values, block) * quantized.scales[..., None]
    return like_sharding(_from_blocks(blocks, values.shape), values)


def _look_up(table: np.ndarray, index: jax.Array) -> jax.Array:
    """`table[index]`, under Explicit axes sharded as the index is."""
    return jnp.asarray(table).at[index].get(mode="clip", out_sharding=explicit_sharding(index))


def _count_below(sorted_255: np.ndarray, values: jax.Array) -> jax.Array:
    """How many of 255 sorted numbers lie below each value, by bisection: uint8."""
    count = jnp.zeros_like(values, jnp.uint8)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        last = _look_up(sorted_255, count + jnp.uint8(step - 1))
        count += jnp.where(last < values, jnp.uint8(step), jnp.uint8(0))
    return count


# The code book in closed form. Its positive numbers come in seven groups of 1, 2, 4, ... 64 (twice
# as many without a sign), each evenly spaced over a power of ten: the n-th from 1 is, with k the
# whole part of log2 n, 10^(k - 6) (0.9 (n + 1/2) / 2^k - 0.8); without a sign, k - 7 and n from 2.
# Above them stands 1, below them 0. Lists here go by the group.


def _groups(signed: bool) -> list[tuple[int, float]]:
    """(first n, power of ten) of each group."""
    return [(2 ** (k if signed else k + 1), 10.0 ** (k - 6)) for k in range(7)]


def values_of_codes(codes: jax.Array, *, signed: bool) -> jax.Array:
    """What codes stand for, calculated: uint8 (...) -> float32 (...), to 1e-6 of each value."""
    code = codes.astype(jnp.float32)
    n = jnp.abs(code - 127) if signed else code + 1
    value = jnp.zeros_like(n)
    for first, power in _groups(signed):
        value = jnp.where(n >= first, power * (0.9 / first * (n + 0.5) - 0.8), value)
    value = jnp.where(n >= 2 * first, 1.0, value)
    return jnp.where(code < 127, -value, value) if signed else value


def nearest_codes(unit: jax.Array, *, signed: bool) -> jax.Array:
    """The codes nearest to float32 values in [-1, 1], calculated: uint8 (...)."""
    book, size = code_book(signed), jnp.abs(unit)
    positive = book[book > 0].astype(np.float64)
    n = jnp.zeros_like(size) if signed else jnp.ones_like(size)
    for first, power in _groups(signed):
        # From halfway between the last number of the group before and the first of this.
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
    """Under Explicit axes, makes the last axis whole on every device if a shard ends in a block."""
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
    min_size: int = MIN_SIZE,
    rounding: Rounding = "table",
    unsigned: frozenset[str] = UNSIGNED_FIELDS,
) -> optax.GradientTransformationExtraArgs:
    """Holds the moments of `tx` in blockwise 8 bits between its updates.

    A step reads the moments back, runs `tx` in full precision, and stores them again, so the update
    is computed from the new moments before they are rounded, as bitsandbytes does.

    Args:
      tx: Any transformation; every float array of its state with at least `min_size` elements in
        its last two axes is held in 8 bits, whatever stack of matrices it is.
      block: Values that share a scale.
      min_size: Smaller arrays stay as they are.
      rounding: See `quantize`.
      unsigned: Names of state fields that are never negative. Two of Optax's rules use these names
        for signed moments: give `frozenset({"n"})` for adan, `frozenset({"mu"})` for sm3.

    Raises:
      ValueError: for a block size or rounding that does not exist.

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
        # A moment's path ends in its parameter's, whose own names say nothing of the sign.
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
    """Runs `tx` on large arrays one slice after the other, so that its copies are a slice's.

    Reading 8-bit moments back makes several float32 copies of an array, which for an embedding of
    131 M numbers would be the largest arrays of a training step. Slices are of the first axis, the
    rows of a matrix or the layers of a stack, which should not be sharded.

    Args:
      tx: A rule that treats every row on its own, and needs no parameters. Its state is a tuple of
        scalars and of trees like the parameters.
      max_size: Numbers in a slice, at most, where the axis divides so.

    Raises:
      ValueError: for a `max_size` that is an array.
    """
    check_static("max_size", max_size)

    def number_of_slices(x: jax.Array) -> int:
        if x.size <= max_size or x.ndim < 2:
            return 1
        if x.ndim > 2:
            return x.shape[0]
        # A slice that `quantize_state` would not hold in 8 bits has another state than the whole.
        counts = range(-(-x.size // max_size), min(x.shape[0] - 1, x.size // MIN_SIZE) + 1)
        return next((c for c in counts if x.shape[0] % c == 0), 1)

    def split(x: jax.Array, count: int) -> jax.Array:
        return x if x.ndim > 2 else x.reshape(count, x.shape[0] // count, -1)

    def one(x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """The update of one array, and its own part of the state."""
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
