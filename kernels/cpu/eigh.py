"""LAPACK on stacks of symmetric matrices, on the CPU: one matrix at a time, several threads at once.

    smallest               syevr, heevr (jobz='V', range='I')  eigenpairs 1…k of each matrix
    smallest_of_all        sytrd, stedc, ormtr                 all eigenvalues, by divide and conquer, and eigenvectors 1…k
    deflated_is_definite   syrk, potrf                         whether Σ + B Bᵀ - s I has a Cholesky factorisation

SciPy's and NumPy's own wrappers hold the GIL or loop in one thread. LAPACK and BLAS are reached through the addresses that
`scipy.linalg.cython_lapack` and `cython_blas` publish; a Fortran routine takes nothing but pointers, so one intrinsic calls
them all. Only lower triangles are read. A row-major symmetric matrix is its own column-major transpose (a Hermitian one its
conjugate's): no copy is reordered.
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

_PREFIX = {"float32": "s", "float64": "d", "complex64": "c", "complex128": "z"}
# the arguments of BLAS and LAPACK that are characters, one byte each
_LETTERS = np.frombuffer(b"VILN", np.uint8)
_V, _I, _L, _N = range(4)


@functools.cache
def _address(module: str, routine: str) -> int:
    return int(get_cython_function_address(f"scipy.linalg.cython_{module}", routine))


def _routines(a: np.ndarray, *names: str) -> tuple[int, ...]:
    """The addresses of LAPACK and BLAS routines for the dtype of `a`, with "-" in place of the dtype's letter."""
    prefix = _PREFIX[str(a.dtype)]
    return tuple(_address("blas" if name == "-syrk" else "lapack", name.replace("-", prefix)) for name in names)


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
def _smallest(first, last, routines, letters, a, values, vectors, info):
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
        _call(routines[0], (
            _at(letters, _V), _at(letters, _I), _at(letters, _L), _at(ints, n), _at(reals, 0), _at(ints, n),
            _at(reals, zeros), _at(reals, zeros), _at(ints, one), _at(ints, count), _at(reals, zeros), _at(ints, found),
            _at(reals, w), _at(vectors, i * k * m), _at(ints, n), _at(ints, support), _at(reals, work),
            _at(ints, lwork), _at(ints, iwork), _at(ints, liwork), _at(ints, status),
        ))  # fmt: skip
        # read after the call: keeps the workspaces alive through it
        values[i] = reals[w : w + k]
        info[i] = ints[status] if ints[found] == k else -1


@kernel
def _smallest_hermitian(first, last, routines, letters, a, values, vectors, info):
    m, k = a.shape[-1], values.shape[-1]
    # heevr wants 2 m complex numbers and 24 m real ones at least, and 10 m integers
    size = 34 * m
    matrix, work, reals = np.zeros(m * m, a.dtype), np.zeros(size, a.dtype), np.zeros(25 * m + 2, values.dtype)
    ints = np.zeros(12 * m + 9, np.int32)
    rwork, zeros = m, 25 * m
    support, iwork, n, one, count, found, lwork, liwork, lrwork, status = (
        9, 9 + 2 * m, 0, 1, 2, 3, 4, 5, 6, 7,
    )  # fmt: skip
    ints[n], ints[one], ints[count], ints[lwork], ints[liwork], ints[lrwork] = m, 1, k, size, 10 * m, 24 * m
    for i in range(first, last):
        matrix[:] = a[i].reshape(m * m)
        for j in range(m * m):
            matrix[j] = matrix[j].conjugate()  # the transpose of a Hermitian matrix, column by column the matrix itself
        _call(routines[0], (
            _at(letters, _V), _at(letters, _I), _at(letters, _L), _at(ints, n), _at(matrix, 0), _at(ints, n),
            _at(reals, zeros), _at(reals, zeros), _at(ints, one), _at(ints, count), _at(reals, zeros), _at(ints, found),
            _at(reals, 0), _at(vectors, i * k * m), _at(ints, n), _at(ints, support), _at(work, 0), _at(ints, lwork),
            _at(reals, rwork), _at(ints, lrwork), _at(ints, iwork), _at(ints, liwork), _at(ints, status),
        ))  # fmt: skip
        values[i] = reals[:k]
        info[i] = ints[status] if ints[found] == k and matrix.size and work.size else -1


