"""What a run says before its first update."""

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
    """What is about to run, in a few lines.

    `state_bytes` is left out where it is not yet known, and what each device holds of both where
    there is one.
    """
    state = "" if state_bytes is None else f"{optimizer_state(state_bytes)}, "
    start = f"going on from step {step:,}" if step else "from the start"
    optimizer, subspace = options.optimizer, options.subspace
    method = f"{optimizer.optimizer}, full rank"
    if optimizer.is_projected:
        method = f"{optimizer.optimizer}, {subspace.proj_type}, rank {subspace.rank}"
    share = "" if bytes_on_each is None else f", on each device {bytes_on_each / 2**20:,.1f} MiB"
    kept = read_record(options.run.path) if step else None
    changed = changed_options(kept, options.record()) if kept else []
    return (
        f"{Path(options.model.model_config).stem}: {parameters / 1e6:.1f} M parameters ({dtype}) "
        f"on {device}, {start}\n"
        f"{method}: {state}"
        f"weights {weight_bytes / 2**20:,.1f} MiB{share}\n"
        f"{optimizer.num_training_steps:,} updates of {options.data.tokens_per_update:,} tokens; "
        f"the run is kept in {options.run.path}"
    ) + "".join(f"\nchanged since it began: {change}" for change in changed)


def optimizer_state(size: int) -> str:
    """How large the optimizer's state is, in words."""
    return f"optimizer state {size / 2**20:,.1f} MiB"
