"""Custom basis rules, lifts and transports, written outside the library.

A toy of each kind, about twenty lines long, runs in every kind of step.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import osd_jax
from osd_jax import COLUMN_ENERGIES, CORRELATION, SQUARED_NORM, Needs, llama
from osd_jax.basis_rule import MOVE, NOTHING, REFRESH, Clock
from osd_jax.diagnostics import subspace_diagnostics, subspace_states
from osd_jax.llama.layerwise import make_layerwise_train_step
from osd_jax.llama.train import make_train_step
from osd_jax.quantization import code_book, dequantize
from osd_jax.sharding import make_mesh, state_sharding
from osd_jax.sketch import make_sketch
from parity_tests.support.arrays import normal_jax
from parity_tests.support.jax_toys import (
    CONFIG,
    assert_sketches_are_refused,
    is_one_of_its_shape,
    llama_run,
    llama_toy,
)

Tree = Any
RANK, EVERY, GAP, EPS = 3, 2, 5, 1.0
STACKED = osd_jax.SubspaceDimensionNumbers(1, 2)


# ------------------------------------------------------------------------------------ the toys

COLUMN_SUMS = osd_jax.Statistic("column_sums", 1, lambda P, M, R: M.sum(-2, dtype=R.dtype))


def oja(step_size: float = 0.1, order: Any = "after", gradient: Any = "at a refresh") -> Any:
    """P starts with the first columns of M, orthonormal, and follows -A / ||M||^2."""

    def fresh(matrix: Any, old: Any, side: Any, key: Any, each: Any) -> Any:
        start = lambda M: jnp.linalg.qr(M[:, : old.shape[-1]])[0].astype(old.dtype)
        return each(start, matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32)))

    def slope(basis: Any, sketch: osd_jax.Sketch) -> Any:
        a, s = (sketch.statistics[each.name] for each in (CORRELATION, SQUARED_NORM))
        return -a / s[..., None, None]

    needs = Needs((CORRELATION, SQUARED_NORM), gradient, "Oja's toy reads the gradient")
    clock = Clock(refresh_every=GAP, move_every=EVERY)
    return osd_jax.BasisRule(clock, fresh, needs, slope, optax.sgd(step_size), order=order)


def by_column_sums() -> osd_jax.Lift:
    """Divides the update's columns by a mean over time of |the gradient's column sums|."""

    def apply(direction: Any, seen: osd_jax.Seen) -> osd_jax.Lifted:
        size = jnp.abs(seen.sketch.statistics["column_sums"])
        mean = 0.5 * seen.state["mean"] + 0.5 * size
        return osd_jax.Lifted(direction / (EPS + mean[..., None, :]), state={"mean": mean})

    init = lambda matrix, low_rank: {"mean": jnp.zeros_like(low_rank[..., 0, :])}
    return osd_jax.Lift(apply, Needs((COLUMN_SUMS,)), init)


def with_residual() -> osd_jax.Lift:
    """Adds what P does not reach."""

    def apply(direction: Any, seen: osd_jax.Seen) -> osd_jax.Lifted:
        assert seen.gradient is not None
        rest = seen.gradient - seen.basis @ seen.sketch.low_rank
        return osd_jax.Lifted(direction, rest=0.1 * rest, then=jnp.tanh, scale=0.5)

    reason = "the residual toy adds what P leaves of the gradient"
    return osd_jax.Lift(apply, Needs((), "always", reason))


class Count(NamedTuple):
    """The state of a rule of the user's own: how often P changed, by parameter."""

    changes: Any

    def transported(self, changes: Any) -> Count:
        is_change = lambda x: isinstance(x, osd_jax.transport.Change)
        more = lambda change, n: n + change.happened
        return Count(jax.tree.map(more, changes, self.changes, is_leaf=is_change))


def counting() -> optax.GradientTransformation:
    zero = lambda x: jnp.zeros(x.shape[:-2], jnp.int32)
    init = lambda params: Count(jax.tree.map(zero, params))
    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


# ------------------------------------------------------------------------ on a few matrices


def draw(seed: int, shape: tuple[int, ...] = (6, 9), dtype: Any = jnp.float32) -> Tree:
    return {"w": (1.0 + normal_jax(seed, {"w": shape})["w"]).astype(dtype)}


def toy(rule: Any = None, lift: Any = None, **more: Any) -> Any:
    options = {"rank": RANK, "side": "input", **more}
    inner = options.pop("inner", optax.identity())
    return osd_jax.scale_by_subspace(inner, rule or oja(), lift=lift or by_column_sums(), **options)


def run(tx: Any, grads: list[Tree], state: Tree = None) -> tuple[list[np.ndarray], Tree]:
    state = tx.init(grads[0]) if state is None else state
    update, found = jax.jit(tx.update), []
    for g in grads:
        updates, state = update(g, state, g)
        found.append(np.asarray(updates["w"]))
    return found, state


