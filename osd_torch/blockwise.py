"""8-bit optimizer state, by bitsandbytes, on CUDA and on the CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from osd_torch.numerics import float32_by_default
from osd_torch.rules import Adam, Change, Rule, State, Trace, transported_second_moment
from osd_torch.sharding import (
    first_axis_parts,
    local,
    parted_like,
    placed_like,
    zeros_placed_as,
)

BLOCK_SIZE = 256  # values that share one scale; fixed by bitsandbytes
MIN_8BIT_SIZE = 4096  # fewest values that are worth 8 bits, as in bitsandbytes' own optimizers
_CHUNK = 2**22  # values that are quantized or read back at a time, for the sake of their copies


def import_bitsandbytes() -> Any:
    """The library, imported at first use because that takes seconds.

    Raises:
        ImportError: if it cannot be imported, saying what to install.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "8-bit optimizer state needs bitsandbytes, which could not be imported: "
            "`pip install 'bitsandbytes>=0.50'`, or choose an optimizer and proj_type without 8bit"
        ) from error
    return bitsandbytes


@functools.cache
def code_books(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 float32 values that the codes of the first and of the second moment stand for."""
    dynamic_map = import_bitsandbytes().functional.create_dynamic_map
    with float32_by_default():  # it names no dtype
        return dynamic_map(signed=True).to(device), dynamic_map(signed=False).to(device)


@dataclass(frozen=True)
class Adam8bit(Rule):
    """Adam whose moments are held in 8 bits, one float32 scale to each 256 values.

    State of fewer than `min_8bit_size` values stays float32, as in bitsandbytes' own optimizers.
    The state of a sharded gradient is sharded with it where whole blocks lie on each process, and
    is else replicated, so that the numbers do not depend on the number of processes.

    Attributes:
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment, after the bias correction.
        min_8bit_size: Fewest values that are worth 8 bits.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    min_8bit_size: int = MIN_8BIT_SIZE

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """Codes and scales of both moments, or small moments in float32."""
        import_bitsandbytes()  # missing, it is an error now and not at the first large matrix
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
        # bitsandbytes has taken the step, downhill.
        return placed_like(parted_like(step.neg_(), placed), gradient), lr

    def transport_(self, state: State, change: Change, t: int) -> None:
        """Both moments, read back, carried over in float32 and quantized again."""
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
            weight: float32 or bfloat16, contiguous, written in place.
            gradient: Like `weight`.
            state: With uint8 moments; written in place.
            t: The number of this step, from 1.
            lr: The step size.
        """
        signed, unsigned = code_books(weight.device)
        # By keyword: what the positions mean has changed between releases.
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
    """`Trace` with its moment in 8 bits, each value's nearest code; placed as `Adam8bit`'s.

    Attributes:
        momentum: b of `m <- b m + g`.
        nesterov: The direction is `g + b m` with the new m, and not m.
        min_8bit_size: Fewest values that are worth 8 bits.
    """

    momentum: float = 0.95
    nesterov: bool = False
    min_8bit_size: int = MIN_8BIT_SIZE

    @property
    def _wide(self) -> Trace:
        return Trace(self.momentum, self.nesterov)

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """Codes and scales, or a small moment in float32."""
        import_bitsandbytes()  # whose code book it is
        like = like.to(torch.float32)
        if like.numel() < self.min_8bit_size:
            return self._wide.init(like)
        blocks, replicate = math.ceil(like.numel() / BLOCK_SIZE), not blocks_fit(like)
        return {
            "exp_avg": zeros_placed_as(like, like.shape, torch.uint8, replicate),
            "exp_avg_absmax": zeros_placed_as(like, (blocks,), torch.float32, replicate),
        }

    def step(self, gradient: Tensor, state: State, t: int, lr: float) -> tuple[Tensor, float]:
        """One step; see `Rule`. The direction has the moment before it is rounded."""
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
        """The moment, read back, carried over in float32 and quantized again."""
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


def read_back(codes: Tensor, scales: Tensor, code_book: Tensor) -> Tensor:
    """The float32 values of 8-bit codes, in their shape."""
    values = code_book[codes.flatten().long()]
    blocks = scales.repeat_interleave(BLOCK_SIZE)[: values.numel()]
    return (values * blocks).view(codes.shape)


def quantize(values: Tensor, code_book: Tensor, block: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """(codes, scales): each block divided by its largest magnitude, each value's nearest code."""
    flat = values.flatten()
    pad = -flat.numel() % block
    blocks = torch.nn.functional.pad(flat, (0, pad)).view(-1, block)
    scales = blocks.abs().amax(dim=1)
    relative = (blocks / scales.clamp(min=torch.finfo(scales.dtype).tiny)[:, None]).flatten()
    middles = (code_book[1:] + code_book[:-1]) / 2
    codes = torch.bucketize(relative, middles)[: flat.numel()].to(torch.uint8)
    return codes.view(values.shape), scales


def quantize_rows_(matrix: Tensor, codes: Tensor, scales: Tensor, code_book: Tensor) -> None:
    """Writes a matrix in 8 bits whose blocks end with each row, as those of `osd_jax` do.

    Args:
        matrix: (a, b), float32.
        codes: (a, b), uint8, written in place.
        scales: (a, ceil(b / 256)), float32, written in place.
        code_book: The 256 values that codes stand for.
    """
    if not matrix.numel():
        return
    width = matrix.shape[1]
    block = min(BLOCK_SIZE, width)
    for part, own, scale in _in_chunks(matrix, codes, scales):
        padded = torch.nn.functional.pad(part, (0, -width % block))
        new_codes, new_scales = quantize(padded, code_book, block)
        own.copy_(new_codes[:, :width])
        scale.copy_(new_scales.view(scale.shape))


def read_rows(codes: Tensor, scales: Tensor, code_book: Tensor) -> Tensor:
    """The float32 matrix (a, b) that `quantize_rows_` wrote, to a code's precision."""
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for part, own, scale in _in_chunks(values, codes, scales):
        blocks = scale.repeat_interleave(BLOCK_SIZE, dim=1)[:, : codes.shape[1]]
        torch.mul(code_book[own.int()], blocks, out=part)
    return values


def _in_chunks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of matrices of as many rows each, the first of them of at most `_CHUNK` values."""
    rows = max(1, _CHUNK // max(1, matrices[0].shape[1]))
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def blocks_fit(like: Tensor) -> bool:
    """Whether each process' part of a tensor is whole blocks, and of as many as its scales'."""
    parts = first_axis_parts(like)
    if parts is None or parts == 1:
        return parts == 1
    row = math.prod(like.shape[1:])
    values, scales = math.ceil(like.shape[0] / parts) * row, math.ceil(like.numel() / BLOCK_SIZE)
    return values == math.ceil(scales / parts) * BLOCK_SIZE
