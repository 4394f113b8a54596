"""`close`: a result is held to the measure of `hw3gpu._cli.measure`, with the worst element in the message."""

from __future__ import annotations

from typing import Any

import numpy as np

from hw3gpu._cli.measure import as_rounded, largest, max_error, tolerance, ulp

__all__ = ["as_rounded", "close", "largest", "max_error", "tolerance", "ulp"]


def close(actual: Any, reference: Any, torch_error: float | None = None, dtype: str = "float32") -> None:
    """Assert max |actual - reference| <= 1.5 * `torch_error` + 1 ulp(`dtype`) of max |reference|.

    `actual` and `reference` are NumPy arrays, `actual` as `kit.numpy` returns it; `torch_error` is
    `max_error(PyTorch's result on the same input, reference, dtype)`, None where PyTorch has no such operation. NaN and
    infinities have to stand where the reference has them; a reference beyond the range of `dtype` counts as infinite.
    """
    actual = np.asarray(actual, dtype=np.float64)
    error, bound = max_error(actual, reference, dtype), tolerance(reference, dtype, torch_error)
    if error <= bound:
        return
    reference = as_rounded(reference, dtype)
    same = np.isnan(actual) & np.isnan(reference) | (actual == reference)
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.nan_to_num(np.abs(actual - reference), nan=np.inf))
    worst = np.unravel_index(np.argmax(distance), distance.shape)
    raise AssertionError(
        f"max |error| {error:.3g} is above {bound:.3g} = 1.5 * {torch_error} (PyTorch) + 1 ulp({dtype}); "
        f"at {tuple(map(int, worst))}: got {actual[worst]!r}, expected {reference[worst]!r}"
    )
