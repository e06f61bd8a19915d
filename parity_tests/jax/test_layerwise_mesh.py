"""Layer-by-layer updates in JAX on meshes of 8 virtual devices: the numbers of one device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from launch.compile_tpu.hlo import Collective, collectives
from osd_jax import llama, make_optimizer
from osd_jax.llama.layerwise import make_layerwise_train_step
from osd_jax.llama.partition import batch_sharding
from osd_jax.llama.train import init_state, make_train_step, train_state_sharding
from osd_jax.sharding import make_mesh
from parity_tests.support.mesh_runs import train

CONFIG = llama.LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
)
STEPS, MEASURED, ROWS, LENGTH = 20, 3, 16, 24
Sizes = tuple[int, int, int]


def meshes(default: Sizes) -> list[Any]:
    """The meshes; only one runs by default, since each takes many seconds to compile."""
    sizes = ((8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4))
    return [pytest.param(x, marks=[pytest.mark.slow] * (x != default)) for x in sizes]


class Run(NamedTuple):
    """Losses of 20 steps, the last norm, the compiler's figure of temporary bytes, its program."""

    losses: np.ndarray
    norm: float
    temporaries: int
    program: str


@functools.cache
def run(
    make: Any,
    sizes: Sizes | None,
    proj_type: str = "continuous",
    micro_batches: int = 1,
    **options: Any,
) -> Run:
    """Trains on one device, or on a mesh, with the same batches."""
    mesh = None if sizes is None else make_mesh(*sizes)
    # A larger step would let rounding grow past 1e-5 within the steps.
    tx = make_optimizer(
        "galore_adamw", proj_type, learning_rate=1e-3, rank=8, update_proj_gap=15,
        select=llama.is_projected, dimension_numbers=llama.dimension_numbers,
    )  # fmt: skip
    step = make(CONFIG, tx, mesh=mesh, **options)
    measures = [number == MEASURED for number in range(STEPS)]
    shape, layerwise = (micro_batches, ROWS, LENGTH), make is make_layerwise_train_step
    done = train(CONFIG, tx, step, mesh, shape, measures, layerwise=layerwise)
    energies = [metrics["energy/attention/query"] for metrics in done.metrics]
    assert np.isfinite(energies).tolist() == measures
    if mesh is not None:
        layout = train_state_sharding(tx, done.state.params, mesh, layerwise=layerwise)
        is_same = lambda x, to: x.sharding.is_equivalent_to(to, x.ndim)
        assert all(jax.tree.leaves(jax.tree.map(is_same, done.state, layout)))
    memory = done.compiled.memory_analysis().temp_size_in_bytes
    norm = done.metrics[-1]["gradient_norm"]
    return Run(done.losses, norm, memory, done.compiled.as_text())


@pytest.mark.parametrize("sizes", meshes((2, 2, 2)), ids=str)
def test_losses_are_those_of_the_plain_step_on_one_device(sizes: Sizes) -> None:
    found, alone = run(make_layerwise_train_step, sizes), run(make_train_step, None)
    np.testing.assert_allclose(found.losses, alone.losses, atol=1e-5)
    assert found.norm == pytest.approx(alone.norm, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "sizes", "tied"),
    [
        (make_train_step, (2, 2, 2), False),
        (make_layerwise_train_step, (2, 2, 2), False),
        (make_layerwise_train_step, (2, 2, 2), True),
        (make_layerwise_train_step, (1, 8, 1), False),
    ],
)
def test_a_few_tokens_have_the_gradients_of_one_device(
    make: Any, sizes: tuple[int, int, int], tied: bool
) -> None:
    """XLA partitions a step with other numbers of tokens in another way."""
    config = llama.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    tx = make_optimizer("adamw", "std", learning_rate=1e-3)
    found = []
    for mesh in (None, make_mesh(*sizes)):
        step = make(config, tx, mesh=mesh)
        found.append(train(config, tx, step, mesh, (1, 8, 16), [False] * 2))
    alone, split = found
    np.testing.assert_allclose(split.losses, alone.losses, atol=1e-5)
    for one, other in zip(split.metrics, alone.metrics, strict=True):
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)


@pytest.mark.parametrize("sizes", meshes((2, 2, 2))[1:], ids=str)
def test_no_stack_is_gathered_for_one_layer(sizes: Sizes) -> None:
    """Of weights or state: only a layer's slice is."""
    assert not gathered_stacks(run(make_layerwise_train_step, sizes).program, CONFIG)


def test_no_stack_of_8bit_state_is_gathered_for_one_layer() -> None:
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=512)
    tx = make_optimizer(
        "galore_adamw8bit", "continuous_adam8bit", learning_rate=1e-3, rank=64, update_proj_gap=15,
        projector_init="qr", select=llama.is_projected, dimension_numbers=llama.dimension_numbers,
    )  # fmt: skip
    mesh = make_mesh(2, 2, 2)
    like = jax.eval_shape(lambda: init_state(llama.init(config, 0), tx))
    layout = train_state_sharding(tx, like.params, mesh, layerwise=True)
    state = jax.tree.map(lambda x, to: x.update(sharding=to), like, layout)
    tokens = jax.ShapeDtypeStruct((1, ROWS, LENGTH), np.int32, sharding=batch_sharding(mesh))
    batch = {"tokens": tokens, "mask": tokens.update(dtype=np.bool)}
    step: Any = make_layerwise_train_step(config, tx, mesh=mesh)
    compiled = step.lower(state, batch, jax.ShapeDtypeStruct((), np.bool)).compile()
    assert not gathered_stacks(compiled.as_text(), config)


def gathered_stacks(program: str, config: llama.LlamaConfig) -> list[Collective]:
    """All-gathers of arrays with an axis of layers, inside the loop over layers."""
    gathers = [x for x in collectives(program) if x.op == "all-gather" and x.times > 1]
    gathers = [one for one in gathers if LENGTH not in one.shape]  # no activations
    assert len(gathers) > 20
    layers = config.num_hidden_layers
    return [one for one in gathers if len(one.shape) > 2 and one.shape[0] == layers]


@pytest.mark.parametrize("sizes", meshes((8, 1, 1)), ids=str)
def test_less_is_alive_than_in_the_plain_step(sizes: Sizes) -> None:
    plain = run(make_train_step, sizes, remat=True)
    assert run(make_layerwise_train_step, sizes).temporaries < plain.temporaries


@pytest.mark.parametrize("sizes", meshes((8, 1, 1))[:2], ids=str)
def test_reduced_sketches_give_the_same_losses(sizes: Sizes) -> None:
    """With `std`, which does not read the norm that reduced sketches estimate."""
    found = run(make_layerwise_train_step, sizes, "std", compress_gradients=True)
    alone = run(make_train_step, None, "std")
    np.testing.assert_allclose(found.losses, alone.losses, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [False, True])
def test_several_micro_batches_and_clipping(reduced: bool) -> None:
    args, options = ("std", 2), {"grad_clipping": 0.3}
    alone = run(make_layerwise_train_step, None, *args, **options)
    found = run(make_layerwise_train_step, (2, 2, 2), *args, **options, compress_gradients=reduced)
    np.testing.assert_allclose(found.losses, alone.losses, atol=1e-5)
    assert found.norm == pytest.approx(alone.norm, rel=1e-4)


def test_reduced_sketches_need_a_mesh() -> None:
    tx = make_optimizer("galore_adamw", "std", learning_rate=0.1, rank=4)
    with pytest.raises(ValueError, match="mesh's data axis: give mesh"):
        make_layerwise_train_step(CONFIG, tx, compress_gradients=True)
