"""Parameters that are stepped together: one, or a stack of one kind.

A GPU takes a launch for each operation, whatever its size. Parameters of one group with the same
shape, dtype and device are therefore stepped as one stack (b, p, q): its products, rules and lift
are those of a matrix, with one more axis in front. The state of a parameter is then a view of the
stack's; its names and shapes stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osd_names import ResolvedSide
from osd_torch.layout import to_matrix
from osd_torch.rules import Count, Rule
from osd_torch.sharding import is_distributed
from osd_torch.sketch import Sketch
from osd_torch.state import ON_HOST, Group
from osd_torch.stateful import StatefulOptimizer

STACK_BYTES = 2**30  # the parameters of a stack have at most this size
LARGE = 2**24  # a GPU by default steps matrices of at least this many values one at a time


class Bucket(NamedTuple):
    """Parameters that are stepped together.

    Attributes:
        params: One parameter, or those of a stack.
        state: The state of the parameter; of a stack, its tensors with one more axis in front, of
            which the parameters' states are views.
        on_device: Whether the host does not read the step numbers, which may then differ.
    """

    params: tuple[Tensor, ...]
    state: dict[str, Tensor]
    on_device: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether the tensors of the state have one more axis in front."""
        return self.state["step"].ndim > 0

    @property
    def step(self) -> Count:
        """The number of steps taken, the same for all; on the device, one for each matrix."""
        return self._count("step")

    @property
    def set_at(self) -> Count:
        """The step at which P was set; like `step`."""
        return self._count("set_at")

    def _count(self, name: str) -> Count:
        counts = self.state[name]
        return counts.double() if self.on_device else int(counts[0] if counts.ndim else counts)

    def gradient(self, side: ResolvedSide) -> Tensor | None:
        """M, or the stack of each parameter's; None if they have no gradient."""
        gradients = [param.grad for param in self.params if param.grad is not None]
        if not gradients:
            return None
        return to_matrix(torch.stack(gradients) if self.is_stack else gradients[0], side)

    def weight(self) -> Tensor:
        """The parameter, or the stack of them."""
        return torch.stack(list(self.params)) if self.is_stack else self.params[0]

    def weights(self, side: ResolvedSide) -> list[Tensor]:
        """Each parameter, laid out as M."""
        return [to_matrix(param, side) for param in self.params]

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """A number for each parameter, such as a squared norm, on the device of a stack."""
        if not self.is_stack:
            return values[0]
        return torch.stack(list(values)).to(self.params[0].device, non_blocking=True)

    def joined_sketch(self, sketches: Sequence[Sketch]) -> Sketch:
        """The sketch of the stack from those of its parameters."""
        first = sketches[0]
        if not self.is_stack:
            return first
        statistics = {
            name: self.joined([sketch.statistics[name] for sketch in sketches])
            for name in first.statistics
        }
        low_rank = torch.stack([sketch.low_rank for sketch in sketches])
        return Sketch(low_rank, statistics, first.degrees)


def in_buckets(
    optimizer: StatefulOptimizer,
    group: Group,
    params: Iterable[Tensor],
    held: Mapping[Tensor, Sketch],
) -> list[Bucket]:
    """Parameters of a group, divided into those that are stepped together.

    Args:
        optimizer: The optimizer.
        group: The parameters' group.
        params: Parameters with a gradient or a held sketch, whose P is set if it was due.
        held: The held sketches.
    """
    alike: dict[Any, list[Tensor]] = {}
    for param in params:
        key = _kind(optimizer, group, param, param in held)
        alike.setdefault(param if key is None else key, []).append(param)
    parts = [part for same in alike.values() for part in _of_limited_size(same)]
    return [_together(optimizer, part, bool(group.get("capturable"))) for part in parts]


def _together(optimizer: StatefulOptimizer, params: list[Tensor], capturable: bool) -> Bucket:
    states = [optimizer.state[param] for param in params]
    is_stack = len(params) > 1 or capturable
    return Bucket(tuple(params), stacked(states) if is_stack else states[0], capturable)


