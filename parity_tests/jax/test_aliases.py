"""osd_jax's public interface: the Optax aliases, and P's own step count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import osd_jax
from osd_jax.composition import STATIC_ARGUMENTS
from osd_jax.rules import scale_by_adam_of_age, scale_by_factored_second_moment

PARAMS = {
    "mlp": {"up": jnp.linspace(-1, 1, 24 * 40).reshape(24, 40)},
    "norm": jnp.ones(24),
    "stack": {"mlp": jnp.linspace(-1, 1, 3 * 16 * 24).reshape(3, 16, 24)},
}
NUMBERS = {
    "mlp": {"up": osd_jax.SubspaceDimensionNumbers()},
    "norm": None,
    "stack": {"mlp": osd_jax.SubspaceDimensionNumbers(1, 2)},
}
LR, RANK = 0.01, 4
SHARED: dict[str, Any] = {"rank": RANK, "dimension_numbers": NUMBERS}


def gradients(step: int) -> Any:
    keys = iter(jax.random.split(jax.random.key(step), 3))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), PARAMS)


def run(tx: optax.GradientTransformation, steps: int = 7) -> Any:
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_same(first: Any, second: Any) -> None:
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def by_name(optimizer: str, proj_type: str = "std", **options: Any) -> Any:
    options = {"update_proj_gap": 3, **SHARED, **options}
    return osd_jax.make_optimizer(optimizer, proj_type, learning_rate=LR, **options)


PCA = osd_jax.online_pca(
    optax.chain(scale_by_adam_of_age(), optax.add_decayed_weights(0.01), optax.scale(-1 / 3))
)


@pytest.mark.parametrize(
    ("alias", "named"),
    [
        (
            lambda: osd_jax.osd_adamw(LR, **SHARED, weight_decay=0.1, basis=osd_jax.svd(3)),
            lambda: by_name("galore_adamw", weight_decay=0.1),
        ),
        (
            lambda: osd_jax.osd_adamw(
                LR, **SHARED, b1=0.8, b2=0.95, eps=1e-4, basis=PCA, lift=osd_jax.scaled(0.25)
            ),
            lambda: by_name(
                "galore_adamw", "continuous", beta1=0.8, beta2=0.95, eps=1e-4, scale=0.25
            ),
        ),
        (
            lambda: osd_jax.osd_lion(LR, **SHARED, basis=PCA, weight_decay=0.1),
            lambda: by_name("galore_lion", "continuous", weight_decay=0.1),
        ),
        (
            lambda: osd_jax.osd_lion(LR, **SHARED, basis=PCA, lift=osd_jax.scaled()),
            lambda: by_name("galore_lion", "continuous", lion_sign="subspace"),
        ),
        (
            lambda: osd_jax.osd_adafactor(LR, **SHARED, b1=0.9, basis=osd_jax.svd(3), side="both"),
            lambda: by_name("galore_adafactor", "full", beta1=0.9),
        ),
        (
            lambda: osd_jax.osd_adamw8bit(LR, **SHARED, basis=osd_jax.random(3)),
            lambda: by_name("galore_adamw8bit", "random"),
        ),
        (
            lambda: osd_jax.osd_adamw(
                LR, **SHARED, b2=0.95, basis=osd_jax.svd(3), transport_moments=True
            ),
            lambda: by_name("galore_adamw", beta2=0.95, transport_moments=True),
        ),
    ],
    ids=["adamw", "adamw, betas", "lion", "lion, sign", "adafactor", "adamw8bit", "transport"],
)
def test_aliases_are_what_the_names_stand_for(
    alias: Callable[[], Any], named: Callable[[], Any]
) -> None:
    assert_same(run(alias()), run(named()))


@pytest.mark.parametrize("alias", [osd_jax.osd_adamw, osd_jax.osd_lion, osd_jax.osd_adafactor])
def test_a_schedule_is_a_learning_rate(alias: Callable[..., Any]) -> None:
    constant = run(alias(LR, **SHARED))
    assert_same(constant, run(alias(lambda count: LR, **SHARED)))
    falling = optax.linear_schedule(LR, 0.0, 3)
    three, seven = (run(alias(falling, **SHARED), steps) for steps in (3, 7))
    if alias is not osd_jax.osd_adafactor:  # its momentum is of scaled updates
        assert_same(three, seven)  # from step 3 on the rate is 0


ALIASES = [osd_jax.osd_adamw, osd_jax.osd_adamw8bit, osd_jax.osd_lion, osd_jax.osd_adafactor]


@pytest.mark.parametrize("alias", ALIASES)
def test_a_lift_that_is_not_linear_sees_no_learning_rate(alias: Callable[..., Any]) -> None:
    """By the sign each entry moves by the rate times what Adam corrects biases by."""
    tx = alias(1e-3, **SHARED, basis=osd_jax.svd(3), lift=osd_jax.sign_after_lift())
    updates, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    wanted = 1e-3 * (np.sqrt(1e-3) / 0.1 if alias is osd_jax.osd_adamw else 1.0)
    np.testing.assert_allclose(np.abs(updates["mlp"]["up"]), wanted, rtol=1e-4)


@pytest.mark.parametrize("alias", ALIASES)
def test_numbers_in_the_state_by_inject_hyperparams(alias: Callable[..., Any]) -> None:
    options = {**SHARED, "weight_decay": 0.1, "basis": osd_jax.svd(3), "b1": 0.8}
    tx = optax.inject_hyperparams(alias, static_args=STATIC_ARGUMENTS)(
        optax.linear_schedule(LR, 0.0, 20), **options
    )
    state = tx.init(PARAMS)
    assert set(state.hyperparams) >= {"learning_rate", "b1", "weight_decay"}
    assert optax.tree.set(state, learning_rate=0.5).hyperparams["learning_rate"] == 0.5
    assert_same(run(tx), run(alias(optax.linear_schedule(LR, 0.0, 20), **options)))
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)


def test_injecting_what_is_static_says_so() -> None:
    with pytest.raises(ValueError, match="rank is an array.*static_args="):
        tx = optax.inject_hyperparams(osd_jax.osd_adamw, static_args=("mask",))(LR, rank=RANK)
        tx.init(PARAMS["mlp"])


@pytest.mark.parametrize(
    "mask",
    [
        lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        {"mlp": {"up": True}, "norm": False, "stack": {"mlp": True}},
    ],
    ids=["function", "tree"],
)
def test_the_mask_of_weight_decay(mask: Any) -> None:
    """A leaf in the mask goes as with decay everywhere, any other as with none."""
    make = lambda **more: run(osd_jax.osd_adamw(LR, **SHARED, basis=osd_jax.svd(3), **more))
    masked, all_, none = make(weight_decay=0.5, mask=mask), make(weight_decay=0.5), make()
    assert_same(masked["mlp"], all_["mlp"])
    assert_same(masked["stack"], all_["stack"])
    assert_same(masked["norm"], none["norm"])
    assert np.abs(all_["norm"] - none["norm"]).max() > 1e-3
    named = run(by_name("galore_adamw", weight_decay=0.5, no_decay=lambda name, x: name == "norm"))
    assert_same(named, masked)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "lion", "adafactor", "adam8bit"])
def test_full_rank_optimizers_mask_too(optimizer: str) -> None:
    make = lambda **more: run(
        osd_jax.make_optimizer(optimizer, learning_rate=LR, dimension_numbers=NUMBERS, **more)
    )
    masked = make(weight_decay=0.5, no_decay=lambda name, x: name.startswith("norm"))
    assert_same(masked["mlp"], make(weight_decay=0.5)["mlp"])
    assert_same(masked["norm"], make()["norm"])


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "galore_adamw", "galore_adamw8bit", "lion"])
def test_betas_reach_the_rule(optimizer: str) -> None:
    """b1 = b2 = 0 leaves no memory: the same gradient makes the same step."""
    tx = osd_jax.make_optimizer(optimizer, learning_rate=LR, beta1=0.0, beta2=0.0, **SHARED)
    state, found = tx.init(PARAMS), []
    for step in (5, 0, 5):
        updates, state = tx.update(gradients(step), state, PARAMS)
        found.append(updates["norm"])
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5, atol=1e-8)
    assert np.abs(found[0] - found[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: osd_jax.osd_adamw(-1.0, rank=4), "learning_rate is -1.0"),
        (lambda: osd_jax.osd_adamw(LR, rank=0), "rank is 0"),
        (lambda: osd_jax.osd_adamw(LR, rank=4, b2=1.0), "b2 is 1.0: expected a number in"),
        (lambda: osd_jax.osd_adamw(LR, rank=4, eps=-1.0), "eps is -1.0"),
        (lambda: osd_jax.osd_lion(LR, rank=4, weight_decay=-0.1), "weight_decay is -0.1"),
        (lambda: osd_jax.osd_lion(LR, rank=4, basis="svd"), "basis is 'svd': expected None or a"),
        (lambda: osd_jax.osd_adamw8bit(LR, rank=4, lift=0.25), "lift is 0.25: expected None or a"),
        (lambda: osd_jax.osd_adafactor(LR, rank=4, side="top"), "side is 'top'"),
        (lambda: osd_jax.osd_adamw(LR, rank=4, b1=None), "b1 is None: expected a number in"),
        (lambda: osd_jax.osd_adamw(LR, rank=4, select=3), "select is 3: expected None or a fun"),
        (lambda: osd_jax.osd_lion(LR, rank=4, transport_moments="no"), "transport_moments is 'no'"),
        (
            lambda: osd_jax.osd_adafactor(LR, rank=4, transport_moments=True),
            "Adafactor's factored second moment cannot follow P",
        ),
        (lambda: osd_jax.scaled(float("nan")), "factor is nan"),
        (
            lambda: osd_jax.scale_by_subspace(optax.scale_by_adam(), None, rank=4),
            "projector is None: expected a BasisRule",
        ),
        (
            lambda: osd_jax.scale_by_subspace(
                optax.scale_by_adam(), osd_jax.svd(3), rank=4, lift=0.5
            ),
            "lift is 0.5: expected a Lift",
        ),
        (
            lambda: osd_jax.osd_adafactor(LR, rank=4, side="both"),
            "side='both' has two bases",
        ),
    ],
)
def test_mistakes_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# P's own count of steps.


def test_ages_of_one_number_are_the_count() -> None:
    """With every matrix of the same age the rules are Optax's, and the factored one its own."""
    grads = {"x": gradients(0)["stack"]["mlp"]}
    for tx, like in (
        (scale_by_adam_of_age(0.8, 0.95), optax.scale_by_adam(0.8, 0.95)),
        (scale_by_factored_second_moment(), scale_by_factored_second_moment()),
    ):
        state, other = tx.init(grads), like.init(grads)
        for step in range(1, 5):
            age = {"x": jnp.full(3, step, jnp.int32)}
            found, state = tx.update(grads, state, age=age)
            wanted, other = like.update(grads, other)
            assert_same(found, wanted)


