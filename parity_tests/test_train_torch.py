"""`launch/train_torch.py`, whole runs of a tiny model on a tiny text, in one process and in two.

Runs of one process are made in this one. Those of two are made in two worker processes, which are
started once and join anew for each run; a few go through torchrun itself.
"""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_options import PUBLISHED_7B, PUBLISHED_7B_GALORE, PUBLISHED_60M

from launch import train_torch, training
from launch.data import TrainBatches, load_tokenizer, open_data
from launch.options import FULL_RANK, Options, UsageError, run_cli
from launch.run_log import TIMING, read_metrics
from osd_torch import llama
from osd_torch.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
STEPS, EVAL_EVERY, SAVE_EVERY = 60, 20, 7
MODEL = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_sequence_length": 64,
    "bos_token_id": 7,  # not the tokenizer's, as in the published configs
    "eos_token_id": 8,
}
HANG = 120  # seconds after which a run of two processes has failed


@dataclasses.dataclass(frozen=True)
class Home:
    """A folder with a corpus, model configs and runs."""

    path: Path

    def flags(self, name: str, **changes: Any) -> list[str]:
        """A command line; an option that is None is left out, one that is True has no value."""
        values: dict[str, Any] = {
            "model_config": self.path / "model.json",
            "dataset": f"text:{self.path}/corpus.txt",
            "cache_dir": self.path / "cache",
            "tokenizer": "byte",
            "max_length": 32,
            "batch_size": 4,
            "total_batch_size": 8,
            "optimizer": "galore_adamw",
            "proj_type": "std",
            "rank": 4,
            "update_proj_gap": 10,
            "galore_scale": 0.25,
            "lr": 0.02,
            "warmup_steps": 8,
            "num_training_steps": STEPS,
            "eval_every": EVAL_EVERY,
            "eval_tokens": 1000,
            "save_every": SAVE_EVERY,
            "sample_tokens": 12,
            "run_dir": self.path / "runs",
            "name": name,
        }
        if changes.get("optimizer") in FULL_RANK:
            values |= dict.fromkeys(("proj_type", "rank", "update_proj_gap", "galore_scale"))
        flags: list[str] = []
        for key, value in (values | changes).items():
            if value is not None:
                flags += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        return flags

    def run(self, name: str, **changes: Any) -> int:
        return train_torch.main(self.flags(name, **changes))

    def process(self, name: str, **changes: Any) -> subprocess.Popen[str]:
        return start([sys.executable, "launch/train_torch.py", *self.flags(name, **changes)])

    def torchrun(self, processes: int, name: str, **changes: Any) -> subprocess.Popen[str]:
        return start([*torchrun(processes), *self.flags(name, **changes)])

    def __truediv__(self, name: str) -> Path:
        return self.path / "runs" / name


def torchrun(processes: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(processes), "launch/train_torch.py"]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(tmp_path_factory.mktemp("home"))
    (home.path / "model.json").write_text(json.dumps(MODEL))
    words = ["the", "of", "people", "union", "state", "government", "congress", "year", "peace"]
    draw = random.Random(0)
    paragraphs = [" ".join(draw.choices(words, k=60)) + "." for _ in range(40)]
    (home.path / "corpus.txt").write_text("\n\n".join(paragraphs))  # less than the run reads
    return home


@dataclasses.dataclass
class Reference:
    """The run without interruption."""

    path: Path
    shown: str


@pytest.fixture(scope="module")
def reference(home: Home) -> Reference:
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tqdm.tqdm.write", lambda text, **_: shown.append(text))
        assert home.run("reference", keep=20) == 0
    return Reference(home / "reference", "\n".join(shown))


def timeless(run: Path, after: int = 0) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key not in TIMING}
        for record in read_metrics(run)
        if record["step"] > after
    ]


def assert_same_end(run: Path, reference: Path, after: int = 0) -> None:
    """Every later metric and the final model, bit for bit."""
    assert timeless(run, after) == timeless(reference, after)
    for path in (reference / "model").iterdir():
        assert (run / "model" / path.name).read_bytes() == path.read_bytes(), path.name


