"""Transformations whose parts (refresh, project, apply) can be called separately."""

from __future__ import annotations

from typing import Any

import jax
import optax

from osd_jax.diagnostics import subspace_states
from osd_jax.sketch import (
    ONLY_SKETCHES,
    Reduce,
    Sketch,
    SketchLeaf,
    as_leaves,
    is_sketch,
    is_two_sided,
)
from osd_jax.state import SubspaceState
from osd_jax.subspace import SubspaceTransformation
from osd_jax.trees import Path, boxed_like, by_path, is_box, path_of, promotes, unboxed


def in_parts(
    tx: optax.GradientTransformation, subspace: SubspaceTransformation | None
) -> SubspaceTransformation:
    """Adds to `tx` the parts of the subspace transformation that it contains.

    Transformations before the subspace in `tx` then receive sketches instead of the projected
    gradients (`osd_jax.sketch.SketchLeaf`), and may multiply them by numbers.

    Args:
      tx: Any composition that passes the extra arguments of Optax down to `subspace`.
      subspace: The result of `scale_by_subspace` or `make_optimizer`. None: nothing is projected,
        and gradients are their own sketches.

    Returns:
      `tx` with `refresh`, `project` and `apply`, which take the whole trees of gradients, states
      and sketches. Its `apply` raises TypeError if `tx` does more before the subspace than sketches
      allow, and its parts raise ValueError if the state of `tx` holds a subspace other than
      `subspace`.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> subspace = osd_jax.scale_by_subspace(optax.scale_by_adam(), osd_jax.svd(200), rank=4)
      >>> tx = optax.chain(subspace, optax.scale_by_learning_rate(0.1))
      >>> tx = osd_jax.accumulate_sketches(osd_jax.in_parts(tx, subspace), every_k=4)
      >>> state = tx.init({"kernel": jnp.ones((16, 24))})
      >>> state.held["kernel"].low_rank.shape
      (4, 24)
    """
    tx = optax.with_extra_args_support(tx)

    def own_state(state: optax.OptState) -> SubspaceState | None:
        found = subspace_states(state)
        if len(found) > (subspace is not None):
            raise ValueError(
                "the optimizer's state holds a subspace whose parts (refresh, project, apply) "
                "are hidden, as by optax.chain, so whole gradients would be kept instead of "
                "sketches: pass osd_jax.in_parts(tx, subspace) instead of tx, with all projected "
                "parameters in one subspace, as returned by scale_by_subspace or make_optimizer"
            )
        return next(iter(found), None)

    def own_part(tree: Any, state: SubspaceState) -> Any:
        """The projected leaves; the others are hidden as by `optax.masked`."""
        paths = by_path(state.projector.basis, is_two_sided)
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if path_of(path) in paths else optax.MaskedNode(),
            tree,
            is_leaf=is_box,
        )

    @promotes
    def refresh(
        grads: optax.Updates,
        state: optax.OptState,
        when: jax.typing.ArrayLike = True,
        reduce: Reduce | None = None,
    ) -> optax.OptState:
        own = own_state(state)
        if subspace is None or own is None:
            return state
        new = subspace.refresh(own_part(grads, own), own, when, reduce)
        is_own = lambda x: isinstance(x, SubspaceState)
        return jax.tree.map(lambda x: new if is_own(x) else x, state, is_leaf=is_own)

    @promotes
    def project(grads: optax.Updates, state: optax.OptState, reduce: Reduce | None = None) -> Any:
        own = own_state(state)
        found: dict[Path, Sketch] = {}
        if subspace is not None and own is not None:
            found = by_path(subspace.project(own_part(grads, own), own, reduce), is_sketch)
        rest = reduce or (lambda x: x)
        return jax.tree_util.tree_map_with_path(
            lambda path, g: found[path_of(path)] if path_of(path) in found else rest(g),
            unboxed(grads),
        )

    @promotes
    def apply(
        sketches: Any,
        state: optax.OptState,
        params: optax.Params,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        like = unboxed(params)
        cast = lambda x, param: x if is_sketch(x) else x.astype(param.dtype)
        updates = as_leaves(like, jax.tree.map(cast, sketches, like, is_leaf=is_sketch))
        try:
            return tx.update(boxed_like(params, updates), state, params, **extra_args)
        except (AttributeError, TypeError, ValueError) as error:
            # JAX, NumPy and Optax name the class in their errors for an argument that is not an
            # array.
            if SketchLeaf.__name__ not in str(error):
                raise
            raise TypeError(f"{ONLY_SKETCHES}. The error was: {error}") from error

    needs_gradient = None if subspace is None else subspace.needs_gradient
    return SubspaceTransformation(tx.init, tx.update, refresh, project, apply, needs_gradient)


def parted(tx: optax.GradientTransformation) -> SubspaceTransformation:
    """An optimizer with its parts: its own, or those of an optimizer without a subspace."""
    return tx if isinstance(tx, SubspaceTransformation) else in_parts(tx, None)