def _kind(
    optimizer: StatefulOptimizer, group: Group, param: Tensor, is_held: bool
) -> tuple[Any, ...] | None:
    """What the parameters of a stack have in common; None for one that is stepped alone."""
    if not is_stacked(optimizer, group, param):
        return None
    gradient = None if param.grad is None else param.grad.dtype
    kind = (tuple(param.shape), param.is_contiguous(), param.dtype, param.device, gradient, is_held)
    if group.get("capturable"):
        return kind
    state = optimizer.state[param]
    return (*kind, *(int(state[name]) for name in ON_HOST if name in state))


def is_stacked(optimizer: StatefulOptimizer, group: Group, param: Tensor) -> bool:
    """Whether a parameter is stepped with others of its kind, if there are any."""
    foreach = group.get("foreach")
    if foreach is None:
        foreach = group.get("capturable") or (param.is_cuda and param.numel() < LARGE)
    return bool(foreach) and not is_distributed(param) and can_stack(optimizer, group, param)


def can_stack(optimizer: StatefulOptimizer, group: Group, param: Tensor) -> bool:
    """Whether the rules of a group can step a stack of parameters such as this one."""
    if group["rank"] is None:
        return optimizer.rule(group).stacked(param) is not None
    basis_rule = optimizer.basis_rule(group)
    if not optimizer.lift(group).stacks or not (basis_rule.stacks or basis_rule.gradient is None):
        return False
    of_basis = basis_rule.optimizer
    if of_basis is not None and of_basis.stacked(optimizer.state[param]["basis"]) is None:
        return False
    return optimizer.rule(group).stacked(low_rank_like(optimizer, group, param)) is not None


def rule_of(optimizer: StatefulOptimizer, group: Group, bucket: Bucket) -> Rule:
    """The weight rule of a bucket: that of its group, or the one that steps its stack."""
    rule, like = optimizer.rule(group), bucket.params[0]
    if not bucket.is_stack:
        return rule
    stacked = rule.stacked(like if group["rank"] is None else low_rank_like(optimizer, group, like))
    assert stacked is not None
    return stacked


def low_rank_like(optimizer: StatefulOptimizer, group: Group, param: Tensor) -> Tensor:
    """A tensor with the shape of a parameter's R, in the layout of the weight; takes no memory."""
    side, rank = optimizer.side(group, param), min(group["rank"], *param.shape)
    output, inputs = param.shape
    shape = (output if side == "input" else rank, inputs if side == "output" else rank)
    return torch.empty(shape, device="meta")


def _of_limited_size(params: list[Tensor]) -> list[list[Tensor]]:
    size = params[0].numel() * params[0].element_size()
    count = max(1, STACK_BYTES // max(1, size))
    return [params[i : i + count] for i in range(0, len(params), count)]


def stacked(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The states of several parameters as one, of which theirs become views."""
    return {name: _stacked(states, name) for name in states[0]}


def _stacked(states: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    parts = [state[name] for state in states]
    stack = _of_views(parts)
    if stack is None:
        stack = torch.stack(parts)
        for state, part in zip(states, stack.unbind(), strict=True):
            state[name] = part
    return stack


def _of_views(parts: Sequence[Tensor]) -> Tensor | None:
    """The stack of which tensors are the consecutive parts; None if there is none."""
    first = parts[0]
    size, start, memory = first.numel(), first.storage_offset(), first.untyped_storage()
    for i, part in enumerate(parts):
        is_next = part.storage_offset() == start + i * size and part.is_contiguous()
        if not is_next or part.untyped_storage().data_ptr() != memory.data_ptr():
            return None
    if (start + len(parts) * size) * first.element_size() > memory.nbytes():
        return None  # empty tensors share the address 0
    return first.as_strided((len(parts), *first.shape), (size, *first.stride()), start)
