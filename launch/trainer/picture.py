"""The picture of a run's loss, `loss.png`, and of several runs in comparison.

On the left the loss stands over the tokens trained on, on the right over the time. The thin line is
the training loss, the strong one its running mean, the points are the validation loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.trainer.files import atomic, read_metrics

_UNITS = ((2 * 3600, 3600, "hours"), (2 * 60, 60, "minutes"), (0, 1, "seconds"))


def plot(runs: Sequence[Path], out: Path) -> Path:
    """Draws the runs into one picture; the suffix of `out` says of which format.

    Raises:
        FileNotFoundError: a run has no metrics, or the folder of `out` does not exist.
        ValueError: a run has no loss to draw, or the format is unknown.

    Returns:
        Where the picture is: `out`, with `.png` where it has no suffix.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    curves = [_curves(run) for run in runs]
    longest = max(curve["train"]["seconds"][-1] for curve in curves)
    unit, unit_name = next((unit, name) for least, unit, name in _UNITS if longest >= least)

    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    by_tokens, by_time = axes = figure.subplots(1, 2, sharey=True)
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    handles = []
    for index, (name, curve) in enumerate(zip(_names(runs), curves, strict=True)):
        color = colors[index % len(colors)]
        train, held_out = curve["train"], curve["eval"]
        for ax, x, scale in ((by_tokens, "tokens", 1), (by_time, "seconds", unit)):
            ax.plot(train[x] / scale, train["loss"], color=color, linewidth=0.7, alpha=0.3)
            ax.plot(train[x] / scale, _running_mean(train["loss"]), color=color, linewidth=1.8)
            ax.plot(
                held_out[x] / scale, held_out["loss"], "o",
                color=color, markeredgecolor="white", markersize=7, zorder=3,
            )  # fmt: skip
        last = f" (validation ends at {held_out['loss'][-1]:.3f})" if held_out["loss"].size else ""
        handles.append(Line2D([], [], color=color, linewidth=1.8, label=name + last))
    handles += [
        Line2D([], [], color="gray", linewidth=0.7, alpha=0.5, label="training loss"),
        Line2D(
            [], [], color="gray", marker="o", markeredgecolor="white", markersize=7, linestyle="",
            label="validation loss",
        ),
    ]  # fmt: skip

    losses = [values["loss"] for curve in curves for values in curve.values()]
    low = min(loss.min() for loss in losses if loss.size)
    # The first updates need not be seen.
    high = max(np.quantile(loss, 0.98) for loss in losses if loss.size)
    margin = 0.05 * (high - low) or 0.1
    by_tokens.set_ylim(low - margin, high + margin)
    by_tokens.set_ylabel("loss (nats per token)")
    by_tokens.set_xlabel("tokens")
    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_time.set_xlabel(unit_name)
    by_time.legend(handles=handles, frameon=False)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)

    out = out if out.suffix else out.with_suffix(".png")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist; make it first")
    with atomic(out) as temporary:
        figure.savefig(temporary)
    return out


def _curves(run: Path) -> dict[str, dict[str, np.ndarray[Any, np.dtype[np.float64]]]]:
    """{"train" | "eval": {"tokens" | "seconds" | "loss": (N,) float64}}, finite losses only."""
    records = [r for r in read_metrics(run) if r.get("loss") is not None]
    if not any(r["kind"] == "train" for r in records):
        raise ValueError(f"{run / 'metrics.jsonl'} holds no training loss yet; nothing to draw")
    return {
        kind: {
            key: np.array([r[key] for r in records if r["kind"] == kind], dtype=np.float64)
            for key in ("tokens", "seconds", "loss")
        }
        for kind in ("train", "eval")
    }


def _running_mean(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean over a window of a twenty-fifth of the run, centred; shorter at both ends."""
    window = np.ones(2 * (len(values) // 50) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [run.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
