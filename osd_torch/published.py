"""The published names of bases and residuals as objects, following the table in `osd_names`."""

from __future__ import annotations

import functools
from collections.abc import Callable

from osd_names import PROJECTIONS, Order
from osd_torch.bases import gaussian, oja, online_pca, random, svd
from osd_torch.basis_rule import BasisRule
from osd_torch.lift import Lift
from osd_torch.residuals import column_ema, gradient_only, norm_ratio, residual_sign
from osd_torch.rules import SGD, Adafactor, Adam, Lion, Rule
from osd_torch.rules_8bit import Adam8bit

# Optimizers of P, by the names in `osd_names.PROJECTIONS`.
PROJECTOR_RULES: dict[str, Rule] = {
    "adam": Adam(),
    "adam8bit": Adam8bit(),
    "lion": Lion(),
    "adafactor": Adafactor(),
    "sgd": SGD(),
}
# Basis rules that set P every k steps, by their names there.
REFRESHED: dict[str, Callable[[int], BasisRule]] = {
    "svd": svd, "random": random, "gaussian": gaussian
}  # fmt: skip
# Lifts by the names in `osd_names.RESIDUALS`: (scale, residual_scale, growth_limiter) -> lift.
RESIDUAL_LIFTS: dict[str, Callable[[float, float, bool], Lift | None]] = {
    "none": lambda a, own, limiter: None,
    "norm_ratio": lambda a, own, limiter: norm_ratio(a, limiter=limiter),
    "norm_ratio_released": lambda a, own, limiter: norm_ratio(a, limiter=limiter, release=True),
    "column_ema": lambda a, own, limiter: column_ema(own),
    "gradient_only": lambda a, own, limiter: gradient_only(a, limiter=limiter),
    "gradient_only_matrix": lambda a, own, limiter: gradient_only(a, per="matrix", limiter=limiter),
    "sign": lambda a, own, limiter: residual_sign(own, a),
}


@functools.cache
def published_basis(
    proj_type: str, gap: int, every: int, penalty: float, weight_decay: float | None, order: Order
) -> BasisRule:
    """The basis rule that the `BASIS_OPTIONS` describe."""
    named = PROJECTIONS[proj_type]
    if named.basis in REFRESHED:
        return REFRESHED[named.basis](gap)
    if named.basis == "oja":
        return oja(PROJECTOR_RULES[named.rule], order=order, every=every)
    decay = named.weight_decay if weight_decay is None else weight_decay
    rule = PROJECTOR_RULES[named.rule]
    if named.basis == "online_pca":
        return online_pca(rule, penalty=penalty, weight_decay=decay, order=order, every=every)
    raise AssertionError(f"no basis rule for {named.basis!r}: add it to published_basis")
