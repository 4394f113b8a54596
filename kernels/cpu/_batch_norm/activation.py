"""What follows batch normalisation in the loops: a residual is added, then an activation; and what that lets through of dy.

A kernel takes the activation as a value whose type tells the compiler which it is, or None: a call without one is compiled
to the loops without it. Beside it comes the residual, or None. The backward pass computes p, what went into the activation,
again from x (docs/derivations.md, section 2.7) and the residual, in memory for a run or a line; of a ReLU the result comes in
the place of the residual, and what passes is told where dy is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types

from .._numba.compile import inline, overload
from .._numba.elements import load, store
from .._numba.exp import exp
from .._numba.simd import Lanes, larger, load_lanes, load_lanes_like, where_at_most, where_below
from .._numba.views import borrowed, gather, line_of, plane_of
from .positions import kept


class Relu(NamedTuple):
    """max(p, 0)."""


class Silu(NamedTuple):
    """p σ(p)."""


class Hardswish(NamedTuple):
    """p min(max(p + 3, 0), 6) / 6."""


class Gelu(NamedTuple):
    """p Φ(p)."""


KINDS: dict[str | None, Any] = {
    None: None, "relu": Relu(), "silu": Silu(), "hardswish": Hardswish(), "gelu": Gelu(),
}  # fmt: skip

# Φ(-a) = exp(-a²/2) G(a), and (1 + SLOPE a) G(a) is a polynomial of 1 - 2 K / (a + K), a >= 0, interpolated at Chebyshev's
# points: relative error 3e-10 for a <= 14 and 1e-18 for a <= 39; beyond, exp(-a²/2) is 0.
_SLOPE, _DENSITY, _SIXTH, _THIRD = 1.25, 1.0 / math.sqrt(2.0 * math.pi), 1.0 / 6.0, 1.0 / 3.0
_K32, _K64 = 3.75, 4.5
_G32 = (
    0.5689730048179626, -0.07714829593896866, -0.021546587347984314, 0.05862845480442047, -0.046066250652074814,
    0.019318703562021255, -0.002583184279501438, -0.001587943290360272, 0.0006563077331520617, 0.0001541020319564268,
    -0.0001014857116388157, -3.3215688745258376e-05,
)  # fmt: skip
_G64 = (
    0.5618224727141773, -0.07908516279848876, -0.00038269063049718537, 0.04308649630081776, -0.048096791388468736,
    0.03230521924589897, -0.01429704943428759, 0.0034578016006086188, 0.0002231411757012061, -0.0004669225072746217,
    8.575525378405472e-05, 4.5849078009159476e-05, -1.8667774558122762e-05, -4.967779580750244e-06, 3.2186862081881003e-06,
    7.342531368458572e-07, -5.392572135803261e-07, -1.5176513892080918e-07, 8.641018053855862e-08, 3.6636014004706925e-08,
    -1.0990770850053971e-08, -8.14440106788077e-09, 2.542285422692531e-10, 1.1332221816984648e-09, 2.343396514269003e-10,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- of `Lanes`
@inline
def _sigmoids(p) -> tuple[Lanes, Lanes]:
    """σ(p) and σ(-p), neither by a difference."""
    e = exp(where_below(p, 0.0, p, 0.0 - p))
    q = 1.0 / (1.0 + e)
    return where_below(p, 0.0, e * q, q), where_below(p, 0.0, q, e * q)


@inline
def _polynomial(t, of) -> Lanes:
    value = t * of[len(of) - 1] + of[len(of) - 2]
    for k in range(len(of) - 3, -1, -1):
        value = value * t + of[k]
    return value


def _tail(a: Any) -> Any:
    """G(a), a >= 0."""


@overload(_tail)
def _choose_tail(a) -> Callable[..., Any]:
    K, of = (_K64, _G64) if a.dtype == types.float64 else (_K32, _G32)
    return lambda a: _polynomial(1.0 - 2.0 * K / (a + K), of) / (a * _SLOPE + 1.0)


@inline
def _normal(p) -> tuple[Lanes, Lanes]:
    """φ(p) √(2 π) and Φ(p)."""
    density = exp(p * p * -0.5)
    tail = density * _tail(larger(p, 0.0 - p))
    return density, where_below(p, 0.0, tail, 1.0 - tail)


@inline
def _relu(p) -> Lanes:
    return where_at_most(p, 0.0, 0.0, p)


@inline
def _silu(p) -> Lanes:
    sigma, _ = _sigmoids(p)
    return p * sigma


@inline
def _silu_gradient(dy, p) -> Lanes:
    sigma, rest = _sigmoids(p)
    return dy * (sigma * (p * rest + 1.0))


@inline
def _hardswish(p) -> Lanes:
    t = p + 3.0
    t = where_below(t, 0.0, 0.0, t)
    return p * (where_below(6.0, t, 6.0, t) * _SIXTH)


@inline
def _hardswish_gradient(dy, p) -> Lanes:
    return where_at_most(p, -3.0, 0.0, where_at_most(3.0, p, dy, dy * (p * _THIRD + 0.5)))


@inline
def _gelu(p) -> Lanes:
    _, distribution = _normal(p)
    return p * distribution


@inline
def _gelu_gradient(dy, p) -> Lanes:
    density, distribution = _normal(p)
    return dy * (p * (density * _DENSITY) + distribution)


_FORMULAS: dict[Any, Any] = {
    Relu: (_relu, None),
    Silu: (_silu, _silu_gradient),
    Hardswish: (_hardswish, _hardswish_gradient),
    Gelu: (_gelu, _gelu_gradient),
}


def _finished(v: Any, i: Any, exist: Any, kind: Any, residual: Any) -> Any:
    """a(v + residual), vector i of the row."""


@overload(_finished)
def _choose_finished(v, i, exist, kind, residual) -> Callable[..., Any]:
    formula = None if kind == types.none else _FORMULAS[kind.instance_class][0]
    if formula is None and residual == types.none:
        return lambda v, i, exist, kind, residual: v
    if formula is None:
        return lambda v, i, exist, kind, residual: v + load_lanes(residual, i, exist, 0.0)
    if residual == types.none:
        return lambda v, i, exist, kind, residual: formula(v)
    return lambda v, i, exist, kind, residual: formula(v + load_lanes(residual, i, exist, 0.0))


@inline
def finished(v, i, exist, after) -> Lanes:
    """What `after` = (activation, residual) makes of the vector `v` at i."""
    kind, residual = after
    return _finished(v, i, exist, kind, residual)


def _let_through(dy: Any, v: Any, i: Any, exist: Any, kind: Any, residual: Any) -> Any:
    """dy a'(v + residual)."""


