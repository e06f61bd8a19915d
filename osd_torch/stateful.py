"""An optimizer's parameter groups and their state: checked, created, saved and loaded.

`StatefulOptimizer` is the part of `osd_torch.subspace.SubspaceOptimizer` that takes no steps.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from osd_names import ResolvedSide
from osd_torch.basis_rule import BasisRule, name_of_rule
from osd_torch.basis_step import first_moments
from osd_torch.guard import SkipsNonFinite
from osd_torch.layout import (
    INPUT_AXIS,
    OUTPUT_AXIS,
    SubspaceDimensionNumbers,
    axes_of,
    check_dtype,
    check_placement,
    check_rank,
    matrix_count,
    matrix_shape,
    to_matrix,
)
from osd_torch.lift import Lift
from osd_torch.numerics import Number, accumulator_dtype, check_number
from osd_torch.rules import Rule, check_can_transport
from osd_torch.sharding import (
    distributed_as,
    is_along_first_axis,
    is_distributed,
    local,
    shape_of,
    whole,
    zeros_along,
)
from osd_torch.sketch import Needs, merged
from osd_torch.state import (
    EXECUTION_OPTIONS,
    LATER_OPTIONS,
    LIFT_PREFIX,
    NOT_SET,
    ON_HOST,
    OWN_OPTIONS,
    PREFIX,
    RULE_OPTIONS,
    Group,
    basis_of,
    completed,
    described,
    named_parameters,
    refuse_state,
    step_number,
    unwrapped,
    with_objects,
)

_COUNTS = {"step": 0.0, "set_at": float(NOT_SET)}


class StatefulOptimizer(SkipsNonFinite, torch.optim.Optimizer):
    """An optimizer whose groups have a weight rule, a basis rule and a lift, with their state.

    See `osd_torch.subspace.SubspaceOptimizer`, which takes the steps.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy, a loaded state or a pickle."""
        super().__setstate__(state)
        if "rank" in self.defaults:  # for groups that are added to a pickle
            self.defaults = {**LATER_OPTIONS, **self.defaults}
        for group in self.param_groups:
            for name, value in LATER_OPTIONS.items():
                if name in self.defaults or "rank" in group:
                    group.setdefault(name, value)

    def rule(self, group: Group) -> Rule:
        """The rule that turns a gradient of this group into a direction."""
        raise NotImplementedError

    def side(self, group: Group, param: Tensor) -> ResolvedSide:
        """The side of a matrix (output, input) that P projects: "output", "input" or "both"."""
        raise NotImplementedError

    def basis_rule(self, group: Group) -> BasisRule:
        """The basis rule of this group."""
        raise NotImplementedError

    def lift(self, group: Group) -> Lift:
        """The rule that turns a direction in the subspace into an update of W."""
        raise NotImplementedError

    def projector_lr(self, group: Group) -> Number:
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
        numbers = group.get("dimension_numbers")
        if numbers is not None:
            check_stackable(self, group, numbers)
            return
        for name, param in named_parameters(group):
            if param.ndim != 2:
                raise ValueError(
                    f"parameter '{name}' has shape {tuple(param.shape)}, which is not a matrix: put"
                    " it into a group without rank, or give the axes of its matrices in "
                    "dimension_numbers"
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
        if not state or (not has_stepped(state) and not self._fits(group, param)):
            state.clear()
            state.update(self.init_state(group, param))
        return state

    def _fits(self, group: Group, param: Tensor) -> bool:
        """Whether a parameter's state matches its current device, dtype and options."""
        state, kinds = self.state[param], state_kinds(self, group, param)
        elsewhere = () if group.get("capturable") else ON_HOST
        is_here = (x.device == param.device for name, x in state.items() if name not in elsewhere)
        return {name: (x.shape, x.dtype) for name, x in state.items()} == kinds and all(is_here)

    def init_state(self, group: Group, like: Tensor) -> dict[str, Tensor]:
        """A parameter's state before its first step: zeros, and no P.

        Args:
            group: The parameter's group.
            like: The parameter, or a tensor with its shape, dtype, device and placement.
        """
        numbers = group.get("dimension_numbers")
        place = like.device if group.get("capturable") else torch.device("cpu")
        if group["rank"] is None:
            rule, wide = self.rule(group), accumulator_dtype(like.dtype)
            return {"step": step_number(0, place), **rule.init(shape_of(like, wide))}
        if numbers is None:
            counts = {"step": step_number(0, place), "set_at": step_number(NOT_SET, place)}
            return {**counts, **self._init_matrix(group, like)}
        # A stack: the state of a matrix, with one more axis in front, sharded like the parameter.
        shape, count = matrix_shape(like.shape, numbers), matrix_count(like.shape, numbers)
        of_matrix = {**group, "dimension_numbers": None}
        matrix = torch.empty(shape, dtype=like.dtype, device="meta")
        of_one = self._init_matrix(of_matrix, matrix)
        counts = {
            name: torch.full((count,), value, device=place) for name, value in _COUNTS.items()
        }
        if is_distributed(like):
            counts = {name: distributed_as(x.to(like.device), like) for name, x in counts.items()}
        return {
            **counts,
            **{
                name: zeros_along(like, (count, *x.shape), x.dtype, (0, *[None] * x.ndim))
                for name, x in of_one.items()
            },
        }

    def _init_matrix(self, group: Group, like: Tensor) -> dict[str, Tensor]:
        """The state of a projected matrix without its numbers of steps; see `init_state`."""
        rule, wide = self.rule(group), accumulator_dtype(like.dtype)
        every_axis = tuple(range(like.ndim))
        side, rank = self.side(group, like), min(group["rank"], *like.shape)

        def basis_along(axis: int) -> Tensor:
            dtype = group["basis_dtype"] or wide
            return zeros_along(like, (like.shape[axis], rank), dtype, (axis, None))

        projected = {"output": (OUTPUT_AXIS,), "input": (INPUT_AXIS,), "both": every_axis}[side]
        names = ("basis_output", "basis_input") if side == "both" else ("basis",)
        bases = {name: basis_along(axis) for name, axis in zip(names, projected, strict=True)}
        moments = first_moments(self.basis_rule(group), basis_of(bases), side)
        # R in the layout of the weight, the rank replacing the projected axis, so that the
        # blocks of 8-bit moments are those of the release.
        shape = [rank if axis in projected else n for axis, n in enumerate(like.shape)]
        follows = [None if axis in projected else axis for axis in every_axis]
        low_rank = zeros_along(like, shape, wide, follows)
        kept = self.lift(group).init(
            to_matrix(shape_of(like, wide), side), to_matrix(low_rank, side)
        )
        return {
            **bases,
            **{PREFIX + name: x for name, x in moments.items()},
            **{LIFT_PREFIX + name: x.contiguous() for name, x in kept.items()},
            **rule.init(low_rank),
        }

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
        options become the saved ones, except for `foreach` and `capturable`.

        Raises:
            ValueError: The state belongs to another optimizer or other parameters; the message
                names the first difference. Nothing is changed.
        """
        saved = state_dict["param_groups"]
        own, how = (
            [{k: g[k] for k in names if k in g} for g in self.param_groups]
            + [{}] * (len(saved) - len(self.param_groups))
            for names in (OWN_OPTIONS, EXECUTION_OPTIONS)
        )
        later = {k: x for k, x in LATER_OPTIONS.items() if k in self.defaults}
        groups = [
            {**later, **mine, **g, **its} for mine, g, its in zip(own, saved, how, strict=False)
        ]
        groups = with_objects(self, groups)
        state_dict = {**state_dict, "param_groups": groups}
        states = {index: completed(state) for index, state in state_dict["state"].items()}
        state_dict = {**state_dict, "state": states}
        check_state(self, state_dict)
        super().load_state_dict({**state_dict, "state": {}})
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
            if name in ON_HOST and not is_distributed(own.get(name, value)):
                place = param.device if group.get("capturable") else torch.device("cpu")
                return value.to(device=place, copy=True)
            value = value.to(param.device)
            value = distributed_as(value, own[name]) if own else whole(value)
            return value.clone(memory_format=torch.contiguous_format)

        return {name: placed(name, value) for name, value in state.items()}


def has_stepped(state: dict[str, Tensor]) -> bool:
    """Whether a parameter has taken a step."""
    steps = local(state["step"])
    return bool(steps.any()) if steps.ndim else int(steps) > 0


def state_kinds(
    optimizer: StatefulOptimizer, group: Group, param: Tensor
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shapes and dtypes of a parameter's state, by name."""
    like = torch.empty(param.shape, dtype=param.dtype, device="meta")
    return {name: (x.shape, x.dtype) for name, x in optimizer.init_state(group, like).items()}


