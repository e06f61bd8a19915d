"""Compares training methods on the built-in corpus, each with its own best learning rate.

    python -m launch.compare

trains online PCA, GaLore and full-rank AdamW on the quickstart's shape. A method's learning rate is
swept over a grid until the best of one seed lies between two worse ones or at the grid's end, and
that one is trained with two seeds more. Finished runs are kept in `runs/compare`, so an interrupted
comparison goes on where it was. The result is written to `docs/comparison.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launch.options import Options, UsageError, count, run_cli
from launch.run_log import read_metrics, write_atomic

RUN_DIR = Path("runs/compare")
SEEDS = (0, 1, 2)
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SHARED = (
    "--model_config configs/llama_quickstart.json --dataset builtin --batch_size 8 "
    "--warmup_steps 40 --eval_every 100000 --eval_tokens 100K --log_every 10 --sample_tokens 0"
)
PROJECTED = "--optimizer galore_adamw --rank 32 --update_proj_gap 200 --galore_scale 0.25"
METHODS: Mapping[str, tuple[str, str, float]] = {
    # name: what it is, its flags, where its sweep starts
    "osd": ("Online Subspace Descent", f"{PROJECTED} --proj_type continuous", 1e-2),
    "galore": ("GaLore (SVD every 200 updates)", f"{PROJECTED} --proj_type std", 1e-2),
    "adamw": ("Full-rank AdamW", "--optimizer adamw", 3e-3),
}


def train_once(method: str, lr: float, seed: int, tokens: int) -> float:
    """Trains a run of the comparison unless it is done; see `train`."""
    command = f"{SHARED} {METHODS[method][1]} --lr {lr} --seed {seed}"
    return train(f"{method}-lr{lr:g}-seed{seed}", command, tokens, RUN_DIR)


def train(name: str, command: str, tokens: int, run_dir: Path) -> float:
    """Trains a run unless it is done, and returns its final validation loss in nats.

    Args:
        name: Of the run.
        command: Its flags, but for its name and those of the next two.
        tokens: Of the run.
        run_dir: Where it is kept.

    Raises:
        UsageError: a run of this name was trained with other flags.
    """
    flags = [*command.split(), "--name", name, "--resume"]
    flags += ["--max_train_tokens", str(tokens), "--run_dir", str(run_dir)]
    flags += ["--single_gpu"]  # a batch of 8 has few parts, and times are to compare
    wanted = Options.parse(flags).check()
    path = wanted.path / "options.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != wanted.record():
        raise UsageError(f"{path.parent} was trained with other flags; delete it, or move it away")
    if not (wanted.path / "model" / "config.json").is_file():
        print(f"training {name}", flush=True)
        subprocess.run([sys.executable, "-m", "launch.train_jax", *flags], check=True)
    return next(r["loss"] for r in read_metrics(wanted.path) if r["kind"] == "final")


def sweep(method: str, tokens: int) -> dict[float, float]:
    """Losses by learning rate, of the first seed; the best has a worse one on either side.

    Unless it is the grid's first or last.
    """
    start = LEARNING_RATES.index(METHODS[method][2])
    losses = {i: train_once(method, LEARNING_RATES[i], SEEDS[0], tokens) for i in _around(start)}
    while missing := [i for i in _around(min(losses, key=losses.__getitem__)) if i not in losses]:
        losses |= {i: train_once(method, LEARNING_RATES[i], SEEDS[0], tokens) for i in missing}
    return {LEARNING_RATES[i]: losses[i] for i in sorted(losses)}


def _around(index: int) -> Iterator[int]:
    return (i for i in (index - 1, index, index + 1) if 0 <= i < len(LEARNING_RATES))


def report(results: Mapping[str, dict], tokens: int) -> str:
    """The comparison as a Markdown page."""
    lines = [
        "# How the methods compare",
        "",
        f"`python -m launch.compare --tokens {tokens}` on the built-in corpus, the quickstart's "
        f"shape (`configs/llama_quickstart.json`), {tokens:,} tokens a run, {len(SEEDS)} seeds, "
        f"float32 on a CPU ({platform.machine()}). Loss is the mean over held-out tokens, in nats.",
        "",
        "| method | learning rate | validation loss, mean ± standard deviation | of each seed |",
        "|---|---|---|---|",
    ]
    for name, result in results.items():
        losses = result["losses"]
        lines.append(
            f"| {METHODS[name][0]} | {result['learning_rate']:g} | "
            f"{mean_and_deviation(losses)} | "
            f"{', '.join(f'{loss:.3f}' for loss in losses)} |"
        )
    lines += [
        "",
        "Each method's learning rate is the best of its own sweep with one seed:",
        "",
        "| method | validation loss by learning rate |",
        "|---|---|",
    ]
    for name, result in results.items():
        found = ", ".join(f"{lr}: {loss:.3f}" for lr, loss in result["sweep"].items())
        lines.append(f"| {METHODS[name][0]} | {found} |")
    lines += [
        "",
        "This is a small model on little text: it shows that each method trains and where they "
        "stand in the first minutes, not how they rank at scale. One learning rate serves all "
        "parameters of full-rank AdamW; the other two take projected matrices at "
        "`--galore_scale` times the rate of embeddings and head, which may be part of what sets "
        "them apart. Times in the picture compare only where nothing else ran on the machine.",
        "",
        "![Loss of the first seed of each](comparison.png)",
        "",
        *flags_of_runs(SHARED, {name: flags for name, (_, flags, _) in METHODS.items()}),
    ]
    return "\n".join(lines) + "\n"


def flags_of_runs(shared: str, by_name: Mapping[str, str]) -> list[str]:
    """The end of a page: what all runs were given, and each method's."""
    own = (f"{name}: {flags}" for name, flags in by_name.items())
    return ["Flags of every run:", "", "```", shared, *own, "```"]


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """Such as 4.191 ± 0.018; with `sign` "+", the mean's sign always."""
    return f"{statistics.mean(values):{sign}.3f} ± {statistics.stdev(values):.3f}"


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    from launch.plot import plot

    parser = argparse.ArgumentParser(prog="python -m launch.compare", description=__doc__)
    parser.add_argument("--tokens", type=count, default=800_000, help="of every run")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the pages go")
    args = parser.parse_args(argv)

    results = {}
    for method in METHODS:
        losses = sweep(method, args.tokens)
        best = min(losses, key=losses.__getitem__)
        results[method] = {
            "learning_rate": best,
            "losses": [train_once(method, best, seed, args.tokens) for seed in SEEDS],
            "sweep": {f"{lr:g}": loss for lr, loss in losses.items()},
        }
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "comparison.json", json.dumps(results, indent=2) + "\n")
    write_atomic(args.out / "comparison.md", report(results, args.tokens))
    first = [RUN_DIR / f"{m}-lr{r['learning_rate']:g}-seed0" for m, r in results.items()]
    plot(first, args.out / "comparison.png")
    print((args.out / "comparison.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
