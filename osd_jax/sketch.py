"""The sketch of a gradient: R = P^T M and the statistics that the rules declare.

A `Statistic` defines one quantity of a gradient: how to compute it, how it scales with the gradient
and how to average it over devices. This module implements scaling, clipping, accumulation and
reduction once for all statistics. `Needs` declares which statistics a rule reads, and when it reads
the gradient itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from osd_jax.layout import MatrixLayout
from osd_jax.numerics import (
    contract,
    float32_or_more,
    has_direction,
    squared_norm,
    written_transpose,
)
from osd_jax.stacks import columns_of_stored, whole_of_stored
from osd_jax.trees import traced_once


class TwoSided(NamedTuple):
    """The bases of a matrix that is projected on both sides: (..., m, r) and (..., n, r).

    Attributes:
      output: The basis of the output side.
      input: The basis of the input side.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> tx = osd_jax.scale_by_subspace(
      ...     optax.scale_by_adam(), osd_jax.svd(200), rank=2, side="both")
      >>> both = osd_jax.projectors(tx.init({"kernel": jnp.ones((6, 8))}))["kernel"]
      >>> both.output.shape, both.input.shape
      ((8, 2), (6, 2))
    """

    output: jax.Array
    input: jax.Array


Basis = jax.Array | TwoSided
Reduce = Callable[[jax.Array], jax.Array]


def is_two_sided(x: Any) -> bool:
    """Whether `x` is a pair of bases of one matrix."""
    return isinstance(x, TwoSided)


class Statistic(NamedTuple):
    """A quantity of a gradient M (..., p, q) that a rule reads in addition to R.

    Attributes:
      name: Its key in a sketch.
      degree: Its degree in M: the statistic of c M is c ** degree times that of M.
      of: (P, M, R) -> the value, (batch..., ...), float32 (float64 for float64 gradients).
      estimate: None if the mean over devices of `of(P, M_i, R)`, with the mean R, equals the
        statistic of the mean of the parts M_i. Otherwise the value cannot be computed from the
        parts, and `estimate(a, b, c)` approximates it, where a is the mean of `of(P, M_i, R_i)`, b
        the mean of `of(P, R_i, R_i)` and c is `of(P, R, R)`. Only for statistics that read M alone.

    Example:
      >>> import jax.numpy as jnp
      >>> from osd_jax.sketch import Statistic, make_sketch
      >>> largest = Statistic("largest", 1, lambda P, M, R: jnp.abs(M).max((-2, -1)))
      >>> P, M = jnp.eye(3, 2), jnp.ones((3, 4))
      >>> make_sketch(P, M, (largest,)).scaled(2.0).statistics
      {'largest': Array(2., dtype=float32)}
    """

    name: str
    degree: int
    of: Callable[[Any, jax.Array, jax.Array], jax.Array]
    estimate: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Sketch:
    """What a step reads of a gradient M (..., p, q) with basis P (..., p, r). A pytree.

    All arrays are float32 (float64 for float64 gradients). While P is fixed, the R of a sum of
    gradients is the sum of their R's.

    Attributes:
      low_rank: R = P^T M, (..., r, q); two-sided: P_out^T M P_in, (..., r, r), stored
        transposed, because M is laid out as (input, output) here.
      statistics: The statistics by name.
      degrees: The degree of each statistic in M, by name; part of the tree's structure.

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> from osd_jax.sketch import make_sketch
      >>> P, M = jnp.eye(3, 2), jnp.ones((3, 4))
      >>> sketch = make_sketch(P, M, (osd_jax.SQUARED_NORM,))
      >>> sketch.low_rank.shape, float(sketch.scaled(0.5).statistics["squared_norm"])
      ((2, 4), 3.0)
    """

    low_rank: jax.Array
    statistics: Mapping[str, jax.Array]
    degrees: Mapping[str, int]

    def scaled(self, factor: jax.typing.ArrayLike) -> Sketch:
        """Returns the sketch of `factor` M."""
        statistics = {
            name: x * factor**degree if (degree := self.degrees[name]) else x
            for name, x in self.statistics.items()
        }
        return Sketch(self.low_rank * factor, statistics, self.degrees)

    def only(self, statistics: Iterable[Statistic]) -> Sketch:
        """Returns the sketch with only the given statistics."""
        names = [statistic.name for statistic in statistics]
        pick = lambda by_name: {name: by_name[name] for name in names}
        return Sketch(self.low_rank, pick(self.statistics), pick(self.degrees))


def _flatten_sketch(sketch: Sketch) -> tuple[list[tuple[Any, Any]], Any]:
    names = sorted(sketch.statistics)
    children = [sketch.low_rank, *(sketch.statistics[name] for name in names)]
    keys = [jax.tree_util.GetAttrKey(name) for name in ("low_rank", *names)]
    return list(zip(keys, children, strict=True)), tuple((k, sketch.degrees[k]) for k in names)


def _unflatten_sketch(degrees: tuple[tuple[str, int], ...], children: Iterable[Any]) -> Sketch:
    low_rank, *statistics = children
    names = (name for name, _ in degrees)
    return Sketch(low_rank, dict(zip(names, statistics, strict=True)), dict(degrees))


jax.tree_util.register_pytree_with_keys(Sketch, _flatten_sketch, _unflatten_sketch)


def is_sketch(x: Any) -> bool:
    """Whether `x` is a sketch rather than an unprojected gradient."""
    return isinstance(x, Sketch)


class Needs(NamedTuple):
    """What a rule reads of a gradient in addition to R.

    Attributes:
      statistics: The statistics that it reads at the steps at which it runs.
      gradient: When it reads the gradient itself.
      reason: Why it reads the gradient; the text of the error in modes that keep only sketches.
      remedy: What to use instead in these modes.

    Example:
      >>> import osd_jax
      >>> needs = osd_jax.Needs((osd_jax.CORRELATION,), "always", "my rule adds the residual")
    """

    statistics: tuple[Statistic, ...] = ()
    gradient: Literal["never", "at a refresh", "always"] = "never"
    reason: str = ""
    remedy: str = "another rule"


def reading_gradient(needs: Iterable[Needs]) -> Needs | None:
    """The needs of the first rule that reads the gradient at every step; None if there is none."""
    return next((each for each in needs if each.gradient == "always"), None)


def merged(*statistics: Iterable[Statistic]) -> tuple[Statistic, ...]:
    """The statistics of several rules, each name once.

    Raises:
      ValueError: Two statistics share a name.
    """
    by_name: dict[str, Statistic] = {}
    for statistic in (one for several in statistics for one in several):
        if by_name.setdefault(statistic.name, statistic) != statistic:
            raise ValueError(
                f"two different statistics are named {statistic.name!r}: names must be unique; "
                "rename one"
            )
    return tuple(by_name.values())


def make_sketch(
    basis: Basis,
    matrix: jax.Array,
    statistics: Iterable[Statistic] = (),
    reduce: Reduce | None = None,
) -> Sketch:
    """Computes the sketch of M with basis P.

    Args:
      basis: P, (..., p, r).
      matrix: M, (..., p, q), or this device's part of a mean.
      statistics: The statistics to compute; each name once.
      reduce: The mean over devices, if M is only a part. The parts themselves are not reduced: R is
        reduced first, then each statistic as it declares.
    """
    statistics = tuple(statistics)
    degrees = {statistic.name: statistic.degree for statistic in statistics}
    low_rank = columns_of_stored(low_rank_gradient(basis, matrix))
    if reduce is None:
        of = lambda one: whole_of_stored(one.of(basis, matrix, low_rank))
        values = {one.name: of(one) for one in statistics}
        return Sketch(low_rank, values, degrees)
    parts = {
        one.name: reduce(
            jnp.stack([one.of(basis, matrix, low_rank), one.of(basis, low_rank, low_rank)])
        )
        for one in statistics
        if one.estimate is not None
    }
    low_rank = reduce(low_rank)

    def reduced(one: Statistic) -> jax.Array:
        if one.estimate is None:
            return reduce(one.of(basis, matrix, low_rank))
        of_parts, of_low_ranks = parts[one.name][0], parts[one.name][1]
        return one.estimate(of_parts, of_low_ranks, one.of(basis, low_rank, low_rank))

    return Sketch(low_rank, {one.name: reduced(one) for one in statistics}, degrees)


def as_in_subspace(mean: jax.Array, of_low_ranks: jax.Array, of_low_rank: jax.Array) -> jax.Array:
    """Estimates the squared norm of a mean: it shrinks like R compared with the R_i.

    `mean ||M_i||^2 * ||R||^2 / mean ||R_i||^2`, exact if averaging shrinks the norm outside the
    subspace by the same factor as inside.
    """
    usable = has_direction(of_low_ranks)
    ratio = of_low_rank / jnp.where(usable, of_low_ranks, 1)
    return mean * jnp.where(usable, ratio, 1)


def low_rank_gradient(basis: Basis, matrix: jax.Array) -> jax.Array:
    """R: (..., p, r), (..., p, q) -> (..., r, q); two-sided: (..., r, r); float32 or float64."""
    if isinstance(basis, TwoSided):
        # (P_out^T M P_in)^T, because M is (input, output) here. The output side first, as in
        # PyTorch: bfloat16 rounds the product with that basis.
        half = contract("pq,qs->ps", matrix, basis.output)
        return contract("pr,ps->rs", basis.input, half)
    return contract("rp,pq->rq", written_transpose(basis), matrix)


def correlation(matrix: jax.Array, low_rank: jax.Array) -> jax.Array:
    """A = M R^T: (..., p, q), (..., r, q) -> (..., p, r), in float32 or float64."""
    return written_transpose(contract("rq,pq->rp", low_rank, matrix))


def squared_columns(matrix: jax.Array) -> jax.Array:
    """||M_j||^2 of each column: (..., p, q) -> (..., q), in float32 or float64."""
    return jnp.sum(jnp.square(float32_or_more(matrix)), axis=-2)


CORRELATION = Statistic("correlation", 2, lambda P, M, R: correlation(M, R))
"""A = M R^T, (..., p, r)."""

SQUARED_NORM = Statistic("squared_norm", 2, lambda P, M, R: squared_norm(M), as_in_subspace)
"""||M||_F^2, (...,)."""

COLUMN_ENERGIES = Statistic(
    "column_energies", 2, lambda P, M, R: squared_columns(M), as_in_subspace
)
"""c_j = ||M_j||^2 of each column, (..., q)."""


# ------------------------------------------------------------ sketches as leaves of Optax trees


class SketchLeaf:
    """A sketch that replaces its gradient in an Optax tree: a leaf, not a node.

    It passes through `optax.chain`, `optax.masked` and `optax.partition` to `scale_by_subspace`. On
    its way it may be multiplied by a number, which scales R and each statistic by its degree. Any
    other operation raises, because the gradient no longer exists.

    Args:
      sketch: The sketch of the gradient.
      shape: Shape of the gradient.
      dtype: Dtype of the gradient.
    """

    __array_ufunc__ = None  # NumPy scalars defer the multiplication to this class

    def __init__(self, sketch: Sketch, shape: tuple[int, ...], dtype: Any) -> None:
        self.sketch = sketch
        self.shape = shape
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        """Number of axes of the gradient."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the gradient."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype).size

    def __mul__(self, factor: Any) -> SketchLeaf:
        if jnp.ndim(factor):
            raise TypeError(f"a SketchLeaf times an array of shape {jnp.shape(factor)}")
        return SketchLeaf(self.sketch.scaled(factor), self.shape, self.dtype)

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> SketchLeaf:
        return self * (1 / factor)

    def __neg__(self) -> SketchLeaf:
        return self * -1

    def __repr__(self) -> str:
        return f"SketchLeaf(shape={self.shape}, dtype={self.dtype})"


