"""The sum of the rows' losses, and what it is divided by."""

from __future__ import annotations

import math

import numpy as np

from .._numba.compile import inline, kernel


@inline
def class_weight(weight, t) -> float:
    """w_t; 1 where there are no class weights."""
    return np.float64(weight[t]) if weight.size else 1.0


@inline
def _added(total, lost, value) -> tuple[float, float]:
    """total + value, and what roundings have lost so far (Neumaier)."""
    new = total + value
    return new, lost + ((total - new) + value if abs(total) >= abs(value) else (value - new) + total)


@inline
def _with_lost(total, lost) -> float:
    return total + lost if math.isfinite(lost) else total


@inline
def compensated_sum(loss) -> float:
    """sum loss of (N, S) in float64, with the rounding of each addition carried along."""
    total, lost = 0.0, 0.0
    for n in range(loss.shape[0]):
        for s in range(loss.shape[1]):
            total, lost = _added(total, lost, np.float64(loss[n, s]))
    return _with_lost(total, lost)


@inline
def denominator_of(rows, target, weight, V, ignore_index) -> float:
    """sum w_target over the rows that have a class, compensated, or the number of rows if V < 0."""
    if V < 0:
        return np.float64(rows)
    total, lost = 0.0, 0.0
    for n in range(target.shape[0]):
        for s in range(target.shape[1]):
            t = target[n, s]
            if 0 <= t < V and t != ignore_index:
                total, lost = _added(total, lost, class_weight(weight, t))
    return _with_lost(total, lost)


@kernel
def _count(rows, target, weight, V, ignore_index, denominator) -> None:
    """denominator (1,) = sum w_target, as `denominator_of`. Reads the targets."""
    denominator[0] = denominator_of(rows, target, weight, V, ignore_index)


@kernel
def _reduce(loss, target, weight, V, ignore_index, total, denominator) -> None:
    """total (1,) = sum loss, and denominator (1,) as `_count`. Reads loss and targets."""
    total[0] = compensated_sum(loss)
    denominator[0] = denominator_of(loss.size, target, weight, V, ignore_index)


@kernel
def _divide(loss, denominator, result) -> None:
    """result = sum loss / denominator, with two roundings, as of a loss that is reduced without its gradient."""
    of = result.dtype.type
    result[0] = of(compensated_sum(loss)) / of(denominator)
