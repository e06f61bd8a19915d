"""Adam with one second moment per row: against NumPy, JAX against PyTorch, in 8 bits, sharded."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import osd_jax
from osd_jax import llama, scale_by_adam_of_rows
from osd_jax.adam_of_rows import ScaleByAdamOfRowsState
from osd_jax.quantization import Quantized
from osd_jax.rules import on_matrices
from osd_jax.sharding import state_sharding
from osd_torch.adam_of_rows import AdamOfRows
from osd_torch.rules import Adam
from osd_torch.sharding import local, whole
from osd_torch.transport import Change
from parity_tests.support.two_processes import Run

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 20
B1, B2, EPS = 0.9, 0.999, 1e-8
SHAPES = [(30, 7), (7, 30), (9, 9), (1, 12), (12, 1), (11,), (2, 5, 4)]
ids = lambda shape: "x".join(map(str, shape))
is_rows = lambda x: isinstance(x, ScaleByAdamOfRowsState)

IN_LLAMA: dict[str, Any] = {
    "second_moment": "row",
    "first_moment": "8bit",
    "select": llama.is_projected,
    "dimension_numbers": llama.dimension_numbers,
}
make_optimizer = partial(osd_jax.make_optimizer, learning_rate=0.01, **IN_LLAMA)
BUILT: dict[str, Any] = {
    "osd_adamw": partial(osd_jax.osd_adamw, 0.01, rank=4, **IN_LLAMA),
    "osd_muon": partial(osd_jax.osd_muon, 0.01, rank=4, **IN_LLAMA),
    "adamw": partial(make_optimizer, "adamw", "std"),
    "muon": partial(make_optimizer, "muon", "std"),
    "galore_adamw": partial(make_optimizer, "galore_adamw", "continuous", rank=4),
    "osd_muon by name": partial(make_optimizer, "osd_muon", "continuous", rank=4),
}


def draw(shape: tuple[int, ...], seed: int = 0, steps: int = STEPS) -> np.ndarray:
    """Gradients (steps, ...) in float64 whose rows, by either axis, differ by powers of ten."""
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((steps, *shape))
    for axis, size in enumerate(shape, start=1):
        scales = 10.0 ** rng.uniform(-1, 0, size)
        gradients *= scales.reshape([-1 if i == axis else 1 for i in range(gradients.ndim)])
    return gradients


def reference(gradients: np.ndarray, b1: float = B1, b2: float = B2, eps: float = EPS) -> Any:
    """(directions, m, v) after each step, written out in float64."""
    _, *shape = gradients.shape
    is_matrix = len(shape) == 2 and min(shape) > 1
    m, directions = np.zeros(shape), []
    across = 1 if shape[0] >= shape[-1] else 0  # the axis of the mean
    v = np.zeros(max(shape)) if is_matrix else np.zeros(shape)
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (np.mean(g * g, axis=across) if is_matrix else g * g)
        whole_v = np.expand_dims(v, across) if is_matrix else v
        directions.append(m / (1 - b1**t) / (np.sqrt(whole_v / (1 - b2**t)) + eps))
    return np.stack(directions), m, v


def by_torch(gradients: Any, rule: AdamOfRows) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """(directions, the last state)."""
    state = rule.init(torch.as_tensor(gradients[0]))
    directions = []
    for t, g in enumerate(gradients, start=1):
        direction, rate = rule.step(torch.as_tensor(g), state, t, 1.0)
        directions.append(rate * direction.numpy())
    return np.stack(directions), state


def by_jax(gradients: Any, **options: Any) -> tuple[np.ndarray, Any]:
    """(directions, the last state), as one scan."""
    tx = scale_by_adam_of_rows(**options)
    gradients = jnp.asarray(gradients)
    step = lambda state, g: tx.update(g, state)[::-1]
    state, directions = jax.jit(lambda g: jax.lax.scan(step, tx.init(g[0]), g))(gradients)
    return np.asarray(directions), state


# ---------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("options", [{}, {"b1": 0.0, "b2": 0.95, "eps": 1e-2}], ids=["", "others"])
def test_jax_is_the_reference(shape: tuple[int, ...], options: dict[str, float]) -> None:
    gradients = draw(shape)
    wanted, m, v = reference(gradients, **options)
    with jax.enable_x64(True):
        found, state = by_jax(gradients, **options)
    assert found.dtype == np.float64 and state.nu.shape == v.shape and int(state.count) == STEPS
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(state.mu, m, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state.nu, v, rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("options", [{}, {"b1": 0.0, "b2": 0.95, "eps": 1e-2}], ids=["", "others"])
def test_torch_is_the_reference(shape: tuple[int, ...], options: dict[str, float]) -> None:
    gradients = draw(shape)
    wanted, m, v = reference(gradients, **options)
    betas = (options.get("b1", B1), options.get("b2", B2))
    found, state = by_torch(gradients, AdamOfRows(betas, options.get("eps", EPS)))
    second = state["exp_avg_sq_row" if v.shape != m.shape else "exp_avg_sq"]
    assert found.dtype == np.float64 and tuple(second.shape) == v.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(state["exp_avg"], m, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(second, v, rtol=1e-9)


@pytest.mark.parametrize("first_8bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (13,)], ids=ids)
def test_torch_steps_in_place_as_by_its_direction(
    shape: tuple[int, ...], dtype: torch.dtype, first_8bit: bool
) -> None:
    rule, lr, decay = AdamOfRows(first_8bit=first_8bit), 0.1, 0.5
    gradients = torch.as_tensor(draw(shape, steps=3)).float()
    x = torch.ones(shape, dtype=dtype)
    state = rule.init(gradients[0])
    for t, g in enumerate(gradients, start=1):
        other, before = copy.deepcopy(state), x.float().clone()
        rule.step_(x, g, state, t, lr, decay)
        direction, rate = rule.step(g, other, t, lr)
        # x of at most 1, and its step, each round by half a unit: 2^-24 or 2^-8.
        limit = 4 * torch.finfo(dtype).eps
        wanted = (1 - lr * decay) * before - rate * direction
        torch.testing.assert_close(x.float(), wanted, rtol=limit, atol=limit)
        assert all(torch.equal(state[name], other[name]) for name in state)


def test_a_vector_has_adams_very_step() -> None:
    gradients = torch.as_tensor(draw((500,))).float()
    ours, theirs = AdamOfRows(first_8bit=True), Adam()
    x, y = torch.ones(500), torch.ones(500)
    state, other = ours.init(x), theirs.init(y)
    for t, g in enumerate(gradients, start=1):
        ours.step_(x, g, state, t, 0.01, 0.1)
        theirs.step_(y, g, other, t, 0.01, 0.1)
    assert torch.equal(x, y) and state.keys() == other.keys()


def test_a_matrix_of_equal_columns_has_adams_step() -> None:
    """And optax.scale_by_adam's: each entry's square is its row's mean."""
    gradients = np.repeat(draw((6, 1)), 4, axis=2)
    with jax.enable_x64(True):
        found, _ = by_jax(gradients)
        adam = optax.scale_by_adam()
        state = adam.init(jnp.asarray(gradients[0]))
        for g, direction in zip(gradients, found, strict=True):
            wanted, state = adam.update(jnp.asarray(g), state)
            np.testing.assert_allclose(direction, wanted, rtol=1e-9)


