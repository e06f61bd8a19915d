"""Layer-by-layer updates in JAX: the losses and weights of the plain step, with less memory."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import osd_jax
from osd_jax import llama
from osd_jax.llama.layer_state import state_of_part, state_of_parts
from osd_jax.llama.layerwise import make_layerwise_train_step
from osd_jax.llama.train import TrainState, init_state, make_train_step
from parity_tests.support.jax_toys import is_one_of_its_shape

CONFIG = llama.LlamaConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
)
WIDE = llama.LlamaConfig(  # large enough for 8-bit state
    vocab_size=300,
    hidden_size=128,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=2,
)


def make_optimizer(optimizer: str, proj_type: str = "continuous", **more: Any) -> Any:
    """Projects a kernel of each shape; in 8 bits all kernels, as the limits there assume."""
    select = llama.is_projected if "8bit" in optimizer else is_one_of_its_shape
    projected = {"rank": 4, "update_proj_gap": 20} if optimizer.startswith("galore") else {}
    return osd_jax.make_optimizer(
        optimizer,
        proj_type if projected else "std",
        learning_rate=1e-3,
        weight_decay=0.1,
        dimension_numbers=llama.dimension_numbers,
        **{"select": select} | projected | more,
    )


@functools.cache
def steps_of_adamw(micro_batches: int, clipping: float) -> tuple[Any, Any, Any]:
    """The optimizer, its plain and its layerwise step of `CONFIG`; compiled once for all tests."""
    tx = make_optimizer("galore_adamw", select=llama.is_projected)
    plain = make_train_step(CONFIG, tx, grad_clipping=clipping, accumulate="sketches")
    return tx, plain, make_layerwise_train_step(CONFIG, tx, grad_clipping=clipping)


def batches(config: llama.LlamaConfig, micro_batches: int, rows: int = 2) -> Iterator[Any]:
    """Batches whose micro-batches differ in their tokens."""
    rng = np.random.default_rng(0)
    while True:
        tokens = rng.integers(0, config.vocab_size, (micro_batches, rows, 9), np.int32)
        lengths = rng.integers(4, 10, (micro_batches, rows, 1))
        yield {"tokens": tokens, "mask": np.arange(9) < lengths}


def run(
    step: Any,
    config: llama.LlamaConfig,
    tx: Any,
    steps: int,
    micro_batches: int,
    rows_swapped: bool = False,
) -> Any:
    """Metrics of each step, and the last state."""
    state, found = init_state(llama.init(config, 0), tx), []
    as_floats = functools.partial(jax.tree.map, float)
    for number, batch in zip(range(steps), batches(config, micro_batches), strict=False):
        if rows_swapped:
            batch = {name: x[:, ::-1] for name, x in batch.items()}
        state, metrics = step(state, batch, number == 3)
        found.append(as_floats(metrics))
    return found, state


def share_off(params: optax.Params, others: optax.Params) -> float:
    """The share of the weights that differ by more than 1e-5."""
    pairs = zip(*map(jax.tree.leaves, (params, others)), strict=True)
    off = np.concatenate([np.abs(one - other).ravel() > 1e-5 for one, other in pairs])
    return float(np.mean(off))


def ways(**default: Any) -> list[Any]:
    """(optimizer, micro-batches, clipping); by default, those in which each optimizer is named."""
    return [
        pytest.param(name, *way, marks=() if way in default[name] else pytest.mark.slow)
        for name in default
        for way in itertools.product((1, 3), (0.0, 0.5))
    ]


# Clipping and micro-batches make four programs. By default each of them runs at least once, and
# each optimizer that is not in 8 bits in float32 and in float64.
ONE = ((1, 0.0), (3, 0.5))


@pytest.mark.parametrize(
    ("optimizer", "micro_batches", "clipping"),
    ways(galore_adamw=ONE, galore_lion=((1, 0.5),), galore_adamw8bit=((1, 0.0),)),
)
def test_layerwise_and_plain_step_are_the_same(
    optimizer: str, micro_batches: int, clipping: float
) -> None:
    config = WIDE if "8bit" in optimizer else CONFIG
    if optimizer == "galore_adamw":
        tx, plain, layerwise = steps_of_adamw(micro_batches, clipping)
    else:
        tx = make_optimizer(optimizer)
        plain = make_train_step(config, tx, grad_clipping=clipping, accumulate="sketches")
        layerwise = make_layerwise_train_step(config, tx, grad_clipping=clipping)
    wanted, wanted_state = run(plain, config, tx, 20, micro_batches)
    found, state = run(layerwise, config, tx, 20, micro_batches)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
    # Later on, Lion's signs differ where its momentum is a rounding error.
    for one, other in zip(found[:4], wanted, strict=False):
        np.testing.assert_allclose(one["gradient_norm"], other["gradient_norm"], rtol=1e-4)
    measured = {name: value for name, value in wanted[3].items() if "/" in name}
    assert measured
    for name, value in measured.items():
        np.testing.assert_allclose(found[3][name], value, atol=1e-4)
    assert all(np.isnan(found[4][name]) for name in measured)
    if "8bit" not in optimizer:
        chex.assert_trees_all_close(state.params, wanted_state.params, rtol=0, atol=1e-5)
    else:
        # Where two programs round otherwise, a code moves to its neighbour, and a weight by part of
        # a step. How many do shows where the plain step sums the same rows in another order.
        _, swapped = run(plain, config, tx, 20, micro_batches, rows_swapped=True)
        by_rounding = share_off(swapped.params, wanted_state.params)
        assert share_off(state.params, wanted_state.params) < 4 * by_rounding + 1e-4
        assert by_rounding < 0.02
    chex.assert_trees_all_equal_shapes_and_dtypes(state, wanted_state)


def test_inputs_in_the_hosts_memory() -> None:
    """The same step, bit for bit."""
    tx, _, layerwise = steps_of_adamw(1, 0.0)
    offloading = make_layerwise_train_step(CONFIG, tx, offload_inputs=True)
    wanted, found = (run(step, CONFIG, tx, 2, 1) for step in (layerwise, offloading))
    chex.assert_trees_all_equal(found, wanted)


def test_layerwise_with_rows() -> None:
    """Embedding and head have one second moment per row; the norms of each layer have their own."""
    tx = make_optimizer("osd_muon", rank=4, second_moment="row", full_lr=1e-3)
    plain = make_train_step(CONFIG, tx)
    layerwise = make_layerwise_train_step(CONFIG, tx)
    _, wanted = run(plain, CONFIG, tx, 3, 1)
    _, found = run(layerwise, CONFIG, tx, 3, 1)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_one_layer_has_a_state_of_its_own(micro_batches: int) -> None:
    """Its axis has length 1 in all of the state, which still is no part that layers share."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    tx = make_optimizer("galore_adamw")
    plain = make_train_step(config, tx, accumulate="sketches")
    layerwise = make_layerwise_train_step(config, tx)
    _, wanted = run(plain, config, tx, 3, micro_batches)
    _, found = run(layerwise, config, tx, 3, micro_batches)
    chex.assert_trees_all_close(found.params, wanted.params, rtol=0, atol=1e-5)
    chex.assert_trees_all_equal(
        *(osd_jax.diagnostics.subspace_states(x)[0].projector.set_at for x in (found, wanted))
    )


