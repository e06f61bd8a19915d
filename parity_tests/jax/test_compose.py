"""osd_jax inside Optax and JAX: wrapping, transforming, sharding and saving it as users do."""

from __future__ import annotations

import functools
import importlib
import itertools
import warnings
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import osd_jax
from osd_jax import SubspaceDimensionNumbers, make_optimizer, scale_by_subspace
from osd_names import FULL_RANK_OPTIMIZERS, PROJ_TYPES, SUBSPACE_OPTIMIZERS
from parity_tests.support.arrays import normal_jax

Tree = Any
SHAPES = {"mlp": {"up": (8, 16), "down": (16, 8)}, "norm": (8,)}
is_shape = lambda x: isinstance(x, tuple)


def draw(seed: int, shapes: Tree = SHAPES, dtype: Any = jnp.float32) -> Tree:
    return normal_jax(seed, shapes, dtype)


PARAMS = draw(0)


def online_pca(**options: Any) -> osd_jax.BasisRule:
    return osd_jax.online_pca(optax.adam(0.01), **options)


def subspace(projector: osd_jax.BasisRule | None = None, **options: Any) -> Any:
    options = {"rank": 2, **options}
    return scale_by_subspace(optax.scale_by_adam(), projector or online_pca(), **options)


ALONE = subspace()  # one object, so that JAX compiles it once


def run(
    tx: optax.GradientTransformation, grads: list[Tree], params: Tree, state: Tree = None
) -> tuple[list[Tree], Tree]:
    """The updates of each step, and the last state."""
    update, out = jax.jit(tx.update), []
    state = jax.jit(tx.init)(params) if state is None else state
    for grad in grads:
        updates, state = update(grad, state, params)
        out.append(updates)
    return out, state


def assert_equal(actual: Tree, expected: Tree) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual: Tree, expected: Tree, tolerance: float = 1e-5) -> None:
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, actual, expected)


def assert_near(actual: Tree, expected: Tree, tolerance: float = 1e-3) -> None:
    """By each array's norm: Adam makes much of the rounding of a gradient near zero."""

    def near(a: jax.Array, b: jax.Array) -> None:
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)

    jax.tree.map(near, jax.device_get(actual), jax.device_get(expected))


def types(tree: Tree) -> Tree:
    """Structure, shapes, dtypes, weak types and shardings."""
    return jax.tree.map(jax.typeof, tree)


MATRICES = {"mlp": PARAMS["mlp"]}
MATRIX_GRADS = [draw(seed, {"mlp": SHAPES["mlp"]}) for seed in range(1, 5)]
GRADS = [draw(seed) for seed in range(1, 5)]


# ----------------------------------------------------------------------------- Optax wrappers


def test_chain() -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), subspace(), optax.scale_by_learning_rate(0.1))
    clipped = [optax.tree.scale(1 / optax.tree.norm(g), g) for g in MATRIX_GRADS]
    alone = run(ALONE, clipped, MATRICES)[0]
    expected = [optax.tree.scale(-0.1, u) for u in alone]
    assert_close(run(tx, MATRIX_GRADS, MATRICES)[0], expected)


def test_partition() -> None:
    """A subspace for the matrices, Adam for the norm: each as it would be alone."""
    labels = lambda tree: jax.tree.map(lambda x: "matrix" if x.ndim == 2 else "vector", tree)
    tx = optax.partition({"matrix": subspace(), "vector": optax.scale_by_adam()}, labels)
    updates, state = run(tx, GRADS, PARAMS)
    matrix_grads = [{"mlp": g["mlp"]} for g in GRADS]
    assert_equal([{"mlp": u["mlp"]} for u in updates], run(ALONE, matrix_grads, MATRICES)[0])
    vector = run(optax.scale_by_adam(), [g["norm"] for g in GRADS], PARAMS["norm"])[0]
    assert_equal([u["norm"] for u in updates], vector)
    assert set(osd_jax.projectors(state)) == {"mlp/down", "mlp/up"}


