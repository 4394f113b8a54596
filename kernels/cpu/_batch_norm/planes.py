"""Batch normalisation where the values of a channel lie in planes: runs along S, adjacent in memory (NCHW).

A run is a part of a plane x[n, c, :]; it has one mean, scale and shift, and its sums are taken several lanes at a time. Strides
other than 1 along S are right too: such a run is copied to be adjacent, RUN values at a time. The formulas are those of
`batch_norm.py`. Arguments that may be None: `kind` (the activation), `residual` and `dresidual` (`activation.py`), `on`, the
positions that count (`positions.py`). `forward` and `backward` do whole channels; the other kernels split all values in blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from .._numba.compile import inline, kernel, overload
from .._numba.simd import Lanes, fetch, load_lanes, streamed, width, write
from .._numba.views import gather, line_of, plane_of, row_buffer, scatter
from .activation import (
    finished,
    is_computed_again,
    let_through,
    line_beside,
    passed_lanes,
    piece_beside,
    put,
    result_of,
    run_beside,
    scale_of,
    scratch_beside,
)
from .positions import NONE, kept_lanes, share_of, values_of_channel
from .run_sums import deviation_sums_of_run, gradient_sums_of_run
from .statistics import add_to, better_shift, finish, first_mean, first_positions, sums_of

# Bytes of the smallest result that is written past the caches; as many are read. A MiB took 33 us through a last cache of
# 32 MiB where both lay in half of it, 130 to 150 us where they did not, and 60 to 100 us past it.
AROUND = 8 << 20
# Values whose sum is taken at once, and values copied at once.
RUN = 512
# Bytes of what passes an activation that are kept from the first pass over a block to the second.
MOST_KEPT, NONE_KEPT = 1 << 20, (0, 0, 0)
# 0 as a variable: Numba compiles a function once more for a literal.
START = np.int64(0)


# ---------------------------------------------------------------------------------------------- vector i of a run's results
# Functions (i, exist, args) as `write` takes them, for planes and for lines. A parameter is a number, the same for the whole
# run (planes), or a row with one a position (lines of several channels), whose last vector is read whole.
@inline
def _y(x, mean, rest, scale, beta) -> Any:
    """y = (x - mean) scale + beta, scale = rstd gamma; the mean is mean + rest. Of numbers or of vectors of them."""
    return ((x - mean) - rest) * scale + beta


@inline
def _dx(dy, x, mean, rest, scale, b, k) -> Any:
    """dx = scale (dy - b - (x - mean) k), b = dbeta / m, k = rstd dgamma / m: docs/derivations.md, (2.3)."""
    return ((dy - b) - ((x - mean) - rest) * k) * scale


def _at_position(parameter: Any, i: Any) -> Any:
    """A parameter of the positions i…: itself, or a vector of a row of them."""


@overload(_at_position)
def _choose_at_position(parameter, i) -> Callable[..., Any]:
    if isinstance(parameter, types.Array):
        return lambda parameter, i: load_lanes(parameter, i, width(parameter), 0.0)
    return lambda parameter, i: parameter


@inline
def _y_at(i, exist, x, mean, rest, scale, beta) -> Lanes:
    of = _at_position(mean, i), _at_position(rest, i), _at_position(scale, i), _at_position(beta, i)
    return _y(load_lanes(x, i, exist, 0.0), *of)


@inline
def _y_of_run(i, exist, args) -> Lanes:
    """a(y + residual), after = (activation, residual), each None where there is none; 0 where `on` is."""
    x, on, mean, rest, scale, beta, after = args
    return kept_lanes(finished(_y_at(i, exist, x, mean, rest, scale, beta), i, exist, after), on, i, exist)


@inline
def _dx_of_run(i, exist, args) -> Lanes:
    """dx, 0 where `on` is."""
    dy, x, on, result, mean, rest, scale, b, k = args
    of = _at_position(mean, i), _at_position(rest, i), _at_position(scale, i), _at_position(b, i), _at_position(k, i)
    g = passed_lanes(load_lanes(dy, i, exist, 0.0), result, i, exist, dy)
    return kept_lanes(_dx(g, load_lanes(x, i, exist, 0.0), *of), on, i, exist)


@inline
def _scaled_run(i, exist, args) -> Lanes:
    """scale dy: dx where the statistics do not depend on x; 0 where `on` is."""
    dy, on, result, scale = args
    g = passed_lanes(load_lanes(dy, i, exist, 0.0), result, i, exist, dy)
    return kept_lanes(g * _at_position(scale, i), on, i, exist)


@inline
def _let_pass(i, exist, args) -> Lanes:
    dy, x, mean, rest, scale, beta, after = args
    return let_through(load_lanes(dy, i, exist, 0.0), _y_at(i, exist, x, mean, rest, scale, beta), i, exist, after)


@inline
def _pass_run(row, dy, x, mean, rest, scale, beta, after) -> np.ndarray:
    """row = dy a'(p), what the activation of `after` lets through of a run `dy`; gives `row`."""
    write(row, False, _let_pass, (dy, x, mean, rest, scale, beta, after))
    return row


