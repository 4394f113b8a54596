"""How far a result may lie from the answer sheet: docs/errors.md.

The measure is the same for every kernel, dtype and input, ordinary or adversarial. A result passes where either holds:

    max |actual - reference|  <=  1.5 * max |PyTorch - reference|  +  1 ulp of max |reference|
    |actual - reference|  <=  bound  +  1/2 ulp of |reference| + bound,   element by element (in float64 1 ulp)

The first asks the kernels to be as good as PyTorch's own on the same input; one unit in the last place of the result's
dtype even an exactly computed value may need for its one rounding. The second, `hw3gpu._error_bounds`, is what rounding
may do to a right algorithm: where PyTorch happens to be exact on a few numbers, its error is no measure.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

PYTORCH_FACTOR = 1.5

# significand bits after the leading one, and the exponents of the smallest and largest normal numbers
_FORMATS = {"float16": (10, -14, 15), "bfloat16": (7, -126, 127), "float32": (23, -126, 127), "float64": (52, -1022, 1023)}


def ulp(value: float, dtype: str) -> float:
    """The distance between neighbouring numbers of `dtype` at the magnitude of `value`."""
    bits, lowest, highest = _FORMATS[dtype]
    exponent = math.frexp(value)[1] - 1 if value else lowest
    return math.ldexp(1.0, min(max(exponent, lowest), highest) - bits)


def _half_ulps(values: np.ndarray, dtype: str) -> np.ndarray:
    """Half the `ulp` of each value: what rounding a number there to nearest may cost."""
    bits, lowest, highest = _FORMATS[dtype]
    exponents = np.where(values == 0.0, lowest, np.frexp(values)[1] - 1)
    return np.ldexp(0.5, np.clip(exponents, lowest, highest) - bits)


def largest(dtype: str) -> float:
    """The largest finite number of `dtype`."""
    bits, _, highest = _FORMATS[dtype]
    return math.ldexp(2.0 - math.ldexp(1.0, -bits), highest)


def as_rounded(reference: Any, dtype: str) -> np.ndarray:
    """The reference in float64, with infinity where `dtype` has no number as large: there a right result overflows."""
    reference = np.array(reference, dtype=np.float64)
    if dtype != "float64":
        top = largest(dtype)
        reference[np.abs(reference) >= top + ulp(top, dtype) / 2] *= math.inf
    return reference


def _errors(actual: Any, reference: Any, dtype: str) -> tuple[np.ndarray, np.ndarray] | None:
    """|actual - reference| and |reference| where that is finite; None where NaN or infinity is in a wrong place."""
    actual, reference = np.asarray(actual, dtype=np.float64), as_rounded(reference, dtype)
    if actual.shape != reference.shape:
        raise ValueError(f"actual: expected the shape of reference, {reference.shape}, got {actual.shape}")
    finite = np.isfinite(reference)
    if not np.array_equal(actual[~finite], reference[~finite], equal_nan=True) or not np.isfinite(actual[finite]).all():
        return None
    return np.abs(actual[finite] - reference[finite]), np.abs(reference[finite])


def max_error(actual: Any, reference: Any, dtype: str) -> float:
    """max |actual - reference|; infinite where one is NaN or infinite and the other is not, or has another sign."""
    errors = _errors(actual, reference, dtype)
    return math.inf if errors is None else float(np.max(errors[0], initial=0.0))


def tolerance(reference: Any, dtype: str, torch_error: float | None = None) -> float:
    """What PyTorch's error allows; `torch_error` is None for an operation that PyTorch does not have."""
    if torch_error is not None and not math.isfinite(torch_error):
        raise ValueError(f"torch_error: expected a finite error, got {torch_error}: here PyTorch is no measure")
    reference = as_rounded(reference, dtype)
    magnitude = float(np.max(np.abs(reference[np.isfinite(reference)]), initial=0.0))
    return PYTORCH_FACTOR * (torch_error or 0.0) + ulp(magnitude, dtype)


def share_of_bound(actual: Any, reference: Any, dtype: str, bound: Any) -> float:
    """The largest of |actual - reference| / (bound + rounding): at most 1 where rounding explains every error.

    `bound`, of the shape of `reference`, leaves out the rounding of the result to `dtype`, half a unit in the last place. The
    reference, in float64, was rounded to that too: where the result is float64 this counts as much.
    """
    errors = _errors(actual, reference, dtype)
    if errors is None:
        return math.inf
    bound = np.broadcast_to(np.asarray(bound, dtype=np.float64), np.shape(reference))[np.isfinite(as_rounded(reference, dtype))]
    if not np.isfinite(bound).all():
        raise ValueError("bound: expected a finite number wherever the reference is finite")
    rounding = _half_ulps(errors[1] + bound, dtype)
    allowed = bound + (2.0 * rounding if dtype == "float64" else rounding)
    wrong = errors[0] > 0.0  # 0/0 is no share
    with np.errstate(divide="ignore"):
        return float(np.max(errors[0][wrong] / allowed[wrong], initial=0.0))
