"""Several processes: DDP, FSDP2, reduced sketches, and the sharding of the optimizer's state.

Replicated weights (DDP). Every process holds all weights and all state. DDP averages the gradients;
alternatively `optimizer.reduce = mean_over_processes()` averages sketches instead: R first, then
A = G R^T with the averaged R, which is exact. The squared norm of an average cannot be computed
from the partial norms; an estimate replaces it (`sketch.as_in_subspace`). It scales the gradient of
P: SGD is affected, and a scale-invariant rule only if the error factor of the estimate changes from
step to step.

Sharded weights (FSDP2, `fully_shard`). Weights, gradients and state are DTensors, and each process
computes on its shard. With M (p, q) the gradient, its projected axis first:

                                        p is sharded     q is sharded
    P (p, r), and the state of its rule sharded alike    replicated
    R (r, q), and the moments of W      replicated       sharded alike
    summed over the processes           R, P^T A, P^T P  A

`fully_shard` shards the rows, the output side. ||G||_F^2 and Adafactor's means are summed as well.
A gradient is all-gathered only when its SVD sets P; each process then keeps its shard of the P of
the first process. 8-bit moments are sharded if their blocks of 256 values fit the shards, and
replicated otherwise, so that the numbers and a checkpoint's tensors are the same for any number of
processes.

For plain tensors the functions below only do arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.tensor as dtensor
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

Reduce = Callable[[Tensor], Tensor]
Model = TypeVar("Model", bound=torch.nn.Module)


def process_count() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes; the tensor itself with one process."""
    if process_count() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def is_first_process() -> bool:
    """Whether this process writes and prints: the first of several, or the only one."""
    return process_index() == 0


def process_index() -> int:
    """The index of this process among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(value: Any) -> list[Any]:
    """All-gathers an object from each process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def mean_over_processes(group: dist.ProcessGroup | None = None) -> Reduce:
    """Returns a function that averages a tensor over the processes of a group.

    Args:
        group: The process group. None: all processes.

    Returns:
        tensor -> tensor, with the same shape and dtype, equal on every process; it may modify its
        argument. Every process must call it for the same tensors in the same order.

    Raises:
        ValueError: No process group is initialized.

    Example:
        >>> import torch, osd_torch
        >>> torch.distributed.init_process_group(
        ...     "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> reduce = osd_torch.mean_over_processes()
        >>> reduce(torch.ones(2))
        tensor([1., 1.])
        >>> torch.distributed.destroy_process_group()
    """
    if not dist.is_initialized():
        raise ValueError(
            "there is no process group to average over: call torch.distributed.init_process_group"
        )
    processes = dist.get_world_size(group)

    def averaged(tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=group)
        return tensor.div_(processes)

    return averaged


def means_of(values: Sequence[float], reduce: Reduce, device: torch.device) -> list[float]:
    """The mean over processes of each value, the same list on every process.

    Args:
        values: Values of this process, equally many on every process; the mean of a flag is the
            fraction of the processes that set it.
        reduce: The mean over processes.
        device: A device that `reduce` supports.
    """
    return reduce(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


def data_parallel(model: torch.nn.Module) -> DistributedDataParallel:
    """Wraps the model in DistributedDataParallel, whose backward pass averages gradients.

    Args:
        model: Its parameters are on the CPU, or all on this process's GPU.

    Returns:
        The wrapped model.

    Example:
        >>> import torch, osd_torch
        >>> torch.distributed.init_process_group(
        ...     "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> model = osd_torch.data_parallel(torch.nn.Linear(24, 16))
        >>> torch.distributed.destroy_process_group()
    """
    device = next(model.parameters()).device
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, which shares its memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor) -> tuple[int, ...]:
    """Which shard of a DTensor this process holds: its place in each mesh dimension.

    Equal on processes that hold the same shard; empty for a replicated tensor.
    """
    if not isinstance(tensor, DTensor):
        return ()
    places = tensor.device_mesh.get_coordinate() or ()  # none on a process outside the mesh
    pairs = zip(places, tensor.placements, strict=False)
    return tuple(place for place, placement in pairs if not placement.is_replicate())


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered on every process; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def from_parts(
    part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]
) -> Tensor:
    """The DTensor of a global shape whose shard on this process is given; partial sums are summed.

    Args:
        part: Contiguous.
        mesh: The processes.
        placements: One for each dimension of the mesh.
        shape: The global shape.
    """
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    whole_shape = torch.Size(shape)
    return settled(DTensor.from_local(part, mesh, placements, shape=whole_shape, stride=stride))


def parted_like(part: Tensor, like: Tensor) -> Tensor:
    """The DTensor with the shape and placement of `like`; the shard itself if that is plain."""
    if not isinstance(like, DTensor):
        return part
    return from_parts(part.contiguous(), like.device_mesh, like.placements, like.shape)