@pytest.mark.parametrize("numbers", ["tree", "callable"])
def test_masked_with_dimension_numbers_of_all_parameters(numbers: str) -> None:
    """The tree covers the hidden parameters too; those pass through."""

    def tree(params: Tree) -> Tree:
        del params
        matrix = SubspaceDimensionNumbers(0, 1)
        return {"mlp": {"up": matrix, "down": matrix}, "norm": SubspaceDimensionNumbers((), 0)}

    dimension_numbers = tree if numbers == "callable" else tree(None)
    is_matrix = lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)
    tx = optax.masked(subspace(dimension_numbers=dimension_numbers), is_matrix)
    updates, _ = run(tx, GRADS, PARAMS)
    matrix_grads = [{"mlp": g["mlp"]} for g in GRADS]
    assert_equal([{"mlp": u["mlp"]} for u in updates], run(ALONE, matrix_grads, MATRICES)[0])
    assert_equal([u["norm"] for u in updates], [g["norm"] for g in GRADS])


def test_inject_hyperparams_around_make_optimizer() -> None:
    """Numbers move into the state; what shapes the computation stays static."""
    arguments = {"weight_decay": 0.1, "rank": 2, "update_proj_gap": 2}
    static = ("rank", "update_proj_gap", "update_proj_every", "seed", "penalty", "select")
    static = (*static, "schedule", "dimension_numbers")
    factory = optax.inject_hyperparams(make_optimizer, static_args=static)
    tx = factory("galore_adamw", "continuous", learning_rate=0.1, scale=0.5, **arguments)
    updates, state = run(tx, GRADS[:2], PARAMS)
    plain = make_optimizer(
        "galore_adamw", "continuous", learning_rate=0.1, scale=0.5, **arguments
    )  # fmt: skip
    expected, plain_state = run(plain, GRADS[:2], PARAMS)
    assert_close(updates, expected)
    update = jax.jit(tx.update)
    before = types(state)
    for learning_rate in (0.1, 0.2):
        state.hyperparams["learning_rate"] = jnp.float32(learning_rate)
        assert types(state) == before
        again, _ = update(GRADS[2], state, PARAMS)
        slower = make_optimizer(
            "galore_adamw", "continuous", learning_rate=learning_rate, scale=0.5, **arguments
        )
        assert_close(again, slower.update(GRADS[2], plain_state, PARAMS)[0])
    assert update._cache_size() == 1


def test_inject_hyperparams_around_a_chain() -> None:
    def build(learning_rate: float, scale: float) -> optax.GradientTransformation:
        return optax.chain(subspace(scale=scale), optax.scale_by_learning_rate(learning_rate))

    tx = optax.inject_hyperparams(build)(learning_rate=0.1, scale=0.25)
    updates, state = run(tx, MATRIX_GRADS[:2], MATRICES)
    assert_close(updates, run(build(0.1, 0.25), MATRIX_GRADS[:2], MATRICES)[0])
    update = jax.jit(tx.update)
    state.hyperparams["scale"] = 2 * state.hyperparams["scale"]
    doubled = update(MATRIX_GRADS[2], state, MATRICES)[0]
    state.hyperparams["scale"] = state.hyperparams["scale"] / 2
    assert_close(doubled, optax.tree.scale(2, update(MATRIX_GRADS[2], state, MATRICES)[0]))


