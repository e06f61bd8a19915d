"""Both libraries and both trainers on a GPU: `JAX_PLATFORMS=cuda pytest -m gpu -n 0`.

The release's trajectories are compared as on a CPU, with the same tolerances: float32 matrix
products are computed in float32, not TF32. The signs of singular vectors depend on the library, and
cuSOLVER's differ from LAPACK's. Online PCA is not affected. At a refresh of P the kept moments meet
the new signs, so PyTorch computes those SVDs on the CPU, and JAX's runs, which are compiled, are
omitted.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import osd_torch
from launch import train_jax, train_torch
from launch.trainer.files import read_metrics
from osd_jax.llama.attention import cudnn
from osd_jax.llama.attention_plain import written_out
from parity_tests.support import golden_in_jax, golden_in_torch
from parity_tests.support.golden_cases import GoldenCase, GoldenRun, golden_cases, golden_runs
from parity_tests.support.sides import gradients, run_torch
from parity_tests.support.trainer_runs import SHORT, Home, make_home

pytestmark = pytest.mark.gpu
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(autouse=True, scope="module")
def gpu() -> Iterator[None]:
    """Products of float32 in float32, on both sides; fails where either sees no GPU."""
    assert torch.cuda.is_available(), "PyTorch sees no GPU"
    assert jax.default_backend() == "gpu", "JAX sees no GPU; set JAX_PLATFORMS=cuda"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with jax.default_matmul_precision("highest"):
        yield
    torch.set_float32_matmul_precision(before)


def marked(case: Any) -> Any:
    is_8bit = "8bit" in case.optimizer + case.proj_type
    return pytest.param(case, id=case.name, marks=needs_bitsandbytes if is_8bit else ())


@pytest.fixture
def lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular vectors with LAPACK's signs."""
    svd = torch.linalg.svd

    def on_cpu(matrix: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        return tuple(x.to(matrix.device) for x in svd(matrix.cpu(), **options))

    monkeypatch.setattr(torch.linalg, "svd", on_cpu)


@pytest.mark.usefixtures("lapack")
@pytest.mark.parametrize("case", [marked(case) for case in golden_cases()])
def test_a_matrix_in_pytorch_follows_the_release(case: GoldenCase) -> None:
    with torch.device("cuda"):
        golden_in_torch.check_matrix(case)


@pytest.mark.parametrize(
    "case",
    [case for case in golden_cases() if case.proj_type.startswith("continuous")],
    ids=lambda case: case.name,
)
def test_a_matrix_in_jax_follows_the_release(case: GoldenCase) -> None:
    golden_in_jax.check_matrix(case, transposed=True)


@pytest.mark.usefixtures("lapack")
@pytest.mark.parametrize("run", [marked(run) for run in golden_runs()])
def test_a_tiny_llama_in_pytorch_trains_as_in_the_release(run: GoldenRun) -> None:
    with torch.device("cuda"):
        golden_in_torch.check_tiny_llama(run)


@pytest.mark.parametrize(
    "run",
    [run for run in golden_runs() if run.proj_type.startswith("continuous")],
    ids=lambda run: run.name,
)
def test_a_tiny_llama_in_jax_trains_as_in_the_release(run: GoldenRun) -> None:
    golden_in_jax.check_tiny_llama(run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("optimizer", "proj_type"),
    [
        ("galore_adamw", "continuous"),
        ("galore_adamw", "random"),
        ("galore_lion", "continuous_lion"),
        ("galore_adafactor", "continuous_adafactor"),
        ("galore_adamw", "continuous_sgd"),
    ],
)
def test_a_gpu_trains_as_a_cpu_does(optimizer: str, proj_type: str, dtype: str) -> None:
    """Sketches of bfloat16 are bfloat16 products there and float32 products here: equal up to sums.

    The limit is then one step of the weight's own rounding for each of 8 steps.
    """
    rng = np.random.default_rng(0)
    start = {"mlp.weight": rng.standard_normal((48, 32)), "norm": rng.standard_normal(32)}
    grads = {name: gradients(rng, 8, x.shape, 1.5 * (x.ndim == 2)) for name, x in start.items()}
    options: Any = {"lr": 0.01, "rank": 6, "update_proj_gap": 20, "scale": 1.0, "seed": 3}
    ends = []
    for device in ("cpu", "cuda"):
        with torch.device(device):
            args = (start, grads, np.ones(8), optimizer, proj_type)
            ends.append(run_torch(*args, dtype=dtype, **options).weights)
    for name, first in start.items():
        cpu, cuda = (end[name][-1] for end in ends)
        error = np.linalg.norm(cuda - cpu) / np.linalg.norm(cpu - first)
        assert error < (1e-3 if dtype == "float32" else 5e-2), name


def test_the_count_of_steps_lies_on_the_cpu_and_the_rest_on_the_gpu() -> None:
    with torch.device("cuda"):
        weight = torch.nn.Parameter(torch.randn(24, 16))
        weight.grad = torch.randn(24, 16)
    optimizer = osd_torch.make_optimizer(
        [("mlp", weight)], "galore_adamw", "continuous", lr=0.01, rank=4
    )
    for _ in range(2):
        optimizer.step()
    state = optimizer.state[weight]
    kinds = {name: x.device.type for name, x in state.items()}
    assert kinds.pop("step") == "cpu" and set(kinds.values()) == {"cuda"}


STEPS_OF_STACKS = {
    "one at a time": {"foreach": False},
    "stacks": {"foreach": True},
    "without the host": {"capturable": True},
    "in a CUDA graph": {"capturable": True},
}


@pytest.mark.parametrize("how", [how for how in STEPS_OF_STACKS if how != "one at a time"])
@pytest.mark.parametrize(
    ("optimizer", "proj_type"),
    [
        ("galore_adamw", "continuous"),
        ("galore_adamw", "random"),
        ("galore_lion", "continuous_lion"),
        ("galore_adafactor", "continuous_sgd"),
        ("osd_muon", "continuous_sgd"),
    ],
)
def test_stacks_and_cuda_graphs_step_as_one_matrix_at_a_time(
    optimizer: str, proj_type: str, how: str
) -> None:
    """In float64, over a schedule, with a refresh of P between replays of the graph."""
    expected, found = (stacks_of_a_gpu(optimizer, proj_type, x) for x in ("one at a time", how))
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


def stacks_of_a_gpu(optimizer: str, proj_type: str, how: str) -> list[torch.Tensor]:
    """The weights of ten matrices and vectors after eight steps."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64)
    shapes = [(48, 64)] * 4 + [(64, 48)] * 4 + [(64,)] * 2
    params = [torch.nn.Parameter(draw(shape)) for shape in shapes]
    named = [(f"{i}.mlp" if x.ndim == 2 else f"{i}.norm", x) for i, x in enumerate(params)]
    lr = torch.tensor(0.01, device="cuda", dtype=torch.float64)
    moves = {"peak_lr": 0.01} if proj_type.startswith("continuous") else {}
    built = osd_torch.make_optimizer(
        named, optimizer, proj_type, lr=lr, rank=8, update_proj_gap=5, **moves,
        **STEPS_OF_STACKS[how],
    )  # fmt: skip
    for param in params:
        param.grad = torch.zeros_like(param)
    graph = None
    for step in range(8):
        for param in params:
            param.grad.copy_(draw(param.shape))
        for group in built.param_groups:
            group["lr"].fill_(0.01 * (1 - step / 20))
        if how != "in a CUDA graph" or step < 2:
            built.step()
            continue
        built.refresh_()
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                built.step()
        graph.replay()
    return [param.detach() for param in params]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("is_packed", [False, True])
def test_cudnn_attention_equals_the_written_out_one(is_packed: bool, key_heads: int) -> None:
    """Results and gradients, by a few of bfloat16's roundings."""
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [(2, 201, heads, 64) for heads in (4, key_heads, key_heads)]
    q, k, v, weight = (
        jax.random.normal(key, size).astype("bfloat16")
        for key, size in zip(keys, [*sizes, (2, 201, 256)], strict=True)
    )
    segments = jnp.asarray(np.arange(201) // [[70], [120]], jnp.int32) if is_packed else None

    def found(attention: Any) -> Any:
        total = lambda *inputs: jnp.sum((attention(*inputs, segments) * weight).astype("float32"))
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)[1]

    for one, other in zip(found(cudnn), found(written_out), strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.isfinite(one).all()
        assert np.abs(one - other).max() <= 8 * 2**-8 * np.abs(other).max()


@pytest.fixture(scope="module", params=[train_torch, train_jax], ids=["torch", "jax"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Home:
    trainer = request.param
    return make_home(tmp_path_factory.mktemp("gpu"), trainer, "-m", trainer.__name__)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "galore_adamw", "proj_type": "continuous"},
        {"optimizer": "galore_adamw_per_layer", "proj_type": "continuous", "batch_size": 8},
        {"optimizer": "galore_adamw", "proj_type": "std", "dtype": "float32"},
        pytest.param(
            {
                "optimizer": "galore_adamw8bit_per_layer",
                "proj_type": "continuous_adam8bit",
                "activation_checkpointing": True,
                "batch_size": 8,
            },
            marks=needs_bitsandbytes,
        ),
        {"optimizer": "adamw"},
    ],
    ids=lambda changes: f"{changes['optimizer']}-{changes.get('proj_type')}",
)
def test_trainers_train_stop_and_go_on(changes: dict[str, Any], home: Home) -> None:
    name = "-".join(map(str, changes.values()))
    short: dict[str, Any] = {**SHORT, "num_training_steps": 40, "total_batch_size": 8} | changes
    short |= {"eval_every": 20, "save_every": 10, "warmup_steps": 4}
    assert home.run(name, **short) == 0
    losses = losses_of(home / name)
    assert np.isfinite(losses).all() and np.mean(losses[-4:]) < losses[0] - 0.2
    again = f"{name}-again"
    assert home.run(again, **short, continue_from=home / name / "checkpoints" / "30") == 0
    # The gradients of embeddings are sums in no fixed order there.
    np.testing.assert_allclose(losses_of(home / again)[-10:], losses[-10:], rtol=2e-2)


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if record["kind"] == "train"]
