"""Mean and scatter of points (B, n, m), one pass over them, added to those of points seen before.

    μ = 1/n Σ x_i,    scatter = Σ (x_i - μ)(x_i - μ)ᵀ                            docs/derivations.md, sections 2.5 and 4.5
    update   read x once, read and write the state; n > 1024 and n > 2 m: up to 16 partial scatters, together no more than x.
             From m = 512 on, a few bands of rows of the scatter read x each
    merge    the states of two sets of points
    finish   mean, covariance = scatter / divisor

The state of `count` points, in float64: shift (B, m), a mean of some of them; total (2, B, m), Σ (x - shift); scatter (2, B,
m, m), its lower triangle. Index 1 holds what the additions to index 0 have rounded off, so that neither their number nor the
size of μ costs digits. All of a variable is multiplied by unit (B, m), a power of two with which no square leaves float64: of
float64 points STEP until a value reaches 1 / LARGE, 1 until one reaches LARGE, and 1 / STEP from there on. BLOCK_N points at a
time are copied to the cache, one variable after another, and centred there twice: about their rounded mean, then about what
that rounding left. Blocks are merged in order (Chan, Golub and LeVeque).
"""

from __future__ import annotations

import math

import numpy as np

from ._batch_norm.statistics import two_sum, with_low
from ._numba.compile import inline, kernel, reduction
from ._numba.threads import Moves, moving, run
from ._numba.views import copy

# Points centred at once. A variable's lie BLOCK_N + PAD apart, so that a column of them does not share one cache set.
BLOCK_N = 128
PAD = 8
# Runs of points whose scatters are summed apart, at most; each run has at least this many points, and m.
MOST_RUNS = 16
RUN_POINTS = 512
# Squares of numbers between 1 / LARGE and LARGE can be summed; STEP takes smaller ones there, 1 / STEP larger ones.
LARGE, STEP = 2.0**480, 2.0**544
# Rows of the scatter that one thread fills, at least, where there are few runs.
BAND_ROWS = 256


# ---------------------------------------------------------------------------------------------- one block, in the cache
@reduction
def _total(d, j, count) -> float:
    total = 0.0
    for p in range(count):
        total += d[j, p]
    return total


@reduction
def _reaches(d, j, count, limit) -> int:
    """How many values of variable j are `limit` or more."""
    found = 0
    for p in range(count):
        found += abs(d[j, p]) >= limit
    return found


@inline
def _centre(x, b, m, first, count, d, unit, shift, rest) -> float:
    """d (m, BLOCK_N + PAD) = the deviations of `count` points of x[b] from their mean, shift + rest (m), times unit (m).

    The units fall where values are too large for them; whether one did.
    """
    fell = False
    for p in range(count):
        for j in range(m):
            d[j, p] = np.float64(x[b, first + p, j])
    for j in range(m):
        if unit[j] > 1.0 and _reaches(d, j, count, 1 / LARGE) > 0:
            unit[j], fell = 1.0, True
        if x.itemsize == 8 and unit[j] == 1.0 and _reaches(d, j, count, LARGE) > 0:
            unit[j], fell = 1 / STEP, True
        if unit[j] != 1.0:
            for p in range(count):
                d[j, p] *= unit[j]
        shift[j] = _total(d, j, count) / count
        for p in range(count):
            d[j, p] -= shift[j]
        rest[j] = _total(d, j, count) / count
        for p in range(count):
            d[j, p] -= rest[j]
        if not math.isfinite(shift[j]):
            rest[j] = 0.0  # an infinite mean has nothing left; the deviations are NaN
    return fell


