"""PyTorch checkpoints: everything is restored bit for bit, or an error says what is wrong."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import osd_torch
from osd_torch import llama
from osd_torch.llama.checkpoint import Checkpoints
from parity_tests.support.trainer_runs import assert_absent_directory_stays_absent, largest_file

OPTIMIZERS = {
    "galore_adamw": ("galore_adamw", "continuous"),
    # codes of 8 bits and their scales, for W and for P
    "galore_adamw8bit": ("galore_adamw8bit", "continuous_adam8bit"),
    # factored moments, two bases a matrix
    "galore_adafactor": ("galore_adafactor", "full"),
    "galore_lion": ("galore_lion", "random"),
    "adamw": ("adamw", "std"),
    "adam8bit": ("adam8bit", "std"),
}
Run = tuple[Any, torch.optim.Optimizer]


def fresh(
    name: str, *, rank: int = 3, hidden: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Run:
    config = llama.config_from_dict(
        {
            "model_type": "llama",
            "vocab_size": 300,
            "hidden_size": hidden,
            # wide enough for moments of 4096 values, which are 8-bit ones
            "intermediate_size": 1500,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    )
    model = llama.build(config, seed=seed, dtype=dtype)
    optimizer = osd_torch.make_optimizer(
        model.named_parameters(), *OPTIMIZERS[name], lr=0.01, rank=rank, update_proj_gap=2
    )
    return model, optimizer


def trained(name: str, steps: int = 3, **options: Any) -> Run:
    """A state in which no moment is zero any more."""
    model, optimizer = fresh(name, **options)
    for _ in range(steps):
        train(model, optimizer)
    return model, optimizer


def train(model: Any, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.randint(300, (2, 16))  # from the global random state, which is kept too
    llama.loss(model, tokens)[0].backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors(run: Run) -> dict[str, torch.Tensor]:
    model, optimizer = run
    found = dict(model.named_parameters())
    for name, param in model.named_parameters():
        state = optimizer.state.get(param, {})
        found |= {f"{name}/{key}": torch.as_tensor(x) for key, x in state.items()}
    return {name: x.detach().clone() for name, x in found.items()}


def assert_same(run: Run, wanted: dict[str, torch.Tensor]) -> None:
    found = tensors(run)
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        y = wanted[name]
        assert x.dtype == y.dtype and torch.equal(x, y), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_comes_back_bit_for_bit_and_goes_on_alike(name: str, tmp_path: Path) -> None:
    run = trained(name)
    before = tensors(run)
    extra = {"data": [{"document": 3, "offset": 17, "corpus": "text"}]}
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(3, *run, extra)
    train(*run)

    reader = Checkpoints(tmp_path / "c")
    assert reader.steps() == [3]
    other = fresh(name, seed=1)
    assert reader.restore(3, *other) == extra
    assert_same(other, before)
    train(*other)
    assert_same(other, tensors(run))


def test_bfloat16_weights_and_their_float32_moments_come_back(tmp_path: Path) -> None:
    run = trained("galore_adamw", dtype=torch.bfloat16)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, *run, {})
    other = fresh("galore_adamw", dtype=torch.bfloat16)
    Checkpoints(tmp_path).restore(3, *other)
    assert_same(other, tensors(run))
    moments = [x for name, x in tensors(other).items() if "exp_avg" in name]
    assert {x.dtype for x in moments} == {torch.float32}


def test_the_files_are_plain(tmp_path: Path) -> None:
    """transformers reads the model, and `weights_only` the rest."""
    model, optimizer = trained("galore_adamw8bit")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, model, optimizer, {"document": 5})
    folder = tmp_path / "3"
    theirs = type(model).from_pretrained(folder / "model")
    for (name, x), y in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(x, y), name
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    assert state.keys() == dict(model.named_parameters()).keys()
    torch.load(folder / "random.pt", weights_only=True)
    assert json.loads((folder / "state.json").read_text())["extra"] == {"document": 5}


def test_options_stay_and_skipped_steps_come_back(tmp_path: Path) -> None:
    model, optimizer = trained("adamw")
    optimizer.skipped = (4, 2)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, model, optimizer, {})
    model, optimizer = fresh("adamw")
    for group in optimizer.param_groups:
        group |= {"lr": 0.5, "weight_decay": 0.25}
    Checkpoints(tmp_path).restore(3, model, optimizer)
    assert osd_torch.skipped_steps(optimizer) == (4, 2)
    assert all((g["lr"], g["weight_decay"]) == (0.5, 0.25) for g in optimizer.param_groups)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = fresh("adamw")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 7, 20):
            checkpoints.save(step, *run, {"step": step})
        assert checkpoints.steps() == [20, 7]
    assert Checkpoints(tmp_path).restore(7, *run) == {"step": 7}
    assert {path.name for path in tmp_path.iterdir()} == {"7", "20"}


def test_later_ones_are_set_aside(tmp_path: Path) -> None:
    run = fresh("adamw")
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (1, 2, 3):
        checkpoints.save(step, *run, {"step": step})
    checkpoints.set_aside_after(1)
    assert checkpoints.steps() == [1]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2.set-aside", "3.set-aside"}
    checkpoints.save(2, *run, {"step": -2})
    assert checkpoints.restore(2, *run) == {"step": -2}


def test_a_directory_that_is_not_there_has_no_checkpoints_and_is_not_made(tmp_path: Path) -> None:
    assert_absent_directory_stays_absent(Checkpoints, tmp_path)


def test_reading_leaves_an_unfinished_checkpoint_alone_and_a_writer_removes_it(
    tmp_path: Path,
) -> None:
    run = fresh("adamw")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, *run, {})
        unfinished = tmp_path / "2.tmp"
        unfinished.mkdir()
        assert Checkpoints(tmp_path).steps() == [1]
        assert unfinished.exists()
        checkpoints.save(3, *run, {})
        assert checkpoints.steps() == [3, 1]
    assert not unfinished.exists()


def test_another_model_or_optimizer_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, *trained("galore_adamw", steps=1), {})
    reader = Checkpoints(tmp_path)

    def refusal(run: Run) -> str:
        before = tensors(run)
        with pytest.raises(ValueError, match="is of another model or optimizer") as caught:
            reader.restore(1, *run)
        assert_same(run, before)
        message = str(caught.value)
        assert str(tmp_path / "1") in message and "use the options" in message
        return message

    assert "float32[300, 16] there and float32[300, 20] in" in refusal(
        fresh("galore_adamw", hidden=20)
    )
    assert "rank 3 there and continuous of rank 2 in" in refusal(fresh("galore_adamw", rank=2))
    assert "SubspaceAdamW there and TorchAdamW in this run" in refusal(fresh("adamw"))
    assert "bfloat16" in refusal(fresh("galore_adamw", dtype=torch.bfloat16))


FILES = ["model/model.safetensors", "model/config.json", "optimizer.pt", "random.pt", "state.json"]


@pytest.mark.parametrize("part", [*FILES, "manifest.json"])
@pytest.mark.parametrize("left", [None, 0, 0.5, 1], ids=["absent", "empty", "half", "changed"])
def test_a_damaged_checkpoint_is_an_os_error(
    part: str, left: float | None, two_checkpoints: Path
) -> None:
    path = two_checkpoints / "2" / part
    intact = path.read_bytes()
    if left is None:
        path.unlink()
    elif left == 1:
        path.write_bytes(intact[:-20] + bytes(x ^ 1 for x in intact[-20:]))
    else:
        os.truncate(path, int(len(intact) * left))
    run = fresh("adamw", seed=1)
    before = tensors(run)
    reader = Checkpoints(two_checkpoints)
    assert reader.steps() == [2, 1]
    with pytest.raises(OSError, match=r"2 is damaged and cannot be read"):
        reader.restore(2, *run)
    assert_same(run, before)
    path.write_bytes(intact)
    assert reader.restore(2, *run) == {"document": 2}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    run = trained("adamw")
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, *run, {"document": step})
    return directory


@pytest.mark.parametrize("size", [100, 5_000, 150_000, 400_000])
def test_a_full_disk_leaves_nothing_half_written(size: int, tmp_path: Path) -> None:
    """Whichever file it is that does not fit."""
    run = trained("adamw")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, *run, {"document": 1})
        with largest_file(size), pytest.raises(OSError, match="step 2, about 1 MiB, cannot be wri"):
            checkpoints.save(2, *run, {"document": 2})
        assert {path.name for path in tmp_path.iterdir()} == {"1"}
        assert checkpoints.restore(1, *run) == {"document": 1}
        checkpoints.save(2, *run, {"document": 2})
    assert checkpoints.steps() == [2, 1]


def test_a_disk_that_is_full_when_it_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    run = fresh("adamw")
    monkeypatch.setattr(os, "fsync", full)
    save = functools.partial(Checkpoints(tmp_path, keep=2).save, 1, *run, {})
    with pytest.raises(OSError, match=r"No space left on device; free space there"):
        save()
    assert list(tmp_path.iterdir()) == []
