"""Meshes: sharding of weights, optimizer state and batches, and the communication of a step.

Eight virtual CPU devices must give the numbers of one.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import osd_jax
from launch.compile_tpu.hlo import Collective, collectives
from osd_jax import llama, make_optimizer, sharding
from osd_jax.llama.checkpoint import Checkpoints
from osd_jax.llama.layerwise import make_layerwise_train_step
from osd_jax.llama.partition import (
    batch_sharding,
    for_products,
    on,
    partition_specs,
    scattered_specs,
    shards_over_data,
    stored_specs,
)
from osd_jax.llama.train import (
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    train_state_sharding,
)
from osd_jax.sharding import make_mesh, mesh_axes, parse_mesh, state_sharding, unpadded
from osd_jax.trees import path_name
from osd_names import FULL_RANK_OPTIMIZERS, PROJ_TYPES, PROJECTIONS, SUBSPACE_OPTIMIZERS
from parity_tests.support import CONFIGS
from parity_tests.support.jax_toys import is_one_of_its_shape
from parity_tests.support.mesh_runs import train

EVEN = llama.LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
)
# 60 = 4 * 15 does not divide by 8, 90 = 2 * 45 not by 4, 251 by nothing, 3 layers not by 2.
ODD = llama.LlamaConfig(
    vocab_size=251,
    hidden_size=60,
    intermediate_size=90,
    num_hidden_layers=3,
    num_attention_heads=6,
)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)]
RANK = 8
STEPS = 4
ROWS, LENGTH = 16, 12


def optimizer(name: str = "galore_adamw", proj_type: str = "continuous", **more: Any) -> Any:
    # A larger step would let rounding grow past 1e-5 within the few steps.
    options = {"learning_rate": 0.002, "rank": RANK, "update_proj_gap": 3} | more
    return make_optimizer(name, proj_type, dimension_numbers=llama.dimension_numbers, **options)


def shapes(config: llama.LlamaConfig) -> Any:
    return jax.eval_shape(lambda: llama.init(config, 0))


# ------------------------------------------------------------------------------------ meshes


def test_a_mesh_is_read_from_text() -> None:
    assert parse_mesh("data=2, tensor=4") == {"data": 2, "fsdp": 1, "tensor": 4}
    assert parse_mesh("") == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(**parse_mesh("fsdp=-1,tensor=2")).shape) == {
        "data": 1, "fsdp": 4, "tensor": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "model=2.*expected each of data, fsdp, tensor"),
        ("data=2,data=4", "data=4.*at most once"),
        ("data", "expected a whole number"),
        ("data=two", "expected a whole number"),
        ("data=0", "at least 1"),
        ("data=-1,fsdp=-1", "only one axis can be -1"),
    ],
)
def test_a_mesh_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (4, 4, 1), (-1, 3, 1), (1, 1, 1)])
def test_a_mesh_of_other_than_all_devices_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="there are 8"):
        make_mesh(*sizes)


# ----------------------------------------------------------------------------------- weights


def test_every_matrix_is_split_on_both_axes() -> None:
    specs = partition_specs(shapes(EVEN), make_mesh(2, 2, 2))
    assert specs["embedding"] == P("tensor", "fsdp") and specs["head"] == P("fsdp", "tensor")
    layers = specs["layers"]
    for kernel in (*(layers["attention"][k] for k in ("query", "key", "value")),
                   layers["mlp"]["gate"], layers["mlp"]["up"]):  # fmt: skip
        assert kernel == P(None, "fsdp", "tensor")
    assert layers["attention"]["output"] == layers["mlp"]["down"] == P(None, "tensor", "fsdp")
    assert specs["norm"] == P(None) and layers["mlp_norm"] == P(None, None)


def test_fsdp_alone_splits_the_longer_axis_of_a_layer_where_it_divides_it() -> None:
    few_keys = dataclasses.replace(EVEN, num_key_value_heads=2)
    specs = partition_specs(shapes(few_keys), make_mesh(1, 8, 1))
    attention, mlp = specs["layers"]["attention"], specs["layers"]["mlp"]
    for kernel in (attention["query"], attention["output"], mlp["gate"], mlp["up"]):
        assert kernel == P(None, None, "fsdp")
    for kernel in (attention["key"], attention["value"], mlp["down"]):
        assert kernel == P(None, "fsdp", None)
    assert specs["embedding"] == P(None, "fsdp") and specs["head"] == P("fsdp", None)
    odd = dataclasses.replace(EVEN, intermediate_size=5461)
    mlp = partition_specs(shapes(odd), make_mesh(1, 8, 1))["layers"]["mlp"]
    assert mlp["gate"] == P(None, "fsdp", None) and mlp["down"] == P(None, None, "fsdp")


# A quarter of the hidden axis is 12 values, for which a TPU stores 16.
TILES = dataclasses.replace(EVEN, vocab_size=1024, hidden_size=48)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that store arrays in tiles."""
    monkeypatch.setattr(sharding, "_has_tiles", lambda mesh: True)


@pytest.mark.usefixtures("tiles")
def test_the_embedding_and_the_head_are_stored_in_whole_tiles() -> None:
    mesh, both = make_mesh(2, 4, 1), ("data", "fsdp")
    stored = stored_specs(shapes(TILES), mesh, shard_over_data=True)
    assert stored["embedding"] == P(both, None) and stored["head"] == P(None, both)
    scattered = scattered_specs(shapes(TILES), mesh, True)
    assert scattered["embedding"] == P("data", "fsdp") and scattered["head"] == P("fsdp", "data")
    assert stored["layers"] == scattered["layers"]
    # Nothing is padded; 1002 tokens do not divide by 8; an eighth of 512 is padded too.
    for other in (EVEN, *(dataclasses.replace(TILES, vocab_size=n) for n in (1002, 512))):
        assert stored_specs(shapes(other), mesh, True) == scattered_specs(shapes(other), mesh, True)
    assert stored_specs(shapes(TILES), mesh) == partition_specs(shapes(TILES), mesh)
    beside_tensor = make_mesh(2, 2, 2)
    assert stored_specs(shapes(TILES), beside_tensor, True) == scattered_specs(
        shapes(TILES), beside_tensor, True
    )


