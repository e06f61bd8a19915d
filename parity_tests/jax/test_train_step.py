"""The train step, the eval step, the schedule and sampling, on a tiny LLaMA."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import osd_jax
from osd_jax import llama
from osd_jax.diagnostics import projectors
from osd_jax.guard import skipped_steps
from osd_jax.llama import LlamaConfig
from osd_jax.llama.train import (
    TrainState,
    init_state,
    learning_rate_schedule,
    make_eval_step,
    make_train_step,
    sample,
)
from osd_jax.sketch import TwoSided
from parity_tests.support import GOLDEN

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    eos_token_id=1,
)
KINDS = ("attention/query", "mlp/down")  # a square and an oblong one; fewer compile faster
SHAPE = (3, 12)  # rows and tokens of a micro-batch


# ---------------------------------------------------------------------------- the schedule


def factors(scheduler: str, **more: Any) -> np.ndarray:
    arguments = {"num_training_steps": 100, "warmup_steps": 10, "min_lr_ratio": 0.1, **more}
    schedule = learning_rate_schedule(scheduler, **arguments)
    found = np.asarray(schedule(jnp.arange(131)))
    for step in (0, 1, 10, 55, 100):
        assert float(schedule(step)) == pytest.approx(found[step], abs=1e-6)
    return found


def cosine(step: Any, total: int = 100, warmup: int = 10, least: float = 0.1) -> Any:
    done = np.clip((np.asarray(step) - warmup) / (total - warmup), 0, 1)
    return least + (1 - least) * 0.5 * (1 + np.cos(np.pi * done))


def test_linear_rises_and_falls_on_straight_lines() -> None:
    found = factors("linear")
    np.testing.assert_allclose(found[:11], np.linspace(0, 1, 11), atol=1e-6)
    np.testing.assert_allclose(found[10:101], np.linspace(1, 0, 91), atol=1e-6)
    np.testing.assert_allclose(found[101:], 0, atol=1e-6)


def test_cosine_ends_at_the_least_factor_and_stays() -> None:
    found = factors("cosine")
    np.testing.assert_allclose(found[:11], np.linspace(0, 1, 11), atol=1e-6)
    np.testing.assert_allclose(found[10:], cosine(np.arange(10, 131)), atol=1e-6)
    assert found[100] == pytest.approx(0.1) and found[130] == pytest.approx(0.1)


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_a_schedule_without_warmup_starts_at_the_peak(scheduler: str) -> None:
    found = factors(scheduler, warmup_steps=0, min_lr_ratio=0.0)
    assert found[0] == 1 and found[100] == pytest.approx(0, abs=1e-7)


def test_warmup_may_fill_the_whole_run() -> None:
    found = factors("cosine", warmup_steps=100)
    np.testing.assert_allclose(found[:101], np.arange(101) / 100, atol=1e-6)


def test_cosine_restarts_drops_to_zero_and_returns_to_the_cosine() -> None:
    found = factors("cosine_restarts", cycle_length=30, restart_warmup_steps=5)
    wanted = np.where(np.arange(131) < 10, np.arange(131) / 10, cosine(np.arange(131)))
    for start in (30, 60, 90, 120):
        wanted[start : start + 5] = np.arange(5) / 5 * cosine(start + 5)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert found[30] == found[60] == 0
    # where no warmup follows a restart there is nothing to drop for
    plain = factors("cosine_restarts", cycle_length=30)
    np.testing.assert_allclose(plain, factors("cosine"), atol=1e-7)


def test_every_golden_trajectory_has_this_schedule() -> None:
    golden = GOLDEN / "index.json"
    ratios = {tuple(entry["lr_ratio"]) for entry in json.loads(golden.read_text())}
    fits = 0
    for ratio in ratios:
        warmup = ratio.index(1.0)
        # A trajectory may end before its schedule does.
        fits += any(
            np.allclose([float(schedule(step)) for step in range(len(ratio))], ratio, atol=1e-6)
            for total in range(max(warmup + 1, len(ratio) - 1), len(ratio) + 9)
            for schedule in [
                learning_rate_schedule("cosine", num_training_steps=total, warmup_steps=warmup)
            ]
        )
    assert fits == len(ratios) > 0


def test_a_wrong_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'step'.*linear, cosine or cosine_restarts"):
        learning_rate_schedule("step", num_training_steps=10)
    with pytest.raises(ValueError, match="cycle_length is None"):
        learning_rate_schedule("cosine_restarts", num_training_steps=10)


# ---------------------------------------------------------------------------- the train step


@functools.cache
def transformation(
    optimizer: str = "galore_adamw", proj_type: str = "continuous"
) -> optax.GradientTransformationExtraArgs:
    return osd_jax.make_optimizer(
        optimizer,
        proj_type,
        learning_rate=0.02,
        schedule=learning_rate_schedule("cosine", num_training_steps=20, warmup_steps=2),
        rank=4,
        update_proj_gap=3,
        select=lambda path, array: path.removeprefix("layers/") in KINDS,
        dimension_numbers=llama.dimension_numbers,
    )


@functools.cache
def train_step(optimizer: str = "galore_adamw", proj_type: str = "continuous", **more: Any) -> Any:
    tx = transformation(optimizer, proj_type)
    return make_train_step(CONFIG, tx, **more)


def fresh(
    optimizer: str = "galore_adamw", proj_type: str = "continuous", dtype: Any = jnp.float32
) -> TrainState:
    weights = jax.tree.map(lambda x: x.astype(dtype), llama.init(CONFIG, 0))
    return init_state(weights, transformation(optimizer, proj_type))


def batch(seed: int = 0, micro_batches: int = 1, *, padded: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (micro_batches, *SHAPE)
    tokens = rng.integers(2, CONFIG.vocab_size, shape).astype(np.int32)
    lengths = rng.integers(2, SHAPE[1] + 1, (*shape[:2], 1)) if padded else SHAPE[1]
    return {"tokens": tokens, "mask": np.broadcast_to(np.arange(SHAPE[1]) < lengths, shape)}


def host(tree: Any) -> Any:
    """A copy that outlives donation."""
    return jax.tree.map(np.array, tree)


def run(
    step: Callable[..., Any],
    state: TrainState,
    steps: int = 3,
    make: Callable[[int], Mapping[str, np.ndarray]] = batch,
) -> tuple[TrainState, list[dict[str, Any]]]:
    every = []
    for number in range(steps):
        state, metrics = step(state, make(number), jnp.asarray(number > 0))
        every.append(host(metrics))
    return state, every


def assert_close(found: Any, wanted: Any, **tolerance: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), found, wanted)


@jax.jit
def loss_and_gradient(weights: Any, rows: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    """One plain mean over the predicted tokens of rows (K, B, S)."""
    rows, mask = rows.reshape(-1, SHAPE[1]), mask.reshape(-1, SHAPE[1])[:, 1:]

    def mean(weights: Any) -> jax.Array:
        logits = llama.forward(weights, CONFIG, rows)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
        return jnp.sum(losses * mask) / jnp.sum(mask)

    return jax.value_and_grad(mean)(weights)


def loss_and_norm(weights: Any, data: Mapping[str, np.ndarray]) -> tuple[float, float]:
    loss, grads = loss_and_gradient(weights, data["tokens"], data["mask"])
    return float(loss), float(optax.tree.norm(grads))


def test_metrics_are_named_and_measured_when_asked() -> None:
    _, (first, second, _) = run(train_step(), fresh())
    measured = {f"{what}/{kind}" for what in ("energy", "orthonormality") for kind in KINDS}
    assert set(first) == {"loss", "gradient_norm", "skipped", "skipped_in_a_row", *measured}
    assert all(np.isnan(first[name]) for name in measured)
    assert all(np.isfinite(second[name]) for name in second)
    assert all(0 < second[f"energy/{kind}"] <= 1.001 for kind in KINDS)
    assert first["loss"].dtype == first["gradient_norm"].dtype == np.float32
    assert first["skipped"].dtype == np.int32


@pytest.mark.parametrize("padded", [False, True])
def test_accumulation_equals_one_batch(padded: bool) -> None:
    """The tokens weigh alike, not the micro-batches, whatever padding they have."""
    many = lambda seed: batch(seed, 4, padded=padded)

    def joined(seed: int) -> dict[str, np.ndarray]:
        return {name: x.reshape(1, -1, SHAPE[1]) for name, x in many(seed).items()}

    start = host(fresh().params)
    a, in_parts = run(train_step(), fresh(), make=many)
    b, at_once = run(train_step(), fresh(), make=joined)
    loss, norm = loss_and_norm(start, many(0))
    for found in (in_parts[0], at_once[0]):
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    for x, y in zip(in_parts, at_once, strict=True):
        for name in x:
            np.testing.assert_allclose(x[name], y[name], rtol=2e-4, atol=1e-5, err_msg=name)
    assert_close(a.params, b.params, atol=2e-5)
    assert optax.tree.norm(optax.tree.sub(a.params, start)) > 0.1


def test_clipping_scales_the_whole_gradient() -> None:
    """With plain SGD the update is the gradient, so that the clipped one can be read off it."""
    tx = osd_jax.make_optimizer("sgd", learning_rate=1.0)
    moves = []
    for limit in (1e6, 1e-3):
        state = init_state(llama.init(CONFIG, 0), tx)
        before = host(state.params)
        step = make_train_step(CONFIG, tx, grad_clipping=limit)
        state, metrics = step(state, batch(), jnp.asarray(False))
        moves.append(jax.tree.map(np.subtract, before, host(state.params)))
        norm = float(metrics["gradient_norm"])
    assert norm == pytest.approx(loss_and_norm(before, batch())[1], rel=1e-4)
    plain, clipped = moves
    assert float(optax.tree.norm(plain)) == pytest.approx(norm, rel=1e-4)
    assert float(optax.tree.norm(clipped)) == pytest.approx(1e-3, rel=1e-3)
    assert_close(clipped, jax.tree.map(lambda x: x * 1e-3 / norm, plain), atol=1e-7)


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the loss of one micro-batch is poisoned; its gradient alone would look healthy."""
    real = llama.loss

    def poisoned(params: Any, config: Any, tokens: jax.Array, *rest: Any, **more: Any) -> Any:
        loss, count = real(params, config, tokens, *rest, **more)
        return loss + jax.lax.stop_gradient(jnp.where(tokens[0, 0] == 0, jnp.nan, 0.0)), count

    monkeypatch.setattr(llama, "loss", poisoned)
    step = make_train_step(CONFIG, transformation())
    good, bad = batch(1, 2), batch(2, 2)
    bad["tokens"][-1, 0, 0] = 0
    state, _ = run(step, fresh(), steps=2, make=lambda _: good)
    assert isinstance(state.opt_state, optax.ApplyIfFiniteState)

    skipped = []
    for data in (bad, bad, good, bad):
        before = host((state.params, state.opt_state.inner_state))
        state, metrics = step(state, data, jnp.asarray(True))
        after = host((state.params, state.opt_state.inner_state))
        skipped.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
        assert np.isfinite(metrics["loss"]) == (data is good)
        if data is bad:
            jax.tree.map(np.testing.assert_array_equal, after, before)
        else:
            assert optax.tree.norm(optax.tree.sub(after[0], before[0])) > 0.01
    assert skipped == [(1, 1), (2, 2), (2, 0), (3, 1)]
    assert skipped_steps(state.opt_state) == (3, 1)
    assert int(state.step) == 6


