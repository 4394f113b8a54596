"""Softmax cross entropy along the middle axis of (N, V, S), loss and gradient, on the CPU.

With class weights w (1 if there are none), label smoothing eps and target probabilities y (one-hot for a class index):

    q_c    = w_c ((1 - eps) y_c + eps / V),   W = sum_c q_c
    lse    = m + log sum_c exp(z_c - m),                           m = max_c z_c
    loss   = W (lse - m) - sum_c q_c (z_c - m) + zeta lse^2,       zeta the z-loss's factor, 0 * inf = 0
    dz_c   = g ((W + 2 zeta lse) p_c - q_c),   p_c = exp(z_c - m) / sum exp(z - m),   g = upstream / denominator
    softcap tau: z stands for tau tanh(z / tau) everywhere, and dz_c gains the factor 1 - (z_c / tau)^2
    logit_scale kappa: z stands for kappa z everywhere, before the cap, and dz_c gains the factor kappa

    forward             reads z (and y)              1 pass  (2)
    backward            reads z (and y), writes dz   2 passes (3)
    forward_backward    reads z (and y), writes dz   2 passes (3), and so does forward_backward_reduced

A pass is one read or one write of the whole tensor. `forward` saves three numbers a row, m, sum exp(z - m) - 1 and W: logits
near 1e4 would lose the digits of p in a rounded m + log sum, and where p -> 1 so would 1 - p in a sum near 1. Everything is
computed in float32 (float64 for float64), sums are merged in float64, and the result is rounded once: the 1 of a one-hot y is
subtracted before that.

A row whose target is `ignore_index` has loss 0 and dz 0 whatever its logits are. One whose target is no class at all has
loss and dz NaN, and the smallest such row number n S + s goes to `invalid`. The logits of neither are read. The kernels here
know neither z-loss nor softcap, and save no more than the three numbers: `_cross_entropy.row_with_options` has those that do.
"""

from __future__ import annotations

import math

import numpy as np

from ._cross_entropy.kernels import (
    _hard_backward,
    _hard_forward,
    _hard_forward_backward,
    _soft_backward,
    _soft_forward,
    _soft_forward_backward,
)
from ._cross_entropy.reduction import _count, _divide, _reduce
from ._cross_entropy.row_with_options import hard_rows, soft_rows
from ._numba.elements import accumulate_dtype, as_classes, to_accumulate
from ._numba.threads import Moves, moving, run, tell

_GRADIENT = Moves(("z", "target", "y", "stats", "upstream"), ("dz",))
moving(Moves(("z", "target", "y"), ("loss", "stats")), _hard_forward, _soft_forward)
moving(_GRADIENT, _hard_backward, _soft_backward)
moving(
    Moves(("z", "target", "y"), ("loss", "stats", "dz")), _hard_forward_backward, _soft_forward_backward, hard_rows, soft_rows
)
moving(Moves(("loss", "target")), _count, _reduce)


# ---------------------------------------------------------------------------------------------- launchers
def _weights(weight: np.ndarray | None, z: np.ndarray, dense: bool) -> tuple[np.ndarray, float]:
    """Class weights as the kernels take them, and their sum. Empty stands for ones, unless a sum over classes needs them."""
    dtype, V = accumulate_dtype(z), z.shape[1]
    if weight is None:
        return np.ones(V, dtype) if dense else _NO_WEIGHT[dtype], float(V)
    weight = np.ascontiguousarray(weight, dtype)
    return weight, float(weight.sum(dtype=np.float64)) if dense else 0.0


# What stands for nothing, by dtype, so that a call makes none of it.
_NO_WEIGHT = {np.dtype(of): np.empty(0, of) for of in (np.float32, np.float64)}
_NO_CLASSES, _ANY_CLASS = np.empty((0, 0), np.int64), np.iinfo(np.int64).max


def _check(z, target, weight, *of_rows) -> None:
    """The kernels check no bounds: with a wrong shape they use a wrong address."""
    N, V, S = z.shape
    assert target.shape in ((N, S), (N, V, S)), (target.shape, z.shape)
    assert weight is None or weight.shape == (V,), (weight.shape, z.shape)
    for values in of_rows:
        assert values.shape == (N, S), (values.shape, z.shape)