def copy(reference: Path, home: Home, name: str, newest: int = STEPS) -> Path:
    """The reference as it would have been if killed after the save of step `newest`."""
    run = home / name
    shutil.copytree(reference, run)
    shutil.rmtree(run / "model")
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > newest:
            shutil.rmtree(path)
    return run


def everything(directory: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def at_batches(numbers: range, act: Callable[[dict[str, np.ndarray]], Any]) -> Any:
    """A `TrainBatches.__next__` that acts on the batches of these numbers, from 0."""
    real, count = TrainBatches.__next__, iter(range(10**6))

    def next_batch(self: TrainBatches) -> dict[str, np.ndarray]:
        batch = real(self)
        if next(count) in numbers:
            act(batch)
        return batch

    return next_batch


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model" / "model.safetensors")


# ------------------------------------------------------------------------------ two processes

Pair = Callable[..., list[Any]]


def serve(rank: int, connection: Connection) -> None:
    """One of two processes: runs the command lines that it is sent, until it is sent None."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    while (job := connection.recv()) is not None:
        port, flags = job
        os.environ["MASTER_PORT"] = str(port)
        try:
            connection.send(train_torch.main(flags))
        except UsageError as error:
            connection.send(str(error))
        except SystemExit as end:  # the first process tells why
            connection.send(end.code)


@pytest.fixture(scope="module")
def pair(home: Home) -> Iterator[Pair]:
    """Makes a run of two processes -> what each returned: an exit code, or a message."""
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(2)]
    workers = [
        context.Process(target=serve, args=(rank, end[1]), daemon=True)
        for rank, end in enumerate(ends)
    ]
    for worker in workers:
        worker.start()

    def run(name: str, flags: list[str] | None = None, **changes: Any) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for mine, _ in ends:
            mine.send((port, flags or home.flags(name, **changes)))
        answers = []
        for mine, _ in ends:
            assert mine.poll(HANG), "a process hangs"
            answers.append(mine.recv())
        return answers

    yield run
    for mine, _ in ends:
        mine.send(None)
    for worker in workers:
        worker.join(10)
        worker.kill()


# The published gap: P moves slowly, as it does in the published runs.
ROWS: dict[str, Any] = {
    "no-pack": True,
    "num_training_steps": 20,
    "warmup_steps": 4,
    "eval_every": 10,
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


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(mode: str, pair: Pair, one_process: Path, home: Home) -> None:
    """The same rows an update, so the same losses but for the order of sums.

    Where only sketches are reduced, the mean of the parts' squared norms stands in for that of the
    mean (`osd_torch.sharding`); at the published gap that moves P by too little to be seen.
    """
    assert pair(mode, **{**ROWS, **MODES[mode]}) == [0, 0]
    assert differences(home / mode, one_process, "loss") < 1e-4
    if "compressed" not in mode and "layer" not in mode:
        energies = [k for k in timeless(one_process)[9] if k.startswith(("energy", "ortho"))]
        assert len(energies) == 14
        assert differences(home / mode, one_process, "gradient_norm", *energies) < 1e-4


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
    process = home.torchrun(2, "mistaken", model_config=model(home, "odd", num_attention_heads=5))
    output, _ = process.communicate()
    assert process.returncode != 0
    assert output.count("hidden_size 32 is not a multiple of num_attention_heads 5") == 1, output
    assert not (home / "mistaken").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_is_killed_and_both_end(victim: int, home: Home) -> None:
    """And --resume goes on, as if nothing had been."""
    settings = {"batch_size": 2, "keep": 20}
    whole, name = home / "torchrun", f"torchrun, {victim} killed"
    if not whole.exists():
        output, _ = (process := home.torchrun(2, "torchrun", **settings)).communicate()
        assert process.returncode == 0, output
    process = home.torchrun(2, name, **settings)
    while process.poll() is None and lines_in(home / name) < 20:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    workers = sorted(int(word) for word in children.split())
    os.kill(workers[victim], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert Checkpoints(home / name / "checkpoints").steps()
    process = home.torchrun(2, name, resume=True, **settings)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_same_end(home / name, whole)


@pytest.mark.slow
def test_torchrun_stops_with_a_checkpoint_on_sigterm(home: Home) -> None:
    process = home.torchrun(2, "terminated", num_training_steps=2000)
    while process.poll() is None and lines_in(home / "terminated") < 5:
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=60)
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
        {"proj_type": "continuous"},
        pytest.param({"optimizer": "galore_adafactor"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "galore_lion", "lr": 0.002}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "adamw"}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: settings.get("optimizer", "galore_adamw"),
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

    last = {"num_training_steps": 1, "continue_from": runs[1] / "model", "warmup_steps": 0}
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
    from osd_torch.train import make_train_step

    config = llama.load_config(home.path / "model.json")
    net = llama.build(config, seed=0, dtype=torch.bfloat16)
    opt = osd_torch.make_optimizer(
        net.named_parameters(), optimizer, "continuous", lr=0.01, rank=4
    )  # fmt: skip
    train_step = make_train_step(net, opt, lr=0.01, schedule=lambda step: 1.0)
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


def test_a_run_learns_and_leaves_all_that_it_should(reference: Reference) -> None:
    lines = read_metrics(reference.path)
    kinds = {kind: [r for r in lines if r["kind"] == kind] for kind in ("train", "eval", "final")}
    assert [r["step"] for r in kinds["train"]] == list(range(1, STEPS + 1))
    assert [r["step"] for r in kinds["eval"]] == [20, 40, 60]
    assert kinds["train"][-1]["tokens"] == STEPS * 8 * 32
    assert kinds["train"][0]["learning_rate"] == 0
    assert kinds["train"][8]["learning_rate"] == pytest.approx(0.02)
    measured = {r["step"] for r in kinds["train"] if "energy/attention/query" in r}
    assert measured == {20, 40, 60}
    assert all(r["skipped"] == 0 for r in kinds["train"])
    assert kinds["train"][0]["loss"] == pytest.approx(np.log(300), abs=0.1)
    [final] = kinds["final"]
    assert final["loss"] == kinds["eval"][-1]["loss"] < kinds["train"][0]["loss"] - 2
    assert final["sample"].startswith("The")

    names = {path.name for path in reference.path.iterdir()}
    assert {"options.json", "metrics.jsonl", "loss.png", "checkpoints", "model"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    steps = Checkpoints(reference.path / "checkpoints").steps()
    assert steps == [60, 56, 49, 42, 35, 28, 21, 14, 7]


def test_what_a_run_says(reference: Reference) -> None:
    assert "model: 0.0 M parameters (float32) on cpu, from the start" in reference.shown
    assert "galore_adamw, std, rank 4: weights 0.1 MiB" in reference.shown
    assert "60 updates of 256 tokens" in reference.shown
    assert "optimizer state 0." in reference.shown
    assert "step 20: validation loss" in reference.shown
    assert "from token frequencies alone it would be" in reference.shown
    assert f"The model is in {reference.path / 'model'}" in reference.shown


def test_transformers_reads_the_model_and_gives_the_same_loss(
    reference: Reference, home: Home
) -> None:
    import transformers

    folder = reference.path / "model"
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == words.eos_token_id == 1
    text = "the people of the union"
    tokenizer = load_tokenizer("byte", "builtin", cache_dir=home.path / "cache", vocab_size=300)
    assert words(text)["input_ids"] == tokenizer.encode_batch([text])[0].tolist()
    data = open_data(
        f"text:{home.path}/corpus.txt", tokenizer, cache_dir=home.path / "cache", max_length=32
    )
    batch = next(data.validation(4))
    tokens, mask = (torch.from_numpy(batch[name]) for name in ("tokens", "mask"))
    with torch.no_grad():
        total, count = llama.loss(llama.load_hf(folder), tokens, mask)
        theirs = model(tokens.long(), labels=tokens.long()).loss
    assert batch["mask"].all()
    assert float(total / count) == pytest.approx(float(theirs), abs=1e-5)


# --------------------------------------------------------------------------------- going on


def kill_when(process: subprocess.Popen[str], is_time: Callable[[], bool]) -> bool:
    """kill -9 once it is time; False if the process ended before."""
    while process.poll() is None and not is_time():
        time.sleep(0.002)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def lines_in(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def test_kill_9_and_resume_is_the_same_run(reference: Reference, home: Home) -> None:
    lines = random.randrange(SAVE_EVERY, STEPS)
    process = home.process("killed", resume=True)
    killed = kill_when(process, lambda: lines_in(home / "killed") >= lines)
    assert killed and not (home / "killed" / "model").exists()
    assert home.run("killed", resume=True) == 0
    assert_same_end(home / "killed", reference.path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_ten_kills(number: int, reference: Reference, home: Home) -> None:
    """Each again and again in one run: at random lines of the log, and in the midst of saves."""
    name, draw = f"killed-{number}", random.Random(number)
    kills, goal = 0, 0
    for _ in range(3):
        goal = draw.randrange(goal, STEPS + 3)
        directory = home / name / "checkpoints"

        def is_saving(directory: Path = directory, goal: int = goal) -> bool:
            return any(int(path.stem) >= goal for path in directory.glob("*.tmp"))

        def is_there(name: str = name, goal: int = goal) -> bool:
            return lines_in(home / name) >= goal

        process = home.process(name, resume=True)
        kills += kill_when(process, is_saving if draw.random() < 0.5 else is_there)
    process = home.process(name, resume=True)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert kills > 0
    assert_same_end(home / name, reference.path)


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
    """Accumulated, but for the first."""
    settings = {"num_training_steps": 12, "eval_every": 4, "save_every": 5, **STOPPED[name]}
    if "model_config" in settings:  # of more than the 4096 values from which on state is 8 bits
        settings["model_config"] = model(home, "wide", intermediate_size=2048)
    assert home.run(f"{name} whole", **settings) == 0
    stop = lambda batch: os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(TrainBatches, "__next__", at_batches(range(6, 7), stop))
        assert home.run(f"{name} stopped", **settings) == training.STOPPED
    assert Checkpoints(home / f"{name} stopped" / "checkpoints").steps()[0] < 12
    assert home.run(f"{name} stopped", resume=True, **settings) == 0
    assert_same_end(home / f"{name} stopped", home / f"{name} whole")


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "per layer"])
def test_two_processes_killed_and_resumed(mode: str, pair: Pair, home: Home) -> None:
    """After a kill there is the last checkpoint and a longer log."""
    settings = {"num_training_steps": 12, "eval_every": 6, "save_every": 5, **MODES[mode]}
    settings |= {"proj_type": "continuous", "batch_size": 2}
    whole = home / f"two, {mode}"
    assert pair(whole.name, **settings) == [0, 0]
    run = copy(whole, home, f"{whole.name}, killed", newest=5 if mode == "ddp" else 10)
    assert pair(run.name, resume=True, **settings) == [0, 0]
    assert_same_end(run, whole)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_another_number_of_processes_goes_on(
    mode: str, pair: Pair, one_process: Path, home: Home
) -> None:
    """Two -> one -> two; where each row is a document no document is lost."""
    settings = {**ROWS, "save_every": 6, "keep": 20, **MODES[mode]}
    name = f"{mode} two"
    assert pair(name, **settings) == [0, 0]
    run = copy(home / name, home, f"{mode} two, one", newest=6)
    stop_at_12 = {**settings, "batch_size": 8, "resume": True}
    with pytest.MonkeyPatch.context() as patch:
        stop = lambda batch: os.kill(os.getpid(), signal.SIGTERM)
        patch.setattr(TrainBatches, "__next__", at_batches(range(5, 6), stop))
        assert home.run(run.name, **stop_at_12) == training.STOPPED
    assert Checkpoints(run / "checkpoints").steps()[0] == 12
    assert pair(run.name, resume=True, **settings) == [0, 0]
    assert differences(run, one_process, "loss") < 1e-4


def test_continue_from_another_run_under_a_new_name(reference: Reference, home: Home) -> None:
    before = everything(reference.path)
    assert home.run("branch", continue_from=reference.path / "checkpoints" / "42") == 0
    assert_same_end(home / "branch", reference.path, after=42)
    assert min(record["step"] for record in read_metrics(home / "branch")) == 43
    assert everything(reference.path) == before


def test_continue_from_an_older_checkpoint_of_the_same_run(
    reference: Reference, home: Home
) -> None:
    """What is younger is made anew, and saved."""
    run = copy(reference.path, home, "back")
    stamp = (run / "checkpoints" / "56").stat().st_mtime_ns
    assert home.run("back", continue_from=run / "checkpoints" / "49", keep=3) == 0
    assert_same_end(run, reference.path)
    assert Checkpoints(run / "checkpoints").steps() == [60, 56, 49]
    assert (run / "checkpoints" / "56").stat().st_mtime_ns > stamp


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


def test_where_all_checkpoints_are_damaged_nothing_is_lost(
    reference: Reference, home: Home
) -> None:
    run = copy(reference.path, home, "ruined", newest=14)
    for step in (7, 14):
        os.truncate(run / "checkpoints" / str(step) / "optimizer.pt", 10)
    before = everything(run)
    with pytest.raises(UsageError, match=r"no checkpoint in .*checkpoints can be read; .*--overw"):
        home.run("ruined", resume=True)
    assert everything(run) == before


def test_signals_stop_with_a_checkpoint_and_resume_goes_on(
    reference: Reference, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """SIGTERM at a step that an evaluation is due for; then SIGINT."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    start = 0
    for number, step in ((signal.SIGTERM, 20), (signal.SIGINT, 33)):
        batch = 2 * (step - start - 1)  # the first of two in the update to this step
        stop = lambda batch, number=number: os.kill(os.getpid(), number)
        with monkeypatch.context() as patch:
            patch.setattr(TrainBatches, "__next__", at_batches(range(batch, batch + 1), stop))
            assert home.run("stopped", resume=True) == training.STOPPED
        assert Checkpoints(home / "stopped" / "checkpoints").steps()[0] == step
        assert read_metrics(home / "stopped")[-1]["step"] == step
        said = capsys.readouterr().err
        assert "stopping after this update, with a checkpoint" in said
        assert f"stopped at step {step}; go on with the same command and --resume" in said
        start = step
    assert home.run("stopped", resume=True) == 0
    assert_same_end(home / "stopped", reference.path)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_overwrite_starts_anew_and_max_train_tokens_counts_tokens(
    reference: Reference, home: Home
) -> None:
    run = copy(reference.path, home, "anew", newest=21)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 999}\n')
    tokens = STEPS * 256 + 255
    assert home.run("anew", overwrite=True, num_training_steps=None, max_train_tokens=tokens) == 0
    assert_same_end(run, reference.path)


