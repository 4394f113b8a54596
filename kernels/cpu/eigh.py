"""LAPACK on stacks of symmetric matrices, on the CPU: one matrix at a time, several threads at once.

    extents, scaled                                            max |a_ij|, max |a_ij - a_ji|; the symmetric part, scaled
    smallest               syevr, heevr (jobz='V', range='I')  eigenpairs 1…k of each matrix; of small ones stevr
    smallest_of_all        sytrd, stedc, ormtr                 all eigenvalues, by divide and conquer, and eigenvectors 1…k
    deflated_is_definite   syrk, potrf                         whether Σ + B Bᵀ - s I has a Cholesky factorisation

SciPy's and NumPy's own wrappers hold the GIL or loop in one thread. LAPACK and BLAS are reached through the addresses that
`scipy.linalg.cython_lapack` and `cython_blas` publish; a Fortran routine takes nothing but pointers, so one intrinsic calls
them all. Only lower triangles are read. A row-major symmetric matrix is its own column-major transpose (a Hermitian one its
conjugate's): no copy is reordered.
"""

from __future__ import annotations

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
# the arguments of BLAS and LAPACK that are characters, one byte each
_LETTERS = np.frombuffer(b"VILN", np.uint8)
_V, _I, _L, _N = range(4)
_BITS = {"float32": np.int32, "float64": np.int64}
# Rows and columns of the tiles in which a matrix is read beside its transpose.
_TILE = 32
# Matrices up to this size are made tridiagonal here: in LAPACK the calls of BLAS cost more than the arithmetic.
_SMALL = 96


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

    return types.void(types.int64, types.UniTuple(types.intp, pointers.count)), generate


_call: Any = intrinsic(_call_routine)


@numba.njit(inline="always")
def _at(array, i):
    """The address of element i of a contiguous array."""
    return array.ctypes.data + i * array.itemsize


# ---------------------------------------------------------------------------------------------- checks and scaling
@inline
def _band(unit, bands, m):
    """(matrix, first row, end row) of a unit of work: a band of rows, whole tiles."""
    tiles = (m + _TILE - 1) // _TILE
    q = unit % bands
    return unit // bands, tiles * q // bands * _TILE, min(tiles * (q + 1) // bands * _TILE, m)


@kernel
def _extents(first, last, a, bits, bands, found):
    """Of each band, the bits of max |a_ij| and max |a_ij - a_ji|. As integers these vectorise, and NaN lies above infinity."""
    m = a.shape[-1]
    apart = np.empty(_TILE, a.dtype)
    apart_bits = apart.view(bits.dtype)
    mask = bits.dtype.type((1 << (8 * a.itemsize - 1)) - 1)
    for unit in range(first, last):
        b, top, end = _band(unit, bands, m)
        largest, asymmetry = mask & 0, mask & 0
        for i in range(top, end):
            row = bits[b, i]
            for j in range(m):
                size = row[j] & mask
                largest = size if size > largest else largest
        for corner in range(top, end, _TILE):
            for left in range(0, corner + 1, _TILE):
                for i in range(corner, min(corner + _TILE, end)):
                    row, column = a[b, i, left : min(left + _TILE, i)], a[b, left : min(left + _TILE, i), i]
                    for j in range(row.size):
                        apart[j] = row[j] - column[j]
                    for j in range(row.size):
                        size = apart_bits[j] & mask
                        asymmetry = size if size > asymmetry else asymmetry
        found[0, unit], found[1, unit] = largest, asymmetry


@kernel
def _scaled(first, last, a, bands, scale, halve, s):
    m = a.shape[-1]
    of = s.dtype.type
    for unit in range(first, last):
        b, top, end = _band(unit, bands, m)
        factor = of(scale[b])
        for i in range(top, end):
            row = a[b, i]
            if halve[b]:
                for j in range(m):
                    s[b, i, j] = (of(row[j]) * factor + of(a[b, j, i]) * factor) / of(2)
            else:
                for j in range(m):
                    s[b, i, j] = of(row[j]) * factor


