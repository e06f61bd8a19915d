"""Writes the README's tables from the suite's facts: `python -m parity_tests.readme_tables`."""

from __future__ import annotations

import re

from launch.compare.report import headline, shares_table
from launch.compare.runs import Runs
from osd_names import PROJECTIONS, SUBSPACE_OPTIMIZERS
from parity_tests.support import ROOT
from parity_tests.support.combinations import PROJ_TYPES, RULES
from parity_tests.support.golden_cases import golden_cases
from parity_tests.support.state_bytes import table

README = ROOT / "README.md"


def combinations() -> str:
    """Which rule of W and which rule of P are checked together, and against what, in Markdown."""
    oracle = {(optimizer, kind) for optimizer, _ in RULES.values() for kind in PROJ_TYPES}
    golden = {(case.optimizer, case.proj_type) for case in golden_cases()}
    columns = SUBSPACE_OPTIMIZERS
    lines = ["| `proj_type` | " + " | ".join(f"`{name}`" for name in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for kind in PROJECTIONS:
        cells = []
        for name in columns:
            checks = {"oracle": oracle, "release": golden}
            found = [check for check, pairs in checks.items() if (name, kind) in pairs]
            cells.append(", ".join(found) or "runs")
        lines.append(f"| `{kind}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def updated(readme: str) -> str:
    """The README with the tables between their markers replaced."""
    names = ("muon", "osd_muon", "osd_muon_low", "osd_muon_small", "osd", "galore", "adamw_8bit")
    learned = ("adamw", "muon", "osd_muon", "osd_muon_fixed", "osd_muon_small", "stateless")
    runs = Runs(ROOT / "docs/comparison/runs.jsonl").read()
    tables = {
        "learned": "\n".join(headline(runs, "quickstart-1.2M", (*learned, "galore", "osd_paper"))),
        "combinations": combinations(),
        "state": table(),
        "shares": "\n".join(shares_table(names)),
    }
    for name, text in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        readme, count = re.subn(
            pattern, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", readme, flags=re.DOTALL
        )
        assert count == 1, f"README.md has {count} places for the table '{name}'"
    return readme


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
