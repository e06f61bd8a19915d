"""The optimizer: gradient -> sketch -> step of W -> step of P.

Online Subspace Descent keeps the optimizer state in a subspace of each weight matrix. It reads only
a `Sketch` of a gradient G, and a step consists of three pure functions:

    refresh(grads, state)           -> state             sets P from G, where P is due or waits
    project(grads, state)           -> sketches          large in, small out
    apply(sketches, state, params)  -> (updates, state)  small in, large out

`update` calls them in this order. No gradient is alive between `project` and `apply`; accumulation,
data parallelism and layer-by-layer updates rely on this.

A gradient is laid out as M, of shape (..., p, q): batch axes first, then the axis that P projects,
then the other axis. P has shape (..., p, r), and its columns are the basis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from osd_jax.basis_rule import MOVE, REFRESH, BasisRule, check_rule
from osd_jax.basis_step import move_basis, restarted, set_basis
from osd_jax.cond import cond_once
from osd_jax.layout import (
    DimensionNumbers,
    MatrixLayout,
    check_basis_dtype,
    check_dtype,
    check_rank,
    layouts_of,
)
from osd_jax.lift import Lift, Seen, check_lift_state, lifted_update
from osd_jax.lift import scaled as scaled_lift
from osd_jax.numerics import (
    accumulator_dtype,
    any_of,
    check_object,
    check_static,
    float32_or_more,
    zeros_of,
    zeros_of_axes,
)
from osd_jax.sharding import takes_shapes
from osd_jax.sketch import (
    ONLY_SKETCHES,
    Basis,
    Needs,
    Reduce,
    Sketch,
    TwoSided,
    bare,
    is_sketch,
    is_sketch_leaf,
    is_two_sided,
    merged,
    reading_gradient,
    sketches_of,
)
from osd_jax.stacks import (
    as_stored,
    bases_of_whole,
    on_every_device,
    split_matrices,
    whole_matrices,
)
from osd_jax.state import NOT_SET, ProjectorState, SubspaceState, set_before, steps_since_set
from osd_jax.transport import Transport, change_of
from osd_jax.trees import boxed_like, promotes, traced_once, unboxed, unzip
from osd_names import SIDES, Side


class SubspaceTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation whose update is also available as its three parts.

    Attributes:
      refresh: (grads, state, when=True, reduce=None) -> state. Sets each P that is due at this step
        (if `when`), or that still waits, from its gradient if that is nonzero. `reduce` is as in
        `project`; it is not called if no P is due or waits.
      project: (grads, state, reduce=None) -> sketches, a tree like the gradients without its boxes,
        with a `Sketch` for each projected gradient. `reduce` is the mean over devices, such as
        `functools.partial(jax.lax.pmean, axis_name="data")`, if each device has its own gradients:
        R is reduced first, and A is computed with the reduced R. On a CPU, a mean of 16-bit arrays
        within `shard_map` has to be taken in float32, or XLA ends the process.
      apply: (sketches, state, params) -> (updates, state).
      needs_gradient: The `Needs` of a rule that reads the gradient itself at every step, or None.
        If there is one, `scale_by_subspace`'s `apply` also takes `grads=`.
    """

    refresh: Callable[..., Any]
    project: Callable[..., Any]
    apply: Callable[..., tuple[optax.Updates, Any]]
    needs_gradient: Needs | None

    def __new__(cls, init, update, refresh, project, apply, needs_gradient):  # type: ignore[no-untyped-def]
        """Remains the pair that `optax.chain` unpacks; the parts are attributes."""
        self = super().__new__(cls, init, update)
        self.refresh, self.project, self.apply = refresh, project, apply
        self.needs_gradient = needs_gradient
        return self


