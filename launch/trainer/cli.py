"""How a command of this project ends: an exit code, and one line on stderr for a user's mistake."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence


class UsageError(ValueError):
    """A mistake in what the user asked for: the value, what was expected and what to do."""


def run_cli(main: Callable[[Sequence[str]], int | None]) -> int:
    """Runs `main` on the command line's arguments and returns the exit code.

    `UsageError` becomes one line on stderr and code 2, any other OSError (a full disk) one line and
    code 1, an interrupt code 130. Anything else is a fault of the program and keeps its traceback;
    wrap calls whose ValueError or OSError is the user's in `user_errors`.
    """
    try:
        return main(sys.argv[1:]) or 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


@contextlib.contextmanager
def user_errors(flag: str | None = None) -> Iterator[None]:
    """Turns a ValueError or OSError raised inside into a `UsageError` with the same message.

    Args:
        flag: Named in front of the message: "lr" for `--lr`.
    """
    try:
        yield
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(f"--{flag}: {error}" if flag else str(error)) from error


def set_up_logging(shows: bool = True) -> None:
    """Shows warnings, and what this package and its libraries log, as bare lines on stderr.

    Args:
        shows: False for a process whose messages are those of the first one.
    """
    logging.basicConfig(level=logging.WARNING if shows else logging.ERROR, format="%(message)s")
    for package in ("launch", "osd_jax", "osd_torch"):
        logging.getLogger(package).setLevel(logging.INFO if shows else logging.ERROR)
