"""`launch/train_torch.py`, whole runs of a tiny model on a tiny text, in one process and in two.

Runs of one process execute in this one. Runs of two execute in `two_processes`, which connect
again for each run; a few use torchrun itself.
"""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from launch import train_torch
from launch.data import TrainBatches
from launch.trainer import loop, torch_processes
from launch.trainer.cli import UsageError, run_cli
from launch.trainer.files import read_metrics
from launch.trainer.resume import skipped_documents
from osd_torch import llama
from osd_torch.llama import checkpoint
from osd_torch.llama.checkpoint import Checkpoints
from parity_tests.support.hang import HANG
from parity_tests.support.published_commands import PUBLISHED_7B, PUBLISHED_7B_GALORE, PUBLISHED_60M
from parity_tests.support.trainer_runs import (
    SETTINGS,
    SHORT,
    Home,
    Reference,
    RunTests,
    assert_nothing_is_left_to_do,
    assert_same_end,
    at_batches,
    common_mistakes,
    copy,
    everything,
    hide_all,
    largest_file,
    lines_in,
    make_home,
    make_reference,
    model,
    short_run,
    start,
    timeless,
)
from parity_tests.support.two_processes import Meanwhile, TwoProcesses


def torchrun(processes: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(processes), "launch/train_torch.py"]


def by_torchrun(home: Home, processes: int, name: str, **changes: Any) -> subprocess.Popen[str]:
    return start([*torchrun(processes), *home.flags(name, **changes)])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("home"), train_torch, "launch/train_torch.py")


@pytest.fixture(scope="module")
def reference(home: Home) -> Reference:
    return make_reference(home)


class TestRuns(RunTests):
    checkpoints = Checkpoints
    unfinished = "*.tmp"
    indispensable = "optimizer.pt"
    says = ("galore_adamw, std, rank 4: weights 0.1 MiB", "optimizer state 0.")
    kills = 3
    loss_tolerance = 1e-5

    def loss(self, folder: Path, batch: Any) -> float:
        tokens, mask = (torch.from_numpy(batch[name]) for name in ("tokens", "mask"))
        with torch.no_grad():
            total, count = llama.loss(llama.load_hf(folder), tokens, mask)
        return float(total / count)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


# ------------------------------------------------------------------------------ two processes

Pair = Callable[..., list[Any]]
Whole = Callable[[Path, dict[str, Any]], Path]
Spoil = Callable[[pytest.MonkeyPatch, int], None]


