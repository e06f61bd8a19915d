"""Which axes of a parameter form a matrix, which side of it P projects, and checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osd_names import ResolvedSide, Side
from osd_torch.sharding import has_plain_placement

OUTPUT_AXIS, INPUT_AXIS = 0, 1  # axes of a matrix
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class SubspaceDimensionNumbers(NamedTuple):
    """Which axes of a parameter form its matrices; all others are batch axes.

    Such a parameter is a stack of matrices (output, input), each with its own P, such as the
    experts of a layer.

    Attributes:
        reduction_axis: The input side, the axes over which a layer sums.
        output_axis: The output side.
        parts: The number of equal matrices into which the output side is divided, such as 3 for a
            weight that holds the queries, keys and values.

    Example:
        >>> import torch, osd_torch
        >>> kernel = torch.nn.Conv2d(3, 16, 5).weight  # output, input, height, width
        >>> numbers = osd_torch.SubspaceDimensionNumbers(reduction_axis=(1, 2, 3), output_axis=0)
        >>> optimizer = osd_torch.SubspaceAdamW(
        ...     [{"params": [kernel], "rank": 4, "dimension_numbers": numbers}])
        >>> optimizer.state[kernel]["basis"].shape
        torch.Size([1, 16, 4])
    """

    reduction_axis: int | tuple[int, ...] = 1
    output_axis: int | tuple[int, ...] = 0
    parts: int = 1


class Axes(NamedTuple):
    """The axes of a parameter: of its batch, its output side and its input side."""

    batch: tuple[int, ...]
    output: tuple[int, ...]
    input: tuple[int, ...]


def _as_tuple(axis: int | tuple[int, ...]) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)


def axes_of(numbers: SubspaceDimensionNumbers, shape: Sequence[int], name: str = "") -> Axes:
    """The axes of a parameter.

    Args:
        numbers: Its dimension numbers.
        shape: Its shape.
        name: Its name, for messages.

    Raises:
        ValueError: The numbers do not describe matrices of this parameter.
    """
    sides = [_as_tuple(numbers.output_axis), _as_tuple(numbers.reduction_axis)]
    used = [axis for side in sides for axis in side]
    in_range = all(-len(shape) <= axis < len(shape) for axis in used)
    sides = [tuple(axis % len(shape) for axis in side) for side in sides] if in_range else sides
    used = [axis for side in sides for axis in side]
    if not in_range or len(set(used)) != len(used) or not all(sides):
        raise ValueError(
            f"parameter '{name}' of shape {tuple(shape)} has {numbers}: expected two disjoint, "
            "non-empty sets of its axes"
        )
    outputs = math.prod(shape[axis] for axis in sides[0])
    if not isinstance(numbers.parts, int) or numbers.parts < 1 or outputs % numbers.parts:
        raise ValueError(
            f"parameter '{name}' of shape {tuple(shape)} has {numbers}: expected parts that divide "
            f"its output side of {outputs} equally"
        )
    batch = tuple(axis for axis in range(len(shape)) if axis not in used)
    return Axes(batch, sides[0], sides[1])


def matrix_shape(shape: Sequence[int], numbers: SubspaceDimensionNumbers | None) -> tuple[int, int]:
    """(output, input) of each matrix of a parameter."""
    if numbers is None:
        outputs, inputs = shape
        return outputs, inputs
    axes = axes_of(numbers, shape)
    outputs = math.prod(shape[axis] for axis in axes.output)
    return outputs // numbers.parts, math.prod(shape[axis] for axis in axes.input)


def matrix_count(shape: Sequence[int], numbers: SubspaceDimensionNumbers) -> int:
    """The number of matrices of a parameter."""
    return math.prod(shape[axis] for axis in axes_of(numbers, shape).batch) * numbers.parts


def to_stack(tensor: Tensor, numbers: SubspaceDimensionNumbers) -> Tensor:
    """A parameter or its gradient as a stack of matrices (b, output, input), a view if possible."""
    axes = axes_of(numbers, tensor.shape)
    permuted = tensor.permute(*axes.batch, *axes.output, *axes.input)
    count = matrix_count(tensor.shape, numbers)
    return permuted.reshape(count, *matrix_shape(tensor.shape, numbers))


def from_stack(stack: Tensor, numbers: SubspaceDimensionNumbers, shape: Sequence[int]) -> Tensor:
    """The parameter of a shape from its stack of matrices."""
    order = [axis for axes in axes_of(numbers, shape) for axis in axes]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return stack.reshape([shape[axis] for axis in order]).permute(inverse)


def resolve_side(side: Side, shape: Sequence[int]) -> ResolvedSide:
    """Resolves a `side` to "input", "output" or "both" for the (output, input) of a matrix."""
    if side == "input" or side == "output" or side == "both":
        return side
    outputs, inputs = shape
    return "input" if (inputs <= outputs) == (side == "shorter") else "output"


def check_rank(rank: int) -> None:
    """Raises ValueError unless `rank` is a whole number of at least 1."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank is {rank!r}: expected a whole number of at least 1")


def check_dtype(name: str, param: Tensor) -> None:
    """Raises ValueError for a dtype that the optimizers do not support."""
    if param.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"parameter '{name}' has dtype {param.dtype}: expected float32, bfloat16 or float64 "
            "(float16 overflows in squared gradients; use bfloat16)"
        )


def check_placement(name: str, param: Tensor) -> None:
    """Raises ValueError for a matrix with an axis that is sharded over two mesh dimensions."""
    if not has_plain_placement(param):
        placements = getattr(param, "placements", ())
        raise ValueError(
            f"parameter '{name}' is placed as {placements}: expected each of its axes sharded "
            "over at most one dimension of the mesh (fully_shard with tensor parallelism over "
            "the same axis is not supported); put it into a group without rank"
        )


def check_basis_dtype(dtype: torch.dtype | None, name: str = "basis_dtype") -> None:
    """Raises ValueError unless `dtype` is None or a supported dtype of P; `name` is the option."""
    if dtype is not None and dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"{name} is {dtype!r}: expected None, float32, bfloat16 or float64")


def to_matrix(tensor: Tensor, side: ResolvedSide) -> Tensor:
    """Views a weight or gradient (output, input) as M (p, q), the projected axis first; or back.

    Args:
        tensor: A matrix or a stack.
        side: "output", "input" or "both".
    """
    return tensor.mT if side == "input" else tensor