def is_sketch_leaf(x: Any) -> bool:
    """Whether `x` is a sketch within an Optax tree."""
    return isinstance(x, SketchLeaf)


def bare(tree: Any) -> Any:
    """Replaces each `SketchLeaf` by its `Sketch`, a pytree that JAX transformations accept."""
    return jax.tree.map(lambda x: x.sketch if is_sketch_leaf(x) else x, tree)


def as_leaves(like: Any, tree: Any) -> Any:
    """The inverse of `bare`, with shapes and dtypes from the leaves of `like`."""

    def one(like: Any, x: Any) -> Any:
        return SketchLeaf(x, tuple(like.shape), like.dtype) if is_sketch(x) else x

    return jax.tree.map(one, like, tree)


def sketches_of(
    tree: Any, grads: Any, bases: Any, statistics: Iterable[Statistic], reduce: Reduce | None = None
) -> Any:
    """The sketch of each gradient, with these statistics; `tree` is of `MatrixLayout`."""

    @functools.partial(traced_once, static_argnums=0)
    def one(layout: MatrixLayout, gradient: jax.Array, basis: Basis) -> Sketch:
        return make_sketch(basis, layout.to_matrix(gradient), statistics, reduce)

    return jax.tree.map(one, tree, grads, bases)


# Any operation on a gradient if only its sketch is kept.
ONLY_SKETCHES = (
    "only the sketches of projected gradients are kept here (accumulated or reduced sketches, or "
    "layer-by-layer updates with micro-batches or clipping). A transformation before "
    "scale_by_subspace may only multiply them by a number: put it after scale_by_subspace, or "
    "keep whole gradients"
)
