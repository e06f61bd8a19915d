"""Writes `docs/benchmark.md` and its figure from the measurements; `_cuda` for a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
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
    write_atomic(docs / f"{name}.md", "\n".join(lines(results)) + "\n")
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


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """The page."""
    name = stem(results)
    on = "" if name == "benchmark" else ", on a GPU"
    yield from (
        f"# How fast a step is, and how large{on}",
        "",
        "The time of one step relative to its lower bound (the floor), to the published "
        "implementation (the *published way* in the tables), and to other optimizers. In every "
        "round each contender runs once in the same process; a ratio divides two times of the "
        "same round. All figures are medians, with quartiles in brackets.",
        "",
        f"![Times and sizes]({name}.png)",
        "",
        *_floor(results),
    )
    if "optimizer" in results:
        yield from _optimizer(results["optimizer"])
    if "train" in results:
        yield from _train(results["train"])
    if "memory" in results:
        yield from _memory(results["memory"])
    yield from (
        "## How to repeat it",
        "",
        "```",
        *(command(mode, found) for mode, found in results.items()),
        "python -m launch.bench docs       # writes this page from runs/bench",
        "```",
        "",
        "`--device cuda` runs the same on a GPU, including the matrices of 7B; `--out` then "
        "names another folder, for `docs` as well. Measure on an otherwise idle machine: ratios "
        "within a round tolerate other programs, but a thread pool waiting for one of its "
        "threads is affected.",
    )


def _floor(results: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "## The floor",
        "",
        "A step of Online Subspace Descent computes three things from a gradient M (p, q), where "
        "p is the projected axis: its projection R = P^T M, the correlation A = M R^T, and "
        "||M||. The gradient of P is then `(2 / ||M||^2) (P (P^T A) + A (P^T P) - 2 A)`: it "
        "needs no autograd, no SVD and no other matrix of M's size. A step therefore consists of "
        "seven matrix products, with P (p, r) and the direction D (r, q) that the optimizer "
        "computes from R. The floor is the time of these seven products alone, in the same "
        "framework, written into preallocated memory:",
        "",
        report.markdown_table(
            ("product", "operations", "numbers read and written, at least"),
            [
                (f"`{name}`", ops, moved)
                for (name, ops, _), moved in zip(PRODUCTS, NUMBERS_MOVED, strict=True)
            ],
        ),
        "",
        "All other operations read or write each number a few times: ||M||, which also tells "
        "whether M is finite (p q), the moments of R (q r numbers each) and those of P (p r "
        "each). They account for the ratios above 1 in the tables below. GaLore's step has two "
        "of the seven products, R and W, and an SVD every update_proj_gap steps. The published "
        "implementation has 3.25 times the floor's operations for a square matrix of rank p / 4: "
        "its time over the floor's, below, is the largest speedup over it that any step could "
        "reach.",
        "",
        "`osd_muon` adds Muon's orthogonalization to the seven products: 5 Newton-Schulz steps "
        "of three products each, 5 (4 s^2 l + 2 s^3) operations for a matrix with sides s and l "
        ">= s. For a square matrix of rank p / 4 this is 15 times the floor, as for Muon itself. "
        "Relative to the forward and backward passes, 6 p q operations per token, it is 5 p / "
        "tokens of an update: 2 % for p = 512 and 131,072 tokens, 31 % for the quickstart's p = "
        "128 and 2,048.",
        "",
    )
    if "optimizer" not in results:
        return
    found_rates = results["optimizer"]["rates"]
    rows = []
    for name, records in report.by_case(results["optimizer"]["records"]):
        ops, numbers = floor_of(records[0]["shape"], records[0]["rank"])
        floors = [r["seconds"]["median"] for r in records if r["contender"].startswith("floor")]
        rates = (f"{ops / seconds / 1e9:,.0f}" for seconds in floors)
        rows.append((name, f"{ops / 1e6:,.0f}", f"{numbers * 4 / 1e6:,.1f}", *rates))
    header = ("matrix", "10^6 operations", "MB in float32", "GFLOP/s, torch", "GFLOP/s, jax")
    yield report.markdown_table(header, rows)
    yield from ("", "Peak rates of the machine:", "")
    yield from (f"- {line}" for line in report.rates_text(found_rates).splitlines())
    whose = "PyTorch's float32 products call MKL, JAX's use XLA's own kernels."
    if stem(results) != "benchmark":
        whose = "both call cuBLAS, XLA also its own kernels, and float32 is TF32 in both."
    yield from ("", "Where the two frameworks' floors differ, their products differ: " + whose, "")


def _optimizer(found: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## One optimizer step", "", about(found), "")
    yield from (*_in_short(found["records"]), "")
    if found["device"] != "cpu":
        yield from (
            "If a step takes the same time for a small matrix as for a large one, it is limited "
            "by the host, which launches about twenty kernels one by one; XLA launches fewer. "
            "Full-rank AdamW reads and writes each number a few times and computes no matrix "
            "products: if the floor is slower than it, no step with these seven products can be "
            "as fast. With bfloat16 weights its moments are bfloat16; the moments in a subspace, "
            "and P, are float32, and the P of the published implementation is bfloat16.",
            "",
        )
    yield (
        "GaLore's step includes its SVD, measured alone and amortized over 200 steps; "
        "optax.contrib.galore projects the longer side, the others the shorter. If P moves every "
        "k steps, the time is the mean over k steps. The published implementation steps P by "
        "autograd through `||P P^T G - G||^2`, for which it forms P P^T."
    )
    for name, records in report.by_case(found["records"]):
        yield from ("", f"### {name}", "", _table(records, report.OPTIMIZER_COLUMNS))
    yield ""


def _in_short(records: Sequence[report.Record]) -> Iterator[str]:
    yield from (
        "Summary for P by online PCA with AdamW; the [comparison](comparison/README.md) shows "
        "how moving P only every 10 steps affects the loss:",
        "",
    )
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
    yield report.markdown_table(titles, body)


def _table(records: Sequence[report.Record], columns: report.Columns) -> str:
    return report.markdown_table(list(columns), report.rows(records, columns))


def _trained(how: Mapping[str, Any]) -> str:
    return f"`{how['model_config']}`, {how['tokens']:,} tokens a step, rank {how['rank']}, "


def _train(found: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "## The whole train step",
        "",
        about(found),
        "",
        _trained(found["how"]) + "with the train steps of `launch.train_torch` and "
        "`launch.train_jax`. GaLore without its SVDs.",
        "",
        _table(found["records"], report.TRAIN_COLUMNS),
        "",
        "Where the two frameworks differ, full-rank AdamW differs too. The next table times the "
        "same parts of the model alone. PyTorch has one kernel for attention, which skips what "
        "the mask hides; XLA computes products and separate passes. For the head JAX computes "
        "four products where PyTorch computes three: it computes the logits of many tokens in "
        "slices, recomputes them in the backward pass, and never stores all of them.",
        "",
        report.markdown_table(report.PARTS_HEADER, report.parts_rows(found["parts"])),
        "",
    )


def _memory(found: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "## Memory",
        "",
        _trained(found["how"])
        + f"{found['how']['dtype']}. The state is counted on the arrays. The peak covers all "
        "memory alive within a train step: in JAX as planned by the compiler; in PyTorch as "
        "handed out by the allocator, on a CPU as recorded by the profiler, in addition to weights "
        "and state.",
        "",
        _table(found["records"], report.MEMORY_COLUMNS),
        "",
    )


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
