"""Any pytree that Optax accepts gives the numbers of the plain dict of the same arrays."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import NamedSharding, PartitionSpec

import osd_jax
import osd_names
from osd_jax import SubspaceDimensionNumbers, diagnostics, layout, quantization, rules, trees
from osd_jax.sharding import make_mesh, state_sharding
from parity_tests.support.arrays import normal_jax

Tree = Any


@pytest.fixture(scope="module", autouse=True)
def compile_once() -> Iterator[None]:
    """Trees of the same leaves compile to the same program, which the cache then has."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)


# ------------------------------------------------------------------------------- kinds of trees


@flax.struct.dataclass
class StructLayer:
    down: Any
    up: Any


@flax.struct.dataclass
class StructModel:
    mlp: Any
    norm: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    down: Any
    up: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    mlp: Any
    norm: Any


class TupleLayer(NamedTuple):
    down: Any
    up: Any


class TupleModel(NamedTuple):
    mlp: Any
    norm: Any


class Module:
    """A module in the way of Equinox: its attributes are its children."""

    def __init__(self, **children: Any) -> None:
        self.__dict__.update(children)


def _module(keys: tuple[str, ...], children: Any) -> Module:
    return Module(**dict(zip(keys, children, strict=True)))


jax.tree_util.register_pytree_with_keys(
    Module,
    lambda m: ([(jax.tree_util.GetAttrKey(k), x) for k, x in vars(m).items()], tuple(vars(m))),
    _module,
)


class Opaque:
    """A container that gives its children no keys."""

    def __init__(self, *children: Any) -> None:
        self.children = children


jax.tree_util.register_pytree_node(
    Opaque, lambda node: (node.children, None), lambda _, children: Opaque(*children)
)


class NnxModule(nnx.Module):
    def __init__(self, **children: Any) -> None:
        for name, child in children.items():
            setattr(self, name, child)


partitioned = lambda x: nn.Partitioned(x, names=(None,) * x.ndim)
boxed = functools.partial(jax.tree.map, nnx.Param)
KINDS: dict[str, Callable[[Tree], Tree]] = {
    "dict": lambda t: t,
    "nnx.State": lambda t: nnx.State(boxed(t)),
    "nnx.State without boxes": lambda t: nnx.State(t),
    "nnx.Module": lambda t: NnxModule(mlp=NnxModule(**boxed(t["mlp"])), norm=boxed(t["norm"])),
    "nnx.Param in a dict": boxed,
    "nn.Partitioned": functools.partial(jax.tree.map, partitioned),
    "boxes in boxes": lambda t: boxed(jax.tree.map(partitioned, t)),
    "FrozenDict": FrozenDict,
    "flax.struct": lambda t: StructModel(StructLayer(**t["mlp"]), t["norm"]),
    "dataclass": lambda t: Model(Layer(**t["mlp"]), t["norm"]),
    "NamedTuple": lambda t: TupleModel(TupleLayer(**t["mlp"]), t["norm"]),
    "tuple": lambda t: ((t["mlp"]["down"], t["mlp"]["up"]), t["norm"]),
    "list": lambda t: [[t["mlp"]["down"], t["mlp"]["up"]], t["norm"]],
    "module": lambda t: Module(mlp=Module(**t["mlp"]), norm=t["norm"]),
    "no keys": lambda t: Opaque(Opaque(t["mlp"]["down"], t["mlp"]["up"]), t["norm"]),
    "None": lambda t: {**t, "attn": None, "mlp": {**t["mlp"], "frozen": None}},
    "MaskedNode": lambda t: {**t, "attn": optax.MaskedNode()},
}


def draw(seed: int) -> Tree:
    return normal_jax(seed, {"mlp": {"down": (96, 64), "up": (64, 96)}, "norm": (8,)})


def is_matrix(path: str, x: Any) -> bool:
    assert not isinstance(x, (optax.MaskedNode, nnx.Variable, nn.Partitioned))
    assert x.dtype == jnp.float32 and len(x.shape) == x.ndim
    assert not path.endswith("value")  # a box is no part of a name
    return x.ndim == 2


def make(optimizer: str = "galore_adamw", proj_type: str = "continuous", **options: Any) -> Any:
    rank = 64 if "8bit" in optimizer else 4
    options = {"select": is_matrix, "rank": rank, "weight_decay": 0.1, **options}
    return osd_jax.make_optimizer(
        optimizer, proj_type, learning_rate=0.1, update_proj_gap=2, **options
    )


