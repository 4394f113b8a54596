"""Memory for large outputs on the host, used again once no array or tensor refers to it.

A fresh large array costs more than the arithmetic that fills it: for each page the system takes a page fault and clears it.
`empty` reuses a *block* that was freed, or makes one. It returns a `_Lease`, an array on that block. Whatever refers to the
memory keeps the lease alive: a NumPy view by its `base`, a torch storage by the array that it was made from, and with the
storage every tensor on it (views, slices, detached and saved ones). When the lease is deleted, the block is free.

At most HW3GPU_CPU_CACHE_MB megabytes are kept idle (by default 1024, or an eighth of the memory where that is less). Beyond
that the blocks that have been idle longest are released. 0 turns the pool off. `empty_cache` releases all of them.

A lease may be deleted in any thread and at any time, also while this file's code runs: so it never waits for a lock. A forked
child starts with an empty pool.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

# Bytes below which an allocator has pages of its own at hand.
SMALLEST = 1 << 20
# As torch aligns its tensors: a row's first vector then lies in one cache line.
ALIGNMENT = 64
DEFAULT_MB = 1024
VARIABLE = "HW3GPU_CPU_CACHE_MB"


def limit() -> int:
    """Bytes that may be kept idle, from the current HW3GPU_CPU_CACHE_MB. ValueError if that is no number of at least 0."""
    text = os.environ.get(VARIABLE)
    if not text:
        return _DEFAULT
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = -1.0
    if not 0 <= megabytes < float("inf"):
        raise ValueError(f"{VARIABLE}: expected a number of megabytes of at least 0, got {text!r}")
    return int(megabytes * 2**20)


def _default_limit() -> int:
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return DEFAULT_MB * 2**20
    return min(DEFAULT_MB * 2**20, memory // 8)


_DEFAULT = _default_limit()


class _Block(np.ndarray):
    """Bytes; the first aligned one is at `start`.

    It has a class of its own, because NumPy takes as the `base` of a view the last of its bases that have the view's class.
    With one class for both that would be the block and not the lease.
    """

    start: int


class _Lease(np.ndarray):
    """An array on a block, which returns to the pool when the last view of the array has gone."""

    block: _Block | None = None

    def __del__(self) -> None:
        if self.block is not None and _pool is not None:  # None once the interpreter has cleared this module
            _pool.give_back(self.block)


class _Pool:
    """Idle blocks by size: `idle[size]` has (stamp, block) pairs, oldest first. `returned`: blocks not yet sorted into
    `idle`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.returned: deque[_Block] = deque()
        self.idle: dict[int, deque[tuple[int, _Block]]] = {}
        self.idle_bytes = 0
        self.stamp = 0
        self.limit = _DEFAULT

    def take(self, nbytes: int) -> _Block:
        """A block of at least `nbytes`, an idle one if there is one."""
        size, block = _block_size(nbytes), None
        with self.lock:
            self._sort_in()
            blocks = self.idle.get(size)
            if blocks:
                block = blocks.pop()[1]
                self.idle_bytes -= size
        self._settle()
        return _new_block(size) if block is None else block

    def give_back(self, block: _Block) -> None:
        """Never waits: the thread that holds the lock sorts in what was returned meanwhile."""
        self.returned.append(block)
        self._settle()

    def set_limit(self, limit: int) -> None:
        with self.lock:
            self.limit = limit
            self._sort_in()
        self._settle()

    def empty(self) -> None:
        with self.lock:
            self.returned.clear()
            self.idle.clear()
            self.idle_bytes = 0
        self._settle()

    def _settle(self) -> None:
        while self.returned and self.lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self.lock.release()

    def _sort_in(self) -> None:
        """Moves `returned` to `idle`, and releases the oldest blocks above the limit. The caller holds the lock."""
        while self.returned:
            block = self.returned.popleft()
            self.stamp += 1
            self.idle.setdefault(block.nbytes, deque()).append((self.stamp, block))
            self.idle_bytes += block.nbytes
        while self.idle_bytes > self.limit:
            oldest = min((size for size, blocks in self.idle.items() if blocks), key=lambda size: self.idle[size][0][0])
            self.idle[oldest].popleft()
            self.idle_bytes -= oldest


_pool = _Pool()


def _forget() -> None:
    """In a forked child: its copy may have been taken in the middle of a change."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _new_block(size: int) -> _Block:
    block = _Block(size, np.uint8)
    block.start = -block.ctypes.data % ALIGNMENT
    return block


def _block_size(nbytes: int) -> int:
    """Bytes for `nbytes` and their alignment, in steps of an eighth of a power of two: outputs of nearly one size share."""
    wanted = nbytes + ALIGNMENT
    step = max(1 << (wanted.bit_length() - 4), 1)
    return -(-wanted // step) * step


def empty(shape: Sequence[int], dtype: np.dtype, strides: Sequence[int] | None = None) -> np.ndarray | None:
    """An uninitialised array, aligned as torch aligns; None where the pool is off or the array is small."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALLEST:
        return None
    most = limit()
    if most != _pool.limit:
        _pool.set_limit(most)
    if not most:
        return None
    block = _pool.take(nbytes)
    lease = _Lease(shape, dtype, block, block.start, strides)
    lease.block = block
    return lease


def idle_bytes() -> int:
    """Bytes that are idle now."""
    _pool._settle()
    return _pool.idle_bytes


def empty_cache() -> None:
    """Release the memory of idle outputs to the system. Memory that an array or tensor still uses is not touched.

    Large results on the host reuse the memory of earlier results, of which at most HW3GPU_CPU_CACHE_MB megabytes are kept (by
    default 1024, or an eighth of the memory where that is less; 0: none).
    """
    _pool.empty()
