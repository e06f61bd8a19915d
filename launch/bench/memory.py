"""Bytes of optimizer state, and the peak memory of a train step.

State is counted on the arrays. The peak includes weights, state, batch and everything else of one
step: in JAX as planned by its compiler (arguments, results and temporaries, minus shared memory);
in PyTorch what its allocator has handed out, on a GPU by its own count, and on a CPU by the events
of the profiler in addition to weights and state. Memory that a library allocates itself, such as
the packed matrices of a product, is not included.
"""

from __future__ import annotations

import itertools
from typing import Any

from launch.bench.train import METHODS, Contender, JaxRun, Setting, TorchRun

CONTENDERS = tuple(
    Contender(framework, method, layerwise)
    for framework in ("torch", "jax")
    for layerwise in (False, True)
    for method in METHODS
    if not layerwise or method not in ("osd_muon", "Muon")
)


def run(setting: Setting) -> list[dict[str, Any]]:
    """One record per contender."""
    return [measure(setting, contender) for contender in CONTENDERS]


def measure(setting: Setting, contender: Contender) -> dict[str, Any]:
    """The record of one contender: weights, state and peak, in bytes."""
    of = {"torch": of_torch, "jax": of_jax}[contender.framework]
    found = of(setting, contender)
    return {"contender": contender.name, **contender._asdict(), **found}


def of_jax(setting: Setting, contender: Contender) -> dict[str, int]:
    """According to the compiler; nothing is run."""
    import jax
    import numpy as np

    run = JaxRun(setting, contender.method, shapes_only=True)
    lowered = run.steps[contender.layerwise].lower(run.state, run.batch, np.asarray(False))  # type: ignore[attr-defined]
    plan = lowered.compile().memory_analysis()
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return {
        "weight_bytes": size(run.state.params),
        "state_bytes": size(run.state.opt_state),
        "peak_bytes": plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes,
    }


def of_torch(setting: Setting, contender: Contender) -> dict[str, int]:
    """According to the allocator, in the second step: the first one creates the state."""
    import torch

    from osd_torch.llama.checkpoint import size_in_bytes

    run = TorchRun(setting, contender.method, contender.layerwise)
    run()
    weights, state = size_in_bytes(run.model), size_in_bytes(run.optimizer)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = weights + state + most_allocated(run)
    return {"weight_bytes": weights, "state_bytes": state, "peak_bytes": peak}


def most_allocated(step: Any) -> int:
    """The peak of the bytes that a step on the CPU allocates."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