# ---------------------------------------------------------------------------------------------- values s0…s1-1 of a plane
@inline
def _scratch(x) -> np.ndarray:
    """Memory for a run of `x` that is not adjacent in memory; empty where runs are adjacent."""
    return np.empty(0 if x.strides[2] == x.itemsize else RUN, x.dtype)


@inline
def _goes_around(y) -> bool:
    """True where the planes of a result are to be written past the caches."""
    return y.size * y.itemsize >= AROUND and y.strides[2] == y.itemsize


@inline
def _fetch_next(x, n, c, s, end) -> None:
    """Prefetches the same values of the next sample."""
    if n + 1 < x.shape[0] and x.strides[2] == x.itemsize:
        fetch(line_of(x, n + 1, c, s, end - s))


@inline
def _add_deviations(x, on, n, c, s0, s1, shift, sums, j, scratch, ahead) -> None:
    """Adds x - shift and its square, of the values x[n, c, s0:s1], to the sums of channel j. ahead: prefetch sample n + 1."""
    for s in range(s0, s1, RUN):
        end = min(s + RUN, s1)
        if ahead:
            _fetch_next(x, n, c, s, end)
        on_run = line_beside(on, 0, n, s, end - s)
        share = share_of(on_run)
        if share != NONE:
            pair = deviation_sums_of_run(gather(plane_of(x, n, c, s, end), scratch), on_run, share, shift)
            add_to(sums, j, pair[0], pair[1])


@inline
def _add_gradients(dy, x, on, n, c, s0, s1, mean, sums, j, dy_scratch, x_scratch, ahead, gate, told) -> None:
    """Adds dy and dy (x - mean) of these values to the sums of channel j; with an activation dy counts as dy a'(p)."""
    for s in range(s0, s1, RUN):
        end = min(s + RUN, s1)
        if ahead:
            _fetch_next(x, n, c, s, end)
            _fetch_next(dy, n, c, s, end)
        on_run = line_beside(on, 0, n, s, end - s)
        share = share_of(on_run)
        if share != NONE:
            dy_run, x_run = gather(plane_of(dy, n, c, s, end), dy_scratch), gather(plane_of(x, n, c, s, end), x_scratch)
            dy_run, result_run = _through(dy_run, x_run, mean, n, c, s, end, gate), _result_run(told, n, c, s, end)
            pair = gradient_sums_of_run(dy_run, x_run, on_run, share, mean[0, c], mean[1, c], result_run)
            add_to(sums, j, pair[0], pair[1])


