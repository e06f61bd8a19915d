"""osd_jax's residual lifts and Muon: against released codes, explicit formulas, and PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import osd_jax
import osd_torch
from launch.compile_tpu.hlo import collectives
from osd_jax.diagnostics import subspace_states
from osd_jax.lift import Seen
from osd_jax.llama.layerwise import make_layerwise_train_step
from osd_jax.llama.train import make_train_step
from osd_jax.muon import MUON_STATIC_ARGUMENTS
from osd_jax.newton_schulz import MUON_COEFFICIENTS, newton_schulz
from osd_jax.residuals import residual_energies
from osd_jax.rules import scale_by_adam_of_age
from osd_jax.sketch import COLUMN_ENERGIES, make_sketch
from osd_torch.rules import Adam
from parity_tests.support.arrays import normal_jax
from parity_tests.support.jax_toys import (
    CONFIG,
    assert_sketches_are_refused,
    is_one_of_its_shape,
    llama_run,
    llama_toy,
)
from parity_tests.support.lifts import lifts_of
from parity_tests.support.residual_cases import ResidualCase, residual_cases

pytestmark = [
    pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64"),  # one lift's
]

Tree = Any
ALL = lambda name, x: True


LIFTS = lifts_of(osd_jax, jnp.float64)
TORCH_LIFTS = lifts_of(osd_torch, torch.float64)
ONE_SIDED = [name for name in LIFTS if name != "residual_sign" and "muon" not in name]


class Together(NamedTuple):
    """An optimizer with each lift, in one program: each takes the same gradients.

    Attributes:
        init: parameters -> states by lift.
        update: (gradients, states, parameters by lift) -> (updates by lift, states).
    """

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree], Tree]


@functools.cache
def together(lr: Any = 0.01, names: Any = tuple(LIFTS), **options: Any) -> Together:
    options = {"rank": 3, "select": ALL, **options}

    def one(name: str) -> Any:
        if "muon" in name:
            return osd_jax.osd_muon(lr, momentum=0.8, lift=LIFTS[name], **options)
        return osd_jax.osd_adamw(lr, b2=0.99, lift=LIFTS[name], **options)

    txs = {name: one(name) for name in names}

    @jax.jit
    def update(grads: Tree, states: Tree, params: Tree) -> Tree:
        found = {n: tx.update(grads, states[n], params[n]) for n, tx in txs.items()}
        return {n: x for n, (x, _) in found.items()}, {n: x for n, (_, x) in found.items()}

    return Together(lambda params: {name: tx.init(params) for name, tx in txs.items()}, update)


def steps_of(
    txs: Together, grads: list[Tree], params: Tree, states: Tree = None
) -> tuple[Tree, Tree]:
    """The parameters by lift and the states after some steps; `params` by lift, if states are."""
    if states is None:
        states = txs.init(params)
        params = dict.fromkeys(states, params)
    for g in grads:
        updates, states = txs.update(g, states, params)
        params = optax.apply_updates(params, updates)
    return params, states


def norms_of(state: Any) -> Any:
    return subspace_states(state)[0].lift


# The released codes.


def lift_of(case: ResidualCase) -> osd_jax.Lift:
    if case.method == "fira_adamw":
        return osd_jax.norm_ratio(case.scale, release=True)
    return osd_jax.gradient_only(
        case.scale, per="matrix" if case.method == "apollo_mini" else "column"
    )


def basis_of(case: ResidualCase) -> osd_jax.BasisRule:
    if "svd" in case.method or case.method == "fira_adamw":
        return osd_jax.svd(case.update_proj_gap)
    due = slice(None, None, case.update_proj_gap)
    bases, gradients = np.stack(case.bases[due]), case.gradients[due]

    def fresh(matrix: Any, old: Any, side: Any, key: Any, each: Any) -> Any:
        """The P of the step with this gradient."""
        known = gradients if side == "output" else gradients.swapaxes(-1, -2)
        step = jnp.argmin(jnp.sum(jnp.square(known - matrix), (-2, -1)))
        return jnp.asarray(bases)[step].astype(old.dtype)

    return osd_jax.BasisRule(osd_jax.Clock(case.update_proj_gap), fresh)


@pytest.mark.parametrize("case", residual_cases(), ids=lambda case: case.key)
def test_a_matrix_follows_the_released_code(case: ResidualCase) -> None:
    rates = jnp.asarray(case.lr * np.array(case.lr_ratio), jnp.float32)
    tx = osd_jax.osd_adamw(
        lambda count: rates[count], b1=case.betas[0], b2=case.betas[1], eps=case.eps,
        rank=case.rank, weight_decay=case.weight_decay, basis=basis_of(case), lift=lift_of(case),
    )  # fmt: skip
    params = {"mlp": jnp.asarray(case.start.T)}
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in case.gradients:
        updates, state = update({"mlp": jnp.asarray(gradient.T)}, state, params)
        params = optax.apply_updates(params, updates)
    assert case.error(np.asarray(params["mlp"]).T) <= 3e-4
    assert float(norms_of(state)["mlp"]["norm"]) == pytest.approx(case.norms[-1], rel=1e-3)


# The rules written out, and PyTorch.

SHAPES = {"a": (14, 9), "b": (9, 14)}  # PyTorch's (output, input)
STEPS, LR, DECAY = 20, 0.01, 0.1
RULES: dict[str, tuple[Any, Any]] = {
    "svd": (osd_jax.svd(7), osd_torch.svd(7)),
    "online": (
        osd_jax.online_pca(optax.chain(scale_by_adam_of_age(), optax.scale(-0.05))),
        osd_torch.online_pca(Adam(), step_size=0.05),
    ),
    "gaussian": (osd_jax.gaussian(7), None),
}


def start(name: str) -> np.ndarray:
    return np.random.default_rng(len(name)).standard_normal(SHAPES[name])


def gradient(name: str, step: int) -> np.ndarray:
    found = np.random.default_rng([step, ord(name)]).standard_normal(SHAPES[name])
    if step == 4:
        found[:, 2] = found[3] = 0  # a column of M that is zero, on either side
    return found


class Trajectory(NamedTuple):
    weights: dict[str, np.ndarray]  # the last
    bases: dict[str, list[np.ndarray]]  # of each step, by parameter: P that R was taken with


@functools.cache
def trajectories(basis: str) -> dict[str, Trajectory]:
    """Of each lift, in float64."""
    txs = together(LR, weight_decay=DECAY, basis=RULES[basis][0])
    with jax.enable_x64(True):
        params = dict.fromkeys(LIFTS, {name: jnp.asarray(start(name).T) for name in SHAPES})
        states = txs.init(params["muon"])
        used: dict[str, dict[str, list[np.ndarray]]] = {n: {w: [] for w in SHAPES} for n in LIFTS}
        for step in range(STEPS):
            before = {n: osd_jax.projectors(states[n]) for n in LIFTS}
            grads = {name: jnp.asarray(gradient(name, step).T) for name in SHAPES}
            updates, states = txs.update(grads, states, params)
            params = optax.apply_updates(params, updates)
            for n, weights in used.items():
                after = osd_jax.projectors(states[n])
                for w, bases in weights.items():
                    is_moved = basis == "online" and step > 0
                    bases.append(np.asarray(before[n][w] if is_moved else after[w]))
    last = {n: {w: np.asarray(x).T for w, x in params[n].items()} for n in LIFTS}
    return {n: Trajectory(last[n], used[n]) for n in LIFTS}


def written_out(name: str, P: Any, M: Any, D: Any, kept: dict[str, Any]) -> np.ndarray:
    """The direction of W by a lift, from the whole residual, in float64."""
    R = P.T @ M
    kind = name.split(",")[0]
    columns = lambda x: np.linalg.norm(x, axis=0)
    if kind == "residual_sign":
        return 0.25 * P @ D + 0.5 * np.sign(M - P @ R)
    if kind == "muon":
        update = M + P @ (D - R)
        is_wide = name == "muon, float64"
        X = update / np.linalg.norm(update)
        a, b, c = MUON_COEFFICIENTS
        for _ in range(7 if is_wide else 5):
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        return X * kept["factor"][is_wide]
    if kind == "column_ema":
        E = np.sum((M - P @ R) ** 2, axis=0)
        kept["t"] = kept.get("t", 0) + 1
        kept["p"] = 0.9 * kept.get("p", 0) + 0.1 * E
        root = np.maximum(np.sqrt(kept["p"] / (1 - 0.9 ** kept["t"])), 1e-3 * columns(M))
        return P @ D + (M - P @ R) * (0.4 * math.sqrt(P.shape[0] - P.shape[1]) / root)
    k = columns(D) / (columns(R) + 1e-8)
    if kind == "gradient_only":
        if "matrix" in name:
            return math.sqrt(128) * M * (np.linalg.norm(D) / (np.linalg.norm(R) + 1e-8))
        rest, inside, scale = M * k, 0 * M, math.sqrt(2)
    elif name == "norm_ratio, release":
        rest, inside, scale = (M - 0.25 * P @ R) * k, 0.25 * P @ D, 1.0
    else:
        rest, inside, scale = (M - P @ R) * k, P @ D, 1.0 if "free" in name else 0.25
    if "free" not in name:
        norm = float(np.linalg.norm(rest))
        if kept.get("norm", 0) > 0:
            rest = rest / (max(norm / (kept["norm"] + 1e-8), 1.01) / 1.01)
        kept["norm"] = np.linalg.norm(rest)
    return scale * (inside + rest)


# By names algorithm/test_oracle.py has the same steps, of three shapes, for both libraries.
@pytest.mark.slow
@pytest.mark.parametrize("weight", SHAPES)
@pytest.mark.parametrize("basis", RULES)
@pytest.mark.parametrize("name", LIFTS)
def test_twenty_steps_against_the_rule_written_out(name: str, basis: str, weight: str) -> None:
    found, shape, is_muon = trajectories(basis)[name], SHAPES[weight], "muon" in name
    # P is on the shorter side: of a (14, 9) matrix on the input's.
    turned = (lambda x: x.T) if shape[0] > shape[1] else (lambda x: x)
    m: Any = 0.0
    v: Any = 0.0
    expected = start(weight)
    factors = (0.2 * math.sqrt(max(shape)), math.sqrt(max(1, shape[0] / shape[1])))
    kept: dict[str, Any] = {"factor": factors}
    for step, P in enumerate(found.bases[weight]):
        t, M = step + 1, turned(gradient(weight, step))
        R = P.T @ M
        if is_muon:
            m = D = 0.8 * m + R
            expected = expected * (1 - LR * DECAY) - LR * turned(written_out(name, P, M, D, kept))
        else:
            m, v = 0.9 * m + 0.1 * R, 0.99 * v + 0.01 * R**2
            D, rate = m / (np.sqrt(v) + 1e-6), LR * math.sqrt(1 - 0.99**t) / (1 - 0.9**t)
            update = rate * turned(written_out(name, P, M, D, kept))
            expected = (expected - update) * (1 - LR * DECAY)
    atol = 1e-9 * float(np.abs(expected).max())
    np.testing.assert_allclose(found.weights[weight], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("basis", ["svd", "online"])
@pytest.mark.parametrize("name", LIFTS)
def test_both_libraries_take_the_same_steps(name: str, basis: str) -> None:
    params = {w: torch.nn.Parameter(torch.tensor(start(w))) for w in SHAPES}
    options: Any = {"rank": 3, "select": ALL, "basis": RULES[basis][1], "lift": TORCH_LIFTS[name]}
    if "muon" in name:
        optimizer: Any = osd_torch.SubspaceMuon(
            list(params.items()), lr=LR, momentum=0.8, weight_decay=DECAY, **options
        )
    else:
        optimizer = osd_torch.SubspaceAdamW(
            list(params.items()), lr=LR, betas=(0.9, 0.99), weight_decay=DECAY, **options
        )
    for step in range(STEPS):
        for w, param in params.items():
            param.grad = torch.tensor(gradient(w, step))
        optimizer.step()
    for w, param in params.items():
        moved = np.linalg.norm(param.detach().numpy() - start(w))
        error = np.linalg.norm(param.detach().numpy() - trajectories(basis)[name].weights[w])
        assert error <= 1e-9 * moved


PAIRS: dict[str, tuple[Any, Any]] = {
    "muon": (
        functools.partial(
            osd_torch.SubspaceMuon, nesterov=True, momentum=0.8, weight_decay=0.1,
            betas=(0.8, 0.9), eps=1e-6, muon_scale="muon", ns_steps=4,
        ),
        functools.partial(
            osd_jax.osd_muon, nesterov=True, momentum=0.8, weight_decay=0.1,
            b1=0.8, b2=0.9, eps=1e-6, muon_scale="muon", ns_steps=4,
        ),
    ),
    "adamw": (
        functools.partial(osd_torch.SubspaceAdamW, lift=osd_torch.norm_ratio(0.25)),
        functools.partial(osd_jax.osd_adamw, lift=osd_jax.norm_ratio(0.25)),
    ),
    "adafactor": (
        functools.partial(
            osd_torch.SubspaceAdafactor, beta1=0.9, lift=osd_torch.residual_sign(0.5)
        ),
        functools.partial(osd_jax.osd_adafactor, b1=0.9, lift=osd_jax.residual_sign(0.5)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_with_a_schedule_the_rest_of_the_model_agrees_too(case: str) -> None:
    """Unprojected parameters are trained as without a lift; Muon's with their own rate."""
    of_torch, of_jax = PAIRS[case]
    rates = [0.01 * (1 + step) for step in range(6)]
    begin = {"mlp": start("a"), "bias": start("b")[0], "rest": start("b")}
    selected = lambda name, x: name == "mlp"
    params = {n: torch.nn.Parameter(torch.tensor(x)) for n, x in begin.items()}
    full = {"full_lr": 0.5} if case == "muon" else {}
    optimizer = of_torch(
        list(params.items()), lr=0.5, rank=3, select=selected, basis=RULES["online"][1], **full
    )
    with jax.enable_x64(True):
        own = {"full_lr": lambda count: 0.005 * (1 + count)} if full else {}
        tx = of_jax(
            lambda count: 0.01 * (1 + count), rank=3, select=selected, basis=RULES["online"][0],
            **own,
        )  # fmt: skip
        weights = {n: jnp.asarray(x.T) for n, x in begin.items()}
        state, update = tx.init(weights), jax.jit(tx.update)
        for step, rate in enumerate(rates):
            grads = {"mlp": gradient("a", step), "rest": gradient("b", step)}
            grads["bias"] = grads["rest"][1]
            for group in optimizer.param_groups:
                group["lr"] = rate / 2 if full and group["rank"] is None else rate
            for n, param in params.items():
                param.grad = torch.tensor(grads[n])
            optimizer.step()
            turned = {n: jnp.asarray(x.T) for n, x in grads.items()}
            updates, state = update(turned, state, weights)
            weights = optax.apply_updates(weights, updates)
        for n, param in params.items():
            wanted = param.detach().numpy()
            error = np.linalg.norm(np.asarray(weights[n]).T - wanted)
            assert error <= 1e-9 * np.linalg.norm(wanted - begin[n]), n


