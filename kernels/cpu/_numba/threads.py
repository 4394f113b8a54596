"""Threads for kernels that run without the GIL.

`run(kernel, blocks, cost, *args)` calls `kernel(first, last, *args)` until every block in range(blocks) is done, on the
calling thread and, when there is enough to do, on helpers: torch's OpenMP threads where torch is loaded (`openmp.py`), else
those of a pool made in this process. What a block holds depends on shapes alone, never on the number of threads, so that every
thread count gives the same bits. Any number of Python threads may call at once; a forked child starts with an empty pool of
its own, and leaves OpenMP alone.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import math
import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .internals import Dispatcher
from .openmp import openmp, team_of

# Bytes moved below which a second thread costs more than it saves: waking one takes some 30 µs.
BYTES_PER_THREAD = 1 << 18
# Pieces per thread: later pieces go to whoever is free, so that a thread that was held up does not hold up the rest.
PIECES_PER_THREAD = 4
# Bytes moved in one stretch, some tenths of a second: between stretches Python sees a signal, so that Ctrl-C does not wait.
BYTES_AT_ONCE = 1 << 28

# Told of each kernel that runs, for `hw3gpu.explain`: observer(kernel, plan, share, reads, writes), the last two tuples of
# (name, bytes, address).
observer: contextvars.ContextVar[Any] = contextvars.ContextVar("hw3gpu_cpu_observer", default=None)


@dataclass(frozen=True)
class Share:
    """How the blocks of a kernel are shared: `pieces` runs of blocks, on `threads` threads."""

    blocks: int
    threads: int
    pieces: int


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


# Where the launches of a call are noted, as (kernel, blocks, cost, args, plan, moves), while somebody keeps them
# (`kernels/cpu/launch.py`).
recording: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("hw3gpu_recording_on_the_host", default=None)


def run(kernel: Callable[..., Any], blocks: int, cost: int, *args: Any, plan: Any = None, moves: Moves | None = None) -> None:
    """Call `kernel(first, last, *args)` for pieces that together are range(blocks). `cost`: bytes that they move.

    For the observer alone: plan, what decided the blocks; moves, where they are others than `moving` says of the kernel.
    """
    noted = recording.get()
    if noted is not None:
        noted.append((kernel, blocks, cost, args, plan, moves))
    threads = stretches = 1
    if cost >= 2 * BYTES_PER_THREAD and blocks > 1:
        threads = min(num_threads(), blocks, cost // BYTES_PER_THREAD)
        stretches = min(blocks, -(-cost // BYTES_AT_ONCE))
    if observer.get() is not None:
        pieces = min(blocks, threads * PIECES_PER_THREAD * stretches) if threads > 1 else stretches
        tell(kernel, (0, blocks, *args), Share(blocks, max(threads, 1), pieces), plan, moves)
    if threads < 2:
        for i in range(stretches):
            kernel(blocks * i // stretches, blocks * (i + 1) // stretches, *args)
        return
    pieces, entry = min(blocks, threads * PIECES_PER_THREAD * stretches), openmp()
    for i in range(stretches):
        part = pieces * i // stretches, pieces * (i + 1) // stretches
        if entry and isinstance(kernel, Dispatcher):
            team_of(kernel)(entry, threads, *part, pieces, blocks, *args)
        else:
            _share_out(kernel, *part, pieces, blocks, threads, args)


# ---------------------------------------------------------------------------------------------- for the observer
class Moves(NamedTuple):
    """The arguments of a kernel that it reads or writes as a whole; vectors of a number a channel or class are none."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


_moves: dict[Any, Moves] = {}
_ALONE = Share(1, 1, 1)


def moving(moves: Moves, *kernels: Any) -> None:
    """Says what kernels move; a call need not."""
    _moves.update(dict.fromkeys(kernels, moves))


def tell(
    kernel: Any, args: tuple[Any, ...], share: Share = _ALONE, plan: Any = None, moves: Moves | None = None,
    addresses: dict[int, int] | None = None,
) -> None:  # fmt: skip
    """Tells the observer, if there is one, of `kernel(*args)`.

    An argument that is an address is of float32, as many as the kernel's arguments N, C or V, and S say. addresses: where the
    elements of an array are, by its id, if they are elsewhere.
    """
    observe = observer.get()
    if observe is None:
        return
    function = getattr(kernel, "py_func", kernel)
    of = dict(zip(function.__code__.co_varnames, args, strict=False))
    reads, writes = moves or _moves.get(kernel, Moves())

    def moved(names: tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
        found = [(name, of[name]) for name in names if of.get(name) is not None]
        elements = math.prod(of.get(size, 1) for size in ("N", "C", "V", "S")) if any(type(v) is int for _, v in found) else 0
        operands = [
            (name.removesuffix("_at"), 4 * elements, v)
            if type(v) is int
            else (name, v.nbytes, v.ctypes.data if addresses is None else addresses[id(v)])
            for name, v in found
        ]
        return tuple(operand for operand in operands if operand[1])

    module = function.__module__.partition("kernels.")[2]
    observe(f"{module}.{function.__name__}", plan, share, moved(reads), moved(writes))


def _share_out(
    kernel: Callable[..., Any], first: int, end: int, pieces: int, blocks: int, threads: int, args: tuple[Any, ...]
) -> None:
    """The pieces from `first` to `end` of one call of `run`: whoever is free takes the next."""
    next_piece = itertools.count(first).__next__
    errors: list[BaseException] = []

    def work() -> None:
        while (piece := next_piece()) < end:
            kernel(blocks * piece // pieces, blocks * (piece + 1) // pieces, *args)

    def help_with(part: threading.Lock) -> None:
        if part.acquire(blocking=False):
            try:
                work()
            except BaseException as error:
                errors.append(error)
            finally:
                part.release()

    parts = [threading.Lock() for _ in range(threads - 1)]
    _pool.submit([functools.partial(help_with, part) for part in parts])
    try:
        work()
    finally:
        for part in parts:  # waits for a helper that is at work; one that comes later finds its part taken and leaves
            part.acquire()
    if errors:
        raise errors[0]


class _Pool:
    """Daemon threads that wait for jobs; as many as were ever asked for at once.

    Not concurrent.futures: that refuses work once the main thread has ended, while other threads may go on, and its `submit`
    takes 2 microseconds a helper more.
    """

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.size = 0

    def submit(self, jobs: list[Callable[[], None]]) -> None:
        with self.lock:
            while self.size < len(jobs):
                threading.Thread(target=self._serve, name=f"hw3gpu-{self.size}", daemon=True).start()
                self.size += 1
        for job in jobs:
            self.jobs.put(job)

    def _serve(self) -> None:
        while True:
            self.jobs.get()()


_pool = _Pool()


def _forget_pool() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
