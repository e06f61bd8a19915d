"""`python -m launch.train_jax` on meshes of 8 virtual devices, in one process and in two of 4 each.

Runs of one process execute in this one. Runs of two use new processes, because JAX connects only
once per process.
"""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from launch import train_jax
from launch.trainer import jax_processes
from launch.trainer.cli import UsageError
from launch.trainer.files import read_metrics
from launch.trainer.processes import OneProcess
from osd_jax.llama.checkpoint import Checkpoints
from parity_tests.support.hang import HANG
from parity_tests.support.jax_steps import steps_made_once as steps_made_once
from parity_tests.support.trainer_runs import ROOT, Home, lines_in, make_home, model, timeless

# `python -m launch.train_jax` that takes no busy process for a lost one.
PATIENT = f"""
from launch import train_jax
from launch.trainer import jax_processes
from launch.trainer.cli import run_cli
jax_processes.SECONDS_OF_SILENCE = {HANG:.0f}
raise SystemExit(run_cli(train_jax.main))
"""

# A document a row, so that the rows of an update do not depend on the number of processes; P moves
# slowly, as in the published runs.
ROWS: dict[str, Any] = {
    "no-pack": True,
    "num_training_steps": 12,
    "warmup_steps": 4,
    "eval_every": 6,
    "save_every": 3,
    "keep": 20,
    "proj_type": "continuous",
    "update_proj_gap": 200,
    "batch_size": 8,
    "sample_tokens": 5,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    path = tmp_path_factory.mktemp("home")
    home = make_home(path, train_jax, "-c", PATIENT)
    paragraphs = (path / "corpus.txt").read_text().split("\n\n")
    # one document each, some too short for a row
    lines = [f'{{"text": "{text[: 9 + 11 * (i % 5)]}"}}' for i, text in enumerate(paragraphs)]
    (path / "rows.jsonl").write_text("\n".join(lines))
    return home


def flags(home: Home, name: str, **changes: Any) -> list[str]:
    rows = {"dataset": f"text:{home.path}/rows.jsonl", "mesh": None, **ROWS}
    return home.flags(name, **{**rows, **changes})


def run(home: Home, name: str, **changes: Any) -> Path:
    """A run in this process."""
    assert train_jax.main(flags(home, name, **changes)) == 0
    return home / name


class Pair:
    """A run in two processes of 4 devices each."""

    def __init__(self, home: Home, name: str, per_process: Any = None, **changes: Any) -> None:
        self.path = home / name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        devices = re.sub(r"(device_count)=\d+", r"\1=4", os.environ["XLA_FLAGS"])
        here = {"coordinator_address": address, "num_processes": 2}
        self.outputs = [home.path / f"{name}-{index}.txt" for index in range(2)]
        self.processes = []
        for index, output in enumerate(self.outputs):
            own = {**here, "process_id": index, **(per_process or {}).get(index, {})}
            command = flags(home, name, **{"batch_size": 4, **changes, **own})
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *home.command, *command],
                        cwd=ROOT,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"XLA_FLAGS": devices},
                    )
                )

    def until(self, is_time: Callable[[], bool]) -> None:
        while not is_time():
            assert all(p.poll() is None for p in self.processes), self.said()
            time.sleep(0.01)

    def ends(self) -> list[int]:
        """The exit codes."""
        deadline = time.monotonic() + HANG
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            raise AssertionError(f"a process hangs: {self.said()}") from None

    def said(self) -> list[str]:
        return [path.read_text() for path in self.outputs]


def last_lines(text: str) -> str:
    return text.strip().splitlines()[-1]


def two(home: Home, name: str, **changes: Any) -> Path:
    pair = Pair(home, name, **changes)
    assert pair.ends() == [0, 0], pair.said()
    return pair.path


def assert_same_losses(found: Path, wanted: Path, tolerance: float = 1e-5) -> None:
    """And what was measured, to the same; and one log of each step, in order."""
    a, b = timeless(found), timeless(wanted)
    assert [(r["kind"], r["step"]) for r in a] == [(r["kind"], r["step"]) for r in b]
    names = {k for r in b for k in r if k in ("loss", "learning_rate") or k.startswith("energy/")}
    assert len(names) == 9
    for x, y in zip(a, b, strict=True):
        assert {k: x[k] for k in names & x.keys()} == pytest.approx(
            {k: y[k] for k in names & y.keys()}, abs=tolerance
        )


