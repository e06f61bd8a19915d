"""Writes `docs/benchmark.md` and its figure from the measurements; `_cuda` for a GPU.

The text of the page is in `page.md` next to this file, in sections of `string.Template`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from launch.bench import report
from launch.trainer.cli import UsageError
from launch.trainer.files import write_atomic

MODES = ("optimizer", "train", "memory")
PRODUCTS = (
    # Product, formula, and (operations, numbers read and written) for M (p, q) and P (p, r).
    ("R = P^T M", "2 p q r", lambda p, q, r: (2 * p * q * r, p * q + p * r + q * r)),
    ("W += P D", "2 p q r", lambda p, q, r: (2 * p * q * r, 2 * p * q + p * r + q * r)),
    ("A = M R^T", "2 p q r", lambda p, q, r: (2 * p * q * r, p * q + q * r + p * r)),
    ("P^T A", "2 p r r", lambda p, q, r: (2 * p * r * r, 2 * p * r + r * r)),
    ("P^T P", "2 p r r", lambda p, q, r: (2 * p * r * r, p * r + r * r)),
    ("P (P^T A)", "2 p r r", lambda p, q, r: (2 * p * r * r, 2 * p * r + r * r)),
    ("+ A (P^T P)", "2 p r r", lambda p, q, r: (2 * p * r * r, 3 * p * r + r * r)),
)
NUMBERS_MOVED = (
    "p q + p r + q r", "2 p q + p r + q r", "p q + q r + p r",
    "2 p r + r r", "p r + r r", "2 p r + r r", "3 p r + r r",
)  # fmt: skip


def floor_of(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """Operations of the seven products, and the least count of numbers that they read and write."""
    p, q = sorted(shape)
    each = [count(p, q, rank) for _, _, count in PRODUCTS]
    return sum(ops for ops, _ in each), sum(numbers for _, numbers in each)


def read(directory: Path) -> dict[str, Any]:
    """The measurements, by mode.

    Raises:
        UsageError: The folder holds no results, or a file is damaged.
    """
    found = {}
    for mode in MODES:
        path = directory / f"{mode}.json"
        if path.is_file():
            try:
                found[mode] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UsageError(f"--out: {path} is damaged: {error}; measure again") from None
    if not found:
        raise UsageError(
            f"--out: {directory} holds no results; run python -m launch.bench optimizer first"
        )
    return found


def write(results: Mapping[str, Any], docs: Path) -> Path:
    """Writes the page, its data and its figure into a folder; returns the page's path."""
    docs.mkdir(parents=True, exist_ok=True)
    name = stem(results)
    write_atomic(docs / f"{name}.json", json.dumps(results, indent=1) + "\n")
    report.plot_all({mode: found["records"] for mode, found in results.items()},
                    docs / f"{name}.png")  # fmt: skip
    write_atomic(docs / f"{name}.md", text(results))
    return docs / f"{name}.md"


def stem(results: Mapping[str, Any]) -> str:
    """The page's name, separate for a GPU.

    Raises:
        UsageError: The results are from several devices.
    """
    devices = sorted({found["how"]["device"] for found in results.values()})
    if len(devices) > 1:
        raise UsageError(f"--out: it holds results of {' and '.join(devices)}; give each its own")
    return "benchmark" if devices == ["cpu"] else f"benchmark_{devices[0]}"


def text(results: Mapping[str, Any]) -> str:
    """The page."""
    return "\n\n".join(_blocks(results)) + "\n"