@overload(_let_through)
def _choose_let_through(dy, v, i, exist, kind, residual) -> Callable[..., Any]:
    formula = _FORMULAS[kind.instance_class][1]
    if residual == types.none:
        return lambda dy, v, i, exist, kind, residual: formula(dy, v)
    return lambda dy, v, i, exist, kind, residual: formula(dy, v + load_lanes(residual, i, exist, 0.0))


@inline
def let_through(dy, v, i, exist, after) -> Lanes:
    """What `after` = (activation, residual) lets through of the vector `dy` at i, v = γ x̂ + β."""
    kind, residual = after
    return _let_through(dy, v, i, exist, kind, residual)


# ---------------------------------------------------------------------------------------------- a ReLU's result
def result_of(kind: Any, beside: Any) -> Any:
    """`beside`, the result, where the activation is a ReLU; else None."""


@overload(result_of)
def _choose_result_of(kind, beside) -> Callable[..., Any]:
    if kind != types.none and kind.instance_class is Relu:
        return lambda kind, beside: beside
    return lambda kind, beside: None


def is_computed_again(kind: Any) -> bool:
    """Whether the type of an activation is one whose gradient needs p."""
    return bool(kind != types.none and kind.instance_class is not Relu)


def passed(value: Any, result: Any, i: Any) -> Any:
    """`value` where result[i] is positive or NaN, else 0; `value` itself where `result` is None."""