@pytest.mark.parametrize("order", ["after", "before"])
def test_the_toys_follow_their_equations(order: Any) -> None:
    steps = 2 * GAP + 2
    with jax.enable_x64(True):
        grads = [draw(seed, dtype=jnp.float64) for seed in range(steps)]
        gradient = "always" if order == "before" else "at a refresh"
        tx = toy(oja(order=order, gradient=gradient))
        found, state = run(tx, grads)
    mean = np.zeros(9)
    for step, (g, update) in enumerate(zip(grads, found, strict=True)):
        G = np.asarray(g["w"])
        if step % GAP == 0:
            P = np.linalg.qr(G[:, :RANK])[0]
        moved = P
        if step % EVERY == 0 and step % GAP:
            moved = P + 0.1 * G @ (P.T @ G).T / np.sum(G**2)
        used = moved if order == "before" else P
        mean = 0.5 * mean + 0.5 * np.abs(G.sum(0))
        np.testing.assert_allclose(update, used @ (used.T @ G / (EPS + mean)), rtol=1e-10)
        P = moved
    np.testing.assert_allclose(osd_jax.projectors(state)["w"], P, rtol=1e-10)
    np.testing.assert_allclose(subspace_states(state)[0].lift["w"]["mean"], mean, rtol=1e-10)


def test_before_takes_what_the_lift_reads_of_the_moved_basis() -> None:
    project_twice = osd_jax.Lift(lambda d, seen: osd_jax.Lifted(seen.sketch.low_rank))
    tx = toy(oja(order="before", gradient="always"), project_twice)
    grads = [draw(seed) for seed in range(4)]
    found, state = run(tx, grads[:2])
    for g in grads[2:]:
        (update,), state = run(tx, [g], state)
        P = np.asarray(osd_jax.projectors(state)["w"])
        np.testing.assert_allclose(update, P @ (P.T @ np.asarray(g["w"])), rtol=1e-5, atol=1e-6)


def test_a_lift_may_add_a_rest_and_take_a_function_of_the_sum() -> None:
    tx = toy(osd_jax.svd(GAP), with_residual())
    g = draw(0)
    (update,), state = run(tx, [g])
    P, G = (np.asarray(x) for x in (osd_jax.projectors(state)["w"], g["w"]))
    inside = P @ (P.T @ G)
    np.testing.assert_allclose(update, 0.5 * np.tanh(inside + 0.1 * (G - inside)), rtol=1e-4)
    nothing = osd_jax.Lift(lambda d, seen: osd_jax.Lifted(None, rest=jnp.zeros((6, 9))))
    assert not np.any(run(toy(osd_jax.svd(GAP), nothing), [g])[0][0])


def test_the_published_lion_is_a_lift() -> None:
    from osd_jax.rules import interpolate_momentum

    lion = toy(osd_jax.svd(GAP), osd_jax.sign_after_lift(), inner=interpolate_momentum())
    named = osd_jax.make_optimizer(
        "galore_lion", "right", learning_rate=0.1, rank=RANK, select=lambda *_: True, scale=0.25,
        update_proj_gap=GAP,
    )  # fmt: skip
    grads = [draw(seed) for seed in range(3)]
    for one, other in zip(run(lion, grads)[0], run(named, grads)[0], strict=True):
        np.testing.assert_allclose(-0.1 * one, other, rtol=1e-6)
    assert set(np.unique(run(lion, grads)[0][2])) == {-1.0, 1.0}


