"""Products, dtypes and shardings that do not depend on the caller's settings; checks of numbers."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> Any:
    """float32, or float64 for float64: what moments, norms and products are kept in."""
    return jnp.promote_types(dtype, jnp.float32)


def float32_or_more(array: jax.Array) -> jax.Array:
    """The array in its accumulator's dtype."""
    return array.astype(accumulator_dtype(array.dtype))


# A float32 in bits: all but its sign; an infinity, above which are NaNs; what makes a NaN quiet, in
# the upper half, which is a bfloat16.
MAGNITUDE, INFINITY, QUIET = 0x7FFFFFFF, 0x7F800000, 0x0040


def round_stochastically(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up or down, so that the mean over the bits is x itself.

    A bfloat16 is the upper half of a float32. Adding the bits to the lower half carries into the
    upper one with the probability that the lower half is of its range. So a number that bfloat16
    holds stays as it is, subnormal ones too. Infinities and NaN stay what they are, and a finite
    number beyond the largest bfloat16 becomes that one.

    Args:
      x: float32.
      bits: Of x's shape, whole numbers in [0, 65536), each equally probable; see `random_bits`.

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
    """16 random bits for each number of an array, uint16, drawn for each index of its first axis.

    Args:
      key: Of `jax.random`.
      shape: Of the array.
      first: Index of the array's first slice, where it is a part of a longer one.

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
    """Whether G / ||G||_F is a number: ||G||_F^2 is neither zero (nor subnormal) nor overflown."""
    return (squared_norm >= jnp.finfo(squared_norm.dtype).tiny) & jnp.isfinite(squared_norm)


def bias_correction(count: jax.Array, b: jax.typing.ArrayLike) -> jax.Array:
    """`1 - b^t`, by which a moving average is short of a mean after t = `count` steps.

    In float32, b2 itself and b2^t round to a step of 6e-8, against 1 - b2 = 1e-3. So it is
    `-expm1(t log b)`, with the logarithm of a plain number taken in double precision.
    """
    if isinstance(b, jax.Array):
        return -jnp.expm1(count * jnp.log(b))
    return -jnp.expm1(count * (math.log(b) if b else -math.inf))  # type: ignore[arg-type]


def any_of(tree: Any) -> jax.Array:
    """Whether any boolean of a tree is True."""
    return functools.reduce(jnp.logical_or, map(jnp.any, jax.tree.leaves(tree)), jnp.array(False))


def zeros_of(shape: jax.ShapeDtypeStruct | jax.Array) -> jax.Array:
    """Zeros of a shape and dtype, under Explicit axes sharded as it says."""
    return jnp.zeros(shape.shape, shape.dtype, out_sharding=explicit_sharding(shape))


def contract(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of matrices, such as "pr,pq->rq", over any leading batch axes.

    Both inputs are read in the narrower of their dtypes and the products accumulated, and
    returned, in float32 (float64 for float64). Under a mesh with Explicit axes an output axis is
    sharded as the input axis of the same letter, which says what JAX cannot guess.
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
    """The transpose of (..., p, r) or (..., r, p): on a CPU made here, not within what reads it.

    A matrix M may be a transposed view of the array that holds it. XLA's products on CPUs take 2 to
    4 times as long where both factors are read against their layout, and its elementwise loops
    longer still; and into either it folds a transposition. This one is of a factor that is small
    beside M, and spares M's. Other devices read any layout alike.
    """

    def write(array: jax.Array) -> jax.Array:
        barrier = jax.lax.optimization_barrier
        return barrier(barrier(array).mT)

    return jax.lax.platform_dependent(array, cpu=write, default=lambda array: array.mT)


def as_it_lies(product: jax.Array, is_flipped: bool) -> jax.Array:
    """A product that lies in memory as its transpose, if `is_flipped`: on a CPU kept as it lies.

    Into a product XLA folds the transposition that follows it, and the loops that read it then run
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
    """Zeros of shape (batch..., *axes), "p" and "q" being the matrix's and "r", "s" the rank's.

    Under Explicit axes, p and q are sharded as the matrix's are; the rank is on every device.
    """
    batch = "uvwxyz"[: len(matrix.shape) - 2]
    sizes = dict(zip(batch + "pq", matrix.shape, strict=True)) | {"r": rank, "s": rank}
    shape = tuple(sizes[letter] for letter in batch + axes)
    return jnp.zeros(
        shape, dtype, out_sharding=_sharding_by_letter({batch + "pq": matrix}, batch + axes)
    )


def explicit_sharding(array: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding | None:
    """How an array is sharded under a mesh with Explicit axes; None without one."""
    typed = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    sharding: Any = typed.sharding
    if sharding is None or jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding


def _sharding_by_letter(inputs: dict[str, Any], output: str) -> jax.sharding.NamedSharding | None:
    """Under Explicit axes: each output axis as the first input axis of the same letter."""
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
    """Under Explicit axes, the array whole on every device, as LAPACK-like routines need it."""
    if explicit_sharding(array) is None:
        return array
    return jax.sharding.reshard(array, jax.sharding.PartitionSpec())


def whole_columns(matrix: jax.Array) -> jax.Array:
    """Under Explicit axes, (..., p, q) split along q alone, by the axes of p too where they fit.

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
    """Under Explicit axes, `array` laid out as `like`."""
    sharding = explicit_sharding(like)
    return array if sharding is None else jax.sharding.reshard(array, sharding)


def check_static(name: str, value: Any, static_args: tuple[str, ...] | None = None) -> None:
    """Raises ValueError for an array where only a plain value will do.

    Args:
      name: The argument's.
      value: Of the argument.
      static_args: All arguments of its function that have to be plain. None: this one.
    """
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} is an array, which decides what is computed and so has to be a plain value: "
            "optax.inject_hyperparams makes arrays of numbers and of what functions return, except "
            f"for those that it is told, static_args={static_args or (name,)}"
        )


def check_object(name: str, value: Any, kind: type, example: str, expected: str = "a") -> None:
    """Raises ValueError unless a rule that is given as an object is of its kind."""
    if not isinstance(value, kind):
        raise ValueError(
            f"{name} is {value!r}: expected {expected} {kind.__name__}, such as osd_jax.{example}"
        )


def check_period(every: int) -> None:
    """Raises ValueError unless `every` is a whole number of steps, at least 1."""
    check_static("every", every)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"the period of P is {every!r}: expected a whole number of at least 1")


def check_number(name: str, value: jax.typing.ArrayLike) -> None:
    """Raises ValueError unless `value` is a finite number of at least 0.

    An array passes unread: it may be traced, as the numbers of `optax.inject_hyperparams` are.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        return
    if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}: expected a number of at least 0")


def known_zero(value: jax.typing.ArrayLike) -> bool:
    """Whether `value` is a plain 0, whose term can be left out; a traced number never is."""
    return isinstance(value, numbers.Real) and value == 0
