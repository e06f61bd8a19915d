"""Dtypes independent of the caller's settings: accumulators, autocast, the default dtype."""

from __future__ import annotations

import contextlib
import math
import numbers
import zlib
from collections.abc import Iterator, Mapping
from typing import overload

import torch
from torch import Tensor

# A number of the host, or on the device: 0-dimensional, or one for each matrix of a stack.
Number = float | Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: the dtype of moments, norms and products."""
    return torch.promote_types(dtype, torch.float32)


def float32_or_more(tensor: Tensor) -> Tensor:
    """The tensor in its accumulator's dtype."""
    return tensor.to(accumulator_dtype(tensor.dtype))


# Bits of a float32: all but the sign; infinity, above which are the NaNs; and the quiet bit of a
# NaN, which is in the upper half, the bfloat16.
MAGNITUDE, INFINITY, QUIET = 0x7FFFFFFF, 0x7F800000, 0x0040


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Rounds float32 to bfloat16, up or down, so that the expectation over the bits is x.

    A bfloat16 is the upper half of a float32. Adding the bits to the lower half carries into the
    upper half with a probability equal to the lower half's fraction of its range. Numbers that
    bfloat16 represents exactly stay unchanged, including subnormal ones. Infinities and NaN stay
    unchanged, and a finite number beyond the largest bfloat16 rounds to that one.

    Args:
        x: float32.
        bits: int32 in [0, 65536) of x's shape, uniformly distributed; see `random_bits`.

    Example:
        >>> import torch
        >>> x = torch.full((4,), 1 + 2**-9)  # bfloat16 holds 1 and 1 + 2**-7
        >>> round_stochastically(x, torch.tensor([0, 2**14, 3 * 2**14 - 1, 3 * 2**14])).tolist()
        [1.0, 1.0, 1.0, 1.0078125]
    """
    word = x.view(torch.int32)
    rounded = word + bits
    is_kept = ((word & INFINITY) == INFINITY) | ((rounded & INFINITY) == INFINITY)
    half = torch.where(is_kept, word, rounded) >> 16
    half = torch.where((word & MAGNITUDE) > INFINITY, half | QUIET, half)
    return half.to(torch.int16).view(torch.bfloat16)


def random_bits(like: Tensor, key: str) -> Tensor:
    """Draws 16 random bits (int32) per element of a plain tensor, on its device.

    Args:
        like: A tensor with the shape and device.
        key: Identifies the draw: the same key gives the same bits, independent of earlier draws, on
            devices of the same kind.

    Example:
        >>> import torch
        >>> first, again = (random_bits(torch.ones(9), "0/mlp/7") for _ in range(2))
        >>> torch.equal(first, again)
        True
    """
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(key.encode()))
    bits = torch.empty(like.shape, dtype=torch.int32, device=like.device)
    return bits.random_(0, 1 << 16, generator=generator)


@overload
def has_direction(squared_norm: float, dtype: torch.dtype) -> bool: ...
@overload
def has_direction(squared_norm: Tensor, dtype: torch.dtype) -> Tensor: ...
def has_direction(squared_norm: float | Tensor, dtype: torch.dtype) -> bool | Tensor:
    """Whether G / ||G||_F is defined: ||G||_F^2 is not zero, subnormal or infinite.

    Args:
        squared_norm: ||G||_F^2: a number, or a tensor, for which a tensor of bool is returned.
        dtype: The dtype in which it was computed.
    """
    limits = torch.finfo(dtype)
    return (limits.tiny <= squared_norm) & (squared_norm <= limits.max)


def per_part(values: Tensor, stack: Tensor) -> Tensor:
    """One value for each part of a stack, (b,), in a shape that broadcasts with the stack."""
    return values.view(-1, *[1] * (stack.ndim - 1))


def select_(kept: Mapping[str, Tensor], before: Mapping[str, Tensor], is_taken: Tensor) -> None:
    """Restores earlier values in place, all of them or those of some matrices of a stack.

    Args:
        kept: Tensors by name.
        before: Their earlier values.
        is_taken: Whether the new values stay: 0-dimensional, or one flag for each matrix.
    """
    for name, x in kept.items():
        flags = per_part(is_taken, x) if is_taken.ndim else is_taken
        x.copy_(torch.where(flags, x, before[name]))


def plus_product(x: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float) -> Tensor:
    """beta x + alpha a b of matrices, or of stacks of matrices (b, ., .)."""
    return (torch.addmm if x.ndim == 2 else torch.baddbmm)(x, a, b, beta=beta, alpha=alpha)


def _device_types() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


_DEVICE_TYPES = _device_types()


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Disables `torch.autocast` on all devices, as a context or as a decorator.

    An optimizer's products choose their dtypes themselves; under autocast, P^T G would be computed
    in bfloat16.
    """
    with contextlib.ExitStack() as stack:
        for device_type in _DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """Sets float32 as the default dtype, for foreign code that does not specify one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_number(name: str, value: float | Tensor) -> None:
    """Raises ValueError unless `value` is a finite number of at least 0."""
    is_number = isinstance(value, (numbers.Real, Tensor)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}: expected a number of at least 0")


def check_period(every: int, name: str = "update_proj_gap") -> None:
    """Raises ValueError unless `every` is a whole number of at least 1."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{name} is {every!r}: expected a whole number of at least 1")
