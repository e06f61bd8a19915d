"""The basis rules: online PCA, SVD, random.

A `BasisRule` says, by its clock, at which steps P is set from a gradient and at which it moves; how
it is set; and the gradient that moves it. Online PCA reads two statistics of a gradient beside R,
and no SVD after the first step.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from osd_names import MOVE_PROJECTOR, check_choice
from osd_torch.basis_rule import BasisRule, Clock, Each, Order, StepSize
from osd_torch.layout import to_matrix
from osd_torch.numerics import (
    accumulator_dtype,
    check_number,
    check_period,
    float32_or_more,
    has_direction,
)
from osd_torch.rules import SGD, Adam, Rule
from osd_torch.sharding import local, parted_like, whole
from osd_torch.sketch import (
    CORRELATION,
    SQUARED_NORM,
    Basis,
    Needs,
    Sketch,
    TwoSided,
    product,
)

FROM_SVD = "P is set from the gradient's singular vectors"
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
    """P follows the gradients by one optimizer step on the online PCA loss after each step of W.

    The loss is `||P P^T Gn - Gn||_F^2 + penalty ||P^T P - I||_F^2`, `Gn = G / ||G||_F`
    (arXiv 2408.12857, equation 8); see `online_pca_gradient` for its closed form. At the first step
    P is set from that gradient and not moved; from then on `optimizer` takes one step a time, or
    one every `every`. Where a gradient is zero, or its squared norm overflows, P stays; at the
    first step, it waits for the first gradient that has a direction.

    Args:
        optimizer: The rule of P's step. Its first step is the first after P was set.
        step_size: P's: a number, or a function of lr, such as `lambda lr: 5 * lr` (the paper's).
        penalty: Lambda of the orthogonality penalty (the paper uses 0.1, the release none).
        weight_decay: Decoupled, of P, before the step.
        order: "before": P moves before W's step, and R is taken again with the new P.
        every: P moves at steps `every`, 2 `every`, ... with that step's gradient. At all others P
            and its optimizer's state stay, and neither A nor ||G||_F^2 is computed.

    Raises:
        ValueError: for a negative penalty, weight decay or step size, an unknown order, or a period
            below 1.

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
    needs = Needs((CORRELATION, SQUARED_NORM), "at a refresh", FROM_SVD)
    if order == "before":
        needs = needs._replace(
            gradient="always",
            reason="move_projector is 'before', which takes R again from the gradient after P has "
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
    )