def energies(zero_steps: int, proj_type: str, resume_at: int | None = None) -> np.ndarray:
    """The part of each gradient that P captured, (steps, experts); expert 0 idles at first."""
    params = {"mlp": jnp.zeros((2, 40, 60))}
    numbers = osd_jax.SubspaceDimensionNumbers(1, 2)

    def build() -> Any:
        return osd_jax.make_optimizer(
            "galore_adamw", proj_type, learning_rate=LR, rank=3, update_proj_gap=50,
            select=lambda path, x: True, dimension_numbers=numbers,
        )  # fmt: skip

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    left, right, found = draw(2, 40, 3), draw(2, 3, 60), []
    tx = build()
    state, update = tx.init(params), jax.jit(tx.update)
    late = np.random.default_rng(1)
    for step in range(zero_steps):
        busy = late.standard_normal((2, 40, 60)).astype(np.float32)
        busy[0] = 0
        _, state = update({"mlp": jnp.asarray(busy)}, state, params)
        if step == resume_at:
            kept = jax.tree.map(np.asarray, state)
            tx = build()
            state = jax.tree.map(jnp.asarray, kept)
            update = jax.jit(tx.update)
    for _ in range(40):
        left = left + 0.02 * draw(2, 40, 3)
        gradient = left @ draw(2, 3, 3) @ right + 0.01 * draw(2, 40, 60)
        _, state = update({"mlp": jnp.asarray(gradient)}, state, params)
        basis = np.asarray(osd_jax.projectors(state)["mlp"])
        captured = np.linalg.norm(np.swapaxes(basis, 1, 2) @ gradient, axis=(1, 2))
        found.append((captured / np.linalg.norm(gradient, axis=(1, 2))) ** 2)
    return np.array(found)


@pytest.mark.parametrize(
    "proj_type", ["std", "continuous", "continuous_sgd", "continuous_adafactor"]
)
@pytest.mark.parametrize(("zero_steps", "resume_at"), [(1, None), (7, 3), (130, None)])
def test_an_idle_expert_loses_no_energy(
    proj_type: str, zero_steps: int, resume_at: int | None
) -> None:
    """From its first gradient on, P follows as in a run that never had a zero gradient."""
    found, never = energies(zero_steps, proj_type, resume_at), energies(0, proj_type)
    steps = np.arange(40)
    # With `std` the two runs refresh at different steps of the drift.
    compared = steps + zero_steps < 50 if proj_type == "std" else steps < 40
    if zero_steps > 50 and proj_type == "std":
        compared = steps < 20
    assert (found[compared, 0] > 0.99 * never[compared, 0]).all()
