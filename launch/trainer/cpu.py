"""CPU settings for speed, used by both trainers and by the benchmark.

They do not affect results, and do nothing if the library is absent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os


def keep_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of returning it to the system.

    By default glibc maps large arrays again each time, and the system must clear their pages: a
    third of the time of a step of `llama_9m` in PyTorch; this saves two thirds of that. XLA's
    arrays use it too. It needs no more memory than the largest step. Other C libraries have no such
    switch; this function then does nothing.
    """
    m_trim_threshold, m_mmap_threshold, large = -1, -3, 2**30  # the names in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_threshold, large)
        mallopt(m_trim_threshold, large)


def keep_lapack_to_one_thread() -> None:
    """Restricts OpenBLAS, which runs JAX's SVDs on a CPU, to one thread; call before importing JAX.

    Its threads spin while they wait for each other. Next to XLA's threads, or other programs, each
    wait then lasts until the system takes the core away: seconds for a matrix that one thread
    handles in 40 ms. XLA runs the SVDs of several parameters in parallel, and its own products are
    unaffected.
    """
    if "OMP_NUM_THREADS" not in os.environ:  # which OpenBLAS also reads
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
