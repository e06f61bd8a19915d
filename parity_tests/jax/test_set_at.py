"""When P is set: a zero gradient does not set P, and the next nonzero gradient does.

Energy is the fraction of the next gradient that P's columns span. Here gradients have rank 3 on
both sides plus noise, so a P set by one of them captures nearly all of the others.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import osd_jax
from osd_jax.diagnostics import subspace_states
from osd_jax.sharding import make_mesh, state_sharding

EXPERTS, P_SIZE, Q_SIZE, RANK = 3, 16, 24, 4
GAP = 10
STACKED = osd_jax.SubspaceDimensionNumbers(1, 2)
Tree = Any


def gradients(steps: int, zero: dict[int, Any], experts: int = 0) -> list[np.ndarray]:
    """Of one matrix, or a stack of `experts`; `zero`: step -> which of them have none."""
    rng = np.random.default_rng(0)
    shape = (experts,) if experts else ()
    columns = lambda size: np.linalg.qr(rng.standard_normal((*shape, size, 3)))[0]
    left, right = columns(P_SIZE), columns(Q_SIZE)
    found = []
    for step in range(steps):
        clean = left @ columns(3) @ right.mT
        noise = 0.002 * rng.standard_normal(clean.shape)
        grads = (clean + noise).astype(np.float32)
        if step in zero:
            grads[zero[step]] = 0
        found.append(grads)
    return found


def optimizer(proj_type: str, experts: int = 0, **more: Any) -> Any:
    options: dict[str, Any] = {"learning_rate": 1e-2, "rank": RANK, "update_proj_gap": GAP}
    if proj_type.startswith("continuous"):
        options["update_proj_gap"] = 200
    if experts:
        options["dimension_numbers"] = STACKED
    options |= more
    return osd_jax.make_optimizer(options.pop("optimizer", "galore_adamw"), proj_type, **options)


def set_at(state: Tree) -> list[int]:
    (own,) = subspace_states(state)
    (at,) = jax.tree.leaves(own.projector.set_at)
    assert at.dtype == jnp.int32
    return np.ravel(at).tolist()


def basis_of(state: Tree) -> Any:
    return osd_jax.projectors(state)["mlp"]


def energy(basis: Any, gradient: np.ndarray) -> np.ndarray:
    """The part of each gradient (..., p, q) that P spans; two-sided: in both. 0 for a P of 0."""
    both = isinstance(basis, osd_jax.TwoSided)
    if both:
        sides = [basis.input, basis.output]
    else:
        sides = [basis, None] if basis.shape[-2] == gradient.shape[-2] else [None, basis]
    found = gradient
    for side in sides:
        if side is not None:
            span = np.linalg.qr(side)[0] * np.any(side, axis=(-2, -1), keepdims=True)
            found = span.mT @ found
        found = found.mT
    norm = np.sum(gradient**2, axis=(-2, -1))
    return np.ravel(np.sum(found**2, axis=(-2, -1)) / np.where(norm > 0, norm, np.inf))


@dataclasses.dataclass
class Run:
    """Of each step: the energy that P captures before it, and P, the updates and `set_at` after."""

    energies: np.ndarray  # (steps, experts or 1)
    bases: list[Any]
    updates: list[np.ndarray]
    set_at: list[list[int]]
    state: Tree


def run(tx: Any, grads: Sequence[np.ndarray], state: Tree = None) -> Run:
    params = {"mlp": jnp.zeros(grads[0].shape)}
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    found = Run(np.zeros(0), [], [], [], state)
    energies = []
    for g in grads:
        energies.append(energy(jax.tree.map(np.asarray, basis_of(found.state)), g))
        updates, found.state = update({"mlp": jnp.asarray(g)}, found.state, params)
        found.bases.append(jax.tree.map(np.asarray, basis_of(found.state)))
        found.updates.append(np.asarray(updates["mlp"]))
        found.set_at.append(set_at(found.state))
    found.energies = np.array(energies)
    return found


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("std", {}),
    ("reverse_std", {}),
    ("full", {}),
    ("continuous", {}),
    ("continuous", {"projector_init": "qr"}),
    ("continuous", {"move_projector": "before"}),
    ("continuous", {"update_proj_every": 3}),
    ("continuous_sgd", {}),
    ("continuous_adafactor", {}),
]
name_of = lambda way: "-".join([way[0], *map(str, way[1].values())])


# -------------------------------------------------------------------- what a zero gradient costs


@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_zero_first_gradients_cost_no_energy(way: tuple[str, dict[str, Any]]) -> None:
    proj_type, more = way
    tx = optimizer(proj_type, **more)
    late = run(tx, gradients(20, {0: ..., 1: ...}))
    never = run(tx, gradients(20, {}))
    assert late.set_at[:3] == [[-1], [-1], [2]]
    assert not np.any(late.updates[:2])
    assert all(not np.any(x) for x in jax.tree.leaves(late.bases[1]))
    np.testing.assert_allclose(late.energies[3:], never.energies[3:], rtol=0.01)


def test_zero_first_gradients_only_put_random_off() -> None:
    late = run(optimizer("random"), gradients(GAP + 2, {0: ...}))
    assert late.set_at == [[-1]] + [[1]] * (GAP - 1) + [[GAP]] * 2
    identity = np.eye(RANK)
    for basis in late.bases[1:]:
        np.testing.assert_allclose(basis.T @ basis, identity, atol=1e-5)


@pytest.mark.parametrize("way", WAYS[:1] + WAYS[3:8], ids=name_of)
def test_an_expert_without_tokens_at_first_loses_no_energy(way: tuple[str, dict[str, Any]]) -> None:
    proj_type, more = way
    tx = optimizer(proj_type, EXPERTS, **more)
    late = run(tx, gradients(20, dict.fromkeys(range(3), 1), EXPERTS))
    never = run(tx, gradients(20, {}, EXPERTS))
    assert late.set_at[2:4] == [[0, -1, 0], [0, 3, 0]] or proj_type == "std"
    np.testing.assert_allclose(late.energies[4:], never.energies[4:], rtol=0.01)
    others = [0, 2]
    for one, other in zip(late.bases, never.bases, strict=True):
        np.testing.assert_allclose(one[others], other[others], atol=1e-6)


@pytest.mark.parametrize("experts", [0, EXPERTS])
@pytest.mark.parametrize("proj_type", ["std", "full", "random"])
def test_a_zero_gradient_at_a_refresh_leaves_the_basis(proj_type: str, experts: int) -> None:
    which = 1 if experts else ...
    late = run(optimizer(proj_type, experts), gradients(18, {GAP: which}, experts))
    taken = lambda tree: [x[which] for x in jax.tree.leaves(tree)]
    before, at, after = (taken(late.bases[step]) for step in (GAP - 1, GAP, GAP + 1))
    for one, two, three in zip(before, at, after, strict=True):
        assert one.tobytes() == two.tobytes() != three.tobytes()
    waiting, then = ([-1], [GAP + 1]) if not experts else ([GAP, -1, GAP], [GAP, GAP + 1, GAP])
    assert late.set_at[GAP : GAP + 3] == [waiting, then, then]
    if proj_type != "random":
        never = run(optimizer(proj_type, experts), gradients(18, {}, experts))
        np.testing.assert_allclose(late.energies[GAP + 2 :], never.energies[GAP + 2 :], rtol=0.01)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the energy of such a gradient
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, 1e-30], ids=str)
def test_a_gradient_without_a_finite_norm_sets_no_basis(bad: float) -> None:
    """Neither does one whose squared norm under- or overflows; other matrices are set."""
    tx = osd_jax.scale_by_subspace(
        optax.identity(), osd_jax.svd(GAP), rank=RANK, dimension_numbers=STACKED
    )
    grads = gradients(3, {}, EXPERTS)
    grads[0][1] = bad if not np.isfinite(bad) else bad * grads[0][1]
    found = run(tx, grads)
    assert found.set_at == [[0, -1, 0], [0, 1, 0], [0, 1, 0]]
    assert not np.any(found.bases[0][1])


# ------------------------------------------------------------------------- the step that sets P


@pytest.mark.parametrize("move_projector", ["after", "before"])
@pytest.mark.parametrize("proj_type", ["continuous", "continuous_sgd", "continuous_lion"])
def test_the_step_that_sets_a_basis_does_not_move_it(proj_type: str, move_projector: str) -> None:
    """Weight decay does not change it either: it equals the gradient's SVD, bit for bit."""
    more = {"projector_weight_decay": 0.5, "penalty": 0.1, "move_projector": move_projector}
    grads = gradients(5, dict.fromkeys(range(3), 1), EXPERTS)
    found = run(optimizer(proj_type, EXPERTS, **more), grads)
    by_svd = run(optimizer("std", EXPERTS), grads)
    assert not np.any([basis[1] for basis in found.bases[:3]])
    assert found.bases[3][1].tobytes() == by_svd.bases[3][1].tobytes()
    assert found.bases[0].tobytes() == by_svd.bases[0].tobytes()
    assert found.bases[4][1].tobytes() != found.bases[3][1].tobytes()
    assert all(np.any(found.bases[i][0] != found.bases[i + 1][0]) for i in range(4))


