"""`launch.compare`: the search, its page about stored runs, and that its flags are valid."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from launch.compare import __main__ as program
from launch.compare import methods, report, runs, state, tune
from launch.compare.methods import METHODS, Config, Setting
from launch.trainer.cli import UsageError
from launch.trainer.options import Options

SETTING = Setting("quickstart", 1_200_000)


def bowl(config: Config) -> float:
    """A loss whose best rate is 0.02 with the flags "b", and 0.01 with others, which are worse."""
    best = 0.02 if config.own == "b" else 0.01
    return math.log2(config.lr / best) ** 2 + 2 * (config.own != "b")


def test_the_search_ends_between_two_worse_rates_within_its_trials() -> None:
    found = tune.search(bowl, Config(0.0025, 0.03, "a"), ("a", "b", "c"), trials=20)
    assert found[0] == Config(0.02, 0.03, "b")
    rates = {config.lr for config in found if config.own == "b"}
    assert {0.01, 0.02, 0.04} <= rates
    for trials in range(1, 9):
        tried: list[Config] = []
        loss = lambda config, tried=tried: tried.append(config) or bowl(config)  # type: ignore[func-returns-value]
        ranked = tune.search(loss, Config(0.0025, 0.03, "a"), ("a", "b"), trials)
        assert len(tried) == len(set(tried)) == len(ranked) <= trials + tune.MORE
        assert bowl(ranked[0]) == min(map(bowl, tried))


def test_flags_at_an_edge_widen_the_search_by_one() -> None:
    loss = lambda config: {"a": 2.0, "b": 1.0, "beyond": 0.0}[config.own] + abs(config.lr - 0.01)
    for trials, best in ((8, "beyond"), (4, "b")):
        found = tune.search(loss, Config(0.01, 0.03, "a"), ("a", "b"), trials, {"b": "beyond"})
        assert found[0].own == best and len(found) <= trials + tune.MORE
    never = tune.search(loss, Config(0.01, 0.03, "a"), ("a", "b"), 8, {"a": "beyond"})
    assert never[0].own == "b"
    assert METHODS["muon"].wider and METHODS["adamw"].wider


def test_the_rates_take_half_of_the_trials_before_the_flags() -> None:
    asked: list[Config] = []
    loss = lambda config: (asked.append(config), -config.lr)[1]  # type: ignore[func-returns-value]
    tune.search(loss, Config(0.01, 0.03, "a"), ("a", "b"), 8)
    assert [config.own for config in asked[:5]] == ["a", "a", "a", "a", "b"]


def test_a_rate_at_an_edge_of_its_trials_is_marked() -> None:
    trials = {Config(lr, 0.03, own): 4.0 for lr in (0.01, 0.02, 0.04) for own in ("a", "b")}
    one = report.Summary(Config(0.02, 0.03, "b"), {}, trials, [])
    assert report.rate_text(one) == "0.02"
    del trials[Config(0.04, 0.03, "b")]
    assert report.rate_text(one) == "0.02, at the edge of its trials"


def test_other_configurations_with_seeds_are_listed_but_not_chosen() -> None:
    def one(method: str, lr: float, seed: int, loss: float) -> dict[str, Any]:
        given = {"setting": "quickstart-1M", "method": method, "lr": lr, "full_lr": 0.03, "own": ""}
        return {**given, "seed": seed, "loss": loss, "curve": []}

    found = [one("galore", 0.01, seed, 4.0) for seed in (0, 100, 1, 2)]
    for lr, by_search, losses in ((0.01, 3.9, (4.1, 4.2)), (0.02, 4.0, (3.8, 3.9))):
        found += [one("osd_paper", lr, seed, by_search) for seed in (0, 100)]
        found += [one("osd_paper", lr, seed, x) for seed, x in zip((1, 2), losses, strict=True)]
    summaries = {m: report.summary(found, "quickstart-1M", m) for m in ("osd_paper", "galore")}
    ours = summaries["osd_paper"]
    assert ours and ours.config.lr == 0.01 and ours.losses == {1: 4.1, 2: 4.2}
    page = "\n".join(report.section("quickstart-1M", summaries))  # type: ignore[arg-type]
    title = METHODS["osd_paper"].title
    assert f"| {title} | {METHODS['galore'].title} | +0.150 ± " in page
    assert f"| {title}; not chosen by the search: 0.02 | {METHODS['galore'].title} | -0.150" in page


def test_a_rate_that_fails_is_not_chosen() -> None:
    loss = lambda config: math.inf if config.lr > 0.01 else -config.lr
    assert tune.search(loss, Config(0.01, 0.03, ""), ("",))[0].lr == 0.01


def test_of_the_two_best_the_better_one_with_two_seeds() -> None:
    lucky = {0.01: -0.1, 0.005: 0.0, 0.02: 1.0}
    loss = lambda config, seed: lucky[config.lr] if seed == 0 else float(config.lr == 0.01)
    method = METHODS["stateless"]._replace(own=("",))
    assert tune.tuned(loss, method, Config(0.01, 0.03, ""), 3).lr == 0.005


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", methods.MODELS)
def test_every_method_has_flags_that_the_trainer_takes(model: str, name: str) -> None:
    own = METHODS[name]
    for one in (*own.own, *own.wider.values()):
        flags = methods.flags_of(Setting(model, 10**9), own, Config(own.lr, 0.03, one), seed=3)
        options = Options.parse([*flags.split(), "--run_dir", "nowhere"]).check()
        assert options.optimizer.lr == own.lr and options.run.seed == 3
        assert options.optimizer.full_lr == (None if own.one_rate else 0.03)


def kept(method: str, seed: int, loss: float | None, lr: float = 0.01) -> dict[str, Any]:
    """A finished run."""
    return {
        "setting": SETTING.name, "method": method, "lr": lr, "full_lr": 0.03, "own": "--beta2 0.95",
        "seed": seed, "loss": loss, "curve": [5.0, 4.5, 4.2], "seconds": 1.0, "flags": str(seed),
        "machine": "a processor",
    }  # fmt: skip


def test_a_difference_is_that_of_students_paired_t() -> None:
    draw = np.random.default_rng(0).normal
    ours, theirs = draw(4.0, 0.1, 5), draw(4.1, 0.1, 5)
    found = report.difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    wanted = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found is not None
    np.testing.assert_allclose(
        [found.mean - found.half, found.mean + found.half], wanted, rtol=1e-12
    )
    assert report.difference({1: 4.0, 2: math.inf}, {1: 4.0, 2: 4.1}) is None
    assert report.difference({1: 4.0}, {1: 4.1}) is None
    with_others = report.difference({1: 4.0, 2: 4.0, 7: 9.0}, {1: 4.5, 2: 4.5, 8: 1.0})
    assert with_others is not None and with_others.mean == -0.5  # the seeds of both alone


def test_the_page_says_what_the_runs_say(tmp_path: Path) -> None:
    losses = {"adamw": [4.0, 4.1, 4.2], "osd_muon": [3.8, 3.9, 4.0], "muon": [3.7, None, 3.9]}
    found = [kept(name, 0, 4.0, lr) for name in losses for lr in (0.005, 0.01, 0.02)]
    found += [kept(n, seed, x) for n, each in losses.items() for seed, x in enumerate(each, 1)]
    report.write(found, tmp_path)
    page = (tmp_path / "README.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if "3.900" in line}
    ours = lines[METHODS["osd_muon"].title]
    assert "-0.200 ± 0.000" in ours and "3.800, 3.900, 4.000" in ours and "| 0.01 |" in ours
    assert f"| {METHODS['muon'].title} |" in page and "failed" in page  # a failed run is reported
    assert (tmp_path / f"{SETTING.name}.png").read_bytes()[:4] == b"\x89PNG"

    # What someone concluded from them, with the figures filled in.
    name = f"{SETTING.name.replace('-', '_').replace('.', '_')}_osd_muon_adamw"
    (tmp_path / report.FINDINGS).write_text(f"Lower by ${name}.")
    report.write(found, tmp_path)
    assert "\n\nLower by -0.200 ± 0.000.\n\n" in (tmp_path / "README.md").read_text()
    (tmp_path / report.FINDINGS).write_text(f"Lower by ${name}_other.")
    with pytest.raises(UsageError, match=rf"\${name}_other is not .* expected one of {name}"):
        report.write(found, tmp_path)


def test_longer_runs_begin_with_what_was_best_in_shorter_ones() -> None:
    found = [kept("muon", 0, 4.0), kept("muon", 0, 3.9, 0.02), kept("muon", 1, 3.9, 0.02)]
    assert report.best_config(found, SETTING, "muon") is None
    longer = SETTING._replace(tokens=5_000_000)
    best = report.best_config(found, longer, "muon")
    assert best == Config(0.02, 0.03, "--beta2 0.95")
    assert report.best_config(found, longer._replace(model="9m"), "muon") is None


def test_a_run_does_not_see_another_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another process, or of one that was killed after ten updates without a finite loss."""

    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert not any(Path(command[command.index("--run_dir") + 1]).iterdir())
        return subprocess.CompletedProcess(command, 1, "", "a wrong flag")

    monkeypatch.setattr(runs, "RUN_DIR", tmp_path)
    monkeypatch.setattr(runs.subprocess, "run", fail)
    (tmp_path / "taken").mkdir()
    log = tmp_path / "taken" / "metrics.jsonl"
    log.write_text('{"kind": "train", "step": 10, "loss": null, "skipped_in_a_row": 10}\n')
    with pytest.raises(UsageError, match="a wrong flag"):
        runs.trained("taken", "--lr 1", threads=1)
    assert list(tmp_path.iterdir()) == [log.parent] and log.exists()


