"""Carries moments over from the old subspace to the new one when P changes.

When P changes, by a refresh or a move, moments of the old R are converted to the new coordinates.
With Q = P_new^T P_old a first moment m becomes Q m. Only the diagonal of a second moment v is
known; LDAdam (arXiv 2410.16103, algorithm 1) subtracts m^2, transforms the remaining variance by
the squares of Q, and adds the square of the new mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax.numerics import bias_correction, contract, float32_or_more
from osd_jax.quantization import BLOCK_SIZE, Quantized, Rounding, dequantize, quantize
from osd_jax.sketch import Basis, TwoSided
from osd_jax.trees import by_path, path_name, path_of

Transport = Callable[[Any, Any], Any]  # (state, tree of Change) -> state


class Change(NamedTuple):
    """The change of the P of one parameter.

    Attributes:
      rotation: Q = P_new^T P_old, (..., r, r), float32 (float64 for float64); `TwoSided` like P.
      happened: bool (batch...), whether the P of a matrix changed.
    """

    rotation: Any
    happened: jax.Array

    def applied(self, x: jax.Array, *, squared: bool = False) -> jax.Array:
        """Computes Q X: (..., r, q) -> (..., r, q); two-sided: Q_in X Q_out^T.

        Args:
          x: X.
          squared: Whether to square the elements of Q.
        """
        power = (lambda q: jnp.square(q)) if squared else (lambda q: q)
        if isinstance(self.rotation, TwoSided):
            half = contract("rs,sq->rq", power(self.rotation.input), x)
            return contract("rq,sq->rs", half, power(self.rotation.output))
        return contract("rs,sq->rq", power(self.rotation), x)

    def chosen(self, new: Any, old: Any) -> Any:
        """`new` where P changed, otherwise `old`, bit for bit: trees of (..., a, b)."""
        pick = lambda new, old: jnp.where(self.happened[..., None, None], new, old)
        return jax.tree.map(pick, new, old)


def change_of(old: Basis, new: Basis) -> Change:
    """The change from one P (..., p, r) to another."""
    rotation = lambda new, old: contract("pr,ps->rs", new, old)
    differs = lambda new, old: jnp.any(new != old, axis=(-2, -1))
    if isinstance(old, TwoSided) and isinstance(new, TwoSided):
        return Change(
            TwoSided(*(rotation(*both) for both in zip(new, old, strict=True))),
            differs(new.output, old.output) | differs(new.input, old.input),
        )
    assert not isinstance(old, TwoSided) and not isinstance(new, TwoSided)
    return Change(rotation(new, old), differs(new, old))


def is_change(x: Any) -> bool:
    """Whether `x` is the change of one parameter's P."""
    return isinstance(x, Change)


def first_moment(change: Change, m: jax.Array) -> jax.Array:
    """m <- Q m, (..., r, q)."""
    return change.applied(m)


def second_moment(
    change: Change, m: jax.Array, v: jax.Array, c1: jax.Array, c2: jax.Array
) -> jax.Array:
    """v <- c2 |Q^2 (v / c2 - (m / c1)^2) + (Q m / c1)^2|, (..., r, q), with Q^2 elementwise.

    Args:
      change: The change of P.
      m: First moment before the change.
      v: Second moment before the change.
      c1: 1 - b1^t, the bias correction of m after t steps.
      c2: 1 - b2^t, the bias correction of v.
    """
    variance = v / c2 - jnp.square(m / c1)
    return c2 * jnp.abs(change.applied(variance, squared=True) + jnp.square(change.applied(m) / c1))


# Optax states whose only memory is a mean of directions, by its field.
_OF_FIRST_MOMENTS = {
    optax.ScaleByLionState: "mu",
    optax.TraceState: "trace",
    optax.EmaState: "ema",
}


def refuse_factored(name: str) -> None:
    """Raises ValueError for a second moment of rows or columns, whose state has this name."""
    raise ValueError(
        f"transport_moments cannot transform {name}: the means of a second moment's rows or "
        "columns do not determine it in a new basis; use a rule with full moments, such as "
        "Adam's, or leave transport_moments out"
    )