def test_a_tree_that_waits_is_a_tree_that_starts_later() -> None:
    """Adam's count for P, which corrects its moments' bias, begins when a P moves."""
    grads = gradients(12, dict.fromkeys(range(4), ...))
    waited, later = (run(optimizer("continuous"), g) for g in (grads, grads[4:]))
    for one, other in zip(waited.bases[4:], later.bases, strict=True):
        assert one.tobytes() == other.tobytes()


# -------------------------------------------------------------------------- other ways to step


@pytest.mark.parametrize("way", [*WAYS[:3], WAYS[4], WAYS[7]], ids=name_of)
def test_accumulation_sets_a_basis_from_the_first_part_with_a_direction(
    way: tuple[str, dict[str, Any]],
) -> None:
    proj_type, more = way
    tx = osd_jax.accumulate_sketches(optimizer(proj_type, **more), every_k=3)
    late = run(tx, gradients(18, {0: ...}))
    never = run(tx, gradients(18, {}))
    assert late.set_at[:4] == [[-1], [0], [0], [0]]
    np.testing.assert_allclose(late.energies[2:], never.energies[2:], rtol=0.01)
    assert np.any(late.updates[2])
    # An update of zeros only: the next update's first part sets it.
    late = run(tx, gradients(18, dict.fromkeys(range(3), ...)))
    assert late.set_at[:4] == [[-1], [-1], [-1], [1]]
    np.testing.assert_allclose(late.energies[4:], never.energies[4:], rtol=0.01)


