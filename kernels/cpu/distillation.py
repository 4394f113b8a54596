"""Divergences of a teacher's and a student's softmax along the middle axis of (N, V, S), and their gradients, on the CPU.

    p = softmax(teacher / T),  q = softmax(student / T),  u = log q - log p,  phi(x) = e^x - 1 - x
    forward           KL(p‖q) = sum p phi(u)
    reverse           KL(q‖p)
    jensen_shannon    beta KL(p‖M) + (1 - beta) KL(q‖M),  M = beta p + (1 - beta) q
    dstudent, dteacher of KL(p‖q): (q - p) / T, -p (u + KL) / T; of KL(q‖p) with p and q exchanged
    of jensen_shannon: -(1 - beta) q (log(M/q) + KL(q‖M)) / T, -beta p (log(M/p) + KL(p‖M)) / T

    forward     reads student and teacher                     2 passes
    backward    reads both, writes the gradients asked for    3 passes, or 4

A pass is one read or one write of the whole tensor. A sum of p phi(u) has no terms of two signs: of nearly equal rows it keeps
its digits. `forward` saves for the backward pass m and Z of both, s, kappa and two divergences, where
u = ((student - teacher) / T - s) - kappa: s is a rounded number, kappa small and exact. Everything is computed in float32
(float64 for float64), and sums are merged in float64. A row that the mask leaves out is not read and gives zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from ._distillation.terms import NEAR, magnitude, minus_one, mixed, mixture_logs, phi_near
from ._numba.compile import inline, kernel, overload
from ._numba.elements import accumulate_dtype
from ._numba.exp import exp
from ._numba.simd import Lanes, load_lanes, prefetch, streamed, sum_of, times, where_below, width, write, zeros_like
from ._numba.threads import Moves, moving, run
from ._numba.views import bypasses_cache, gather, prefetch_row, release, row_buffer, row_of, row_scratch, scatter
from ._rows import CHUNK, fill, row_max, sums_of_row

_LOWEST = -3.4028234663852886e38  # of float32: below it is -inf alone, or a float64 that no softmax tells from it


# ---------------------------------------------------------------------------------------------- sums over a row
@inline
def _both_exps(i, exist, args) -> tuple[Lanes, Lanes]:
    """exp((z - max z) scale) of both rows. Meanwhile fetches the row `ahead` of the other."""
    base, other, m, m_o, scale, ahead = args
    prefetch(ahead, i)
    return (
        exp((load_lanes(base, i, exist, -math.inf) - m) * scale),
        exp((load_lanes(other, i, exist, -math.inf) - m_o) * scale),
    )


@inline
def _three_sums(base, other, terms, args) -> tuple[float, float, float]:
    """The sums over the classes of the three numbers that `terms` gives for each."""
    A, B, C, size, count = 0.0, 0.0, 0.0, base.size, width(base)
    for first in range(0, size, CHUNK):
        i, last = first, min(first + CHUNK, size)
        a = zeros_like(load_lanes(base, i, 0, 0.0))
        b, c = a, a
        while i < last:
            exist = min(count, last - i)
            of = terms(load_lanes(base, i, exist, -math.inf), load_lanes(other, i, exist, -math.inf), args)
            a, b, c = a + of[0], b + of[1], c + of[2]
            i += count
        A, B, C = A + np.float64(sum_of(a)), B + np.float64(sum_of(b)), C + np.float64(sum_of(c))
    return A, B, C


@inline
def _kl_terms(base, other, args) -> tuple[Lanes, Lanes, Lanes]:
    """p phi(y) without the e^y of the classes where |y| is not small, and those e^y; p y; and 1 for a class that base has and
    other does not, which makes the divergence infinite."""
    m, over, m_o, over_o, s, scale = args
    p, q = exp((base - m) * scale) * over, exp((other - m_o) * scale) * over_o
    y = where_below(other, _LOWEST, 0.0, (other - base) * scale - s)
    size = magnitude(y)
    in_A, in_F = where_below(size, NEAR, p * phi_near(y), 0.0 - times(p, 1.0 + y)), where_below(size, NEAR, 0.0, q)
    return in_A + in_F, times(p, y), where_below(other, _LOWEST, where_below(base, _LOWEST, 0.0, 1.0), 0.0)


@inline
def _mixture_terms(base, other, args) -> tuple[Lanes, Lanes, Lanes]:
    """What a class adds to KL(p‖M), to KL(q‖M) and to sum p (e^y - 1)."""
    (m, over, m_o, over_o, s, scale), (beta, gamma) = args
    p, q = exp((base - m) * scale) * over, exp((other - m_o) * scale) * over_o
    y = (other - base) * scale - s
    of_p, of_q = mixed(p, q, y, beta, gamma)
    return of_p, of_q, minus_one(y, p, q)


# ---------------------------------------------------------------------------------------------- forward
@inline
def _phi(x) -> Lanes:
    return x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x / 120)))


@inline
def _kl(z, z_o, numbers, K, mixture) -> tuple[float, float, float, float]:
    """KL(base‖other) of a row, kappa, and the divergence that the backward pass takes."""
    A, B, lacking = _three_sums(z, z_o, _kl_terms, numbers)
    kappa = K - numbers[4]
    if A < 0.5 and lacking == 0.0 and abs(A + B) < 0.25:  # the sums of far rows are no small numbers
        kappa = math.log1p(A + B)
    divergence = math.inf if lacking > 0.0 else A - _phi(kappa)
    return divergence, kappa, divergence, 0.0


@inline
def _jensen_shannon(z, z_o, numbers, K, mixture) -> tuple[float, float, float, float]:
    """beta KL(p‖M) + (1 - beta) KL(q‖M) of a row, p of base and q of other; kappa, KL(p‖M) and KL(q‖M)."""
    in_p, in_q, drift = _three_sums(z, z_o, _mixture_terms, (numbers, mixture))
    (beta, gamma), kappa = mixture, K - numbers[4]
    if in_p + in_q < 0.25 and abs(drift) < 0.25:
        kappa = math.log1p(drift)
    # both are about the shift, and about K smaller by half of these squares
    in_p -= 0.5 * (gamma * kappa) ** 2
    in_q -= 0.5 * (beta * kappa) ** 2
    return beta * in_p + gamma * in_q, kappa, in_p, in_q


def _divergence(z: Any, z_o: Any, numbers: Any, K: Any, mixture: Any) -> Any:
    """`_kl` where mixture is None, else `_jensen_shannon`."""


@overload(_divergence)
def _choose_divergence(z, z_o, numbers, K, mixture) -> Callable[..., Any]:
    if isinstance(mixture, types.NoneType):
        return lambda z, z_o, numbers, K, mixture: _kl(z, z_o, numbers, K, mixture)
    return lambda z, z_o, numbers, K, mixture: _jensen_shannon(z, z_o, numbers, K, mixture)


@kernel
def _forward_rows(first, last, base, other, mask, loss, stats, over_temperature, mixture) -> None:
    """The divergence of each row, of p = softmax(base / T) and q = softmax(other / T).

    mixture: None for KL(p‖q), (beta, gamma) for beta KL(p‖M) + gamma KL(q‖M).
    """
    S, of = base.shape[2], loss.dtype.type
    scale, scratch, scratch_o = of(over_temperature), row_scratch(base), row_scratch(other)
    for row in range(first, last):
        n, s = row // S, row % S
        if mask.size and not mask[n, s]:
            loss[n, s], stats[:, n, s] = 0.0, 0.0
            continue
        z, z_o = gather(row_of(base, n, s), scratch), gather(row_of(other, n, s), scratch_o)
        m, m_o, ahead_o = row_max(z), row_max(z_o), prefetch_row(other, row, last, z_o)
        Z, Z_o = sums_of_row(z, _both_exps, (z, z_o, m, m_o, scale, ahead_o), prefetch_row(base, row, last, z))
        K = (np.float64(m_o) - np.float64(m)) * over_temperature + math.log(Z_o / Z)
        shift = of(K)
        numbers = m, of(1.0 / Z), m_o, of(1.0 / Z_o), shift, scale
        loss[n, s], kappa, in_p, in_q = _divergence(z, z_o, numbers, K, mixture)
        stats[0, n, s], stats[1, n, s], stats[2, n, s], stats[3, n, s] = m, Z, m_o, Z_o
        stats[4, n, s], stats[5, n, s], stats[6, n, s], stats[7, n, s] = shift, kappa, in_p, in_q
    release(scratch)
    release(scratch_o)


# ---------------------------------------------------------------------------------------------- backward
# `of_base`: 1.0 for the gradient of base, 0.0 for that of other; one compiled loop for both takes half the time to compile.
@inline
def _of_kl(p, q, u, divergence, of_base, mixture) -> Lanes:
    return where_below(0.5, of_base, 0.0 - times(p, u + divergence), minus_one(u, p, q))


@inline
def _of_jensen_shannon(p, q, u, divergence, of_base, mixture) -> Lanes:
    v, w = mixture_logs(p, q, u, mixture[0], mixture[1])
    return times(where_below(0.5, of_base, p, q), where_below(0.5, of_base, v, w) + divergence)


def _of_divergence(p: Any, q: Any, u: Any, divergence: Any, of_base: Any, mixture: Any) -> Any:
    """The gradient of KL(p‖q) by base or by other where mixture is None, else minus that of KL(p‖M) or KL(q‖M)."""


@overload(_of_divergence)
def _choose_of_divergence(p, q, u, divergence, of_base, mixture) -> Callable[..., Any]:
    if isinstance(mixture, types.NoneType):
        return lambda p, q, u, divergence, of_base, mixture: _of_kl(p, q, u, divergence, of_base, mixture)
    return lambda p, q, u, divergence, of_base, mixture: _of_jensen_shannon(p, q, u, divergence, of_base, mixture)


@inline
def _gradient(i, exist, args) -> Lanes:
    base, other, numbers, g, divergence, of_base, mixture = args
    m, over, m_o, over_o, s, kappa, scale = numbers
    z, z_o = load_lanes(base, i, exist, 0.0), load_lanes(other, i, exist, 0.0)
    p, q, u = exp((z - m) * scale) * over, exp((z_o - m_o) * scale) * over_o, ((z_o - z) * scale - s) - kappa
    return _of_divergence(p, q, u, divergence, of_base, mixture) * g


@kernel
def _backward_rows(first, last, base, other, mask, stats, upstream, d, is_base, weight, over_temperature, mixture) -> None:
    """weight times `_of_divergence` of each row, of base or of other."""
    S, of = base.shape[2], stats.dtype.type
    scratch, scratch_o, d_scratch, around = row_scratch(base), row_scratch(other), row_scratch(d), bypasses_cache(d)
    for row in range(first, last):
        n, s = row // S, row % S
        d_row = row_buffer(row_of(d, n, s), d_scratch)
        g = np.float64(upstream[n, s]) * over_temperature
        if (mask.size and not mask[n, s]) or g == 0.0:
            fill(d_row, 0.0)
        else:
            z, z_o = gather(row_of(base, n, s), scratch), gather(row_of(other, n, s), scratch_o)
            over, over_o = of(1.0 / np.float64(stats[1, n, s])), of(1.0 / np.float64(stats[3, n, s]))
            numbers = stats[0, n, s], over, stats[2, n, s], over_o, stats[4, n, s], stats[5, n, s], of(over_temperature)
            given = z, z_o, numbers, of(g * weight), stats[6 if is_base else 7, n, s], of(is_base), mixture
            write(d_row, around, _gradient, given)
        scatter(row_of(d, n, s), d_scratch)
    streamed()
    release(scratch)
    release(scratch_o)
    release(d_scratch)


# ---------------------------------------------------------------------------------------------- launchers
moving(Moves(("base", "other", "mask"), ("loss", "stats")), _forward_rows)
moving(Moves(("base", "other", "mask", "stats", "upstream"), ("d",)), _backward_rows)


def _operands(student, teacher, mask, stats, of_rows, kind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """base, other and the mask as the kernels take them, which check no bounds; of_rows: a number a row, (N, S)."""
    base, other = (student, teacher) if kind == "reverse" else (teacher, student)
    rows = base.shape[0], base.shape[2]
    mask = np.empty((0, 0), np.uint8) if mask is None else np.ascontiguousarray(mask)
    assert base.shape == other.shape, (base.shape, other.shape)
    assert of_rows.shape == stats.shape[1:] == rows, (of_rows.shape, stats.shape)
    assert len(stats) == 8, stats.shape
    assert mask.shape in ((0, 0), rows), mask.shape
    return base, other, mask


def forward(student, teacher, mask, loss, stats, *, kind: str, beta: float, temperature: float) -> None:
    """The divergence of each row, (N, S), and stats, (8, N, S) or None. mask: (N, S) of uint8, or None."""
    stats = np.empty((8, *loss.shape), loss.dtype) if stats is None else stats
    base, other, mask = _operands(student, teacher, mask, stats, loss, kind)
    mixture = (beta, 1.0 - beta) if kind == "jensen_shannon" else None
    run(_forward_rows, loss.size, 2 * base.nbytes, base, other, mask, loss, stats, 1.0 / temperature, mixture)


def backward(
    student, teacher, mask, stats, upstream, dstudent, dteacher, *, kind: str, beta: float, temperature: float
) -> None:  # fmt: skip
    """The gradients from what `forward` saved, either None; upstream: (N, S), of any strides."""
    upstream = np.ascontiguousarray(upstream, accumulate_dtype(student))
    base, other, mask = _operands(student, teacher, mask, stats, upstream, kind)
    mixture = (beta, 1.0 - beta) if kind == "jensen_shannon" else None
    for d, is_base in ((dstudent, kind == "reverse"), (dteacher, kind != "reverse")):
        if d is not None:
            assert d.shape == base.shape, (d.shape, base.shape)
            weight = 1.0 if mixture is None else -mixture[0 if is_base else 1]
            args = (base, other, mask, stats, upstream, d, is_base, weight, 1.0 / temperature, mixture)
            run(_backward_rows, upstream.size, 3 * base.nbytes, *args)