@pytest.mark.parametrize(
    ("optimizer", "micro_batches", "clipping"),
    ways(galore_adamw=((3, 0.0),), galore_lion=((1, 0.0),), galore_adamw8bit=()),
)
def test_in_float64_they_are_the_same_to_rounding(
    optimizer: str, micro_batches: int, clipping: float
) -> None:
    """So the remaining difference in float32 is rounding, not different arithmetic."""
    with jax.enable_x64(True):
        config = WIDE if "8bit" in optimizer else CONFIG
        tx = make_optimizer(optimizer)
        plain = make_train_step(config, tx, grad_clipping=clipping, accumulate="sketches")
        layerwise = make_layerwise_train_step(config, tx, grad_clipping=clipping)
        ends = []
        for step in (plain, layerwise):
            params = jax.tree.map(lambda x: x.astype(jnp.float64), llama.init(config, 0))
            state = init_state(params, tx)
            for _, batch in zip(range(6), batches(config, micro_batches), strict=False):
                state, metrics = step(state, batch, False)
            ends.append((metrics["loss"], state.params))
        # The model's norms, softmax and loss are float32; so is what 8-bit codes are made from.
        if "8bit" not in optimizer:
            chex.assert_trees_all_close(*ends, rtol=0, atol=1e-6)
            return
        # Rounding of d = 1e-6 moves a value to a neighbouring code, s = 0.05 away, with probability
        # 2 d / s: 2.4e-4 in 6 steps, and 1e-3 at most. That is sqrt(1e-3) s = 1.6e-3 of the moments
        # in norm, and of the distance that the weights move.
        assert float(ends[0][0]) == pytest.approx(float(ends[1][0]), abs=1e-5)
        moved, off = (
            optax.tree.norm(jax.tree.map(jnp.subtract, ends[0][1], others))
            for others in (llama.init(config, 0), ends[1][1])
        )
        assert off <= 2e-3 * moved


