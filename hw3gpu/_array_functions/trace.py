"""The k-dimensional subspace on which a symmetric matrix has the least trace, with a proof that it is the least.

    minimise Trace(Φᵀ Σ Φ)  subject to  Φᵀ Φ = I_k

The minimum is the sum of the k smallest eigenvalues of Σ, and eigenvectors that belong to them attain it (Ky Fan):
docs/derivations.md, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .._core import check
from .._core.dlpack import interchange
from .._linalg.certificate import Certificate, certificate
from .._linalg.numerics import (
    COMPLEX,
    REAL,
    Numerics,
    check_dtype,
    check_finite,
    check_square,
    departure,
    eps,
    fix_signs,
    frobenius,
    inner,
    matmul,
    numerics,
    power_of_two,
    real_dtype,
    symmetric,
)
from .._linalg.solvers import check_method, smallest, svd

__all__ = ["TraceMinimum", "minimize_trace", "minor_components"]

Array = Any

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
        method: the solver that ran: "syevr", LAPACK's for a range of eigenpairs, "syevd", all eigenvalues by divide and
            conquer, "syevdx" and "syev_batched", cuSOLVER's ("heevr", … for complex Σ). From `minor_components`: "gesdd",
            LAPACK's by divide and conquer, "gesvd" and "gesvdj", cuSOLVER's by the QR algorithm and by Jacobi's method.
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


@interchange
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

    Runs where `covariance` lives: LAPACK for NumPy arrays and torch CPU tensors, cuSOLVER through CuPy and nvmath-python for
    CuPy arrays and torch CUDA tensors. Σ may be indefinite; a power of two scales it first, so that its size does not matter.

    Args:
        covariance: Σ (..., m, m), symmetric, float32 or float64, or complex Hermitian (then Φᵀ is Φᴴ throughout). The
            symmetric part is used where max |Σ - Σᵀ| ≤ 1000 · eps · max |Σ|, with eps of its dtype.
        k: number of columns, 1 ≤ k ≤ m.
        largest: maximise instead.
        dtype: the dtype computed in, "float64" (None) or "float32". In float32 LAPACK loses the smallest eigenspace of
            an ill-conditioned Σ while ΦᵀΦ still looks perfect: float32 input too is solved in float64.
        method: "auto": by m, k, batch and device. Or one of these: on the host "syevr" (a range of eigenpairs) and "syevd" (all
            eigenvalues, by divide and conquer); on a GPU "syevd" (CuPy's `eigh`; of a stack, Jacobi's method) and, with the
            extra `nvmath`, "syevdx" (a range) and "syev_batched" (all, of a stack at once).
        certify: fill in the residual, the orthogonality and the certificate; `False` saves their cost.

    Returns:
        A `TraceMinimum`.

    Raises:
        TypeError: `covariance` is no array or has another dtype (float16 and bfloat16 are refused), `k` is no integer.
        ValueError: Σ is not square, not symmetric, or not finite; k lies outside 1…m; unknown `method` or `dtype`.
        numpy.linalg.LinAlgError: the eigensolver did not converge.
        BackendError: Σ lives on a GPU and CuPy cannot be used there, or `method` needs nvmath-python and it is not there.
    """
    with numerics(covariance, "covariance") as ns:
        given = check_dtype(covariance, "covariance", REAL + COMPLEX)
        m = check_square(covariance, "covariance")
        k = _check_k(k, m)
        check_method(method, ns.xp is np)
        for value, name in ((largest, "largest"), (certify, "certify")):
            check.boolean(value, name)
        scaled = symmetric(ns, covariance, "covariance", _compute_dtype(dtype, given))
        s = -scaled.s if largest else scaled.s
        found = _from_eigenpairs(ns, s, k, method, certify)
        return _result(ns, found, given, (-1.0 if largest else 1.0) / scaled.scale)


