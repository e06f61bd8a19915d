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
import functools
import logging
import sys
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from osd_names import Side
from osd_torch.bases import (
    MOVE,
    REFRESH,
    BasisRule,
    check_fresh,
    on_whole_matrix,
    to_matrix,
)
from osd_torch.guard import check_dense, count_if_not_finite
from osd_torch.layout import (
    INPUT_AXIS,
    OUTPUT_AXIS,
    change_of,
    check_dtype,
    check_placement,
    check_rank,
)
from osd_torch.lift import Lift, Lifted, Seen, lift
from osd_torch.numerics import (
    accumulator_dtype,
    check_number,
    has_direction,
    random_bits,
    round_stochastically,
    without_autocast,
)
from osd_torch.rules import Change, Rule
from osd_torch.sharding import (
    Reduce,
    distributed_as,
    is_distributed,
    local,
    means_of,
    on_host,
    part_of,
    placed_like,
    shape_of,
    squared_norm,
    squared_norms,
    whole,
    zeros_along,
)
from osd_torch.sketch import (
    Basis,
    Needs,
    Sketch,
    TwoSided,
    make_sketch,
    merged,
    product,
    reading_gradient,
)
from osd_torch.state import (
    LIFT_PREFIX,
    NOT_SET,
    ON_HOST,
    PREFIX,
    RULE_OPTIONS,
    Group,
    basis_of,
    check_lift_state,
    completed,
    described,
    name_of,
    named_bases,
    named_parameters,
    of_prefix,
    refuse_state,
    step_number,
    unwrapped,
    with_objects,
)

# Options newer than some saved states, with the values that those were trained with: they let a
# state_dict, pickle or checkpoint of an earlier version load.
LATER_OPTIONS = {
    "update_proj_every": 1, "transport_moments": False, "stochastic_rounding": False,
    "basis": None, "lift": None, "side": None,
    "second_moment": "full", "first_moment": "full", "use_muon": False,
}  # fmt: skip
# For these, if a state was saved without them, the optimizer keeps its own values.
OWN_OPTIONS = ("transport_moments", "stochastic_rounding")
log = logging.getLogger("osd_torch")


