"""`parity_tests.processors`: settings that reach the tests, and a table of the results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from parity_tests import processors
from parity_tests.support import ROOT

TESTS = """
import os
import torch

def test_of_this_setting():
    assert torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX")
    assert os.environ["OMP_NUM_THREADS"] == "1"

def test_that_fails():
    assert False
"""


def test_a_setting_reaches_the_tests_and_failures_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "test_one.py"
    path.write_text(TESTS)
    if reason := processors.reason_to_skip(processors.SETTINGS["ATen default"]):
        pytest.skip(reason)
    command = ["--settings", "ATen default", "--jobs", "1", str(path)]
    assert processors.main(command) == 1
    *header, row = capsys.readouterr().out.splitlines()
    assert "\n".join(header) == processors.HEADER
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["ATen default", "1", "1"] and cells[4] == "`test_one::test_that_fails`"
    assert float(cells[3]) >= 0


def test_a_setting_is_added_to_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    environment = processors.environment_of(processors.SETTINGS["XLA AVX2"])
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_max_isa=AVX2"
    assert environment["XLA_FLAGS"] == flags and environment["OMP_NUM_THREADS"] == "4"
    assert processors.environment_of(processors.SETTINGS["2 threads"])["OMP_NUM_THREADS"] == "2"
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"


def test_what_the_processor_lacks_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(processors, "instructions", lambda: {"avx2"})
    monkeypatch.setattr(processors.platform, "machine", lambda: "x86_64")
    assert processors.main(["--settings", "XLA AVX512"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == "| XLA AVX512 | 0 | 0 | 0 | skipped: x86_64 without avx512f |"


def test_a_setting_that_does_not_arrive_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(processors, "instructions", lambda: {"avx2"})
    monkeypatch.setattr(processors, "report", lambda setting: "ATen: AVX512")
    assert processors.main(["--settings", "ATen AVX2"]) == 1
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == "| ATen AVX2 | 0 | 1 | 0 | the setting did not arrive |"


def test_every_module_is_there() -> None:
    modules = {name for setting in processors.SETTINGS.values() for name in setting.modules}
    assert not [name for name in modules if not (ROOT / "parity_tests" / f"{name}.py").exists()]
