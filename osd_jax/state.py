"""The state of the subspaces, the bases P and when each was set; arrays of 8-bit state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_names import Side

NOT_SET = -1  # value of ProjectorState.set_at


class ProjectorState(NamedTuple):
    """The bases P, the state of the optimizer that moves them, and when each P was set.

    Attributes:
      basis: P, a tree like the parameters; zeros until it is set for the first time.
      optimizer: State of the optimizer that moves P.
      set_at: A tree like the parameters of int32 (batch...), one number per matrix: the count of
        the step at which its P was set, or `NOT_SET` while it waits for a nonzero gradient.
    """

    basis: Any
    optimizer: optax.OptState
    set_at: Any


class _SubspaceFields(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # a field, as in Optax's states
    projector: ProjectorState
    inner: optax.OptState
    lift: Any = ()


class SubspaceState(_SubspaceFields):
    """State of `scale_by_subspace`. A pytree; `side` is part of its structure.

    Attributes:
      count: int32 scalar, the number of steps: one for the whole tree, so that a refresh of P is
        one `lax.cond`.
      projector: The bases P, the state of the optimizer that moves them, and when P was set.
      inner: State of the inner transformation, in the shapes of R.
      lift: State of the lift: a tree like the parameters of arrays by name; () if it has none.
      side: The side that P projects. None in the state of an earlier version, which did not store
        it; the shapes then determine it.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> tx = osd_jax.scale_by_subspace(optax.scale_by_adam(), osd_jax.svd(200), rank=4)
      >>> state = tx.init({"kernel": jnp.ones((16, 24))})
      >>> state.side, state.inner.mu["kernel"].shape
      ('shorter', (4, 24))
    """

    side: (
        Side | None
    )  # not a field: functions that iterate over fields, as Optax's do, expect arrays

    def __new__(  # noqa: D102
        cls,
        count: Any,
        projector: ProjectorState,
        inner: optax.OptState,
        lift: Any = (),
        side: Side | None = None,
    ) -> SubspaceState:
        self = super().__new__(cls, count, projector, inner, lift)
        self.side = side
        return self

    def _replace(self, **changes: Any) -> SubspaceState:
        return SubspaceState(**{**self._asdict(), "side": self.side, **changes})


def _flatten_state(state: SubspaceState) -> tuple[list[tuple[Any, Any]], Any]:
    # A stateless lift and the side add nothing to a checkpoint.
    names = (
        "count",
        "projector",
        "inner",
        *(() if isinstance(state.lift, tuple) and not state.lift else ("lift",)),
    )
    children = [(jax.tree_util.GetAttrKey(name), getattr(state, name)) for name in names]
    return children, (names, state.side)


def _unflatten_state(structure: Any, children: Any) -> SubspaceState:
    names, side = structure
    return SubspaceState(**dict(zip(names, children, strict=True)), side=side)


jax.tree_util.register_pytree_with_keys(SubspaceState, _flatten_state, _unflatten_state)


class Quantized(NamedTuple):
    """An array in blockwise 8 bits.

    Attributes:
      codes: uint8, the array's own shape (..., n).
      scales: float32, (..., ceil(n / block)): the largest absolute value of each block.
    """

    codes: jax.Array
    scales: jax.Array


def set_before(set_at: Any, count: jax.Array) -> Any:
    """Whether each P was set before the step with this count: a tree like `set_at`, of bool."""
    return jax.tree.map(lambda at: (at != NOT_SET) & (at != count), set_at)


def steps_since_set(set_at: Any, count: jax.Array, every: int | None) -> Any:
    """The number of moves of each P since it was set, including this step: a tree like `set_at`.

    At least 1, also if P does not move.
    """
    assert every is not None
    return jax.tree.map(lambda at: jnp.maximum(count // every - at // every, 1), set_at)
