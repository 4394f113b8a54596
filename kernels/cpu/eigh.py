"""LAPACK on stacks of symmetric matrices, on the CPU: one matrix at a time, several threads at once.

    smallest      syevr (jobz='V', range='I', uplo='L')    eigenpairs 1…k of each matrix
    definite      potrf (uplo='L')                         whether each matrix has a Cholesky factorisation

SciPy's and NumPy's own wrappers hold the GIL or loop in one thread. LAPACK is reached through the addresses that
`scipy.linalg.cython_lapack` publishes; a Fortran routine takes nothing but pointers, so one intrinsic calls them all.
Only lower triangles are read. A row-major symmetric matrix is its own column-major transpose: no copy is reordered.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import get_cython_function_address, intrinsic

from ._jit import kernel
from ._threads import run

_PREFIX = {"float32": "s", "float64": "d"}
# the arguments of syevr and potrf that are characters, one byte each
_LETTERS = np.frombuffer(b"VIL", np.uint8)


@functools.cache
def _address(routine: str) -> int:
    return int(get_cython_function_address("scipy.linalg.cython_lapack", routine))


def _call_routine(typing_context: Any, address: Any, pointers: Any) -> Any:
    """Call the routine at `address` with a tuple of addresses as its arguments."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        routine = ir.FunctionType(ir.VoidType(), [byte] * pointers.count).as_pointer()
        values = [builder.inttoptr(builder.extract_value(args[1], i), byte) for i in range(pointers.count)]
        builder.call(builder.inttoptr(args[0], routine), values)
        return context.get_dummy_value()

    return types.void(types.int64, types.containers.UniTuple(types.intp, pointers.count)), generate


_call: Any = intrinsic(_call_routine)


@numba.njit(inline="always")
def _at(array, i):
    """The address of element i of a contiguous array."""
    return array.ctypes.data + i * array.itemsize


@kernel
def _smallest(first, last, syevr, letters, a, values, vectors, info):
    m, k = a.shape[-1], values.shape[-1]
    # syevr destroys its matrix; its least workspaces are 26 m numbers and 10 m integers
    size = 32 * m
    reals = np.zeros(m * m + m + size + 2, a.dtype)
    ints = np.zeros(12 * m + 8, np.int32)
    w, work, zeros = m * m, m * m + m, m * m + m + size
    support, iwork, n, one, count, found, lwork, liwork, status = (
        8, 8 + 2 * m, 0, 1, 2, 3, 4, 5, 6,
    )  # fmt: skip
    ints[n], ints[one], ints[count], ints[lwork], ints[liwork] = m, 1, k, size, 10 * m
    for i in range(first, last):
        reals[: m * m] = a[i].reshape(m * m)
        _call(syevr, (
            _at(letters, 0), _at(letters, 1), _at(letters, 2), _at(ints, n), _at(reals, 0), _at(ints, n),
            _at(reals, zeros), _at(reals, zeros), _at(ints, one), _at(ints, count), _at(reals, zeros), _at(ints, found),
            _at(reals, w), _at(vectors, i * k * m), _at(ints, n), _at(ints, support), _at(reals, work),
            _at(ints, lwork), _at(ints, iwork), _at(ints, liwork), _at(ints, status),
        ))  # fmt: skip
        # read after the call: keeps the workspaces alive through it
        values[i] = reals[w : w + k]
        info[i] = ints[status] if ints[found] == k else -1


@kernel
def _definite(first, last, potrf, letters, a, info):
    m = a.shape[-1]
    ints = np.zeros(2, np.int32)
    ints[0] = m
    for i in range(first, last):
        _call(potrf, (_at(letters, 2), _at(ints, 0), _at(a, i * m * m), _at(ints, 0), _at(ints, 1)))
        info[i] = ints[1]


def smallest(a: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k smallest eigenvalues (B, k) of a (B, m, m), eigenvectors (B, m, k), and LAPACK's info (B,), 0 for success.

    `a` is C-contiguous, float32 or float64.
    """
    batch, m, _ = a.shape
    values = np.empty((batch, k), a.dtype)
    vectors = np.empty((batch, k, m), a.dtype)
    info = np.empty(batch, np.int32)
    syevr = _address(_PREFIX[str(a.dtype)] + "syevr")
    run(_smallest, batch, 16 * a.nbytes, syevr, _LETTERS, a, values, vectors, info)
    return values, vectors.swapaxes(-1, -2), info


def definite(a: np.ndarray) -> np.ndarray:
    """Whether each of a (B, m, m), C-contiguous, float32 or float64, has a Cholesky factorisation. Overwrites `a`."""
    info = np.empty(a.shape[0], np.int32)
    run(_definite, a.shape[0], 4 * a.nbytes, _address(_PREFIX[str(a.dtype)] + "potrf"), _LETTERS, a, info)
    return info == 0
