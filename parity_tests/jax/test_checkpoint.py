"""Checkpoints: everything is restored bit for bit, or an error says what is wrong."""

import functools
import gc
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import osd_jax
from osd_jax.adam_of_rows import ScaleByAdamOfRowsState
from osd_jax.llama.checkpoint import Checkpoints
from osd_jax.llama.train import TrainState, init_state
from parity_tests.support.trainer_runs import assert_absent_directory_stays_absent, largest_file

# TensorStore's reads of a damaged file end after Orbax has stopped waiting for them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OPTIMIZERS = {
    # MaskedNode where a partition hides a parameter, EmptyState in the chain
    "galore_adamw": ("galore_adamw", "continuous"),
    # codes of 8 bits and their scales, for W and for P
    "galore_adamw8bit": ("galore_adamw8bit", "continuous_adam8bit"),
    # factored moments, two bases a matrix
    "galore_adafactor": ("galore_adafactor", "full"),
    "galore_lion": ("galore_lion", "random"),
    "adamw": ("adamw", "std"),
}


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Sets aside what other modules left: a damaged checkpoint makes Python collect garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def params(hidden: int = 6, dtype: Any = jnp.float32) -> Any:
    key = iter(jax.random.split(jax.random.key(0), 3))
    normal = lambda *shape: jax.random.normal(next(key), shape, dtype)
    return {"mlp": {"up": normal(hidden, 80), "down": normal(80, hidden)}, "norm": normal(hidden)}


@functools.cache
def transformation(name: str, rank: int = 3) -> optax.GradientTransformationExtraArgs:
    return osd_jax.make_optimizer(
        *OPTIMIZERS[name], learning_rate=0.01, rank=rank, update_proj_gap=2
    )


def trained(name: str, dtype: Any = jnp.float32, steps: int = 3) -> TrainState:
    """A state in which no moment is zero any more."""
    tx = transformation(name)
    state = init_state(params(dtype=dtype), tx)
    update = jax.jit(tx.update)
    for step in range(steps):
        grads = jax.tree.map(lambda x, s=step: jnp.sin(x + s), state.params)
        updates, opt_state = update(grads, state.opt_state, state.params)
        moved = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + 1, moved, opt_state)
    return state


def assert_same(found: TrainState, wanted: TrainState) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path
        assert x.sharding == y.sharding, path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    state = trained(name)
    extra = {"data": {"document": 3, "offset": 17, "corpus": "text"}}
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(3, state, extra)
    reader = Checkpoints(tmp_path / "c")
    assert reader.steps() == [3]
    like = jax.eval_shape(lambda: init_state(params(), transformation(name)))
    found = reader.restore(3, like)
    assert_same(found.state, state)
    assert found.extra == extra


NO_MATRIX = osd_jax.SubspaceDimensionNumbers(reduction_axis=(), output_axis=1)
is_rows = lambda x: isinstance(x, ScaleByAdamOfRowsState)


def without_rows(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: () if is_rows(x) else x, state, is_leaf=is_rows)


class ProjectorStateBefore(NamedTuple):
    """As checkpoints held it before each matrix knew when its P was set."""

    basis: Any
    optimizer: Any


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor"])
def test_a_checkpoint_without_set_at_is_read(name: str, steps: int, tmp_path: Path) -> None:
    """Every P counts as set at step 0, if a step was taken, and else as not set."""
    state = trained(name, steps=steps)
    is_subspace = lambda x: isinstance(x, osd_jax.SubspaceState)

    def before(x: Any) -> Any:
        if not is_subspace(x):
            return x
        return x._replace(projector=ProjectorStateBefore(x.projector.basis, x.projector.optimizer))

    def expected(x: Any) -> Any:
        if not is_subspace(x):
            return x
        set_at = jax.tree.map(lambda at: jnp.full_like(at, 0 if steps else -1), x.projector.set_at)
        return x._replace(projector=x.projector._replace(set_at=set_at))

    replaced = lambda one: jax.tree.map(one, state, is_leaf=is_subspace)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, replaced(before), {"place": 7})
        checkpoints.wait()
        found = checkpoints.restore(3, jax.eval_shape(lambda: state))
    assert_same(found.state, replaced(expected))
    assert found.extra == {"place": 7}


