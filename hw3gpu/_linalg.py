"""Symmetric eigenproblems for `points` and `trace`, on the array namespace of `_numerics`.

`symmetric` checks and scales a matrix, `smallest` solves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from . import _arrays, _check, _cusolver
from ._numerics import Numerics

Array = Any

REAL = ("float32", "float64")
COMPLEX = ("complex64", "complex128")
# the solvers, by where they run; "auto" chooses among them
_ON_HOST, _ON_GPU = ("syevr", "syevd"), ("syevd", "syevdx", "syev_batched")
METHODS = ("auto", "syevr", "syevd", "syevdx", "syev_batched")
_REAL_OF = {"complex64": "float32", "complex128": "float64"}
# Σ may differ from its (conjugate) transpose by this many units of its dtype's eps, times its largest entry.
SYMMETRY_TOLERANCE = 1000.0
# cuSOLVER's solvers by Jacobi's method count their workspace in 32 bits: it overflows near 2.0 million small matrices, too.
_GPU_BATCH_ELEMENTS, _GPU_BATCH = 2**26, 2**20
# Batches of so many m³ in all are worth the CPU kernels' threads, and their compilation the first time.
_WORTH_THREADS = 2**23
# One matrix from this size on too.
_LARGE = 256
# From this size on BLAS uses threads.
_THREADED = 64
_TILE = 128


# ---------------------------------------------------------------------------------------------------------- checks
def check_dtype(x: Array, name: str, allowed: tuple[str, ...]) -> str:
    """The name of `x`'s dtype; TypeError, with the reason for half precision, unless it is among `allowed`."""
    dtype = _arrays.dtype_name(x)
    if dtype in ("float16", "bfloat16"):
        bits = {"float16": 11, "bfloat16": 8}[dtype]
        raise TypeError(
            f"{name}: expected dtype {', '.join(allowed)}, got {dtype}, whose {bits} bits lose every eigenvalue below "
            f"2^-{bits} of the largest: convert to float32 or float64 first"
        )
    if dtype not in allowed:
        raise TypeError(f"{name}: expected dtype {', '.join(allowed)}, {_check.got_dtype(x, name)}")
    return dtype


def check_square(x: Array, name: str) -> int:
    """m of a stack of square matrices, m ≥ 1."""
    _check.rank_at_least(x, name, 2, "..., m, m")
    m = int(x.shape[-1])
    if int(x.shape[-2]) != m or m < 1:
        raise ValueError(f"{name}: expected square matrices (..., m, m) with m >= 1, got shape {_check.shape_of(x)}")
    return m


def check_finite(ns: Numerics, a: Array, name: str) -> None:
    """ValueError, naming the first entry, when `a` holds NaN or an infinity; of a GPU's, with the next `ns.fetch`."""

    def look(finite: np.ndarray) -> None:
        if not finite:
            raise _not_finite(ns, a, name)

    ns.check(look, ns.xp.isfinite(a).all())


def _not_finite(ns: Numerics, a: Array, name: str) -> ValueError:
    values = ns.host(a)
    bad = ~np.isfinite(values)
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
    return ValueError(f"{name}: expected finite values, got {values[where]} at {list(where)} ({int(bad.sum())} not finite)")


def eps(dtype: str) -> float:
    """The distance from 1 to the next number of `dtype`."""
    return float(np.finfo(dtype).eps)


def real_dtype(dtype: str) -> str:
    """The dtype of the eigenvalues of a matrix of `dtype`."""
    return _REAL_OF.get(dtype, dtype)


def adjoint(a: Array) -> Array:
    """Aᵀ, or Aᴴ for complex A, of a stack of matrices."""
    a = a.swapaxes(-1, -2)
    return a.conj() if a.dtype.kind == "c" else a


@dataclass(frozen=True)
class Symmetric:
    """A stack of symmetric matrices s = scale · Σ, where `scale` (...), a power of two, puts max |s_ij| in [1/2, 1).

    `s` is the library's own memory. Powers of two change no digit, and at this size no square over- or underflows.
    """

    s: Array
    scale: Array