def bare(**options: Any) -> Any:
    pca = osd_jax.online_pca(optax.adam(0.01))
    return osd_jax.scale_by_subspace(optax.scale_by_adam(), pca, rank=4, **options)


matrices = lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)
kinds_of_array = lambda tree: jax.tree.map(lambda x: "matrix" if x.ndim == 2 else "vector", tree)
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "continuous": make,
    "both sides": lambda: make(proj_type="full"),
    "moved before": lambda: make(move_projector="before", update_proj_every=2),
    "adafactor": lambda: make("galore_adafactor", "continuous_adafactor", beta1=0.9),
    "8 bits": lambda: make("galore_adamw8bit", "continuous_adam8bit"),
    "8 bits in slices": lambda: make("adam8bit", "std", slice_size=4096, select=None, rank=128),
    "accumulated": lambda: osd_jax.accumulate_sketches(make(), 2),
    "accumulated and masked": lambda: optax.masked(
        osd_jax.accumulate_sketches(bare(), 2), matrices
    ),
    "subspace": lambda: optax.masked(bare(), matrices),
    "partition": lambda: optax.partition(
        {"matrix": make(), "vector": optax.adam(0.1)}, kinds_of_array
    ),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), make()),
    "quantize_state": lambda: osd_jax.quantize_state(optax.adam(0.1)),
    "slice_by_slice": lambda: quantization.slice_by_slice(
        osd_jax.quantize_state(optax.scale_by_adam()), 4096
    ),
    "on_matrices": lambda: rules.on_matrices(rules.scale_by_adafactor(lambda count: 0.1)),
}
STEPS = 3


