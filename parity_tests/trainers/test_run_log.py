"""The log of a run: complete, exact, and the same whether or not the run was interrupted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.plot import main as plot_main
from launch.plot import plot
from launch.trainer.cli import UsageError
from launch.trainer.files import read_metrics, write_atomic
from launch.trainer.options import Options
from launch.trainer.run_log import TIMING, RunLog
from parity_tests.support import ROOT

STEPS = 20


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def options(name: str = "a") -> Options:
    return Options.of(
        model_config=str(ROOT / "configs/llama_9m.json"), dataset="builtin", batch_size=2,
        num_training_steps=STEPS, warmup_steps=0, name=name, resume=True,
    ).check()  # fmt: skip


def losses() -> np.ndarray:
    values = (8 * np.exp(-np.arange(STEPS + 1) / 9)).astype(np.float32)
    values[7] = np.nan
    return values


def train(log: RunLog, start: int, stop: int, per_update: int) -> None:
    """Updates start + 1 to stop, with an evaluation every five."""
    for step in range(start + 1, stop + 1):
        loss = losses()[step]
        log.train(step, step * per_update, loss=loss, skipped=np.int32(step >= 7), **{"e/a": 0.1})
        if step % 5 == 0:
            log.eval(step, step * per_update, loss=loss / 3)


def timeless(directory: Path) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key not in TIMING}
        for record in read_metrics(directory)
    ]


def test_metrics_are_strict_json_and_exact():
    run = options()
    with RunLog(run) as log:
        train(log, 0, STEPS, run.data.tokens_per_update)
        log.write("final", STEPS, 1, loss=1.0, text="So it ends.")

    def refuse(constant):
        raise AssertionError(constant)

    lines = (run.run.path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert records == read_metrics(run.run.path)
    updates = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in updates] == list(range(1, STEPS + 1))
    assert [record["kind"] for record in records].count("eval") == STEPS // 5
    for record in updates:
        loss = losses()[record["step"]]
        if math.isnan(loss):
            assert record["loss"] is None and record["perplexity"] is None
        else:
            assert np.float32(record["loss"]) == loss
            assert record["perplexity"] == math.exp(loss)
        assert record["skipped"] == int(record["step"] >= 7)
        assert set(TIMING) <= record.keys()
    assert records[-1]["text"] == "So it ends."
    assert json.loads((run.run.path / "options.json").read_text())["options"]["batch_size"] == 2
    assert (run.run.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.run.path.glob(".*"))  # no temporary file is left


@pytest.mark.parametrize("resume_step", [0, 4, 5, 12])
def test_an_interrupted_run_reads_as_an_uninterrupted_one(resume_step):
    whole, broken = options("whole"), options("broken")
    with RunLog(whole) as log:
        train(log, 0, STEPS, whole.data.tokens_per_update)
    with RunLog(broken) as log:
        train(log, 0, 13, broken.data.tokens_per_update)
        log.write("final", 13, 0)
    with (broken.run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    with RunLog(broken, resume_step=resume_step) as log:
        train(log, resume_step, STEPS, broken.data.tokens_per_update)
    assert timeless(broken.run.path) == timeless(whole.run.path)
    seconds = [record["seconds"] for record in read_metrics(broken.run.path)]
    assert seconds == sorted(seconds)


def test_a_step_stands_once():
    run = options()
    with RunLog(run) as log:
        train(log, 0, 5, 1)
    with RunLog(run, resume_step=5) as log:
        log.eval(5, 5, loss=9.0)  # evaluated again, as at the end of a finished run
        train(log, 5, 6, 1)
    assert [r["step"] for r in read_metrics(run.run.path) if r["kind"] == "eval"] == [5]


def test_starting_anew_clears_the_old_log():
    run = options()
    for _ in range(2):
        with RunLog(run) as log:
            train(log, 0, 3, 1)
    assert len(read_metrics(run.run.path)) == 3
    assert len(list(run.run.path.glob("events.out.tfevents.*"))) == 1


def test_tensorboard_reads_the_events_once_each():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = options()
    with RunLog(run) as log:
        train(log, 0, 6, 1)
    # Event files are named by the second and ordered by name.
    for file in run.run.path.glob("events.out.tfevents.*"):
        file.rename(run.run.path / "events.out.tfevents.0000000001.host")
    with RunLog(run, resume_step=4) as log:
        train(log, 4, STEPS, 1)
    events = EventAccumulator(str(run.run.path))
    events.Reload()
    drawn = events.Scalars("train/loss")
    assert [event.step for event in drawn] == [n for n in range(1, STEPS + 1) if n != 7]
    assert drawn[0].value == losses()[1]
    assert [event.step for event in events.Scalars("eval/perplexity")] == [5, 10, 15, 20]
    assert "train/e/a" in events.Tags()["scalars"]


def test_neither_tensorflow_nor_torch_is_loaded():
    code = (
        "import sys\nfor name in ('tensorflow', 'torch', 'jax'): sys.modules[name] = None\n"
        "from launch.trainer.options import Options\nfrom launch.trainer.run_log import RunLog\n"
        f"o = Options.of(model_config={str(ROOT / 'configs/llama_9m.json')!r}, batch_size=2)\n"
        "with RunLog(o) as log:\n    log.train(1, 2, loss=1.0)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


def test_other_processes_write_and_show_nothing(capsys):
    with RunLog(options("silent"), active=False) as log:
        train(log, 0, 5, 1)
        log.note("not shown")
    assert not Path("runs/silent").exists()
    assert capsys.readouterr() == ("", "")


def test_quiet_progress_without_a_terminal(capsys):
    run = options()
    with RunLog(run) as log:
        train(log, 0, STEPS, run.data.tokens_per_update)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("step 1/20  loss 7.159  ppl 1,285  ")
    assert "step 20/20" in shown[-2] and "1 skipped" in shown[-2]
    assert sum("validation loss" in line for line in shown) == STEPS // 5
    assert len(shown) == 2 + STEPS // 5


def test_a_run_without_a_finite_loss_still_ends(capsys):
    with RunLog(options()) as log:
        log.train(1, 1, loss=math.inf, skipped=1)
    assert "loss.png was not written" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_disk_that_is_full_for_tensorboard_names_the_directory(monkeypatch, capsys):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    log = RunLog(options())
    log.train(1, 10, loss=1.0)
    monkeypatch.setattr(log._events, "write", full)
    monkeypatch.setattr(log._events, "close", full)
    with pytest.raises(OSError, match="the log .*a cannot be written: No space left on device; f"):
        log.train(2, 20, loss=1.0)
    log.close()
    assert "TensorBoard's events are incomplete" in capsys.readouterr().err


def test_plot_several_runs(tmp_path, capsys):
    for name in ("a", "b"):
        with RunLog(options(name)) as log:
            train(log, 0, 3 if name == "b" else STEPS, 1)  # b was never evaluated
    plot_main(["runs/a", "runs/b", "--out", "both.svg"])
    assert capsys.readouterr().out.strip() == "both.svg"
    assert Path("both.svg").read_text().startswith("<?xml")
    plot_main(["runs/a/"])
    assert Path("runs/a/loss.png").exists()


def test_plot_names_what_is_missing():
    with pytest.raises(UsageError, match="runs/none/metrics.jsonl does not exist"):
        plot_main(["runs/none"])
    Path("runs/empty").mkdir(parents=True)
    Path("runs/empty/metrics.jsonl").touch()
    with pytest.raises(UsageError, match="runs/empty/metrics.jsonl has no training loss"):
        plot_main(["runs/empty"])
    with RunLog(options()) as log:
        train(log, 0, 3, 1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plot([Path("runs/a")], Path("nowhere/loss.png"))
    with pytest.raises(UsageError, match="foo"):
        plot_main(["runs/a", "--out", "loss.foo"])
