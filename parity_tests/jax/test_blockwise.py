"""8-bit optimizer state: compared with bitsandbytes, and around any Optax transformation."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from osd_jax import make_optimizer, quantize_state
from osd_jax.quantization import (
    Quantized,
    code_book,
    dequantize,
    nearest_codes,
    quantize,
    slice_by_slice,
    values_of_codes,
)

is_quantized = lambda x: isinstance(x, Quantized)


@pytest.fixture(scope="module")
def torch() -> Any:
    """PyTorch, with bitsandbytes' operators loaded."""
    pytest.importorskip("bitsandbytes")
    return pytest.importorskip("torch")


def draw(shape: tuple[int, ...], seed: int = 0, *, heavy: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_cauchy(shape) if heavy else rng.standard_normal(shape)
    return values.astype(np.float32)


# ------------------------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize("signed", [True, False])
def test_code_book_is_bitsandbytes(torch: Any, signed: bool) -> None:
    """To two roundings: torch.linspace, and the mean of neighbours, which they are computed by."""
    import bitsandbytes.functional

    theirs = bitsandbytes.functional.create_dynamic_map(signed=signed).numpy()
    np.testing.assert_array_max_ulp(code_book(signed), theirs, maxulp=2)


@pytest.mark.parametrize("signed", [True, False])
def test_every_entry_of_the_rounding_table_is_bitsandbytes(torch: Any, signed: bool) -> None:
    """One value inside each of the 65,536 cells, in blocks whose largest value is 1."""
    cells = np.linspace(-1, 1, 65536).astype(np.float32)
    blocks = np.ones((258, 256), np.float32)
    blocks[:, 1:] = np.resize(cells, (258, 255))
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(
        torch.from_numpy(blocks), torch.from_numpy(code_book(signed).copy()), 256
    )
    ours = quantize(jnp.asarray(blocks), signed=signed)
    np.testing.assert_array_equal(ours.codes, codes.numpy())
    np.testing.assert_array_equal(ours.scales.ravel(), scales.numpy())


@pytest.mark.parametrize(
    ("shape", "heavy"),
    [((2, 8, 512), False), ((8, 512), True), ((8192,), False), ((4999,), True)],
)
def test_adam_state_is_bitsandbytes_after_50_steps(
    torch: Any, shape: tuple[int, ...], heavy: bool
) -> None:
    """Also where the last of a vector's blocks is partial, and under heavy tails.

    bitsandbytes has flat blocks, ours lie along the last axis: the same for these shapes.
    """
    import bitsandbytes.functional

    size, lr = int(np.prod(shape)), 0.01
    weight = torch.zeros(size)
    codes = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(-(-size // 256)) for _ in range(2)]
    books = [torch.from_numpy(code_book(signed).copy()) for signed in (True, False)]
    tx = quantize_state(optax.scale_by_adam(), min_size=0)
    state, update = tx.init(jnp.zeros(shape)), jax.jit(tx.update)
    ours = np.zeros(shape, np.float32)
    for step in range(1, 51):
        grad = draw(shape, step, heavy=heavy)
        bitsandbytes.functional.optimizer_update_8bit_blockwise(
            optimizer_name="adam",
            g=torch.from_numpy(grad.ravel()),
            p=weight,
            state1=codes[0],
            state2=codes[1],
            beta1=0.9,
            beta2=0.999,
            beta3=0.0,
            alpha=0.0,
            eps=1e-8,
            step=step,
            lr=lr,
            qmap1=books[0],
            qmap2=books[1],
            absmax1=scales[0],
            absmax2=scales[1],
        )
        updates, state = update(jnp.asarray(grad), state)
        ours -= lr * np.asarray(updates)
    for moment, theirs, scale in zip((state.mu, state.nu), codes, scales, strict=True):
        difference = np.abs(moment.codes.ravel().astype(int) - theirs.numpy().astype(int))
        assert difference.max() <= 1
        assert np.mean(difference == 0) >= 0.99
        np.testing.assert_allclose(moment.scales.ravel(), scale.numpy(), rtol=1e-5)
    error = np.linalg.norm(ours.ravel() - weight.numpy())
    assert error < 1e-3 * np.linalg.norm(weight.numpy())


# ------------------------------------------------------------------------------ one array


def test_round_trip_with_a_partial_block_and_a_block_of_zeros() -> None:
    array = draw((3, 600))
    array[1, 256:512] = 0
    for signed, rounding in ((True, "table"), (True, "nearest"), (False, "table")):
        values = array if signed else array**2
        stored = quantize(jnp.asarray(values), signed=signed, rounding=rounding)
        assert stored.codes.dtype == jnp.uint8 and stored.codes.shape == (3, 600)
        assert stored.scales.dtype == jnp.float32 and stored.scales.shape == (3, 3)
        back = np.asarray(dequantize(stored, signed=signed))
        np.testing.assert_array_equal(back[1, 256:512], 0)
        # The code books' widest step is 0.0142 of the scale.
        scale = np.repeat(stored.scales, 256, axis=1)[:, :600]
        assert np.max(np.abs(back - values) / np.where(scale, scale, 1)) < 0.0075


@pytest.mark.parametrize("signed", [True, False])
def test_nearest_is_the_nearest_code(signed: bool) -> None:
    values = draw((4, 256)) if signed else draw((4, 256)) ** 2
    stored = quantize(jnp.asarray(values), signed=signed, rounding="nearest")
    unit = values / np.abs(values).max(axis=1, keepdims=True)
    nearest = np.abs(unit[..., None] - code_book(signed)).argmin(axis=-1)
    np.testing.assert_array_equal(stored.codes, nearest)


def test_blocks_do_not_span_rows() -> None:
    """So a shard of rows is quantized as it would be alone."""
    array = jnp.asarray(draw((4, 100)))
    whole, row = quantize(array, signed=True), quantize(array[2], signed=True)
    np.testing.assert_array_equal(whole.codes[2], row.codes)
    np.testing.assert_array_equal(whole.scales[2], row.scales)


# ------------------------------------------------------------------------- around Optax


@pytest.mark.parametrize(
    ("tx", "moments"),
    [
        (optax.scale_by_adam(), 2),
        (optax.scale_by_lion(), 1),
        (optax.trace(0.9), 1),
        (optax.scale_by_rms(), 1),
        (optax.scale_by_factored_rms(min_dim_size_to_factor=10_000), 1),
        (optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=8), optax.ema(0.9)), 1),
    ],
    ids=["adam", "lion", "momentum", "rms", "unfactored", "factored"],
)
def test_follows_the_transformation_that_it_wraps(
    tx: optax.GradientTransformation, moments: int
) -> None:
    """Matrices are held in 8 bits, small arrays as they were, updates stay close, types stay."""
    params = {"matrix": jnp.zeros((16, 512)), "vector": jnp.zeros(64)}
    wrapped = quantize_state(tx)
    plain_state, state = tx.init(params), wrapped.init(params)
    types = jax.tree.map(jax.typeof, state)
    update, plain_update = jax.jit(wrapped.update), jax.jit(tx.update)
    for step in range(3):
        grads = {
            "matrix": jnp.asarray(draw((16, 512), step)),
            "vector": jnp.asarray(draw(64, step)),
        }
        plain, plain_state = plain_update(grads, plain_state, params)
        updates, state = update(grads, state, params)
    assert jax.tree.map(jax.typeof, state) == types
    held = [x for x in jax.tree.leaves(state, is_leaf=is_quantized) if is_quantized(x)]
    assert [x.codes.shape for x in held] == [(16, 512)] * moments
    np.testing.assert_array_equal(updates["vector"], plain["vector"])
    error = jnp.linalg.norm(updates["matrix"] - plain["matrix"])
    assert error < 0.1 * jnp.linalg.norm(plain["matrix"])


def test_arrays_below_min_size_stay_float32() -> None:
    params = {
        "below": jnp.zeros((15, 256)),
        "at": jnp.zeros((16, 256)),
        "stack": jnp.zeros((9, 8, 64)),
    }
    state = quantize_state(optax.scale_by_adam()).init(params)
    for moment in (state.mu, state.nu):
        assert [is_quantized(moment[k]) for k in ("below", "at", "stack")] == [False, True, False]
        assert moment["below"].dtype == jnp.float32


def test_bfloat16_parameters_through_make_optimizer() -> None:
    """bf16 parameters have the float32 optimizer's state, so they step as float32 ones."""
    tx = make_optimizer("adam8bit", learning_rate=0.01)
    grads = {"w": jnp.asarray(draw((16, 256))).astype(jnp.bfloat16)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    update = jax.jit(tx.update)
    updates, state = update(grads, tx.init(grads), grads)
    expected, expected_state = update(wide, tx.init(wide), wide)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates["w"], expected["w"].astype(jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)


def test_vmap_and_scan_equal_a_loop() -> None:
    tx = quantize_state(optax.scale_by_adam())
    grads = jnp.asarray(draw((3, 2, 16, 256)))  # steps, layers

    def scanned(grads: jax.Array) -> Any:
        update = lambda state, g: tx.update(g, state)[::-1]
        return jax.lax.scan(update, tx.init(grads[0]), grads)

    state, updates = jax.jit(jax.vmap(scanned, in_axes=1))(grads)
    step = jax.jit(tx.update)
    for layer in range(2):
        alone = tx.init(grads[0, layer])
        for t in range(3):
            expected, alone = step(grads[t, layer], alone)
            np.testing.assert_allclose(updates[layer, t], expected, rtol=1e-6)
        np.testing.assert_array_equal(state.nu.codes[layer], alone.nu.codes)


@pytest.mark.parametrize("spec", [("x", None), (None, "x")], ids=["rows", "columns"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_arrays_stay_sharded(axis_type: AxisType, spec: tuple[str | None, ...]) -> None:
    """Each device quantizes its own part: no collective in the compiled step."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    grads = jnp.asarray(draw((16, 2048)))
    tx = quantize_state(optax.scale_by_adam())
    expected, expected_state = jax.jit(tx.update)(grads, tx.init(grads))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        sharded = jax.device_put(grads, sharding)
        state = jax.jit(tx.init)(sharded)
        if axis_type == AxisType.Auto:  # as any Optax state there: zeros are placed by the caller
            put = lambda x: jax.device_put(x, sharding) if x.ndim == 2 else x
            state = jax.tree.map(put, state)
        step = jax.jit(tx.update).lower(sharded, state).compile()
        updates, state = step(sharded, state)
    for array in (updates, *state.mu, *state.nu):
        assert array.sharding.is_equivalent_to(sharding, 2)
    assert not any(op in step.as_text() for op in ("all-gather", "all-to-all", "all-reduce"))
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    np.testing.assert_array_equal(state.nu.codes, expected_state.nu.codes)


@pytest.mark.parametrize("rounding", ["table", "nearest"])
@pytest.mark.parametrize("columns", [512, 600], ids=["blocks over shards", "a partial block"])
def test_shards_that_end_inside_a_block(columns: int, rounding: Any) -> None:
    """Explicit axes need the blocks gathered; the numbers and the codes' sharding stay."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    grads, tx = (
        jnp.asarray(draw((16, columns))),
        quantize_state(optax.trace(0.9), rounding=rounding),
    )
    expected, expected_state = jax.jit(tx.update)(grads, tx.init(grads))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(grads, NamedSharding(mesh, PartitionSpec(None, "x")))
        state = jax.jit(tx.init)(sharded)
        types = jax.tree.map(jax.typeof, state)
        updates, state = jax.jit(tx.update)(sharded, state)
    assert jax.tree.map(jax.typeof, state) == types
    assert state.trace.codes.sharding.spec == PartitionSpec(None, "x")
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    np.testing.assert_array_equal(state.trace.codes, expected_state.trace.codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"block": 0}, "block is 0"), ({"rounding": "up"}, "'up': expected 'table' or 'nearest'")],
)
def test_errors_name_the_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_state(optax.scale_by_adam(), **arguments)


