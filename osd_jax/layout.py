"""Which axes of an array form a matrix, and which side of it P projects."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax.trees import KeyPath, by_path, flatten, names, path_name, path_of, unboxed
from osd_names import ResolvedSide, Side

SUPPORTED_DTYPES = tuple(jnp.dtype(name) for name in ("float32", "bfloat16", "float64"))


class SubspaceDimensionNumbers(NamedTuple):
    """Which axes of a parameter form its matrix; all others are batch axes.

    Attributes:
      reduction_axis: The input side, the axes over which a layer sums. An empty tuple declares that
        the parameter holds vectors, which are not projected.
      output_axis: The output side.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> numbers = osd_jax.SubspaceDimensionNumbers(1, (2, 3))  # layers, embed, heads, head_dim
      >>> tx = osd_jax.scale_by_subspace(
      ...     optax.scale_by_adam(), osd_jax.svd(200), rank=4, dimension_numbers=numbers)
      >>> osd_jax.projectors(tx.init({"query": jnp.ones((2, 8, 4, 4))}))["query"].shape
      (2, 8, 4)
    """

    reduction_axis: int | tuple[int, ...] = 0
    output_axis: int | tuple[int, ...] = 1


# One for all parameters, a tree of them, a function from parameters to a tree, or None.
DimensionNumbers = SubspaceDimensionNumbers | Mapping[str, Any] | Callable[[Any], Any] | Any | None


@dataclasses.dataclass(frozen=True)
class MatrixLayout:
    """How a parameter is viewed as matrices M of shape (..., p, q), and converted back.

    Layouts of parameters with different names and draws are equal if all else is (`traced_once`).
    """

    name: str = dataclasses.field(compare=False)
    shape: tuple[int, ...]
    axes: tuple[int, ...]  # the permutation: batch axes, projected side, other side
    matrix_shape: tuple[int, ...]  # (batch..., p, q)
    side: ResolvedSide
    draw: int = dataclasses.field(default=0, compare=False)  # folded into its random keys

    @property
    def is_flipped(self) -> bool:
        """Whether M is a transposed view of the array."""
        first_of_p = len(self.matrix_shape) - 2
        return self.axes[-1] < self.axes[first_of_p]

    @property
    def stack_axis(self) -> int | None:
        """The parameter's first batch axis, the first axis of M; None for a single matrix."""
        return self.axes[0] if len(self.matrix_shape) > 2 else None

    @property
    def column_axis(self) -> int:
        """The parameter's first axis of q."""
        count, columns = 1, self.matrix_shape[-1]
        while math.prod(self.shape[axis] for axis in self.axes[-count:]) < columns:
            count += 1
        return self.axes[-count]

    def to_matrix(self, array: jax.Array) -> jax.Array:
        """(the parameter's shape) -> (..., p, q)."""
        return array.transpose(self.axes).reshape(self.matrix_shape)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """(..., p, q) -> (the parameter's shape)."""
        permuted = tuple(self.shape[axis] for axis in self.axes)
        inverse = tuple(sorted(range(len(self.axes)), key=self.axes.__getitem__))
        return matrix.reshape(permuted).transpose(inverse)


def _as_tuple(axis: int | tuple[int, ...]) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)


def matrix_layout(
    name: str, array: jax.Array, numbers: SubspaceDimensionNumbers | None, side: Side = "input"
) -> MatrixLayout:
    """Returns the layout of one parameter as matrices.

    Args:
      name: A name for messages.
      array: The parameter, or any object with its `shape` and `ndim`.
      numbers: Its matrix axes; None: the two axes of a 2-D array.
      side: The side that P projects. "both" uses the layout (input, output).

    Raises:
      ValueError: The axes do not describe a matrix of this parameter.
    """
    shape = tuple(array.shape)
    if numbers is None:
        if len(shape) != 2:
            raise ValueError(
                f"parameter '{name}' has shape {shape}, which is not a matrix: give its matrix "
                "axes in dimension_numbers, or exclude it from the subspace (select=, "
                "optax.masked)"
            )
        numbers = SubspaceDimensionNumbers()
    sides = [_as_tuple(numbers.reduction_axis), _as_tuple(numbers.output_axis)]
    used = [axis for axes in sides for axis in axes]
    in_range = all(-len(shape) <= axis < len(shape) for axis in used)
    sides = [tuple(axis % len(shape) for axis in axes) for axes in sides] if in_range else sides
    used = [axis for axes in sides for axis in axes]
    if not in_range or len(set(used)) != len(used) or not all(sides):
        raise ValueError(
            f"parameter '{name}' of shape {shape} has {numbers}: expected two disjoint, non-empty "
            "sets of its axes"
        )
    n_in, n_out = (math.prod(shape[axis] for axis in axes) for axes in sides)
    resolved: ResolvedSide
    if side == "shorter" or side == "longer":
        resolved = "input" if (n_in <= n_out) == (side == "shorter") else "output"
    else:
        resolved = side
    if resolved == "output":
        sides.reverse()
    batch = tuple(axis for axis in range(len(shape)) if axis not in used)
    return MatrixLayout(
        name=name,
        shape=shape,
        axes=batch + sides[0] + sides[1],
        matrix_shape=tuple(shape[axis] for axis in batch)
        + tuple(math.prod(shape[axis] for axis in axes) for axes in sides),
        side=resolved,
    )