def test_a_batch_with_nothing_to_predict_is_skipped() -> None:
    empty = batch()
    empty["mask"] = np.zeros_like(empty["mask"])
    state, (metrics,) = run(train_step(), fresh(), steps=1, make=lambda _: empty)
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, fresh().params)


@pytest.mark.parametrize("proj_type", ["continuous", "full"])
def test_energy_and_orthonormality_against_numpy(proj_type: str) -> None:
    step = train_step(proj_type=proj_type)
    state, _ = run(step, fresh(proj_type=proj_type), steps=5)
    bases, weights = host(dict(projectors(state.opt_state))), host(state.params)
    data = batch(99)
    _, metrics = step(state, data, jnp.asarray(True))
    grads = host(loss_and_gradient(weights, data["tokens"], data["mask"])[1])
    for kind in KINDS:
        group, _, name = kind.partition("/")
        energy, off = [], []
        for layer in range(CONFIG.num_hidden_layers):
            G = grads["layers"][group][name][layer].astype(np.float64)
            basis = bases[f"layers/{kind}"]
            if isinstance(basis, TwoSided):
                P_in, P_out = basis.input[layer], basis.output[layer]
                captured = P_in @ (P_in.T @ G @ P_out) @ P_out.T
                sides = [P_in, P_out]
            else:
                P = basis[layer].astype(np.float64)
                captured = P @ (P.T @ G) if G.shape[0] <= G.shape[1] else (G @ P) @ P.T
                sides = [P]
            energy.append(np.sum(captured**2) / np.sum(G**2))
            gap = lambda P: np.linalg.norm(P.T @ P - np.eye(P.shape[1])) / math.sqrt(P.shape[1])
            off.append(max(map(gap, sides)))
        assert metrics[f"energy/{kind}"] == pytest.approx(np.mean(energy), rel=1e-3), kind
        assert metrics[f"orthonormality/{kind}"] == pytest.approx(np.mean(off), abs=1e-5), kind


