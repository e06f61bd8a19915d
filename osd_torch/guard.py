"""Skips and counts steps with a non-finite gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from osd_torch.sharding import all_finite


def check_dense(optimizer: torch.optim.Optimizer, gradients: Iterable[Tensor]) -> None:
    """Raises RuntimeError for a sparse gradient."""
    if any(gradient.layout != torch.strided for gradient in gradients):
        raise RuntimeError(
            f"{type(optimizer).__name__} does not support sparse gradients: use a dense embedding"
            " (sparse=False)"
        )


def count_if_not_finite(
    optimizer: torch.optim.Optimizer,
    gradients: Sequence[Tensor],
    squares: Sequence[Tensor] | None = None,
) -> bool:
    """Returns whether any gradient is non-finite, and counts it; one device synchronization.

    Args:
        optimizer: The optimizer that counts.
        gradients: Dense gradients.
        squares: Their squared norms, if known.
    """
    is_finite = all_finite(gradients, squares)
    total, in_a_row = optimizer.param_groups[0].get("skipped_steps", (0, 0))
    counts = (total, 0) if is_finite else (total + 1, in_a_row + 1)
    optimizer.param_groups[0]["skipped_steps"] = counts
    return not is_finite


@torch.compiler.disable(reason="the host decides whether a step is skipped")
def drop_if_not_finite(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A step pre-hook: drops all gradients and counts if one is not finite."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    present = [p for p in params if p.grad is not None]
    gradients = [p.grad for p in present]
    check_dense(optimizer, gradients)
    if count_if_not_finite(optimizer, gradients):
        for param in present:
            param.grad = None


def skip_if_not_finite(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Makes an optimizer of another library skip and count steps with a non-finite gradient.

    It does not see what a closure computes inside `step`.
    """
    optimizer.param_groups[0].setdefault("skipped_steps", (0, 0))
    optimizer.register_step_pre_hook(drop_if_not_finite)
    return optimizer


class _SkipsNonFinite:
    """`skip_if_not_finite` for torch.optim classes; copies and pickles keep it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        skip_if_not_finite(self)  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        # torch drops the hooks of a copy, and also calls this in load_state_dict.
        hooks = self._optimizer_step_pre_hooks  # type: ignore[attr-defined]
        if drop_if_not_finite not in hooks.values():
            skip_if_not_finite(self)  # type: ignore[arg-type]


class TorchAdam(_SkipsNonFinite, torch.optim.Adam):
    """`torch.optim.Adam` that skips steps with a non-finite gradient."""


class TorchAdamW(_SkipsNonFinite, torch.optim.AdamW):
    """`torch.optim.AdamW` that skips steps with a non-finite gradient."""


class TorchSGD(_SkipsNonFinite, torch.optim.SGD):
    """`torch.optim.SGD` that skips steps with a non-finite gradient."""