TIED = {"galore_adafactor": False, "adamw": True, "adam8bit": False, "sgd": True}  # by default


@pytest.mark.parametrize(
    ("optimizer", "tied"),
    [
        pytest.param(name, tied, marks=[pytest.mark.slow] * (tied != TIED[name]))
        for name in TIED
        for tied in (False, True)
    ],
)
def test_any_separable_optimizer_and_a_tied_embedding(optimizer: str, tied: bool) -> None:
    fields = CONFIG.to_hf_dict() | {"tie_word_embeddings": tied}
    config = llama.LlamaConfig.from_hf_dict(fields)
    tx = make_optimizer(optimizer)
    wanted, wanted_state = run(make_train_step(config, tx), config, tx, 4, 1)
    found, state = run(make_layerwise_train_step(config, tx), config, tx, 4, 1)
    assert [x["loss"] for x in found] == pytest.approx([x["loss"] for x in wanted], abs=1e-5)
    chex.assert_trees_all_close(state.params, wanted_state.params, rtol=0, atol=1e-5)


def test_a_plain_optax_optimizer() -> None:
    tx = optax.apply_if_finite(optax.adamw(1e-2), 5)
    wanted, wanted_state = run(make_train_step(CONFIG, tx), CONFIG, tx, 4, 2)
    found, state = run(make_layerwise_train_step(CONFIG, tx), CONFIG, tx, 4, 2)
    assert [x["loss"] for x in found] == pytest.approx([x["loss"] for x in wanted], abs=1e-5)
    chex.assert_trees_all_close(state.params, wanted_state.params, rtol=0, atol=1e-5)


def test_accumulated_sketches_against_whole_gradients() -> None:
    """R is exact: `std`, which reads no more, takes the same steps; A is the mean of the parts'."""
    for proj_type, tolerance in (("std", 1e-5), ("continuous", 1e-2)):
        tx = make_optimizer("galore_adamw", proj_type, update_proj_gap=200)
        steps = [make_train_step(CONFIG, tx, accumulate=how) for how in ("gradients", "sketches")]
        # From the second update on, so that both have P of the same gradient.
        first = next(batches(CONFIG, 3))
        start, _ = steps[0](init_state(llama.init(CONFIG, 0), tx), first, False)
        ends = []
        for step in steps:
            state = jax.tree.map(jnp.copy, start)
            for _, batch in zip(range(3), batches(CONFIG, 3), strict=False):
                state, _ = step(state, batch, False)
            ends.append(state.params)
        far = optax.tree.max(jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), *ends))
        assert far < tolerance
        if proj_type == "continuous":
            assert far > 1e-6  # else this test compares nothing


@pytest.mark.parametrize(("micro_batches", "clipping"), ONE)
def test_a_loss_that_is_not_finite_changes_nothing(micro_batches: int, clipping: float) -> None:
    tx, _, step = steps_of_adamw(micro_batches, clipping)
    state = init_state(llama.init(CONFIG, 0), tx)
    batch = next(batches(CONFIG, micro_batches))
    state, _ = step(state, batch, False)
    broken = state._replace(params=state.params | {"norm": state.params["norm"] * jnp.nan})
    before = jax.tree.map(jnp.copy, broken)
    after, metrics = step(broken, batch, False)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    chex.assert_trees_all_equal(after.params, before.params)
    of_subspace = lambda state: osd_jax.diagnostics.subspace_states(state.opt_state)
    chex.assert_trees_all_equal(of_subspace(after), of_subspace(before))
    healed = after._replace(params=after.params | {"norm": jnp.ones_like(after.params["norm"])})
    _, metrics = step(healed, batch, False)
    assert metrics["skipped"] == 1 and metrics["skipped_in_a_row"] == 0


def test_a_checkpoint_of_one_step_goes_on_with_the_other() -> None:
    tx, plain, layerwise = steps_of_adamw(1, 0.0)
    wanted, _ = run(plain, CONFIG, tx, 6, 1)
    state, found = init_state(llama.init(CONFIG, 0), tx), []
    alternating = [plain, layerwise] * 3
    for step, batch in zip(alternating, batches(CONFIG, 1), strict=False):
        state, metrics = step(state, batch, False)
        found.append(float(metrics["loss"]))
    assert found == pytest.approx([float(x["loss"]) for x in wanted], abs=1e-5)