def leaves(tree: Tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def run(tx: Any, convert: Callable[[Tree], Tree]) -> tuple[list[list[np.ndarray]], Tree]:
    """The leaves of each step's updates, all compiled, and the last state."""
    params = convert(draw(0))
    state, update, found = jax.jit(tx.init)(params), jax.jit(tx.update), []
    for seed in range(1, STEPS + 1):
        before = jax.tree.structure(state)
        updates, state = update(convert(draw(seed)), state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.structure(state) == before
        optax.apply_updates(params, updates)
        found.append(leaves(updates))
    return found, state


@functools.cache
def of_dict(name: str) -> tuple[list[list[np.ndarray]], list[tuple[int, ...]]]:
    found, state = run(OPTIMIZERS[name](), KINDS["dict"])
    return found, [x.shape for x in jax.tree.leaves(osd_jax.projectors(state))]


# Every kind with one transformation and every transformation with one kind; the rest is slow.
EVERYWHERE = {"continuous", "nnx.State"}
TREES = [
    pytest.param(name, kind, marks=() if EVERYWHERE & {name, kind} else pytest.mark.slow)
    for name in OPTIMIZERS
    for kind in KINDS
    if kind != "dict"
]


@pytest.mark.parametrize(("name", "kind"), TREES)
def test_any_tree_has_the_numbers_of_a_dict(name: str, kind: str) -> None:
    expected, shapes = of_dict(name)
    found, state = run(OPTIMIZERS[name](), KINDS[kind])
    for actual, wanted in zip(found, expected, strict=True):
        for a, b in zip(actual, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert [x.shape for x in jax.tree.leaves(osd_jax.projectors(state))] == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_diagnostics_and_sharding_of_any_tree(kind: str) -> None:
    params, grads = KINDS[kind](draw(0)), KINDS[kind](draw(1))
    tx = make()
    at_first = tx.init(params)
    _, state = tx.update(grads, at_first, params)
    found = osd_jax.diagnostics.subspace_diagnostics(grads, state)
    assert found.keys() == osd_jax.projectors(state).keys() and len(found) == 2
    assert all(0 < one.energy < 1 and one.orthonormality < 1e-5 for one in found.values())
    assert int(osd_jax.skipped_steps(state)[0]) == 0
    mesh = make_mesh(fsdp=-1)
    specs = jax.tree.map(
        lambda x: PartitionSpec("fsdp") if x.ndim == 2 else PartitionSpec(), params
    )
    for given in (specs, trees.unboxed(specs)):
        layout = state_sharding(tx, params, given, mesh, share_over=())
        assert jax.tree.structure(layout) == jax.tree.structure(at_first)
        spread = {x.spec for x in osd_jax.projectors(layout).values()}
        assert spread == {PartitionSpec("fsdp", None), PartitionSpec(None, None)}


# ------------------------------------------------------------------------------------ flax.nnx


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attn = nnx.Linear(64, 96, rngs=rngs)
        self.head = nnx.Linear(96, 64, rngs=rngs)


def network_grads(model: Network, seed: int) -> nnx.State:
    """In boxes, as `nnx.grad` gives them."""
    rng = np.random.default_rng(seed)
    one = lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    return jax.tree.map(one, nnx.state(model, nnx.Param))


# By default one of each structure of state.
WITH_NNX = ("continuous", "both sides", "8 bits", "accumulated", "partition", "multi_steps")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in WITH_NNX))
        for name in [*OPTIMIZERS, "multi_steps"]
    ],
)
def test_nnx_optimizer_takes_the_steps_of_a_dict(name: str) -> None:
    """It hands boxes to `init` and bare arrays to `update`."""
    if name == "multi_steps":
        tx: Any = optax.MultiSteps(make(), 2).gradient_transformation()
    else:
        tx = OPTIMIZERS[name]()
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)

    @nnx.jit
    def step(model: Network, optimizer: nnx.Optimizer, grads: nnx.State) -> None:
        optimizer.update(model, grads)

    for seed in range(STEPS):
        grads = network_grads(model, seed)
        step(model, optimizer, grads)
        updates, state = update(nnx.to_pure_dict(grads), state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(leaves(nnx.state(model, nnx.Param)), leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    bases = osd_jax.projectors(optimizer.opt_state)
    assert jax.tree.map(jnp.shape, bases) == jax.tree.map(jnp.shape, osd_jax.projectors(state))


def test_select_meets_the_same_names_under_nnx_at_init_and_update() -> None:
    met: list[str] = []

    def select(path: str, x: Any) -> bool:
        met.append(path)
        return is_matrix(path, x)

    model = Network(nnx.Rngs(0))
    tx = make(select=select)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    at_init = set(met)
    met.clear()
    optimizer.update(model, network_grads(model, 0))
    assert set(met) == at_init == {"attn/bias", "attn/kernel", "head/bias", "head/kernel"}
    total, in_a_row = osd_jax.skipped_steps(optimizer.opt_state)
    assert (int(total), int(in_a_row)) == (0, 0) and isinstance(total, jax.Array)


# ----------------------------------------------------------------------- paths that read alike

x, y = (jax.random.normal(jax.random.key(i), (6, 8)) for i in range(2))
ALIKE = {
    "a slash": {"mlp": {"a/b": x}, "mlp/a": {"b": y}},
    # A dict sorts its keys, which these cannot be.
    "a number and its text": collections.OrderedDict([(1, x), ("1", y)]),
}


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("proj_type", ["std", "continuous", "random"])
@pytest.mark.parametrize("entry", ["update", "accumulated"])
def test_paths_that_read_alike_are_two(entry: str, proj_type: str, kind: str) -> None:
    def end(params: Tree) -> tuple[Tree, Tree]:
        tx = make(proj_type=proj_type)
        tx = osd_jax.accumulate_sketches(tx, 1) if entry == "accumulated" else tx
        state = jax.jit(tx.init)(params)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(params, state, params)
        return updates, state

    updates, state = end(ALIKE[kind])
    bases = osd_jax.projectors(state)
    read = {"a slash": ["['mlp']['a/b']", "['mlp/a']['b']"]}.get(kind, ["[1]", "['1']"])
    assert list(bases) == read
    first, second = bases.values()
    assert np.abs(first - second).max() > 0.1  # found, or drawn, apart
    if proj_type != "random":
        for a, b in zip(leaves(updates), leaves(end([x, y])[0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_only_some_of_the_paths_that_read_alike_may_be_projected() -> None:
    """One is a matrix, the other a vector: who takes part goes by the path, not by its text."""
    params = {"mlp": {"a/b": y[0]}, "mlp/a": {"b": x}}
    tx = make()
    state = tx.init(params)
    sketches = tx.project(params, tx.refresh(params, state))
    assert isinstance(sketches["mlp/a"]["b"], osd_jax.Sketch)
    assert sketches["mlp"]["a/b"].shape == (8,)
    assert list(osd_jax.projectors(state)) == ["mlp/a/b"]
    found = diagnostics.subspace_diagnostics(params, tx.refresh(params, state))
    assert found["mlp/a/b"].energy > 0.5


def test_dimension_numbers_go_by_keys_and_then_by_text() -> None:
    first, second = SubspaceDimensionNumbers(0, 1), SubspaceDimensionNumbers(1, 0)
    params = {"mlp/a": {"b": x}, "mlp": {"a/b": y}}
    numbers = {"mlp/a": {"b": first}, "mlp": {"a/b": second}}
    lookup = layout.dimension_numbers_by_path(numbers, params)
    paths = [path for path, _ in trees.flatten(params)]
    assert [lookup(path) for path in paths] == [second, first]
    # A dict for a list: the keys are texts of numbers, and no two of them read alike.
    lookup = layout.dimension_numbers_by_path({"0": first, "1": second}, [x, y])
    assert [lookup(path) for path, _ in trees.flatten([x, y])] == [first, second]
    # Of these two no key says which is meant.
    lookup = layout.dimension_numbers_by_path(numbers, Module(**{"mlp/a/b": x}))
    with pytest.raises(
        ValueError, match=r"\['mlp'\]\['a/b'\] and \['mlp/a'\]\['b'\].*have the same text"
    ):
        lookup((jax.tree_util.GetAttrKey("mlp/a/b"),))
    lookup = layout.dimension_numbers_by_path({"mlp/a/b": first}, params)
    with pytest.raises(
        ValueError, match=r"\['mlp'\]\['a/b'\] and \['mlp/a'\]\['b'\].*have the same text"
    ):
        lookup(paths[0])


def test_draws_of_other_trees_are_as_before() -> None:
    """Keyed by the CRC-32 of the path's text, so that runs from before repeat."""
    named = {"mlp": {"up": x, "down": y}, "list": [x, y]}
    assert layout.random_draws(named) == [1147255937, 862358551, 399685281, 50952869]
    both = layout.random_draws(ALIKE["a slash"])
    assert len(set(both)) == 2


def test_a_container_that_repeats_a_key_is_named() -> None:
    class Twice(Opaque):
        pass

    key = jax.tree_util.GetAttrKey("w")
    jax.tree_util.register_pytree_with_keys(
        Twice, lambda t: ([(key, c) for c in t.children], None), lambda _, c: Twice(*c)
    )
    with pytest.raises(ValueError, match=r"two leaves have the path \.w"):
        trees.by_path(Twice(x, y))


# -------------------------------------------------------------------------- parameters' shapes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_init_takes_shapes(name: str) -> None:
    tx = OPTIMIZERS[name]()
    params = draw(0)
    expected = jax.jit(tx.init)(params)
    shapes = jax.eval_shape(lambda: params)
    found = tx.init(shapes)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(jax.eval_shape(tx.init, shapes)) == jax.tree.structure(found)


@pytest.mark.parametrize("kind", ["dict", "nnx.State"])
def test_state_of_sharded_shapes_is_laid_out_as_they_are(kind: str) -> None:
    mesh = make_mesh(fsdp=-1)
    spec = lambda x: PartitionSpec("fsdp") if x.ndim == 2 else PartitionSpec()

    def shape(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x)))

    tx, params = make(), KINDS[kind](draw(0))
    state = tx.init(jax.tree.map(shape, params))
    layout = state_sharding(tx, params, jax.tree.map(spec, params), mesh)
    assert jax.tree.all(
        jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, layout)
    )
    assert not all(x.sharding.is_fully_replicated for x in osd_jax.projectors(state).values())


# ----------------------------------------------------------------------------- differentiation


SMALL = {"mlp": (6, 9), "norm": (5,)}


def small(seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in SMALL.items()}


def small_optimizer(name: str) -> Any:
    if name == "scale_by_subspace":
        pca = osd_jax.online_pca(optax.adam(0.05))
        return optax.masked(osd_jax.scale_by_subspace(optax.scale_by_adam(), pca, rank=2), matrices)
    every = 2 if name == "every second step" else 1
    proj_type = "std" if name == "std" else "continuous"
    return osd_jax.make_optimizer(
        "galore_adamw", proj_type, learning_rate=0.1, rank=2, update_proj_gap=5,
        update_proj_every=every, weight_decay=0.1, projector_lr_multiple=None, select=is_mlp,
    )  # fmt: skip


def is_mlp(path: str, x: Any) -> bool:
    return path == "mlp"


def loss_after(tx: Any, state: Tree, steps: int, scale: jax.Array) -> jax.Array:
    """Of some steps from a state in which P is set, as a function of what scales some gradients."""
    params = small(0)
    for step in range(steps):
        bent = jax.tree.map(lambda p: scale * jnp.sin(3 * p), params)
        grads = optax.tree.add(small(step + 1), bent)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("continuous", 2), ("scale_by_subspace", 2),  # the second takes the P that the first moved
        *(
            pytest.param(name, 3, marks=pytest.mark.slow)
            for name in ("continuous", "scale_by_subspace", "std", "every second step")
        ),
    ],
)  # fmt: skip
def test_derivatives_of_an_update_are_those_of_finite_differences(name: str, steps: int) -> None:
    """Forward, reverse, and batched, through W's steps and P's, after P was set."""
    with jax.enable_x64(True):
        tx, params = small_optimizer(name), small(0)
        _, state = jax.jit(lambda grads: tx.update(grads, tx.init(params), params))(small(9))
        loss = jax.jit(functools.partial(loss_after, tx, state, steps))
        at, h = jnp.array([0.3, 1.1]), 1e-6
        expected = np.array([(loss(x + h) - loss(x - h)) / (2 * h) for x in at])
        assert np.abs(expected).min() > 1e-3
        gradient = jax.jit(jax.grad(loss))
        reverse = [gradient(x) for x in at]
        forward = [jax.jvp(loss, (x,), (jnp.ones_like(x),))[1] for x in at]
        np.testing.assert_allclose(reverse, expected, rtol=1e-6)
        np.testing.assert_allclose(forward, expected, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(gradient)(at), expected, rtol=1e-6)
        total = jax.grad(lambda at: jnp.sum(jax.vmap(loss)(at)))(at)
        np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.mark.parametrize("projector", ["svd", "online_pca", "random"])