class SubspaceOptimizer(torch.optim.Optimizer):
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
        if "rank" in self.defaults:  # for groups that are added to a pickle
            self.defaults = {**LATER_OPTIONS, **self.defaults}
        for group in self.param_groups:
            for name, value in LATER_OPTIONS.items():
                if name in self.defaults or "rank" in group:
                    group.setdefault(name, value)

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

    def rule(self, group: Group) -> Rule:
        """The rule that turns a gradient of this group into a direction."""
        raise NotImplementedError

    def side(self, group: Group, param: Tensor) -> Side:
        """The side of a matrix (output, input) that P projects: "output", "input" or "both"."""
        raise NotImplementedError

    def basis_rule(self, group: Group) -> BasisRule:
        """The basis rule of this group."""
        raise NotImplementedError

    def lift(self, group: Group) -> Lift:
        """The rule that turns a direction in the subspace into an update of W."""
        raise NotImplementedError

    def projector_lr(self, group: Group) -> float:
        """P's step size at the group's current learning rate."""
        raise NotImplementedError

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_number("lr", group["lr"])
        check_number("weight_decay", group["weight_decay"])
        for name, param in named_parameters(group):
            check_dtype(name, param)
        if group["rank"] is None:
            return
        check_rank(group["rank"])
        merged(*(needs.statistics for needs in needs_of(self, group)))
        if group.get("transport_moments"):
            check_can_transport(self.rule(group))
        for name, param in named_parameters(group):
            if param.ndim != 2:
                raise ValueError(
                    f"parameter '{name}' has shape {tuple(param.shape)}, which is not a matrix: put"
                    " it into a group without rank"
                )
            check_placement(name, param)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters, projected if it has a `rank`.

        Raises:
            ValueError: An option is out of range, a dtype is not float32, bfloat16 or float64, or a
                projected parameter is not a matrix.
        """
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        group = self.param_groups[-1]
        for param in group["params"]:
            if param.requires_grad:
                self.state_of(group, param)

    def state_of(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        """The state of a parameter; before its first step, the result of `init_state`.

        It is created again if the model has moved to another device or dtype since then, or an
        option of the group has changed.
        """
        state = self.state[param]
        if not state or (int(state["step"]) == 0 and not self._fits(group, param)):
            state.clear()
            state.update(self.init_state(group, param))
        return state

    def _fits(self, group: Group, param: Tensor) -> bool:
        """Whether a parameter's state matches its current device, dtype and options."""
        state, kinds = self.state[param], state_kinds(self, group, param)
        is_here = (x.device == param.device for name, x in state.items() if name not in ON_HOST)
        return {name: (x.shape, x.dtype) for name, x in state.items()} == kinds and all(is_here)

    def init_state(self, group: Group, like: Tensor) -> dict[str, Tensor]:
        """A parameter's state before its first step: zeros, and no P.

        Args:
            group: The parameter's group.
            like: The parameter, or a tensor with its shape, dtype, device and placement.
        """
        rule, wide = self.rule(group), accumulator_dtype(like.dtype)
        if group["rank"] is None:
            return {"step": step_number(0), **rule.init(shape_of(like, wide))}
        every_axis = tuple(range(like.ndim))
        side, rank = self.side(group, like), min(group["rank"], *like.shape)

        def basis_along(axis: int) -> Tensor:
            dtype = group["basis_dtype"] or wide
            return zeros_along(like, (like.shape[axis], rank), dtype, (axis, None))

        projected = {"output": (OUTPUT_AXIS,), "input": (INPUT_AXIS,), "both": every_axis}[side]
        names = ("basis_output", "basis_input") if side == "both" else ("basis",)
        bases = {name: basis_along(axis) for name, axis in zip(names, projected, strict=True)}
        moments = self.basis_rule(group).init(basis_of(bases), side)
        # R in the layout of the weight, with the rank in place of the projected axis, so that the
        # blocks of 8-bit moments are those of the release.
        shape = [rank if axis in projected else n for axis, n in enumerate(like.shape)]
        follows = [None if axis in projected else axis for axis in every_axis]
        low_rank = zeros_along(like, shape, wide, follows)
        kept = self.lift(group).init(
            to_matrix(shape_of(like, wide), side), to_matrix(low_rank, side)
        )
        return {
            "step": step_number(0),
            "set_at": step_number(NOT_SET),
            **bases,
            **{PREFIX + name: x for name, x in moments.items()},
            **{LIFT_PREFIX + name: x.contiguous() for name, x in kept.items()},
            **rule.init(low_rank),
        }

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
        # One synchronization transfers all that the host needs to know of the gradients: whether
        # they are finite, and the norms that scale P's. The norm of a held sketch is not that of
        # its R.
        squares = squared_norms(applied)
        numbers = [
            (sketch.statistics, name)
            for sketch in held.values()
            for name, x in sketch.statistics.items()
            if x.ndim == 0
        ]
        known = on_host([*squares, *(statistics[name] for statistics, name in numbers)])
        squares, of_held = known[: len(squares)], known[len(squares) :]
        for (statistics, name), value in zip(numbers, of_held, strict=True):
            statistics[name] = value
        if count_if_not_finite(self, applied, squares):
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
            params = all_params(self)
            flags = [float(p is param) for p in params]
            *some, mean_share = means_of([*flags, share], self._reduce, param.device)
            called_for = [p for p, is_any in zip(params, some, strict=True) if is_any]
            if len(called_for) > 1:
                names = ", ".join(repr(name_of(self, p)) for p in called_for)
                raise ValueError(
                    f"processes call accumulate for different parameters: {names}; with reduce "
                    "set, call it for the same parameters in the same order on all of them, with "
                    "a gradient of zeros if a process has none"
                )
            if abs(mean_share - share) > 1e-9:
                raise ValueError(
                    f"share is {share!r} for parameter '{name}' on this process, but "
                    f"{mean_share!r} in the mean of all: give its share over all processes, the "
                    "same on each"
                )
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
        state = self.state_of(group, param)
        event = self.basis_rule(group).clock.event(int(state["step"]))
        is_first_part = param not in self.held
        return (event == REFRESH and is_first_part) or int(state["set_at"]) == NOT_SET

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
        gradient, state = _gradient(param), self.state[param]
        state["set_at"].fill_(NOT_SET)
        if square is None:
            square = squared_norm(gradient)
        if not has_direction(float(square), square.dtype):
            return
        side, step, old = self.side(group, param), int(state["step"]), basis_of(state)
        key = f"{group['seed']}/{unwrapped(name_of(self, param))}/{step}"
        rule = self.basis_rule(group)
        basis = rule.fresh(to_matrix(gradient, side), old, side, key, on_whole_matrix)
        check_fresh(basis, old, name_of(self, param))
        state.update(
            {name: distributed_as(x, state[name]) for name, x in named_bases(basis).items()}
        )
        state["set_at"].fill_(step)
        for x in of_prefix(state, PREFIX).values():
            x.zero_()  # the state of P's optimizer belongs to the old P
        self._transport(group, param, old)

    def moves(self, group: Group, param: Tensor) -> bool:
        """Whether P moves at the next step; it does not at the step that sets it."""
        state = self.state_of(group, param)
        step, set_at = int(state["step"]), int(state["set_at"])
        event = self.basis_rule(group).clock.event(step)
        return event == MOVE and set_at not in (step, NOT_SET)

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
        state, rule, side = self.state[param], self.basis_rule(group), self.side(group, param)
        basis, every = basis_of(state), rule.clock.move_every
        assert isinstance(basis, Tensor) and every is not None
        old = basis.clone() if group.get("transport_moments") else basis
        t = step // every - int(state["set_at"]) // every
        lr = self.projector_lr(group)
        moved = rule.move_(basis, side, sketch, of_prefix(state, PREFIX), t, lr)
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

    def state_dict(self) -> StateDict:
        """As in torch; rule objects are saved by name."""
        state_dict = super().state_dict()
        groups = [{k: described(k, x) for k, x in g.items()} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restores a `state_dict`, to continue bit for bit.

        It copies the tensors and keeps their dtypes, whereas `torch.optim.Optimizer` would cast the
        float32 moments of a bfloat16 parameter to bfloat16. Each tensor gets the placement of its
        parameter: unsharded state can be loaded into sharded parameters. As in torch, the groups'
        options become the saved ones.

        Raises:
            ValueError: The state belongs to another optimizer or other parameters; the message
                names the first difference. Nothing is changed.
        """
        saved = state_dict["param_groups"]
        own = [{k: g[k] for k in OWN_OPTIONS if k in g} for g in self.param_groups]
        own += [{}] * (len(saved) - len(own))
        later = {k: x for k, x in LATER_OPTIONS.items() if k in self.defaults}
        groups = [{**later, **mine, **g} for mine, g in zip(own, saved, strict=False)]
        groups = with_objects(self, groups)
        state_dict = {**state_dict, "param_groups": groups}
        states = {index: completed(state) for index, state in state_dict["state"].items()}
        state_dict = {**state_dict, "state": states}
        check_state(self, state_dict)
        super().load_state_dict({**state_dict, "state": {}})
        forward_reduce()  # called by accelerate, which may not have been imported before
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, param in zip(saved["params"], group["params"], strict=True):
                if state := states.get(index):
                    self.state[param] = self._placed(group, param, state)
                elif param.requires_grad:
                    self.state_of(group, param)

    def _placed(self, group: Group, param: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors of a parameter's state, contiguous and with its placement."""
        own = self.init_state(group, param) if is_distributed(param) else {}

        def placed(name: str, value: Tensor) -> Tensor:
            if name in ON_HOST:
                return value.to(device="cpu", copy=True)
            value = value.to(param.device)
            value = distributed_as(value, own[name]) if own else whole(value)
            return value.clone(memory_format=torch.contiguous_format)

        return {name: placed(name, value) for name, value in state.items()}


def forward_reduce() -> None:
    """Forwards `prepared.reduce = ...` to the optimizer in `accelerate`'s wrapper.

    The wrapper forwards methods, but keeps an attribute that is set on itself.
    """
    wrapper = getattr(sys.modules.get("accelerate.optimizer"), "AcceleratedOptimizer", None)
    if wrapper is not None and not hasattr(wrapper, "reduce"):
        wrapper.reduce = property(
            lambda self: getattr(self.optimizer, "reduce", None),
            lambda self, reduce: setattr(self.optimizer, "reduce", reduce),
        )


def all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of all groups, in their order."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def zero_where_others_have_gradients(
    optimizer: torch.optim.Optimizer, reduce: Reduce, held: Container[Tensor] = ()
) -> None:
    """Gives a zero gradient to each parameter that has a gradient only on other processes.

    Args:
        optimizer: The optimizer of the parameters.
        reduce: The mean over processes.
        held: Parameters that count as having a gradient.
    """
    params = all_params(optimizer)
    present = [p.grad is not None or p in held for p in params]
    some_have = means_of(present, reduce, params[0].device)
    for param, is_present, some in zip(params, present, some_have, strict=True):
        if some and not is_present:
            param.grad = torch.zeros_like(param)