def test_both_scale_and_lift_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scale is 0.5 and lift is given: .* give one"):
        toy(scale=0.5)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (oja()._replace(optimizer=None), "move_every=2, and its gradient and its optimizer"),
        (osd_jax.svd(2)._replace(optimizer=optax.sgd(0.1)), "move_every=None, and its gradient"),
        (oja(order="before"), "order='before', which recomputes the sketch"),
        (oja(order="first"), "order is 'first': expected one of after, before"),
        (osd_jax.svd(2)._replace(clock=Clock(0)), "the period of P is 0"),
    ],
)
def test_a_rule_that_contradicts_itself_is_refused(rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy(rule)


def test_a_fresh_basis_of_another_shape_is_refused() -> None:
    rule = osd_jax.svd(2)._replace(fresh=lambda matrix, old, *rest: old[..., :1])
    with pytest.raises(ValueError, match=r"fresh P of 'w' is float32\[6, 1\]: expected .*\[6, 3\]"):
        run(toy(rule), [draw(0)])


def test_two_statistics_of_one_name_are_refused() -> None:
    other = osd_jax.Statistic("correlation", 1, lambda P, M, R: M.sum((-2, -1)))
    lift = osd_jax.Lift(by_column_sums().apply, Needs((other,)))
    with pytest.raises(ValueError, match="two different statistics are named 'correlation'"):
        toy(lift=lift)


@pytest.mark.parametrize(
    ("refresh", "move"), [(None, None), (None, 1), (None, 3), (4, None), (4, 2)]
)
def test_a_clock_says_a_refresh_before_a_move(refresh: int | None, move: int | None) -> None:
    clock = Clock(refresh, move)
    for step in range(9):
        wanted = MOVE if move and step % move == 0 else NOTHING
        if step == 0 or (refresh and step % refresh == 0):
            wanted = REFRESH
        assert int(clock.event(jnp.int32(step))) == wanted
        assert clock.event(jnp.int32(step)).dtype == jnp.int32


# ------------------------------------------------------------------------------ statistics


def test_column_energies_are_the_columns_squared_norms() -> None:
    """And of degree 2, summed to ||M||^2, and estimated over devices column by column."""
    rng = np.random.default_rng(0)
    P, parts = np.linalg.qr(rng.standard_normal((2, 6, 3)))[0], rng.standard_normal((4, 2, 6, 9))
    with jax.enable_x64(True):
        both = (COLUMN_ENERGIES, SQUARED_NORM, COLUMN_SUMS)
        sketch = make_sketch(jnp.asarray(P), jnp.asarray(parts[0]), both)
        np.testing.assert_allclose(
            sketch.statistics["column_energies"], np.linalg.norm(parts[0], axis=-2) ** 2, rtol=1e-12
        )
        np.testing.assert_allclose(
            sketch.statistics["column_energies"].sum(-1), sketch.statistics["squared_norm"]
        )
        chex.assert_trees_all_close(
            sketch.scaled(3.0), make_sketch(jnp.asarray(P), jnp.asarray(3 * parts[0]), both)
        )
        assert sketch.scaled(3.0).degrees == {
            "column_energies": 2, "squared_norm": 2, "column_sums": 1,
        }  # fmt: skip

        mean = functools.partial(jax.lax.pmean, axis_name="data")
        reduced = jax.vmap(lambda M: make_sketch(jnp.asarray(P), M, both, mean), axis_name="data")
        found = jax.tree.map(lambda x: x[0], reduced(jnp.asarray(parts)))
        whole = make_sketch(jnp.asarray(P), jnp.asarray(parts.mean(0)), both)
        chex.assert_trees_all_close(found.only([COLUMN_SUMS]), whole.only([COLUMN_SUMS]))
        own = [P.mT @ M for M in parts]
        ratio = np.sum(np.mean(own, 0) ** 2, -2) / np.mean(np.sum(np.square(own), -2), 0)
        wanted = np.mean(np.sum(parts**2, -2), 0) * ratio
        np.testing.assert_allclose(found.statistics["column_energies"], wanted, rtol=1e-12)
        alike = reduced(jnp.asarray(np.stack([parts.mean(0)] * 4)))
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], alike), whole)


def test_statistics_are_taken_at_the_steps_that_read_them() -> None:
    """Those of P where it moves, those of the lift always; a sketch is of one structure."""
    tx, grads = toy(), [draw(seed) for seed in range(3)]
    state = run(tx, grads[:1])[1]
    for step, moves in ((1, False), (2, True)):
        sketch = tx.project(grads[step], state)["w"]
        assert set(sketch.statistics) == {"correlation", "squared_norm", "column_sums"}
        assert bool(np.any(sketch.statistics["correlation"])) == moves
        assert np.any(sketch.statistics["column_sums"])
        state = run(tx, grads[step : step + 1], state)[1]


# --------------------------------------------------------------------------- other ways to step


@pytest.mark.parametrize("shape", [(6, 9), (2, 6, 9)], ids=str)
def test_accumulated_parts_that_are_alike_are_a_plain_step(shape: tuple[int, ...]) -> None:
    numbers = STACKED if len(shape) == 3 else None
    tx = toy(dimension_numbers=numbers)
    grads = [draw(seed, shape) for seed in range(2 * GAP)]
    plain, plain_state = run(tx, grads)
    twice, state = run(osd_jax.accumulate_sketches(tx, 2), [g for g in grads for _ in range(2)])
    np.testing.assert_allclose(twice[1::2], plain, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state.inner, plain_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("micro_batches", "clipping"), [(1, 0.0), (2, 0.5)])
def test_the_toys_go_layer_by_layer(micro_batches: int, clipping: float) -> None:
    with jax.enable_x64(True):
        tx = llama_toy(oja(), by_column_sums(), transport=osd_jax.transport_moments())
        plain = make_train_step(CONFIG, tx, grad_clipping=clipping, accumulate="sketches")
        layerwise = make_layerwise_train_step(CONFIG, tx, grad_clipping=clipping)
        ends = [
            llama_run(step, tx, micro_batches, dtype=jnp.float64)[1] for step in (plain, layerwise)
        ]
    chex.assert_trees_all_close(*ends, rtol=0, atol=1e-6)


