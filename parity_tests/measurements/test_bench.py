"""The benchmark: each mode runs, names every contender, and times what it claims to time.

No test here depends on timings.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import osd_torch
from launch.bench import memory, page, report, timing
from launch.bench.__main__ import main
from launch.bench.contender import GAP, LR, SCALE, Case, arrays
from launch.bench.in_jax import seven_products
from launch.bench.in_torch import PublishedStep, SevenProducts
from launch.bench.memory import most_allocated
from launch.bench.optimizer import CONTENDERS, FLOORS, FULL_RANK, PUBLISHED, records
from launch.bench.parts import PARTS
from launch.bench.train import CONTENDERS as TRAINED
from launch.trainer.cli import UsageError
from launch.trainer.cpu import keep_lapack_to_one_thread
from osd_torch.bases import online_pca_gradient
from osd_torch.sketch import CORRELATION, SQUARED_NORM, make_sketch

SHAPES = [(24, 16), (16, 24), (16, 16)]
RANK = 4
SPREAD = {"median", "low", "high"}


def case_of(shape: tuple[int, int]) -> Case:
    return Case("tiny", shape, RANK)


def started(shape: tuple[int, int]) -> tuple[torch.nn.Parameter, torch.Tensor, bool]:
    """W with G in its `grad`, P, and whether P acts from the right; float64."""
    given = arrays(case_of(shape))
    weight = torch.nn.Parameter(torch.from_numpy(given.weight).double())
    weight.grad = torch.from_numpy(given.gradient).double()
    return weight, torch.from_numpy(given.basis).double(), shape[0] >= shape[1]


def as_m(tensor: torch.Tensor, right: bool) -> torch.Tensor:
    return tensor.mT if right else tensor


@pytest.mark.parametrize("shape", SHAPES)
def test_the_published_way_steps_p_down_the_closed_form(shape: tuple[int, int]) -> None:
    weight, basis, right = started(shape)
    step = PublishedStep(weight, weight.grad, basis.clone(), right)
    found: list[torch.Tensor] = []
    step.optimizer.register_step_pre_hook(
        lambda optimizer, *_: found.append(optimizer.param_groups[0]["params"][0].grad.clone())
    )
    step.move()
    matrix = as_m(weight.grad, right)
    low_rank = basis.mT @ matrix
    sketch = make_sketch(basis, matrix, (CORRELATION, SQUARED_NORM))
    torch.testing.assert_close(sketch.low_rank, low_rank)
    torch.testing.assert_close(found[0], online_pca_gradient(basis, sketch), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_published_way_is_a_step_of_the_library(shape: tuple[int, int]) -> None:
    """W and P after 3 steps; the library's first step, which sets P by an SVD, goes before."""
    weight, _, right = started(shape)
    own = torch.nn.Parameter(weight.detach().clone())
    gradients = [weight.grad * (1 + k) + 1e-3 * k for k in range(4)]
    optimizer = osd_torch.make_optimizer(
        [("mlp", own)], "galore_adamw", "continuous", lr=LR, rank=RANK, scale=SCALE,
        update_proj_gap=GAP,
    )  # fmt: skip
    own.grad = gradients[0].clone()
    optimizer.step()
    basis, state = osd_torch.projectors(optimizer)["mlp"], optimizer.state[own]
    step = PublishedStep(own.detach().clone(), gradients[0], basis.clone(), right)
    step.count = 1  # as after the library's first step, which moves W and not P
    step.first, step.second = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    for gradient in gradients[1:]:
        step.gradient = gradient
        step()
        own.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(step.weight, own.detach(), rtol=1e-9, atol=1e-12)
    basis = osd_torch.projectors(optimizer)["mlp"]
    torch.testing.assert_close(step.basis.detach(), basis, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_floor_is_the_products_of_a_step(shape: tuple[int, int]) -> None:
    weight, basis, right = started(shape)
    before = as_m(weight.detach().clone(), right)
    matrix = as_m(weight.grad, right)
    floor = SevenProducts(weight.float(), weight.grad.float(), basis.float(), right)
    floor()
    low_rank = basis.mT @ matrix
    a = matrix @ low_rank.mT
    moved = basis @ (basis.mT @ a) + a @ (basis.mT @ basis)
    lifted = before - LR * basis @ floor.direction.double()
    close = dict(rtol=1e-4, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(floor.weight, lifted, **close)
    torch.testing.assert_close(floor.moved, moved, **close)
    # All that P's gradient needs besides: (2 / s) (... - 2 A).
    s = matrix.square().sum()
    gradient = online_pca_gradient(basis, make_sketch(basis, matrix, (CORRELATION, SQUARED_NORM)))
    torch.testing.assert_close((floor.moved - 2 * a) * 2 / s, gradient, **close)

    of_jax = seven_products(
        *(jnp.asarray(x.numpy(), jnp.float32) for x in (before, matrix, basis, floor.direction))
    )
    for there, here in zip(of_jax, (lifted, low_rank, a, moved), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-6)


def test_optimizer_runs_every_contender(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = tuple(map(case_of, SHAPES[:2]))  # a square one takes the first one's side
    monkeypatch.setattr("launch.bench.optimizer.CASES", cases)
    flags = "--rounds 1 --turn_seconds 0 --svd_seconds 0 --machine here"
    main(["optimizer", *flags.split(), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "optimizer.json").read_text())
    assert (found["machine"], found["how"]["rounds"]) == ("here", 1)
    assert {"cpu", "threads", "date", "versions"} <= set(found)
    assert {k: set(v) for k, v in found["rates"].items()} == {
        "torch": {"product", "copy"}, "jax": {"product", "copy"},
    }  # fmt: skip
    assert len(found["records"]) == len(cases) * len(CONTENDERS)
    for record in found["records"]:
        assert record["contender"] in printed
        assert set(record["seconds"]) == SPREAD and record["seconds"]["median"] > 0
        assert ("svd" in record) == record["contender"].startswith("GaLore")
        if record["contender"] in FLOORS.values():
            assert record["over_floor"]["median"] == 1
    assert (tmp_path / "optimizer.png").stat().st_size > 0

    main(["docs", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "benchmark.md").read_text()
    for words in (*CONTENDERS, "16x24, rank 4 (tiny)", found["date"]):
        assert words in text
    assert str(tmp_path) not in text
    assert (tmp_path / "docs" / "benchmark.png").stat().st_size > 0
    osd = next(r for r in found["records"] if r["contender"] == "osd_jax, AdamW")
    assert f"| jax | {report.ratio(osd['over_floor'])} |" in text  # in short


def test_the_page_of_a_gpu_is_one_of_its_own(tmp_path: Path) -> None:
    found = {"how": {"device": "cuda"}}
    assert page.stem({"memory": found}) == "benchmark_cuda"
    with pytest.raises(UsageError, match="results of cpu and cuda"):
        page.stem({"memory": found, "train": {"how": {"device": "cpu"}}})


TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 16, "rms_norm_eps": 1e-6,
}  # fmt: skip


@pytest.fixture
def tiny_flags(tmp_path: Path) -> list[str]:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    flags = f"--model_config {tmp_path / 'tiny.json'} --tokens 16 --length 8 --rank 4"
    return [*flags.split(), "--out", str(tmp_path)]


def test_model_steps_all_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.bench.model import ADAMW, FLOOR, OURS

    flags = f"--model_config configs/llama_quickstart.json --rank 8 --rounds 1 --out {tmp_path}"
    main(["model", *flags.split()])
    records = json.loads((tmp_path / "model.json").read_text())["records"]
    assert [record["contender"] for record in records] == [FLOOR, *OURS, ADAMW]
    assert all(record["matrices"] == 28 for record in records)
    assert "over the floor" in capsys.readouterr().out


def test_train_runs_every_contender(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", *tiny_flags, "--rounds", "1"])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "train.json").read_text())
    assert [r["contender"] for r in found["records"]] == [c.name for c in TRAINED]
    for record in found["records"]:
        assert record["contender"] in printed
        assert all(set(x) == SPREAD for x in record.values() if isinstance(x, dict))
        assert record["tokens_per_second"]["median"] > 0
    for part in PARTS:
        assert part in printed
        assert all(found["parts"][part][name]["median"] > 0 for name in ("torch", "jax"))
    main(["docs", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")])
    assert PARTS[0] in (tmp_path / "docs" / "benchmark.md").read_text()
    assert (tmp_path / "train.png").stat().st_size > 0


COUNTED = {  # by default
    ("online PCA", False), ("online PCA", True), ("osd_muon", False), ("full-rank AdamW", False),
    ("8-bit online PCA", False),
}  # fmt: skip


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_counts_state_alike_on_both_sides(
    everything: bool,
    tiny_flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_chosen = lambda one: everything or (one.method, one.layerwise) in COUNTED
    monkeypatch.setattr(memory, "CONTENDERS", list(filter(is_chosen, memory.CONTENDERS)))
    main(["memory", *tiny_flags])
    assert "peak of a step" in capsys.readouterr().out
    found = json.loads((tmp_path / "memory.json").read_text())["records"]
    by_name = {record["contender"]: record for record in found}
    assert len(by_name) == len(found)
    for record in found:
        assert record["peak_bytes"] > record["weight_bytes"] + record["state_bytes"] > 0
        other = by_name[record["contender"].replace("osd_torch", "osd_jax")]
        assert other["weight_bytes"] == record["weight_bytes"]
        if "8-bit" not in record["contender"]:  # they differ in what is too small for 8 bits
            # One side counts steps by parameter, in float32, the other a few times.
            assert math.isclose(other["state_bytes"], record["state_bytes"], rel_tol=0.01)
    moments = 2 * by_name["osd_jax, full-rank AdamW"]["weight_bytes"]
    assert moments <= by_name["osd_jax, full-rank AdamW"]["state_bytes"] < moments + 100


def test_most_allocated_is_what_lives_at_once() -> None:
    def step() -> None:
        first = torch.empty(10_000, dtype=torch.uint8)
        del first
        second, third = (torch.empty(30_000, dtype=torch.uint8) for _ in range(2))
        del second, third

    assert most_allocated(step) == 60_000


def test_ratios_are_of_one_round_and_svds_are_spread() -> None:
    times = {name: [1.0, 10.0, 100.0] for name in CONTENDERS}
    times["osd_torch, AdamW"] = [1.5, 15.0, 150.0]
    times[PUBLISHED["torch"]] = [3.0, 30.0, 300.0]
    times[FLOORS["jax"]] = [0.5, 5.0, 50.0]
    del times["bitsandbytes AdamW8bit"]
    svd = timing.Spread(20.0, 20.0, 20.0)
    found = records(
        case_of((16, 24)), times, {"GaLore, osd_torch": svd}, {"bitsandbytes AdamW8bit": "absent"}
    )
    by_name = {record["contender"]: record for record in found}
    ours = by_name["osd_torch, AdamW"]
    assert ours["over_floor"] == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert ours["over_best_floor"]["median"] == 3
    assert ours["published_over_this"]["median"] == 2
    assert ours["over_full_rank"]["median"] == 1.5
    assert by_name[FULL_RANK["jax"]]["over_floor"]["median"] == 2
    assert by_name["GaLore, osd_torch"]["seconds"]["median"] == 10 + 20 / GAP
    assert by_name["bitsandbytes AdamW8bit"]["missing"] == "absent"
    assert "absent" in report.optimizer_text(found)


def test_lapack_has_one_thread_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in (({}, "1"), ({"OPENBLAS_NUM_THREADS": "4"}, "4")):
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        keep_lapack_to_one_thread()
        assert os.environ["OPENBLAS_NUM_THREADS"] == expected
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    keep_lapack_to_one_thread()
    assert "OPENBLAS_NUM_THREADS" not in os.environ


def test_rounds_give_each_contender_its_turn() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.time_in_rounds(steps, rounds=4, settle=False)
    assert {name: len(x) for name, x in times.items()} == dict.fromkeys("abc", 4)
    turns = calls[-12:]
    assert all(sorted(turns[i : i + 3]) == list("abc") for i in range(0, 12, 3))
    assert turns != turns[:3] * 4  # the order is random in each round


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("optimizer --models 2B", "--models: 2B is unknown; expected 60M, 350M, 1B"),
        ("optimizer --rounds 0", "--rounds: 0 is too small"),
        ("train --tokens 100", "--tokens: 100 is not a number of rows of 256"),
        ("memory --model_config nowhere.json", "--model_config: no file nowhere.json"),
        ("docs --out nowhere", "nowhere holds no results"),
        ("optimizer --threads 4096", "--threads: 4096 is more than the"),
    ],
)
def test_errors_name_the_flag(flags: str, words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        main(flags.split())


def test_numbers_are_read_at_a_glance() -> None:
    given = (0.01234, 0.9996, 1.234, 12.34, 123.4, 1234.5, 0.0)
    assert [report.number(x) for x in given] == [
        "0.0123", "1.00", "1.23", "12.3", "123", "1,230", "0",
    ]  # fmt: skip


def test_floor_of_counts_seven_products() -> None:
    p, q, r = 512, 1376, 128
    ops, numbers = page.floor_of((q, p), r)
    assert ops == 6 * p * q * r + 8 * p * r * r
    assert numbers == 4 * p * q + 3 * p * r + 3 * q * r + 8 * p * r + 4 * r * r
