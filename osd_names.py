"""The published names, in one table: optimizers, projections, and which of them read which option.

`osd_jax.make_optimizer` and `osd_torch.make_optimizer` parse these names into their own objects;
the trainers' flags, the README's table and the tests' oracle take their names and constants from
here, and both libraries their version. It imports no framework.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

__version__ = "0.1.0"  # of both libraries; pyproject.toml reads it from here

Side = Literal["shorter", "longer", "input", "output", "both"]
SIDES = ("shorter", "longer", "input", "output", "both")


class Optimizer(NamedTuple):
    """What an optimizer's name stands for.

    Attributes:
        rule: Of the weights: "adam", "adamw", "lion", "adafactor", "adam8bit", "sgd" or "muon".
        is_projected: Whether selected matrices are trained in a subspace, all else at full rank.
    """

    rule: str
    is_projected: bool = False


OPTIMIZERS: dict[str, Optimizer] = {
    "galore_adamw": Optimizer("adamw", is_projected=True),
    "galore_lion": Optimizer("lion", is_projected=True),
    "galore_adafactor": Optimizer("adafactor", is_projected=True),
    "galore_adamw8bit": Optimizer("adam8bit", is_projected=True),
    "osd_muon": Optimizer("muon", is_projected=True),
    "adam": Optimizer("adam"),
    "adamw": Optimizer("adamw"),
    "lion": Optimizer("lion"),
    "adafactor": Optimizer("adafactor"),
    "adam8bit": Optimizer("adam8bit"),
    "sgd": Optimizer("sgd"),
    "muon": Optimizer("muon"),
}


class Projection(NamedTuple):
    """What a `proj_type` stands for.

    Attributes:
        side: The side of a weight (output, input) that P projects; "shorter" is input where both
            are equal.
        basis: The basis rule: "svd", "random" or "gaussian" every `update_proj_gap` steps, or
            "online_pca" or "oja", where P moves.
        rule: Of P's step, where it moves.
        weight_decay: Of P, in the release.
    """

    side: Side
    basis: Literal["svd", "random", "gaussian", "online_pca", "oja"]
    rule: str = ""
    weight_decay: float = 0.0


PROJECTIONS: dict[str, Projection] = {
    "std": Projection("shorter", "svd"),
    "reverse_std": Projection("longer", "svd"),
    "left": Projection("output", "svd"),
    "right": Projection("input", "svd"),
    "full": Projection("both", "svd"),
    "random": Projection("shorter", "random"),
    "gaussian": Projection("shorter", "gaussian"),
    "continuous": Projection("shorter", "online_pca", "adam", weight_decay=0.01),
    "continuous_adam8bit": Projection("shorter", "online_pca", "adam8bit"),
    "continuous_lion": Projection("shorter", "online_pca", "lion"),
    "continuous_adafactor": Projection("shorter", "online_pca", "adafactor"),
    "continuous_sgd": Projection("shorter", "online_pca", "sgd"),
    "oja": Projection("shorter", "oja", "sgd"),
}

SUBSPACE_OPTIMIZERS = tuple(name for name, x in OPTIMIZERS.items() if x.is_projected)
FULL_RANK_OPTIMIZERS = tuple(name for name, x in OPTIMIZERS.items() if not x.is_projected)
PROJ_TYPES = tuple(PROJECTIONS)
LION_SIGNS = ("lifted", "subspace")
MUON_SCALES = ("adamw", "muon", "none")
MOMENTUM = 0.95  # Muon's, where none is given
SECOND_MOMENTS = ("full", "row")
FIRST_MOMENTS = ("full", "8bit")


class Residual(NamedTuple):
    """What a `residual` stands for: a lift that adds what P does not reach.

    Attributes:
        scale: Default of `residual_scale`; None: it does not read one.
        reads_scale: Whether it reads `scale`, the factor on the lifted update.
        limits: Whether it has a growth limiter.
    """

    scale: float | None = None
    reads_scale: bool = True
    limits: bool = False


RESIDUALS: dict[str, Residual] = {
    "none": Residual(),
    "norm_ratio": Residual(limits=True),
    "norm_ratio_released": Residual(limits=True),
    "column_ema": Residual(0.4, reads_scale=False),
    "gradient_only": Residual(limits=True),
    "gradient_only_matrix": Residual(limits=True),
    "sign": Residual(1.0),
}
MOVE_PROJECTOR = ("after", "before")
PROJECTOR_INITS = ("svd", "qr")


class Reader(NamedTuple):
    """Who reads an option.

    Attributes:
        who: In words, for messages.
        reads: (optimizer, proj_type) -> whether it does.
    """

    who: str
    reads: Callable[[str, str], bool]


def is_online(optimizer: str, proj_type: str) -> bool:
    """Whether P moves with the gradients, by online PCA or Oja's rule."""
    moves = PROJECTIONS[proj_type].basis in ("online_pca", "oja")
    return OPTIMIZERS[optimizer].is_projected and moves


def _rule_is(*rules: str) -> Callable[[str, str], bool]:
    return lambda optimizer, proj_type: OPTIMIZERS[optimizer].rule in rules


