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

import jax

from osd_jax.adam_of_rows import scale_by_adam_of_rows
from osd_jax.basis_rule import BasisRule
from osd_jax.composition import (
    Mask,
    ScalarOrSchedule,
    Subspace,
    adafactor_rule,
    adam8bit_rule,
    adamw_rule,
    apart,
    check_betas,
    check_rates,
    decaying,
    descending,
    following,
    in_subspace,
    is_linear,
    lion_rule,
)
from osd_jax.layout import DimensionNumbers
from osd_jax.lift import Lift
from osd_jax.selection import Select
from osd_jax.subspace import SubspaceTransformation
from osd_names import FirstMoment, SecondMoment, Side, check_moments


def osd_adamw(
    learning_rate: ScalarOrSchedule,
    *,
    rank: int,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    second_moment: SecondMoment = "full",
    first_moment: FirstMoment = "full",
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
        entry of the longer axis; see `scale_by_adam_of_rows`. Stacked vectors, such as the norms of
        all layers, must then be declared in `dimension_numbers`.
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
    shared = Subspace(
        rank, weight_decay, mask, basis, lift, side, select, dimension_numbers,
        stochastic_rounding, basis_dtype, seed,
    )  # fmt: skip
    rule = adamw_rule(learning_rate, b1, b2, eps, linear=is_linear(lift))
    check_moments(second_moment, first_moment)
    if second_moment == "row":
        by_rows = scale_by_adam_of_rows(
            b1, b2, eps,
            first_8bit=first_moment == "8bit", dimension_numbers=dimension_numbers,
        )  # fmt: skip
        others = adamw_rule(learning_rate)._replace(low_rank=descending(by_rows, learning_rate))
        rule = apart(rule, others, functools.partial(decaying, weight_decay, mask))
    return in_subspace(
        rule,
        shared,
        following(transport_moments, b1, b2),
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
    shared = Subspace(
        rank, weight_decay, mask, basis, lift, side, select, dimension_numbers,
        stochastic_rounding, basis_dtype, seed,
    )  # fmt: skip
    return in_subspace(
        adam8bit_rule(learning_rate, b1, b2, eps, linear=is_linear(lift)),
        shared,
        following(transport_moments, b1, b2),
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
    shared = Subspace(
        rank, weight_decay, mask, basis, lift, side, select, dimension_numbers,
        stochastic_rounding, basis_dtype, seed,
    )  # fmt: skip
    return in_subspace(
        lion_rule(learning_rate, b1, b2, sign="lifted" if lift is None else "subspace"),
        shared,
        following(transport_moments, b1, b2),
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
    shared = Subspace(
        rank, weight_decay, mask, basis, lift, side, select, dimension_numbers,
        stochastic_rounding, basis_dtype, seed,
    )  # fmt: skip
    return in_subspace(
        adafactor_rule(learning_rate, b1, linear=is_linear(lift)),
        shared,
        None,
    )