def test_overwrite_deletes_only_what_a_run_leaves(reference: Reference, home: Home) -> None:
    run = copy(reference.path, home, "shared", newest=7)
    mine = [run / "checkpoints" / "mine.txt", run / "model" / "mine.txt"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert home.run("shared", overwrite=True) == 0
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    mine[1].unlink()
    assert_same_end(run, reference.path)


def test_resume_comes_before_the_place_that_the_run_continued_from(
    reference: Reference, home: Home
) -> None:
    """So that the command of an interrupted run needs no more than `--resume`."""
    started = {"continue_from": reference.path / "checkpoints" / "42", "resume": True}
    stop = lambda batch: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainBatches, "__next__", at_batches(range(10, 11), stop))
        assert home.run("20261124", **started) == training.STOPPED
    assert Checkpoints(home / "20261124" / "checkpoints").steps()[0] == 48
    assert home.run("20261124", **started) == 0
    assert_same_end(home / "20261124", reference.path, after=42)


def test_a_run_belongs_to_one_process(reference: Reference, home: Home) -> None:
    run = copy(reference.path, home, "claimed", newest=56)
    options = Options.parse(home.flags("claimed", resume=True)).check()
    before = everything(run)
    with (
        training.claimed(options),
        pytest.raises(UsageError, match="another process is writing to"),
    ):
        home.run("claimed", resume=True)
    assert {k: v for k, v in everything(run).items() if not k.endswith(".lock")} == {
        k: v for k, v in before.items() if not k.endswith(".lock")
    }