@pytest.mark.parametrize("first_moment", ["full", "8bit"])
@pytest.mark.parametrize("shape", [(3, 1400), (70, 60)], ids=str)
def test_a_checkpoint_with_stacked_vectors_as_matrices_is_read(
    shape: tuple[int, int], first_moment: str, tmp_path: Path
) -> None:
    """Each vector gets the first moment of its own, and the second moment that all shared."""

    def trained(dimension_numbers: Any) -> TrainState:
        tx = osd_jax.osd_muon(
            0.01, rank=3, second_moment="row", first_moment=first_moment,  # type: ignore[arg-type]
            select=lambda path, x: path == "w", dimension_numbers=dimension_numbers,
        )  # fmt: skip
        state = init_state({"w": jnp.ones((6, 8)), "norm": jnp.ones(shape)}, tx)
        grads = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size) + 1.0).reshape(x.shape), state[1])
        return state._replace(opt_state=jax.jit(tx.update)(grads, state.opt_state, state.params)[1])

    vectors = {"w": osd_jax.SubspaceDimensionNumbers(), "norm": NO_MATRIX}
    old, like = trained(None), trained(vectors)
    mesh = jax.make_mesh((2,), ("x",))
    on_mesh = lambda x: jax.NamedSharding(mesh, jax.P("x") if x.shape[:1] == (70,) else jax.P())
    for target in (like, jax.device_put(like, jax.tree.map(on_mesh, like))):
        with Checkpoints(tmp_path / str(len(jax.tree.leaves(target)[0].devices())), 1) as kept:
            kept.save(3, old, {})
            kept.wait()
            found = kept.restore(3, target).state
        for x, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
            assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
        rows = lambda state: next(x for x in jax.tree.leaves(state, is_leaf=is_rows) if is_rows(x))
        across = 1 if shape[0] >= shape[1] else 0
        shared = np.expand_dims(rows(old).nu["norm"], across)
        np.testing.assert_array_equal(rows(found).nu["norm"], np.broadcast_to(shared, shape))
        # The 64 largest codes are spaced evenly over 0.1 to 1 of their block's largest value.
        largest = np.abs(rows(like).mu["norm"]).max()
        atol = 1.01 * 0.45 / 64 * largest if first_moment == "8bit" else 0
        np.testing.assert_allclose(rows(found).mu["norm"], rows(like).mu["norm"], 0, atol)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, like)
        assert_same(without_rows(found), without_rows(target))


def test_bfloat16_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    state = trained("galore_adamw", jnp.bfloat16)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state, {})
        checkpoints.wait()
        assert_same(checkpoints.restore(3, state).state, state)


def test_a_save_does_not_see_what_a_donated_step_writes_later(tmp_path: Path) -> None:
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState) -> TrainState:
        return jax.tree.map(lambda x: x + 1, state)

    state = TrainState(jnp.int32(0), {"w": jnp.zeros((512, 4096))}, (jnp.zeros((512, 4096)),))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for number in range(1, 25):
            state = step(state)
            if number in (2, 9):
                checkpoints.save(number, state, {})
        jax.block_until_ready(state)
        checkpoints.wait()
        for number in (2, 9):
            for leaf in jax.tree.leaves(checkpoints.restore(number, state).state):
                assert (np.asarray(leaf) == number).all()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    state = TrainState(jnp.int32(0), {"w": jnp.ones(3)}, ())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 7, 20):
            checkpoints.save(step, state, {"step": step})
        checkpoints.wait()
        assert checkpoints.steps() == [20, 7]
    assert Checkpoints(tmp_path).restore(7, state).extra == {"step": 7}
    assert {path.name for path in tmp_path.iterdir()} == {"7", "20"}


def test_a_directory_that_is_not_there_has_no_checkpoints_and_is_not_made(tmp_path: Path) -> None:
    assert_absent_directory_stays_absent(Checkpoints, tmp_path)


