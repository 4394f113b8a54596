"""cuSOLVER's range-limited and batched eigensolvers, which CuPy does not reach, through nvmath-python (extra `nvmath`).

    Xsyevdx        eigenpairs 1…k of one matrix
    XsyevBatched   all eigenpairs of each of a stack (CUDA 12.6 or later)

Arrays are CuPy's, `xp` is CuPy. A row-major symmetric matrix is its own column-major transpose, a Hermitian one its
conjugate's; eigenvectors come back as rows.
"""

from __future__ import annotations

import functools
import threading
from types import ModuleType
from typing import Any

import numpy as np

Array = Any

# enumerators of cusolverEigMode_t, cusolverEigRange_t and cublasFillMode_t, and of cudaDataType
_VECTORS, _BY_INDEX, _LOWER = 1, 1002, 0
_DATA_TYPE = {"float32": 0, "float64": 1, "complex64": 4, "complex128": 5}
# XsyevBatched takes stacks of fewer than 2^31 numbers
_BATCH_ELEMENTS = 2**30

_handles = threading.local()


@functools.cache
def refusal() -> str | None:
    """Why nvmath-python cannot be used here, or None when it can."""
    try:
        from nvmath.bindings import cusolverDn  # noqa: F401
    except Exception as error:  # it loads CUDA's libraries, which fail in their own ways
        return f"{type(error).__name__}: {error}"
    return None


def _solver(xp: ModuleType) -> tuple[ModuleType, int, int]:
    """(the bindings, a handle for this thread and device, on the current stream, default parameters)"""
    from nvmath.bindings import cusolverDn

    device = int(xp.cuda.runtime.getDevice())
    made = _handles.__dict__.setdefault("made", {})
    if device not in made:
        made[device] = (cusolverDn.create(), cusolverDn.create_params())
    handle, params = made[device]
    cusolverDn.set_stream(handle, int(xp.cuda.get_current_stream().ptr))
    return cusolverDn, handle, params


def _address(a: Array) -> int:
    interface = getattr(a, "__cuda_array_interface__", None) or a.__array_interface__
    return int(interface["data"][0])


def _columns(s: Array) -> Array:
    """A copy of `s` that the solver may overwrite, whose memory, read by columns, is `s`."""
    return s.conj() if s.dtype.kind == "c" else s.copy()


def _types(s: Array) -> tuple[int, int, str]:
    """(cudaDataType of `s`, that of its eigenvalues, their dtype)"""
    name = str(s.dtype)
    real = {"complex64": "float32", "complex128": "float64"}.get(name, name)
    return _DATA_TYPE[name], _DATA_TYPE[real], real


def check(info: np.ndarray, routine: str) -> None:
    """LinAlgError if any of a routine's devInfo, on the host, is not 0."""
    failed = np.count_nonzero(info)
    if failed:
        first = info.ravel()[np.flatnonzero(info)[0]]
        raise np.linalg.LinAlgError(f"{routine} did not converge for {failed} of {info.size} matrices (devInfo {first})")


def smallest(xp: ModuleType, s: Array, count: int) -> tuple[Array, Array, Array]:
    """Eigenvalues 1…count, ascending, eigenvectors (m, count) and devInfo () of one matrix `s` (m, m)."""
    solver, handle, params = _solver(xp)
    m, a = s.shape[-1], _columns(s)
    kind, real_kind, real = _types(s)
    values, info = xp.empty(m, real), xp.zeros(1, "int32")
    limits, found = np.zeros(2), np.zeros(1, np.int64)  # by value: not used, but read
    problem = (
        handle, params, _VECTORS, _BY_INDEX, _LOWER, m, kind, _address(a), m,
        _address(limits), _address(limits[1:]), 1, count,
    )  # fmt: skip
    output = (real_kind, _address(values), kind)
    on_device, on_host = solver.xsyevdx_buffer_size(*problem, _address(found), *output)
    work, host_work = xp.zeros(max(on_device, 1), "uint8"), np.zeros(max(on_host, 1), np.uint8)
    got = solver.xsyevdx(
        *problem, *output, _address(work), on_device, _address(host_work), on_host, _address(info)
    )  # fmt: skip
    if got != count:
        raise np.linalg.LinAlgError(f"Xsyevdx found {got} of {count} eigenvalues")
    return values[:count], a[:count].T, info[0]


def all_of_stack(xp: ModuleType, s: Array) -> tuple[Array, Array, Array]:
    """All eigenvalues (B, m), ascending, eigenvectors (B, m, m) and devInfo (B,) of a stack `s` (B, m, m)."""
    solver, handle, params = _solver(xp)
    m, a = s.shape[-1], _columns(s)
    kind, real_kind, real = _types(s)
    values, info = xp.empty(s.shape[:-1], real), xp.zeros(s.shape[0], "int32")
    step = max(1, _BATCH_ELEMENTS // (m * m))
    for start in range(0, s.shape[0], step):
        part = slice(start, start + step)
        batch = a[part].shape[0]
        problem = (handle, params, _VECTORS, _LOWER, m, kind, _address(a[part]), m, real_kind, _address(values[part]), kind)
        on_device, on_host = solver.xsyev_batched_buffer_size(*problem, batch)
        # zeroed: one version of XsyevBatched reads its workspace before it writes it
        work, host_work = xp.zeros(max(on_device, 1), "uint8"), np.zeros(max(on_host, 1), np.uint8)
        buffers = (_address(work), on_device, _address(host_work), on_host)
        solver.xsyev_batched(*problem, *buffers, _address(info[part]), batch)
    return values, a.swapaxes(-1, -2), info
