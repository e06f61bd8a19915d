"""osd_jax compared with osd_torch directly, on random problems in float32 and bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osd_names import MUON_SCALES, RESIDUALS
from parity_tests.support.golden_cases import align
from parity_tests.support.oracle import Oracle
from parity_tests.support.sides import Trajectory, forget_compiled, gradients, run_jax, run_torch

STEPS = 7
RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("galore_adamw", {}),
    ("galore_lion", {}),
    ("galore_lion", {"lion_sign": "subspace"}),
    ("galore_adafactor", {}),
    ("galore_adafactor", {"beta1": 0.9}),
)
SVD_KINDS = ("std", "reverse_std", "left", "right", "full")
PCA_KINDS = ("continuous", "continuous_lion", "continuous_adafactor", "continuous_sgd")


@dataclass(frozen=True)
class Problem:
    optimizer: str
    proj_type: str
    shape: tuple[int, int]
    dtype: str
    lr_ratio: tuple[float, ...]
    seed: int
    options: dict[str, Any]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Every published rule of W and of P in float, but `random`, whose draws are a framework's.

    A P as wide as it is long spans everything, so its loss and gradient vanish up to rounding, and
    Adam, Lion and Adafactor make steps of full size of that rounding: nothing to compare. SGD does
    not, and the SVD kinds have no such step; they get these ranks. What comes near to that is left
    to `well_posed_steps`.
    """
    shape = draw(st.tuples(st.integers(2, 14), st.integers(2, 14)))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    optimizer, rule_options = draw(st.sampled_from(RULES))
    # What P of this very gradient makes of it on two sides is diagonal, off it rounding: see above.
    in_subspace = "lion_sign" in rule_options
    kinds = tuple(kind for kind in SVD_KINDS + PCA_KINDS if not (in_subspace and kind == "full"))
    proj_type = draw(st.sampled_from(kinds))
    ranks = st.sampled_from([1, min(shape), min(shape) + 3]) | st.integers(1, min(shape))
    gaps = [1, 2, 3, 5, 20]
    options: dict[str, Any] = {}
    if proj_type in PCA_KINDS:
        gaps = [5, 20, 200] if dtype == "float32" else [50, 200]
        options["penalty"] = draw(st.sampled_from([0.0, 0.1]))
        options["move_projector"] = draw(st.sampled_from(["after", "before"]))
        if proj_type != "continuous_sgd":
            ranks = st.integers(1, min(shape) - 1)
    return Problem(
        optimizer=optimizer,
        proj_type=proj_type,
        shape=shape,
        dtype=dtype,
        lr_ratio=draw(st.sampled_from([(1.0,) * STEPS, tuple(t / 4 for t in range(STEPS))])),
        seed=draw(st.integers(0, 2**32 - 1)),
        options={
            "rank": draw(ranks),
            "update_proj_gap": draw(st.sampled_from(gaps)),
            "scale": draw(st.sampled_from([1.0, 0.25])),
            "lr": draw(st.sampled_from([0.1, 0.01, 0.001])),
            "weight_decay": draw(st.sampled_from([0.0, 0.1, 1.0])),
            **rule_options,
            **options,
        },
    )


def same_signs(ours: Trajectory, theirs: Trajectory) -> int:
    """The steps until a column of P changes its sign on only one side.

    The sign of a column is arbitrary, but at a refresh the kept moments meet the new one: if the
    two LAPACKs choose differently there, both are right, and W differs from then on. A column with
    the opposite sign from the start has no effect.
    """
    pairs = [(ours.bases["mlp"][side], P) for side, P in theirs.bases["mlp"].items()]
    signs = np.concatenate([np.sum(a * b, axis=1) > 0 for a, b in pairs], axis=1)
    turned = np.flatnonzero(np.any(signs != signs[0], axis=1))
    return int(turned[0]) if turned.size else STEPS


def basis_limit(problem: Problem) -> float:
    """Largest difference in an entry of P, whose columns are of length 1.

    Singular vectors are off by about eps sigma_1 / (distance to the next singular value), and the
    gradients' singular values fall by 1.5 each, so by 2^-24 * 1.5^13 * 3 = 4e-5 at worst and hardly
    ever by a tenth of that; a step of online PCA adds its size times the error of its direction.
    In bfloat16 products read P rounded to 8 bits, and an error of 1e-7 in P decides, rarely, which
    way an entry goes: its direction is then off by 2^-8, which may turn the sign of one.
    """
    if problem.proj_type not in PCA_KINDS:
        return 4e-5
    turn = 2.0**-10  # Adam's, of an entry that comes within 1e-4 of zero
    if problem.dtype == "bfloat16":
        turn = 2.0 if problem.proj_type == "continuous_lion" else 2.0**-4
    largest_step = max(problem.lr_ratio) / problem.options["update_proj_gap"]
    return 4e-5 + turn * largest_step


