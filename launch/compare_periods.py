"""Compares how often P moves: at every k-th update, on the built-in corpus, over three seeds.

    python -m launch.compare_periods

trains online PCA with P moved at every update, every 2nd, 5th and 10th, and GaLore, on the
quickstart's model with short rows, so that there are many updates. Finished runs are kept in
`runs/compare_periods`, so an interrupted comparison goes on where it was. The result is written to
`docs/every_kth_step.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.compare import PROJECTED, SEEDS, flags_of_runs, mean_and_deviation, train
from launch.options import count, run_cli
from launch.run_log import write_atomic

RUN_DIR = Path("runs/compare_periods")
PERIODS = (1, 2, 5, 10)
ROW, ROWS = 64, 8
SHARED = (
    f"--model_config configs/llama_quickstart.json --dataset builtin --max_length {ROW} "
    f"--batch_size {ROWS} --warmup_steps 40 --eval_every 100000 --eval_tokens 100K --log_every 50 "
    f"--sample_tokens 0 {PROJECTED}"
)
ONLINE = "--proj_type continuous --lr 0.01 --update_proj_every"
METHODS: Mapping[str, tuple[str, str]] = {  # by the names of runs: what it is, and its flags
    **{f"every{k}": (f"online PCA, k = {k}", f"{ONLINE} {k}") for k in PERIODS},
    "galore-lr0.01": ("GaLore, an SVD every 200", "--proj_type std --lr 0.01"),
}


def report(results: Mapping[str, Sequence[float]], tokens: int) -> str:
    """The comparison as a Markdown page."""
    updates, base = tokens // (ROW * ROWS), results["every1"]
    lines = [
        "# P moved every k-th step: what it does to the loss",
        "",
        f"`python -m launch.compare_periods --tokens {tokens}` on the built-in corpus, the "
        f"quickstart's model (`configs/llama_quickstart.json`), {updates} updates of {ROWS} rows "
        f"of {ROW} tokens, {len(base)} seeds, in JAX, float32 on a CPU ({platform.machine()}). "
        "Loss is the mean over held-out tokens, in nats. The difference to k = 1, P moved at every "
        "update, is taken seed by seed: a seed fixes the weights' start and the order of the data.",
        "",
        "| method | validation loss, mean ± standard deviation | of each seed | "
        "minus that of k = 1, mean ± standard deviation |",
        "|---|---|---|---|",
    ]
    for name, losses in results.items():
        off = [loss - other for loss, other in zip(losses, base, strict=True)]
        lines.append(
            f"| {METHODS[name][0]} | {mean_and_deviation(losses)} | "
            f"{', '.join(f'{loss:.3f}' for loss in losses)} | "
            f"{'' if name == 'every1' else mean_and_deviation(off, '+')} |"
        )
    lines += [
        "",
        "Online PCA has the learning rate that was its best in [the comparison of "
        "methods](comparison.md), and GaLore the same, at which the two were equal there. P's step "
        "has one size whatever k, so that P travels less the larger k is. A small model, few "
        "updates and few seeds: what is smaller than its deviation says nothing, and nothing "
        "here is of large models or long runs.",
        "",
        *flags_of_runs(SHARED, {name: flags for name, (_, flags) in METHODS.items()}),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.compare_periods", description=__doc__)
    parser.add_argument("--tokens", type=count, default=204_800, help="of every run")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the page goes")
    args = parser.parse_args(argv)

    results: dict[str, list[float]] = {name: [] for name in METHODS}
    for seed in SEEDS:  # all methods of a seed first, so that what is there compares
        for name, (_, flags) in METHODS.items():
            command = f"{SHARED} {flags} --seed {seed}"
            results[name].append(train(f"{name}-seed{seed}", command, args.tokens, RUN_DIR))
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "every_kth_step.json", json.dumps(results, indent=2) + "\n")
    write_atomic(args.out / "every_kth_step.md", report(results, args.tokens))
    print((args.out / "every_kth_step.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
