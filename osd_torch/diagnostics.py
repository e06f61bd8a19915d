"""What can be read of the subspaces in an optimizer's state."""

from __future__ import annotations

from typing import Any

import torch

from osd_torch.sketch import Basis
from osd_torch.state import basis_of, named_parameters
from osd_torch.subspace import SubspaceOptimizer


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer itself, out of wrappers such as `accelerate`'s.

    They hold it as `optimizer`, those of `torch.distributed.optim` as `optim`.

    Raises:
        ValueError: for a wrapper with parameter groups of its own, which steps others than these.
    """
    inside = lambda x: getattr(x, "optimizer", None) or getattr(x, "optim", None)
    while isinstance(inner := inside(optimizer), torch.optim.Optimizer):
        if optimizer.param_groups is not inner.param_groups:
            raise ValueError(
                f"a {type(optimizer).__name__} around a {type(inner).__name__} has parameter groups"
                " of its own: expected an optimizer of osd_torch or torch, or a wrapper that steps "
                "the same parameters"
            )
        optimizer = inner
    return optimizer


def projectors(optimizer: torch.optim.Optimizer) -> dict[str, Basis]:
    """The bases P in an optimizer, by parameter name.

    Returns:
        For each projected parameter its P: (m, r) where it acts on the output side, (n, r) on the
        input side, or `TwoSided(output, input)`. Columns are the basis; zeros until a gradient has
        set them. DTensors where the parameters are.
        The names are those that the optimizer was built with; without names, `group.position`.

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
    """(total, in a row): the steps that a non-finite gradient made the optimizer skip.

    Raises:
        ValueError: for an optimizer of another make, which does not count them.

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
            f"{type(optimizer).__name__} counts no skipped steps: it is not make_optimizer's"
        )
    total, in_a_row = group.get("skipped_steps", (0, 0))
    return total, in_a_row
