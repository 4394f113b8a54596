"""`close`: a result is held to the measure of docs/errors.md, with the worst element in the message."""

from __future__ import annotations

from typing import Any

import numpy as np

from hw3gpu._cli.measure import as_rounded, largest, max_error, share_of_bound, tolerance, ulp

__all__ = ["as_rounded", "close", "largest", "max_error", "share_of_bound", "tolerance", "ulp"]


def close(
    actual: Any, reference: Any, torch_error: float | None = None, dtype: str = "float32", bound: Any = None, name: str = ""
) -> None:
    """Assert max |actual - reference| <= 1.5 * `torch_error` + 1 ulp(`dtype`) of max |reference|, or, element by element,
    |actual - reference| <= `bound` + the rounding of the result.

    `actual` and `reference` are NumPy arrays, `actual` as `kit.numpy` returns it; `torch_error` is
    `max_error(PyTorch's result on the same input, reference, dtype)`, None where PyTorch has no such operation; `bound` is
    that of `hw3gpu._error_bounds`, None where there is none. NaN and infinities have to stand where the reference has
    them; a reference beyond the range of `dtype` counts as infinite.
    """
    actual = np.asarray(actual, dtype=np.float64)
    error, allowed = max_error(actual, reference, dtype), tolerance(reference, dtype, torch_error)
    if error <= allowed:
        return
    share = np.inf if bound is None else share_of_bound(actual, reference, dtype, bound)
    if share <= 1.0:
        return
    reference = as_rounded(reference, dtype)
    same = np.isnan(actual) & np.isnan(reference) | (actual == reference)
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.nan_to_num(np.abs(actual - reference), nan=np.inf))
    worst = np.unravel_index(np.argmax(distance), distance.shape)
    raise AssertionError(
        f"{name or 'result'}: max |error| {error:.3g} is above {allowed:.3g} = 1.5 * {torch_error} (PyTorch) + 1 ulp({dtype}), "
        f"and {'there is no bound' if bound is None else f'{share:.3g} of the bound'}; "
        f"at {tuple(map(int, worst))}: got {actual[worst]!r}, expected {reference[worst]!r}"
    )
