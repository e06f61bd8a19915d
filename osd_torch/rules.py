"""Weight rules: a gradient and its moments in, a direction out.

A rule is used in three places: for the low-rank gradient R (OptimizerW), for the gradient of the
basis P (OptimizerP), and for parameters that are not projected. The JAX library uses Optax's rules
for this.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from osd_torch.numerics import Number, per_part
from osd_torch.sharding import local, mean, parted_like
from osd_torch.transport import Change, bias_corrections, second_moment_after

State = Mapping[str, Tensor]
Count = int | Tensor  # of steps; of a stack on the device, one for each matrix


def zeros_like(like: Tensor) -> Tensor:
    """Zeros, contiguous even if `like` is a transposed view.

    Code that loads and saves state (`torch.distributed`, safetensors) reads memory in order.
    """
    return torch.zeros_like(like, memory_format=torch.contiguous_format)


class Rule(Protocol):
    """How an optimizer turns gradients into steps.

    The state of a sharded gradient (a DTensor) consists of DTensors.

    Attributes:
        capturable: Whether a step of a stack reads nothing on the host; t is then a tensor (b,),
            and lr may be one.
    """

    capturable: ClassVar[bool] = False

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """Contiguous zero moments for a gradient of this shape, dtype (float32/64) and device."""
        raise NotImplementedError

    def step(self, gradient: Tensor, state: State, t: Count, lr: Number) -> tuple[Tensor, Number]:
        """Updates the moments in `state` and returns the step.

        Args:
            gradient: float32 or float64, finite. Not modified.
            state: From `init`; updated in place.
            t: The number of this step, from 1.
            lr: The step size.

        Returns:
            (direction, rate), to be applied as `x - rate * direction`. The caller must not modify
            the direction: it may be the gradient or a moment.
        """
        raise NotImplementedError

    def stacked(self, like: Tensor) -> Rule | None:
        """The rule that steps each part of a stack (b, ...) as this one steps a gradient (...).

        None if there is none: parameters are then stepped one at a time.

        Args:
            like: A tensor with the shape of one gradient.
        """
        return None

    def step_(
        self, x: Tensor, gradient: Tensor, state: State, t: Count, lr: Number, weight_decay: float
    ) -> None:
        """Applies the step to x: `x <- (1 - lr * weight_decay) x - rate * direction`."""
        direction, rate = self.step(gradient, state, t, lr)
        own = local(x)
        if weight_decay:
            own.mul_(1 - lr * weight_decay)
        if isinstance(rate, Tensor):
            own.sub_((rate * local(direction)).to(own.dtype))
        else:
            own.add_(local(direction).to(own.dtype), alpha=-rate)

    def transport_(self, state: State, change: Change, t: Count) -> None:
        """Carries the moments over to a changed P, in place.

        Args:
            state: From `init` for R.
            change: The change of P.
            t: The number of steps taken, at least 1.

        Raises:
            ValueError: The rule does not support this.
        """
        raise ValueError(
            f"transport_moments is True, but {type(self).__name__} cannot carry its state over to "
            "another P: expected a rule whose moments have the shape of R, such as Adam or Lion"
        )


@dataclass(frozen=True)
class Adam(Rule):
    """Adam (arXiv 1412.6980), without weight decay.

    Attributes:
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment.
        eps_first: Whether to add epsilon before bias correction, as `galore_adamw` does, instead of
            after it, as `torch.optim.AdamW` does.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_first: bool = False

    capturable = True

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """Two moments."""
        return {"exp_avg": zeros_like(like), "exp_avg_sq": zeros_like(like)}

    def step(self, gradient: Tensor, state: State, t: Count, lr: Number) -> tuple[Tensor, Number]:
        """One step; see `Rule`."""
        if isinstance(t, Tensor):
            return self._step_on_device(gradient, state, t, lr)
        # Starting from 0 with lr = -1, the kernel writes the direction itself.
        direction = torch.zeros_like(local(state["exp_avg"]))
        self._move(direction, gradient, state, t, lr=-1.0)
        return parted_like(direction, gradient), self._rate(t, lr)

    def step_(
        self, x: Tensor, gradient: Tensor, state: State, t: Count, lr: Number, weight_decay: float
    ) -> None:
        """Uses one pass of the kernel."""
        own, first = local(x), local(state["exp_avg"])
        if isinstance(t, Tensor) or isinstance(lr, Tensor) or own.dtype != first.dtype or not lr:
            super().step_(x, gradient, state, t, lr, weight_decay)
            return
        rate = self._rate(t, lr)
        moved = laid_out_as(own, first)
        decay = weight_decay * lr / rate
        self._move(moved, gradient, state, t, lr=float(rate), weight_decay=float(decay))
        if moved is not own:
            own.copy_(moved)

    def stacked(self, like: Tensor) -> Rule | None:
        """Itself: it steps each value by itself."""
        return self

    def transport_(self, state: State, change: Change, t: Count) -> None:
        """Both moments; see `second_moment_after`."""
        first, second = state["exp_avg"], state["exp_avg_sq"]
        new = second_moment_after(first, second, change, self.betas, t)
        local(second).copy_(new)
        local(first).copy_(change.of(first))

    def _step_on_device(
        self, gradient: Tensor, state: State, t: Tensor, lr: Number
    ) -> tuple[Tensor, Number]:
        """One step of a stack; only the device knows the number of the step."""
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(gradient, 1 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        c1, c2 = (torch.as_tensor(c) for c in bias_corrections(self.betas, t, first))
        eps = self.eps if self.eps_first else self.eps * c2.sqrt()
        return first / (second.sqrt() + eps), lr * (c2.sqrt() / c1)

    def _rate(self, t: int, lr: Number) -> Number:
        return lr * math.sqrt(1 - self.betas[1] ** t) / (1 - self.betas[0] ** t)

    def _move(
        self,
        x: Tensor,
        gradient: Tensor,
        state: State,
        t: int,
        lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        """One pass of torch.optim's kernel over the moments and x, without bias corrections.

        The public function, torch.optim.adam.adam, takes longer than the kernel for a small matrix.
        """
        own, first, second = (local(x) for x in (gradient, state["exp_avg"], state["exp_avg_sq"]))
        own = laid_out_as(own, first)
        eps = self.eps if self.eps_first else self.eps * math.sqrt(1 - self.betas[1] ** t)
        torch._fused_adamw_(
            [x], [own], [first], [second], [], [_endless(own.device)],
            lr=lr, beta1=self.betas[0], beta2=self.betas[1], weight_decay=weight_decay, eps=eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, or a copy with the strides of `like`: a fused kernel needs equal strides."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like).copy_(tensor)


@functools.cache
def _endless(device: torch.device) -> Tensor:
    """A step number after which torch.optim's kernel corrects no bias, because `Adam` does."""
    return torch.full((), math.inf, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Lion(Rule):
    """Lion (arXiv 2302.06675), without weight decay.

    Attributes:
        betas: Weight of the moment in the direction, and its decay.
        sign: Whether to return the sign of the direction; False leaves it to the caller.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    sign: bool = True

    capturable = True

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """One moment."""
        return {"exp_avg": zeros_like(like)}

    def step(self, gradient: Tensor, state: State, t: Count, lr: Number) -> tuple[Tensor, Number]:
        """One step; see `Rule`."""
        beta1, beta2 = self.betas
        own, moment = local(gradient), local(state["exp_avg"])
        direction = (moment * beta1).add_(own, alpha=1 - beta1)
        moment.mul_(beta2).add_(own, alpha=1 - beta2)
        return parted_like(direction.sign_() if self.sign else direction, gradient), lr

    def stacked(self, like: Tensor) -> Rule | None:
        """Itself: it steps each value by itself."""
        return self

    def transport_(self, state: State, change: Change, t: Count) -> None:
        """The moment."""
        local(state["exp_avg"]).copy_(change.of(state["exp_avg"]))


@dataclass(frozen=True)
class Adafactor(Rule):
    """Adafactor (arXiv 1804.04235) with a given step size, as in Hugging Face's class.

    The first moment, if any, averages steps that include their step size, so a change of `lr`
    reaches the weights late.

    Attributes:
        beta1: Decay of the first moment; None: no first moment.
        eps: Added to the squared gradient.
        clip_threshold: Maximum root mean square of a direction.
        decay_rate: The second moment's decay at step t is `1 - t ** decay_rate`.
        of_stack: Whether gradients are stacks (b, ...); each part then has its own maximum.
    """

    beta1: float | None = None
    eps: float = 1e-30
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    of_stack: bool = field(default=False, repr=False)  # its name in a saved state stays the same

    capturable = True

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """Two vectors for a matrix, one for a vector, and the first moment."""
        state = {} if self.beta1 is None else {"exp_avg": zeros_like(like)}
        if like.ndim < 2:
            return {**state, "exp_avg_sq": zeros_like(like)}
        return {
            **state,
            "exp_avg_sq_row": zeros_like(mean(like, dim=-1)),
            "exp_avg_sq_col": zeros_like(mean(like, dim=-2)),
        }

    def step(self, gradient: Tensor, state: State, t: Count, lr: Number) -> tuple[Tensor, Number]:
        """One step; see `Rule`. The direction includes lr."""
        own = local(gradient)
        new: Number = t**self.decay_rate
        if isinstance(new, Tensor):
            new = per_part(new.to(gradient.dtype), own)
        square = own.square().add_(self.eps)
        is_vector = gradient.ndim - self.of_stack < 2
        if is_vector:
            update = local(state["exp_avg_sq"]).lerp_(square, new).rsqrt().mul_(own)
        else:
            square = parted_like(square, gradient)
            rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            new = new.squeeze(-1) if isinstance(new, Tensor) else new
            row = local(rows).lerp_(local(mean(square, dim=-1)), new)
            column = local(columns).lerp_(local(mean(square, dim=-2)), new)
            row_mean = local(mean(rows, dim=-1, keepdim=True))
            row_factor = (row / row_mean).rsqrt_().unsqueeze(-1)
            update = (own * row_factor).mul_(column.rsqrt().unsqueeze(-2))
        square = update.square()
        if self.of_stack:
            axes = tuple(range(1, square.ndim))
            rms = (square.mean(dim=axes, keepdim=True) if axes else square).sqrt()
        else:
            rms = local(mean(parted_like(square, gradient))).sqrt_()
        update.div_((rms / self.clip_threshold).clamp_(min=1)).mul_(lr)
        if self.beta1 is not None:
            update = local(state["exp_avg"]).mul_(self.beta1).add_(update, alpha=1 - self.beta1)
        return parted_like(update, gradient), 1.0

    def stacked(self, like: Tensor) -> Rule | None:
        """The same with `of_stack`."""
        return replace(self, of_stack=True)


@dataclass(frozen=True)
class Trace(Rule):
    """Momentum, `m <- b m + g`, as `optax.trace`; torch.optim.SGD's without dampening.

    Attributes:
        momentum: b.
        nesterov: Whether the direction is `g + b m` with the new m instead of m.
    """

    momentum: float = 0.95
    nesterov: bool = False

    capturable = True

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """One moment."""
        return {"exp_avg": zeros_like(like)}

    def step(self, gradient: Tensor, state: State, t: Count, lr: Number) -> tuple[Tensor, Number]:
        """One step; see `Rule`."""
        own, moment = local(gradient), local(state["exp_avg"])
        moment.mul_(self.momentum).add_(own)
        if not self.nesterov:
            return state["exp_avg"], lr
        return parted_like(own.add(moment, alpha=self.momentum), gradient), lr

    def stacked(self, like: Tensor) -> Rule | None:
        """Itself: it steps each value by itself."""
        return self

    def transport_(self, state: State, change: Change, t: Count) -> None:
        """The moment."""
        local(state["exp_avg"]).copy_(change.of(state["exp_avg"]))


@dataclass(frozen=True)
class SGD(Rule):
    """Plain gradient descent."""

    capturable = True

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """No state."""
        return {}

    def step(self, gradient: Tensor, state: State, t: Count, lr: Number) -> tuple[Tensor, Number]:
        """The gradient itself."""
        return gradient, lr

    def stacked(self, like: Tensor) -> Rule | None:
        """Itself: it steps each value by itself."""
        return self

    def transport_(self, state: State, change: Change, t: Count) -> None:
        """Does nothing: there is no state."""


def check_can_transport(rule: Rule) -> None:
    """Raises ValueError for a rule that cannot carry its state over to another P."""
    if type(rule).transport_ is Rule.transport_:
        rule.transport_({}, Change(None, None), 1)


@dataclass(frozen=True)
class EachPart(Rule):
    """Steps the parts of a stack one at a time, for a rule that does not accept stacks.

    Attributes:
        rule: The rule.
    """

    rule: Rule

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """The state of each part."""
        one = self.rule.init(like[0])
        return {name: x.new_zeros((len(like), *x.shape)) for name, x in one.items()}

    def step(self, gradient: Tensor, state: State, t: Count, lr: Number) -> tuple[Tensor, Number]:
        """One step; see `Rule`. The parts have taken the same number of steps."""
        assert not isinstance(t, Tensor)
        steps = [self.rule.step(gradient[i], own, t, lr) for i, own in _parts(state, gradient)]
        if not steps:
            return torch.zeros_like(gradient), lr
        return torch.stack([direction for direction, _ in steps]), steps[0][1]

    def step_(
        self, x: Tensor, gradient: Tensor, state: State, t: Count, lr: Number, weight_decay: float
    ) -> None:
        """Applies the step to each part of x."""
        for i, own in _parts(state, gradient):
            of_part = int(t[i]) if isinstance(t, Tensor) else t
            self.rule.step_(x[i], gradient[i], own, of_part, lr, weight_decay)

    def transport_(self, state: State, change: Change, t: Count) -> None:
        """Carries over the moments of each part."""
        sides = [side for side in change if side is not None]
        for i, own in _parts(state, sides[0]):
            part = Change(*(None if side is None else side[i] for side in change))
            self.rule.transport_(own, part, int(t[i]) if isinstance(t, Tensor) else t)


def _parts(state: State, stack: Tensor) -> Iterator[tuple[int, State]]:
    """The index and the state of each part of a stack."""
    for i in range(len(stack)):
        yield i, {name: x[i] for name, x in state.items()}


def of_stack(rule: Rule, like: Tensor, t: Count = 1) -> Rule:
    """A rule that steps the parts of a stack as a rule steps a gradient like this one.

    Args:
        rule: The rule.
        like: A tensor with the shape of one gradient.
        t: The number of the step. If it differs between the parts it is a tensor, which only a
            capturable rule accepts.
    """
    if isinstance(t, Tensor) and not getattr(rule, "capturable", False):
        return EachPart(rule)
    return stacked_rule(rule, like) or EachPart(rule)


def stacked_rule(rule: Rule, like: Tensor) -> Rule | None:
    """`Rule.stacked`; None for an object that is a rule by its methods only."""
    stacked = getattr(rule, "stacked", None)
    return None if stacked is None else stacked(like)
