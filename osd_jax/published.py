"""The published names of bases and residuals as objects, following the table in `osd_names`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from osd_jax.bases import gaussian, oja, online_pca, random, svd
from osd_jax.basis_rule import BasisRule
from osd_jax.composition import in_8bit
from osd_jax.lift import Lift
from osd_jax.numerics import known_zero
from osd_jax.residuals import column_ema, gradient_only, norm_ratio, residual_sign
from osd_jax.rules import (
    Schedule,
    clip_by_matrix_rms,
    scale_by_adam_of_age,
    scale_by_factored_second_moment,
)
from osd_names import PROJECTIONS, ProjectorInit

# Optimizers of P, by the names in `osd_names.PROJECTIONS`.
PROJECTOR_RULES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": scale_by_adam_of_age,
    "adam8bit": lambda: in_8bit(scale_by_adam_of_age()),
    "lion": optax.scale_by_lion,
    "adafactor": lambda: optax.chain(scale_by_factored_second_moment(), clip_by_matrix_rms()),
    "sgd": optax.identity,
}


# Basis rules that set P every k steps, by their names there.
REFRESHED: dict[str, Callable[[int], BasisRule]] = {
    "svd": svd, "random": random, "gaussian": gaussian
}  # fmt: skip
# Lifts by the names in `osd_names.RESIDUALS`: (scale, residual_scale, growth_limiter) -> lift.
RESIDUAL_LIFTS: dict[str, Callable[[Any, Any, bool], Lift | None]] = {
    "none": lambda a, own, limiter: None,
    "norm_ratio": lambda a, own, limiter: norm_ratio(a, limiter=limiter),
    "norm_ratio_released": lambda a, own, limiter: norm_ratio(a, limiter=limiter, release=True),
    "column_ema": lambda a, own, limiter: column_ema(own),
    "gradient_only": lambda a, own, limiter: gradient_only(a, limiter=limiter),
    "gradient_only_matrix": lambda a, own, limiter: gradient_only(a, per="matrix", limiter=limiter),
    "sign": lambda a, own, limiter: residual_sign(own, a),
}


def published_basis(
    proj_type: str,
    *,
    gap: int,
    every: int,
    step_size: Schedule,
    weight_decay: float | None,
    penalty: float,
    order: Any,
    init: ProjectorInit,
) -> BasisRule:
    """The basis rule of a published name."""
    named = PROJECTIONS[proj_type]
    if named.basis in REFRESHED:
        return REFRESHED[named.basis](gap)
    decay = named.weight_decay if weight_decay is None else weight_decay
    optimizer = optax.chain(
        PROJECTOR_RULES[named.rule](),
        optax.identity() if known_zero(decay) else optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(step_size),
    )
    if named.basis == "oja":
        return oja(optimizer, init=init, order=order, every=every)
    if named.basis == "online_pca":
        return online_pca(optimizer, penalty=penalty, init=init, order=order, every=every)
    raise AssertionError(f"no basis rule for {named.basis!r}: add it to published_basis")
