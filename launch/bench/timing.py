"""Times of several contenders in one process, in rounds, so that they meet the same machine.

A machine that others use is now fast, now slow. In each round every contender has its turn, in an
order drawn anew, and what is compared is the ratio of two times of one round.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.trainer.cli import UsageError
from launch.trainer.cpu import keep_lapack_to_one_thread, keep_memory

Step = Callable[[], Any]  # one whole step, which is done when it returns
Times = dict[str, list[float]]  # seconds of each round, by contender
REST = 0.02  # seconds
PACKAGES = ("torch", "jax", "jaxlib", "optax", "bitsandbytes", "numpy")


class Spread(NamedTuple):
    """The median of some numbers, and their quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Median and quartiles of the ratios of two contenders' times, each within one round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def time_in_rounds(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    turn_seconds: float = 0.0,
    settle: bool = True,
    seed: int = 0,
) -> Times:
    """Seconds a step, by contender and round.

    A turn is a rest, in which the threads of the last contender fall asleep: they spin for some
    milliseconds when their work is done, on cores that are no longer theirs. Then one step that is
    not timed, after which caches are this contender's, and as many timed ones as last for
    `turn_seconds`, at least one.

    Args:
        steps: By contender.
        rounds: How many.
        turn_seconds: How long a turn should last.
        settle: Whether a turn has that rest and first step; a long step need not.
        seed: Of the order of turns, drawn anew for each round.
    """
    counts = {name: _steps_in(step, turn_seconds) for name, step in steps.items()}
    draw = random.Random(seed)
    times: Times = {name: [] for name in steps}
    for _ in range(rounds):
        for name in draw.sample(list(steps), len(steps)):
            if settle:
                time.sleep(REST)
                steps[name]()
            times[name].append(_seconds_of(steps[name], counts[name]))
    return times


def samples(step: Step, *, most: int, seconds: float) -> list[float]:
    """Seconds of a step, at most so many times; none is begun after `seconds`."""
    found: list[float] = []
    while len(found) < most and sum(found) <= seconds:
        found.append(_seconds_of(step, 1))
    return found


def _steps_in(step: Step, seconds: float) -> int:
    step()  # the first one compiles, allocates and chooses kernels
    if not seconds:
        return 1
    step()
    return max(1, math.ceil(seconds / _seconds_of(step, 1)))


def _seconds_of(step: Step, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


def prepare(device: str, threads: int | None) -> None:
    """Gives both frameworks the same device, threads and memory, before either is imported.

    As the trainers do.

    Both start as many threads as this process has cores, so it keeps only so many.

    Raises:
        UsageError: more threads than cores, or no such device.
    """
    if threads is not None:
        if not hasattr(os, "sched_setaffinity"):
            raise UsageError("--threads: this system does not let a process keep to some cores")
        cores = sorted(os.sched_getaffinity(0))
        if threads > len(cores):
            raise UsageError(f"--threads: {threads} is more than the {len(cores)} cores there are")
        os.sched_setaffinity(0, cores[:threads])
        os.environ["OMP_NUM_THREADS"] = str(threads)
    keep_lapack_to_one_thread()
    if device == "cpu":
        keep_memory()
    os.environ["JAX_PLATFORMS"] = device
    # The two share the GPU; JAX would take most of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if device == "cuda":
        import jax
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch finds no GPU; see torch.cuda.is_available()")
        torch.set_float32_matmul_precision("high")  # as the trainer does, and XLA
        try:
            jax.devices()
        except RuntimeError as error:
            raise UsageError(f"--device cuda: JAX finds no GPU: {error}") from None


def machine(name: str | None, device: str) -> dict[str, Any]:
    """What the figures are of: the machine, its threads, the versions and the date."""
    import torch

    about = {
        "machine": name or platform.node(),
        "cpu": _cpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # 1 for each busy core, this program's among them
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
    }
    return {**about, "versions": dict(_versions())}


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "absent"


def _cpu() -> str:
    path = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
