"""Code and pages use plain technical English: phrases to avoid, and what to write instead.

Quotations are exempt: lines of Markdown that start with `>`.
"""

from __future__ import annotations

import re
import subprocess

import pytest

from parity_tests.support import ROOT

SUFFIXES = (".py", ".md", ".ipynb", ".sh", ".toml", ".yml", ".yaml", ".txt", ".cff")
EXEMPT = ("parity_tests/golden/", "parity_tests/house/test_english.py")
_UNITS = (
    "updates?|steps?|second|matrix|matrices|row|run|device|process|token|parameter|weight|layer"
)

# A regular expression -> what to write instead.
PHRASES = {
    r"\banew\b": "again, or a verb with re-: recomputed, rebuilt, redrawn",
    r"\bof which\b": "whose, a relative clause, or two sentences",
    r"\bso manieth\b|\bmanieth\b": "every k steps",
    r"\bnot to be had\b|\bto be had\b": "cannot be computed, is not available",
    r"\b(go|goes|going|went|gone) on\b": "continues, resumes",
    r"\bstands? in\b(?! the\b)": "replaces, approximates",
    r"\bat hand\b": "available, or this machine",
    r"\bin (the )?place of\b": "instead of, replaces",
    r"\bthat many\b|\bso many\b": "the given number of",
    r"\b(is|are|was|were) given to\b": "is passed to, receives",
    r"\b(is|are) gone\b": "is freed, no longer exists",
    r"\blets? (it |them )?through\b": "adds the residual, applies the full gradient",
    r"\bas before does\b": "as before",
    r"\bin the midst\b": "during, in the middle",
    r"\bfor ever\b|\bfor good\b": "forever, permanently",
    r"\bas ever\b|\bthe very (same|step|weights|losses)\b": "as usual, the same",
    r"\ban? (update|step|matrix|row|process|device) each\b": "once per update",
    rf"\b(numbers?|tokens|rows|bytes|times|operations|chunks) an? ({_UNITS})\b": "per",
    r"\bneed not\b|\bneed be\b": "does not need to, is not required",
    r"\bmakes? no difference\b": "has no effect",
    r"\b(whoever|whosoever|whereof|thereof|therein|wherein|whence|thence|lest|whilst|nought)\b": (
        "a modern word"
    ),
    r"\bsays? nothing (of|to)\b": "does not describe, does not affect",
    r"\b(is|are) told of\b|\btells? of\b": "is reported, reports",
    r"\bwalks? (back|over|down|the)\b": "iterates over",
    r"\bmends?\b|\bmended\b": "repair, fix",
    r"\bhanded (over )?to\b": "passed to",
}


def sources() -> list[str]:
    """The tracked text files, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:  # a copy without its repository
        pytest.skip("git lists no files here")
    names = [name for name in listed.stdout.split("\0") if name.endswith(SUFFIXES)]
    return [name for name in names if not name.startswith(("shared/", *EXEMPT))]


def found(text: str, pattern: str, is_markdown: bool) -> list[str]:
    """The places in a text, also across a line break, as "line: words"."""
    quoted = re.compile(r"^>.*$", re.MULTILINE)
    kept = quoted.sub(lambda m: " " * len(m[0]), text) if is_markdown else text
    spaced = pattern.replace(" ", r"[\s#]+")
    return [
        f"{kept.count(chr(10), 0, m.start()) + 1}: {' '.join(m[0].split())}"
        for m in re.finditer(spaced, kept, re.IGNORECASE)
    ]


def test_phrases_to_avoid() -> None:
    failures = []
    for name in sources():
        path = ROOT / name
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        for pattern, instead in PHRASES.items():
            for place in found(text, pattern, name.endswith(".md")):
                failures.append(f"{name}:{place} (write: {instead})")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("P is set anew.", ["1: anew"]),
        ("> P is set anew.", []),
        ("the run\ngoes\n# on with", ["2: goes # on"]),
        ("P is set again; renewed", []),
    ],
)
def test_a_phrase_is_found_outside_quotations(text: str, places: list[str]) -> None:
    both = found(text, r"\banew\b", True) + found(text, r"\b(go|goes) on\b", True)
    assert both == places