def float32_limit(shape: tuple[int, ...], steps: int) -> float:
    """Largest difference of two directions in float32, whose unit u is 2^-24.

    With G the largest |g| of a row of n, v / c2 >= G^2 / (t n) apart from b2^t, so a direction is
    at most sqrt(t n), and so is G over the root. m / c1 accumulates 4 u G per step; the root, half
    of v's (n + 4 + 4 t) u; the corrections, the quotients and eps, 8 u of the direction.
    """
    n = min(shape) if len(shape) == 2 else 1
    roundings = 4 * steps + (n + 4 + 4 * steps) / 2 + 8
    return 2 * 1.01 * np.sqrt(steps * n) * roundings * 2.0**-24


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 14), min_size=1, max_size=2).map(tuple),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_jax_is_torch(shape: tuple[int, ...], scale: float, seed: int) -> None:
    gradients = (scale * draw(shape, seed, steps=5)).astype(np.float32)
    ours, state = by_jax(gradients)
    theirs, other = by_torch(gradients, AdamOfRows())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=float32_limit(shape, 5))
    second = other.get("exp_avg_sq_row", other.get("exp_avg_sq"))
    np.testing.assert_allclose(state.nu, second, rtol=40 * 2.0**-24)


def test_zero_gradients_and_zero_rows_are_no_nan() -> None:
    gradients = draw((40, 130)).astype(np.float32)
    gradients[:, :, 3] = 0
    gradients[:2] = 0
    for first_8bit in (False, True):
        ours, _ = by_jax(gradients, first_8bit=first_8bit)
        theirs, _ = by_torch(gradients, AdamOfRows(first_8bit=first_8bit))
        for found in (ours, theirs):
            assert np.isfinite(found).all()
            assert not found[:2].any() and not found[:, :, 3].any()