def test_a_changed_option_is_told(reference: Reference, home: Home, capsys: Any) -> None:
    copy(reference.path, home, "changed", newest=56)
    assert home.run("changed", resume=True, lr=0.03) == 0
    assert "changed since it began: --lr 0.02 -> 0.03" in capsys.readouterr().err


def test_continue_from_a_model_takes_its_weights_only(reference: Reference, home: Home) -> None:
    assert home.run("tuned", continue_from=reference.path / "model") == 0
    first, last = timeless(home / "tuned")[0], timeless(reference.path)[-1]
    assert first["step"] == 1 and first["learning_rate"] == 0
    assert first["loss"] == pytest.approx(last["loss"], abs=0.3)


def test_another_learning_rate_takes_effect_on_going_on(reference: Reference, home: Home) -> None:
    run = copy(reference.path, home, "slower", newest=42)
    assert home.run("slower", resume=True, lr=0.001, keep=20) == 0
    assert read_metrics(run)[-3]["learning_rate"] == pytest.approx(0.0001, rel=0.1)
    a, b = (weights(r / "checkpoints" / "49") for r in (run, reference.path))
    assert not torch.equal(a["lm_head.weight"], b["lm_head.weight"])


# ------------------------------------------------------------------------ losses that are no number


def hide_all(batch: dict[str, np.ndarray]) -> None:
    """Leaves nothing to predict: the loss is 0 / 0."""
    batch["mask"][:] = False


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