@interchange
def minor_components(points: Array, k: int, *, largest: bool = False, ddof: int = 0) -> TraceMinimum:
    """The k directions in which points vary least: `minimize_trace` of their covariance, which is never formed.

    Uses the singular values σ of the centred points X (n, m), by LAPACK's gesdd or, on a GPU, cuSOLVER's gesvd (of stacks up to
    32 by 32, gesvdj): λ = σ² / (n - ddof). The condition number of the covariance is the square of that of X. So an error of a
    small eigenvalue is eps · λ_max · (λ / λ_max)^(1/2) here, and eps · λ_max by way of the covariance. `largest=True` gives the
    principal components instead.

    The certificate is Weyl's inequality: X = UΣVᵀ + E, with E and the departures of U and V from orthogonality bounded in
    floating point, puts every singular value of X within that bound of a computed one. `margin` is the largest of the
    resulting bounds on λ_1…λ_k, `residual` is sqrt(‖XΦ - UΣ‖² + ‖XᵀU - ΦΣ‖²) / ‖X‖ for the k, and `subspace_error` Wedin's
    bound from it.

    Args:
        points: (..., n, m), one a row, float32 or float64, n > ddof; computed in float64.
        k: number of components, 1 ≤ k ≤ m.
        largest: the k directions of largest variance, descending.
        ddof: the divisor is n - ddof.

    Returns:
        A `TraceMinimum`.

    Raises:
        TypeError, ValueError, BackendError: as `minimize_trace` and `moments` do.
        numpy.linalg.LinAlgError: the singular values did not converge.
    """
    with numerics(points, "points") as ns:
        given = check_dtype(points, "points", REAL)
        check.rank_at_least(points, "points", 2, "..., n, m")
        check.rank_at_most(points, "points", 32)
        n, m = (int(size) for size in points.shape[-2:])
        k, ddof = _check_k(k, m), check.integer_value(ddof, "ddof")
        check.boolean(largest, "largest")
        if n - ddof < 1 or ddof < 0:
            raise ValueError(f"points: expected n > ddof >= 0, got n = {n}, ddof = {ddof}")
        x = ns.read(points)
        check_finite(ns, x, "points")
        if ns.xp is not np:  # which the check has not told yet
            x = ns.xp.where(ns.xp.isfinite(x), x, 0)
        scale = power_of_two(ns.xp, abs(x).max(axis=(-2, -1)), "float64")
        x = x.astype("float64") * scale[..., None, None]
        for _ in range(2):  # the second time takes up the rounding of the mean
            x -= x.mean(axis=-2, keepdims=True)
        found = _from_singular_values(ns, x, k, largest)
        return _result(ns, found, given, (-1.0 if largest else 1.0) / (n - ddof) / scale, 1 / scale)


def _check_k(k: Any, m: int) -> int:
    k = check.integer_value(k, "k")
    if not 1 <= k <= m:
        raise ValueError(f"k: expected 1 <= k <= m = {m}, got {k}")
    return k


def _compute_dtype(dtype: Any, given: str) -> str:
    """The dtype computed in for a matrix of dtype `given` when the caller asks for `dtype`."""
    name = "float64" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in REAL and name not in COMPLEX:
        name = getattr(dtype, "__name__", name)
    name = real_dtype(name)
    if name not in REAL:
        error = ValueError if isinstance(dtype, str) else check.ChoiceError
        raise error(f"dtype: expected None, 'float64' or 'float32', got {dtype!r}")
    return {"float64": "complex128", "float32": "complex64"}[name] if given in COMPLEX else name


@dataclass(frozen=True)
class _Findings:
    """What is known of the minimum for a scaled matrix (its negative, for a maximum), each of shape (...) if not said.

    `residual` is relative, `total` the sum of the eigenvalues `kept` (..., k).
    """

    phi: Array  # (..., m, k)
    kept: Array
    gap: Array
    unique: Array
    value: Array
    residual: Array
    orthogonality: Array
    sine: Array
    proof: Certificate
    agrees: Array
    method: str

    @property
    def total(self) -> Array:
        return self.kept.sum(axis=-1)


