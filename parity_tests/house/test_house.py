"""The structure of the project: files import downward only, and the libraries stand alone."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.support import ROOT

PACKAGES = ("osd_jax", "osd_torch", "launch")
FOREIGN = ("flax", "orbax", "safetensors", "transformers", "launch")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for name in PACKAGES for path in (ROOT / name).rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The modules of the project that a file imports, within functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner or {node.module}
    return found & MODULES.keys() - {module_name(path)}


def test_no_two_files_import_each_other() -> None:
    graph = {name: imports(path) for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 100
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) == len(MODULES)


@pytest.mark.parametrize("library", ["osd_jax", "osd_torch"])
def test_a_library_imports_nothing_of_the_other_and_nothing_of_launch(library: str) -> None:
    other = {"osd_jax": "osd_torch", "osd_torch": "osd_jax"}[library]
    own = {name: path for name, path in MODULES.items() if name.split(".")[0] == library}
    assert own
    for name, path in own.items():
        roots = {x.split(".")[0] for x in imports(path)}
        assert not roots & {other, "launch"}, name
        if ".llama" not in name:
            assert not any(x.startswith(f"{library}.llama") for x in imports(path)), name


@pytest.mark.parametrize(("library", "framework"), [("osd_jax", "torch"), ("osd_torch", "jax")])
def test_import_of_a_library_needs_its_framework_alone(library: str, framework: str) -> None:
    code = (
        f"import sys, {library}; print(*(x for x in {(*FOREIGN, framework)} if x in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_no_test_imports_another_test() -> None:
    """What several files of tests share is in `parity_tests/support`."""
    paths = list((ROOT / "parity_tests").rglob("*.py"))
    assert len(paths) > 50
    pattern = re.compile(r"^\s*(?:from|import)\s.*\btest_\w+", re.MULTILINE)
    assert not [str(path) for path in paths if pattern.search(path.read_text(encoding="utf-8"))]


def test_the_readme_names_each_file_of_a_library_and_no_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("The files of each library") :].split("The libraries import nothing")[0]
    paths = [path for library in ("osd_jax", "osd_torch") for path in (ROOT / library).glob("*.py")]
    assert set(re.findall(r"`(\w+\.py)`", table)) == {x.name for x in paths} - {"__init__.py"}
