"""The state of a group's parameters: saved by name, checked, laid out, completed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from osd_torch.basis_rule import name_of_rule
from osd_torch.sketch import (
    Basis,
    TwoSided,
)

Group = dict[str, Any]
# Of the names, in a parameter's state, of what P's optimizer keeps, and of what the lift keeps.
PREFIX, LIFT_PREFIX = "projector_", "lift_"
# Options of the rules of W: by these the groups of one optimizer differ from another's.
RULE_OPTIONS = (
    "betas", "eps", "lion_sign", "beta1", "clip_threshold", "decay_rate", "min_8bit_size", "l2",
    "rule", "momentum",
)  # fmt: skip
OBJECTS = ("rule", "basis", "lift")  # options of a group that are objects, saved by their names
NOT_SET = -1  # the step at which P was set, while it waits for a gradient
# State that lies on the CPU, where reading it costs no synchronisation.
ON_HOST = ("step", "set_at")


def step_number(step: int) -> Tensor:
    """The number of a step, float32 on the CPU."""
    return torch.tensor(step, dtype=torch.float32, device="cpu")


def completed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's saved state with what earlier versions did not save.

    They did not save when P was set, and where their first step was skipped they saved a P alone,
    which the next step sets again.
    """
    if "step" not in state:
        return {}
    if "set_at" in state or not any(name.startswith("basis") for name in state):
        return dict(state)
    return {**state, "set_at": step_number(0)}


def described(option: str, value: Any) -> Any:
    """An option of a group as it is saved: a rule by its name, all else as it is."""
    if option not in OBJECTS or value is None or isinstance(value, str):
        return value
    return name_of_rule(value)


def with_objects(optimizer: torch.optim.Optimizer, saved: list[Group]) -> list[Group]:
    """Saved groups with the optimizer's own objects in the place of their names.

    Raises:
        ValueError: where a name is another one's.
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
    """What a parameter's state keeps under names with a prefix, by the rest of the name."""
    named = [(name, x) for name, x in state.items() if name.startswith(prefix)]
    return {name.removeprefix(prefix): x for name, x in named}


def refuse_state(optimizer: torch.optim.Optimizer, what: str, there: object, here: object) -> None:
    """Raises ValueError: a saved state differs from the optimizer that it is loaded into."""
    raise ValueError(
        f"the state is of another optimizer or model: {what} is {there} there and {here} in "
        f"this {type(optimizer).__name__}; build it as it was built when the state was saved"
    )


def unwrapped(name: str) -> str:
    """A parameter's name without what DistributedDataParallel and torch.compile add to it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def basis_of(state: Mapping[str, Tensor]) -> Basis:
    """P in a parameter's state."""
    if "basis" in state:
        return state["basis"]
    return TwoSided(state["basis_output"], state["basis_input"])


def named_bases(basis: Basis) -> dict[str, Tensor]:
    """P as a parameter's state holds it."""
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
        ValueError: if the optimizer does not hold it.
    """
    for i, group in enumerate(optimizer.param_groups):
        for name, other in named_parameters(group, prefix=f"{i}."):
            if other is param:
                return name
    raise ValueError(
        f"this {type(optimizer).__name__} does not hold the parameter, of shape "
        f"{tuple(param.shape)}: expected one of those that it was built with"
    )


# Options that are younger than some saved states, and what those were trained with.
LATER_OPTIONS = {
    "update_proj_every": 1, "transport_moments": False, "stochastic_rounding": False,
    "basis": None, "lift": None, "side": None,
    "second_moment": "full", "first_moment": "full", "use_muon": False,
}  # fmt: skip
# Of these, where a state was saved without them, the optimizer's own are kept.
OWN_OPTIONS = ("transport_moments", "stochastic_rounding")


def all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of all groups, in their order."""
    return [param for group in optimizer.param_groups for param in group["params"]]
