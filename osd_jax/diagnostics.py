"""Functions that inspect the subspaces in a state: the bases, and how much they capture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax.layout import DimensionNumbers, MatrixLayout, dimension_numbers_by_path, matrix_layout
from osd_jax.numerics import contract
from osd_jax.sketch import Basis, TwoSided, is_two_sided, low_rank_gradient
from osd_jax.stacks import bases_of_whole, whole_matrices
from osd_jax.state import SubspaceState
from osd_jax.trees import KeyPath, by_path, flatten, names, path_of, promotes, unboxed
from osd_names import Side


class Diagnostics(NamedTuple):
    """How well P captures the gradient of one parameter; each (batch...,) float32.

    Attributes:
      energy: `||P P^T M||_F^2 / ||M||_F^2`, the fraction of the gradient that P captures.
      orthonormality: `||P^T P - I||_F / sqrt(r)`, the deviation of P from orthonormal.
    """

    energy: jax.Array
    orthonormality: jax.Array


@promotes
def subspace_diagnostics(
    grads: optax.Updates,
    opt_state: optax.OptState,
    *,
    dimension_numbers: DimensionNumbers = None,
) -> dict[str, Diagnostics]:
    """Compares P with the gradients that it is about to project.

    Args:
      grads: The gradients of all parameters.
      opt_state: An optimizer's state, in any wrapper. It determines the side that P projects.
      dimension_numbers: The `dimension_numbers` of the optimizer.

    Returns:
      `Diagnostics` by name, as in `projectors`. Empty if nothing is projected.
    """
    grads = unboxed(grads)
    numbers, by = dimension_numbers_by_path(dimension_numbers, grads), by_path(grads)
    sides = [
        (path, state.side)
        for state in subspace_states(unboxed(opt_state))
        for path, _ in flatten(state.projector.basis, is_two_sided)
    ]
    found = bases_by_key_path(opt_state)

    def one(name: str, path: KeyPath, basis: Basis, side: Side | None) -> Diagnostics:
        grad = by[path_of(path)]
        layout = matrix_layout(name, grad, numbers(path))
        side = side or _side_by_shape(basis, layout)
        layout = matrix_layout(name, grad, numbers(path), side)
        grad = whole_matrices(grad, layout.stack_axis, layout.column_axis)
        return _diagnose(bases_of_whole(basis), layout.to_matrix(grad))

    named = names([path for path, _ in found])
    return {
        name: one(name, path, basis, side)
        for name, (path, basis), (_, side) in zip(named, found, sides, strict=True)
    }


def _side_by_shape(basis: Basis, layout: MatrixLayout) -> Side:
    """The side that P projects of a matrix laid out by its input side; input if it is square."""
    if isinstance(basis, TwoSided):
        return "both"
    return "input" if basis.shape[-2] == layout.matrix_shape[-2] else "output"


def _diagnose(basis: Basis, matrix: jax.Array) -> Diagnostics:
    low_rank = low_rank_gradient(basis, matrix)
    sides = [basis.input, basis.output] if isinstance(basis, TwoSided) else [basis]
    grams = [contract("pr,ps->rs", side, side) for side in sides]
    # ||P R||^2 = <R, (P^T P) R>
    weighted = contract("rs,sq->rq", grams[0], low_rank)
    if len(grams) == 2:
        weighted = contract("rq,qs->rs", weighted, grams[1])
    captured = jnp.sum(low_rank * weighted, axis=(-2, -1))
    norm = jnp.sum(jnp.square(matrix.astype(low_rank.dtype)), axis=(-2, -1))
    identity = jnp.eye(grams[0].shape[-1], dtype=grams[0].dtype)
    off = [jnp.linalg.norm(gram - identity, axis=(-2, -1)) for gram in grams]
    return Diagnostics(
        energy=captured / jnp.where(norm > 0, norm, 1),
        orthonormality=jnp.maximum(off[0], off[-1]) / grams[0].shape[-1] ** 0.5,
    )


def subspace_states(opt_state: optax.OptState) -> list[SubspaceState]:
    """Every `SubspaceState` inside an optimizer state, in any wrapper."""
    is_state = lambda x: isinstance(x, SubspaceState)
    return [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(leaf)]


def projectors(opt_state: optax.OptState) -> Mapping[str, Basis]:
    """Returns the bases P in an optimizer state, by parameter.

    Args:
      opt_state: An optimizer state, in any wrapper.

    Returns:
      The P of each projected parameter by name: (..., m, r) if it projects the output side, (...,
      n, r) for the input side, or `TwoSided(output, input)`; its columns are the basis. The name is
      the text of the path, such as `mlp/kernel`; if two paths have the same text, the name is that
      of their keys, such as `['mlp/a']['b']` and `['mlp']['a/b']`.

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> tx = osd_jax.make_optimizer("galore_adamw", "continuous", learning_rate=0.01, rank=4)
      >>> bases = osd_jax.projectors(tx.init({"mlp": {"kernel": jnp.ones((16, 24))}}))
      >>> {name: basis.shape for name, basis in bases.items()}
      {'mlp/kernel': (16, 4)}
    """
    found = bases_by_key_path(opt_state)
    named = names([path for path, _ in found])
    return {name: basis for name, (_, basis) in zip(named, found, strict=True)}


def bases_by_key_path(opt_state: optax.OptState) -> list[tuple[KeyPath, Basis]]:
    """The bases P in an optimizer state, each with its parameter's key path."""
    return [
        leaf
        for state in subspace_states(unboxed(opt_state))
        for leaf in flatten(state.projector.basis, is_two_sided)
    ]


def projected_paths(opt_state: optax.OptState) -> list[KeyPath]:
    """The key paths of the parameters that an optimizer state projects."""
    return [path for path, _ in bases_by_key_path(opt_state)]
