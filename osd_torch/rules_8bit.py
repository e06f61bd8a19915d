"""Rules with 8-bit state: Adam8bit and Trace8bit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from osd_torch.numerics import Number
from osd_torch.quantization import (
    BLOCK_SIZE,
    MIN_8BIT_SIZE,
    blocks_fit,
    code_books,
    import_bitsandbytes,
    quantize,
    read_back,
)
from osd_torch.rules import Adam, Count, Rule, State, Trace
from osd_torch.sharding import local, parted_like, placed_like, zeros_placed_as
from osd_torch.transport import Change, second_moment_after


@dataclass(frozen=True)
class Adam8bit(Rule):
    """Adam whose moments are stored in 8 bits, with one float32 scale per 256 values.

    State of fewer than `min_8bit_size` values stays float32, as in bitsandbytes' own optimizers.
    The state of a sharded gradient is sharded with it if each process holds whole blocks, and is
    otherwise replicated, so that the numbers do not depend on the number of processes.

    Attributes:
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment, after bias correction.
        min_8bit_size: Smallest number of values stored in 8 bits.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    min_8bit_size: int = MIN_8BIT_SIZE

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """Codes and scales of both moments, or small moments in float32."""
        import_bitsandbytes()  # fails now instead of at the first large matrix
        like = like.to(torch.float32)
        if like.numel() < self.min_8bit_size:
            return Adam(self.betas, self.eps).init(like)
        blocks = math.ceil(like.numel() / BLOCK_SIZE)
        replicate = not blocks_fit(like)
        state = {}
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = zeros_placed_as(like, like.shape, torch.uint8, replicate)
            state[f"{name}_absmax"] = zeros_placed_as(like, (blocks,), torch.float32, replicate)
        return state

    def step(self, gradient: Tensor, state: State, t: Count, lr: Number) -> tuple[Tensor, Number]:
        """One step; see `Rule`."""
        gradient = gradient.to(torch.float32)
        if state["exp_avg"].dtype != torch.uint8:
            return Adam(self.betas, self.eps).step(gradient, state, t, lr)
        placed = placed_like(gradient, state["exp_avg"])
        part = local(placed).contiguous()
        step = torch.zeros_like(part)
        if isinstance(t, Tensor):
            raise ValueError(
                "bitsandbytes reads the number of a step on the host: capturable is off"
            )
        if part.numel():
            self.move_(step, part, {name: local(x) for name, x in state.items()}, t, lr=1.0)
        # bitsandbytes has subtracted the step.
        return placed_like(parted_like(step.neg_(), placed), gradient), lr

    def stacked(self, like: Tensor) -> Rule | None:
        """Itself, if no block of 256 values spans two matrices."""
        return self if _stacks(like, self.min_8bit_size) else None

    def transport_(self, state: State, change: Change, t: Count) -> None:
        """Dequantizes both moments, carries them over in float32 and quantizes them again."""
        if state["exp_avg"].dtype != torch.uint8:
            Adam(self.betas, self.eps).transport_(state, change, t)
            return
        names = ("exp_avg", "exp_avg_sq")
        codes = [local(state[name]) for name in names]
        scales = [local(state[f"{name}_absmax"]) for name in names]
        books = code_books(codes[0].device)
        first, second = map(read_back, codes, scales, books)
        values = (
            change.of(first),
            second_moment_after(first, second, change, self.betas, t),
        )
        for value, book, own, scale in zip(values, books, codes, scales, strict=True):
            new_codes, new_scales = quantize(value, book)
            own.copy_(new_codes)
            scale.copy_(new_scales.view(scale.shape))

    def move_(self, weight: Tensor, gradient: Tensor, state: State, t: int, lr: float) -> None:
        """One step of `weight` in place, with 8-bit moments and without weight decay.

        Args:
            weight: float32 or bfloat16, contiguous, updated in place.
            gradient: Like `weight`.
            state: With uint8 moments; updated in place.
            t: The number of this step, from 1.
            lr: The step size.
        """
        signed, unsigned = code_books(weight.device)
        # By keyword: the meaning of the positions has changed between releases.
        import_bitsandbytes().functional.optimizer_update_8bit_blockwise(
            optimizer_name="adam",
            g=gradient,
            p=weight,
            state1=state["exp_avg"],
            state2=state["exp_avg_sq"],
            beta1=self.betas[0],
            beta2=self.betas[1],
            beta3=0.0,
            alpha=0.0,
            eps=self.eps,
            step=t,
            lr=lr,
            qmap1=signed,
            qmap2=unsigned,
            absmax1=state["exp_avg_absmax"].view(-1),
            absmax2=state["exp_avg_sq_absmax"].view(-1),
            weight_decay=0.0,
        )


@dataclass(frozen=True)
class Trace8bit(Rule):
    """`Trace` with an 8-bit moment, each value's nearest code; sharded like `Adam8bit`'s.

    Attributes:
        momentum: b of `m <- b m + g`.
        nesterov: Whether the direction is `g + b m` with the new m instead of m.
        min_8bit_size: Smallest number of values stored in 8 bits.
    """

    momentum: float = 0.95
    nesterov: bool = False
    min_8bit_size: int = MIN_8BIT_SIZE

    @property
    def _wide(self) -> Trace:
        return Trace(self.momentum, self.nesterov)

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """Codes and scales, or a small moment in float32."""
        import_bitsandbytes()  # for its code book
        like = like.to(torch.float32)
        if like.numel() < self.min_8bit_size:
            return self._wide.init(like)
        blocks, replicate = math.ceil(like.numel() / BLOCK_SIZE), not blocks_fit(like)
        return {
            "exp_avg": zeros_placed_as(like, like.shape, torch.uint8, replicate),
            "exp_avg_absmax": zeros_placed_as(like, (blocks,), torch.float32, replicate),
        }

    def step(self, gradient: Tensor, state: State, t: Count, lr: Number) -> tuple[Tensor, Number]:
        """One step; see `Rule`. The direction uses the moment before rounding."""
        gradient = gradient.to(torch.float32)
        if state["exp_avg"].dtype != torch.uint8:
            return self._wide.step(gradient, state, t, lr)
        placed = placed_like(gradient, state["exp_avg"])
        part = local(placed).contiguous()
        moment = self._read(state, part.device).mul_(self.momentum).add_(part)
        self._write(state, moment)
        direction = part.add(moment, alpha=self.momentum) if self.nesterov else moment
        return placed_like(parted_like(direction, placed), gradient), lr

    def stacked(self, like: Tensor) -> Rule | None:
        """Itself, if no block of 256 values spans two matrices."""
        return self if _stacks(like, self.min_8bit_size) else None

    def transport_(self, state: State, change: Change, t: Count) -> None:
        """Dequantizes the moment, carries it over in float32 and quantizes it again."""
        if state["exp_avg"].dtype != torch.uint8:
            self._wide.transport_(state, change, t)
        else:
            self._write(state, change.of(self._read(state, state["exp_avg"].device)))

    def _read(self, state: State, device: torch.device) -> Tensor:
        codes, scales = local(state["exp_avg"]), local(state["exp_avg_absmax"])
        return read_back(codes, scales, code_books(device)[0])

    def _write(self, state: State, moment: Tensor) -> None:
        codes, scales = quantize(moment, code_books(moment.device)[0])
        local(state["exp_avg"]).copy_(codes)
        own = local(state["exp_avg_absmax"])
        own.copy_(scales.view(own.shape))


def _stacks(like: Tensor, min_8bit_size: int) -> bool:
    return like.numel() < min_8bit_size or like.numel() % BLOCK_SIZE == 0
