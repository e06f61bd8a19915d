"""Which side of a matrix P projects, and checks of parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from osd_names import ResolvedSide, Side
from osd_torch.sharding import has_plain_placement

OUTPUT_AXIS, INPUT_AXIS = 0, 1  # axes of a matrix
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def resolve_side(side: Side, tensor: Tensor) -> ResolvedSide:
    """Resolves a `side` to "input", "output" or "both" for a matrix (output, input)."""
    if side == "input" or side == "output" or side == "both":
        return side
    outputs, inputs = tensor.shape
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
        tensor: A matrix.
        side: "output", "input" or "both".
    """
    return tensor.mT if side == "input" else tensor