_MOMENTS = Reader(
    "a subspace optimizer other than galore_adafactor, whose second moment is factored,",
    lambda optimizer, _: OPTIMIZERS[optimizer].is_projected and optimizer != "galore_adafactor",
)
_ONLINE = Reader("online PCA (a subspace optimizer with a continuous* proj_type) or oja", is_online)
_PCA = Reader(
    "online PCA (a subspace optimizer with a continuous* proj_type)",
    lambda optimizer, proj_type: is_online(optimizer, proj_type) and proj_type != "oja",
)
_OWN_STEP = Reader(
    "an optimizer of this project (sgd and adam8bit are torch's and bitsandbytes' own in PyTorch)",
    lambda optimizer, _: optimizer not in ("sgd", "adam8bit"),
)
_LION = Reader("galore_lion", lambda optimizer, _: optimizer == "galore_lion")
_ADAM = ("adam", "adamw", "adam8bit")
_MUON = Reader("osd_muon or muon", _rule_is("muon"))
# An optimizer at full rank takes what describes a subspace without reading it, as it takes a rank.
_SCALED = Reader("a galore_* optimizer", lambda optimizer, _: optimizer != "osd_muon")
_RESIDUAL = Reader(
    "a galore_* optimizer, with one side projected (not full),",
    lambda optimizer, proj_type: optimizer.startswith("galore_") and proj_type != "full",
)
_ROWS = Reader("galore_adamw, osd_muon, muon, adam or adamw", _rule_is("adam", "adamw", "muon"))

# Options that some optimizers do not read, with their default and their readers.
OPTIONS: dict[str, tuple[Any, Reader]] = {
    "beta1": (
        None,
        Reader("Adam, Lion, Adafactor or Muon", _rule_is(*_ADAM, "lion", "adafactor", "muon")),
    ),
    "beta2": (None, Reader("Adam, Lion or Muon", _rule_is(*_ADAM, "lion", "muon"))),
    "eps": (None, Reader("Adam or Muon", _rule_is(*_ADAM, "muon"))),
    "momentum": (None, _MUON),
    "nesterov": (False, _MUON),
    "muon_scale": ("adamw", _MUON),
    "ns_dtype": (None, _MUON),
    "scale": (1.0, _SCALED),
    "residual": ("none", _RESIDUAL),
    "residual_scale": (None, _RESIDUAL),
    "growth_limiter": (True, _RESIDUAL),
    "second_moment": ("full", _ROWS),
    "first_moment": ("full", _ROWS),
    "lion_sign": ("lifted", _LION),
    "transport_moments": (False, _MOMENTS),
    "stochastic_rounding": (False, _OWN_STEP),
    "update_proj_every": (1, _ONLINE),
    "penalty": (0.0, _PCA),
    "projector_lr_multiple": (None, _ONLINE),
    "projector_weight_decay": (None, _PCA),
    "peak_lr": (None, _ONLINE),
    "move_projector": ("after", _ONLINE),
    "projector_init": ("svd", _ONLINE),
}


def not_installed(library: str, extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error of a library whose framework is not installed, naming the extra to install.

    Args:
        library: Its name.
        extra: Of pyproject.toml, which installs what the library needs.
        error: What the import of the framework raised.

    Example:
        >>> print(not_installed("osd_jax", "jax", ModuleNotFoundError("No module named 'jax'")))
        osd_jax: No module named 'jax'; pip install 'online-subspace-descent[jax]'
    """
    return ModuleNotFoundError(
        f"{library}: {error}; pip install 'online-subspace-descent[{extra}]'", name=error.name
    )


def check_names(optimizer: str, proj_type: str) -> None:
    """Raises ValueError for an unknown name, naming the choices."""
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    check_choice("proj_type", proj_type, PROJ_TYPES)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: expected True or False")


def check_muon(muon_scale: str, nesterov: bool, momentum: Any) -> None:
    """Raises ValueError for options of Muon out of range, or that a momentum of 0 ignores.

    Args:
        muon_scale: A published name.
        nesterov: Whether momentum is Nesterov's.
        momentum: Its decay; one that is no plain number, such as a traced one, passes.
    """
    check_choice("muon_scale", muon_scale, MUON_SCALES)
    check_flag("nesterov", nesterov)
    if nesterov and isinstance(momentum, numbers.Number) and momentum == 0:
        raise ValueError(
            "nesterov is True: a momentum of 0 keeps no moment, so that it is not read; leave it "
            "out, or give a momentum above 0"
        )


def check_residual(
    residual: str,
    residual_scale: float | None,
    growth_limiter: bool,
    scale: float,
    scale_name: str = "scale",
) -> None:
    """Raises ValueError for an option that the residual's rule would silently ignore."""
    check_choice("residual", residual, tuple(RESIDUALS))
    check_flag("growth_limiter", growth_limiter)
    rule = RESIDUALS[residual]
    given = (
        ("residual_scale", residual_scale, None, rule.scale is not None),
        ("growth_limiter", growth_limiter, True, rule.limits),
        (scale_name, scale, 1.0, rule.reads_scale),
    )
    for name, value, default, is_read in given:
        is_plain = value is None or isinstance(value, (bool, numbers.Number))
        if not is_read and is_plain and value != default:
            raise ValueError(
                f"{name} is {value!r}: residual {residual!r} does not read it; leave it out"
            )


def check_moments(second_moment: str, first_moment: str) -> None:
    """Raises ValueError for unknown forms of the moments of embedding and head."""
    check_choice("second_moment", second_moment, SECOND_MOMENTS)
    check_choice("first_moment", first_moment, FIRST_MOMENTS)
    if first_moment != "full" and second_moment != "row":
        raise ValueError(
            f"first_moment is {first_moment!r}: only second_moment 'row' reads it; leave it "
            "out, or give both"
        )


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