def test_multi_steps() -> None:
    """Two gradients accumulated are one step by their mean."""
    tx = make_optimizer("galore_adamw", "std", learning_rate=0.1, rank=2, update_proj_gap=2)
    updates, state = run(optax.MultiSteps(tx, 2), GRADS, PARAMS)
    means = [optax.tree.scale(0.5, optax.tree.add(a, b)) for a, b in (GRADS[:2], GRADS[2:])]
    expected, expected_state = run(tx, means, PARAMS)
    assert_close([updates[1], updates[3]], expected)
    assert_equal(updates[0], optax.tree.zeros_like(PARAMS))
    assert_close(state.inner_opt_state, expected_state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_apply_if_finite(dtype: Any) -> None:
    params, *grads = (draw(seed, {"w": (8, 16)}, dtype) for seed in range(4))
    bad = jax.tree.map(lambda g: g.at[1, 2].set(jnp.nan), grads[1])
    tx = optax.apply_if_finite(subspace(), max_consecutive_errors=3)
    updates, state = run(tx, [grads[0], bad, grads[2]], params)
    expected, expected_state = run(ALONE, [grads[0], grads[2]], params)
    assert_equal(updates[0], expected[0])
    assert_equal(updates[1], optax.tree.zeros_like(params))
    assert_equal(updates[2], expected[1])
    assert_equal(state.inner_state, expected_state)
    assert int(state.total_notfinite) == 1
    assert updates[0]["w"].dtype == dtype


# ----------------------------------------------------------------------------- JAX transforms


@pytest.mark.parametrize("proj_type", ["std", "continuous", "full"])
def test_one_compilation_over_refreshes_and_a_changing_schedule(proj_type: str) -> None:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 5)
    tx = make_optimizer(
        "galore_adamw", proj_type, learning_rate=0.1, schedule=schedule, rank=2, update_proj_gap=2
    )
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    before, sizes = types(state), []
    for step in range(5):
        updates, state = update(draw(step), state, params)
        params = optax.apply_updates(params, updates)
        sizes.append(float(optax.tree.norm(updates)))
    assert update._cache_size() == 1
    assert types(state) == before
    assert sizes[0] == 0 and sizes[4] < sizes[2]  # the warmup starts at 0, the cosine falls


ALL = list(itertools.product(SUBSPACE_OPTIMIZERS, PROJ_TYPES))
ALL += [(optimizer, "std") for optimizer in FULL_RANK_OPTIMIZERS]


@pytest.mark.parametrize(("optimizer", "proj_type"), ALL)
def test_state_types_are_the_same_after_update(optimizer: str, proj_type: str) -> None:
    """Structure, shapes, dtypes and weak types; moments are float32 for bfloat16 parameters."""
    tx = make_optimizer(optimizer, proj_type, learning_rate=0.1, rank=2, weight_decay=0.1)
    params = jax.eval_shape(lambda: draw(0, dtype=jnp.bfloat16))
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert types(new_state) == types(state)
    assert types(updates) == types(params)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} <= {jnp.dtype(jnp.float32)}
    assert types(jax.eval_shape(lambda: tx.init(draw(0, dtype=jnp.bfloat16)))) == types(state)


@pytest.mark.parametrize("compiles_init", [False, True])
@pytest.mark.parametrize("optimizer", ["galore_adamw", "galore_adamw8bit"])
def test_donated_state_and_parameters_are_reused(optimizer: str, compiles_init: bool) -> None:
    shapes = {"mlp": (64, 72)}
    tx = make_optimizer(optimizer, "continuous", learning_rate=0.1, rank=64, weight_decay=0.1)

    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = draw(0, shapes)
    state = (jax.jit(tx.init) if compiles_init else tx.init)(params)
    old = jax.tree.leaves((params, state))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.block_until_ready(jax.jit(step, donate_argnums=(0, 1))(params, state, draw(1, shapes)))
    # `last_finite`, a bool that no step reads, is not even handed over.
    assert [x.dtype for x in old if not x.is_deleted()] == [jnp.bool_]


