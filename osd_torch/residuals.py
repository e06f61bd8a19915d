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
from typing import Any

import torch
from torch import Tensor

from osd_names import MUON_SCALES, check_choice
from osd_torch.bases import to_matrix
from osd_torch.lift import Lift, Lifted, Seen, lift
from osd_torch.numerics import accumulator_dtype, check_number
from osd_torch.sharding import distributed_as, settled, whole
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
    """|x_j| of each column, (r, q) -> (q,)."""
    return settled(matrix.square().sum(dim=0)).sqrt()


def residual_energies(seen: Seen, scale: float = 1.0) -> Tensor:
    """E_j = |M_j - a P R_j|^2 of each column, (q,), computed from the statistics alone.

    Args:
        seen: Inputs of the lift, with `COLUMN_ENERGIES`.
        scale: a.
    """
    basis, low_rank = seen.basis, seen.sketch.low_rank
    assert not isinstance(basis, TwoSided)
    gram = product(basis.mT, basis)
    lifted = settled((low_rank * product(gram, low_rank)).sum(dim=0))
    energies = seen.sketch.statistics["column_energies"]
    return (energies - 2 * scale * low_rank.square().sum(dim=0) + scale**2 * lifted).clamp(min=0)


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
    norm = settled((ratio.square() * energies).sum()).sqrt()
    factor, kept = _limit(norm, seen.state["norm"])
    return ratio * factor, {"norm": kept}


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
    return Lift(apply, _needs(), name=f"residual_sign({weight}, {scale})")


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
    return Lift(_add_gradient, _needs(), name="add_gradient()")


def _add_gradient(direction: Tensor, seen: Seen) -> Lifted:
    return Lifted(direction - seen.sketch.low_rank, _wide(seen))


def _wide(seen: Seen) -> Tensor:
    """M in float32 (float64 for float64)."""
    assert seen.gradient is not None
    return seen.gradient.to(accumulator_dtype(seen.gradient.dtype))


# Newton-Schulz

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(
    inner: Lift,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    dtype: torch.dtype | None = None,
    scale: str = "adamw",
) -> Lift:
    """Orthogonalizes the update of another lift as Muon does: all singular values become about 1.

    Sharded matrices are gathered one at a time.

    Args:
        inner: Another lift, such as `add_gradient()`.
        steps: Number of Newton-Schulz steps.
        coefficients: (a, b, c) of `X <- a X + (b X X^T + c (X X^T)^2) X`.
        dtype: Dtype of the iteration. None: the update's, float32 or float64; bfloat16 is faster on
            a GPU.
        scale: "adamw" multiplies by 0.2 sqrt(max(m, n)), so that AdamW's learning rates carry over;
            "muon" by sqrt(max(1, m / n)) for an (m, n) = (output, input) matrix; or "none".

    Returns:
        A `Lift` with the needs of `inner`.

    Raises:
        ValueError: An argument is out of range.

    References:
        Jordan et al. (2024), Muon; the "adamw" scale: Moonlight, arXiv 2502.16982.

    Example:
        >>> orthogonalized(add_gradient()).name
        'orthogonalized(add_gradient(), steps=5, scale=adamw)'
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps is {steps!r}: expected a whole number of at least 1")
    check_choice("scale", scale, MUON_SCALES)
    if len(coefficients) != 3:
        raise ValueError(f"coefficients are {coefficients!r}: expected three numbers")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype is {dtype!r}: expected None, float32, bfloat16 or float64")
    options: dict[str, Any] = {
        "steps": steps, "coefficients": tuple(coefficients), "dtype": dtype, "scale": scale,
    }  # fmt: skip
    return inner._replace(
        apply=functools.partial(_orthogonalized, inner, options),
        name=f"orthogonalized({inner.name}, steps={steps}, scale={scale})",
    )


def _orthogonalized(inner: Lift, options: dict[str, Any], direction: Tensor, seen: Seen) -> Lifted:
    lifted = inner.apply(direction, seen)

    def then(update: Tensor) -> Tensor:
        update = update if lifted.then is None else lifted.then(update)
        return orthogonalize(update, seen.side, **options)

    return lifted._replace(then=then)


def orthogonalize(
    update: Tensor,
    side: str,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    dtype: torch.dtype | None = None,
    scale: str = "adamw",
) -> Tensor:
    """Applies `newton_schulz` to a matrix and multiplies by its `scale`; gathers a sharded matrix.

    Args:
        update: (p, q), where p is the `side` of the weight, "output" or "input".
        side: See above.
        steps: See `orthogonalized`.
        coefficients: See `orthogonalized`.
        dtype: See `orthogonalized`.
        scale: See `orthogonalized`.

    Returns:
        (p, q), sharded like `update`.

    Example:
        >>> import torch
        >>> orthogonalize(torch.ones(4, 3), "output").shape
        torch.Size([4, 3])
    """
    matrix = whole(update)
    found = newton_schulz(matrix, steps=steps, coefficients=coefficients, dtype=dtype)
    return distributed_as(found.mul_(muon_scale(to_matrix(matrix, side), scale)), update)


def muon_scale(matrix: Tensor, scale: str) -> float:
    """The factor of a `scale`; see `orthogonalized`."""
    p, q = matrix.shape
    return {"adamw": 0.2 * math.sqrt(max(p, q)), "muon": math.sqrt(max(1, p / q)), "none": 1.0}[
        scale
    ]


def newton_schulz(
    matrix: Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximates U V^T of a matrix U S V^T, (m, n): its singular values move close to 1.

    After a division by the Frobenius norm, each step applies the odd polynomial `a s + b s^3 + c
    s^5` to all singular values. With Muon's coefficients and 5 steps, values above 0.002 of that
    norm end in [0.68, 1.21]. A step has 3 products of the shorter side: 2 min^2 (max + min / 2)
    multiplications.

    Args:
        matrix: float32 or float64.
        steps: Number of iterations.
        coefficients: a, b, c.
        dtype: Dtype of the iteration. None: the dtype of the matrix.

    Returns:
        (m, n), with the matrix's dtype; zeros for zeros, and if the squared norm overflows.

    Example:
        >>> import torch
        >>> update = newton_schulz(torch.diag(torch.tensor([3.0, 0.5])))
        >>> bool(((update.diagonal() - 1).abs() < 0.35).all())
        True
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    # If the squared norm underflowed, values above 1 would remain and diverge.
    x = (x / x.norm().clamp(min=torch.finfo(x.dtype).tiny ** 0.5)).to(dtype or x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrix.dtype)
