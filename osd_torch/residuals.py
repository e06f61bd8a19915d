"""Lifts that add what P does not reach: the residual M - P R, or the full gradient.

The plain lift ignores the part of the gradient outside the subspace. Each rule here adds it, scaled
column by column by what the optimizer does inside, where a column is an entry of the axis that P
does not project:

    norm_ratio      P (D - R o k) + M o k,  k_j = |D_j| / (|R_j| + 1e-8)    (Fira)
    column_ema      the same,  k_j = a sqrt(p - r) / sqrt(mean of E_j)      (Alice)
    gradient_only   M o k, no lifted part                                   (APOLLO)
    residual_sign   P D + w sign(M - P R)                                   (FRUGAL)
    add_gradient    P (D - R) + M                                           (`orthogonalized`)

E_j = c_j - 2 |R_j|^2 + R_j^T (P^T P) R_j is the energy of a residual's column. It is computed from
the `COLUMN_ENERGIES` c_j, so only `residual_sign` computes another product with M.

A zero gradient has k = |D| / 1e-8 and a residual of 0; likewise for a zero column. The optimizer
skips a step with a non-finite gradient before the lift.
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
GROWTH = 1.01  # maximum growth of a residual's norm per step


def _needs(*statistics: Statistic) -> Needs:
    return Needs(
        statistics,
        "always",
        "the lift adds a part of the gradient itself",
        "the plain lift, scaled()",
    )


def column_norms(matrix: Tensor) -> Tensor:
    """|x_j| of each column, (..., r, q) -> (..., q)."""
    return settled(matrix.square().sum(dim=-2)).sqrt()


def residual_energies(seen: Seen, scale: float = 1.0) -> Tensor:
    """E_j = |M_j - a P R_j|^2 of each column, (q,), computed from the statistics alone.

    Args:
        seen: Inputs of the lift, with `COLUMN_ENERGIES`.
        scale: a.
    """
    basis, low_rank = seen.basis, seen.sketch.low_rank
    assert not isinstance(basis, TwoSided)
    gram = product(basis.mT, basis)
    lifted = settled((low_rank * product(gram, low_rank)).sum(dim=-2))
    energies = seen.sketch.statistics["column_energies"]
    return (energies - 2 * scale * low_rank.square().sum(dim=-2) + scale**2 * lifted).clamp(min=0)


def _limit(norm: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(factor on a residual of this norm, the resulting norm): limits the growth to 1 %.

    No limit if no norm is stored: at the first step, and after a residual of 0.
    """
    factor = 1 / ((norm / (kept + EPS)).clamp(min=GROWTH) / GROWTH)
    factor = torch.where(kept > 0, factor, torch.ones_like(factor))
    return factor, norm * factor


def _limited(
    seen: Seen, ratio: Tensor, energies: Tensor, limiter: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """k times the growth limiter's factor, and the lift's new state.

    Args:
        seen: Inputs of the lift, with the stored norm.
        ratio: k, (q,).
        energies: Of the columns that k scales, (q,).
        limiter: Whether to limit the growth.
    """
    if not limiter:
        return ratio, {}
    norm = settled((ratio.square() * energies).sum(dim=-1)).sqrt()
    factor, kept = _limit(norm, seen.state["norm"])
    return ratio * factor[..., None], {"norm": kept}


def _norm_state(limiter: bool, matrix: Tensor, low_rank: Tensor) -> dict[str, Tensor]:
    return {"norm": settled(low_rank.sum()) * 0} if limiter else {}


def norm_ratio(scale: float = 1.0, *, limiter: bool = True, release: bool = False) -> Lift:
    """Fira: scales the columns of the residual as the optimizer scales those of R.

        W <- W - lr a (P (D - R o k) + M o k),   k_j = |D_j| / (|R_j| + 1e-8)

    The norm of the residual grows by at most 1 % per step.

    Args:
        scale: a.
        limiter: Whether to limit the residual's growth; the norm is one number of state per matrix.
        release: Whether to compute it as the released code does: the residual is M - a P R, and the
            scale a multiplies P D only.

    Returns:
        A `Lift` that reads the gradient at every step.

    Raises:
        ValueError: The scale is not a finite number of at least 0.

    References:
        arXiv 2410.01623, equations 5 and 6.

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
    return Lift(
        apply, needs, functools.partial(_norm_state, limiter), name, two_sided=False, stacks=True
    )


def _norm_ratio(
    scale: float, limiter: bool, release: bool, direction: Tensor, seen: Seen
) -> Lifted:
    low_rank, a = seen.sketch.low_rank, scale if release else 1.0
    ratio = column_norms(direction) / (column_norms(low_rank) + EPS)
    energies = residual_energies(seen, a) if limiter else ratio
    ratio, state = _limited(seen, ratio, energies, limiter)
    ratio = ratio.unsqueeze(-2)
    inside = a * (direction - low_rank * ratio)
    return Lifted(inside, _wide(seen) * ratio, scale=1.0 if release else scale, state=state)


def column_ema(scale: float = 0.4, *, decay: float = 0.9) -> Lift:
    """Alice: scales the columns of the residual by a moving average of their energies.

        W <- W - lr (P (D - R o k) + M o k),   k_j = a sqrt(p - r) / sqrt(e_j)

    e is the bias-corrected moving average of E, and at least 1e-6 c_j.

    Args:
        scale: a.
        decay: Decay of the moving average.

    Returns:
        A `Lift` that reads the gradient at every step.

    Raises:
        ValueError: A number is out of range.

    References:
        arXiv 2502.07752, algorithm 4, without its limiter.

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
        stacks=True,
    )