@pytest.mark.parametrize(
    ("optimizer", "proj_type", "options"),
    [
        ("galore_adamw", "continuous_lion", {"basis_dtype": jnp.bfloat16}),
        ("galore_adafactor", "full", {"beta1": 0.9}),
        ("galore_adamw8bit", "continuous_adam8bit", {}),
    ],
)
def test_orbax_round_trip_continues_bit_for_bit(
    tmp_path: Path, optimizer: str, proj_type: str, options: dict[str, Any]
) -> None:
    shapes = {"mlp": (64, 72), "norm": (8,)}
    grads, params = [draw(seed, shapes) for seed in range(1, 5)], draw(0, shapes)
    tx = make_optimizer(
        optimizer, proj_type, learning_rate=0.1, rank=64, update_proj_gap=3, **options
    )
    _, state = run(tx, grads[:2], params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert types(restored) == types(state)
    assert_equal(restored, state)
    assert_equal(run(tx, grads[2:], params, restored), run(tx, grads[2:], params, state))


# -------------------------------------------------------------------------------- stacked layers

LAYERS = 3
STACKED = SubspaceDimensionNumbers(1, 2)


def stacked_grads(steps: int) -> list[Tree]:
    return [draw(seed, {"mlp": (LAYERS, 8, 16)}) for seed in range(1, steps + 1)]


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_narrow_basis_does_not_round_the_step_size(scale: float) -> None:
    """Lion's signs are exact in bfloat16, and the learning rate and the scale are not."""
    params, grads = draw(0, {"mlp": (12, 16)}), draw(1, {"mlp": (12, 16)})

    def update(rate: float, scale: float) -> Tree:
        tx = make_optimizer(
            "galore_lion", "continuous", learning_rate=rate, rank=4, scale=scale,
            lion_sign="subspace", basis_dtype=jnp.bfloat16,
        )  # fmt: skip
        return tx.update(grads, tx.init(params), params)[0]

    wanted = jax.tree.map(lambda x: 0.00101 * scale * x, update(1.0, 1.0))
    chex.assert_trees_all_close(update(0.00101, scale), wanted, rtol=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_hyperparameters_may_be_traced_and_batched(every: int) -> None:
    """Those of P's step among them, which `update` closes over."""
    params, grads = draw(0, {"mlp": (12, 16)}), draw(1, {"mlp": (12, 16)})
    rates = jnp.array([0.1, 0.02])

    def end(rate: jax.Array) -> Tree:
        tx = make_optimizer(
            "galore_adamw", "continuous", learning_rate=rate, rank=4, penalty=rate,
            projector_lr_multiple=5, update_proj_every=every,
        )  # fmt: skip
        after, state = params, tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, after)
            after = optax.apply_updates(after, updates)
        return after, osd_jax.projectors(state)

    together = jax.jit(jax.vmap(end))(rates)
    for i, rate in enumerate(rates):
        alone = jax.jit(end)(rate)
        of_one = jax.tree.map(lambda x, i=i: x[i], together)
        chex.assert_trees_all_close(of_one, alone, rtol=0, atol=1e-6)
    moved = jax.tree.map(lambda x: jnp.abs(x[0] - x[1]).max(), together)
    assert min(jax.tree.leaves(moved)) > 1e-3  # the two rates differ, or nothing is compared


@pytest.mark.parametrize("way", ["batch axis", "vmap"])
@pytest.mark.parametrize("proj_type", ["std", "full", "continuous"])
def test_stacked_layers_are_the_layers_apart(
    monkeypatch: pytest.MonkeyPatch, proj_type: str, way: str
) -> None:
    """As a batch axis, and under `jax.vmap` of all of `update` with the step counts batched.

    The SVD runs at refreshes only: `lax.cond` under `vmap` would run it at every step.
    """
    executions = []
    module = importlib.import_module("osd_jax.bases")
    real = module.leading_singular_vectors

    def counting(*args: Any) -> Any:
        jax.debug.callback(lambda: executions.append(1))
        return real(*args)

    options = {"learning_rate": 0.1, "rank": 2, "update_proj_gap": 2, "weight_decay": 0.1}
    alone = make_optimizer("galore_adamw", proj_type, **options)
    params, grads = draw(0, {"mlp": (LAYERS, 8, 16)}), stacked_grads(4)
    layer = lambda tree, index: jax.tree.map(lambda x: x[index], tree)
    expected, _ = zip(
        *(run(alone, [layer(g, i) for g in grads], layer(params, i)) for i in range(LAYERS)),
        strict=True,
    )

    monkeypatch.setattr(module, "leading_singular_vectors", counting)
    tx = make_optimizer("galore_adamw", proj_type, dimension_numbers=STACKED, **options)
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    if way == "vmap":
        tx = make_optimizer("galore_adamw", proj_type, **options)
        init, update = jax.jit(jax.vmap(tx.init)), jax.jit(jax.vmap(tx.update))
    state, runs = init(params), []
    for step, grad in enumerate(grads):
        executions.clear()
        updates, state = update(grad, state, params)
        jax.effects_barrier()
        runs.append(bool(executions))
        for index in range(LAYERS):
            assert_close(layer(updates, index), expected[index][step])
    assert runs == [True, False, proj_type != "continuous", False]


# ----------------------------------------------------------------------------------- the seam


@pytest.mark.parametrize(
    ("projector", "side"),
    [
        (online_pca(), "shorter"),
        (online_pca(order="before", penalty=0.1), "longer"),
        (osd_jax.svd(2), "both"),
        (osd_jax.random(2), "output"),
    ],
    ids=["online_pca", "before", "svd", "random"],
)
def test_the_parts_of_an_update_are_the_update(projector: osd_jax.BasisRule, side: Any) -> None:
    tx = subspace(projector, side=side)

    @jax.jit
    def in_parts(grads: Tree, state: Tree) -> tuple[Tree, Tree]:
        state = tx.refresh(grads, state)
        needed = {"grads": grads} if tx.needs_gradient else {}
        return tx.apply(tx.project(grads, state), state, MATRICES, **needed)

    update, state = jax.jit(tx.update), tx.init(MATRICES)
    for grads in MATRIX_GRADS[:3]:
        expected = update(grads, state)
        updates, state = in_parts(grads, state)
        assert_close((updates, state), expected, 1e-6)


def test_sketches_add_up() -> None:
    """R is linear in the gradient; A is exact where every part takes the final R."""
    tx = subspace()
    _, state = run(tx, MATRIX_GRADS[:1], MATRICES)
    parts = MATRIX_GRADS[1:3]
    whole = tx.project(optax.tree.add(*parts), state)["mlp"]["up"]
    sketches = [tx.project(part, state)["mlp"]["up"] for part in parts]
    low_rank = sketches[0].low_rank + sketches[1].low_rank
    assert_close(low_rank, whole.low_rank)
    basis = osd_jax.projectors(state)["mlp/up"]  # on the input side, so M is the gradient itself
    assert_close(basis.T @ sum(part["mlp"]["up"] for part in parts), low_rank)
    of_parts = sum(part["mlp"]["up"] @ low_rank.T for part in parts)
    assert_close(of_parts, whole.statistics["correlation"])


def test_projectors_names_and_shapes() -> None:
    for side, shape in (("shorter", (8, 2)), ("longer", (16, 2))):
        found = osd_jax.projectors(subspace(side=side).init(MATRICES))
        assert jax.tree.map(jnp.shape, dict(found)) == {"mlp/down": shape, "mlp/up": shape}
    both = osd_jax.projectors(subspace(osd_jax.svd(2), side="both").init(MATRICES))["mlp/up"]
    assert (both.output.shape, both.input.shape) == ((16, 2), (8, 2))


# ------------------------------------------------------------------------------------- meshes

KERNELS = {
    "mlp": {"up": (8, 16), "down": (16, 8)},
    "attention": {"query": (2, 8, 4, 4)},  # layers, embed, heads, head_dim
    "norm": (2, 8),
}
KERNEL_AXES = {
    "mlp": {"up": SubspaceDimensionNumbers(0, 1), "down": SubspaceDimensionNumbers(0, 1)},
    "attention": {"query": SubspaceDimensionNumbers(1, (2, 3))},
    "norm": SubspaceDimensionNumbers((), 1),
}
SPECS = {
    "mlp": {"up": PartitionSpec("x", "y"), "down": PartitionSpec("y", "x")},
    "attention": {"query": PartitionSpec(None, "x", "y", None)},
    "norm": PartitionSpec(),
}
ON_A_MESH = [
    *itertools.product(
        ["galore_adamw"],
        ["std", "full", "random", "continuous"],
        [AxisType.Auto, AxisType.Explicit],
    ),
    # Auto axes ask nothing of the code; Explicit ones do, of each rule.
    ("galore_lion", "continuous_lion", AxisType.Explicit),
    ("galore_adafactor", "continuous_adafactor", AxisType.Explicit),
    ("galore_adamw8bit", "continuous_adam8bit", AxisType.Explicit),
]


def mesh_optimizer(optimizer: str, proj_type: str) -> optax.GradientTransformation:
    beta1 = 0.9 if optimizer == "galore_adafactor" else None
    return make_optimizer(
        optimizer, proj_type, learning_rate=0.1, rank=2, update_proj_gap=2, weight_decay=0.1,
        beta1=beta1, dimension_numbers=KERNEL_AXES,
    )  # fmt: skip


@functools.cache
def on_one_device(optimizer: str, proj_type: str) -> tuple[list[Tree], Tree]:
    params, *grads = (draw(seed, KERNELS) for seed in range(4))
    return run(mesh_optimizer(optimizer, proj_type), grads, params)


@pytest.mark.parametrize(("optimizer", "proj_type", "axis_type"), ON_A_MESH)
def test_a_mesh_gives_the_numbers_of_one_device(
    optimizer: str, proj_type: str, axis_type: AxisType
) -> None:
    """Eight devices, 4 x 2; under Explicit axes P is sharded as the axis of W that it projects."""
    tx = mesh_optimizer(optimizer, proj_type)
    expected, expected_state = on_one_device(optimizer, proj_type)
    params, *grads = (draw(seed, KERNELS) for seed in range(4))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        put = lambda tree: jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, SPECS
        )
        updates, state = run(tx, [put(g) for g in grads], put(params))
    # At a refresh, `full`'s R is diagonal, and Adam divides the off-diagonal rounding errors by
    # themselves.
    assert_near(updates, expected, 1e-2 if proj_type == "full" else 1e-3)
    assert_near(dict(osd_jax.projectors(state)), dict(osd_jax.projectors(expected_state)))
    if axis_type == AxisType.Explicit:
        bases = osd_jax.projectors(state)
        sharded = lambda basis: basis.sharding.spec
        if proj_type == "full":
            assert sharded(bases["mlp/up"].input) == PartitionSpec("x", None)
            assert sharded(bases["mlp/up"].output) == PartitionSpec("y", None)
        else:
            assert sharded(bases["mlp/up"]) == PartitionSpec("x", None)
            assert sharded(bases["mlp/down"]) == PartitionSpec("x", None)
            assert sharded(bases["attention/query"]) == PartitionSpec(None, "x", None)