@pytest.mark.parametrize("signed", [True, False])
def test_what_a_tpu_calculates_is_the_code_book(signed: bool) -> None:
    book = code_book(signed)
    codes = jnp.arange(256, dtype=jnp.uint8)
    values = values_of_codes(codes, signed=signed)
    np.testing.assert_allclose(values, book, rtol=1e-6, atol=0)
    assert jnp.array_equal(nearest_codes(jnp.asarray(book), signed=signed), codes)
    # halfway between two numbers either may come; a little to each side it is the nearer
    middle = (book[1:].astype(np.float64) + book[:-1]) / 2
    for nudge, wanted in ((-1e-4, codes[:-1]), (1e-4, codes[1:])):
        unit = middle + nudge * np.diff(book)
        assert jnp.array_equal(nearest_codes(jnp.asarray(unit, jnp.float32), signed=signed), wanted)


def test_slices_of_a_large_array_are_updated_as_the_whole() -> None:
    tx = quantize_state(optax.scale_by_adam())
    sliced = slice_by_slice(tx, max_size=8192)
    params = {
        "rows": jnp.zeros((12, 2000)),
        "stack": jnp.zeros((3, 20, 300)),
        "prime": jnp.zeros((7, 1500)),
        "small": jnp.zeros((3, 5)),
    }
    whole_state, state = tx.init(params), sliced.init(params)
    for step in range(3):
        keys = optax.tree.split_key_like(jax.random.key(step), params)
        grads = jax.tree.map(lambda key, x: jax.random.normal(key, x.shape), keys, params)
        wanted, whole_state = jax.jit(tx.update)(grads, whole_state)
        found, state = jax.jit(sliced.update)(grads, state)
        # Slices compile to other instructions, which round the last bit otherwise; now and then
        # that moves a code to its neighbour, a hundredth of the value.
        chex.assert_trees_all_close(found, wanted, rtol=2e-2, atol=1e-3)
        chex.assert_trees_all_close(state, whole_state, rtol=1e-6, atol=1)
        differ = jax.tree.map(
            lambda a, b: jnp.mean((a != b) & (a.dtype == jnp.uint8)), state, whole_state
        )
        assert optax.tree.max(differ) < 1e-3
