"""Several PyTorch processes that train together: how they meet, agree and end.

torchrun starts them and stops all of them as soon as one has ended; one process without --fsdp
needs no process group, and none is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from launch.trainer.cli import UsageError
from launch.trainer.cpu import keep_memory
from launch.trainer.options import Options
from launch.trainer.processes import OneProcess, Processes, in_words

if TYPE_CHECKING:
    import torch

TIMEOUT_MINUTES = 10.0
GLOO_TIMEOUTS = ("Timed out waiting", "timeout caused pair closure")
SECONDS_FOR_THE_FIRST = 30.0
"""How long the others wait before they tell of a mistake in their options: on a busy machine the
first, which tells of the same, may be that far behind."""
SECONDS_TO_BE_STOPPED = 2.0
"""How long one of several processes waits before it tells of an error.

Most are the same on all, or follow from another process's end. torchrun stops the others as soon as
one has ended, so that only the first one's message, or the cause, is shown.
"""


@dataclasses.dataclass(frozen=True)
class TorchProcesses(Processes):
    """Several processes of `torch.distributed`."""

    index: int
    count: int

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in order, on every process."""
        from osd_torch.sharding import gathered

        return gathered(value)

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        import torch
        import torch.distributed as dist

        found = torch.tensor(float(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)


def launched() -> Processes:
    """The processes that torchrun has started, not yet joined; without it, one."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    return TorchProcesses(int(os.environ.get("RANK", 0)), count) if count > 1 else OneProcess()


@contextlib.contextmanager
def told_by_the_first(processes: Processes) -> Iterator[None]:
    """Leaves a mistake that all processes make to the first one's message.

    Raises:
        UsageError: raised inside.
        OSError: likewise.
    """
    try:
        yield
    except (UsageError, OSError):
        if not processes.is_first:
            time.sleep(SECONDS_FOR_THE_FIRST)
        raise


def own_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none, set up for training.

    Raises:
        UsageError: there are more processes than GPUs.
    """
    import torch

    if not torch.cuda.is_available():
        keep_memory()
        return torch.device("cpu")
    index, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= there:
        raise UsageError(
            f"--nproc_per_node: process {index + 1} of this machine has no GPU, and there are "
            f"{there}; start at most {there}, or show more in CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(index)
    # TF32 on tensor cores, as XLA does unless told otherwise: P's products are float32.
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", index)


@contextlib.contextmanager
def joined(options: Options, processes: Processes, device: torch.device) -> Iterator[None]:
    """Joins the processes, if there are several or weights are sharded.

    Args:
        options: Checked options.
        processes: From `launched`.
        device: Of this process.

    Raises:
        UsageError: they cannot meet; or in all of them, inside.
        SystemExit: code 2, in all but the first, where all of them raise UsageError.
        OSError: one has waited for another for too long.
    """
    import torch.distributed as dist

    if processes.count == 1 and not options.devices.fsdp:
        yield
        return
    # gloo for what lies on the CPU: counts, and what the processes agree on.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    minutes = options.devices.timeout_minutes or TIMEOUT_MINUTES
    alone: dict[str, Any] = {}
    if processes.count == 1:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes), **alone)
        dist.barrier()  # nothing is written before all have checked their options
    except (RuntimeError, ValueError) as error:  # a port in use, an address that is none
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{in_words(processes.count)} cannot meet at {where}: {reason}; start them by "
            "torchrun --standalone, which finds a free port, or give another --master_port"
        ) from None
    try:
        yield
    except UsageError as error:  # all processes know of it, and the first one tells
        # Frees DistributedDataParallel, which would else free the group later. With Python's lock
        # held, that waits for a thread of gloo which may be waiting for the lock.
        traceback.clear_frames(error.__traceback__)
        dist.destroy_process_group()
        if not processes.is_first:
            raise SystemExit(2) from None
        raise
    except Exception as error:
        # Still connected, so that the others do not fail of this before it is told.
        time.sleep(SECONDS_TO_BE_STOPPED)
        if any(words in str(error) for words in GLOO_TIMEOUTS):
            raise OSError(
                f"another process has not answered for {minutes:g} minutes: it hangs, or is busy "
                "for longer than --timeout_minutes; see to it, or raise that, and go on with "
                "--resume"
            ) from error
        raise
    dist.destroy_process_group()
