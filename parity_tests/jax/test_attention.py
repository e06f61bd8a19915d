"""Each implementation of attention against the written-out one, and against each document alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import osd_jax
from osd_jax import llama, sharding
from osd_jax.llama import LlamaConfig
from osd_jax.llama.attention import BLOCKWISE_FROM, select_attention, splash
from osd_jax.llama.attention_plain import blockwise, written_out
from osd_jax.llama.layerwise import make_layerwise_train_step
from osd_jax.llama.partition import on
from osd_jax.llama.train import init_state, make_eval_step, make_train_step

# 200 is not a multiple of a block of 128: the last one is partly filled.
LENGTH, HEADS, SIZE = 200, 4, 16
IN_STEPS = functools.partial(splash, interpret=True)


def segments_of(kind: str, batch: int, length: int) -> jax.Array | None:
    """Padding on the left or documents of several lengths; each row differs."""
    place = np.arange(length)
    starts = np.array([[length // 3], [length // 2]] * batch)[:batch]
    if kind == "left padding":
        return jnp.asarray(np.where(place < starts, -1, 1), jnp.int32)
    if kind == "packed":
        return jnp.asarray(1 + (place >= starts) + 1 * (place >= starts + 7), jnp.int32)
    return None


def drawn(key_heads: int, dtype: str = "float32", length: int = LENGTH, batch: int = 2) -> Any:
    """Query, key, value, and a weight for each entry of the result."""
    keys = jax.random.split(jax.random.key(key_heads), 4)
    shapes = [(batch, length, heads, SIZE) for heads in (HEADS, key_heads, key_heads)]
    *inputs, weight = [
        2 * jax.random.normal(key, shape)
        for key, shape in zip(keys, [*shapes, (batch, length, HEADS * SIZE)], strict=True)
    ]
    return [x.astype(dtype) for x in inputs], weight


def result_and_gradients(attention: Any, inputs: Any, weight: Any, segments: Any) -> list[Any]:
    def total(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        attended = attention(*inputs, segments)
        return jnp.sum(attended * weight), attended

    (_, attended), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(
        *inputs
    )
    return [attended, *gradients]


def deviation(found: list[Any], expected: list[Any]) -> float:
    """The largest difference, relative to the largest entry of each array."""
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)
    return max(
        float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
        for a, b in zip(found, expected, strict=True)
    )


KINDS = ("whole rows", "left padding", "packed")


@pytest.mark.parametrize(
    ("attention", "kind", "key_heads"),
    [
        *((blockwise, kind, heads) for kind in KINDS for heads in (4, 2, 1)),
        (IN_STEPS, "whole rows", 4),
        (IN_STEPS, "left padding", 1),
        (IN_STEPS, "packed", 2),
    ],
)
def test_equals_the_written_out_one(attention: Any, kind: str, key_heads: int) -> None:
    inputs, weight = drawn(key_heads)
    segments = segments_of(kind, 2, LENGTH)
    expected = result_and_gradients(written_out, inputs, weight, segments)
    assert deviation(result_and_gradients(attention, inputs, weight, segments), expected) <= 1e-5


@pytest.mark.parametrize("attention", [blockwise, IN_STEPS], ids=["blockwise", "splash"])
def test_bfloat16_is_as_near_as_the_written_out_one(attention: Any) -> None:
    """To the float32 results of the same inputs, both by a few of bfloat16's roundings, 2^-9."""
    inputs, weight = drawn(2, "bfloat16")
    segments = segments_of("packed", 2, LENGTH)
    wide = [x.astype(jnp.float32) for x in inputs]
    expected = result_and_gradients(written_out, wide, weight, segments)
    own = deviation(result_and_gradients(written_out, inputs, weight, segments), expected)
    found = result_and_gradients(attention, inputs, weight, segments)
    assert [x.dtype for x in found] == [jnp.bfloat16] * 4
    assert own <= 4 * 2**-8
    assert deviation(found, expected) <= 4 * 2**-8


def test_a_kernel_on_a_mesh_computes_its_own_rows_and_heads() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    inputs, weight = drawn(2, length=128, batch=4)
    segments = segments_of("packed", 4, 128)
    expected = result_and_gradients(written_out, inputs, weight, segments)
    arguments = jax.device_put((inputs, weight, segments), jax.NamedSharding(mesh, jax.P()))
    with on(mesh):
        assert deviation(result_and_gradients(IN_STEPS, *arguments), expected) <= 1e-5
        # Three rows do not divide over four devices: each of these computes all of them.
        few = [x[:3] for x in (*arguments[0], arguments[2])]
        assert deviation([jax.jit(IN_STEPS)(*few)], [expected[0][:3]]) <= 1e-5