def symmetric(ns: Numerics, x: Array, name: str, dtype: str) -> Symmetric:
    """Check `x` (..., m, m) for NaN, infinities and asymmetry, take the symmetric part, scale and convert to `dtype`.

    ValueError when |Σ - Σᵀ| exceeds `SYMMETRY_TOLERANCE` · eps · max |Σ| anywhere, with eps of the dtype of `x`.
    """
    xp = ns.xp
    a = ns.read(x)
    m = a.shape[-1]
    if xp is np and a.ndim == 2 and a.dtype.kind == "f" and a.flags.f_contiguous:
        a = a.T  # a column-major matrix is no other row by row, up to the asymmetry that is averaged out
    in_kernel = a.dtype.kind == "f" and xp is np and a.flags.c_contiguous and (in_threads(a) or (a.ndim == 2 and m >= _LARGE))
    if in_kernel:
        kernels, stack = _arrays.kernels("eigh", "cpu"), a.reshape(-1, m, m)
        largest, asymmetry = (array.reshape(a.shape[:-2]) for array in kernels.extents(stack))
    else:
        with np.errstate(all="ignore"):  # of infinities, which the check names
            largest, asymmetry = _largest(xp, a), _asymmetry(xp, a)
    ns.check(lambda *found: _check_symmetric(ns, a, name, *found), largest, asymmetry)
    scale = power_of_two(xp, largest, dtype)
    # in recycled memory where it is large: fresh pages cost more than the product
    s = _arrays.empty(a.shape, dtype, a) if type(a) is np.ndarray else xp.empty(a.shape, dtype)
    if in_kernel:
        kernels.scaled(stack, scale.reshape(-1), (asymmetry > 0).reshape(-1), s.reshape(-1, m, m))
        return Symmetric(s, scale)
    xp.multiply(a, scale.astype(real_dtype(dtype))[..., None, None], out=s, casting="same_kind")
    if xp is not np or np.any(asymmetry > 0):  # a GPU is not asked, and of a symmetric matrix this is the matrix
        s = (s + adjoint(s)) / 2
    return Symmetric(s, scale)


def _check_symmetric(ns: Numerics, a: Array, name: str, largest: np.ndarray, asymmetry: np.ndarray) -> None:
    """ValueError unless max |a_ij|, `largest`, is finite and max |a_ij - a_ji| small beside it, for each matrix."""
    if not np.isfinite(largest).all():
        raise _not_finite(ns, a, name)
    tolerance = SYMMETRY_TOLERANCE * eps(str(a.dtype))
    excess = asymmetry > largest * tolerance
    if excess.any():
        at = int(np.argmax(excess))
        found, size = float(asymmetry.flat[at]), float(largest.flat[at])
        kind = "a Hermitian" if a.dtype.kind == "c" else "a symmetric"
        raise ValueError(
            f"{name}: expected {kind} matrix, got max |A - A^T| = {found:.3g} where max |A| = {size:.3g}: "
            f"{found / size:.3g} of it, and {tolerance:.3g} is allowed"
        )


def power_of_two(xp: ModuleType, largest: Array, dtype: str) -> Array:
    """The power of two, representable in `dtype`, by which numbers up to `largest` come into [1/2, 1); 1 for zeros."""
    info = np.finfo(real_dtype(dtype))
    exponent = xp.clip(-xp.frexp(xp.asarray(largest, dtype="float64"))[1], info.minexp, info.maxexp - 1)
    return xp.ldexp(xp.ones(exponent.shape, "float64"), exponent)


def _largest(xp: ModuleType, a: Array) -> Array:
    """max |a_ij| of each matrix; NaN and infinities show in it. (Of complex entries the larger part counts.)"""
    if a.dtype.kind == "c":
        return xp.maximum(_largest(xp, a.real), _largest(xp, a.imag))
    return xp.maximum(a.max(axis=(-2, -1)), -a.min(axis=(-2, -1)))


def _asymmetry(xp: ModuleType, a: Array) -> Array:
    """max |A - Aᴴ| of each matrix."""
    if xp is not np or a.ndim > 2 or a.shape[-1] <= _TILE:
        return _largest(xp, a - adjoint(a))
    # a transpose read across whole rows misses the cache at every entry
    starts = range(0, a.shape[-1], _TILE)
    tiles = [[a[i : i + _TILE, j : j + _TILE] for j in starts] for i in starts]
    pairs = [(tiles[i][j], tiles[j][i]) for i in range(len(tiles)) for j in range(i + 1)]
    return np.max([_largest(np, tile - adjoint(mirrored)) for tile, mirrored in pairs])