PARTED = {
    "attention": {"kernel": jnp.linspace(-1, 1, 2 * 12 * 8).reshape(2, 12, 8)},
    "mlp": {"kernel": jnp.cos(jnp.arange(10.0 * 14)).reshape(10, 14)},
    "norm": jnp.ones(10),
}
PARTED_NUMBERS = {
    "attention": {"kernel": osd_jax.SubspaceDimensionNumbers(1, 2)},
    "mlp": {"kernel": osd_jax.SubspaceDimensionNumbers(0, 1)},
    "norm": osd_jax.SubspaceDimensionNumbers((), 0),
}


@pytest.mark.parametrize(
    ("optimizer", "proj_type"),
    [
        ("adamw", "std"),
        *itertools.product(
            # Except osd_muon, which needs the gradient in addition to its sketch.
            (name for name in SUBSPACE_OPTIMIZERS if name != "osd_muon"),
            ("std", "full", "continuous", "continuous_adafactor"),
        ),
    ],
)
def test_the_parts_of_an_optimizer_make_its_update(optimizer: str, proj_type: str) -> None:
    tx = osd_jax.make_optimizer(
        optimizer, proj_type, learning_rate=0.1, rank=4, update_proj_gap=3, weight_decay=0.1,
        dimension_numbers=PARTED_NUMBERS,
    )  # fmt: skip

    def in_parts(grads: Any, state: Any, params: Any) -> Any:
        state = tx.refresh(grads, state)
        return tx.apply(tx.project(grads, state), state, params)

    whole, parts = jax.jit(tx.update), jax.jit(in_parts)
    state = other_state = tx.init(PARTED)
    for step in range(5):
        grads = jax.tree.map(lambda x: jnp.sin(x) + 0.1, optax.tree.scale(step + 2, PARTED))
        if step == 3:
            grads["mlp"]["kernel"] = grads["mlp"]["kernel"].at[1, 2].set(jnp.nan)
        updates, state = whole(grads, state, PARTED)
        others, other_state = parts(grads, other_state, PARTED)
        # P of the step that is skipped may be set, since it will be set again
        chex.assert_trees_all_close(updates, others, rtol=1e-5, atol=1e-6)
    assert int(osd_jax.skipped_steps(other_state)[0]) == 1
    chex.assert_trees_all_close(state, other_state, rtol=1e-5, atol=1e-6)


