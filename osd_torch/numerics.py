"""Dtypes that do not depend on the caller's settings: accumulators, autocast, the default dtype."""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
from collections.abc import Iterator

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: what moments, norms and products are kept in."""
    return torch.promote_types(dtype, torch.float32)


def float32_or_more(tensor: Tensor) -> Tensor:
    """The tensor in its accumulator's dtype."""
    return tensor.to(accumulator_dtype(tensor.dtype))


def has_direction(squared_norm: float, dtype: torch.dtype) -> bool:
    """Whether G / ||G||_F is defined: ||G||_F^2 is neither zero (nor subnormal) nor infinite.

    Args:
        squared_norm: ||G||_F^2.
        dtype: That it was computed in.
    """
    limits = torch.finfo(dtype)
    return limits.tiny <= squared_norm <= limits.max


@functools.cache
def _device_types() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Disables `torch.autocast` on all devices, as a context or as a decorator.

    An optimizer's products choose their dtypes themselves. Under autocast, P^T G would be computed
    in bfloat16.
    """
    with contextlib.ExitStack() as stack:
        for device_type in _device_types():
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """Sets float32 as the default dtype, for code of others that names none."""
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
