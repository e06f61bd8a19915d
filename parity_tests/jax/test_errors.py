"""Errors of osd_jax: harmful gradients and invalid arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import osd_jax
from osd_jax import SubspaceDimensionNumbers, make_optimizer, scale_by_subspace, skipped_steps
from osd_names import FULL_RANK_OPTIMIZERS, PROJ_TYPES, SUBSPACE_OPTIMIZERS
from parity_tests.support.arrays import normal_jax

Tree = Any
COMBINATIONS = [
    ("galore_adamw", "std"),
    ("galore_adamw", "full"),
    ("galore_adamw", "random"),
    ("galore_adamw", "continuous"),
    ("galore_lion", "continuous_lion"),
    ("galore_adafactor", "continuous_adafactor"),
    ("galore_adamw8bit", "continuous_adam8bit"),
    ("galore_adamw", "continuous_sgd"),
]


def draw(seed: int, scale: float = 1.0) -> Tree:
    return jax.tree.map(lambda x: scale * x, normal_jax(seed, {"mlp": (64, 72), "norm": (6,)}))


PARAMS = draw(0)
ZERO = optax.tree.zeros_like(PARAMS)


@functools.cache
def built(optimizer: str, proj_type: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`init` and `update`, compiled once for all tests. 64 x 72 is large enough for 8-bit state."""
    tx = make_optimizer(optimizer, proj_type, learning_rate=0.1, rank=64, update_proj_gap=3)
    return jax.jit(tx.init), jax.jit(tx.update)


def assert_equal(actual: Tree, expected: Tree) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def all_finite(tree: Tree) -> bool:
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


def moves(updates: Tree) -> bool:
    return all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(updates))


# ------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("optimizer", "proj_type"), COMBINATIONS)
def test_a_zero_first_gradient_moves_nothing(optimizer: str, proj_type: str) -> None:
    init, update = built(optimizer, proj_type)
    updates, state = update(ZERO, init(PARAMS), PARAMS)
    assert_equal(updates, ZERO)
    assert all_finite(state)
    for seed in (1, 2, 3):
        updates, state = update(draw(seed), state, PARAMS)
        assert all_finite((updates, state)) and moves(updates)


@pytest.mark.parametrize(("optimizer", "proj_type"), COMBINATIONS)
def test_a_later_zero_gradient_poisons_nothing(optimizer: str, proj_type: str) -> None:
    """W continues with its momentum, as without a subspace; online PCA leaves P unchanged."""
    init, update = built(optimizer, proj_type)
    _, state = update(draw(1), init(PARAMS), PARAMS)
    _, state = update(draw(2), state, PARAMS)
    before = dict(osd_jax.projectors(state))
    updates, state = update(ZERO, state, PARAMS)
    assert all_finite((updates, state))
    assert_equal(dict(osd_jax.projectors(state)), before)
    for seed in (3, 4):
        updates, state = update(draw(seed), state, PARAMS)
        assert all_finite((updates, state)) and moves(updates)


@pytest.mark.parametrize("proj_type", ["continuous", "continuous_adafactor", "continuous_sgd"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e19, 1e30])
def test_a_squared_norm_beyond_float32_leaves_the_basis(proj_type: str, scale: float) -> None:
    """Finite gradients whose ||G||^2 underflows or overflows."""
    tx = scale_by_subspace(
        optax.identity(), osd_jax.online_pca(optax.adam(0.01), penalty=0.1), rank=2
    )
    update, grads = jax.jit(tx.update), [draw(seed)["mlp"] for seed in range(3)]
    _, state = update(grads[0], tx.init(grads[0]))
    updates, state = update(scale * grads[1], state)
    assert all_finite((updates, state.projector))
    _, state = update(grads[2], state)
    assert all_finite(state.projector)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf], ids=str)
