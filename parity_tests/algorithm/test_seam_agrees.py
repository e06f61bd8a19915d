"""Rules written once for each library take the same steps in both, in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import osd_jax
import osd_torch
from osd_jax.rules import scale_by_adam_of_age
from osd_names import OPTIMIZERS
from osd_torch.rules import Adam

RANK, LR, STEPS = 3, 0.02, 14
SHAPES = {"mlp": (12, 8), "attn": (8, 12)}  # PyTorch's (output, input)


def start(name: str) -> np.ndarray:
    return np.random.default_rng(len(name)).standard_normal(SHAPES[name])


def gradient(name: str, step: int, zero_until: int) -> np.ndarray:
    rng = np.random.default_rng([step, len(name)])
    found = rng.standard_normal(SHAPES[name])
    return np.zeros_like(found) if name == "attn" and step < zero_until else found


def torch_run(optimizer_of: Any, zero_until: int) -> dict[str, np.ndarray]:
    params = {name: torch.nn.Parameter(torch.tensor(start(name))) for name in SHAPES}
    optimizer = optimizer_of(list(params.items()))
    for step in range(STEPS):
        for name, param in params.items():
            param.grad = torch.tensor(gradient(name, step, zero_until))
        optimizer.step()
    return {name: param.detach().numpy() for name, param in params.items()}


def jax_run(tx_of: Any, zero_until: int) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        params: Any = {name: jnp.asarray(start(name).T) for name in SHAPES}
        tx = tx_of()
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(STEPS):
            grads = {name: jnp.asarray(gradient(name, step, zero_until).T) for name in SHAPES}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return {name: np.asarray(x).T for name, x in params.items()}


def torch_rule(every: int | None, move: int) -> osd_torch.BasisRule:
    """QR of sums of the gradient's columns, then online PCA by Adam."""
    pca = osd_torch.online_pca(Adam(), step_size=0.05, penalty=0.1)

    def fresh(matrix: Any, old: Any, side: str, key: str, each: Any) -> Any:
        return each(lambda M: torch.linalg.qr(M[:, :RANK] + M[:, RANK : 2 * RANK])[0], matrix)

    return pca._replace(clock=osd_torch.Clock(every, move), fresh=fresh, name="toy")


def jax_rule(every: int | None, move: int) -> osd_jax.BasisRule:
    optimizer = optax.chain(scale_by_adam_of_age(), optax.scale(-0.05))
    pca = osd_jax.online_pca(optimizer, penalty=0.1)

    def fresh(matrix: Any, old: Any, side: str, key: Any, each: Any) -> Any:
        return each(lambda M: jnp.linalg.qr(M[:, :RANK] + M[:, RANK : 2 * RANK])[0], matrix)

    return pca._replace(clock=osd_jax.Clock(every, move), fresh=fresh)


ALL = lambda name, x: True
CASES = {
    "adamw": (osd_torch.SubspaceAdamW, osd_jax.osd_adamw, {"weight_decay": 0.1}, {}),
    "adamw, betas": (
        osd_torch.SubspaceAdamW,
        osd_jax.osd_adamw,
        {"betas": (0.8, 0.95), "eps": 1e-4, "transport_moments": True},
        {"b1": 0.8, "b2": 0.95, "eps": 1e-4, "transport_moments": True},
    ),
    "lion": (
        osd_torch.SubspaceLion,
        osd_jax.osd_lion,
        {"betas": (0.8, 0.95), "transport_moments": True},
        {"b1": 0.8, "b2": 0.95, "transport_moments": True},
    ),
    "adafactor": (osd_torch.SubspaceAdafactor, osd_jax.osd_adafactor, {"beta1": 0.9}, {"b1": 0.9}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_lift_by_signs_takes_the_same_steps(case: str) -> None:
    """It is not linear, so the learning rate and Adam's bias correction follow it on both sides."""
    of_torch, of_jax, torch_options, jax_options = CASES[case]
    found = torch_run(
        lambda named: of_torch(
            named, lr=LR, rank=RANK, select=ALL, basis=torch_rule(None, 1),
            lift=osd_torch.sign_after_lift(), **torch_options,
        ),
        0,
    )  # fmt: skip
    shared = {name: x for name, x in torch_options.items() if name == "weight_decay"}
    wanted = jax_run(
        lambda: of_jax(
            LR, rank=RANK, select=ALL, basis=jax_rule(None, 1), lift=osd_jax.sign_after_lift(),
            **jax_options, **shared,
        ),
        0,
    )  # fmt: skip
    for name in SHAPES:
        moved = np.linalg.norm(found[name] - start(name))
        assert np.linalg.norm(found[name] - wanted[name]) <= 1e-9 * moved, name


@pytest.mark.parametrize("zero_until", [0, 6])
@pytest.mark.parametrize(("every", "move"), [(5, 1), (5, 2), (None, 1), (None, 3)])
@pytest.mark.parametrize("case", CASES)
def test_both_libraries_take_the_same_steps(
    case: str, every: int | None, move: int, zero_until: int
) -> None:
    """P is set again and moves in between; when it is set, P's optimizer restarts on both sides."""
    of_torch, of_jax, torch_options, jax_options = CASES[case]
    shared = {name: x for name, x in torch_options.items() if name == "weight_decay"}
    found = torch_run(
        lambda named: of_torch(
            named, lr=LR, rank=RANK, select=ALL, basis=torch_rule(every, move),
            lift=osd_torch.scaled(0.25), **torch_options,
        ),
        zero_until,
    )  # fmt: skip
    wanted = jax_run(
        lambda: of_jax(
            LR, rank=RANK, select=ALL, basis=jax_rule(every, move), lift=osd_jax.scaled(0.25),
            **jax_options, **shared,
        ),
        zero_until,
    )  # fmt: skip
    for name in SHAPES:
        moved = np.linalg.norm(found[name] - start(name))
        assert np.linalg.norm(found[name] - wanted[name]) <= 1e-9 * moved, name


@pytest.mark.parametrize("name", [x for x in OPTIMIZERS if x not in ("adam", "sgd")])
def test_each_parameter_decays_at_its_own_rate(name: str) -> None:
    """With zero gradients; `no_decay` sees the parameters as they are, vectors as vectors."""
    shapes = {"embed": (12, 4), "mlp": (8, 6), "norm": (5,)}
    rates = {"embed": 0.5 * 0.003, "mlp": 0.5 * 0.01, "norm": 0.0}
    seen: set[tuple[int, ...]] = set()

    def no_decay(path: str, x: Any) -> bool:
        seen.add(tuple(x.shape))
        return bool(x.ndim < 2)

    options: Any = {"full_lr": 0.003, "weight_decay": 0.5, "no_decay": no_decay, "rank": 2}
    ones = {key: jnp.ones(shape) for key, shape in shapes.items()}
    tx = osd_jax.make_optimizer(name, learning_rate=0.01, **options)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones)
    params = {key: torch.nn.Parameter(torch.ones(shape)) for key, shape in shapes.items()}
    optimizer = osd_torch.make_optimizer(params.items(), name, lr=0.01, **options)
    for param in params.values():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for key, rate in rates.items():
        np.testing.assert_allclose(-updates[key], rate, rtol=1e-5)
        np.testing.assert_allclose(1 - params[key].detach(), rate, rtol=1e-3)
    assert seen == set(shapes.values())