def test_a_basis_that_is_set_is_a_constant(projector: str) -> None:
    """The derivative of P P^T G is P P^T dG where P is set, of gradients of low rank too."""
    pca = osd_jax.online_pca(optax.adam(0.05))
    rule = {"svd": osd_jax.svd(2), "online_pca": pca, "random": osd_jax.random(2)}[projector]
    tx = osd_jax.scale_by_subspace(optax.identity(), rule, rank=3, side="input")
    params = {"mlp": x}
    low_rank = {"mlp": x[:, :2] @ y[:2]}  # four singular values are 0
    first = lambda grads: tx.update(grads, tx.init(params))
    forward = jax.jit(lambda grads, tangents: jax.jvp(first, (grads,), (tangents,)))
    backward = jax.jit(lambda grads, ct: jax.vjp(lambda g: first(g)[0], grads)[1](ct)[0])
    for grads in (params, low_rank):
        (_, state), (tangents, _) = forward(grads, {"mlp": y})
        basis = osd_jax.projectors(state)["mlp"]
        np.testing.assert_allclose(tangents["mlp"], basis @ (basis.T @ y), rtol=1e-5, atol=1e-5)
        found = backward(grads, {"mlp": y})["mlp"]
        np.testing.assert_allclose(found, basis @ (basis.T @ y), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ strict promotion


def every_optimizer() -> list[Any]:
    found = [(one, kind) for one in osd_names.SUBSPACE_OPTIMIZERS for kind in osd_names.PROJ_TYPES]
    found = [
        pair if pair[0] == "galore_adamw" or pair[1] in ("full", "continuous")
        else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in found
    ]  # fmt: skip
    return found + [(one, "std") for one in osd_names.FULL_RANK_OPTIMIZERS]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("optimizer", "proj_type"), every_optimizer())
