"""What a vector of classes adds to a divergence, without a difference that loses digits: docs/derivations.md, section 3.9."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from .._numba.compile import inline, overload
from .._numba.log import log1p
from .._numba.simd import Lanes, larger, times, where_below

NEAR = 0.5  # |x| below which phi(x) is the series'


@inline
def magnitude(x) -> Lanes:
    return larger(x, 0.0 - x)


def phi_near(x) -> Any:
    """phi(x) = e^x - 1 - x of `Lanes`, |x| <= 1/2, by its series to half a unit in the last place."""
    return np.expm1(x) - x


_C32 = tuple(np.float32(1 / math.factorial(k)) for k in range(2, 9))
_C64 = tuple(1 / math.factorial(k) for k in range(2, 16))


@inline
def _phi32(x) -> Lanes:
    y = _C32[5] + x * _C32[6]
    return x * x * (_C32[0] + x * (_C32[1] + x * (_C32[2] + x * (_C32[3] + x * (_C32[4] + x * y)))))


@inline
def _phi64(x) -> Lanes:
    y = _C64[9] + x * (_C64[10] + x * (_C64[11] + x * (_C64[12] + x * _C64[13])))
    y = _C64[5] + x * (_C64[6] + x * (_C64[7] + x * (_C64[8] + x * y)))
    return x * x * (_C64[0] + x * (_C64[1] + x * (_C64[2] + x * (_C64[3] + x * (_C64[4] + x * y)))))


@overload(phi_near)
def _phi_near(x) -> Callable[..., Any]:
    if x.dtype == types.float64:
        return lambda x: _phi64(x)
    return lambda x: _phi32(x)


@inline
def minus_one(u, p, q) -> Lanes:
    """p (e^u - 1) = q - p with the digits of a small u."""
    return where_below(magnitude(u), NEAR, times(p, u + phi_near(u)), q - p)


@inline
def _mixed_logs(x, ratio, b, g) -> tuple[Lanes, Lanes]:
    """log(M/p) and log(M/q) for x = log(q/p) <= 0, M = b p + g q, ratio = q/p."""
    below = where_below(magnitude(x), NEAR, x + phi_near(x), ratio - 1.0)
    of_p = log1p(g * below, where_below(magnitude(x), NEAR, 1.0 + g * below, b + g * ratio))
    # p/q - 1; beyond e^16, where it may be no number, the difference of the logarithms is none of near numbers
    above = (0.0 - b * below) / where_below(x, -16.0, 1.0, where_below(magnitude(x), NEAR, 1.0 + below, ratio))
    return of_p, where_below(x, -16.0, of_p - x, log1p(above, 1.0 + above))


@inline
def _by_size(p, q, u, beta, gamma) -> tuple[Lanes, Lanes, Lanes, Lanes, Lanes]:
    """(larger, smaller, log of the smaller over the larger, what each is multiplied by in M)."""
    large, small = where_below(0.0, u, q, p), where_below(0.0, u, p, q)
    return large, small, 0.0 - magnitude(u), where_below(0.0, u, gamma, beta), where_below(0.0, u, beta, gamma)


@inline
def mixture_logs(p, q, u, beta, gamma) -> tuple[Lanes, Lanes]:
    """log(M/p) and log(M/q), M = beta p + gamma q, u = log(q/p)."""
    large, small, x, b, g = _by_size(p, q, u, beta, gamma)
    of_large, of_small = _mixed_logs(x, small / where_below(0.0, large, large, 1.0), b, g)
    return where_below(0.0, u, of_small, of_large), where_below(0.0, u, of_large, of_small)


@inline
def mixed(p, q, u, beta, gamma) -> tuple[Lanes, Lanes]:
    """What a class adds to KL(p‖M) and to KL(q‖M), M = beta p + gamma q, u = log(q/p)."""
    large, small, x, b, g = _by_size(p, q, u, beta, gamma)
    of_large, of_small = _mixed_logs(x, small / where_below(0.0, large, large, 1.0), b, g)
    far_large = g * (small - large) - times(large, of_large)
    far_small = b * (large - small) - times(small, of_small)
    in_large = where_below(magnitude(of_large), NEAR, times(large, phi_near(of_large)), far_large)
    in_small = where_below(magnitude(of_small), NEAR, times(small, phi_near(of_small)), far_small)
    return where_below(0.0, u, in_small, in_large), where_below(0.0, u, in_large, in_small)