def trained(rank: int, port: int, flags: list[str], spoil: Spoil | None) -> Any:
    """A run in one of two processes: its exit code, or a message."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK"):
            patch.setenv(name, str(rank))
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(port))
        patch.setattr(torch_processes, "SECONDS_FOR_THE_FIRST", 0)  # nothing stops it
        patch.setattr(torch_processes, "SECONDS_TO_BE_STOPPED", 0)
        if spoil:
            spoil(patch, rank)
        try:
            return train_torch.main(flags)
        except SystemExit as end:  # the first process tells why
            return end.code
        except Exception as error:
            if not isinstance(error, UsageError | OSError):
                traceback.print_exc()
            return str(error)


@pytest.fixture(scope="module")
def pair(home: Home, two_processes: TwoProcesses) -> Pair:
    """Makes a run of two processes -> what each returned: an exit code, or a message.

    `spoil`, a function of this module, may patch what one of them does; `meanwhile`: see
    `TwoProcesses.unconnected`.
    """

    def run(
        name: str,
        flags: list[str] | None = None,
        spoil: Spoil | None = None,
        meanwhile: Meanwhile | None = None,
        **changes: Any,
    ) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = flags or home.flags(name, **changes)
        return two_processes.unconnected(trained, port, flags, spoil, meanwhile=meanwhile)

    return run


# The published gap: P moves slowly, as it does in the published runs.
ROWS: dict[str, Any] = {
    "no-pack": True,
    "num_training_steps": 20,
    "warmup_steps": 4,
    "eval_every": 10,
    "save_every": 6,
    "keep": 20,
    "proj_type": "continuous",
    "update_proj_gap": 200,
    "sample_tokens": 0,
}
MODES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "compressed": {"compress_gradients": True},
    "per layer": {"per_layer": True},
    "ddp, accumulated": {"batch_size": 2},
    "fsdp, accumulated": {"fsdp": True, "batch_size": 2},
}


def differences(run: Path, other: Path, *names: str) -> float:
    """The largest difference of these metrics over all lines."""
    a, b = timeless(run), timeless(other)
    assert [(r["kind"], r["step"]) for r in a] == [(r["kind"], r["step"]) for r in b]
    return max(abs(x[k] - y[k]) for x, y in zip(a, b, strict=True) for k in names if k in x)


@pytest.fixture(scope="module")
def one_process(home: Home) -> Path:
    assert home.run("one", **{**ROWS, "batch_size": 8}) == 0
    return home / "one"


@pytest.fixture(scope="module")
def whole(pair: Pair) -> Whole:
    """Makes a run of two processes without interruption -> its directory; each is trained once."""
    done: set[Path] = set()

    def run(path: Path, settings: dict[str, Any]) -> Path:
        if path not in done:
            assert pair(path.name, **settings) == [0, 0]
            done.add(path)
        return path

    return run


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(mode: str, whole: Whole, one_process: Path, home: Home) -> None:
    """The same rows per update, so the same losses up to the order of sums.

    If only sketches are reduced, an estimate replaces the squared norm of the mean
    (`osd_torch.sketch.as_in_subspace`); at the published gap the effect on P is too small to
    measure.
    """
    run = whole(home / mode, {**ROWS, **MODES[mode]})
    assert differences(run, one_process, "loss") < 1e-4
    if "compressed" not in mode and "layer" not in mode:
        energies = [k for k in timeless(one_process)[9] if k.startswith(("energy", "ortho"))]
        assert len(energies) == 14
        assert differences(run, one_process, "gradient_norm", *energies) < 1e-4


# ------------------------------------------------------------------------ the published commands

COMMANDS = {"60M": PUBLISHED_60M, "7B": PUBLISHED_7B, "7B, GaLore": PUBLISHED_7B_GALORE}


def published(command: str, name: str, **changes: Any) -> list[str]:
    """A published command's flags with other counts and places, and all else verbatim."""
    words = COMMANDS[command].split()
    counts = {"batch_size": 2, "total_batch_size": 8, "num_training_steps": 3, "warmup_steps": 1}
    for key, value in (counts | changes).items():
        if f"--{key}" in words:
            words[words.index(f"--{key}") + 1] = str(value)
        else:
            words += [f"--{key}", str(value)]
    return [*words, "--name", name, "--eval_tokens", "1000", "--sample_tokens", "5"]


