"""Batch normalisation of the positions that count, on the CPU: the passes of `batch_norm.py` where a mask is given.

The loops are in `_batch_norm/masked.py`. Bits come in, one a position for all channels; they are made bytes once a call, N S of
them beside N C S values. Planes are done whole where `batch_norm` does so, channels-last rows are always split. Where every
position counts there is nothing to leave out: `chosen` gives None, and `batch_norm` goes its own way, to the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import channel_plan
from ._batch_norm import masked
from ._batch_norm.statistics import better_shifts, finish_all, merge
from ._numba.threads import Moves, moving, run
from .channel_plan import Pass, layout_of

__all__ = [
    "Chosen",
    "apply",
    "backward",
    "chosen",
    "clear",
    "forward",
    "gradient_sums",
    "normalize",
    "plan_whole",
    "statistics",
]

moving(Moves(("x", "on"), ("y",)), masked.sums, masked.row_sums, masked.normalize, masked.row_normalize, masked.forward)
moving(Moves(("dy", "x", "on"), ("dx",)), masked.gradient_sums, masked.row_gradient_sums, masked.apply, masked.row_apply)
moving(Moves(("dy", "x", "on"), ("dx",)), masked.backward)
moving(Moves(("on",), ("y",)), masked.clear, masked.row_clear)


class Chosen(NamedTuple):
    """on: (1, N, S) bytes, 1 where a position counts; m: how many do, so many values a channel."""

    on: np.ndarray
    m: float


def chosen(x: np.ndarray, valid: np.ndarray | None) -> Chosen | None:
    """The positions of x (N, C, S) that count, from their bits; None where all do."""
    if valid is None:
        return None
    N, _, S = x.shape
    on = np.unpackbits(valid, count=N * S, bitorder="little")
    m = int(np.count_nonzero(on))
    return None if m == N * S else Chosen(on.reshape(1, N, S), float(m))


def statistics(
    of: Chosen, x: np.ndarray, mean: np.ndarray, var: np.ndarray, rstd: np.ndarray, running_mean: np.ndarray,
    running_var: np.ndarray, eps: float, momentum: float,
) -> None:  # fmt: skip
    """mean (2, C), var and rstd (C,), and the running statistics in place, where these have values."""
    if of.m == 0:
        mean[...], var[...], rstd[...] = 0, 0, 1 / np.sqrt(eps)
        return
    shift, at, plan = np.empty(x.shape[1]), masked.first_positions(of.on), channel_plan.plan_masked_sums(layout_of(x))
    masked.first_means(x, at, shift)
    sums = _sums(plan, of, x, shift)
    if better_shifts(shift, sums, of.m):
        sums = _sums(plan, of, x, shift)
    finish_all(shift, sums, of.m, eps, momentum, mean, var, rstd, running_mean, running_var)


def _sums(plan: Pass, of: Chosen, x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """sum (x - shift) and sum (x - shift)^2 of every channel: (2, C) float64."""
    partial = np.empty((plan.partial, 2, x.shape[1]))
    run(masked.row_sums if plan.loops == "lines" else masked.sums, plan.blocks, x.nbytes, *plan.told, x, of.on, shift, partial)
    return _merged(partial)


def _merged(partial: np.ndarray) -> np.ndarray:
    sums = np.empty(partial.shape[1:])
    merge(partial, sums)
    return sums


def normalize(of: Chosen, x: np.ndarray, mean: np.ndarray, scale: np.ndarray, beta: np.ndarray, y: np.ndarray) -> None:
    """y = (x - mean) scale + beta, 0 where a position does not count."""
    plan = channel_plan.plan_masked_result(layout_of(x, y))
    kernel = masked.row_normalize if plan.loops == "lines" else masked.normalize
    run(kernel, plan.blocks, 2 * x.nbytes, *plan.told, x, of.on, mean, scale, beta, y)


def forward(
    of: Chosen, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, y: np.ndarray, mean: np.ndarray, var: np.ndarray,
    rstd: np.ndarray, running_mean: np.ndarray, running_var: np.ndarray, eps: float, momentum: float,
) -> None:  # fmt: skip
    """`statistics`, then `normalize`."""
    whole = plan_whole(x, y) if of.m else None
    if whole is None:
        statistics(of, x, mean, var, rstd, running_mean, running_var, eps, momentum)
        normalize(of, x, mean, rstd * gamma, beta, y)
        return
    operands = x, of.on, of.m, masked.first_positions(of.on), gamma, beta, y, mean, var, rstd, running_mean, running_var
    run(masked.forward, whole.blocks, 3 * x.nbytes, *whole.told, *operands, eps, momentum)


def gradient_sums(
    of: Chosen, dy: np.ndarray, x: np.ndarray, mean: np.ndarray, scale: np.ndarray, dx: np.ndarray | None
) -> np.ndarray:
    """sum dy and sum dy (x - mean) of every channel: (2, C) float64. dx, where given, = scale dy."""
    plan = channel_plan.plan_masked_sums(layout_of(x, dy) if dx is None else layout_of(x, dy, dx))
    partial = np.empty((plan.partial, 2, x.shape[1]))
    kernel = masked.row_gradient_sums if plan.loops == "lines" else masked.gradient_sums
    written = np.empty((0, 0, 0), x.dtype) if dx is None else dx
    run(kernel, plan.blocks, 2 * x.nbytes, *plan.told, dy, x, of.on, mean, scale, written, partial)
    return _merged(partial)


def apply(
    of: Chosen, dy: np.ndarray, x: np.ndarray, mean: np.ndarray, scale: np.ndarray, b: np.ndarray, k: np.ndarray,
    dx: np.ndarray,
) -> None:  # fmt: skip
    """dx = scale (dy - b - (x - mean) k), 0 where a position does not count."""
    plan = channel_plan.plan_masked_result(layout_of(x, dy, dx))
    kernel = masked.row_apply if plan.loops == "lines" else masked.apply
    run(kernel, plan.blocks, 3 * x.nbytes, *plan.told, dy, x, of.on, mean, scale, b, k, dx)


def plan_whole(x: np.ndarray, *beside: np.ndarray) -> Pass | None:
    """How channels are done whole; None where they are to be split."""
    return channel_plan.plan_masked_whole(layout_of(x, *beside))


def backward(
    whole: Pass, of: Chosen, dy: np.ndarray, x: np.ndarray, mean: np.ndarray, rstd: np.ndarray, gamma: np.ndarray,
    dx: np.ndarray, dgamma: np.ndarray, dbeta: np.ndarray,
) -> None:  # fmt: skip
    """dgamma, dbeta and dx of channels done whole."""
    operands = dy, x, of.on, max(of.m, 1.0), mean, rstd, gamma, dx, dgamma, dbeta
    run(masked.backward, whole.blocks, 5 * x.nbytes, *whole.told, *operands)


def clear(of: Chosen, y: np.ndarray) -> None:
    """y = 0 where a position does not count."""
    plan = channel_plan.plan_masked_result(layout_of(y))
    kernel = masked.row_clear if plan.loops == "lines" else masked.clear
    run(kernel, plan.blocks, y.nbytes, plan.told[0], of.on, y)
