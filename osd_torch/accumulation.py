"""Steps from sketches: when sketches suffice, and agreement between processes."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Sequence

import torch
from torch import Tensor

from osd_torch.sharding import Reduce, means_of, on_host, squared_norms
from osd_torch.sketch import Sketch, reading_gradient
from osd_torch.state import Group, all_params, name_of
from osd_torch.stateful import StatefulOptimizer, needs_of


def zero_where_others_have_gradients(
    optimizer: torch.optim.Optimizer, reduce: Reduce, held: Container[Tensor] = ()
) -> None:
    """Gives a zero gradient to each parameter that has a gradient only on other processes.

    Args:
        optimizer: The optimizer of the parameters.
        reduce: The mean over processes.
        held: Parameters that count as having a gradient.
    """
    params = all_params(optimizer)
    present = [p.grad is not None or p in held for p in params]
    some_have = means_of(present, reduce, params[0].device)
    for param, is_present, some in zip(params, present, some_have, strict=True):
        if some and not is_present:
            param.grad = torch.zeros_like(param)


def is_sketched(optimizer: StatefulOptimizer, group: Group) -> bool:
    """Whether a step of this group can be computed from sketches alone."""
    return group["rank"] is not None and reading_gradient(needs_of(optimizer, group)) is None


def check_sketch_suffices(optimizer: StatefulOptimizer, group: Group) -> None:
    """Raises ValueError if a step of this group reads more of a gradient than its sketch."""
    needs = None if group["rank"] is None else reading_gradient(needs_of(optimizer, group))
    if needs is not None:
        raise ValueError(
            f"{needs.reason}, but only its sketch is kept here (layer-by-layer updates with "
            f"micro-batches or clipping): use {needs.remedy}, or one micro-batch and no clipping"
        )


def check_agreed(
    optimizer: torch.optim.Optimizer, reduce: Reduce, param: Tensor, share: float
) -> None:
    """Raises ValueError unless all processes accumulate this parameter, with this share."""
    params = all_params(optimizer)
    flags = [float(p is param) for p in params]
    *some, mean_share = means_of([*flags, share], reduce, param.device)
    called_for = [p for p, is_any in zip(params, some, strict=True) if is_any]
    if len(called_for) > 1:
        names = ", ".join(repr(name_of(optimizer, p)) for p in called_for)
        raise ValueError(
            f"processes call accumulate for different parameters: {names}; with reduce set, call "
            "it for the same parameters in the same order on all of them, with a gradient of "
            "zeros if a process has none"
        )
    if abs(mean_share - share) > 1e-9:
        raise ValueError(
            f"share is {share!r} for parameter '{name_of(optimizer, param)}' on this process, but "
            f"{mean_share!r} in the mean of all: give its share over all processes, the same on "
            "each"
        )


def read_norms(applied: Sequence[Tensor], held: Iterable[Sketch]) -> list[Tensor]:
    """All that the host needs to know of a step's gradients, in one synchronization.

    Args:
        applied: What the step applies: R of held sketches, other gradients.
        held: The sketches. Their scalar statistics are moved to the CPU: the norm of a held sketch
            is not that of its R.

    Returns:
        The squared norm of each, on the CPU.
    """
    squares = squared_norms(applied)
    numbers = [
        (sketch.statistics, name)
        for sketch in held
        for name, x in sketch.statistics.items()
        if x.ndim == 0
    ]
    known = on_host([*squares, *(statistics[name] for statistics, name in numbers)])
    for (statistics, name), value in zip(numbers, known[len(squares) :], strict=True):
        statistics[name] = value
    return known[: len(squares)]


def forward_reduce() -> None:
    """Forwards `prepared.reduce = ...` to the optimizer in `accelerate`'s wrapper.

    The wrapper forwards methods, but keeps an attribute that is set on itself.
    """
    wrapper = getattr(sys.modules.get("accelerate.optimizer"), "AcceleratedOptimizer", None)
    if wrapper is not None and not hasattr(wrapper, "reduce"):
        wrapper.reduce = property(
            lambda self: getattr(self.optimizer, "reduce", None),
            lambda self, reduce: setattr(self.optimizer, "reduce", reduce),
        )