def test_reading_leaves_an_unfinished_checkpoint_alone_and_a_writer_removes_it(
    tmp_path: Path,
) -> None:
    state = TrainState(jnp.int32(0), {"w": jnp.ones(3)}, ())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, {})
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert Checkpoints(tmp_path).steps() == [1]
    assert unfinished.exists()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(2, state, {})
        checkpoints.wait()
    assert not unfinished.exists()


def test_another_model_or_optimizer_is_refused_by_the_name_of_the_array(tmp_path: Path) -> None:
    state = trained("galore_adamw", steps=1)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    reader = Checkpoints(tmp_path)

    def refusal(like: TrainState) -> str:
        with pytest.raises(ValueError, match="is of another model or optimizer") as caught:
            reader.restore(1, like)
        message = str(caught.value)
        assert str(tmp_path / "1") in message and "use the options" in message
        return message

    tx = transformation("galore_adamw")
    wider = refusal(init_state(params(hidden=10), tx))
    assert "float32[6" in wider and "float32[10" in wider
    thinner = refusal(init_state(params(), transformation("galore_adamw", rank=2)))
    assert "mu/mlp/down is float32[3, 80] there and float32[2, 80] in this run" in thinner
    assert "absent" in refusal(init_state(params(), transformation("adamw")))
    assert "bfloat16" in refusal(init_state(params(dtype=jnp.bfloat16), tx))


def parts(checkpoint: Path) -> list[Path]:
    """The files without which a checkpoint is worth nothing."""
    arrays = max((checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    inside = ("state/_METADATA", "state/manifest.ocdbt", "extra/metadata")
    return [arrays, *(checkpoint / name for name in inside)]


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """Checkpoints 1 and 2 of a state."""
    path = tmp_path_factory.mktemp("two_saved")
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)
    state = TrainState(jnp.int32(1), {"w": noise}, (jnp.ones(3),))
    with Checkpoints(path, keep=2) as checkpoints:
        checkpoints.save(1, state, {"document": 12345})
        checkpoints.save(2, state, {"document": 67890})
    return path, state


def damage(path: Path, left: float | None) -> None:
    """Deletes a file, or leaves this part of it."""
    if left is None:
        path.unlink()
    else:
        os.truncate(path, int(path.stat().st_size * left))


each_part = pytest.mark.parametrize(
    "part", range(4), ids=["arrays", "structure", "manifest", "extra"]
)


@each_part
@pytest.mark.parametrize("left", [None, 0, 0.5], ids=["absent", "empty", "half"])
def test_a_damaged_checkpoint_is_an_os_error(
    part: int, left: float | None, two_saved: tuple[Path, TrainState], tmp_path: Path
) -> None:
    saved, state = two_saved
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    damage(parts(tmp_path / "2")[part], left)
    reader = Checkpoints(tmp_path)
    assert reader.steps() == [2, 1]
    with pytest.raises(OSError, match=r"2 is damaged and cannot be read"):
        reader.restore(2, state)
    assert_same(reader.restore(1, state).state, state)


@each_part
def test_a_damaged_checkpoint_is_set_aside_and_written_again(
    part: int, two_saved: tuple[Path, TrainState], tmp_path: Path
) -> None:
    saved, state = two_saved
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    damage(parts(tmp_path / "2")[part], left=0)
    writer = Checkpoints(tmp_path, keep=2)
    writer.set_aside_after(1)
    with writer:
        writer.save(2, state, {"document": 67890})
    assert Checkpoints(tmp_path).restore(2, state).extra == {"document": 67890}
    assert (tmp_path / "2.set-aside").is_dir()  # another attempt might read it
    assert Checkpoints(tmp_path).steps() == [2, 1]


def test_what_has_nothing_to_do_with_the_checkpoint_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TrainState(jnp.int32(0), {"w": jnp.ones(3)}, ())
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.restore", fail)
    with pytest.raises(MemoryError):
        Checkpoints(tmp_path).restore(1, state)


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(256, 256)), jnp.float32)
    state = TrainState(jnp.int32(1), {"w": noise}, ())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        full = pytest.raises(OSError, match="a checkpoint cannot be written to .*; free space")
        with largest_file(50_000), full:
            checkpoints.save(2, state, {})
            checkpoints.wait()
    assert Checkpoints(tmp_path).steps() == [1]
