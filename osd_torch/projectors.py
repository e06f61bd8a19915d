"""The rules that move P: online PCA, SVD, random.

A `Projector` says when P is set anew from a gradient, and how it moves after a step of W. Online
PCA needs three small things of a gradient, its `Sketch`, and no SVD after the first step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from osd_torch.numerics import accumulator_dtype, float32_or_more, has_direction
from osd_torch.rules import Rule, State
from osd_torch.sharding import Reduce, local, matmul, parted_like, squared_norm, whole


class Sketch(NamedTuple):
    """All that a step asks of a gradient M (p, q) with P (p, r).

    Attributes:
        low_rank: R = P^T M, (r, q); two-sided: P_out^T M P_in, (r, r).
        correlation: A = M R^T, (p, r), or None where the projector does not read it.
        squared_norm: s = ||M||_F^2, 0-dimensional, or None likewise. It may lie on the CPU.

    All float32 (float64 for float64 gradients). R of a sum of gradients is the sum of their R's
    while P is fixed; A is exact if every part uses the final R; s of a sum is not to be had from
    the parts' own.
    """

    low_rank: Tensor
    correlation: Tensor | None
    squared_norm: Tensor | None


class TwoSided(NamedTuple):
    """The bases of a matrix that is projected on both sides: (m, r) and (n, r)."""

    output: Tensor
    input: Tensor


Basis = Tensor | TwoSided
FreshBasis = Callable[[Tensor, str, int, torch.dtype, str], Basis]


class MakeSketch(Protocol):
    """How a projector sketches a gradient."""

    def __call__(
        self,
        basis: Basis,
        matrix: Tensor,
        reduce: Reduce | None = None,
        moves: bool = True,
        square: Tensor | None = None,
    ) -> Sketch:
        """P and M -> the sketch of M.

        Args:
            basis: P.
            matrix: M, or this process' part of a mean.
            reduce: The mean over processes, if M is only a part; the sketch is then that of the
                mean, but for its squared norm: see `reduced_sketch`.
            moves: Whether P moves at this step, or else only R is read.
            square: ||M||_F^2, if it is known; not of a part.
        """


class Projector(NamedTuple):
    """A rule for P, as functions.

    Attributes:
        is_due: (step, from 0) -> whether P is set anew from the gradient, before projecting.
        fresh_basis: (gradient (m, n), side, rank, dtype, key) -> P for that side, "output", "input"
            or "both". The key is text that names the draw.
        sketch: (P, M) -> Sketch; see `MakeSketch`.
        init: (P, side) -> the state of P's optimizer.
        move: (P, side, sketch, that state, step, step size) -> None; moves P in place, at the steps
            at which it moves. Without a sketch P stays, and its optimizer sees a zero gradient: P
            is not set yet, or was set at this step.
        two_sided: Whether it serves side "both".
        moves_first: Whether P moves before W's step, at the cost of one more product with the
            gradient.
        every: P moves at steps `every`, 2 `every`, ...
    """

    is_due: Callable[[int], bool]
    fresh_basis: FreshBasis
    sketch: MakeSketch
    init: Callable[[Basis, str], dict[str, Tensor]]
    move: Callable[[Basis, str, Sketch | None, State, int, float], None]
    two_sided: bool = False
    moves_first: bool = False
    every: int = 1

    def moves_at(self, step: int) -> bool:
        """Whether P moves at this step, from 0."""
        return step % self.every == 0 and step > 0


def online_pca(
    optimizer: Rule,
    *,
    penalty: float = 0.0,
    weight_decay: float = 0.0,
    moves_first: bool = False,
    every: int = 1,
) -> Projector:
    """P follows the gradients by one optimizer step on the online PCA loss after each step of W.

    The loss is `||P P^T Gn - Gn||_F^2 + penalty ||P^T P - I||_F^2`, `Gn = G / ||G||_F`
    (arXiv 2408.12857, equation 8); see `online_pca_gradient` for its closed form. At the first step
    P is set from that gradient and not moved; from then on `optimizer` takes one step a time, or
    one every `every`. Where a gradient is zero, or its squared norm overflows, P stays; at the
    first step, it waits for the first gradient that has a direction.

    Args:
        optimizer: The rule of P's step. It counts its own steps, of which step `every` of W, from
            0, is the first.
        penalty: Lambda of the orthogonality penalty (the paper uses 0.1, the release none).
        weight_decay: Decoupled, of P, before the step.
        moves_first: P moves before W's step, and R is taken again with the new P.
        every: P moves at steps `every`, 2 `every`, ... with that step's gradient. At all others P
            and its optimizer's state stay, and neither A nor ||G||_F^2 is computed.

    Raises:
        ValueError: for a negative penalty or weight decay, or a period below 1.
    """
    check_period(every, "update_proj_every")
    for name, value in (("penalty", penalty), ("projector_weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} is {value!r}: expected a number of at least 0")

    def sketch(
        basis: Basis,
        matrix: Tensor,
        reduce: Reduce | None = None,
        moves: bool = True,
        square: Tensor | None = None,
    ) -> Sketch:
        assert not isinstance(basis, TwoSided)
        low_rank = low_rank_gradient(basis, matrix)
        if not moves:
            return Sketch(low_rank if reduce is None else reduce(low_rank), None, None)
        if reduce is not None:
            return reduced_sketch(matrix, low_rank, reduce)
        norm = squared_norm(matrix) if square is None else square
        return Sketch(low_rank, product(matrix, low_rank.mT), norm)

    def init(basis: Basis, side: str) -> dict[str, Tensor]:
        assert not isinstance(basis, TwoSided)
        return optimizer.init(to_matrix(float32_or_more(basis), side))

    def move(
        basis: Basis, side: str, sketch: Sketch | None, state: State, step: int, lr: float
    ) -> None:
        assert not isinstance(basis, TwoSided)
        wide = float32_or_more(basis)
        if sketch is None:
            gradient, moves = torch.zeros_like(wide), False
        else:
            assert sketch.squared_norm is not None
            gradient = online_pca_gradient(wide, sketch, penalty)
            moves = has_direction(float(sketch.squared_norm), gradient.dtype)
        # The release holds the basis of the input side as rows, and 8-bit blocks run along them.
        now = (to_matrix(gradient, side), state, step // every, lr)
        if moves:
            optimizer.step_(to_matrix(basis, side), *now, weight_decay)
        else:
            optimizer.step(*now)  # its moments alone

    return Projector(
        is_due=lambda step: step == 0,
        fresh_basis=leading_singular_vectors,
        sketch=sketch,
        init=init,
        move=move,
        moves_first=moves_first,
        every=every,
    )


def reduced_sketch(matrix: Tensor, low_rank: Tensor, reduce: Reduce) -> Sketch:
    """The sketch of the mean M of the processes' parts M_i, which themselves are not reduced.

    R is the mean of the parts' R_i = P^T M_i, and A the mean of M_i R^T: both exact. ||M||_F^2 is
    not to be had from the parts. If the mean is shorter than its parts by as much outside the
    subspace as inside it, then it is `mean ||M_i||_F^2 * ||R||_F^2 / mean ||R_i||_F^2`.

    Args:
        matrix: M_i, (p, q).
        low_rank: R_i, (r, q); written to.
        reduce: The mean over processes.
    """
    squares = reduce(torch.stack([squared_norm(matrix), squared_norm(low_rank)]))
    low_rank = reduce(low_rank)
    ratio = squared_norm(low_rank) / squares[1]
    limits = torch.finfo(squares.dtype)
    is_normal = (limits.tiny <= squares[1]) & (squares[1] <= limits.max)
    norm = squares[0] * torch.where(is_normal, ratio, 1)
    return Sketch(low_rank, reduce(product(matrix, low_rank.mT)), norm)


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
    a, s = sketch.correlation, sketch.squared_norm
    assert a is not None and s is not None
    # Where s overflows so may A, and infinity times 0 is no number.
    a, scale = (a, 2 / float(s)) if has_direction(float(s), a.dtype) else (torch.zeros_like(a), 0.0)
    inner = local(product(basis.mT, a)).mul_(scale)
    gram = local(product(basis.mT, basis))
    if penalty:
        inner.add_(gram, alpha=4 * penalty).diagonal().sub_(4 * penalty)
    gram.diagonal().sub_(2)
    gradient = (local(basis) @ inner).addmm_(local(a), gram, alpha=scale)
    return parted_like(gradient, basis)


def svd(every: int) -> Projector:
    """P is the gradient's leading singular vectors at steps 0, `every`, 2 `every`, ... (GaLore).

    Raises:
        ValueError: for a period below 1.
    """
    return _periodic(every, leading_singular_vectors)


def random(every: int) -> Projector:
    """P is the singular vectors of a Gaussian matrix, new at steps 0, `every`, 2 `every`, ...

    Drawn on the CPU from a generator seeded by the key, so that the draws do not depend on the
    device or on what was drawn before, and a resumed run repeats them.

    Raises:
        ValueError: for a period below 1.
    """

    def fresh_basis(gradient: Tensor, side: str, rank: int, dtype: torch.dtype, key: str) -> Basis:
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))

        def draw(length: int) -> Tensor:
            wide = accumulator_dtype(dtype)
            gaussian = torch.randn(length, rank, generator=generator, dtype=wide, device="cpu")
            basis = leading_singular_vectors(gaussian, "output", rank, dtype)
            assert isinstance(basis, Tensor)
            return basis.to(gradient.device)

        m, n = gradient.shape
        if side == "both":
            return TwoSided(draw(m), draw(n))
        return draw(m if side == "output" else n)

    return _periodic(every, fresh_basis)


def _periodic(every: int, fresh_basis: FreshBasis) -> Projector:
    check_period(every)

    def sketch(
        basis: Basis,
        matrix: Tensor,
        reduce: Reduce | None = None,
        moves: bool = True,
        square: Tensor | None = None,
    ) -> Sketch:
        low_rank = low_rank_gradient(basis, matrix)
        return Sketch(low_rank if reduce is None else reduce(low_rank), None, None)

    return Projector(
        is_due=lambda step: step % every == 0,
        fresh_basis=fresh_basis,
        sketch=sketch,
        init=lambda basis, side: {},
        move=lambda basis, side, sketch, state, step, lr: None,
        two_sided=True,
    )


def check_period(every: int, name: str = "update_proj_gap") -> None:
    """Raises ValueError unless `every` is a whole number of steps, at least 1."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{name} is {every!r}: expected a whole number of at least 1")