def oja(
    optimizer: Rule = _SGD, *, step_size: StepSize = 1.0, order: Order = "after", every: int = 1
) -> BasisRule:
    """Oja's rule: P follows the gradients by `P <- QR(P + eta A / ||G||_F^2)`, `A = G G^T P`.

    The columns stay orthonormal, in their order and with their signs. With a large step size a step
    is one of subspace iteration. A QR of (p, r) a move, and two of the five products that
    `online_pca` takes for P.

    Source: Oja (1992), Principal components, minor components, and linear neural networks.

    Args:
        optimizer: The rule of P's step, given `-A / ||G||_F^2`.
        step_size: eta: a number, or a function of lr.
        order: See `online_pca`.
        every: See `online_pca`.

    Raises:
        ValueError: as `online_pca`.

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
    """`-A / s`, (p, r); zero where the squared norm s is zero or overflows."""
    a, s = sketch.statistics["correlation"], float(sketch.statistics["squared_norm"])
    return a / -s if has_direction(s, a.dtype) else torch.zeros_like(a)


def orthonormalized(basis: Tensor) -> Tensor:
    """The Q of P's QR decomposition, (p, r), with the signs that make R's diagonal positive."""
    q, r = torch.linalg.qr(basis)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)


def online_pca_gradient(basis: Tensor, sketch: Sketch, penalty: float = 0.0) -> Tensor:
    """Gradient of the online PCA loss in closed form.

    `(2 / s) (P (P^T A) + A (P^T P) - 2 A) + 4 penalty P (P^T P - I)`, which is what autograd gives
    for `||P P^T Gn - Gn||_F^2 + penalty ||P^T P - I||_F^2` without a p x p or second p x q matrix.

    Args:
        basis: P, (p, r), float32 or float64.
        sketch: Of the gradient by this P. Where its squared norm is zero or overflows, the first
            term is zero. Reading that, if it is a tensor on a GPU, is a device synchronisation.
        penalty: Lambda.

    Returns:
        (p, r).
    """
    a, s = sketch.statistics["correlation"], sketch.statistics["squared_norm"]
    # Where s overflows so may A, and infinity times 0 is no number.
    a, scale = (a, 2 / float(s)) if has_direction(float(s), a.dtype) else (torch.zeros_like(a), 0.0)
    inner = local(product(basis.mT, a)).mul_(scale)
    gram = local(product(basis.mT, basis))
    if penalty:
        inner.add_(gram, alpha=4 * penalty).diagonal().sub_(4 * penalty)
    gram.diagonal().sub_(2)
    gradient = (local(basis) @ inner).addmm_(local(a), gram, alpha=scale)
    return parted_like(gradient, basis)


def svd(every: int) -> BasisRule:
    """P is the gradient's leading singular vectors at steps 0, `every`, 2 `every`, ... (GaLore).

    Source: arXiv 2403.03507, algorithm 2.

    Args:
        every: Steps between two refreshes.

    Raises:
        ValueError: for a period below 1.

    Example:
        >>> svd(200).clock
        Clock(refresh_every=200, move_every=None)
    """
    check_period(every)
    needs = Needs((), "at a refresh", FROM_SVD)
    return BasisRule(
        Clock(every), leading_singular_vectors, needs, two_sided=True, name=f"svd({every})"
    )


def random(every: int) -> BasisRule:
    """P is the singular vectors of a Gaussian matrix, new at steps 0, `every`, 2 `every`, ...

    Drawn on the CPU from a generator seeded by the key, so that the draws do not depend on the
    device or on what was drawn before, and a resumed run repeats them.

    Args:
        every: Steps between two draws.

    Raises:
        ValueError: for a period below 1.

    Example:
        >>> random(200).name
        'random(200)'
    """
    check_period(every)
    return BasisRule(Clock(every), drawn, two_sided=True, name=f"random({every})")


def gaussian(every: int) -> BasisRule:
    """P's entries are drawn from N(0, 1 / r), new at steps 0, `every`, 2 `every`, ... (APOLLO).

    Its columns are not orthonormal; `P P^T` is the identity on average, so that R has the norms of
    M on average. For lifts that read norms, such as `gradient_only`.

    Source: arXiv 2412.05270.

    Args:
        every: Steps between two draws.

    Raises:
        ValueError: for a period below 1.

    Example:
        >>> gaussian(200).name
        'gaussian(200)'
    """
    check_period(every)
    return BasisRule(Clock(every), drawn_gaussian, two_sided=True, name=f"gaussian({every})")


def drawn_gaussian(matrix: Tensor, old: Basis, side: str, key: str, each: Each) -> Basis:
    """A Gaussian matrix of P's shape; see `BasisRule.fresh`."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def draw(old: Tensor) -> Tensor:
        wide = accumulator_dtype(old.dtype)
        normal = torch.randn(old.shape, generator=generator, dtype=wide, device="cpu")
        return (normal / math.sqrt(old.shape[1])).to(old.dtype).to(matrix.device)

    return TwoSided(*map(draw, old)) if isinstance(old, TwoSided) else draw(old)


def drawn(matrix: Tensor, old: Basis, side: str, key: str, each: Each) -> Basis:
    """The left singular vectors of a Gaussian matrix of P's shape; see `BasisRule.fresh`."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def draw(old: Tensor) -> Tensor:
        wide = accumulator_dtype(old.dtype)
        gaussian = torch.randn(old.shape, generator=generator, dtype=wide, device="cpu")
        return _leading(torch.linalg.svd(gaussian, full_matrices=False)[0], old).to(matrix.device)

    return TwoSided(*map(draw, old)) if isinstance(old, TwoSided) else draw(old)


def on_whole_matrix(function: Callable[..., Any], *arrays: Tensor) -> Any:
    """`each` of `BasisRule.fresh`: a function of arrays, gathered where they are sharded."""
    return function(*map(whole, arrays))


def leading_singular_vectors(
    matrix: Tensor, old: Basis, side: str, key: str = "", each: Each = on_whole_matrix
) -> Basis:
    """The leading left ("output") or right ("input") singular vectors of a gradient, or "both".

    Always of the matrix as PyTorch lays it out: LAPACK fixes each vector's sign, the moments kept
    across a refresh meet the new signs, and those of the transposed matrix may be others. Copies,
    so that the rest of the decomposition can be freed.

    Args:
        matrix: M, (p, q), finite; a transposed view of the gradient where the side is "input".
        old: P, (p, r), or `TwoSided`, with the shapes and dtype of the result; r <= min(p, q).
        side: "output", "input" or "both".
        key: Not read; nothing is drawn.
        each: Calls a function of the whole matrix.
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
    """A copy of the first columns, as many as P has, in its dtype."""
    columns = vectors[:, : old.shape[1]]
    return columns.to(old.dtype, copy=True, memory_format=torch.contiguous_format)
