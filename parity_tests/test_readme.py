"""What the README and the docstrings show runs, and its tables are those of the suite."""

from __future__ import annotations

import doctest
import importlib
import re

import pytest
from readme_tables import README, updated

MODULES = (
    "launch.hosts", "osd_jax.blockwise", "osd_jax.checkpoint", "osd_jax.hlo", "osd_jax.optimizers",
    "osd_jax.projectors", "osd_jax.rules", "osd_jax.selection", "osd_jax.sharding",
    "osd_jax.subspace", "osd_jax.train",
    "osd_torch.blockwise", "osd_torch.optimizers", "osd_torch.projectors", "osd_torch.rules",
    "osd_torch.selection", "osd_torch.subspace",
)  # fmt: skip


def test_its_examples_run() -> None:
    failed, run = doctest.testfile(str(README), module_relative=False)
    assert run >= 12
    assert not failed


def test_its_tables_are_the_suites() -> None:
    text = README.read_text(encoding="utf-8")
    assert updated(text) == text, "run: python -m parity_tests.readme_tables"


def test_what_pages_link_to_is_there() -> None:
    pages = [README, *(README.parent / "docs").glob("*.md")]
    found = 0
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)", text):
            if "://" not in target:
                found += 1
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
    assert found > 10


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    assert not doctest.testmod(importlib.import_module(name)).failed
