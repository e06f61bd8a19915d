"""Rules with 8-bit state or one number of state per row: Adam8bit, Trace8bit and AdamOfRows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from osd_torch.numerics import accumulator_dtype, float32_or_more
from osd_torch.quantization import (
    BLOCK_SIZE,
    MIN_8BIT_SIZE,
    blocks_fit,
    code_books,
    import_bitsandbytes,
    quantize,
    quantize_rows_,
    read_back,
    read_rows,
)
from osd_torch.rules import Adam, Change, Rule, State, Trace, transported_second_moment, zeros_like
from osd_torch.sharding import (
    local,
    parted_like,
    placed_like,
    shape_of,
    squared_columns,
    zeros_along,
    zeros_placed_as,
)


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

    def step(self, gradient: Tensor, state: State, t: int, lr: float) -> tuple[Tensor, float]:
        """One step; see `Rule`."""
        gradient = gradient.to(torch.float32)
        if state["exp_avg"].dtype != torch.uint8:
            return Adam(self.betas, self.eps).step(gradient, state, t, lr)
        placed = placed_like(gradient, state["exp_avg"])
        part = local(placed).contiguous()
        step = torch.zeros_like(part)
        if part.numel():
            self.move_(step, part, {name: local(x) for name, x in state.items()}, t, lr=1.0)
        # bitsandbytes has subtracted the step.
        return placed_like(parted_like(step.neg_(), placed), gradient), lr

    def transport_(self, state: State, change: Change, t: int) -> None:
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
            transported_second_moment(first, second, change, self.betas, t),
        )
        for value, book, own, scale in zip(values, books, codes, scales, strict=True):
            new_codes, new_scales = quantize(value, book)
            own.copy_(new_codes)
            scale.copy_(new_scales)

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
            absmax1=state["exp_avg_absmax"],
            absmax2=state["exp_avg_sq_absmax"],
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

    def step(self, gradient: Tensor, state: State, t: int, lr: float) -> tuple[Tensor, float]:
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

    def transport_(self, state: State, change: Change, t: int) -> None:
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
        local(state["exp_avg_absmax"]).copy_(scales)


@dataclass(frozen=True)
class AdamOfRows(Rule):
    """Adam with one second moment per row of a matrix, the mean of g^2 along the row.

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) mean(g^2)
        direction = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Rows are the entries of the longer axis, whichever it is: the vocabulary of an embedding or a
    head. For a square matrix they are the entries of the first axis. The state of (m, n) has mn +
    max(m, n) numbers, compared with Adam's 2mn. All other arrays, including matrices with one row
    or column, have Adam's state and step.

    In 8 bits, m is stored row by row, in blocks of up to 256 values that do not cross rows. Codes
    far below the largest value of their block are so coarse that b1 times a value may round back to
    the same code. A row without gradients that shared a block with a row of steady magnitude would
    keep its m while v decays; in separate blocks m decays with its scale.

    Attributes:
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment, after bias correction, as in
            `torch.optim.AdamW`.
        first_8bit: Whether to store the first moment of a matrix of at least 4096 values in 8 bits,
            with the code book of bitsandbytes, which must be installed.

    Example:
        >>> import torch
        >>> from osd_torch.rules_8bit import AdamOfRows
        >>> state = AdamOfRows().init(torch.zeros(32, 8))
        >>> {name: tuple(x.shape) for name, x in state.items()}
        {'exp_avg': (32, 8), 'exp_avg_sq_row': (32,)}
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    first_8bit: bool = False

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """The first moment, or its codes and scales, and one number per row.

        Raises:
            ImportError: `first_8bit` is set, but bitsandbytes cannot be imported.
        """
        if self.first_8bit:
            import_bitsandbytes()  # fails now instead of at a large matrix
        like = shape_of(like, accumulator_dtype(like.dtype))
        axis = axis_of_rows(like)
        if axis is None:
            return self._adam.init(like)
        rows, width = like.shape[axis], like.shape[1 - axis]
        second = {"exp_avg_sq_row": zeros_along(like, (rows,), like.dtype, (axis,))}
        if not self.first_8bit or like.numel() < MIN_8BIT_SIZE:
            return {"exp_avg": zeros_like(like), **second}
        blocks = math.ceil(width / BLOCK_SIZE)
        return {
            "exp_avg": zeros_along(like, (rows, width), torch.uint8, (axis, None)),
            "exp_avg_absmax": zeros_along(like, (rows, blocks), torch.float32, (axis, None)),
            **second,
        }

    def step(self, gradient: Tensor, state: State, t: int, lr: float) -> tuple[Tensor, float]:
        """One step; see `Rule`."""
        gradient = float32_or_more(gradient)
        if axis_of_rows(gradient) is None:
            return self._adam.step(gradient, state, t, lr)
        first, denominator = self._moved(gradient, state, t)
        return parted_like(first / denominator, gradient), lr

    def step_(
        self, x: Tensor, gradient: Tensor, state: State, t: int, lr: float, weight_decay: float
    ) -> None:
        """Avoids a copy of x if it has the moments' dtype."""
        own, gradient = local(x), float32_or_more(gradient)
        if axis_of_rows(gradient) is None:
            self._adam.step_(x, gradient, state, t, lr, weight_decay)
        elif own.dtype != gradient.dtype:
            super().step_(x, gradient, state, t, lr, weight_decay)
        else:
            if weight_decay:
                own.mul_(1 - lr * weight_decay)
            own.addcdiv_(*self._moved(gradient, state, t), value=-lr)

    def _moved(self, gradient: Tensor, state: State, t: int) -> tuple[Tensor, Tensor]:
        """Updates the moments of a matrix: (m, its divisor), for this process's shard.

        m is the state itself or, in 8 bits, m before rounding.
        """
        is_flipped = axis_of_rows(gradient) == 1
        turned = gradient.mT if is_flipped else gradient  # (rows, width)
        squares = local(squared_columns(turned.mT)) / turned.shape[1]
        second = local(state["exp_avg_sq_row"]).lerp_(squares, 1 - self.betas[1])
        root = (second / (1 - self.betas[1] ** t)).sqrt_().add_(self.eps)
        denominator = root.mul_(1 - self.betas[0] ** t).unsqueeze(0 if is_flipped else 1)
        if state["exp_avg"].dtype != torch.uint8:
            return local(state["exp_avg"]).lerp_(local(gradient), 1 - self.betas[0]), denominator
        first = local(placed_like(self._moved_in_8_bits(turned, state), turned)).to(root.dtype)
        return first.mT if is_flipped else first, denominator

    def _moved_in_8_bits(self, gradient: Tensor, state: State) -> Tensor:
        """Updates the codes of m and returns m before rounding.

        Args:
            gradient: (rows, width).
            state: Updated in place.

        Returns:
            (rows, width), float32, sharded over the processes like the codes.
        """
        placed = placed_like(gradient, state["exp_avg"])
        codes, scales = local(state["exp_avg"]), local(state["exp_avg_absmax"])
        book = code_books(codes.device)[0]
        moment = read_rows(codes, scales, book)
        moment.lerp_(local(placed).to(torch.float32), 1 - self.betas[0])
        quantize_rows_(moment, codes, scales, book)
        return parted_like(moment, placed)

    @property
    def _adam(self) -> Adam:
        return Adam(self.betas, self.eps)


def axis_of_rows(like: Tensor) -> int | None:
    """The axis with one second moment per entry in `AdamOfRows`; None: plain Adam."""
    if like.ndim != 2 or min(like.shape) < 2:
        return None
    return 0 if like.shape[0] >= like.shape[1] else 1
