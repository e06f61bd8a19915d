"""The golden trajectories in `golden/`: what the published PyTorch code does, step by step.

Framework-neutral: NumPy arrays in PyTorch's orientation, (output, input).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


class Published:
    """What a published run's options share."""

    rank: int
    update_proj_gap: int
    scale: float
    weight_decay: float

    @property
    def options(self) -> dict[str, Any]:
        """The keywords that either library's `make_optimizer` takes, but the learning rate."""
        names = ("rank", "update_proj_gap", "scale", "weight_decay")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class GoldenCase(Published):
    """One matrix, trained for a few steps.

    Attributes:
        name: Unique, for test ids.
        optimizer: Published name.
        proj_type: Published name.
        rank: Columns of P.
        update_proj_gap: Period, or for online PCA one over P's step size.
        scale: Factor on the lifted update.
        lr: The peak.
        lr_ratio: Step t uses `lr * lr_ratio[t]`; may be 0.
        weight_decay: Decoupled.
        beta1: Adafactor's first moment, or None.
        start: The weight before the first step, (m, n) float32.
        gradients: (steps, m, n) float32.
        kept_steps: The steps after which `weights` and `bases` were kept.
        weights: (kept, m, n) float32.
        bases: By side, "output" or "input" (both for `full`): (kept, p, r), columns the basis.
    """

    name: str
    optimizer: str
    proj_type: str
    rank: int
    update_proj_gap: int
    scale: float
    lr: float
    lr_ratio: tuple[float, ...]
    weight_decay: float
    beta1: float | None
    start: np.ndarray
    gradients: np.ndarray
    kept_steps: tuple[int, ...]
    weights: np.ndarray
    bases: dict[str, np.ndarray]

    @property
    def is_8bit(self) -> bool:
        return "8bit" in self.optimizer + self.proj_type

    @property
    def tolerance(self) -> float:
        """Largest relative error of the final weight that a float32 run may show."""
        if self.is_8bit:
            return 8e-2
        return 2e-2 if self.optimizer == "galore_lion" else 3e-4

    def error(self, weight: np.ndarray) -> float:
        """||W - W_golden|| / ||W_golden - W0|| of a final weight."""
        final = self.weights[-1]
        return float(np.linalg.norm(weight - final) / np.linalg.norm(final - self.start))


@dataclass(frozen=True)
class GoldenRun(Published):
    """One training run of the tiny LLaMA; see `TINY_LLAMA`.

    Attributes:
        name: Unique, for test ids.
        optimizer: Published name.
        proj_type: Published name.
        lr: The peak.
        lr_ratio: Step t uses `lr * lr_ratio[t]`.
        weight_decay: Decoupled.
        rank: Columns of P.
        update_proj_gap: Period, or for online PCA one over P's step size.
        scale: Factor on the lifted update.
        grad_clipping: Largest gradient norm; 0: no clipping.
        batches: (steps, batch, sequence) token ids.
        losses: Training loss at every step, before its update.
    """

    name: str
    optimizer: str
    proj_type: str
    lr: float
    lr_ratio: tuple[float, ...]
    weight_decay: float
    rank: int
    update_proj_gap: int
    scale: float
    grad_clipping: float
    batches: np.ndarray
    losses: np.ndarray

    @property
    def tolerance(self) -> float:
        """Largest difference of a loss."""
        return 2e-3 if self.optimizer == "galore_adamw" else 4e-2


TINY_LLAMA = GOLDEN / "tiny_llama"  # config.json and model.safetensors are the start of every run


@functools.cache
def golden_cases() -> list[GoldenCase]:
    """Every single-matrix trajectory."""
    return [_case(entry) for entry in json.loads((GOLDEN / "index.json").read_text())]


@functools.cache
def golden_runs() -> list[GoldenRun]:
    """Every training run of the tiny LLaMA."""
    batches = np.load(TINY_LLAMA / "batches.npy")
    return [_run(e, batches) for e in json.loads((TINY_LLAMA / "losses.json").read_text())]


@functools.cache
def _arrays(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / file) as arrays:
        return dict(arrays)


def _case(entry: dict) -> GoldenCase:
    inputs, outputs, key = _arrays("inputs.npz"), _arrays(entry["file"]), entry["key"]
    m, n = entry["shape"]
    if entry["proj_type"] == "full":
        held = [outputs[f"{key}/P_left"], outputs[f"{key}/P_right"]]
    else:
        held = [outputs[f"{key}/P"]]
    r = min(entry["rank"], m, n)
    sides = {
        "std": "input" if m >= n else "output",
        "reverse_std": "output" if m >= n else "input",
        "left": "output",
        "right": "input",
        "full": "both",
    }
    side = sides.get(entry["proj_type"], sides["std"])
    names = ["output", "input"] if side == "both" else [side]
    bases = {k: P.swapaxes(1, 2) if k == "input" else P for k, P in zip(names, held, strict=True)}
    assert all(P.shape[1:] == ({"output": m, "input": n}[k], r) for k, P in bases.items())
    beta1 = "" if entry["beta1"] is None else "_beta1"
    return GoldenCase(
        name=f"{entry['optimizer']}{beta1}-{key.replace('/', '-')}",
        start=inputs[f"{entry['inputs']}/W0"],
        gradients=inputs[f"{entry['inputs']}/G"],
        kept_steps=tuple(entry["kept_steps"]),
        lr_ratio=tuple(entry["lr_ratio"]),
        weights=outputs[f"{key}/W"],
        bases=bases,
        **{
            field: entry[field]
            for field in (
                "optimizer", "proj_type", "rank", "update_proj_gap", "scale", "lr", "weight_decay",
                "beta1",
            )
        },
    )  # fmt: skip


def _run(entry: dict, batches: np.ndarray) -> GoldenRun:
    warmup, total, least = (
        entry[k] for k in ("warmup_steps", "num_training_steps", "min_lr_ratio")
    )

    def ratio(step: int) -> float:
        if step < warmup:
            return step / warmup
        cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup)))
        return float(least + (1 - least) * cosine)

    return GoldenRun(
        name=f"{entry['optimizer']}-{entry['proj_type']}",
        lr_ratio=tuple(ratio(step) for step in range(total)),
        batches=batches[:total],
        losses=np.asarray(entry["losses"]),
        **{
            field: entry[field]
            for field in (
                "optimizer", "proj_type", "lr", "weight_decay", "rank", "update_proj_gap", "scale",
                "grad_clipping",
            )
        },
    )  # fmt: skip