def test_blocks_never_hold_all_scores() -> None:
    inputs, weight = drawn(2, length=1024, batch=1)

    def holds_all(attention: Any) -> bool:
        total = lambda *inputs: jnp.sum(attention(*inputs) * weight)
        step = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*inputs).compile()
        return "1024,1024]" in (step.as_text() or "")

    assert holds_all(written_out)
    assert not holds_all(blockwise)


# ------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "length", "chosen"),
    [
        ("cpu", "float32", 64, 256, "written_out"),
        ("cpu", "bfloat16", 64, BLOCKWISE_FROM, "blockwise"),
        ("gpu", "bfloat16", 64, 256, "cudnn"),
        ("gpu", "float32", 64, 256, "written_out"),
        ("gpu", "float32", 64, 4096, "blockwise"),
        ("gpu", "bfloat16", 52, 4096, "blockwise"),
        ("gpu", "bfloat16", 256, 4096, "blockwise"),
        ("tpu", "bfloat16", 64, 256, "splash"),
        ("tpu", "float32", 64, 64, "written_out"),
    ],
)
def test_auto_chooses_by_hardware(
    backend: str, dtype: str, head_dim: int, length: int, chosen: str
) -> None:
    shape: dict[str, Any] = {"dtype": dtype, "head_dim": head_dim, "length": length}
    assert select_attention("auto", backend, **shape) == chosen
    assert select_attention(chosen, backend, **shape) == chosen


@pytest.mark.parametrize(
    ("name", "backend", "dtype", "head_dim", "match"),
    [
        ("flash", "cpu", "float32", 64, "'flash': expected one of auto, written_out"),
        ("cudnn", "cpu", "bfloat16", 64, "'cudnn': it needs a GPU, .* this is a cpu"),
        ("cudnn", "gpu", "float32", 64, "'cudnn': .* a gpu with float32"),
        ("cudnn", "gpu", "bfloat16", 52, "'cudnn': .* heads of 52"),
        ("splash", "gpu", "bfloat16", 64, "'splash': it needs a TPU, but this is a gpu"),
    ],
)
def test_what_a_backend_cannot_run_is_refused(
    name: str, backend: str, dtype: str, head_dim: int, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        select_attention(name, backend, dtype=dtype, head_dim=head_dim, length=256)


# -------------------------------------------------------------------------------- documents

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
)
DOCUMENTS = (5, 12, 7)
TOKENS = np.random.default_rng(0).integers(0, 61, (1, sum(DOCUMENTS))).astype(np.int32)
SEGMENTS = np.repeat([[1, 2, 3]], DOCUMENTS, axis=1).astype(np.int32)
IS_LABEL = np.roll(SEGMENTS, 1, axis=1) == SEGMENTS


@pytest.mark.parametrize("attention", ["written_out", "blockwise"])
def test_a_document_in_a_packed_row_is_as_alone(attention: str) -> None:
    params = llama.init(CONFIG, 0)
    logits = jax.jit(llama.forward, static_argnums=1, static_argnames="attention")
    packed = logits(params, CONFIG, TOKENS, segments=SEGMENTS, attention=attention)
    cuts = np.cumsum(DOCUMENTS)[:-1]
    alone = [logits(params, CONFIG, part) for part in np.split(TOKENS, cuts, axis=1)]
    assert np.abs(packed - jnp.concatenate(alone, axis=1)).max() <= 1e-5
    together = logits(params, CONFIG, TOKENS)
    assert np.abs(packed - together)[:, : DOCUMENTS[0]].max() <= 1e-5
    assert np.abs(packed - together)[:, DOCUMENTS[0] :].max() > 0.01


def test_every_step_keeps_documents_separate() -> None:
    params = llama.init(CONFIG, 0)
    expected, count = llama.loss(params, CONFIG, TOKENS, IS_LABEL, segments=SEGMENTS)
    assert int(count) == TOKENS.size - len(DOCUMENTS)
    one = {"tokens": TOKENS, "mask": IS_LABEL, "segments": SEGMENTS}
    total, number = make_eval_step(CONFIG, "blockwise")(params, one)
    assert number == count and abs(float(total - expected)) <= 1e-4
    tx = osd_jax.make_optimizer("sgd", "std", learning_rate=0.1)
    batch = {name: x[None] for name, x in one.items()}
    for make in (make_train_step, make_layerwise_train_step):
        step = make(CONFIG, tx, attention="blockwise")
        state, metrics = step(init_state(llama.init(CONFIG, 0), tx), batch, False)
        assert abs(float(metrics["loss"] - expected / count)) <= 1e-5
        total, _ = make_eval_step(CONFIG)(state.params, one)
        assert total < expected