@pytest.mark.parametrize(
    ("shape", "before", "after"),
    [
        ((3, 96, 1024), P(None, "fsdp", None), P(None, None, "fsdp")),  # 12 rows
        ((3, 1024, 96), P(None, None, "fsdp"), P(None, "fsdp", None)),
        ((1024, 96), P(None, "fsdp"), P("fsdp", None)),
        ((3, 128, 1024), P(None, "fsdp", None), None),  # 16 rows
        ((3, 96, 1020), P(None, "fsdp", None), None),  # 1020 does not divide by 8
        ((3, 96, 96), P(None, "fsdp", None), None),  # padded either way
        ((24, 4, 100), P("fsdp", None, None), None),  # by layers
        ((3, 96, 1024), P(None, "fsdp", "data"), None),  # the other axis is split
    ],
)
@pytest.mark.usefixtures("tiles")
def test_a_mesh_axis_splits_the_axis_that_is_not_padded(shape: Any, before: P, after: P) -> None:
    for mesh in (make_mesh(1, 8, 1), make_mesh(1, 8, 1).abstract_mesh):
        assert unpadded(shape, before, mesh, ("data", "fsdp")) == (after or before)


def test_only_tpus_store_tiles() -> None:
    mesh, spec = make_mesh(1, 8, 1), P("fsdp", None)
    assert unpadded((96, 1024), spec, mesh, ("fsdp",)) == spec


def test_what_does_not_divide_is_whole_and_named(caplog: pytest.LogCaptureFixture) -> None:
    config = llama.LlamaConfig(250, 52, 90, 2, 2)
    with caplog.at_level(logging.WARNING, logger="osd_jax.llama.partition"):
        specs = partition_specs(shapes(config), make_mesh(1, 2, 4))
    assert specs["embedding"] == P(None, "fsdp")
    assert specs["layers"]["mlp"]["gate"] == P(None, "fsdp", None)
    assert specs["layers"]["attention"]["query"] == P(None, "fsdp", "tensor")
    assert "layers/mlp/gate (2, 52, 90): 90 is not divisible by tensor=4" in caplog.text
    assert "query" not in caplog.text


def test_other_models_are_told_to_write_their_own_specs() -> None:
    with pytest.raises(ValueError, match="'dense/kernel' does not belong to osd_jax.llama"):
        partition_specs({"dense": {"kernel": jnp.ones((2, 2))}}, make_mesh(8))


# ----------------------------------------------------------------------------- optimizer state

SPECS = {"attention": {"query": P(None, "x", "y")}, "embedding": P("y", "x"), "norm": P(None)}
PARAMS = {
    "attention": {"query": jax.ShapeDtypeStruct((2, 1024, 2048), jnp.float32)},
    "embedding": jax.ShapeDtypeStruct((512, 1024), jnp.float32),
    "norm": jax.ShapeDtypeStruct((64,), jnp.float32),
}
NUMBERS = {
    "attention": {"query": osd_jax.SubspaceDimensionNumbers(1, 2)},
    "embedding": osd_jax.SubspaceDimensionNumbers(0, 1),
    "norm": osd_jax.SubspaceDimensionNumbers((), 0),
}


def own_mesh() -> Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def state_specs(
    tx: Any, params: Any = PARAMS, specs: Any = SPECS, share_over: Any = ()
) -> dict[str, tuple[Any, Any]]:
    """By path: (shape, spec), without further splits of what the weights' axes leave whole."""
    mesh = own_mesh()
    layout = state_sharding(tx, params, specs, mesh, share_over)
    found = jax.tree_util.tree_flatten_with_path(layout)[0]
    state = jax.tree.leaves(jax.eval_shape(tx.init, params))
    assert all(x.mesh == mesh for _, x in found)
    return {
        path_name(path): (leaf.shape, tuple(x.spec) + (None,) * (leaf.ndim - len(x.spec)))
        for (path, x), leaf in zip(found, state, strict=True)
    }


ALL = [(o, p) for o in SUBSPACE_OPTIMIZERS for p in PROJ_TYPES] + [
    (o, "std") for o in FULL_RANK_OPTIMIZERS
]


