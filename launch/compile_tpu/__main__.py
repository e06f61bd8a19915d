"""The command line of `launch.compile_tpu`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from launch.compile_tpu.step import compile_step
from launch.trainer.cli import run_cli


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.compile_tpu",
        description="Compile launch.train_jax's step for a TPU slice, on a machine without one.",
        epilog="All other flags are those of launch.train_jax; see its --help.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SIZES",
        help="the slice: v5e:1x1, v6e:16x16, v5p:4x4x4, ...",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    own, rest = parser.parse_known_args(argv)
    report = compile_step(own.topology, rest)
    print(json.dumps(dataclasses.asdict(report), indent=2) if own.json else report.text())
    return 0 if report.fits else 1


if __name__ == "__main__":
    sys.exit(run_cli(main))
