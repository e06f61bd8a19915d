"""The train step compiled for TPUs without a TPU: memory, operations, communication."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import osd_jax
from launch.compile_tpu import step, table
from launch.compile_tpu.__main__ import main
from launch.compile_tpu.step import Report, find_topology, memory_granted, product_flops, refusal
from launch.trainer.cli import UsageError
from launch.trainer.options import Options
from osd_jax import llama
from osd_jax.llama.attention import splash
from osd_jax.llama.train import init_state
from osd_jax.sharding import make_mesh
from parity_tests.support import ROOT

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)

SMALL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
# Cut into whole tiles of the TPU's memory, (8, 128) or more, so that nothing is padded but scalars.
FLAGS = (
    "--batch_size 8 --max_length 128 --optimizer galore_adamw --proj_type continuous "
    "--rank 128 --warmup_steps 0 --projector_init qr"
)


@pytest.fixture
def quick_compiler(pytestconfig: pytest.Config) -> Iterator[None]:
    """The TPU compiler's least effort, as `conftest.py` has of the CPU's, without `--optimized`.

    JAX 0.11 no longer has these settings.
    """
    effort = 0.0 if pytestconfig.getoption("optimized") else -1.0
    names = ("jax_exec_time_optimization_effort", "jax_memory_fitting_effort")
    before = {name: getattr(jax.config, name) for name in names if hasattr(jax.config, name)}
    for name in before:
        jax.config.update(name, effort)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL))
    return ["--model_config", str(config), *FLAGS.split()]


@pytest.mark.parametrize("name", ["v6e", "v7:1x1", "v6e:1", "v6e:axb", "v4:2x2x1"])
def test_what_is_no_slice_is_refused(name: str) -> None:
    with pytest.raises(
        UsageError, match=rf"--topology: '{name}' is not a slice; expected.*v6e:4x4"
    ):
        find_topology(name)


@needs_compiler
def test_a_slice_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="the TPU compiler does not know v6e:3x7"):
        find_topology("v6e:3x7")


@needs_compiler
@pytest.mark.parametrize(
    ("name", "chips", "gib"), [("v5e:1x1", 1, 16), ("v5p:4x4x4", 64, 96), ("v6e:16x16", 256, 32)]
)
def test_a_slice_has_its_chips_and_most_of_their_memory(name: str, chips: int, gib: float) -> None:
    devices = find_topology(name)
    assert len(devices) == chips
    assert gib - 1 < memory_granted(devices[0]) / step.GIB < gib


@needs_compiler
@pytest.mark.parametrize("sizes", [(16, 16, 1), (4, 32, 2), (256, 1, 1)], ids=str)
def test_a_mesh_may_split_the_axes_of_a_slice(sizes: tuple[int, int, int]) -> None:
    """16 of 4x8x8 chips is no product of its axes."""
    devices = find_topology("v5p:4x8x8")
    mesh = make_mesh(*sizes, devices=devices)
    assert tuple(mesh.shape.values()) == sizes
    assert set(mesh.devices.flat) == set(devices)


def test_both_forms_of_a_refusal_are_read() -> None:
    late = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.72G of 15.75G hbm."
    found = refusal(RuntimeError(late))
    assert found is not None and found.needed == pytest.approx(23.72 * 2**30)
    assert found.granted == 15.75 * 2**30 and found.words == "Used 23.72G of 15.75G hbm"
    early = "the total memory required for HLO temporaries (512.00M) exceeds available HBM (1.50G)."
    found = refusal(RuntimeError(early))
    assert found is not None and (found.needed, found.granted) == (2**29, 1.5 * 2**30)
    assert refusal(RuntimeError("INTERNAL: another matter")) is None


def test_products_are_counted_in_loops_and_branches() -> None:
    w = jnp.ones((3, 5))

    def f(x: jax.Array, big: jax.Array) -> jax.Array:
        x = jax.lax.scan(lambda x, _: (jnp.sin(x @ w @ w.T), None), x, length=7)[0]
        product = lambda x: jnp.einsum("bij,bjk->bik", x[None], jnp.ones((1, 3, 11)))
        return jnp.sum(jax.lax.cond(big, lambda x: jnp.sum(product(x)), jnp.sum, x))

    traced = jax.jit(f).trace(jnp.ones((2, 3)), jnp.array(True))
    in_loop = 7 * (2 * 2 * 3 * 5 + 2 * 2 * 5 * 3)
    assert product_flops(traced.jaxpr.jaxpr) == in_loop + 2 * 2 * 3 * 11


def test_products_on_each_device_are_counted_on_all() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("x")
    product = jax.shard_map(
        lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"x"}
    )
    traced = jax.jit(product).trace(jnp.ones((8, 3)))
    assert product_flops(traced.jaxpr.jaxpr) == 4 * 2 * 2 * 3 * 2


def test_products_of_a_kernel_are_counted_in_all_its_blocks() -> None:
    """Splash attention of 256 positions: two products of 256 x 256 x 16 for each of 2 x 4 heads."""
    q, k = (jax.ShapeDtypeStruct((2, 256, heads, 16), jnp.float32) for heads in (4, 2))
    traced = jax.jit(splash).trace(q, k, k)
    assert product_flops(traced.jaxpr.jaxpr) == 2 * 4 * 2 * (2 * 256 * 256 * 16)


@pytest.mark.tpu
@needs_compiler
@pytest.mark.parametrize("head_dim", [32, 48, 52, 64, 80, 128])
def test_the_kernel_of_attention_compiles_for_the_heads_of_every_config(head_dim: int) -> None:
    """With documents, grouped heads and a length that no block divides."""
    where = jax.sharding.SingleDeviceSharding(find_topology("v6e:1x1")[0])
    q, k = (
        jax.ShapeDtypeStruct((2, 300, heads, head_dim), jnp.bfloat16, sharding=where)
        for heads in (4, 2)
    )
    segments = jax.ShapeDtypeStruct((2, 300), jnp.int32, sharding=where)
    total = lambda *inputs: jnp.sum(splash(*inputs).astype(jnp.float32))
    step = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k, segments).compile()
    assert "300,300]" not in (step.as_text() or "")


@pytest.mark.tpu
@needs_compiler
@pytest.mark.parametrize(
    "more",
    [
        "--mesh data=2,fsdp=2 --compress_gradients",
        "--mesh data=2,tensor=2 --dataset builtin --separate_documents",
        "--fsdp --per_layer --optimizer galore_adamw8bit --proj_type continuous_adam8bit",
    ],
)
def test_the_kernel_of_attention_compiles_in_every_step(flags: list[str], more: str) -> None:
    assert step.compile_step("v6e:2x2", [*flags, *more.split()]).fits


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("more", [[], ["--per_layer"]], ids=["plain", "layerwise"])
def test_a_step_on_one_chip(
    flags: list[str], more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--topology", "v6e:1x1", "--json", *flags, *more])
    report = Report(**json.loads(capsys.readouterr().out))
    assert code == 0 and report.fits and report.chips == 1 and not report.mesh
    assert report.arguments is not None
    # Scales of 8-bit blocks and scalars are padded to a tile each.
    assert argument_bytes() <= report.arguments <= 1.15 * argument_bytes()
    assert report.arguments < report.peak < report.memory
    assert report.collectives == {}
    assert 1 < report.product_flops / products(layerwise=bool(more)) < 1.15
    assert "It fits" in report.text()


def argument_bytes() -> int:
    """Of weights in bfloat16, optimizer state, tokens and mask."""
    config = llama.LlamaConfig.from_hf_dict(SMALL)
    tx = osd_jax.make_optimizer(
        "galore_adamw", "continuous", learning_rate=0.1, rank=128,
        select=llama.is_projected, dimension_numbers=llama.dimension_numbers,
    )  # fmt: skip
    to_bfloat16 = lambda x: x.astype(jnp.bfloat16)
    state = jax.eval_shape(lambda: init_state(jax.tree.map(to_bfloat16, llama.init(config, 0)), tx))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return held + 8 * 128 * (4 + 1)


def products(layerwise: bool) -> float:
    """Operations of a step, except setting and measuring P."""
    tokens, h, i, v, rank = 8 * 128, 256, 512, 512, 128
    kernels = [(h, h)] * 4 + [(h, i)] * 3
    linear = 2 * tokens * sum(p * q for p, q in kernels)
    attention = 2 * 2 * tokens * 128 * h
    # P^T G, G R^T and P D; P^T A, P^T P, P (P^T A) and A (P^T P).
    optimizer = sum(3 * 2 * p * q * rank + 4 * 2 * p * rank * rank for p, q in kernels)
    # The backward pass takes twice the forward; the plain step keeps what a kernel gives.
    layer = (4 if layerwise else 3) * linear + 4 * attention + optimizer
    return 2 * layer + 3 * 2 * tokens * h * v


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
def test_a_step_on_a_mesh_exchanges(flags: list[str]) -> None:
    report = step.compile_step("v5e:2x2", [*flags, "--mesh", "data=2,fsdp=2"])
    assert (report.chips, report.mesh, report.fits) == (4, "data=2,fsdp=2", True)
    assert report.arguments is not None
    assert 0.5 <= report.arguments / argument_bytes() < 0.7  # halves, and what does not divide
    # On one chip, setting P is less than 0.15 of the rest, and here both members of `data` set it.
    assert 1 < 4 * report.product_flops / products(layerwise=False) < 1 + 2 * 0.15
    assert {"all-gather", "all-reduce"} <= report.collectives.keys()
    assert all(found["bytes_sent"] > 0 for found in report.collectives.values())


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
def test_a_step_that_does_not_fit_ends_with_1(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A head of 16 GiB."""
    large = SMALL | {"hidden_size": 2**14, "vocab_size": 2**18, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(large))
    assert main(["--topology", "v5e:1x1", *flags]) == 1
    shown = capsys.readouterr().out
    assert "It does not fit: " in shown and re.search(r"of 15\.75G|HBM \(15\.75G\)", shown)


