"""The sketch of a gradient: R = P^T M and the statistics that the rules declare.

A `Statistic` defines one quantity of a gradient: how to compute it, how it scales with the gradient
and how to average it over processes. This module implements scaling, clipping, accumulation and
reduction once for all statistics. `Needs` declares which statistics a rule reads, and when it reads
the gradient itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from osd_torch.numerics import accumulator_dtype
from osd_torch.sharding import Reduce, local, matmul, squared_columns, squared_norm


class TwoSided(NamedTuple):
    """The bases of a matrix that is projected on both sides: (m, r) and (n, r).

    Attributes:
        output: The basis of the output side.
        input: The basis of the input side.

    Example:
        >>> import torch
        >>> both = TwoSided(output=torch.eye(6, 2), input=torch.eye(8, 2))
        >>> low_rank_gradient(both, torch.ones(6, 8)).shape
        torch.Size([2, 2])
    """

    output: Tensor
    input: Tensor


Basis = Tensor | TwoSided


class Statistic(NamedTuple):
    """A quantity of a gradient M (p, q) that a rule reads in addition to R.

    Attributes:
        name: Its key in a sketch.
        degree: Its degree in M: the statistic of c M is c ** degree times that of M.
        of: (P, M, R) -> the value, float32 (float64 for float64 gradients).
        estimate: None if the mean over processes of `of(P, M_i, R)`, with the mean R, equals the
            statistic of the mean of the parts M_i. Otherwise the value cannot be computed from the
            parts, and `estimate(a, b, c)` approximates it, where a is the mean of `of(P, M_i,
            R_i)`, b the mean of `of(P, R_i, R_i)` and c is `of(P, R, R)`. Only for statistics that
            read M alone.

    Example:
        >>> import torch
        >>> largest = Statistic("largest", 1, lambda P, M, R: M.abs().max())
        >>> P, M = torch.eye(3)[:, :2], torch.ones(3, 4)
        >>> make_sketch(P, M, (largest,)).scaled(2.0).statistics
        {'largest': tensor(2.)}
    """

    name: str
    degree: int
    of: Callable[[Basis, Tensor, Tensor], Tensor]
    estimate: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


class Sketch(NamedTuple):
    """What a step reads of a gradient M (p, q) with basis P (p, r).

    All tensors are float32 (float64 for float64 gradients). While P is fixed, the R of a sum of
    gradients is the sum of their R's.

    Attributes:
        low_rank: R = P^T M, (r, q); two-sided: P_out^T M P_in, (r, r).
        statistics: The statistics by name. 0-dimensional ones may be on the CPU.
        degrees: The degree of each statistic in M, by name.

    Example:
        >>> import torch
        >>> sketch = make_sketch(torch.eye(6, 2), torch.ones(6, 8), (SQUARED_NORM,))
        >>> sketch.statistics["squared_norm"], sketch.scaled(2.0).statistics["squared_norm"]
        (tensor(48.), tensor(192.))
    """

    low_rank: Tensor
    statistics: dict[str, Tensor]
    degrees: dict[str, int]

    def scaled(self, factor: float) -> Sketch:
        """Returns the sketch of `factor` M."""
        scale = lambda x, degree: x * factor**degree
        return self._each(scale)

    def scale_(self, factor: Tensor) -> None:
        """Turns this into the sketch of `factor` M, in place."""

        def scale(x: Tensor, degree: int) -> Tensor:
            part = local(x)
            part.mul_((factor**degree).to(part.device))
            return x

        self._each(scale)

    def part(self, share: float) -> Sketch:
        """The contribution of this sketch of one part, a `share` of a sum, to the sum's sketch.

        The R's add up to the sum's R. Each statistic is approximated by the mean over the parts,
        with each part scaled up to a whole gradient by its share.
        """
        return self._each(lambda x, degree: x if share == 1 else _over(x, share, degree))

    def add_(self, other: Sketch) -> Sketch:
        """Adds another sketch, in place."""
        for mine, its in zip(self.values(), other.values(), strict=True):
            mine.add_(its)
        return self

    def values(self) -> list[Tensor]:
        """R, then the statistics."""
        return [self.low_rank, *self.statistics.values()]

    def _each(self, function: Callable[[Tensor, int], Tensor]) -> Sketch:
        statistics = {k: function(x, self.degrees[k]) for k, x in self.statistics.items()}
        return self._replace(low_rank=function(self.low_rank, 1), statistics=statistics)


def _over(x: Tensor, share: float, degree: int) -> Tensor:
    return x if degree == 1 else x / share ** (degree - 1)


class Needs(NamedTuple):
    """What a rule reads of a gradient in addition to R.

    Attributes:
        statistics: The statistics that it reads at the steps at which it runs.
        gradient: When it reads the gradient itself.
        reason: Why it reads the gradient; the text of the error in modes that keep only sketches.
        remedy: What to use instead in these modes.

    Example:
        >>> needs = Needs((COLUMN_ENERGIES,), "always", "it adds a part of the gradient")
        >>> reading_gradient([Needs(), needs]).reason
        'it adds a part of the gradient'
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
    matrix: Tensor,
    statistics: Iterable[Statistic] = (),
    reduce: Reduce | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> Sketch:
    """Computes the sketch of M with basis P.

    Args:
        basis: P.
        matrix: M, or this process's part of a mean.
        statistics: The statistics to compute; each name once.
        reduce: The mean over processes, if M is only a part. The parts themselves are not reduced:
            R is reduced first, then each statistic as it declares.
        known: Values already known to the caller, by name; not for a part.
    """
    statistics = tuple(statistics)
    degrees = {one.name: one.degree for one in statistics}
    low_rank = low_rank_gradient(basis, matrix)
    if reduce is None:
        known = known or {}
        values = {
            one.name: known[one.name] if one.name in known else one.of(basis, matrix, low_rank)
            for one in statistics
        }
        return Sketch(low_rank, values, degrees)
    parts = {
        one.name: reduce(
            torch.stack([one.of(basis, matrix, low_rank), one.of(basis, low_rank, low_rank)])
        )
        for one in statistics
        if one.estimate is not None
    }
    low_rank = reduce(low_rank)

    def reduced(one: Statistic) -> Tensor:
        if one.estimate is None:
            return reduce(one.of(basis, matrix, low_rank))
        of_parts, of_low_ranks = parts[one.name].unbind()
        return one.estimate(of_parts, of_low_ranks, one.of(basis, low_rank, low_rank))

    return Sketch(low_rank, {one.name: reduced(one) for one in statistics}, degrees)


