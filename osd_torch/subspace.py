"""The optimizer: gradient -> sketch -> step of W -> step of P.

Online Subspace Descent keeps the optimizer state in a subspace of each weight matrix. It reads only
a `Sketch` of a gradient G, and a step of one parameter consists of three methods of
`SubspaceOptimizer`:

    refresh(group, param)          sets P from G, on the few steps that do so
    project(group, param)          -> Sketch: large in, small out
    apply(group, param, sketch)    small in, large out: updates W, P and the moments in place

`step` calls them in this order. Between `project` and `apply` no gradient needs to be alive:

    accumulate(param, share)       refresh, project, add to the held sketch, drop the gradient
    clip_(optimizer, max_norm)     scales the held sketches and the other gradients
    step()                         applies the held sketches

Micro-batches, reduced sketches and layer-by-layer updates are built from these.

A gradient is laid out as M, of shape (p, q): the axis that P projects, then the other axis; for two
sides (output, input). P has shape (p, r), and its columns are the basis.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from osd_torch.accumulation import (
    check_agreed,
    check_sketch_suffices,
    forward_reduce,
    is_sketched,
    read_norms,
    zero_where_others_have_gradients,
)
from osd_torch.basis_step import is_due, move_basis_, moves, set_basis_
from osd_torch.guard import check_dense
from osd_torch.layout import to_matrix
from osd_torch.lift import Seen, add_, add_lifted_, check_lift_state
from osd_torch.numerics import accumulator_dtype, without_autocast
from osd_torch.sharding import Reduce, is_distributed, part_of
from osd_torch.sketch import Basis, Sketch, make_sketch, merged
from osd_torch.state import LIFT_PREFIX, Group, basis_of, name_of, of_prefix, unwrapped
from osd_torch.stateful import StatefulOptimizer
from osd_torch.transport import change_of

log = logging.getLogger("osd_torch")


class SubspaceOptimizer(StatefulOptimizer):
    """Base of the optimizer classes: a weight rule in a subspace that a basis rule moves.

        R = P^T M,   D = rule(R),   W <- W - lr * scale * P D

    A parameter group with a `rank` is projected: for a gradient laid out as M, the rule turns R
    into a direction D, and the lift turns D into an update of W, as above for the plain lift. A
    group without a rank is trained with the same rule at full rank.

    The state of a parameter consists of contiguous tensors: `step`; the moments in the shape of R,
    float32 (float64 for float64 parameters) or 8 bits; `basis`, or `basis_output` and
    `basis_input`; `set_at`, the step at which P was set; the moments of P's optimizer, with the
    prefix `projector_`; and the state of the lift, with the prefix `lift_`. All of it exists as
    soon as the optimizer holds the parameter, so it is the same on every process before the first
    step.

    P is set from a nonzero gradient: its squared norm is neither zero nor infinite. Until the first
    one P is zero and `set_at` is -1, and the parameter takes steps of zero. If the gradient is zero
    when a refresh is due, the next nonzero one sets P.

    A step with a non-finite value in any gradient changes nothing and is counted; see
    `skipped_steps`. The check takes one device synchronization per step. (If sketches are computed
    before this is known, P may have been set and its moments carried over; it is set again at the
    next update. If each parameter is stepped inside the backward pass, each counts as a step: see
    `osd_torch.layerwise`.)

    Attributes:
        held: The sketches that the next step applies, by parameter. Transient: `state_dict` does
            not contain them, and `zero_grad` drops them.

    References:
        arXiv 2408.12857, equation 6.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(24, 16)
        >>> optimizer = osd_torch.SubspaceAdamW(layer.parameters(), lr=0.01, rank=4)
        >>> for half in (torch.ones(2, 24), torch.zeros(2, 24)):  # two micro-batches, as sketches
        ...     (layer(half).square().sum() / 2).backward()
        ...     optimizer.accumulate(layer.weight, share=0.5)
        >>> layer.weight.grad is None
        True
        >>> optimizer.step()
    """

    decays_first = False  # whether weight decay comes before the update
    _has_said_uncompiled = False
    _reduce: Reduce | None = None
    _is_reduced = False  # whether what the next step applies is already equal on every process

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self.held: dict[Tensor, Sketch] = {}
        super().__init__(params, defaults)
        forward_reduce()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy, a loaded state or a pickle; no sketches are held."""
        super().__setstate__(state)
        self.held = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SubspaceOptimizer:
        """A copy with the same `reduce`; after unpickling, `reduce` must be set again."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        other._reduce = self._reduce
        return other

    @property
    def reduce(self) -> Reduce | None:
        """The mean over processes, if each has its own gradients; None: gradients are equal.

        It reduces sketches instead of projected gradients, which are reduced only when they set P;
        other gradients are reduced as a whole.
        """
        return self._reduce

    @reduce.setter
    def reduce(self, reduce: Reduce | None) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        if reduce is not None and any(is_distributed(param) for param in params):
            raise ValueError(
                "reduce is set, but the parameters are DTensors, whose gradients fully_shard "
                "already reduces: leave reduce None"
            )
        self._reduce = reduce

    def observe(self, group: Group) -> None:
        """Reads a group's learning rate before each step."""

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Takes one step with the held sketches and with the gradients in `grad`.

        Parameters with neither stay unchanged. The step is unaffected by `torch.autocast`.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The result of the closure.

        Raises:
            RuntimeError: A gradient is sparse.
            ValueError: A parameter has both a held sketch and a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(torch.compiler.is_compiling())
        return loss

    @torch.compiler.disable(reason="steps of osd_torch's optimizers run uncompiled")
    @torch.no_grad()
    @without_autocast()
    def _step(self, is_compiling: bool) -> None:
        if is_compiling and not self._has_said_uncompiled:
            self._has_said_uncompiled = True
            log.warning(
                "torch.compile: steps of %s run uncompiled; compile only the model",
                type(self).__name__,
            )
        for group in self.param_groups:
            self.observe(group)
        self.reduce_()
        self._is_reduced = False
        present = list(self.present())
        held, self.held = self.held, {}
        applied = [held[p].low_rank if p in held else _gradient(p) for _, p in present]
        check_dense(self, applied)
        squares = read_norms(applied, held.values())
        if self.skips(applied, squares):
            return
        for (group, param), square in zip(present, squares, strict=True):
            if group["rank"] is None:
                self.step_full_rank(group, param)
            elif param in held:
                self.apply(group, param, held.pop(param))
            else:
                self.refresh(group, param, square)
                self.apply(group, param, self.project(group, param, square))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients and the held sketches."""
        super().zero_grad(set_to_none)
        self.held.clear()
        self._is_reduced = False

    def present(self) -> Iterator[tuple[Group, Tensor]]:
        """The parameters that the next step updates, each with its group.

        Raises:
            ValueError: A parameter has both a held sketch and a gradient.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param in self.held:
                    raise ValueError(
                        f"parameter '{name_of(self, param)}' has a gradient in addition to the "
                        "sketch of earlier ones: call accumulate after each backward pass, or "
                        "zero_grad() to restart the update"
                    )
                if param.grad is not None or param in self.held:
                    yield group, param

    @torch.no_grad()
    @without_autocast()
    def accumulate(self, param: Tensor, share: float = 1.0) -> None:
        """Turns a projected parameter's gradient into a sketch, adds it to the held one, drops it.

        The gradient is one micro-batch's part of the update's gradient: parts add up, as backward
        passes add to `grad`. R of their sum is exact. Each statistic is approximated by the mean
        over the parts' own values, with each part scaled up to a whole gradient by its share. When
        P is due, the first part of the update with a nonzero gradient sets it.

        Args:
            param: A parameter with a `grad`.
            share: This part's share of the update, such as its share of the tokens; the shares sum
                to 1. A part with share 0 adds nothing.

        Raises:
            ValueError: The share is outside [0, 1]; the parameter is not projected, has no gradient
                or is not the optimizer's; a rule needs the gradient itself when the step is taken;
                or with `reduce` set the processes call it for different parameters or shares.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share!r}: expected a number in [0, 1]")
        name = name_of(self, param)
        group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        if group["rank"] is None:
            raise ValueError(
                f"parameter '{name}' is not projected and has no sketch: keep its gradient; "
                "backward passes add to it"
            )
        check_sketch_suffices(self, group)
        if param.grad is None:
            raise ValueError(f"parameter '{name}' has no gradient: call accumulate after backward")
        if self._reduce is not None:
            check_agreed(self, self._reduce, param, share)
        self.accumulate_agreed(group, param, share)

    @torch.no_grad()
    @without_autocast()
    def accumulate_agreed(self, group: Group, param: Tensor, share: float = 1.0) -> None:
        """`accumulate` for a parameter on which all processes have agreed, without its checks."""
        if share:
            if self.is_due(group, param):
                if self._reduce is not None:
                    param.grad = self._reduce(_gradient(param))
                self.refresh(group, param)
            part, held = self.project(group, param).part(share), self.held.get(param)
            self.held[param] = part if held is None else held.add_(part)
        param.grad = None

    @torch.no_grad()
    @without_autocast()
    def reduce_(self) -> None:
        """If `reduce` is set, makes what the next step applies equal on every process.

        `step` and `clip_` call it. Gradients of projected parameters become held sketches. A
        parameter with a gradient on only some processes gets a zero gradient on the others.
        """
        if self._reduce is None or self._is_reduced:
            return
        zero_where_others_have_gradients(self, self._reduce, self.held)
        for group, param in self.present():
            if not is_sketched(self, group):
                param.grad = self._reduce(_gradient(param))
            elif param.grad is not None:
                self.accumulate_agreed(group, param)
        self._is_reduced = True

    def is_due(self, group: Group, param: Tensor) -> bool:
        """Whether the next nonzero gradient sets P.

        True at the first part of an update whose step is a refresh of the rule's clock, and from
        then on until a nonzero gradient arrives.
        """
        return is_due(self.basis_rule(group), self.state_of(group, param), param in self.held)

    @torch.no_grad()
    @without_autocast()
    def refresh(self, group: Group, param: Tensor, square: Tensor | None = None) -> None:
        """Sets P from the gradient if P is due and the gradient is nonzero.

        Args:
            group: The parameter's group.
            param: A parameter with a `grad`.
            square: The squared norm of its gradient, if known.
        """
        if not self.is_due(group, param):
            return
        side, state, name = self.side(group, param), self.state[param], name_of(self, param)
        old, key = basis_of(state), f"{group['seed']}/{unwrapped(name)}/{int(state['step'])}"
        gradient = to_matrix(_gradient(param), side)
        if set_basis_(self.basis_rule(group), state, gradient, side, key, name, square):
            self._transport(group, param, old)

    def moves(self, group: Group, param: Tensor) -> bool:
        """Whether P moves at the next step; it does not at the step that sets it."""
        return moves(self.basis_rule(group), self.state_of(group, param))

    @torch.no_grad()
    @without_autocast()
    def project(self, group: Group, param: Tensor, square: Tensor | None = None) -> Sketch:
        """Computes the sketch of one projected parameter's gradient, with what its rules need.

        Args:
            group: The parameter's group.
            param: A parameter with a `grad`.
            square: The squared norm of its gradient, if known.
        """
        state = self.state_of(group, param)
        matrix = to_matrix(_gradient(param), self.side(group, param))
        statistics = merged(self.lift(group).needs.statistics)
        if self.moves(group, param):
            statistics = merged(statistics, self.basis_rule(group).needs.statistics)
        known = {} if square is None else {"squared_norm": square}
        return make_sketch(basis_of(state), matrix, statistics, self._reduce, known)

    @torch.no_grad()
    @without_autocast()
    def apply(self, group: Group, param: Tensor, sketch: Sketch) -> None:
        """One step of W and of P from a sketch, in place.

        Reads the gradient itself only if a rule needs it.
        """
        basis_rule, rule, lift = self.basis_rule(group), self.rule(group), self.lift(group)
        state, side = self.state_of(group, param), self.side(group, param)
        basis, step, moves = basis_of(state), int(state["step"]), self.moves(group, param)
        gradient = None if param.grad is None else to_matrix(param.grad, side)
        if moves and basis_rule.order == "before":
            self._move(group, param, sketch, step)
            assert gradient is not None
            sketch = make_sketch(basis, gradient, merged(lift.needs.statistics))
        low_rank, lr = to_matrix(sketch.low_rank, side), float(group["lr"])
        direction, rate = rule.step(low_rank, state, step + 1, lr if lift.linear else 1.0)
        rate = rate if lift.linear else rate * lr
        own = of_prefix(state, LIFT_PREFIX)
        lifted = lift.apply(to_matrix(direction, side), Seen(basis, sketch, gradient, own, side))
        check_lift_state(lift, lifted.state, own)
        alpha, beta = self.coefficients(group, rate * lifted.scale)
        key = self.rounding_key(group, param, step)
        add_lifted_(to_matrix(param, side), basis, lifted, alpha, beta, key)
        for name, value in lifted.state.items():
            own[name].copy_(value)
        state["step"] += 1
        if moves and basis_rule.order == "after":
            self._move(group, param, sketch, step)

    def _move(self, group: Group, param: Tensor, sketch: Sketch, step: int) -> None:
        """Moves P at a step, from 0. Its optimizer's first step is the first after P was set."""
        state, side, lr = self.state[param], self.side(group, param), self.projector_lr(group)
        basis = basis_of(state)
        assert isinstance(basis, Tensor)
        old = basis.clone() if group.get("transport_moments") else basis
        moved = move_basis_(self.basis_rule(group), state, side, sketch, step, lr)
        if moved and lr:  # with a step size of 0 P stays unchanged
            self._transport(group, param, old)

    def _transport(self, group: Group, param: Tensor, old: Basis) -> None:
        """Carries the moments of R over from the old P to the current one, if requested."""
        state = self.state[param]
        taken = int(state["step"])
        if group.get("transport_moments") and taken:
            change = change_of(old, basis_of(state), self.side(group, param))
            self.rule(group).transport_(state, change, taken)

    def step_full_rank(self, group: Group, param: Tensor) -> None:
        """One step of a parameter that is not projected, in place."""
        gradient = self.full_rank_gradient(group, param)
        state, rule = self.state_of(group, param), self.rule(group)
        key = self.rounding_key(group, param, int(state["step"]))
        state["step"] += 1
        direction, rate = rule.step(gradient, state, int(state["step"]), float(group["lr"]))
        direction = self.full_rank_direction(group, direction)
        add_(param, direction, *self.coefficients(group, rate), key)

    def full_rank_direction(self, group: Group, direction: Tensor) -> Tensor:
        """Transforms the rule's direction for a parameter that is not projected."""
        return direction

    def full_rank_gradient(self, group: Group, param: Tensor) -> Tensor:
        """The input of the rule for a parameter that is not projected, in float32 or float64."""
        return _gradient(param).to(accumulator_dtype(param.dtype))

    def rounding_key(self, group: Group, param: Tensor, step: int) -> str | None:
        """Identifies the random bits that round a weight at a step, from 0; None: to nearest.

        A resumed run repeats the bits, and so does every process that holds the same shard of the
        weight. Different shards have different bits.
        """
        if not group.get("stochastic_rounding") or param.dtype != torch.bfloat16:
            return None
        name, part = unwrapped(name_of(self, param)), part_of(param)
        return f"stochastic_rounding/{group['seed']}/{name}/{step}/{','.join(map(str, part))}"

    def coefficients(self, group: Group, rate: float) -> tuple[float, float]:
        """(alpha, beta) of `W <- beta * W + alpha * D`, a step with decoupled weight decay."""
        keep = 1 - float(group["lr"]) * group["weight_decay"]
        return (-rate if self.decays_first else -rate * keep), keep

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restores a `state_dict`; see `StatefulOptimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        forward_reduce()  # called by accelerate, which may not have been imported before


def _gradient(param: Tensor) -> Tensor:
    if param.grad is None:
        raise ValueError("this parameter has no gradient")
    return param.grad
