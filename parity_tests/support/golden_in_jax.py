"""Runs osd_jax through the golden trajectories, on the default device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import osd_jax
from osd_jax import llama
from osd_jax.llama.train import clipping_factor
from parity_tests.support.golden_cases import TINY_LLAMA, GoldenCase, GoldenRun, golden_cases
from parity_tests.support.sides import Trajectory, run_jax

SETTINGS = (
    "optimizer", "proj_type", "rank", "update_proj_gap", "scale", "lr", "weight_decay", "beta1",
    "lr_ratio",
)  # fmt: skip


def settings(case: GoldenCase) -> dict[str, Any]:
    """What the cases of one compiled run share."""
    return {name: getattr(case, name) for name in SETTINGS}


@functools.cache
def together(settings_items: tuple[tuple[str, Any], ...], transposed: bool) -> Trajectory:
    """All shapes of the same settings in one compiled run."""
    cases = {
        f"mlp_{'x'.join(map(str, case.start.shape))}": case
        for case in golden_cases()
        if tuple(settings(case).items()) == settings_items
    }
    options = dict(settings_items)
    rejoin = {name: held_after_kept_steps(case) for name, case in cases.items() if case.is_8bit}
    return run_jax(
        {name: case.start for name, case in cases.items()},
        {name: case.gradients for name, case in cases.items()},
        np.asarray(options.pop("lr_ratio")),
        transposed=transposed,
        rejoin=rejoin,
        **options,
    )


def held_after_kept_steps(case: GoldenCase) -> dict[str, np.ndarray]:
    """By side, (steps, p, r): the release's P after the kept steps, NaN after the others."""
    held = {}
    for side, golden in case.bases.items():
        held[side] = np.full((len(case.gradients), *golden.shape[1:]), np.nan, np.float32)
        held[side][list(case.kept_steps)] = golden
    return held


def check_matrix(case: GoldenCase, transposed: bool) -> None:
    """The weight and the kept bases are those of the release, within the case's tolerance."""
    run = together(tuple(settings(case).items()), transposed)
    name = f"mlp_{'x'.join(map(str, case.start.shape))}"
    error = case.error(run.weights[name][-1])
    limit = case.tolerance(other_blocks=True)  # ours lie along the last axis
    print(f"{case.name}: {error:.1e}, limit {limit:.0e}")
    assert error <= limit
    case.check_bases({k: P[list(case.kept_steps)] for k, P in run.bases[name].items()})


def train_tiny_llama(run: GoldenRun) -> np.ndarray:
    """The losses of a run, one scan."""
    config, params = llama.load_hf(TINY_LLAMA)
    lr_ratio = jnp.asarray(run.lr_ratio)
    optimizer = osd_jax.make_optimizer(
        run.optimizer,
        run.proj_type,
        learning_rate=run.lr,
        schedule=lambda step: lr_ratio[step],
        **run.options,
        select=llama.is_projected,
        dimension_numbers=llama.dimension_numbers,
    )

    def mean_loss(params: llama.Params, tokens: jax.Array) -> jax.Array:
        total, count = llama.loss(params, config, tokens)
        return total / count

    @jax.jit
    def train(params: llama.Params) -> jax.Array:
        def step(carry: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            loss, grads = jax.value_and_grad(mean_loss)(params, tokens)
            factor = clipping_factor(optax.tree.norm(grads), run.grad_clipping)
            grads = jax.tree.map(lambda g: g * factor, grads)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.asarray(run.batches))[1]

    state = jax.eval_shape(optimizer.init, params)
    assert len(osd_jax.projectors(state)) == 7  # kinds of kernels
    return np.asarray(train(params))


def check_tiny_llama(run: GoldenRun) -> None:
    """The losses are those of the release, within the run's tolerance."""
    error = np.abs(train_tiny_llama(run) - run.losses)
    print(f"{run.name}: largest loss difference {error.max():.1e}, limit {run.tolerance:.0e}")
    assert error[:2].max() <= 1e-5  # before the first update
    assert error.max() <= run.tolerance