# --------------------------------------------------------------------------------------------------------- solvers
def smallest(ns: Numerics, s: Array, k: int, method: str) -> tuple[Array, Array, str]:
    """Eigenvalues 1…c of each matrix of `s`, ascending, at least as many eigenvectors as a certificate for k needs, and the
    name of the solver that ran.

    There are min(k + 1, m) vectors at least, and all m where k > m / 2. "auto" takes the range-limited solver on the host for
    few eigenpairs: of one matrix k ≲ m / 16 for 64 ≤ m < 256 and m / 8 from there on, where it was measured to be as fast; of
    each of a stack in threads k ≲ m / 8.
    """
    m = s.shape[-1]
    if method == "auto":
        method = (_auto_on_host if ns.xp is np else _auto_on_gpu)(s, k)
    if method == "syevr":
        values, vectors = eigh_range(s, min(k + 1, m))
    elif method == "syevdx":
        values, vectors = _smallest_by_cusolver(ns, s, min(k + 1, m))
    elif ns.xp is np and s.dtype.kind == "f" and (in_threads(s) or (s.ndim == 2 and m >= _LARGE)):
        values, vectors = _in_kernel("smallest_of_all", s, min(k + 1, m) if 2 * k <= m else m)
    else:
        values, vectors = eigh(ns, s, method)
    return values, vectors, method.replace("sy", "he") if s.dtype.kind == "c" else method


def _auto_on_host(s: Array, k: int) -> str:
    m = s.shape[-1]
    part = 16 if s.ndim == 2 and m < 256 else 8
    return "syevr" if part * k <= m and m >= 64 and (s.ndim == 2 or in_threads(s)) else "syevd"


def _auto_on_gpu(s: Array, k: int) -> str:
    if _cusolver.refusal():
        return "syevd"
    return "syev_batched" if s.ndim > 2 else "syevdx" if 4 * k <= s.shape[-1] else "syevd"


def check_method(method: Any, on_host: bool) -> None:
    """ValueError for a method that is unknown or runs elsewhere; `BackendError` for one whose library is missing."""
    _check.one_of(method, "method", METHODS)
    here, lives, runs = (_ON_HOST, "on the host", "on a GPU") if on_host else (_ON_GPU, "on a GPU", "on the host")
    if method != "auto" and method not in here:
        raise ValueError(
            f"method: {method!r} runs {runs} alone, and covariance lives {lives}; use one of auto, {', '.join(here)}"
        )
    why = _cusolver.refusal() if method in ("syevdx", "syev_batched") else None
    if why:
        raise _arrays.BackendError(f"method: {method!r} needs nvmath-python ({why}): pip install 'hw3gpu[nvmath]'")


def eigh(ns: Numerics, s: Array, method: str = "syevd") -> tuple[Array, Array]:
    """All eigenvalues (..., m), ascending, and eigenvectors (..., m, m), in columns, by `xp.linalg.eigh` (syevd).

    A zero matrix gives 0 and unit vectors, whatever the solver makes of it. LinAlgError when it does not converge.
    """
    xp = ns.xp
    if xp is not np:
        values, vectors = _eigh_on_gpu(ns, s, method)
    elif s.ndim == 2 and s.shape[-1] >= _THREADED:
        from scipy.linalg import eigh as scipy_eigh

        values, vectors = scipy_eigh(_by_columns(s), lower=True, driver="evd", check_finite=False)
    else:
        values, vectors = in_parts(np.linalg.eigh, s)
    _check_solved(ns, values)
    return values, vectors


def _check_solved(ns: Numerics, values: Array) -> None:
    def look(finite: np.ndarray) -> None:
        if not finite:
            raise np.linalg.LinAlgError("the eigensolver returned values that are not finite")

    ns.check(look, ns.xp.isfinite(values).all())


def _without_zeros(xp: ModuleType, s: Array) -> tuple[Array, Array]:
    """`s` with diag(0, 1, …) for each zero matrix, of which cuSOLVER may make NaN, and which ones these are.

    For one that is not finite too, of which no check has told the host yet.
    """
    zero = ~(xp.any(s != 0, axis=(-2, -1)) & xp.isfinite(s).all(axis=(-2, -1)))
    numbers = xp.arange(s.shape[-1], dtype=real_dtype(str(s.dtype)))
    return xp.where(zero[..., None, None], xp.diag(numbers).astype(s.dtype), s), zero


