"""Optax aliases: Online Subspace Descent with AdamW, Lion, Adafactor or Muon.

Each takes the learning rate first, a number or a schedule, then its own numbers under Optax's
names, and the rules of the subspace as objects. Selected parameters are projected; all others are
trained by the same rule at full rank (by AdamW for Muon). For the published names and flags see
`make_optimizer`.

`optax.inject_hyperparams(osd_adamw, static_args=STATIC_ARGUMENTS)` keeps the numbers in its state;
use `MUON_STATIC_ARGUMENTS` for `osd_muon`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from osd_jax.bases import BasisRule, online_pca
from osd_jax.composition import (
    WeightRule,
    adafactor_rule,
    adam8bit_rule,
    adamw_rule,
    apart,
    check_betas,
    composed,
    decaying,
    descending,
    lion_rule,
    muon_rule,
    scale_by_momentum,
)
from osd_jax.layout import DimensionNumbers, Side, check_basis_dtype
from osd_jax.lift import Lift, scaled
from osd_jax.numerics import check_number, check_object, check_static
from osd_jax.quantization import Rounding
from osd_jax.residuals import MUON_COEFFICIENTS, add_gradient, orthogonalized
from osd_jax.rules import scale_by_adam_of_age, scale_by_adam_of_rows
from osd_jax.selection import LinearSelection, Select
from osd_jax.subspace import SubspaceTransformation
from osd_jax.transport import Transport
from osd_jax.transport import transport_moments as follow_basis
from osd_names import check_flag, check_moments, check_muon

ScalarOrSchedule = jax.typing.ArrayLike | Callable[[Any], Any]
Mask = Any | Callable[[optax.Params], Any] | None

# Arguments that determine which computation is built: `static_args` of `optax.inject_hyperparams`.
STATIC_ARGUMENTS = (
    "rank",
    "mask",
    "basis",
    "lift",
    "side",
    "select",
    "dimension_numbers",
    "transport_moments",
    "stochastic_rounding",
    "basis_dtype",
    "seed",
)
MUON_STATIC_ARGUMENTS = (
    *STATIC_ARGUMENTS,
    "nesterov",
    "second_moment",
    "first_moment",
    "ns_steps",
    "ns_coefficients",
    "ns_dtype",
    "muon_scale",
)


def osd_adamw(
    learning_rate: ScalarOrSchedule,
    *,
    rank: int,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    second_moment: str = "full",
    first_moment: str = "full",
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    basis: BasisRule | None = None,
    lift: Lift | None = None,
    side: Side = "shorter",
    select: Select | None = None,
    dimension_numbers: DimensionNumbers = None,
    transport_moments: bool = False,
    stochastic_rounding: bool = False,
    basis_dtype: jax.typing.DTypeLike | None = None,
    seed: int = 0,
) -> SubspaceTransformation:
    """AdamW in a subspace: `R = P^T G`, `W <- (1 - lr wd) (W - lr * lift(Adam(R)))`.

    As in the release, epsilon is added to the root of the second moment before bias correction.

    Args:
      learning_rate: A number or a schedule, (step, from 0) -> number.
      rank: Number of columns of P; at most min(m, n) are used.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      second_moment: For matrices that are not projected: "full", or "row", one number for each
        entry of the longer axis; see `scale_by_adam_of_rows`.
      first_moment: For these matrices with "row": "full", or "8bit".
      weight_decay: Decoupled, multiplied by the learning rate, after the update.
      mask: A tree of bool like the parameters, or a function from them to one: what has weight
        decay. None: all parameters.
      basis: The basis rule, such as `online_pca(optax.adam(5e-3))`, `svd(200)` or `random(200)`.
        None: online PCA by Adam with step size 5e-3, like `continuous` of `make_optimizer` at its
        default gap, but without weight decay.
      lift: Turns a direction into an update of W, such as `scaled(0.25)`. None: `scaled(1)`.
      side: The side of a matrix that P projects; see `scale_by_subspace`.
      select: (path, parameter) -> whether it is projected; see `make_optimizer`.
      dimension_numbers: Matrix axes; see `scale_by_subspace`. None: those of `select_linear`,
        otherwise 2-D arrays are (input, output).
      transport_moments: Whether moments follow changes of P; see `osd_jax.transport_moments`.
      stochastic_rounding: Whether to round bfloat16 weights up or down at random, so that the
        expectation is the float32 weight; see `make_optimizer`.
      basis_dtype: dtype of P. None: float32 (float64 for float64 parameters).
      seed: Seed of random basis rules and of stochastic rounding.

    Returns:
      An Optax transformation like that of `make_optimizer`: `update` requires `params`, and a step
      with a non-finite gradient changes nothing and is counted (`skipped_steps`).

    Raises:
      ValueError: An argument is out of range; the message names it.

    References:
      Liang et al., arXiv 2408.12857, algorithm 1.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> params = {"mlp": {"kernel": jnp.ones((16, 24))}, "norm": jnp.ones(16)}
      >>> tx = osd_jax.osd_adamw(
      ...     optax.cosine_decay_schedule(1e-2, 100), rank=4, b2=0.95, weight_decay=0.1,
      ...     basis=osd_jax.online_pca(optax.adam(5e-3), penalty=0.1), lift=osd_jax.scaled(0.25))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> osd_jax.projectors(state)["mlp/kernel"].shape
      (16, 4)
    """
    check_rates(learning_rate, weight_decay, rank, eps=eps)
    check_betas(b1=b1, b2=b2)
    shared = Shared(
        rank, weight_decay, mask, basis, lift, side, select, dimension_numbers,
        stochastic_rounding, basis_dtype, seed,
    )  # fmt: skip
    rule = adamw_rule(learning_rate, b1, b2, eps, linear=is_linear(lift))
    check_moments(second_moment, first_moment)
    if second_moment == "row":
        by_rows = scale_by_adam_of_rows(b1, b2, eps, first_8bit=first_moment == "8bit")
        others = adamw_rule(learning_rate)._replace(low_rank=descending(by_rows, learning_rate))
        rule = apart(rule, others, functools.partial(decaying, weight_decay, mask))
    return _composed(
        rule,
        shared,
        _following(transport_moments, b1, b2),
    )


def osd_adamw8bit(
    learning_rate: ScalarOrSchedule,
    *,
    rank: int,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    basis: BasisRule | None = None,
    lift: Lift | None = None,
    side: Side = "shorter",
    select: Select | None = None,
    dimension_numbers: DimensionNumbers = None,
    transport_moments: bool = False,
    stochastic_rounding: bool = False,
    basis_dtype: jax.typing.DTypeLike | None = None,
    seed: int = 0,
) -> SubspaceTransformation:
    """`osd_adamw` with 8-bit moments (`quantize_state`); epsilon is added after bias correction.

    Args:
      learning_rate: A number or a schedule.
      rank: Number of columns of P.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled, multiplied by the learning rate, after the update.
      mask: What has weight decay; this and the following arguments as in `osd_adamw`.
      basis: The basis rule.
      lift: Turns a direction into an update of W.
      side: The side of a matrix that P projects.
      select: Which parameters are projected.
      dimension_numbers: Matrix axes.
      transport_moments: Whether moments follow changes of P.
      stochastic_rounding: Whether bfloat16 weights are rounded stochastically.
      basis_dtype: dtype of P.
      seed: Seed of random basis rules and of stochastic rounding.

    Returns:
      See `osd_adamw`.

    Raises:
      ValueError: An argument is out of range; the message names it.

    References:
      Dettmers et al., arXiv 2110.02861.

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> tx = osd_jax.osd_adamw8bit(1e-2, rank=4)
      >>> state = tx.init({"mlp": {"kernel": jnp.ones((16, 24))}})
    """
    check_rates(learning_rate, weight_decay, rank, eps=eps)
    check_betas(b1=b1, b2=b2)
    shared = Shared(
        rank, weight_decay, mask, basis, lift, side, select, dimension_numbers,
        stochastic_rounding, basis_dtype, seed,
    )  # fmt: skip
    return _composed(
        adam8bit_rule(learning_rate, b1, b2, eps, linear=is_linear(lift)),
        shared,
        _following(transport_moments, b1, b2),
    )


def osd_lion(
    learning_rate: ScalarOrSchedule,
    *,
    rank: int,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    basis: BasisRule | None = None,
    lift: Lift | None = None,
    side: Side = "shorter",
    select: Select | None = None,
    dimension_numbers: DimensionNumbers = None,
    transport_moments: bool = False,
    stochastic_rounding: bool = False,
    basis_dtype: jax.typing.DTypeLike | None = None,
    seed: int = 0,
) -> SubspaceTransformation:
    """Lion in a subspace: `D = b1 m + (1 - b1) R`, `m <- b2 m + (1 - b2) R`, `W <- W - lr lift(D)`.

    Without `lift` the sign is applied after the lift, `sign(P D)`, as in the release. With a lift,
    such as `lift=scaled(1.0)`, it is applied to the low-rank direction, as in the paper.

    Args:
      learning_rate: A number or a schedule.
      rank: Number of columns of P.
      b1: Weight of the moment in the direction.
      b2: Decay of the moment.
      weight_decay: Decoupled, multiplied by the learning rate, after the update.
      mask: What has weight decay; this and the following arguments as in `osd_adamw`.
      basis: The basis rule.
      lift: Turns a direction into an update of W. None: `sign_after_lift()`.
      side: The side of a matrix that P projects.
      select: Which parameters are projected.
      dimension_numbers: Matrix axes.
      transport_moments: Whether the moment follows changes of P.
      stochastic_rounding: Whether bfloat16 weights are rounded stochastically.
      basis_dtype: dtype of P.
      seed: Seed of random basis rules and of stochastic rounding.

    Returns:
      See `osd_adamw`.

    Raises:
      ValueError: An argument is out of range; the message names it.

    References:
      Chen et al., arXiv 2302.06675.

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> tx = osd_jax.osd_lion(1e-3, rank=4, weight_decay=0.1)
      >>> state = tx.init({"mlp": {"kernel": jnp.ones((16, 24))}})
    """
    check_rates(learning_rate, weight_decay, rank)
    check_betas(b1=b1, b2=b2)
    shared = Shared(
        rank, weight_decay, mask, basis, lift, side, select, dimension_numbers,
        stochastic_rounding, basis_dtype, seed,
    )  # fmt: skip
    return _composed(
        lion_rule(learning_rate, b1, b2, sign="lifted" if lift is None else "subspace"),
        shared,
        _following(transport_moments, b1, b2),
    )


def osd_adafactor(
    learning_rate: ScalarOrSchedule,
    *,
    rank: int,
    b1: jax.typing.ArrayLike | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    basis: BasisRule | None = None,
    lift: Lift | None = None,
    side: Side = "shorter",
    select: Select | None = None,
    dimension_numbers: DimensionNumbers = None,
    transport_moments: bool = False,
    stochastic_rounding: bool = False,
    basis_dtype: jax.typing.DTypeLike | None = None,
    seed: int = 0,
) -> SubspaceTransformation:
    """Adafactor in a subspace, with a given step size.

    Args:
      learning_rate: A number or a schedule.
      rank: Number of columns of P.
      b1: Decay of the first moment. None: no first moment.
      weight_decay: Decoupled, multiplied by the learning rate, before the update.
      mask: What has weight decay; this and the following arguments as in `osd_adamw`.
      basis: The basis rule.
      lift: Turns a direction into an update of W.
      side: The side of a matrix that P projects.
      select: Which parameters are projected.
      dimension_numbers: Matrix axes.
      transport_moments: True raises: a factored second moment cannot follow P.
      stochastic_rounding: Whether bfloat16 weights are rounded stochastically.
      basis_dtype: dtype of P.
      seed: Seed of random basis rules and of stochastic rounding.

    Returns:
      See `osd_adamw`.

    Raises:
      ValueError: An argument is out of range; the message names it.

    References:
      Shazeer and Stern, arXiv 1804.04235.

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> tx = osd_jax.osd_adafactor(1e-3, rank=4, b1=0.9)
      >>> state = tx.init({"mlp": {"kernel": jnp.ones((16, 24))}})
    """
    check_rates(learning_rate, weight_decay, rank)
    if b1 is not None:
        check_betas(b1=b1)
    if transport_moments:
        raise ValueError(
            "transport_moments is True, but Adafactor's factored second moment cannot follow P: "
            "use another optimizer, or leave it out"
        )
    shared = Shared(
        rank, weight_decay, mask, basis, lift, side, select, dimension_numbers,
        stochastic_rounding, basis_dtype, seed,
    )  # fmt: skip
    return _composed(
        adafactor_rule(learning_rate, b1, linear=is_linear(lift)),
        shared,
        None,
    )


def osd_muon(
    learning_rate: ScalarOrSchedule,
    *,
    rank: int,
    momentum: jax.typing.ArrayLike = 0.95,
    nesterov: bool = False,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    full_lr: ScalarOrSchedule | None = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    second_moment: str = "full",
    first_moment: str = "full",
    ns_steps: int = 5,
    ns_coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    ns_dtype: jax.typing.DTypeLike | None = None,
    muon_scale: str = "adamw",
    basis: BasisRule | None = None,
    lift: Lift | None = None,
    side: Side = "shorter",
    select: Select | None = None,
    dimension_numbers: DimensionNumbers = None,
    transport_moments: bool = False,
    stochastic_rounding: bool = False,
    basis_dtype: jax.typing.DTypeLike | None = None,
    seed: int = 0,
) -> SubspaceTransformation:
    """Momentum in a subspace plus the full gradient, orthogonalized; weight decay first.

        m <- b m + R,   R = P^T M
        W <- (1 - lr wd) W - lr s O(M + P (D - R))

    for a projected matrix. D is m, or `R + b m` with Nesterov momentum; O moves all singular values
    close to 1 (Newton-Schulz); s is a scale. With a full-rank P this is Muon. Parameters that are
    not projected are trained by AdamW.

    The state of a projected (m, n) matrix is r max(m, n) numbers for m, r min(m, n) for P, and the
    state of P's optimizer.

    Args:
      learning_rate: Learning rate of the projected matrices, a number or a schedule.
      rank: Number of columns of P.
      momentum: b.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Decoupled, multiplied by the learning rate, before the update.
      mask: What has weight decay, as in `osd_adamw`.
      full_lr: Learning rate of the parameters that are not projected. None: `learning_rate`.
      b1: AdamW's b1 for the parameters that are not projected.
      b2: AdamW's b2 for these.
      eps: AdamW's eps for these; added to the root of the second moment after bias correction.
      second_moment: For matrices that are not projected: "full", or "row", one number for each
        entry of the longer axis; see `scale_by_adam_of_rows`.
      first_moment: "full", or "8bit" for the first moment of these matrices with "row", and for the
        momentum.
      ns_steps: Number of Newton-Schulz steps.
      ns_coefficients: Coefficients of its polynomial.
      ns_dtype: Dtype of the iteration; None: float32 or float64.
      muon_scale: "adamw", "muon" or "none"; see `orthogonalized`.
      basis: The basis rule; this and the following arguments as in `osd_adamw`.
      lift: Turns a direction into an update of W, instead of `orthogonalized(add_gradient(), ...)`
        with the options above.
      side: The side of a matrix that P projects.
      select: Which parameters are projected.
      dimension_numbers: Matrix axes.
      transport_moments: Whether the momentum follows changes of P.
      stochastic_rounding: Whether bfloat16 weights are rounded stochastically.
      basis_dtype: dtype of P.
      seed: Seed of random basis rules and of stochastic rounding.

    Returns:
      See `osd_adamw`.

    Raises:
      ValueError: An argument is out of range; the message names it.

    References:
      Muon (https://kellerjordan.github.io/posts/muon/; scale "adamw" of arXiv 2502.16982) on the
      subspace of arXiv 2408.12857.

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> params = {"mlp": {"kernel": jnp.ones((16, 24))}, "norm": jnp.ones(16)}
      >>> tx = osd_jax.osd_muon(0.02, rank=4, momentum=0.8, full_lr=0.01)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> osd_jax.projectors(state)["mlp/kernel"].shape
      (16, 4)
    """
    full_lr = learning_rate if full_lr is None else full_lr
    check_rates(learning_rate, weight_decay, rank, eps=eps)
    if not callable(full_lr):
        check_number("full_lr", full_lr)
    check_betas(momentum=momentum, b1=b1, b2=b2)
    check_muon(muon_scale, nesterov, momentum)
    check_basis_dtype(ns_dtype, "ns_dtype")
    options: dict[str, Any] = {
        "steps": ns_steps,
        "coefficients": ns_coefficients,
        "dtype": ns_dtype,
        "scale": muon_scale,
    }
    if lift is not None and tuple(options.values()) != (5, MUON_COEFFICIENTS, None, "adamw"):
        raise ValueError(
            "lift is given, so ns_steps, ns_coefficients, ns_dtype and muon_scale are not read: "
            "leave them out, or pass them to orthogonalized(...)"
        )
    by_us = orthogonalized(add_gradient(), **options)
    shared = Shared(
        rank, weight_decay, mask, basis, lift, side, select, dimension_numbers,
        stochastic_rounding, basis_dtype, seed,
    )  # fmt: skip
    return _composed(
        muon_rule(
            learning_rate,
            full_lr,
            functools.partial(decaying, weight_decay, mask),
            by_us,
            trace=scale_by_momentum(momentum, nesterov, in_8bit=first_moment == "8bit"),
            adam=_adam_of_others(b1, b2, eps, second_moment, first_moment),
        ),
        shared,
        _following(transport_moments, b1, b2, rounding="nearest"),
    )


class Shared(NamedTuple):
    """Arguments that all optimizers here share; see `osd_adamw`."""

    rank: int
    weight_decay: Any
    mask: Mask
    basis: BasisRule | None
    lift: Lift | None
    side: Side
    select: Select | None
    dimension_numbers: DimensionNumbers
    stochastic_rounding: bool
    basis_dtype: Any
    seed: int


def _composed(
    rule: WeightRule, shared: Shared, transport: Transport | None
) -> SubspaceTransformation:
    if shared.basis is not None:
        check_object("basis", shared.basis, BasisRule, "online_pca(optax.adam(5e-3))", "None or a")
    if shared.lift is not None:
        check_object("lift", shared.lift, Lift, "scaled(0.25)", "None or a")
    check_flag("stochastic_rounding", shared.stochastic_rounding)
    select, numbers = shared.select, shared.dimension_numbers
    if select is not None and not callable(select):
        raise ValueError(
            f"select is {select!r}: expected None or a function (path, parameter) -> bool"
        )
    if numbers is None and isinstance(select, LinearSelection):
        numbers = select.dimension_numbers
    by_adam = optax.chain(scale_by_adam_of_age(), optax.scale(-5e-3))
    return composed(
        rule,
        shared.basis or online_pca(by_adam),
        rank=shared.rank,
        lift=shared.lift or rule.lift or scaled(1.0),
        decay=functools.partial(decaying, shared.weight_decay, shared.mask),
        side=shared.side,
        select=select,
        dimension_numbers=numbers,
        seed=shared.seed,
        basis_dtype=shared.basis_dtype,
        transport=transport,
        stochastic_rounding=shared.stochastic_rounding,
    )


def _following(
    transport_moments: Any, b1: Any, b2: Any, rounding: Rounding = "table"
) -> Transport | None:
    check_flag("transport_moments", transport_moments)
    return follow_basis(b1, b2, rounding=rounding) if transport_moments else None


def _adam_of_others(
    b1: Any, b2: Any, eps: Any, second_moment: str, first_moment: str
) -> optax.GradientTransformation:
    """Adam for the parameters that are not projected."""
    check_moments(second_moment, first_moment)
    if second_moment == "full":
        return optax.scale_by_adam(b1, b2, eps)
    return scale_by_adam_of_rows(b1, b2, eps, first_8bit=first_moment == "8bit")


def is_linear(lift: Any) -> bool:
    """Whether the learning rate can be applied before the lift; for None the optimizer decides."""
    return lift is None or (isinstance(lift, Lift) and lift.linear)


def check_rates(learning_rate: Any, weight_decay: Any, rank: Any, **numbers: Any) -> None:
    """Raises ValueError for a negative number, or an array where a plain number is required."""
    check_static("rank", rank, STATIC_ARGUMENTS)
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate)
    for name, value in {"weight_decay": weight_decay, **numbers}.items():
        check_number(name, value)
