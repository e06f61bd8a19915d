"""One table of the published names: optimizers, projections, and the options that each reads.

`osd_jax.make_optimizer` and `osd_torch.make_optimizer` turn these names into their own objects. The
trainers' flags, the README's table and the tests' oracle import the names and constants from here,
and both libraries import their version. This module imports no framework.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

__version__ = "0.1.0"  # shared by both libraries and read by pyproject.toml

# The choices of an option: a `Literal` for annotations, and from it the tuple for checks and flags.
Side = Literal["shorter", "longer", "input", "output", "both"]
ResolvedSide = Literal["input", "output", "both"]  # with "shorter" and "longer" resolved
Order = Literal["after", "before"]
LionSign = Literal["lifted", "subspace"]
MuonScale = Literal["adamw", "muon", "none"]
SecondMoment = Literal["full", "row"]
FirstMoment = Literal["full", "8bit"]
ProjectorInit = Literal["svd", "qr"]
Attention = Literal["auto", "written_out", "blockwise", "cudnn", "splash"]
SIDES = get_args(Side)
MOVE_PROJECTOR = get_args(Order)
LION_SIGNS = get_args(LionSign)
MUON_SCALES = get_args(MuonScale)
SECOND_MOMENTS = get_args(SecondMoment)
FIRST_MOMENTS = get_args(FirstMoment)
PROJECTOR_INITS = get_args(ProjectorInit)
ATTENTIONS = get_args(Attention)


class Optimizer(NamedTuple):
    """The meaning of an optimizer's name.

    Attributes:
        rule: The weight rule: "adam", "adamw", "lion", "adafactor", "adam8bit", "sgd" or "muon".
        is_projected: Whether it trains the selected matrices in a subspace; all other parameters
            are trained at full rank.
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
    """The meaning of a `proj_type`.

    Attributes:
        side: The side of a weight (output, input) that P projects; "shorter" is input if both are
            equal.
        basis: The basis rule: "svd", "random" or "gaussian", which set P every `update_proj_gap`
            steps, or one of `MOVING_BASES`, which move P.
        rule: The optimizer of P, if P moves.
        weight_decay: The weight decay of P in the release.
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

# Basis rules that move P.
MOVING_BASES = ("online_pca", "oja")

SUBSPACE_OPTIMIZERS = tuple(name for name, x in OPTIMIZERS.items() if x.is_projected)
FULL_RANK_OPTIMIZERS = tuple(name for name, x in OPTIMIZERS.items() if not x.is_projected)
PROJ_TYPES = tuple(PROJECTIONS)
MOMENTUM = 0.95  # default momentum of Muon


class Residual(NamedTuple):
    """The meaning of a `residual`: a lift that adds the part of the gradient outside the subspace.

    Attributes:
        scale: Default of `residual_scale`; None if it does not read this option.
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


class Reader(NamedTuple):
    """The optimizers that read an option.

    Attributes:
        who: A description for error messages.
        reads: (optimizer, proj_type) -> whether this combination reads the option.
    """

    who: str
    reads: Callable[[str, str], bool]


def is_online(optimizer: str, proj_type: str) -> bool:
    """Whether P moves with the gradients."""
    moves = PROJECTIONS[proj_type].basis in MOVING_BASES
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
    lambda optimizer, proj_type: (
        is_online(optimizer, proj_type) and PROJECTIONS[proj_type].basis == "online_pca"
    ),
)
_OWN_STEP = Reader(
    "an optimizer of this project (sgd and adam8bit are torch's and bitsandbytes' own in PyTorch)",
    lambda optimizer, _: optimizer not in ("sgd", "adam8bit"),
)
_LION = Reader("galore_lion", lambda optimizer, _: optimizer == "galore_lion")
_ADAM = ("adam", "adamw", "adam8bit")
_MUON = Reader("osd_muon or muon", _rule_is("muon"))
# A full-rank optimizer accepts the options of a subspace, such as a rank, and ignores them.
_SCALED = Reader("a galore_* optimizer", lambda optimizer, _: optimizer != "osd_muon")
_RESIDUAL = Reader(
    "a galore_* optimizer, with one side projected (not full),",
    lambda optimizer, proj_type: optimizer.startswith("galore_") and proj_type != "full",
)
_ROWS = Reader("galore_adamw, osd_muon, muon, adam or adamw", _rule_is("adam", "adamw", "muon"))

# Options that some optimizers do not read: their default and their readers.
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
    """The error for a library whose framework is not installed; it names the extra to install.

    Args:
        library: Name of the library.
        extra: The extra of pyproject.toml that installs its dependencies.
        error: The error of the framework's import.

    Example:
        >>> print(not_installed("osd_jax", "jax", ModuleNotFoundError("No module named 'jax'")))
        osd_jax: No module named 'jax'; pip install 'online-subspace-descent[jax]'
    """
    return ModuleNotFoundError(
        f"{library}: {error}; pip install 'online-subspace-descent[{extra}]'", name=error.name
    )


def check_names(optimizer: str, proj_type: str) -> None:
    """Raises ValueError for an unknown name and lists the choices."""
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
    """Raises ValueError for options of Muon that are out of range or ignored with a momentum of 0.

    Args:
        muon_scale: One of `MUON_SCALES`.
        nesterov: Whether to use Nesterov momentum.
        momentum: Decay of the momentum; only a plain number is checked, not a traced one.
    """
    check_choice("muon_scale", muon_scale, MUON_SCALES)
    check_flag("nesterov", nesterov)
    if nesterov and isinstance(momentum, numbers.Number) and momentum == 0:
        raise ValueError(
            "nesterov is True, but a momentum of 0 keeps no moment and ignores it; leave it out, "
            "or give a momentum above 0"
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
    """Raises ValueError for invalid moment options of embedding and head."""
    check_choice("second_moment", second_moment, SECOND_MOMENTS)
    check_choice("first_moment", first_moment, FIRST_MOMENTS)
    if first_moment != "full" and second_moment != "row":
        raise ValueError(
            f"first_moment is {first_moment!r}: only second_moment 'row' reads it; leave it out, "
            "or give both"
        )


def check_read(optimizer: str, proj_type: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that the optimizer would silently ignore.

    Args:
        optimizer: A published name.
        proj_type: A published name.
        options: Values by name; only plain values are checked, not traced numbers.
    """
    for name, value in options.items():
        default, reader = OPTIONS[name]
        is_given = isinstance(value, (str, numbers.Number)) and value != default
        if is_given and not reader.reads(optimizer, proj_type):
            raise ValueError(f"{name} is {value!r}: only {reader.who} reads it; leave it out")