def _column_ema_state(matrix: Tensor, low_rank: Tensor) -> dict[str, Tensor]:
    return {"energies": settled(low_rank.sum(dim=0)) * 0, "steps": settled(low_rank.sum()) * 0}


def _column_ema(scale: float, decay: float, direction: Tensor, seen: Seen) -> Lifted:
    low_rank, basis = seen.sketch.low_rank, seen.basis
    assert isinstance(basis, Tensor)
    steps = seen.state["steps"] + 1
    mean = decay * seen.state["energies"] + (1 - decay) * residual_energies(seen)
    root = (mean / (1 - decay ** steps[..., None])).sqrt()
    root = torch.maximum(root, 1e-3 * seen.sketch.statistics["column_energies"].sqrt())
    reach = scale * math.sqrt(basis.shape[-2] - basis.shape[-1])
    ratio = torch.where(root > 0, reach / root, torch.zeros_like(root)).unsqueeze(-2)
    state = {"energies": mean, "steps": steps}
    return Lifted(direction - low_rank * ratio, _wide(seen) * ratio, state=state)


def gradient_only(scale: float = 1.0, *, per: str = "column", limiter: bool = True) -> Lift:
    """APOLLO: applies the full gradient, scaled as the optimizer scales R; nothing is lifted.

        W <- W - lr sqrt(a) M o k,   k_j = |D_j| / (|R_j| + 1e-8)

    or one k for the whole matrix (APOLLO-Mini). The norm of the update grows by at most 1 % per
    step. P only has to preserve norms, as `gaussian` does.

    Args:
        scale: a.
        per: "column" or "matrix".
        limiter: Whether to limit the update's growth; the norm is one number of state per matrix.

    Returns:
        A `Lift` that reads the gradient at every step.

    Raises:
        ValueError: The scale is not a finite number of at least 0, or `per` is unknown.

    References:
        arXiv 2412.05270, algorithm 1.

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
        stacks=True,
    )


def _gradient_only(scale: float, per: str, limiter: bool, direction: Tensor, seen: Seen) -> Lifted:
    columns, of_low_rank = column_norms(direction), column_norms(seen.sketch.low_rank)
    if per == "matrix":
        total = lambda x: settled(x.square().sum(dim=-1)).sqrt()[..., None].expand(columns.shape)
        columns, of_low_rank = total(columns), total(of_low_rank)
    ratio = columns / (of_low_rank + EPS)
    energies = seen.sketch.statistics["column_energies"] if limiter else ratio
    ratio, state = _limited(seen, ratio, energies, limiter)
    update = _wide(seen) * ratio.unsqueeze(-2)
    return Lifted(None, update, scale=math.sqrt(scale), state=state)


def residual_sign(weight: float = 1.0, scale: float = 1.0) -> Lift:
    """FRUGAL: adds the sign of the residual: `W <- W - lr (a P D + w sign(M - P R))`.

    The residual part has no state. It costs one more product with P than the plain lift.

    Args:
        weight: w.
        scale: a.

    Returns:
        A `Lift` that reads the gradient at every step.

    Raises:
        ValueError: A number is out of range.

    References:
        arXiv 2411.07837, algorithm 1, with signSGD outside the subspace.

    Example:
        >>> residual_sign(0.1).name
        'residual_sign(0.1, 1.0)'
    """
    check_number("weight", weight)
    check_number("scale", scale)
    apply = functools.partial(_residual_sign, weight, scale)
    return Lift(apply, _needs(), name=f"residual_sign({weight}, {scale})", stacks=True)


def _residual_sign(weight: float, scale: float, direction: Tensor, seen: Seen) -> Lifted:
    residual = _wide(seen) - lift(seen.basis, seen.sketch.low_rank)
    return Lifted(scale * direction, weight * residual.sign())


def add_gradient() -> Lift:
    """The lift `P (D - R) + M`: the full gradient, with R replaced by D inside the subspace.

    With a rule that adds momentum to R (`Trace`), the update is the gradient plus the part of its
    momentum inside the subspace.

    Returns:
        A `Lift` that reads the gradient at every step.

    Example:
        >>> add_gradient().name
        'add_gradient()'
    """
    return Lift(_add_gradient, _needs(), name="add_gradient()", stacks=True)


def _add_gradient(direction: Tensor, seen: Seen) -> Lifted:
    return Lifted(direction - seen.sketch.low_rank, _wide(seen))


def _wide(seen: Seen) -> Tensor:
    """M in float32 (float64 for float64)."""
    assert seen.gradient is not None
    return seen.gradient.to(accumulator_dtype(seen.gradient.dtype))