def settled(tensor: Tensor) -> Tensor:
    """A DTensor with its partial sums summed over the processes; any other tensor unchanged."""
    if not isinstance(tensor, DTensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=placements)


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A DTensor with the placement of another one; any other tensor unchanged."""
    if not isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    return tensor.redistribute(placements=like.placements)


def distributed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor with the placement of another one: a DTensor if that is one, else a plain one.

    Args:
        tensor: Not sharded and equal on every process (if not, the first one's values are used), or
            a DTensor.
        like: A tensor with the same global shape.
    """
    if not isinstance(like, DTensor):
        return whole(tensor)
    if isinstance(tensor, DTensor):
        return tensor.redistribute(like.device_mesh, like.placements)
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def matmul(a: Tensor, b: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The matrix product a b of shards on each process, summed where necessary.

    Args:
        a: (p, q).
        b: (q, r), sharded such that no shard needs to be fetched.
        multiply: The product of two plain matrices.

    Raises:
        ValueError: A shard of one of the DTensors would have to be fetched.
    """
    if not isinstance(a, DTensor) or not isinstance(b, DTensor):
        return multiply(a, b)
    placements = [
        _product_placement(*pair) for pair in zip(a.placements, b.placements, strict=True)
    ]
    part = multiply(local(a), local(b))
    return from_parts(part, a.device_mesh, placements, (a.shape[0], b.shape[1]))


def _product_placement(a: Placement, b: Placement) -> Placement:
    if a.is_replicate() and b.is_replicate():
        return Replicate()
    if a.is_shard(0) and b.is_replicate():
        return Shard(0)
    if a.is_replicate() and b.is_shard(1):
        return Shard(1)
    if a.is_shard(1) and b.is_shard(0):
        return Partial()
    raise ValueError(f"matrices placed as {a} and {b} cannot be multiplied without fetching shards")


def mean(tensor: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The mean along an axis, or of all values; also correct for uneven shards."""
    if not isinstance(tensor, DTensor):
        return tensor.mean() if dim is None else tensor.mean(dim=dim, keepdim=keepdim)
    total = tensor.sum() if dim is None else tensor.sum(dim=dim, keepdim=keepdim)
    return settled(total) / (tensor.numel() if dim is None else tensor.shape[dim])


def squared_norm(matrix: Tensor) -> Tensor:
    """||M||_F^2 of a matrix, or of each matrix of a stack, (..., p, q) -> (...,).

    A plain tensor, float32 (float64 for float64).
    """
    if matrix.ndim < 3:
        return squared_norms([matrix])[0]
    wide = torch.promote_types(matrix.dtype, torch.float32)
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=wide).square()


def squared_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of squares of each tensor: one reduction for all that are placed alike."""
    squares: list[Tensor] = list(tensors)
    alike: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        layout = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
        alike.setdefault((layout, tensor.device, tensor.dtype), []).append(i)
    for (layout, _, dtype), places in alike.items():
        wide = torch.promote_types(dtype, torch.float32)
        norms = torch._foreach_norm([local(tensors[i]) for i in places], 2, dtype=wide)
        together = torch.stack(norms).square()  # one kernel for all
        if layout:
            together = _sum_of_parts(together, *layout)
        for i, square in zip(places, together.unbind(), strict=True):
            squares[i] = square
    return squares


def squared_columns(matrix: Tensor) -> Tensor:
    """||M_j||^2 of each column: (..., p, q) -> (..., q), in float32 (float64 for float64).

    A DTensor, sharded like the columns, if M is one.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    squares = torch.linalg.vector_norm(local(matrix), dim=-2, dtype=wide).square()
    if not isinstance(matrix, DTensor):
        return squares
    along = lambda p: Partial() if p.is_shard(0) else Shard(0) if p.is_shard(1) else Replicate()
    placements = [along(p) for p in matrix.placements]
    return from_parts(squares, matrix.device_mesh, placements, matrix.shape[1:])


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all values of some tensors, as a plain 0-dimensional float32 tensor.

    float64 for float64.
    """
    squares = squared_norms(tensors)
    if not squares:
        return torch.zeros((), dtype=torch.float32)
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def first_index(tensor: Tensor) -> int:
    """The index along the first axis of the first entry that this process holds."""
    if not isinstance(tensor, DTensor):
        return 0
    placements = (tensor.device_mesh, tensor.placements)
    return compute_local_shape_and_global_offset(tensor.shape, *placements)[1][0]


def has_plain_placement(tensor: Tensor) -> bool:
    """Whether no axis of a tensor is sharded over two dimensions of a mesh."""
    if not isinstance(tensor, DTensor):
        return True
    sharded = [p for p in tensor.placements if p.is_shard()]
    axes = [p.dim for p in sharded]  # type: ignore[attr-defined]
    return all(type(p) is Shard for p in sharded) and len(set(axes)) == len(axes)


def is_along_first_axis(tensor: Tensor) -> bool:
    """Whether a tensor is sharded along its first axis only, over one dimension of a mesh."""
    return isinstance(tensor, DTensor) and first_axis_parts(tensor) is not None


def first_axis_parts(tensor: Tensor) -> int | None:
    """The shards of a tensor's first axis; None if another axis is sharded too."""
    if not isinstance(tensor, DTensor):
        return 1
    sharded = [i for i, p in enumerate(tensor.placements) if p.is_shard()]
    is_simple = all(tensor.placements[i].is_shard(0) for i in sharded) and len(sharded) < 2
    return math.prod(tensor.device_mesh.size(i) for i in sharded) if is_simple else None


