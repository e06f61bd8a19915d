"""Muon in a subspace (`osd_muon`), and at full rank."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

from osd_jax.adam_of_rows import scale_by_adam_of_rows
from osd_jax.basis_rule import BasisRule
from osd_jax.composition import (
    STATIC_ARGUMENTS,
    Decay,
    Mask,
    ScalarOrSchedule,
    Subspace,
    WeightRule,
    check_betas,
    check_rates,
    decaying,
    descending,
    following,
    in_subspace,
)
from osd_jax.layout import DimensionNumbers, check_basis_dtype
from osd_jax.lift import Lift
from osd_jax.newton_schulz import MUON_COEFFICIENTS, orthogonalize, orthogonalized
from osd_jax.numerics import check_number, known_zero
from osd_jax.quantization import quantize_state
from osd_jax.residuals import add_gradient
from osd_jax.rules import decay_before_update, in_float32, on_matrices
from osd_jax.selection import Select
from osd_jax.subspace import SubspaceTransformation
from osd_names import FirstMoment, MuonScale, SecondMoment, Side, check_moments, check_muon

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
    second_moment: SecondMoment = "full",
    first_moment: FirstMoment = "full",
    ns_steps: int = 5,
    ns_coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    ns_dtype: jax.typing.DTypeLike | None = None,
    muon_scale: MuonScale = "adamw",
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
        entry of the longer axis; see `scale_by_adam_of_rows`. Stacked vectors, such as the norms of
        all layers, must then be declared in `dimension_numbers`.
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
    shared = Subspace(
        rank, weight_decay, mask, basis, lift, side, select, dimension_numbers,
        stochastic_rounding, basis_dtype, seed,
    )  # fmt: skip
    return in_subspace(
        muon_rule(
            learning_rate,
            full_lr,
            functools.partial(decaying, weight_decay, mask),
            by_us,
            trace=scale_by_momentum(momentum, nesterov, in_8bit=first_moment == "8bit"),
            adam=_adam_of_others(b1, b2, eps, second_moment, first_moment, dimension_numbers),
        ),
        shared,
        following(transport_moments, b1, b2, rounding="nearest"),
    )


def _adam_of_others(
    b1: Any,
    b2: Any,
    eps: Any,
    second_moment: SecondMoment,
    first_moment: FirstMoment,
    dimension_numbers: DimensionNumbers,
) -> optax.GradientTransformation:
    """Adam for the parameters that are not projected."""
    check_moments(second_moment, first_moment)
    if second_moment == "full":
        return optax.scale_by_adam(b1, b2, eps)
    return scale_by_adam_of_rows(
        b1, b2, eps, first_8bit=first_moment == "8bit", dimension_numbers=dimension_numbers
    )


def muon_rule(
    lr: Any,
    full_lr: Any,
    decay: Decay,
    lift: Lift,
    *,
    trace: optax.GradientTransformation,
    adam: optax.GradientTransformation,
) -> WeightRule:
    """Momentum in the subspace, AdamW with its own learning rate elsewhere; decay before both.

    Args:
      lr: Learning rate of projected parameters.
      full_lr: Learning rate of all other parameters.
      decay: What decays.
      lift: A lift, such as `orthogonalized(...)`.
      trace: The momentum; see `scale_by_momentum`.
      adam: The rule of all other parameters.
    """
    decayed = lambda tx, lr: optax.chain(descending(tx, lr), decay(decay_before_update, lr))
    return WeightRule(
        trace,
        lambda decay: optax.identity(),
        lift=lift,
        full_rank=decayed(adam, full_lr),
        after_lift=lambda subspace: decayed(subspace, lr),
    )


def scale_by_momentum(
    momentum: Any, nesterov: bool, *, in_8bit: bool = False
) -> optax.GradientTransformation:
    """`optax.trace`; without a moment if the momentum is 0, or with an 8-bit moment."""
    if known_zero(momentum):
        return optax.identity()
    trace = optax.trace(momentum, nesterov)
    return in_float32(quantize_state(trace, rounding="nearest")) if in_8bit else trace


def full_rank_muon(
    lr: Any,
    decay: Decay,
    trace: optax.GradientTransformation,
    dimension_numbers: DimensionNumbers,
    options: dict[str, Any],
) -> optax.GradientTransformation:
    """Muon: orthogonalized momentum; weight decay before the update."""
    by_us = lambda x: orthogonalize(x, "input", **options)
    orthogonal = optax.stateless(lambda updates, params: jax.tree.map(by_us, updates))
    tx = on_matrices(optax.chain(trace, orthogonal), dimension_numbers)
    return optax.chain(descending(tx, lr), decay(decay_before_update, lr))
