"""Trains runs, and stores their results in a file from which another machine can resume."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.compare.methods import METHODS, Config, Setting, flags_of
from launch.trainer.cli import UsageError
from launch.trainer.files import read_metrics, write_atomic
from launch.trainer.loop import MAX_SKIPPED_IN_A_ROW

RUN_DIR = Path("runs/compare")
CURVE = 30  # points of a stored curve


class Runs:
    """The finished runs, in a file with one JSON object per line.

    Args:
        path: Path of the file; a missing file has no runs.
        threads: Number of CPU threads of each run.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path, self.threads = path, threads
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """All stored runs.

        Raises:
            UsageError: The file is damaged.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        try:
            return [json.loads(line) for line in lines if line]
        except ValueError as error:
            raise UsageError(f"{self.path} is damaged: {error}; restore it with git") from None

    def loss(self, setting: Setting, method: str, config: Config, seed: int) -> float:
        """The final validation loss of a run in nats, trained unless stored; inf if it failed."""
        flags = flags_of(setting, METHODS[method], config, seed)
        found = self._find(flags)
        if found is None:
            own = config.own.replace("--", "").replace(" ", "")
            name = f"{setting.name}-{method}-{config.lr:g}-{config.full_lr:g}-{own}-{seed}"
            new = {
                "setting": setting.name, "method": method, **config._asdict(), "seed": seed,
                **trained(name, flags, self.threads),
                "flags": flags, "machine": machine(),
                "threads": self.threads,
            }  # fmt: skip
            with self._lock, self._alone():
                found = self._find(flags)  # by another process meanwhile
                if found is None:
                    found = new
                    kept = [json.dumps(run) for run in [*self.read(), new]]
                    write_atomic(self.path, "\n".join(kept) + "\n")
            print(f"{setting.name} {method} {config} seed {seed}: {found['loss']}", flush=True)
        return float("inf") if found["loss"] is None else found["loss"]

    def _find(self, flags: str) -> dict[str, Any] | None:
        """The stored run with these flags."""
        return next((run for run in self.read() if run["flags"] == flags), None)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Makes other processes that write the file wait."""
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def trained(name: str, flags: str, threads: int) -> dict[str, Any]:
    """Trains a run in a separate process, in a directory of its own, and returns its results.

    Returns:
        "loss": the final validation loss, in nats; None if it is not finite or the trainer gave up
        because of non-finite gradients. "curve": the training loss, about 30 points over the run.
        "seconds": the training time; None if the trainer gave up.

    Raises:
        UsageError: The trainer failed for another reason.
    """
    RUN_DIR.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(dir=RUN_DIR, prefix=f"{name}-") as directory:
        command = [sys.executable, "-m", "launch.train_torch", *flags.split(), "--name", name]
        command += ["--run_dir", directory]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        run = Path(directory) / name
        records = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    train = [r for r in records if r["kind"] == "train"]
    gave_up = bool(train) and train[-1]["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW
    if done.returncode and not gave_up:
        raise UsageError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    losses = [r["loss"] for r in train]
    final = next((r for r in records if r["kind"] == "final"), {"loss": None, "seconds": None})
    every = max(1, len(losses) // CURVE)
    rounded = [None if x is None else round(x, 3) for x in losses[every - 1 :: every]]
    return {
        "loss": final["loss"],
        "curve": rounded,
        "seconds": final["seconds"] and round(final["seconds"], 1),
    }


def machine() -> str:
    """The processor or GPU that trains."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
