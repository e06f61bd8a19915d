"""`docs/benchmark.md` and its picture, made from what was measured; `_cuda` of a GPU."""

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
    # what it is, operations and numbers read and written, of M (p, q) and P (p, r)
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
    """Operations of the seven products, and the numbers that they read and write at least."""
    p, q = sorted(shape)
    each = [count(p, q, rank) for _, _, count in PRODUCTS]
    return sum(ops for ops, _ in each), sum(numbers for _, numbers in each)


def read(directory: Path) -> dict[str, Any]:
    """What was measured, by mode.

    Raises:
        UsageError: there is nothing, or a file is damaged.
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
    """Writes the page, its numbers and its picture into a folder; returns the page's path."""
    docs.mkdir(parents=True, exist_ok=True)
    name = stem(results)
    write_atomic(docs / f"{name}.json", json.dumps(results, indent=1) + "\n")
    report.plot_all({mode: found["records"] for mode, found in results.items()},
                    docs / f"{name}.png")  # fmt: skip
    write_atomic(docs / f"{name}.md", "\n".join(lines(results)) + "\n")
    return docs / f"{name}.md"


def stem(results: Mapping[str, Any]) -> str:
    """The page's name: a GPU has one of its own.

    Raises:
        UsageError: the results are of several devices.
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
        "What one step costs beside its floor, beside the published way of taking it, and beside "
        "other optimizers. In every round each contender has its turn in the same process; ratios "
        "are of two times of one round. All figures are medians, with quartiles in brackets.",
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
        "`--device cuda` runs the same on a GPU, with the matrices of 7B too; `--out` then names "
        "another folder, for `docs` as well. Measure on a machine that does nothing else: ratios "
        "within a round bear other programs, a pool of threads that waits for one of its own does "
        "less well.",
    )


def _floor(results: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "## The floor",
        "",
        "A step of Online Subspace Descent needs of a gradient M (p, q), p the projected axis, its "
        "projection R = P^T M, the correlation A = M R^T and ||M||. With them the gradient of P is "
        "`(2 / ||M||^2) (P (P^T A) + A (P^T P) - 2 A)`: no autograd, no SVD, no other matrix of "
        "M's size. So a step is seven matrix products, with P (p, r) and the direction D (r, q) "
        "that the optimizer makes of R. The floor is the time of those seven alone, into memory "
        "that is there already, in the same framework:",
        "",
        report.markdown_table(
            ("product", "operations", "numbers read and written, at least"),
            [
                (f"`{name}`", ops, moved)
                for (name, ops, _), moved in zip(PRODUCTS, NUMBERS_MOVED, strict=True)
            ],
        ),
        "",
        "All else reads or writes each number a few times: ||M||, which is also whether M is "
        "finite (p q), the moments of R (q r numbers each) and those of P (p r each). That is what "
        "a step may cost above 1 in the tables below. GaLore's step has two of the seven products, "
        "R and W, and an SVD now and then. The published way has 3.25 times the floor's operations "
        "for a square matrix of rank p / 4: its time over the floor's, below, is the most by which "
        "any step could be faster than it.",
        "",
        "`osd_muon` has the seven products and Muon's orthogonalization on top: 5 Newton-Schulz "
        "steps of three products each, 5 (4 s^2 l + 2 s^3) operations for a matrix with sides s "
        "and l >= s. For a square matrix of rank p / 4 that is 15 times the floor, as it is for "
        "Muon itself. Beside the forward and backward passes, 6 p q operations a token, it is 5 p "
        "/ tokens of an update: 2 % for p = 512 and 131,072 tokens, 31 % for the quickstart's "
        "p = 128 and 2,048.",
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
    yield from ("", "What the machine does at best:", "")
    yield from (f"- {line}" for line in report.rates_text(found_rates).splitlines())
    whose = "PyTorch's float32 products are MKL's, JAX's are XLA's own."
    if stem(results) != "benchmark":
        whose = "both have cuBLAS's, and XLA's own beside, and float32 is TF32 in both."
    yield from ("", "Where the two frameworks' floors differ, their products do: " + whose, "")


def _optimizer(found: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## One optimizer step", "", about(found), "")
    yield from (*_in_short(found["records"]), "")
    if found["device"] != "cpu":
        yield from (
            "Where a step takes as long for a small matrix as for a large one, it is the host that "
            "takes it, launching some twenty kernels one by one; XLA launches fewer. Full-rank "
            "AdamW reads and writes each number a few times and multiplies no matrices: where the "
            "floor is above it, no step with these seven products reaches it. Its moments are "
            "bfloat16 with bfloat16 weights; those of a subspace, and P, are float32, and the "
            "published way's P is bfloat16.",
            "",
        )
    yield (
        "GaLore's step has its SVD, measured alone, spread over 200 steps; optax.contrib.galore "
        "projects the longer side, the others the shorter. Where P moves every k-th step, a time "
        "is the mean over k steps. The published way steps P by autograd through "
        "`||P P^T G - G||^2`, for which it forms P P^T."
    )
    for name, records in report.by_case(found["records"]):
        yield from ("", f"### {name}", "", _table(records, report.OPTIMIZER_COLUMNS))
    yield ""


def _in_short(records: Sequence[report.Record]) -> Iterator[str]:
    yield from (
        "In short, P by online PCA with AdamW; what P moved every 10th step does to the loss is in "
        "the [comparison](comparison/README.md):",
        "",
    )
    titles = (
        "matrix", "framework", "step over floor", "published way over step",
        "published way over floor", "step over GaLore's: what P moved at every step costs",
        "P moved every 10th over GaLore's", "step over full-rank AdamW's",
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
        _trained(found["how"]) + "by the train steps of `launch.train_torch` and "
        "`launch.train_jax`. GaLore without its SVDs.",
        "",
        _table(found["records"], report.TRAIN_COLUMNS),
        "",
        "Where the two frameworks differ, full-rank AdamW does too: the same parts of the model "
        "alone. PyTorch has one kernel for attention, without what the mask hides; XLA's is "
        "products, and passes of their own. For the head JAX takes four products where PyTorch "
        "takes three: many logits are made in slices, and again in the backward pass, and are "
        "never whole.",
        "",
        report.markdown_table(report.PARTS_HEADER, report.parts_rows(found["parts"])),
        "",
    )


def _memory(found: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "## Memory",
        "",
        _trained(found["how"])
        + f"{found['how']['dtype']}. State is counted on the arrays. The peak is of all that is "
        "alive within a train step: as the compiler plans it in JAX; in PyTorch what the "
        "allocator hands out, "
        "on a CPU by the profiler's events, on top of weights and state.",
        "",
        _table(found["records"], report.MEMORY_COLUMNS),
        "",
    )


def about(found: Mapping[str, Any]) -> str:
    """The machine, the date and the versions of a measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    device = "" if found["device"] == "cpu" else f", {found['device']}"
    return (
        f"{found['machine']}: {found['cpu']}{device}, {found['threads']} threads, "
        f"{found['system']}, {found['date']}; {found['how']['rounds']} rounds, "
        f"{found['how']['dtype']}; {versions}. Load average {found['load']}: where it is more than "
        f"the {found['threads']} threads, other programs ran beside, and widened the quartiles."
    )


def command(mode: str, found: Mapping[str, Any]) -> str:
    """The command line that measured."""
    given = {k: v for k, v in found["how"].items() if v is not None}
    flags = " ".join(
        f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in given.items()
    )
    return f"python -m launch.bench {mode} {flags}"
