"""One array namespace for NumPy, CuPy and torch, on which `_linalg`, `trace` and `points` compute.

NumPy arrays and torch CPU tensors are computed on by NumPy (and LAPACK), through views that share the caller's memory;
CuPy arrays and torch CUDA tensors by CuPy, on the caller's device and stream.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from . import _arrays

Array = Any


@dataclass(frozen=True)
class Numerics:
    """Where the arrays of one call are computed on: `xp` is NumPy or CuPy, `like` the caller's array.

    What a call looks at on the host, and what it reports there, comes from a GPU in one copy: `check` waits for `fetch`.
    """

    xp: ModuleType
    like: Array
    waiting: list[tuple[tuple[Array, ...], Callable[..., None]]] = field(default_factory=list)

    def read(self, x: Array, dtype: str | None = None) -> Array:
        """`x` as an array of `xp`; a view of the caller's memory unless `dtype` asks for another dtype."""
        if _arrays.is_torch(x):
            x = x.detach().resolve_conj().resolve_neg()
            x = x.numpy() if self.xp is np else self.xp.from_dlpack(x)
        return x if dtype is None else x.astype(dtype, copy=False)

    def give(self, a: Array, dtype: str) -> Array:
        """`a` in the caller's kind of array and on its device, rounded once to `dtype`; NumPy scalars for 0 axes."""
        a = self.xp.asarray(a, dtype=dtype)
        if not _arrays.is_torch(self.like):
            return a[()] if self.xp is np else a
        return _arrays.kernel_view(a, "gpu")

    def check(self, look: Callable[..., None], *arrays: Array) -> None:
        """`look(*arrays)`, in NumPy, which raises what is wrong: now on the host, with the next `fetch` on a GPU."""
        if self.xp is np:
            look(*map(np.asarray, arrays))
        else:
            self.waiting.append((arrays, look))

    def fetch(self, *arrays: Array) -> list[np.ndarray]:
        """`arrays` in NumPy, and those of the checks that wait, in one copy: of numbers that float64 holds."""
        if self.xp is np:
            return [np.asarray(a) for a in arrays]
        waiting = [*self.waiting]
        self.waiting.clear()
        wanted = [a for checked, _ in waiting for a in checked] + [*arrays]
        if not wanted:
            return []
        packed = self.xp.asnumpy(self.xp.concatenate([a.astype("float64").ravel() for a in wanted]))
        parts = np.split(packed, np.cumsum([a.size for a in wanted])[:-1])
        found = iter([part.reshape(a.shape).astype(a.dtype) for part, a in zip(parts, wanted, strict=True)])
        for checked, look in waiting:
            look(*(next(found) for _ in checked))
        return list(found)

    def host(self, a: Array) -> np.ndarray:
        """`a` in NumPy, by a copy of its own: for messages of errors."""
        return np.asarray(a) if self.xp is np else self.xp.asnumpy(a)


@contextlib.contextmanager
def numerics(x: Array, name: str) -> Iterator[Numerics]:
    """The `Numerics` for the array `x`; inside the block CuPy uses its device and the caller's stream.

    On the host BLAS uses one thread inside for several matrices, which is as fast for small ones as it gets: large stacks are
    shared out over threads, a matrix to each.

    Raises `BackendError` when `x` lives on a GPU and CuPy, or a library that it loads, cannot be imported, or finds no device.
    What CUDA raises inside the block passes.
    """
    kind = _arrays.kind(x, name)
    if _arrays.on_host(x):
        with _arrays.kernels("_blas", "cpu").one_thread() if _is_stack(x) else contextlib.nullcontext():
            yield Numerics(np, x)
        return
    cupy = _cupy(name)
    import cupyx

    with contextlib.ExitStack() as stack:
        if kind == "torch":
            stack.enter_context(cupy.cuda.Device(x.device.index))
            stack.enter_context(_stream_of(cupy, x))
        else:
            stack.enter_context(x.device)
        stack.enter_context(cupyx.errstate(linalg="raise"))  # the default, "ignore", never looks at devInfo
        try:
            ns = Numerics(cupy, x)
            yield ns
            ns.fetch()
        except ImportError as error:  # of cuSOLVER, say, which CuPy loads when it is first asked for
            raise _unusable(name, error) from error


def _cupy(name: str) -> ModuleType:
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except (ImportError, RuntimeError) as error:  # CUDARuntimeError, where there is no driver or no device
        raise _unusable(name, error) from error
    return cupy


def _stream_of(cupy: ModuleType, x: Array) -> Any:
    """CuPy's name for the stream on which the caller of a CUDA tensor queues work."""
    import torch

    stream = torch.cuda.current_stream(x.device)
    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, x.device.index)


def _unusable(name: str, error: Exception) -> _arrays.BackendError:
    return _arrays.BackendError(
        f"{name}: arrays on a GPU are solved by CuPy, which cannot be used here ({type(error).__name__}: {error}); "
        "pip install 'hw3gpu[cuda12]' or 'hw3gpu[cuda13]' brings it, the NVIDIA driver is the machine's"
    )


def _is_stack(x: Array) -> bool:
    """Whether there is more than one matrix in `x` (..., n, m)."""
    return x.ndim > 2 and math.prod(x.shape[:-2]) > 1