def forward(
    z, target, weight, loss, stats, invalid, *,
    total=None, denominator=None, row_weights=None, mean: bool = False, zero_if_ignored: bool = False,
    ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:  # fmt: skip
    """Loss per row and stats, (3, N, S) or (6, N, S): m, sum exp(z - m) - 1, W; z_target - m, entropy and argmax.

    Where `total` is given, also sum loss, or its mean and as `denominator` what it is divided by (`reduce`). row_weights:
    memory that kernels on a GPU need.
    """
    _check(z, target, weight, loss)
    assert stats.shape[0] in (3, 6), stats.shape
    assert stats.shape[1:] == loss.shape, (stats.shape, loss.shape)
    rows, smoothing, soft = loss.size, float(label_smoothing), target.ndim == 3
    if soft and z.size == 0:
        loss.fill(0.0)
        stats.fill(0.0)
    elif z_loss or softcap is not None or logit_scale != 1.0 or len(stats) > 3:
        rows_of = (z, target, weight, loss, stats, False, None, invalid, None, None, False)
        _rows_with_options(*rows_of, ignore_index, smoothing, z_loss, softcap, logit_scale)
    elif soft:
        of_classes, _ = _weights(weight, z, False)
        run(_soft_forward, rows, z.nbytes + target.nbytes, z, target, of_classes, loss, stats, smoothing)
    else:
        of_classes, weight_sum = _weights(weight, z, smoothing != 0.0)
        args = (z, as_classes(target), of_classes, loss, stats, invalid, int(ignore_index), smoothing, weight_sum)
        run(_hard_forward, rows, z.nbytes, *args)
    if total is not None:
        found = np.empty(1, loss.dtype) if denominator is None else denominator
        _reduce_rows(loss, target, weight, total, found, mean, zero_if_ignored, ignore_index)


def _reduce_rows(loss, target, weight, total, denominator, mean, zero_if_ignored, ignore_index) -> None:
    reduce(loss, target, weight, total, denominator, ignore_index=ignore_index)
    _never_zero(denominator, zero_if_ignored)
    if mean:
        with np.errstate(divide="ignore", invalid="ignore"):
            np.divide(total, denominator, out=total)


def _never_zero(denominator, zero_if_ignored) -> None:
    """A mean over nothing is 0/0, or 0 where that is asked for: over an infinite number."""
    if zero_if_ignored and denominator[0] == 0:
        denominator[0] = math.inf


def backward(
    z, target, weight, stats, upstream, denominator, dz, *, unless_one: bool = False,
    ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:  # fmt: skip
    """dz from what `forward` saved, for any upstream gradient per row, divided by `denominator` where given.

    `unless_one` leaves the rows alone whose upstream gradient is 1: dz holds theirs already.
    """
    _check(z, target, weight, upstream)
    assert stats.shape[1:] == upstream.shape, (stats.shape, upstream.shape)
    assert dz.shape == z.shape, (dz.shape, z.shape)
    if z.size == 0:
        return
    rows, smoothing, soft = stats[0].size, float(label_smoothing), target.ndim == 3
    if z_loss or softcap is not None or logit_scale != 1.0:
        invalid = np.empty(1, np.int64)  # reported by the forward pass
        rows_of = (z, target, weight, np.empty_like(stats[0]), stats, True, dz, invalid, upstream, denominator, unless_one)
        _rows_with_options(*rows_of, ignore_index, smoothing, z_loss, softcap, logit_scale)
        return
    weight, _ = _weights(weight, z, smoothing != 0.0 and not soft)
    upstream = to_accumulate(upstream, upstream.size, weight.dtype, 1.0)
    denominator = _NO_WEIGHT[weight.dtype] if denominator is None else denominator
    if soft:
        cost = 2 * z.nbytes + target.nbytes
        run(_soft_backward, rows, cost, z, target, weight, stats, upstream, denominator, dz, unless_one, smoothing)
    else:
        given = (upstream, denominator, dz, unless_one, int(ignore_index), smoothing)
        run(_hard_backward, rows, 2 * z.nbytes, z, as_classes(target), weight, stats, *given)


def forward_backward(
    z, target, weight, loss, dz, invalid, *, stats=None, upstream=None, denominator=None,
    total=None, mean: bool = False, zero_if_ignored: bool = False,
    ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:  # fmt: skip
    """Loss per row, stats where given, and the gradient for an upstream gradient of 1, or (N, S), over `denominator`.

    Where `total` is given, also sum loss, or its mean: for hard targets over `denominator`, which `count` has found; for soft
    ones over their number, which is written there.
    """
    if total is not None and mean and target.ndim == 3:
        count(target, weight, denominator, ignore_index=ignore_index, zero_if_ignored=zero_if_ignored)
    g = 1.0 if denominator is None else _quotient(1.0, denominator[0])
    g = g if upstream is None else g * upstream
    options = ignore_index, label_smoothing, z_loss, softcap, logit_scale
    _loss_and_gradient(z, target, weight, loss, stats, dz, invalid, g, *options)
    if total is not None:
        _reduce_rows(loss, target, weight, total, np.empty(1, loss.dtype), mean, zero_if_ignored, ignore_index)


def forward_backward_reduced(
    z, target, weight, result, dz, invalid, *, stats=None, upstream: float, mean: bool, zero_if_ignored: bool = False,
    ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:  # fmt: skip
    """The sum or the mean of the loss as `result` (1,), and dz for the upstream gradient of `result`; else `forward_backward`.

    For a training step: 2 passes (3) and one exponential an element, where `forward` and `backward` take 3 (5) and two. dz is
    computed before the upstream gradient is known, which is nearly always 1; for another it is called again. The GPU has no
    such launcher: it would have to wait for the denominator, and for the upstream gradient.
    """
    denominator = np.ones(1)
    if mean:
        count(target, weight, denominator, ignore_index=ignore_index, zero_if_ignored=zero_if_ignored)
    loss = np.empty((z.shape[0], z.shape[2]), result.dtype)
    g = _quotient(upstream, denominator[0])
    options = ignore_index, label_smoothing, z_loss, softcap, logit_scale
    _loss_and_gradient(z, target, weight, loss, stats, dz, invalid, g, *options)
    _divide(loss, denominator[0], result)


def _quotient(upstream, denominator) -> float:
    """upstream / denominator; infinite for 0, where no row has a gradient."""
    return float(upstream) / float(denominator) if denominator else math.inf


def _loss_and_gradient(
    z, target, weight, loss, stats, dz, invalid, g, ignore_index, label_smoothing, z_loss, softcap, logit_scale
) -> None:
    """`forward_backward` for the upstream gradient `g` of every row's loss, a number or (N, S)."""
    _check(z, target, weight, loss)
    assert dz.shape == z.shape, (dz.shape, z.shape)
    assert stats is None or stats.shape[1:] == loss.shape, (stats.shape, loss.shape)
    rows, smoothing, soft = loss.size, float(label_smoothing), target.ndim == 3
    if soft and z.size == 0:
        loss.fill(0.0)
        if stats is not None:
            stats.fill(0.0)
    elif z_loss or softcap is not None or logit_scale != 1.0 or stats is not None or isinstance(g, np.ndarray):
        upstream = np.full(loss.shape, g, loss.dtype)
        rows_of = (z, target, weight, loss, stats, False, dz, invalid, upstream, None, False)
        _rows_with_options(*rows_of, ignore_index, smoothing, z_loss, softcap, logit_scale)
    elif soft:
        weight, _ = _weights(weight, z, False)
        cost = 2 * z.nbytes + target.nbytes
        run(_soft_forward_backward, rows, cost, z, target, weight, loss, dz, g, smoothing)
    else:
        weight, weight_sum = _weights(weight, z, smoothing != 0.0)
        given = (loss, dz, invalid, g, int(ignore_index), smoothing, weight_sum)
        run(_hard_forward_backward, rows, 2 * z.nbytes, z, as_classes(target), weight, *given)


def _rows_with_options(
    z, target, weight, loss, stats, known, dz, invalid, upstream, denominator, unless_one,
    ignore_index, smoothing, z_loss, softcap, logit_scale,
) -> None:  # fmt: skip
    """Loss and stats (unless None, or known), and dz (unless None) by the kernels of `_cross_entropy.row_with_options`."""
    weight, _ = _weights(weight, z, True)
    stats = np.empty((0, *loss.shape), loss.dtype) if stats is None else stats
    dz = np.empty((0, 0, 0), z.dtype) if dz is None else dz
    upstream = to_accumulate(upstream, loss.size, weight.dtype, 1.0).reshape(loss.shape)
    denominator = np.ones(1, weight.dtype) if denominator is None else denominator
    numbers = (float(smoothing), float(z_loss), 0.0 if softcap is None else float(softcap), float(logit_scale))
    cost, moves = z.nbytes + dz.nbytes, _GRADIENT if known else None
    if target.ndim == 3:
        of_probabilities = (z, target, weight, loss, stats, known, dz, upstream, denominator, unless_one)
        run(soft_rows, loss.size, cost + target.nbytes, *of_probabilities, *numbers, moves=moves)
    else:
        of_classes = (z, as_classes(target), weight, loss, stats, known, dz, invalid, upstream, denominator, unless_one)
        run(hard_rows, loss.size, cost, *of_classes, int(ignore_index), *numbers, moves=moves)


def count(target, weight, denominator, *, ignore_index: int, zero_if_ignored: bool = False) -> None:
    """denominator = sum w_target over the rows that count (hard targets), the number of rows (soft)."""
    rows = target.shape[0] * target.shape[-1]
    args = (rows, *_counted(target, weight, denominator.dtype), int(ignore_index), denominator)
    tell(_count, args)
    _count(*args)
    _never_zero(denominator, zero_if_ignored)


def reduce(loss, target, weight, total, denominator, *, ignore_index: int) -> None:
    """total = sum loss; denominator as of `count`."""
    assert target.ndim == 3 or target.shape == loss.shape, (target.shape, loss.shape)
    args = (loss, *_counted(target, weight, loss.dtype), int(ignore_index), total, denominator)
    tell(_reduce, args)
    _reduce(*args)


def _counted(target: np.ndarray, weight: np.ndarray | None, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, int]:
    """Classes, weights and the number of classes as `denominator_of` takes them."""
    classes, V = _NO_CLASSES, -1
    if target.ndim == 2:
        classes, V = as_classes(target), _ANY_CLASS if weight is None else weight.shape[0]
    return classes, _NO_WEIGHT[dtype] if weight is None else np.ascontiguousarray(weight, dtype), V