def test_the_toys_train_by_reduced_sketches_on_a_mesh() -> None:
    """Column sums are exact over devices; ||G||^2, by which P's step is divided, is estimated."""
    tx = llama_toy(oja(step_size=1e-3), by_column_sums())
    alone = llama_run(make_train_step(CONFIG, tx), tx, 1)[0]
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for compress, tolerance in ((False, 1e-5), (True, 1e-4)):
        step = make_train_step(CONFIG, tx, mesh=mesh, compress_gradients=compress)
        np.testing.assert_allclose(llama_run(step, tx, 1, mesh=mesh)[0], alone, atol=tolerance)
    assert np.ptp(alone) > 0.01


def test_the_lifts_state_is_split_as_its_columns_are() -> None:
    mesh = make_mesh(fsdp=8)
    params = {"w": jax.ShapeDtypeStruct((6, 16), jnp.float32)}
    layout = state_sharding(toy(), params, {"w": jax.sharding.PartitionSpec(None, "fsdp")}, mesh)
    assert layout.lift["w"]["mean"].spec == jax.sharding.PartitionSpec("fsdp")


# ------------------------------------------------------------------ without the gradient

WITH_REASON: list[Any] = [
    (lambda: (oja(), with_residual()), "the residual toy adds what P leaves of the gradient"),
    (lambda: (oja(gradient="always"), by_column_sums()), "Oja's toy reads the gradient"),
    (
        lambda: (osd_jax.online_pca(optax.sgd(0.1), order="before"), osd_jax.scaled()),
        "move_projector is 'before'",
    ),
]


@pytest.mark.parametrize(("make", "reason"), WITH_REASON, ids=["lift", "rule", "before"])
def test_a_rule_that_reads_the_gradient_is_refused_by_its_own_reason(
    make: Callable[[], Any], reason: str
) -> None:
    """In modes that free gradients, and only there."""
    tx = llama_toy(*make())
    assert_sketches_are_refused(tx, f"{reason}.*only its sketch is kept")
    params = llama.init(CONFIG, 0)
    with pytest.raises(ValueError, match=f"{reason}.*: pass the gradients to apply as grads="):
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(lambda g, s: tx.apply(tx.project(g, s), s, g), params, state)


