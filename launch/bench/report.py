"""Tables and plots of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
COLORS = {"torch": "tab:orange", "jax": "tab:blue"}


def title(record: Record) -> str:
    """What a record's case is, such as `512x1376, rank 128 (60M)`."""
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
    median, low, high = (f"{value[key] * unit:.3g}" for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


OPTIMIZER_COLUMNS: Mapping[str, Callable[[Record], str]] = {
    "contender": lambda r: r["contender"],
    "ms a step": lambda r: milliseconds(r["seconds"]),
    "over its floor": lambda r: ratio(r["over_floor"]),
    "over the better floor": lambda r: ratio(r["over_best_floor"]),
    "published way over it": lambda r: ratio(r["published_over_this"]),
    "over full-rank AdamW": lambda r: ratio(r["over_full_rank"]),
    "of which": lambda r: svd_note(r),
}


TRAIN_COLUMNS: Mapping[str, Callable[[Record], str]] = {
    "contender": lambda r: r["contender"],
    "tokens a second": lambda r: _with_quartiles(r["tokens_per_second"], 1),
    "of AdamW's": lambda r: ratio(r["of_full_rank"]),
    "of plain AdamW's": lambda r: ratio(r["of_plain_full_rank"]),
    "of the other framework's": lambda r: ratio(r["of_other_framework"]),
}
MEMORY_COLUMNS: Mapping[str, Callable[[Record], str]] = {
    "contender": lambda r: r["contender"],
    "weights, MB": lambda r: megabytes(r["weight_bytes"]),
    "optimizer state, MB": lambda r: megabytes(r["state_bytes"]),
    "peak of a step, MB": lambda r: megabytes(r["peak_bytes"]),
}


def megabytes(value: int) -> str:
    """In units of 10^6 bytes."""
    return f"{value / 1e6:,.1f}"


def svd_note(record: Record) -> str:
    """How an amortised step is made up."""
    if "svd" not in record:
        return ""
    return f"step {milliseconds(record['step_alone'])}, SVD {milliseconds(record['svd'])} / 200"


def rows(
    records: Iterable[Record], columns: Mapping[str, Callable[[Record], str]]
) -> list[list[str]]:
    """A table's rows; what is missing says so in its second cell."""
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


def train_text(records: Sequence[Record]) -> str:
    """The table of the train steps, to print."""
    return text_table(list(TRAIN_COLUMNS), rows(records, TRAIN_COLUMNS))


def memory_text(records: Sequence[Record]) -> str:
    """The table of bytes, to print."""
    return text_table(list(MEMORY_COLUMNS), rows(records, MEMORY_COLUMNS))


def plot_optimizer(records: Sequence[Record], out: Path) -> None:
    """Draws each case's steps over the floor of their framework, with quartiles."""
    from matplotlib.figure import Figure

    cases = by_case(records)
    height = max(len(group) for _, group in cases)
    lines = -(-len(cases) // 2)
    figure = Figure(figsize=(13, 0.6 + lines * (0.9 + 0.24 * height)), layout="constrained")
    axes = figure.subplots(lines, 2, squeeze=False).flat
    for ax, (name, group) in zip(axes, cases, strict=False):
        there = [r for r in group if "missing" not in r]
        _bars(ax, there, [r["over_floor"] for r in there], "{:.2f}")
        ax.set_xscale("log")
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("time of a step, over the seven products alone", fontsize=8)
    for ax in list(axes)[len(cases) :]:
        ax.set_visible(False)
    _save(figure, out)


def plot_train(records: Sequence[Record], out: Path) -> None:
    """Draws each contender's tokens a second, with quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.3 * len(records)), layout="constrained")
    ax = figure.subplots()
    _bars(ax, records, [r["tokens_per_second"] for r in records], "{:.0f}")
    ax.set_xlabel("tokens a second")
    _save(figure, out)


def plot_memory(records: Sequence[Record], out: Path) -> None:
    """Draws the peak of each contender's step, and how much of it are weights and state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.3 * len(records)), layout="constrained")
    ax = figure.subplots()
    as_spread = lambda value: dict.fromkeys(("median", "low", "high"), value / 1e6)
    _bars(ax, records, [as_spread(r["peak_bytes"]) for r in records], "{:,.0f}")
    kept = [(r["weight_bytes"] + r["state_bytes"]) / 1e6 for r in records]
    ax.barh(range(len(records)), kept, color="black", alpha=0.35, height=0.35)
    ax.set_xlabel("MB: the peak of a step; dark, weights and optimizer state")
    _save(figure, out)


def _bars(
    ax: Any, records: Sequence[Record], values: Sequence[Mapping[str, float]], form: str
) -> None:
    medians = [v["median"] for v in values]
    around = [[v["median"] - v["low"] for v in values], [v["high"] - v["median"] for v in values]]
    places = range(len(records))
    colors = [COLORS[r["framework"]] for r in records]
    ax.barh(places, medians, xerr=around, color=colors, height=0.7, error_kw={"linewidth": 0.8})
    ax.set_yticks(places, [r["contender"] for r in records], fontsize=7)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    for place, median in zip(places, medians, strict=True):
        ax.annotate(
            form.format(median), (median, place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=6,
        )  # fmt: skip


def _save(figure: Any, out: Path) -> None:
    temporary = out.with_name(f".{out.name}")
    figure.savefig(temporary, dpi=110)
    temporary.replace(out)