def test_sketches_are_reduced_over_devices() -> None:
    """R and A of the mean gradient are exact; ||G||^2 is where the parts are alike."""
    tx = osd_jax.scale_by_subspace(optax.identity(), osd_jax.online_pca(optax.sgd(0.1)), rank=4)
    parts = jax.random.normal(jax.random.key(0), (3, 10, 14))
    mean = parts.mean(0)
    state = tx.refresh({"w": mean}, tx.init({"w": mean}))
    wanted = tx.project({"w": mean}, state)["w"]
    reduce = functools.partial(jax.lax.pmean, axis_name="data")
    project = jax.vmap(lambda g: tx.project({"w": g}, state, reduce)["w"], axis_name="data")
    found = jax.tree.map(lambda x: x[0], project(parts))
    exact = lambda sketch: sketch.only([osd_jax.CORRELATION])
    chex.assert_trees_all_close(exact(found), exact(wanted), rtol=1e-5)
    assert found.statistics["squared_norm"] < jnp.mean(jnp.sum(parts**2, (1, 2)))
    alike = jax.tree.map(lambda x: x[1], project(jnp.stack([mean] * 3)))
    chex.assert_trees_all_close(alike, wanted, rtol=1e-5)


@pytest.mark.parametrize("seed", [-1, 2**31, 2**40])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    params = {"mlp": jnp.ones((6, 8))}
    tx = osd_jax.make_optimizer("galore_adamw", "random", learning_rate=0.1, rank=2, seed=seed)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert jnp.any(osd_jax.projectors(state)["mlp"])


