"""Compares methods of training, each tuned with the same number of trials.

    python -m launch.compare

trains the quickstart's model with every method of `launch.compare.methods` on 1.2M tokens: rates
are searched with one seed, the two best with a second one, and the best with five seeds more, the
same for every method. Finished runs are kept in OUT/runs.jsonl, so that an interrupted comparison
goes on where it was, on another machine too. The page, its figures and its pictures are written to
OUT after each method.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.compare import report
from launch.compare.methods import BAR, FULL_RATES, METHODS, MODELS, Config, Setting
from launch.compare.runs import Runs
from launch.compare.tune import TRIALS, tuned
from launch.trainer.cli import UsageError, run_cli
from launch.trainer.options import count

SEEDS = 5


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="quickstart", help="what is trained")
    parser.add_argument("--tokens", type=count, default=1_200_000, help="of every run")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default: all)"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="that confirm a method")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of a method's search")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of a thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that trains")
    parser.add_argument("--out", type=Path, default=Path("docs/comparison"), help="of the page")
    parser.add_argument("--report", action="store_true", help="train nothing, write the page")
    args = parser.parse_args(argv)
    check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(args.out / "runs.jsonl", threads=1 if args.jobs > 1 else os.cpu_count() or 1)
    if not args.report:
        dtype = "bfloat16" if args.device == "cuda" else "float32"
        setting = Setting(args.model, args.tokens, dtype)
        compare(runs, setting, args)
    report.write(runs.read(), args.out)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for arguments that cannot be."""
    args.methods = [name.strip() for name in args.methods.split(",")]
    for name in args.methods:
        if name not in METHODS:
            raise UsageError(f"--methods: {name!r} is unknown; expected of {', '.join(METHODS)}")
    for name, least in (("seeds", 2), ("trials", 1), ("jobs", 1)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name}: {getattr(args, name)}; expected {least} or more")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device: cuda, and PyTorch finds no GPU; use cpu")
        args.jobs = 1
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def compare(runs: Runs, setting: Setting, args: argparse.Namespace) -> None:
    """Tunes and confirms methods, several at a time."""
    full_lr = best_full_rate(runs, setting, args.jobs)

    def one(name: str) -> None:
        method = METHODS[name]
        loss = lambda config, seed: runs.loss(setting, name, config, seed)
        start = report.best_config(runs.read(), setting, name)
        start = start or Config(method.lr, full_lr, method.own[0])
        start = start._replace(full_lr=full_lr)
        best = tuned(loss, method, start, args.trials)
        for seed in range(1, args.seeds + 1):
            loss(best, seed)

    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(one, args.methods):
            report.write(runs.read(), args.out)


def best_full_rate(runs: Runs, setting: Setting, jobs: int) -> float:
    """The rate of what is not projected that is best for the bar; shared by all methods."""
    bar = METHODS[BAR]
    known = report.best_config(runs.read(), setting, BAR)
    if known:  # of fewer tokens
        return known.full_lr
    loss = lambda rate: runs.loss(setting, BAR, Config(bar.lr, rate, bar.own[0]), 0)
    with ThreadPoolExecutor(jobs) as pool:
        losses = dict(zip(FULL_RATES, pool.map(loss, FULL_RATES), strict=True))
    while True:  # a best one at the edge widens the grid
        best = min(losses, key=losses.__getitem__)
        wider = {min(losses): best / 3, max(losses): best * 3}.get(best)
        if wider is None:
            return best
        losses[wider] = loss(wider)


if __name__ == "__main__":
    sys.exit(run_cli(main))
