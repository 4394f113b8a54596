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

import numpy as np

from ._distillation.terms import NEAR, magnitude, minus_one, mixed, mixture_logs, phi_near
from ._numba.compile import inline, kernel
from ._numba.elements import accumulate_dtype
from ._numba.exp import exp
from ._numba.simd import Lanes, load_lanes, prefetch, streamed, sum_of, times, where_below, width, write, zeros_like
from ._numba.threads import Moves, moving, run
from ._numba.views import bypasses_cache, gather, prefetch_row, release, row_buffer, row_of, row_scratch, scatter
from ._rows import CHUNK, fill, row_max

_LOWEST = -3.4028234663852886e38  # of float32: below it is -inf alone, or a float64 that no softmax tells from it


# ---------------------------------------------------------------------------------------------- forward
@inline
def _masses(base, other, m, m_o, scale, ahead, ahead_o) -> tuple[float, float]:
    """sum exp((z - max z) scale) of both rows. Meanwhile fetches the rows `ahead`."""
    Z, Z_o, size, count = 0.0, 0.0, base.size, width(base)
    for first in range(0, size, CHUNK):
        i, last = first, min(first + CHUNK, size)
        a = zeros_like(load_lanes(base, i, 0, 0.0))
        b = a
        while i < last:
            exist = min(count, last - i)
            prefetch(ahead, i)
            prefetch(ahead_o, i)
            a = a + exp((load_lanes(base, i, exist, -math.inf) - m) * scale)
            b = b + exp((load_lanes(other, i, exist, -math.inf) - m_o) * scale)
            i += count
        Z, Z_o = Z + np.float64(sum_of(a)), Z_o + np.float64(sum_of(b))
    return Z, Z_o


@inline
def _kl_terms(base, other, numbers) -> tuple[Lanes, Lanes, Lanes]:
    """What each class adds to (A, B, F): p phi(y) without the e^y of the classes where |y| is not small, p y, and those e^y."""
    m, over, m_o, over_o, s, scale = numbers
    p, q = exp((base - m) * scale) * over, exp((other - m_o) * scale) * over_o
    y = where_below(other, _LOWEST, 0.0, (other - base) * scale - s)
    size = magnitude(y)
    return (
        where_below(size, NEAR, p * phi_near(y), 0.0 - times(p, 1.0 + y)),
        times(p, y),
        where_below(size, NEAR, 0.0, q),
    )


@inline
def _lacking(base, other) -> Lanes:
    """1 for a class that base has and other does not: the divergence is infinite."""
    return where_below(other, _LOWEST, where_below(base, _LOWEST, 0.0, 1.0), 0.0)


@inline
def _kl(base, other, numbers) -> tuple[float, float, float]:
    """(A + F, B, how many classes are lacking) of a row."""
    A, B, lacking, size, count = 0.0, 0.0, 0.0, base.size, width(base)
    for first in range(0, size, CHUNK):
        i, last = first, min(first + CHUNK, size)
        a = zeros_like(load_lanes(base, i, 0, 0.0))
        b, c = a, a
        while i < last:
            exist = min(count, last - i)
            z, z_o = load_lanes(base, i, exist, -math.inf), load_lanes(other, i, exist, -math.inf)
            in_A, in_B, in_F = _kl_terms(z, z_o, numbers)
            a, b, c = a + (in_A + in_F), b + in_B, c + _lacking(z, z_o)
            i += count
        A, B, lacking = A + np.float64(sum_of(a)), B + np.float64(sum_of(b)), lacking + np.float64(sum_of(c))
    return A, B, lacking


@inline
def _phi(x) -> Lanes:
    return x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x / 120)))


@inline
def _normalizers(z, z_o, z_ahead, z_o_ahead, scale, over_temperature) -> tuple[float, float, float, float, float]:
    """Maximum m and sum of exponentials Z of both rows, and K = log of the ratio of their softmax's divisors."""
    m, m_o = row_max(z), row_max(z_o)
    Z, Z_o = _masses(z, z_o, m, m_o, scale, z_ahead, z_o_ahead)
    return m, Z, m_o, Z_o, (np.float64(m_o) - np.float64(m)) * over_temperature + math.log(Z_o / Z)