@pytest.mark.parametrize(("name", "proj_type"), ALL)
def test_state_follows_the_axes_of_the_weight(name: str, proj_type: str) -> None:
    """By sizes, which differ here: each axis of the state is of the weight's axis of its size."""
    tx = make_optimizer(name, proj_type, learning_rate=0.1, rank=16, dimension_numbers=NUMBERS)
    by_size = {"query": {1024: "x", 2048: "y"}, "embedding": {512: "y", 1024: "x"}, "norm": {}}
    side = PROJECTIONS[proj_type].side
    seen = 0
    for path, (shape, spec) in state_specs(tx).items():
        last = path.rsplit("/", 1)[-1]
        owner = next((owner for owner in by_size if owner in path.split("/")), None)
        if owner is None:
            assert shape == () == spec, path
        elif last == "scales":
            # 2048 in blocks of 256 is four whole ones on each of two; 1024 is one on each of four.
            blocks = {size // 256: axis for size, axis in by_size[owner].items() if size >= 1024}
            assert spec[-1] == blocks.get(shape[-1]), path
            assert spec[-2] == by_size[owner].get(shape[-2]), path
        else:
            assert spec == tuple(by_size[owner].get(size) for size in shape), path
            seen += owner == "query"
    assert seen > 0 or name == "sgd"
    if name.startswith("galore") and side in ("input", "output"):
        (basis,) = [v for k, v in state_specs(tx).items() if "basis" in k]
        p = 1024 if side == "input" else 2048
        assert basis == ((2, p, 16), (None, "x" if p == 1024 else "y", None))


@pytest.mark.parametrize(("proj_type", "p", "r"), [("std", "x", "y"), ("reverse_std", "y", "x")])
def test_square_matrices_are_told_apart_by_their_side(proj_type: str, p: str, r: str) -> None:
    tx = make_optimizer("galore_adamw", proj_type, learning_rate=0.1, rank=4)
    found = state_specs(tx, {"mlp": jax.ShapeDtypeStruct((64, 64), jnp.float32)},
                        {"mlp": P("x", "y")})  # fmt: skip
    bases = [v for k, v in found.items() if "basis" in k]
    moments = [v for k, v in found.items() if "/mu/" in k or "/nu/" in k]
    assert bases == [((64, 4), (p, None))]
    assert moments == [((4, 64), (None, r))] * 2


@pytest.mark.parametrize("tx", [optax.adamw(0.1), optax.lion(0.1), optax.chain(
    optax.clip_by_global_norm(1.0), optax.adafactor(0.1))], ids=["adamw", "lion", "adafactor"]
)  # fmt: skip
def test_plain_optax_states_follow_their_weights(tx: optax.GradientTransformation) -> None:
    by_size = {512: "y", 1024: "x", 2048: "y"}
    found = state_specs(tx)
    for path, (shape, spec) in found.items():
        assert spec == tuple(by_size.get(size) for size in shape), path
    assert len(found) > len(jax.tree.leaves(PARAMS))


def test_attention_kernels_with_heads_and_short_specs() -> None:
    params = {"mlp": jax.ShapeDtypeStruct((64, 8, 16), jnp.bfloat16)}
    tx = osd_jax.scale_by_subspace(
        optax.scale_by_adam(), osd_jax.online_pca(optax.adam(1e-2)), rank=4,
        dimension_numbers=osd_jax.SubspaceDimensionNumbers(0, (1, 2)),
    )  # fmt: skip
    found = state_specs(tx, params, {"mlp": P("y", "x")})  # heads over x, each whole
    assert found["projector/basis/mlp"] == ((64, 4), ("y", None))
    assert found["inner/mu/mlp"] == ((4, 128), (None, "x"))
    for path, (_, spec) in state_specs(tx, params, {"mlp": P(("x", "y"))}).items():
        if "basis" in path:
            assert spec == (("x", "y"), None)


def test_a_spec_that_does_not_divide_is_refused() -> None:
    params = {"mlp": jax.ShapeDtypeStruct((30, 64), jnp.float32)}
    with pytest.raises(ValueError, match="'mlp' of shape .30, 64. .* 30 is not divisible by x=4"):
        state_specs(optax.adam(0.1), params, {"mlp": P("x", "y")})


# -------------------------------------------------------- state that no axis of a weight splits


def owners(spec: tuple[Any, ...]) -> set[str]:
    """The mesh axes of a spec."""
    return {name for axes in spec for name in mesh_axes(axes)}


@pytest.mark.parametrize(("name", "proj_type"), ALL)
def test_no_large_array_stays_whole_over_an_axis_that_splits_weights(
    name: str, proj_type: str
) -> None:
    tx = make_optimizer(name, proj_type, learning_rate=0.1, rank=16, dimension_numbers=NUMBERS)
    before, after = state_specs(tx), state_specs(tx, share_over=None)
    largest = max((math.prod(shape) for shape, _ in after.values()), default=0)
    for path, (shape, spec) in after.items():
        for old, new in zip(before[path][1], spec, strict=True):
            assert set(mesh_axes(old)) <= set(mesh_axes(new)), path
        if math.prod(shape) >= 0.02 * largest and len(shape) > 1:
            assert owners(spec) == {"x", "y"}, path
        if math.prod(shape) < 0.005 * largest and not path.endswith("scales"):
            assert spec == before[path][1], path


def test_what_stays_whole_is_split_along_its_rank() -> None:
    params = {"mlp": jax.ShapeDtypeStruct((4, 64, 64), jnp.float32)}
    tx = osd_jax.scale_by_subspace(
        optax.scale_by_adam(), osd_jax.online_pca(optax.adam(1e-2)), rank=16,
        dimension_numbers=osd_jax.SubspaceDimensionNumbers(1, 2),
    )  # fmt: skip
    specs = {"mlp": P(None, "x", None)}
    for share_over, rank, of_p in (((), None, None), (None, "x", None), (("x", "y"), "x", "y")):
        found = state_specs(tx, params, specs, share_over)
        assert found["projector/basis/mlp"] == ((4, 64, 16), (None, "x", of_p))
        assert found["projector/set_at/mlp"] == ((4,), (None,))
        assert found["inner/mu/mlp"] == ((4, 16, 64), (None, rank, "y" if of_p else None))


@pytest.mark.parametrize(
    ("columns", "codes", "scales"),
    [
        (1024, (None, "x"), (None, "x")),  # a block on each device
        (512, ("x", None), ("x", None)),  # half a block would be
        (600, ("x", None), ("x", None)),  # the last block is a part
    ],
)
def test_scales_go_with_whole_blocks(columns: int, codes: Any, scales: Any) -> None:
    params = {"table": jax.ShapeDtypeStruct((64, columns), jnp.float32)}
    tx = osd_jax.quantize_state(optax.scale_by_adam())
    found = state_specs(tx, params, {"table": P(None, "x")}, None)
    for moment in ("mu", "nu"):
        assert found[f"{moment}/table/codes"] == ((64, columns), codes)
        assert found[f"{moment}/table/scales"] == ((64, -(-columns // 256)), scales)
    kept = state_specs(tx, params, {"table": P(None, "x")}, ())
    assert kept["mu/table/codes"] == ((64, columns), (None, "x"))


def test_codes_that_divide_nowhere_else_stay_split_within_blocks() -> None:
    """Like the embedding of GPT-2, of 50,257 rows: better than whole on every device."""
    params = {"table": jax.ShapeDtypeStruct((61, 768), jnp.float32)}
    tx = osd_jax.quantize_state(optax.scale_by_adam())
    found, before = (state_specs(tx, params, {"table": P(None, "x")}, x) for x in (None, ()))
    assert found == before and found["mu/table/codes"] == ((61, 768), (None, "x"))


def test_the_largest_array_does_not_keep_others_whole() -> None:
    """R's moments of a model without stacks, beside an embedding that is 150 times as large."""
    params = {
        "embedding": jax.ShapeDtypeStruct((2**17, 4096), jnp.float32),
        "mlp": jax.ShapeDtypeStruct((4096, 14336), jnp.float32),
    }
    tx = make_optimizer(
        "galore_adamw", "continuous", learning_rate=0.1, rank=128,
        select=lambda path, x: path == "mlp",
    )  # fmt: skip
    layout = state_sharding(tx, params, {"embedding": P("x"), "mlp": P("x", None)}, own_mesh())
    like = jax.eval_shape(tx.init, params)
    pairs = zip(jax.tree.leaves(like), jax.tree.leaves(layout), strict=True)
    whole = [x.shape for x, to in pairs if x.size > 2**18 and not any(to.spec)]
    assert not whole


def own_loop(mesh: Mesh, spec: P, proj_type: str, is_jitted: bool) -> tuple[Any, str]:
    """The update of a stack of 8 matrices in a user's own loop, and the compiled text."""
    tx = make_optimizer(
        "galore_adamw", proj_type, learning_rate=0.1, rank=4, select=lambda path, x: True,
        dimension_numbers=lambda params: {"mlp": osd_jax.SubspaceDimensionNumbers(1, 2)},
    )  # fmt: skip
    params = {"mlp": jax.random.normal(jax.random.key(0), (8, 16, 24))}
    with jax.set_mesh(mesh):
        if not is_jitted:
            return tx.update(params, tx.init(params), params)[0]["mlp"], ""
        put = {"mlp": jax.device_put(params["mlp"], jax.NamedSharding(mesh, spec))}
        layout = state_sharding(tx, put, {"mlp": spec}, mesh)
        state = jax.jit(tx.init, out_shardings=layout)(put)
        step = jax.jit(tx.update).lower(put, state, put).compile()
        return step(put, state, put)[0]["mlp"], step.as_text()


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("spec", [P("fsdp"), P("expert", "fsdp")], ids=str)
def test_a_stack_that_its_user_splits_stays_split(spec: P) -> None:
    """Under a mesh of the user's own with an axis of that name, where no step of ours is traced."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    found, text = own_loop(mesh, spec, "continuous", is_jitted=True)
    alone, _ = own_loop(mesh, spec, "continuous", is_jitted=False)  # eager: on one device
    np.testing.assert_allclose(found, alone, atol=1e-5)
    gathered = [x for x in collectives(text) if x.op == "all-gather" and x.dtype == "f32"]
    assert not [x for x in gathered if math.prod(x.shape) >= 8 * 16 * 24 and not x.branches]


def test_an_explicit_axis_beside_fsdp() -> None:
    kinds = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=kinds)
    spec = P(None, None, "tensor")
    found, alone = (own_loop(mesh, spec, "std", is_jitted)[0] for is_jitted in (True, False))
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_axes_of_data_parallelism_split_state_if_they_are_named() -> None:
    params = {"mlp": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    for share_over, spec in ((None, ("x", None)), (("x", "y"), ("x", "y"))):
        found = state_specs(optax.adam(0.1), params, {"mlp": P("x", None)}, share_over)
        assert found["0/mu/mlp"] == ((64, 64), spec)


def test_explicit_axes_keep_the_types_of_the_operations() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    params, specs = {"mlp": jax.ShapeDtypeStruct((64, 64), jnp.float32)}, {"mlp": P("x", None)}
    tx = make_optimizer("galore_adamw", "std", learning_rate=0.1, rank=4)
    same = [state_sharding(tx, params, specs, mesh, over) for over in (None, ())]
    assert same[0] == same[1]


# -------------------------------------------------------------------------------- train steps


class Run(NamedTuple):
    """A few steps: losses, the bytes of the state on the first device, and the compiled text."""

    losses: np.ndarray
    bytes: int
    text: str
    state: TrainState


@functools.cache
def run(
    config: llama.LlamaConfig,
    sizes: tuple[int, int, int] | None,
    name: str = "galore_adamw",
    proj_type: str = "continuous",
    micro_batches: int = 1,
    **options: Any,
) -> Run:
    """Trains on one device, or on a mesh, with the same batches."""
    mesh = None if sizes is None else make_mesh(*sizes)
    tx = optimizer(name, proj_type)
    step = make_train_step(config, tx, mesh=mesh, **options)
    shape = (micro_batches, ROWS, LENGTH)
    over_data = options.get("shard_over_data", False)
    done = train(config, tx, step, mesh, shape, [True] * STEPS, over_data)
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(done.state)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )
    return Run(done.losses, held, done.compiled.as_text(), done.state)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_gives_the_losses_of_one_device(sizes: tuple[int, int, int]) -> None:
    np.testing.assert_allclose(run(EVEN, sizes).losses, run(EVEN, None).losses, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [(1, 8, 1), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=str
)
def test_so_does_one_that_does_not_divide_the_model(sizes: tuple[int, int, int]) -> None:
    np.testing.assert_allclose(run(ODD, sizes).losses, run(ODD, None).losses, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "proj_type"),
    [
        ("galore_adamw8bit", "continuous_adam8bit"),
        pytest.param("galore_adafactor", "std", marks=pytest.mark.slow),
        pytest.param("osd_muon", "oja", marks=pytest.mark.slow),
    ],
)
def test_so_do_other_optimizers(name: str, proj_type: str) -> None:
    found = run(EVEN, (2, 2, 2), name, proj_type, 2, grad_clipping=0.1).losses
    alone = run(EVEN, None, name, proj_type, 2, grad_clipping=0.1).losses
    np.testing.assert_allclose(found, alone, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [(1, 8, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str
)
def test_weights_gathered_once_per_update(sizes: tuple[int, int, int]) -> None:
    """The losses of one device; no weight is gathered in a loop over layers or micro-batches."""
    once = run(EVEN, sizes, micro_batches=2, reshard_after_forward=False)
    np.testing.assert_allclose(once.losses, run(EVEN, None, micro_batches=2).losses, atol=1e-5)
    gathers = [c for c in collectives(once.text) if c.op == "all-gather" and not c.branches]
    weights = [c for c in gathers if len(c.shape) > 2 and c.shape[0] == EVEN.num_hidden_layers]
    assert weights
    # The embedding stays split; its tokens are gathered for each micro-batch.
    assert all(c.times == 1 for c in gathers if c.dtype != "s32")


# Layers on the members of `data`, beside other axes and alone, and stacks that it does not divide.
SHARDED = [
    ((2, 2, 2), 4),
    ((8, 1, 1), 8),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (((2, 2, 2), 2), ((2, 4, 1), 4), ((8, 1, 1), 2), ((4, 2, 1), 2))
    ),
]


@pytest.mark.parametrize(("sizes", "layers"), SHARDED, ids=str)
def test_weights_and_state_split_over_data_too(sizes: tuple[int, int, int], layers: int) -> None:
    """The losses and every P of one device, and a device holds its share by all axes.

    On (2, 2, 2), XLA gave zeros for A of half of the layers, and the losses hardly showed it.
    """
    config = dataclasses.replace(EVEN, num_hidden_layers=layers)
    found = run(config, sizes, proj_type="oja", shard_over_data=True)
    alone = run(config, None, proj_type="oja")
    np.testing.assert_allclose(found.losses, alone.losses, atol=1e-5)
    tx = optimizer(proj_type="oja")
    assert found.bytes == pytest.approx(share(config, sizes, tx, over=sizes), rel=0.05)
    bases = [osd_jax.projectors(done.state.opt_state) for done in (found, alone)]
    for (name, basis), wanted in zip(bases[0].items(), bases[1].values(), strict=True):
        # A step of P is about 0.03; rounding of float32 moves it by 1e-5.
        np.testing.assert_allclose(basis, wanted, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("name", "proj_type", "micro_batches", "options"),
    [
        pytest.param(
            *("osd_muon", "oja", 2, {"reshard_after_forward": False}), marks=pytest.mark.slow
        ),
        pytest.param("galore_adamw8bit", "continuous_adam8bit", 1, {}, marks=pytest.mark.slow),
        pytest.param("galore_adamw", "std", 2, {"accumulate": "sketches"}, marks=pytest.mark.slow),
        pytest.param("galore_adafactor", "oja", 2, {"grad_clipping": 0.1}, marks=pytest.mark.slow),
        pytest.param("adamw", "std", 2, {}, marks=pytest.mark.slow),
    ],
)
def test_so_do_other_optimizers_over_data(
    name: str, proj_type: str, micro_batches: int, options: dict[str, Any]
) -> None:
    found = run(EVEN, (2, 4, 1), name, proj_type, micro_batches, shard_over_data=True, **options)
    alone = run(EVEN, None, name, proj_type, micro_batches, **options)
    np.testing.assert_allclose(found.losses, alone.losses, atol=1e-5)


@pytest.mark.usefixtures("tiles")
def test_so_do_arrays_stored_in_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding and the head; then, as if all were padded, every P and the moments of R."""
    found = run.__wrapped__(TILES, (2, 4, 1), shard_over_data=True)
    table = found.state.params["embedding"]
    assert table.sharding.shard_shape(table.shape) == (1024 // 8, 48)
    np.testing.assert_allclose(found.losses, run(TILES, None).losses, atol=1e-5)

    def is_off_rank(shape: Any, entries: Any, mesh: Any) -> bool:
        return "fsdp" in entries[-1 if shape[-1] != RANK else -2]

    monkeypatch.setattr(sharding, "_is_padded", is_off_rank)
    found = run.__wrapped__(EVEN, (2, 4, 1), shard_over_data=True)
    for tree in (osd_jax.projectors(found.state.opt_state), low_rank_moments(found.state)):
        for name, x in tree.items():
            layers, *matrix = x.shape
            wanted = (layers // 2, *(n // 4 if n == RANK else n for n in matrix))
            assert x.sharding.shard_shape(x.shape) == wanted, name
    np.testing.assert_allclose(found.losses, run(EVEN, None).losses, atol=1e-5)


def low_rank_moments(state: TrainState) -> dict[str, jax.Array]:
    """Moments of R (layers, r, q), by name."""
    leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    named = {path_name(path): x for path, x in leaves}
    found = {name: x for name, x in named.items() if x.ndim == 3 and x.shape[1] == RANK}
    assert len(found) >= 2 * 7
    return found


def test_sharding_over_data_sends_the_bytes_of_data_parallelism() -> None:
    """Outside conditionals, up to norms and counts; no matrix travels within the optimizer."""
    config = dataclasses.replace(EVEN, num_hidden_layers=8)
    sent = {}
    for over in (False, True):
        options = {"rows": ROWS, "length": LENGTH, "shard_over_data": over}
        found = exchanged(config, optimizer(), (8, 1, 1), **options)
        within = [c for c in found if c.branches]
        assert not [c for c in within if c.bytes > 8 * config.num_hidden_layers], within
        sent[over] = sum(c.sent for c in found if not c.branches)
    norms = 4 * config.hidden_size * (2 * config.num_hidden_layers + 1)
    assert sent[True] <= sent[False] + norms


def test_gradients_are_reduce_scattered_over_data_beside_fsdp() -> None:
    config = dataclasses.replace(EVEN, num_hidden_layers=8)
    options = {"rows": ROWS, "length": LENGTH, "shard_over_data": True}
    found = exchanged(config, optimizer(), (2, 4, 1), **options)
    norms = 4 * config.hidden_size * config.num_hidden_layers
    over_data = [c for c in found if c.group == 2 and not c.branches and c.bytes > norms]
    assert {c.op for c in over_data} == {"all-gather", "reduce-scatter"}
    kernel_bytes = sum(4 * math.prod(shape) for shape in kernels(config).values())
    scattered = sum(c.bytes for c in over_data if c.op == "reduce-scatter")
    assert scattered == kernel_bytes / 4  # a device's shards over fsdp


def test_no_gradient_is_scattered_along_its_last_axis() -> None:
    """A TPU would all-reduce it, as it did the head's."""
    mesh, params = make_mesh(2, 4, 1), shapes(EVEN)
    scatter, specs = shards_over_data(mesh, params)
    assert "data" in specs["head"][-1:]
    of_member = jax.shard_map(
        scatter, mesh=mesh, axis_names={"data"}, in_specs=P(), out_specs=specs, check_vma=False
    )
    text = str(jax.make_jaxpr(jax.jit(of_member))(params))
    found = re.findall(r":f32\[([\d,]+)\] = reduce_scatter\[(.*?)\]", text, re.DOTALL)
    assert len(found) == len(jax.tree.leaves(params))
    for shape, options in found:
        sizes = shape.split(",")
        axis = int(re.search(r"scatter_dimension=(\d)", options)[1])  # type: ignore[index]
        assert axis < len(sizes) - ("tiled=True" in options), (shape, options)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1)], ids=str)
@pytest.mark.usefixtures("tiles")
def test_evaluation_gathers_weights_split_over_data_once(sizes: tuple[int, int, int]) -> None:
    """And over all devices it only sums the loss and the tokens."""
    config = dataclasses.replace(TILES, num_hidden_layers=8)
    mesh, tx = make_mesh(*sizes), optimizer()
    layout = train_state_sharding(tx, shapes(config), mesh, shard_over_data=True).params
    params = llama.init(config, 0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (ROWS, LENGTH), np.int32)
    batch = {"tokens": tokens, "mask": tokens >= 0}
    losses = [make_eval_step(config)(params, batch)]
    params = jax.device_put(params, layout)
    batch = jax.device_put(batch, jax.NamedSharding(mesh, P(("data", "fsdp"))))
    evaluate: Any = make_eval_step(config, mesh=mesh, shard_over_data=True)
    losses.append(evaluate(params, batch))
    found = collectives(evaluate.lower(params, batch).compile().as_text())
    np.testing.assert_allclose(*(loss for loss, _ in losses), rtol=1e-6)
    gathers = [c for c in found if c.op == "all-gather" and c.group == sizes[0]]
    assert len(gathers) >= len(kernels(config)) and all(c.times == 1 for c in gathers)
    beside = [c for c in found if c.group != sizes[0]]
    assert all(c.group == sizes[1] or c.bytes <= 8 for c in beside), beside


def test_sharding_over_data_needs_a_mesh_and_whole_gradients() -> None:
    with pytest.raises(ValueError, match="give mesh"):
        make_train_step(EVEN, optimizer(), shard_over_data=True)
    with pytest.raises(ValueError, match="no compress_gradients"):
        both = {"shard_over_data": True, "compress_gradients": True}
        make_train_step(EVEN, optimizer(), mesh=make_mesh(8), **both)


def share(
    config: llama.LlamaConfig, sizes: tuple[int, int, int], tx: Any, over: Any = None
) -> float:
    """Bytes per device if all but norms were split over fsdp and tensor, or over all of `over`."""
    parts = math.prod(over or sizes[1:])
    params, total = shapes(config), 0.0
    both = (params, jax.eval_shape(tx.init, params))
    for path, x in jax.tree_util.tree_flatten_with_path(both)[0]:
        is_whole = "norm" in path_name(path) or x.ndim == 0
        total += x.size * x.dtype.itemsize / (1 if is_whole else parts)
    return total


def test_state_comes_back_from_another_layout_and_mesh(tmp_path: Path) -> None:
    """Saved with R's moments whole over fsdp, as earlier versions did, and in five layouts."""
    tx, started = optimizer(), run(EVEN, (1, 8, 1)).state
    mesh = make_mesh(1, 8, 1)
    whole = state_sharding(tx, started.params, partition_specs(started.params, mesh), mesh, ())
    assert whole != train_state_sharding(tx, started.params, mesh).opt_state
    state = started._replace(opt_state=jax.device_put(started.opt_state, whole))
    by_layers, layerwise = (4, 2, 1), (4, 2, 1, False, True)
    layouts: list[Any] = [(1, 8, 1), by_layers, layerwise, (2, 4, 1, True), None, (1, 8, 1)]
    for number, sizes in enumerate(layouts):
        with Checkpoints(tmp_path / str(number), keep=1) as checkpoints:
            checkpoints.save(1, state, {})
        like: Any = jax.eval_shape(lambda: init_state(llama.init(EVEN, 0), tx))
        if sizes is not None:
            layout = train_state_sharding(tx, like.params, make_mesh(*sizes[:3]), *sizes[3:])
            like = jax.tree.map(lambda x, to: x.update(sharding=to), like, layout)
        state = Checkpoints(tmp_path / str(number)).restore(1, like).state
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(started), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(started), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_device_holds_its_share(sizes: tuple[int, int, int]) -> None:
    assert run(EVEN, sizes).bytes == pytest.approx(share(EVEN, sizes, optimizer()), rel=0.05)


def kernels(config: llama.LlamaConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(shapes(config))[0]
    return {path_name(p): x.shape for p, x in leaves if "norm" not in path_name(p)}


def assert_gathers_weights_only(
    found: list[Collective], config: llama.LlamaConfig, sizes: tuple[int, int, int]
) -> None:
    """Outside conditionals, the weights that FSDP gathers; within the optimizer's, no stack.

    The optimizer is within one conditional, that of a finite gradient, and the first P within two.
    """
    layers, tensor = config.num_hidden_layers, sizes[2]
    norms = 4 * layers * config.hidden_size
    gathered = [c for c in found if c.op == "all-gather" and not c.branches]
    large = [c for c in gathered if c.bytes > max(norms, 4 * ROWS * LENGTH)]
    if tensor == 1:  # all-to-alls alone: each device has whole matrices
        within = [c for c in found if c.branches and c.op != "all-to-all"]
        assert not [c for c in within if c.bytes > norms], within
    wanted: dict[tuple[int, ...], int] = {}
    for name, shape in kernels(config).items():
        if name != "embedding" and sizes[1] > 1:  # whose rows travel, not the table
            matrix = tuple(sorted(shape[-2:]))
            split = config.vocab_size if name == "head" else None
            wanted[matrix] = wanted.get(matrix, 0) + (1 if split else layers)
    # Once for the forward pass and once for the backward pass.
    weights = sum(
        math.prod(shape) * n for shape, n in wanted.items()
    ) * 4 / tensor  # fmt: skip
    assert sum(c.bytes * c.times for c in large) <= 2 * weights
    assert all("jvp" in c.name or "state.params" in c.name for c in large), large
    # The first P takes one layer's gradient at a time, and no P and no R is larger here.
    matrix = max(4 * math.prod(shape[-2:]) for shape in kernels(config).values())
    assert all(c.bytes <= matrix for c in found if c.branches and c.op == "all-gather")


@pytest.mark.parametrize(("sizes", "is_gathered"), [((2, 2, 2), True), ((2, 4, 1), False)], ids=str)
def test_products_beside_tensor_read_gathered_kernels(
    sizes: tuple[int, int, int], is_gathered: bool
) -> None:
    """XLA's partitioner gives some products of kernels split over two axes wrong gradients."""
    mesh = make_mesh(*sizes)
    split = jax.NamedSharding(mesh, P("fsdp", "tensor"))
    head = jax.device_put(jnp.ones((16, 32)), split)

    def both(head: jax.Array) -> tuple[jax.Array, jax.Array]:
        with on(mesh):
            read, pullback = jax.vjp(lambda head: for_products({"head": head})["head"], head)
            return read, pullback(read)[0]

    read, gradient = jax.jit(both)(head)
    seen = jax.NamedSharding(mesh, P(None, "tensor")) if is_gathered else split
    assert read.sharding.is_equivalent_to(seen, 2)
    assert gradient.sharding.is_equivalent_to(split, 2)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_online_pca_gathers_no_gradient_and_no_state(sizes: tuple[int, int, int]) -> None:
    assert_gathers_weights_only(collectives(run(EVEN, sizes).text), EVEN, sizes)


def exchanged(
    config: llama.LlamaConfig,
    tx: Any,
    sizes: tuple[int, int, int],
    *,
    rows: int,
    length: int,
    **options: Any,
) -> list[Collective]:
    """What a step that does not measure exchanges, by the compiler; nothing is allocated."""
    mesh = make_mesh(*sizes)
    step = make_train_step(config, tx, mesh=mesh, **options)
    params = shapes(config)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params))
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    over_data = options.get("shard_over_data", False)
    state = jax.tree.map(put, state, train_state_sharding(tx, params, mesh, over_data))
    batch = {
        name: jax.ShapeDtypeStruct((1, rows, length), dtype, sharding=batch_sharding(mesh))
        for name, dtype in (("tokens", jnp.int32), ("mask", jnp.bool_))
    }
    unmeasured: Any = jax.jit(lambda state, batch: step(state, batch, False), donate_argnums=0)
    return collectives(unmeasured.lower(state, batch).compile().as_text())


# Megabytes that a device sent when R's moments were whole over fsdp and R was all-reduced: in every
# step, and in conditionals.
SENT_BEFORE = {
    (1, 8, 1): (5.294828, 1.830864),
    (2, 2, 2): (2.764060, 1.290784),
    (1, 2, 4): (2.923004, 1.413072),
}


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_a_step_sends_no_more_than_with_whole_state(sizes: tuple[int, int, int]) -> None:
    """With eight layers: with fewer than devices, what is sent includes padding.

    In all, and in conditionals: a gradient moves to the state of its matrices before the optimizer,
    which is in one.
    """
    config = dataclasses.replace(EVEN, num_hidden_layers=8, vocab_size=1024)
    found = exchanged(config, optimizer(), sizes, rows=ROWS, length=LENGTH)
    always, within = (
        sum(c.sent for c in found if bool(c.branches) == is_within) / 1e6
        for is_within in (False, True)
    )
    assert always + within <= sum(SENT_BEFORE[sizes])
    assert within <= SENT_BEFORE[sizes][1]


@pytest.mark.parametrize(("name", "is_projected"), [("galore_adamw", True), ("adamw", False)])
def test_state_of_projected_weights_is_stored_by_layers(name: str, is_projected: bool) -> None:
    """A layerwise step reads one layer from all devices; other state meets a gradient's shards."""
    config = dataclasses.replace(EVEN, num_hidden_layers=8)
    mesh, tx, params = make_mesh(1, 8, 1), optimizer(name), shapes(config)
    plain, layerwise = (
        train_state_sharding(tx, params, mesh, layerwise=layerwise) for layerwise in (False, True)
    )
    assert plain.params == layerwise.params
    assert (plain.opt_state == layerwise.opt_state) != is_projected
    state = jax.tree_util.tree_flatten_with_path(jax.eval_shape(tx.init, params))[0]
    stacks = [
        (to.spec[0], leaf.shape)
        for (path, leaf), to in zip(state, jax.tree.leaves(plain.opt_state), strict=True)
        if "layers" in path_name(path) and leaf.ndim > 2
    ]
    assert stacks and {axis for axis, _ in stacks} == {"fsdp" if is_projected else None}


@pytest.mark.parametrize("proj_type", ["continuous", "std"])
def test_only_gradient_and_update_move_if_state_is_stored_by_layers(proj_type: str) -> None:
    config = dataclasses.replace(EVEN, num_hidden_layers=8)
    found = exchanged(
        config, optimizer(proj_type=proj_type), (1, 8, 1), rows=ROWS, length=LENGTH
    )  # fmt: skip
    layers = sum(4 * math.prod(s) for name, s in kernels(config).items() if "layers" in name)
    within = [c for c in found if c.branches]
    small = 8 * config.num_hidden_layers  # what says whether a matrix waits for its P
    assert sum(c.sent for c in within if c.bytes > small) == layers / 8 * 7 / 8
    assert {c.op for c in within if c.bytes > small} == {"all-to-all"}


# -------------------------------------------------------------------------- reduced sketches


@pytest.mark.parametrize(
    "sizes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str
)
def test_reduced_sketches_give_the_losses_of_whole_gradients(sizes: tuple[int, int, int]) -> None:
    """An SVD's P asks only R of a gradient, which is exact; online PCA a norm that is estimated."""
    compressed = run(EVEN, sizes, proj_type="std", compress_gradients=True)
    alone = run(EVEN, None, proj_type="std")
    np.testing.assert_allclose(compressed.losses, alone.losses, atol=1e-5)


def test_reduced_sketches_of_online_pca_come_near_the_losses_of_whole_gradients() -> None:
    compressed = run(EVEN, (8, 1, 1), compress_gradients=True, micro_batches=2)
    alone = run(EVEN, None, micro_batches=2)
    np.testing.assert_allclose(compressed.losses, alone.losses, atol=1e-4)


@pytest.mark.parametrize("make", [make_train_step, make_layerwise_train_step])
def test_reduced_sketches_in_bfloat16_are_summed_in_float32_on_a_cpu(make: Any) -> None:
    """XLA's CPU compiler ends the process at a 16-bit sum from `shard_map`."""
    mesh, tx = make_mesh(2, 4), optimizer(select=is_one_of_its_shape)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes(EVEN))
    state = jax.eval_shape(lambda params: init_state(params, tx), params)
    tokens = jax.ShapeDtypeStruct((1, ROWS, LENGTH), jnp.int32)
    batch = {"tokens": tokens, "mask": jax.ShapeDtypeStruct(tokens.shape, bool)}
    step = make(EVEN, tx, mesh=mesh, compress_gradients=True)
    lowered = step.lower(state, batch, jax.ShapeDtypeStruct((), bool)).as_text()
    sums = re.findall(r"stablehlo\.all_reduce.*?\}\) : \(tensor<([^>]*)>", lowered, re.DOTALL)
    assert len(sums) > 10
    assert not [one for one in sums if "bf16" in one]


def test_reduced_sketches_need_a_mesh_and_an_optimizer_that_reads_no_more() -> None:
    with pytest.raises(ValueError, match="give mesh"):
        make_train_step(EVEN, optimizer(), compress_gradients=True)
    with pytest.raises(ValueError, match="move_projector is 'before'"):
        tx = optimizer(move_projector="before")
        make_train_step(EVEN, tx, mesh=make_mesh(8), compress_gradients=True)


def every_step(
    config: llama.LlamaConfig, tx: Any, *, rows: int, length: int, **options: Any
) -> list[Collective]:
    """What data parallelism over eight devices exchanges in each step, by the compiler.

    Not what is conditional: setting P from whole gradients, on the steps that do so.
    """
    found = exchanged(config, tx, (8, 1, 1), rows=rows, length=length, **options)
    return [one for one in found if not one.branches]


def sketch_bytes(config: llama.LlamaConfig, rank: int) -> int:
    """R and A of every projected matrix, whole gradients of all else, in float32."""
    numbers = 0
    for path, x in jax.tree_util.tree_flatten_with_path(shapes(config))[0]:
        projected = llama.is_projected(path_name(path), x)
        numbers += x.shape[0] * sum(x.shape[-2:]) * rank if projected else x.size
    return 4 * numbers


def test_reduced_sketches_send_less_than_adamw_at_1b() -> None:
    config, rank = llama.LlamaConfig.load(CONFIGS / "llama_1b.json"), 512
    batch = {"rows": 8, "length": 256}
    small = every_step(config, optimizer(rank=rank), compress_gradients=True, **batch)
    large = every_step(config, optimizer("adamw", "std"), **batch)
    assert {one.op for one in small + large} == {"all-reduce"}
    reduced = [sum(one.bytes * one.times for one in found) for found in (small, large)]
    # And a few scalars, such as R's squared norm for each R.
    assert reduced[0] == pytest.approx(sketch_bytes(config, rank), rel=1e-3)
    assert reduced[1] == pytest.approx(4 * llama.num_parameters(config), rel=1e-3)
    # 4.27e9 bytes sent by a device, compared with 9.37e9.
    sent = [sum(one.sent for one in found) for found in (small, large)]
    assert sent[0] / sent[1] == pytest.approx(0.455, abs=0.001)
