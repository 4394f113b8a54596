"""Cross entropy of a training step on the CPU: the reduced loss and its gradient in one sweep of the logits.

    denominator = sum w_target over the rows that have a class ('mean'), or 1 ('sum')
    result = sum loss / denominator,   dz as in `cross_entropy`

reads z (and y) and writes dz: 2 passes (3), and one exponential an element, where `cross_entropy.forward` and `backward` take
3 (5) and two. It computes dz before the upstream gradient is known, which is nearly always 1; for another it is called again.
The GPU has no such launcher: it would have to wait for the denominator, and for the upstream gradient.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from ._cross_entropy.kernels import _hard_forward_backward
from ._cross_entropy.reduction import compensated_sum, denominator_of
from ._numba.by_address import floats, planes, pointer
from ._numba.compile import kernel
from ._numba.threads import Moves, moving, tell
from .cross_entropy import _ANY_CLASS, _loss_and_gradient, _quotient, count


@kernel
def _divide(loss, denominator, result) -> None:
    of = result.dtype.type  # two roundings, as of a loss that is reduced without its gradient
    result[0] = of(compensated_sum(loss)) / of(denominator)


@kernel
def _at_addresses(
    z_at, target_at, dz_at, result_at, N, V, S, upstream, mean, zero_if_ignored, ignore_index, smoothing
) -> int:  # fmt: skip
    z, dz, result = planes(z_at, N, V, S), planes(dz_at, N, V, S), floats(result_at, 1)
    target = carray(pointer(target_at), (N, S), np.int64)
    no_weight, loss, invalid = np.empty(0, np.float32), np.empty((N, S), np.float32), np.full(1, N * S)
    denominator = denominator_of(N * S, target, no_weight, _ANY_CLASS, ignore_index) if mean else 1.0
    if zero_if_ignored and denominator == 0.0:
        denominator = math.inf
    g = upstream / denominator if denominator != 0.0 else math.inf
    weight = np.ones(V if smoothing else 0, np.float32)
    _hard_forward_backward(0, N * S, z, target, weight, loss, dz, invalid, g, ignore_index, smoothing, np.float64(V))
    _divide(loss, denominator, result)
    return invalid[0]


moving(Moves(("z_at",), ("dz_at",)), _at_addresses)


def forward_backward(
    z, target, weight, result, dz, invalid, *, stats=None, upstream: float, mean: bool, zero_if_ignored: bool = False,
    ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """result (1,), and dz for the upstream gradient of `result`; stats and invalid as `cross_entropy.forward` leaves them.

    `zero_if_ignored`: a mean over nothing is 0, not 0/0.
    """
    denominator = np.ones(1)
    if mean:
        count(target, weight, denominator, ignore_index=ignore_index)
    if zero_if_ignored and denominator[0] == 0:
        denominator[0] = np.inf
    loss = np.empty((z.shape[0], z.shape[2]), result.dtype)
    g = _quotient(upstream, denominator[0])
    _loss_and_gradient(z, target, weight, loss, stats, dz, invalid, g, ignore_index, label_smoothing, z_loss, softcap)
    _divide(loss, denominator[0], result)


def at_addresses(
    z: int, target: int, dz: int, result: int, N: int, V: int, S: int, *, upstream: float, mean: bool,
    zero_if_ignored: bool, ignore_index: int, label_smoothing: float,
) -> int:  # fmt: skip
    """`forward_backward` of a small float32 call, of classes without weights, on one thread; the first wrong row, or N S."""
    args = z, target, dz, result, N, V, S, upstream, mean, zero_if_ignored, ignore_index, label_smoothing
    tell(_at_addresses, args)
    return _at_addresses(*args)