def test_one_compilation_over_measures_refreshes_and_the_end_of_warmup() -> None:
    step: Any = make_train_step(CONFIG, transformation(proj_type="std"))
    state = fresh(proj_type="std")
    for number in range(8):  # refreshes of `std` at 0, 3, 6; the warmup ends at 2
        state, _ = step(state, batch(number), jnp.asarray(number % 2 == 0))
    assert step._cache_size() == 1
    evaluate: Any = make_eval_step(CONFIG)
    for number in range(3):
        evaluate(state.params, {name: x[0] for name, x in batch(number).items()})
    assert evaluate._cache_size() == 1


def test_the_old_state_is_donated() -> None:
    state = fresh()
    run(train_step(), state, steps=1)
    assert all(x.is_deleted() for x in jax.tree.leaves(state[1:]) if x.size > 1)


def test_full_rank_has_nothing_to_measure() -> None:
    _, (_, metrics) = run(train_step("adamw"), fresh("adamw"), steps=2)
    assert set(metrics) == {"loss", "gradient_norm", "skipped", "skipped_in_a_row"}


def test_remat_gives_the_same_numbers() -> None:
    _, plain = run(train_step(), fresh())
    _, remat = run(train_step(remat=True), fresh())
    for x, y in zip(plain, remat, strict=True):
        for name in x:
            np.testing.assert_allclose(x[name], y[name], rtol=2e-4, atol=1e-5, err_msg=name)


