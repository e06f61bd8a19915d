"""Runs the notebooks of examples/ and stores their outputs: `python -m parity_tests.notebooks`."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from parity_tests.support import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def read(notebook: Path) -> NotebookNode:
    """The notebook with the outputs that it holds."""
    return nbformat.read(notebook, as_version=4)


def executed(notebook: Path) -> NotebookNode:
    """The notebook with the outputs of a run in the project's root; a cell's error is raised."""
    book = read(notebook)
    client = NotebookClient(
        book,
        timeout=300,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    book.metadata.language_info = {"name": "python"}  # the kernel adds the versions of its machine
    return book


def printed(book: NotebookNode) -> list[str]:
    """What the cells print and return, as text."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return [output.text if "text" in output else output.data["text/plain"] for output in outputs]


if __name__ == "__main__":
    for notebook in NOTEBOOKS:
        nbformat.write(executed(notebook), notebook)
