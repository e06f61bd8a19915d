"""Lifts: from a direction in the subspace to an update of W.

The plain lift is `P D`. Other lifts change D first, add the part outside the subspace, or apply a
function to the sum. A `Lift` describes its update as data, `Lifted`; the optimizer computes the
product and adds it to W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osd_names import ResolvedSide
from osd_torch.basis_rule import name_of_rule
from osd_torch.numerics import (
    Number,
    check_number,
    random_bits,
    round_stochastically,
)
from osd_torch.sharding import local, placed_like
from osd_torch.sketch import Basis, Needs, Sketch, TwoSided, product


class Seen(NamedTuple):
    """The inputs of a lift other than the direction.

    Attributes:
        basis: P, (p, r).
        sketch: The sketch of the gradient, with the statistics that the lift declares.
        gradient: M, (p, q), if the lift declares that it reads it "always"; otherwise None.
        state: The lift's own state for this matrix, by name.
        side: The side of p: "output", "input" or "both". M is (output, input), and transposed for
            "input".

    Example:
        >>> halved_where_large = Lift(lambda direction, seen: Lifted(
        ...     direction / (1 + (seen.sketch.low_rank.norm() > 1))))
    """

    basis: Basis
    sketch: Sketch
    gradient: Tensor | None
    state: Mapping[str, Tensor]
    side: ResolvedSide = "output"


class Lifted(NamedTuple):
    """An update of W, `W <- W - lr * scale * then(P D + rest)`.

    Attributes:
        low_rank: D, (r, q), or None for no lifted part.
        rest: (p, q), added to P D; None for nothing.
        then: A function of the sum, which may modify its argument. None: the identity.
        scale: A number.
        state: The lift's new state, by name.

    Example:
        >>> import torch
        >>> update = Lifted(torch.ones(2, 3), rest=torch.zeros(4, 3), then=torch.sign, scale=0.5)
        >>> update.low_rank.shape
        torch.Size([2, 3])
    """

    low_rank: Tensor | None
    rest: Tensor | None = None
    then: Callable[[Tensor], Tensor] | None = None
    scale: float = 1.0
    state: Mapping[str, Tensor] = {}

    def times(self, factor: Tensor) -> Lifted:
        """The update of a stack times a number, or one for each matrix, (b, 1, 1).

        A factor of 0 leaves out even an update of NaN.
        """

        def scaled(x: Tensor) -> Tensor:
            return torch.where(factor == 0, 0, x * factor.to(x.dtype))

        if self.rest is None and self.then is None and self.low_rank is not None:
            return self._replace(low_rank=scaled(self.low_rank))
        then = self.then or (lambda x: x)
        return self._replace(then=lambda x: scaled(then(x)))


def no_state(matrix: Tensor, low_rank: Tensor) -> dict[str, Tensor]:
    """The empty state of a stateless lift."""
    return {}


class Lift(NamedTuple):
    """A rule that turns a direction into an update of W.

    Attributes:
        apply: (direction (r, q), Seen) -> Lifted. The direction is the output of the optimizer's
            rule, before the learning rate and Adam's bias correction; it must not be modified.
        needs: The statistics that it reads at every step, and whether it reads the gradient.
        init: (a tensor like M, one like R) -> its state before the first step, by name.
        name: A name for messages and saved states. If not given, the name of `apply`.
        two_sided: Whether it supports a P on both sides.
        linear: Whether its update is linear in the direction, so that the learning rate can be
            applied before or after it. Otherwise the lift does not see the learning rate.
        stacks: Whether `apply` and the function `then` that it returns accept stacks, whose tensors
            have one more axis in front, and treat each matrix by itself. Otherwise matrices are
            stepped one at a time.

    Example:
        >>> import torch, osd_torch
        >>> signs = Lift(lambda direction, seen: Lifted(direction.sign()))
        >>> layer = torch.nn.Linear(8, 6, bias=False)
        >>> optimizer = osd_torch.SubspaceAdamW(layer.parameters(), lr=0.1, rank=2, lift=signs)
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """

    apply: Callable[[Tensor, Seen], Lifted]
    needs: Needs = Needs()
    init: Callable[[Tensor, Tensor], dict[str, Tensor]] = no_state
    name: str = ""
    two_sided: bool = True
    linear: bool = False
    stacks: bool = False


def scaled(factor: float = 1.0) -> Lift:
    """The plain lift, `factor * P D`.

    Args:
        factor: GaLore's alpha.

    Returns:
        A `Lift`.

    Raises:
        ValueError: The factor is not a finite number of at least 0.

    References:
        arXiv 2408.12857, equation 6.

    Example:
        >>> scaled(0.25).name
        'scaled(0.25)'
    """
    check_number("factor", factor)
    apply = functools.partial(_plain, factor)
    return Lift(apply, name=f"scaled({factor})", linear=True, stacks=True)


def _plain(factor: float, direction: Tensor, seen: Seen) -> Lifted:
    return Lifted(direction, scale=factor)


def sign_after_lift() -> Lift:
    """The lift `sign(P D)`: the released Lion takes the sign after the lift. No scale changes it.

    Returns:
        A `Lift`.

    Example:
        >>> import torch, osd_torch
        >>> from osd_torch.rules import Lion
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.OnlineSubspaceDescent(
        ...     layer.parameters(), 1e-4, rule=Lion(sign=False), rank=2, lift=sign_after_lift())
    """
    return Lift(_signed, name="sign_after_lift()", stacks=True)


def _signed(direction: Tensor, seen: Seen) -> Lifted:
    return Lifted(direction, then=Tensor.sign_)


def lift(basis: Basis, direction: Tensor) -> Tensor:
    """P D: (p, r), (r, q) -> (p, q); two-sided: P_out D P_in^T; or of a stack.

    In float32 or float64.
    """
    if isinstance(basis, TwoSided):
        return product(product(basis.output, direction), basis.input.mT)
    if direction.ndim > 2 and not direction.is_contiguous():  # the layout of M, as for R
        return product(direction.mT, basis.mT).mT
    return product(basis, direction)


def add_lifted_(
    weight: Tensor,
    basis: Basis | None,
    lifted: Lifted,
    alpha: float,
    beta: Number,
    rounding_keys: Sequence[str] = (),
) -> None:
    """W <- beta W + alpha * then(P D + rest) in place, rounded once; for a matrix or a stack.

    The plain lift needs no temporary of W's size, except for a weight that is rounded
    stochastically and for a bfloat16 weight on a CPU, where bfloat16 products are slow.
    """
    direction, is_plain = lifted.low_rank, lifted.rest is None and lifted.then is None
    is_narrow = weight.dtype == torch.bfloat16 and not weight.is_cuda
    is_sum = is_plain and not is_narrow and not rounding_keys
    if basis is None or direction is None or not is_sum or isinstance(beta, Tensor):
        add_(weight, lifted_update(basis, lifted), alpha, beta, rounding_keys)
        return
    weight = local(weight)
    add_product_ = weight.addmm_ if weight.ndim == 2 else weight.baddbmm_
    add_product_(*_factors(basis, direction, weight.dtype), beta=beta, alpha=alpha)


def _factors(basis: Basis, direction: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two matrices of a dtype whose product is P D. D is not rounded to the dtype of P."""
    if isinstance(basis, TwoSided):
        left, right = product(basis.output, direction), basis.input.mT
    else:
        left, right = basis, direction
    return local(left).to(dtype), local(right).to(dtype)


