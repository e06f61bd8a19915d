"""The examples of README, docs and docstrings run, and the README's tables match the suite."""

from __future__ import annotations

import doctest
import importlib.util
import pkgutil
import re
from types import ModuleType

import pytest

import osd_jax
import osd_torch
from parity_tests.readme_tables import README, updated

LIBRARIES = (osd_jax, osd_torch)
EXAMPLES = (
    "osd_names", "launch.compile_tpu.hlo", "launch.trainer.keywords",
    "launch.trainer.options.options", "launch.trainer.processes",
)  # fmt: skip
MODULES = EXAMPLES + tuple(
    module.name
    for library in LIBRARIES
    for module in pkgutil.walk_packages(library.__path__, f"{library.__name__}.")
)


def test_its_examples_run() -> None:
    failed, run = doctest.testfile(str(README), module_relative=False)
    assert run >= 12
    assert not failed


def test_the_methods_examples_run() -> None:
    page = README.parent / "docs" / "method.md"
    failed, run = doctest.testfile(str(page), module_relative=False)
    assert run >= 6
    assert not failed


def test_its_tables_are_the_suites() -> None:
    text = README.read_text(encoding="utf-8")
    assert updated(text) == text, "run: python -m parity_tests.readme_tables"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_the_files_that_a_page_names_are_there(page: str) -> None:
    """And so are the modules of its commands, and the parts of the suite that it runs."""
    root = README.parent
    text = (root / page).read_text(encoding="utf-8")
    for path in re.findall(r"[\w./-]+/[\w.-]+\.(?:py|sh|md|yml|txt)\b", text):
        assert (root / path).is_file(), f"{page} names {path}"
    for module in re.findall(r"-m ((?:launch|parity_tests)[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None, f"{page} names {module}"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    assert not doctest.testmod(importlib.import_module(name)).failed


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.__name__)
def test_every_public_object_has_an_example(library: ModuleType) -> None:
    """Statistics are values, whose docstring is that of their class."""
    objects = {name: getattr(library, name) for name in library.__all__}
    lacking = [name for name, x in objects.items() if ">>>" not in (x.__doc__ or "")]
    assert not [name for name in lacking if not name.isupper()]
