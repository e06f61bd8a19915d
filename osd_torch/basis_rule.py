"""The definition of a basis rule: a `Clock`, which says when P is set and moved, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from osd_names import MOVE_PROJECTOR, Order, ResolvedSide, check_choice
from osd_torch.numerics import check_period
from osd_torch.rules import Rule
from osd_torch.sketch import Basis, Needs, Sketch

NOTHING, REFRESH, MOVE = 0, 1, 2  # events of a clock
Each = Callable[..., Any]  # (function, *arrays) -> the result of the function
Fresh = Callable[[Tensor, Basis, ResolvedSide, str, Each], Basis]
StepSize = float | Callable[[Any], Any]  # of lr, which may be a tensor


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
            P does not move. Under FSDP2 they are DTensors: multiply with `sketch.product`, and
            compute the rest on `sharding.local` parts.
        optimizer: The rule of P's step.
        weight_decay: Decoupled weight decay of P, before the step.
        two_sided: Whether the rule supports side "both".
        order: Whether P moves "after" W's step, or "before" it, in which case R is recomputed with
            the new P.
        step_size: Step size of P: a number, or a function of lr.
        name: A name for messages and saved states. If not given, the name of `fresh`.
        retract: (P (p, r), float32 or float64, not sharded) -> P after a step of its optimizer,
            such as `orthonormalized`. None: no retraction.
        stacks: Whether `gradient` and `retract` accept stacks, whose tensors have one more axis in
            front, and treat each matrix by itself. Otherwise matrices whose P moves are stepped one
            at a time.

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
    fresh: Fresh
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
    stacks: bool = False


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


def check_fresh(name: str, new: Basis, old: Basis) -> None:
    """Raises ValueError unless a newly set P has the shapes and dtype of the old one."""
    both = [(x,) if isinstance(x, Tensor) else tuple(x) for x in (new, old)]
    kinds = [[(tuple(x.shape), x.dtype) for x in each] for each in both]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the rule's P of parameter '{name}' is {kinds[0]}: expected {kinds[1]}, like the old P"
        )
