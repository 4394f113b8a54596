"""The smallest eigenpairs of each of a stack of symmetric matrices, on the CPU: by LAPACK, in several threads.

    smallest    eigenpairs 1…k of each matrix by syevr or heevr (jobz='V', range='I'); of small ones by stevr

SciPy's own wrappers hold the GIL, and NumPy's eigh computes all eigenpairs, which takes 2 to 4 times as long. LAPACK is
reached through the addresses that `scipy.linalg.cython_lapack` publishes; a Fortran routine takes nothing but pointers, so one
intrinsic calls them all. Only lower triangles are read. A row-major symmetric matrix is its own column-major transpose (a
Hermitian one its conjugate's): no copy is reordered.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import get_cython_function_address, intrinsic

from ._numba.blas import one_thread
from ._numba.compile import inline, kernel, reduction
from ._numba.threads import run
from ._numba.views import copy

_PREFIX = {"float32": "s", "float64": "d", "complex64": "c", "complex128": "z"}
# the arguments of LAPACK that are characters, one byte each
_LETTERS = np.frombuffer(b"VIL", np.uint8)
_V, _I, _L = range(3)
# Matrices up to this size are made tridiagonal here: in LAPACK the calls of BLAS cost more than the arithmetic.
_SMALL = 96


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

    return types.void(types.int64, types.UniTuple(types.intp, pointers.count)), generate


_call: Any = intrinsic(_call_routine)


@numba.njit(inline="always")
def _at(array, i) -> int:
    """The address of element i of a contiguous array."""
    return array.ctypes.data + i * array.itemsize


# ---------------------------------------------------------------------------------------------- tridiagonal form
@reduction
def _dot(x, y) -> float:
    total = x.dtype.type(0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@inline
def _subtract_two(row, x, y, y_times, x_times) -> None:
    for j in range(row.size):
        row[j] -= y_times * y[j] + x_times * x[j]


@inline
def _tridiagonal(a, d, e, tau, work) -> None:
    """Qᵀ a Q with diagonal d and off-diagonal e, as LAPACK's sytd2 (uplo='L') has it: Householder vectors stay in rows of `a`.

    Row i of `a` (m, m) is its column i to LAPACK. Both triangles are kept up to date, so that every loop runs along a row.
    (Loops begin at 0, over slices: of an index that may be negative Numba makes a loop that does not vectorise.)
    """
    m = a.shape[0]
    of = a.dtype.type
    for i in range(m - 1):
        d[i] = a[i, i]
        row = a[i, i + 1 :]
        alpha = row[0]
        row[0] = of(0)
        norm2 = _dot(row, row)
        if norm2 == 0:
            tau[i], e[i] = of(0), alpha
            continue
        beta = -math.copysign(math.sqrt(alpha * alpha + norm2), alpha)
        tau[i], e[i] = (beta - alpha) / beta, beta
        inverse = of(1) / (alpha - beta)
        v, w = work[0, i + 1 :], work[1, i + 1 :]
        for j in range(row.size):
            row[j] *= inverse
        row[0] = of(1)
        copy(row, v)
        for j in range(row.size):
            w[j] = tau[i] * _dot(a[i + 1 + j, i + 1 :], v)
        half = of(0.5) * tau[i] * _dot(w, v)
        for j in range(row.size):
            w[j] -= half * v[j]
        for r in range(row.size):
            _subtract_two(a[i + 1 + r, i + 1 :], v, w, v[r], w[r])
    d[m - 1] = a[m - 1, m - 1]


@inline
def _turn_back(a, tau, z) -> None:
    """Q z for each row z of (k, m), with Q as `_tridiagonal` left it in `a` and `tau`."""
    m = a.shape[0]
    for i in range(m - 2, -1, -1):
        if tau[i] != 0:
            v = a[i, i + 1 :]
            for c in range(z.shape[0]):
                x = z[c, i + 1 :]
                share = tau[i] * _dot(v, x)
                for j in range(x.size):
                    x[j] -= share * v[j]


# ---------------------------------------------------------------------------------------------- solvers
@kernel
def _smallest_of_small(first, last, routine, letters, a, values, vectors, info) -> None:
    m, k = a.shape[-1], values.shape[-1]
    size = 20 * m
    matrix, pair, work = np.zeros((m, m), a.dtype), np.zeros((2, m), a.dtype), np.zeros(size, a.dtype)
    reals = np.zeros(4 * m + 1, a.dtype)
    ints = np.zeros(12 * m + 8, np.int32)
    d, e, tau, w, zero = 0, m, 2 * m, 3 * m, 4 * m
    support, iwork, n, one, count, found, lwork, liwork, status = (
        8, 8 + 2 * m, 0, 1, 2, 3, 4, 5, 6,
    )  # fmt: skip
    ints[n], ints[one], ints[count], ints[lwork], ints[liwork] = m, 1, k, size, 10 * m
    for i in range(first, last):
        for r in range(m):
            copy(a[i, r], matrix[r])
        _tridiagonal(matrix, reals[d:e], reals[e:tau], reals[tau:w], pair)
        _call(routine, (
            _at(letters, _V), _at(letters, _I), _at(ints, n), _at(reals, d), _at(reals, e), _at(reals, zero), _at(reals, zero),
            _at(ints, one), _at(ints, count), _at(reals, zero), _at(ints, found), _at(reals, w), _at(vectors, i * k * m),
            _at(ints, n), _at(ints, support), _at(work, 0), _at(ints, lwork), _at(ints, iwork), _at(ints, liwork),
            _at(ints, status),
        ))  # fmt: skip
        copy(reals[w : w + k], values[i])
        _turn_back(matrix, reals[tau:w], vectors[i])
        # read after the call: keeps the workspaces alive through it
        info[i] = ints[status] if ints[found] == k and work.size and reals.size else -1


@kernel
def _smallest(first, last, routine, letters, a, values, vectors, info) -> None:
    """syevr of real matrices, heevr of complex ones, which wants `reals` besides."""
    m, k = a.shape[-1], values.shape[-1]
    # the least workspaces are 26 m numbers, of heevr 2 m and 24 m real ones, and 10 m integers
    size = 32 * m
    matrix, work, reals = np.empty(m * m, a.dtype), np.empty(size, a.dtype), np.zeros(25 * m + 1, values.dtype)
    ints = np.zeros(12 * m + 9, np.int32)
    n, one, count, found, lwork, lrwork, liwork, status, support, iwork = 0, 1, 2, 3, 4, 5, 6, 7, 9, 9 + 2 * m
    ints[n], ints[one], ints[count], ints[lwork], ints[lrwork], ints[liwork] = m, 1, k, size, 24 * m, 10 * m
    zero = _at(reals, 25 * m)
    for i in range(first, last):
        for r in range(m):
            for j in range(m):  # the transpose of a Hermitian matrix: column by column this is the matrix itself
                matrix[r * m + j] = a[i, r, j].conjugate()
        given = (
            _at(letters, _V), _at(letters, _I), _at(letters, _L), _at(ints, n), _at(matrix, 0), _at(ints, n), zero, zero,
            _at(ints, one), _at(ints, count), zero, _at(ints, found), _at(reals, 0), _at(vectors, i * k * m), _at(ints, n),
            _at(ints, support), _at(work, 0), _at(ints, lwork),
        )  # fmt: skip
        integers = _at(ints, iwork), _at(ints, liwork), _at(ints, status)
        if a.itemsize == values.itemsize:
            _call(routine, given + integers)
        else:
            _call(routine, given + (_at(reals, m), _at(ints, lrwork)) + integers)  # noqa: RUF005
        copy(reals[:k], values[i])
        # read after the call: keeps the workspaces alive through it
        info[i] = ints[status] if ints[found] == k and matrix.size and work.size else -1


def _outputs(a: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    B, m, _ = a.shape
    return np.empty((B, k), np.empty(0, a.dtype).real.dtype), np.empty((B, k, m), a.dtype), np.empty(B, np.int32)


def smallest(a: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k smallest eigenvalues (B, k) of a (B, m, m), eigenvectors (B, m, k), and LAPACK's info (B,), 0 for success.

    `a` is C-contiguous, float32, float64, complex64 or complex128. One matrix has the threads of BLAS; several have those of
    the kernels, each with one of BLAS.
    """
    values, vectors, info = outputs = _outputs(a, k)
    body, routine = _smallest, "syevr"
    if a.dtype.kind == "c":
        routine = "heevr"
    elif 1 < a.shape[-1] <= _SMALL:
        body, routine = _smallest_of_small, "stevr"
    args = _address(_PREFIX[str(a.dtype)] + routine), _LETTERS, a, *outputs
    with one_thread() if len(a) > 1 else contextlib.nullcontext():
        run(body, len(a), 16 * a.nbytes, *args)
    return values, vectors.swapaxes(-1, -2), info
