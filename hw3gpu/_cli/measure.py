"""How far a result may lie from the float64 answer sheet.

The measure is the same for every kernel, dtype and input, ordinary or adversarial:

    max |actual - reference|  <=  1.5 * max |PyTorch - reference|  +  1 ulp of max |reference|

The first term asks the kernels to be as good as PyTorch's own on the same input. The second is one unit in the last
place of the result's dtype, which even an exactly computed value may need for its one rounding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

PYTORCH_FACTOR = 1.5

# significand bits after the leading one, and the exponents of the smallest and largest normal numbers
_FORMATS = {
    "float16": (10, -14, 15),
    "bfloat16": (7, -126, 127),
    "float32": (23, -126, 127),
    "float64": (52, -1022, 1023),
}


def ulp(value: float, dtype: str) -> float:
    """The distance between neighbouring numbers of `dtype` at the magnitude of `value`."""
    bits, lowest, highest = _FORMATS[dtype]
    exponent = math.frexp(value)[1] - 1 if value else lowest
    return math.ldexp(1.0, min(max(exponent, lowest), highest) - bits)


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


def max_error(actual: Any, reference: Any, dtype: str) -> float:
    """max |actual - reference|; infinite where one is NaN or infinite and the other is not, or has another sign."""
    actual, reference = np.asarray(actual, dtype=np.float64), as_rounded(reference, dtype)
    if actual.shape != reference.shape:
        raise ValueError(f"actual: expected the shape of reference, {reference.shape}, got {actual.shape}")
    finite = np.isfinite(reference)
    if not np.array_equal(actual[~finite], reference[~finite], equal_nan=True) or not np.isfinite(actual[finite]).all():
        return math.inf
    return float(np.max(np.abs(actual[finite] - reference[finite]), initial=0.0))


def tolerance(reference: Any, dtype: str, torch_error: float | None = None) -> float:
    """The bound of this page for one result; `torch_error` is None for an operation that PyTorch does not have."""
    if torch_error is not None and not math.isfinite(torch_error):
        raise ValueError(f"torch_error: expected a finite error, got {torch_error}: here PyTorch is no measure")
    reference = as_rounded(reference, dtype)
    magnitude = float(np.max(np.abs(reference[np.isfinite(reference)]), initial=0.0))
    return PYTORCH_FACTOR * (torch_error or 0.0) + ulp(magnitude, dtype)