@pytest.mark.parametrize("first_8bit", [False, True])
def test_bfloat16_gradients_have_float32_state_and_directions(first_8bit: bool) -> None:
    gradients = jnp.asarray(draw((90, 60)), jnp.bfloat16)
    found, state = by_jax(gradients, first_8bit=first_8bit)
    wanted, _ = by_jax(gradients.astype(jnp.float32), first_8bit=first_8bit)
    assert found.dtype == state.nu.dtype == jnp.float32
    np.testing.assert_array_equal(found, wanted)
    wide = torch.as_tensor(np.array(gradients.astype(jnp.float32)))
    found, of_torch = by_torch(wide.to(torch.bfloat16), AdamOfRows(first_8bit=first_8bit))
    wanted, _ = by_torch(wide, AdamOfRows(first_8bit=first_8bit))
    assert found.dtype == np.float32 and of_torch["exp_avg_sq_row"].dtype == torch.float32
    np.testing.assert_array_equal(found, wanted)


# ---------------------------------------------------------------------------------------- 8 bits


@pytest.mark.parametrize("shape", [(64, 512), (70, 300), (90, 60), (300, 700)], ids=ids)
def test_codes_of_jax_are_torchs(shape: tuple[int, int]) -> None:
    """Whether blocks fill rows, end in a part, or are shorter; also with the rows last.

    From one state. A value that the libraries round otherwise in its last bits may come to lie on
    two sides of the middle between two codes, one in some thousands.
    """
    tx, rule = scale_by_adam_of_rows(first_8bit=True), AdamOfRows(first_8bit=True)
    gradients = draw(shape).astype(np.float32)
    state, update = tx.init(jnp.asarray(gradients[0])), jax.jit(tx.update)
    theirs = rule.init(torch.as_tensor(gradients[0]))
    rows, width = max(shape), min(shape)
    assert state.mu.codes.shape == tuple(theirs["exp_avg"].shape) == (rows, width)
    assert (
        state.mu.scales.shape == tuple(theirs["exp_avg_absmax"].shape) == (rows, -(-width // 256))
    )
    for t, g in enumerate(gradients, start=1):
        ours = {
            "exp_avg": state.mu.codes,
            "exp_avg_absmax": state.mu.scales,
            "exp_avg_sq_row": state.nu,
        }
        for name, value in ours.items():
            theirs[name].copy_(torch.as_tensor(np.array(value)))
        found, state = update(jnp.asarray(g), state)
        wanted, _ = rule.step(torch.as_tensor(g), theirs, t, 1.0)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        difference = np.abs(state.mu.codes.astype(int) - theirs["exp_avg"].numpy().astype(int))
        assert difference.max() <= 1 and np.mean(difference > 0) < 2e-3
        np.testing.assert_allclose(state.mu.scales, theirs["exp_avg_absmax"], rtol=1e-6)
        np.testing.assert_allclose(state.nu, theirs["exp_avg_sq_row"], rtol=1e-5)


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)], ids=ids)
def test_8_bits_follow_float32(shape: tuple[int, int]) -> None:
    gradients = draw(shape).astype(np.float32)
    wanted, _, v = reference(gradients)
    ours, state = by_jax(gradients, first_8bit=True)
    theirs, other = by_torch(gradients, AdamOfRows(first_8bit=True))
    for found, second in ((ours, state.nu), (theirs, other["exp_avg_sq_row"])):
        assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
        np.testing.assert_allclose(second, v, rtol=1e-5)


