"""`python -m launch.train_jax`, whole runs of a tiny model on a tiny text.

Most runs execute in this process, with options that compile to the same program, so that JAX's
compilation cache serves all but the first.
"""

import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import train_jax
from launch.data import TrainBatches
from launch.trainer.cli import UsageError
from launch.trainer.files import read_metrics
from osd_jax import llama
from osd_jax.llama.checkpoint import Checkpoints
from osd_jax.llama.train import make_eval_step
from parity_tests.support.jax_steps import forget_steps
from parity_tests.support.jax_steps import steps_made_once as steps_made_once
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
    make_home,
    make_reference,
    short_run,
    timeless,
)

# TensorStore's reads of a damaged file end after Orbax has stopped waiting for them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("home"), train_jax, "-m", "launch.train_jax")


@pytest.fixture(scope="module")
def reference(home: Home) -> Reference:
    forget_steps()
    compiled: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            compiled.append(record.getMessage())

    listener, dispatch = Listener(), logging.getLogger("jax._src.interpreters.pxla")
    dispatch.addHandler(listener)
    with jax.log_compiles():
        reference = make_reference(home)
    dispatch.removeHandler(listener)
    reference.compiled = compiled
    return reference


class TestRuns(RunTests):
    checkpoints = Checkpoints
    unfinished = "*orbax-checkpoint-tmp*"
    indispensable = "state/manifest.ocdbt"
    says = ("galore_adamw, std, rank 4: optimizer state",)
    kills = 5
    loss_tolerance = 1e-4

    def loss(self, folder: Path, batch: Any) -> float:
        config = llama.LlamaConfig.load(folder / "config.json")
        total, count = make_eval_step(config)(llama.load_hf(folder)[1], batch)
        return float(total / count)


def test_one_compilation_of_each_step_in_a_run(reference: Reference) -> None:
    """Over evaluations, refreshes of the projector and the end of the warmup."""
    for name in ("train_step", "eval_step", "write"):
        assert sum(f"Compiling jit({name})" in line for line in reference.compiled) == 1, name


# ----------------------------------------------------------------------------------- resuming


def test_a_damaged_checkpoint_is_passed_over(
    reference: Reference, home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy(reference.path, home, "damaged", newest=56)
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
    assert_same_end(run, reference.path)
    assert Checkpoints(run / "checkpoints").steps()[:4] == [60, 56, 49, 42]


# ------------------------------------------------------------------------ losses that are no number


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


def mistakes(home: Home, reference: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> changed options, and what the message has to say."""
    return {
        **common_mistakes(home, reference),
        "other rank": (
            {"continue_from": reference / "checkpoints", "rank": 5},
            r"another model or optimizer: .*\[2, 4, 32\] there and",
        ),
        "what torch alone does": (
            {"compile": True},
            r"--compile: JAX always compiles; .*or use launch\.train_torch",
        ),
        "torch's timeout": (
            {"timeout_minutes": 5},
            r"--timeout_minutes: JAX has its own limit, .*or use launch\.train_torch",
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

OTHER = {
    **SETTINGS,
    "adafactor": {"optimizer": "galore_adafactor", "proj_type": "full", "beta1": 0.9},
    "layers of several micro-batches": {
        "optimizer": "galore_adamw8bit_per_layer",
        "proj_type": "continuous",
        "gradient_accumulation": 2,
        "grad_clipping": 1.0,
    },
}


def settings(name: str) -> dict[str, Any]:
    return SHORT | {"update_proj_gap": 2} | OTHER[name]


def test_8bit_bfloat16_remat_and_a_worker(home: Home) -> None:
    short_run(home, "8bit", settings("8bit"))
    config, params = llama.load_hf(home / "8bit" / "model")
    assert params["embedding"].dtype == jnp.bfloat16
    assert_nothing_is_left_to_do(home, "8bit", settings("8bit"))


def test_layer_by_layer_the_losses_are_the_same_and_a_checkpoint_goes_on(home: Home) -> None:
    short = SHORT | {"batch_size": 8, "save_every": 2}
    assert home.run("whole_step", **short) == 0
    assert home.run("per_layer", **short, optimizer="galore_adamw_per_layer") == 0
    losses = lambda name: [r["loss"] for r in read_metrics(home / name)]
    assert losses("per_layer") == pytest.approx(losses("whole_step"), abs=1e-5)
    assert_nothing_is_left_to_do(home, "per_layer", short | {"optimizer": "galore_adamw_per_layer"})


def test_sketches_of_micro_batches_add_up_to_that_of_their_sum(home: Home) -> None:
    """With `random`; with `std`, P is of the first micro-batch, and later losses are others."""

    def losses(proj_type: str, **more: Any) -> list[float]:
        name = "_".join((proj_type, *more))
        short = SHORT | {"batch_size": 4, "gradient_accumulation": 2, "proj_type": proj_type}
        assert home.run(name, **short, **more) == 0
        return [r["loss"] for r in read_metrics(home / name)]

    of_sketches = losses("random", accumulate_sketches=True)
    assert of_sketches == pytest.approx(losses("random"), abs=1e-4)
    of_sketches, of_gradients = losses("std", accumulate_sketches=True), losses("std")
    assert of_sketches[0] == pytest.approx(of_gradients[0], abs=1e-5)
    assert abs(of_sketches[-1] - of_gradients[-1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OTHER if name != "8bit"])
def test_other_settings(name: str, home: Home) -> None:
    short_run(home, name, settings(name))
