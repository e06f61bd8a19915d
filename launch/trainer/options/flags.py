"""A flag: a field of a frozen dataclass that knows its help text, its type and its bounds."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, get_args, get_type_hints

from launch.trainer.cli import UsageError

Field = dataclasses.Field[Any]
DTYPES = ("bfloat16", "float32")


def flag(
    default: Any = dataclasses.MISSING, *, help: str, section: str | None = None, **rules: Any
) -> Any:
    """A field of an option group.

    Args:
        default: Of the flag; none: the flag is required.
        help: What `--help` says.
        section: Of `--help` where it stands; None: that of its group.
        **rules: `choices` (names), `low` and `high` (inclusive bounds), `above` (exclusive bound),
            `type` (reads the text), `metavar`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "section": section, **rules})


def count(text: str) -> int:
    """Reads a whole number that may end in K, M or B: "100M" is 100,000,000.

    Raises:
        argparse.ArgumentTypeError: `text` is no such number.
    """
    digits, unit = text.strip().replace("_", "").replace(",", ""), 1
    if digits[-1:].upper() in ("K", "M", "B"):
        unit = {"K": 10**3, "M": 10**6, "B": 10**9}[digits[-1].upper()]
        digits = digits[:-1]
    try:
        number = float(digits) * unit if unit > 1 else int(digits)
        if number != int(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number; write 1000000 or 1M (K, M and B are understood)"
        ) from None
    return int(number)


def dtype_name(text: str) -> str:
    """The full name of a dtype: "BF16" is "bfloat16"."""
    name = text.lower()
    return {"bf16": "bfloat16", "fp32": "float32"}.get(name, name)


def close(word: str, known: Sequence[str]) -> str:
    """The known word that was probably meant, as the end of a message; empty where none is."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_value(field: Field, value: Any) -> None:
    """Raises UsageError for a value that breaks the rules of its flag."""
    if value is None:
        return
    rules, where = field.metadata, f"--{field.name}: {value!r}"
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where} is not a finite number")
    if "low" in rules and value < rules["low"]:
        raise UsageError(f"{where} is too small; expected {rules['low']} or more")
    if "above" in rules and value <= rules["above"]:
        raise UsageError(f"{where} is too small; expected more than {rules['above']}")
    if "high" in rules and value > rules["high"]:
        raise UsageError(f"{where} is too large; expected {rules['high']} or less")
    if "choices" in rules and value not in rules["choices"]:
        names = ", ".join(rules["choices"])
        raise UsageError(f"{where} is unknown{close(value, rules['choices'])}; expected {names}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}; see --help")


def parse(
    argv: Sequence[str],
    groups: Mapping[str, type],
    sections: Mapping[str, str],
    *,
    prog: str | None,
    description: str,
) -> dict[str, Any]:
    """The values of the flags that a command line gives, by name.

    Args:
        argv: The command line, without the program's name.
        groups: Dataclasses of flags, by the section of `--help` where their flags stand.
        sections: What `--help` says of each section, in its order.
        prog: The program's name.
        description: What it does.

    Raises:
        UsageError: a flag is unknown or missing, or its value is not of its type.
        SystemExit: code 0, after `--help`.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
        usage="%(prog)s --model_config FILE --batch_size N [options]",
    )
    shown = {name: parser.add_argument_group(name, text or None) for name, text in sections.items()}
    known = ["--help"]
    for section, group in groups.items():
        types = get_type_hints(group)
        for field in dataclasses.fields(group):
            known += _add(shown[field.metadata["section"] or section], field, types[field.name])
    _refuse_unknown(argv, known)
    return vars(parser.parse_args(argv))


def _add(section: Any, field: Field, hint: Any) -> list[str]:
    """Adds a flag to a section of a parser; returns its spellings.

    Args:
        section: From `add_argument_group`.
        field: From `flag`.
        hint: Its type, or its type or None.
    """
    kind = next((t for t in (hint, *get_args(hint)) if t in (bool, int, float)), str)
    required = field.default is dataclasses.MISSING
    about = field.metadata["help"]
    if choices := field.metadata.get("choices"):
        about += f"; one of {', '.join(choices)}"
    if required:
        about += " (required)"
    elif kind is not bool and field.default is not None and "(default" not in about:
        about += f" (default: {field.default})"
    name = f"--{field.name}"
    if kind is bool:
        section.add_argument(name, action=argparse.BooleanOptionalAction, help=about)
        return [name, f"--no-{field.name}"]
    metavar = {int: "N", float: "X", str: "NAME"}[kind]
    section.add_argument(
        name,
        type=field.metadata.get("type", kind),
        metavar=field.metadata.get("metavar", metavar),
        required=required,
        help=about,
    )
    return [name]


def _refuse_unknown(argv: Sequence[str], known: Sequence[str]) -> None:
    """Names a misspelt flag; argparse would first ask for the required one it was meant for."""
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise UsageError(f"{name}: no such flag{close(name, known)}; see --help")