def weight_limits(problem: Problem, weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(T,), largest Frobenius distance of W after each step.

    What P's error makes of the distance moved, and the roundings of W: float32 rounds a step, a
    decay and their sum by 2^-24 each, bfloat16 by 2^-8 the sum (PyTorch) and the step too (JAX).
    """
    norm = lambda x: np.linalg.norm(x, axis=(-2, -1))
    moved = norm(weights - start)
    size = np.maximum.accumulate(norm(weights)) + np.linalg.norm(start)
    roundings = 2 * np.arange(1, STEPS + 1) * size
    if problem.dtype == "bfloat16":
        lion = problem.optimizer == "galore_lion"
        flips = 4 * problem.options["lr"] if lion else 0.0  # two entries' signs
        return 0.05 * moved + 2.0**-8 * roundings + flips
    small, relative = 0.0, 3e-4
    if problem.optimizer == "galore_adamw":
        # R's rounding error, a few 2^-24 sigma_1, is taken in units of 3e-5 (eps after the bias
        # correction) where an entry itself is that small. One such entry may be in any R; on two
        # sides, with P of this very gradient, all of them off the diagonal are.
        small = 2e-2 * problem.options["lr"] * problem.options["scale"]
        relative = 5e-2 if problem.proj_type == "full" else relative
    return relative * moved + small + 2.0**-24 * roundings


def compared_steps(problem: Problem) -> int:
    """Asserts that both sides agree on a problem; how many of its steps could be compared."""
    rng = np.random.default_rng(problem.seed)
    lr = problem.options["lr"]
    start = (lr * rng.standard_normal(problem.shape)).astype(np.float32)
    # float32 first, so that both frameworks round to bfloat16 from the same value.
    grads = gradients(rng, STEPS, problem.shape, falling_by=1.5).astype(np.float32)
    ratio = np.array(problem.lr_ratio, np.float32)
    ours, theirs = (
        run({"mlp": start}, {"mlp": grads}, ratio, problem.optimizer, problem.proj_type,
            dtype=problem.dtype, **problem.options)
        for run in (run_jax, run_torch)
    )  # fmt: skip
    until = min(same_signs(ours, theirs), well_posed_steps(problem, start, grads, theirs))
    if problem.dtype == "float32" and comes_near_a_sign_change(problem, start, grads, theirs):
        return 0
    weights, expected = ours.weights["mlp"], theirs.weights["mlp"]
    error = np.linalg.norm(weights - expected, axis=(1, 2))
    limits = weight_limits(problem, expected, start)
    assert np.all(error[:until] <= limits[:until]), (error / limits)[:until]
    for side, P in theirs.bases["mlp"].items():
        difference = np.abs(align(ours.bases["mlp"][side], P) - P)[:until].max(initial=0)
        assert difference <= basis_limit(problem), side
    return until


def comes_near_a_sign_change(
    problem: Problem, start: np.ndarray, grads: np.ndarray, run: Trajectory
) -> bool:
    """Whether Lion takes the sign of an entry that is zero up to float32 rounding."""
    oracle, _, _ = exact(problem, start, grads.astype(float), run)
    margins = (state.get("margin", 1.0) for state in (oracle.state, oracle.projector_state))
    return min(margins) < 1e-5


def well_posed_steps(
    problem: Problem, start: np.ndarray, grads: np.ndarray, run: Trajectory
) -> int:
    """The steps until float32 rounding errors move the float64 oracle itself too far.

    P is rounded to 2^-24 and deviates from orthonormal by a few of these. If it spans nearly all of
    a gradient, its own gradient consists of little else, and scale-invariant rules turn that into
    steps of full size. The compared problems must satisfy their limits with a factor of ten.
    """
    _, weights, bases = exact(problem, start, grads.astype(float), run)
    _, moved, turned = exact(problem, start, grads.astype(float), run, rounding=2.0**-22)
    error = np.linalg.norm(moved - weights, axis=(1, 2))
    posed = error <= weight_limits(problem, weights, start) / 10
    for side, P in bases.items():
        difference = np.abs(turned[side] - P).max(axis=(1, 2))
        posed &= difference <= basis_limit(problem) / 10
    return STEPS if posed.all() else int(np.argmin(posed))


def exact(
    problem: Problem,
    start: np.ndarray,
    grads: np.ndarray,
    run: Trajectory,
    rounding: float = 0.0,
) -> tuple[Oracle, np.ndarray, dict[str, np.ndarray]]:
    """The oracle after all steps, its weights (T, m, n), and by side its bases (T, p, r).

    With `rounding`, each step's P is off by at most so much in every entry.
    """
    rng = np.random.default_rng(problem.seed)
    oracle = Oracle(
        start.astype(float),
        problem.optimizer,
        problem.proj_type,
        schedule=problem.lr_ratio.__getitem__,
        **problem.options,
    )
    weights, bases = [], []
    for step in range(STEPS):
        reported = {side: P[step] for side, P in run.bases["mlp"].items()}
        oracle.step(grads[step].astype(float), reported)
        off = {k: rounding * rng.uniform(-1, 1, P.shape) for k, P in oracle.bases.items()}
        oracle.bases = {k: P + off[k] for k, P in oracle.bases.items()}
        weights.append(oracle.weight)
        bases.append(oracle.bases)
    return oracle, np.stack(weights), {k: np.stack([b[k] for b in bases]) for k in bases[0]}


def repeatable(examples: int) -> settings:
    """The given number of random problems, the same in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def compare_examples(examples: int) -> None:
    """Compares the given number of random problems; nearly all steps must be comparable."""
    compared: list[int] = []

    @repeatable(examples)
    @given(problems())
    def check(problem: Problem) -> None:
        compared.append(compared_steps(problem))
        if len(compared) % 200 == 0:
            forget_compiled()

    check()
    share = np.mean(compared) / STEPS
    print(f"{len(compared)} problems, {share:.1%} of their steps compared")
    assert len(compared) >= examples
    assert share > 0.9


def test_jax_and_torch_agree_on_random_problems() -> None:
    compare_examples(40)


@pytest.mark.slow
def test_jax_and_torch_agree_on_many_random_problems() -> None:
    compare_examples(2000)


@st.composite
def residual_problems(draw: st.DrawFn) -> Problem:
    """Muon in a subspace and every residual, in float64, where P moves and is never set again.

    Columns of P may have other signs in each framework, which change no update here.
    """
    shape = draw(st.tuples(st.integers(3, 12), st.integers(3, 12)))
    proj_type = draw(st.sampled_from(["continuous", "continuous_sgd", "oja"]))
    optimizer = draw(st.sampled_from(["osd_muon", "galore_adamw", "galore_adafactor"]))
    options: dict[str, Any] = {"transport_moments": optimizer != "galore_adafactor"}
    if optimizer == "osd_muon":
        options |= {
            "momentum": draw(st.sampled_from([0.0, 0.6, 0.95])),
            "muon_scale": draw(st.sampled_from(MUON_SCALES)),
        }
        options["nesterov"] = options["momentum"] > 0 and draw(st.booleans())
    else:
        name = draw(st.sampled_from([name for name in RESIDUALS if name != "none"]))
        options["residual"] = name
        if RESIDUALS[name].limits:
            options["growth_limiter"] = draw(st.booleans())
        if RESIDUALS[name].reads_scale:
            options["scale"] = draw(st.sampled_from([1.0, 0.25]))
        if RESIDUALS[name].scale is not None:
            options["residual_scale"] = draw(st.sampled_from([0.1, 1.0]))
    return Problem(
        optimizer=optimizer,
        proj_type=proj_type,
        shape=shape,
        dtype="float64",
        lr_ratio=draw(st.sampled_from([(1.0,) * STEPS, tuple(t / 4 for t in range(STEPS))])),
        seed=draw(st.integers(0, 2**32 - 1)),
        options={
            "rank": draw(st.integers(1, min(shape) - 1)),
            "update_proj_gap": draw(st.sampled_from([5, 20, 200])),
            "scale": 1.0,
            "lr": 0.01,
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            **options,
        },
    )


def compare_residuals(examples: int) -> None:
    """Asserts that both sides agree to 1e-7 of the way.

    That is roundings of 2^-53 times the few thousand that Newton-Schulz (484) and Adam's roots make
    of one, over steps that build on each other, and room for P's gradient where little is left of
    it.
    """

    @repeatable(examples)
    @given(residual_problems())
    def check(problem: Problem) -> None:
        rng = np.random.default_rng(problem.seed)
        start = {"mlp": 0.1 * rng.standard_normal(problem.shape)}
        grads = {"mlp": gradients(rng, STEPS, problem.shape, falling_by=1.5)}
        ratio = np.array(problem.lr_ratio)
        ours, theirs = (
            run(start, grads, ratio, problem.optimizer, problem.proj_type,
                dtype="float64", **problem.options).weights["mlp"]
            for run in (run_jax, run_torch)
        )  # fmt: skip
        moved = np.linalg.norm(theirs - start["mlp"], axis=(1, 2))
        error = np.linalg.norm(ours - theirs, axis=(1, 2))
        assert np.all(error <= 1e-7 * moved), error / moved

    check()


def test_jax_and_torch_agree_on_residuals_and_muon() -> None:
    compare_residuals(8)


@pytest.mark.slow
def test_jax_and_torch_agree_on_many_residuals() -> None:
    compare_residuals(400)
