"""Parameters that are stepped together: one, or a stack of one kind.

A GPU takes a launch for each operation, whatever its size. Parameters of one group with the same
shape, dtype and device are therefore stepped as one stack (b, p, q): its products, rules and lift
are those of a matrix, with one more axis in front. The state of a parameter is then a view of the
stack's; its names and shapes stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osd_names import ResolvedSide
from osd_torch.layout import (
    SubspaceDimensionNumbers,
    from_stack,
    matrix_shape,
    to_matrix,
    to_stack,
)
from osd_torch.rules import Count, Rule, of_stack, stacked_rule
from osd_torch.sharding import is_distributed, local
from osd_torch.sketch import Sketch
from osd_torch.state import ON_HOST, Group, numbers_of
from osd_torch.stateful import StatefulOptimizer

STACK_BYTES = 2**30  # the parameters of a stack have at most this size
LARGE = 2**24  # a GPU by default steps matrices of at least this many values one at a time


class Bucket(NamedTuple):
    """Parameters that are stepped together.

    Attributes:
        params: One matrix, or the parameters of a stack: several matrices, or parameters that are
            stacks by their dimension numbers.
        state: The state of the matrix; of a stack, its tensors with one more axis in front. The
            parameters' states are views of them. Of sharded parameters, this process's part.
        numbers: The parameters' dimension numbers, if they are stacks.
        on_device: Whether the host does not read the numbers of steps.
    """

    params: tuple[Tensor, ...]
    state: dict[str, Tensor]
    numbers: SubspaceDimensionNumbers | None = None
    on_device: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether the tensors have one more axis in front."""
        return self.state["step"].ndim > 0

    @property
    def step(self) -> Count:
        """The number of steps taken: one for all, or a tensor with one for each matrix."""
        return self._count("step")

    @property
    def set_at(self) -> Count:
        """The step at which P was set; like `step`."""
        return self._count("set_at")

    def _count(self, name: str) -> Count:
        counts = self.state[name]
        if not counts.ndim and not self.on_device:
            return int(counts)
        if not self.on_device:
            different = set(counts.flatten().tolist())
            if len(different) < 2:
                return int(next(iter(different), 0))
        return counts.double().to(self.params[0].device)

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """Parameters or gradients as one matrix or stack, a view if possible."""
        if self.numbers is not None:
            stacks = [to_stack(local(tensor), self.numbers) for tensor in tensors]
            return stacks[0] if len(stacks) == 1 else torch.cat(stacks)
        return torch.stack(list(tensors)) if self.is_stack else tensors[0]

    def parted(self, stack: Tensor) -> list[Tensor]:
        """The parameters of a stack."""
        if self.numbers is None:
            return list(stack.unbind())
        parts = stack.chunk(len(self.params))
        shapes = [local(param).shape for param in self.params]
        return [from_stack(x, self.numbers, shape) for x, shape in zip(parts, shapes, strict=True)]

    def gradient(self, side: ResolvedSide) -> Tensor | None:
        """M, or the stack of each matrix's; None if the parameters have no gradient."""
        gradients = [param.grad for param in self.params if param.grad is not None]
        return to_matrix(self.joined(gradients), side) if gradients else None

    def joined_squares(self, squares: Sequence[Tensor]) -> Tensor | None:
        """The squared norm of each matrix, on the device of a stack; None if not known.

        Args:
            squares: The squared norm of each parameter's gradient.
        """
        if self.numbers is not None:
            return None
        if not self.is_stack:
            return squares[0]
        return torch.stack(list(squares)).to(self.params[0].device, non_blocking=True)

    def joined_sketch(self, sketches: Sequence[Sketch]) -> Sketch:
        """The sketch of the stack from those of its parameters."""
        first = sketches[0]
        if len(sketches) == 1 and (self.numbers is not None or not self.is_stack):
            return first
        join = torch.stack if self.numbers is None else torch.cat
        device = first.low_rank.device
        statistics = {
            name: join([sketch.statistics[name] for sketch in sketches]).to(device)
            for name in first.statistics
        }
        return Sketch(join([sketch.low_rank for sketch in sketches]), statistics, first.degrees)

    def matrices(self) -> Iterator[Bucket]:
        """Each matrix of a parameter by itself."""
        if not self.is_stack:
            yield self
            return
        for i in range(len(self.state["step"])):
            yield Bucket(self.params, {name: x[i] for name, x in self.state.items()})