def test_a_rule_that_reads_the_gradient_trains_where_it_is_there() -> None:
    with jax.enable_x64(True):
        tx = llama_toy(oja(), with_residual())
        steps = [make_train_step(CONFIG, tx), make_layerwise_train_step(CONFIG, tx)]
        ends = [llama_run(step, tx, 1, dtype=jnp.float64)[1] for step in steps]
    chex.assert_trees_all_close(*ends, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ sketches in Optax's trees


def chained(*before: optax.GradientTransformation) -> tuple[Any, Any]:
    subspace = toy()
    return optax.chain(*before, subspace, optax.scale(-0.1)), subspace


@pytest.mark.parametrize("half", [optax.scale(0.5), optax.scale_by_schedule(lambda count: 0.5)])
def test_a_scale_in_front_of_the_subspace_scales_by_degrees(half: Any) -> None:
    tx, subspace = chained(half)
    grads = [draw(seed) for seed in range(2 * GAP)]
    plain, plain_state = run(tx, grads)
    parts = osd_jax.accumulate_sketches(osd_jax.in_parts(tx, subspace), 1)
    found, state = run(parts, grads)
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(state.inner, plain_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "front",
    [
        optax.clip_by_global_norm(1.0),
        optax.clip(1.0),
        optax.trace(0.9),
        optax.ema(0.9),
        optax.zero_nans(),
        optax.centralize(),
        optax.add_decayed_weights(0.1),
        optax.adaptive_grad_clip(1.0),
    ],
)
def test_more_than_a_scale_in_front_of_the_subspace_is_refused(front: Any) -> None:
    tx, subspace = chained(front)
    run(tx, [draw(0)])  # of whole gradients it is fine
    parts = osd_jax.accumulate_sketches(osd_jax.in_parts(tx, subspace), 2)
    with pytest.raises(TypeError, match="put it after scale_by_subspace, or keep whole gradients"):
        run(parts, [draw(0)])


def test_so_is_a_wrapper_that_reads_gradients() -> None:
    subspace = toy()
    wrapped = osd_jax.in_parts(optax.apply_if_finite(subspace, 3), subspace)
    with pytest.raises(TypeError, match="only the sketches of projected gradients are kept"):
        run(osd_jax.accumulate_sketches(wrapped, 2), [draw(0)])


def test_what_is_in_front_of_other_parameters_is_left_alone() -> None:
    subspace = toy()
    front = optax.masked(optax.clip_by_global_norm(0.1), {"w": False, "b": True})
    kinds = {"in": subspace, "full": optax.identity()}
    tx = optax.chain(front, optax.partition(kinds, {"w": "in", "b": "full"}))
    parts = osd_jax.accumulate_sketches(osd_jax.in_parts(tx, subspace), 2)
    grads = [draw(seed) | {"b": jnp.full(4, 2.0)} for seed in (0, 0)]
    found, state = run(parts, grads)
    plain, plain_state = run(tx, grads[:1])
    np.testing.assert_allclose(found[1], plain[0], rtol=1e-4)
    chex.assert_trees_all_close(state.inner, plain_state, rtol=1e-4)


def test_the_errors_of_others_stay_as_they_are() -> None:
    def broken(updates: Tree, state: Tree, params: Tree = None) -> Any:
        raise TypeError("not about sketches")

    subspace = toy()
    tx = optax.chain(subspace, optax.GradientTransformation(lambda params: (), broken))
    with pytest.raises(TypeError, match="^not about sketches(?!.*whole gradients)"):
        run(osd_jax.accumulate_sketches(osd_jax.in_parts(tx, subspace), 1), [draw(0)])


HIDDEN = "parts .* are hidden, as by optax.chain.*osd_jax.in_parts"


def test_a_chain_that_hides_its_subspace_is_refused() -> None:
    tx, subspace = chained()
    with pytest.raises(ValueError, match=HIDDEN):
        osd_jax.accumulate_sketches(tx, 2).init(draw(0))
    two = optax.chain(subspace, toy())
    with pytest.raises(ValueError, match="all projected parameters in one subspace"):
        osd_jax.accumulate_sketches(osd_jax.in_parts(two, subspace), 2).init(draw(0))

    made = osd_jax.make_optimizer(
        "galore_adamw", "continuous", learning_rate=1e-3, rank=4, select=llama.is_projected,
        dimension_numbers=llama.dimension_numbers,
    )  # fmt: skip
    tx = optax.chain(optax.scale(1.0), made)
    mesh = make_mesh(8)
    with pytest.raises(ValueError, match=HIDDEN):
        llama_run(make_train_step(CONFIG, tx, accumulate="sketches"), tx, 2)
    with pytest.raises(ValueError, match=HIDDEN):
        step = make_train_step(CONFIG, tx, mesh=mesh, compress_gradients=True)
        llama_run(step, tx, 1, mesh=mesh)
    for micro_batches, clipping in ((2, 0.0), (1, 0.5)):
        step = make_layerwise_train_step(CONFIG, tx, grad_clipping=clipping)
        with pytest.raises(ValueError, match=HIDDEN):
            llama_run(step, tx, micro_batches)


def test_in_parts_of_a_chain_is_the_chain() -> None:
    """Around what `make_optimizer` returns, by sketches and layer by layer."""
    made = osd_jax.make_optimizer(
        "galore_adamw", "continuous", learning_rate=1e-3, rank=4, select=is_one_of_its_shape,
        dimension_numbers=llama.dimension_numbers,
    )  # fmt: skip
    tx = optax.chain(optax.scale(1.0), made)
    parts = osd_jax.in_parts(tx, made)
    by_sketches = functools.partial(make_train_step, CONFIG, accumulate="sketches")
    wanted = llama_run(by_sketches(made), made, 2)
    for step in (by_sketches(parts), make_layerwise_train_step(CONFIG, parts)):
        found = llama_run(step, parts, 2)
        chex.assert_trees_all_close(found, wanted, rtol=0, atol=1e-5)


def test_a_plain_optimizer_has_nothing_to_sketch() -> None:
    tx = optax.apply_if_finite(optax.adamw(1e-3), 5)
    wanted = llama_run(make_train_step(CONFIG, tx), tx, 2)
    by_sketches = make_train_step(CONFIG, tx, accumulate="sketches")
    chex.assert_trees_all_close(llama_run(by_sketches, tx, 2), wanted, rtol=0, atol=1e-5)
    mesh = make_mesh(8)
    compressed = make_train_step(CONFIG, tx, mesh=mesh, compress_gradients=True)
    chex.assert_trees_all_close(llama_run(compressed, tx, 2, mesh=mesh), wanted, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------ the state


class StateBefore(NamedTuple):
    """As it was before it said its side, in pickles and on disk."""

    count: Any
    projector: Any
    inner: Any


def test_a_state_from_before_it_said_its_side_goes_on(tmp_path: Path) -> None:
    grads = [draw(seed, (8, 8)) for seed in range(6)]
    tx = osd_jax.scale_by_subspace(optax.scale_by_adam(), osd_jax.svd(4), rank=3)
    _, state = run(tx, grads[:3])
    assert state.side == "shorter"
    wanted, end = run(tx, grads[3:], state)

    # A pickle of three fields calls the class with three.
    old = osd_jax.SubspaceState(*tuple(state)[:3])
    found, _ = run(tx, grads[3:], pickle.loads(pickle.dumps(old)))
    np.testing.assert_array_equal(found, wanted)
    assert pickle.loads(pickle.dumps(state)).side == "shorter"

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", StateBefore(*tuple(state)[:3]))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "old", jax.eval_shape(tx.init, grads[0]))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    np.testing.assert_array_equal(run(tx, grads[3:], restored)[0], wanted)


@pytest.mark.parametrize("side", ["shorter", "longer", "input", "output", "both"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)], ids=str)
def test_the_state_says_which_side_to_measure(side: Any, shape: tuple[int, ...]) -> None:
    g = draw(0, shape)
    tx = osd_jax.scale_by_subspace(optax.identity(), osd_jax.svd(4), rank=5, side=side)
    (update,), state = run(tx, [g])
    (found,) = subspace_diagnostics(g, state).values()
    G = np.asarray(g["w"])
    energy = np.sum(np.linalg.svd(G)[1][:5] ** 2) / np.sum(G**2)
    np.testing.assert_allclose(found.energy, energy, rtol=1e-5)
    if shape != (7, 7) or side in ("input", "shorter", "both"):
        before = subspace_diagnostics(g, state._replace(side=None))
        np.testing.assert_allclose(before["w"].energy, energy, rtol=1e-5)


def test_equal_transformations_have_states_of_one_structure() -> None:
    structure = lambda **more: jax.tree.structure(jax.eval_shape(toy(**more).init, draw(0)))
    assert structure() == structure() and hash(structure()) == hash(structure())
    assert structure() != structure(side="output")


# ---------------------------------------------------------------------------- transport_moments


def rotated(Q: Any, x: np.ndarray, power: int = 1) -> np.ndarray:
    left, right = Q
    x = left**power @ x
    return x if right is None else x @ (right**power).mT


class Restated:
    """Adam in a subspace whose moments follow P, in float64."""

    b1, b2, eps = 0.9, 0.95, 1e-3  # with a smaller one Adam makes much of rounding

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0

    def follow(self, Q: Any) -> None:
        if self.t:
            c1, c2 = 1 - self.b1**self.t, 1 - self.b2**self.t
            spread = rotated(Q, self.v / c2 - (self.m / c1) ** 2, 2)
            self.v = c2 * np.abs(spread + (rotated(Q, self.m) / c1) ** 2)
            self.m = rotated(Q, self.m)

    def direction(self, R: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * R
        self.v = self.b2 * self.v + (1 - self.b2) * R**2
        c1, c2 = 1 - self.b1**self.t, 1 - self.b2**self.t
        return self.m / c1 / (np.sqrt(self.v / c2) + self.eps)


def change(old: Any, new: Any) -> Any:
    if isinstance(old, osd_jax.TwoSided):
        return np.asarray(new.input.mT @ old.input), np.asarray(new.output.mT @ old.output)
    return np.asarray(new.mT @ old), None


def changed(old: Any, new: Any) -> bool:
    return any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (old, new)), strict=True))