@inline
def _normalize(x, on, n, c, s0, s1, mean, scale, beta, y, around, x_scratch, y_scratch, behind) -> None:
    """y[n, c, s0:s1] from x and the residual. behind: the activation, the residual, and memory for a run of the residual."""
    kind, residual, r_scratch = behind
    step = piece_beside(r_scratch, RUN if x_scratch.size or y_scratch.size else max(s1 - s0, 1))
    for s in range(s0, s1, step):
        end = min(s + step, s1)
        y_run, after = row_buffer(plane_of(y, n, c, s, end), y_scratch), (kind, run_beside(residual, n, c, s, end, r_scratch))
        x_run = gather(plane_of(x, n, c, s, end), x_scratch)
        on_run = line_beside(on, 0, n, s, end - s)
        write(y_run, around, _y_of_run, (x_run, on_run, mean[0, c], mean[1, c], scale, beta, after))
        scatter(plane_of(y, n, c, s, end), y_scratch)


@inline
def _apply(
    dy, x, on, n, c, s0, s1, mean, scale, b, k, dx, around, dy_scratch, x_scratch, dx_scratch, gate, told, dresidual
) -> None:  # fmt: skip
    """dx[n, c, s0:s1], and dresidual there, from dy and x."""
    step = _gated_piece(gate, RUN if dy_scratch.size or x_scratch.size or dx_scratch.size else max(s1 - s0, 1))
    step = piece_beside(told[1], step)
    for s in range(s0, s1, step):
        end = min(s + step, s1)
        dy_run, x_run = gather(plane_of(dy, n, c, s, end), dy_scratch), gather(plane_of(x, n, c, s, end), x_scratch)
        dy_run, result_run = _went_through(dy_run, x_run, mean, n, c, s, end, gate), _result_run(told, n, c, s, end)
        on_run = line_beside(on, 0, n, s, end - s)
        put(dy_run, on_run, result_run, dresidual, n, c, s)
        dx_run = row_buffer(plane_of(dx, n, c, s, end), dx_scratch)
        write(dx_run, around, _dx_of_run, (dy_run, x_run, on_run, result_run, mean[0, c], mean[1, c], scale, b, k))
        scatter(plane_of(dx, n, c, s, end), dx_scratch)


@inline
def _scale(dy, x, on, n, c, s0, s1, mean, scale, dx, dy_scratch, x_scratch, dx_scratch, gate, told, dresidual) -> None:
    """dx = scale dy, and dresidual, for a run that is still in the nearest cache."""
    dy_run, dx_run = gather(plane_of(dy, n, c, s0, s1), dy_scratch), row_buffer(plane_of(dx, n, c, s0, s1), dx_scratch)
    dy_run = _through(dy_run, gather(plane_of(x, n, c, s0, s1), x_scratch), mean, n, c, s0, s1, gate)
    on_run, result_run = line_beside(on, 0, n, s0, s1 - s0), _result_run(told, n, c, s0, s1)
    put(dy_run, on_run, result_run, dresidual, n, c, s0)
    write(dx_run, False, _scaled_run, (dy_run, on_run, result_run, scale))
    scatter(plane_of(dx, n, c, s0, s1), dx_scratch)


# ---------------------------------------------------------------------------------------------- a residual and an activation
def _gated_piece(gate: Any, size: Any) -> Any:
    """Values of a run that are done at once: RUN where the activation's gradient needs memory, else `size`."""


@overload(_gated_piece)
def _choose_gated_piece(gate, size) -> Callable[..., Any]:
    return (lambda gate, size: size) if gate == types.none else (lambda gate, size: RUN)


def _gate(kind: Any, residual: Any, scale: Any, beta: Any, shape: Any) -> Any:
    """What `_through` takes: activation, residual, memory for a run of it, γ rstd, β, memory for what passes, and 1 where that
    has all values of a block, 0 where it has RUN of them; None without an activation, and for a ReLU."""