def _from_eigenpairs(ns: Numerics, sigma: Array, k: int, method: str, certify: bool) -> _Findings:
    """Solve for `sigma` (..., m, m) and check the solution against it."""
    xp, m = ns.xp, sigma.shape[-1]
    values, vectors, ran = smallest(ns, sigma, k, method)
    phi, kept, size = vectors[..., :k], values[..., :k].astype("float64"), frobenius(xp, sigma)
    gap = values[..., k].astype("float64") - kept[..., -1] if k < m else xp.full(size.shape, np.inf)
    unique = gap > m * eps(str(sigma.dtype)) * size
    if not certify:
        nothing, no = xp.full(size.shape, np.nan), xp.zeros(size.shape, dtype=bool)
        unproved = Certificate(no, no, nothing, nothing)
        return _Findings(
            phi, kept, gap, unique, kept.sum(axis=-1), nothing, nothing, nothing, unproved, no, ran
        )  # fmt: skip
    image = matmul(xp, sigma, phi)
    value, image_size = inner(xp, phi, image), frobenius(xp, image)
    image -= phi * values[..., None, :k]
    residual, orthogonality = frobenius(xp, image), departure(xp, phi)
    proof = certificate(ns, sigma, values, vectors, k, residual)  # which overwrites sigma
    agrees = _agree(value, kept.sum(axis=-1), proof, k, orthogonality * image_size)
    return _Findings(
        phi, kept, gap, unique, value, _ratio(xp, residual, size, 0.0), orthogonality, _ratio(xp, residual, gap, np.inf),
        proof, agrees, ran,
    )  # fmt: skip


def _from_singular_values(ns: Numerics, x: Array, k: int, largest: bool) -> _Findings:
    """The same for XᵀX (-XᵀX for `largest`) of centred points `x` (..., n, m) that are not multiplied out."""
    xp, (n, m) = ns.xp, x.shape[-2:]
    size = frobenius(xp, x)
    u, sigma, vt, solver = svd(xp, x, full_matrices=n < m)
    if n < m:
        none = xp.zeros((*x.shape[:-2], m - n))
        sigma, u = xp.concatenate([sigma, none], axis=-1), xp.concatenate([u, xp.zeros((*x.shape[:-1], m - n))], axis=-1)
    # X = UΣVᵀ + E: each singular value of X lies within ‖E‖ and the departures from orthogonality of one of Σ
    u_rounding, v_rounding, product_rounding = (eps("float64") * size_ for size_ in (n * m, m * m, m + 2))
    skew = departure(xp, u[..., : min(n, m)]) + u_rounding + departure(xp, vt.swapaxes(-1, -2)) + v_rounding
    error = frobenius(xp, x - matmul(xp, u * sigma[..., None, :], vt)) + product_rounding * (m**0.5 + 1) * size
    error = error[..., None] + sigma * skew[..., None] + 1e-300
    order = slice(None) if largest else slice(None, None, -1)
    u, sigma, v, error = u[..., order], sigma[..., order], vt.swapaxes(-1, -2)[..., order], error[..., order]

    phi, left, kept = v[..., :k], u[..., :k], sigma[..., :k]
    image, sign = matmul(xp, x, phi), -1.0 if largest else 1.0
    bound = (kept + error[..., :k]) if largest else xp.maximum(kept - error[..., :k], 0)
    margin = ((kept + error[..., :k]) ** 2 - kept**2).max(axis=-1)
    yes = xp.ones(size.shape, dtype=bool)
    distance = abs(sigma[..., k] - kept[..., -1]) if k < m else xp.full(size.shape, np.inf)
    separated = distance > error[..., k] + error[..., k - 1] if k < m else yes
    proof = Certificate(yes, separated, sign * (bound**2).sum(axis=-1), margin)
    residual = xp.sqrt(
        frobenius(xp, image - left * kept[..., None, :]) ** 2
        + frobenius(xp, matmul(xp, x.swapaxes(-1, -2), left) - phi * kept[..., None, :]) ** 2
    )
    value, orthogonality = sign * frobenius(xp, image) ** 2, departure(xp, phi)
    gap = distance * (sigma[..., k] + kept[..., -1]) if k < m else distance
    agrees = _agree(value, sign * (kept**2).sum(axis=-1), proof, k, orthogonality * abs(value))
    return _Findings(
        phi, sign * kept**2, gap, distance > max(n, m) * eps("float64") * size, value, _ratio(xp, residual, size, 0.0),
        orthogonality, _ratio(xp, residual, distance, np.inf), proof, agrees, solver,
    )  # fmt: skip


