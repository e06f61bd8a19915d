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

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax.bases import (
    MOVE,
    NOT_SET,
    REFRESH,
    BasisRule,
    ProjectorState,
    check_rule,
    each_matrix,
)
from osd_jax.layout import (
    SIDES,
    DimensionNumbers,
    MatrixLayout,
    Side,
    check_basis_dtype,
    check_dtype,
    check_rank,
    dimension_numbers_by_path,
    matrix_layout,
)
from osd_jax.lift import Lift, Lifted, Seen, lift
from osd_jax.lift import scaled as scaled_lift
from osd_jax.numerics import (
    accumulator_dtype,
    any_of,
    as_it_lies,
    check_object,
    check_static,
    float32_or_more,
    has_direction,
    like_sharding,
    squared_norm,
    zeros_of,
    zeros_of_axes,
)
from osd_jax.sharding import takes_shapes
from osd_jax.sketch import (
    SQUARED_NORM,
    Basis,
    Needs,
    Reduce,
    Sketch,
    Statistic,
    TwoSided,
    bare,
    is_sketch,
    is_sketch_leaf,
    is_two_sided,
    make_sketch,
    merged,
    reading_gradient,
)
from osd_jax.transport import Transport, change_of
from osd_jax.trees import (
    KeyPath,
    boxed_like,
    by_path,
    flatten,
    names,
    path_name,
    path_of,
    promotes,
    unboxed,
)


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


class SubspaceTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation whose update is also available as its three parts.

    Attributes:
      refresh: (grads, state, when=True, reduce=None) -> state. Sets each P that is due at this step
        (if `when`), or that still waits, from its gradient if that is nonzero. `reduce` is as in
        `project`; it is not called if no P is due or waits.
      project: (grads, state, reduce=None) -> sketches, a tree like the gradients without its boxes,
        with a `Sketch` for each projected gradient. `reduce` is the mean over devices, such as
        `functools.partial(jax.lax.pmean, axis_name="data")`, if each device has its own gradients:
        R is reduced first, and A is computed with the reduced R.
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
        "longer" (ties: output) or "both" (`R = P_in^T M P_out`, not with online PCA).
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
        numbers = dimension_numbers_by_path(dimension_numbers, params)
        draws = iter(random_draws(params))

        def one(path: KeyPath, x: jax.Array) -> MatrixLayout:
            layout = matrix_layout(path_name(path), x, numbers(path), side)
            return dataclasses.replace(layout, draw=next(draws))

        return jax.tree_util.tree_map_with_path(one, unboxed(params))

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

        def set_wanted(
            layout: MatrixLayout,
            count: jax.Array,
            key_data: jax.Array,
            wanted: jax.Array,
            grad: jax.Array,
            basis: Basis,
            set_at: jax.Array,
        ) -> tuple[Basis, jax.Array]:
            key = jax.random.fold_in(jax.random.wrap_key_data(key_data), count)
            key = jax.random.fold_in(key, layout.draw)
            each = functools.partial(each_matrix, wanted)
            new = projector.fresh(layout.to_matrix(grad), basis, layout.side, key, each)

            def pick(new: jax.Array, old: jax.Array) -> jax.Array:
                check_fresh(layout.name, new, old)
                new = like_sharding(new, old)
                return jnp.where(wanted[..., None, None], new, old)

            return jax.tree.map(pick, new, basis), jnp.where(wanted, count, set_at)

        def set_waiting(
            layout: MatrixLayout,
            count: jax.Array,
            key_data: jax.Array,
            grad: jax.Array,
            basis: Basis,
            set_at: jax.Array,
        ) -> tuple[Basis, jax.Array]:
            # Reduced before the check for a zero gradient, so that every device decides alike.
            grad = grad if reduce is None else reduce(grad)
            has_one = has_direction(squared_norm(layout.to_matrix(grad)))
            wanted = (set_at == NOT_SET) & has_one
            return _cond_once(
                jnp.any(wanted),
                functools.partial(set_wanted, layout),
                lambda count, key_data, wanted, grad, basis, set_at: (basis, set_at),
                *(count, key_data, wanted, grad, basis, set_at),
            )

        def fresh(
            due: jax.Array,
            count: jax.Array,
            key_data: jax.Array,
            grads: optax.Updates,
            bases: Any,
            set_at: Any,
        ) -> tuple[Any, Any]:
            def one(
                layout: MatrixLayout, grad: jax.Array, basis: Basis, set_at: jax.Array
            ) -> tuple[Basis, jax.Array]:
                set_at = jnp.where(due, NOT_SET, set_at)
                return _cond_once(
                    jnp.any(set_at == NOT_SET),
                    functools.partial(set_waiting, layout),
                    lambda count, key_data, grad, basis, set_at: (basis, set_at),
                    *(count, key_data, grad, basis, set_at),
                )

            tree = layouts(grads)
            return _unzip(tree, jax.tree.map(one, tree, unboxed(grads), bases, set_at))

        due = (clock.event(state.count) == REFRESH) & when
        waits = jax.tree.map(lambda at: at == NOT_SET, state.projector.set_at)
        before = (state.projector.basis, state.projector.set_at)
        may_change = due | any_of(waits)
        bases, set_at = _cond_once(
            may_change,
            fresh,
            lambda due, count, key_data, grads, bases, set_at: (bases, set_at),
            *(due, state.count, jax.random.key_data(jax.random.key(seed)), grads, *before),
            # Replaces the derivative of `fresh`, whose P is a constant.
            derivative_of=lambda due, count, key_data, grads, bases, set_at: (
                optax.tree.zeros_like(bases),
                set_at,
            ),
        )
        if transport is not None:
            changed = (state.projector.basis, bases, state.inner)
            state = state._replace(inner=_cond_once(may_change, transported, unchanged, *changed))
        optimizer = state.projector.optimizer
        if projector.optimizer is not None and clock.refresh_every is not None:
            is_new = jax.tree.map(lambda new, old: new != old, set_at, state.projector.set_at)
            keep = lambda bases, optimizer, is_new: optimizer
            optimizer = _cond_once(may_change, restart, keep, bases, optimizer, is_new)
        return state._replace(projector=ProjectorState(bases, optimizer, set_at))

    def restart(bases: Any, optimizer: optax.OptState, is_new: Any) -> optax.OptState:
        """The state of P's optimizer, reset for each matrix whose P is new."""
        assert projector.optimizer is not None
        masks = by_path(is_new)

        def one(path: KeyPath, kept: jax.Array, first: jax.Array) -> jax.Array:
            keys = path_of(path)
            parts = (keys[i:j] for i in range(len(keys) + 1) for j in range(len(keys), i - 1, -1))
            mask = next((masks[part] for part in parts if part in masks), None)
            if mask is None or kept.ndim <= mask.ndim or kept.shape[: mask.ndim] != mask.shape:
                return kept  # shared by all matrices, such as a count
            mask = mask.reshape(mask.shape + (1,) * (kept.ndim - mask.ndim))
            return jnp.where(mask, first, kept)

        first = projector.optimizer.init(jax.tree.map(float32_or_more, bases))
        return jax.tree_util.tree_map_with_path(one, optimizer, first)

    def moves_now(state: SubspaceState) -> jax.Array:
        """Whether any P moves at this step."""
        may_move = any_of(set_before(state.projector.set_at, state.count))
        return (clock.event(state.count) == MOVE) & may_move

    @promotes
    def project(grads: optax.Updates, state: SubspaceState, reduce: Reduce | None = None) -> Any:
        """Gradients -> a tree of `Sketch`, with the statistics of the projector and the lift."""
        tree, grads = layouts(grads), unboxed(grads)

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
            return moving(grads, state.projector.basis)
        return _cond_once(moves_now(state), moving, staying, grads, state.projector.basis)

    def move(bases: Any, sketches: Any, optimizer: optax.OptState, moves: Any, age: Any) -> Any:
        """One step of P's optimizer -> (bases, its state), for the P where `moves` (...) is True.

        `age` is the number of this step by each matrix's own count; P's optimizer receives it as an
        extra argument of `update`.
        """
        assert projector.gradient is not None and projector.optimizer is not None
        gradient_of = projector.gradient

        def gradient(basis: Any, sketch: Sketch, moves: jax.Array) -> Any:
            pick = lambda x: jnp.where(moves[..., None, None], x, 0)
            return jax.tree.map(pick, gradient_of(basis, sketch))

        def stepped(old: Any, basis: Any, step: Any, sketch: Sketch, moves: jax.Array) -> Any:
            norm = sketch.statistics.get(SQUARED_NORM.name)
            moves &= has_direction(squared_norm(sketch.low_rank) if norm is None else norm)

            def pick(old: jax.Array, basis: jax.Array, step: jax.Array) -> jax.Array:
                new = basis + step
                if projector.retract is not None:
                    new = like_sharding(each_matrix(moves, projector.retract, new), new)
                return jnp.where(moves[..., None, None], new.astype(old.dtype), old)

            return jax.tree.map(pick, old, basis, step)

        each = functools.partial(jax.tree.map, is_leaf=is_two_sided)
        wide = jax.tree.map(float32_or_more, bases)
        steps, new = optax.with_extra_args_support(projector.optimizer).update(
            each(gradient, wide, sketches, moves), optimizer, wide, age=age
        )
        return each(stepped, bases, wide, steps, sketches, moves), new

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
        moves, moved, inner_state = moves_now(state), (bases, optimizer), state.inner

        def after_move(inner_state: optax.OptState) -> optax.OptState:
            if transport is None or projector.gradient is None:
                return inner_state
            changed = (state.projector.basis, moved[0], inner_state)
            return jax.lax.cond(moves, transported, unchanged, *changed)

        if projector.gradient is not None:
            stay = lambda bases, sketches, optimizer, moves, age: (bases, optimizer)
            age = steps_since_set(set_at, state.count, clock.move_every)
            args = (bases, sketches, optimizer, set_before(set_at, state.count), age)
            # No custom derivative: values captured by P's optimizer, such as a learning rate, may
            # be traced.
            moved = jax.lax.cond(moves, move, stay, *args)
        read = jax.tree.map(lambda sketch: sketch.only(always), sketches, is_leaf=is_sketch)
        if projector.order == "before":
            bases = moved[0]
            again = lambda grads, bases, read: sketches_of(tree, grads, bases, always)
            still = lambda grads, bases, read: read
            read = jax.lax.cond(moves, again, still, whole, bases, read)
            inner_state = after_move(inner_state)
        low_rank = jax.tree.map(lambda sketch: sketch.low_rank, read, is_leaf=is_sketch)
        directions, inner_state = inner.update(low_rank, inner_state, None, **extra_args)
        if projector.order == "after":
            inner_state = after_move(inner_state)

        def lift_one(
            layout: MatrixLayout, x: Any, basis: Any, d: jax.Array, read: Sketch, g: Any, own: Any
        ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
            matrix = layout.to_matrix(g) if lift_rule.needs.gradient == "always" else None
            lifted = lift_rule.apply(d, Seen(basis, read, matrix, own, layout.side))
            check_lift_state(lift_rule, lifted.state, own)
            update = lifted_update(layout, basis, lifted)
            return update if widen_updates else update.astype(x.dtype), {**own, **lifted.state}

        own = state.lift if jax.tree.leaves(state.lift) else jax.tree.map(lambda _: {}, tree)
        found = jax.tree.map(
            lift_one, tree, like, bases, directions, read, tree if grads is None else whole, own
        )
        updates, own = _unzip(tree, found)
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
        state = refresh(grads, state)
        return apply(project(grads, state), state, grads, grads=grads, **extra_args)

    return SubspaceTransformation(init, update, refresh, project, apply, needs_gradient)


def sketches_of(
    tree: Any, grads: Any, bases: Any, statistics: Iterable[Statistic], reduce: Reduce | None = None
) -> Any:
    """The sketch of each gradient, with these statistics; `tree` is of `MatrixLayout`."""
    return jax.tree.map(
        lambda layout, g, basis: make_sketch(basis, layout.to_matrix(g), statistics, reduce),
        tree,
        grads,
        bases,
    )


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


def check_fresh(name: str, new: jax.Array, old: jax.Array) -> None:
    """Raises ValueError unless a rule's P has the shape and dtype of the old P."""
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        raise ValueError(
            f"the rule's fresh P of '{name}' is {new.dtype}{list(new.shape)}: expected "
            f"{old.dtype}{list(old.shape)}, like the old P"
        )


def set_before(set_at: Any, count: jax.Array) -> Any:
    """Whether each P was set before the step with this count: a tree like `set_at`, of bool."""
    return jax.tree.map(lambda at: (at != NOT_SET) & (at != count), set_at)


def steps_since_set(set_at: Any, count: jax.Array, every: int | None) -> Any:
    """The number of moves of each P since it was set, including this step: a tree like `set_at`.

    At least 1, also if P does not move.
    """
    assert every is not None
    return jax.tree.map(lambda at: jnp.maximum(count // every - at // every, 1), set_at)


def _unzip(tree: Any, pairs: Any) -> tuple[Any, Any]:
    """A tree like `tree` with a pair at each leaf -> a pair of trees."""
    first, second = (jax.tree.map(lambda _, x, i=i: x[i], tree, pairs) for i in range(2))
    return first, second


def random_draws(params: optax.Params) -> list[int]:
    """The number of each parameter that is folded into the key of its random draws.

    The text of the path determines it, as in earlier versions; if two paths have the same text,
    their keys determine it.
    """
    named = names([path for path, _ in flatten(params)])
    return [zlib.crc32(name.encode()) for name in named]


def _cond_once(
    due: jax.Array,
    do: Callable[..., Any],
    keep: Callable[..., Any],
    *args: Any,
    derivative_of: Callable[..., Any] | None = None,
) -> Any:
    """`do(*args)` if `due`, else `keep(*args)`, which must be cheaper.

    Plain `lax.cond`, except under `jax.vmap` with a batched `due`: there `cond` would run both
    branches at every step, including an SVD, so an outer `cond` tests whether any of them is due.
    `derivative_of`, if given, has the derivative of `do`.
    """
    batchable = jax.custom_batching.custom_vmap(
        lambda due, *args: jax.lax.cond(due, do, keep, *args)
    )
    choose = jax.custom_jvp(batchable)

    @choose.defjvp
    @promotes
    def differentiated(primals, tangents):  # type: ignore[no-untyped-def]
        # Reverse mode supports neither custom `vmap` rules nor a `cond` of tangents whose `due` is
        # batched.
        (due, *args), (_, *directions) = primals, tangents
        new, old = (
            jax.jvp(branch, tuple(args), tuple(directions))[1]
            for branch in (derivative_of or do, keep)
        )
        is_integer = lambda tangent: tangent.dtype == jax.dtypes.float0
        pick = lambda x, y: x if is_integer(x) else jnp.where(due, x, y)
        return choose(*primals), jax.tree.map(pick, new, old)

    @batchable.def_vmap
    @promotes
    def batched(axis_size, in_batched, due, *args):  # type: ignore[no-untyped-def]
        def spread(x: jax.Array, is_batched: bool) -> jax.Array:
            return x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))

        due_all, *rest = (
            jax.tree.map(spread, x, b) for x, b in zip((due, *args), in_batched, strict=True)
        )

        def some(*args: Any) -> Any:
            pick = jax.vmap(lambda due, new, old: jnp.where(due, new, old))
            new, old = jax.vmap(do)(*args), jax.vmap(keep)(*args)
            return jax.tree.map(functools.partial(pick, due_all), new, old)

        out = jax.lax.cond(jnp.any(due), some, jax.vmap(keep), *rest)
        return out, jax.tree.map(lambda _: True, out)

    return choose(due, *args)


# Any operation on a gradient of which only the sketch is kept.
ONLY_SKETCHES = (
    "only the sketches of projected gradients are kept here (accumulated or reduced sketches, or "
    "layer-by-layer updates with micro-batches or clipping). A transformation before "
    "scale_by_subspace may only multiply them by a number: put it after scale_by_subspace, or "
    "keep whole gradients"
)
