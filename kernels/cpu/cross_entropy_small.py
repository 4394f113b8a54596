"""`cross_entropy.forward_backward_reduced` for small float32 calls: operands are addresses, one thread does all rows.

Making a NumPy view of each tensor takes longer than the arithmetic (`_numba/by_address.py`).
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from ._cross_entropy.kernels import _hard_forward_backward
from ._cross_entropy.reduction import _divide, denominator_of
from ._numba.by_address import floats, planes, pointer
from ._numba.compile import kernel
from ._numba.threads import Moves, moving, tell
from .cross_entropy import _ANY_CLASS


@kernel
def _at_addresses(
    z_at, target_at, weight_at, dz_at, result_at, N, V, S, upstream, mean, zero_if_ignored, ignore_index, smoothing
) -> int:  # fmt: skip
    z, dz, result = planes(z_at, N, V, S), planes(dz_at, N, V, S), floats(result_at, 1)
    target = carray(pointer(target_at), (N, S), np.int64)
    weight, loss, invalid = floats(weight_at, V if weight_at else 0), np.empty((N, S), np.float32), np.full(1, N * S)
    denominator = denominator_of(N * S, target, weight, V if weight_at else _ANY_CLASS, ignore_index) if mean else 1.0
    if zero_if_ignored and denominator == 0.0:
        denominator = math.inf
    g = upstream / denominator if denominator != 0.0 else math.inf
    if smoothing:
        weight = np.ones(V, np.float32)
    _hard_forward_backward(0, N * S, z, target, weight, loss, dz, invalid, g, ignore_index, smoothing, np.float64(V))
    _divide(loss, denominator, result)
    return invalid[0]


moving(Moves(("z_at",), ("dz_at",)), _at_addresses)


def forward_backward(
    z: int, target: int, weight: int, dz: int, result: int, N: int, V: int, S: int, *, upstream: float, mean: bool,
    zero_if_ignored: bool, ignore_index: int, label_smoothing: float,
) -> int:  # fmt: skip
    """result (1,) and dz of classes; returns the first row whose class is out of range, or N S. No weight beside smoothing."""
    args = z, target, weight, dz, result, N, V, S, upstream, mean, zero_if_ignored, ignore_index, label_smoothing
    tell(_at_addresses, args)
    return _at_addresses(*args)
