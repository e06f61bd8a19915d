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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from osd_names import MOVE_PROJECTOR, check_choice
from osd_torch.numerics import accumulator_dtype, check_number, float32_or_more, has_direction
from osd_torch.rules import SGD, Adam, Rule, State
from osd_torch.sharding import distributed_as, local, parted_like, squared_norm, whole
from osd_torch.sketch import (
    CORRELATION,
    SQUARED_NORM,
    Basis,
    Needs,
    Sketch,
    TwoSided,
    product,
)

NOTHING, REFRESH, MOVE = 0, 1, 2  # events of a clock
FROM_SVD = "svd sets P from the gradient's singular vectors"
Order = Literal["after", "before"]
Each = Callable[..., Any]  # (function, *arrays) -> the result of the function
FreshBasis = Callable[[Tensor, Basis, str, str, Each], Basis]
StepSize = float | Callable[[float], float]
_ADAM, _SGD = Adam(), SGD()


class Clock(NamedTuple):
    """When P is set from a gradient, and when it moves.

    Attributes:
        refresh_every: P is set at steps 0, `refresh_every`, 2 `refresh_every`, ...; None: at step 0
            only.
        move_every: P moves at steps `move_every`, 2 `move_every`, ..., unless a refresh is due;
            None: never.

    Example:
        >>> clock = Clock(refresh_every=4, move_every=2)
        >>> [clock.event(step) for step in range(5)] == [REFRESH, NOTHING, MOVE, NOTHING, REFRESH]
        True
    """

    refresh_every: int | None = None
    move_every: int | None = None

    def event(self, step: int) -> int:
        """Returns `NOTHING`, `REFRESH` or `MOVE` for a step, from 0."""
        if step == 0 or (self.refresh_every and step % self.refresh_every == 0):
            return REFRESH
        return MOVE if self.move_every and step % self.move_every == 0 else NOTHING


class BasisRule(NamedTuple):
    """A rule for P.

    Attributes:
        clock: When P is set, and when it moves. A matrix whose gradient is zero when P is due waits
            for its next nonzero gradient, and P does not move at that step.
        fresh: (M (p, q), the old P, side, key, each) -> P, with the shapes and dtype of the old
            one. The side is "input", "output" or "both" (M is then (output, input) and P
            `TwoSided`); the key is text that identifies the draw. `each(function, *arrays)` applies
            a function to one matrix's arrays, which it gathers if they are sharded.
        needs: What the rule reads in addition to R: the statistics of the steps at which P moves,
            for `gradient`.
        gradient: (P (p, r), float32 or float64; Sketch) -> the gradient of P's loss, (p, r); None:
            P does not move.
        optimizer: The rule of P's step.
        weight_decay: Decoupled weight decay of P, before the step.
        two_sided: Whether the rule supports side "both".
        order: Whether P moves "after" W's step, or "before" it, in which case R is recomputed with
            the new P.
        step_size: Step size of P: a number, or a function of lr.
        name: A name for messages and saved states. If not given, the name of `fresh`.
        retract: (P (p, r), float32 or float64, not sharded) -> P after a step of its optimizer,
            such as `orthonormalized`. None: no retraction.

    Example:
        >>> import torch, osd_torch
        >>> corner = BasisRule(
        ...     Clock(refresh_every=100),
        ...     lambda matrix, old, side, key, each: torch.eye(*old.shape, dtype=old.dtype))
        >>> layer = torch.nn.Linear(8, 6, bias=False)
        >>> optimizer = osd_torch.SubspaceAdamW(layer.parameters(), lr=0.1, rank=2, basis=corner)
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> (layer.weight != 0).sum().item() > 0
        True
    """

    clock: Clock
    fresh: FreshBasis
    needs: Needs = Needs()
    gradient: Callable[[Tensor, Sketch], Tensor] | None = None
    optimizer: Rule | None = None
    weight_decay: float = 0.0
    two_sided: bool = False
    order: Order = "after"
    step_size: StepSize = 0.005
    name: str = ""
    # Newer fields come last: a pickle stores the fields of a tuple by position.
    retract: Callable[[Tensor], Tensor] | None = None

    def init(self, basis: Basis, side: str) -> dict[str, Tensor]:
        """The state of P's optimizer before its first step."""
        if self.optimizer is None:
            return {}
        assert isinstance(basis, Tensor)
        return self.optimizer.init(to_matrix(float32_or_more(basis), side))

    def move_(
        self, basis: Basis, side: str, sketch: Sketch, state: State, t: int, lr: float
    ) -> bool:
        """Moves P in place, unless the gradient is zero; returns whether it did.

        Args:
            basis: P, (p, r).
            side: The side of p.
            sketch: The sketch of the gradient for this P, with the statistics that the rule needs.
            state: State of P's optimizer, updated in place, also if P stays unchanged.
            t: The number of P's step, from 1.
            lr: P's step size.
        """
        assert isinstance(basis, Tensor) and self.gradient is not None
        assert self.optimizer is not None
        gradient = self.gradient(float32_or_more(basis), sketch)
        # The release stores the basis of the input side as rows, and 8-bit blocks run along them.
        now = (to_matrix(gradient, side), state, t, lr)
        square = sketch.statistics.get("squared_norm")
        square = squared_norm(sketch.low_rank) if square is None else square
        moves = has_direction(float(square), gradient.dtype)
        if moves:
            self.optimizer.step_(to_matrix(basis, side), *now, self.weight_decay)
            if self.retract is not None:
                moved = self.retract(float32_or_more(whole(basis))).to(basis.dtype)
                local(basis).copy_(local(distributed_as(moved, basis)))
        else:
            self.optimizer.step(*now)  # updates only its moments
        return moves