@kernel
def _divergence_rows(first, last, base, other, mask, loss, stats, over_temperature) -> None:
    """KL(base‖other)."""
    S, of = base.shape[2], loss.dtype.type
    scale, scratch, scratch_o = of(over_temperature), row_scratch(base), row_scratch(other)
    for row in range(first, last):
        n, s = row // S, row % S
        if mask.size and not mask[n, s]:
            loss[n, s], stats[:, n, s] = 0.0, 0.0
            continue
        z, z_o = gather(row_of(base, n, s), scratch), gather(row_of(other, n, s), scratch_o)
        m, Z, m_o, Z_o, K = _normalizers(
            z, z_o, prefetch_row(base, row, last, z), prefetch_row(other, row, last, z_o), scale, over_temperature
        )
        shift = of(K)
        A, B, lacking = _kl(z, z_o, (m, of(1.0 / Z), m_o, of(1.0 / Z_o), shift, scale))
        kappa = K - shift
        if A < 0.5 and lacking == 0.0 and abs(A + B) < 0.25:  # the sums of far rows are no small numbers
            kappa = math.log1p(A + B)
        loss[n, s] = math.inf if lacking > 0.0 else A - _phi(kappa)
        stats[0, n, s], stats[1, n, s], stats[2, n, s], stats[3, n, s] = m, Z, m_o, Z_o
        stats[4, n, s], stats[5, n, s], stats[6, n, s], stats[7, n, s] = shift, kappa, loss[n, s], 0.0
    release(scratch)
    release(scratch_o)


@inline
def _mixed_sums(base, other, numbers, beta, gamma) -> tuple[float, float, float]:
    """KL(p‖M), KL(q‖M) and sum p (e^y - 1) of a row."""
    m, over, m_o, over_o, s, scale = numbers
    in_p, in_q, drift, size, count = 0.0, 0.0, 0.0, base.size, width(base)
    for first in range(0, size, CHUNK):
        i, last = first, min(first + CHUNK, size)
        a = zeros_like(load_lanes(base, i, 0, 0.0))
        b, c = a, a
        while i < last:
            exist = min(count, last - i)
            z, z_o = load_lanes(base, i, exist, -math.inf), load_lanes(other, i, exist, -math.inf)
            p, q = exp((z - m) * scale) * over, exp((z_o - m_o) * scale) * over_o
            y = (z_o - z) * scale - s
            of_p, of_q = mixed(p, q, y, beta, gamma)
            a, b, c = a + of_p, b + of_q, c + minus_one(y, p, q)
            i += count
        in_p, in_q, drift = in_p + np.float64(sum_of(a)), in_q + np.float64(sum_of(b)), drift + np.float64(sum_of(c))
    return in_p, in_q, drift


@kernel
def _jensen_shannon_rows(first, last, base, other, mask, loss, stats, over_temperature, beta) -> None:
    """beta KL(p‖M) + (1 - beta) KL(q‖M), p of base and q of other."""
    S, of = base.shape[2], loss.dtype.type
    scale, scratch, scratch_o = of(over_temperature), row_scratch(base), row_scratch(other)
    for row in range(first, last):
        n, s = row // S, row % S
        if mask.size and not mask[n, s]:
            loss[n, s], stats[:, n, s] = 0.0, 0.0
            continue
        z, z_o = gather(row_of(base, n, s), scratch), gather(row_of(other, n, s), scratch_o)
        m, Z, m_o, Z_o, K = _normalizers(
            z, z_o, prefetch_row(base, row, last, z), prefetch_row(other, row, last, z_o), scale, over_temperature
        )
        shift = of(K)
        numbers = m, of(1.0 / Z), m_o, of(1.0 / Z_o), shift, scale
        in_p, in_q, drift = _mixed_sums(z, z_o, numbers, of(beta), of(1.0 - beta))
        kappa = K - shift
        if in_p + in_q < 0.25 and abs(drift) < 0.25:
            kappa = math.log1p(drift)
        # both are about the shift, and about K smaller by half of these squares
        in_p -= 0.5 * ((1.0 - beta) * kappa) ** 2
        in_q -= 0.5 * (beta * kappa) ** 2
        loss[n, s] = beta * in_p + (1.0 - beta) * in_q
        stats[0, n, s], stats[1, n, s], stats[2, n, s], stats[3, n, s] = m, Z, m_o, Z_o
        stats[4, n, s], stats[5, n, s], stats[6, n, s], stats[7, n, s] = shift, kappa, in_p, in_q
    release(scratch)
    release(scratch_o)


# ---------------------------------------------------------------------------------------------- backward
@inline
def _p_q_u(i, exist, base, other, numbers) -> tuple[Lanes, Lanes, Lanes]:
    m, over, m_o, over_o, s, kappa, scale = numbers
    z, z_o = load_lanes(base, i, exist, 0.0), load_lanes(other, i, exist, 0.0)
    u = ((z_o - z) * scale - s) - kappa
    return exp((z - m) * scale) * over, exp((z_o - m_o) * scale) * over_o, u


# `of_base`: 1.0 for the gradient of base, 0.0 for that of other; one compiled loop for both takes half the time to compile.
@inline
def _gradient(i, exist, args) -> Lanes:
    base, other, numbers, g, divergence, of_base = args
    p, q, u = _p_q_u(i, exist, base, other, numbers)
    return where_below(0.5, of_base, 0.0 - times(p, u + divergence), minus_one(u, p, q)) * g


