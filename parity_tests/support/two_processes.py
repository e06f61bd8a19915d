"""Runs functions on two PyTorch processes connected by gloo on loopback.

A file that uses the fixture `run` imports it, and `one_thread` if its numbers are compared.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parity_tests.support.hang import HANG

WORLD = 2
Run = Callable[..., list[Any]]


def serve(rank: int, store: str, connection: Connection) -> None:
    """One process: runs the functions it is sent, until it is killed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    while True:
        function, args = connection.recv()
        try:
            connection.send((function(*args), None))
        except Exception:
            connection.send((None, traceback.format_exc()))


class TwoProcesses:
    """Runs functions of a test's module on two processes, which stay for the next function."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.workers: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What each process returns; a test fails if one raises or hangs."""
        if not self.workers:
            self.start()
        connections = [connection for _, connection in self.workers]
        for connection in connections:
            connection.send((function, args))
        results: dict[Connection, Any] = {}
        while len(results) < WORLD:
            waiting = [connection for connection in connections if connection not in results]
            ready = wait(waiting, timeout=HANG)
            for connection in ready:
                results[connection], error = connection.recv()
                if error:
                    self.stop()
                    pytest.fail(error)
            if not ready:
                self.stop()
                pytest.fail(f"no answer from {function.__name__} in {HANG:g} s")
        return [results[connection] for connection in connections]

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = tempfile.mktemp(dir=self.directory)
        for rank in range(WORLD):
            here, there = context.Pipe()
            worker = context.Process(target=serve, args=(rank, store, there), daemon=True)
            worker.start()
            self.workers.append((worker, here))

    def stop(self) -> None:
        for worker, _ in self.workers:
            worker.kill()
            worker.join()
        self.workers.clear()