@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize("proj_type", ["std", "continuous"])
def test_a_run_resumed_while_a_basis_waits_goes_on_bit_for_bit(proj_type: str, stop: int) -> None:
    tx = optimizer(proj_type, EXPERTS)
    grads = gradients(8, dict.fromkeys(range(4), 1), EXPERTS)
    whole, first = run(tx, grads), run(tx, grads[:stop])
    leaves, structure = jax.tree.flatten(first.state)
    saved = [np.array(x) for x in leaves]
    rest = run(tx, grads[stop:], jax.tree.unflatten(structure, map(jnp.asarray, saved)))
    for one, other in zip(jax.tree.leaves(rest.state), jax.tree.leaves(whole.state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("proj_type", ["std", "continuous"])
def test_vmap_sets_each_basis_in_its_own_time(proj_type: str) -> None:
    tx = optimizer(proj_type)
    runs = [gradients(6, {}), gradients(6, {0: ..., 1: ...})]
    alone = [run(tx, grads) for grads in runs]
    params = {"mlp": jnp.zeros((2, P_SIZE, Q_SIZE))}
    state, update = jax.vmap(tx.init)(params), jax.jit(jax.vmap(tx.update))
    for step in range(6):
        grads = {"mlp": jnp.stack([one[step] for one in runs])}
        state = update(grads, state, params)[1]
        assert set_at(state) == [one.set_at[step][0] for one in alone]
        for ours, one in zip(np.asarray(basis_of(state)), alone, strict=True):
            np.testing.assert_allclose(ours, one.bases[step], atol=1e-5)


def test_a_mesh_sets_the_bases_of_one_device() -> None:
    """Sharded over experts and rows, with Explicit and with Auto axes."""
    grads = gradients(4, {0: 1, 1: 1}, experts=4)
    tx = optimizer("continuous_sgd", experts=4)
    wanted = run(tx, grads)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2, 2), ("expert", "row"), axis_types=(kind,) * 2)
        split = NamedSharding(mesh, PartitionSpec("expert", "row", None))
        with jax.set_mesh(mesh):
            params = {"mlp": jax.device_put(jnp.zeros(grads[0].shape), split)}
            state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
            for step, g in enumerate(grads):
                put = {"mlp": jax.device_put(jnp.asarray(g), split)}
                state = update(put, state, params)[1]
                assert set_at(state) == wanted.set_at[step]
                np.testing.assert_allclose(basis_of(state), wanted.bases[step], atol=1e-5)