def updates_of_stack(basis: Basis | None, lifted: Lifted, dtype: torch.dtype) -> Tensor:
    """then(P D + rest) of a stack (b, p, q), with the products of `add_lifted_` for this dtype."""
    direction, is_plain = lifted.low_rank, lifted.rest is None and lifted.then is None
    if basis is None or direction is None or not is_plain:
        return lifted_update(basis, lifted)
    left, right = _factors(basis, direction, dtype)
    if right.is_contiguous():
        return left @ right
    return (right.mT @ left.mT).mT  # the layout of M


def lifted_update(basis: Basis | None, lifted: Lifted) -> Tensor:
    """then(P D + rest), (p, q)."""
    if lifted.low_rank is None:
        if lifted.rest is None:
            raise ValueError("a lift returned neither a direction nor a rest: expected one of them")
        # `then` may modify its argument, and the rest may be the gradient.
        update = lifted.rest if lifted.then is None else lifted.rest.clone()
    else:
        assert basis is not None
        update = lift(basis, lifted.low_rank)
        if lifted.rest is not None:
            local(update).add_(local(placed_like(lifted.rest, update)))
    return update if lifted.then is None else lifted.then(update)


def add_(
    weight: Tensor,
    direction: Tensor,
    alpha: Number,
    beta: Number,
    rounding_keys: Sequence[str] = (),
) -> None:
    """W <- beta W + alpha D in place, computed in D's dtype and rounded once.

    Args:
        weight: W, or a stack.
        direction: D.
        alpha: Its factor.
        beta: W's factor.
        rounding_keys: Rounds a bfloat16 W stochastically, from float32, with the bits that the key
            identifies, or each matrix of a stack with its own. Empty: to nearest.
    """
    weight, direction = local(weight), local(direction)
    if rounding_keys:
        direction = direction.to(torch.float32)
    result = weight.to(direction.dtype)  # W itself if the dtypes are equal
    if isinstance(beta, Tensor) or beta != 1:
        result.mul_(beta)
    if isinstance(alpha, Tensor):
        result.add_((direction * alpha).to(result.dtype))
    else:
        result.add_(direction, alpha=alpha)
    if rounding_keys:
        parts = result.chunk(len(rounding_keys))
        bits = [random_bits(*pair) for pair in zip(parts, rounding_keys, strict=True)]
        result = round_stochastically(result, bits[0] if len(bits) == 1 else torch.cat(bits))
    if result is not weight:
        weight.copy_(result)


def check_lift_state(lift: Lift, new: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a lift whose new state differs from its initial state in structure."""
    for name, value in new.items():
        if name not in own or value.shape != own[name].shape:
            here = tuple(own[name].shape) if name in own else "absent"
            raise ValueError(
                f"the lift {name_of_rule(lift)} returns state {name!r} of shape "
                f"{tuple(value.shape)}: expected the shape of its init, {here}"
            )
