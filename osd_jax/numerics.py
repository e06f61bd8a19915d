"""Products, dtypes and shardings independent of the caller's settings; checks of numbers."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> Any:
    """float32, or float64 for float64: the dtype of moments, norms and products."""
    return jnp.promote_types(dtype, jnp.float32)


def float32_or_more(array: jax.Array) -> jax.Array:
    """The array in its accumulator's dtype."""
    return array.astype(accumulator_dtype(array.dtype))


# Bits of a float32: all but the sign; infinity, above which are the NaNs; and the quiet bit of a
# NaN, which is in the upper half, the bfloat16.
MAGNITUDE, INFINITY, QUIET = 0x7FFFFFFF, 0x7F800000, 0x0040


def round_stochastically(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up or down, so that the expectation over the bits is x.

    A bfloat16 is the upper half of a float32. Adding the bits to the lower half carries into the
    upper half with a probability equal to the lower half's fraction of its range. Numbers that
    bfloat16 represents exactly stay unchanged, including subnormal ones. Infinities and NaN stay
    unchanged, and a finite number beyond the largest bfloat16 rounds to that one.

    Args:
      x: float32.
      bits: Integers in [0, 65536) of x's shape, uniformly distributed; see `random_bits`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.full(4, 1 + 2**-9)  # bfloat16 holds 1 and 1 + 2**-7
      >>> round_stochastically(x, jnp.array([0, 2**14, 3 * 2**14 - 1, 3 * 2**14])).tolist()
      [1.0, 1.0, 1.0, 1.0078125]
    """
    word = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = word + bits.astype(jnp.uint32)
    is_kept = ((word & INFINITY) == INFINITY) | ((rounded & INFINITY) == INFINITY)
    half = jnp.where(is_kept, word, rounded) >> 16
    half = jnp.where((word & MAGNITUDE) > INFINITY, half | QUIET, half)
    return jax.lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.bfloat16)


def random_bits(
    key: jax.Array, shape: tuple[int, ...], first: jax.typing.ArrayLike = 0
) -> jax.Array:
    """Draws 16 random bits (uint16) per element, separately for each index of the first axis.

    Args:
      key: A `jax.random` key.
      shape: Shape of the array.
      first: Index of the array's first slice, if it is a part of a longer one.

    Example:
      >>> import jax
      >>> bits = random_bits(jax.random.key(0), (4, 3))
      >>> bool((random_bits(jax.random.key(0), (2, 3), first=1) == bits[1:3]).all())
      True
    """
    if not shape:
        return jax.random.bits(key, dtype=jnp.uint16)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.bits(key, shape[1:], jnp.uint16))(keys)


def squared_norm(matrix: jax.Array) -> jax.Array:
    """||M||_F^2: (..., p, q) -> (...,), in float32 or float64."""
    return jnp.sum(jnp.square(float32_or_more(matrix)), axis=(-2, -1))


def has_direction(squared_norm: jax.Array) -> jax.Array:
    """Whether G / ||G||_F is finite: ||G||_F^2 is not zero, subnormal or overflowed."""
    return (squared_norm >= jnp.finfo(squared_norm.dtype).tiny) & jnp.isfinite(squared_norm)


def bias_correction(count: jax.Array, b: jax.typing.ArrayLike) -> jax.Array:
    """`1 - b^t`, the bias correction of a moving average after t = `count` steps.

    In float32, b2 and b2^t round in steps of 6e-8, compared with 1 - b2 = 1e-3. The result is
    therefore `-expm1(t log b)`, with the logarithm of a plain number computed in double precision.
    """
    if isinstance(b, jax.Array):
        return -jnp.expm1(count * jnp.log(b))
    return -jnp.expm1(count * (math.log(b) if b else -math.inf))  # type: ignore[arg-type]


def any_of(tree: Any) -> jax.Array:
    """Whether any boolean in a tree is True."""
    return functools.reduce(jnp.logical_or, map(jnp.any, jax.tree.leaves(tree)), jnp.array(False))


def zeros_of(shape: jax.ShapeDtypeStruct | jax.Array) -> jax.Array:
    """Zeros of a shape and dtype; under Explicit axes with the given sharding."""
    return jnp.zeros(shape.shape, shape.dtype, out_sharding=explicit_sharding(shape))


def contract(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product, such as "pr,pq->rq", over any leading batch axes.

    Both inputs are read in the narrower of their dtypes; the products are accumulated and returned
    in float32 (float64 for float64). Under a mesh with Explicit axes, an output axis is sharded
    like the input axis of the same letter, which resolves the ambiguity for JAX.
    """
    inputs, output = spec.split("->")
    a_axes, b_axes = inputs.split(",")
    batch = "uvwxyz"[: a.ndim - 2]
    narrow = min(a.dtype, b.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    return jnp.einsum(
        f"{batch}{a_axes},{batch}{b_axes}->{batch}{output}",
        a.astype(narrow),
        b.astype(narrow),
        preferred_element_type=accumulator_dtype(narrow),
        out_sharding=_sharding_by_letter({batch + a_axes: a, batch + b_axes: b}, batch + output),
    )


def written_transpose(array: jax.Array) -> jax.Array:
    """Transposes (..., p, r) or (..., r, p); on a CPU it materializes the result.

    A matrix M may be a transposed view of its array. XLA's products on CPUs take 2 to 4 times as
    long if both factors are read against their layout, and elementwise loops even longer; XLA fuses
    a transposition into both. This function transposes a factor that is small compared with M and
    thereby avoids a transposition of M. Other devices read any layout equally fast.
    """

    def write(array: jax.Array) -> jax.Array:
        barrier = jax.lax.optimization_barrier
        return barrier(barrier(array).mT)

    return jax.lax.platform_dependent(array, cpu=write, default=lambda array: array.mT)


def as_it_lies(product: jax.Array, is_flipped: bool) -> jax.Array:
    """A product stored in memory as its transpose if `is_flipped`: on a CPU it keeps this layout.

    XLA fuses a following transposition into a product, and the loops that read the result then run
    against their layout.
    """

    def keep(product: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(product.mT).mT

    if not is_flipped:
        return product
    return jax.lax.platform_dependent(product, cpu=keep, default=lambda product: product)


def zeros_of_axes(
    axes: str, matrix: jax.ShapeDtypeStruct | jax.Array, rank: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Zeros of shape (batch..., *axes); "p" and "q" are axes of the matrix, "r" and "s" the rank.

    Under Explicit axes, p and q are sharded like those of the matrix; the rank is replicated.
    """
    batch = "uvwxyz"[: len(matrix.shape) - 2]
    sizes = dict(zip(batch + "pq", matrix.shape, strict=True)) | {"r": rank, "s": rank}
    shape = tuple(sizes[letter] for letter in batch + axes)
    return jnp.zeros(
        shape, dtype, out_sharding=_sharding_by_letter({batch + "pq": matrix}, batch + axes)
    )


def explicit_sharding(array: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding | None:
    """The sharding of an array under a mesh with Explicit axes; None without one."""
    typed = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    sharding: Any = typed.sharding
    if sharding is None or jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding


def _sharding_by_letter(inputs: dict[str, Any], output: str) -> jax.sharding.NamedSharding | None:
    """Under Explicit axes: shards each output axis like the first input axis of the same letter."""
    by_letter: dict[str, Any] = {}
    mesh = None
    for axes, array in inputs.items():
        if (sharding := explicit_sharding(array)) is not None:
            mesh = sharding.mesh
            for letter, names in zip(axes, sharding.spec, strict=True):
                by_letter[letter] = by_letter.get(letter) or names
    if mesh is None:
        return None
    spec, used = [], set[str]()
    for letter in output:
        names = by_letter.get(letter)
        names_set = {names} if isinstance(names, str) else set(names or ())
        spec.append(None if names_set & used else names)
        used |= names_set
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def replicated(array: jax.Array) -> jax.Array:
    """Under Explicit axes, replicates the array on all devices, as LAPACK-like routines require."""
    if explicit_sharding(array) is None:
        return array
    return jax.sharding.reshard(array, jax.sharding.PartitionSpec())


def whole_columns(matrix: jax.Array) -> jax.Array:
    """Under Explicit axes, shards (..., p, q) along q alone, over the axes of p too if they fit.

    A product over q, such as M M^T, is then one all-reduce of p x p numbers.
    """
    sharding = explicit_sharding(matrix)
    if sharding is None or sharding.spec[-2] is None:
        return matrix
    *batch, of_p, of_q = sharding.spec
    as_tuple = lambda names: (names,) if isinstance(names, str) else tuple(names or ())
    both = as_tuple(of_q) + as_tuple(of_p)
    parts = math.prod(sharding.mesh.shape[name] for name in both)
    spec = (*batch, None, of_q if matrix.shape[-1] % parts else both)
    return jax.sharding.reshard(matrix, jax.sharding.PartitionSpec(*spec))


def like_sharding(array: jax.Array, like: jax.Array) -> jax.Array:
    """Under Explicit axes, shards `array` like `like`."""
    sharding = explicit_sharding(like)
    return array if sharding is None else jax.sharding.reshard(array, sharding)


def check_static(name: str, value: Any, static_args: tuple[str, ...] | None = None) -> None:
    """Raises ValueError for an array where a plain value is required.

    Args:
      name: Name of the argument.
      value: Value of the argument.
      static_args: All arguments of the function that must be plain. None: only this one.
    """
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} is an array, but it determines what is computed and must be a plain value: "
            "optax.inject_hyperparams converts numbers and the results of functions to arrays "
            f"unless they are listed in static_args={static_args or (name,)}"
        )


def check_object(name: str, value: Any, kind: type, example: str, expected: str = "a") -> None:
    """Raises ValueError unless a rule object has the expected type."""
    if not isinstance(value, kind):
        raise ValueError(
            f"{name} is {value!r}: expected {expected} {kind.__name__}, such as osd_jax.{example}"
        )


def check_period(every: int, name: str = "the period of P") -> None:
    """Raises ValueError unless `every` is a whole number of at least 1."""
    check_static("every", every)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{name} is {every!r}: expected a whole number of at least 1")


def check_number(name: str, value: jax.typing.ArrayLike) -> None:
    """Raises ValueError unless `value` is a finite number of at least 0.

    Arrays are not checked: they may be traced, like the numbers of `optax.inject_hyperparams`.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        return
    if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}: expected a number of at least 0")


def known_zero(value: jax.typing.ArrayLike) -> bool:
    """Whether `value` is a plain 0, so that its term can be omitted; False for a traced number."""
    return isinstance(value, numbers.Real) and value == 0


def safe_sqrt(x: jax.Array) -> jax.Array:
    """sqrt(x), with a derivative of 0 where x is 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), x)