@overload(_gate)
def _choose_gate(kind, residual, scale, beta, shape) -> Callable[..., Any]:
    if not is_computed_again(kind):
        return lambda kind, residual, scale, beta, shape: None
    return lambda kind, residual, scale, beta, shape: _new_gate(kind, residual, scale, beta, shape)


@inline
def _new_gate(kind, residual, scale, beta, shape) -> Any:
    kept = 0 < shape[0] * shape[1] * shape[2] * scale.itemsize <= MOST_KEPT
    memory = np.empty(shape if kept else (1, 1, RUN), scale.dtype)
    return kind, residual, scratch_beside(residual, RUN), scale, beta, memory, 1 if kept else 0


def _through(dy: Any, x: Any, mean: Any, n: Any, c: Any, s: Any, end: Any, gate: Any) -> Any:
    """dy a'(p) of a run, in the gate's memory; `dy` itself without a gate."""


@overload(_through)
def _choose_through(dy, x, mean, n, c, s, end, gate) -> Callable[..., Any]:
    if gate == types.none:
        return lambda dy, x, mean, n, c, s, end, gate: dy
    return lambda dy, x, mean, n, c, s, end, gate: _passed_run(dy, x, mean, n, c, s, end, gate)


@inline
def _passed_run(dy, x, mean, n, c, s, end, gate) -> np.ndarray:
    kind, residual, r_scratch, scale, beta, _, _ = gate
    after = kind, run_beside(residual, n, c, s, end, r_scratch)
    return _pass_run(_run_of_gate(n, c, s, end, gate), dy, x, mean[0, c], mean[1, c], scale[c], beta[c], after)


@inline
def _run_of_gate(n, c, s, end, gate) -> np.ndarray:
    memory, kept = gate[5], gate[6]
    return line_of(memory, n * kept, c % memory.shape[1], s * kept, end - s)


def _went_through(dy: Any, x: Any, mean: Any, n: Any, c: Any, s: Any, end: Any, gate: Any) -> Any:
    """What `_through` gave of this run, from the gate's memory where that keeps it."""


@overload(_went_through)
def _choose_went_through(dy, x, mean, n, c, s, end, gate) -> Callable[..., Any]:
    if gate == types.none:
        return lambda dy, x, mean, n, c, s, end, gate: dy
    return lambda dy, x, mean, n, c, s, end, gate: (
        _run_of_gate(n, c, s, end, gate) if gate[6] else _passed_run(dy, x, mean, n, c, s, end, gate)
    )


@inline
def _told_by(kind, beside) -> Any:
    """What `_result_run` takes: a ReLU's result and memory for a run of it, or None twice."""
    result = result_of(kind, beside)
    return result, scratch_beside(result, RUN)


@inline
def _result_run(told, n, c, s, end) -> Any:
    result, scratch = told
    return run_beside(result, n, c, s, end, scratch)


# ---------------------------------------------------------------------------------------------- whole channels
@inline
def _statistics(
    x, on, at, m, c0, c1, shift, sums, mean, var, rstd, running_mean, running_var, eps, momentum, x_scratch
) -> None:  # fmt: skip
    """Mean, var, rstd and running statistics of the channels c0…c1-1; shift (c1 - c0) and sums (2, 2, c1 - c0) are memory."""
    N, S = x.shape[0], x.shape[2]
    sums[:] = 0.0
    # 1. the shift, a mean of a few first values, and the sums about it
    for c in range(c0, c1):
        shift[c - c0] = first_mean(x, c, at)
    for n in range(N):
        for c in range(c0, c1):
            _add_deviations(x, on, n, c, START, S, shift[c - c0], sums, c - c0, x_scratch, True)
    # 2. a shift far from the mean found is replaced by that, and the sums are taken again; then the statistics
    for c in range(c0, c1):
        j = c - c0
        total, square = sums_of(sums, j)
        better = better_shift(shift[j], total, square, m)
        if better == better:
            shift[j] = better
            sums[:, :, j] = 0.0
            for n in range(N):
                _add_deviations(x, on, n, c, START, S, better, sums, j, x_scratch, True)
            total, square = sums_of(sums, j)
        finish(c, shift[j], total, square, m, eps, momentum, mean, var, rstd, running_mean, running_var)


