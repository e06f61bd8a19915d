"""Several JAX processes that train together: how they connect, agree and end.

One process with all its devices needs none of this. Several processes connect by
--coordinator_address, --num_processes and --process_id; or JAX detects them: under SLURM's `srun`,
Open MPI's `mpirun` and on a TPU pod.

The first process reports mistakes that all of them make. If a process ends during the run, for any
reason, the others end too, immediately or after `SECONDS_OF_SILENCE`, and say so: no process can
train alone, and saved data are complete. They only wait longer if one cannot write its part of a
checkpoint: Orbax allows it ten minutes.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import glob
import importlib.util
import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from launch.trainer.cli import UsageError
from launch.trainer.options import Options
from launch.trainer.processes import OneProcess, Processes

SECONDS_TO_MEET = 300
"""How long the first process waits for the last to connect."""
SECONDS_OF_SILENCE = 30
"""How long the others wait for a process that no longer answers."""
SECONDS_TO_LEAVE = 3600
"""How long a finished process waits for the others, such as the first, which writes the model."""

LOST = (
    "error: another process of this run has ended, or cannot be reached; its output may say why. "
    "This process ends too: start all of them again with the same commands and --resume"
)


@dataclasses.dataclass(frozen=True)
class JaxProcesses(Processes):
    """Several processes connected by `jax.distributed`."""

    index: int
    count: int

    def gathered(self, value: Any) -> list[Any]:
        """Gathers a JSON value of each process, in order, on every process."""
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = process_allgather(np.int32(len(text)))
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(text)] = text
        rows = process_allgather(padded)
        return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        return bool(process_allgather(np.bool_(flag)).any())


# --------------------------------------------------------------------------- connecting and ending


@contextlib.contextmanager
def joined(options: Options) -> Iterator[Processes]:
    """Joins the processes of this run, if there are several. Call it before JAX is used.

    Args:
        options: Not yet checked: a check needs the number of processes.

    Raises:
        UsageError: They have no address, or cannot connect; or it is raised in all of them, inside.
        SystemExit: With code 2, in all but the first, if all of them raise UsageError.
    """
    given = _explicit(options)
    if given is None and not _is_launched():
        yield OneProcess()
        return
    processes = _initialized(given)
    try:
        yield processes
    except UsageError:  # all have it, and the first one reports it
        if not processes.is_first:
            raise SystemExit(2) from None
        raise
    except (Exception, KeyboardInterrupt) as error:
        if processes.count == 1:
            raise
        _end_at_once(error)


def _explicit(options: Options) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` from the flags; None: none, or one process.

    Raises:
        UsageError: The flags are incomplete or contradictory.
    """
    names = ("coordinator_address", "num_processes", "process_id")
    given = {name: getattr(options.devices, name) for name in names}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == 3 or given["num_processes"] == 1:
        return None
    if missing:
        raise UsageError(
            f"{', '.join(missing)}: missing; several processes need --coordinator_address, "
            "--num_processes and --process_id, or a launcher that JAX knows, such as srun"
        )
    host, _, port = given["coordinator_address"].rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UsageError(
            f"--coordinator_address: {given['coordinator_address']!r} is not HOST:PORT; expected "
            "such as node001:12345, the machine of process 0 and a free port of it"
        )
    if not 0 <= given["process_id"] < given["num_processes"]:
        raise UsageError(
            f"--process_id: {given['process_id']} is not one of the --num_processes "
            f"{given['num_processes']}; expected 0 to {given['num_processes'] - 1}"
        )
    return given