def assert_same_weights(found: Path, wanted: Path) -> None:
    a, b = (load_file(path / "model" / "model.safetensors") for path in (found, wanted))
    assert a.keys() == b.keys()
    for name, weight in b.items():
        np.testing.assert_allclose(a[name], weight, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def one_device(home: Home) -> Path:
    return run(home, "one", single_gpu=True)


# -------------------------------------------------------------------------------- one process


SLOW = pytest.mark.slow
MESHES = [
    pytest.param({"mesh": "data=2,fsdp=2,tensor=2"}, "data=2,fsdp=2,tensor=2", id="all"),
    pytest.param({}, "data=8", marks=SLOW, id="default"),
    pytest.param({"fsdp": True}, "fsdp=8", marks=SLOW, id="fsdp"),
    pytest.param({"mesh": "fsdp=2,tensor=-1"}, "fsdp=2,tensor=4", marks=SLOW, id="tensor"),
    pytest.param({"mesh": "data=4"}, "data=4", marks=SLOW, id="four"),
    pytest.param(
        {"mesh": "data=2,fsdp=4", "per_layer": True}, "data=2,fsdp=4", marks=SLOW, id="layers"
    ),
    pytest.param(
        {"mesh": "data=4,fsdp=2", "shard_over_data": True},
        "data=4,fsdp=2",
        marks=SLOW,
        id="over data",
    ),
]


@pytest.mark.parametrize(("settings", "shown"), MESHES)
def test_meshes_have_the_losses_of_one_device(
    settings: dict[str, Any], shown: str, home: Home, one_device: Path, capsys: Any
) -> None:
    """Whole runs; from one device's checkpoint, and back; and from its Hugging Face weights."""
    meshed = run(home, shown, **settings)
    assert f" x cpu ({shown}), from the start" in capsys.readouterr().err
    assert_same_losses(meshed, one_device)
    assert_same_weights(meshed, one_device)

    on_mesh = {"continue_from": one_device / "checkpoints" / "9", **settings}
    on_one = {"continue_from": meshed / "checkpoints" / "9", "single_gpu": True}
    for name, changes in ((f"one, {shown}", on_mesh), (f"{shown}, one", on_one)):
        assert_goes_on(run(home, name, **changes), one_device, after=9)

    start = {"continue_from": one_device / "model", "num_training_steps": 4}
    alone = run(home, f"one, tuned by {shown}", single_gpu=True, **start)
    assert_same_losses(run(home, f"tuned by {shown}", **start, **settings), alone)


def assert_goes_on(found: Path, wanted: Path, after: int) -> None:
    losses = [[r["loss"] for r in timeless(path, after)] for path in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert_same_weights(found, wanted)


def mistakes(home: Home) -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> changed options, and what the message has to say."""
    meet = {"coordinator_address": "127.0.0.1:1", "num_processes": 2, "process_id": 0}
    return {
        "devices": ({"mesh": "data=16"}, r"--mesh: .*16 devices.* there are 8"),
        "axis": ({"mesh": "rows=2"}, r"--mesh: .*'rows=2': expected each of data, fsdp, tensor"),
        "size": ({"mesh": "data=two"}, r"--mesh: .*whole number"),
        "batch": (
            {"batch_size": 12, "total_batch_size": 12},
            r"--batch_size: 12 rows are not divisible by 8, .*\(data=8\) in a process; use 16",
        ),
        "twice": (
            {"mesh": "data=2", "fsdp": True},
            r"--mesh: --fsdp also determines .*leave one out",
        ),
        "nothing to reduce": (
            {"compress_gradients": True, "single_gpu": True},
            r"--compress_gradients: .*data axis.* one device here; leave it out",
        ),
        "nothing to split": (
            {"shard_over_data": True, "mesh": "fsdp=8"},
            r"--shard_over_data: .*data axis.* one device here; leave it out",
        ),
        "no number": ({"num_processes": 2}, r"--coordinator_address, --process_id: missing; "),
        "out of range": (
            {**meet, "process_id": 2},
            r"--process_id: 2 is not one of the --num_processes 2; expected 0 to 1",
        ),
        "no port": (
            {**meet, "coordinator_address": "node001"},
            r"--coordinator_address: 'node001' is not HOST:PORT; expected such as node001:12345",
        ),
    }


def test_mistakes_are_named_and_leave_nothing(home: Home) -> None:
    for what, (changes, message) in mistakes(home).items():
        with pytest.raises(UsageError, match=message):
            train_jax.main(flags(home, "mistaken", **changes))
        assert not (home / "mistaken").exists(), what


def test_a_coordinator_that_cannot_be(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_processes, "SECONDS_TO_MEET", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        meet = {"coordinator_address": address, "num_processes": 2, "process_id": 0}
        with pytest.raises(UsageError, match=r"port \d+ of this machine cannot be .*: .*in use"):
            train_jax.main(flags(home, "mistaken", **meet))
    with pytest.raises(UsageError, match=rf"no answer from {address} within 0.5 s: .*refused"):
        train_jax.main(flags(home, "mistaken", **{**meet, "process_id": 1}))
    assert not (home / "mistaken").exists()


def test_one_process_sets_nothing_up(monkeypatch: pytest.MonkeyPatch, home: Home) -> None:
    import jax

    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("set up"))
    options = train_jax.Options.parse(flags(home, "plain"))
    for variables in (
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # in a job, and not started by srun
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with jax_processes.joined(options) as processes:
            assert processes == OneProcess()
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert jax_processes._is_launched()


# ------------------------------------------------------------------------------ two processes


# A lost process, noticed by two threads: the other one logs just before this one exits.
NOISY = """
import os, jax
from launch.trainer import jax_processes

leave = os._exit

def logs_and_leaves(code):
    os.write(2, b"noise\\n")
    leave(code)

os._exit = logs_and_leaves
{end}
"""
ENDS = {
    "raises": "jax_processes._end_at_once(jax.errors.JaxRuntimeError('UNAVAILABLE: closed'))",
    "aborts": "jax_processes._at_abort.say(jax_processes.LOST, code=1); os.abort()",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_the_reason_is_the_last_line_whatever_else_is_logged(end: str, tmp_path: Path) -> None:
    output, command = tmp_path / "stderr.txt", [sys.executable, "-c", NOISY.format(end=end)]
    with output.open("w") as file:
        ended = subprocess.run(command, cwd=ROOT, stderr=file, timeout=HANG)
    assert ended.returncode == 1
    assert last_lines(output.read_text()) == jax_processes.LOST


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        ("OSError(24, 'Too many open files')", "error: [Errno 24] Too many open files"),
        (r"ValueError('bad \udce9')", r"ValueError: bad \udce9"),
        ("KeyboardInterrupt()", "stopped"),
    ],
)
def test_the_reason_arrives_without_a_free_file_and_in_any_letters(error: str, wanted: str) -> None:
    code = (
        "import os, resource\n"
        "from launch.trainer import jax_processes\n"
        "import jax\n"
        f"error = {error}\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "jax_processes._end_at_once(error)\n"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert ended.returncode == (130 if wanted == "stopped" else 1)
    assert last_lines(ended.stderr) == wanted


def assert_lost(pair: Pair, victim: int) -> None:
    """The other process has ended on its own and reported why."""
    codes = pair.ends()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, pair.said()
    assert last_lines(pair.said()[1 - victim]) == jax_processes.LOST, pair.said()


def test_two_processes_train_as_one_though_one_is_killed(home: Home, one_device: Path) -> None:
    """The killed process is the coordinator, which also writes; both resume, on another mesh."""
    pair = Pair(home, "pair")
    pair.until(lambda: lines_in(pair.path) >= 8)
    pair.processes[0].kill()
    assert_lost(pair, victim=0)
    unfinished = list((pair.path / "checkpoints").glob("*orbax-checkpoint-tmp*"))
    assert len(unfinished) <= 1
    assert Checkpoints(pair.path / "checkpoints").steps()[-1] == 3

    mesh = {"mesh": "data=4,fsdp=2", "shard_over_data": True}
    pair = Pair(home, "pair", resume=True, **mesh)
    assert pair.ends() == [0, 0], pair.said()
    assert_same_losses(pair.path, one_device)
    assert_same_weights(pair.path, one_device)
    said = pair.said()
    assert "on 8 x cpu (data=4,fsdp=2) in 2 processes, resuming from step" in said[0]
    assert said[0].count("step 12: validation loss") == 1
    assert not re.search("step|loss|model", said[1])  # apart from Gloo's own messages


@pytest.mark.slow
def test_the_other_one_is_killed(home: Home) -> None:
    pair = Pair(home, "pair, second killed", num_training_steps=4000)
    pair.until(lambda: lines_in(pair.path) >= 8)
    pair.processes[1].kill()
    assert_lost(pair, victim=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"fsdp": True},
        {"mesh": "data=2,fsdp=2,tensor=2"},
        {"mesh": "fsdp=2,tensor=4"},
        {"shard_over_data": True},
        {"batch_size": 4, "total_batch_size": 16},
        {"optimizer": "galore_adamw8bit", "proj_type": "continuous_adam8bit"},
    ],
    ids=str,
)
def test_two_processes_equal_one(settings: dict[str, Any], home: Home) -> None:
    name = str(settings)
    alone = run(home, f"{name} by one", **{**settings, "batch_size": 8})
    both = two(home, f"{name} by two", **settings)
    if "8bit" not in name:
        assert_same_losses(both, alone)
        assert_same_weights(both, alone)
        return
    # Where a sum lies between two codes of 8 bits, the order of its terms decides: a weight then
    # moves by another part of a step of 0.02, and one in a thousand does.
    assert_same_losses(both, alone, tolerance=1e-3)
    a, b = (load_file(path / "model" / "model.safetensors") for path in (both, alone))
    for weight, wanted in ((a[name], wanted) for name, wanted in b.items()):
        assert np.sqrt(np.mean((weight - wanted) ** 2)) <= 0.02 * 1e-3**0.5


@pytest.mark.slow
def test_one_process_goes_on_from_two_and_two_from_one(home: Home, one_device: Path) -> None:
    both = two(home, "two")
    alone = run(home, "two, one", continue_from=both / "checkpoints" / "6")
    again = two(home, "two, one, two", continue_from=alone / "checkpoints" / "9", fsdp=True)
    assert_goes_on(alone, one_device, after=6)
    assert_goes_on(again, one_device, after=9)


@pytest.mark.slow
def test_two_processes_start_from_hugging_face_weights(home: Home, one_device: Path) -> None:
    start = {"continue_from": one_device / "model", "num_training_steps": 4}
    alone = run(home, "tuned by one process", **start)
    assert_same_losses(two(home, "tuned by two processes", fsdp=True, **start), alone)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_with_a_checkpoint(home: Home, one_device: Path) -> None:
    pair = Pair(home, "stopped", num_training_steps=4000)
    pair.until(lambda: lines_in(pair.path) >= 8)
    pair.processes[1].terminate()
    assert pair.ends() == [130, 130], pair.said()
    step = read_metrics(pair.path)[-1]["step"]
    assert Checkpoints(pair.path / "checkpoints").steps()[0] == step
    assert f"stopped at step {step}; resume with the same command and --resume" in pair.said()[0]


@pytest.mark.slow
def test_damage_that_one_sees_is_passed_over_by_both(home: Home, one_device: Path) -> None:
    both = two(home, "damaged")
    for path in (both / "checkpoints" / "12" / "state").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)
    pair = Pair(home, "damaged", resume=True)
    assert pair.ends() == [0, 0], pair.said()
    assert "damaged and cannot be read" in pair.said()[0]
    assert_same_losses(both, one_device)


@pytest.mark.slow
def test_a_mistake_is_told_once_and_ends_both(home: Home) -> None:
    odd = model(home, "odd", num_attention_heads=5)
    for own, message in (
        ({0: {"model_config": odd}, 1: {"model_config": odd}}, "not a multiple of num_attention_h"),
        ({1: {"dataset": "text:none/*.txt"}}, "no file matches none"),
        (
            {1: {"save_every": 2}},
            "--save_every: process 0 has 3 but process 1 2; give all of them the same",
        ),
    ):
        pair = Pair(home, "mistaken", per_process=own)
        assert pair.ends() == [2, 2], pair.said()
        said = pair.said()
        assert last_lines(said[0]).startswith("error: ") and message in last_lines(said[0])
        assert "error:" not in said[1]
        assert not pair.path.exists()


@pytest.mark.slow
def test_a_full_disk_in_one_ends_both(home: Home) -> None:
    """The process that cannot write its log says so, and the other one reports its loss."""
    pair = Pair(home, "full", num_training_steps=4000, save_every=4000)
    pair.until(lambda: lines_in(pair.path) >= 8)
    limit = (pair.path / "metrics.jsonl").stat().st_size + 2_000
    resource.prlimit(pair.processes[0].pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert pair.ends() == [1, 1], pair.said()
    said = [last_lines(text) for text in pair.said()]
    assert said[0].startswith("error: ") and "File too large" in said[0], said
    assert said[1] == jax_processes.LOST
