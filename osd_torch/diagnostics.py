"""Functions that inspect the subspaces in an optimizer's state."""

from __future__ import annotations

from typing import Any

import torch

from osd_torch.sketch import Basis
from osd_torch.state import basis_of, named_parameters
from osd_torch.subspace import SubspaceOptimizer


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside wrappers such as `accelerate`'s.

    Wrappers hold it as `optimizer`, those of `torch.distributed.optim` as `optim`.

    Raises:
        ValueError: The wrapper has its own parameter groups and steps other parameters than these.
    """
    inside = lambda x: getattr(x, "optimizer", None) or getattr(x, "optim", None)
    while isinstance(inner := inside(optimizer), torch.optim.Optimizer):
        if optimizer.param_groups is not inner.param_groups:
            raise ValueError(
                f"a {type(optimizer).__name__} around a {type(inner).__name__} has its own "
                "parameter groups: expected an optimizer of osd_torch or torch, or a wrapper "
                "that steps the same parameters"
            )
        optimizer = inner
    return optimizer


def projectors(optimizer: torch.optim.Optimizer) -> dict[str, Basis]:
    """Returns the bases P of an optimizer, by parameter name.

    Args:
        optimizer: A subspace optimizer, or a wrapper around one.

    Returns:
        The P of each projected parameter: (m, r) if it projects the output side, (n, r) for the
        input side, or `TwoSided(output, input)`; its columns are the basis, and it is zero until a
        gradient sets it. A DTensor if the parameter is one. The names are those with which the
        optimizer was built; without names, `group.position`.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(24, 16)
        >>> optimizer = osd_torch.SubspaceAdamW(layer.parameters(), lr=0.01, rank=4)
        >>> {name: tuple(basis.shape) for name, basis in osd_torch.projectors(optimizer).items()}
        {'0.0': (16, 4)}
    """
    optimizer = inner_optimizer(optimizer)
    return {
        name: basis_of(optimizer.state[param])
        for i, group in enumerate(optimizer.param_groups)
        for name, param in named_parameters(group, prefix=f"{i}.")
        if group.get("rank") is not None and optimizer.state.get(param)
    }


def skipped_steps(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Number of steps that the optimizer skipped for a non-finite gradient.

    Args:
        optimizer: An optimizer of this library, or a wrapper around one.

    Returns:
        (total, in a row).

    Raises:
        ValueError: The optimizer does not count skipped steps.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(24, 16)
        >>> optimizer = osd_torch.SubspaceAdamW(layer.parameters(), lr=0.01, rank=4)
        >>> (layer(torch.ones(2, 24)) * float("nan")).sum().backward()
        >>> optimizer.step()
        >>> osd_torch.skipped_steps(optimizer)
        (1, 1)
    """
    optimizer = inner_optimizer(optimizer)
    group = optimizer.param_groups[0]
    if "skipped_steps" not in group and not isinstance(optimizer, SubspaceOptimizer):
        raise ValueError(
            f"{type(optimizer).__name__} counts no skipped steps: expected an optimizer of "
            "make_optimizer or of osd_torch"
        )
    total, in_a_row = group.get("skipped_steps", (0, 0))
    return total, in_a_row
