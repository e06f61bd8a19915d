"""Whole runs of a tiny model on a tiny text, and the requirements on them for either trainer.

`trainers/test_train_jax.py` and `trainers/test_train_torch.py` each inherit `RunTests` and define
its fixtures `home` and `reference`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from launch.data import TrainBatches, load_tokenizer, open_data
from launch.trainer import picture
from launch.trainer.cli import UsageError
from launch.trainer.directory import claimed
from launch.trainer.files import read_metrics
from launch.trainer.loop import STOPPED
from launch.trainer.options import Options
from launch.trainer.run_log import TIMING
from osd_names import FULL_RANK_OPTIMIZERS
from parity_tests.support import ROOT

STEPS, EVAL_EVERY, SAVE_EVERY = 60, 20, 7
REFERENCE = "reference"  # the run without interruption
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
# Three updates of one micro-batch.
SHORT: dict[str, Any] = {
    "num_training_steps": 3, "warmup_steps": 1, "eval_every": 2, "eval_tokens": 100,
    "sample_tokens": 0, "total_batch_size": None,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "8bit": {
        "optimizer": "galore_adamw8bit",
        "proj_type": "continuous_adam8bit",
        "update_proj_every": 2,
        "dtype": "bfloat16",
        "activation_checkpointing": True,
        "workers": 1,
        "gradient_accumulation": 2,
        "grad_clipping": 1.0,
    },
    "lion": {"optimizer": "galore_lion", "proj_type": "continuous_lion", "lion_sign": "subspace"},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "paper": {
        "proj_type": "continuous",
        "penalty": 0.1,
        "projector_lr_multiple": 5.0,
        "move_projector": "before",
    },
    "muon": {
        "optimizer": "osd_muon",
        "proj_type": "continuous",
        "full_lr": 0.01,
        "momentum": 0.8,
        "second_moment": "row",
        "first_moment": "8bit",
        "stochastic_rounding": True,
        "dtype": "bfloat16",
    },
    "fira": {"proj_type": "oja", "residual": "norm_ratio", "transport_moments": True},
    "restarts": {"optimizer": "sgd", "scheduler": "cosine_restarts", "cycle_length": 2},
}


@dataclasses.dataclass(frozen=True)
class Home:
    """A folder with a corpus, model configs and runs of one trainer.

    Attributes:
        path: The folder.
        trainer: `launch.train_jax` or `launch.train_torch`.
        command: The arguments with which Python runs it.
    """

    path: Path
    trainer: ModuleType
    command: tuple[str, ...]

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
            "single_gpu": "mesh" not in changes or None,  # JAX has 8 devices in the tests
        }
        values |= changes
        if values["optimizer"] in FULL_RANK_OPTIMIZERS:
            values |= dict.fromkeys(("proj_type", "rank", "update_proj_gap", "galore_scale"))
        if not str(values["optimizer"]).startswith("galore"):
            values["galore_scale"] = None
        flags: list[str] = []
        for key, value in values.items():
            if value is not None:
                flags += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        return flags

    def run(self, name: str, **changes: Any) -> int:
        """Runs in this process; only the reference draws its plot, which takes long."""
        with pytest.MonkeyPatch.context() as patch:
            if name != REFERENCE:
                patch.setattr(picture, "plot", lambda runs, out: out)
            return self.trainer.main(self.flags(name, **changes))

    def process(self, name: str, **changes: Any) -> subprocess.Popen[str]:
        return start([sys.executable, *self.command, *self.flags(name, **changes)])

    def __truediv__(self, name: str) -> Path:
        return self.path / "runs" / name


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def make_home(path: Path, trainer: ModuleType, *command: str) -> Home:
    home = Home(path, trainer, command)
    model(home, "model")
    words = ["the", "of", "people", "union", "state", "government", "congress", "year", "peace"]
    draw = random.Random(0)
    paragraphs = [" ".join(draw.choices(words, k=60)) + "." for _ in range(40)]
    (path / "corpus.txt").write_text("\n\n".join(paragraphs))  # less than the run reads
    return home


def model(home: Home, name: str, **changes: Any) -> Path:
    path = home.path / f"{name}.json"
    path.write_text(json.dumps(MODEL | changes))
    return path


@dataclasses.dataclass
class Reference:
    """The run without interruption, what it showed, and what JAX compiled in it."""

    path: Path
    shown: str
    compiled: list[str] = dataclasses.field(default_factory=list)


def make_reference(home: Home) -> Reference:
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tqdm.tqdm.write", lambda text, **_: shown.append(text))
        assert home.run(REFERENCE, keep=20) == 0
    return Reference(home / REFERENCE, "\n".join(shown))


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


def hide_all(batch: dict[str, np.ndarray]) -> None:
    """Leaves nothing to predict: the loss is 0 / 0."""
    batch["mask"][:] = False


def assert_absent_directory_stays_absent(kind: Any, parent: Path) -> None:
    """Checkpoints (of a library's class `kind`) of a directory that is not there are none."""
    for keep in (None, 2):
        checkpoints = kind(parent / "none", keep)
        assert checkpoints.steps() == []
        checkpoints.set_aside_after(0)
    assert list(parent.iterdir()) == []


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond this size fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def common_mistakes(home: Home, reference: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> changed options, and what the message has to say."""
    (home.path / "empty.txt").write_text("")
    (home.path / "blank.txt").write_text(" \n\n")
    old, weights = reference / "checkpoints", reference / "model"
    alike = "another model or optimizer"
    return {
        "missing file": ({"dataset": "text:none/*.txt"}, r"no file matches none/\*\.txt"),
        "empty file": ({"dataset": f"text:{home.path}/empty.txt"}, r"empty\.txt is empty"),
        "blank file": ({"dataset": f"text:{home.path}/blank.txt"}, r"blank\.txt contain no text"),
        "vocabulary": (
            {"model_config": model(home, "small", vocab_size=200)},
            r"vocabulary of 258, but the model one of 200: give a model config with vocab_size 258",
        ),
        "heads": (
            {"model_config": model(home, "heads", num_attention_heads=5)},
            r"hidden_size 32 is not a multiple of num_attention_heads 5",
        ),
        "no checkpoint": ({"continue_from": home.path}, r"has no complete checkpoint"),
        "other size": (
            {"continue_from": old, "model_config": model(home, "wide", hidden_size=40)},
            rf"{alike}: .*float32\[.*32.*there and float32\[.*40.*in this run; use the options",
        ),
        "other optimizer": ({"continue_from": old, "optimizer": "adamw"}, alike),
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
            {"continue_from": weights, "model_config": model(home, "deep", num_hidden_layers=3)},
            r"holds another model: its num_hidden_layers is 2, but --model_config has 3; give its",
        ),
        "same run, other rank": (
            {"name": "reference", "resume": True, "rank": 5},
            r"--rank: .*reference was started with 4, not 5",
        ),
        "its own model": (
            {"name": "reference", "continue_from": weights},
            r"is this run's own model, with weights only; resume .* --resume",
        ),
        "a run is there": ({"name": "reference"}, r"reference already contains a run; .*--resume"),
        **{
            name: ({"continue_from": folder, "dataset": f"text:{home.path}/blank.txt"}, message)
            for name, (folder, message) in unreadable_models(home.path, weights).items()
        },
        "torn data": (
            {"dataset": f"text:{torn_data(home.path)}"},
            r"cannot read .*torn\.json\.gz.*; the file is damaged .*fetch or write it again",
        ),
        "C4 without validation": (
            {"dataset": "c4", "data_dir": c4_folder(home.path / "half", validation=0)},
            r"--data_dir: .*half/en has no c4-validation\.\*\.json\.gz: add C4's validation files",
        ),
        "another column": (
            {"dataset": f"text:{c4_folder(home.path / 'c4')}", "text_column": "body"},
            r'en/c4-train.*, line 1: no "body" there, only "url", "text".* by --text_column',
        ),
    }


def unreadable_models(path: Path, weights: Path) -> dict[str, tuple[Path, str]]:
    """Folders of models that neither trainer reads, and what the message has to say of each."""
    index = "model.safetensors.index.json"
    one, two = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    whole = (weights / "model.safetensors").read_bytes()
    shards = json.dumps({"weight_map": {"a": one, "b": two}}).encode()
    config = {"config.json": (weights / "config.json").read_bytes()}
    neither = r"has neither model\.safetensors nor model\.safetensors\.index\.json"
    way_out = r": load the model with transformers and save it with save_pretrained"
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    cases: dict[str, tuple[dict[str, bytes], str]] = {
        name: ({**config, name: b"x"}, rf"{neither}, only {name}{way_out}")
        for name in (
            "pytorch_model.bin", "pytorch_model.bin.index.json", "model.ckpt.index", "tf_model.h5",
            "flax_model.msgpack", "consolidated.00.pth", one,
        )
    }  # fmt: skip
    cases |= {
        "no weights": (config, neither + way_out),
        "no model at all": ({}, "is empty; give the directory of a run"),
        "no config": ({"model.safetensors": whole}, r"has model\.safetensors but no config\.json"),
        "no config, old weights": (
            {"pytorch_model.bin": b"x"},
            r"has pytorch_model\.bin but no config\.json, which describes .*; put the model's",
        ),
        "a lost shard": (
            {**config, index: shards, one: whole},
            rf"names 2 shards, but 1 are missing, {two} first: fetch them",
        ),
        "half a shard": (
            {**config, index: shards, one: whole, two: whole[: len(whole) // 2]},
            rf"{two} is not a readable safetensors file: .*; fetch or save it again",
        ),
        "a pointer": (
            {**config, "model.safetensors": pointer},
            r"model\.safetensors is not a readable safetensors file: .*git lfs pull",
        ),
        "no index": ({**config, index: b"[]"}, r"index\.json is not an index of .*save it again"),
        "index of .bin": (
            {**config, index: shards.replace(b".safetensors", b".bin")},
            r"is not an index of safetensors shards: .*model-00001-of-00002\.bin",
        ),
    }
    folders = {}
    for number, (name, (files, message)) in enumerate(cases.items()):
        folder = path / f"unreadable-{number}"
        folder.mkdir(exist_ok=True)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        folders[name] = (folder, message)
    return folders


def torn_data(path: Path) -> Path:
    file = path / "torn.json.gz"
    file.write_bytes(gzip.compress(b'{"text": "some words"}\n' * 99)[:-9])
    return file


def c4_folder(path: Path, validation: int = 2) -> Path:
    """C4's own files, as small ones, in `en/`."""
    (path / "en").mkdir(parents=True, exist_ok=True)
    words = ["the", "of", "people", "union", "state", "government", "congress", "year", "peace"]
    draw = random.Random(0)
    for split, number, of in (("train", 3, 1024), ("validation", validation, 8)):
        for i in range(number):
            texts = [" ".join(draw.choices(words, k=draw.randrange(3, 20))) for _ in range(20)]
            lines = (json.dumps({"url": "x", "text": text}) + "\n" for text in texts)
            file = path / "en" / f"c4-{split}.{i:05d}-of-{of:05d}.json.gz"
            file.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return path


def short_run(home: Home, name: str, settings: dict[str, Any]) -> None:
    """Three updates, with an evaluation in the middle and at the end."""
    assert home.run(name, **settings) == 0
    lines = read_metrics(home / name)
    assert [r["step"] for r in lines] == [1, 2, 2, 3, 3, 3]
    assert all(np.isfinite(r["loss"]) for r in lines)


def assert_nothing_is_left_to_do(home: Home, name: str, settings: dict[str, Any]) -> None:
    """Resuming from the last checkpoint prints the same again."""
    before = timeless(home / name)
    assert home.run(name, **settings, resume=True) == 0
    assert timeless(home / name) == before


class RunTests:
    """What holds of a run with either trainer.

    Attributes:
        checkpoints: The library's `Checkpoints`.
        unfinished: What the names of checkpoints look like that are being written.
        indispensable: A file without which a checkpoint is damaged.
        says: What only this trainer says in the beginning.
        kills: How often a run is killed in the slow test.
        loss_tolerance: Against transformers' model in float32.
    """

    checkpoints: Any
    unfinished: str
    indispensable: str
    says: tuple[str, ...]
    kills: int
    loss_tolerance: float

    def loss(self, folder: Path, batch: Any) -> float:
        """The mean loss of a batch by the model in a folder."""
        raise NotImplementedError

    def test_a_run_learns_and_leaves_all_that_it_should(self, reference: Reference) -> None:
        lines = read_metrics(reference.path)
        kinds = {
            kind: [r for r in lines if r["kind"] == kind] for kind in ("train", "eval", "final")
        }
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
        steps = self.checkpoints(reference.path / "checkpoints").steps()
        assert steps == [60, 56, 49, 42, 35, 28, 21, 14, 7]

    def test_what_a_run_says(self, reference: Reference) -> None:
        assert "model: 0.0 M parameters (float32) on cpu, from the start" in reference.shown
        assert "60 updates of 256 tokens" in reference.shown
        assert all(text in reference.shown for text in self.says)
        assert "step 20: validation loss" in reference.shown
        assert "from token frequencies alone it would be" in reference.shown
        assert f"The model is in {reference.path / 'model'}" in reference.shown

    def test_transformers_reads_the_model_and_gives_the_same_loss(
        self, reference: Reference, home: Home
    ) -> None:
        torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
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
        tokens = torch.from_numpy(batch["tokens"]).long()
        with torch.no_grad():
            theirs = model(tokens, labels=tokens).loss
        assert batch["mask"].all()
        assert self.loss(folder, batch) == pytest.approx(float(theirs), abs=self.loss_tolerance)

    def test_kill_9_and_resume_is_the_same_run(self, reference: Reference, home: Home) -> None:
        lines = random.randrange(SAVE_EVERY, STEPS)
        process = home.process("killed", resume=True)
        killed = kill_when(process, lambda: lines_in(home / "killed") >= lines)
        assert killed and not (home / "killed" / "model").exists()
        assert home.run("killed", resume=True) == 0
        assert_same_end(home / "killed", reference.path)

    @pytest.mark.slow
    @pytest.mark.parametrize("number", range(10))
    def test_ten_kills(self, number: int, reference: Reference, home: Home) -> None:
        """Each again and again in one run: at random lines of the log, and amid saves."""
        name, draw = f"killed-{number}", random.Random(number)
        kills, goal = 0, 0
        for _ in range(self.kills):
            goal = draw.randrange(goal, STEPS + 3)
            directory = home / name / "checkpoints"

            def is_saving(directory: Path = directory, goal: int = goal) -> bool:
                found = [path.name for path in directory.glob(self.unfinished)]
                return any(int(name.partition(".")[0]) >= goal for name in found)

            def is_there(name: str = name, goal: int = goal) -> bool:
                return lines_in(home / name) >= goal

            process = home.process(name, resume=True)
            kills += kill_when(process, is_saving if draw.random() < 0.5 else is_there)
        process = home.process(name, resume=True)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert kills > 0
        assert_same_end(home / name, reference.path)

    def test_continue_from_another_run_under_a_new_name(
        self, reference: Reference, home: Home
    ) -> None:
        before = everything(reference.path)
        assert home.run("branch", continue_from=reference.path / "checkpoints" / "42") == 0
        assert_same_end(home / "branch", reference.path, after=42)
        assert min(record["step"] for record in read_metrics(home / "branch")) == 43
        assert everything(reference.path) == before

    def test_continue_from_an_older_checkpoint_of_the_same_run(
        self, reference: Reference, home: Home
    ) -> None:
        """Later checkpoints are computed again, and saved."""
        run = copy(reference.path, home, "back")
        stamp = (run / "checkpoints" / "56").stat().st_mtime_ns
        assert home.run("back", continue_from=run / "checkpoints" / "49", keep=3) == 0
        assert_same_end(run, reference.path)
        assert self.checkpoints(run / "checkpoints").steps() == [60, 56, 49]
        assert (run / "checkpoints" / "56").stat().st_mtime_ns > stamp

    def test_where_all_checkpoints_are_damaged_nothing_is_lost(
        self, reference: Reference, home: Home
    ) -> None:
        run = copy(reference.path, home, "ruined", newest=14)
        for step in (7, 14):
            os.truncate(run / "checkpoints" / str(step) / self.indispensable, 10)
        before = everything(run)
        with pytest.raises(
            UsageError, match=r"no checkpoint in .*checkpoints can be read; .*--overw"
        ):
            home.run("ruined", resume=True)
        assert everything(run) == before

    def test_a_run_whose_checkpoints_are_elsewhere_is_not_started_anew(
        self, reference: Reference, home: Home
    ) -> None:
        run = copy(reference.path, home, "moved", newest=14)
        places = [home.path / name for name in ("elsewhere", "nowhere")]
        places[0].mkdir()
        (run / "checkpoints").rename(places[0] / "checkpoints")
        before = everything(run)
        lost = r"--resume: the log in .*moved has 60 updates, but there is no checkpoint in"
        with pytest.raises(UsageError, match=lost):
            home.run("moved", resume=True)
        with pytest.raises(
            UsageError, match=r"saved its checkpoints in .*moved, but.*leave --save"
        ):
            home.run("moved", resume=True, save_dir=places[1])
        assert everything(run) == before
        assert home.run("moved", resume=True, save_dir=places[0], keep=20) == 0
        assert timeless(run) == timeless(reference.path)
        with pytest.raises(
            UsageError, match=r"saved.* in .*/elsewhere, but.*give --save_dir .*/els"
        ):
            home.run("moved", resume=True)

    def test_the_log_of_a_run_that_was_killed_before_its_first_checkpoint_is_set_aside(
        self, home: Home
    ) -> None:
        run = home / "short"
        settings = {**SHORT, "resume": True}
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text('{"kind": "train", "step": 2, "seconds": 1}\n')
        assert home.run("short", **settings) == 0
        assert '"step": 2, "seconds": 1}' in (run / "metrics.jsonl.set-aside").read_text()
        assert read_metrics(run)[0]["step"] == 1

    def test_signals_stop_with_a_checkpoint_and_resume_goes_on(
        self, reference: Reference, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        """SIGTERM at a step that an evaluation is due for; then SIGINT."""
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        start = 0
        for number, step in ((signal.SIGTERM, 20), (signal.SIGINT, 33)):
            batch = 2 * (step - start - 1)  # the first of two in the update to this step
            stop = lambda batch, number=number: os.kill(os.getpid(), number)
            with monkeypatch.context() as patch:
                patch.setattr(TrainBatches, "__next__", at_batches(range(batch, batch + 1), stop))
                assert home.run("stopped", resume=True) == STOPPED
            assert self.checkpoints(home / "stopped" / "checkpoints").steps()[0] == step
            assert read_metrics(home / "stopped")[-1]["step"] == step
            said = capsys.readouterr().err
            assert "stopping after this update, with a checkpoint" in said
            assert f"stopped at step {step}; resume with the same command and --resume" in said
            start = step
        assert home.run("stopped", resume=True) == 0
        assert_same_end(home / "stopped", reference.path)
        assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def test_overwrite_starts_anew_and_max_train_tokens_counts_tokens(
        self, reference: Reference, home: Home
    ) -> None:
        run = copy(reference.path, home, "again", newest=21)
        (run / "metrics.jsonl").write_text('{"kind": "train", "step": 999}\n')
        tokens = STEPS * 256 + 255
        assert (
            home.run("again", overwrite=True, num_training_steps=None, max_train_tokens=tokens) == 0
        )
        assert_same_end(run, reference.path)

    def test_overwrite_deletes_only_what_a_run_leaves(
        self, reference: Reference, home: Home
    ) -> None:
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
        self, reference: Reference, home: Home
    ) -> None:
        """So that the command of an interrupted run needs no more than `--resume`."""
        started = {"continue_from": reference.path / "checkpoints" / "42", "resume": True}
        stop = lambda batch: os.kill(os.getpid(), signal.SIGTERM)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainBatches, "__next__", at_batches(range(10, 11), stop))
            assert home.run("20261124", **started) == STOPPED
        assert self.checkpoints(home / "20261124" / "checkpoints").steps()[0] == 48
        assert home.run("20261124", **started) == 0
        assert_same_end(home / "20261124", reference.path, after=42)
        # a run whose name looks like a step
        assert home.run("after", continue_from=home / "20261124") == 0

    def test_a_run_belongs_to_one_process(self, reference: Reference, home: Home) -> None:
        run = copy(reference.path, home, "claimed", newest=56)
        options = Options.parse(home.flags("claimed", resume=True)).check()
        before = everything(run)
        with (
            claimed(options),
            pytest.raises(UsageError, match="another process is writing to"),
        ):
            home.run("claimed", resume=True)
        assert {k: v for k, v in everything(run).items() if not k.endswith(".lock")} == {
            k: v for k, v in before.items() if not k.endswith(".lock")
        }

    def test_a_changed_option_is_told(self, reference: Reference, home: Home, capsys: Any) -> None:
        copy(reference.path, home, "changed", newest=56)
        assert home.run("changed", resume=True, lr=0.03) == 0
        assert "changed since its start: --lr 0.02 -> 0.03" in capsys.readouterr().err

    def test_continue_from_a_model_takes_its_weights_only(
        self, reference: Reference, home: Home, capsys: Any
    ) -> None:
        assert home.run("tuned", continue_from=reference.path / "model") == 0
        assert "Loading weights" not in capsys.readouterr().err  # a bar of transformers'
        first, last = timeless(home / "tuned")[0], timeless(reference.path)[-1]
        assert first["step"] == 1 and first["learning_rate"] == 0
        assert first["loss"] == pytest.approx(last["loss"], abs=0.3)
        before, after = (
            load_file(run / "model" / "model.safetensors")["model.embed_tokens.weight"]
            for run in (reference.path, home / "tuned")
        )
        assert not np.array_equal(before, after)

    def test_exit_code_2_and_one_line(self, home: Home) -> None:
        for changes, message in (
            ({"optimiser": "adamw"}, "--optimiser: no such flag; did you mean --optimizer?"),
            ({"model_config": "no.json"}, "--model_config: no file no.json"),
            ({"total_batch_size": 6}, "--total_batch_size: 6 is not a multiple of 4"),
        ):
            process = home.process("wrong", **changes)
            output, _ = process.communicate()
            assert process.returncode == 2
            assert output.startswith(f"error: {message}") and output.count("\n") == 1, output
        assert not (home / "wrong").exists()

    def test_c4_in_its_own_files(self, home: Home) -> None:
        """Trained on, and evaluated on the whole of C4's own validation split; and resumed."""
        place = c4_folder(home.path / "c4-own")
        c4 = {**SHORT, "dataset": "c4", "data_dir": place, "eval_tokens": None, "save_every": 2}
        assert home.run("c4-own", **c4) == 0
        lines = timeless(home / "c4-own")
        texts = [
            json.loads(line)["text"]
            for file in sorted((place / "en").glob("c4-validation.*"))
            for line in gzip.decompress(file.read_bytes()).splitlines()
        ]
        assert len(texts) == 40
        tokenizer = load_tokenizer("byte", "c4", cache_dir=home.path / "cache", vocab_size=300)
        data = open_data("c4", tokenizer, data_dir=place, cache_dir=home.path / "cache")
        assert [data.validation_documents[i].tolist()[:32] for i in range(40)] == [
            tokenizer.encode_document(text).tolist()[:32] for text in texts
        ]
        shutil.rmtree(home / "c4-own" / "checkpoints" / "3")
        shutil.rmtree(home / "c4-own" / "model")
        assert home.run("c4-own", **c4, resume=True) == 0
        assert timeless(home / "c4-own") == lines

    def test_token_arrays_have_no_tokenizer_and_no_sample(
        self, home: Home, caplog: pytest.LogCaptureFixture
    ) -> None:
        np.save(home.path / "ids.npy", np.random.default_rng(0).integers(0, 300, 4000))
        changes = {"dataset": f"tokens:{home.path}/ids.npy", "tokenizer": None}
        assert home.run("tokens", **(SHORT | changes | {"sample_tokens": 5})) == 0
        said = [message for message in caplog.messages if "in subspaces of rank 4" in message]
        assert len(said) == 1 and "100 % of those in linear maps inside the blocks" in said[0]
        assert read_metrics(home / "tokens")[-1]["sample"] is None
        config = json.loads((home / "tokens" / "model" / "config.json").read_text())
        assert config["eos_token_id"] == 8