@reduction
def _dots(d, i, j, count) -> tuple[float, ...]:
    """The products of variables i…i+3 and j, j+1."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = 0.0
    for p in range(count):
        y, z = d[j, p], d[j + 1, p]
        a0 += d[i, p] * y
        a1 += d[i + 1, p] * y
        a2 += d[i + 2, p] * y
        a3 += d[i + 3, p] * y
        b0 += d[i, p] * z
        b1 += d[i + 1, p] * z
        b2 += d[i + 2, p] * z
        b3 += d[i + 3, p] * z
    return a0, a1, a2, a3, b0, b1, b2, b3


@inline
def _four_rows(d, i, count, rows) -> None:
    """rows (4, ≥ i + 4) = rows i…i+3 of the scatter of the deviations `d`, up to the diagonal."""
    for j in range(0, i + 4, 2):
        (
            rows[0, j], rows[1, j], rows[2, j], rows[3, j], rows[0, j + 1], rows[1, j + 1], rows[2, j + 1], rows[3, j + 1]
        ) = _dots(d, i, j, count)  # fmt: skip


# ---------------------------------------------------------------------------------------------- merging
@inline
def _difference(m, count, shift, total, low, more, more_shift, more_rest, delta) -> None:
    """delta (m) = the mean of `more` points less that of `count`; adds theirs to total + low = Σ (x - shift)."""
    for j in range(m):
        if count == 0:
            shift[j] = more_shift[j] if math.isfinite(more_shift[j]) else 0.0
            total[j], low[j] = 0.0, 0.0
        away = (more_shift[j] - shift[j]) + more_rest[j]
        delta[j] = away - (total[j] + low[j]) / count if count else 0.0
        total[j], lost = two_sum(total[j], more * away)
        low[j] += lost


@inline
def _add_row(scatter, low, i, count, more, r, weight, delta) -> None:
    """Row i of scatter + low, up to the diagonal, grows by more[r] and by that of weight · delta deltaᵀ; 0 points have none."""
    scaled = weight * delta[i]
    if count == 0:
        for j in range(i + 1):
            scatter[i, j], low[i, j] = more[r, j], 0.0
        return
    for j in range(i + 1):
        scatter[i, j], lost = two_sum(scatter[i, j], more[r, j] + scaled * delta[j])
        low[i, j] += lost


@inline
def _rescale(m, factor, shift, total, low) -> None:
    for j in range(m):
        shift[j] *= factor[j]
        total[j] *= factor[j]
        low[j] *= factor[j]


@inline
def _rescale_rows(factor, scatter, low, top, end) -> None:
    for i in range(top, end):
        for j in range(i + 1):  # a factor after the other: their product is no number
            scatter[i, j] = scatter[i, j] * factor[i] * factor[j]
            low[i, j] = low[i, j] * factor[i] * factor[j]


@inline
def _band_row(band, bands, m) -> int:
    """The first row of a band of the lower triangle, a multiple of 4; the bands are of about one area."""
    return m if band == bands else int(m * math.sqrt(band / bands)) // 4 * 4


@inline
def _run_of(r, n, runs) -> tuple[int, int]:
    """The points start…stop of run r: the first n % runs runs have one more than n // runs."""
    start = r * (n // runs) + min(r, n % runs)
    return start, start + n // runs + (1 if r < n % runs else 0)


@kernel
def _add_runs(first, last, x, runs, bands, seen, old_shift, old_total, old_unit, shift, total, scatter, unit) -> None:
    """runs = 1: add x to the state of `seen` points. Else a state of index b · runs + r for each run, rounded to index 0."""
    n, m = x.shape[1], x.shape[2]
    tiled = (m + 3) // 4 * 4
    d = np.zeros((tiled, BLOCK_N + PAD))  # rows beyond m stay 0
    rows, scratch = np.empty((4, tiled)), np.empty((m if runs > 1 else 1, m))
    block_shift, block_rest, delta = np.empty(m), np.empty(m), np.empty(m)
    mean, sums, lows, units, factor = np.empty(m), np.empty(m), np.empty(m), np.empty(m), np.empty(m)
    for work in range(first, last):
        t, band = work // bands, work % bands
        b, (start, stop) = t // runs, _run_of(t % runs, n, runs)
        top, end = _band_row(band, bands, m), _band_row(band + 1, bands, m)
        # variables from `end` on are nothing to the band; all bands find the same means of the others
        if runs == 1:
            copy(old_shift[b], mean)
            copy(old_total[0, b], sums)
            copy(old_total[1, b], lows)
        units[:] = STEP if x.itemsize == 8 else 1.0
        if runs == 1 and seen > 0:
            copy(old_unit[b], units)
        high, low = scatter[0, t], scratch if runs > 1 else scatter[1, b]
        for begin in range(start, stop, BLOCK_N):
            before, count = seen + begin - start, min(BLOCK_N, stop - begin)
            copy(units, factor)
            if _centre(x, b, end, begin, count, d, units, block_shift, block_rest) and before > 0:
                for j in range(end):
                    factor[j] = units[j] / factor[j]
                _rescale(end, factor, mean, sums, lows)
                _rescale_rows(factor, high, low, top, end)
            _difference(end, before, mean, sums, lows, count, block_shift, block_rest, delta)
            weight = before * (count / (before + count))
            for i in range(top, end, 4):
                _four_rows(d, i, count, rows)
                for r in range(min(4, end - i)):
                    _add_row(high, low, i + r, before, rows, r, weight, delta)
        if band == bands - 1:
            copy(mean, shift[t])
            copy(sums, total[0, t])
            copy(lows, total[1, t])
            copy(units, unit[t])
        if runs > 1:
            for i in range(top, end):
                for j in range(i + 1):
                    high[i, j] = with_low(high[i, j], low[i, j])


@kernel
def _merge(first, last, n, runs, seen, more_shift, more_total, more_scatter, more_unit, shift, total, scatter, unit) -> None:
    """Add the states of `runs` runs, n points in all, to the state of `seen` points."""
    m, whole = shift.shape[1], more_scatter.shape[0] == 1
    delta, mean, rest, row = np.empty(m), np.empty(m), np.empty(m), np.empty((1, m))
    factor, own = np.empty(m), np.empty(m)
    for b in range(first, last):
        high, low = scatter[0, b], scatter[1, b]
        for r in range(runs):
            t, (start, stop) = b * runs + r, _run_of(r, n, runs)
            count, before = stop - start, seen + start
            fell = False
            for j in range(m):
                if before == 0:
                    unit[b, j] = more_unit[t, j]
                smaller = min(unit[b, j], more_unit[t, j])
                factor[j], own[j] = smaller / more_unit[t, j], smaller / unit[b, j]
                fell |= own[j] != 1.0
                unit[b, j] = smaller
                mean[j] = more_shift[t, j] * factor[j]
                rest[j] = with_low(more_total[0, t, j], more_total[1, t, j]) / count * factor[j]
            if fell:
                _rescale(m, own, shift[b], total[0, b], total[1, b])
                _rescale_rows(own, high, low, 0, m)
            _difference(m, before, shift[b], total[0, b], total[1, b], count, mean, rest, delta)
            weight = before * (count / (before + count))
            for i in range(m):
                for j in range(i + 1):
                    more = more_scatter[0, t, i, j] if whole else with_low(more_scatter[0, t, i, j], more_scatter[1, t, i, j])
                    row[0, j] = more * factor[i] * factor[j]
                _add_row(high, low, i, before, row, 0, weight, delta)


@kernel
def _finish(first, last, count, divisor, shift, total, scatter, unit, mean, covariance) -> None:
    """mean = shift + total / count and covariance = scatter / divisor, both triangles; reads the state, writes these."""
    of = mean.dtype.type
    for b in range(first, last):
        for i in range(shift.shape[1]):
            mean[b, i] = of((shift[b, i] + with_low(total[0, b, i], total[1, b, i]) / count) / unit[b, i])
            for j in range(i + 1):
                scaled = with_low(scatter[0, b, i, j], scatter[1, b, i, j]) / divisor
                if unit[b, i] == unit[b, j]:  # whose product may be no number; that of others is one
                    covariance[b, i, j] = of(scaled / unit[b, i] / unit[b, j])
                else:
                    covariance[b, i, j] = of(scaled / (unit[b, i] * unit[b, j]))
                covariance[b, j, i] = covariance[b, i, j]


# ---------------------------------------------------------------------------------------------- launchers
_STATE = "shift", "total", "scatter", "unit"
moving(Moves(("x",), _STATE), _add_runs)
moving(Moves(("more_shift", "more_total", "more_scatter", "more_unit"), _STATE), _merge)
moving(Moves(_STATE, ("mean", "covariance")), _finish)


def update(
    x: np.ndarray, shift: np.ndarray, total: np.ndarray, scatter: np.ndarray, unit: np.ndarray, *, count: int
) -> None:  # fmt: skip
    """Add the points x (B, n, m), n ≥ 1, to the state of `count` points; at 0 what the state holds is not read."""
    B, n, m = x.shape
    state = shift, total, scatter, unit
    assert (n >= 1, *(a.shape for a in state)) == (True, (B, m), (2, B, m), (2, B, m, m), (B, m)), x.shape
    runs = max(1, min(MOST_RUNS, n // max(m, RUN_POINTS)))
    bands = max(1, m // BAND_ROWS) if B * runs < 8 else 1
    cost = x.nbytes * (1 + m // 16)
    if runs == 1:
        run(_add_runs, B * bands, cost, x, 1, bands, count, shift.copy(), total.copy(), unit.copy(), *state)
        return
    parts = np.empty((B * runs, m)), np.empty((2, B * runs, m)), np.empty((1, B * runs, m, m)), np.empty((B * runs, m))
    run(_add_runs, B * runs * bands, cost, x, runs, bands, 0, shift, total, unit, *parts)
    run(_merge, B, parts[2].nbytes, n, runs, count, *parts, *state)


def merge(
    more_shift: np.ndarray, more_total: np.ndarray, more_scatter: np.ndarray, more_unit: np.ndarray,
    shift: np.ndarray, total: np.ndarray, scatter: np.ndarray, unit: np.ndarray, *, more: int, count: int,
) -> None:  # fmt: skip
    """Add the state of `more` ≥ 1 points to that of `count` points."""
    given = more_shift, more_total, more_scatter, more_unit
    run(_merge, shift.shape[0], scatter.nbytes, more, 1, count, *given, shift, total, scatter, unit)


def finish(
    shift: np.ndarray, total: np.ndarray, scatter: np.ndarray, unit: np.ndarray, mean: np.ndarray, covariance: np.ndarray,
    *, count: int, divisor: int,
) -> None:  # fmt: skip
    """mean (B, m) and covariance (B, m, m), exactly symmetric, of the state of `count` points."""
    run(_finish, shift.shape[0], scatter.nbytes, count, divisor, shift, total, scatter, unit, mean, covariance)
