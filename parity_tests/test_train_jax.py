"""`python -m launch.train_jax`, whole runs of a tiny model on a tiny text.

Most runs are made in this process, with options that compile to one and the same program, so that
JAX's compilation cache serves all but the first.
"""

import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import train_jax, training
from launch.data import TrainBatches, load_tokenizer, open_data
from launch.options import FULL_RANK, Options, UsageError
from launch.run_log import TIMING, read_metrics
from osd_jax import llama
from osd_jax.checkpoint import Checkpoints
from osd_jax.train import make_eval_step

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


# TensorStore's reads of a damaged file end after Orbax has stopped waiting for them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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
        values |= changes
        if values["optimizer"] in FULL_RANK:
            values |= dict.fromkeys(("proj_type", "rank", "update_proj_gap", "galore_scale"))
        flags: list[str] = []
        for key, value in values.items():
            if value is not None:
                flags += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        return flags

    def run(self, name: str, **changes: Any) -> int:
        return train_jax.main(self.flags(name, **changes))

    def process(self, name: str, **changes: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.train_jax", *self.flags(name, **changes)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __truediv__(self, name: str) -> Path:
        return self.path / "runs" / name


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
    """The run without interruption, and what JAX compiled in it."""

    path: Path
    compiled: list[str]
    shown: str


@pytest.fixture(scope="module")
def reference(home: Home) -> Iterator[Reference]:
    compiled: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            compiled.append(record.getMessage())

    listener, dispatch = Listener(), logging.getLogger("jax._src.interpreters.pxla")
    dispatch.addHandler(listener)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("tqdm.tqdm.write", lambda text, **_: shown.append(text))
        assert home.run("reference", keep=20) == 0
    dispatch.removeHandler(listener)
    yield Reference(home / "reference", compiled, "\n".join(shown))


def timeless(run: Path, after: int = 0) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key not in TIMING}
        for record in read_metrics(run)
        if record["step"] > after
    ]


def assert_same_end(run: Path, reference: Reference, after: int = 0) -> None:
    """Every later metric and the final model, bit for bit."""
    assert timeless(run, after) == timeless(reference.path, after)
    for path in (reference.path / "model").iterdir():
        assert (run / "model" / path.name).read_bytes() == path.read_bytes(), path.name


def copy(reference: Reference, home: Home, name: str, newest: int = STEPS) -> Path:
    """The reference as it would have been if killed after the save of step `newest`."""
    run = home / name
    shutil.copytree(reference.path, run)
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
    assert "galore_adamw, std, rank 4: optimizer state" in reference.shown
    assert "60 updates of 256 tokens" in reference.shown
    assert "step 20: validation loss" in reference.shown
    assert "from token frequencies alone it would be" in reference.shown
    assert f"The model is in {reference.path / 'model'}" in reference.shown


def test_one_compilation_of_each_step_in_a_run(reference: Reference) -> None:
    """Over evaluations, refreshes of the projector and the end of the warmup."""
    for name in ("train_step", "eval_step", "write"):
        assert sum(f"Compiling jit({name})" in line for line in reference.compiled) == 1, name


