"""Symmetric eigenproblems for `points` and `trace`, on the array namespace of `numerics`.

`symmetric` checks and scales a matrix, `smallest` solves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from .._core import check, dispatch, record
from . import cusolver
from .numerics import _LARGE, _THREADED, Numerics, adjoint, in_parts, in_threads, matmul, real_dtype

Array = Any

# the solvers, by where they run; "auto" chooses among them
_ON_HOST, _ON_GPU = ("syevr", "syevd"), ("syevd", "syevdx", "syev_batched")
METHODS = ("auto", "syevr", "syevd", "syevdx", "syev_batched")
# cuSOLVER's solvers by Jacobi's method count their workspace in 32 bits: it overflows near 2.0 million small matrices, too.
_GPU_BATCH_ELEMENTS, _GPU_BATCH = 2**26, 2**20


# --------------------------------------------------------------------------------------------------------- solvers
def smallest(ns: Numerics, s: Array, k: int, method: str) -> tuple[Array, Array, str]:
    """Eigenvalues 1…c of each matrix of `s`, ascending, at least as many eigenvectors as a certificate for k needs, and the
    name of the solver that ran.

    There are min(k + 1, m) vectors at least, and all m where k > m / 2. "auto" takes the range-limited solver on the host for
    few eigenpairs: of one matrix k ≤ m / 16 for 64 ≤ m < 256 and m / 8 from there on, where it was measured to be as fast; of
    each of a stack in threads k ≤ m / 16 for m < 64 and m / 8 from there on.
    """
    m = s.shape[-1]
    if method == "auto":
        method = (_auto_on_host if ns.xp is np else _auto_on_gpu)(s, k)
    if method == "syevr":
        values, vectors = eigh_range(s, min(k + 1, m))
    elif method == "syevdx":
        values, vectors = _smallest_by_cusolver(ns, s, min(k + 1, m))
    elif ns.xp is np and s.ndim == 2 and s.dtype.kind == "f" and 2 * k <= m and m >= _LARGE:
        values, vectors = _divide_and_conquer(s, k + 1)
    else:
        values, vectors = eigh(ns, s, method)
    return values, vectors, _noted(ns, s, method)


def _noted(ns: Numerics, s: Array, method: str) -> str:
    """The solver's name for the dtype of `s`, noted for `hw3gpu.explain`."""
    method = method.replace("sy", "he") if s.dtype.kind == "c" else method
    record.note(f"eigenvalues by {method} of {'LAPACK' if ns.xp is np else 'cuSOLVER'}")
    return method


def _auto_on_host(s: Array, k: int) -> str:
    m = s.shape[-1]
    part = 8 if m >= (256 if s.ndim == 2 else 64) else 16
    worth = m >= 64 if s.ndim == 2 else in_threads(s)
    return "syevr" if worth and part * k <= m else "syevd"


def _auto_on_gpu(s: Array, k: int) -> str:
    if cusolver.refusal():
        return "syevd"
    return "syev_batched" if s.ndim > 2 else "syevdx" if 4 * k <= s.shape[-1] else "syevd"


def check_method(method: Any, on_host: bool) -> None:
    """ValueError for a method that is unknown or runs elsewhere; `BackendError` for one whose library is missing."""
    check.one_of(method, "method", METHODS)
    here, lives, runs = (_ON_HOST, "on the host", "on a GPU") if on_host else (_ON_GPU, "on a GPU", "on the host")
    if method != "auto" and method not in here:
        raise ValueError(
            f"method: {method!r} runs {runs} alone, and covariance lives {lives}; use one of auto, {', '.join(here)}"
        )
    why = cusolver.refusal() if method in ("syevdx", "syev_batched") else None
    if why:
        raise dispatch.BackendError(f"method: {method!r} needs nvmath-python ({why}): pip install 'hw3gpu[nvmath]'")


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
    _noted(ns, s, method)
    return values, vectors


def _check_solved(ns: Numerics, values: Array) -> None:
    def look(finite: np.ndarray) -> None:
        if not finite:
            raise np.linalg.LinAlgError("the eigensolver returned values that are not finite")

    ns.check(look, ns.xp.isfinite(values).all())


