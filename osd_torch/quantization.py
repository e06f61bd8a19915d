"""8-bit numbers in blocks of 256 with one scale each, by bitsandbytes on CUDA and on the CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from osd_torch.numerics import float32_by_default
from osd_torch.sharding import first_axis_parts

BLOCK_SIZE = 256  # values that share one scale; fixed by bitsandbytes
MIN_8BIT_SIZE = 4096  # smallest size stored in 8 bits, as in bitsandbytes' own optimizers
_CHUNK = 2**22  # values quantized or dequantized at a time, to limit temporary copies


def import_bitsandbytes() -> Any:
    """Imports bitsandbytes at first use, because the import takes seconds.

    Raises:
        ImportError: It cannot be imported; the message says what to install.
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
    """The 256 float32 values of the codes of the first and of the second moment."""
    dynamic_map = import_bitsandbytes().functional.create_dynamic_map
    with float32_by_default():  # it does not specify a dtype
        return dynamic_map(signed=True).to(device), dynamic_map(signed=False).to(device)


def read_back(codes: Tensor, scales: Tensor, code_book: Tensor) -> Tensor:
    """Dequantizes 8-bit codes to float32, in their shape."""
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
    """Writes a matrix in 8 bits with blocks that do not cross rows, as in `osd_jax`.

    Args:
        matrix: (a, b), float32.
        codes: (a, b), uint8, written in place.
        scales: (a, ceil(b / 256)), float32, written in place.
        code_book: The 256 values of the codes.
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
    """The float32 matrix (a, b) that `quantize_rows_` wrote, to the precision of a code."""
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for part, own, scale in _in_chunks(values, codes, scales):
        blocks = scale.repeat_interleave(BLOCK_SIZE, dim=1)[:, : codes.shape[1]]
        torch.mul(code_book[own.int()], blocks, out=part)
    return values


def _in_chunks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of rows of equally tall matrices; those of the first have at most `_CHUNK` values."""
    rows = max(1, _CHUNK // max(1, matrices[0].shape[1]))
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def blocks_fit(like: Tensor) -> bool:
    """Whether each process's shard of a tensor consists of whole blocks, as many as its scales."""
    parts = first_axis_parts(like)
    if parts is None or parts == 1:
        return parts == 1
    row = math.prod(like.shape[1:])
    values, scales = math.ceil(like.shape[0] / parts) * row, math.ceil(like.numel() / BLOCK_SIZE)
    return values == math.ceil(scales / parts) * BLOCK_SIZE