@kernel
def _smallest_of_all(first, last, routines, letters, a, values, vectors, info):
    sytrd, stedc, ormtr = routines
    m, k = a.shape[-1], vectors.shape[1]
    size = max(1 + 4 * m + m * m, 64 * m)
    matrix, z, work, reals = (
        np.empty(m * m, a.dtype),
        np.empty(m * m, a.dtype),
        np.empty(size, a.dtype),
        np.zeros(3 * m, a.dtype),
    )
    ints = np.zeros(5 * m + 8, np.int32)
    n, count, lwork, liwork, status, iwork = 0, 1, 2, 3, 4, 5
    ints[n], ints[count], ints[lwork], ints[liwork] = m, k, size, 5 * m + 3
    for i in range(first, last):
        matrix[:] = a[i].reshape(m * m)
        _call(sytrd, (
            _at(letters, _L), _at(ints, n), _at(matrix, 0), _at(ints, n), _at(reals, 0), _at(reals, m), _at(reals, 2 * m),
            _at(work, 0), _at(ints, lwork), _at(ints, status),
        ))  # fmt: skip
        _call(stedc, (
            _at(letters, _I), _at(ints, n), _at(reals, 0), _at(reals, m), _at(z, 0), _at(ints, n),
            _at(work, 0), _at(ints, lwork), _at(ints, iwork), _at(ints, liwork), _at(ints, status),
        ))  # fmt: skip
        info[i] = ints[status]
        vectors[i] = z[: k * m].reshape(k, m)
        _call(ormtr, (
            _at(letters, _L), _at(letters, _L), _at(letters, _N), _at(ints, n), _at(ints, count), _at(matrix, 0), _at(ints, n),
            _at(reals, 2 * m), _at(vectors, i * k * m), _at(ints, n), _at(work, 0), _at(ints, lwork), _at(ints, status),
        ))  # fmt: skip
        values[i] = reals[:m]
        # read after the calls: keeps the workspaces alive through them
        info[i] += ints[status] if matrix.size and z.size and work.size else 0


@kernel
def _deflated_is_definite(first, last, routines, letters, a, b, shift, info):
    syrk, potrf = routines
    m, k = a.shape[-1], b.shape[1]
    ints, one = np.zeros(3, np.int32), np.ones(1, a.dtype)
    ints[0], ints[1] = m, k
    for i in range(first, last):
        _call(syrk, (
            _at(letters, _L), _at(letters, _N), _at(ints, 0), _at(ints, 1), _at(one, 0), _at(b, i * k * m), _at(ints, 0),
            _at(one, 0), _at(a, i * m * m), _at(ints, 0),
        ))  # fmt: skip
        for j in range(m):
            a[i, j, j] -= shift[i]
        _call(potrf, (_at(letters, _L), _at(ints, 0), _at(a, i * m * m), _at(ints, 0), _at(ints, 2)))
        info[i] = ints[2] if one.size else 0


def _outputs(a: np.ndarray, k: int, values: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    B, m, _ = a.shape
    return np.empty((B, values), np.empty(0, a.dtype).real.dtype), np.empty((B, k, m), a.dtype), np.empty(B, np.int32)


def smallest(a: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k smallest eigenvalues (B, k) of a (B, m, m), eigenvectors (B, m, k), and LAPACK's info (B,), 0 for success.

    `a` is C-contiguous, float32, float64, complex64 or complex128.
    """
    values, vectors, info = _outputs(a, k, k)
    hermitian = a.dtype.kind == "c"
    routines = _routines(a, "-heevr" if hermitian else "-syevr")
    body = _smallest_hermitian if hermitian else _smallest
    run(body, a.shape[0], 16 * a.nbytes, routines, _LETTERS, a, values, vectors, info)
    return values, vectors.swapaxes(-1, -2), info


def smallest_of_all(a: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All eigenvalues (B, m), ascending, of a (B, m, m), the eigenvectors (B, m, k) of the first k, and LAPACK's info (B,).

    `a` is C-contiguous, float32 or float64.
    """
    values, vectors, info = _outputs(a, k, a.shape[-1])
    routines = _routines(a, "-sytrd", "-stedc", "-ormtr")
    run(_smallest_of_all, a.shape[0], 16 * a.nbytes, routines, _LETTERS, a, values, vectors, info)
    return values, vectors.swapaxes(-1, -2), info


def deflated_is_definite(a: np.ndarray, b: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Whether each a + Σ_j b_j b_jᵀ - shift I has a Cholesky factorisation; a (B, m, m) is overwritten, b (B, k, m).

    All C-contiguous and of one dtype, float32 or float64.
    """
    info = np.empty(a.shape[0], np.int32)
    routines = _routines(a, "-syrk", "-potrf")
    run(_deflated_is_definite, a.shape[0], 4 * a.nbytes, routines, _LETTERS, a, b, shift, info)
    return info == 0
