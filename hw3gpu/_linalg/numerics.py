"""The base of the linear algebra: the module that computes for a kind of array (NumPy or CuPy), checks, products and norms."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from .._core import arrays as _arrays
from .._core import check as _check
from .._core import dispatch
from .._core import outputs as _outputs

Array = Any


@dataclass(frozen=True)
class Numerics:
    """The module that computes the arrays of one call, `xp`, NumPy or CuPy, and `like`, the caller's array.

    All numbers that a call needs on the host come from a GPU in one copy: checks wait for the next `fetch`.
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
        return dispatch.kernel_view("gpu")(a)

    def check(self, look: Callable[..., None], *arrays: Array) -> None:
        """Calls `look(*arrays)` in NumPy, which raises for wrong values: at once on the host, with the next `fetch` on a
        GPU."""
        if self.xp is np:
            look(*map(np.asarray, arrays))
        else:
            self.waiting.append((arrays, look))

    def fetch(self, *arrays: Array) -> list[np.ndarray]:
        """`arrays` in NumPy, and those of waiting checks, in one copy; all numbers have to be numbers of float64."""
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

    For several matrices on the host BLAS uses one thread, which is fastest for small matrices; large stacks are shared among
    threads by matrix.

    Raises `BackendError` when `x` lives on a GPU and CuPy, or a library that it loads, cannot be imported, or finds no device.
    What CUDA raises inside the block passes.
    """
    kind = _arrays.kind(x, name)
    if _arrays.on_host(x):
        with dispatch.blas.one_thread() if _is_stack(x) else contextlib.nullcontext():
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
    except (ImportError, AttributeError, RuntimeError) as error:  # CUDARuntimeError, where there is no driver or no device
        raise _unusable(name, error) from error
    return cupy


def _stream_of(cupy: ModuleType, x: Array) -> Any:
    """CuPy's name for the stream on which the caller of a CUDA tensor queues work."""
    import torch

    stream = torch.cuda.current_stream(x.device)
    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, x.device.index)


def _unusable(name: str, error: Exception) -> dispatch.BackendError:
    return dispatch.BackendError(
        f"{name}: arrays on a GPU are solved by CuPy, which cannot be used here ({type(error).__name__}: {error}); "
        "pip install 'hw3gpu[cuda12]' or 'hw3gpu[cuda13]' brings it, the NVIDIA driver is the machine's"
    )


def _is_stack(x: Array) -> bool:
    """Whether there is more than one matrix in `x` (..., n, m)."""
    return x.ndim > 2 and math.prod(x.shape[:-2]) > 1


REAL = ("float32", "float64")
COMPLEX = ("complex64", "complex128")
_REAL_OF = {"complex64": "float32", "complex128": "float64"}
# Σ may differ from its (conjugate) transpose by this many units of its dtype's eps, times its largest entry.
SYMMETRY_TOLERANCE = 1000.0
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
    if xp is np and a.ndim == 2 and a.dtype.kind == "f" and a.flags.f_contiguous:
        a = a.T  # a column-major matrix is no other row by row, up to the asymmetry that is averaged out
    largest, asymmetry = in_parts(_extents, a) if xp is np else (_largest(xp, a), _asymmetry(xp, a))
    ns.check(lambda *found: _check_symmetric(ns, a, name, *found), largest, asymmetry)
    scale = power_of_two(xp, largest, dtype)
    # in recycled memory where it is large: fresh pages cost more than the product
    s = _outputs.empty(a.shape, dtype, a) if type(a) is np.ndarray else xp.empty(a.shape, dtype)
    xp.multiply(a, scale.astype(real_dtype(dtype))[..., None, None], out=s, casting="same_kind")
    if xp is not np or np.any(asymmetry > 0):  # a GPU is not asked, and of a symmetric matrix this is the matrix
        s = (s + adjoint(s)) / 2
    return Symmetric(s, scale)


def _check_symmetric(ns: Numerics, a: Array, name: str, largest: np.ndarray, asymmetry: np.ndarray) -> None:
    """ValueError unless for each matrix max |a_ij|, `largest`, is finite, and max |a_ij - a_ji| small compared with it."""
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


@np.errstate(all="ignore")  # of infinities, which the check names
def _extents(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _largest(np, a), _asymmetry(np, a)


def _largest(xp: ModuleType, a: Array) -> Array:
    """max |a_ij| of each matrix; NaN and infinities show in it. (Of complex entries the larger part counts.)"""
    if a.dtype.kind == "c":
        return xp.maximum(_largest(xp, a.real), _largest(xp, a.imag))
    return xp.maximum(a.max(axis=(-2, -1)), -a.min(axis=(-2, -1)))


def _asymmetry(xp: ModuleType, a: Array) -> Array:
    """max |A - Aᴴ| of each matrix."""
    if xp is not np or a.shape[-1] <= _TILE:
        return _largest(xp, a - adjoint(a))
    # a transpose read across whole rows misses the cache at every entry
    starts = range(0, a.shape[-1], _TILE)
    tiles = [[a[..., i : i + _TILE, j : j + _TILE] for j in starts] for i in starts]
    pairs = [(tiles[i][j], tiles[j][i]) for i in range(len(tiles)) for j in range(i + 1)]
    return np.max([_largest(np, tile - adjoint(mirrored)) for tile, mirrored in pairs], axis=0)


def matmul(xp: ModuleType, a: Array, b: Array) -> Array:
    """a @ b. Large matrices on the host use the BLAS of SciPy's LAPACK: idle threads of NumPy's BLAS would take its
    processors."""
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

    dispatch.threads.run(part, len(flat[0]), 16 * flat[0].nbytes)
    outputs = zip(*(found[first] for first in sorted(found)), strict=True)
    return tuple(np.concatenate(parts).reshape(*batch, *parts[0].shape[1:]) for parts in outputs)


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
