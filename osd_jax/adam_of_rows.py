"""Adam with one second moment per row of a matrix, for parameters that are not projected."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax.layout import DimensionNumbers, declared_vectors
from osd_jax.numerics import accumulator_dtype, bias_correction, check_static, float32_or_more
from osd_jax.quantization import MIN_8BIT_SIZE, Quantized, dequantize, quantize
from osd_jax.sharding import takes_shapes
from osd_jax.transport import refuse_factored
from osd_jax.trees import KeyPath, boxed_like, promotes, unboxed


class ScaleByAdamOfRowsState(NamedTuple):
    """State of Adam with a first moment per element and a second moment per row of a matrix.

    Attributes:
      count: int32 (), the number of steps.
      mu: float32 or float64 like the parameters; in 8 bits `Quantized`, (max(m, n), min(m, n)).
      nu: (max(m, n),) for a matrix (m, n); the parameter's own shape otherwise.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, as in Optax's states
    mu: optax.Updates
    nu: optax.Updates

    def transported(self, changes: Any) -> Any:
        """Raises for `transport_moments`: a row's mean does not determine it in another basis."""
        refuse_factored(type(self).__name__)


def scale_by_adam_of_rows(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    first_8bit: bool = False,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformation:
    """Adam with one second moment per row of a matrix, the mean of g^2 along the row.

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) mean(g^2)
        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Rows are the entries of the longer axis, whichever it is: the vocabulary of an embedding or a
    head. For a square matrix they are the entries of the first axis. The state of (m, n) has mn +
    max(m, n) numbers, compared with Adam's 2mn. All other arrays, including stacks of matrices,
    stacks of vectors that `dimension_numbers` declares, and matrices with one row or column, have
    Adam's state and step. Moments and updates are float32, float64 for float64.

    In 8 bits, m is stored row by row, in blocks of up to 256 values that do not cross rows. Codes
    far below the largest value of their block are so coarse that b1 times a value may round back to
    the same code. A row without gradients that shared a block with a row of steady magnitude would
    keep its m while v decays; in separate blocks m decays with its scale.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, after bias correction.
      first_8bit: Whether to store the first moment of a matrix of at least 4096 values in 8 bits,
        with the code book of `osd_jax.quantize_state`.
      dimension_numbers: As in `scale_by_subspace`. Here it only matters which 2-D arrays it
        declares as vectors (`reduction_axis=()`), such as the norms of stacked layers, (layers, n).
        Without it every 2-D array is a matrix.

    Returns:
      An Optax transformation with state `ScaleByAdamOfRowsState`.

    Raises:
      ValueError: `first_8bit` is an array.

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> state = osd_jax.scale_by_adam_of_rows().init({"embedding": jnp.zeros((32, 8))})
      >>> state.mu["embedding"].shape, state.nu["embedding"].shape
      ((32, 8), (32,))

      Stacked norms of two layers, declared as vectors:

      >>> vectors = {"norm": osd_jax.SubspaceDimensionNumbers((), 1)}
      >>> tx = osd_jax.scale_by_adam_of_rows(dimension_numbers=vectors)
      >>> tx.init({"norm": jnp.zeros((2, 8))}).nu["norm"].shape
      (2, 8)
    """
    check_static("first_8bit", first_8bit)

    def in_8_bits(m: jax.Array) -> Quantized:
        turned = m.mT if axis_of_rows(m) == 1 else m
        return quantize(turned, signed=True, rounding="nearest")

    def read(m: Any, like: jax.Array) -> jax.Array:
        if not isinstance(m, Quantized):
            return m
        values = dequantize(m, signed=True)
        return values.mT if axis_of_rows(like) == 1 else values

    @takes_shapes
    def init(params: optax.Params) -> ScaleByAdamOfRowsState:
        params = unboxed(params)
        holds_vectors = declared_vectors(dimension_numbers, params)

        def first(path: KeyPath, x: jax.Array) -> Any:
            zeros = jnp.zeros_like(x, accumulator_dtype(x.dtype))
            is_matrix = axis_of_rows(x) is not None and not holds_vectors(path)
            is_large = is_matrix and x.size >= MIN_8BIT_SIZE
            return in_8_bits(zeros) if first_8bit and is_large else zeros

        def second(path: KeyPath, x: jax.Array) -> jax.Array:
            axis = None if holds_vectors(path) else axis_of_rows(x)
            # A reduction instead of a slice also works on a sharded axis.
            like = x if axis is None else x.sum(1 - axis)
            return jnp.zeros_like(like, accumulator_dtype(x.dtype))

        mu, nu = (jax.tree_util.tree_map_with_path(one, params) for one in (first, second))
        return ScaleByAdamOfRowsState(jnp.zeros([], jnp.int32), mu, nu)

    @promotes
    def update(
        updates: optax.Updates, state: ScaleByAdamOfRowsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdamOfRowsState]:
        del params
        count = optax.safe_increment(state.count)

        def first(g: jax.Array, m: Any) -> jax.Array:
            return b1 * read(m, g) + (1 - b1) * g

        def second(g: jax.Array, v: jax.Array) -> jax.Array:
            axis, square = _reduced_axis(g, v), jnp.square(g)
            new = square if axis is None else jnp.mean(square, axis=axis)
            return b2 * v + (1 - b2) * new

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            c1, c2 = (bias_correction(count, b).astype(m.dtype) for b in (b1, b2))
            root, axis = jnp.sqrt(v / c2) + eps, _reduced_axis(m, v)
            return m / c1 / (root if axis is None else jnp.expand_dims(root, axis))

        grads = jax.tree.map(float32_or_more, unboxed(updates))
        mu = jax.tree.map(first, grads, state.mu)
        nu = jax.tree.map(second, grads, state.nu)
        kept = lambda m, old: in_8_bits(m) if isinstance(old, Quantized) else m
        return boxed_like(updates, jax.tree.map(direction, mu, nu)), ScaleByAdamOfRowsState(
            count, jax.tree.map(kept, mu, state.mu), nu
        )

    return optax.GradientTransformation(init, update)


def axis_of_rows(x: jax.Array) -> int | None:
    """The axis with one second moment per entry in `scale_by_adam_of_rows`; None: plain Adam."""
    if x.ndim != 2 or min(x.shape) < 2:
        return None
    return 0 if x.shape[0] >= x.shape[1] else 1


def _reduced_axis(x: jax.Array, v: jax.Array) -> int | None:
    """The axis of a matrix over which its second moment `v` is a mean; None: `v` has its shape."""
    axis = axis_of_rows(x)
    return None if axis is None or v.ndim == x.ndim else 1 - axis
