"""The wheel: its contents, and that it works when installed without this tree.

It is built by the hook that pip calls, in a copy of the tree, so that it contains no old build.
Environments are new. Those with a framework also see the packages of the running environment.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from osd_names import __version__
from parity_tests.support import ROOT

LIBRARIES = ("osd_jax", "osd_torch")
EXTRA = {"osd_jax": "jax", "osd_torch": "torch"}
NAME = "online-subspace-descent"
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
RUN_EXAMPLE = """
import doctest, importlib, sys
from pathlib import Path

library = importlib.import_module(sys.argv[1])
for module in (library, sys.modules["osd_names"]):
    assert Path(sys.prefix) in Path(module.__file__).parents, module.__file__
finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
for test in finder.find(library.make_optimizer, "make_optimizer", globs={}):
    runner.run(test)
assert runner.tries >= 5 and not runner.failures
print(library.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("tree") / "tree", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


class Installed:
    """A fresh environment with the wheel alone, which may see the running one's packages."""

    def __init__(self, directory: Path, wheel: Path, sees_packages: bool) -> None:
        venv.create(directory, symlinks=True)
        self.python = directory / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(self.python)]
        subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
        if sees_packages:  # Python reads no .pth files there: an editable install stays unseen
            (own,) = directory.glob("lib/python*/site-packages")
            places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
            (own / "others.pth").write_text("\n".join(sorted(places)) + "\n")

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a program in a plain Python: without PYTHONPATH and without its own folder."""
        command = [str(self.python), "-I", "-c", program, *arguments]
        return subprocess.run(command, capture_output=True, text=True)


def library_files() -> set[str]:
    kinds = ("*.py", "*.npz", "py.typed")
    paths = [x for library in LIBRARIES for kind in kinds for x in (ROOT / library).rglob(kind)]
    return {"osd_names.py"} | {path.relative_to(ROOT).as_posix() for path in paths}


def test_it_holds_the_libraries_and_nothing_else(wheel: Path) -> None:
    held = zipfile.ZipFile(wheel).namelist()
    information = f"{NAME.replace('-', '_')}-{__version__}.dist-info/"
    assert {name for name in held if not name.startswith(information)} == library_files()
    assert {"osd_jax/py.typed", "osd_torch/py.typed", "osd_jax/code_books.npz"} <= set(held)
    assert f"{information}licenses/LICENSE" in held


def test_its_metadata(wheel: Path) -> None:
    (name,) = [x for x in zipfile.ZipFile(wheel).namelist() if x.endswith(".dist-info/METADATA")]
    found = Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())
    assert (found["Name"], found["Version"]) == (NAME, __version__)
    assert {"jax", "torch", "train"} <= set(found.get_all("Provides-Extra", []))
    needed = [x for x in found.get_all("Requires-Dist", []) if "extra ==" not in x]
    assert [re.split(r"\W", x)[0] for x in needed] == ["numpy"]


def test_one_version_everywhere() -> None:
    for page, pattern in (("CITATION.cff", r"^version: (\S+)"), ("CHANGELOG.md", r"^## \[(.*?)\]")):
        found = re.search(pattern, (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert found and found[1] == __version__, page


def test_without_a_framework_it_names_the_extra(wheel: Path, tmp_path: Path) -> None:
    installed = Installed(tmp_path / "venv", wheel, sees_packages=False)
    done = installed.run("import osd_names; print(osd_names.__version__)")
    assert (done.stdout.strip(), done.stderr) == (__version__, "")
    for library in LIBRARIES:
        done = installed.run(f"import {library}")
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"ModuleNotFoundError: {library}: No module named"), last
        assert last.endswith(f"pip install '{NAME}[{EXTRA[library]}]'"), last


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_it_runs_where_it_is_installed(library: str, wheel: Path, tmp_path: Path) -> None:
    """The example of `make_optimizer` takes a step, from the wheel and not from this tree."""
    installed = Installed(tmp_path / "venv", wheel, sees_packages=True)
    done = installed.run(RUN_EXAMPLE, library)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == __version__