def test_exit_code_2_and_one_line(home: Home) -> None:
    for changes, message in (
        ({"optimiser": "adamw"}, "--optimiser: no such flag; did you mean --optimizer?"),
        ({"total_batch_size": 6}, "--total_batch_size: 6 is not a multiple of 4"),
    ):
        process = home.process("wrong", **changes)
        output, _ = process.communicate()
        assert process.returncode == 2
        assert output.startswith(f"error: {message}") and output.count("\n") == 1, output
    assert not (home / "wrong").exists()


def model(home: Home, name: str, **changes: Any) -> Path:
    path = home.path / f"{name}.json"
    path.write_text(json.dumps(MODEL | changes))
    return path


def mistakes(home: Home, reference: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> changed options, and what the message has to say."""
    (home.path / "blank.txt").write_text(" \n\n")
    old, folder = reference / "checkpoints", reference / "model"
    alike = "another model or optimizer"
    return {
        "blank file": ({"dataset": f"text:{home.path}/blank.txt"}, r"no text in .*blank\.txt"),
        "no LLaMA": (
            {"model_config": model(home, "gpt", model_type="gpt2")},
            r"gpt\.json describes a 'gpt2' model, expected 'llama'",
        ),
        "vocabulary": (
            {"model_config": model(home, "small", vocab_size=200)},
            r"vocabulary of 258, and the model one of 200: give a model config with vocab_size 258",
        ),
        "heads": (
            {"model_config": model(home, "heads", num_attention_heads=5)},
            r"hidden_size 32 is not a multiple of num_attention_heads 5",
        ),
        "key heads": (
            {"model_config": model(home, "keys", num_key_value_heads=3)},
            r"num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        "no checkpoint": ({"continue_from": home.path}, r"has no complete checkpoint"),
        "other size": (
            {"continue_from": old, "model_config": model(home, "wide", hidden_size=40)},
            rf"{alike}: .*float32\[.*32.*there and float32\[.*40.*in this run; use the options",
        ),
        "other optimizer": ({"continue_from": old, "optimizer": "adamw"}, alike),
        "other rank": ({"continue_from": old, "rank": 5}, rf"{alike}: .*rank 4 there and .*rank 5"),
        "other dtype": ({"continue_from": old, "dtype": "bfloat16"}, rf"{alike}: .*bfloat16"),
        "other seed": (
            {"continue_from": old, "seed": 1},
            r"--seed: .*checkpoints/60 was started with 0, not 1",
        ),
        "other heads": (
            {"continue_from": old, "model_config": model(home, "eight", num_attention_heads=8)},
            r"--model_config: num_attention_heads: .*/60 was started with 4, not 8",
        ),
        "other batch": (
            {"continue_from": old, "total_batch_size": 16},
            r"--total_batch_size: .*/60 was started with 8, not 16",
        ),
        "fewer steps": (
            {"continue_from": old, "num_training_steps": 50},
            r"--num_training_steps: 50 is less than the 60 updates",
        ),
        "other weights": (
            {"continue_from": folder, "model_config": model(home, "deep", num_hidden_layers=3)},
            r"holds another model: its num_hidden_layers is 2, and --model_config has 3; give its",
        ),
        "same run, other rank": (
            {"name": "reference", "resume": True, "rank": 5},
            r"--rank: .*reference was started with 4, not 5",
        ),
        "its own model": (
            {"name": "reference", "continue_from": folder},
            r"is this run's own model, with weights only; go on .* --resume",
        ),
        "a run is there": ({"name": "reference"}, r"reference holds a run already; .*--resume"),
        "P before W": (
            {"per_layer": True, "proj_type": "continuous", "move_projector": "before"},
            r"move_projector",
        ),
        "sharded by layer": ({"per_layer": True, "fsdp": True}, r"--fsdp: .*use one of the two"),
        "compressed shards": (
            {"compress_gradients": True, "fsdp": True},
            r"--compress_gradients: --fsdp reduces .*use one of the two",
        ),
        "nothing to compress": (
            {"compress_gradients": True, "optimizer": "adamw"},
            r"--compress_gradients: only a galore_\* optimizer takes it",
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
        with pytest.raises(UsageError, match=r"cannot meet at 127.0.0.1:\d+: .*--master_port"):
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


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond this size fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
    assert "File too large" in last and "make room there, or save elsewhere" in last
    assert everything(home / "full" / "checkpoints") == before


# ------------------------------------------------------------------------------ other settings

SHORT: dict[str, Any] = {
    "num_training_steps": 3, "warmup_steps": 1, "eval_every": 2, "eval_tokens": 100,
    "sample_tokens": 0, "total_batch_size": None,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "8bit": {
        "optimizer": "galore_adamw8bit",
        "proj_type": "continuous_adam8bit",
        "dtype": "bfloat16",
        "activation_checkpointing": True,
        "workers": 1,
        "gradient_accumulation": 2,
        "grad_clipping": 1.0,
    },
    "lion": {"optimizer": "galore_lion", "proj_type": "continuous_lion", "lion_sign": "subspace"},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "per_layer": True},
    "paper": {
        "proj_type": "continuous",
        "penalty": 0.1,
        "projector_lr_multiple": 5.0,
        "move_projector": "before",
    },
    "restarts": {"optimizer": "sgd", "scheduler": "cosine_restarts", "cycle_length": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings(name: str, home: Home) -> None:
    assert home.run(name, **(SHORT | SETTINGS[name])) == 0
    lines = read_metrics(home / name)
    assert [r["step"] for r in lines] == [1, 2, 2, 3, 3, 3]
    assert all(np.isfinite(r["loss"]) for r in lines)
    # Going on from the last checkpoint finds nothing left to do, and says the same once more.
    before = timeless(home / name)
    assert home.run(name, **(SHORT | SETTINGS[name]), resume=True) == 0
    assert timeless(home / name) == before


@pytest.mark.slow
def test_compiled(home: Home) -> None:
    assert home.run("eager", **SHORT) == 0
    assert home.run("compiled", **SHORT, compile=True) == 0
    assert differences(home / "compiled", home / "eager", "loss") < 1e-4


def test_token_arrays_have_no_tokenizer_and_no_sample(home: Home) -> None:
    np.save(home.path / "ids.npy", np.random.default_rng(0).integers(0, 300, 4000))
    changes = {"dataset": f"tokens:{home.path}/ids.npy", "tokenizer": None, "optimizer": "sgd"}
    assert home.run("tokens", **(SHORT | changes | {"sample_tokens": 5})) == 0
    assert read_metrics(home / "tokens")[-1]["sample"] is None
    config = json.loads((home / "tokens" / "model" / "config.json").read_text())
    assert config["eos_token_id"] == 8


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