def scale_by_subspace(
    inner: optax.GradientTransformation,
    projector: BasisRule,
    *,
    rank: int,
    scale: jax.typing.ArrayLike | None = None,
    lift: Lift | None = None,
    transport: Transport | None = None,
    side: Side = "shorter",
    dimension_numbers: DimensionNumbers = None,
    seed: int = 0,
    basis_dtype: jax.typing.DTypeLike | None = None,
    widen_updates: bool = False,
) -> SubspaceTransformation:
    """Runs `inner` on the gradient of every matrix in a subspace that `projector` moves.

        R = P^T M,   D = inner(R),   update = scale * P D

    for a gradient laid out as M, of shape (..., p, q); with `lift`, the update is what the lift
    makes of D.

    Args:
      inner: Any transformation that needs no parameters. It receives the tree of R's, of shape
        (..., r, q) and dtype float32 (float64 for float64 gradients), with stacked matrices along
        leading axes, so a rule that is not elementwise should treat the last two axes as the
        matrix.
      projector: `online_pca(...)`, `svd(...)`, `random(...)`, `gaussian(...)`, or a custom
        `BasisRule`.
      rank: Number of columns of P. The effective rank is min(rank, m, n).
      scale: Multiplies the lifted direction: short for `lift=scaled(scale)`. None: 1.
      lift: `scaled(...)`, `sign_after_lift()`, a lift that adds what P does not reach
        (`osd_jax.residuals`), or a custom `Lift`. None: given by `scale`.
      transport: (state of `inner`, a tree like the parameters of `osd_jax.transport.Change`) -> the
        state, such as `transport_moments()`. Called when P changed: after a refresh, before R is
        computed; after a move, at the end of that step, or, if P moves before W's step, before R is
        recomputed. None: `inner` keeps its state unchanged.
      side: The side of the matrix that P projects: "input", "output", "shorter" (ties: input),
        "longer" (ties: output) or "both" (not with online PCA): `R = P_out^T M P_in` for M (output,
        input), and `inner` sees its transpose.
      dimension_numbers: Matrix axes of the parameters: one for all, a tree of them, or a function
        from parameters to a tree. None: every parameter is a matrix (input, output).
      seed: Seed of projectors that draw random numbers.
      basis_dtype: dtype of P. None: float32 (float64 for float64 parameters).
      widen_updates: Whether to return the updates in float32 instead of the gradients' dtype, for
        transformations that follow.

    Returns:
      An Optax transformation with the additional attributes `refresh`, `project` and `apply`.

    Raises:
      ValueError: The rank is below 1, the side or dtype of P is unknown, the projector does not
        support the side, or both `scale` and `lift` are given. `init` raises for a parameter that
        is not a matrix or has an integer or float16 dtype, and for a state that `transport` does
        not support.

    References:
      arXiv 2408.12857, equation 6; with an SVD projector, GaLore, arXiv 2403.03507, algorithm 1.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> tx = optax.chain(
      ...     osd_jax.scale_by_subspace(
      ...         optax.scale_by_adam(), osd_jax.online_pca(optax.adam(5e-3)), rank=4),
      ...     optax.scale_by_learning_rate(1e-2))
      >>> params = {"kernel": jnp.ones((16, 24))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((16, 24))}, state, params)
      >>> jax.tree.map(jnp.shape, osd_jax.projectors(state))
      {'kernel': (16, 4)}
    """
    check_static("rank", rank)
    check_rank(rank)
    check_basis_dtype(basis_dtype)
    check_object("projector", projector, BasisRule, "svd(200)")
    if lift is not None:
        check_object("lift", lift, Lift, "scaled(0.25)")
    if transport is not None and not callable(transport):
        raise ValueError(
            f"transport is {transport!r}: expected None or osd_jax.transport_moments(...)"
        )
    check_rule(projector)
    if side not in SIDES:
        raise ValueError(f"side is {side!r}: expected one of {', '.join(SIDES)}")
    if side == "both" and not projector.two_sided:
        raise ValueError(
            "side='both' has two bases, and online PCA moves one: use svd(...) or random(...), or "
            "one side"
        )
    if side == "both" and lift is not None and not lift.two_sided:
        raise ValueError(
            f"side is 'both', and lift is {lift.name or lift.apply}, which reads one basis: use "
            "one side"
        )
    if scale is not None and lift is not None:
        raise ValueError(
            f"scale is {scale!r} and lift is given: scale is short for lift=scaled(scale); give one"
        )
    lift_rule = lift or scaled_lift(1.0 if scale is None else scale)
    inner = optax.with_extra_args_support(inner)
    clock = projector.clock
    always = merged(lift_rule.needs.statistics)
    at_moves = merged(always, projector.needs.statistics)
    needs_gradient = reading_gradient((projector.needs, lift_rule.needs))

    def layouts(params: optax.Params) -> Any:
        """A tree of layouts like `params`, without its boxes."""
        return layouts_of(params, dimension_numbers, side)

    def whole_gradients(tree: Any, grads: optax.Updates) -> Any:
        """Gradients without boxes, each device with whole matrices; `tree` is of layouts."""

        def one(layout: MatrixLayout, grad: jax.Array) -> jax.Array:
            return whole_matrices(grad, layout.stack_axis, layout.column_axis)

        return jax.tree.map(one, tree, grads)

    def transported(old: Any, new: Any, inner_state: optax.OptState) -> optax.OptState:
        """The inner state after a change of bases."""
        assert transport is not None
        return transport(inner_state, jax.tree.map(change_of, old, new, is_leaf=is_two_sided))

    def unchanged(old: Any, new: Any, inner_state: optax.OptState) -> optax.OptState:
        return inner_state

    @takes_shapes
    def init(params: optax.Params) -> SubspaceState:
        def matrix_of(layout: MatrixLayout, param: jax.Array) -> tuple[Any, int, Any]:
            check_dtype(layout.name, param)
            matrix = jax.eval_shape(layout.to_matrix, param)
            return matrix, min(rank, *matrix.shape[-2:]), accumulator_dtype(param.dtype)

        def init_basis(layout: MatrixLayout, param: jax.Array) -> Basis:
            matrix, r, wide = matrix_of(layout, param)
            left = zeros_of_axes("pr", matrix, r, basis_dtype or wide)
            if side != "both":
                return left
            return TwoSided(output=zeros_of_axes("qr", matrix, r, basis_dtype or wide), input=left)

        def init_low_rank(layout: MatrixLayout, param: jax.Array) -> jax.Array:
            matrix, r, wide = matrix_of(layout, param)
            return zeros_of_axes("rs" if side == "both" else "rq", matrix, r, wide)

        def init_set_at(layout: MatrixLayout, param: jax.Array) -> jax.Array:
            matrix, r, _ = matrix_of(layout, param)
            return zeros_of_axes("", matrix, r, jnp.int32) + NOT_SET

        def init_lift(layout: MatrixLayout, param: jax.Array, low_rank: jax.Array) -> Any:
            return dict(lift_rule.init(layout.to_matrix(param), low_rank))

        tree, params = layouts(params), unboxed(params)
        bases = jax.tree.map(init_basis, tree, params)
        wide = jax.tree.map(float32_or_more, bases)
        low_rank = jax.tree.map(init_low_rank, tree, params)
        lift_state = jax.tree.map(init_lift, tree, params, low_rank)
        inner_state = inner.init(low_rank)
        if transport is not None:  # raises for an unsupported state before any work starts
            jax.eval_shape(transported, bases, bases, inner_state)
        return SubspaceState(
            count=jnp.zeros([], jnp.int32),
            projector=ProjectorState(
                bases,
                projector.optimizer.init(wide) if projector.optimizer else optax.EmptyState(),
                jax.tree.map(init_set_at, tree, params),
            ),
            inner=inner_state,
            lift=lift_state if jax.tree.leaves(lift_state) else (),
            side=side,
        )

    @promotes
    def refresh(
        grads: optax.Updates,
        state: SubspaceState,
        when: jax.typing.ArrayLike = True,
        reduce: Reduce | None = None,
    ) -> SubspaceState:
        """Sets each P that is due or waits from its gradient (..., p, q) if that is nonzero.

        All of it is within one `lax.cond`, which runs while any P is due or waits. Inside it, each
        parameter has two more: a matrix that waits for a long time, such as an expert without
        tokens, costs the norm of its gradient at every step, and an SVD only when that is nonzero.

        A P that is set is a constant under differentiation, as are the bases of a given step: the
        derivative of an SVD is not finite if two singular values are equal, as for a low-rank
        gradient. Derivatives through P's own steps are complete.
        """
        due = (clock.event(state.count) == REFRESH) & when
        waits = jax.tree.map(lambda at: at == NOT_SET, state.projector.set_at)
        before = (state.projector.basis, state.projector.set_at)
        may_change = due | any_of(waits)
        bases, set_at = cond_once(
            may_change,
            functools.partial(set_basis, projector, layouts, reduce),
            lambda due, count, key_data, grads, bases, set_at: (bases, set_at),
            *(due, state.count, jax.random.key_data(jax.random.key(seed)), grads, *before),
            # Replaces the derivative of `set_basis`, whose P is a constant.
            derivative_of=lambda due, count, key_data, grads, bases, set_at: (
                optax.tree.zeros_like(bases),
                set_at,
            ),
        )
        bases, set_at = jax.tree.map(as_stored, bases), jax.tree.map(on_every_device, set_at)
        if transport is not None:
            changed = (state.projector.basis, bases, state.inner)
            state = state._replace(inner=cond_once(may_change, transported, unchanged, *changed))
        optimizer = state.projector.optimizer
        if projector.optimizer is not None and clock.refresh_every is not None:
            is_new = jax.tree.map(lambda new, old: new != old, set_at, state.projector.set_at)
            keep = lambda bases, optimizer, is_new: optimizer
            optimizer = cond_once(
                may_change, functools.partial(restarted, projector), keep, bases, optimizer, is_new
            )
        return state._replace(projector=ProjectorState(bases, optimizer, set_at))

    def moves_now(state: SubspaceState) -> jax.Array:
        """Whether any P moves at this step."""
        may_move = any_of(set_before(state.projector.set_at, state.count))
        return (clock.event(state.count) == MOVE) & may_move

    @promotes
    def project(grads: optax.Updates, state: SubspaceState, reduce: Reduce | None = None) -> Any:
        """Gradients -> a tree of `Sketch`, with the statistics of the projector and the lift."""
        tree = layouts(grads)
        grads = whole_gradients(tree, unboxed(grads))
        bases = bases_of_whole(state.projector.basis)

        def moving(grads: optax.Updates, bases: Any) -> Any:
            return sketches_of(tree, grads, bases, at_moves, reduce)

        def staying(grads: optax.Updates, bases: Any) -> Any:
            # Zeros replace what only P reads, because a `lax.cond` selects between the two.
            def one(shape: Sketch, sketch: Sketch) -> Sketch:
                zeros = {name: zeros_of(x) for name, x in shape.statistics.items()}
                return Sketch(sketch.low_rank, {**zeros, **sketch.statistics}, shape.degrees)

            found = sketches_of(tree, grads, bases, always, reduce)
            return jax.tree.map(one, jax.eval_shape(moving, grads, bases), found, is_leaf=is_sketch)

        if clock.move_every == 1 or len(always) == len(at_moves):
            return moving(grads, bases)
        return cond_once(moves_now(state), moving, staying, grads, bases)

    @promotes
    def apply(
        sketches: Any,
        state: SubspaceState,
        params: optax.Params,
        *,
        grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SubspaceState]:
        """Sketches -> updates in the parameters' shapes.

        Args:
          sketches: From `project`.
          state: From `refresh`.
          params: Only their shapes and dtypes are read.
          grads: The gradients, for rules that read them at every step (`needs_gradient`).
          **extra_args: Passed to `inner`.
        """
        if needs_gradient is not None and grads is None:
            raise ValueError(
                f"{needs_gradient.reason}: pass the gradients to apply as grads=, or use "
                f"{needs_gradient.remedy}"
            )
        tree, like, whole = layouts(params), unboxed(params), unboxed(grads)
        bases, optimizer, set_at = state.projector
        here = bases_of_whole(bases)
        moves, moved, inner_state = moves_now(state), (bases, optimizer), state.inner

        def after_move(inner_state: optax.OptState) -> optax.OptState:
            if transport is None or projector.gradient is None:
                return inner_state
            changed = (state.projector.basis, moved[0], inner_state)
            return jax.lax.cond(moves, transported, unchanged, *changed)

        if projector.gradient is not None:
            stay = lambda bases, here, sketches, optimizer, moves, age: (bases, optimizer)
            age = steps_since_set(set_at, state.count, clock.move_every)
            args = (bases, here, sketches, optimizer, set_before(set_at, state.count), age)
            # No custom derivative: values captured by P's optimizer, such as a learning rate, may
            # be traced.
            moved = jax.lax.cond(moves, functools.partial(move_basis, projector), stay, *args)
        read = jax.tree.map(lambda sketch: sketch.only(always), sketches, is_leaf=is_sketch)
        if projector.order == "before":
            here = bases_of_whole(moved[0])
            again = lambda grads, bases, read: sketches_of(tree, grads, bases, always)
            still = lambda grads, bases, read: read
            read = jax.lax.cond(moves, again, still, whole, here, read)
            inner_state = after_move(inner_state)
        low_rank = jax.tree.map(lambda sketch: sketch.low_rank, read, is_leaf=is_sketch)
        directions, inner_state = inner.update(low_rank, inner_state, None, **extra_args)
        if projector.order == "after":
            inner_state = after_move(inner_state)

        @functools.partial(traced_once, static_argnums=0)
        def lift_one(
            layout: MatrixLayout, basis: Any, d: jax.Array, read: Sketch, g: Any, own: Any
        ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
            matrix = layout.to_matrix(g) if lift_rule.needs.gradient == "always" else None
            lifted = lift_rule.apply(d, Seen(basis, read, matrix, own, layout.side))
            check_lift_state(lift_rule, lifted.state, own)
            update = split_matrices(lifted_update(layout, basis, lifted), layout.stack_axis)
            return update, {**own, **lifted.state}

        directions = jax.tree.map(whole_matrices, directions)
        own = state.lift if jax.tree.leaves(state.lift) else jax.tree.map(lambda _: {}, tree)
        gradient = (
            whole if lift_rule.needs.gradient == "always" else jax.tree.map(lambda _: (), tree)
        )
        found = jax.tree.map(lift_one, tree, here, directions, read, gradient, own)
        updates, own = unzip(tree, found)
        if not widen_updates:
            updates = jax.tree.map(lambda update, x: update.astype(x.dtype), updates, like)
        state = state._replace(
            count=optax.safe_increment(state.count),
            projector=ProjectorState(*moved, set_at),
            inner=inner_state,
            lift=own if jax.tree.leaves(own) else (),
        )
        return boxed_like(params, updates), state

    @promotes
    def update(
        grads: optax.Updates,
        state: SubspaceState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SubspaceState]:
        """The update for gradients, or for a tree of `SketchLeaf` that replaces them."""
        del params  # the gradients have the same shapes and dtypes
        kinds = {is_sketch_leaf(x) for x in jax.tree.leaves(grads)}
        if kinds == {True}:
            return apply(bare(unboxed(grads)), state, grads, **extra_args)
        if True in kinds:
            raise ValueError(f"the tree mixes whole gradients and sketches; {ONLY_SKETCHES}")
        tree = layouts(grads)
        grads = boxed_like(grads, whole_gradients(tree, unboxed(grads)))
        state = refresh(grads, state)
        return apply(project(grads, state), state, grads, grads=grads, **extra_args)

    return SubspaceTransformation(init, update, refresh, project, apply, needs_gradient)
