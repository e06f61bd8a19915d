"""Steps that read nothing on the host: for CUDA graphs and `torch.compile`.

With `capturable=True` the number of steps, the learning rate and P's step size may be tensors on
the device, and `torch.where` decides what the host decides otherwise: whether a step is skipped,
whether P moves, whether a gradient has a direction. Setting P from a gradient is the exception. It
needs the host, as an SVD does, and happens in `refresh_`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from osd_torch.basis_rule import name_of_rule
from osd_torch.bucket_optimizer import BucketOptimizer, gradient_of
from osd_torch.bucket_step import Method
from osd_torch.buckets import Bucket, in_buckets
from osd_torch.guard import check_dense
from osd_torch.numerics import without_autocast
from osd_torch.rules import Rule
from osd_torch.sharding import (
    all_finite,
    finite_on_device,
    is_distributed,
    on_host,
    squared_norms,
)
from osd_torch.state import NOT_SET, ON_HOST, Group, named_parameters

Present = Sequence[tuple[Group, Tensor]]


class CapturableOptimizer(BucketOptimizer):
    """An optimizer that can step without the host.

    See `osd_torch.subspace.SubspaceOptimizer`, which takes the steps.

    Attributes:
        is_capturable: Whether steps read nothing on the host. (While `torch.compile` traces a step,
            it shows `capturable=True` in every group.)
    """

    is_capturable = False
    _plan: list[tuple[Group, Bucket, Method]] | None = None  # the buckets of the next step
    _planned_for: Sequence[Tensor] = ()  # their parameters and the tensors of their state
    # Steps until P of one of them may be due; None: the host has to read the numbers of steps.
    _steps_to_refresh: int | None = None

    def observe(self, group: Group) -> None:
        """Reads a group's learning rate before each step."""

    def present(self) -> Iterator[tuple[Group, Tensor]]:
        """The parameters that the next step updates, each with its group."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters; see `StatefulOptimizer.add_param_group`."""
        super().add_param_group(param_group)
        self._see_capturable()

    def _see_capturable(self) -> None:
        self.is_capturable = any(group.get("capturable") for group in self.param_groups)

    def see_options(self) -> None:
        """Reads `capturable` again: as with torch.optim, it may have been set in the groups.

        Raises:
            NotCapturableError: It is True, but a step needs the host.
        """
        if self.is_capturable == any(group.get("capturable") for group in self.param_groups):
            return
        for group in self.param_groups:
            check_capturable(self, group)
        self._see_capturable()
        self._plan = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy, a loaded state or a pickle; the buckets are formed again."""
        super().__setstate__(state)
        self._plan = None
        self._see_capturable()

    @torch.no_grad()
    @without_autocast()
    def refresh_(self) -> None:
        """Sets P of each matrix that is due, and prepares the next step, with `capturable=True`.

        `step` calls it, except while a CUDA graph is captured and inside `torch.compile`. There,
        call it after each backward pass, before the graph is replayed or the compiled step is
        called. It reads the device only if P may be due. Without `capturable` it does nothing.

        Raises:
            RuntimeError: A gradient is sparse.

        Example:
            >>> import torch, osd_torch
            >>> layer = torch.nn.Linear(8, 6)
            >>> optimizer = osd_torch.SubspaceAdamW(
            ...     layer.parameters(), torch.tensor(0.01), rank=2, capturable=True,
            ...     basis=osd_torch.online_pca(step_size=lambda lr: 5 * lr))
            >>> compiled_step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
            >>> for _ in range(2):
            ...     optimizer.zero_grad()
            ...     layer(torch.ones(1, 8)).sum().backward()
            ...     optimizer.refresh_()
            ...     compiled_step()
        """
        self.see_options()
        if not self.is_capturable:
            return
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor):
                self.observe(group)
        present = list(self.present())
        check_dense(self, [gradient_of(param) for _, param in present])
        if present:
            self.counts_on(present[0][1].device)
        self._prepare(present)
        if self._steps_to_refresh is None or self._steps_to_refresh <= 0:
            self._refresh_where_due([pair for pair in present if pair[0]["rank"] is not None])
        if self._steps_to_refresh is not None:
            self._steps_to_refresh -= 1

    def _prepare(self, present: Present) -> None:
        """Forms the buckets of the next step, unless they and the options are those of the last."""
        known = self._planned_for
        own = self._tensors(present)
        is_same = len(own) == len(known) and all(map(operator.is_, own, known))
        if self._plan is not None and is_same:
            self._plan = [(g, bucket, self._current(g, bucket, m)) for g, bucket, m in self._plan]
            return
        for group, param in present:
            state = self.state_of(group, param)
            state.update({name: state[name].to(param.device) for name in ON_HOST if name in state})
        self._plan = [
            (group, bucket, self.method(group, bucket))
            for group in self.param_groups
            for bucket in in_buckets(self, group, [p for g, p in present if g is group], {})
        ]
        self._planned_for, self._steps_to_refresh = self._tensors(present), None

    def _tensors(self, present: Present) -> list[Tensor]:
        """The parameters, and the tensors of their state."""
        return [x for _, param in present for x in (param, *self.state[param].values())]

    def _current(self, group: Group, bucket: Bucket, planned: Method) -> Method:
        """A planned method, or another one if an option of its group has changed.

        A compiled step is specialized to the objects of its methods.
        """
        now = self.method(group, bucket)
        if now.options == planned.options:
            return planned
        self._steps_to_refresh = None
        return now

    def _refresh_where_due(self, present: Present) -> None:
        """Reads the numbers of steps and sets P where it is due."""
        counts = [
            self.state[param][name].min() for _, param in present for name in ("step", "set_at")
        ]
        numbers = [int(x) for x in on_host(counts)]
        remaining = [2**31]
        due = []
        for (group, param), step, set_at in zip(present, numbers[::2], numbers[1::2], strict=True):
            every = self.basis_rule(group).clock.refresh_every
            is_due = step == 0 or set_at == NOT_SET or (every is not None and step % every == 0)
            if is_due and set_at != step:
                due.append((group, param))
            if every is not None:
                remaining.append(every - step % every)
        self._steps_to_refresh = min(remaining)
        if not due:
            return
        gradients = [gradient_of(param) for _, param in self.present()]
        if not all_finite(gradients):
            self._steps_to_refresh = None  # the step will be skipped
        else:
            squares = on_host(squared_norms([gradient_of(param) for _, param in due]))
            for (group, param), square in zip(due, squares, strict=True):
                self.refresh(group, param, square)
                if int(self.state[param]["set_at"].min()) == NOT_SET:
                    self._steps_to_refresh = None  # it waits for a gradient

    def step_on_device(self) -> None:
        """One step without the host."""
        if self._is_recorded():
            if self._plan is None:
                raise RuntimeError(
                    "a step is captured or compiled before its buckets are known: call "
                    "optimizer.refresh_() after the backward pass, before the step"
                )
        else:
            self.refresh_()
        assert self._plan is not None
        params = [param for _, bucket, _ in self._plan for param in bucket.params]
        if not params:
            return
        gradients = [gradient_of(param) for param in params]
        squares = squared_norms(gradients)
        is_finite = finite_on_device(gradients, squares)
        self.count_on_device(is_finite)
        start = 0
        for group, bucket, planned in self._plan:
            method, end = self.at_current_rates(group, planned), start + len(bucket.params)
            square = bucket.joined_squares(squares[start:end])
            square = None if square is None else torch.where(is_finite, square, 0)
            self.step_bucket(group, bucket, method, None, square, is_finite)
            start = end

    def _is_recorded(self) -> bool:
        """Whether the step is captured by a CUDA graph or compiled, instead of executed."""
        if torch.compiler.is_compiling():
            return True
        is_captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if is_captured:
            self._steps_to_refresh = None  # replays are not counted
        return is_captured


class NotCapturableError(ValueError):
    """A step with `capturable=True` would need the host; the message says why.

    Example:
        >>> import torch, osd_torch
        >>> try:
        ...     osd_torch.SubspaceAdamW(
        ...         torch.nn.Linear(8, 6).parameters(), capturable=True, foreach=False)
        ... except osd_torch.NotCapturableError as error:
        ...     print(error)
        capturable is True, but foreach is False: its steps are those of stacks
    """


def check_capturable(optimizer: CapturableOptimizer, group: Group) -> None:
    """Raises NotCapturableError for a group with `capturable=True` whose step needs the host."""
    if len({bool(each.get("capturable")) for each in optimizer.param_groups}) > 1:
        raise NotCapturableError(
            "capturable is True for some groups only: expected the same for all"
        )
    reason = _reason_for_the_host(optimizer, group)
    if group.get("capturable") and reason is not None:
        raise NotCapturableError(f"capturable is True, but {reason}")


def _reason_for_the_host(optimizer: CapturableOptimizer, group: Group) -> str | None:
    """Why a step of a group needs the host; None if it does not."""
    devices = {str(param.device) for its in optimizer.param_groups for param in its["params"]}
    if len(devices) > 1:
        return f"its parameters are on {', '.join(sorted(devices))}: expected one device"
    if group.get("foreach") is False:
        return "foreach is False: its steps are those of stacks"
    if group.get("stochastic_rounding"):
        return "stochastic_rounding is True, whose bits depend on the number of the step"
    for name, param in named_parameters(group):
        if is_distributed(param):
            return f"parameter '{name}' is a DTensor: shard the model, or capture its steps"
    rules: list[Rule | None] = [optimizer.rule(group)]
    if group["rank"] is not None:
        lift, basis_rule = optimizer.lift(group), optimizer.basis_rule(group)
        if not lift.stacks:
            return f"the lift {name_of_rule(lift)} does not accept stacks (Lift.stacks)"
        if basis_rule.gradient is not None and not basis_rule.stacks:
            return f"the basis rule {name_of_rule(basis_rule)} does not accept stacks"
        rules.append(basis_rule.optimizer)
    for rule in rules:
        if rule is not None and not getattr(rule, "capturable", False):
            return f"{name_of_rule(rule)} reads the number of the step on the host"
    return None
