"""Both libraries in float64 compared with the oracle over 20 steps: every combination but 8-bit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch

import osd_jax
import osd_names as names
import osd_torch
from osd_jax.bases import online_pca_gradient
from osd_jax.sketch import make_sketch
from osd_torch.bases import online_pca_gradient as torch_pca_gradient
from parity_tests.support.combinations import PROJ_TYPES, RULES
from parity_tests.support.golden_cases import align
from parity_tests.support.oracle import Oracle, pca_gradient, pca_loss
from parity_tests.support.sides import Run, gradients, run_jax, run_torch

STEPS = 20
LIMIT = 1e-9
OBLONG = {"mlp_tall": (12, 7), "mlp_wide": (7, 12)}
MATRICES = OBLONG | {"mlp_square": (9, 9)}
FULL_RANK_SHAPES = {"head": (10, 6), "norm": (8,)}
# Every residual with each optimizer that reads it, and what else that reads.
RESIDUALS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("galore_adamw", {"residual": name}) for name in names.RESIDUALS if name != "none"},
    "norm_ratio, no limiter": (
        "galore_adamw", {"residual": "norm_ratio", "growth_limiter": False}
    ),
    "column_ema, 0.2": ("galore_adamw", {"residual": "column_ema", "residual_scale": 0.2}),
    "sign, 0.1": ("galore_adamw", {"residual": "sign", "residual_scale": 0.1}),
    "norm_ratio, lion": ("galore_lion", {"residual": "norm_ratio"}),
    "column_ema, adafactor": ("galore_adafactor", {"residual": "column_ema"}),
}  # fmt: skip
MUON = {
    "momentum 0.6": {"momentum": 0.6},
    "nesterov": {"nesterov": True, "momentum": 0.8},
    "its own scale": {"muon_scale": "muon"},
    "no scale": {"muon_scale": "none", "momentum": 0.0},
}
FULL_RANK: dict[str, tuple[str, dict[str, Any]]] = {
    **RULES,
    **{f"full-rank {name}": (name, {}) for name in ("adam", "adamw", "lion", "adafactor", "sgd")},
    "full-rank adafactor, beta1": ("adafactor", {"beta1": 0.9}),
}
# The paper's side of the rows where paper and release differ.
PAPER = {
    "penalty": 0.1,
    "projector_lr_multiple": 5.0,
    "projector_weight_decay": 0.1,
    "lion_sign": "subspace",
    "scale": 1.0,
}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {name: PAPER[name]} for name in PAPER if "projector" in name or name == "penalty"},
    "move_projector": {"move_projector": "before"},
    "paper": PAPER,
    "paper, P first": {**PAPER, "move_projector": "before"},
}
RATIO = np.concatenate([np.arange(4) / 4, np.cos(np.linspace(0, 1.4, STEPS - 4))])  # from 0

# P at every third step: by each rule that moves it, with each of W, and with all that P takes.
MOVING = [kind for kind in PROJ_TYPES if names.is_online("galore_adamw", kind)]
EVERY_THIRD: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{kind: ("galore_adamw", kind, {}) for kind in MOVING},
    "lion": ("galore_lion", "continuous", {}),
    "adafactor": ("galore_adafactor", "continuous", {}),
    "paper": ("galore_lion", "continuous", PAPER),
    "paper, P first": ("galore_lion", "continuous", {**PAPER, "move_projector": "before"}),
}

both_sides = pytest.mark.parametrize("run", [run_jax, run_torch], ids=["jax", "torch"])


def compare(
    run: Run,
    optimizer: str,
    proj_type: str | None,
    shapes: dict[str, tuple[int, ...]] = MATRICES,
    **options: Any,
) -> None:
    """Asserts that a library and the oracle agree on every parameter after every step.

    Args:
        run: The library.
        optimizer: Published name.
        proj_type: Published name, or None where no parameter is projected.
        shapes: By name of parameter.
        **options: On top of the release's defaults.
    """
    rng = np.random.default_rng(0)
    own = options.get("residual", "none")
    scale = 0.25 if optimizer.startswith("galore") and names.RESIDUALS[own].reads_scale else 1.0
    options = {
        "lr": 0.01, "rank": 4, "update_proj_gap": 7, "scale": scale, "weight_decay": 0.1, **options,
    }  # fmt: skip
    start = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    grads = {name: gradients(rng, STEPS, shape) for name, shape in shapes.items()}
    ours = run(start, grads, RATIO, optimizer, proj_type or "std", dtype="float64", **options)
    projected = {name for name in start if "mlp" in name and proj_type}
    assert set(ours.bases) == projected

    for name, weight in start.items():
        kind = proj_type if name in projected else None
        own = {k: x for k, x in options.items() if k not in ("full_lr", "first_moment")}
        if "mlp" in name:
            own.pop("second_moment", None)
        elif "full_lr" in options:
            own["lr"] = options["full_lr"]
        if optimizer == "muon" and "mlp" not in name:
            oracle = Oracle(weight, "adamw", None, schedule=RATIO.__getitem__, **own)
        else:
            oracle = Oracle(weight, optimizer, kind, schedule=RATIO.__getitem__, **own)
        for step in range(STEPS):
            bases = {side: P[step] for side, P in ours.bases.get(name, {}).items()}
            oracle.step(grads[name][step], bases)
            moved = np.linalg.norm(oracle.weight - weight)
            error = np.linalg.norm(ours.weights[name][step] - oracle.weight)
            assert error <= LIMIT * moved, f"W of {name} after step {step}"
            for side, P in bases.items():
                error = np.linalg.norm(align(P, oracle.bases[side]) - oracle.bases[side])
                assert error <= LIMIT * np.linalg.norm(P), f"P of {name}, {side}, step {step}"


@both_sides
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_combination(run: Run, rule: str, proj_type: str) -> None:
    """Only Adam and Muon also get a square matrix.

    The projection alone chooses the side of P, but Newton-Schulz depends on the shape. The golden
    trajectories contain square matrices for the other rules.
    """
    optimizer, options = RULES[rule]
    shapes = MATRICES if rule in ("adamw", "muon") else OBLONG
    compare(run, optimizer, proj_type, shapes, **options)


@both_sides
@pytest.mark.parametrize("rule", FULL_RANK)
def test_full_rank(run: Run, rule: str) -> None:
    """For unprojected parameters, and for the optimizers that project none."""
    optimizer, options = FULL_RANK[rule]
    compare(run, optimizer, None, FULL_RANK_SHAPES, **options)


SLOWLY = {  # JAX compiles each
    (run, kind): [pytest.mark.slow] * (run is run_jax and kind != "continuous")
    for run in (run_jax, run_torch)
    for kind in ("std", "continuous", "gaussian")
}


@pytest.mark.parametrize(
    ("run", "proj_type"), [pytest.param(*pair, marks=marks) for pair, marks in SLOWLY.items()]
)
@pytest.mark.parametrize("rule", RESIDUALS)
def test_residuals(run: Run, proj_type: str, rule: str) -> None:
    optimizer, options = RESIDUALS[rule]
    compare(run, optimizer, proj_type, **options)


@both_sides
@pytest.mark.parametrize("proj_type", ["std", "continuous", None])
@pytest.mark.parametrize("case", MUON)
def test_muon(run: Run, case: str, proj_type: str | None) -> None:
    """In a subspace, and at full rank."""
    shapes = {**MATRICES, **FULL_RANK_SHAPES}
    compare(run, "osd_muon" if proj_type else "muon", proj_type, shapes, **MUON[case])


APART = {"full_lr": 0.03, "second_moment": "row", "beta2": 0.95}


@both_sides
@pytest.mark.parametrize("option", APART)
@pytest.mark.parametrize("optimizer", ["galore_adamw", "osd_muon", "muon", "adamw", "adam"])
def test_what_is_not_projected_has_its_own(run: Run, optimizer: str, option: str) -> None:
    """Learning rate and second moment of unprojected matrices, with and without projected ones."""
    shapes = {**MATRICES, **FULL_RANK_SHAPES}
    proj_type = "continuous" if optimizer in names.SUBSPACE_OPTIMIZERS else None
    compare(run, optimizer, proj_type, shapes, **{option: APART[option]})


BETAS = {
    "adamw": {"beta1": 0.8, "beta2": 0.95, "eps": 1e-4},
    "lion": {"beta1": 0.95, "beta2": 0.98},
}


@both_sides
@pytest.mark.parametrize("proj_type", [None, "std", "continuous"])
@pytest.mark.parametrize("rule", BETAS)
def test_betas_and_eps(run: Run, rule: str, proj_type: str | None) -> None:
    shapes = MATRICES if proj_type else FULL_RANK_SHAPES
    for name in (f"galore_{rule}", *([rule] if proj_type is None else [])):
        compare(run, name, proj_type, shapes, **BETAS[rule])


@both_sides
@pytest.mark.parametrize("option", OPTIONS)
def test_the_papers_side(run: Run, option: str) -> None:
    optimizer = "galore_lion" if "lion_sign" in OPTIONS[option] else "galore_adamw"
    compare(run, optimizer, "continuous", **OPTIONS[option])


@both_sides
@pytest.mark.parametrize("case", EVERY_THIRD)
def test_the_basis_moved_every_third_step(run: Run, case: str) -> None:
    optimizer, proj_type, options = EVERY_THIRD[case]
    compare(run, optimizer, proj_type, update_proj_every=3, **options)


@both_sides
@pytest.mark.parametrize("rank", [1, 7, 30])
@pytest.mark.parametrize("proj_type", ["reverse_std", "full", "continuous_sgd"])
def test_ranks_to_the_edge_and_beyond(run: Run, proj_type: str, rank: int) -> None:
    """With a whole P, only SGD moves it the same way everywhere: see test_jax_torch."""
    compare(run, "galore_adamw", proj_type, rank=rank)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_the_oracles_pca_gradient_is_the_slope_of_the_loss(penalty: float) -> None:
    rng = np.random.default_rng(1)
    P, G, h = rng.standard_normal((6, 3)), rng.standard_normal((6, 9)), 1e-5
    slope = np.empty_like(P)
    for index in np.ndindex(P.shape):
        e = np.zeros_like(P)
        e[index] = h
        slope[index] = (pca_loss(P + e, G, penalty) - pca_loss(P - e, G, penalty)) / (2 * h)
    # Central differences: h^2 of truncation, eps / h of rounding.
    np.testing.assert_allclose(pca_gradient(P, G, penalty), slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_the_closed_form_is_autograd_of_the_loss(penalty: float) -> None:
    """On both sides, for a P that is far from orthonormal."""
    rng = np.random.default_rng(2)
    P, G = rng.standard_normal((6, 3)), rng.standard_normal((6, 9))
    R = P.T @ G
    parts = (R, G @ R.T, np.sum(G**2))

    with jax.enable_x64(True):

        def loss(P: jax.Array) -> jax.Array:
            Gn = G / np.linalg.norm(G)
            error, gram = P @ P.T @ Gn - Gn, P.T @ P - np.eye(3)
            return (error**2).sum() + penalty * (gram**2).sum()

        autograd = np.asarray(jax.grad(loss)(jax.numpy.asarray(P)))
        in_sketch = (osd_jax.CORRELATION, osd_jax.SQUARED_NORM)
        sketch = make_sketch(jax.numpy.asarray(P), jax.numpy.asarray(G), in_sketch)
        in_jax = np.asarray(online_pca_gradient(jax.numpy.asarray(P), sketch, penalty))
    statistics = {"correlation": torch.tensor(parts[1]), "squared_norm": torch.tensor(parts[2])}
    sketch_torch = osd_torch.Sketch(torch.tensor(R), statistics, dict.fromkeys(statistics, 2))
    in_torch = torch_pca_gradient(torch.tensor(P), sketch_torch, penalty).numpy()
    size = np.abs(autograd).max()
    for ours in (in_jax, in_torch, pca_gradient(P, G, penalty)):
        np.testing.assert_allclose(ours, autograd, rtol=0, atol=1e-12 * size)