def test_mistakes_come_before_any_work(flags: list[str]) -> None:
    with pytest.raises(UsageError, match="--compile"):
        step.compile_step("v5e:1x1", [*flags, "--compile"])
    with pytest.raises(UsageError, match="--attention: attention is 'cudnn'.* this is a tpu"):
        step.compile_step("v5e:1x1", [*flags, "--attention", "cudnn"])
    with pytest.raises(UsageError, match="--batch_size: 6 rows are not divisible"):
        step.compile_step("v6e:4x4", [*flags, "--mesh", "data=16", "--batch_size", "6"])


# ---------------------------------------------------------------------------------- the table


@needs_compiler
def test_every_row_is_a_run_of_the_recipe() -> None:
    names = set()
    for row in table.rows():
        options = Options.parse(table.recipe_flags(row))
        assert options.model.model_config.startswith(f"configs/llama_{row.size}")
        assert options.data.max_length == 256 or str(options.data.max_length) in row.name
        assert options.subspace.projector_init == "qr"
        devices = find_topology(row.topology)
        rows = options.data.batch_size * len({device.process_index for device in devices})
        assert 512 % rows == 0 and rows >= len(devices)
        names.add(row.key)
    assert len(names) == len(list(table.rows()))


def test_a_table_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [row for row in table.rows() if row.size == "60m"][:2]
    asked = []

    def compiled(row: table.Row) -> Report:
        asked.append(row.topology)
        fits = row.topology == "v5e:1x1"
        return Report(
            topology=row.topology, chips=1, mesh="", fits=fits, memory=16 * 2**30,
            arguments=2**30 if fits else None, temporaries=2**29 if fits else None,
            peak=math.pi * 2**30, code=7, product_flops=2e12, seconds=1.0,
            collectives={"all-reduce": {"count": 3, "bytes_sent": 5e6}} if fits else {},
        )  # fmt: skip

    flags = {row.topology: ["--rank", "1"] for row in wanted}
    monkeypatch.setattr(table, "compiled", compiled)
    monkeypatch.setattr(table, "recipe_flags", lambda row: flags[row.topology])
    table.make_table(wanted[:1], tmp_path)
    text = table.make_table(wanted, tmp_path)
    assert asked == ["v5e:1x1", "v5e:4x4"]
    assert table.make_table(wanted[:1], tmp_path, again=[wanted[0].key]) == text
    assert asked == ["v5e:1x1", "v5e:4x4", "v5e:1x1"]
    flags["v5e:4x4"] = ["--rank", "2"]  # a changed recipe
    assert table.make_table(wanted, tmp_path) == text
    assert asked[3:] == ["v5e:4x4"]
    kept = json.loads((tmp_path / "tpu.json").read_text())
    kept["v5e:1x1 60m"]["report"]["chips"] = 4
    (tmp_path / "tpu.json").write_text(json.dumps(kept))
    monkeypatch.setattr(table, "COUNTING", table.COUNTING + 1)  # of several chips: counted again
    assert "| 3.14 GiB | 16.00 GiB | 2.0 TFLOP | | |" in table.make_table([], tmp_path)
    assert table.make_table(wanted[:1], tmp_path) == text
    assert asked[4:] == ["v5e:1x1"]
    assert (tmp_path / "tpu.md").read_text() == text
    row = "| 60M | v5e:1x1 | 1 |  | 1.00 GiB | 3.14 GiB | 16.00 GiB | 2.0 TFLOP | 5 MB | 0 MB |"
    assert row in text and "**does not fit** (3.14 GiB)" in text


def test_every_row_of_the_table_splits_weights_and_state_over_all_chips() -> None:
    """Within 5 % of the least that all chips of any slice hold together, tiles included."""
    kept = json.loads((ROOT / "docs" / "tpu.json").read_text())
    held: dict[str, dict[str, float]] = {}
    assert kept.keys() == {row.key for row in table.rows()}
    for row in table.rows():
        report = kept[row.key]["report"]
        if report["fits"] and not row.name:
            held.setdefault(row.size, {})[row.key] = report["arguments"] * report["chips"]
    assert held.keys() == set(table.SIZES)
    for of_size in held.values():
        least = min(of_size.values())
        assert not [key for key, total in of_size.items() if total > 1.05 * least]


@pytest.mark.slow
@pytest.mark.tpu
@needs_compiler
@pytest.mark.parametrize(("more", "gib"), [("", 22.8), (", continuous_sgd", 21)])
def test_7b_fits_one_v6e_chip(more: str, gib: float) -> None:
    """The published figure, of a GPU, is 22.8 GiB."""
    rows = {row.key: row for row in table.rows()}
    report = table.compiled(rows[f"v6e:1x1 7b layer by layer{more}"])
    assert report.fits and report.peak <= gib * 2**30