def _with_zeros(xp: ModuleType, values: Array, vectors: Array, zero: Array) -> Array:
    """The eigenvalues, 0 for the matrices that are zero and NaN where there is no eigenvector."""
    values = xp.where(zero[..., None], xp.zeros_like(values), values)
    return xp.where(xp.isfinite(vectors).all(axis=-2)[..., : values.shape[-1]], values, np.nan)


def _eigh_on_gpu(ns: Numerics, s: Array, method: str = "syevd") -> tuple[Array, Array]:
    xp = ns.xp
    s, zero = _without_zeros(xp, s)
    if method == "syev_batched":
        m = s.shape[-1]
        values, vectors, info = _cusolver.all_of_stack(xp, s.reshape(-1, m, m))
        ns.check(lambda info: _cusolver.check(info, "XsyevBatched"), info)
        values, vectors = values.reshape(s.shape[:-1]), vectors.reshape(s.shape)
    else:
        values, vectors = _in_chunks(xp, xp.linalg.eigh, s)
    return _with_zeros(xp, values, vectors, zero), vectors


def _smallest_by_cusolver(ns: Numerics, s: Array, count: int) -> tuple[Array, Array]:
    """Eigenpairs 1…count of each matrix by cuSOLVER's solver for a range, one matrix after another."""
    xp = ns.xp
    s, zero = _without_zeros(xp, s)
    values, vectors = xp.empty((*s.shape[:-2], count), real_dtype(str(s.dtype))), xp.empty((*s.shape[:-1], count), s.dtype)
    info = xp.zeros(s.shape[:-2], "int32")
    for i in np.ndindex(s.shape[:-2]):
        values[i], vectors[i], info[i] = _cusolver.smallest(xp, s[i], count)
    ns.check(lambda info: _cusolver.check(info, "Xsyevdx"), info)
    values = _with_zeros(xp, values, vectors, zero)
    _check_solved(ns, values)
    return values, vectors


