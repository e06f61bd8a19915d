"""Writes `docs/tpu.md`: memory and communication of the published runs on TPU slices.

    python -m launch.compile_tpu.table

compiles the train step of `launch/recipes/tpu.sh` for every size and slice with launch.compile_tpu.
A 7B step takes minutes. The results are stored in `docs/tpu.json` with the flags that they were
compiled with, so an interrupted table resumes and a changed recipe is compiled again; delete the
file after a change of the step itself. `--only "v5e:4x4 1b"` compiles the named rows again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.compile_tpu.step import GIB, IN_BRANCH, Report, find_topology
from launch.trainer.cli import run_cli
from launch.trainer.files import write_atomic

RECIPE = "launch/recipes/tpu.sh"
SIZES = ("60m", "130m", "350m", "1b", "7b")
# How bytes sent are counted (launch.compile_tpu.hlo). 2: with the loops of collective matmuls. 3:
# with every reduce-scatter of several that share a channel.
COUNTING = 3
SLICES = (
    "v5e:1x1", "v5e:4x4", "v5e:16x16",
    "v6e:1x1", "v6e:4x4", "v6e:16x16",
    "v5p:2x2x1", "v5p:4x4x4", "v5p:4x8x8",
)  # fmt: skip

# 7B on one chip: one forward pass per update, as in the published figure of 22.8 GiB on a GPU.
ALONE = "--total_batch_size 16 --grad_clipping 0 --basis_dtype bfloat16"
# The least state, and no layer's input on the chip. --galore_scale 1 undoes the recipe's.
SMALL = (
    "--optimizer osd_muon --proj_type continuous_sgd --galore_scale 1 "
    "--second_moment row --first_moment 8bit --ns_dtype bfloat16 --offload_inputs"
)
# 1B with 8192 positions, one row on each chip of four hosts with four chips.
LONG = "--model_config configs/llama_1b_8k.json --batch_size 4 --total_batch_size 16 --max_length"
LENGTHS = (2048, 4096, 8192)
# Weights are gathered once per update, where the memory holds them whole.
OVER_DATA = "--mesh data=-1 --shard_over_data"


class Row(NamedTuple):
    """One row of the table: a published size, a slice, its label, and additional flags."""

    size: str
    topology: str
    name: str
    flags: str = ""

    @property
    def key(self) -> str:
        """Its key in `docs/tpu.json`."""
        return f"{self.topology} {self.size} {self.name}".strip()


def rows() -> Iterator[Row]:
    """Yields all rows in the order of compilation, small ones first."""
    for size in SIZES:
        for topology in SLICES:
            if size != "7b" or not topology.endswith(":1x1"):
                yield Row(size, topology, "")
    for size in ("1b", "7b"):
        yield Row(size, "v5p:2x2x1", "sharded over data", OVER_DATA)
    for length in LENGTHS:
        yield Row("1b", "v6e:4x4", f"rows of {length}", f"{LONG} {length}")
    yield Row("7b", "v5e:4x4", "layer by layer", "--per_layer --grad_clipping 0")
    yield Row("7b", "v6e:1x1", "layer by layer", f"{ALONE} --per_layer")
    sgd = f"{ALONE} --per_layer --proj_type continuous_sgd"
    yield Row("7b", "v6e:1x1", "layer by layer, continuous_sgd", sgd)
    for rank in (256, 1024):
        small = f"{ALONE} --per_layer {SMALL} --rank {rank}"
        yield Row("7b", "v6e:1x1", f"layer by layer, osd_muon of rank {rank}", small)
    yield Row("7b", "v6e:1x1", "plain step", ALONE)


def recipe_flags(row: Row) -> list[str]:
    """The flags that the recipe passes to launch.train_jax on this slice."""
    devices = find_topology(row.topology)
    hosts = len({device.process_index for device in devices})
    given = {name: value for name, value in os.environ.items() if name != "RUNS"}
    slice_of = {"DRY_RUN": "1", "HOSTS": str(hosts), "CHIPS": str(len(devices) // hosts)}
    printed = subprocess.run(
        ["bash", RECIPE, row.size, *row.flags.split()],
        env=given | slice_of, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    words = shlex.split(printed)
    return words[words.index("launch.train_jax") + 1 :]


def compiled(row: Row) -> Report:
    """Compiles one step in a separate process.

    Raises:
        subprocess.CalledProcessError: The compilation fails; stderr has the reason.
    """
    command = [sys.executable, "-m", "launch.compile_tpu", "--json", "--topology", row.topology]
    done = subprocess.run([*command, *recipe_flags(row)], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        done.check_returncode()
        raise subprocess.CalledProcessError(done.returncode, command)
    return Report(**json.loads(done.stdout))


def page(kept: dict[str, dict[str, Any]]) -> str:
    """The table as a Markdown page, from the contents of `tpu.json`."""
    lines = [
        "# A training step on a TPU slice",
        "",
        "The train step of each published run (`bash launch/recipes/tpu.sh SIZE`), compiled for "
        "a named slice by the TPU compiler, without a TPU. All figures are per chip. *peak* is "
        "the compiler's figure for the largest number of bytes alive at a time, including "
        "weights and optimizer state; *of* is the memory available to a program. *products* are "
        "the operations of the step's matrix products. *sent* is what the chip sends to the "
        "others outside conditionals, in every step. *in branches* is what it sends within them: "
        "the optimizer, which runs unless the gradient is not finite, and what sets, moves or "
        "measures P, in some steps. None of these programs was run on a TPU.",
        "",
        "| model | slice | chips | mesh | weights, state and batch | peak | of | products | sent "
        "| in branches |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows():
        if row.key not in kept:
            continue
        report = Report(**kept[row.key]["report"])
        is_counted = _is_counted(kept[row.key])
        megabytes = lambda found: f"{sum(x['bytes_sent'] for x in found) / 1e6:,.0f} MB"
        kinds = report.collectives.items()
        always = megabytes(x for name, x in kinds if not name.endswith(IN_BRANCH))
        at_times = megabytes(x for name, x in kinds if name.endswith(IN_BRANCH))
        name = row.size.upper() + f", {row.name}" * bool(row.name)
        peak = _size(report.peak) if report.fits else f"**does not fit** ({_size(report.peak)})"
        lines.append(
            f"| {name} | {row.topology} | {report.chips} | {report.mesh} "
            f"| {_size(report.arguments)} | {peak} | {_size(report.memory)} "
            f"| {report.product_flops / 1e12:,.1f} TFLOP "
            + (f"| {always} | {at_times} |" if report.fits and is_counted else "| | |")
        )
    is_stale = any(row.key in kept and not _is_counted(kept[row.key]) for row in rows())
    stale = (
        " A row that fits but lacks the bytes sent was compiled before all of them were counted; "
        "`python -m launch.compile_tpu.table` compiles it again."
    ) * is_stale
    has_long = any(row.key in kept for row in rows() if LONG in row.flags)
    long_rows = (
        "The rows of 1B with longer rows have one row per chip and update: "
        f"`tpu.sh 1b {LONG} LENGTH`. "
    )
    lines += [
        "",
        "Weights and state are split over all chips of a slice: a chip holds its share of the "
        "arrays, and at most 5 % more for the padding of 8 x 128 tiles. On 256 chips, it has "
        "12 rows of a square weight of 130M, which tiles pad to 16, and sends them padded.",
        "",
        "The rows of 7B on one chip have one forward pass of 16 rows of 256 tokens per update, "
        f"no clipping, and P in bfloat16: `tpu.sh 7b {ALONE}`, with `--per_layer` for "
        "layer-by-layer updates; osd_muon has momentum and embeddings in 8 bits, and the layers' "
        f"inputs in the host's memory (`{SMALL} --rank RANK`). "
        f"{long_rows * has_long}The rows sharded over data gather the weights once per update, not "
        f"once per pass (`{OVER_DATA}`), and need the memory for them. All other rows are the "
        "published runs, with 512 rows of 256 tokens per update; with layer-by-layer updates on "
        "several chips, without clipping." + stale,
        "",
        "There is no such table for GPUs: to compile for them, XLA needs the CUDA plugin and "
        "libraries, several GB that this project does not install, and a description of the GPU. "
        "The sharding of a mesh is the same on GPUs, and so are weights and state per device; XLA "
        "chooses collectives by the links between GPUs.",
        "",
        "To reproduce the table, or to compile a step of your own, install `pip install -e "
        "'.[jax,train,tpu]'` and run:",
        "",
        "    python -m launch.compile_tpu.table",
        "    python -m launch.compile_tpu --topology v6e:4x4 --model_config configs/llama_1b.json "
        "--batch_size 16 ...",
    ]
    return "\n".join(lines) + "\n"


def _size(size: float | None) -> str:
    """Bytes for people: 1.50 GiB, or 1.8 MiB; empty if unknown."""
    if size is None:
        return ""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _is_counted(row: dict[str, Any]) -> bool:
    """Whether a kept row has all bytes that are sent; one chip sends none."""
    return row.get("counting") == COUNTING or row["report"]["chips"] == 1


def make_table(wanted: Iterable[Row], out: Path, again: Sequence[str] = ()) -> str:
    """Compiles the rows that `out` lacks or has with other flags; writes the page.

    Args:
        wanted: The rows to compile, unless they are there.
        out: Folder of `tpu.json` and `tpu.md`.
        again: Keys of rows to compile in any case.

    Returns:
        The page.
    """
    path = out / "tpu.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = {key: row for key, row in kept.items() if "report" in row}  # not an older version's
    for row in wanted:
        flags = shlex.join(recipe_flags(row))
        is_there = row.key in kept and kept[row.key]["flags"] == flags
        if row.key in again or not is_there or not _is_counted(kept[row.key]):
            print(f"compiling {row.key}", flush=True)
            report = vars(compiled(row))
            kept[row.key] = {"flags": flags, "counting": COUNTING, "report": report}
            write_atomic(path, json.dumps(kept, indent=2) + "\n")
    text = page(kept)
    write_atomic(out / "tpu.md", text)
    return text


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.compile_tpu.table", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="output folder of the page")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="as 'v5e:4x4 1b'")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    known = {row.key: row for row in rows()}
    if unknown := [key for key in args.only if key not in known]:
        parser.error(f"--only: {unknown[0]!r} is no row; expected one of {', '.join(known)}")
    wanted = [known[key] for key in args.only] or known.values()
    print(make_table(wanted, args.out, again=args.only))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
