"""A step of a bucket: of W and P from a sketch, or at full rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from osd_names import ResolvedSide
from osd_torch.basis_rule import BasisRule
from osd_torch.basis_step import move_basis_, moves, moves_each
from osd_torch.buckets import Bucket
from osd_torch.layout import to_matrix
from osd_torch.lift import (
    Lift,
    Lifted,
    Seen,
    add_lifted_,
    check_lift_state,
    scaled,
    updates_of_stack,
)
from osd_torch.numerics import Number, accumulator_dtype, select_
from osd_torch.rules import Rule
from osd_torch.sharding import Reduce, local
from osd_torch.sketch import Basis, Sketch, make_sketch, merged
from osd_torch.state import LIFT_PREFIX, basis_of, moments_of, of_prefix
from osd_torch.transport import change_of

_PLAIN = scaled()


class Method(NamedTuple):
    """How a bucket is stepped: the rules of its group, and the current rates.

    Attributes:
        rule: Turns R, or the gradient at full rank, into a direction.
        coefficients: rate -> (alpha, beta) of `W <- beta W + alpha D`.
        rounding_keys: Of the weights, for stochastic rounding; empty: to nearest.
        lr: Learning rate.
        side: The side that P projects.
        lift: Turns a direction into an update of W.
        basis_rule: The rule of P; None at full rank.
        projector_lr: P's step size.
        transports: Whether the moments of R are carried over when P changes.
    """

    rule: Rule
    coefficients: Callable[[Number], tuple[Number, Number]]
    rounding_keys: tuple[str, ...]
    lr: Number = 0.0
    side: ResolvedSide = "output"
    lift: Lift = _PLAIN
    basis_rule: BasisRule | None = None
    projector_lr: Number = 0.0
    transports: bool = False

    @property
    def options(self) -> tuple[object, ...]:
        """What follows from the options of the group, except for the rates."""
        return self.rule, self.side, self.lift, self.basis_rule, self.transports


def project(
    method: Method,
    bucket: Bucket,
    gradient: Tensor,
    reduce: Reduce | None = None,
    square: Tensor | None = None,
) -> Sketch:
    """The sketch of a bucket's gradients, with what its rules need.

    Args:
        method: How the bucket is stepped.
        bucket: Projected matrices.
        gradient: M, (p, q), or the stack of them.
        reduce: The mean over processes, if the gradient is only this process's part.
        square: The squared norm of each gradient, if known.
    """
    statistics = merged(method.lift.needs.statistics)
    if method.basis_rule is not None and is_moving(method.basis_rule, bucket) is not False:
        statistics = merged(statistics, method.basis_rule.needs.statistics)
    known = {} if square is None else {"squared_norm": square}
    return make_sketch(basis_of(bucket.state), gradient, statistics, reduce, known)


def is_moving(rule: BasisRule, bucket: Bucket) -> bool | Tensor:
    """Whether P moves at the next step; if only the device knows it, a flag for each matrix."""
    if rule.gradient is None:
        return False
    step, set_at = bucket.step, bucket.set_at
    if isinstance(step, Tensor) or isinstance(set_at, Tensor):
        return moves_each(rule, step, set_at)
    return moves(rule, step, set_at)


def apply_(
    method: Method,
    bucket: Bucket,
    sketch: Sketch,
    gradient: Tensor | None,
    is_finite: Tensor | None = None,
) -> None:
    """One step of W and of P from a sketch, in place.

    Args:
        method: How the bucket is stepped.
        bucket: Projected matrices.
        sketch: Of their gradients.
        gradient: M, if it is still alive; rules read it only if they say so.
        is_finite: Whether the step is taken, if only the device knows it: otherwise nothing
            changes.
    """
    basis_rule, lift, side = method.basis_rule, method.lift, method.side
    state, basis, step = bucket.state, basis_of(bucket.state), bucket.step
    assert basis_rule is not None
    moving = is_moving(basis_rule, bucket)
    if isinstance(moving, Tensor) and is_finite is not None:
        moving = moving & is_finite
    if moving is not False and basis_rule.order == "before":
        _move_(method, bucket, sketch, step, moving)
        assert gradient is not None
        sketch = make_sketch(basis, gradient, merged(lift.needs.statistics))
    direction, rate = _direction(method, bucket, to_matrix(sketch.low_rank, side), is_finite)
    own = of_prefix(state, LIFT_PREFIX)
    lifted = lift.apply(to_matrix(direction, side), Seen(basis, sketch, gradient, own, side))
    check_lift_state(lift, lifted.state, own)
    _add_(method, bucket, basis, lifted, rate * lifted.scale, is_finite)
    for name, value in lifted.state.items():
        own[name].copy_(value if is_finite is None else torch.where(is_finite, value, own[name]))
    _count_(bucket, is_finite)
    if moving is not False and basis_rule.order == "after":
        _move_(method, bucket, sketch, step, moving)


def step_full_rank_(
    method: Method,
    bucket: Bucket,
    gradient: Tensor,
    transform: Callable[[Tensor], Tensor],
    is_finite: Tensor | None = None,
) -> None:
    """One step of parameters that are not projected, in place.

    Args:
        method: How the bucket is stepped.
        bucket: The parameters.
        gradient: The input of the rule, float32 or float64.
        transform: A function of the rule's direction.
        is_finite: See `apply_`.
    """
    direction, rate = _direction(method, bucket, gradient, is_finite)
    update = Lifted(None, rest=transform(direction))
    _add_(method, bucket, None, update, rate, is_finite)
    _count_(bucket, is_finite)


def _add_(
    method: Method,
    bucket: Bucket,
    basis: Basis | None,
    lifted: Lifted,
    rate: Number,
    is_finite: Tensor | None,
) -> None:
    alpha, beta = method.coefficients(rate)
    if is_finite is not None:
        taken = is_finite.to(torch.float64)
        alpha, beta = alpha * taken, 1 - (1 - beta) * taken
    if isinstance(alpha, Tensor):
        lifted, alpha = lifted.times(alpha), 1.0
    side, keys, own = method.side, method.rounding_keys, [local(param) for param in bucket.params]
    if not bucket.is_stack:
        add_lifted_(to_matrix(bucket.params[0], side), basis, lifted, alpha, beta, keys)
    elif not keys and accumulator_dtype(own[0].dtype) == own[0].dtype:
        update = updates_of_stack(basis, lifted, own[0].dtype)
        updates = bucket.parted(to_matrix(update, side).contiguous())
        if isinstance(beta, Tensor):
            torch._foreach_mul_(own, beta.to(update.dtype))
        elif beta != 1:
            torch._foreach_mul_(own, beta)
        torch._foreach_add_(own, updates, alpha=alpha)
    else:
        stack = bucket.joined(bucket.params)
        add_lifted_(to_matrix(stack, side), basis, lifted, alpha, beta, keys)
        torch._foreach_copy_(own, bucket.parted(stack))


def _count_(bucket: Bucket, is_finite: Tensor | None) -> None:
    bucket.state["step"].add_(1 if is_finite is None else is_finite)


def _direction(
    method: Method, bucket: Bucket, gradient: Tensor, is_finite: Tensor | None
) -> tuple[Tensor, Number]:
    """(D, its rate) of the weight rule, which updates its moments."""
    linear, state = method.lift.linear, bucket.state
    if is_finite is not None:
        moments = moments_of(state)
        before = {name: x.clone() for name, x in moments.items()}
    direction, rate = method.rule.step(
        gradient, state, bucket.step + 1, method.lr if linear else 1.0
    )
    if is_finite is not None:
        select_(moments, before, is_finite)
    return direction, rate if linear else rate * method.lr


def _move_(
    method: Method, bucket: Bucket, sketch: Sketch, step: int | Tensor, moving: bool | Tensor
) -> None:
    """Moves P at a step, from 0. Its optimizer's first step is the first after P was set."""
    state, lr = bucket.state, method.projector_lr
    basis = basis_of(state)
    assert isinstance(basis, Tensor) and method.basis_rule is not None
    old = basis.clone() if method.transports else basis
    moved = move_basis_(
        method.basis_rule, state, method.side, sketch, step, bucket.set_at, lr,
        moving if isinstance(moving, Tensor) else None,
    )  # fmt: skip
    if not method.transports:
        return
    if isinstance(lr, Tensor):
        moved = moved & (lr != 0)
    elif not lr:  # P stays unchanged
        return
    if isinstance(moved, Tensor):
        moments = moments_of(state)
        before = {name: x.clone() for name, x in moments.items()}
        transport_(method, bucket, old)
        select_(moments, before, moved)
    elif moved:
        transport_(method, bucket, old)


def transport_(method: Method, bucket: Bucket, old: Basis) -> None:
    """Carries the moments of R over from the old P to the current one, if requested."""
    state, taken = bucket.state, bucket.step
    if method.transports and (isinstance(taken, Tensor) or taken):
        change = change_of(old, basis_of(state), method.side)
        method.rule.transport_(state, change, taken)
