"""The published rules at full rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from osd_jax.composition import Decay, in_8bit
from osd_jax.layout import DimensionNumbers
from osd_jax.numerics import known_zero
from osd_jax.rules import (
    Schedule,
    decay_after_update,
    decay_before_update,
    on_matrices,
    scale_by_adafactor,
)


def full_rank_rule(
    kind: str,
    lr: Schedule,
    by_rows: Callable[[], optax.GradientTransformation] | None = None,
    *,
    decay: Decay,
    adam: tuple[Any, Any, Any],
    beta1: Any,
    dimension_numbers: DimensionNumbers,
    slice_size: int | None,
) -> optax.GradientTransformation:
    """A rule at full rank.

    Args:
      kind: As in `osd_names.Optimizer`.
      lr: Learning rate.
      by_rows: Builds the replacement of Adam.
      decay: What decays.
      adam: b1, b2 and eps.
      beta1: The beta1 of Adafactor.
      dimension_numbers: Matrix axes.
      slice_size: See `make_optimizer`.
    """
    descend = optax.scale_by_learning_rate(lr)
    l2 = decay(_l2, lr)
    match kind:
        case "adam":  # torch.optim.Adam: L2 on the gradient
            return optax.chain(l2, by_rows() if by_rows else optax.scale_by_adam(*adam), descend)
        case "adamw":  # torch.optim.AdamW: decoupled, before the update
            return optax.chain(by_rows() if by_rows else optax.scale_by_adam(*adam), l2, descend)
        case "lion":
            return optax.chain(
                optax.scale_by_lion(*adam[:2]), descend, decay(decay_after_update, lr)
            )
        case "adafactor":
            rule = on_matrices(scale_by_adafactor(lr, beta1), dimension_numbers)
            return optax.chain(rule, optax.scale(-1.0), decay(decay_before_update, lr))
        case "adam8bit":  # bitsandbytes' Adam8bit: weight decay is decoupled
            tx = in_8bit(optax.scale_by_adam(*adam), slice_size)
            return optax.chain(on_matrices(tx, dimension_numbers), l2, descend)
        case "sgd":
            return optax.chain(l2, descend)
    raise AssertionError(kind)


def _l2(weight_decay: Any, learning_rate: Any) -> optax.GradientTransformation:
    """Weight decay added to the updates and multiplied by the learning rate that follows."""
    if known_zero(weight_decay):
        return optax.identity()
    return optax.add_decayed_weights(weight_decay)