PCA = osd_jax.online_pca(optax.adam(0.05), every=2)
FIRST = osd_jax.online_pca(optax.adam(0.05), every=2, order="before")


@pytest.mark.parametrize("shape", [(6, 9), (2, 6, 9)], ids=str)
@pytest.mark.parametrize(
    ("rule", "side"),
    [(osd_jax.svd(3), "input"), (osd_jax.svd(3), "both"), (osd_jax.random(3), "output"),
     (PCA, "input"), (FIRST, "input"), (oja(), "output")],
    ids=["svd", "both sides", "random", "online PCA", "P first", "toy"],
)  # fmt: skip
def test_moments_follow_the_basis(rule: Any, side: Any, shape: tuple[int, ...]) -> None:
    with jax.enable_x64(True):
        tx = osd_jax.scale_by_subspace(
            optax.scale_by_adam(0.9, 0.95, 1e-3), rule, rank=RANK, side=side,
            transport=osd_jax.transport_moments(0.9, 0.95),
            dimension_numbers=STACKED if len(shape) == 3 else None,
        )  # fmt: skip
        grads = [draw(seed, shape, jnp.float64) for seed in range(8)]
        state, changes = tx.init(grads[0]), 0
        ours = Restated(state.inner.mu["w"].shape)
        refresh, update = jax.jit(tx.refresh), jax.jit(tx.update)
        for g in grads:
            before = osd_jax.projectors(state)["w"]
            used = osd_jax.projectors(refresh(g, state))["w"]
            updates, state = update(g, state)
            after = osd_jax.projectors(state)["w"]
            used = after if rule.order == "before" else used
            if changed(before, used):
                ours.follow(change(before, used))
            G = np.asarray(g["w"]).mT if side == "output" else np.asarray(g["w"])
            left, right = (used.input, used.output) if side == "both" else (used, None)
            R = left.mT @ G if right is None else left.mT @ G @ right
            D = ours.direction(np.asarray(R))
            lifted = np.asarray(left @ D if right is None else left @ D @ right.mT)
            wanted = lifted.mT if side == "output" else lifted
            np.testing.assert_allclose(updates["w"], wanted, rtol=1e-7, atol=1e-9)
            if changed(used, after):
                ours.follow(change(used, after))
            np.testing.assert_allclose(state.inner.mu["w"], ours.m, rtol=1e-8, atol=1e-11)
            np.testing.assert_allclose(state.inner.nu["w"], ours.v, rtol=1e-8, atol=1e-11)
            changes += changed(before, after)
    assert changes >= 3


