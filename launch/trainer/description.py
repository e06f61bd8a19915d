"""The message of a run before its first update."""

from __future__ import annotations

from pathlib import Path

from launch.trainer.options import Options
from launch.trainer.options.record import changed_options, read_record


def describe(
    options: Options,
    *,
    parameters: int,
    dtype: str,
    device: str,
    weight_bytes: int,
    state_bytes: int | None = None,
    bytes_on_each: int | None = None,
    step: int,
) -> str:
    """A few lines about the run.

    `state_bytes` is omitted if it is not yet known, and the share of each device if there is only
    one.
    """
    state = "" if state_bytes is None else f"{optimizer_state(state_bytes)}, "
    start = f"resuming from step {step:,}" if step else "from the start"
    optimizer, subspace = options.optimizer, options.subspace
    method = f"{optimizer.optimizer}, full rank"
    if optimizer.is_projected:
        method = f"{optimizer.optimizer}, {subspace.proj_type}, rank {subspace.rank}"
    share = "" if bytes_on_each is None else f", on each device {bytes_on_each / 2**20:,.1f} MiB"
    kept = read_record(options.run.path) if step else None
    changed = changed_options(kept, options.record()) if kept else []
    return (
        f"{Path(options.model.model_config).stem}: {parameters / 1e6:.1f} M parameters ({dtype}) "
        f"on {device}, {start}\n{method}: {state}weights {weight_bytes / 2**20:,.1f} "
        f"MiB{share}\n{optimizer.num_training_steps:,} updates of "
        f"{options.data.tokens_per_update:,} tokens; the run is stored in {options.run.path}"
    ) + "".join(f"\nchanged since its start: {change}" for change in changed)


def optimizer_state(size: int) -> str:
    """How large the optimizer's state is, in words."""
    return f"optimizer state {size / 2**20:,.1f} MiB"