def dimension_numbers_by_path(
    dimension_numbers: DimensionNumbers, params: optax.Params, *, some_have_none: bool = False
) -> Callable[[KeyPath], SubspaceDimensionNumbers | None]:
    """Looks up the matrix axes of a parameter by its path.

    The lookup uses paths, not the tree structure, so that a full tree of dimension numbers works
    for parameters that `optax.masked` or `optax.partition` has partly hidden. A tree of other
    containers works too if its paths have the same text as those of the parameters and the text is
    unambiguous. A parameter without an entry raises ValueError, or has None if `some_have_none`.
    """
    params = unboxed(params)
    tree: Any = dimension_numbers(params) if callable(dimension_numbers) else dimension_numbers
    if tree is None or isinstance(tree, SubspaceDimensionNumbers):
        return lambda path: tree
    is_leaf = lambda x: x is None or isinstance(x, (SubspaceDimensionNumbers, optax.MaskedNode))
    tree = unboxed(tree)
    paths = [path for path, _ in flatten(tree, is_leaf)]
    numbers = by_path(tree, is_leaf)
    for path in paths:
        if not is_leaf(leaf := numbers[path_of(path)]):
            raise ValueError(
                f"dimension_numbers holds {leaf!r} for '{path_name(path)}': expected "
                "SubspaceDimensionNumbers(reduction_axis, output_axis) or None"
            )
    of_params = by_path(params)
    unclaimed = [path for path in paths if path_of(path) not in of_params]
    unserved = [path for path, _ in flatten(params) if path_of(path) not in numbers]

    def lookup(path: KeyPath) -> SubspaceDimensionNumbers | None:
        if path_of(path) in numbers:
            return numbers[path_of(path)]
        name = path_name(path)
        alike = [other for other in unclaimed if path_name(other) == name]
        if not alike:
            if some_have_none:
                return None
            raise ValueError(
                f"dimension_numbers has no entry for parameter '{name}'; it has "
                f"{sorted(names(paths))}"
            )
        rivals = [other for other in unserved if path_name(other) == name]
        for kind, several in (("dimension_numbers has", alike), ("there are", rivals)):
            if len(several) > 1:
                both = " and ".join(jax.tree_util.keystr(other) for other in several)
                raise ValueError(
                    f"{kind} {both}, which have the same text '{name}', and none has the keys of "
                    "the other tree: give dimension_numbers the parameters' own keys"
                )
        return numbers[path_of(alike[0])]

    return lookup


def declared_vectors(
    dimension_numbers: DimensionNumbers, params: optax.Params
) -> Callable[[KeyPath], bool]:
    """Looks up by its path whether a parameter is declared to hold vectors.

    Args:
      dimension_numbers: As in `scale_by_subspace`. A parameter without an entry is not declared:
        only projected parameters need one.
      params: The parameters; others may be hidden (`optax.MaskedNode`).

    Raises:
      ValueError: `dimension_numbers` is a function that fails for these parameters.
    """
    if callable(dimension_numbers):
        try:
            dimension_numbers = dimension_numbers(params)
        except Exception as error:
            raise ValueError(
                f"dimension_numbers raised {type(error).__name__} ({error}): it also receives the "
                "parameters that are not projected, with optax.MaskedNode instead of the others; "
                "map over the tree, as with jax.tree_util.tree_map_with_path, or give a tree"
            ) from error
    lookup = dimension_numbers_by_path(dimension_numbers, params, some_have_none=True)

    def holds_vectors(path: KeyPath) -> bool:
        numbers = lookup(path)
        return numbers is not None and numbers.reduction_axis == ()

    return holds_vectors


def check_rank(rank: int) -> None:
    """Raises ValueError unless `rank` is an integer of at least 1."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank is {rank!r}: expected a whole number of at least 1")


def check_dtype(name: str, param: jax.Array) -> None:
    """Raises ValueError for a dtype that the optimizers do not support."""
    if param.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"parameter '{name}' has dtype {param.dtype}: expected float32, bfloat16 or float64 "
            "(float16 overflows in squared gradients; use bfloat16)"
        )


def check_basis_dtype(dtype: jax.typing.DTypeLike | None, name: str = "basis_dtype") -> None:
    """Raises ValueError unless `dtype` is None or a supported dtype of P; `name` is the option."""
    if dtype is not None and dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"{name} is {dtype!r}: expected None, float32, bfloat16 or float64")


def layouts_of(
    params: optax.Params, dimension_numbers: DimensionNumbers, side: Side = "shorter"
) -> Any:
    """A tree of `MatrixLayout` like `params`, without its boxes.

    Args:
      params: Parameters, or their gradients.
      dimension_numbers: As in `scale_by_subspace`.
      side: The side that P projects.
    """
    numbers = dimension_numbers_by_path(dimension_numbers, params)
    draws = iter(random_draws(params))

    def one(path: KeyPath, x: jax.Array) -> MatrixLayout:
        layout = matrix_layout(path_name(path), x, numbers(path), side)
        return dataclasses.replace(layout, draw=next(draws))

    return jax.tree_util.tree_map_with_path(one, unboxed(params))


def random_draws(params: optax.Params) -> list[int]:
    """The number of each parameter that is folded into the key of its random draws.

    The text of the path determines it, as in earlier versions; if two paths have the same text,
    their keys determine it.
    """
    named = names([path for path, _ in flatten(params)])
    return [zlib.crc32(name.encode()) for name in named]
