"""Several JAX processes that train together: how they meet, agree and end.

One process with all its devices needs none of this, and nothing is set up for it. Several find each
other by --coordinator_address, --num_processes and --process_id; or JAX finds out: under SLURM's
`srun`, Open MPI's `mpirun` and on a TPU pod.

Mistakes that all of them make are told by the first one. When one ends in the midst, of whatever
cause, the others end too, at once or after `SECONDS_OF_SILENCE`, and say so: no process can train
on alone, and what is saved is whole. Only where one cannot write its part of a checkpoint do they
wait longer: Orbax gives it ten minutes.
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
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from launch.trainer.cli import UsageError
from launch.trainer.options import Options
from launch.trainer.processes import OneProcess, Processes

SECONDS_TO_MEET = 300
"""How long the first process to come waits for the last."""
SECONDS_OF_SILENCE = 30
"""How long a process that answers no more is waited for."""
SECONDS_TO_LEAVE = 3600
"""How long a process that is done waits for the others: for the first, to write the whole model."""

LOST = (
    "error: another process of this run has ended, or cannot be reached; it may say why. This one "
    "ends too: start all of them again with the same commands and --resume"
)


@dataclasses.dataclass(frozen=True)
class JaxProcesses(Processes):
    """Several processes that `jax.distributed` has brought together."""

    index: int
    count: int

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in order, on every process; a value that JSON can hold."""
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = process_allgather(np.int32(len(text)))
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(text)] = text
        rows = process_allgather(padded)
        return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        return bool(process_allgather(np.bool_(flag)).any())


# ---------------------------------------------------------------------------- meeting, and ending


@contextlib.contextmanager
def joined(options: Options) -> Iterator[Processes]:
    """Joins the processes of this run, if there are several. Call it before JAX is used.

    Args:
        options: Not yet checked: a check has to know how many processes there are.

    Raises:
        UsageError: they are not told how to meet, or cannot; or in all of them, inside.
        SystemExit: code 2, in all but the first, where all of them raise UsageError.
    """
    given = _explicit(options)
    if given is None and not _is_launched():
        yield OneProcess()
        return
    processes = _initialized(given)
    try:
        yield processes
    except UsageError:  # all have it, and the first one tells
        if not processes.is_first:
            raise SystemExit(2) from None
        raise
    except (Exception, KeyboardInterrupt) as error:
        if processes.count == 1:
            raise
        _end_at_once(error)


def _explicit(options: Options) -> dict[str, Any] | None:
    """The keywords of `jax.distributed.initialize` that the flags give; None: no, or one process.

    Raises:
        UsageError: the flags are incomplete or contradict each other.
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
    """Whether something has started several processes that JAX knows how to bring together."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in os.environ for name in slurm):  # within srun, and not only within its job
        return int(os.environ.get("SLURM_NTASKS", 1)) > 1
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    has_tpu = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(has_tpu) and importlib.util.find_spec("libtpu") is not None


def _initialized(given: dict[str, Any] | None) -> Processes:
    """Brings the processes together.

    Args:
        given: From `_explicit`; None: JAX finds out.

    Raises:
        UsageError: they cannot meet.
    """
    where = "where JAX looks for them"
    if given is not None:
        where = given["coordinator_address"]
        _check_coordinator(where, is_here=given["process_id"] == 0)
    import jax

    if not jax.distributed.is_initialized():
        _at_abort.say(
            f"error: the processes cannot meet at {where}: not all came within "
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
            if given is None and "should be defined" in str(error):  # a TPU, and no pod
                return OneProcess()
            reason = str(error).partition("\n")[0]
            raise UsageError(f"the processes cannot meet at {where}: {reason}") from None
        # JAX takes SIGTERM for notices of preemption; until the run minds it, it is to end this.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _at_abort.say(LOST, code=1)
    count = jax.process_count()
    return JaxProcesses(jax.process_index(), count) if count > 1 else OneProcess()


def _check_coordinator(address: str, is_here: bool) -> None:
    """Says in one line what JAX would say by abort(): the port is taken, or nobody is there.

    Raises:
        UsageError: so it is.
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
                    f"--coordinator_address: nobody answers at {address} within "
                    f"{SECONDS_TO_MEET} s: {error.strerror or error}; start process 0 there, and "
                    "see that its port is open to this machine"
                ) from None
            time.sleep(0.2)


class _AtAbort:
    """What this process says and returns where JAX ends it by abort().

    JAX has no other answer to processes that do not meet, or that are lost: a page of addresses in
    C++, and SIGABRT; what it would call in Python instead ends in std::bad_cast, in 0.10. A signal
    handler of Python's own would run too late.
    """

    def __init__(self) -> None:
        self._words = (b"", 1)
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._answer)

    def say(self, text: str, code: int) -> None:
        self._words = (f"{text}\n".encode(), code)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal.restype = ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def _answer(self, number: int) -> None:
        text, code = self._words
        os.write(2, text)
        os._exit(code)


_at_abort = _AtAbort()  # one, and for good: C keeps a pointer to its handler


def _end_at_once(error: BaseException) -> NoReturn:
    """Tells of an error and ends this process without a farewell.

    In leaving in order it would wait for the others, which wait for it. So they notice.
    """
    code = 1
    if isinstance(error, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
        code = 130
    elif _is_loss(error):
        print(LOST, file=sys.stderr)
    elif isinstance(error, OSError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(code)


def _is_loss(error: BaseException) -> bool:
    """Whether an error is what a lost process looks like from another one."""
    import jax

    while error is not None:
        signs = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "coordination")
        if isinstance(error, jax.errors.JaxRuntimeError) and any(s in str(error) for s in signs):
            return True
        error = error.__cause__  # type: ignore[assignment]
    return False
