"""Lifts: from a direction in the subspace to an update of W.

The plain lift is `P D`. Other lifts change D first, add the part outside the subspace, or apply a
function to the sum. A `Lift` describes its update as data, `Lifted`; the optimizer computes the
product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from osd_jax.layout import MatrixLayout
from osd_jax.numerics import as_it_lies, check_number, contract, written_transpose
from osd_jax.sketch import Basis, Needs, Sketch, TwoSided
from osd_names import ResolvedSide


class Seen(NamedTuple):
    """The inputs of a lift other than the direction.

    Attributes:
      basis: P, (..., p, r).
      sketch: The sketch of the gradient, with the statistics that the lift declares.
      gradient: M, (..., p, q), if the lift declares that it reads it "always"; otherwise None.
      state: The lift's own state for this parameter, by name.
      side: The side of p: "output", "input" or "both". M is (input, output), and transposed for
        "output".

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> def by_energy(direction, seen):
      ...     size = jnp.sqrt(seen.sketch.statistics["column_energies"])
      ...     return osd_jax.Lifted(direction / (1 + size[..., None, :]))
      >>> lift = osd_jax.Lift(by_energy, osd_jax.Needs((osd_jax.COLUMN_ENERGIES,)))
    """

    basis: Basis
    sketch: Sketch
    gradient: jax.Array | None
    state: Mapping[str, jax.Array]
    side: ResolvedSide = "input"


class Lifted(NamedTuple):
    """An update of W, to be multiplied by the step size: `scale * then(P D + rest)`.

    Attributes:
      low_rank: D, (..., r, q), or None for no lifted part.
      rest: (..., p, q), added to P D; None for nothing.
      then: A function of the sum. None: the identity.
      scale: A number.
      state: The lift's new state, by name.

    Example:
      >>> import jax.numpy as jnp, osd_jax
      >>> clipped = osd_jax.Lift(lambda direction, seen: osd_jax.Lifted(
      ...     direction, then=lambda lifted: jnp.clip(lifted, -1, 1), scale=0.5))
    """

    low_rank: jax.Array | None
    rest: jax.Array | None = None
    then: Callable[[jax.Array], jax.Array] | None = None
    scale: jax.typing.ArrayLike = 1.0
    state: Mapping[str, jax.Array] = {}


def no_state(matrix: jax.Array, low_rank: jax.Array) -> dict[str, jax.Array]:
    """The empty state of a stateless lift."""
    return {}


class Lift(NamedTuple):
    """A rule that turns a direction into an update of W.

    Attributes:
      apply: (direction (..., r, q), Seen) -> Lifted. The direction is the output of `inner`.
      needs: The statistics that it reads at every step, and whether it reads the gradient.
      init: (an array like M, one like R) -> its state before the first step, by name; each array
        has the leading batch axes of M.
      name: A name for messages.
      two_sided: Whether it supports a P on both sides.
      linear: Whether its update is linear in the direction, so that the learning rate can be
        applied before or after it. The optimizers of `osd_jax.aliases` apply the learning rate
        after a lift that is not linear.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> signs = osd_jax.Lift(lambda direction, seen: osd_jax.Lifted(jnp.sign(direction)))
      >>> tx = osd_jax.scale_by_subspace(
      ...     optax.scale_by_adam(), osd_jax.svd(200), rank=2, lift=signs)
      >>> params = {"kernel": jnp.ones((6, 8))}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["kernel"].shape
      (6, 8)
    """

    apply: Callable[[jax.Array, Seen], Lifted]
    needs: Needs = Needs()
    init: Callable[[Any, Any], Mapping[str, jax.Array]] = no_state
    name: str = ""
    two_sided: bool = True
    linear: bool = False


def scaled(factor: jax.typing.ArrayLike = 1.0) -> Lift:
    """The plain lift, `factor * P D`.

    Args:
      factor: GaLore's alpha.

    Returns:
      A `Lift`.

    References:
      arXiv 2408.12857, equation 6.

    Example:
      >>> import optax, osd_jax
      >>> tx = osd_jax.scale_by_subspace(
      ...     optax.scale_by_adam(), osd_jax.svd(200), rank=4, lift=osd_jax.scaled(0.25))
    """
    check_number("factor", factor)
    apply = lambda direction, seen: Lifted(direction, scale=factor)
    return Lift(apply, name=f"scaled({factor})", linear=True)


def sign_after_lift() -> Lift:
    """The lift `sign(P D)`: the released Lion takes the sign after the lift. No scale changes it.

    Returns:
      A `Lift`.

    Example:
      >>> import osd_jax
      >>> from osd_jax.rules import interpolate_momentum
      >>> lion = osd_jax.scale_by_subspace(
      ...     interpolate_momentum(), osd_jax.svd(200), rank=4, lift=osd_jax.sign_after_lift())
    """
    return Lift(lambda direction, seen: Lifted(direction, then=jnp.sign), name="sign_after_lift()")


def lift(basis: Basis, direction: jax.Array, is_flipped: bool = False) -> jax.Array:
    """Computes P D: (..., p, r), (..., r, q) -> (..., p, q); two-sided: P_out D P_in^T.

    Where two sides are projected, D and the result are stored transposed, as M is.

    Args:
      basis: P.
      direction: D.
      is_flipped: Whether the memory layout of the product is that of (..., q, p).
    """
    if isinstance(basis, TwoSided):
        half = contract("pr,rs->ps", basis.input, direction)
        return contract("ps,qs->pq", half, basis.output)
    if is_flipped:
        return contract("rq,rp->qp", direction, written_transpose(basis)).mT
    return contract("pr,rq->pq", basis, direction)


def lifted_update(layout: MatrixLayout, basis: Basis, lifted: Lifted) -> jax.Array:
    """The update of one parameter, in its shape."""
    d: Any = lifted.low_rank
    scale: Any = lifted.scale
    if d is not None and lifted.rest is None and lifted.then is None:
        # Before the lift, d is smaller; if the lift rounds to a narrower P, the scale is applied
        # after it.
        is_narrow = jax.tree.leaves(basis)[0].dtype.itemsize < d.dtype.itemsize
        before, after = (1, scale) if is_narrow else (scale, 1)
        return after * layout.from_matrix(lift(basis, before * d, layout.is_flipped))
    terms = [] if d is None else [as_it_lies(lift(basis, d, layout.is_flipped), layout.is_flipped)]
    terms += [] if lifted.rest is None else [lifted.rest]
    if not terms:
        raise ValueError(
            f"the lift of '{layout.name}' returns neither low_rank nor rest: expected one of them"
        )
    total = functools.reduce(jnp.add, terms)
    return scale * layout.from_matrix(total if lifted.then is None else lifted.then(total))


def check_lift_state(
    lift: Lift, new: Mapping[str, jax.Array], own: Mapping[str, jax.Array]
) -> None:
    """Raises ValueError for a lift whose new state differs from its initial state in structure."""
    for name, value in new.items():
        if name not in own or jnp.shape(value) != own[name].shape:
            here = own[name].shape if name in own else "absent"
            raise ValueError(
                f"the lift {lift.name or lift.apply} returns state {name!r} of shape "
                f"{jnp.shape(value)}: expected the shape of its init, {here}"
            )
