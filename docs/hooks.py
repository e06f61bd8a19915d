"""What the docs site adds to MkDocs: equations in MathML, and pages of the files in examples/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from math_core import LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

EXAMPLES = Path(__file__).parents[1] / "examples"
MATH = LatexToMathML()  # raises LatexError for what it does not know


def _equation(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{MATH.convert_with_local_state(source, displaystyle=True)}</div>'


def on_config(config: MkDocsConfig) -> None:
    """Adds the fence `math`, which GitHub knows too: browsers draw MathML without a script."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": _equation}]


class GoogleExample(griffe.Extension):
    """Reads `Example:` as the section `Examples:`; Google's style has both, Griffe the latter."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the heading in one docstring."""
        if obj.docstring is not None:
            value = obj.docstring.value
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", value, flags=re.M)


def _page(example: Path) -> str:
    if example.suffix == ".ipynb":
        body, _ = MarkdownExporter().from_filename(str(example))
        return body.replace("](../docs/", "](../")
    return f"# {example.name}\n\n```python\n{example.read_text(encoding='utf-8')}```\n"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Makes a page of each example, `examples/NAME.md`."""
    for example in (*EXAMPLES.glob("*.ipynb"), *EXAMPLES.glob("[!_]*.py")):
        uri = f"examples/{example.stem}.md"
        files.append(File.generated(config, uri, content=_page(example)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links to files of examples/, which work on GitHub, into links to their pages."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(
        r"\]\((?:\.\./)+examples/(\w+)\.(?:py|ipynb)\)", rf"]({up}examples/\1.md)", markdown
    )