# ---------------------------------------------------------------------------------------------- tridiagonal form
@reduction
def _dot(x, y):
    total = x.dtype.type(0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@inline
def _subtract_two(row, x, y, y_times, x_times):
    for j in range(row.size):
        row[j] -= y_times * y[j] + x_times * x[j]


@inline
def _tridiagonal(a, d, e, tau, work):
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
def _turn_back(a, tau, z):
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
def _smallest_of_small(first, last, routines, letters, a, values, vectors, info):
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
        _call(routines[0], (
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
        for r in range(m):
            copy(a[i, r], reals[r * m : r * m + m])
        _call(routines[0], (
            _at(letters, _V), _at(letters, _I), _at(letters, _L), _at(ints, n), _at(reals, 0), _at(ints, n),
            _at(reals, zeros), _at(reals, zeros), _at(ints, one), _at(ints, count), _at(reals, zeros), _at(ints, found),
            _at(reals, w), _at(vectors, i * k * m), _at(ints, n), _at(ints, support), _at(reals, work),
            _at(ints, lwork), _at(ints, iwork), _at(ints, liwork), _at(ints, status),
        ))  # fmt: skip
        # read after the call: keeps the workspaces alive through it
        copy(reals[w : w + k], values[i])
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
        for r in range(m):
            copy(a[i, r], matrix[r * m : r * m + m])
        for j in range(m * m):
            matrix[j] = matrix[j].conjugate()  # the transpose of a Hermitian matrix, column by column the matrix itself
        _call(routines[0], (
            _at(letters, _V), _at(letters, _I), _at(letters, _L), _at(ints, n), _at(matrix, 0), _at(ints, n),
            _at(reals, zeros), _at(reals, zeros), _at(ints, one), _at(ints, count), _at(reals, zeros), _at(ints, found),
            _at(reals, 0), _at(vectors, i * k * m), _at(ints, n), _at(ints, support), _at(work, 0), _at(ints, lwork),
            _at(reals, rwork), _at(ints, lrwork), _at(ints, iwork), _at(ints, liwork), _at(ints, status),
        ))  # fmt: skip
        copy(reals[:k], values[i])
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
        for r in range(m):
            copy(a[i, r], matrix[r * m : r * m + m])
        _call(sytrd, (
            _at(letters, _L), _at(ints, n), _at(matrix, 0), _at(ints, n), _at(reals, 0), _at(reals, m), _at(reals, 2 * m),
            _at(work, 0), _at(ints, lwork), _at(ints, status),
        ))  # fmt: skip
        _call(stedc, (
            _at(letters, _I), _at(ints, n), _at(reals, 0), _at(reals, m), _at(z, 0), _at(ints, n),
            _at(work, 0), _at(ints, lwork), _at(ints, iwork), _at(ints, liwork), _at(ints, status),
        ))  # fmt: skip
        info[i] = ints[status]
        for r in range(k):
            copy(z[r * m : r * m + m], vectors[i, r])
        _call(ormtr, (
            _at(letters, _L), _at(letters, _L), _at(letters, _N), _at(ints, n), _at(ints, count), _at(matrix, 0), _at(ints, n),
            _at(reals, 2 * m), _at(vectors, i * k * m), _at(ints, n), _at(work, 0), _at(ints, lwork), _at(ints, status),
        ))  # fmt: skip
        copy(reals[:m], values[i])
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


def _bands(a: np.ndarray) -> int:
    """Parts of each of a (B, m, m) that are units of work: several where there are few large matrices."""
    return max(1, a.shape[-1] // (4 * _TILE)) if a.shape[0] < 8 else 1


def extents(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """max |a_ij|, NaN where there is one, and max |a_ij - a_ji| of each of a (B, m, m); C-contiguous, float32 or float64."""
    B, bands = a.shape[0], _bands(a)
    found, bits = np.empty((2, B * bands), a.dtype), _BITS[str(a.dtype)]
    run(_extents, B * bands, a.nbytes, a, a.view(bits), bands, found.view(bits))
    largest, asymmetry = found.reshape(2, B, bands).max(axis=-1)
    return largest, asymmetry


def scaled(a: np.ndarray, scale: np.ndarray, halve: np.ndarray, s: np.ndarray) -> None:
    """s (B, m, m) = scale (B,) · a, of (a + aᵀ) / 2 where `halve` (B,) is set."""
    bands = _bands(a)
    run(_scaled, a.shape[0] * bands, 2 * s.nbytes, a, bands, scale, halve, s)


def _share_out(body: Any, matrices: int, cost: int, *args: Any) -> None:
    """`run` for kernels that call LAPACK. One matrix has the threads of BLAS; several have ours, each with one of BLAS."""
    if matrices < 2:
        body(0, matrices, *args)
        return
    with one_thread():
        run(body, matrices, cost, *args)


def smallest(a: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k smallest eigenvalues (B, k) of a (B, m, m), eigenvectors (B, m, k), and LAPACK's info (B,), 0 for success.

    `a` is C-contiguous, float32, float64, complex64 or complex128.
    """
    values, vectors, info = _outputs(a, k, k)
    if a.dtype.kind == "c":
        body, routines = _smallest_hermitian, _routines(a, "-heevr")
    elif 1 < a.shape[-1] <= _SMALL:
        body, routines = _smallest_of_small, _routines(a, "-stevr")
    else:
        body, routines = _smallest, _routines(a, "-syevr")
    _share_out(body, a.shape[0], 16 * a.nbytes, routines, _LETTERS, a, values, vectors, info)
    return values, vectors.swapaxes(-1, -2), info


def smallest_of_all(a: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All eigenvalues (B, m), ascending, of a (B, m, m), the eigenvectors (B, m, k) of the first k, and LAPACK's info (B,).

    `a` is C-contiguous, float32 or float64.
    """
    values, vectors, info = _outputs(a, k, a.shape[-1])
    routines = _routines(a, "-sytrd", "-stedc", "-ormtr")
    _share_out(_smallest_of_all, a.shape[0], 16 * a.nbytes, routines, _LETTERS, a, values, vectors, info)
    return values, vectors.swapaxes(-1, -2), info


def deflated_is_definite(a: np.ndarray, b: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Whether each a + Σ_j b_j b_jᵀ - shift I has a Cholesky factorisation; a (B, m, m) is overwritten, b (B, k, m).

    All C-contiguous and of one dtype, float32 or float64.
    """
    info = np.empty(a.shape[0], np.int32)
    routines = _routines(a, "-syrk", "-potrf")
    _share_out(_deflated_is_definite, a.shape[0], 4 * a.nbytes, routines, _LETTERS, a, b, shift, info)
    return info == 0