def test_matrices_of_one_shape_are_traced_once() -> None:
    """Of a model without stacked layers; also what reads a number of the trace, as a scale."""
    seen: list[tuple[int, ...]] = []

    def make(scale: jax.typing.ArrayLike) -> Any:
        def apply(direction: jax.Array, seen_: osd_jax.Seen) -> osd_jax.Lifted:
            seen.append(direction.shape)
            return osd_jax.Lifted(direction, scale=scale)

        return subspace(lift=osd_jax.Lift(apply))

    shapes = {f"layers_{i}": {"up": (8, 16), "out": (8, 8), "down": (16, 8)} for i in range(5)}
    grads = draw(1, shapes)

    def step(grads: Tree, state: Tree, scale: jax.typing.ArrayLike) -> Tree:
        return make(scale).update(grads, state)

    state = make(0.5).init(grads)
    wanted = step(grads, state, 0.5)
    assert len(seen) == 15  # one at a time, outside a trace
    seen.clear()
    found = jax.jit(step)(grads, state, 0.5)
    assert len(seen) == 3  # up and down have one matrix shape and two layouts
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule", [osd_jax.random(200), osd_jax.gaussian(200)], ids=["random", "gaussian"]
)
def test_matrices_of_one_shape_have_draws_of_their_own(rule: osd_jax.BasisRule) -> None:
    tx = subspace(rule, rank=4)
    grads = draw(1, {f"layers_{i}": {"up": (8, 16), "gate": (8, 16)} for i in range(3)})
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    bases = jax.tree.leaves(osd_jax.projectors(state))
    for one, other in itertools.combinations(bases, 2):
        assert not np.allclose(one, other, atol=0.1)
    _, wanted = tx.update(grads, tx.init(grads))
    chex.assert_trees_all_close(state, wanted, rtol=1e-5, atol=1e-6)
