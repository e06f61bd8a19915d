"""Basis rules, which set and move P: online PCA, Oja, SVD, random, Gaussian.

The clock of a `BasisRule` determines at which steps a gradient sets P and at which P moves; the
rule also defines how P is set and the gradient that moves it. Online PCA reads two statistics of a
gradient in addition to R, and computes no SVD after the first step.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from osd_names import MOVE_PROJECTOR, Order, ResolvedSide, check_choice
from osd_torch.basis_rule import BasisRule, Clock, Each, StepSize
from osd_torch.layout import to_matrix
from osd_torch.numerics import (
    accumulator_dtype,
    check_number,
    check_period,
    float32_or_more,
    has_direction,
    per_part,
)
from osd_torch.rules import SGD, Adam, Rule
from osd_torch.sharding import local, parted_like, whole
from osd_torch.sketch import CORRELATION, SQUARED_NORM, Basis, Needs, Sketch, TwoSided, product

_FROM_SVD = "svd sets P from the gradient's singular vectors"
_ADAM, _SGD = Adam(), SGD()


def online_pca(
    optimizer: Rule = _ADAM,
    *,
    step_size: StepSize = 0.005,
    penalty: float = 0.0,
    weight_decay: float = 0.0,
    order: Order = "after",
    every: int = 1,
) -> BasisRule:
    """Moves P by one optimizer step on the online PCA loss after each step of W.

        L  = ||P P^T Gn - Gn||_F^2 + penalty ||P^T P - I||_F^2,   Gn = G / ||G||_F
        P <- P - step_size * optimizer(dL/dP)

    `online_pca_gradient` has the closed form of dL/dP. The first nonzero gradient sets P, which
    does not move at that step; afterwards `optimizer` takes one step per update, or one every
    `every` updates. P stays unchanged if a gradient is zero or its squared norm overflows.

    Args:
        optimizer: The rule of P's step. Its first step is the first after P was set.
        step_size: Step size of P: a number, or a function of lr, such as `lambda lr: 5 * lr` (the
            paper's).
        penalty: Lambda, the weight of the orthogonality penalty (0.1 in the paper, 0 in the
            release).
        weight_decay: Decoupled weight decay of P, before the step.
        order: "before": P moves before W's step, and R is recomputed with the new P.
        every: P moves at steps `every`, 2 `every`, ... with the gradient of that step. At all other
            steps P and its optimizer's state stay unchanged, and neither A nor ||G||_F^2 is
            computed.

    Returns:
        A `BasisRule`.

    Raises:
        ValueError: A penalty, weight decay or step size is negative, the order is unknown, or the
            period is below 1.

    References:
        arXiv 2408.12857, equation 8.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.SubspaceAdamW(
        ...     layer.parameters(), lr=1e-2, rank=2,
        ...     basis=osd_torch.online_pca(step_size=lambda lr: 5 * lr, penalty=0.1, every=10))
    """
    if isinstance(optimizer, type) or not callable(getattr(optimizer, "step_", None)):
        raise ValueError(
            f"optimizer is {optimizer!r}: expected a Rule, such as osd_torch.rules.Adam()"
        )
    check_period(every, "update_proj_every")
    check_choice("order", order, MOVE_PROJECTOR)
    check_number("penalty", penalty)
    check_number("projector_weight_decay", weight_decay)
    if not callable(step_size):
        check_number("step_size", step_size)
    needs = Needs((CORRELATION, SQUARED_NORM), "at a refresh", _FROM_SVD)
    if order == "before":
        needs = needs._replace(
            gradient="always",
            reason="move_projector is 'before', which recomputes R from the gradient after P has "
            "moved",
            remedy="move_projector='after'",
        )
    return BasisRule(
        clock=Clock(move_every=every),
        fresh=leading_singular_vectors,
        needs=needs,
        gradient=functools.partial(online_pca_gradient, penalty=penalty),
        optimizer=optimizer,
        weight_decay=weight_decay,
        order=order,
        step_size=step_size,
        name=f"online_pca({optimizer!r}, penalty={penalty}, weight_decay={weight_decay}, "
        f"order={order!r}, every={every})",
        stacks=True,
    )


def oja(
    optimizer: Rule = _SGD, *, step_size: StepSize = 1.0, order: Order = "after", every: int = 1
) -> BasisRule:
    """Moves P by Oja's rule: `P <- QR(P + eta A / ||G||_F^2)`, `A = G G^T P`.

    The columns stay orthonormal and keep their order and signs. With a large step size, a step is
    one of subspace iteration. Each move costs a QR of (p, r) and two of the five products that
    `online_pca` computes for P.

    Args:
        optimizer: The rule of P's step, which receives `-A / ||G||_F^2`.
        step_size: eta: a number, or a function of lr.
        order: See `online_pca`.
        every: See `online_pca`.

    Returns:
        A `BasisRule`.

    Raises:
        ValueError: See `online_pca`.

    References:
        Oja (1992), Principal components, minor components, and linear neural networks.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.SubspaceAdamW(
        ...     layer.parameters(), lr=1e-2, rank=2, basis=osd_torch.oja(step_size=0.5))
    """
    rule = online_pca(optimizer, step_size=step_size, order=order, every=every)
    return rule._replace(
        gradient=oja_gradient,
        retract=orthonormalized,
        name=f"oja({optimizer!r}, order={order!r}, every={every})",
    )


def oja_gradient(basis: Tensor, sketch: Sketch) -> Tensor:
    """`-A / s`, (p, r); zero if the squared norm s is zero or overflows."""
    a, s = _with_direction(sketch)
    return a / -s


def orthonormalized(basis: Tensor) -> Tensor:
    """The Q of P's QR decomposition, (p, r), with signs such that R's diagonal is positive."""
    q, r = torch.linalg.qr(basis)
    signs = torch.where(_diagonal(r) < 0, -1.0, 1.0)
    return q * signs.to(q.dtype).unsqueeze(-2)


def _with_direction(sketch: Sketch) -> tuple[Tensor, float | Tensor]:
    """A and s = ||G||_F^2; zeros and infinity for a G whose squared norm is zero or overflows.

    s is a number, which the host reads, or for a stack a tensor that broadcasts with A.
    """
    a, s = sketch.statistics["correlation"], sketch.statistics["squared_norm"]
    if s.ndim:
        has_one = has_direction(s, a.dtype)
        # If s overflows, so may A, and infinity times 0 is NaN.
        a = torch.where(per_part(has_one, a), a, 0)
        return a, per_part(torch.where(has_one, s, math.inf), a)
    return (a, float(s)) if has_direction(float(s), a.dtype) else (torch.zeros_like(a), math.inf)


def online_pca_gradient(basis: Tensor, sketch: Sketch, penalty: float = 0.0) -> Tensor:
    """Gradient of the online PCA loss in closed form.

        (2 / s) (P (P^T A) + A (P^T P) - 2 A) + 4 penalty P (P^T P - I),   s = ||G||_F^2

    It equals autograd's gradient of `||P P^T Gn - Gn||_F^2 + penalty ||P^T P - I||_F^2`, without a
    p x p matrix or a second p x q matrix.

    Args:
        basis: P, (p, r), float32 or float64.
        sketch: The sketch of the gradient for this P. If its squared norm is zero or overflows, the
            first term is zero. Reading the norm of one matrix synchronizes with the device if it
            is a GPU tensor.
        penalty: Lambda.

    Returns:
        The gradient, (p, r).
    """
    a, s = _with_direction(sketch)
    scale = 2 / s
    inner = local(product(basis.mT, a)).mul_(scale)
    gram = local(product(basis.mT, basis))
    if penalty:
        _diagonal(inner.add_(gram, alpha=4 * penalty)).sub_(4 * penalty)
    _diagonal(gram).sub_(2)
    if isinstance(scale, Tensor):
        gradient = (basis @ inner).baddbmm_(a, gram.mul_(scale))
    else:
        gradient = (local(basis) @ inner).addmm_(local(a), gram, alpha=scale)
    return parted_like(gradient, basis)


def _diagonal(square: Tensor) -> Tensor:
    return square.diagonal(dim1=-2, dim2=-1)


def svd(every: int) -> BasisRule:
    """Sets P to the leading singular vectors of G at steps 0, `every`, 2 `every`, ... (GaLore).

    Args:
        every: The number of steps between refreshes.

    Returns:
        A `BasisRule`.

    Raises:
        ValueError: The period is below 1.

    References:
        arXiv 2403.03507, algorithm 2.

    Example:
        >>> svd(200).clock
        Clock(refresh_every=200, move_every=None)
    """
    check_period(every)
    needs = Needs((), "at a refresh", _FROM_SVD)
    return BasisRule(
        Clock(every), leading_singular_vectors, needs, two_sided=True, name=f"svd({every})"
    )


def random(every: int) -> BasisRule:
    """Sets P to the singular vectors of a Gaussian matrix at steps 0, `every`, 2 `every`, ...

    The matrix is drawn on the CPU from a generator seeded by the key, so the draws depend neither
    on the device nor on earlier draws, and a resumed run repeats them.

    Args:
        every: The number of steps between draws.

    Returns:
        A `BasisRule`.

    Raises:
        ValueError: The period is below 1.

    Example:
        >>> random(200).name
        'random(200)'
    """
    check_period(every)
    return BasisRule(Clock(every), _drawn, two_sided=True, name=f"random({every})")


def gaussian(every: int) -> BasisRule:
    """Draws the entries of P from N(0, 1 / r) at steps 0, `every`, 2 `every`, ... (APOLLO).

    The columns are not orthonormal; `P P^T` is the identity in expectation, so R has the norms of M
    in expectation. Use it with lifts that read norms, such as `gradient_only`.

    Args:
        every: The number of steps between draws.

    Returns:
        A `BasisRule`.

    Raises:
        ValueError: The period is below 1.

    References:
        arXiv 2412.05270.

    Example:
        >>> gaussian(200).name
        'gaussian(200)'
    """
    check_period(every)
    return BasisRule(Clock(every), _drawn_gaussian, two_sided=True, name=f"gaussian({every})")


def _drawn_gaussian(matrix: Tensor, old: Basis, side: ResolvedSide, key: str, each: Each) -> Basis:
    """A Gaussian matrix of P's shape; see `BasisRule.fresh`."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def draw(old: Tensor) -> Tensor:
        wide = accumulator_dtype(old.dtype)
        normal = torch.randn(old.shape, generator=generator, dtype=wide, device="cpu")
        return (normal / math.sqrt(old.shape[1])).to(old.dtype).to(matrix.device)

    return TwoSided(*map(draw, old)) if isinstance(old, TwoSided) else draw(old)


def _drawn(matrix: Tensor, old: Basis, side: ResolvedSide, key: str, each: Each) -> Basis:
    """The left singular vectors of a Gaussian matrix of P's shape; see `BasisRule.fresh`."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def draw(old: Tensor) -> Tensor:
        wide = accumulator_dtype(old.dtype)
        gaussian = torch.randn(old.shape, generator=generator, dtype=wide, device="cpu")
        return _leading(torch.linalg.svd(gaussian, full_matrices=False)[0], old).to(matrix.device)

    return TwoSided(*map(draw, old)) if isinstance(old, TwoSided) else draw(old)


def each_matrix(function: Callable[..., Any], *arrays: Tensor) -> Any:
    """`each` of `BasisRule.fresh`: applies a function to arrays, gathered if they are sharded."""
    return function(*map(whole, arrays))


def leading_singular_vectors(
    matrix: Tensor, old: Basis, side: ResolvedSide, key: str = "", each: Each = each_matrix
) -> Basis:
    """The leading left ("output") or right ("input") singular vectors of a gradient, or "both".

    It always decomposes the matrix in PyTorch's layout: LAPACK determines the sign of each vector,
    moments kept across a refresh depend on the new signs, and the transposed matrix may give
    others. Returns copies, so that the rest of the decomposition can be freed.

    Args:
        matrix: M, (p, q), finite; a transposed view of the gradient for side "input".
        old: P, (p, r), or `TwoSided`, with the shapes and dtype of the result; r <= min(p, q).
        side: "output", "input" or "both".
        key: Not read; nothing is drawn.
        each: Applies a function to the full matrix.
    """

    def one(matrix: Tensor) -> Basis:
        gradient = to_matrix(matrix, side)
        u, _, vt = torch.linalg.svd(float32_or_more(gradient), full_matrices=False)
        if isinstance(old, TwoSided):
            return TwoSided(_leading(u, old.output), _leading(vt.mT, old.input))
        return _leading(u if side == "output" else vt.mT, old)

    basis: Basis = each(one, matrix)
    return basis


def _leading(vectors: Tensor, old: Tensor) -> Tensor:
    """A copy of the first columns, as many as P has, with P's dtype."""
    columns = vectors[:, : old.shape[1]]
    return columns.to(old.dtype, copy=True, memory_format=torch.contiguous_format)