def _blocks(results: Mapping[str, Any]) -> Iterator[str]:
    """The sections of the measured modes, in order."""
    name = stem(results)
    on_gpu = name != "benchmark"
    yield _section("head", picture=f"{name}.png", on=", on a GPU" * on_gpu, products=_products())
    if optimizer := results.get("optimizer"):
        records = optimizer["records"]
        yield _section(
            "rates",
            floors=_floors(records),
            rates="\n".join(
                f"- {line}" for line in report.rates_text(optimizer["rates"]).split("\n")
            ),
            whose=_section("products, on a GPU" if on_gpu else "products, on a CPU"),
        )
        yield _section("optimizer", about=about(optimizer), in_short=_in_short(records))
        if on_gpu:
            yield _section("optimizer, on a GPU")
        tables = (
            f"### {case}\n\n{_table(of_case, report.OPTIMIZER_COLUMNS)}"
            for case, of_case in report.by_case(records)
        )
        yield _section("optimizer, case by case", tables="\n\n".join(tables))
    if train := results.get("train"):
        yield _section(
            "train",
            about=about(train),
            setting=_trained(train["how"]),
            steps=_table(train["records"], report.TRAIN_COLUMNS),
            parts=report.markdown_table(report.PARTS_HEADER, report.parts_rows(train["parts"])),
        )
    if memory := results.get("memory"):
        yield _section(
            "memory",
            setting=_trained(memory["how"]),
            dtype=memory["how"]["dtype"],
            sizes=_table(memory["records"], report.MEMORY_COLUMNS),
        )
    commands = (command(mode, found) for mode, found in results.items())
    yield _section("repeat", commands="\n".join(commands))


def _section(name: str, **values: str) -> str:
    """A section of `page.md` with its values filled in."""
    template = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\n(.*?)(?=\n<!--|\Z)", template, re.DOTALL)
    assert found, name
    return Template(found[1].strip()).substitute(values)


def _products() -> str:
    rows = [
        (f"`{name}`", operations, moved)
        for (name, operations, _), moved in zip(PRODUCTS, NUMBERS_MOVED, strict=True)
    ]
    header = ("product", "operations", "numbers read and written, at least")
    return report.markdown_table(header, rows)


def _floors(records: Sequence[report.Record]) -> str:
    """Operations, bytes and speed of each case's floor."""
    rows = []
    for name, of_case in report.by_case(records):
        ops, numbers = floor_of(of_case[0]["shape"], of_case[0]["rank"])
        floors = [r["seconds"]["median"] for r in of_case if r["contender"].startswith("floor")]
        rates = (f"{ops / seconds / 1e9:,.0f}" for seconds in floors)
        rows.append((name, f"{ops / 1e6:,.0f}", f"{numbers * 4 / 1e6:,.1f}", *rates))
    header = ("matrix", "10^6 operations", "MB in float32", "GFLOP/s, torch", "GFLOP/s, jax")
    return report.markdown_table(header, rows)


def _in_short(records: Sequence[report.Record]) -> str:
    titles = (
        "matrix", "framework", "step over floor", "published way over step",
        "published way over floor", "step over GaLore's: the cost of moving P at every step",
        "P moved every 10 steps over GaLore's", "step over full-rank AdamW's",
        "floor over full-rank AdamW's",
    )  # fmt: skip
    body = []
    for name, of_case in report.by_case(records):
        for framework in report.COLORS:
            of = {r["contender"]: r for r in of_case if r["framework"] == framework}
            every, tenth, floor = (
                of[f"osd_{framework}, AdamW"],
                of[f"osd_{framework}, P moved every 10"],
                of[f"floor, {framework}"],
            )
            cells = (
                every["over_floor"], every["published_over_this"], floor["published_over_this"],
                every["over_galore"], tenth["over_galore"], every["over_full_rank"],
                floor["over_full_rank"],
            )  # fmt: skip
            body.append([name, framework, *map(report.ratio, cells)])
    return report.markdown_table(titles, body)


def _table(records: Sequence[report.Record], columns: report.Columns) -> str:
    return report.markdown_table(list(columns), report.rows(records, columns))


def _trained(how: Mapping[str, Any]) -> str:
    return f"`{how['model_config']}`, {how['tokens']:,} tokens per step, rank {how['rank']}"


def about(found: Mapping[str, Any]) -> str:
    """Machine, date and versions of a measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    device = "" if found["device"] == "cpu" else f", {found['device']}"
    return (
        f"{found['machine']}: {found['cpu']}{device}, {found['threads']} threads, "
        f"{found['system']}, {found['date']}; {found['how']['rounds']} rounds, "
        f"{found['how']['dtype']}; {versions}. Load average {found['load']}: if it exceeds the "
        f"{found['threads']} threads, other programs ran at the same time and widened the "
        "quartiles."
    )


def command(mode: str, found: Mapping[str, Any]) -> str:
    """The command line of a measurement."""
    given = {k: v for k, v in found["how"].items() if v is not None}
    flags = " ".join(
        f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in given.items()
    )
    return f"python -m launch.bench {mode} {flags}"