def name_of_rule(rule: Any) -> str:
    """The name of a rule object, the same in every process: its own, or that of its code."""
    if getattr(rule, "name", None):
        return str(rule.name)
    code = getattr(rule, "apply", None) or getattr(rule, "fresh", None)
    if code is not None:
        code = getattr(code, "func", code)
        return f"{code.__module__}.{code.__qualname__}"
    text = repr(rule)
    return type(rule).__qualname__ if " at 0x" in text else text


def check_rule(rule: BasisRule) -> None:
    """Raises ValueError for a rule with contradictory attributes."""
    name = name_of_rule(rule)
    for every in rule.clock:
        if every is not None:
            check_period(every, f"the period of {name}")
    check_choice("order", rule.order, MOVE_PROJECTOR)
    moves = (rule.clock.move_every, rule.gradient, rule.optimizer)
    if any(part is None for part in moves) != all(part is None for part in moves):
        words = ["None" if part is None else "given" for part in moves[1:]]
        raise ValueError(
            f"{name} has clock.move_every={rule.clock.move_every!r}, a gradient that is "
            f"{words[0]} and an optimizer that is {words[1]}: a rule that moves P has all three, "
            "one that does not has none"
        )
    if rule.order == "before" and rule.needs.gradient != "always":
        raise ValueError(
            f"{name} has order='before', which recomputes R from the gradient after P has moved: "
            "expected needs.gradient='always', with this as its reason"
        )


def check_fresh(new: Basis, old: Basis, name: str) -> None:
    """Raises ValueError unless a newly set P has the shapes and dtype of the old one."""
    both = [(x,) if isinstance(x, Tensor) else tuple(x) for x in (new, old)]
    kinds = [[(tuple(x.shape), x.dtype) for x in each] for each in both]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the rule's P of parameter '{name}' is {kinds[0]}: expected {kinds[1]}, like the old P"
        )


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
    needs = Needs((CORRELATION, SQUARED_NORM), "at a refresh", FROM_SVD)
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
    a, s = sketch.statistics["correlation"], float(sketch.statistics["squared_norm"])
    return a / -s if has_direction(s, a.dtype) else torch.zeros_like(a)


def orthonormalized(basis: Tensor) -> Tensor:
    """The Q of P's QR decomposition, (p, r), with signs such that R's diagonal is positive."""
    q, r = torch.linalg.qr(basis)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)


def online_pca_gradient(basis: Tensor, sketch: Sketch, penalty: float = 0.0) -> Tensor:
    """Gradient of the online PCA loss in closed form.

        (2 / s) (P (P^T A) + A (P^T P) - 2 A) + 4 penalty P (P^T P - I),   s = ||G||_F^2

    It equals autograd's gradient of `||P P^T Gn - Gn||_F^2 + penalty ||P^T P - I||_F^2`, without a
    p x p matrix or a second p x q matrix.

    Args:
        basis: P, (p, r), float32 or float64.
        sketch: The sketch of the gradient for this P. If its squared norm is zero or overflows, the
            first term is zero. Reading the norm synchronizes with the device if it is a GPU tensor.
        penalty: Lambda.

    Returns:
        The gradient, (p, r).
    """
    a, s = sketch.statistics["correlation"], sketch.statistics["squared_norm"]
    # If s overflows, so may A, and infinity times 0 is NaN.
    a, scale = (a, 2 / float(s)) if has_direction(float(s), a.dtype) else (torch.zeros_like(a), 0.0)
    inner = local(product(basis.mT, a)).mul_(scale)
    gram = local(product(basis.mT, basis))
    if penalty:
        inner.add_(gram, alpha=4 * penalty).diagonal().sub_(4 * penalty)
    gram.diagonal().sub_(2)
    gradient = (local(basis) @ inner).addmm_(local(a), gram, alpha=scale)
    return parted_like(gradient, basis)


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
    needs = Needs((), "at a refresh", FROM_SVD)
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
    return BasisRule(Clock(every), drawn, two_sided=True, name=f"random({every})")


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


def check_period(every: int, name: str = "update_proj_gap") -> None:
    """Raises ValueError unless `every` is a whole number of at least 1."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{name} is {every!r}: expected a whole number of at least 1")


def on_whole_matrix(function: Callable[..., Any], *arrays: Tensor) -> Any:
    """`each` of `BasisRule.fresh`: applies a function to arrays, gathered if they are sharded."""
    return function(*map(whole, arrays))


def leading_singular_vectors(
    matrix: Tensor, old: Basis, side: str, key: str = "", each: Each = on_whole_matrix
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


def to_matrix(tensor: Tensor, side: str) -> Tensor:
    """Views a weight or gradient (output, input) as M (p, q), the projected axis first; or back.

    Args:
        tensor: A matrix.
        side: "output", "input" or "both".
    """
    return tensor.mT if side == "input" else tensor