def add_lifted_(
    weight: Tensor,
    basis: Basis,
    lifted: Lifted,
    alpha: float,
    beta: float,
    rounding_key: str | None = None,
) -> None:
    """W <- beta W + alpha * then(P D + rest) in place, rounded once.

    The plain lift needs no temporary of W's size, except for a weight that is rounded
    stochastically and for a bfloat16 weight on a CPU, where bfloat16 products are slow.
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
        # `then` may modify its argument, and the rest may be the gradient.
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
        rounding_key: Rounds a bfloat16 W stochastically, from float32, with the bits that this key
            identifies. None: to nearest.
    """
    weight, direction = local(weight), local(direction)
    if rounding_key is not None:
        direction = direction.to(torch.float32)
    result = weight.to(direction.dtype)  # W itself if the dtypes are equal
    if beta != 1:
        result.mul_(beta)
    result.add_(direction, alpha=alpha)
    if rounding_key is not None:
        result = round_stochastically(result, random_bits(result, rounding_key))
    if result is not weight:
        weight.copy_(result)


def needs_of(optimizer: SubspaceOptimizer, group: Group) -> list[Needs]:
    """What the rules of a projected group read of a gradient."""
    return [optimizer.basis_rule(group).needs, optimizer.lift(group).needs]


def is_sketched(optimizer: SubspaceOptimizer, group: Group) -> bool:
    """Whether a step of this group can be computed from sketches alone."""
    return group["rank"] is not None and reading_gradient(needs_of(optimizer, group)) is None