def test_lions_momentum_follows_the_basis() -> None:
    grads = [draw(seed) for seed in range(4)]
    tx = osd_jax.scale_by_subspace(
        optax.scale_by_lion(), osd_jax.svd(3), rank=RANK, side="input",
        transport=osd_jax.transport_moments(),
    )  # fmt: skip
    _, state = run(tx, grads[:3])
    new = tx.refresh(grads[3], state)
    Q, _ = change(*(osd_jax.projectors(x)["w"] for x in (state, new)))
    np.testing.assert_allclose(new.inner.mu["w"], Q @ state.inner.mu["w"], rtol=1e-4, atol=1e-6)
    assert np.abs(Q - np.eye(RANK)).max() > 0.01


@pytest.mark.parametrize("rule", [osd_jax.svd(3), PCA], ids=["svd", "online PCA"])
def test_moments_in_8_bits_follow_to_their_rounding(rule: Any) -> None:
    shape, rank = (64, 512), 16
    tx = osd_jax.scale_by_subspace(
        osd_jax.quantize_state(optax.scale_by_adam(0.9, 0.95)), rule, rank=rank, side="input",
        transport=osd_jax.transport_moments(0.9, 0.95),
    )  # fmt: skip
    plain = tx if rule is not PCA else osd_jax.scale_by_subspace(
        osd_jax.quantize_state(optax.scale_by_adam(0.9, 0.95)), rule, rank=rank, side="input"
    )  # fmt: skip
    grads = [draw(seed, shape) for seed in range(4)]
    count = 3 if rule is not PCA else 2
    _, state = run(tx, grads[:count])
    if rule is PCA:  # the step moves P at its end: without transport it ends before that
        _, before = run(plain, grads[count : count + 1], state)
        _, after = run(tx, grads[count : count + 1], state)
    else:
        before, after = state, tx.refresh(grads[3], state)
    Q = change(osd_jax.projectors(state)["w"], osd_jax.projectors(after)["w"])
    ours, inner = Restated((rank, shape[1])), before.inner
    assert inner.mu["w"].codes.dtype == after.inner.nu["w"].codes.dtype == jnp.uint8
    ours.t = int(inner.count)
    ours.m = np.asarray(dequantize(inner.mu["w"], signed=True), np.float64)
    ours.v = np.asarray(dequantize(inner.nu["w"], signed=False), np.float64)
    ours.follow(Q)
    for found, wanted, signed in (
        (after.inner.mu["w"], ours.m, True),
        (after.inner.nu["w"], ours.v, False),
    ):
        off = np.abs(np.asarray(dequantize(found, signed=signed)) - wanted)
        scales = np.repeat(np.asarray(found.scales), 256, axis=-1)
        # Half the widest gap between two codes, and what the rounding table is coarser.
        assert np.all(off <= (np.diff(code_book(signed)).max() / 2 + 1e-4) * scales)
    assert np.abs(Q[0] - np.eye(rank)).max() > 0.01


def stacked(**more: Any) -> Any:
    return osd_jax.make_optimizer(
        "galore_adamw", more.pop("proj_type", "std"), learning_rate=0.1, rank=RANK,
        update_proj_gap=3, dimension_numbers=STACKED, select=lambda *_: True,
        transport_moments=True, **more,
    )  # fmt: skip