def assert_is_done(run: Path) -> None:
    lines = read_metrics(run)
    assert [(r["kind"], r["step"]) for r in lines] == [
        ("train", 1), ("train", 2), ("train", 3), ("eval", 3), ("final", 3),
    ]  # fmt: skip
    assert all(np.isfinite(r["loss"]) for r in lines)
    assert json.loads((run / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {x.dtype for x in llama.load_hf(run / "model").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("command", COMMANDS)
def test_published_commands_in_two_processes(command: str, pair: Pair, home: Home) -> None:
    small = {"model_config": home.path / "long.json", "run_dir": home.path / "runs"}
    model(home, "long", max_sequence_length=256)
    small |= {"dataset": f"text:{home.path}/corpus.txt", "cache_dir": home.path / "cache"}
    flags = published(command, command, **small, tokenizer="byte")
    assert pair(command, flags) == [0, 0]
    assert_is_done(home / command)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("processes", [1, 2])
def test_published_commands_by_torchrun(command: str, processes: int, home: Home) -> None:
    """A larger model, on the built-in corpus."""
    name = f"{command} by {processes}"
    flags = published(
        command,
        name,
        model_config="configs/llama_9m.json",
        dataset="builtin",
        run_dir=home.path / "runs",
    )
    process = start([*torchrun(processes), *flags])
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_is_done(home / name)
    assert output.count("step 3: validation loss") == 1  # the first process alone shows


def test_torchrun_tells_of_a_mistake_once(home: Home) -> None:
    process = by_torchrun(
        home, 2, "mistaken", model_config=model(home, "odd", num_attention_heads=5)
    )
    output, _ = process.communicate()
    assert process.returncode != 0
    assert output.count("hidden_size 32 is not a multiple of num_attention_heads 5") == 1, output
    assert not (home / "mistaken").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_is_killed_and_both_end(victim: int, home: Home) -> None:
    """And --resume continues as if nothing had happened."""
    settings = {"batch_size": 2, "keep": 20}
    whole, name = home / "torchrun", f"torchrun, {victim} killed"
    if not whole.exists():
        output, _ = (process := by_torchrun(home, 2, "torchrun", **settings)).communicate()
        assert process.returncode == 0, output
    process = by_torchrun(home, 2, name, **settings)
    while process.poll() is None and lines_in(home / name) < 20:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    workers = sorted(int(word) for word in children.split())
    os.kill(workers[victim], signal.SIGKILL)
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode != 0
    assert Checkpoints(home / name / "checkpoints").steps()
    process = by_torchrun(home, 2, name, resume=True, **settings)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_same_end(home / name, whole)


@pytest.mark.slow
def test_torchrun_stops_with_a_checkpoint_on_sigterm(home: Home) -> None:
    process = by_torchrun(home, 2, "terminated", num_training_steps=2000)
    while process.poll() is None and lines_in(home / "terminated") < 5:
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=HANG)
    assert output.count("stopping after this update, with a checkpoint") == 1, output
    last = [r for r in read_metrics(home / "terminated") if r["kind"] == "train"][-1]["step"]
    assert Checkpoints(home / "terminated" / "checkpoints").steps()[0] == last


# ---------------------------------------------------------------------------- against JAX


@pytest.fixture(scope="module")
def start_weights(home: Home) -> Path:
    config = llama.load_config(home.path / "model.json")
    llama.save_hf(home.path / "start", llama.build(config, seed=3))
    return home.path / "start"


@pytest.mark.parametrize(
    "settings",
    [
        {
            "proj_type": "continuous",
            "beta1": 0.8,
            "beta2": 0.98,
            "eps": 1e-7,
            "weight_decay": 0.1,
            "no_decay": "norm,embed,head",
            "transport_moments": True,
        },
        pytest.param({"proj_type": "continuous"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "galore_adafactor"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "galore_lion", "lr": 0.002}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "adamw"}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: " ".join(map(str, settings)),
)
def test_jax_and_torch_have_the_same_losses(
    settings: dict[str, Any], start_weights: Path, home: Home
) -> None:
    """From the same weights, data and flags; and each starts from the model of the other."""
    train_jax = pytest.importorskip("launch.train_jax")
    name = settings.get("optimizer", "galore_adamw")
    short = {"num_training_steps": 30, "eval_every": 10, "continue_from": start_weights}
    flags = {**short, "grad_clipping": 1.0, "sample_tokens": 0, **settings}
    assert train_jax.main(home.flags(f"jax {name}", **flags)) == 0
    assert home.run(f"torch {name}", **flags) == 0
    runs = home / f"jax {name}", home / f"torch {name}"
    assert differences(*runs, "loss", "learning_rate") < 1e-3
    # What is measured has the same names; where P has turned, by much the same numbers.
    kinds = [{key for record in timeless(run) for key in record} for run in runs]
    assert kinds[0] == kinds[1]
    energies = [key for key in kinds[0] if key.startswith(("energy/", "orthonormality/"))]
    assert len(energies) == (0 if name == "adamw" else 14)
    assert differences(*runs, *energies, "loss") < 0.02

    # A checkpoint is for the trainer that wrote it, which the other one says.
    for run, main, writer in (
        (runs[0], train_torch.main, "train_jax"),
        (runs[1], train_jax.main, "train_torch"),
    ):
        wrong = rf"{run}/checkpoints/30 was written by {writer}; .*--continue_from {run}/model"
        with pytest.raises(UsageError, match=wrong):
            main(home.flags(run.name, **flags, resume=True))
        with pytest.raises(UsageError, match=wrong):
            main(home.flags("another", **(flags | {"continue_from": run})))

    # The loss of the first update is that before it, and SGD compiles fastest.
    last = {"optimizer": "sgd", "num_training_steps": 1, "warmup_steps": 0}
    last |= {"continue_from": runs[1] / "model"}
    assert train_jax.main(home.flags(f"jax {name} 1", **last)) == 0
    assert home.run(f"torch {name} 1", **last) == 0
    assert home.run(f"torch {name} 0", **(last | {"continue_from": runs[0] / "model"})) == 0
    names = (f"jax {name} 1", f"torch {name} 1", f"torch {name} 0")
    losses = [timeless(home / run)[0]["loss"] for run in names]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[2] == pytest.approx(losses[1], abs=1e-3)  # that of another model: the JAX run's


# ------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("optimizer", ["galore_adamw", "adamw"])
def test_bfloat16_moments_are_float32_and_decay(optimizer: str, home: Home) -> None:
    """In bfloat16, 0.999 * v rounds to v."""
    import osd_torch
    from osd_torch.llama.train import make_train_step

    config = llama.load_config(home.path / "model.json")
    net = llama.build(config, seed=0, dtype=torch.bfloat16)
    opt = osd_torch.make_optimizer(
        net.named_parameters(), optimizer, "continuous", lr=0.01, rank=4
    )  # fmt: skip
    train_step = make_train_step(net, opt, schedule=lambda step: 1.0)
    draw = np.random.default_rng(0)
    for step in range(30):
        tokens = draw.integers(0, 300, (1, 4, 32), dtype=np.int32) // 2
        loss = train_step(step, {"tokens": tokens, "mask": tokens >= 0}, False)["loss"]
        assert np.isfinite(loss)
    second = {p: state["exp_avg_sq"].clone() for p, state in opt.state.items()}
    assert {x.dtype for x in second.values()} == {torch.float32}
    for _ in range(100):
        for param in net.parameters():
            param.grad = torch.zeros_like(param)
        opt.step()
    for param, before in second.items():
        after = opt.state[param]["exp_avg_sq"]
        torch.testing.assert_close(after, before * 0.999**100, rtol=1e-4, atol=0)


# ---------------------------------------------------------------------------- a run from the start


# ----------------------------------------------------------------------------------- resuming


STOPPED: dict[str, dict[str, Any]] = {
    "per layer": {"per_layer": True, "proj_type": "continuous", "batch_size": 8},
    "per layer, accumulated, clipped, 8 bits": {
        "optimizer": "galore_adamw8bit_per_layer",
        "proj_type": "continuous_adam8bit",
        "grad_clipping": 1.0,
        "model_config": "wide.json",
    },
    "full rank, 8 bits": {"optimizer": "adam8bit"},
    "random": {"proj_type": "random", "activation_checkpointing": True},
    "two-sided adafactor": {
        "optimizer": "galore_adafactor", "proj_type": "full", "beta1": 0.9
    },
    "bfloat16": {"dtype": "bfloat16", "optimizer": "adamw"},
}  # fmt: skip
ALIKE = ("random", "two-sided adafactor")  # to others, for a checkpoint


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in STOPPED],
)
def test_a_stop_and_resume_is_the_same_run(
    name: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulated, except in the first."""
    settings = {"num_training_steps": 12, "eval_every": 4, "save_every": 5, **STOPPED[name]}
    if "model_config" in settings:  # of more than the 4096 values from which on state is 8 bits
        settings["model_config"] = model(home, "wide", intermediate_size=2048)
    assert home.run(f"{name} whole", **settings) == 0
    stop = lambda batch: os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(TrainBatches, "__next__", at_batches(range(6, 7), stop))
        assert home.run(f"{name} stopped", **settings) == loop.STOPPED
    assert Checkpoints(home / f"{name} stopped" / "checkpoints").steps()[0] < 12
    assert home.run(f"{name} stopped", resume=True, **settings) == 0
    assert_same_end(home / f"{name} stopped", home / f"{name} whole")


# Accumulated, and rows packed with documents.
PACKED: dict[str, Any] = {
    "num_training_steps": 12,
    "eval_every": 6,
    "save_every": 5,
    "keep": 9,
    "proj_type": "continuous",
    "batch_size": 2,
}


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "per layer"])
def test_two_processes_killed_and_resumed(mode: str, pair: Pair, whole: Whole, home: Home) -> None:
    """After a kill there is the last checkpoint and a longer log."""
    settings = PACKED | MODES[mode]
    reference = whole(home / f"packed, {mode}", settings)
    newest = 5 if mode == "ddp" else 10
    run = copy(reference, home, f"packed, {mode}, killed", newest)
    assert pair(run.name, resume=True, **settings) == [0, 0]
    assert_same_end(run, reference)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_another_number_of_processes_goes_on(
    mode: str, pair: Pair, whole: Whole, one_process: Path, home: Home
) -> None:
    """Two -> one -> two; where each row is a document no document is lost."""
    settings = {**ROWS, **MODES[mode]}
    run = copy(whole(home / mode, settings), home, f"{mode}, then one", newest=6)
    stop_at_12 = {**settings, "batch_size": 8, "resume": True}
    with pytest.MonkeyPatch.context() as patch:
        stop = lambda batch: os.kill(os.getpid(), signal.SIGTERM)
        patch.setattr(TrainBatches, "__next__", at_batches(range(5, 6), stop))
        assert home.run(run.name, **stop_at_12) == loop.STOPPED
    assert Checkpoints(run / "checkpoints").steps()[0] == 12
    assert pair(run.name, resume=True, **settings) == [0, 0]
    assert differences(run, one_process, "loss") < 1e-4


def test_a_damaged_checkpoint_is_passed_over(
    reference: Reference, home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy(reference.path, home, "damaged", newest=56)
    largest = run / "checkpoints" / "56" / "model" / "model.safetensors"
    os.truncate(largest, largest.stat().st_size // 2)
    (run / "checkpoints" / "49" / "manifest.json").unlink()
    (run / "checkpoints" / "57.tmp" / "model").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "launch"):
        assert home.run("damaged", resume=True, keep=20) == 0
    for step, name in ((56, ": model/model.safetensors"), (49, "")):
        path = run / "checkpoints" / str(step)
        assert f"{path} is damaged and cannot be read{name}; passed over" in caplog.messages
        assert (run / "checkpoints" / f"{step}.set-aside").is_dir()
    assert_same_end(run, reference.path)
    assert Checkpoints(run / "checkpoints").steps()[:4] == [60, 56, 49, 42]
    assert not (run / "checkpoints" / "57.tmp").exists()


def cannot_read_10(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The second process cannot read the weights of step 10."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    def unless_10(where: Any, read: Callable[[], Any]) -> Any:
        if rank == 1 and "/10/" in str(where):
            raise OSError(116, "Stale file handle")
        return read()

    plain, sharded = checkpoint.load_file, FileSystemReader.read_data
    patch.setattr(checkpoint, "load_file", lambda path: unless_10(path, lambda: plain(path)))
    patch.setattr(
        FileSystemReader,
        "read_data",
        lambda self, *args: unless_10(self.path, lambda: sharded(self, *args)),
    )


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_what_one_process_cannot_read_all_pass_over(
    mode: str, pair: Pair, whole: Whole, home: Home
) -> None:
    settings = PACKED | MODES[mode]
    reference = whole(home / f"packed, {mode}", settings)
    run = copy(reference, home, f"packed, {mode}, unread", newest=10)
    assert pair(run.name, spoil=cannot_read_10, resume=True, **settings) == [0, 0]
    assert (run / "checkpoints" / "10.set-aside").is_dir()
    assert_same_end(run, reference)


def sees_nothing(patch: pytest.MonkeyPatch, rank: int) -> None:
    steps = Checkpoints.steps
    patch.setattr(Checkpoints, "steps", lambda self: [] if rank else steps(self))


def sees_one(patch: pytest.MonkeyPatch, rank: int) -> None:
    steps = Checkpoints.steps
    patch.setattr(Checkpoints, "steps", lambda self: steps(self)[: 1 if rank else None])


def test_processes_that_see_other_checkpoints_end_together(pair: Pair, home: Home) -> None:
    settings = {"num_training_steps": 6, "save_every": 3, "eval_every": 6, "warmup_steps": 1}
    assert pair("seen", **settings) == [0, 0]
    start = {**settings, "continue_from": home / "seen", "num_training_steps": 9}
    first, second = pair("unseen", spoil=sees_nothing, **start)
    assert "has no complete checkpoint" in first and second == 2
    first, second = pair("seen", spoil=sees_nothing, **settings, resume=True)
    assert "--resume: the log in" in first and second == 2
    first, second = pair("seen", spoil=sees_one, **settings, resume=True)
    assert re.match(
        r"--save_dir: in .*/seen/checkpoints process 0 .* \[6, 3\], but .* \[6\];", first
    )
    assert second == 2


def test_another_learning_rate_takes_effect_on_going_on(reference: Reference, home: Home) -> None:
    run = copy(reference.path, home, "slower", newest=42)
    assert home.run("slower", resume=True, lr=0.001, keep=20) == 0
    assert read_metrics(run)[-3]["learning_rate"] == pytest.approx(0.0001, rel=0.1)
    a, b = (weights(r / "checkpoints" / "49") for r in (run, reference.path))
    assert not torch.equal(a["lm_head.weight"], b["lm_head.weight"])


# ------------------------------------------------------------------------ losses that are no number


@pytest.mark.parametrize("settings", [{}, {"per_layer": True, "batch_size": 8}])
def test_ten_losses_in_a_row_that_are_not_finite_stop_the_run(
    settings: dict[str, Any],
    reference: Reference,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    name, a_step = f"broken {len(settings)}", 1 if settings else 2
    with monkeypatch.context() as patch:
        patch.setattr(TrainBatches, "__next__", at_batches(range(10 * a_step, 99), hide_all))
        assert home.run(name, keep=20, **settings) == 1
    lines = read_metrics(home / name)
    assert [r["step"] for r in lines] == list(range(1, 21))
    assert [r["skipped"] for r in lines] == [0] * 10 + list(range(1, 11))
    assert [r["loss"] is None for r in lines] == [False] * 10 + [True] * 10
    said = capsys.readouterr().err
    assert "stopped at step 20: the last 10 updates were skipped" in said
    assert "lower --lr, or set --grad_clipping" in said

    # What is saved is the state after update 10, the last good one; 14 is within the bad ones.
    checkpoints = home / name / "checkpoints"
    assert Checkpoints(checkpoints).steps() == [20, 14, 7]
    found = [weights(checkpoints / str(step)) for step in (20, 14, 7)]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert all(x.isfinite().all() for x in found[0].values())
    assert not torch.equal(found[0]["lm_head.weight"], found[2]["lm_head.weight"])

    assert home.run(name, resume=True, **settings) == 0
    later = [r for r in read_metrics(home / name) if r["kind"] == "train"]
    assert [r["skipped_in_a_row"] for r in later][20:] == [0] * 40
    # The ten that were skipped do not count in the schedule.
    assert later[-1]["skipped"] == 10
    rates = [r["learning_rate"] for r in timeless(reference.path) if "skipped" in r]
    assert [r["learning_rate"] for r in later[20:]] == rates[10:50]


# ------------------------------------------------------------------------------- mistakes


def mistakes(home: Home, reference: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> changed options, and what the message has to say."""
    return {
        **common_mistakes(home, reference),
        "no LLaMA": (
            {"model_config": model(home, "gpt", model_type="gpt2")},
            r"gpt\.json describes a 'gpt2' model, expected 'llama'",
        ),
        "key heads": (
            {"model_config": model(home, "keys", num_key_value_heads=3)},
            r"num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        "other rank": (
            {"continue_from": reference / "checkpoints", "rank": 5},
            r"another model or optimizer: .*rank 4 there and .*rank 5",
        ),
        "P before W": (
            {"per_layer": True, "proj_type": "continuous", "move_projector": "before"},
            r"--move_projector: before recomputes R .*with several micro-batches keep only",
        ),
        "P before W, clipped": (
            {
                **{"per_layer": True, "proj_type": "continuous", "move_projector": "before"},
                **{"batch_size": 8, "grad_clipping": 1.0, "dataset": "c4"},
            },
            r"--move_projector: before recomputes R .*with --grad_clipping keep only a sketch",
        ),
        "sharded by layer": ({"per_layer": True, "fsdp": True}, r"--fsdp: .*use one of the two"),
        "compressed shards": (
            {"compress_gradients": True, "fsdp": True},
            r"--compress_gradients: --fsdp itself reduces .*use one of the two",
        ),
        "what JAX alone does": (
            {"mesh": "data=2"},
            r"--mesh: PyTorch has one device per process.*or use launch\.train_jax",
        ),
        "JAX's processes": ({"process_id": 0}, r"--process_id: torchrun connects"),
        "nothing to compress": (
            {"compress_gradients": True, "optimizer": "adamw"},
            r"--compress_gradients: only a galore_\* optimizer or osd_muon reads it",
        ),
    }


def test_mistakes_are_named_and_leave_nothing(reference: Reference, home: Home) -> None:
    before = everything(reference.path)
    for what, (changes, message) in mistakes(home, reference.path).items():
        with pytest.raises(UsageError, match=message):
            home.run(changes.pop("name", "mistaken"), **changes)
        assert not (home / "mistaken").exists(), what
    changes, message = mistakes(home, reference.path)["P before W"]
    with pytest.raises(UsageError, match=message):
        home.run("reference", overwrite=True, **changes)
    assert everything(reference.path) == before


def test_the_number_of_processes_in_words() -> None:
    assert "by 1 process, and now by 2: " in skipped_documents(1, 2)
    assert "by 2 processes, and now by 1: " in skipped_documents(2, 1)


def test_a_gpu_that_is_not_there(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UsageError, match=r"process 2 of this machine has no GPU.* start at most 1"):
        home.run("mistaken")


def test_a_port_in_use(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (place | {"MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=r"cannot connect at 127.0.0.1:\d+: .*--master_port"):
            home.run("mistaken")
    assert not (home / "mistaken").exists()


def test_what_is_wrong_with_two_processes_ends_both(pair: Pair, home: Home) -> None:
    answers = pair("mistaken", total_batch_size=12)
    wrong = (
        r"--total_batch_size: 12 is not a multiple of 8 \(--batch_size 4 x 2 processes\); use 16"
    )
    assert all(re.match(wrong, answer) for answer in answers), answers
    answers = pair("mistaken", model_config=model(home, "heads", num_attention_heads=5))
    assert "not a multiple of num_attention_heads 5" in answers[0] and answers[1] == 2
    assert not (home / "mistaken").exists()


def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoints(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings = {"num_training_steps": 7, "save_every": 3, "eval_every": 50, "warmup_steps": 0}
    assert home.run("full", **settings) == 0
    before = everything(home / "full" / "checkpoints")
    flags = home.flags("full", resume=True, **{**settings, "num_training_steps": 12})
    monkeypatch.setattr(sys, "argv", ["train_torch.py", *flags])
    with largest_file(60_000):
        assert run_cli(train_torch.main) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: the checkpoint of step 9, about 0 MiB, cannot be written to ")
    assert "File too large" in last and "free space there, or save elsewhere" in last
    assert everything(home / "full" / "checkpoints") == before


def test_a_full_disk_ends_the_log_and_the_model_with_a_remedy(
    reference: Reference, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def last_line(size: int, name: str, **changes: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["train_torch.py", *home.flags(name, **changes)])
        with largest_file(size):
            assert run_cli(train_torch.main) == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    path = home / "full log" / "metrics.jsonl"
    said = last_line(4000, "full log", save_every=50)
    assert said.startswith(
        f"error: the log {path} cannot be written: File too large; free space th"
    )
    assert lines_in(home / "full log") > 3

    run = copy(reference.path, home, "full model")
    said = last_line(60_000, "full model", resume=True)
    assert said.startswith(f"error: the model cannot be written to {run / 'model'}: model.safeten")
    assert f"safe in {run / 'checkpoints'}: free space, and the same command with --resu" in said
    assert not (run / "model").exists()
    assert home.run("full model", resume=True) == 0
    assert_same_end(run, reference.path)


def second_hangs_in_the_sixth_update(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The given time limit holds from the fifth on: a busy machine may take long to get there."""
    given: list[timedelta] = []
    real = dist.init_process_group

    def join(backend: str, timeout: timedelta) -> None:
        given.append(timeout)
        real(backend, timeout=timedelta(seconds=HANG))

    def shorten(batch: dict[str, np.ndarray]) -> None:
        dist.distributed_c10d._set_pg_timeout(given[0])

    def stop(batch: dict[str, np.ndarray]) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    patch.setattr(dist, "init_process_group", join)
    number, act = (4, shorten) if rank == 0 else (5, stop)
    patch.setattr(TrainBatches, "__next__", at_batches(range(number, number + 1), act))


def test_a_process_that_hangs_is_not_waited_for_for_ever(pair: Pair, home: Home) -> None:
    def wake_the_second(pids: list[int], first_answers: Callable[[], bool]) -> None:
        answered = first_answers()
        os.kill(pids[1], signal.SIGCONT)
        assert answered, "the first waits forever"

    settings = {"num_training_steps": 2000, "timeout_minutes": 1 / 30}
    hangs = second_hangs_in_the_sixth_update
    first, _ = pair("hung", spoil=hangs, meanwhile=wake_the_second, **settings)
    assert re.match(r"another process has not answered for 0.0333333 minutes: it hangs, or", first)
    assert "\n" not in first


def ends_at_once(rank: int) -> None:
    os._exit(3)


def its_rank(rank: int) -> int:
    return rank


def test_a_test_that_fails_in_two_processes_leaves_no_answers_to_the_next(
    two_processes: TwoProcesses,
) -> None:
    def fail(pids: list[int], first_answers: Callable[[], bool]) -> None:
        raise AssertionError("meanwhile")

    with pytest.raises(AssertionError, match="meanwhile"):
        two_processes.unconnected(ends_at_once, meanwhile=fail)
    assert two_processes.unconnected(its_rank) == [0, 1]
    with pytest.raises(pytest.fail.Exception, match="a process ended in .*ends_at_once"):
        two_processes.unconnected(ends_at_once)
    assert two_processes.unconnected(its_rank) == [0, 1]


# ------------------------------------------------------------------------------ other settings

OTHER = {**SETTINGS, "adamw": {**SETTINGS["adamw"], "per_layer": True}}


@pytest.mark.parametrize("name", OTHER)
def test_other_settings(name: str, home: Home) -> None:
    short_run(home, name, SHORT | OTHER[name])
    assert_nothing_is_left_to_do(home, name, SHORT | OTHER[name])


@pytest.mark.slow
def test_compiled(home: Home) -> None:
    assert home.run("eager", **SHORT) == 0
    assert home.run("compiled", **SHORT, compile=True) == 0
    assert differences(home / "compiled", home / "eager", "loss") < 1e-4


def test_wandb_gets_the_same_numbers(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    sent: list[tuple[int, dict[str, Any]]] = []
    run = types.SimpleNamespace(
        log=lambda values, step: sent.append((step, values)), finish=lambda: sent.append((-1, {}))
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: run  # type: ignore[attr-defined]
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert home.run("watched", **SHORT, wandb=True) == 0
    losses = [r["loss"] for r in read_metrics(home / "watched") if r["kind"] == "train"]
    assert [v["train/loss"] for _, v in sent if "train/loss" in v] == losses
    assert [step for step, _ in sent] == [1, 2, 2, 3, 3, 3, -1]


def test_wandb_that_is_not_installed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--wandb: wandb is not installed; pip install wandb"):
        home.run("mistaken", wandb=True)
