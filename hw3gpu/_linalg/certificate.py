"""The proof, in floating point, that a computed minimum of Trace(Φᵀ Σ Φ) is one: docs/derivations.md, section 5.4.

For any number t and any D ≥ 0 let S = Φ D Φᵀ. Where Σ + S - t I is positive semidefinite,

    Σ_{i≤k} λ_i(Σ) ≥ k t - Trace S    (5.10), the Ky Fan dual value, which no feasible Φ falls below, and
    λ_{k+1}(Σ) ≥ t                    (5.13), as S has rank k: no eigenvalue below t was missed.

Neither needs Φ to be right: a wrong Φ makes the Cholesky factorisation fail or the two values differ. With
d_i = t + τ - λ_i (5.12) the dual value is Σ λ_i - k τ and meets the primal one within k τ. A Cholesky factorisation of
M = Σ + S - (t + c) I that succeeds in floating point proves Σ + S - t I ≥ 0 if c covers

    γ_{m+2} / (1 - γ_{m+2}) · (Trace M + m f)     the backward error of the factorisation (Higham 2002, Theorem 10.3), and
    f = γ_{k+8} (‖Σ‖_F + Trace S + |t|)           what forming M rounds,        γ_n = n u / (1 - n u),  u = eps / 2.

τ = 4 c + 2 ‖ΣΦ - ΦΛ‖_F leaves a margin for Φ's own error; it is the margin that a result states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .numerics import Numerics, eps, frobenius, matmul
from .solvers import deflated_is_definite

Array = Any


@dataclass(frozen=True)
class Certificate:
    """For each matrix of a stack (...): what was proved, in the units of the scaled matrix.

    `proved` that `dual_value` is a lower bound of the minimum; `separated` that some t has λ_k < t ≤ λ_{k+1} besides:
    the minimiser's subspace is the only one; `margin` is τ.
    """

    proved: Array
    separated: Array
    dual_value: Array
    margin: Array


def certificate(ns: Numerics, sigma: Array, values: Array, vectors: Array, k: int, residual: Array) -> Certificate:
    """Certify the first `k` of the eigenpairs `values` (..., c) and `vectors` (..., m, c) of `sigma` (..., m, m).

    There are at least min(k + 1, m) eigenvalues, and k eigenvectors or all m; `residual` (...) is ‖ΣΦ - ΦΛ‖_F of the k.
    Overwrites `sigma`. With all m eigenvectors and k > m / 2 the m - k others are certified to be the largest, which is the
    same statement about -Σ and costs less.
    """
    xp, m, computed = ns.xp, sigma.shape[-1], vectors.shape[-1]
    if computed < m or 2 * k <= m:
        return _certify_smallest(ns, sigma, values[..., :k], vectors[..., :k], values[..., k], residual)
    diagonal = sigma.diagonal(axis1=-2, axis2=-1).real.astype("float64")
    u = eps(str(sigma.dtype)) / 2
    trace, rounding = diagonal.sum(axis=-1), _gamma(m, u, sigma) * abs(diagonal).sum(axis=-1)
    if k == m:
        yes = xp.ones(trace.shape, dtype=bool)
        return Certificate(yes, yes, trace - rounding, _gamma(3 * m, u, sigma) * frobenius(xp, sigma))
    others, largest = vectors[..., :, : k - 1 - m : -1], values[..., : k - 1 - m : -1]
    others_residual = frobenius(xp, matmul(xp, sigma, others) - others * largest[..., None, :])
    dual = _certify_smallest(ns, -sigma, -largest, others, -values[..., k - 1], others_residual)
    return Certificate(dual.proved, dual.separated, trace + dual.dual_value - rounding, dual.margin)


def _certify_smallest(ns: Numerics, sigma: Array, values: Array, phi: Array, following: Array, residual: Array) -> Certificate:
    """`values` (..., k) and `phi` (..., m, k) against `following` (...), the computed λ_{k+1}."""
    xp, m, k = ns.xp, sigma.shape[-1], values.shape[-1]
    u = eps(str(sigma.dtype)) / 2
    values, following = values.astype("float64"), following.astype("float64")
    residual, size = residual.astype("float64"), frobenius(xp, sigma)
    trace = sigma.diagonal(axis1=-2, axis2=-1).real.astype("float64").sum(axis=-1)
    column_sizes = (abs(phi) ** 2).sum(axis=-2).astype("float64")
    tiny = m * float(np.finfo(phi.real.dtype).tiny)
    cholesky, forming = _gamma(m + 2, u, sigma) / (1 - _gamma(m + 2, u, sigma)), _gamma(k + 8, u, sigma)

    def deflation(level: Array) -> tuple[Array, Array]:
        d = xp.maximum(level[..., None] - values, 0)
        return d, (d * column_sizes).sum(axis=-1)

    def rounding(t: Array, trace_s: Array) -> Array:
        formed = forming * (size + trace_s + abs(t))
        trace_m = xp.maximum(trace + trace_s - m * t, 0) + m * formed
        # 1.01 covers what these few sums round themselves, the last term underflow
        return 1.01 * (cholesky * trace_m + formed) + tiny

    def margin(t: Array) -> Array:
        return 4 * rounding(t, deflation(t)[1]) + 2 * residual

    last = values[..., -1]
    middle = last + (following - last) / 2
    separated = following - last > 2 * margin(middle)
    # with no gap between λ_k and λ_{k+1} the value is certified from just below λ_k
    t = xp.where(separated, middle, last - margin(last))
    tau = xp.where(separated, margin(middle), margin(last))
    d, trace_s = deflation(t + tau)
    proved = deflated_is_definite(ns, sigma, phi, d, t + rounding(t, trace_s))
    dual_value = k * t - trace_s - _gamma(m + k + 4, u, sigma) * (k * abs(t) + trace_s)
    return Certificate(proved, separated & proved, dual_value, tau)


def _gamma(n: int, u: float, sigma: Array) -> float:
    """γ_n = n u / (1 - n u); complex arithmetic rounds at most four times as much (Higham 2002, section 3.6)."""
    n = 4 * n if sigma.dtype.kind == "c" else n
    return n * u / (1 - n * u)
