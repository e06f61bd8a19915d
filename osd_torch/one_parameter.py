"""A step of one parameter of an optimizer, without a visit to any other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from osd_torch.guard import TorchAdam, TorchAdamW, TorchSGD, drop_if_not_finite
from osd_torch.state import Group
from osd_torch.subspace import SubspaceOptimizer

# Classes of torch that keep nothing per group but options.
STEP_ALONE = (
    TorchAdam, TorchAdamW, TorchSGD,
    torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad,
)  # fmt: skip


def group_sizes(optimizer: torch.optim.Optimizer) -> list[int]:
    """The number of parameters of each group."""
    return [len(group["params"]) for group in optimizer.param_groups]


def can_step_alone(optimizer: torch.optim.Optimizer) -> bool:
    """Whether one parameter can step as if the optimizer held no other.

    Not if a user's hook may read the groups, and not for optimizers of other libraries, which may
    count steps per group (schedule-free) or look up options by position (bitsandbytes).
    """
    if type(optimizer) not in STEP_ALONE and not isinstance(optimizer, SubspaceOptimizer):
        return False
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return not after and all(hook is drop_if_not_finite for hook in before.values())


@contextlib.contextmanager
def alone(
    optimizer: torch.optim.Optimizer, index: int, param: Tensor, name: str
) -> Iterator[Group]:
    """Makes a parameter the optimizer's only one, if it can be, and yields its group.

    Args:
        optimizer: Holds the parameter.
        index: Of the parameter's group.
        param: The parameter.
        name: Its name in the optimizer (`name_of`).
    """
    groups = optimizer.param_groups
    group = groups[index]
    if not can_step_alone(optimizer):
        yield group
        return
    params, names = group["params"], group.get("param_names")
    group.update(params=[param], param_names=[name])
    optimizer.param_groups = [group]
    try:
        yield group
    finally:
        group.update(params=params, param_names=names)
        if names is None:
            del group["param_names"]
        optimizer.param_groups = groups