def _ratio(xp: ModuleType, a: Array, b: Array, otherwise: float) -> Array:
    """a / b, and `otherwise` where b is 0."""
    positive = b > 0
    return xp.where(positive, a / xp.where(positive, b, 1.0), otherwise)


def _agree(value: Array, total: Array, proof: Certificate, k: int, infeasible: Array) -> Array:
    """Whether primal value, sum of eigenvalues and dual value are one number, to the certificate's margin.

    Making Φ's columns exactly orthonormal changes the value by at most 2 · `infeasible`.
    """
    allowed = _AGREEMENT * k * proof.margin
    return (abs(value - total) <= allowed) & (value + 2 * infeasible - proof.dual_value <= allowed)


@np.errstate(over="ignore", under="ignore")  # a number beyond the caller's is infinite, and said to be
def _result(ns: Numerics, found: _Findings, given: str, *units: Array) -> TraceMinimum:
    """The findings as the caller's `TraceMinimum`; the product of `units` (...) takes scaled values to the caller's."""

    def unscaled(a: Array) -> Array:
        for unit in units:  # whose product need not be a number of float64
            a = a * (unit if a.ndim == unit.ndim else unit[..., None])
        return a

    m, k = found.phi.shape[-2:]
    real, proof, value = real_dtype(given), found.proof, unscaled(found.value)
    held = abs(value) <= np.finfo(real).max
    report = {
        "gap": abs(unscaled(found.gap)),
        "unique": found.unique,
        "residual": found.residual,
        "orthogonality": found.orthogonality,
        "certified": proof.separated & found.agrees & held,
        "eigenvalue_sum": unscaled(found.total),
        "subspace_error": ns.xp.minimum(found.sine, min(k, m - k) ** 0.5),
        "dual_value": unscaled(proof.dual_value),
        "margin": abs(unscaled(proof.margin)),
        "value_certified": proof.proved & found.agrees & held,
    }
    *columns, held, proved = ns.fetch(*report.values(), held, proof.proved)  # all that is looked at on the host, in one copy
    known = dict(zip(report, columns, strict=True))
    told = [known[name] for name in ("certified", "value_certified", "gap", "margin")]
    reasons = np.empty(held.shape, dtype=object)
    for i in np.ndindex(held.shape):
        reasons[i] = _reason(*(a[i] for a in (*told, held, proved)))
    return TraceMinimum(
        phi=ns.give(fix_signs(ns, found.phi, given)[1], given),
        value=ns.give(value, real),
        eigenvalues=ns.give(unscaled(found.kept), real),
        method=found.method,
        **{name: a.item() if a.ndim == 0 else a for name, a in {**known, "reason": reasons}.items()},
    )


def _reason(certified: Any, value_certified: Any, gap: Any, margin: Any, held: Any, proved: Any) -> str:
    """Why a matrix is not certified; empty where it is."""
    if certified:
        return ""
    if np.isnan(margin):
        return "not asked for (certify=False)"
    if not held:
        return "the value is beyond the largest number of its dtype"
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
