"""Threads for kernels that run without the GIL.

`run(kernel, blocks, cost, *args)` calls `kernel(first, last, *args)` until every block in range(blocks) is done, on the
calling thread and, when there is enough to do, on helpers: torch's OpenMP threads where torch is loaded (`openmp.py`), else
those of a pool made in this process. What a block holds depends on shapes alone, never on the number of threads, so that every
thread count gives the same bits. Any number of Python threads may call at once; a forked child starts with an empty pool of
its own, and leaves OpenMP alone.
"""

from __future__ import annotations

import itertools
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

from .internals import Dispatcher
from .openmp import openmp, team_of

# Bytes moved below which a second thread costs more than it saves: waking one takes some 30 µs.
BYTES_PER_THREAD = 1 << 18
# Pieces per thread: later pieces go to whoever is free, so that a thread that was held up does not hold up the rest.
PIECES_PER_THREAD = 4


def _environment(name: str) -> int | None:
    value = os.environ.get(name, "").partition(",")[0].strip()
    return int(value) if value.isdigit() and int(value) > 0 else None


_setting: int | None = _environment("HW3GPU_NUM_THREADS")


def set_num_threads(threads: int | None) -> None:
    """Use at most `threads` threads for a kernel; None goes back to torch's number, or OMP_NUM_THREADS, or the CPUs."""
    global _setting
    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    _setting = threads


def num_threads() -> int:
    """The number of threads that a large kernel uses when called now."""
    if _setting is not None:
        return _setting
    torch = sys.modules.get("torch")
    get_num_threads = getattr(torch, "get_num_threads", None)
    if get_num_threads is not None:
        return int(get_num_threads())
    return _environment("OMP_NUM_THREADS") or _processors()


def _processors() -> int:
    """Those that this process may run on, where the system tells (Linux), else those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(kernel: Callable[..., Any], blocks: int, cost: int, *args: Any) -> None:
    """Call `kernel(first, last, *args)` for pieces that together are range(blocks). `cost`: bytes that they move."""
    if cost < 2 * BYTES_PER_THREAD or blocks < 2:
        kernel(0, blocks, *args)
        return
    threads = min(num_threads(), blocks, cost // BYTES_PER_THREAD)
    if threads < 2:
        kernel(0, blocks, *args)
        return
    pieces, entry = min(blocks, threads * PIECES_PER_THREAD), openmp()
    if entry and isinstance(kernel, Dispatcher):
        team_of(kernel)(entry, threads, pieces, blocks, *args)
    else:
        _Job(kernel, blocks, pieces, args).run(threads)


class _Job:
    """One call of `run`: pieces that whoever is free takes, and a count of the helpers at work on them."""

    def __init__(self, kernel: Callable[..., Any], blocks: int, pieces: int, args: tuple[Any, ...]) -> None:
        self.kernel, self.blocks, self.pieces, self.args = kernel, blocks, pieces, args
        self.next_piece = itertools.count().__next__
        self.lock = threading.Lock()
        self.helpers = 0
        self.closed = False
        self.helpers_gone = threading.Event()
        self.error: BaseException | None = None

    def run(self, threads: int) -> None:
        _pool.submit(self, threads - 1)
        try:
            self.work()
        finally:
            with self.lock:
                self.closed = True
                wait = self.helpers > 0
            if wait:
                self.helpers_gone.wait()
        if self.error is not None:
            raise self.error

    def work(self) -> None:
        while (piece := self.next_piece()) < self.pieces:
            first, last = self.blocks * piece // self.pieces, self.blocks * (piece + 1) // self.pieces
            self.kernel(first, last, *self.args)

    def help(self) -> None:
        """A helper's part. One that comes after the caller has finished leaves at once."""
        with self.lock:
            if self.closed:
                return
            self.helpers += 1
        try:
            self.work()
        except BaseException as error:
            self.error = error
        with self.lock:
            self.helpers -= 1
            if self.closed and self.helpers == 0:
                self.helpers_gone.set()


class _Pool:
    """Daemon threads that wait for jobs; as many as were ever asked for at once."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.size = 0

    def submit(self, job: _Job, helpers: int) -> None:
        if self.size < helpers:
            with self.lock:
                while self.size < helpers:
                    threading.Thread(target=self._serve, name=f"hw3gpu-{self.size}", daemon=True).start()
                    self.size += 1
        for _ in range(helpers):
            self.jobs.put(job)

    def _serve(self) -> None:
        jobs = self.jobs
        while True:
            jobs.get().help()


_pool = _Pool()


def _forget_pool() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
