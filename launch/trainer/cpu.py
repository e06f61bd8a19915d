"""What makes a CPU fast: set by both trainers, and by the benchmark as they do.

Neither is needed for right numbers, and neither does anything where there is no such library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os


def keep_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of giving it back to the system.

    By default it maps large arrays anew each time, and the system has to clear their pages: a third
    of the time of a step of `llama_9m` in PyTorch, of which this spares two thirds. XLA's arrays
    come from it too. It asks for no more memory than the largest step does. Other C libraries have
    no such switch, and nothing is done.
    """
    m_trim_threshold, m_mmap_threshold, large = -1, -3, 2**30  # the names in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_threshold, large)
        mallopt(m_trim_threshold, large)


def keep_lapack_to_one_thread() -> None:
    """Makes OpenBLAS, with which JAX takes SVDs on a CPU, use one thread; before JAX is imported.

    Its threads spin while they wait for each other. Beside XLA's, or other programs', each turn
    then takes until the system takes the core away: seconds for a matrix that one thread takes in
    40 ms. XLA takes the SVDs of several parameters at once, and its own products as before.
    """
    if "OMP_NUM_THREADS" not in os.environ:  # which OpenBLAS reads too
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
