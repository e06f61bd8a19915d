"""The trajectories in `golden/`: what the published PyTorch code computes, step by step.

Framework-neutral: NumPy arrays in PyTorch's orientation, (output, input).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.support import GOLDEN


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

    def tolerance(self, other_blocks: bool = False) -> float:
        """Largest relative error of the final weight that a float32 run may show.

        8-bit moments of W: a value with a relative error d is stored as the neighbour of its code
        with probability 2 d / s, where s is the relative spacing of the code book, which changes
        the value by s. Over all entries the root mean square of that is sqrt(2 d s). Here d is at
        most 7e-4 (`svd_error`), because the R of the first step and of a refresh consists of
        singular vectors, and s is 0.014 to 0.13 for all values of more than a tenth of their
        block's largest and up to 0.25 for smaller ones: sqrt(2 * 7e-4 * 0.25) = 1.9e-2.

        In other blocks, with other largest values, each value is rounded differently: by s /
        sqrt(12) at the book's median s of 0.05, on each side (sqrt(2)), and the first moment
        accumulates 1 / sqrt(1 - 0.9^2) such errors: 4.7e-2, in addition to the second moment's
        rounding errors.

        Only P in 8 bits: P may be off as `check_bases` allows, by 0.2 of its norm of 8, which is
        0.025 of R for some 3 steps until P equals the release's again. These errors differ, while
        the 12 steps have the same direction, 5.8 times the peak in total: 0.025 sqrt(3) / 5.8 =
        7.5e-3. Lion takes signs of it: an entry flips with probability 0.025 / pi and is then off
        by 2, which makes 2 sqrt(0.025 / pi) sqrt(3) / 5.8 = 5.3e-2.

        Args:
            other_blocks: Whether the run splits moments into other blocks of 256 than the release,
                whose blocks run along all rows.
        """
        if self.is_8bit:
            return 8e-2 if other_blocks or self.optimizer == "galore_lion" else 2e-2
        return 2e-2 if self.optimizer == "galore_lion" else 3e-4

    def error(self, weight: np.ndarray) -> float:
        """||W - W_golden|| / ||W_golden - W0|| of a final weight."""
        final = self.weights[-1]
        return float(np.linalg.norm(weight - final) / np.linalg.norm(final - self.start))

    def rejoined(self, kept: int, side: str, basis: np.ndarray) -> np.ndarray:
        """The release's P after its kept step, with the signs of our `basis`, to continue from.

        The 8-bit cases cut 72 singular values after the 64th, where neighbours are close, and Adam
        and Lion take equally large steps for a small entry of P's gradient as for a large one. A
        rounding difference between processors flips the sign of one such entry, that of others at
        the next step, and so on. Runs that restart each stretch from the same P do not have enough
        steps for that: every processor computes the same up to rounding, and the limits detect the
        changes that an error of the code would make. The moments remain ours throughout.
        """
        return align(self.bases[side][kept], basis)

    def check_bases(self, bases: dict[str, np.ndarray]) -> None:
        """Asserts that P agrees after each kept step.

        Args:
            bases: By side, (kept, p, r); of the 8-bit cases each before it was `rejoined`.
        """
        assert bases.keys() == self.bases.keys()
        for side, golden in self.bases.items():
            error = align(bases[side], golden) - golden
            if not self.is_8bit:
                np.testing.assert_allclose(error, 0, rtol=0, atol=1e-5)
                continue
            for kept, step in enumerate(self.kept_steps):
                self._check_rejoined_basis(error[kept], step)

    def _check_rejoined_basis(self, error: np.ndarray, step: int) -> None:
        """Asserts that the error (p, r) of P after a step is one of rounding."""
        online = self.proj_type.startswith("continuous")
        if step == 0 or not online:
            refresh = 0 if online else step - step % self.update_proj_gap
            assert np.linalg.norm(error) <= svd_error(self.gradients[refresh], self.rank)
        elif self.proj_type in ("continuous_adafactor", "continuous_sgd"):
            np.testing.assert_allclose(error, 0, rtol=0, atol=1e-5)
        else:
            # Rounding moves an entry of P's gradient by some 30 * 2^-24 of it, d = 2e-6, for P
            # takes away most of A. As for `tolerance`, a code is another with probability 2 d / s,
            # which at the book's median spacing of 0.05 is 8e-5: 0.4 of 4,608 codes a step and
            # moment, 4 in the longest stretch, of 5 steps. It moves its entry by s of P's step of
            # 1 / gap, 3e-3; where the second moment's code comes out as 0 or not, or a sign turns,
            # by a whole step to each side. In other blocks, every one of the entries is off by
            # sqrt(2) 0.05 / sqrt(12) of P's steps: 0.15 in all, in the longest stretch.
            flips, whole_step = 4, 2 / self.update_proj_gap
            assert np.sum(np.abs(error) > 2e-2) <= flips
            assert np.linalg.norm(error) <= flips**0.5 * whole_step


def svd_error(gradient: np.ndarray, rank: int) -> float:
    """Largest error of the Frobenius norm of P, the leading singular vectors in float32.

    LAPACK gives the vectors of a matrix that is off by a few 2^-24 of its largest singular value
    (backward stability). They turn against their neighbours by that over the distance of their
    singular values (Wedin); the closest pair makes nearly all of it, on both of two sides.
    """
    s = np.linalg.svd(gradient.astype(float), compute_uv=False)
    return float(4 * 2.0**-24 * s[0] / -np.diff(s[: rank + 1]).max())


def align(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """`ours` (..., p, r) with the signs of its columns turned to those of `theirs`."""
    return ours * np.where(np.sum(ours * theirs, axis=-2, keepdims=True) < 0, -1.0, 1.0)


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
        """Largest difference of a loss.

        The rank is below that of the first gradients, so that no column of P comes from rounding
        alone. Noise of 1e-7 on the weights moves the release's own losses by 1e-6 (AdamW), 3e-5
        (Lion) and 1e-4 (Adafactor).
        """
        return 1e-4 if self.optimizer == "galore_adamw" else 2e-3


# config.json and model.safetensors are the start of every run.
TINY_LLAMA = GOLDEN / "tiny_llama_posed"


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