def transport_moments(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    block: int = BLOCK_SIZE,
    rounding: Rounding = "table",
) -> Transport:
    """Makes the moments inside a subspace follow P: `scale_by_subspace(..., transport=...)`.

    Right after the P of a matrix changed, with `Q = P_new^T P_old`, `c1 = 1 - b1^t` and
    `c2 = 1 - b2^t` after t steps:

        m <- Q m
        v <- c2 |Q^2 (v / c2 - (m / c1)^2) + (Q m / c1)^2|      Q^2 elementwise

    It supports the states of Adam, Lion, `optax.trace` and `optax.ema`, also in 8 bits
    (`quantize_state`), inside any chain, mask or partition. A custom state implements a method
    `transported(changes)` that returns the new state; `changes` is a tree like the parameters of
    `Change`.

    Args:
      b1: Adam's decay of m.
      b2: Adam's decay of v.
      block: The `block` of `quantize_state`.
      rounding: The `rounding` of `quantize_state`.

    Returns:
      (state of the inner transformation, tree of `Change`) -> the state. It raises ValueError for
      an unsupported state and for factored second moments.

    References:
      LDAdam, arXiv 2410.16103, algorithm 1.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> tx = osd_jax.scale_by_subspace(
      ...     optax.scale_by_adam(0.9, 0.95), osd_jax.svd(200), rank=4,
      ...     transport=osd_jax.transport_moments(0.9, 0.95))
      >>> state = tx.init({"kernel": jnp.ones((16, 24))})
    """

    def read(x: Any, signed: bool) -> jax.Array:
        if not isinstance(x, Quantized):
            return float32_or_more(x)
        blocks = -(-x.codes.shape[-1] // block)
        if blocks != x.scales.shape[-1]:
            raise ValueError(
                f"transport_moments has block={block}, but 8-bit moments of shape {x.codes.shape} "
                f"have {x.scales.shape[-1]} scales per row: pass the block of quantize_state"
            )
        return dequantize(x, signed=signed, block=block)

    def written(new: jax.Array, old: Any, signed: bool) -> Any:
        if isinstance(old, Quantized):
            return quantize(new, signed=signed, block=block, rounding=rounding)
        return new.astype(old.dtype)

    def transport(state: Any, changes: Any) -> Any:
        found = by_path(changes, is_change)

        def each_moment(function: Callable[..., Any], *moments: Any) -> Any:
            def one(path: Any, *moments: Any) -> Any:
                if path_of(path) not in found:
                    raise ValueError(
                        f"transport_moments finds a moment of '{path_name(path)}', which is not a "
                        "parameter: give the state a method transported(changes)"
                    )
                return function(found[path_of(path)], *moments)

            is_leaf = lambda x: isinstance(x, Quantized)
            return jax.tree_util.tree_map_with_path(one, *moments, is_leaf=is_leaf)

        def first(change: Change, m: Any) -> Any:
            new = first_moment(change, read(m, signed=True))
            return change.chosen(written(new, m, signed=True), m)

        def of_adam(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
            has_stepped = state.count > 0

            def correction(b: jax.typing.ArrayLike, dtype: Any) -> jax.Array:
                return jnp.where(has_stepped, bias_correction(state.count, b).astype(dtype), 1)

            def second(change: Change, m: Any, v: Any) -> Any:
                wide_m, wide_v = read(m, signed=True), read(v, signed=False)
                c1, c2 = correction(b1, wide_v.dtype), correction(b2, wide_v.dtype)
                new = second_moment(change, wide_m, wide_v, c1, c2)
                return change.chosen(written(new, v, signed=False), v)

            mu, nu = each_moment(first, state.mu), each_moment(second, state.mu, state.nu)
            return state._replace(mu=mu, nu=nu)

        def one(path: Any, node: Any) -> Any:
            if hasattr(node, "transported"):
                return node.transported(changes)
            if isinstance(node, optax.ScaleByAdamState):
                return of_adam(node)
            if (field := _OF_FIRST_MOMENTS.get(type(node))) is not None:
                return node._replace(**{field: each_moment(first, getattr(node, field))})
            if isinstance(node, optax.FactoredState):
                refuse_factored(f"Adafactor's {type(node).__name__}")
            if isinstance(node, Quantized) or (
                node.ndim and jnp.issubdtype(node.dtype, jnp.floating)
            ):
                raise ValueError(
                    f"transport_moments does not support the state's {path_name(path)}: expected "
                    "the state of Adam, Lion, optax.trace or optax.ema, or one with a method "
                    "transported(changes)"
                )
            return node

        kinds = (optax.ScaleByAdamState, optax.FactoredState, *_OF_FIRST_MOMENTS, Quantized)
        is_leaf = lambda x: isinstance(x, kinds) or hasattr(x, "transported")
        return jax.tree_util.tree_map_with_path(one, state, is_leaf=is_leaf)

    return transport