@pytest.mark.parametrize("shape", [(90, 100), (100, 90), (64, 256)], ids=ids)
def test_a_row_whose_gradient_vanished_stops(shape: tuple[int, int]) -> None:
    """As without 8 bits, although all neighbouring rows have gradients.

    In blocks that cross rows, with a steady scale, it would keep a moment forever: 0.9 of it rounds
    back to the same code. In its own block, whose largest value may be negative and is then rounded
    to -0.993 of the scale, it decays by 0.9 to 0.9 * 0.993 per step: a sum of up to 6% less. A code
    is also off by up to 1%.
    """
    gradients = np.repeat(draw(shape, steps=1), 150, axis=0).astype(np.float32)
    row = (slice(None), slice(None), 5) if shape[1] > shape[0] else (slice(None), 5)
    gradients[row][3:] = 0
    wanted = reference(gradients)[0][row].sum(axis=0)
    ours, _ = by_jax(gradients, first_8bit=True)
    theirs, _ = by_torch(gradients, AdamOfRows(first_8bit=True))
    for found in (ours, theirs):
        assert np.linalg.norm(found[row].sum(axis=0) - wanted) < 0.07 * np.linalg.norm(wanted)
        assert np.abs(found[row][-1]).max() < 1e-4


def test_small_matrices_and_vectors_stay_float32() -> None:
    params = {"below": (63, 65), "at": (64, 64), "vector": (5000,), "row": (1, 5000)}
    tx, rule = scale_by_adam_of_rows(first_8bit=True), AdamOfRows(first_8bit=True)
    mu = tx.init({name: jnp.zeros(shape) for name, shape in params.items()}).mu
    for name, shape in params.items():
        held = rule.init(torch.zeros(shape))["exp_avg"].dtype == torch.uint8
        assert isinstance(mu[name], Quantized) == held == (name == "at"), name


@pytest.mark.parametrize("first_8bit", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (128, 64)], ids=ids)
def test_a_quadratic_converges(shape: tuple[int, int], first_8bit: bool) -> None:
    """Half the squared distance, weighted from 0.1 to 10 by row and by column."""
    rng = np.random.default_rng(0)
    target = rng.standard_normal(shape).astype(np.float32)
    weights = [10.0 ** rng.uniform(-0.5, 0.5, size).astype(np.float32) for size in shape]
    curvature = np.outer(*weights)
    steps = 400
    rates = 0.05 * (1 - np.arange(steps) / steps)

    x = torch.zeros(shape)
    rule = AdamOfRows(first_8bit=first_8bit)
    state = rule.init(x)
    for t, rate in enumerate(rates, start=1):
        gradient = torch.as_tensor(curvature) * (x - torch.as_tensor(target))
        rule.step_(x, gradient, state, t, float(rate), 0.0)

    tx = optax.chain(
        scale_by_adam_of_rows(first_8bit=first_8bit),
        optax.scale_by_learning_rate(lambda count: 0.05 * (1 - count / steps)),
    )

    @jax.jit
    def run_jax() -> jax.Array:
        def step(carry: Any, _: Any) -> Any:
            y, state = carry
            updates, state = tx.update(curvature * (y - target), state, y)
            return (optax.apply_updates(y, updates), state), None

        start = jnp.zeros(shape)
        return jax.lax.scan(step, (start, tx.init(start)), length=steps)[0][0]

    loss = lambda found: np.sum(curvature * (np.asarray(found) - target) ** 2)
    for found in (x, run_jax()):
        assert loss(found) < 1e-3 * loss(np.zeros(shape))