@inline
def _gradients_of_channels(sums, c0, c1, m, rstd, dgamma, dbeta, b, k) -> None:
    """dgamma and dbeta of the channels c0…c1-1 from their sums, and what dx needs of them in b and k."""
    of = rstd.dtype.type
    for c in range(c0, c1):
        j = c - c0
        total, product = sums_of(sums, j)
        product *= rstd[c]
        dbeta[c], dgamma[c] = of(total), of(product)
        b[j], k[j] = of(total / m), of(product * rstd[c] / m)


# A block is `group` channels, done from first to last while they are in cache.
@kernel
def forward(
    first, last, group, x, gamma, beta, y, mean, var, rstd, running_mean, running_var, eps, momentum, kind, residual, on
) -> None:  # fmt: skip
    """y = a((x - mean) rstd gamma + beta + residual), mean and var of each channel of the blocks first…last-1.

    Reads x twice, the second time from the caches, and the residual once; writes y and these channels' statistics.
    """
    N, C, S = x.shape
    x_scratch, y_scratch, around = _scratch(x), _scratch(y), _goes_around(y)
    shift, sums, behind = np.empty(group), np.empty((2, 2, group)), (kind, residual, scratch_beside(residual, RUN))
    at, m = first_positions(x, on), values_of_channel(x, on)
    for block in range(first, last):
        c0, c1 = block * group, min(block * group + group, C)
        # 1. read x: the statistics of the block's channels
        _statistics(
            x, on, at, m, c0, c1, shift, sums, mean, var, rstd, running_mean, running_var, eps, momentum, x_scratch
        )  # fmt: skip
        # 2. read x again: y
        for n in range(N):
            for c in range(c0, c1):
                scale = rstd[c] * gamma[c]
                _normalize(x, on, n, c, START, S, mean, scale, beta[c], y, around, x_scratch, y_scratch, behind)
    streamed()


@kernel
def backward(
    first, last, group, dy, x, mean, rstd, gamma, dx, dgamma, dbeta, beta, kind, residual, dresidual, on
) -> None:  # fmt: skip
    """dx = rstd gamma (dy - dbeta / m - x_hat dgamma / m) of the channels of the blocks first…last-1, dbeta = sum dy,
    dgamma = sum dy x_hat; with an activation dy counts as dy a'(p), which is dresidual too.

    Reads dy and x (and the residual, where an activation needs it) twice, then from the caches; writes the gradients.
    """
    N, C, S = x.shape
    m = values_of_channel(x, on)
    dy_scratch, x_scratch, dx_scratch, around = _scratch(dy), _scratch(x), _scratch(dx), _goes_around(dx)
    sums, b, k = np.empty((2, 2, group)), np.empty(group, rstd.dtype), np.empty(group, rstd.dtype)
    gate, told = _gate(kind, residual, scale_of(kind, rstd, gamma), beta, (N, group, S)), _told_by(kind, residual)
    for block in range(first, last):
        c0, c1 = block * group, min(block * group + group, C)
        sums[:] = 0.0
        # 1. read dy and x: sum dy and sum dy (x - mean) of the block's channels, and dbeta and dgamma from them
        for n in range(N):
            for c in range(c0, c1):
                _add_gradients(dy, x, on, n, c, START, S, mean, sums, c - c0, dy_scratch, x_scratch, True, gate, told)
        _gradients_of_channels(sums, c0, c1, m, rstd, dgamma, dbeta, b, k)
        # 2. read both again: dx
        for n in range(N):
            for c in range(c0, c1):
                j, scale = c - c0, rstd[c] * gamma[c]
                _apply(
                    dy, x, on, n, c, START, S, mean, scale, b[j], k[j], dx, around, dy_scratch, x_scratch, dx_scratch,
                    gate, told, dresidual,
                )  # fmt: skip
    streamed()


