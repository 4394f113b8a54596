"""One thread for each call of BLAS and LAPACK, while several threads call them.

A BLAS has threads of its own. Called from several threads at once they wait for each other, and OpenBLAS built without OpenMP
writes a warning for each call from a thread of torch's OpenMP. Their number belongs to the process: `one_thread` counts who
is inside, and the last one out restores it. threadpoolctl finds the libraries that NumPy and SciPy have brought.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Library(NamedTuple):
    """How many threads a BLAS uses, and the function that sets it."""

    get: Callable[[], int | None]
    set: Callable[[int], object]


@functools.cache
def libraries() -> tuple[Library, ...]:
    """The BLAS libraries in this process whose threads are their own."""
    import scipy.linalg  # noqa: F401  it brings one, if it was not there yet
    from threadpoolctl import ThreadpoolController

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of OpenMP runtimes that do not go together
        found = ThreadpoolController().select(user_api="blas").lib_controllers
    of_openmp = [lib for lib in found if (lib.internal_api, getattr(lib, "threading_layer", "")) == ("openblas", "openmp")]
    # OpenMP gives its threads one thread each without being told, and to set it would be to set torch's number
    return tuple(Library(lib.get_num_threads, _setter(lib)) for lib in found if lib not in of_openmp)


def _setter(library: Any) -> Callable[[int], object]:
    # threadpoolctl 3.8 lets OpenBLAS be told by the first thread that ever did, and ignores the others in silence
    if library.internal_api == "openblas":
        for name in library.check_symbols:
            if hasattr(library.dynlib, name):
                return getattr(library.dynlib, name.replace("_get_", "_set_"))
    return library.set_num_threads


_lock = threading.Lock()
_inside = 0
_before: list[int | None] = []


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block every BLAS uses the calling thread alone; when no thread is inside any more, what it used before."""
    global _inside, _before
    with _lock:
        if not _inside:
            _before = [library.get() for library in libraries()]
            for library in libraries():
                library.set(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _restore()


def _restore() -> None:
    for library, threads in zip(libraries(), _before, strict=True):
        if threads is not None:
            library.set(threads)


def _after_fork() -> None:
    """A child has none of the threads that were inside, and its parent's numbers."""
    global _lock, _inside
    _lock = threading.Lock()
    if _inside:
        _inside = 0
        _restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