def _is_launched() -> bool:
    """Whether a launcher known to JAX has started several processes."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in os.environ for name in slurm):  # within srun, not only within its job
        return int(os.environ.get("SLURM_NTASKS", 1)) > 1
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    has_tpu = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(has_tpu) and importlib.util.find_spec("libtpu") is not None


def _initialized(given: dict[str, Any] | None) -> Processes:
    """Connects the processes.

    Args:
        given: From `_explicit`; None: JAX detects them.

    Raises:
        UsageError: They cannot connect.
    """
    where = "where JAX looks for them"
    if given is not None:
        where = given["coordinator_address"]
        _check_coordinator(where, is_here=given["process_id"] == 0)
    import jax

    if not jax.distributed.is_initialized():
        _at_abort.say(
            f"error: the processes cannot connect at {where}: not all arrived within "
            f"{SECONDS_TO_MEET} s, or two have the same number; start each of them once",
            code=2,
        )
        try:
            jax.distributed.initialize(
                **(given or {}),
                cluster_detection_method="deactivate" if given else None,
                initialization_timeout=SECONDS_TO_MEET,
                heartbeat_timeout_seconds=SECONDS_OF_SILENCE,
                shutdown_timeout_seconds=SECONDS_TO_LEAVE,
            )
        except (RuntimeError, ValueError) as error:
            if given is None and "should be defined" in str(error):  # a TPU, but no pod
                return OneProcess()
            reason = str(error).partition("\n")[0]
            raise UsageError(f"the processes cannot connect at {where}: {reason}") from None
        # JAX treats SIGTERM as a notice of preemption; until the run handles it, it should end this
        # process.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _at_abort.say(LOST, code=1)
    count = jax.process_count()
    return JaxProcesses(jax.process_index(), count) if count > 1 else OneProcess()


def _check_coordinator(address: str, is_here: bool) -> None:
    """Reports in one line what JAX would report by abort(): the port is in use, or nobody answers.

    Raises:
        UsageError: One of these is the case.
    """
    host, _, port = address.rpartition(":")
    try:
        if is_here:
            with socket.create_server(("", int(port))):
                return
    except OSError as error:
        raise UsageError(
            f"--coordinator_address: port {port} of this machine cannot be listened on: "
            f"{error.strerror}; choose another, for all processes"
        ) from None
    deadline = time.monotonic() + SECONDS_TO_MEET
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"--coordinator_address: no answer from {address} within {SECONDS_TO_MEET} s: "
                    f"{error.strerror or error}; start process 0 there, and check that its port "
                    "is open to this machine"
                ) from None
            time.sleep(0.2)


class _AtAbort:
    """The message and exit code of this process if JAX ends it by abort().

    It saves users of several machines from a page of C++ addresses, a core dump and exit code 134
    when processes do not connect or one is lost: the last line says what happened and what to do.
    JAX 0.10 offers no other way: its Python callback ends in std::bad_cast, and a handler of
    Python's `signal` module would run too late.
    """

    def __init__(self) -> None:
        self._words = ("", 1)
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._answer)

    def say(self, text: str, code: int) -> None:
        self._words = (text, code)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal.restype = ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def _answer(self, number: int) -> None:
        _exit_saying(*self._words)


_at_abort = _AtAbort()  # a single permanent object: C keeps a pointer to its handler


def _end_at_once(error: BaseException) -> NoReturn:
    """Reports an error and ends this process immediately.

    A regular exit would wait for the others, which wait for it. This way they notice.
    """
    if isinstance(error, KeyboardInterrupt):
        _exit_saying("\nstopped", code=130)
    if _is_loss(error):
        _exit_saying(LOST, code=1)
    if isinstance(error, OSError):
        _exit_saying(f"error: {error}", code=1)
    _exit_saying("".join(traceback.format_exception(error)).rstrip("\n"), code=1)


_leaving = threading.RLock()  # never released: one thread ends the process


def _exit_saying(text: str, code: int) -> NoReturn:
    """Writes the last text of this process to stderr, and exits without any cleanup.

    JAX's threads notice a lost process at about the same time and log a page of their own. From
    here on what they write is dropped, so that the reason stays the last line.
    """
    try:
        _leaving.acquire()
        stderr = 2
        with contextlib.suppress(OSError):  # such as too many open files
            stderr = os.dup(2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            time.sleep(0.1)  # what others have begun to write arrives
        os.write(stderr, f"{text}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(code)


def _is_loss(error: BaseException) -> bool:
    """Whether an error is the effect of a lost process on another one."""
    import jax

    while error is not None:
        signs = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "coordination")
        if isinstance(error, jax.errors.JaxRuntimeError) and any(s in str(error) for s in signs):
            return True
        error = error.__cause__  # type: ignore[assignment]
    return False
