"""The steps of P: a basis set from a gradient, and a basis moved by its optimizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from osd_names import ResolvedSide
from osd_torch.bases import each_matrix
from osd_torch.basis_rule import MOVE, REFRESH, BasisRule, check_fresh
from osd_torch.layout import to_matrix
from osd_torch.numerics import Number, float32_or_more, has_direction, select_
from osd_torch.rules import Count, of_stack
from osd_torch.sharding import distributed_as, local, squared_norm, whole
from osd_torch.sketch import Basis, Sketch
from osd_torch.state import NOT_SET, ON_HOST, PREFIX, basis_of, named_bases, of_prefix


def is_due(rule: BasisRule, state: Mapping[str, Tensor], is_held: bool) -> bool:
    """Whether the next nonzero gradient sets P, or one P of a stack.

    Args:
        rule: The rule of P.
        state: State of the parameter, or this process's part of a stack's.
        is_held: Whether a sketch of a part of the update is already held.
    """
    for step, set_at in zip(
        *(local(state[name]).flatten().tolist() for name in ON_HOST), strict=True
    ):
        is_first_part = rule.clock.event(int(step)) == REFRESH and not is_held
        if is_first_part or set_at == NOT_SET:
            return True
    return False


def moves(rule: BasisRule, step: int, set_at: int) -> bool:
    """Whether P moves at a step, from 0; it does not at the step that sets it."""
    return rule.clock.event(step) == MOVE and set_at not in (step, NOT_SET)


def moves_each(rule: BasisRule, step: Count, set_at: Count) -> Tensor:
    """`moves` for each matrix of a stack, whose P has been set if it was due."""
    assert rule.clock.move_every is not None
    is_set = (set_at != NOT_SET) & (set_at != step)
    assert isinstance(is_set, Tensor)
    return is_set & (step % rule.clock.move_every == 0)


def set_basis_(
    rule: BasisRule,
    state: dict[str, Tensor],
    gradient: Tensor,
    side: ResolvedSide,
    key: str,
    name: str,
    square: Tensor | None = None,
) -> bool:
    """Sets P from a nonzero gradient; with a zero gradient P waits. Returns whether it was set.

    Args:
        rule: The rule of P.
        state: State of the parameter, updated in place.
        gradient: M, (p, q).
        side: The side that P projects.
        key: Identifies the draw.
        name: The parameter's name, for messages.
        square: The squared norm of the gradient, if known.

    Raises:
        ValueError: The rule returns a P of another shape or dtype.
    """
    state["set_at"].fill_(NOT_SET)
    square = squared_norm(gradient) if square is None else square
    if not has_direction(float(square), square.dtype):
        return False
    old = basis_of(state)
    basis = rule.fresh(gradient, old, side, key, each_matrix)
    check_fresh(name, basis, old)
    for k, x in named_bases(basis).items():
        local(state[k]).copy_(local(distributed_as(x, state[k])))
    state["set_at"].copy_(state["step"])
    for x in of_prefix(state, PREFIX).values():
        x.zero_()  # the state of P's optimizer belongs to the old P
    return True


def first_moments(rule: BasisRule, basis: Basis, side: ResolvedSide) -> dict[str, Tensor]:
    """The state of P's optimizer before its first step."""
    if rule.optimizer is None:
        return {}
    assert isinstance(basis, Tensor)
    return rule.optimizer.init(to_matrix(float32_or_more(basis), side))


def move_basis_(
    rule: BasisRule,
    state: dict[str, Tensor],
    side: ResolvedSide,
    sketch: Sketch,
    step: Count,
    set_at: Count,
    lr: Number,
    moving: Tensor | None = None,
) -> bool | Tensor:
    """Moves P in place, unless the gradient is zero; returns whether it did.

    Args:
        rule: The rule of P.
        state: State of the parameter or of a stack; the state of P's optimizer is updated in place,
            also if P stays unchanged.
        side: The side that P projects.
        sketch: The sketch of the gradient for this P, with the statistics that the rule needs.
        step: Step of the parameter, from 0; of a stack, a tensor if they differ.
        set_at: The step at which P was set; P's optimizer takes its first step after that.
        lr: P's step size.
        moving: For each matrix of a stack, whether its P moves at this step; None: all of them.

    Returns:
        Whether P moved; for a stack, one flag for each matrix.
    """
    basis, every, optimizer = basis_of(state), rule.clock.move_every, rule.optimizer
    assert isinstance(basis, Tensor) and every is not None
    assert rule.gradient is not None and optimizer is not None
    gradient = rule.gradient(float32_or_more(basis), sketch)
    moments = of_prefix(state, PREFIX)
    square = sketch.statistics.get("squared_norm")
    square = squared_norm(sketch.low_rank) if square is None else square
    # The release stores the basis of the input side as rows, and 8-bit blocks run along them.
    gradient = to_matrix(gradient, side)
    if not square.ndim:
        now = (gradient, moments, step // every - set_at // every, lr)
        if not has_direction(float(square), gradient.dtype):
            optimizer.step(*now)  # updates only its moments
            return False
        optimizer.step_(to_matrix(basis, side), *now, rule.weight_decay)
        _retract_(rule, basis)
        return True
    t = step // every - set_at // every
    t = t.clamp(min=1) if isinstance(t, Tensor) else t
    before = {"basis": basis.clone()}
    if moving is not None:
        before |= {name: x.clone() for name, x in moments.items()}
    like = torch.empty(gradient.shape[1:], device="meta")  # a stack may be empty on a process
    of_stack(optimizer, like, t).step_(
        to_matrix(basis, side), gradient, moments, t, lr, rule.weight_decay
    )
    _retract_(rule, basis)
    has_moved = has_direction(square, gradient.dtype)
    if moving is not None:
        select_(moments, before, moving)
        has_moved = has_moved & moving
    select_({"basis": basis}, before, has_moved)
    return has_moved


def _retract_(rule: BasisRule, basis: Tensor) -> None:
    if rule.retract is not None:
        moved = rule.retract(float32_or_more(whole(basis))).to(basis.dtype)
        local(basis).copy_(local(distributed_as(moved, basis)))
