"""Lifts that let through what P does not reach: the residual M - P R, or the whole gradient.

The plain lift applies nothing of a gradient outside the subspace. Each rule here adds it, scaled
column by column from what the optimizer does inside, where a column is an output of the projection
(an entry of the axis that P does not project):

    norm_ratio      P (D - R o k) + M o k,  k_j = |D_j| / (|R_j| + 1e-8)    (Fira)
    column_ema      the same,  k_j = a sqrt(p - r) / sqrt(mean of E_j)      (Alice)
    gradient_only   M o k, nothing is lifted                                (APOLLO)
    residual_sign   P D + w sign(M - P R)                                   (FRUGAL)
    add_gradient    P (D - R) + M                                           (`orthogonalized`)

E_j = c_j - 2 |R_j|^2 + R_j^T (P^T P) R_j is the energy of a residual's column. It follows from the
`COLUMN_ENERGIES` c_j, so no rule but `residual_sign` takes a further product with M.

A zero gradient has k = |D| / 1e-8 and a residual of 0; a zero column likewise. A value that is not
finite makes the optimizer skip the step before a lift sees it.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from osd_torch.lift import Lift, Lifted, Seen, lift
from osd_torch.numerics import accumulator_dtype, check_number
from osd_torch.sharding import settled
from osd_torch.sketch import COLUMN_ENERGIES, Needs, Statistic, TwoSided, product

EPS = 1e-8
GROWTH = 1.01  # the most by which a residual's norm grows in a step


def _needs(*statistics: Statistic) -> Needs:
    return Needs(
        statistics,
        "always",
        "the lift adds a part of the gradient itself",
        "the plain lift, scaled()",
    )


def column_norms(matrix: Tensor) -> Tensor:
    """|x_j| of each column, (r, q) -> (q,)."""
    return settled(matrix.square().sum(dim=0)).sqrt()


def residual_energies(seen: Seen, scale: float = 1.0) -> Tensor:
    """E_j = |M_j - a P R_j|^2 of each column, (q,), from the statistics alone.

    Args:
        seen: With `COLUMN_ENERGIES`.
        scale: a.
    """
    basis, low_rank = seen.basis, seen.sketch.low_rank
    assert not isinstance(basis, TwoSided)
    gram = product(basis.mT, basis)
    lifted = settled((low_rank * product(gram, low_rank)).sum(dim=0))
    energies = seen.sketch.statistics["column_energies"]
    return (energies - 2 * scale * low_rank.square().sum(dim=0) + scale**2 * lifted).clamp(min=0)


def _limit(norm: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(factor on a residual of this norm, the norm that it leaves): it grows by at most 1 %.

    Free where no norm is kept: at the first step, and after a residual of 0.
    """
    factor = 1 / ((norm / (kept + EPS)).clamp(min=GROWTH) / GROWTH)
    factor = torch.where(kept > 0, factor, torch.ones_like(factor))
    return factor, norm * factor


def _limited(
    seen: Seen, ratio: Tensor, energies: Tensor, limiter: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """k with the growth limiter's factor in it, and the lift's new state.

    Args:
        seen: With the norm that is kept.
        ratio: k, (q,).
        energies: Of the columns that k scales, (q,).
        limiter: Whether there is one.
    """
    if not limiter:
        return ratio, {}
    norm = settled((ratio.square() * energies).sum()).sqrt()
    factor, kept = _limit(norm, seen.state["norm"])
    return ratio * factor, {"norm": kept}


def _norm_state(limiter: bool, matrix: Tensor, low_rank: Tensor) -> dict[str, Tensor]:
    return {"norm": settled(low_rank.sum()) * 0} if limiter else {}


def norm_ratio(scale: float = 1.0, *, limiter: bool = True, release: bool = False) -> Lift:
    """Fira: the residual's columns are scaled as the optimizer scales those of R.

    `W <- W - lr a (P (D - R o k) + M o k)`, `k_j = |D_j| / (|R_j| + 1e-8)`, with the residual's
    norm growing by at most 1 % a step.

    Source: arXiv 2410.01623, equations 5 and 6.

    Args:
        scale: a.
        limiter: Limit the residual's growth; its norm is one number of state a matrix.
        release: As the released code computes it: the residual is M - a P R, and the scale a
            multiplies P D only.

    Raises:
        ValueError: for a scale that is no finite number of at least 0.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.SubspaceAdamW(
        ...     layer.parameters(), lr=1e-2, rank=2, lift=norm_ratio(0.25))
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """
    check_number("scale", scale)
    apply = functools.partial(_norm_ratio, scale, limiter, release)
    name = f"norm_ratio({scale}, limiter={limiter}, release={release})"
    needs = _needs(*((COLUMN_ENERGIES,) if limiter else ()))
    return Lift(apply, needs, functools.partial(_norm_state, limiter), name, two_sided=False)


def _norm_ratio(
    scale: float, limiter: bool, release: bool, direction: Tensor, seen: Seen
) -> Lifted:
    low_rank, a = seen.sketch.low_rank, scale if release else 1.0
    ratio = column_norms(direction) / (column_norms(low_rank) + EPS)
    energies = residual_energies(seen, a) if limiter else ratio
    ratio, state = _limited(seen, ratio, energies, limiter)
    inside = a * (direction - low_rank * ratio)
    return Lifted(inside, _wide(seen) * ratio, scale=1.0 if release else scale, state=state)


def column_ema(scale: float = 0.4, *, decay: float = 0.9) -> Lift:
    """Alice: the residual's columns are scaled by a mean over time of their energies.

    `W <- W - lr (P (D - R o k) + M o k)`, `k_j = a sqrt(p - r) / sqrt(e_j)`, where e is the
    bias-corrected mean of E, and at least 1e-6 c_j.

    Source: arXiv 2502.07752, algorithm 4, without its limiter.

    Args:
        scale: a.
        decay: Of the mean.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> column_ema(0.4).name
        'column_ema(0.4, decay=0.9)'
    """
    check_number("scale", scale)
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay!r}: expected a number in [0, 1)")
    return Lift(
        functools.partial(_column_ema, scale, decay),
        _needs(COLUMN_ENERGIES),
        _column_ema_state,
        f"column_ema({scale}, decay={decay})",
        two_sided=False,
    )