def test_strict_promotion_changes_nothing(optimizer: str, proj_type: str, dtype: str) -> None:
    """Traced: the same types. `optax.adamw` itself fails under it."""
    params = jax.tree.map(lambda x: x.astype(dtype), draw(0))
    projects = optimizer in osd_names.SUBSPACE_OPTIMIZERS
    tx = osd_jax.make_optimizer(
        optimizer, proj_type, learning_rate=0.1, rank=64, weight_decay=0.1,
        select=is_any_matrix if projects else None, beta1=0.9 if "adafactor" in optimizer else None,
    )  # fmt: skip

    def types() -> Tree:
        state = jax.eval_shape(tx.init, params)
        of_update = jax.eval_shape(tx.update, params, state, params)
        of_parts = None
        if optimizer != "osd_muon":  # which adds the gradient itself
            parts = osd_jax.accumulate_sketches(tx, 2)
            accumulated = jax.eval_shape(parts.init, params)
            of_parts = jax.eval_shape(parts.update, params, accumulated, params)
        measured = diagnostics.subspace_diagnostics
        found = jax.eval_shape(measured, params, state)
        return state, of_update, of_parts, found

    expected = types()
    with jax.numpy_dtype_promotion("strict"):
        assert types() == expected


def is_any_matrix(path: str, x: Any) -> bool:
    return x.ndim == 2


