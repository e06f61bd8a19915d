"""Runs functions on two PyTorch processes connected by gloo on loopback.

A file that uses the fixture `two_processes` takes `one_thread` too if its numbers are compared.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from parity_tests.support.hang import HANG

WORLD = 2
# Imported once and forked, since importing takes seconds. The environment of the processes is that
# of the first start.
IMPORTED = ["osd_torch.llama", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
Run = Callable[..., list[Any]]
Meanwhile = Callable[[list[int], Callable[[], bool]], None]


class Job(NamedTuple):
    """A function to run, and the file by which the processes connect; None: it does so itself."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    store: str | None

    def run(self, rank: int) -> Any:
        """What the function returns in this process."""
        if not self.store:
            disconnect()
            try:
                return self.function(rank, *self.args)
            finally:
                disconnect()  # where it left a connection
        if not dist.is_initialized():
            method = f"file://{self.store}"
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=WORLD)
        return self.function(*self.args)


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def serve(rank: int, connection: Connection) -> None:
    """One process: runs the jobs it is sent, until it is killed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    while True:
        job: Job = connection.recv()
        try:
            connection.send((job.run(rank), None))
        except Exception:
            connection.send((None, traceback.format_exc()))


class TwoProcesses:
    """Runs functions of a test's module on two processes, which stay for the next function."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.workers: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What each process returns; a test fails if one raises or hangs."""
        return self.results(Job(function, args, tempfile.mktemp(dir=self.directory)))

    def unconnected(
        self, function: Callable[..., Any], *args: Any, meanwhile: Meanwhile | None = None
    ) -> list[Any]:
        """The same for a function that connects the processes itself: it gets its rank first.

        `meanwhile` gets the processes' ids, and a function that waits for the first one's answer
        and returns whether it came.
        """
        return self.results(Job(function, args, None), meanwhile)

    def results(self, job: Job, meanwhile: Meanwhile | None = None) -> list[Any]:
        if not self.workers:
            self.start()
        try:
            return self.exchanged(job, meanwhile)
        except BaseException:  # what they answer later is not for the next function
            self.stop()
            raise

    def exchanged(self, job: Job, meanwhile: Meanwhile | None) -> list[Any]:
        connections = [connection for _, connection in self.workers]
        for connection in connections:
            connection.send(job)
        if meanwhile:
            pids = [worker.pid for worker, _ in self.workers]
            meanwhile(pids, lambda: connections[0].poll(HANG))
        results: dict[Connection, Any] = {}
        while len(results) < WORLD:
            waiting = [connection for connection in connections if connection not in results]
            ready = wait(waiting, timeout=HANG)
            if not ready:
                pytest.fail(f"no answer from {job.function!r} in {HANG:g} s")
            for connection in ready:
                try:
                    results[connection], error = connection.recv()
                except EOFError:
                    pytest.fail(f"a process ended in {job.function!r}")
                if error:
                    pytest.fail(error)
        return [results[connection] for connection in connections]

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        for rank in range(WORLD):
            here, there = context.Pipe()
            worker = context.Process(target=serve, args=(rank, there), daemon=True)
            worker.start()
            self.workers.append((worker, here))

    def stop(self) -> None:
        for worker, _ in self.workers:
            worker.kill()
            worker.join()
        self.workers.clear()