def _column_ema_state(matrix: Tensor, low_rank: Tensor) -> dict[str, Tensor]:
    return {"energies": settled(low_rank.sum(dim=0)) * 0, "steps": settled(low_rank.sum()) * 0}


def _column_ema(scale: float, decay: float, direction: Tensor, seen: Seen) -> Lifted:
    low_rank, basis = seen.sketch.low_rank, seen.basis
    assert isinstance(basis, Tensor)
    steps = seen.state["steps"] + 1
    mean = decay * seen.state["energies"] + (1 - decay) * residual_energies(seen)
    root = (mean / (1 - decay**steps)).sqrt()
    root = torch.maximum(root, 1e-3 * seen.sketch.statistics["column_energies"].sqrt())
    reach = scale * math.sqrt(basis.shape[0] - basis.shape[1])
    ratio = torch.where(root > 0, reach / root, torch.zeros_like(root))
    state = {"energies": mean, "steps": steps}
    return Lifted(direction - low_rank * ratio, _wide(seen) * ratio, state=state)


def gradient_only(scale: float = 1.0, *, per: str = "column", limiter: bool = True) -> Lift:
    """APOLLO: the whole gradient, scaled as the optimizer scales R; nothing is lifted.

    `W <- W - lr sqrt(a) M o k`, `k_j = |D_j| / (|R_j| + 1e-8)`, or one k for the whole matrix
    (APOLLO-Mini), with the update's norm growing by at most 1 % a step. P only has to keep norms,
    as `gaussian` does.

    Source: arXiv 2412.05270, algorithm 1.

    Args:
        scale: a.
        per: "column" or "matrix".
        limiter: Limit the update's growth; its norm is one number of state a matrix.

    Raises:
        ValueError: for a scale that is no finite number of at least 0, or an unknown `per`.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(8, 6)
        >>> mini = osd_torch.SubspaceAdamW(
        ...     layer.parameters(), lr=1e-2, rank=1, basis=osd_torch.gaussian(200),
        ...     lift=gradient_only(128, per="matrix"))
    """
    check_number("scale", scale)
    if per not in ("column", "matrix"):
        raise ValueError(f"per is {per!r}: expected column or matrix")
    return Lift(
        functools.partial(_gradient_only, scale, per, limiter),
        _needs(*((COLUMN_ENERGIES,) if limiter else ())),
        functools.partial(_norm_state, limiter),
        f"gradient_only({scale}, per={per!r}, limiter={limiter})",
        two_sided=False,
    )


def _gradient_only(scale: float, per: str, limiter: bool, direction: Tensor, seen: Seen) -> Lifted:
    columns, of_low_rank = column_norms(direction), column_norms(seen.sketch.low_rank)
    if per == "matrix":
        total = lambda x: settled(x.square().sum()).sqrt().expand(columns.shape)
        columns, of_low_rank = total(columns), total(of_low_rank)
    ratio = columns / (of_low_rank + EPS)
    energies = seen.sketch.statistics["column_energies"] if limiter else ratio
    ratio, state = _limited(seen, ratio, energies, limiter)
    return Lifted(None, _wide(seen) * ratio, scale=math.sqrt(scale), state=state)


def residual_sign(weight: float = 1.0, scale: float = 1.0) -> Lift:
    """FRUGAL: the residual without state, by its sign: `W <- W - lr (a P D + w sign(M - P R))`.

    One more product with P than the plain lift takes.

    Source: arXiv 2411.07837, algorithm 1, with signSGD outside the subspace.

    Args:
        weight: w.
        scale: a.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> residual_sign(0.1).name
        'residual_sign(0.1, 1.0)'
    """
    check_number("weight", weight)
    check_number("scale", scale)
    apply = functools.partial(_residual_sign, weight, scale)
    return Lift(apply, _needs(), name=f"residual_sign({weight}, {scale})")


def _residual_sign(weight: float, scale: float, direction: Tensor, seen: Seen) -> Lifted:
    residual = _wide(seen) - lift(seen.basis, seen.sketch.low_rank)
    return Lifted(scale * direction, weight * residual.sign())


def add_gradient() -> Lift:
    """`P (D - R) + M`: the whole gradient, and inside the subspace what the rule makes of R.

    With a rule that adds momentum to R (`Trace`), the update is the gradient plus the part of its
    momentum that a subspace holds.

    Example:
        >>> add_gradient().name
        'add_gradient()'
    """
    return Lift(_add_gradient, _needs(), name="add_gradient()")


def _add_gradient(direction: Tensor, seen: Seen) -> Lifted:
    return Lifted(direction - seen.sketch.low_rank, _wide(seen))


def _wide(seen: Seen) -> Tensor:
    """M in float32 (float64 for float64)."""
    assert seen.gradient is not None
    return seen.gradient.to(accumulator_dtype(seen.gradient.dtype))
