"""The k-dimensional subspace on which a symmetric matrix has the least trace, with a proof that it is the least.

    minimise Trace(Φᵀ Σ Φ)  subject to  Φᵀ Φ = I_k

The minimum is the sum of the k smallest eigenvalues of Σ, and eigenvectors that belong to them attain it (Ky Fan):
docs/derivations.md, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _check
from ._certificate import Certificate, certificate
from ._linalg import (
    COMPLEX,
    REAL,
    Numerics,
    adjoint,
    check_dtype,
    check_square,
    eigh,
    eigh_range,
    eps,
    fix_signs,
    frobenius,
    in_threads,
    numerics,
    real_dtype,
    symmetric,
)

__all__ = ["TraceMinimum", "minimize_trace"]

Array = Any

METHODS = ("auto", "syevr", "syevd")
# A value is certified when it lies within this many times k · margin above the dual value.
_AGREEMENT = 6.0


@dataclass(frozen=True, eq=False)
class TraceMinimum:
    """The minimum of Trace(Φᵀ Σ Φ) over Φᵀ Φ = I_k and what is known about it.

    `phi`, `value` and `eigenvalues` are of Σ's kind, device and dtype (the real one for complex Σ). Everything else
    describes the computation *before* that one rounding, in float64 on the host: a Python number for one matrix, a
    NumPy array of shape (...) for a stack (..., m, m). ‖·‖ is the Frobenius norm.

    Attributes:
        phi: (..., m, k), orthonormal columns, eigenvectors in the order of `eigenvalues`. In each column the entry of
            largest modulus, the first of equals, is positive.
        value: (...), Trace(Φᵀ Σ Φ).
        eigenvalues: (..., k), the k smallest, ascending; with `largest=True` the k largest, descending.
        gap: |λ_{k+1} - λ_k|, the distance to the first eigenvalue left out; inf at k = m.
        unique: gap > m · eps · ‖Σ‖: beyond rounding, the subspace span Φ is the only minimiser, and Φ is unique up to
            rotation within it.
        residual: ‖ΣΦ - ΦΛ‖ / ‖Σ‖, 0 for Σ = 0; NaN with `certify=False`.
        orthogonality: ‖ΦᵀΦ - I‖; NaN with `certify=False`.
        eigenvalue_sum: Σ λ_i, the value without forming ΣΦ.
        subspace_error: a bound on ‖sin Θ‖ between span Φ and the exact minimiser, ‖ΣΦ - ΦΛ‖ / gap (Davis and Kahan), at
            most sqrt(min(k, m - k)); NaN with `certify=False`.
        dual_value: the Ky Fan dual value: proved to bound the minimum from below (with `largest=True`, from above) when
            `value_certified`; NaN with `certify=False`.
        margin: τ, the certificate's rounding margin (docs/derivations.md, section 5.4); NaN with `certify=False`.
        value_certified: the value is proved to be the minimum: `dual_value` holds and lies within 6 · k · margin of it.
        certified: beyond that, λ_k < λ_{k+1} is proved, so that the subspace is the minimiser.
        reason: why not `certified`; empty when it is.
        method: the solver that ran: "syevr", LAPACK's for a range of eigenpairs, or "syevd", all of them by divide and
            conquer ("heevr", "heevd" for complex Σ).
    """

    phi: Array
    value: Array
    eigenvalues: Array
    gap: Any
    unique: Any
    residual: Any
    orthogonality: Any
    certified: Any
    eigenvalue_sum: Any
    subspace_error: Any
    dual_value: Any
    margin: Any
    value_certified: Any
    reason: Any
    method: str


def minimize_trace(
    covariance: Array,
    k: int,
    *,
    largest: bool = False,
    dtype: Any = None,
    method: str = "auto",
    certify: bool = True,
) -> TraceMinimum:
    """Minimise Trace(Φᵀ Σ Φ) over all Φ (m, k) with orthonormal columns; docs/derivations.md, section 5.

    Runs where `covariance` lives: LAPACK for NumPy arrays and torch CPU tensors, cuSOLVER through CuPy for CuPy arrays
    and torch CUDA tensors. Σ may be indefinite; it is scaled by a power of two first, so that its size does not matter.

    Args:
        covariance: Σ (..., m, m), symmetric, float32 or float64, or complex Hermitian (then Φᵀ is Φᴴ throughout). The
            symmetric part is used where max |Σ - Σᵀ| ≤ 1000 · eps · max |Σ|, with eps of its dtype.
        k: number of columns, 1 ≤ k ≤ m.
        largest: maximise instead.
        dtype: the dtype computed in, "float64" (None) or "float32". In float32 LAPACK loses the smallest eigenspace of
            an ill-conditioned Σ while ΦᵀΦ still looks perfect: float32 input too is solved in float64.
        method: "syevr" (a range of eigenpairs), "syevd" (all of them) or "auto": by m, k and device.
        certify: fill in the residual, the orthogonality and the certificate; `False` saves their cost.

    Returns:
        A `TraceMinimum`.

    Raises:
        TypeError: `covariance` is no array or has another dtype (float16 and bfloat16 are refused), `k` is no integer.
        ValueError: Σ is not square, not symmetric, or not finite; k lies outside 1…m; unknown `method` or `dtype`.
        numpy.linalg.LinAlgError: the eigensolver did not converge.
        BackendError: Σ lives on a GPU and CuPy cannot be used there.
    """
    with numerics(covariance, "covariance") as ns:
        given = check_dtype(covariance, "covariance", REAL + COMPLEX)
        m = check_square(covariance, "covariance")
        k = _check.integer_value(k, "k")
        if not 1 <= k <= m:
            raise ValueError(f"k: expected 1 <= k <= m = {m}, got {k}")
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if method == "syevr" and ns.xp is not np:
            raise ValueError("method: 'syevr' runs on the host alone, and covariance lives on a GPU; use 'syevd'")
        scaled = symmetric(ns, covariance, "covariance", _compute_dtype(dtype, given))
        s = -scaled.s if largest else scaled.s
        found = _solve(ns, s, k, method)
        return _result(ns, found, _verify(ns, found, certify), given, (-1.0 if largest else 1.0) / scaled.scale)


def _compute_dtype(dtype: Any, given: str) -> str:
    """The dtype computed in for a matrix of dtype `given` when the caller asks for `dtype`."""
    name = "float64" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in REAL and name not in COMPLEX:
        name = getattr(dtype, "__name__", name)
    name = real_dtype(name)
    if name not in REAL:
        raise ValueError(f"dtype: expected None, 'float64' or 'float32', got {dtype!r}")
    return {"float64": "complex128", "float32": "complex64"}[name] if given in COMPLEX else name


@dataclass(frozen=True)
class _Eigenpairs:
    """The eigenpairs 1…c of `sigma` (..., m, m), ascending, c = m or min(k + 1, m), and the solver that found them."""

    sigma: Array
    values: Array
    vectors: Array
    k: int
    method: str

    @property
    def phi(self) -> Array:
        return self.vectors[..., : self.k]

    @property
    def kept(self) -> Array:
        return self.values[..., : self.k].astype("float64")


def _solve(ns: Numerics, sigma: Array, k: int, method: str) -> _Eigenpairs:
    """The eigenpairs of each matrix of `sigma`, with the documented signs, by the method asked for or the fastest."""
    m = sigma.shape[-1]
    count = min(k + 1, m)
    if method == "auto":
        few = 2 * count <= m if in_threads(sigma) else sigma.ndim == 2 and m >= 64 and 8 * count <= m
        method = "syevr" if ns.xp is np and few else "syevd"
    if method == "syevd":
        values, vectors = eigh(ns, sigma)
    else:
        values, vectors = eigh_range(sigma, count)
    name = method.replace("sy", "he") if sigma.dtype.kind == "c" else method
    return _Eigenpairs(sigma, values, fix_signs(ns, vectors), k, name)


@dataclass(frozen=True)
class _Checked:
    """What `sigma` itself says about its eigenpairs, each of shape (...), in the units of the scaled matrix."""

    value: Array
    residual: Array
    orthogonality: Array
    proof: Certificate
    agrees: Array


def _verify(ns: Numerics, found: _Eigenpairs, certify: bool) -> _Checked:
    """Primal value, residual, orthogonality and certificate; without `certify` the sum of the eigenvalues and NaN."""
    xp, k, phi = ns.xp, found.k, found.phi
    total = found.kept.sum(axis=-1)
    if not certify:
        nothing, no = xp.full(total.shape, np.nan), xp.zeros(total.shape, dtype=bool)
        return _Checked(total, nothing, nothing, Certificate(no, no, nothing, nothing), no)
    image = found.sigma @ phi
    value = (phi.conj() * image).real.astype("float64").sum(axis=(-2, -1))
    residual = frobenius(xp, image - phi * found.values[..., None, :k])
    orthogonality = frobenius(xp, adjoint(phi) @ phi - xp.eye(k, dtype=phi.dtype))
    proof = certificate(ns, found.sigma, found.values, found.vectors, k, residual)
    allowed = _AGREEMENT * k * proof.margin
    # making Φ's columns exactly orthonormal changes the value by no more
    infeasible = 2 * orthogonality * frobenius(xp, image)
    agrees = (abs(value - total) <= allowed) & (value + infeasible - proof.dual_value <= allowed)
    return _Checked(value, residual, orthogonality, proof, agrees)


def _result(ns: Numerics, found: _Eigenpairs, checked: _Checked, given: str, unit: Array) -> TraceMinimum:
    """The eigenpairs of the scaled matrix as the caller's `TraceMinimum`; `unit` (...) is ±1 / scale."""
    xp, m, k, proof = ns.xp, found.sigma.shape[-1], found.k, checked.proof
    kept, size, real = found.kept, frobenius(xp, found.sigma), real_dtype(given)
    gap = found.values[..., k].astype("float64") - kept[..., -1] if k < m else xp.full(size.shape, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        sine = xp.where(gap > 0, checked.residual / gap, xp.where(xp.isnan(checked.residual), np.nan, np.inf))
        residual = xp.where(size > 0, checked.residual / size, checked.residual)
    certified, value_certified = proof.separated & checked.agrees, proof.proved & checked.agrees
    host, width = _Report(ns), abs(unit)
    return TraceMinimum(
        phi=ns.give(found.phi, given),
        value=ns.give(checked.value * unit, real),
        eigenvalues=ns.give(kept * unit[..., None], real),
        gap=host(gap * width),
        unique=host(gap > m * eps(str(found.sigma.dtype)) * size),
        residual=host(residual),
        orthogonality=host(checked.orthogonality),
        certified=host(certified),
        eigenvalue_sum=host(kept.sum(axis=-1) * unit),
        subspace_error=host(xp.minimum(sine, min(k, m - k) ** 0.5)),
        dual_value=host(proof.dual_value * unit),
        margin=host(proof.margin * width),
        value_certified=host(value_certified),
        reason=host.reasons(certified, value_certified, proof, gap * width, proof.margin * width),
        method=found.method,
    )


class _Report:
    """Diagnostics as they are given back: Python numbers for one matrix, NumPy arrays for a stack."""

    def __init__(self, ns: Numerics) -> None:
        self.ns = ns

    def __call__(self, a: Array) -> Any:
        a = self.ns.host(a)
        return a.item() if a.ndim == 0 else a

    def reasons(self, certified: Array, value_certified: Array, proof: Certificate, gap: Array, margin: Array) -> Any:
        """Why each matrix is not certified: a string, or an array of strings."""
        columns: list[Any] = [self.ns.host(a) for a in (certified, value_certified, proof.proved, gap, margin)]
        texts = np.empty(columns[0].shape, dtype=object)
        for i in np.ndindex(texts.shape):
            texts[i] = _reason(*(column[i] for column in columns))
        return texts.item() if texts.ndim == 0 else texts


def _reason(certified: bool, value_certified: bool, proved: bool, gap: float, margin: float) -> str:
    if certified:
        return ""
    if np.isnan(margin):
        return "not asked for (certify=False)"
    if value_certified:
        return (
            f"the gap {gap:.3g} is within the rounding margin 2 * {margin:.3g}: the value is certified, the subspace "
            "need not be the only minimiser"
        )
    if not proved:
        return (
            f"the deflated matrix has no Cholesky factorisation within the rounding margin {margin:.3g}: an eigenvalue "
            "was missed or the eigenvectors are wrong"
        )
    return f"value, eigenvalue_sum and dual_value differ by more than {_AGREEMENT:.0f} * k * {margin:.3g}"
