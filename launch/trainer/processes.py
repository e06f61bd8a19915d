"""The processes of a run, seen from one of them: the protocol that both trainers use.

`OneProcess` is a single process; `launch.trainer.jax_processes.JaxProcesses` and
`launch.trainer.torch_processes.TorchProcesses` are several. Each module has a function `joined` in
which the processes connect, and which documents how they end.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from launch.trainer.cli import UsageError, user_errors
from launch.trainer.options import Options

T = TypeVar("T")


class Processes(Protocol):
    """What one process knows of all, and exchanges with all: every process makes the same calls.

    Attributes:
        index: The index of this process, from 0.
        count: Number of processes.
    """

    index: int
    count: int

    def gathered(self, value: Any) -> list[Any]:
        """Gathers a JSON value of each process, in order, on every process."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    @contextlib.contextmanager
    def together(self, in_turn: bool = False) -> Iterator[None]:
        """Makes a user's mistake in one process end all of them, with the same message.

        A ValueError or OSError inside becomes a `UsageError`, as in `user_errors`.

        Args:
            in_turn: Whether the first process goes first; the others wait, and find what it
                prepared.

        Raises:
            UsageError: In this process or in another one.
        """
        if in_turn and not self.is_first:
            self._raise_together(None)
        mistake = None
        try:
            with user_errors():
                yield
        except UsageError as error:
            mistake = str(error)
        self._raise_together(mistake)
        if in_turn and self.is_first:
            self._raise_together(None)  # for the others

    def _raise_together(self, mistake: str | None) -> None:
        for message in self.gathered(mistake):
            if message is not None:
                raise UsageError(message)

    def read(self, read: Callable[[], T]) -> T:
        """Reads something that every process must read; if one finds damage, all raise.

        Args:
            read: Reads it, on this process.

        Raises:
            OSError: On all of them, if it raised on any.
        """
        found: list[T] = []
        damage = None
        try:
            found.append(read())
        except OSError as error:
            damage = str(error)
        for message in self.gathered(damage):
            if message is not None:
                raise OSError(message)
        return found[0]


@dataclasses.dataclass(frozen=True)
class OneProcess(Processes):
    """A run of one process.

    Example:
        >>> OneProcess().gathered({"document": 3})
        [{'document': 3}]
    """

    index: int = 0
    count: int = 1

    def gathered(self, value: Any) -> list[Any]:
        """The value of this process."""
        return [value]

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag


def in_words(count: int) -> str:
    """A number of processes: "1 process", "2 processes"."""
    return f"{count} process" + "es" * (count != 1)


def check_same_options(options: Options, processes: Processes) -> None:
    """Raises if processes have different flags, which would make them wait for each other forever.

    Args:
        options: Checked options.
        processes: Processes of the run. All of them call this.

    Raises:
        UsageError: In all of them.
    """
    own = ("process_id", "data_dir", "cache_dir")
    record = options.record()
    mine = {f"--{name}": x for name, x in record["options"].items() if name not in own}
    mine |= {f"--model_config: {name}": x for name, x in record["model"].items()}
    first, *others = processes.gathered(mine)
    for index, other in enumerate(others, start=1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise UsageError(
                    f"{name}: process 0 has {first.get(name)} but process {index} "
                    f"{other.get(name)}; give all of them the same"
                )
