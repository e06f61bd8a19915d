"""Options as the keywords of the libraries' functions, which are alike in both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from launch.trainer.cli import UsageError
from launch.trainer.options import Options


def schedule_options(options: Options) -> dict[str, Any]:
    """The keywords of either library's `learning_rate_schedule`."""
    return {
        "num_training_steps": options.optimizer.num_training_steps,
        "warmup_steps": options.optimizer.warmup_steps,
        "min_lr_ratio": options.optimizer.min_lr_ratio,
        "cycle_length": options.optimizer.cycle_length,
        "restart_warmup_steps": options.optimizer.restart_warmup_steps or 0,
    }


def optimizer_options(options: Options) -> dict[str, Any]:
    """The keywords that either library's `make_optimizer` takes, but the learning rate."""
    return {
        "rank": options.subspace.rank,
        "update_proj_gap": options.subspace.update_proj_gap,
        "update_proj_every": options.subspace.update_proj_every,
        "scale": options.subspace.galore_scale,
        "weight_decay": options.optimizer.weight_decay,
        "no_decay": has_words(options.optimizer.no_decay),
        "beta1": options.optimizer.beta1 or None,
        "beta2": options.optimizer.beta2,
        "eps": options.optimizer.eps,
        "full_lr": options.optimizer.full_lr,
        "momentum": options.optimizer.momentum,
        "nesterov": options.optimizer.nesterov,
        "muon_scale": options.optimizer.muon_scale,
        "residual": options.subspace.residual,
        "residual_scale": options.subspace.residual_scale,
        "growth_limiter": options.subspace.growth_limiter,
        "second_moment": options.optimizer.second_moment,
        "first_moment": options.optimizer.first_moment,
        "seed": options.run.seed,
        "penalty": options.subspace.penalty,
        "projector_lr_multiple": options.subspace.projector_lr_multiple,
        "projector_weight_decay": options.subspace.projector_weight_decay,
        "lion_sign": options.subspace.lion_sign,
        "move_projector": options.subspace.move_projector,
        "transport_moments": options.subspace.transport_moments,
        "stochastic_rounding": options.optimizer.stochastic_rounding,
    }


def check_words(words: str | None, names: Iterable[str]) -> None:
    """Raises UsageError for a word of `--no_decay` that no parameter's name has in it."""
    known = list(names)
    for word in map(str.strip, words.split(",") if words else ()):
        if not any(word in name for name in known):
            raise UsageError(
                f"--no_decay: no parameter has {word!r} in its name; they are such as "
                f"{', '.join(known[:3])} and {known[-1]}"
            )


def has_words(words: str | None) -> Callable[[str, Any], bool] | None:
    """(name, parameter) -> whether the name has one of some words in it; None for no words.

    Example:
        >>> has_words("norm,embed")("layers/input_norm", None)
        True
    """
    if words is None:
        return None
    found = [word.strip() for word in words.split(",")]
    return lambda name, parameter: any(word in name for word in found)