def test_a_basis_waits_alike_in_both_steps() -> None:
    """Output projections that start at zero leave all before them without a first gradient."""
    tx, plain, layerwise = steps_of_adamw(3, 0.5)

    def states(step: Any) -> Iterator[Any]:
        params = llama.init(CONFIG, 0)
        for block, name in (("attention", "output"), ("mlp", "down")):
            params["layers"][block][name] = jnp.zeros_like(params["layers"][block][name])
        state = init_state(params, tx)
        for _, batch in zip(range(4), batches(CONFIG, 3), strict=False):
            state, _ = step(state, batch, False)
            yield jax.device_get(state)

    for step, (one, other) in enumerate(zip(states(plain), states(layerwise), strict=True)):
        wanted, found = (
            osd_jax.diagnostics.subspace_states(x.opt_state)[0].projector.set_at
            for x in (one, other)
        )
        chex.assert_trees_all_equal(found, wanted)
        chex.assert_trees_all_close(other.params, one.params, rtol=0, atol=1e-5)
        query, output = (wanted["layers"]["attention"][name] for name in ("query", "output"))
        assert output.tolist() == [0] * CONFIG.num_hidden_layers
        assert query.tolist() == [-1 if step == 0 else 1] * CONFIG.num_hidden_layers


def test_one_compilation() -> None:
    tx, _, step = steps_of_adamw(1, 0.0)
    run(step, CONFIG, tx, 3, 1)
    assert step._cache_size() == 1


def test_state_in_parts_is_the_whole_again() -> None:
    params = llama.init(CONFIG, 0)
    tx = make_optimizer("galore_adafactor")
    state = tx.init(params)
    parts = [state_of_part(tx, {name: x}, state) for name, x in params.items()]
    named = [
        {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(part)}
        for part in parts
    ]
    chex.assert_trees_all_equal(state_of_parts(state, named), state)


def test_what_cannot_go_layer_by_layer_is_refused() -> None:
    batch = next(batches(CONFIG, 2))
    params = llama.init(CONFIG, 0)
    before = make_optimizer("galore_adamw", move_projector="before")
    step = make_layerwise_train_step(CONFIG, before)
    with pytest.raises(ValueError, match="move_projector is 'before'"):
        step(init_state(params, before), batch, False)
    with pytest.raises(ValueError, match="move_projector is 'before'"):
        make_train_step(CONFIG, before, accumulate="sketches")
    with pytest.raises(ValueError, match="accumulate is 'grads': expected"):
        make_train_step(CONFIG, before, accumulate="grads")
    flat = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: jnp.zeros(x.size), params),
        lambda updates, state, params=None: (updates, state),
    )
    flat = optax.apply_if_finite(flat, 5)
    step = make_layerwise_train_step(CONFIG, flat)
    with pytest.raises(ValueError, match="cannot be updated layer by layer"):
        step(init_state(llama.init(CONFIG, 0), flat), next(batches(CONFIG, 1)), False)


@pytest.mark.usefixtures("optimized")
def test_less_is_alive_than_in_the_plain_step() -> None:
    """By the compiler's count: what a further layer costs the layerwise step is its input.

    On a CPU also a copy of `up` and of `down`, which XLA makes before it writes the new layer into
    all: their gradients do not depend on their old values, so nothing else orders the two.
    """
    tx = make_optimizer("galore_adamw")

    def temporaries(make: Any, layers: int) -> int:
        fields = WIDE.to_hf_dict() | {"num_hidden_layers": layers}
        config = llama.LlamaConfig.from_hf_dict(fields)
        params = jax.eval_shape(lambda: llama.init(config, 0))
        state = TrainState(
            jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params)
        )
        batch = {
            "tokens": jax.ShapeDtypeStruct((1, 2, 16), jnp.int32),
            "mask": jax.ShapeDtypeStruct((1, 2, 16), bool),
        }
        flag = jax.ShapeDtypeStruct((), bool)
        compiled = make(config, tx).lower(state, batch, flag).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain = functools.partial(make_train_step, remat=True)
    layerwise = make_layerwise_train_step
    growth = {
        make: (temporaries(make, 12) - temporaries(make, 4)) / 8 for make in (plain, layerwise)
    }
    layers = jax.tree.map(lambda x: x[0], llama.init(WIDE, 0)["layers"])
    assert growth[plain] > sum(x.nbytes for x in jax.tree.leaves(layers))
    inputs = 2 * 16 * WIDE.hidden_size * 4
    copied = layers["mlp"]["up"].nbytes + layers["mlp"]["down"].nbytes
    assert growth[layerwise] < inputs + copied + 1024  # and a few numbers, such as norms
