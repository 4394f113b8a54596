"""Batch normalisation of a few small float32 planes, by address, on one thread: the loops of `_lines.py`, called once.

There is no twin: on a GPU a launch takes addresses anyway.
"""

from __future__ import annotations

from . import _lines
from ._by_address import floats, vector_or
from ._jit import kernel
from .batch_norm import SMALL_PLANE, _channels_per_tile

__all__ = ["SMALL_PLANE", "backward", "forward"]


@kernel
def _forward(
    x_at, gamma_at, beta_at, y_at, stats_at, running_mean_at, running_var_at, N, C, S, group, eps, momentum
):  # fmt: skip
    x, y, stats = floats(x_at, (N, C, S)), floats(y_at, (N, C, S)), floats(stats_at, (4, C))
    gamma, beta = vector_or(gamma_at, C, 1.0), vector_or(beta_at, C, 0.0)
    kept = C if running_mean_at else 0
    running_mean, running_var = floats(running_mean_at, kept), floats(running_var_at, kept)
    results = stats[:2], stats[3], stats[2], running_mean, running_var
    _lines.forward(0, (C + group - 1) // group, group, x, gamma, beta, y, *results, eps, momentum)


@kernel
def _backward(dy_at, x_at, stats_at, gamma_at, dx_at, dgamma_at, dbeta_at, N, C, S, group):
    dy, x, dx = floats(dy_at, (N, C, S)), floats(x_at, (N, C, S)), floats(dx_at, (N, C, S))
    stats, gamma = floats(stats_at, (4, C)), vector_or(gamma_at, C, 1.0)
    dgamma, dbeta = floats(dgamma_at, C), floats(dbeta_at, C)
    _lines.backward(0, (C + group - 1) // group, group, dy, x, stats[:2], stats[2], gamma, dx, dgamma, dbeta)


def forward(
    x: int, gamma: int, beta: int, y: int, stats: int, running_mean: int, running_var: int, N: int, C: int, S: int,
    *, eps: float, momentum: float,
) -> None:  # fmt: skip
    """`batch_norm.forward` of planes of 2 to SMALL_PLANE values; stats (4, C): mean (2, C), rstd, var."""
    group = min(_channels_per_tile(S, 4), C)
    _forward(x, gamma, beta, y, stats, running_mean, running_var, N, C, S, group, float(eps), float(momentum))


def backward(dy: int, x: int, stats: int, gamma: int, dx: int, dgamma: int, dbeta: int, N: int, C: int, S: int) -> None:
    """`batch_norm.backward` after `forward`."""
    _backward(dy, x, stats, gamma, dx, dgamma, dbeta, N, C, S, min(_channels_per_tile(S, 4), C))