@pytest.mark.parametrize(("optimizer", "proj_type"), [*COMBINATIONS, ("adam8bit", "std")])
def test_one_non_finite_entry_skips_the_step(optimizer: str, proj_type: str, bad: float) -> None:
    """In the projected matrix or elsewhere: no parameter, moment, counter or P changes."""
    init, update = built(optimizer, proj_type)
    _, state = update(draw(1), init(PARAMS), PARAMS)
    start = state
    for count, name in enumerate(("mlp", "norm"), start=1):
        grads = draw(2)
        grads[name] = grads[name].at[(3,) * grads[name].ndim].set(bad)
        updates, state = update(grads, state, PARAMS)
        assert_equal(updates, ZERO)
        assert_equal(state.inner_state, start.inner_state)
        assert [int(n) for n in skipped_steps(state)] == [count, count]
    after = update(draw(2), state, PARAMS)
    assert_equal(after[0], update(draw(2), start, PARAMS)[0])
    assert [int(n) for n in skipped_steps(after[1])] == [2, 0]


def test_a_first_gradient_that_is_not_finite_does_not_set_the_basis() -> None:
    init, update = built("galore_adamw", "continuous")
    bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    _, state = update(bad, init(PARAMS), PARAMS)
    updates, _ = update(draw(1), state, PARAMS)
    assert_equal(updates, update(draw(1), init(PARAMS), PARAMS)[0])


def test_skipped_steps_are_counted_inside_other_states() -> None:
    tx = optax.chain(optax.identity(), make_optimizer("sgd", learning_rate=0.1))
    _, state = tx.update(jax.tree.map(lambda x: x * jnp.nan, PARAMS), tx.init(PARAMS), PARAMS)
    assert [int(n) for n in skipped_steps(state)] == [1, 1]
    with pytest.raises(ValueError, match="expected the state of make_optimizer"):
        skipped_steps(optax.adam(0.1).init(PARAMS))


@pytest.mark.parametrize("optimizer", [*SUBSPACE_OPTIMIZERS, *FULL_RANK_OPTIMIZERS])
@pytest.mark.parametrize("empty", [{}, {"mlp": {}}], ids=["no layers", "an empty layer"])
def test_an_empty_tree(optimizer: str, empty: Tree) -> None:
    tx = make_optimizer(optimizer, "continuous", learning_rate=0.1, weight_decay=0.1)
    state = tx.init(empty)
    updates, _ = tx.update(empty, state, empty)
    assert updates == empty
    assert osd_jax.projectors(state) == {}


# ------------------------------------------------------------------------------- arguments


def choices(names: tuple[str, ...]) -> str:
    return "expected one of " + ", ".join(names)


