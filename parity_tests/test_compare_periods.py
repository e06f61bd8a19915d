"""The page of `launch.compare_periods`: what it says of losses, and that its flags are good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.compare_periods import METHODS, SHARED, report
from launch.options import Options

DOCS = Path(__file__).parent.parent / "docs"


def test_differences_are_taken_seed_by_seed() -> None:
    losses = {name: [4.0, 5.0, 6.0] for name in METHODS}
    losses["every10"] = [4.1, 5.1, 6.1]
    rows = [line for line in report(losses, 204_800).splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(METHODS)
    tenth = next(row for row in rows if "k = 10 " in row)
    assert "5.100 ± 1.000" in tenth and "+0.100 ± 0.000" in tenth


@pytest.mark.parametrize("name", METHODS)
def test_the_flags_are_a_trainers(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(DOCS.parent)
    line = f"{SHARED} {METHODS[name][1]} --run_dir {tmp_path}"
    assert Options.parse(line.split()).check().optimizer == "galore_adamw"


def test_the_page_is_of_the_kept_losses() -> None:
    losses = json.loads((DOCS / "every_kth_step.json").read_text())
    page = (DOCS / "every_kth_step.md").read_text()
    table = lambda text: [line for line in text.splitlines() if line.startswith("| ")]
    assert table(page) == table(report(losses, 204_800))
