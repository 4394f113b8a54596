"""Small calls on the CPU, by address: a NumPy view of every tensor costs several times the arithmetic.

The loops are those of `cross_entropy.py` and `_lines.py`, called once, on one thread. All arrays are float32 (classes int64)
and contiguous, which the caller has seen to (`hw3gpu/_small.py`); address 0 stands for what is not given. There is no twin: on
a GPU a launch takes addresses anyway.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from . import _lines
from ._jit import inline, kernel
from .batch_norm import SMALL_PLANE, _channels_per_tile
from .cross_entropy import _ANY_CLASS, _hard_forward_backward, compensated_sum, denominator_of

__all__ = ["SMALL_PLANE", "batch_norm_backward", "batch_norm_forward", "cross_entropy"]


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """An address as a `void *`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), codegen


@inline
def _floats(address, shape):
    return carray(_pointer(address), shape, np.float32)


@inline
def _vector_or(address, size, default):
    return _floats(address, size) if address else np.full(size, np.float32(default), np.float32)


@kernel
def _cross_entropy(
    z_at, target_at, dz_at, result_at, N, V, S, upstream, mean, zero_if_ignored, ignore_index, smoothing
):  # fmt: skip
    z, dz, result = _floats(z_at, (N, V, S)), _floats(dz_at, (N, V, S)), _floats(result_at, 1)
    target = carray(_pointer(target_at), (N, S), np.int64)
    no_weight, loss, invalid = np.empty(0, np.float32), np.empty((N, S), np.float32), np.full(1, N * S)
    denominator = denominator_of(N * S, target, no_weight, _ANY_CLASS, ignore_index) if mean else 1.0
    if zero_if_ignored and denominator == 0.0:
        denominator = math.inf
    g = upstream / denominator if denominator != 0.0 else math.inf
    weight = np.ones(V if smoothing else 0, np.float32)
    _hard_forward_backward(0, N * S, z, target, weight, loss, dz, invalid, g, ignore_index, smoothing, np.float64(V))
    result[0] = np.float32(compensated_sum(loss)) / np.float32(denominator)
    return invalid[0]


@kernel
def _batch_norm_forward(
    x_at, gamma_at, beta_at, y_at, stats_at, running_mean_at, running_var_at, N, C, S, group, eps, momentum
):  # fmt: skip
    x, y, stats = _floats(x_at, (N, C, S)), _floats(y_at, (N, C, S)), _floats(stats_at, (4, C))
    gamma, beta = _vector_or(gamma_at, C, 1.0), _vector_or(beta_at, C, 0.0)
    kept = C if running_mean_at else 0
    running_mean, running_var = _floats(running_mean_at, kept), _floats(running_var_at, kept)
    results = stats[:2], stats[3], stats[2], running_mean, running_var
    _lines.forward(0, (C + group - 1) // group, group, x, gamma, beta, y, *results, eps, momentum)


@kernel
def _batch_norm_backward(dy_at, x_at, stats_at, gamma_at, dx_at, dgamma_at, dbeta_at, N, C, S, group):
    dy, x, dx = _floats(dy_at, (N, C, S)), _floats(x_at, (N, C, S)), _floats(dx_at, (N, C, S))
    stats, gamma = _floats(stats_at, (4, C)), _vector_or(gamma_at, C, 1.0)
    dgamma, dbeta = _floats(dgamma_at, C), _floats(dbeta_at, C)
    _lines.backward(0, (C + group - 1) // group, group, dy, x, stats[:2], stats[2], gamma, dx, dgamma, dbeta)


def cross_entropy(
    z: int, target: int, dz: int, result: int, N: int, V: int, S: int, *, upstream: float, mean: bool,
    zero_if_ignored: bool, ignore_index: int, label_smoothing: float,
) -> int:  # fmt: skip
    """`cross_entropy_step.forward_backward` of classes, without weights; the first wrong row, or N S."""
    return _cross_entropy(
        z, target, dz, result, N, V, S, upstream, mean, zero_if_ignored, ignore_index, label_smoothing
    )  # fmt: skip


def batch_norm_forward(
    x: int, gamma: int, beta: int, y: int, stats: int, running_mean: int, running_var: int, N: int, C: int, S: int,
    *, eps: float, momentum: float,
) -> None:  # fmt: skip
    """`batch_norm.forward` of planes of 2 to SMALL_PLANE values; stats (4, C): mean (2, C), rstd, var."""
    group = min(_channels_per_tile(S, 4), C)
    _batch_norm_forward(x, gamma, beta, y, stats, running_mean, running_var, N, C, S, group, eps, momentum)


def batch_norm_backward(
    dy: int, x: int, stats: int, gamma: int, dx: int, dgamma: int, dbeta: int, N: int, C: int, S: int
) -> None:
    """`batch_norm.backward` after `batch_norm_forward`."""
    _batch_norm_backward(dy, x, stats, gamma, dx, dgamma, dbeta, N, C, S, min(_channels_per_tile(S, 4), C))
