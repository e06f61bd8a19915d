"""The definition of a basis rule: a `Clock`, which says when P is set and moved, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax.numerics import check_period
from osd_jax.sketch import Needs, Sketch
from osd_names import MOVE_PROJECTOR, Order, ResolvedSide, check_choice

NOTHING, REFRESH, MOVE = 0, 1, 2  # events of a clock

Each = Callable[..., Any]  # (function, *arrays) -> the results of the function, matrix by matrix
Fresh = Callable[[jax.Array, Any, ResolvedSide, jax.Array, Each], Any]


class Clock(NamedTuple):
    """When P is set from a gradient, and when it moves.

    Attributes:
      refresh_every: P is set at the steps whose count is a multiple of it; None: at step 0 only.
      move_every: P moves at the steps whose count is a multiple of it, unless a refresh is due.
        None: never.

    Example:
      >>> from osd_jax.basis_rule import Clock
      >>> [int(Clock(refresh_every=4, move_every=2).event(step)) for step in range(6)]
      [1, 0, 2, 0, 1, 0]
    """

    refresh_every: int | None = None
    move_every: int | None = None

    def event(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Returns `NOTHING`, `REFRESH` or `MOVE` (int32) for the step with this count, from 0."""
        step = jnp.asarray(step)
        refreshes = step == 0 if self.refresh_every is None else step % self.refresh_every == 0
        otherwise = jnp.int32(NOTHING)
        if self.move_every is not None:
            otherwise = jnp.where(step % self.move_every == 0, jnp.int32(MOVE), otherwise)
        return jnp.where(refreshes, jnp.int32(REFRESH), otherwise)


class BasisRule(NamedTuple):
    """A rule for P, as pure functions. P never moves at the step that sets it.

    Attributes:
      clock: When P is set, and when it moves. A matrix whose gradient is zero when P is due waits
        for its next nonzero gradient.
      fresh: (M (..., p, q), old P, the side of p, key, each) -> P, with the shape and dtype of the
        old one. `key` is a random key for this parameter and step. `each(function, *arrays)`
        applies a function of one matrix's arrays to each matrix that is to be set, one at a time,
        and accepts stacks (..., a, b). The other matrices keep the old P, whatever this returns.
      needs: The statistics that `gradient` reads, and when the rule reads the gradient itself.
      gradient: (P, Sketch) -> the gradient of P's loss, (..., p, r). None: P does not move.
      optimizer: The optimizer of P, including its learning rate; it may read P as its parameters
        (weight decay). None if P does not move.
      two_sided: Whether the rule supports side="both".
      order: Whether P moves "after" W's step or "before" it, which costs one more product with the
        gradient and requires `needs.gradient` to be "always".
      retract: (one P (p, r), float32 or float64) -> P after a step of its optimizer, such as
        `orthonormalized`. None: no retraction.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> def fixed(matrix, old, side, key, each):
      ...     return jnp.broadcast_to(jnp.eye(*old.shape[-2:], dtype=old.dtype), old.shape)
      >>> rule = osd_jax.BasisRule(osd_jax.Clock(), fixed)
      >>> tx = osd_jax.scale_by_subspace(optax.scale_by_adam(), rule, rank=2)
    """

    clock: Clock
    fresh: Fresh
    needs: Needs = Needs()
    gradient: Callable[[Any, Sketch], Any] | None = None
    optimizer: optax.GradientTransformation | None = None
    two_sided: bool = False
    order: Order = "after"
    retract: Callable[[jax.Array], jax.Array] | None = None


def check_rule(rule: BasisRule) -> None:
    """Raises ValueError for a rule with contradictory attributes."""
    for every in rule.clock:
        if every is not None:
            check_period(every)
    check_choice("order", rule.order, MOVE_PROJECTOR)
    moves = (rule.clock.move_every, rule.gradient, rule.optimizer)
    if any(part is None for part in moves) != all(part is None for part in moves):
        raise ValueError(
            f"the rule for P has clock.move_every={rule.clock.move_every!r}, and its gradient and "
            "its optimizer are "
            + " and ".join("None" if part is None else "given" for part in moves[1:])
            + ": a rule that moves P has all three, one that does not has none"
        )
    if rule.order == "before" and rule.needs.gradient != "always":
        raise ValueError(
            "the rule for P has order='before', which recomputes the sketch from the gradient "
            "after P has moved: expected needs.gradient='always', with this as its reason"
        )


def check_fresh(name: str, new: jax.Array, old: jax.Array) -> None:
    """Raises ValueError unless a rule's P has the shape and dtype of the old P."""
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        raise ValueError(
            f"the rule's fresh P of '{name}' is {new.dtype}{list(new.shape)}: expected "
            f"{old.dtype}{list(old.shape)}, like the old P"
        )
