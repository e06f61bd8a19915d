"""Functions that inspect the subspaces in an optimizer's state."""

from __future__ import annotations

import torch

from osd_torch.sketch import Basis
from osd_torch.state import basis_of, inner_optimizer, named_parameters


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