def test_a_run_that_two_processes_trained_is_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (runs.Runs(tmp_path / "runs.jsonl") for _ in range(2))
    of = (SETTING, "muon", Config(0.01, 0.03, ""), 0)
    results = {"loss": 4.0, "curve": [], "seconds": 1.0}
    monkeypatch.setattr(runs, "machine", lambda: "a processor")

    def meanwhile(*_: Any) -> dict[str, Any]:
        monkeypatch.setattr(runs, "trained", lambda *_: results)
        other.loss(*of)
        return results

    monkeypatch.setattr(runs, "trained", meanwhile)
    assert one.loss(*of) == 4.0
    assert len(one.read()) == 1


def test_an_interrupted_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run is trained twice, and the rate of the embedding widens its grid."""
    trained: list[str] = []

    def train(name: str, flags: str, threads: int) -> dict[str, Any]:
        if len(trained) == stop_at:
            raise KeyboardInterrupt
        trained.append(flags)
        options = Options.parse(flags.split())
        rates = options.optimizer
        assert rates.full_lr is not None
        loss = 4 + math.log2(rates.lr / 0.004) ** 2 + math.log2(rates.full_lr / 0.1) ** 2
        return {"loss": loss + 0.01 * options.run.seed, "curve": [loss], "seconds": 1.0}

    monkeypatch.setattr(runs, "trained", train)
    argv = ["--methods", "adamw,osd_muon", "--jobs", "1", "--out", str(tmp_path), "--seeds", "2"]
    for stop_at in (3, 9, 1000):
        try:
            program.main(argv)
        except KeyboardInterrupt:
            assert stop_at < 1000
    assert len(trained) == len(set(trained))
    found = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["flags"] for run in found] == trained
    assert {run["full_lr"] for run in found if run["method"] == "osd_muon"} == {0.09}
    assert "| AdamW |" in (tmp_path / "README.md").read_text()
    confirmed = report.summary(found, SETTING.name, "adamw")
    assert confirmed is not None and confirmed.config.lr == 0.004 and len(confirmed.losses) == 2


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--methods", "adam"], ("'adam'", "osd_muon")),
        (["--seeds", "1"], ("--seeds: 1", "2 or more")),
        (["--device", "cuda"], ("--device: cuda", "use cpu")),
    ],
)
def test_mistakes_are_named(
    argv: list[str], parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError) as error:
        program.main([*argv, "--out", str(tmp_path / "new")])
    assert all(part in str(error.value) for part in parts)
    assert not (tmp_path / "new").exists()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"loss": 4.0}\n{"lo')
    with pytest.raises(UsageError, match=r"runs\.jsonl is damaged"):
        program.main(["--report", "--out", str(tmp_path)])


def test_a_run_is_trained_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truly, of two updates; and what fails says what the trainer said."""
    monkeypatch.setattr(runs, "RUN_DIR", tmp_path / "runs")
    flags = Setting.flags
    monkeypatch.setattr(Setting, "flags", lambda self: flags(self).replace("100K", "4K"))
    kept_runs = runs.Runs(tmp_path / "runs.jsonl")
    setting = SETTING._replace(tokens=2 * 4096)
    config = Config(0.01, 0.03, "--momentum 0.8")
    loss = kept_runs.loss(setting, "osd_muon_small", config, seed=1)
    assert 5 < loss < 9
    (found,) = kept_runs.read()
    assert found["loss"] == loss and found["machine"] and found["setting"] == "quickstart-0.008192M"
    assert not list((tmp_path / "runs").iterdir())
    with pytest.raises(UsageError, match="--momentum"):
        kept_runs.loss(setting, "adamw", config, seed=1)
    assert len(kept_runs.read()) == 1


