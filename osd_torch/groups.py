"""Parameter groups: split by projection and weight decay, and checks of their options."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from osd_names import PROJECTIONS, SIDES, Side, check_choice, check_flag
from osd_torch.basis_rule import BasisRule, check_rule, name_of_rule
from osd_torch.layout import SubspaceDimensionNumbers
from osd_torch.lift import Lift
from osd_torch.numerics import check_number
from osd_torch.selection import (
    Kinds,
    LinearSelection,
    Select,
    dimension_numbers_of,
    say_what_is_projected,
)
from osd_torch.state import Group

# The options of a group that determine its basis rule.
BASIS_OPTIONS = (
    "proj_type", "update_proj_gap", "update_proj_every", "penalty", "projector_weight_decay",
    "move_projector",
)  # fmt: skip


def trained_parameters(
    named_parameters: Iterable[tuple[str, Tensor]],
) -> list[tuple[str, Tensor]]:
    """The parameters that require a gradient, with their names.

    Raises:
        ValueError: An element is not a (name, parameter) pair, or no parameter requires a gradient.
    """
    pairs = list(named_parameters)
    for pair in pairs:
        is_pair = isinstance(pair, tuple) and len(pair) == 2
        if not is_pair or not isinstance(pair[0], str) or not isinstance(pair[1], Tensor):
            raise ValueError(
                f"named_parameters contains a {type(pair).__name__}: expected pairs of a name and "
                "a parameter, such as model.named_parameters()"
            )
    trained = [(name, param) for name, param in pairs if param.requires_grad]
    if pairs and not trained:
        raise ValueError(
            f"none of the {len(pairs)} parameters requires a gradient (the first is "
            f"{pairs[0][0]!r}): call requires_grad_() on those to be trained"
        )
    return trained


def rule_options(
    rule: str, optimizer: str, beta1: float | None, beta2: float | None, eps: float | None
) -> dict[str, Any]:
    """`make_optimizer`'s options of the weight rule as arguments of its class."""
    if rule == "adafactor":
        return {"beta1": beta1}
    if rule == "sgd":
        return {}
    second = 0.99 if rule == "lion" else 0.999
    betas = (0.9 if beta1 is None else beta1, second if beta2 is None else beta2)
    if rule == "lion":
        return {"betas": betas}
    default = 1e-6 if optimizer == "galore_adamw" else 1e-8
    return {"betas": betas, "eps": default if eps is None else eps}


def execution_options(optimizer: str, foreach: bool | None, capturable: bool) -> dict[str, Any]:
    """`make_optimizer`'s options of how a step is executed, if they are given.

    Raises:
        ValueError: A value is not a flag, or the optimizer does not support it.
    """
    given: dict[str, Any] = {}
    if foreach is not None:
        check_flag("foreach", foreach)
        given["foreach"] = foreach
    check_flag("capturable", capturable)
    if capturable:
        given["capturable"] = capturable
    for name, value in given.items():
        if optimizer == "adam8bit" or (optimizer == "sgd" and name == "capturable"):
            raise ValueError(
                f"{name} is {value!r}, which optimizer='{optimizer}' of another library does not "
                "read: leave it out, or choose an optimizer of osd_torch"
            )
    return given


def split_by_decay(groups: Sequence[Group], no_decay: Select | None) -> list[Group]:
    """Groups of (name, parameter) pairs, each split in two if some have no weight decay."""
    if no_decay is None:
        return list(groups)
    found = []
    for group in groups:
        pairs, named = group["params"], {name: no_decay(name, x) for name, x in group["params"]}
        parts: tuple[Group, Group] = (
            {**group, "params": [pair for pair in pairs if not named[pair[0]]]},
            {**group, "params": [pair for pair in pairs if named[pair[0]]], "weight_decay": 0.0},
        )
        found += [part for part in parts if part["params"]]
    return found


