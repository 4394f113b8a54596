"""Batch normalisation of float32 by address: the tiles of `_lines.py`, of small planes and of rows of channels; in evaluation
larger planes too.

There is no twin: on a GPU a launch takes addresses anyway. Arrays are (N, C, S), contiguous, S = 1 for rows of channels; which
of them a launcher takes, `does_whole` and `normalizes` say.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from . import _lines, _planes
from ._by_address import floats, vector_or
from ._cut import SMALL_PLANE, flat_blocks, strip, tiles
from ._jit import kernel
from ._threads import run

__all__ = ["backward", "does_whole", "forward", "normalize", "normalizes"]

# The shortest line that is worth a loop of its own.
SHORTEST = 32


@kernel
def _forward(
    first, last, group, x_at, gamma_at, beta_at, y_at, stats_at, running_mean_at, running_var_at, N, C, S, eps, momentum
):  # fmt: skip
    x, y, stats = floats(x_at, (N, C, S)), floats(y_at, (N, C, S)), floats(stats_at, (4, C))
    gamma, beta = vector_or(gamma_at, C, 1.0), vector_or(beta_at, C, 0.0)
    kept = C if running_mean_at else 0
    running_mean, running_var = floats(running_mean_at, kept), floats(running_var_at, kept)
    results = stats[:2], stats[3], stats[2], running_mean, running_var
    _lines.forward(first, last, group, x, gamma, beta, y, *results, eps, momentum)


@kernel
def _backward(first, last, group, dy_at, x_at, stats_at, gamma_at, trained, dx_at, dgamma_at, dbeta_at, N, C, S):
    dy, x, dx = floats(dy_at, (N, C, S)), floats(x_at, (N, C, S)), floats(dx_at, (N, C, S))
    stats, gamma = floats(stats_at, (3, C)), vector_or(gamma_at, C, 1.0)
    dgamma, dbeta = floats(dgamma_at, C), floats(dbeta_at, C)
    _lines.backward(first, last, group, dy, x, stats[:2], stats[2], gamma, trained, dx, dgamma, dbeta)


@kernel
def _known_statistics(running_mean_at, running_var_at, stats_at, C, eps):
    """stats (3, C) in evaluation, by float32's operations, as PyTorch has them."""
    stats, mean, var = floats(stats_at, (3, C)), floats(running_mean_at, C), floats(running_var_at, C)
    for c in range(C):
        stats[0, c], stats[1, c] = mean[c], np.float32(0)
        stats[2, c] = np.float32(1) / math.sqrt(var[c] + np.float32(eps))


@kernel
def _normalize(first, last, group, parts, x_at, gamma_at, beta_at, y_at, stats_at, N, C, S):
    x, y, stats = floats(x_at, (N, C, S)), floats(y_at, (N, C, S)), floats(stats_at, (3, C))
    gamma, beta = vector_or(gamma_at, C, 1.0), vector_or(beta_at, C, 0.0)
    _lines.tile_normalize(first, last, group, parts, x, stats[:2], stats[2] * gamma, beta, y)


@kernel
def _normalize_planes(first, last, blocks, x_at, gamma_at, beta_at, y_at, stats_at, N, C, S):
    x, y, stats = floats(x_at, (N, C, S)), floats(y_at, (N, C, S)), floats(stats_at, (3, C))
    gamma, beta = vector_or(gamma_at, C, 1.0), vector_or(beta_at, C, 0.0)
    _planes.normalize(first, last, blocks, x, stats[:2], stats[2] * gamma, beta, y)


@functools.lru_cache(1024)
def _group(N: int, C: int, S: int) -> int:
    """Channels of a tile where channels are done whole, by `batch_norm` too; else 0."""
    if S == 1:
        return strip(N, C, 4)
    group, parts = tiles(N, C, S, 4) if S <= SMALL_PLANE else (0, 0)
    return group if parts == 1 else 0


def does_whole(N: int, C: int, S: int) -> bool:
    """True for what `forward` and `backward` take."""
    return _group(N, C, S) > 0


def normalizes(N: int, C: int, S: int) -> bool:
    """True for what `normalize` takes."""
    return S > 1 or C >= SHORTEST


def forward(
    x: int, gamma: int, beta: int, y: int, stats: int, running_mean: int, running_var: int, N: int, C: int, S: int,
    *, eps: float, momentum: float,
) -> None:  # fmt: skip
    """`batch_norm.forward`; stats (4, C): mean (2, C), rstd, var."""
    group = _group(N, C, S)
    operands = x, gamma, beta, y, stats, running_mean, running_var, N, C, S, float(eps), float(momentum)
    run(_forward, -(-C // group), 12 * N * C * S, group, *operands)


def backward(
    dy: int, x: int, stats: int, gamma: int, dx: int, dgamma: int, dbeta: int, N: int, C: int, S: int, *, trained: bool
) -> None:
    """`batch_norm.backward`, or `inference_backward` unless `trained`; of `stats` three rows count."""
    group, cost = _group(N, C, S), (20 if trained else 16) * N * C * S
    run(_backward, -(-C // group), cost, group, dy, x, stats, gamma, trained, dx, dgamma, dbeta, N, C, S)


def normalize(
    x: int, gamma: int, beta: int, y: int, stats: int, running_mean: int, running_var: int, N: int, C: int, S: int,
    *, eps: float,
) -> None:  # fmt: skip
    """Writes stats (3, C) of the running statistics (mean, 0 and rstd), then does what `batch_norm.normalize` does."""
    _known_statistics(running_mean, running_var, stats, C, float(eps))
    operands = x, gamma, beta, y, stats, N, C, S
    if S > SMALL_PLANE:
        blocks = flat_blocks(4 * N * C * S, N * C * S)
        run(_normalize_planes, blocks, 8 * N * C * S, blocks, *operands)
        return
    group, parts = tiles(N, C, S, 4)
    run(_normalize, -(-C // group) * parts, 8 * N * C * S, group, parts, *operands)