def as_in_subspace(mean: Tensor, of_low_ranks: Tensor, of_low_rank: Tensor) -> Tensor:
    """Estimates the squared norm of a mean: it shrinks like R compared with the R_i.

    `mean ||M_i||^2 * ||R||^2 / mean ||R_i||^2`, exact if averaging shrinks the norm outside the
    subspace by the same factor as inside.
    """
    limits = torch.finfo(of_low_ranks.dtype)
    is_normal = (limits.tiny <= of_low_ranks) & (of_low_ranks <= limits.max)
    return mean * torch.where(is_normal, of_low_rank / of_low_ranks, 1)


def low_rank_gradient(basis: Basis, matrix: Tensor) -> Tensor:
    """R: (p, r), (p, q) -> (r, q); two-sided: (r, r), in float32 or float64; or of a stack.

    R has the memory layout of M, which is that of the moments.
    """
    if isinstance(basis, TwoSided):
        return product(product(basis.output.mT, matrix), basis.input)
    if not matrix.is_contiguous() and matrix.mT.is_contiguous():
        return product(matrix.mT, basis).mT
    return product(basis.mT, matrix)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product of a and b, or of each pair of two stacks (b, ., .).

    Both inputs are read in the narrower of their dtypes; the products are accumulated and returned
    in float32 (float64 for float64). Sharded inputs: see `sharding.matmul`.
    """
    return matmul(a, b, _plain_product)


def _plain_product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == b.dtype == accumulator_dtype(a.dtype):
        return a @ b
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    wide, a, b = accumulator_dtype(narrow), a.to(narrow), b.to(narrow)
    if a.is_cuda and narrow != wide:
        return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def _correlation(basis: Basis, matrix: Tensor, low_rank: Tensor) -> Tensor:
    return product(matrix, low_rank.mT)


def _squared_norm(basis: Basis, matrix: Tensor, low_rank: Tensor) -> Tensor:
    return squared_norm(matrix)


def _squared_columns(basis: Basis, matrix: Tensor, low_rank: Tensor) -> Tensor:
    return squared_columns(matrix)


CORRELATION = Statistic("correlation", 2, _correlation)
"""A = M R^T, (p, r)."""

SQUARED_NORM = Statistic("squared_norm", 2, _squared_norm, as_in_subspace)
"""||M||_F^2, 0-dimensional."""

COLUMN_ENERGIES = Statistic("column_energies", 2, _squared_columns, as_in_subspace)
"""c_j = ||M_j||^2 of each column, (q,); for P on one side."""