@overload(passed)
def _choose_passed(value, result, i) -> Callable[..., Any]:
    if result == types.none:
        return lambda value, result, i: value
    return lambda value, result, i: type(value)(0) if load(result, i) <= 0.0 else value


def passed_lanes(v: Any, result: Any, i: Any, exist: Any, like: Any) -> Any:
    """As `passed`, of a vector at i, with as many lanes as one of `like`."""


@overload(passed_lanes)
def _choose_passed_lanes(v, result, i, exist, like) -> Callable[..., Any]:
    if result == types.none:
        return lambda v, result, i, exist, like: v
    return lambda v, result, i, exist, like: where_at_most(load_lanes_like(result, i, exist, 0.0, like), 0.0, 0.0, v)


def scale_of(kind: Any, rstd: Any, gamma: Any) -> Any:
    """γ rstd; None without an activation."""


@overload(scale_of)
def _choose_scale_of(kind, rstd, gamma) -> Callable[..., Any]:
    return (lambda kind, rstd, gamma: None) if kind == types.none else (lambda kind, rstd, gamma: rstd * gamma)


# ---------------------------------------------------------------------------------------------- views, of None too
def line_beside(a: Any, n: Any, c: Any, s: Any, size: Any) -> Any:
    """`line_of`, or None."""


@overload(line_beside)
def _choose_line(a, n, c, s, size) -> Callable[..., Any]:
    if a == types.none:
        return lambda a, n, c, s, size: None
    return lambda a, n, c, s, size: line_of(a, n, c, s, size)


def run_beside(a: Any, n: Any, c: Any, first: Any, last: Any, scratch: Any) -> Any:
    """a[n, c, first:last] with adjacent elements, or None."""


@overload(run_beside)
def _choose_run(a, n, c, first, last, scratch) -> Callable[..., Any]:
    if a == types.none:
        return lambda a, n, c, first, last, scratch: None
    return lambda a, n, c, first, last, scratch: gather(plane_of(a, n, c, first, last), scratch)


def scratch_beside(a: Any, size: Any) -> Any:
    """Memory for a run of `a` that is not adjacent in memory."""


@overload(scratch_beside)
def _choose_scratch(a, size) -> Callable[..., Any]:
    if a == types.none:
        return lambda a, size: None
    return lambda a, size: np.empty(0 if a.strides[2] == a.itemsize else size, a.dtype)


def piece_beside(r_scratch: Any, size: Any) -> Any:
    """Values of a run that are done at once: as many as the scratch of the residual has, `size` where it has none."""


@overload(piece_beside)
def _choose_piece(r_scratch, size) -> Callable[..., Any]:
    if r_scratch == types.none:
        return lambda r_scratch, size: size
    return lambda r_scratch, size: r_scratch.size if r_scratch.size else size


def put(row: Any, on: Any, result: Any, a: Any, n: Any, c: Any, s: Any) -> Any:
    """Rounds what `result` lets pass of `row` to a[n, c, s:], 0 where a position does not count; nothing where `a` is None."""


@overload(put)
def _choose_put(row, on, result, a, n, c, s) -> Callable[..., Any]:
    if a == types.none:
        return lambda row, on, result, a, n, c, s: None
    return lambda row, on, result, a, n, c, s: _put(row, on, result, a, n, c, s)


@inline
def _put(row, on, result, a, n, c, s) -> None:
    to = plane_of(a, n, c, s, s + row.size)
    if a.strides[2] == a.itemsize:
        _round(row, on, result, borrowed(to))
    else:
        _round(row, on, result, to)


@inline
def _round(row, on, result, to) -> None:
    for i in range(row.size):
        store(to, i, kept(passed(load(row, i), result, i), on, i))


def put_line(row: Any, result: Any, a: Any, n: Any, c: Any, s: Any) -> Any:
    """Rounds what `result` lets pass of `row` to the line from a[n, c, s] on; nothing where `a` is None."""


@overload(put_line)
def _choose_put_line(row, result, a, n, c, s) -> Callable[..., Any]:
    if a == types.none:
        return lambda row, result, a, n, c, s: None
    return lambda row, result, a, n, c, s: _round(row, None, result, line_of(a, n, c, s, row.size))
