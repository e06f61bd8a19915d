"""Muon's lift: an update with all singular values close to 1, by Newton-Schulz."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from osd_names import MUON_SCALES, MuonScale, ResolvedSide, check_choice
from osd_torch.lift import Lift, Lifted, Seen
from osd_torch.numerics import plus_product
from osd_torch.sharding import distributed_as, whole

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(
    inner: Lift,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    dtype: torch.dtype | None = None,
    scale: MuonScale = "adamw",
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
        >>> import osd_torch
        >>> osd_torch.orthogonalized(osd_torch.add_gradient()).name
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
    side: ResolvedSide,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    dtype: torch.dtype | None = None,
    scale: MuonScale = "adamw",
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
    return distributed_as(found.mul_(muon_scale(tuple(matrix.shape), side, scale)), update)


def muon_scale(shape: tuple[int, ...], side: ResolvedSide, scale: MuonScale) -> float:
    """The factor of a `scale`; see `orthogonalized`.

    Args:
        shape: Shape of M, (..., p, q).
        side: The side of p; see `Seen`.
        scale: One of `osd_names.MUON_SCALES`.
    """
    n_out, n_in = shape[-2:] if side == "output" else shape[:-3:-1]
    return {
        "adamw": 0.2 * math.sqrt(max(n_out, n_in)),
        "muon": math.sqrt(max(1, n_out / n_in)),
        "none": 1.0,
    }[scale]


def newton_schulz(
    matrix: Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximates U V^T of a matrix U S V^T, (..., m, n): its singular values move close to 1.

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
        (..., m, n), with the matrix's dtype; zeros for zeros, and if the squared norm overflows.

    Example:
        >>> import torch
        >>> update = newton_schulz(torch.diag(torch.tensor([3.0, 0.5])))
        >>> bool(((update.diagonal() - 1).abs() < 0.35).all())
        True
    """
    a, b, c = coefficients
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    norm = x.norm() if x.ndim == 2 else torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    # If the squared norm underflowed, values above 1 would remain and diverge.
    x = (x / norm.clamp(min=torch.finfo(x.dtype).tiny ** 0.5)).to(dtype or x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = plus_product(gram, gram, gram, beta=b, alpha=c)
        x = plus_product(x, polynomial, x, beta=a, alpha=1.0)
    return (x.mT if is_tall else x).to(matrix.dtype)
