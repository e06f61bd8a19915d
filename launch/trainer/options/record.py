"""The stored options of a run, and whether a run resumes with the same ones.

A record is the content of `options.json`: {"options": every flag's value, "model": the model's
config}. A checkpoint contains the same, as of when it was saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.trainer.cli import UsageError
from launch.trainer.options.groups import FLAGS

Record = Mapping[str, Any]

# A run resumes only with these unchanged: they determine the state's shapes, the meaning of its
# counts or the order of the data.
FIXED = (
    "optimizer", "proj_type", "rank", "basis_dtype", "update_proj_every", "dataset",
    "text_column", "tokenizer", "max_length", "pack", "separate_documents", "seed",
    "total_batch_size", "no_decay", "residual", "growth_limiter", "second_moment", "first_moment",
    "stochastic_rounding",
)  # fmt: skip
# How a run is started, which is not part of the run itself.
_STARTED_BY = ("resume", "overwrite", "continue_from", "coordinator_address", "process_id")


def read_record(run: Path) -> Record | None:
    """The record in a run's directory; None if there is none.

    Raises:
        UsageError: Its file is damaged.
    """
    path = run / "options.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"--name: {path} is damaged: {error}; use another --name") from None


def check_same_run(kept: Record, now: Record, where: Path) -> None:
    """Raises if options in `FIXED` differ from those of the run to resume.

    Args:
        kept: Record of the run to resume.
        now: Record of the current options.
        where: Directory of the stored record.

    Raises:
        UsageError: An option of `FIXED`, or the model, differs.
    """
    for what, old, new in (*_fixed_options(kept, now), *_model(kept, now)):
        if old != new:
            raise UsageError(
                f"{what}: {where} was started with {old}, not {new}; resume with {old}, or start "
                "another run with --name"
            )


def _fixed_options(kept: Record, now: Record) -> Iterator[tuple[str, Any, Any]]:
    for name in FIXED:
        # A flag newer than the run had its default.
        old = kept["options"].get(name, FLAGS[name].default)
        yield f"--{name}", old, now["options"][name]


def _model(kept: Record, now: Record) -> Iterator[tuple[str, Any, Any]]:
    for key in {**kept["model"], **now["model"]}:
        yield f"--model_config: {key}", kept["model"].get(key), now["model"].get(key)


def changed_options(kept: Record, now: Record) -> list[str]:
    """The differences between two records of a run: "--lr 0.01 -> 0.005"."""
    return [
        f"--{name} {old} -> {now['options'][name]}"
        for name, old in kept["options"].items()
        if name not in _STARTED_BY and now["options"].get(name, old) != old
    ]