def test_moments_of_a_basis_that_stays_are_kept_bit_for_bit() -> None:
    """One expert has no gradient at the refresh, and waits."""
    tx = stacked()
    grads = [draw(seed, (3, 6, 9)) for seed in range(5)]
    grads[3]["w"] = grads[3]["w"].at[1].set(0)
    _, state = run(tx, grads[:3])
    new = jax.jit(tx.refresh)(grads[3], state)
    adam = lambda state: subspace_states(state)[0].inner[0]
    for moment in ("mu", "nu"):
        old_moment, new_moment = (np.asarray(getattr(adam(x), moment)["w"]) for x in (state, new))
        assert old_moment[1].tobytes() == new_moment[1].tobytes()
        for index in (0, 2):
            assert np.abs(old_moment[index] - new_moment[index]).max() > 1e-3
    _, state = run(tx, grads[3:4], state)
    later = jax.jit(tx.refresh)(grads[4], state)  # the next gradient sets it
    assert np.any(adam(later).mu["w"][1] != adam(state).mu["w"][1])
    assert np.array_equal(adam(later).mu["w"][0], adam(state).mu["w"][0])


@pytest.mark.parametrize("optimizer", ["galore_adamw", "galore_lion", "galore_adamw8bit"])
@pytest.mark.parametrize("proj_type", ["std", "continuous"])
def test_a_run_with_transport_resumes_bit_for_bit(optimizer: str, proj_type: str) -> None:
    make = lambda transport: osd_jax.make_optimizer(
        optimizer, proj_type, learning_rate=0.1, rank=16, update_proj_gap=3,
        select=lambda *_: True, transport_moments=transport,
    )  # fmt: skip
    tx, grads = make(True), [draw(seed, (64, 256)) for seed in range(7)]
    whole, end = run(tx, grads)
    _, state = run(tx, grads[:4])
    saved = jax.tree.map(np.array, state)
    rest, again = run(tx, grads[4:], jax.tree.map(jnp.asarray, saved))
    np.testing.assert_array_equal(rest, whole[4:])
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(end), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert np.any(np.array(run(make(False), grads)[0])[4:] != whole[4:])


@pytest.mark.parametrize("proj_type", ["std", "full", "continuous"])
def test_transport_under_vmap_is_each_run_alone(proj_type: str) -> None:
    tx = osd_jax.make_optimizer(
        "galore_adamw", proj_type, learning_rate=0.1, rank=RANK, update_proj_gap=2,
        select=lambda *_: True, transport_moments=True,
    )  # fmt: skip
    grads = [draw(seed, (2, 6, 9)) for seed in range(5)]
    state, update = jax.vmap(tx.init)(grads[0]), jax.jit(jax.vmap(tx.update))
    for step, g in enumerate(grads):
        updates, state = update(g, state, g)
        for index in range(2):
            alone = [{"w": one["w"][index]} for one in grads[: step + 1]]
            wanted = run(tx, alone)[0][-1]
            np.testing.assert_allclose(updates["w"][index], wanted, rtol=1e-3, atol=1e-4)


def test_a_rule_of_the_users_own_reads_the_event() -> None:
    tx = osd_jax.scale_by_subspace(
        optax.chain(counting(), optax.scale_by_adam()), osd_jax.svd(2), rank=RANK,
        transport=osd_jax.transport_moments(), dimension_numbers=STACKED,
    )  # fmt: skip
    grads = [draw(seed, (2, 6, 9)) for seed in range(5)]
    grads[2]["w"] = grads[2]["w"].at[0].set(0)
    _, state = run(tx, grads)
    # Refreshes at steps 0, 2 and 4; the first matrix waits at 2 and is set at 3.
    assert state.inner[0].changes["w"].tolist() == [3, 3]
    _, state = run(tx, grads[:3])
    assert state.inner[0].changes["w"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (osd_jax.rules.scale_by_adafactor(lambda count: 0.1), "Adafactor's FactoredSecondMoment"),
        (optax.scale_by_factored_rms(), "Adafactor's FactoredState"),
        (optax.scale_by_amsgrad(), "does not support the state's mu/w"),
        (
            osd_jax.quantize_state(optax.scale_by_adam(), block=128, min_size=1),
            "block=256, but 8-bit moments .* have 3 scales per row",
        ),
    ],
)
def test_a_state_that_transport_does_not_know_is_refused_at_init(inner: Any, message: str) -> None:
    tx = osd_jax.scale_by_subspace(
        inner, osd_jax.svd(2), rank=RANK, transport=osd_jax.transport_moments()
    )
    with pytest.raises(ValueError, match=message):
        tx.init(draw(0, (6, 300)))


@pytest.mark.parametrize(
    ("optimizer", "value", "message"),
    [
        (
            "galore_adafactor",
            True,
            "transport_moments is True: .*galore_adafactor, whose second moment is factored",
        ),
        (
            "adamw",
            True,
            "transport_moments is True: only a subspace optimizer .* reads it; leave it out",
        ),
        ("galore_adamw", 1, "transport_moments is 1: expected True or False"),
    ],
)
def test_make_optimizer_says_where_moments_cannot_follow(
    optimizer: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        osd_jax.make_optimizer(optimizer, learning_rate=0.1, transport_moments=value)