def test_muon_of_full_rank_is_optaxs() -> None:
    """With P orthonormal and square, whose momentum is then that of the whole gradient."""
    numbers = lambda params: jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(), params)
    theirs = optax.contrib.muon(
        0.02, beta=0.8, nesterov=False, weight_decay=0.1, consistent_rms=0.2,
        muon_weight_dimension_numbers=numbers,
    )  # fmt: skip
    ours = osd_jax.osd_muon(
        0.02, momentum=0.8, weight_decay=0.1, rank=99, basis=osd_jax.svd(100), select=ALL
    )
    ends = []
    with jax.enable_x64(True):
        for tx in (ours, theirs):
            params: Tree = {"a": jnp.asarray(start("a")), "b": jnp.asarray(start("b"))}
            state, update = tx.init(params), jax.jit(tx.update)
            for step in range(5):
                grads = {w: jnp.asarray(gradient(w, step)) for w in SHAPES}
                updates, state = update(grads, state, params)
                params = optax.apply_updates(params, updates)
            ends.append(params)
        # Optax's momentum is a mean, and 1e-8 is added to its norm.
        chex.assert_trees_all_close(*ends, rtol=0, atol=1e-6)


def test_muon_trains_the_rest_by_adamw_at_its_own_rate() -> None:
    """As Optax's AdamW does, with its mask; a projected matrix keeps one moment in the subspace."""
    params: Tree = {"mlp": draw(0)["w"], "norm": draw(1, (12,))["w"], "embed": draw(2)["w"]}
    mask = {"mlp": False, "norm": False, "embed": True}
    ours = osd_jax.osd_muon(
        0.02, rank=3, full_lr=0.005, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1,
        mask=mask, basis=osd_jax.svd(3),
    )  # fmt: skip
    theirs = optax.adamw(0.005, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1, mask=mask)
    plain = osd_jax.osd_muon(0.02, rank=3, basis=osd_jax.svd(3))
    ends = []
    for tx in (ours, theirs, plain):
        weights, state, update = params, tx.init(params), jax.jit(tx.update)
        for step in range(5):
            grads = {"mlp": draw(step)["w"], "norm": draw(step, (12,))["w"], "embed": draw(9)["w"]}
            updates, state = update(grads, state, weights)
            weights = optax.apply_updates(weights, updates)
        ends.append(weights)
    for name in ("norm", "embed"):
        np.testing.assert_allclose(ends[0][name], ends[1][name], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(ends[0]["mlp"], ends[2]["mlp"])  # not in the mask
    (own,) = subspace_states(plain.init(params))
    assert jax.tree.map(jnp.shape, own.inner.trace) == {**own.inner.trace, "mlp": (3, 12)}


# Parts.


def test_energies_come_from_statistics_for_any_p() -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        P = jnp.asarray(rng.standard_normal((2, 12, 4)) / 3)
        M = jnp.asarray(rng.standard_normal((2, 12, 30)))
        seen = lambda P, M: Seen(P, make_sketch(P, M, (COLUMN_ENERGIES,)), M, {})
        for a in (1.0, 0.25):
            wanted = np.sum(np.square(M - a * P @ (P.mT @ M)), axis=-2)
            np.testing.assert_allclose(residual_energies(seen(P, M), a), wanted, rtol=1e-12)
        Q = jnp.linalg.qr(P)[0]
        inside = Q @ jnp.asarray(rng.standard_normal((4, 30)))
        assert np.all(residual_energies(seen(Q, inside)) >= 0)  # no residual, and rounding


def large_products(jaxpr: Any, size: int) -> int:
    """The products in a program that read or write a matrix of the weight's size."""
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            count += any(x.aval.size == size for x in (*eqn.invars, *eqn.outvars))
        for inner in jaxprs_in_params(eqn.params):
            count += large_products(inner, size)
    return count


def products_of_a_step(lift: osd_jax.Lift) -> int:
    tx = osd_jax.scale_by_subspace(
        optax.scale_by_adam(), osd_jax.online_pca(optax.adam(0.01)), rank=4, lift=lift
    )
    params = {"mlp": jnp.ones((30, 40))}
    step = lambda g, s: tx.apply(tx.project(g, s), s, g, grads=g)
    return large_products(jax.make_jaxpr(step)(params, tx.init(params)).jaxpr, 30 * 40)


def test_products_with_the_gradient() -> None:
    """R, A and the lift; `gradient_only` lifts nothing, and `residual_sign` lifts R too."""
    plain = products_of_a_step(osd_jax.scaled())
    assert plain == 3
    for name, lift in LIFTS.items():
        if "muon" not in name:
            more = {"gradient_only": -1, "residual_sign": 1}.get(name.split(",")[0], 0)
            assert products_of_a_step(lift) == plain + more, name


def test_newton_schulz_against_the_polar_factor() -> None:
    """The singular values that its polynomial gives, and the polar factor's vectors."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for shape in ((20, 12), (12, 20), (16, 16), (2, 3, 12, 20)):
            matrix = rng.standard_normal(shape)
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
            values = s / np.linalg.norm(matrix, axis=(-2, -1))[..., None]
            large = values > 2e-3
            a, b, c = MUON_COEFFICIENTS
            for _ in range(5):
                values = a * values + b * values**3 + c * values**5
            found = np.asarray(newton_schulz(jnp.asarray(matrix)))
            np.testing.assert_allclose(found, (u * values[..., None, :]) @ vt, rtol=0, atol=1e-12)
            assert np.all((values[large] > 0.68) & (values[large] < 1.21))
            in_16_bits = newton_schulz(jnp.asarray(matrix, jnp.float32), dtype=jnp.bfloat16)
            assert in_16_bits.dtype == jnp.float32
            assert np.linalg.norm(in_16_bits - found) / np.linalg.norm(found) < 0.03
            tiny = newton_schulz(jnp.asarray(1e-17 * matrix, jnp.float32))
            np.testing.assert_allclose(tiny, found, atol=1e-4)
    for x in (0.0, 1e-25, 1e-30, 1e30):  # the squared norm underflows or overflows
        assert np.all(np.abs(newton_schulz(jnp.full((4, 3), x))) < 1e-2)
    assert not np.any(newton_schulz(jnp.zeros((4, 3))))


def test_a_gaussian_basis_keeps_norms_on_average() -> None:
    tx = osd_jax.scale_by_subspace(
        optax.identity(), osd_jax.gaussian(2), rank=50, side="both",
        dimension_numbers=osd_jax.SubspaceDimensionNumbers(1, 2),
    )  # fmt: skip
    grads, bases = {"w": jnp.ones((2, 60, 80))}, []
    state, refresh = tx.init(grads), jax.jit(tx.refresh)
    for step in range(3):
        state = refresh(grads, state._replace(count=jnp.int32(step)))
        bases.append(osd_jax.projectors(state)["w"])
    for side in ("input", "output"):
        first, same, other = (np.asarray(getattr(P, side)) for P in bases)
        assert np.array_equal(first, same) and not np.any(first == other)
        assert not np.any(first[0] == first[1])
        assert np.mean(first**2) == pytest.approx(1 / 50, rel=0.05)
    assert not np.any(np.asarray(bases[0].input)[0, 0] == np.asarray(bases[0].output)[0, 0])


# Corners.


def draw(seed: int, shape: tuple[int, ...] = (8, 12), dtype: Any = jnp.float32) -> Tree:
    return normal_jax(seed, {"w": shape}, dtype)


def test_zero_gradients_move_nothing_but_by_momentum() -> None:
    txs, params = together(0.1), draw(9)
    zero, g = {"w": jnp.zeros((8, 12))}, draw(0)
    after, states = steps_of(txs, [zero] * 3, params)
    for name in LIFTS:
        np.testing.assert_array_equal(after[name]["w"], params["w"], name)
    moved, states = steps_of(txs, [g], after, states)  # a kept norm of 0 limits nothing
    for name in LIFTS:
        first = np.linalg.norm(moved[name]["w"] - params["w"])
        assert np.isfinite(first) and first > 0.01, name
    after, states = steps_of(txs, [zero] * 2, moved, states)
    assert all(np.all(np.isfinite(after[name]["w"])) for name in LIFTS)
    same, states = steps_of(txs, [{"w": g["w"].at[0, 0].set(jnp.nan)}], after, states)
    for name in LIFTS:
        np.testing.assert_array_equal(same[name]["w"], after[name]["w"], name)
        assert [int(n) for n in osd_jax.skipped_steps(states[name])] == [1, 1]


def test_gradients_and_bases_in_16_bits_are_computed_in_float32() -> None:
    txs = together(0.1, basis_dtype=jnp.bfloat16)
    params = draw(9, dtype=jnp.bfloat16)
    for column in (slice(2, 3), slice(None)):  # a zero column, then all of it
        grads = [{"w": draw(s, dtype=jnp.bfloat16)["w"].at[:, column].set(0)} for s in range(2)]
        after, states = steps_of(txs, [*grads, draw(3, dtype=jnp.bfloat16)], params)
        for name in LIFTS:
            assert after[name]["w"].dtype == jnp.bfloat16
            assert np.all(np.isfinite(np.asarray(after[name]["w"], np.float32))), name
            kept = jax.tree.leaves(norms_of(states[name]))
            assert all(x.dtype == jnp.float32 for x in kept)


def test_derivatives_pass_through_zero_columns() -> None:
    grads = {"w": draw(0)["w"].at[:, 2].set(0)}
    for name, lift in LIFTS.items():
        tx = osd_jax.scale_by_subspace(optax.identity(), osd_jax.svd(3), rank=3, lift=lift)
        state = tx.refresh(grads, tx.init(grads))

        def loss(g: Tree, tx: Any = tx, state: Any = state) -> Any:
            return jnp.sum(tx.apply(tx.project(g, state), state, g, grads=g)[0]["w"] ** 2)

        assert np.all(np.isfinite(jax.grad(loss)(grads)["w"])), name


def test_the_limiter_is_blind_to_the_learning_rate() -> None:
    """A warm-up of the rate does not make the residual grow."""
    norms = []
    for rates in ((0.1,) * 6, (0.001, 0.01, 0.1, 0.1, 0.1, 0.1)):
        tx = osd_jax.osd_adamw(
            functools.partial(jnp.take, jnp.array(rates)),
            rank=3,
            lift=osd_jax.norm_ratio(),
            select=ALL,
            basis=osd_jax.svd(100),
        )
        params = draw(9)
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(6):
            updates, state = update(draw(step), state, params)
            params = optax.apply_updates(params, updates)
        norms.append(float(norms_of(state)["w"]["norm"]))
    assert norms[0] == norms[1] > 0


def test_a_residual_grows_by_one_percent_at_most() -> None:
    """Separately for each matrix of a stack."""
    numbers = osd_jax.SubspaceDimensionNumbers(1, 2)
    tx = osd_jax.osd_adamw(
        0.1, rank=3, lift=osd_jax.gradient_only(), select=ALL, dimension_numbers=numbers
    )
    params, norms = draw(9, (2, 8, 12)), []
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(10):
        g = draw(step, (2, 8, 12))["w"] * jnp.array([10.0**step, 0.1**step])[:, None, None]
        _, state = update({"w": g}, state, params)
        norms.append(np.asarray(norms_of(state)["w"]["norm"]))
    growth = np.array(norms[1:]) / np.array(norms[:-1])
    assert growth[:, 0].max() <= 1.01 + 1e-5 and growth[:, 0].max() > 1.0099
    assert norms[-1][1] < norms[0][1]


# Other ways to step.


def test_a_stack_is_each_matrix_alone() -> None:
    """And so is `jax.vmap`, over whole optimizers."""
    numbers = osd_jax.SubspaceDimensionNumbers(-2, -1)
    txs = together(dimension_numbers=numbers, basis=osd_jax.svd(3))
    with jax.enable_x64(True):
        shape = (2, 8, 12)
        grads, params = [draw(seed, shape, jnp.float64) for seed in range(5)], draw(9, shape)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        stacked, states = steps_of(txs, grads, params)
        mapped = dict.fromkeys(LIFTS, params)
        mapped_states, update = jax.vmap(txs.init)(params), jax.jit(jax.vmap(txs.update))
        for g in grads:
            updates, mapped_states = update(g, mapped_states, mapped)
            mapped = optax.apply_updates(mapped, updates)
        for index in range(2):
            take = lambda tree, index=index: jax.tree.map(lambda x: x[index], tree)
            alone, own = steps_of(txs, [take(g) for g in grads], take(params))
            for name in LIFTS:
                for many in (stacked, mapped):
                    chex.assert_trees_all_close(take(many[name]), alone[name], rtol=1e-9)
                chex.assert_trees_all_close(
                    take(norms_of(states[name])), norms_of(own[name]), rtol=1e-9
                )


@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)], ids=str
)
def test_a_mesh_gives_the_steps_of_one_device(kind: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    shapes = {"both": (8, 16), "one": (24, 16), "odd": (8, 18), "stack": (4, 8, 16)}
    specs = {
        "both": PartitionSpec("x", "y"),
        "one": PartitionSpec(None, ("y", "x")),
        "odd": PartitionSpec("x", "y"),
        "stack": PartitionSpec("x", None, "y"),
    }
    numbers = osd_jax.SubspaceDimensionNumbers(-2, -1)
    pca = osd_jax.online_pca(optax.adam(0.01))
    of_each_kind = ("norm_ratio", "column_ema", "gradient_only", "residual_sign", "muon")
    txs = together(names=of_each_kind, basis=pca, rank=4, dimension_numbers=numbers)
    with jax.enable_x64(True):
        tree = lambda seed: {n: draw(seed, x, jnp.float64)["w"] for n, x in shapes.items()}
        grads = [tree(seed) for seed in range(3)]
        wanted, wanted_states = steps_of(txs, grads, tree(9))
        put = lambda tree: {
            n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in tree.items()
        }
        with jax.set_mesh(mesh):
            found, states = steps_of(txs, [put(g) for g in grads], put(tree(9)))
        for name in of_each_kind:
            chex.assert_trees_all_close(
                *map(jax.device_get, (found[name], wanted[name])), rtol=1e-9
            )
            kept = [jax.device_get(norms_of(x[name])) for x in (states, wanted_states)]
            chex.assert_trees_all_close(*kept, rtol=1e-9)


def test_newton_schulz_on_a_mesh_exchanges_products_of_the_shorter_side() -> None:
    """And the matrix twice: to be split along its longer side alone, and back."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    for shape, spec in (((16, 64), ("x", "y")), ((64, 16), (None, "x")), ((16, 64), (None, "y"))):
        x = jax.device_put(jnp.ones(shape), NamedSharding(mesh, PartitionSpec(*spec)))
        with jax.set_mesh(mesh):
            compiled = jax.jit(newton_schulz).lower(x).compile()
            assert jax.typeof(compiled(x)).sharding.spec == PartitionSpec(*spec)
        found = collectives(compiled.as_text())
        assert {each.op for each in found} <= {"all-reduce", "all-to-all"}, found
        assert sum(each.op == "all-reduce" for each in found) <= 6  # 5 steps and the norm
        assert sum(each.bytes for each in found) <= 5 * 4 * 16**2 + 2 * 4 * 16 * 64


def test_a_run_resumes_bit_for_bit() -> None:
    txs, params = together(0.1), draw(9)  # compiled for zero gradients too
    grads = [draw(seed) for seed in range(6)]
    wanted, _ = steps_of(txs, grads, params)
    half, states = steps_of(txs, grads[:3], params)
    saved = jax.tree.map(np.array, (half, states))
    found, _ = steps_of(txs, grads[3:], *jax.tree.map(jnp.asarray, saved))
    chex.assert_trees_all_equal(found, wanted)
    assert all(np.any(found[name]["w"] != half[name]["w"]) for name in LIFTS)


@pytest.mark.parametrize("name", ["norm_ratio", "column_ema"])
def test_a_run_with_moments_in_8_bits_resumes_bit_for_bit(name: str) -> None:
    tx = osd_jax.osd_adamw8bit(0.01, rank=16, lift=LIFTS[name], select=ALL, basis=osd_jax.svd(3))
    params = draw(9, (64, 256))
    state, update, ends = tx.init(params), jax.jit(tx.update), []
    assert any(x.dtype == jnp.uint8 for x in jax.tree.leaves(state))
    for step in range(6):
        updates, state = update(draw(step, (64, 256)), state, params)
        params = optax.apply_updates(params, updates)
        if step == 2:
            saved = jax.tree.map(np.array, (params, state))
    ends.append(params)
    params, state = jax.tree.map(jnp.asarray, saved)
    for step in range(3, 6):
        updates, state = update(draw(step, (64, 256)), state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(params, *ends)


def test_numbers_of_muon_in_the_state_by_inject_hyperparams() -> None:
    options = {"rank": 3, "select": ALL, "momentum": 0.8, "weight_decay": 0.1}
    plain = osd_jax.osd_muon(0.02, **options)
    injected = optax.inject_hyperparams(osd_jax.osd_muon, static_args=MUON_STATIC_ARGUMENTS)(
        0.02, **options
    )
    params, ends = draw(9), []
    for tx in (plain, injected):
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(3):
            updates, state = update(draw(step), state, params)
        ends.append(updates)
    assert set(state.hyperparams) >= {"learning_rate", "momentum", "weight_decay", "b1", "eps"}
    chex.assert_trees_all_close(*ends, rtol=1e-4)


def test_moments_of_muon_follow_the_basis() -> None:
    """With one P after the other of full rank, what is lifted does not change."""
    ends = []
    for basis in (osd_jax.svd(1), osd_jax.svd(100)):
        tx = osd_jax.osd_muon(0.02, rank=99, select=ALL, basis=basis, transport_moments=True)
        params = draw(9)
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(4):
            updates, state = update(draw(step), state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    chex.assert_trees_all_close(*ends, atol=1e-4)


@pytest.mark.parametrize("name", ["norm_ratio", "gradient_only, matrix", "residual_sign", "muon"])
def test_where_gradients_are_gone_they_are_refused(name: str) -> None:
    tx = llama_toy(osd_jax.online_pca(optax.adam(0.01)), LIFTS[name])
    assert_sketches_are_refused(tx, "adds a part of the gradient itself.*plain lift")


@pytest.mark.parametrize("name", LIFTS)
def test_on_both_sides(name: str) -> None:
    make = lambda: osd_jax.osd_adamw(
        0.1, rank=3, lift=LIFTS[name], select=ALL, side="both", basis=osd_jax.svd(5)
    )
    if name in ONE_SIDED:
        kind = name.split(",")[0]
        with pytest.raises(ValueError, match=rf"side is 'both'.*{kind}\(.*reads one basis"):
            make()
        return
    tx = make()
    updates, _ = tx.update(draw(0), tx.init(draw(0)), draw(0))
    assert np.all(np.isfinite(updates["w"])) and np.any(updates["w"])


@pytest.mark.parametrize("name", [pytest.param("column_ema", marks=pytest.mark.slow), "muon"])
def test_a_layer_at_a_time_with_one_micro_batch(name: str) -> None:
    """A whole optimizer, with a lift that has a state and with Muon's two rates."""
    from osd_jax import llama

    options = {
        "rank": 4, "select": is_one_of_its_shape, "dimension_numbers": llama.dimension_numbers,
        "basis": osd_jax.online_pca(optax.adam(0.01), init="qr"),
    }  # fmt: skip
    tx = (
        osd_jax.osd_muon(1e-3, full_lr=3e-3, **options)
        if name == "muon"
        else osd_jax.osd_adamw(1e-3, lift=LIFTS[name], **options)
    )
    with jax.enable_x64(True):
        steps = (make_train_step(CONFIG, tx), make_layerwise_train_step(CONFIG, tx))
        ends = [llama_run(step, tx, 1, dtype=jnp.float64)[1] for step in steps]
    chex.assert_trees_all_close(*ends, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: osd_jax.norm_ratio(-1.0), "scale is -1.0: expected a number of at least 0"),
        (lambda: osd_jax.column_ema(decay=1.0), r"decay is 1.0: expected a number in \[0, 1\)"),
        (lambda: osd_jax.gradient_only(per="row"), "per is 'row': expected column or matrix"),
        (lambda: osd_jax.residual_sign(math.nan), "weight is nan"),
        (lambda: osd_jax.gaussian(0), "the period of P is 0: expected a whole number"),
        (
            lambda: osd_jax.osd_muon(0.1, rank=2, muon_scale="big"),
            "muon_scale is 'big': expected one of adamw, muon, none",
        ),
        (
            lambda: osd_jax.osd_muon(0.1, rank=2, nesterov="yes"),  # type: ignore[arg-type]
            "nesterov is 'yes': expected True or False",
        ),
        (
            lambda: osd_jax.osd_muon(0.1, rank=2, nesterov=True, momentum=0.0),
            "a momentum of 0 keeps no moment",
        ),
        (
            lambda: osd_jax.osd_muon(0.1, rank=2, ns_steps=0),
            "steps is 0: expected a whole number",
        ),
        (
            lambda: osd_jax.osd_muon(0.1, rank=2, ns_coefficients=(1.0, 2.0)),  # type: ignore
            "coefficients are .*: expected three numbers",
        ),
        (
            lambda: osd_jax.osd_muon(0.1, rank=2, ns_dtype=jnp.float16),
            "ns_dtype is .*float16.*: expected None, float32",
        ),
        (
            lambda: osd_jax.osd_muon(0.1, rank=2, lift=osd_jax.add_gradient(), ns_steps=7),
            "lift is given, so ns_steps",
        ),
        (lambda: osd_jax.osd_muon(0.1, rank=2, momentum=1.0), "momentum is 1.0: expected a number"),
        (
            lambda: osd_jax.osd_muon(0.1, rank=2, full_lr=-1.0),
            "full_lr is -1.0",
        ),
    ],
)
def test_what_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
