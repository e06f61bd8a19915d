"""The state of a group's parameters: saving by name, checks, placement, completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from osd_torch.basis_rule import name_of_rule
from osd_torch.layout import SubspaceDimensionNumbers
from osd_torch.numerics import Number
from osd_torch.sketch import Basis, TwoSided

Group = dict[str, Any]
# Prefixes of the names in a parameter's state: of P's optimizer and of the lift.
PREFIX, LIFT_PREFIX = "projector_", "lift_"
# Options of the weight rules, in which the groups of one optimizer class differ from another's.
RULE_OPTIONS = (
    "betas", "eps", "lion_sign", "beta1", "clip_threshold", "decay_rate", "min_8bit_size", "l2",
    "rule", "momentum",
)  # fmt: skip
# Options of a group that are objects, saved by name.
OBJECTS = ("rule", "basis", "lift", "dimension_numbers")
NOT_SET = -1  # the step at which P was set, while it waits for a gradient
# State kept on the CPU, where reading it needs no synchronization, unless a group is capturable.
ON_HOST = ("step", "set_at")
_CPU = torch.device("cpu")


def step_number(step: int, device: torch.device = _CPU) -> Tensor:
    """The number of a step, float32."""
    return torch.tensor(step, dtype=torch.float32, device=device)


def lr_of(group: Group) -> Number:
    """A group's learning rate; a tensor stays one if the host must not read it."""
    return group["lr"] if group.get("capturable") else float(group["lr"])


def numbers_of(group: Group) -> SubspaceDimensionNumbers | None:
    """The dimension numbers of a projected group; at full rank parameters are not stacks."""
    return None if group["rank"] is None else group.get("dimension_numbers")


def completed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's saved state, completed with what earlier versions did not save.

    They did not save when P was set; if their first step was skipped they saved only a P, which the
    next step sets again.
    """
    if "step" not in state:
        return {}
    if "set_at" in state or not any(name.startswith("basis") for name in state):
        return dict(state)
    return {**state, "set_at": step_number(0)}


def described(option: str, value: Any) -> Any:
    """An option of a group in its saved form: a rule by its name, all others unchanged."""
    if option not in OBJECTS or value is None or isinstance(value, str):
        return value
    return name_of_rule(value)


def with_objects(optimizer: torch.optim.Optimizer, saved: list[Group]) -> list[Group]:
    """Saved groups with the names of objects replaced by the optimizer's own objects.

    Raises:
        ValueError: The name is that of another object.
    """
    groups = []
    for i, group in enumerate(saved):
        own = optimizer.param_groups[i] if i < len(optimizer.param_groups) else {}
        for option in OBJECTS:
            there, here = described(option, group.get(option)), described(option, own.get(option))
            if there != here:
                refuse_state(optimizer, f"the option {option!r} of group {i}", there, here)
        groups.append({**group, **{k: own[k] for k in OBJECTS if k in group and k in own}})
    return groups


def of_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a parameter's state with a prefix, by the rest of the name."""
    named = [(name, x) for name, x in state.items() if name.startswith(prefix)]
    return {name.removeprefix(prefix): x for name, x in named}


def moments_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the weight rule in a parameter's state."""
    others = (*ON_HOST, "basis", PREFIX, LIFT_PREFIX)
    return {name: x for name, x in state.items() if not name.startswith(others)}


def refuse_state(optimizer: torch.optim.Optimizer, what: str, there: object, here: object) -> None:
    """Raises ValueError: a saved state differs from the optimizer into which it is loaded."""
    raise ValueError(
        f"the state is of another optimizer or model: {what} is {there} there and {here} in this "
        f"{type(optimizer).__name__}; build the optimizer as it was built when the state was saved"
    )


def unwrapped(name: str) -> str:
    """A parameter's name without the prefixes of DistributedDataParallel and torch.compile."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def basis_of(state: Mapping[str, Tensor]) -> Basis:
    """P in a parameter's state."""
    if "basis" in state:
        return state["basis"]
    return TwoSided(state["basis_output"], state["basis_input"])


def copied(basis: Basis) -> Basis:
    """A copy of P."""
    return basis.clone() if isinstance(basis, Tensor) else TwoSided(*(x.clone() for x in basis))


def named_bases(basis: Basis) -> dict[str, Tensor]:
    """P as stored in a parameter's state."""
    if isinstance(basis, TwoSided):
        return {"basis_output": basis.output, "basis_input": basis.input}
    return {"basis": basis}


def named_parameters(group: Group, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The parameters of a group with their names; without names, their positions."""
    params = group["params"]
    names = group.get("param_names") or [f"{prefix}{i}" for i in range(len(params))]
    return zip(names, params, strict=True)


def name_of(optimizer: torch.optim.Optimizer, param: Tensor) -> str:
    """A parameter's name in an optimizer; without names, `group.position`.

    Raises:
        ValueError: The optimizer does not hold it.
    """
    for i, group in enumerate(optimizer.param_groups):
        for name, other in named_parameters(group, prefix=f"{i}."):
            if other is param:
                return name
    raise ValueError(
        f"this {type(optimizer).__name__} does not hold the parameter, of shape "
        f"{tuple(param.shape)}: expected one of the parameters that it was built with"
    )


# Options newer than some saved states, with the values that those were trained with: they let
# state_dicts, pickles and checkpoints of earlier versions load.
LATER_OPTIONS = {
    "update_proj_every": 1, "transport_moments": False, "stochastic_rounding": False,
    "basis": None, "lift": None, "side": None,
    "second_moment": "full", "first_moment": "full", "use_muon": False,
    "foreach": None, "capturable": False, "dimension_numbers": None,
}  # fmt: skip
# For these, if a state was saved without them, the optimizer keeps its own values.
OWN_OPTIONS = ("transport_moments", "stochastic_rounding")
# How a step is executed: the optimizer always keeps its own values.
EXECUTION_OPTIONS = ("foreach", "capturable")


def all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of all groups, in their order."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside wrappers such as `accelerate`'s.

    Wrappers hold it as `optimizer`, those of `torch.distributed.optim` as `optim`.

    Raises:
        ValueError: The wrapper has its own parameter groups and steps other parameters than these.
    """
    inside = lambda x: getattr(x, "optimizer", None) or getattr(x, "optim", None)
    while isinstance(inner := inside(optimizer), torch.optim.Optimizer):
        if optimizer.param_groups is not inner.param_groups:
            raise ValueError(
                f"a {type(optimizer).__name__} around a {type(inner).__name__} has its own "
                "parameter groups: expected an optimizer of osd_torch or torch, or a wrapper "
                "that steps the same parameters"
            )
        optimizer = inner
    return optimizer