# ------------------------------------------------------------------------------------- the state


def numbers_and_bytes(arrays: Any) -> tuple[int, int]:
    arrays = [x for x in arrays if x.ndim]
    return sum(int(np.prod(x.shape)) for x in arrays), sum(
        int(np.prod(x.shape)) * x.dtype.itemsize for x in arrays
    )


@pytest.mark.parametrize("shape", [(32000, 512), (512, 32000)], ids=ids)
def test_numbers_of_state(shape: tuple[int, int]) -> None:
    """mn + m; in 8 bits a byte to each and a scale to 256."""
    mn, m = 32000 * 512, 32000
    wanted = {False: (mn + m, 4 * (mn + m)), True: (mn + m + mn // 256, mn + 4 * (m + mn // 256))}
    for first_8bit, numbers in wanted.items():
        tx = scale_by_adam_of_rows(first_8bit=first_8bit)
        state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
        assert numbers_and_bytes(jax.tree.leaves(state)) == numbers
        rule = AdamOfRows(first_8bit=first_8bit)
        held = rule.init(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        assert numbers_and_bytes(held.values()) == numbers
        assert all(x.is_contiguous() and x.is_meta for x in held.values())


def test_torchs_state_of_a_transposed_view_is_contiguous() -> None:
    for first_8bit in (False, True):
        state = AdamOfRows(first_8bit=first_8bit).init(torch.zeros(60, 90).mT)
        assert all(x.is_contiguous() for x in state.values())


def test_moments_cannot_follow_another_basis() -> None:
    rule = AdamOfRows()
    state = rule.init(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="AdamOfRows cannot carry its state over to another P"):
        rule.transport_(state, Change(torch.eye(4), None), 1)
    tx = osd_jax.scale_by_subspace(
        scale_by_adam_of_rows(), osd_jax.svd(1), rank=4, transport=osd_jax.transport_moments()
    )
    params = {"w": jnp.ones((8, 12))}
    with pytest.raises(
        ValueError, match="cannot transform ScaleByAdamOfRowsState: the means of a second moment"
    ):
        tx.update(params, tx.init(params), params)


def test_first_8bit_is_a_plain_value() -> None:
    with pytest.raises(ValueError, match="first_8bit is an array"):
        scale_by_adam_of_rows(first_8bit=jnp.array(True))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 11), (11, 3), (8, 600)], ids=ids)
def test_declared_vectors_are_stepped_as_alone(shape: tuple[int, int]) -> None:
    """The norms of stacked layers, (layers, n): each like PyTorch's own vector of its layer."""
    gradients = draw(shape)
    vectors = {"norm": osd_jax.SubspaceDimensionNumbers((), 1)}
    tx = scale_by_adam_of_rows(first_8bit=True, dimension_numbers=vectors)

    def step(state: Any, g: jax.Array) -> Any:
        # Only projected parameters need an entry in `dimension_numbers`.
        directions, state = tx.update({"norm": g, "head": g}, state)
        return state, directions

    with jax.enable_x64(True):
        params = dict.fromkeys(("norm", "head"), jnp.asarray(gradients[0]))
        state, found = jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g))(gradients)
        matrix, _ = by_jax(gradients, first_8bit=True)
    assert state.mu["norm"].shape == state.nu["norm"].shape == shape
    assert state.nu["head"].shape == (max(shape),)
    np.testing.assert_array_equal(found["head"], matrix)
    for layer in range(shape[0]):
        alone, held = by_torch(gradients[:, layer], AdamOfRows(first_8bit=True))
        np.testing.assert_allclose(found["norm"][:, layer], alone, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(state.nu["norm"][layer], held["exp_avg_sq"], rtol=1e-9)


def test_a_function_that_reads_a_hidden_parameter_is_refused() -> None:
    params = {"norm": jnp.ones((3, 8)), "w": jnp.ones((3, 8, 16))}
    axes = lambda x: osd_jax.SubspaceDimensionNumbers(x.ndim - 2, x.ndim - 1)
    tx = osd_jax.osd_adamw(
        0.01, rank=2, second_moment="row", select=lambda name, x: name == "w",
        dimension_numbers=lambda tree: {"w": axes(tree["w"])},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"dimension_numbers raised AttributeError.*give a tree"):
        tx.init(params)


@pytest.mark.parametrize("built", sorted(BUILT))
def test_stacked_norms_of_llama_have_adams_state(built: str) -> None:
    """In every optimizer that takes `second_moment`, also where they would be in 8 bits."""
    config = llama.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=64,
        num_attention_heads=2,
    )
    state = jax.eval_shape(lambda: BUILT[built]().init(llama.init(config, 0)))
    found = {
        field: {jax.tree_util.keystr(path): x.shape for path, x in leaves}
        for rows in jax.tree.leaves(state, is_leaf=is_rows)
        if is_rows(rows)
        for field in ("mu", "nu")
        for leaves in [jax.tree.leaves_with_path(getattr(rows, field))]
    }
    for norm in ("attention_norm", "mlp_norm"):
        for field in ("mu", "nu"):
            assert found[field][f"['layers']['{norm}']"] == (64, 64)
    assert found["nu"]["['embedding']"] == (96,)