def test_set_at_is_split_as_its_experts_are() -> None:
    mesh = make_mesh(fsdp=8)
    params = {"mlp": jax.ShapeDtypeStruct((8, P_SIZE, Q_SIZE), jnp.float32)}
    tx = optimizer("continuous", 8)
    layout = state_sharding(tx, params, {"mlp": PartitionSpec("fsdp", None, None)}, mesh)
    (own,) = subspace_states(layout)
    assert own.projector.set_at["mlp"].spec == PartitionSpec("fsdp")


def test_devices_agree_on_who_has_a_direction() -> None:
    """It is the mean's: parts without one do not stop it, and parts that cancel have none."""
    tx = osd_jax.scale_by_subspace(
        optax.identity(), osd_jax.online_pca(optax.sgd(0.1)), rank=RANK, dimension_numbers=STACKED
    )
    g = gradients(1, {}, EXPERTS)[0]
    parts = np.stack([g, g])
    parts[0, 0], parts[1, 1] = 0, -g[1]  # the first on one device only; the second cancels
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    mean = functools.partial(jax.lax.pmean, axis_name="data")
    spec = PartitionSpec
    reduced = jax.shard_map(
        lambda grads, state: tx.refresh({"mlp": grads[0]}, state, reduce=mean),
        mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec(),
    )  # fmt: skip
    state = jax.jit(reduced)(parts, tx.init({"mlp": g}))
    assert set_at(state) == [0, -1, 0]
    expected = tx.refresh({"mlp": jnp.asarray(parts.mean(0))}, tx.init({"mlp": g}))
    np.testing.assert_allclose(basis_of(state), basis_of(expected), atol=1e-6)


# ------------------------------------------------------------------------------ what waiting costs


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each SVD of a gradient that runs."""
    ran: list[int] = []
    module = importlib.import_module("osd_jax.bases")
    real: Callable[..., Any] = module._signed_svd

    def counted(matrix: jax.Array) -> Any:
        jax.debug.callback(lambda: ran.append(1))
        return real(matrix)

    monkeypatch.setattr(module, "_signed_svd", counted)
    return ran


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("proj_type", ["std", "continuous"])
def test_an_svd_runs_for_a_matrix_that_waits_and_has_a_direction_only(
    proj_type: str, batched: bool, decompositions: list[int]
) -> None:
    tx = optimizer(proj_type, EXPERTS)
    grads = gradients(6, dict.fromkeys(range(4), 1), EXPERTS)
    params = {"mlp": jnp.zeros(grads[0].shape)}
    init, update = tx.init, tx.update
    if batched:
        params, grads = jax.tree.map(lambda x: x[None], params), [g[None] for g in grads]
        init, update = jax.vmap(init), jax.vmap(update)
    state, update, ran = init(params), jax.jit(update), []
    for g in grads:
        state = update({"mlp": g}, state, params)[1]
        jax.block_until_ready(state)
        jax.effects_barrier()
        ran.append(len(decompositions))
        decompositions.clear()
    if batched:  # `vmap` runs all of a stack where it runs one
        assert [n > 0 for n in ran] == [True, False, False, False, True, False]
    else:
        assert ran == [EXPERTS - 1, 0, 0, 0, 1, 0]
