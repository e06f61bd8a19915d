"""Measures how fast and how large the optimizers are, on the machine at hand.

    python -m launch.bench optimizer     # one step on the matrices of LLaMA 60M, 350M and 1B

prints a table and writes it as JSON and as a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench import report, timing
from launch.options import UsageError, run_cli
from launch.run_log import write_atomic


def write(args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Writes what was measured, with where and how, to OUT/MODE.json."""
    how = {name: value for name, value in vars(args).items() if name not in ("out", "machine")}
    found = {"mode": args.mode, **timing.machine(args.machine, args.device), "how": how}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.mode}.json"
    write_atomic(path, json.dumps({**found, "records": records}, indent=1) + "\n")


def optimizer(args: argparse.Namespace) -> None:
    """One optimizer step, case by case; what is done is written after each."""
    from launch.bench.optimizer import CASES, CASES_ON_GPU, Settings, run_case

    cases = CASES + (CASES_ON_GPU if args.device == "cuda" else ())
    if args.models:
        known = {case.model for case in cases}
        if unknown := set(args.models) - known:
            raise UsageError(f"--models: {min(unknown)} is unknown; expected {', '.join(known)}")
        cases = tuple(case for case in cases if case.model in args.models)
    settings = Settings(args.rounds, args.turn_seconds, args.svd_seconds)
    records: list[dict[str, Any]] = []
    for case in cases:
        found = run_case(case, settings, args.device, args.dtype)
        print(report.optimizer_text(found), end="\n\n", flush=True)
        records += found
        write(args, records)
    report.plot_optimizer(records, args.out / "optimizer.png")


MODES = {"optimizer": optimizer}


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench", description=__doc__)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="what to run on (cpu)")
    add("--out", type=Path, default=Path("runs/bench"), help="where files go (runs/bench)")
    add("--threads", type=int, help="of either framework (as many as there are cores)")
    add("--machine", help="the machine's name in the files (what it calls itself)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(float32)")
    add("--rounds", type=int, default=15, help="turns of each contender (15)")

    mode = modes.add_parser("optimizer", parents=[shared], help=optimizer.__doc__)
    mode.add_argument("--models", nargs="+", help="which sizes, such as 60M 350M (all)")
    mode.add_argument("--turn_seconds", type=float, default=0.05, help="of a turn (0.05)")
    mode.add_argument(
        "--svd_seconds", type=float, default=10.0, help="no SVD is begun after so many (10)"
    )

    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UsageError(f"--rounds: {args.rounds} is too small; expected 1 or more")
    timing.prepare(args.device, args.threads)
    MODES[args.mode](args)


if __name__ == "__main__":
    sys.exit(run_cli(main))