# --------------------------------------------------------------------------- inject_hyperparams


def test_inject_hyperparams_says_which_arguments_are_static() -> None:
    params = {"mlp": x}
    bare = optax.inject_hyperparams(osd_jax.make_optimizer)
    with pytest.raises(ValueError, match=r"rank is an array.*static_args=\('schedule', 'rank'"):
        bare("galore_adamw", "continuous", learning_rate=0.1, rank=2).init(params)
    static = osd_jax.optimizers.STATIC_ARGUMENTS
    values: dict[str, Any] = {
        "schedule": lambda count: 1.0,
        "rank": 2,
        "update_proj_gap": 2,
        "update_proj_every": 2,
        "no_decay": lambda *_: False,
        "ns_dtype": jnp.bfloat16,
        "select": lambda *_: True,
        "dimension_numbers": lambda *_: jnp.int32(0),
        "basis_dtype": jnp.bfloat16,
        "slice_size": 4096,
    }
    assert tuple(values) == static
    for name, value in values.items():
        others = [other for other in static if other != name]
        factory = optax.inject_hyperparams(osd_jax.make_optimizer, static_args=others)
        with pytest.raises(ValueError, match=f"{name} is .*static_args=.*{name}"):
            factory("galore_adamw", "continuous", learning_rate=0.1, **{name: value}).init(params)


def test_inject_hyperparams_holds_every_other_number() -> None:
    params = {"mlp": x, "norm": y[0]}
    numbers = {
        "learning_rate": 0.1, "scale": 0.5, "weight_decay": 0.1, "seed": 3, "penalty": 0.1,
        "projector_lr_multiple": 5.0, "projector_weight_decay": 0.01,
    }  # fmt: skip
    options = {"rank": 2, "projector_init": "qr"}
    plain = osd_jax.make_optimizer("galore_adamw", "continuous", **options, **numbers)
    factory = optax.inject_hyperparams(
        osd_jax.make_optimizer, static_args=osd_jax.optimizers.STATIC_ARGUMENTS
    )
    injected = factory("galore_adamw", "continuous", **options, **numbers)
    state, expected = injected.init(params), plain.init(params)
    assert set(state.hyperparams) == set(numbers)
    for _ in range(3):
        found, state = jax.jit(injected.update)(params, state, params)
        wanted, expected = jax.jit(plain.update)(params, expected, params)
    for a, b in zip(leaves(found), leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("factory", "arguments", "name"),
    [
        (osd_jax.scale_by_subspace, {"rank": 2}, "rank"),
        (osd_jax.accumulate_sketches, {"every_k": 2}, "every_k"),
        (osd_jax.quantize_state, {}, "block"),
        (quantization.slice_by_slice, {"max_size": 4096}, "max_size"),
    ],
)
def test_inject_hyperparams_around_the_pieces(
    factory: Any, arguments: dict[str, Any], name: str
) -> None:
    first = (
        {"tx": make()}
        if name != "rank"
        else {"inner": optax.scale_by_adam(), "projector": osd_jax.svd(2)}
    )
    with pytest.raises(ValueError, match=f"{name} is an array.*static_args=.*{name}"):
        optax.inject_hyperparams(factory)(**first, **arguments).init({"mlp": x})
