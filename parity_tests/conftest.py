"""Set-up and fixtures shared by all tests. It runs before JAX or PyTorch is imported."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from parity_tests.support.two_processes import TwoProcesses

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # -m gpu and -m tpu runs set it themselves
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' own processes share the cores
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would need the network fails at once
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Eight devices on few cores wait for each other in every collective. Each gets threads of its
    # own to wait in, and a machine that stands still for 40 seconds, XLA's patience, is no fault.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
    os.environ.setdefault("PJRT_NPROC", "16")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # With it, devices start independent collectives in different orders: some wait for the others
    # in a permutation, those for them in an all-gather, and all of them forever.
    os.environ["XLA_FLAGS"] += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    # By default XLA splits a program into 32 parts and compiles them in parallel. One part takes a
    # third less CPU time for a small program, and the workers use all cores anyway.
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
if "cuda" in os.environ["JAX_PLATFORMS"]:  # choosing among kernels would take minutes
    os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"
# Compiling dominates the suite: what one run or worker compiled, the next reads. A resumed trainer
# reads small programs too, which compile in less than JAX's minimum of 1 s.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def quick_compiler() -> str:
    """XLA's flag for the older of two code generators, which JAX 0.11 no longer has.

    XLA ends the process at a flag that it does not know.
    """
    major, minor, *_ = importlib.metadata.version("jaxlib").split(".")
    is_older = (int(major), int(minor)) < (0, 11)
    return " --xla_cpu_use_fusion_emitters=false" if is_older else ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--optimized",
        action="store_true",
        help="compile with XLA's defaults on a CPU too, which takes three times as long",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Chooses how XLA compiles, before JAX is imported, here and in processes that tests start.

    On a CPU, compiling takes most of the suite's time. What the tests claim of a program holds for
    every compiler that keeps its meaning, so they take the quickest: without most optimizations
    and with the older of two code generators where JAX has both. `--optimized` takes XLA's
    defaults. So does `jax/test_optimized.py` in every run; the fixture `optimized` brings the
    optimizations back.
    """
    if os.environ["JAX_PLATFORMS"] == "cpu" and not config.getoption("optimized"):
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        if quick_compiler() not in os.environ["XLA_FLAGS"]:
            os.environ["XLA_FLAGS"] += quick_compiler()


# The files that take longest, first: else a worker may start one when the other has finished.
LONGEST = (
    "trainers/test_train_torch", "algorithm/test_oracle", "jax/test_layerwise",
    "torch/test_sharding", "trainers/test_train_jax", "jax/test_seam", "jax/test_compose",
    "jax/test_trees", "trainers/test_train_jax_hosts", "jax/test_residuals", "jax/test_sharding",
    "jax/test_golden", "measurements/test_compile_tpu", "measurements/test_bench",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the files by `LONGEST`; `launch/test.sh` hands them out in this order."""
    place = {f"{name}.py": i for i, name in enumerate(LONGEST)}
    name = lambda item: item.path.relative_to(Path(__file__).parent).as_posix()
    items.sort(key=lambda item: place.get(name(item), len(LONGEST)))


@pytest.fixture
def optimized() -> Iterator[None]:
    """With XLA's optimizations: for what a program sends, keeps alive or recomputes."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


def pytest_collection_finish() -> None:
    """Lets Python look for cycles of garbage rarely, and not among what was imported.

    Tracing makes many objects that stay, among which the default thresholds search again and again.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_unconfigure() -> None:
    """Lets Python end without a last search for garbage, which takes a worker seconds."""
    gc.freeze()


MOST_MAPS = 20_000  # that a module may leave


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps() -> Iterator[None]:
    """Frees what JAX compiled where a module leaves many memory maps behind.

    Each program keeps some, a process may have 65,530 on Linux, and beyond them LLVM crashes.
    """
    yield
    maps = Path("/proc/self/maps")
    if "jax" not in sys.modules or not maps.exists():
        return
    with maps.open() as lines:
        count = sum(1 for _ in lines)
    if count > MOST_MAPS:
        sys.modules["jax"].clear_caches()
        if sides := sys.modules.get("parity_tests.support.sides"):
            sides.forget_compiled()
        gc.unfreeze()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch with one thread, as in `two_processes`: LAPACK's singular vectors depend on it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    """Runs a function of the test's module on two processes and returns what each returned.

    The processes start once for all modules: importing takes them seconds.
    """
    from parity_tests.support.two_processes import TwoProcesses

    processes = TwoProcesses(tmp_path_factory.mktemp("two_processes"))
    yield processes
    processes.stop()


# Its tests are collected where they are inherited.
pytest.register_assert_rewrite("parity_tests.support.trainer_runs")
