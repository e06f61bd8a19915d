"""The processes of a run, seen from one of them: the one protocol that both trainers use.

`OneProcess` is a run by itself, `launch.trainer.jax_processes.JaxProcesses` and
`launch.trainer.torch_processes.TorchProcesses` are several; each module has a `joined`, in which
the processes meet, and which says how they end.
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
    """What one process knows of all, and asks of all: every process makes the same calls.

    Attributes:
        index: The number of this process, from 0.
        count: How many there are.
    """

    index: int
    count: int

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in order, on every process; a value that JSON can hold."""

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.index == 0

    @contextlib.contextmanager
    def together(self, in_turn: bool = False) -> Iterator[None]:
        """What is the user's mistake in one process ends all of them, with the same message.

        A ValueError or OSError inside becomes a `UsageError`, as in `user_errors`.

        Args:
            in_turn: The first process goes first; the others wait, and find what it has prepared.

        Raises:
            UsageError: in this process or in another one.
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
        """What every process can read; where one finds damage, all do.

        Args:
            read: Reads it, on this process.

        Raises:
            OSError: on all of them, where it raised one on any.
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
    """A run of one process, which agrees with itself.

    Example:
        >>> OneProcess().gathered({"document": 3})
        [{'document': 3}]
    """

    index: int = 0
    count: int = 1

    def gathered(self, value: Any) -> list[Any]:
        """What this process has."""
        return [value]

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag


def in_words(count: int) -> str:
    """A number of processes: "1 process", "2 processes"."""
    return f"{count} process" + "es" * (count != 1)


def check_same_options(options: Options, processes: Processes) -> None:
    """Refuses different flags in different processes, which would wait for each other for good.

    Args:
        options: Checked options.
        processes: Of the run. All of them call this.

    Raises:
        UsageError: in all of them.
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
                    f"{name}: process 0 has {first.get(name)} and process {index} "
                    f"{other.get(name)}; give all of them the same"
                )