def _in_chunks(xp: ModuleType, function: Callable[[Array], tuple[Array, ...]], s: Array) -> tuple[Array, ...]:
    """CuPy's `function` of a matrix or a stack `s` (..., n, m), of no more matrices at a time than a 32-bit workspace holds."""
    n, m = s.shape[-2:]
    step = max(1, min(_GPU_BATCH, _GPU_BATCH_ELEMENTS // (n * m or 1)))
    if s.ndim == 2 or math.prod(s.shape[:-2]) <= step:
        return tuple(function(s))
    flat = s.reshape(-1, n, m)
    parts = [function(flat[start : start + step]) for start in range(0, flat.shape[0], step)]
    return tuple(xp.concatenate(each).reshape(*s.shape[:-2], *each[0].shape[1:]) for each in zip(*parts, strict=True))


def eigh_range(s: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` smallest eigenvalues and their eigenvectors of matrices on the host, by LAPACK's syevr (heevr)."""
    if s.ndim == 2:
        values, vectors = _eigh_range(s, count)
    elif in_threads(s):
        values, vectors = _in_kernel("smallest", s, count)
    else:
        values = np.empty((*s.shape[:-2], count), real_dtype(str(s.dtype)))
        vectors = np.empty((*s.shape[:-1], count), s.dtype)
        for i in np.ndindex(s.shape[:-2]):
            values[i], vectors[i] = _eigh_range(s[i], count)
    # in clusters its vectors are orthogonal to some 1e3 eps: a Newton-Schulz step towards the polar factor squares that
    correction = 1.5 * np.eye(count, dtype=s.dtype) - 0.5 * matmul(np, adjoint(vectors), vectors)
    return values, matmul(np, vectors, correction)


def _in_kernel(name: str, s: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    *batch, m, _ = s.shape
    solve = getattr(_arrays.kernels("eigh", "cpu"), name)
    values, vectors, info = solve(np.ascontiguousarray(s).reshape(-1, m, m), count)
    if info.any():
        raise np.linalg.LinAlgError(f"LAPACK did not converge for {np.count_nonzero(info)} of {info.size} matrices")
    return values.reshape(*batch, values.shape[-1]), vectors.reshape(*batch, m, count)


def _eigh_range(s: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    from scipy.linalg import eigh as scipy_eigh

    return scipy_eigh(_by_columns(s), lower=True, subset_by_index=(0, count - 1), driver="evr", check_finite=False)


def _by_columns(s: np.ndarray) -> np.ndarray:
    """A row-major symmetric matrix as LAPACK wants it: it is its own transpose, a Hermitian one its conjugate's."""
    return s if s.flags.f_contiguous else adjoint(s)


def matmul(xp: ModuleType, a: Array, b: Array) -> Array:
    """a @ b. Large matrices on the host go to the BLAS of SciPy's LAPACK: the idle threads of NumPy's would spin beside it."""
    if xp is np and a.ndim > 2:
        return in_parts(lambda a, b: (a @ b,), a, b)[0]
    if xp is not np or max(*a.shape, *b.shape) < _THREADED:
        return a @ b
    from scipy.linalg import get_blas_funcs

    columns = [x if x.flags.f_contiguous else x.T for x in (a, b)]
    across = [column is not x for column, x in zip(columns, (a, b), strict=True)]
    return get_blas_funcs("gemm", columns)(1.0, *columns, trans_a=across[0], trans_b=across[1])


def in_parts(function: Callable[..., tuple[np.ndarray, ...]], *stacks: np.ndarray) -> tuple[np.ndarray, ...]:
    """`function(*stacks)`, one of NumPy's that take stacks (..., n, m) matrix by matrix; of large stacks in threads."""
    if not in_threads(stacks[0]):
        return tuple(function(*stacks))
    batch, found = stacks[0].shape[:-2], {}
    flat = [stack.reshape(-1, *stack.shape[-2:]) for stack in stacks]

    def part(first: int, last: int) -> None:
        found[first] = function(*(stack[first:last] for stack in flat))

    _arrays.kernels("_threads", "cpu").run(part, len(flat[0]), 16 * flat[0].nbytes)
    outputs = zip(*(found[first] for first in sorted(found)), strict=True)
    return tuple(np.concatenate(parts).reshape(*batch, *parts[0].shape[1:]) for parts in outputs)


def svd(xp: ModuleType, x: Array, full_matrices: bool) -> tuple[Array, Array, Array, str]:
    """(U, σ, Vᵀ) of each of a stack (..., n, m), σ descending, and the name of the solver; `full_matrices` as NumPy's."""

    def solve(x: Array) -> tuple[Array, Array, Array]:
        return xp.linalg.svd(x, full_matrices=full_matrices)

    if xp is np:
        u, sigma, vt = in_parts(solve, x)
        return u, sigma, vt, "gesdd"
    u, sigma, vt = _in_chunks(xp, solve, x)
    # CuPy's choice: Jacobi's method for stacks of matrices up to 32 by 32, else the QR algorithm
    return u, sigma, vt, "gesvdj" if x.ndim > 2 and max(x.shape[-2:]) <= 32 else "gesvd"


def departure(xp: ModuleType, phi: Array) -> Array:
    """‖ΦᴴΦ - I‖_F of each of a stack, in float64."""
    k = phi.shape[-1]
    if xp is np and phi.ndim == 2 and k >= _THREADED and phi.dtype.kind == "f":
        from scipy.linalg import get_blas_funcs

        a, trans = (phi, True) if phi.flags.f_contiguous else (phi.T, False)
        lower = get_blas_funcs("syrk", (a,))(1.0, a, trans=trans, lower=True)  # half the work; zeros above the diagonal
        diagonal = lower.diagonal() - 1
        lower[np.diag_indices(k)] = 0
        return np.sqrt(2 * inner(np, lower, lower) + np.sum(diagonal.astype("float64") ** 2))
    return frobenius(xp, matmul(xp, adjoint(phi), phi) - xp.eye(k, dtype=phi.dtype))


def in_threads(s: Array) -> bool:
    """Whether a stack on the host goes to the CPU kernels, which are compiled once and share it out over threads."""
    return isinstance(s, np.ndarray) and s.ndim > 2 and s.size * s.shape[-1] >= _WORTH_THREADS


def deflated_is_definite(ns: Numerics, a: Array, phi: Array, d: Array, shift: Array) -> Array:
    """Whether each of the library's own matrices a (..., m, m) + Φ diag(d) Φᴴ - shift I, formed as B Bᴴ with the columns
    B = Φ √d, has a Cholesky factorisation; overwrites `a`."""
    xp, m, k = ns.xp, a.shape[-1], phi.shape[-1]
    b = phi * xp.sqrt(d).astype(phi.real.dtype)[..., None, :]
    shift = shift.astype(phi.real.dtype)
    if in_threads(a) and a.dtype.kind == "f":
        rows = np.ascontiguousarray(b.swapaxes(-1, -2)).reshape(-1, k, m)
        definite = _arrays.kernels("eigh", "cpu").deflated_is_definite
        return definite(np.ascontiguousarray(a).reshape(-1, m, m), rows, shift.reshape(-1)).reshape(a.shape[:-2])
    if xp is np and a.ndim == 2 and a.dtype.kind == "f":
        from scipy.linalg import get_blas_funcs, get_lapack_funcs

        # the transpose is column-major, so that nothing is copied, and definite if a is
        a = get_blas_funcs("syrk", (a,))(1.0, b.T, beta=1.0, c=a.T, trans=True, lower=True, overwrite_c=True)
        a[np.diag_indices(m)] -= shift
        return np.asarray(get_lapack_funcs("potrf", (a,))(a, lower=True, clean=False, overwrite_a=True)[1] == 0)
    a += matmul(xp, b, adjoint(b))
    i = xp.arange(m)
    a[..., i, i] -= shift[..., None]
    return _is_definite(ns, a)


def _is_definite(ns: Numerics, a: Array) -> Array:
    xp = ns.xp
    try:
        factor = xp.linalg.cholesky(a)
    except np.linalg.LinAlgError:
        return xp.zeros((), dtype=bool) if a.ndim == 2 else xp.stack([_is_definite(ns, matrix) for matrix in a])
    return xp.isfinite(factor.diagonal(axis1=-2, axis2=-1)).all(axis=-1)


def inner(xp: ModuleType, a: Array, b: Array) -> Array:
    """Re Trace(Aᴴ B) of each matrix of a stack, in float64."""
    parts = ((a.real, b.real), (a.imag, b.imag)) if a.dtype.kind == "c" else ((a, b),)
    return sum(xp.einsum("...ij,...ij->...", *part) for part in parts).astype("float64")


def frobenius(xp: ModuleType, a: Array) -> Array:
    """‖A‖_F of each matrix of a stack, in float64."""
    return xp.sqrt(inner(xp, a, a))


def fix_signs(ns: Numerics, vectors: Array, dtype: str) -> tuple[Array, Array]:
    """`vectors` with each column turned by ±1 or a phase, and that rounded to `dtype`.

    In each column of the second the entry of largest modulus, the first of equals, is positive. That is told after the
    rounding, which may make entries equal. The other entries of a complex column get their moduli from a product rounded once
    more: any that reaches the entry's own is brought below it, by a few units in its last place.
    """
    xp = ns.xp
    rounded = vectors.astype(dtype, copy=False)
    if rounded.dtype.kind != "c":
        most, least = rounded.max(axis=-2), rounded.min(axis=-2)
        positive = most > -least
        if xp is not np or np.any(most == -least):
            at = xp.argmax(abs(rounded), axis=-2)[..., None, :]
            positive = (xp.take_along_axis(rounded, at, axis=-2) >= 0)[..., 0, :]
        sign = xp.where(positive, 1.0, -1.0)[..., None, :]
        return vectors * sign.astype(vectors.dtype), rounded * sign.astype(dtype)
    at = xp.argmax(abs(rounded), axis=-2)[..., None, :]
    pivot = xp.take_along_axis(vectors, at, axis=-2)
    size = abs(pivot)
    turned = vectors * xp.where(size > 0, pivot.conj() / xp.where(size > 0, size, 1), xp.ones_like(pivot))
    rounded = turned.astype(dtype)
    i = xp.arange(vectors.shape[-2])[:, None]
    largest = size.astype(rounded.real.dtype)
    sizes = abs(rounded)
    over = (i != at) & ((sizes > largest) | ((sizes == largest) & (i < at))) & (largest > 0)
    unit = eps(real_dtype(dtype))
    shrink = xp.where(over, largest / xp.where(over, sizes, 1) * (1 - 2 * unit), 1).astype(largest.dtype)
    return turned, xp.where(i == at, largest.astype(dtype), rounded * shrink)