def test_bfloat16_stays_finite_and_learns() -> None:
    state, metrics = run(train_step(), fresh(dtype=jnp.bfloat16), 20, lambda _: batch(0, 2))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    floats = [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(state.params))
    assert metrics[-1]["skipped"] == 0
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    _, norm = loss_and_norm(fresh().params, batch(0, 2))
    assert metrics[0]["gradient_norm"] == pytest.approx(norm, rel=0.02)


# ---------------------------------------------------------------------- evaluation and sampling


def test_eval_step_sums_over_predicted_tokens() -> None:
    weights = llama.init(CONFIG, 0)
    data = batch(5, padded=True)
    total, count = make_eval_step(CONFIG)(weights, {name: x[0] for name, x in data.items()})
    assert int(count) == data["mask"][0, :, 1:].sum()
    assert float(total / count) == pytest.approx(loss_and_norm(weights, data)[0], rel=1e-5)


def certain(token: int) -> Any:
    """Weights that always predict one token."""
    weights = jax.tree.map(jnp.zeros_like, llama.init(CONFIG, 0))
    return weights | {
        "embedding": jnp.ones_like(weights["embedding"]),
        "norm": jnp.ones_like(weights["norm"]),
        "head": weights["head"].at[:, token].set(100.0),
    }


def test_sample_is_deterministic_and_begins_with_the_prompt() -> None:
    weights, prompt = llama.init(CONFIG, 0), np.array([5, 6, 7])
    first, again, other = (
        sample(weights, CONFIG, prompt, length=30, seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.int32
    np.testing.assert_array_equal(first[:3], prompt)
    assert first.tolist() != other.tolist()


def test_sample_stops_at_the_end_of_text_and_at_the_length() -> None:
    assert sample(certain(1), CONFIG, np.array([1, 7]), length=10).tolist() == [1, 7]
    assert sample(certain(9), CONFIG, np.array([5]), length=4).tolist() == [5, 9, 9, 9]
    assert sample(certain(9), CONFIG, np.arange(8), length=4).tolist() == [0, 1, 2, 3]