@inline
def _gradient_in_mixture(i, exist, args) -> Lanes:
    base, other, numbers, g, divergence, of_base, beta, gamma = args
    p, q, u = _p_q_u(i, exist, base, other, numbers)
    v, w = mixture_logs(p, q, u, beta, gamma)
    return times(where_below(0.5, of_base, p, q), where_below(0.5, of_base, v, w) + divergence) * (0.0 - g)


@inline
def _saved(stats, n, s, over_temperature, of) -> tuple[float, float, float, float, float, float, float]:
    """What `_p_q_u` takes of a row."""
    over, over_o = of(1.0 / np.float64(stats[1, n, s])), of(1.0 / np.float64(stats[3, n, s]))
    return stats[0, n, s], over, stats[2, n, s], over_o, stats[4, n, s], stats[5, n, s], of(over_temperature)


@kernel
def _backward_rows(first, last, base, other, mask, stats, upstream, d, is_base, over_temperature) -> None:
    """The gradient of KL(base‖other) by base or by other."""
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
            numbers = _saved(stats, n, s, over_temperature, of)
            write(d_row, around, _gradient, (z, z_o, numbers, of(g), stats[6, n, s], of(is_base)))
        scatter(row_of(d, n, s), d_scratch)
    streamed()
    release(scratch)
    release(scratch_o)
    release(d_scratch)


@kernel
def _backward_mixture_rows(first, last, base, other, mask, stats, upstream, d, is_base, over_temperature, beta) -> None:
    """The gradient of beta KL(p‖M) + (1 - beta) KL(q‖M) by base or by other."""
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
            weight = beta if is_base else 1.0 - beta
            numbers, divergence = _saved(stats, n, s, over_temperature, of), stats[6 if is_base else 7, n, s]
            given = (z, z_o, numbers, of(g * weight), divergence, of(is_base), of(beta), of(1.0 - beta))
            write(d_row, around, _gradient_in_mixture, given)
        scatter(row_of(d, n, s), d_scratch)
    streamed()
    release(scratch)
    release(scratch_o)
    release(d_scratch)


# ---------------------------------------------------------------------------------------------- launchers
moving(Moves(("base", "other", "mask"), ("loss", "stats")), _divergence_rows, _jensen_shannon_rows)
moving(Moves(("base", "other", "mask", "stats", "upstream"), ("d",)), _backward_rows, _backward_mixture_rows)


def _mask(mask, N: int, S: int) -> np.ndarray:
    return np.empty((0, 0), np.uint8) if mask is None else np.ascontiguousarray(mask)


def forward(student, teacher, mask, loss, stats, *, kind: str, beta: float, temperature: float) -> None:
    """The divergence of each row, (N, S), and stats, (8, N, S) or None. mask: (N, S) of uint8, or None."""
    base, other = (student, teacher) if kind == "reverse" else (teacher, student)
    N, _, S = base.shape
    stats = np.empty((8, N, S), loss.dtype) if stats is None else stats
    mask = _mask(mask, N, S)
    assert base.shape == other.shape, (base.shape, other.shape)  # the kernels check no bounds
    assert loss.shape == stats.shape[1:] == (N, S), (loss.shape, stats.shape)
    assert len(stats) == 8, stats.shape
    assert mask.shape in ((0, 0), (N, S)), mask.shape
    args = (base, other, mask, loss, stats, 1.0 / temperature)
    if kind == "jensen_shannon":
        run(_jensen_shannon_rows, N * S, 2 * base.nbytes, *args, beta)
    else:
        run(_divergence_rows, N * S, 2 * base.nbytes, *args)


def backward(
    student, teacher, mask, stats, upstream, dstudent, dteacher, *, kind: str, beta: float, temperature: float
) -> None:  # fmt: skip
    """The gradients from what `forward` saved, either None; upstream: (N, S), of any strides."""
    base, other = (student, teacher) if kind == "reverse" else (teacher, student)
    N, _, S = base.shape
    mask, upstream = _mask(mask, N, S), np.ascontiguousarray(upstream, accumulate_dtype(base))
    assert base.shape == other.shape, (base.shape, other.shape)
    assert upstream.shape == stats.shape[1:] == (N, S), (upstream.shape, stats.shape)
    assert len(stats) == 8, stats.shape
    assert mask.shape in ((0, 0), (N, S)), mask.shape
    for d, is_base in ((dstudent, kind == "reverse"), (dteacher, kind != "reverse")):
        if d is None:
            continue
        assert d.shape == base.shape, (d.shape, base.shape)
        args = (base, other, mask, stats, upstream, d, is_base, 1.0 / temperature)
        if kind == "jensen_shannon":
            run(_backward_mixture_rows, N * S, 3 * base.nbytes, *args, beta)
        else:
            run(_backward_rows, N * S, 3 * base.nbytes, *args)
