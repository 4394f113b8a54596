"""What an operation costs, and how many additions a term meets: docs/errors.md, "What an operation costs" and "Sums"."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..reference import Array, _extended

# docs/errors.md, "What an operation costs": roundings of
EXP = 4  # exp x, and 2 |x| more, for x is the rounded difference of a logit and the maximum, times log2 e
LOG = 14  # log(1 + x), x = Σ exp - 1
CAP = 12  # τ tanh(z / τ)
ARRAY_LOG = 8  # the logarithm of NumPy, PyTorch and CuPy
RSTD = 3  # 1 / sqrt(variance + eps), given the variance
VARIANCE = 6  # each (x - mean)², beside its sum
CHANNEL_SUM = 3  # a compensated sum over a channel
MEAN = 1 + CHANNEL_SUM  # the deviations that a mean is gathered from, and their sum
# docs/errors.md, "Sums": additions that a number meets in the first sum it goes into, and how many numbers each more stands for
FIRST_SUM = 32
ROW, ROW_OF_FLOAT64, CHANNEL = 256, 16, 64


def unit_roundoff(dtype: str) -> float:
    """u of an accumulation dtype."""
    return 2.0**-53 if dtype == "float64" else 2.0**-24


def result(counted: Any, dtype: str, sheet: Any = 0.0) -> Array:
    """u · Σ count |term|, and what a number below the normal ones may lose, which a GPU may take for 0.

    `sheet`: counted in the same way, what the answer sheet itself rounds where its terms are larger than the kernels'.
    """
    tiny = 2.0**-1022 if dtype == "float64" else 2.0**-126
    bound = unit_roundoff(dtype) * counted + float(np.finfo(np.longdouble).eps) / 2 * sheet
    return np.asarray(bound, dtype=np.float64) + tiny


def additions_of(n: int, run: int) -> int:
    """The most additions that one of n terms goes through."""
    return min(max(n - 1, 0), FIRST_SUM + n // run)


def of_a_row(n: int, dtype: str, last: bool = True) -> int:
    """Rows along an axis that is not the last one are gone through in shorter pieces."""
    return additions_of(n, ROW if last and dtype == "float32" else ROW_OF_FLOAT64)


def sum_of_products(magnitude: Any, n: int, *, dtype: str) -> Array:
    """Of a sum of n products, Σ |products| given, in any order: what a convolution or a matrix product is."""
    return result((n + 1.0) * _extended(magnitude), dtype)


def sum_of(terms: Any, axis: Any = -1) -> Any:
    return np.sum(terms, axis=axis, keepdims=True)


def times(a: Any, b: Any) -> Any:
    """a b with 0 · ∞ = 0: what a probability of 0 is multiplied by does not count."""
    with np.errstate(invalid="ignore"):
        return np.where(a == 0.0, 0.0, a * b)
