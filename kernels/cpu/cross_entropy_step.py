"""Cross entropy of a training step on the CPU: the reduced loss and its gradient in one sweep of the logits.

    denominator = sum w_target over the rows that have a class ('mean'), or 1 ('sum')
    result = sum loss / denominator,   dz as in `cross_entropy`

reads z (and y) and writes dz: 2 passes (3), and one exponential an element, where `cross_entropy.forward` and `backward` take
3 (5) and two. It computes dz before the upstream gradient is known, which is nearly always 1; for another it is called again.
It has no twin: a GPU would have to wait for the denominator, and for the upstream gradient.
"""

from __future__ import annotations

import math

import numpy as np

from ._jit import kernel
from .cross_entropy import _counted, _loss_and_gradient, compensated_sum, denominator_of


@kernel
def _count(rows, target, weight, V, ignore_index):
    return denominator_of(rows, target, weight, V, ignore_index)


@kernel
def _divide(loss, denominator, result):
    of = result.dtype.type  # two roundings, as of a loss that is reduced without its gradient
    result[0] = of(compensated_sum(loss)) / of(denominator)


def forward_backward(
    z: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None,
    result: np.ndarray,
    dz: np.ndarray,
    invalid: np.ndarray,
    *,
    upstream: float,
    mean: bool,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """result (1,), and dz for the upstream gradient of `result`; invalid as `cross_entropy.forward` leaves it."""
    rows, ignore_index = z.shape[0] * z.shape[2], int(ignore_index)
    denominator = _count(rows, *_counted(target, weight, result.dtype), ignore_index) if mean else 1.0
    loss = np.empty((z.shape[0], z.shape[2]), result.dtype)
    g = upstream / denominator if denominator else math.inf  # no row then has a gradient
    _loss_and_gradient(z, target, weight, loss, dz, invalid, g, ignore_index, label_smoothing)
    _divide(loss, denominator, result)