BAD_ARGUMENTS = [
    ({"rank": 0}, "rank is 0: expected a whole number of at least 1"),
    ({"rank": -4}, "rank is -4: expected a whole number"),
    ({"rank": 2.5}, "rank is 2.5: expected a whole number"),
    ({"rank": True}, "rank is True: expected a whole number"),
    ({"update_proj_gap": 0}, "update_proj_gap is 0: expected a whole number of at least 1"),
    ({"update_proj_gap": -1}, "update_proj_gap is -1: expected"),
    ({"update_proj_gap": 1.5}, "update_proj_gap is 1.5: expected"),
    ({"update_proj_gap": True}, "update_proj_gap is True: expected"),
    ({"update_proj_every": 0}, "update_proj_every is 0: expected a whole number of at least 1"),
    ({"update_proj_every": 2.0}, "update_proj_every is 2.0: expected"),
    ({"update_proj_every": 5}, "update_proj_every is 5: only online PCA"),
    ({"optimizer": "adamW"}, "optimizer is 'adamW': "),
    ({"optimizer": "adamW"}, choices(SUBSPACE_OPTIMIZERS + FULL_RANK_OPTIMIZERS)),
    ({"proj_type": "svd"}, "proj_type is 'svd': " + choices(PROJ_TYPES)),
    ({"lion_sign": "full"}, "lion_sign is 'full': expected one of lifted, subspace"),
    ({"move_projector": "first"}, "move_projector is 'first': expected one of after, before"),
    ({"learning_rate": -0.1}, "learning_rate is -0.1: expected a number of at least 0"),
    ({"learning_rate": float("nan")}, "learning_rate is nan: expected"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1: expected"),
    ({"beta1": 1.0}, "beta1 is 1.0: expected None or a number in"),
    ({"proj_type": "continuous", "penalty": -1.0}, "penalty is -1.0: expected"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_make_optimizer_names_the_argument_and_the_choices(
    arguments: dict[str, Any], message: str
) -> None:
    good = {"optimizer": "galore_adamw", "learning_rate": 0.1}
    with pytest.raises(ValueError) as error:
        make_optimizer(**{**good, **arguments})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: osd_jax.svd(0), "the period of P is 0: expected a whole number of at least 1"),
        (lambda: osd_jax.random(-2), "the period of P is -2: expected"),
        (lambda: osd_jax.online_pca(optax.adam(0.1), penalty=-1), "penalty is -1: expected"),
        (lambda: osd_jax.online_pca(optax.adam(0.1), every=0), "the period of P is 0: expected"),
        (
            lambda: osd_jax.online_pca(optax.adam(0.1), init="eigh"),
            "'eigh': expected one of svd, qr",
        ),
        (
            lambda: scale_by_subspace(optax.identity(), osd_jax.svd(1), rank=0),
            "rank is 0: expected",
        ),
        (
            lambda: scale_by_subspace(optax.identity(), osd_jax.svd(1), rank=1, side="left"),  # type: ignore[arg-type]
            "side is 'left': expected one of shorter, longer, input, output, both",
        ),
        (
            lambda: scale_by_subspace(
                optax.identity(), osd_jax.online_pca(optax.adam(0.1)), rank=1, side="both"
            ),
            "side='both' has two bases, and online PCA moves one: use svd(...) or random(...)",
        ),
    ],
)
def test_the_pieces_name_the_argument(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build()
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int32], ids=["float16", "int32"])
@pytest.mark.parametrize("optimizer", ["galore_adamw", "adamw"])
def test_a_dtype_that_does_not_train_is_refused(optimizer: str, dtype: Any) -> None:
    params = {"layer": {"mlp": jnp.ones((4, 6), dtype)}}
    with pytest.raises(ValueError, match=r"'layer/mlp' has dtype .*: expected float32, bfloat16"):
        make_optimizer(optimizer, learning_rate=0.1).init(params)
    if optimizer == "galore_adamw":
        with pytest.raises(ValueError, match=f"'layer/mlp' has dtype {jnp.dtype(dtype)}"):
            scale_by_subspace(optax.identity(), osd_jax.svd(1), rank=1).init(params)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)], ids=str)
def test_a_parameter_that_is_not_a_matrix_is_named(shape: tuple[int, ...]) -> None:
    params = {"mlp": {"bias": jnp.ones(shape)}}
    expected = r"'mlp/bias' has shape .*, which is not a matrix: give its matrix axes in dimension_"
    with pytest.raises(ValueError, match=expected):
        scale_by_subspace(optax.identity(), osd_jax.svd(1), rank=1).init(params)
    with pytest.raises(ValueError, match=expected):
        make_optimizer("galore_adamw", learning_rate=0.1, select=lambda *_: True).init(params)


@pytest.mark.parametrize(
    ("dimension_numbers", "message"),
    [
        (SubspaceDimensionNumbers(0, 2), "expected two disjoint, non-empty sets of its axes"),
        (SubspaceDimensionNumbers(0, 0), "expected two disjoint"),
        (SubspaceDimensionNumbers((), 1), "expected two disjoint"),
        ({"mlp": (0, 1)}, "dimension_numbers holds"),
        ({"up": None}, "dimension_numbers has no entry for parameter 'mlp'; it has ['up']"),
    ],
)
def test_dimension_numbers_that_do_not_fit_name_the_parameter(
    dimension_numbers: Any, message: str
) -> None:
    tx = scale_by_subspace(
        optax.identity(), osd_jax.svd(1), rank=1, dimension_numbers=dimension_numbers
    )
    with pytest.raises(ValueError) as error:
        tx.init({"mlp": jnp.ones((4, 6))})
    assert message in str(error.value) and "mlp" in str(error.value)


@pytest.mark.parametrize("optimizer", [*SUBSPACE_OPTIMIZERS, *FULL_RANK_OPTIMIZERS])
def test_weight_decay_without_parameters_says_so(optimizer: str) -> None:
    tx = make_optimizer(optimizer, learning_rate=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))