# ---------------------------------------------------------------------------------------------- split
# Block b is the values size b / blocks … size (b + 1) / blocks - 1 of all, in the order of n, c, s: one run in memory, mostly.
@inline
def _run_at(x, v, end) -> tuple[int, int, int, int]:
    """n, c, s and where s ends: the values v… of a plane, below `end`."""
    C, S = x.shape[1], x.shape[2]
    s = v % S
    return v // S // C, v // S % C, s, min(S, s + end - v)


@kernel
def sums(first, last, x, shift, partial, on) -> None:
    """partial (blocks, 2, C) = sum (x - shift) and sum (x - shift)^2 of every block and channel. Reads x once."""
    C = x.shape[1]
    blocks, scratch, pieces = partial.shape[0], _scratch(x), np.empty((2, 2, C))
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        pieces[:] = 0.0
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            _add_deviations(x, on, n, c, s, stop, shift[c], pieces, c, scratch, False)
            v += stop - s
        for c in range(C):
            partial[block, 0, c], partial[block, 1, c] = sums_of(pieces, c)


@kernel
def gradient_sums(first, last, dy, x, mean, scale, dx, partial, beta, kind, residual, dresidual, on) -> None:
    """partial (blocks, 2, C) = sum dy and sum dy (x - mean) of every block and channel. Reads dy and x once.

    Where dx has values the statistics do not depend on x: dx = scale dy and dresidual = dy are written too, run by run.
    """
    C = x.shape[1]
    blocks, dy_scratch, x_scratch, pieces = partial.shape[0], _scratch(dy), _scratch(x), np.empty((2, 2, C))
    dx_scratch, gate, told = _scratch(dx), _gate(kind, residual, scale, beta, NONE_KEPT), _told_by(kind, residual)
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        pieces[:] = 0.0
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            stop = min(stop, s + RUN)
            _add_gradients(dy, x, on, n, c, s, stop, mean, pieces, c, dy_scratch, x_scratch, False, gate, told)
            if dx.size:
                _scale(
                    dy, x, on, n, c, s, stop, mean, scale[c], dx, dy_scratch, x_scratch, dx_scratch, gate, told,
                    dresidual,
                )  # fmt: skip
            v += stop - s
        for c in range(C):
            partial[block, 0, c], partial[block, 1, c] = sums_of(pieces, c)


@kernel
def normalize(first, last, blocks, x, mean, scale, beta, y, kind, residual, on) -> None:
    """y = a((x - mean) scale + beta + residual) of every block, scale = rstd gamma. Reads x and the residual, writes y."""
    behind = kind, residual, scratch_beside(residual, RUN)
    x_scratch, y_scratch, around = _scratch(x), _scratch(y), _goes_around(y)
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            _normalize(x, on, n, c, s, stop, mean, scale[c], beta[c], y, around, x_scratch, y_scratch, behind)
            v += stop - s
    streamed()


@kernel
def apply(first, last, blocks, dy, x, mean, scale, b, k, dx, beta, kind, residual, dresidual, on) -> None:
    """dx = scale (dy - b - (x - mean) k) of every block, b = dbeta / m, k = rstd dgamma / m.

    Reads dy and x (and the residual, where an activation needs it); writes dx and dresidual.
    """
    dy_scratch, x_scratch, dx_scratch, around = _scratch(dy), _scratch(x), _scratch(dx), _goes_around(dx)
    gate, told = _gate(kind, residual, scale, beta, NONE_KEPT), _told_by(kind, residual)
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            _apply(
                dy, x, on, n, c, s, stop, mean, scale[c], b[c], k[c], dx, around, dy_scratch, x_scratch, dx_scratch, gate, told,
                dresidual,
            )  # fmt: skip
            v += stop - s
    streamed()