def bucket_of(
    group: Group, params: Sequence[Tensor], states: Sequence[dict[str, Tensor]]
) -> Bucket:
    """The bucket of parameters with these states, which become views of the bucket's."""
    numbers, capturable = numbers_of(group), bool(group.get("capturable"))
    if len(states) == 1 and (numbers is not None or not capturable):
        state = {name: local(x) for name, x in states[0].items()} if numbers else states[0]
    else:
        state = stacked(states, is_batch=numbers is not None)
    return Bucket(tuple(params), state, numbers, capturable)


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
    return [bucket_of(group, part, [optimizer.state[param] for param in part]) for part in parts]


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
    if numbers_of(group) is not None:  # P may wait for some of its matrices: `set_at` differs
        return (*kind, *set(state["step"].tolist()))
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
        return stacked_rule(optimizer.rule(group), param) is not None
    basis_rule = optimizer.basis_rule(group)
    if not optimizer.lift(group).stacks or not (basis_rule.stacks or basis_rule.gradient is None):
        return False
    of_basis = basis_rule.optimizer
    if of_basis is not None and stacked_rule(of_basis, optimizer.state[param]["basis"]) is None:
        return False
    like = low_rank_like(optimizer, group, param)
    return stacked_rule(optimizer.rule(group), like) is not None


def rule_of(optimizer: StatefulOptimizer, group: Group, bucket: Bucket) -> Rule:
    """The weight rule of a bucket: that of its group, or one that steps its stack."""
    rule, like = optimizer.rule(group), bucket.params[0]
    if not bucket.is_stack:
        return rule
    return of_stack(rule, like if group["rank"] is None else low_rank_like(optimizer, group, like))


def low_rank_like(optimizer: StatefulOptimizer, group: Group, param: Tensor) -> Tensor:
    """A tensor with the shape of a matrix's R, in the layout of the weight; takes no memory."""
    side = optimizer.side(group, param)
    output, inputs = matrix_shape(param.shape, group.get("dimension_numbers"))
    rank = min(group["rank"], output, inputs)
    shape = (output if side == "input" else rank, inputs if side == "output" else rank)
    return torch.empty(shape, device="meta")


def _of_limited_size(params: list[Tensor]) -> list[list[Tensor]]:
    size = params[0].numel() * params[0].element_size()
    count = max(1, STACK_BYTES // max(1, size))
    return [params[i : i + count] for i in range(0, len(params), count)]


def stacked(states: Sequence[dict[str, Tensor]], is_batch: bool) -> dict[str, Tensor]:
    """The states of several parameters as one; theirs become views of it.

    Args:
        states: The states.
        is_batch: Whether each is that of a stack already.
    """
    return {name: _stacked(states, name, is_batch) for name in states[0]}


def _stacked(states: Sequence[dict[str, Tensor]], name: str, is_batch: bool) -> Tensor:
    parts = [state[name] for state in states]
    stack = _of_views(parts, is_batch)
    if stack is None:
        stack = torch.cat(parts) if is_batch else torch.stack(parts)
        views = stack.chunk(len(parts)) if is_batch else stack.unbind()
        for state, view in zip(states, views, strict=True):
            state[name] = view
    return stack


def _of_views(parts: Sequence[Tensor], is_batch: bool) -> Tensor | None:
    """The stack whose consecutive parts the tensors are; None if there is none."""
    first = parts[0]
    size, start, memory = first.numel(), first.storage_offset(), first.untyped_storage()
    for i, part in enumerate(parts):
        is_next = part.storage_offset() == start + i * size and part.is_contiguous()
        if not is_next or part.untyped_storage().data_ptr() != memory.data_ptr():
            return None
    if (start + len(parts) * size) * first.element_size() > memory.nbytes():
        return None  # empty tensors share the address 0
    if is_batch:
        shape = (len(parts) * first.shape[0], *first.shape[1:])
        return first.as_strided(shape, first.stride(), start)
    return first.as_strided((len(parts), *first.shape), (size, *first.stride()), start)
