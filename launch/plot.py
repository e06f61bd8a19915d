"""Draws the loss of one or several runs: `python -m launch.plot RUN [RUN ...] [--out FILE]`.

On the left the loss stands over the tokens trained on, on the right over the time. The thin line is
the training loss, the strong one its running mean, the points are the validation loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.trainer.cli import run_cli, user_errors
from launch.trainer.picture import plot


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.plot",
        description="Draw the loss of one or several runs against tokens and against time.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="picture to write: .png, .svg or .pdf (default: RUN/loss.png for one run, loss.png "
        "here for several)",
    )
    arguments = parser.parse_args(argv)
    runs = arguments.runs
    out = arguments.out or (runs[0] / "loss.png" if len(runs) == 1 else Path("loss.png"))
    with user_errors():
        print(plot(runs, out))


if __name__ == "__main__":
    sys.exit(run_cli(main))
