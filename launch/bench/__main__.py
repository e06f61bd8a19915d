"""Measures the time and memory of the optimizers on this machine.

    python -m launch.bench optimizer     # one step on the matrices of LLaMA 60M, 350M and 1B
    python -m launch.bench model         # one step on all matrices of a LLaMA, in PyTorch
    python -m launch.bench train         # the whole train step of LLaMA 60M
    python -m launch.bench memory        # bytes of its state, and the peak of that step

Each prints a table and writes it as JSON and as a figure;

    python -m launch.bench docs

writes docs/benchmark.md from their results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench import page, report, timing
from launch.trainer.cli import UsageError, run_cli
from launch.trainer.files import write_atomic
from launch.trainer.options import count


def write(args: argparse.Namespace, records: list[dict[str, Any]], **more: Any) -> None:
    """Writes the measurements, with machine and settings, to OUT/MODE.json."""
    how = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    for name in ("mode", "out", "machine"):
        del how[name]
    found = {"mode": args.mode, **timing.machine(args.machine, args.device), "how": how, **more}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.mode}.json"
    write_atomic(path, json.dumps({**found, "records": records}, indent=1) + "\n")


def optimizer(args: argparse.Namespace) -> None:
    """One optimizer step, case by case; results are written after each case."""
    from launch.bench.optimizer import CASES, CASES_ON_GPU, Settings, rates, run_case

    cases = CASES + (CASES_ON_GPU if args.device == "cuda" else ())
    if args.models:
        known = list(dict.fromkeys(case.model for case in cases))
        if unknown := set(args.models) - set(known):
            raise UsageError(f"--models: {min(unknown)} is unknown; expected {', '.join(known)}")
        cases = tuple(case for model in args.models for case in cases if case.model == model)
    settings = Settings(args.rounds, args.turn_seconds, args.svd_seconds)
    found_rates = rates(args.device, args.dtype, args.rounds)
    at_best = {
        framework: {what: value._asdict() for what, value in of.items()}
        for framework, of in found_rates.items()
    }
    print(report.rates_text(at_best), end="\n\n", flush=True)
    records: list[dict[str, Any]] = []
    for case in cases:
        found = run_case(case, settings, args.device, args.dtype)
        print(report.optimizer_text(found), end="\n\n", flush=True)
        records += found
        write(args, records, rates=at_best)
    report.plot_all({"optimizer": records}, args.out / "optimizer.png")


def model(args: argparse.Namespace) -> None:
    """One optimizer step on all projected matrices of a model, in PyTorch."""
    from launch.bench.model import run

    check_config(args.model_config)
    records = run(args.model_config, args.rank, args.device, args.dtype, args.rounds)
    print(report.model_text(records))
    write(args, records)


def train(args: argparse.Namespace) -> None:
    """Tokens per second of the whole train step, by method and framework, plain and layerwise."""
    from launch.bench import parts
    from launch.bench.train import run

    records = run(setting(args), args.rounds)
    print(report.train_text(records))
    found = parts.run(setting(args), args.rounds)
    of_parts = {
        part: {framework: value._asdict() for framework, value in of.items()}
        for part, of in found.items()
    }
    print(f"\n{report.parts_text(of_parts)}")
    write(args, records, parts=of_parts)
    report.plot_all({"train": records}, args.out / "train.png")


def memory(args: argparse.Namespace) -> None:
    """Bytes of optimizer state, and the peak memory of a train step."""
    from launch.bench.memory import run

    records = run(setting(args))
    print(report.memory_text(records))
    write(args, records)
    report.plot_all({"memory": records}, args.out / "memory.png")


def setting(args: argparse.Namespace) -> Any:
    """The trained model and batch according to the flags."""
    from launch.bench.train import Setting

    if args.tokens < args.length or args.tokens % args.length:
        raise UsageError(f"--tokens: {args.tokens} is not a number of rows of {args.length}")
    check_config(args.model_config)
    rows = args.tokens // args.length
    return Setting(args.model_config, rows, args.length, args.rank, args.device, args.dtype)


def check_config(path: Path) -> None:
    """Raises UsageError unless the file of a model's config exists."""
    if not path.is_file():
        raise UsageError(f"--model_config: no file {path}; see configs/")


def docs(args: argparse.Namespace) -> None:
    """Writes docs/benchmark.md, .json and .png from the results of the other modes.

    For a GPU, docs/benchmark_cuda.md.
    """
    print(page.write(page.read(args.out), args.docs))


MODES = {"optimizer": optimizer, "model": model, "train": train, "memory": memory, "docs": docs}


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench", description=__doc__)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--out", type=Path, default=Path("runs/bench"), help="output folder (runs/bench)")
    measured = argparse.ArgumentParser(add_help=False, parents=[shared])
    add = measured.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to run on (cpu)")
    add("--threads", type=int, help="of each framework (number of cores)")
    add("--machine", help="name of the machine in the results (its host name)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(float32)")
    timed = argparse.ArgumentParser(add_help=False)
    timed.add_argument("--rounds", type=int, help="rounds per contender (train 7, others 15)")
    sized = argparse.ArgumentParser(add_help=False)
    add = sized.add_argument
    add("--model_config", type=Path, default=Path("configs/llama_60m.json"), help="(60M)")
    add("--rank", type=int, default=128, help="of P (128)")
    trained = argparse.ArgumentParser(add_help=False, parents=[sized])
    add = trained.add_argument
    add("--tokens", type=count, default=4096, help="of a step (4096)")
    add("--length", type=int, default=256, help="tokens per row (256)")

    mode = modes.add_parser("optimizer", parents=[measured, timed], help=optimizer.__doc__)
    mode.set_defaults(rounds=15)
    mode.add_argument("--models", nargs="+", help="model sizes, in order: 7B 60M (all)")
    mode.add_argument("--turn_seconds", type=float, default=0.05, help="of a turn (0.05)")
    mode.add_argument(
        "--svd_seconds",
        type=float,
        default=10.0,
        help="start no further SVD after this many seconds (10)",
    )
    mode = modes.add_parser("model", parents=[measured, timed, sized], help=model.__doc__)
    mode.set_defaults(rounds=15)
    mode = modes.add_parser("train", parents=[measured, timed, trained], help=train.__doc__)
    mode.set_defaults(rounds=7)
    modes.add_parser("memory", parents=[measured, trained], help=memory.__doc__)
    mode = modes.add_parser("docs", parents=[shared], help=docs.__doc__)
    mode.add_argument(
        "--docs", type=Path, default=Path("docs"), help="output folder of the page (docs)"
    )

    args = parser.parse_args(argv)
    lowest = {"rounds": 1, "threads": 1, "rank": 1, "turn_seconds": 0, "svd_seconds": 0}
    for name, low in lowest.items():
        value = vars(args).get(name)
        if value is not None and value < low:
            raise UsageError(f"--{name}: {value} is too small; expected {low} or more")
    if "device" in args:
        timing.prepare(args.device, args.threads)
    MODES[args.mode](args)


if __name__ == "__main__":
    sys.exit(run_cli(main))
