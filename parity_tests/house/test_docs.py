"""Pages and notebooks: what they link to is there, and their code and commands run.

`launch/docs.sh`, which `.ci/run` calls, builds the site and checks links and anchors once more.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shlex
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from launch.train_jax import Options, refuse_torch_only
from launch.train_torch import refuse_jax_only
from parity_tests.notebooks import NOTEBOOKS, executed, printed, read
from parity_tests.support import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINKING = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
GUIDES = sorted((DOCS / "guides").glob("*.md"))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(page: Path, language: str) -> list[tuple[int, str]]:
    """(lines before it, text) of each block of a language."""
    text = page.read_text(encoding="utf-8")
    blocks = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in blocks]


# Pages and links


def nav_pages(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from nav_pages(inner)


def test_the_nav_has_every_page_and_example() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    examples = [*NOTEBOOKS, *(ROOT / "examples").glob("[!_]*.py")]
    expected = [str(page.relative_to(DOCS)) for page in PAGES]
    expected += [f"examples/{example.stem}.md" for example in examples]
    assert sorted(nav_pages(site["nav"])) == sorted(expected)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site give the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}


@pytest.mark.parametrize("page", LINKING, ids=name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!\w+:)([^)\s#]*)#?([^)\s]*)", text)
    assert links or page.parent.name in ("api", "docs"), "a page that should link to others"
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), f"{name(page)} links to {path}"
        if anchor:
            assert anchor in anchors(target), f"{name(page)} links to {path}#{anchor}"


# Code


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_the_code_of_a_guide_runs(page: Path) -> None:
    """Block by block in one namespace, as a reader would run them."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for lines, block in fenced(page, "python"):
        exec(compile("\n" * lines + block, name(page), "exec"), namespace)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_a_notebook_prints_what_it_holds(notebook: Path) -> None:
    """All but the losses, which depend on Python's version: the text is one of its files.

    They are below the loss of token frequencies alone, the entropy of the text's bytes.
    """
    held, now = printed(read(notebook)), printed(executed(notebook))
    assert len(held) == 2 and held[0].count("\n") == 4
    losses = re.compile(r"\d+\.\d+")
    assert [losses.sub("", text) for text in now] == [losses.sub("", text) for text in held]
    counts = Counter(Path(argparse.__file__).read_bytes())
    shares = [count / counts.total() for count in counts.values()]
    entropy = -sum(share * math.log(share) for share in shares)
    for text in (held[0], now[0]):
        assert len(losses.findall(text)) == 3
        assert max(map(float, losses.findall(text))) < entropy - 0.2
    for path in (str(ROOT), str(Path.home()), "/tmp/"):
        assert path not in notebook.read_text(encoding="utf-8")


# Commands

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def check_pip(arguments: list[str]) -> None:
    """The extras are declared, and so are packages beside them."""
    extras = PROJECT["optional-dependencies"]
    declared = {re.match(r"[\w-]+", each)[0] for extra in extras.values() for each in extra}
    assert arguments[0] == "install"
    for word in (word for word in arguments[1:] if word != "-e"):
        if word.startswith("."):
            assert set(word[2:-1].split(",")) <= set(extras), word
        else:
            assert word in declared, word


def check_trainer(script: str, arguments: list[str], processes: int) -> None:
    """The trainer accepts the flags."""
    options = Options.parse(arguments).check(processes=processes)
    (refuse_jax_only if script.endswith("train_torch") else refuse_torch_only)(options)


def check_recipe(script: str, arguments: list[str], environment: dict[str, str]) -> None:
    """The recipe prints a command whose flags its trainer accepts."""
    shown = subprocess.run(
        ["bash", script, *arguments],
        cwd=ROOT,
        env={**os.environ, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    words = shown.stdout.split()
    start = words.index("-m")
    processes = int(environment.get("SLURM_NTASKS", environment.get("HOSTS", "1")))
    check_trainer(words[start + 1], words[start + 2 :], processes)


def check_example(module: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """All is well but for the number of steps, which it checks last: nothing is trained."""
    with pytest.raises(SystemExit):
        importlib.import_module(module).main([*arguments, "--steps", "0"])
    assert "--steps: 0 is too few" in capsys.readouterr().err


def check_module(module: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The flags are in the module's help; what `compile_tpu` passes on, the trainer accepts."""
    assert importlib.util.find_spec(module) is not None, f"no module {module}"
    if module == "launch.compile_tpu":
        topology = argparse.ArgumentParser(allow_abbrev=False)
        topology.add_argument("--topology", required=True)
        check_trainer("launch.train_jax", topology.parse_known_args(arguments)[1], processes=1)
        return
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in arguments if word.startswith("-"))


def check(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails for a command that would be refused, and for one that this test does not know."""
    words = shlex.split(command, comments=True)
    environment = {}
    while "=" in words[0]:
        key, _, value = words.pop(0).partition("=")
        environment[key] = value
    match words:
        case ["pip", *arguments]:
            check_pip(arguments)
        case ["torchrun", *arguments]:
            run = get_args_parser().parse_args(arguments)
            script = run.training_script.removesuffix(".py")
            if script.startswith("examples/"):
                check_example(script.replace("/", "."), run.training_script_args, capsys)
            else:
                check_trainer(script, run.training_script_args, int(run.nproc_per_node))
        case ["sbatch", nodes, script, *arguments] if nodes.startswith("--nodes="):
            tasks = 8 * int(nodes.removeprefix("--nodes="))  # as the script's header asks for
            assert "#SBATCH --ntasks-per-node=8\n" in (ROOT / script).read_text(encoding="utf-8")
            check_recipe(script, arguments, {**environment, "SLURM_NTASKS": str(tasks)})
        case ["bash", script, *arguments] if script.startswith("launch/recipes/"):
            check_recipe(script, arguments, environment)
        case ["bash", script]:
            subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
        case ["python", "-m", "launch.train_jax", *arguments]:
            check_trainer("launch.train_jax", arguments, processes=1)
        case ["python", "-m", module, *arguments]:
            check_module(module, arguments, capsys)
        case ["python", script, *arguments] if script.startswith("examples/"):
            check_example(script.removesuffix(".py").replace("/", "."), arguments, capsys)
        case _:
            pytest.fail(f"no check for: {command}")


COMMANDS = [
    (name(page), command)
    for page in PAGES
    for _, block in fenced(page, "bash")
    for command in re.sub(r"\\\n\s*", "", block).splitlines()
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_accepted(
    page: str, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    check(command, capsys)


def test_the_guides_have_code_and_commands() -> None:
    """So that the tests above test something."""
    assert {page.stem for page in GUIDES} >= {"optax", "torch", "trainer", "llama"}
    assert sum(len(fenced(page, "python")) for page in GUIDES) > 12
    assert len(COMMANDS) > 12