def _without_zeros(xp: ModuleType, s: Array) -> tuple[Array, Array]:
    """`s` with diag(0, 1, …) in place of each zero matrix, for which cuSOLVER may return NaN, and which matrices these are.

    A matrix that is not finite is replaced too, because the check for that has not reached the host yet.
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
        values, vectors, info = cusolver.all_of_stack(xp, s.reshape(-1, m, m))
        ns.check(lambda info: cusolver.check(info, "XsyevBatched"), info)
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
        values[i], vectors[i], info[i] = cusolver.smallest(xp, s[i], count)
    ns.check(lambda info: cusolver.check(info, "Xsyevdx"), info)
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
        values, vectors = _range_in_threads(s, count)
    else:
        values = np.empty((*s.shape[:-2], count), real_dtype(str(s.dtype)))
        vectors = np.empty((*s.shape[:-1], count), s.dtype)
        for i in np.ndindex(s.shape[:-2]):
            values[i], vectors[i] = _eigh_range(s[i], count)
    # in clusters its vectors are orthogonal to some 1e3 eps: a Newton-Schulz step towards the polar factor squares that
    correction = 1.5 * np.eye(count, dtype=s.dtype) - 0.5 * matmul(np, adjoint(vectors), vectors)
    return values, matmul(np, vectors, correction)


def _range_in_threads(s: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    *batch, m, _ = s.shape
    stack = np.ascontiguousarray(s).reshape(-1, m, m)
    values, vectors, info = dispatch.eigh.smallest(stack, count)
    if info.any():
        raise np.linalg.LinAlgError(f"LAPACK did not converge for {np.count_nonzero(info)} of {info.size} matrices")
    return values.reshape(*batch, count), vectors.reshape(*batch, m, count)


def _eigh_range(s: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    from scipy.linalg import eigh as scipy_eigh

    return scipy_eigh(_by_columns(s), lower=True, subset_by_index=(0, count - 1), driver="evr", check_finite=False)


def _divide_and_conquer(s: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """All eigenvalues of one real matrix, and the eigenvectors of the first `count`: syevd, which turns back these alone.

    All of them with a SciPy that has no stevd.
    """
    from scipy.linalg import eigh as scipy_eigh
    from scipy.linalg import get_lapack_funcs, lapack

    if not hasattr(lapack, "dstevd"):
        return scipy_eigh(_by_columns(s), lower=True, driver="evd", check_finite=False)
    sytrd, sytrd_lwork, stevd, ormqr = get_lapack_funcs(("sytrd", "sytrd_lwork", "stevd", "ormqr"), (s,))
    q, d, e, tau, _ = sytrd(_by_columns(s), lower=True, lwork=int(sytrd_lwork(len(s), lower=True)[0]))
    values, z, info = stevd(d, e)
    if info:
        raise np.linalg.LinAlgError(f"LAPACK's stevd did not converge: info = {info}")
    vectors = z[:, :count]
    # the reflectors leave the first row alone; ormqr's workspace is of blocks of 64 and their triangle
    vectors[1:] = ormqr("L", "N", q[1:, :-1], tau, vectors[1:], 64 * (count + 65))[0]
    return values, vectors


def _by_columns(s: np.ndarray) -> np.ndarray:
    """A row-major symmetric matrix as LAPACK wants it: it is its own transpose, a Hermitian one its conjugate's."""
    return s if s.flags.f_contiguous else adjoint(s)


def svd(xp: ModuleType, x: Array, full_matrices: bool) -> tuple[Array, Array, Array, str]:
    """(U, σ, Vᵀ) of each of a stack (..., n, m), σ descending, and the name of the solver; `full_matrices` as NumPy's."""

    def solve(x: Array) -> tuple[Array, Array, Array]:
        return xp.linalg.svd(x, full_matrices=full_matrices)

    if xp is np:
        u, sigma, vt = in_parts(solve, x)
        record.note("singular values by gesdd of LAPACK")
        return u, sigma, vt, "gesdd"
    u, sigma, vt = _in_chunks(xp, solve, x)
    # CuPy's choice: Jacobi's method for stacks of matrices up to 32 by 32, else the QR algorithm
    method = "gesvdj" if x.ndim > 2 and max(x.shape[-2:]) <= 32 else "gesvd"
    record.note(f"singular values by {method} of cuSOLVER")
    return u, sigma, vt, method


def deflated_is_definite(ns: Numerics, a: Array, phi: Array, d: Array, shift: Array) -> Array:
    """Whether each of the library's own matrices a (..., m, m) + Φ diag(d) Φᴴ - shift I, formed as B Bᴴ with the columns
    B = Φ √d, has a Cholesky factorisation; overwrites `a`."""
    xp, m = ns.xp, a.shape[-1]
    b = phi * xp.sqrt(d).astype(phi.real.dtype)[..., None, :]
    shift = shift.astype(phi.real.dtype)
    if xp is np and a.ndim == 2 and a.dtype.kind == "f":
        from scipy.linalg import get_blas_funcs, get_lapack_funcs

        # the transpose is column-major, so that nothing is copied, and definite if a is
        a = get_blas_funcs("syrk", (a,))(1.0, b.T, beta=1.0, c=a.T, trans=True, lower=True, overwrite_c=True)
        a[np.diag_indices(m)] -= shift
        return np.asarray(get_lapack_funcs("potrf", (a,))(a, lower=True, clean=False, overwrite_a=True)[1] == 0)
    a += matmul(xp, b, adjoint(b))
    i = xp.arange(m)
    a[..., i, i] -= shift[..., None]
    stack = a.reshape(-1, m, m)
    (definite,) = in_parts(lambda part: (_is_definite(np, part),), stack) if xp is np else (_is_definite(xp, stack),)
    return definite.reshape(a.shape[:-2])


def _is_definite(xp: ModuleType, a: Array) -> Array:
    """Whether each of a stack (B, m, m) has a Cholesky factorisation; `cholesky` says of the whole that one has none."""
    try:
        return xp.isfinite(xp.linalg.cholesky(a).diagonal(axis1=-2, axis2=-1)).all(axis=-1)
    except np.linalg.LinAlgError:
        half = len(a) // 2
        return xp.concatenate([_is_definite(xp, a[:half]), _is_definite(xp, a[half:])]) if half else xp.zeros(1, dtype=bool)