def zeros_along(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype, axes: Sequence[int | None]
) -> Tensor:
    """Zeros whose axes are sharded like axes of `like`.

    Args:
        like: A parameter.
        shape: The global shape.
        dtype: dtype of the result.
        axes: For each axis of the result the axis of `like` that it follows, or None.
    """
    if not isinstance(like, DTensor):
        return torch.zeros(shape, dtype=dtype, device=like.device)
    placements: list[Placement] = [
        next(
            (Shard(i) for i, axis in enumerate(axes) if axis is not None and p.is_shard(axis)),
            Replicate(),
        )
        for p in like.placements
    ]
    return dtensor.zeros(shape, dtype=dtype, device_mesh=like.device_mesh, placements=placements)


def shape_of(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor with another dtype, as a template for others; a plain one takes no memory."""
    if isinstance(like, DTensor):
        return like.detach().to(dtype)
    return torch.empty((), dtype=dtype, device=like.device).expand(like.shape)


def zeros_placed_as(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype, replicate: bool = False
) -> Tensor:
    """Zeros, sharded over the processes like `like`, or replicated."""
    if not isinstance(like, DTensor):
        return torch.zeros(shape, dtype=dtype, device=like.device)
    placements = [Replicate()] * like.device_mesh.ndim if replicate else like.placements
    return dtensor.zeros(shape, dtype=dtype, device_mesh=like.device_mesh, placements=placements)


def on_host(values: Sequence[Tensor]) -> list[Tensor]:
    """0-dimensional tensors, of one device or of several, on the CPU; one device sync."""
    if all(value.is_cpu for value in values):
        return list(values)
    return list(torch.stack([value.to(values[0].device) for value in values]).cpu().unbind())


def all_finite(tensors: Sequence[Tensor], squares: Sequence[Tensor] | None = None) -> bool:
    """Whether every value is finite, on all processes that share a tensor; one device sync.

    A second one if the sum of squares is not finite, because it may have overflowed: the largest
    absolute value cannot overflow, but takes 30 times as long on a CPU.

    Args:
        tensors: Any tensors.
        squares: Their squared norms, if known.
    """
    known = on_host(squared_norms(tensors)) if squares is None else squares
    if not _on_any(not math.isfinite(sum(map(float, known))), tensors):
        return True
    parts = [x for x in map(local, tensors) if x.numel()]
    largest = float(torch.nn.utils.get_total_norm(parts, norm_type=math.inf))
    return not _on_any(not math.isfinite(largest), tensors)


def finite_on_device(tensors: Sequence[Tensor], squares: Sequence[Tensor]) -> Tensor:
    """`all_finite` without a device sync: 0-dimensional, bool.

    Args:
        tensors: Plain tensors on one device, at least one.
        squares: Their squared norms, whose sum may overflow.
    """
    parts = [tensor for tensor in tensors if tensor.numel()]
    largest = torch._foreach_norm(parts, math.inf) if parts else squares
    return torch.stack([*squares]).sum().isfinite() | torch.stack([*largest]).isfinite().all()


def _on_any(flag: bool, tensors: Sequence[Tensor]) -> bool:
    """Whether a flag is set on any of the processes that share the tensors."""
    shared = next((tensor for tensor in tensors if isinstance(tensor, DTensor)), None)
    if shared is None:
        return flag
    everywhere = [Partial()] * shared.device_mesh.ndim
    value = torch.tensor(float(flag), dtype=torch.float32, device=shared.device)
    return bool(local(from_parts(value, shared.device_mesh, everywhere, ())))


def _sum_of_parts(value: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """The sum of a small tensor over the processes that hold different shards."""
    summands = [Partial() if p.is_shard() else Replicate() for p in placements]
    return local(from_parts(value, mesh, summands, value.shape))
