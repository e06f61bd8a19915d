"""What released codes of residual rules compute, step by step: `golden/residual/`.

Fira (xichen-fy/Fira at 5c28b13) and APOLLO (zhuhanqing/APOLLO at 76b3472), on a CPU in float32 with
torch 2.13. Matrices are in PyTorch's orientation, (output, input).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import numpy as np

from parity_tests.support import GOLDEN


@dataclass(frozen=True)
class ResidualCase:
    """One matrix, trained by one released code.

    Attributes:
        key: Its name.
        method: "fira_adamw", "apollo_svd", "apollo_random" or "apollo_mini".
        rank: Columns of P.
        update_proj_gap: Steps between two P's.
        scale: Of the update; for APOLLO its root is.
        lr: The peak.
        lr_ratio: The schedule, by step.
        weight_decay: Decoupled, after the update.
        betas: Adam's.
        eps: Adam's, added before the bias correction.
        start: The first weight.
        gradients: By step.
        weights: After each step.
        bases: P (p, r) of each step.
        norms: The limiter's norm after each step.
    """

    key: str
    method: str
    rank: int
    update_proj_gap: int
    scale: float
    lr: float
    lr_ratio: list[float]
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    start: np.ndarray
    gradients: np.ndarray
    weights: np.ndarray
    bases: list[np.ndarray]
    norms: np.ndarray

    def error(self, weight: np.ndarray) -> float:
        """How far the last weight is from the released code's, in parts of the way travelled."""
        final = self.weights[-1].astype(np.float64)
        travelled = np.linalg.norm(final - self.start)
        return float(np.linalg.norm(weight - final) / travelled)


@functools.cache
def residual_cases() -> list[ResidualCase]:
    """All of them."""
    inputs = np.load(GOLDEN / "inputs.npz")
    index = json.loads((GOLDEN / "residual" / "index.json").read_text(encoding="utf-8"))
    with np.load(GOLDEN / "residual" / "trajectories.npz") as file:
        found = {name: file[name] for name in file.files}
    cases = []
    for entry in index:
        key, rank = entry["key"], entry["rank"]
        # The code holds (m, r) on the output side and (r, n) on the input side.
        is_output = lambda P, m=entry["shape"][0], r=rank: P.shape == (m, r)
        bases = [P if is_output(P) else P.T for P in found[f"{key}/P"]]
        cases.append(
            ResidualCase(
                key,
                entry["method"],
                rank,
                entry["update_proj_gap"],
                entry["scale"],
                entry["lr"],
                entry["lr_ratio"],
                entry["weight_decay"],
                tuple(entry["betas"]),
                entry["eps"],
                inputs[f"{entry['inputs']}/W0"],
                inputs[f"{entry['inputs']}/G"],
                found[f"{key}/W"],
                bases,
                found[f"{key}/N"],
            )
        )
    return cases