def check_sketch_suffices(optimizer: SubspaceOptimizer, group: Group) -> None:
    """Raises ValueError if a step of this group reads more of a gradient than its sketch."""
    needs = None if group["rank"] is None else reading_gradient(needs_of(optimizer, group))
    if needs is not None:
        raise ValueError(
            f"{needs.reason}, but only its sketch is kept here (layer-by-layer updates with "
            f"micro-batches or clipping): use {needs.remedy}, or one micro-batch and no clipping"
        )


def check_can_transport(rule: Rule) -> None:
    """Raises ValueError for a rule that cannot carry its state over to another P."""
    if type(rule).transport_ is Rule.transport_:
        rule.transport_({}, Change(None, None), 1)


def _gradient(param: Tensor) -> Tensor:
    if param.grad is None:
        raise ValueError("this parameter has no gradient")
    return param.grad


def state_kinds(
    optimizer: SubspaceOptimizer, group: Group, param: Tensor
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shapes and dtypes of a parameter's state, by name."""
    like = torch.empty(param.shape, dtype=param.dtype, device="meta")
    return {name: (x.shape, x.dtype) for name, x in optimizer.init_state(group, like).items()}


def check_state(optimizer: SubspaceOptimizer, state_dict: StateDict) -> None:
    """Raises ValueError unless a `state_dict` belongs to such an optimizer with such parameters."""
    refuse = functools.partial(refuse_state, optimizer)
    kept, own = state_dict["param_groups"], optimizer.param_groups
    if len(kept) != len(own):
        refuse("the number of parameter groups", len(kept), len(own))
    for i, (saved, group) in enumerate(zip(kept, own, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            refuse(
                f"the number of parameters of group {i}", len(saved["params"]), len(group["params"])
            )
        for key in (*optimizer.defaults, *RULE_OPTIONS):
            if (key in saved) != (key in group):
                words = {True: "present", False: "absent"}
                refuse(f"the option {key!r} of group {i}", words[key in saved], words[key in group])
        named = list(named_parameters(group, prefix=f"{i}."))
        for j, name in enumerate(saved.get("param_names", ())):
            if "param_names" in group and unwrapped(name) != unwrapped(named[j][0]):
                refuse(f"parameter {j} of group {i}", repr(name), repr(named[j][0]))
        merged = {**saved, "params": group["params"]}
        optimizer.check_group(merged)
        for index, (name, param) in zip(saved["params"], named, strict=True):
            state = state_dict["state"].get(index, {})
            if not state:  # it has not taken a step
                continue
            wanted = {k: shape for k, (shape, _) in state_kinds(optimizer, merged, param).items()}
            for part in sorted({*state, *wanted}):
                there = getattr(state.get(part), "shape", None)
                if there != wanted.get(part):
                    shapes = (None if x is None else tuple(x) for x in (there, wanted.get(part)))
                    refuse(f"the shape of {part!r} of parameter '{name}'", *shapes)
