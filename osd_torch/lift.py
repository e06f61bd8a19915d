"""From a direction in the subspace to an update of W: the lift, as an object.

The plain lift is `P D`. Others change D before it, add a part that P does not reach, or take a
function of the sum. A `Lift` describes its update as data, `Lifted`; the optimizer computes the
product and adds it to W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from osd_torch.basis_rule import name_of_rule
from osd_torch.numerics import (
    check_number,
    random_bits,
    round_stochastically,
)
from osd_torch.sharding import (
    local,
    placed_like,
)
from osd_torch.sketch import (
    Basis,
    Needs,
    Sketch,
    TwoSided,
    product,
)


class Seen(NamedTuple):
    """What a lift may read, beside the direction.

    Attributes:
        basis: P.
        sketch: Of the gradient, with the statistics that the lift needs.
        gradient: M, (p, q), where the lift needs it "always"; else None.
        state: The lift's own state of this matrix, by name.
        side: That P acts on: "output", "input" or "both". M is (output, input), transposed where
            it is "input".

    Example:
        >>> halved_where_large = Lift(lambda direction, seen: Lifted(
        ...     direction / (1 + (seen.sketch.low_rank.norm() > 1))))
    """

    basis: Basis
    sketch: Sketch
    gradient: Tensor | None
    state: Mapping[str, Tensor]
    side: str = "output"


class Lifted(NamedTuple):
    """An update of W, `W <- W - lr * scale * then(P D + rest)`.

    Attributes:
        low_rank: D, (r, q), or None: nothing is lifted.
        rest: (p, q), added to P D; None: nothing.
        then: Of the sum; it may write into its argument. None: the sum itself.
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


def no_state(matrix: Tensor, low_rank: Tensor) -> dict[str, Tensor]:
    """The state of a lift that has none."""
    return {}


class Lift(NamedTuple):
    """A rule of the lift.

    Attributes:
        apply: (direction (r, q), Seen) -> Lifted. The direction is what the optimizer's rule
            returns, before the learning rate and Adam's bias correction; not to be written to.
        needs: The statistics that it reads at every step, and whether it reads the gradient.
        init: (a tensor like M, one like R) -> its state before the first step, by name.
        name: For messages, and for a saved state to say what it was trained with. None given: that
            of `apply`.
        two_sided: Whether it serves P on both sides.
        linear: Whether its update is linear in the direction, so that it makes no difference on
            which side of it the learning rate is applied. Else a lift sees no learning rate.

    Example:
        >>> import torch
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


def scaled(factor: float = 1.0) -> Lift:
    """The plain lift, `factor * P D` (arXiv 2408.12857, equation 6; GaLore's alpha).

    Raises:
        ValueError: for a factor that is no finite number of at least 0.

    Example:
        >>> scaled(0.25).name
        'scaled(0.25)'
    """
    check_number("factor", factor)
    return Lift(functools.partial(_plain, factor), name=f"scaled({factor})", linear=True)


def _plain(factor: float, direction: Tensor, seen: Seen) -> Lifted:
    return Lifted(direction, scale=factor)


def sign_after_lift() -> Lift:
    """`sign(P D)`: Lion as released takes its sign after the lift. No scale changes it.

    Example:
        >>> import torch, osd_torch
        >>> from osd_torch.rules import Lion
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.OnlineSubspaceDescent(
        ...     layer.parameters(), 1e-4, rule=Lion(sign=False), rank=2, lift=sign_after_lift())
    """
    return Lift(_signed, name="sign_after_lift()")


def _signed(direction: Tensor, seen: Seen) -> Lifted:
    return Lifted(direction, then=Tensor.sign_)


def lift(basis: Basis, direction: Tensor) -> Tensor:
    """P D: (p, r), (r, q) -> (p, q); two-sided: P_out D P_in^T, in float32 or float64."""
    if isinstance(basis, TwoSided):
        return product(product(basis.output, direction), basis.input.mT)
    return product(basis, direction)


def add_lifted_(
    weight: Tensor,
    basis: Basis,
    lifted: Lifted,
    alpha: float,
    beta: float,
    rounding_key: str | None = None,
) -> None:
    """W <- beta W + alpha * then(P D + rest) in place, rounded once.

    The plain lift takes no temporary of W's size. The exceptions are a weight that is rounded
    stochastically, and one in bfloat16 on a CPU, whose products in bfloat16 are slow.
    """
    direction, is_plain = lifted.low_rank, lifted.rest is None and lifted.then is None
    is_narrow = weight.dtype == torch.bfloat16 and not weight.is_cuda
    if direction is None or not is_plain or is_narrow or rounding_key is not None:
        add_(weight, update_of(basis, lifted), alpha, beta, rounding_key)
        return
    if isinstance(basis, TwoSided):
        left, right = product(basis.output, direction), basis.input.mT
    else:
        left, right = basis, direction
    weight, left, right = local(weight), local(left), local(right)
    weight.addmm_(left.to(weight.dtype), right.to(weight.dtype), beta=beta, alpha=alpha)


def update_of(basis: Basis, lifted: Lifted) -> Tensor:
    """then(P D + rest), (p, q)."""
    if lifted.low_rank is None:
        if lifted.rest is None:
            raise ValueError("a lift returned neither a direction nor a rest: expected one of them")
        # `then` may write into its argument, and the rest may be the gradient.
        update = lifted.rest if lifted.then is None else lifted.rest.clone()
    else:
        update = lift(basis, lifted.low_rank)
        if lifted.rest is not None:
            local(update).add_(local(placed_like(lifted.rest, update)))
    return update if lifted.then is None else lifted.then(update)


def add_(
    weight: Tensor, direction: Tensor, alpha: float, beta: float, rounding_key: str | None = None
) -> None:
    """W <- beta W + alpha D in place, computed in D's dtype and rounded once.

    Args:
        weight: W.
        direction: D.
        alpha: Its factor.
        beta: W's factor.
        rounding_key: Rounds a W in bfloat16 stochastically, from float32, by the bits that this
            names. None: to nearest.
    """
    weight, direction = local(weight), local(direction)
    if rounding_key is not None:
        direction = direction.to(torch.float32)
    result = weight.to(direction.dtype)  # W itself where the dtypes agree
    if beta != 1:
        result.mul_(beta)
    result.add_(direction, alpha=alpha)
    if rounding_key is not None:
        result = round_stochastically(result, random_bits(result, rounding_key))
    if result is not weight:
        weight.copy_(result)


def check_lift_state(lift: Lift, new: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a lift whose new state is not of the names and shapes of its first."""
    for name, value in new.items():
        if name not in own or value.shape != own[name].shape:
            here = tuple(own[name].shape) if name in own else "absent"
            raise ValueError(
                f"the lift {name_of_rule(lift)} returns state {name!r} of shape "
                f"{tuple(value.shape)}: expected what its init makes, where it is {here}"
            )