def divided(
    named: Iterable[tuple[str, Tensor]],
    given: Sequence[tuple[str, Tensor]],
    select: Select | None,
    rank: int,
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(projected, others) of (name, parameter) pairs; logs what is projected and what is not.

    Args:
        named: All parameters of the model.
        given: The pairs to divide.
        select: (name, parameter) -> whether it is projected. None: by name and shape.
        rank: Rank of the projected ones.
    """
    named = list(named)
    projected, others = split_by_selection(named, given, select)
    if others and not projected:
        warnings.warn(
            f"none of the {len(others)} parameters is projected (the first is {others[0][0]!r}): "
            "all are trained at full rank. Select the parameters to project with select=",
            stacklevel=3,
        )
    by_us = select is None or isinstance(select, LinearSelection)
    trained = [pair for pair in given if pair[1].requires_grad]
    names, kinds = {name for name, _ in projected}, Kinds(name for name, _ in named)
    say_what_is_projected(trained, names, kinds=kinds, rank=rank, chosen_here=by_us)
    return projected, others


def split_by_selection(
    named: Iterable[tuple[str, Tensor]],
    given: Sequence[tuple[str, Tensor]],
    select: Select | None,
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(selected, others) of (name, parameter) pairs; see `divided`."""
    chosen = select or Kinds(name for name, _ in named).selects
    is_chosen = [bool(chosen(*pair)) for pair in given]
    return (
        [pair for pair, yes in zip(given, is_chosen, strict=True) if yes],
        [pair for pair, yes in zip(given, is_chosen, strict=True) if not yes],
    )


def projected_groups(
    params: ParamsT, rank: int, select: Select | None, numbers: Numbers | None = None
) -> list[Group]:
    """Parameters or (name, parameter) pairs as groups: the projected ones, and all others.

    Args:
        params: Not groups, which specify themselves which are projected.
        rank: Rank of the projected group.
        select: (name, parameter) -> whether it is projected. None: by name as in `make_optimizer`;
            without names every matrix.
        numbers: See `split_by_numbers`. None: without names every parameter is one matrix.

    Raises:
        ValueError: `params` are groups.
    """
    given = list(params)
    if any(isinstance(item, dict) for item in given):
        raise ValueError(
            "rank is given, but params are groups: put rank, basis, lift and side into the "
            "groups to be projected"
        )
    if all(isinstance(item, tuple) for item in given):
        pairs: Any = given
        projected, others = divided(pairs, pairs, select, rank)
        named = split_by_numbers(projected, pairs, numbers)
        return [{**g, "rank": rank} for g in named] + [{"params": others}] * bool(others)
    unnamed: list[Any] = [("", param) for param in given]
    chosen = select or (lambda name, param: param.ndim == 2)
    projected, others = split_by_selection(unnamed, unnamed, chosen)
    groups = split_by_numbers(projected, unnamed, numbers or (lambda name, param: None))
    groups = [{**g, "rank": rank} for g in groups] + [{"params": others}] * bool(others)
    return [{**group, "params": [param for _, param in group["params"]]} for group in groups]


Numbers = SubspaceDimensionNumbers | Callable[[str, Tensor], SubspaceDimensionNumbers | None]


def split_by_numbers(
    projected: Sequence[tuple[str, Tensor]],
    named: Iterable[tuple[str, Tensor]],
    numbers: Numbers | None,
) -> list[Group]:
    """Groups of projected (name, parameter) pairs with the same dimension numbers.

    Args:
        projected: The pairs.
        named: All parameters of the model.
        numbers: The dimension numbers of parameters with more than two axes, or a function from any
            (name, parameter). None: by name and shape; see `selection.dimension_numbers_of`.

    Raises:
        ValueError: They cannot be determined, or `numbers` are none and no function.
    """
    is_one = isinstance(numbers, SubspaceDimensionNumbers)
    if numbers is not None and not is_one and not callable(numbers):
        raise ValueError(
            f"dimension_numbers is {numbers!r}: expected SubspaceDimensionNumbers(reduction_axis, "
            "output_axis), or a function (name, parameter) that returns them"
        )
    shapes = {name: tuple(param.shape) for name, param in named}

    def of(name: str, param: Tensor) -> SubspaceDimensionNumbers | None:
        if isinstance(numbers, SubspaceDimensionNumbers):
            return None if param.ndim == 2 else numbers
        return dimension_numbers_of(name, shapes) if numbers is None else numbers(name, param)

    alike: dict[SubspaceDimensionNumbers | None, list[tuple[str, Tensor]]] = {}
    for name, param in projected:
        alike.setdefault(of(name, param), []).append((name, param))
    return [
        {"params": pairs, **({} if its is None else {"dimension_numbers": its})}
        for its, pairs in alike.items()
    ]


def side_of(group: Group) -> Side:
    """The side that a group's P projects, before the shorter side is known."""
    if group["side"] is not None:
        return group["side"]
    return "shorter" if group["basis"] is not None else PROJECTIONS[group["proj_type"]].side


def check_objects(group: Group) -> None:
    """Raises ValueError for a `basis`, `lift` or `side` of the wrong type."""
    for name, kind, example in (
        ("basis", BasisRule, "online_pca(Adam(), step_size=5e-3)"),
        ("lift", Lift, "scaled(0.25)"),
    ):
        if group[name] is not None and not isinstance(group[name], kind):
            raise ValueError(
                f"{name} is {group[name]!r}: expected None or a {kind.__name__}, such as "
                f"osd_torch.{example}"
            )
    if group["basis"] is not None:
        check_rule(group["basis"])
    for name, options in (("basis", BASIS_OPTIONS), ("lift", ("scale",))):
        for option in options if group[name] is not None else ():
            if group[option] != SUBSPACE_DEFAULTS[option]:
                raise ValueError(
                    f"{option} is {group[option]!r}, but {name} is given, which does not read it: "
                    f"leave it out, or pass it to {name_of_rule(group[name])}"
                )
    for name in ("transport_moments", "stochastic_rounding", "capturable"):
        check_flag(name, group[name])
    if group["foreach"] is not None:
        check_flag("foreach", group["foreach"])
    if group["side"] is not None:
        check_choice("side", group["side"], SIDES)
    if side_of(group) == "both" and group["basis"] and not group["basis"].two_sided:
        raise ValueError(
            f"side is 'both', but basis is {name_of_rule(group['basis'])}, which moves one basis: "
            "use svd(...) or random(...), or one side"
        )
    if side_of(group) == "both" and group["lift"] and not group["lift"].two_sided:
        raise ValueError(
            "P is on both sides (side='both', proj_type='full'), but lift is "
            f"{name_of_rule(group['lift'])}, which reads one basis: use one side"
        )


def check_seed(seed: int) -> None:
    """Raises ValueError unless `seed` is a whole number."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed is {seed!r}: expected a whole number")


def check_beta(name: str, beta: Any) -> None:
    """Raises ValueError unless `beta` is in [0, 1)."""
    if not isinstance(beta, (int, float)) or not 0 <= beta < 1:
        raise ValueError(f"{name} is {beta!r}: expected a number in [0, 1)")


def check_betas(group: Group) -> None:
    """Raises ValueError unless the group's `betas` are two numbers in [0, 1) and its eps is one."""
    betas = group["betas"] if isinstance(group["betas"], (tuple, list)) else ()
    if len(betas) != 2 or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas are {group['betas']!r}: expected two numbers in [0, 1)")
    if "eps" in group:
        check_number("eps", group["eps"])


SUBSPACE_DEFAULTS: dict[str, Any] = {
    "rank": None,
    "update_proj_gap": 200,
    "update_proj_every": 1,
    "scale": 1.0,
    "proj_type": "std",
    "penalty": 0.0,
    "projector_lr_multiple": None,
    "projector_weight_decay": None,
    "peak_lr": None,
    "move_projector": "after",
    "basis_dtype": None,
    "transport_moments": False,
    "foreach": None,
    "capturable": False,
    "dimension_numbers": None,
    "stochastic_rounding": False,
    "seed": 0,
    "basis": None,
    "lift": None,
    "side": None,
}
