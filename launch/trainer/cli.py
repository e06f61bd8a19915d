"""How the commands exit: an exit code, and one line on stderr for a user's mistake."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence


class UsageError(ValueError):
    """A mistake in the user's input; the message has the value, the expectation and a remedy."""


def run_cli(main: Callable[[Sequence[str]], int | None]) -> int:
    """Runs `main` on the command line's arguments and returns the exit code.

    `UsageError` becomes one line on stderr and code 2, any other OSError (a full disk) one line and
    code 1, an interrupt code 130. Anything else is a bug and keeps its traceback; wrap calls whose
    ValueError or OSError is caused by the user in `user_errors`.
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
    """Converts a ValueError or OSError raised inside to a `UsageError` with the same message.

    Args:
        flag: Flag named at the start of the message: "lr" for `--lr`.
    """
    try:
        yield
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(f"--{flag}: {error}" if flag else str(error)) from error


def set_up_logging(shows: bool = True) -> None:
    """Prints warnings and log messages of this package and its libraries as plain stderr lines.

    Args:
        shows: False for a process that leaves messages to the first one.
    """
    logging.basicConfig(level=logging.WARNING if shows else logging.ERROR, format="%(message)s")
    for package in ("launch", "osd_jax", "osd_torch"):
        logging.getLogger(package).setLevel(logging.INFO if shows else logging.ERROR)