def test_any_tree_and_kernels_as_matrices() -> None:
    """Boxes and hidden leaves; `on_matrices` gives a vector, as a matrix of one row, Adam."""
    from flax import nnx

    params = {"kernel": nnx.Param(jnp.ones((6, 4))), "norm": jnp.ones(5), "none": None}
    tx = scale_by_adam_of_rows()
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert state.nu["kernel"].shape == (6,) and state.nu["none"] is None
    wrapped = on_matrices(tx)
    plain = {"kernel": params["kernel"][...], "norm": params["norm"]}
    turned, state = wrapped.update(plain, wrapped.init(plain))
    assert state.nu["norm"].shape == (1, 5)
    np.testing.assert_allclose(turned["norm"], updates["norm"])
    np.testing.assert_allclose(turned["kernel"], updates["kernel"][...])


# ---------------------------------------------------------------------------------- many devices

SPECS = [("x", None), (None, "x"), ("x", "y"), ("y", "x")]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(2048, 512), (64, 256), (256, 64)], ids=ids)
def test_state_sharding_follows_the_weight(
    shape: tuple[int, int], spec: tuple[str | None, ...]
) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    params, rows = jnp.zeros(shape), int(np.argmax(shape))
    turned = P(spec[rows], spec[1 - rows])
    for first_8bit in (False, True):
        tx = scale_by_adam_of_rows(first_8bit=first_8bit)
        layout = state_sharding(tx, params, P(*spec), mesh)
        state = jax.jit(tx.init, out_shardings=layout)(params)
        assert state.nu.sharding.spec == P(spec[rows])
        if first_8bit:
            assert state.mu.codes.sharding.spec == turned
            assert state.mu.scales.sharding.spec[0] == spec[rows]
        else:
            assert state.mu.sharding.spec == P(*spec)


