"""Moments of R carried over when P changes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from osd_names import Side
from osd_torch.numerics import Number, per_part
from osd_torch.sharding import local
from osd_torch.sketch import Basis, TwoSided, product


class Change(NamedTuple):
    """A change of P: Q = P_new^T P_old, (r, r), for each projected side; otherwise None."""

    output: Tensor | None
    input: Tensor | None

    def of(self, moment: Tensor) -> Tensor:
        """Transforms a moment of R, laid out as (output, input), to the new P: Q m."""
        own = local(moment)
        if self.output is not None:
            own = local(self.output).to(own.dtype) @ own
        if self.input is not None:
            own = own @ local(self.input).to(own.dtype).mT
        return own

    def squared(self) -> Change:
        """The elementwise square of Q."""
        return Change(*(None if side is None else side.square() for side in self))


def bias_corrections(
    betas: tuple[float, float], t: int | Tensor, moment: Tensor
) -> tuple[Number, Number]:
    """`1 - beta ** t` for both betas: numbers, or for a stack tensors that broadcast with it."""
    if isinstance(t, Tensor):  # in float64, as on the host: in float32, 1 - 0.999 has 4 digits
        of_parts = [per_part(1 - beta**t, moment).to(moment.dtype) for beta in betas]
        return of_parts[0], of_parts[1]
    return 1 - betas[0] ** t, 1 - betas[1] ** t


def second_moment_after(
    first: Tensor, second: Tensor, change: Change, betas: tuple[float, float], t: int | Tensor
) -> Tensor:
    """Adam's second moment in the new basis, estimated as in LDAdam (arXiv 2410.16103).

    `v <- c2 |Q^2 (v / c2 - (m / c1)^2) + (Q m / c1)^2|`, where Q^2 holds the squared entries of Q,
    and c1, c2 are the bias corrections after t steps: variances are transformed as for uncorrelated
    entries, means exactly.

    Args:
        first: m before the change, (r, q) or its transpose.
        second: v before the change.
        change: The change of P.
        betas: Decay of m and of v.
        t: The number of steps taken; of a stack on the device, one for each matrix.
    """
    c1, c2 = bias_corrections(betas, t, first)
    mean = local(first) / c1
    variance = change.squared().of(local(second) / c2 - mean.square())
    return variance.add_(change.of(mean).square()).abs_().mul_(c2)


def change_of(old: Basis, new: Basis, side: Side) -> Change:
    """P_new^T P_old of each side of a matrix (output, input) that P projects."""
    if isinstance(old, TwoSided) and isinstance(new, TwoSided):
        return Change(product(new.output.mT, old.output), product(new.input.mT, old.input))
    assert isinstance(old, Tensor) and isinstance(new, Tensor)
    change = product(new.mT, old)
    return Change(change, None) if side == "output" else Change(None, change)
