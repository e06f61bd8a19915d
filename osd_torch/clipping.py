"""Clipping by the norm of all gradients, in a plain step and in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from osd_torch.numerics import check_number, without_autocast
from osd_torch.sharding import local, total_norm
from osd_torch.state import all_params, inner_optimizer
from osd_torch.subspace import SubspaceOptimizer


@torch.no_grad()
@without_autocast()
def clip_(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scales what the next step applies to at most a given norm, in place.

        x <- x min(1, max_norm / (||x|| + 1e-6))

    ||x|| is the norm over all parameters of R for projected parameters with a held sketch, and of G
    for all others. Sketches are held after `accumulate`, and with `reduce` set.

    Args:
        optimizer: Any optimizer, or a wrapper around one, with gradients or held sketches.
        max_norm: The maximum norm; 0 does not scale.

    Returns:
        The norm before clipping, 0-dimensional float32 (float64 for float64), the same on every
        process if the gradients are.

    Raises:
        ValueError: `max_norm` is negative or infinite.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(24, 16)
        >>> optimizer = osd_torch.SubspaceAdamW(layer.parameters(), lr=0.01, rank=4)
        >>> layer(torch.ones(2, 24)).square().sum().backward()
        >>> norm = osd_torch.clip_(optimizer, 1.0)
        >>> bool(torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()]) < 1.001)
        True
    """
    check_number("max_norm", max_norm)
    optimizer, held = inner_optimizer(optimizer), {}
    if isinstance(optimizer, SubspaceOptimizer):
        optimizer.reduce_()
        held = optimizer.held
    params = all_params(optimizer)
    gradients = [p.grad for p in params if p.grad is not None and p not in held]
    # In the optimizer's order: held sketches have the order of the backward pass, and the order of
    # a sum affects its rounding.
    norm = total_norm([*(held[p].low_rank for p in params if p in held), *gradients])
    if max_norm:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
        for gradient in gradients:
            scale_(gradient, factor)
        for sketch in held.values():
            sketch.scale_(factor)
    return norm


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiplies a tensor in place."""
    part = local(tensor)
    part.mul_(factor.to(part.device))
