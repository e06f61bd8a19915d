"""Each recipe starts the published run of each size, with flags that `launch.train_jax` accepts."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.train_jax import refuse_torch_only
from launch.trainer.options import Options
from launch.trainer.options.groups import Devices
from parity_tests.support import ROOT

# rank, steps, warmup, learning rate, gap, and rows of one device in a forward pass, as published
PUBLISHED = {
    "60m": (128, 10_000, 1_000, 0.01, 200, 256),
    "130m": (256, 20_000, 2_000, 0.01, 200, 256),
    "350m": (256, 60_000, 6_000, 0.01, 200, 128),
    "1b": (1024, 100_000, 10_000, 0.01, 200, 16),
    "7b": (1024, 150_000, 15_000, 0.005, 500, 16),
}
# recipe, environment, processes, devices of each
PLACES = [
    ("gpu", {}, 1, 1),
    ("slurm", {"SLURM_NTASKS": "8"}, 8, 1),
    ("slurm", {"SLURM_NTASKS": "64"}, 64, 1),
    ("tpu", {}, 1, 4),
    ("tpu", {"HOSTS": "4"}, 4, 4),
    ("tpu", {"HOSTS": "16", "CHIPS": "8", "RUNS": "there"}, 16, 8),
]


SPLIT_BY_DEFAULT = {
    "fsdp": False, "mesh": None, "reshard_after_forward": True, "shard_over_data": False
}  # fmt: skip


def split_of(size: str, chips: int) -> dict[str, Any]:
    """How the recipe splits a model over the chips of a slice."""
    if size in ("1b", "7b"):
        if chips == 128:
            return {"mesh": "data=4,fsdp=-1", "shard_over_data": True}
        return {"fsdp": True}
    if chips == 4:
        return {"mesh": "data=-1", "shard_over_data": True}
    once = {"reshard_after_forward": False}
    if chips == 16 and size == "130m":
        return {"mesh": "data=-1,fsdp=16", **once}
    return {"mesh": f"data={8 if chips == 16 else 4},fsdp=-1", "shard_over_data": True, **once}


def printed(recipe: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"launch/recipes/{recipe}.sh", *words],
        cwd=ROOT,
        env={**os.environ, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("size", PUBLISHED)
def test_recipes_start_the_published_runs(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rank, steps, warmup, lr, gap, rows = PUBLISHED[size]
    for recipe, environment, processes, devices in PLACES:
        shown = printed(recipe, size, "--seed", "3", "--name", "other", **environment)
        assert shown.returncode == 0, shown.stderr
        command = shown.stdout.split()
        start = command.index("launch.train_jax")
        launcher = ["srun"] if recipe == "slurm" else []
        assert command[:start] == [*launcher, ".venv/bin/python", "-m"]
        options = Options.parse(command[start + 1 :]).check(processes=processes)

        assert options.model.model_config == f"configs/llama_{size}.json"
        subspace, optimizer = options.subspace, options.optimizer
        assert (subspace.rank, optimizer.num_training_steps, optimizer.warmup_steps) == (
            rank, steps, warmup
        )  # fmt: skip
        assert (optimizer.lr, subspace.update_proj_gap, subspace.galore_scale) == (lr, gap, 0.25)
        is_7b = size == "7b"
        assert optimizer.optimizer == ("galore_adamw8bit" if is_7b else "galore_adamw")
        assert subspace.proj_type == ("continuous_adam8bit" if is_7b else "continuous")
        assert optimizer.grad_clipping == (1.0 if is_7b else 0)
        assert options.model.activation_checkpointing == is_7b
        assert options.data.total_batch_size == 512
        assert options.data.batch_size == min(rows * devices, 512 // processes)
        assert options.data.batch_size % devices == 0
        is_large = size in ("1b", "7b")
        split = {"fsdp": recipe == "slurm" and is_large}
        if recipe == "tpu":
            split = split_of(size, processes * devices)
        for name, default in SPLIT_BY_DEFAULT.items():
            assert getattr(options.devices, name) == split.get(name, default)
        assert options.devices.per_layer == (recipe == "gpu" and is_7b)
        assert options.devices.single_gpu == (recipe == "gpu")
        assert options.run.resume and (options.run.seed, options.run.name) == (3, "other")
        refuse_torch_only(options)


def test_another_mesh_replaces_fsdp() -> None:
    for more in (("--mesh", "data=2,fsdp=2"), ("--mesh=data=4",), ("--compress_gradients",)):
        for hosts in (4, 16):
            devices = tpu_devices("1b", *more, hosts=hosts)
            assert not devices.fsdp and not devices.shard_over_data


@pytest.mark.parametrize("more", [("--fsdp",), ("--per_layer",), ("--compress_gradients",)])
def test_other_flags_replace_the_split_of_small_models(more: tuple[str, ...]) -> None:
    devices = tpu_devices("60m", *more)
    assert devices.mesh is None and not devices.shard_over_data


@pytest.mark.parametrize(
    ("size", "hosts", "mesh"),
    [
        ("1b", 1, None),
        ("7b", 8, "data=4,fsdp=-1"),
        ("60m", 2, "data=-1"),
        ("130m", 2, "data=4,fsdp=-1"),
        ("350m", 8, "data=4,fsdp=-1"),
    ],
)
def test_a_mesh_for_each_slice(size: str, hosts: int, mesh: str | None) -> None:
    devices = tpu_devices(size, hosts=hosts)
    assert (devices.mesh, devices.fsdp) == (mesh, mesh is None)
    assert devices.shard_over_data == (mesh is not None)


def test_layer_by_layer_updates_of_large_models_have_fsdp_alone() -> None:
    devices = tpu_devices("7b", "--per_layer", "--grad_clipping", "0", hosts=16)
    assert devices.fsdp and devices.mesh is None and not devices.shard_over_data
    named = tpu_devices("7b", "--name", "per_layer", hosts=16)
    assert named.shard_over_data


def tpu_devices(size: str, *more: str, hosts: int = 4) -> Devices:
    command = printed("tpu", size, *more, HOSTS=str(hosts)).stdout.split()
    options = Options.parse(command[command.index("launch.train_jax") + 1 :])
    return options.check(processes=hosts).devices


def test_what_is_wrong_is_named() -> None:
    for shown, message in (
        (printed("gpu", "2b"), "error: no published run of '2b'; expected 60m, 130m, 350m, 1b or"),
        (printed("tpu"), "error: no published run of ''"),
        (
            printed("slurm", "60m", SLURM_NTASKS="12"),
            "are not divisible by 12 processes x 1 devices",
        ),
    ):
        assert shown.returncode == 2
        assert message in shown.stderr and shown.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    scripts = [*Path("launch").glob("*.sh"), *Path("launch/recipes").glob("*.sh")]
    subprocess.run(["shellcheck", "-x", "-s", "bash", *map(str, scripts)], cwd=ROOT, check=True)