def test_a_run_that_diverges_is_kept_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer gives up with exit code 1 after 10 updates that are not finite."""
    monkeypatch.setattr(runs, "RUN_DIR", tmp_path / "runs")
    last = {"kind": "train", "step": 12, "loss": None, "skipped_in_a_row": 10}

    def train(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        words = dict(zip(command, command[1:], strict=False))
        directory = Path(words["--run_dir"]) / words["--name"]
        directory.mkdir()
        (directory / "metrics.jsonl").write_text(json.dumps(last) + "\n")
        return subprocess.CompletedProcess(command, 1, "", "a reason")

    monkeypatch.setattr(subprocess, "run", train)
    kept_runs = runs.Runs(tmp_path / "runs.jsonl")
    config = Config(0.01, 0.03, "")
    assert kept_runs.loss(SETTING, "adamw", config, seed=1) == math.inf
    assert kept_runs.read()[0]["loss"] is None
    last["skipped_in_a_row"] = 0  # another reason is no result
    with pytest.raises(UsageError, match="a reason"):
        kept_runs.loss(SETTING, "adamw", config, seed=2)


def test_runs_in_other_dtypes_are_of_other_settings() -> None:
    """Runs on a GPU are not mixed with those on a CPU, and searches do not start from them."""
    narrow = SETTING._replace(dtype="bfloat16")
    assert (SETTING.name, narrow.name) == ("quickstart-1.2M", "quickstart-bfloat16-1.2M")
    found = [{**kept("muon", 0, 4.0), "setting": narrow.name}]
    assert report.best_config(found, SETTING._replace(tokens=5_000_000), "muon") is None
    assert report.best_config(found, narrow._replace(tokens=5_000_000), "muon") is not None


def test_the_machine_of_a_run_is_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    assert runs.machine() == "a GPU"


def test_state_is_counted_as_the_formulas_say() -> None:
    """For the quickstart's model: AdamW 2 numbers per weight, Muon 1 for matrices, none without."""
    weights = 4 * (4 * 128 * 128 + 3 * 128 * 352)
    rest = 2 * 2048 * 128 + 9 * 128
    by_name = {name: state.state_size("quickstart", name) for name in METHODS}
    close = lambda numbers, wanted: abs(numbers - wanted) <= 16  # counts
    assert close(by_name["adamw"].numbers, 2 * (weights + rest))
    assert close(by_name["muon"].numbers, weights + 2 * rest)
    assert close(by_name["stateless"].numbers, 2 * rest)
    assert by_name["adamw_8bit"].bytes < 0.27 * by_name["adamw"].bytes
    small = state.share_of_bar("60m", report.RECOMMENDED)
    assert small[0] < 40 and small[1] < 40
    assert state.share_of_bar("350m", report.RECOMMENDED)[0] < 20
    assert state.share_of_bar("1b", report.RECOMMENDED)[0] < 15