def check_state(optimizer: StatefulOptimizer, state_dict: StateDict) -> None:
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


def check_stackable(
    optimizer: StatefulOptimizer, group: Group, numbers: SubspaceDimensionNumbers
) -> None:
    """Raises ValueError unless a group's parameters are stacks that its rules can step."""
    if not isinstance(numbers, SubspaceDimensionNumbers):
        raise ValueError(
            f"dimension_numbers is {numbers!r}: expected "
            "SubspaceDimensionNumbers(reduction_axis, output_axis)"
        )
    lift, basis_rule = optimizer.lift(group), optimizer.basis_rule(group)
    is_stackable = basis_rule.stacks or basis_rule.gradient is None
    for rule, stacks in ((lift, lift.stacks), (basis_rule, is_stackable)):
        if not stacks:
            raise ValueError(
                f"dimension_numbers are given, but {name_of_rule(rule)} does not accept stacks of "
                "matrices: use a rule that does, and says so by stacks=True"
            )
    for name, param in named_parameters(group):
        axes = axes_of(numbers, param.shape, name)
        if not is_distributed(param):
            continue
        if axes.batch != (0,) or numbers.parts != 1 or not is_along_first_axis(param):
            raise ValueError(
                f"parameter '{name}' is placed as {getattr(param, 'placements', ())}: expected a "
                "stack of matrices sharded along its only batch axis, the first; put it into a "
                "group without rank"
            )


def needs_of(optimizer: StatefulOptimizer, group: Group) -> list[Needs]:
    """What the rules of a projected group read of a gradient."""
    return [optimizer.basis_rule(group).needs, optimizer.lift(group).needs]
