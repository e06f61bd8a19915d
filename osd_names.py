"""The published names, in one table: optimizers, projections, and which of them read which option.

`osd_jax.make_optimizer` and `osd_torch.make_optimizer` parse these names into their own objects;
the trainers' flags, the README's table and the tests' oracle take their names and constants from
here. It imports no framework.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Side = Literal["shorter", "longer", "input", "output", "both"]
SIDES = ("shorter", "longer", "input", "output", "both")


class Optimizer(NamedTuple):
    """What an optimizer's name stands for.

    Attributes:
        rule: Of the weights: "adam", "adamw", "lion", "adafactor", "adam8bit" or "sgd".
        is_projected: Whether selected matrices are trained in a subspace, all else at full rank.
    """

    rule: str
    is_projected: bool = False


OPTIMIZERS: dict[str, Optimizer] = {
    "galore_adamw": Optimizer("adamw", is_projected=True),
    "galore_lion": Optimizer("lion", is_projected=True),
    "galore_adafactor": Optimizer("adafactor", is_projected=True),
    "galore_adamw8bit": Optimizer("adam8bit", is_projected=True),
    "adam": Optimizer("adam"),
    "adamw": Optimizer("adamw"),
    "lion": Optimizer("lion"),
    "adafactor": Optimizer("adafactor"),
    "adam8bit": Optimizer("adam8bit"),
    "sgd": Optimizer("sgd"),
}


class Projection(NamedTuple):
    """What a `proj_type` stands for.

    Attributes:
        side: The side of a weight (output, input) that P projects; "shorter" is input where both
            are equal.
        basis: The basis rule: "svd" or "random" every `update_proj_gap` steps, or "online_pca".
        rule: Of P's step, of online PCA.
        weight_decay: Of P, in the release.
    """

    side: Side
    basis: Literal["svd", "random", "online_pca"]
    rule: str = ""
    weight_decay: float = 0.0


PROJECTIONS: dict[str, Projection] = {
    "std": Projection("shorter", "svd"),
    "reverse_std": Projection("longer", "svd"),
    "left": Projection("output", "svd"),
    "right": Projection("input", "svd"),
    "full": Projection("both", "svd"),
    "random": Projection("shorter", "random"),
    "continuous": Projection("shorter", "online_pca", "adam", weight_decay=0.01),
    "continuous_adam8bit": Projection("shorter", "online_pca", "adam8bit"),
    "continuous_lion": Projection("shorter", "online_pca", "lion"),
    "continuous_adafactor": Projection("shorter", "online_pca", "adafactor"),
    "continuous_sgd": Projection("shorter", "online_pca", "sgd"),
}

SUBSPACE_OPTIMIZERS = tuple(name for name, x in OPTIMIZERS.items() if x.is_projected)
FULL_RANK_OPTIMIZERS = tuple(name for name, x in OPTIMIZERS.items() if not x.is_projected)
PROJ_TYPES = tuple(PROJECTIONS)
LION_SIGNS = ("lifted", "subspace")
MOVE_PROJECTOR = ("after", "before")


class Reader(NamedTuple):
    """Who reads an option.

    Attributes:
        who: In words, for messages.
        reads: (optimizer, proj_type) -> whether it does.
    """

    who: str
    reads: Callable[[str, str], bool]


def is_online(optimizer: str, proj_type: str) -> bool:
    """Whether P moves by online PCA."""
    return OPTIMIZERS[optimizer].is_projected and PROJECTIONS[proj_type].basis == "online_pca"


def _rule_is(*rules: str) -> Callable[[str, str], bool]:
    return lambda optimizer, proj_type: OPTIMIZERS[optimizer].rule in rules


_MOMENTS = Reader(
    "galore_adamw, galore_adamw8bit or galore_lion (not Adafactor: its second moment is factored)",
    lambda optimizer, _: optimizer in ("galore_adamw", "galore_lion", "galore_adamw8bit"),
)
_ONLINE = Reader("online PCA (a galore_* optimizer with a continuous* proj_type)", is_online)
_LION = Reader("galore_lion", lambda optimizer, _: optimizer == "galore_lion")
_ADAM = ("adam", "adamw", "adam8bit")

# Options that some optimizers do not read, with their default and their readers.
OPTIONS: dict[str, tuple[Any, Reader]] = {
    "beta1": (None, Reader("Adam, Lion or Adafactor", _rule_is(*_ADAM, "lion", "adafactor"))),
    "beta2": (None, Reader("Adam or Lion", _rule_is(*_ADAM, "lion"))),
    "eps": (None, Reader("Adam", _rule_is(*_ADAM))),
    "lion_sign": ("lifted", _LION),
    "transport_moments": (False, _MOMENTS),
    "update_proj_every": (1, _ONLINE),
    "penalty": (0.0, _ONLINE),
    "projector_lr_multiple": (None, _ONLINE),
    "projector_weight_decay": (None, _ONLINE),
    "peak_lr": (None, _ONLINE),
    "move_projector": ("after", _ONLINE),
    "projector_init": ("svd", _ONLINE),
}


def check_names(optimizer: str, proj_type: str) -> None:
    """Raises ValueError for an unknown name, naming the choices."""
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    check_choice("proj_type", proj_type, PROJ_TYPES)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")


def check_read(optimizer: str, proj_type: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that would be silently ignored.

    Args:
        optimizer: A published name.
        proj_type: Likewise.
        options: Values by name. One that is no plain value, such as a traced number, passes.
    """
    for name, value in options.items():
        default, reader = OPTIONS[name]
        is_given = isinstance(value, (str, numbers.Number)) and value != default
        if is_given and not reader.reads(optimizer, proj_type):
            raise ValueError(f"{name} is {value!r}: only {reader.who} reads it; leave it out")
