"""What a call does, recorded for `hw3gpu.explain`. Where no record is open, a note costs one read of a context variable."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .arrays import Array

_open: contextvars.ContextVar[Record | None] = contextvars.ContextVar("hw3gpu_record", default=None)

# The modules whose `observer` each engine calls with what it launches, once they are loaded.
_OBSERVED = ("hw3gpu.kernels.cpu._numba.threads", "hw3gpu.kernels.gpu.launch")


class Launched(NamedTuple):
    """A kernel that ran, as its launcher reported it."""

    kernel: str  # module of `kernels/` and function
    plan: Any  # what decided it: a frozen plan, or None
    grid: Any  # programs on the GPU; a `threads.Share` on the CPU
    reads: tuple[tuple[str, int, str | None], ...]  # operand, bytes, and whose memory that is
    writes: tuple[tuple[str, int, str | None], ...]


class Record:
    """The notes of one call. `memory`: spans of bytes whose owner is known, by name."""

    def __init__(self, arguments: dict[str, Array]) -> None:
        self.engines: list[str] = []
        self.paths: list[str] = []
        self.launches: list[Launched] = []
        self.memory: list[tuple[int, int, str]] = []
        for name, x in arguments.items():
            self.owns(f"argument {name}", x)

    def owns(self, name: str, x: Array) -> None:
        """Operands in the memory of `x` are `name`."""
        span = _span(x)
        if span is not None:
            self.memory.append((*span, name))

    def launched(self, kernel: str, plan: Any, grid: Any, reads: Any, writes: Any) -> None:
        """An engine's observer."""
        found = tuple((name, nbytes, self._owner(address)) for name, nbytes, address in reads)
        self.memory += [(at, at + nbytes, f"{name} of an earlier kernel") for name, nbytes, at in writes if at is not None]
        written = tuple((name, nbytes, None) for name, nbytes, _ in writes)
        self.launches.append(Launched(kernel, plan, grid, found, written))

    def _owner(self, address: int | None) -> str | None:
        """The name of the memory's owner; '' where it has none, as a copy; None where that is not known."""
        if address is None:
            return None
        return next((name for start, end, name in self.memory if start <= address < end), "")


def _span(x: Array) -> tuple[int, int] | None:
    """(first byte, byte after the last) of the memory behind an array; None where it cannot be asked for."""
    if isinstance(x, np.ndarray):
        return np.lib.array_utils.byte_bounds(x)
    with contextlib.suppress(Exception):  # tensors inside a transform, without memory, or of other libraries
        if hasattr(x, "untyped_storage"):
            storage = x.untyped_storage()
            return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if hasattr(x, "data") and hasattr(x.data, "mem"):
            return x.data.mem.ptr, x.data.mem.ptr + x.data.mem.size
        return np.lib.array_utils.byte_bounds(np.from_dlpack(x))
    return None


@contextlib.contextmanager
def record(arguments: dict[str, Array]) -> Iterator[Record]:
    """Records what this thread and context do with these arrays inside the block. The engines have to be loaded before."""
    found = Record(arguments)
    undo: list[Callable[[], None]] = []
    for variable in (_open, *(sys.modules[name].observer for name in _OBSERVED if name in sys.modules)):
        token = variable.set(found if variable is _open else found.launched)
        undo.append(lambda variable=variable, token=token: variable.reset(token))  # type: ignore[misc]
    try:
        yield found
    finally:
        for back in reversed(undo):
            back()


def note(path: str, which: str | None = None) -> None:
    """Records the path that a call takes, and its engine where that is known."""
    found = _open.get()
    if found is None:
        return
    if path not in found.paths:
        found.paths.append(path)
    if which is not None:
        found.engines.append(which)


def note_engine(which: str) -> None:
    """Records the engine of a call."""
    found = _open.get()
    if found is not None:
        found.engines.append(which)


def note_made(name: str, x: Array) -> None:
    """Records an array that a call makes on purpose, so that it does not count as a copy of an argument."""
    found = _open.get()
    if found is not None:
        found.owns(name, x)