def leading_singular_vectors(
    gradient: Tensor, side: str, rank: int, dtype: torch.dtype, key: str = ""
) -> Basis:
    """The first `rank` left ("output") or right ("input") singular vectors of a matrix, or "both".

    Always of the matrix as PyTorch lays it out: LAPACK fixes each vector's sign, the moments kept
    across a refresh meet the new signs, and those of the transposed matrix may be others. Copies,
    so that the rest of the decomposition can be freed.

    Args:
        gradient: (m, n), finite; gathered whole if it is sharded.
        side: "output", "input" or "both".
        rank: At most min(m, n).
        dtype: Of the result.
        key: Not read; nothing is drawn.

    Returns:
        (m, rank), (n, rank) or `TwoSided` of both.
    """
    u, _, vt = torch.linalg.svd(float32_or_more(whole(gradient)), full_matrices=False)

    def leading(vectors: Tensor) -> Tensor:
        return vectors[:, :rank].to(dtype, copy=True, memory_format=torch.contiguous_format)

    if side == "both":
        return TwoSided(leading(u), leading(vt.mT))
    return leading(u if side == "output" else vt.mT)


def to_matrix(tensor: Tensor, side: str) -> Tensor:
    """A weight or gradient (output, input) as a view M (p, q), the projected axis first, or back.

    Args:
        tensor: A matrix.
        side: "output", "input" or "both".
    """
    return tensor.mT if side == "input" else tensor


def low_rank_gradient(basis: Basis, matrix: Tensor) -> Tensor:
    """R: (p, r), (p, q) -> (r, q); two-sided: (r, r), in float32 or float64.

    R lies in memory as M does, in the order of the moments that it meets.
    """
    if isinstance(basis, TwoSided):
        return product(product(basis.output.mT, matrix), basis.input)
    if not matrix.is_contiguous() and matrix.mT.is_contiguous():
        return product(matrix.mT, basis).mT
    return product(basis.mT, matrix)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product of a and b.

    Both inputs are read in the narrower of their dtypes and the products accumulated, and
    returned, in float32 (float64 for float64). Sharded inputs: see `sharding.matmul`.
    """
    return matmul(a, b, _plain_product)


def _plain_product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == b.dtype == accumulator_dtype(a.dtype):
        return a @ b
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    wide, a, b = accumulator_dtype(narrow), a.to(narrow), b.to(narrow)
    if a.is_cuda and narrow != wide:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)