@pytest.mark.parametrize("first_8bit", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("shape", [(48, 600), (600, 48)], ids=ids)
def test_steps_on_a_mesh_are_those_of_one_device(
    shape: tuple[int, int], axis_type: AxisType, spec: tuple[str | None, ...], first_8bit: bool
) -> None:
    """Types stay, directions lie as gradients do, and the state as `state_sharding` says."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    gradients = draw(shape, steps=2).astype(np.float32)
    tx = scale_by_adam_of_rows(first_8bit=first_8bit)
    wanted, expected = by_jax(gradients, first_8bit=first_8bit)
    layout = state_sharding(tx, jnp.asarray(gradients[0]), P(*spec), mesh)
    sharding = NamedSharding(mesh, P(*spec))
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(g, sharding) for g in gradients]
        state = jax.jit(tx.init, out_shardings=layout)(sharded[0])
        types = jax.tree.map(jax.typeof, state)
        step = jax.jit(tx.update, out_shardings=(sharding, layout))
        for g, direction in zip(sharded, wanted, strict=True):
            found, state = step(g, state)
            np.testing.assert_allclose(found, direction, rtol=1e-5, atol=1e-6)
    assert jax.tree.map(jax.typeof, state) == types
    assert found.sharding.is_equivalent_to(sharding, 2)
    for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    np.testing.assert_allclose(state.nu, expected.nu, rtol=1e-5)


@pytest.mark.parametrize("first_8bit", [False, True])
def test_rows_split_over_devices_need_no_exchange(first_8bit: bool) -> None:
    mesh = jax.make_mesh((8,), ("x",))
    tx, sharding = scale_by_adam_of_rows(first_8bit=first_8bit), NamedSharding(mesh, P("x", None))
    g = jax.device_put(jnp.ones((512, 64)), sharding)
    layout = state_sharding(tx, g, P("x", None), mesh)
    state = jax.jit(tx.init, out_shardings=layout)(g)
    text = jax.jit(tx.update, out_shardings=(sharding, layout)).lower(g, state).compile().as_text()
    assert not any(op in text for op in ("all-gather", "all-to-all", "all-reduce"))


def steps_on_two(shape: tuple[int, int], axis: int | None, first_8bit: bool) -> Any:
    """(directions, weight, state, its parts) with all of them sharded along an axis."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    place = [Replicate() if axis is None else Shard(axis)]
    gradients = [
        distribute_tensor(torch.as_tensor(g), mesh, place)
        for g in draw(shape, steps=4).astype(np.float32)
    ]
    rule = AdamOfRows(first_8bit=first_8bit)
    state, directions = rule.init(gradients[0]), []
    x = distribute_tensor(torch.ones(shape), mesh, place)
    other = rule.init(gradients[0])
    for t, g in enumerate(gradients, start=1):
        direction, _ = rule.step(g, state, t, 1.0)
        assert direction.placements == g.placements and direction.shape == g.shape
        directions.append(whole(direction))
        rule.step_(x, g, other, t, 0.1, 0.5)
    parts = {name: tuple(local(value).shape) for name, value in state.items()}
    assert all(local(value).is_contiguous() for value in state.values())
    return (
        torch.stack(directions),
        whole(x),
        {name: whole(value) for name, value in state.items()},
        parts,
    )


@pytest.mark.parametrize("first_8bit", [False, True])
@pytest.mark.parametrize("axis", [0, 1, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "shape", [(91, 61), pytest.param((61, 91), marks=pytest.mark.slow)], ids=ids
)
def test_two_processes_are_one(
    two_processes: Run,
    shape: tuple[int, int],
    axis: int | None,
    first_8bit: bool,
) -> None:
    """Where no axis divides by 2: FSDP2's rows, columns, and whole on each process."""
    gradients = draw(shape, steps=4).astype(np.float32)
    rule = AdamOfRows(first_8bit=first_8bit)
    wanted, expected = by_torch(gradients, rule)
    weight, state = torch.ones(shape), rule.init(torch.ones(shape))
    for t, g in enumerate(gradients, start=1):
        rule.step_(weight, torch.as_tensor(g), state, t, 0.1, 0.5)
    rows = int(np.argmax(shape))
    for rank, (directions, x, found, parts) in enumerate(
        two_processes(steps_on_two, shape, axis, first_8bit)
    ):
        np.testing.assert_allclose(directions, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x, weight, rtol=1e-5, atol=1e-6)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            limit = {"rtol": 0, "atol": 1} if value.dtype == torch.uint8 else {"rtol": 1e-5}
            np.testing.assert_allclose(found[name].numpy(), value.numpy(), **limit)
        half = (max(shape) + 1) // 2 if rank == 0 else max(shape) // 2
        assert parts["exp_avg_sq_row"] == ((half if axis == rows else max(shape)),)
        if axis == rows:
            assert parts["exp_avg"][0 if first_8bit else rows] == half
