"""Adam with one second moment per row of a matrix, for parameters that are not projected."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from osd_torch.numerics import Number, accumulator_dtype, float32_or_more
from osd_torch.quantization import (
    BLOCK_SIZE,
    MIN_8BIT_SIZE,
    code_books,
    import_bitsandbytes,
    quantize_rows_,
    read_rows,
)
from osd_torch.rules import Adam, Count, Rule, State, zeros_like
from osd_torch.sharding import (
    local,
    parted_like,
    placed_like,
    shape_of,
    squared_columns,
    zeros_along,
)


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
        >>> from osd_torch.adam_of_rows import AdamOfRows
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

    def step(self, gradient: Tensor, state: State, t: Count, lr: Number) -> tuple[Tensor, Number]:
        """One step; see `Rule`."""
        gradient = float32_or_more(gradient)
        if axis_of_rows(gradient) is None:
            return self._adam.step(gradient, state, t, lr)
        assert isinstance(t, int)
        first, denominator = self._moved(gradient, state, t)
        return parted_like(first / denominator, gradient), lr

    def step_(
        self, x: Tensor, gradient: Tensor, state: State, t: Count, lr: Number, weight_decay: float
    ) -> None:
        """Avoids a copy of x if it has the moments' dtype."""
        own, gradient = local(x), float32_or_more(gradient)
        if axis_of_rows(gradient) is None:
            self._adam.step_(x, gradient, state, t, lr, weight_decay)
        elif own.dtype != gradient.dtype:
            super().step_(x, gradient, state, t, lr, weight_decay)
        else:
            assert isinstance(t, int)
            if weight_decay:
                own.mul_(1 - lr * weight_decay)
            own.addcdiv_(*self._moved(gradient, state, t), value=-float(lr))

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


def axis_of_rows(x: Tensor) -> int | None:
    """The axis with one second moment per entry in `AdamOfRows`; None: plain Adam."""
    if x.ndim != 2 or min(x.shape) < 2:
        return None
    return 0 if x.shape[0] >= x.shape[1] else 1
