"""Points and the trace: docs/errors.md, section 3."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import reference
from ..reference import Array, _extended
from .rounding import result, unit_roundoff


def moments(points: Any) -> reference.Moments:
    """The kernels' sums are float64's whatever the dtype of the points."""
    x = _extended(points)
    n = x.shape[0]
    additions = min(n - 1, 128)
    distance = abs(x - np.sum(x, axis=0) / n)
    mean = (additions + 4.0) * np.sum(distance, axis=0) / n + 2.0 * abs(np.sum(x, axis=0)) / n
    covariance = (additions + 8.0) * (distance.T @ distance) / n
    return reference.Moments(result(mean, "float64"), result(covariance, "float64"))


def _of_eigenvalues(covariance: Array) -> float:
    """p(m) ε ‖Σ‖, p(m) = m: how far each eigenvalue of LAPACK's and of cuSOLVER's may lie from the true one."""
    return covariance.shape[-1] * 2.0 * unit_roundoff("float64") * float(np.linalg.norm(covariance, 2))


def points_with_moments(mean: Any, covariance: Any, points: Any, *, dtype: str) -> reference.Moments:
    """How far the exact moments of `points`, each rounded to `dtype`, may lie from `mean` and `covariance`."""
    x, covariance = abs(_extended(points)), np.asarray(covariance, dtype=np.float64)
    n, m = x.shape
    distance = abs(_extended(points) - _extended(mean))
    roundoff = unit_roundoff(dtype) + (m + 8.0) * unit_roundoff("float64")
    values = abs(np.linalg.eigvalsh(covariance))
    # those that count as 0, by the docstring of the function
    left_out = float(np.max(values, where=values <= 2.0 * m * unit_roundoff(dtype) * values.max(), initial=0.0))
    of_products = (x.T @ distance + distance.T @ x) / n
    bound = roundoff * of_products + 2.0 * _of_eigenvalues(covariance) + left_out
    mean_bound = np.asarray(roundoff * np.sum(x, axis=0) / n, dtype=np.float64)
    return reference.Moments(mean_bound, np.asarray(bound, dtype=np.float64))


def minimize_trace(covariance: Any, k: int, *, dtype: str) -> tuple[float, Array]:
    """Of the value, and of the projector Φ Φᵀ formed in `dtype` from Φ rounded to it. The sheet's own error counts too."""
    covariance = np.asarray(covariance, dtype=np.float64)
    sheet, of_eigenvalues = reference.minimize_trace(covariance, k), 2.0 * _of_eigenvalues(covariance)
    m = covariance.shape[-1]
    gap = np.inf if k == m else sheet.eigenvalues[k] - sheet.eigenvalues[k - 1]
    phi = abs(sheet.phi)
    projector = (k + 3.0) * unit_roundoff(dtype) * (phi @ phi.T) + 2.0 * of_eigenvalues / gap
    return k * of_eigenvalues, projector + 2.0 * m * unit_roundoff("float64")
