"""Tables and plots of the measurements."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from launch.trainer.files import atomic

Record = Mapping[str, Any]
Columns = Mapping[str, Callable[[Record], str]]  # title -> cell of a record
COLORS = {"torch": "tab:orange", "jax": "tab:blue"}


def title(record: Record) -> str:
    """The case of a record, such as `512x1376, rank 128 (60M)`."""
    m, n = record["shape"]
    return f"{m}x{n}, rank {record['rank']} ({record['model']})"


def by_case(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """The records of each case, under its title."""
    return [(name, list(group)) for name, group in groupby(records, key=title)]


def milliseconds(value: Mapping[str, float]) -> str:
    """Median and quartiles, in milliseconds."""
    return _with_quartiles(value, 1e3)


def ratio(value: Mapping[str, float]) -> str:
    """Median and quartiles of a ratio."""
    return _with_quartiles(value, 1)


def _with_quartiles(value: Mapping[str, float], unit: float) -> str:
    median, low, high = (number(value[key] * unit) for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def number(value: float) -> str:
    """Three significant digits, and no exponent: 0.0123, 1.23, 12,300."""
    rounded = float(f"{value:.3g}")
    places = 2 - math.floor(math.log10(rounded)) if rounded > 0 else 0
    return f"{rounded:,.{max(0, places)}f}"


OPTIMIZER_COLUMNS: Columns = {
    "contender": lambda r: r["contender"],
    "ms per step": lambda r: milliseconds(r["seconds"]),
    "over its floor": lambda r: ratio(r["over_floor"]),
    "over the better floor": lambda r: ratio(r["over_best_floor"]),
    "published way over it": lambda r: ratio(r["published_over_this"]),
    "over GaLore": lambda r: ratio(r["over_galore"]),
    "over full-rank AdamW": lambda r: ratio(r["over_full_rank"]),
    "breakdown": lambda r: svd_note(r),
}


TRAIN_COLUMNS: Columns = {
    "contender": lambda r: r["contender"],
    "tokens per second": lambda r: _with_quartiles(r["tokens_per_second"], 1),
    "of AdamW's": lambda r: ratio(r["of_full_rank"]),
    "of plain AdamW's": lambda r: ratio(r["of_plain_full_rank"]),
    "of the other framework's": lambda r: ratio(r["of_other_framework"]),
}
MEMORY_COLUMNS: Columns = {
    "contender": lambda r: r["contender"],
    "weights, MB": lambda r: megabytes(r["weight_bytes"]),
    "optimizer state, MB": lambda r: megabytes(r["state_bytes"]),
    "peak of a step, MB": lambda r: megabytes(r["peak_bytes"]),
}


def megabytes(value: int) -> str:
    """In units of 10^6 bytes."""
    return f"{value / 1e6:,.1f}"


def svd_note(record: Record) -> str:
    """The parts of an amortized step."""
    if "svd" not in record:
        return ""
    return f"step {milliseconds(record['step_alone'])}, SVD {milliseconds(record['svd'])} / 200"


def rates_text(rates: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The peak rates of the machine, one sentence per framework."""
    return "\n".join(
        f"{framework}: a large product {_with_quartiles(of['product'], 1e-9)} GFLOP/s, a copy "
        f"{_with_quartiles(of['copy'], 1e-9)} GB/s"
        for framework, of in rates.items()
    )


def rows(
    records: Iterable[Record], columns: Mapping[str, Callable[[Record], str]]
) -> list[list[str]]:
    """A table's rows; a missing record gives the reason in its second cell."""
    return [
        [record["contender"], record["missing"], *[""] * (len(columns) - 2)]
        if "missing" in record
        else [cell(record) for cell in columns.values()]
        for record in records
    ]