def test_transformers_reads_the_model_and_gives_the_same_loss(
    reference: Reference, home: Home
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
    total, count = make_eval_step(llama.LlamaConfig.load(folder / "config.json"))(
        llama.load_hf(folder)[1], batch
    )
    tokens = torch.tensor(batch["tokens"], dtype=torch.long)
    with torch.no_grad():
        theirs = model(tokens, labels=tokens).loss
    assert batch["mask"].all()
    assert float(total / count) == pytest.approx(float(theirs), abs=1e-4)


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
    assert_same_end(home / "killed", reference)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_ten_kills(number: int, reference: Reference, home: Home) -> None:
    """Each again and again in one run: at random lines of the log, and in the midst of saves."""
    name, draw = f"killed-{number}", random.Random(number)
    kills, goal = 0, 0
    for _ in range(5):
        goal = draw.randrange(goal, STEPS + 3)
        directory = home / name / "checkpoints"

        def is_saving(directory: Path = directory, goal: int = goal) -> bool:
            found = [path.name for path in directory.glob("*orbax-checkpoint-tmp*")]
            return any(int(name.partition(".")[0]) >= goal for name in found)

        def is_there(name: str = name, goal: int = goal) -> bool:
            return lines_in(home / name) >= goal

        process = home.process(name, resume=True)
        kills += kill_when(process, is_saving if draw.random() < 0.5 else is_there)
    process = home.process(name, resume=True)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert kills > 0
    assert_same_end(home / name, reference)


def test_continue_from_another_run_under_a_new_name(reference: Reference, home: Home) -> None:
    before = everything(reference.path)
    assert home.run("branch", continue_from=reference.path / "checkpoints" / "42") == 0
    assert_same_end(home / "branch", reference, after=42)
    assert min(record["step"] for record in read_metrics(home / "branch")) == 43
    assert everything(reference.path) == before


def test_continue_from_an_older_checkpoint_of_the_same_run(
    reference: Reference, home: Home
) -> None:
    """What is younger is made anew, and saved."""
    run = copy(reference, home, "back")
    stamp = (run / "checkpoints" / "56").stat().st_mtime_ns
    assert home.run("back", continue_from=run / "checkpoints" / "49", keep=3) == 0
    assert_same_end(run, reference)
    assert Checkpoints(run / "checkpoints").steps() == [60, 56, 49]
    assert (run / "checkpoints" / "56").stat().st_mtime_ns > stamp


def test_a_damaged_checkpoint_is_passed_over(
    reference: Reference, home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy(reference, home, "damaged", newest=56)
    arrays = (run / "checkpoints" / "56" / "state").rglob("d/*")
    largest = max(arrays, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    (run / "checkpoints" / "49" / "extra" / "metadata").unlink()
    (run / "checkpoints" / "57.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "launch"):
        assert home.run("damaged", resume=True, keep=20) == 0
    for step in (56, 49):
        start = f"{run / 'checkpoints' / str(step)} is damaged and cannot be read: "
        assert any(m.startswith(start) and m.endswith("; passed over") for m in caplog.messages)
        assert (run / "checkpoints" / f"{step}.set-aside").is_dir()
    assert_same_end(run, reference)
    assert Checkpoints(run / "checkpoints").steps()[:4] == [60, 56, 49, 42]


def test_where_all_checkpoints_are_damaged_nothing_is_lost(
    reference: Reference, home: Home
) -> None:
    run = copy(reference, home, "ruined", newest=14)
    for step in (7, 14):
        os.truncate(run / "checkpoints" / str(step) / "state" / "manifest.ocdbt", 10)
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
    assert_same_end(home / "stopped", reference)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_overwrite_starts_anew_and_max_train_tokens_counts_tokens(
    reference: Reference, home: Home
) -> None:
    run = copy(reference, home, "anew", newest=21)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 999}\n')
    tokens = STEPS * 256 + 255
    assert home.run("anew", overwrite=True, num_training_steps=None, max_train_tokens=tokens) == 0
    assert_same_end(run, reference)


def test_overwrite_deletes_only_what_a_run_leaves(reference: Reference, home: Home) -> None:
    run = copy(reference, home, "shared", newest=7)
    mine = [run / "checkpoints" / "mine.txt", run / "model" / "mine.txt"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert home.run("shared", overwrite=True) == 0
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    mine[1].unlink()
    assert_same_end(run, reference)


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
    assert_same_end(home / "20261124", reference, after=42)
    # a run whose name looks like a step
    assert home.run("after", continue_from=home / "20261124") == 0


def test_a_run_belongs_to_one_process(reference: Reference, home: Home) -> None:
    run = copy(reference, home, "claimed", newest=56)
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
    copy(reference, home, "changed", newest=56)
    assert home.run("changed", resume=True, lr=0.03) == 0
    assert "changed since it began: --lr 0.02 -> 0.03" in capsys.readouterr().err


def test_continue_from_a_model_takes_its_weights_only(reference: Reference, home: Home) -> None:
    assert home.run("tuned", continue_from=reference.path / "model") == 0
    first, last = timeless(home / "tuned")[0], timeless(reference.path)[-1]
    assert first["step"] == 1 and first["learning_rate"] == 0
    assert first["loss"] == pytest.approx(last["loss"], abs=0.3)
    before = llama.load_hf(reference.path / "model")[1]
    after = llama.load_hf(home / "tuned" / "model")[1]
    assert not jnp.array_equal(before["embedding"], after["embedding"])


# ------------------------------------------------------------------------ losses that are no number


def hide_all(batch: dict[str, np.ndarray]) -> None:
    """Leaves nothing to predict: the loss is 0 / 0."""
    batch["mask"][:] = False


def test_ten_losses_in_a_row_that_are_not_finite_stop_the_run(
    reference: Reference, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TrainBatches, "__next__", at_batches(range(20, 99), hide_all))
        assert home.run("broken", keep=20, log_every=3) == 1
    lines = read_metrics(home / "broken")
    assert [r["step"] for r in lines] == [3, 6, 9, 12, 15, 18, 20]
    assert [r["skipped"] for r in lines] == [0, 0, 0, 2, 5, 8, 10]
    assert [r["loss"] is None for r in lines] == [False] * 3 + [True] * 4
    # Skipped updates leave the schedule where it was.
    assert {r["learning_rate"] for r in lines[3:]} == {lines[3]["learning_rate"]}
    said = capsys.readouterr().err
    assert "stopped at step 20: the last 10 updates were skipped" in said
    assert "lower --lr, or set --grad_clipping" in said

    # What is saved is the state after update 10, the last good one; 14 is within the bad ones.
    checkpoints = Checkpoints(home / "broken" / "checkpoints")
    assert checkpoints.steps() == [20, 14, 7]
    weights = [restored_params(checkpoints, step) for step in (20, 14, 7)]
    jax.tree.map(np.testing.assert_array_equal, weights[0], weights[1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights[0]))
    assert not np.array_equal(weights[0]["embedding"], weights[2]["embedding"])

    assert home.run("broken", resume=True) == 0
    later = read_metrics(home / "broken")
    after = [r for r in later if r["kind"] == "train" and r["step"] > 20]
    assert [r["skipped_in_a_row"] for r in after] == [0] * 40
    # The ten that were skipped do not count in the schedule.
    assert later[-3]["kind"] == "train" and later[-3]["skipped"] == 10
    at = {r["step"]: r["learning_rate"] for r in later if r["kind"] == "train"}
    uninterrupted = {
        r["step"]: r["learning_rate"] for r in timeless(reference.path) if "skipped" in r
    }
    assert [at[step] for step in range(21, 61)] == [
        uninterrupted[step - 10] for step in range(21, 61)
    ]


def restored_params(checkpoints: Checkpoints, step: int) -> Any:
    """The weights in a checkpoint, without a state to compare to."""
    metadata = checkpoints._manager.item_metadata(step)["state"].tree
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), metadata)
    return checkpoints.restore(step, like).state["params"]


@pytest.mark.slow
def test_an_absurd_learning_rate_ends_with_a_finite_checkpoint(home: Home) -> None:
    process = home.process("absurd", lr=1e30, warmup_steps=0)
    output, _ = process.communicate()
    assert process.returncode == 1, output
    assert "Traceback" not in output
    checkpoints = Checkpoints(home / "absurd" / "checkpoints")
    weights = restored_params(checkpoints, checkpoints.steps()[0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))


# ------------------------------------------------------------------------------- mistakes


def test_exit_code_2_and_one_line(home: Home) -> None:
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


def model(home: Home, name: str, **changes: Any) -> Path:
    path = home.path / f"{name}.json"
    path.write_text(json.dumps(MODEL | changes))
    return path


def mistakes(home: Home, reference: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> changed options, and what the message has to say."""
    (home.path / "empty.txt").write_text("")
    (home.path / "blank.txt").write_text(" \n\n")
    old, weights = reference / "checkpoints", reference / "model"
    alike = "another model or optimizer"
    return {
        "missing file": ({"dataset": "text:none/*.txt"}, r"no file matches none/\*\.txt"),
        "empty file": ({"dataset": f"text:{home.path}/empty.txt"}, r"empty\.txt is empty"),
        "blank file": ({"dataset": f"text:{home.path}/blank.txt"}, r"no text in .*blank\.txt"),
        "vocabulary": (
            {"model_config": model(home, "small", vocab_size=200)},
            r"vocabulary of 258, and the model one of 200: give a model config with vocab_size 258",
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
        "other rank": ({"continue_from": old, "rank": 5}, rf"{alike}: .*\[2, 4, 32\] there and"),
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
            r"holds another model: its num_hidden_layers is 2, and --model_config has 3; give its",
        ),
        "same run, other rank": (
            {"name": "reference", "resume": True, "rank": 5},
            r"--rank: .*reference was started with 4, not 5",
        ),
        "its own model": (
            {"name": "reference", "continue_from": weights},
            r"is this run's own model, with weights only; go on .* --resume",
        ),
        "a run is there": ({"name": "reference"}, r"reference holds a run already; .*--resume"),
        "per layer": ({"optimizer": "galore_adamw_per_layer"}, r"use galore_adamw$"),
        "what torch alone does": (
            {"fsdp": True},
            r"--fsdp: the JAX side runs on one device yet; .*or use launch\.train_torch",
        ),
    }


def test_mistakes_are_named_before_anything_is_compiled(
    reference: Reference, home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    before = everything(reference.path)
    for what, (changes, message) in mistakes(home, reference.path).items():
        caplog.clear()
        with jax.log_compiles(), pytest.raises(UsageError, match=message):
            home.run(changes.pop("name", "mistaken"), **changes)
        compiled = [line for line in caplog.messages if line.startswith("Compiling")]
        assert not any("_step" in line or "init" in line for line in compiled), (what, compiled)
        assert not (home / "mistaken").exists(), what
    assert everything(reference.path) == before


# ------------------------------------------------------------------------------ other settings

SHORT = {
    "num_training_steps": 3, "warmup_steps": 1, "eval_every": 2, "eval_tokens": 100,
    "sample_tokens": 0, "total_batch_size": None, "update_proj_gap": 2,
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
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "adafactor": {"optimizer": "galore_adafactor", "proj_type": "full", "beta1": 0.9},
    "paper": {
        "proj_type": "continuous",
        "penalty": 0.1,
        "projector_lr_multiple": 5.0,
        "move_projector": "before",
    },
    "restarts": {"optimizer": "sgd", "scheduler": "cosine_restarts", "cycle_length": 2},
}


def short_run(home: Home, name: str) -> list[dict[str, Any]]:
    assert home.run(name, **(SHORT | SETTINGS[name])) == 0
    lines = read_metrics(home / name)
    assert [r["step"] for r in lines] == [1, 2, 2, 3, 3, 3]
    assert all(np.isfinite(r["loss"]) for r in lines)
    return lines


def test_8bit_bfloat16_remat_and_a_worker(home: Home) -> None:
    short_run(home, "8bit")
    config, params = llama.load_hf(home / "8bit" / "model")
    assert params["embedding"].dtype == jnp.bfloat16
    # Going on from the last checkpoint finds nothing left to do, and says the same once more.
    before = timeless(home / "8bit")
    assert home.run("8bit", **(SHORT | SETTINGS["8bit"]), resume=True) == 0
    assert timeless(home / "8bit") == before


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "8bit"])
def test_other_settings(name: str, home: Home) -> None:
    short_run(home, name)


def test_token_arrays_have_no_tokenizer_and_no_sample(home: Home) -> None:
    np.save(home.path / "ids.npy", np.random.default_rng(0).integers(0, 300, 4000))
    changes = {"dataset": f"tokens:{home.path}/ids.npy", "tokenizer": None}
    assert home.run("tokens", **(SHORT | changes | {"sample_tokens": 5})) == 0
    assert read_metrics(home / "tokens")[-1]["sample"] is None
    config = json.loads((home / "tokens" / "model" / "config.json").read_text())
    assert config["eos_token_id"] == 8