def text_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table to print, its columns aligned."""
    lines = [list(header), *map(list, body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    pad = lambda line: "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
    return "\n".join([pad(lines[0]), "  ".join("-" * w for w in widths), *map(pad, lines[1:])])


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table for a page."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def optimizer_text(records: Sequence[Record]) -> str:
    """The tables of all cases, to print."""
    return "\n\n".join(
        f"{name}\n{text_table(list(OPTIMIZER_COLUMNS), rows(group, OPTIMIZER_COLUMNS))}"
        for name, group in by_case(records)
    )


MODEL_COLUMNS: dict[str, Callable[[Record], str]] = {
    "contender": lambda record: record["contender"],
    "ms a step": lambda record: milliseconds(record["seconds"]),
    "over the floor": lambda record: ratio(record["over_floor"]),
    "over fused AdamW": lambda record: ratio(record["over_adamw"]),
}


def model_text(records: Sequence[Record]) -> str:
    """The table of the steps on all matrices of a model, to print."""
    title = f"{records[0]['matrices']} matrices"
    return f"{title}\n{text_table(list(MODEL_COLUMNS), rows(records, MODEL_COLUMNS))}"


def train_text(records: Sequence[Record]) -> str:
    """The table of the train steps, to print."""
    return text_table(list(TRAIN_COLUMNS), rows(records, TRAIN_COLUMNS))


PARTS_HEADER = ("part, forward and backward", "torch, ms", "jax, ms")


def parts_rows(parts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[list[str]]:
    """One row per part of the model: its time in each framework."""
    return [[part, *(milliseconds(of[name]) for name in COLORS)] for part, of in parts.items()]


def parts_text(parts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The table of the model's parts, to print."""
    return text_table(PARTS_HEADER, parts_rows(parts))


def memory_text(records: Sequence[Record]) -> str:
    """The table of bytes, to print."""
    return text_table(list(MEMORY_COLUMNS), rows(records, MEMORY_COLUMNS))


def plot_all(results: Mapping[str, Sequence[Record]], out: Path) -> None:
    """Draws the measurements into one figure: the steps of each case, train steps and memory.

    Args:
        results: Records by mode, any of "optimizer", "train" and "memory".
        out: Path of the figure.
    """
    from matplotlib.figure import Figure

    panels: list[tuple[int, Callable[[Any], None]]] = [
        (len(group), functools.partial(_draw_case, name, group))
        for name, group in by_case(results.get("optimizer", ()))
    ]
    panels += [
        (len(results[mode]), functools.partial(draw, results[mode]))
        for mode, draw in (("train", _draw_train), ("memory", _draw_memory))
        if mode in results
    ]
    width = min(2, len(panels))
    lines = [panels[i : i + width] for i in range(0, len(panels), width)]
    heights = [1.0 + 0.2 * max(count for count, _ in line) for line in lines]
    figure = Figure(figsize=(7 * width, sum(heights)), layout="constrained")
    axes = figure.subplots(len(lines), width, squeeze=False, height_ratios=heights)
    for line, line_axes in zip(lines, axes, strict=True):
        for (_, draw), ax in zip(line, line_axes, strict=False):
            draw(ax)
        for ax in line_axes[len(line) :]:
            ax.set_visible(False)
    with atomic(out) as temporary:
        figure.savefig(temporary, dpi=110)


def _draw_case(name: str, group: Sequence[Record], ax: Any) -> None:
    there = [r for r in group if "missing" not in r]
    _bars(ax, there, [r["over_floor"] for r in there], name, "{:.2f}")
    ax.set_xscale("log")
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xlabel("time of a step, over the seven products alone", fontsize=8)


def _draw_train(records: Sequence[Record], ax: Any) -> None:
    values = [r["tokens_per_second"] for r in records]
    _bars(ax, records, values, "whole train step", "{:,.0f}")
    ax.set_xlabel("tokens per second", fontsize=8)


def _draw_memory(records: Sequence[Record], ax: Any) -> None:
    values = [dict.fromkeys(("median", "low", "high"), r["peak_bytes"] / 1e6) for r in records]
    _bars(ax, records, values, "peak of a train step", "{:,.0f}")
    kept = [(r["weight_bytes"] + r["state_bytes"]) / 1e6 for r in records]
    ax.barh(range(len(records)), kept, color="black", alpha=0.35, height=0.35)
    ax.set_xlabel("MB; dark: weights and optimizer state", fontsize=8)


def _bars(
    ax: Any,
    records: Sequence[Record],
    values: Sequence[Mapping[str, float]],
    title: str,
    form: str,
) -> None:
    medians = [v["median"] for v in values]
    around = [[v["median"] - v["low"] for v in values], [v["high"] - v["median"] for v in values]]
    places = range(len(records))
    colors = [COLORS[r["framework"]] for r in records]
    ax.barh(places, medians, xerr=around, color=colors, height=0.7, error_kw={"linewidth": 0.8})
    ax.set_yticks(places, [r["contender"] for r in records], fontsize=7)
    ax.invert_yaxis()
    ax.set_title(title, fontsize=10)
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    for place, median in zip(places, medians, strict=True):
        ax.annotate(
            form.format(median), (median, place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=6,
        )  # fmt: skip
