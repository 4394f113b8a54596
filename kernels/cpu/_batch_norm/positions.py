"""The positions that count, where a mask is given: shared by the loops over planes and over rows of channels.

`on` is None where every position counts, so that a kernel without a mask is compiled as if there were none; else it is an array
(1, N, S) with a byte a position, 1 where it counts and 0 elsewhere, the same for all channels. Sums leave out the others,
results are 0 there, and nothing of x or dy reaches them, NaN and infinities included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from .._numba.compile import inline, overload
from .._numba.elements import bits, from_bits
from .._numba.simd import lanes_where
from .._numba.views import line_of

# How many positions of a run count.
NONE, SOME, ALL = range(3)


# ---------------------------------------------------------------------------------------------- one number, one vector
def kept(value: Any, on: Any, i: Any) -> Any:
    """`value` where on[i] is 1, else 0; `on` is a run of bytes or None."""


@overload(kept)
def _choose_kept(value, on, i) -> Callable[..., Any]:
    if on == types.none:
        return lambda value, on, i: value
    # all its bits or none of them: a condition would keep LLVM from making vectors of the loop
    integer = np.int64 if value == types.float64 else np.int32
    return lambda value, on, i: from_bits(integer(bits(value) & -integer(on[np.uintp(i)])))


def kept_lanes(v: Any, on: Any, i: Any, exist: Any) -> Any:
    """The vector `v` where on[i : i + exist] is 1, else 0."""


@overload(kept_lanes)
def _choose_kept_lanes(v, on, i, exist) -> Callable[..., Any]:
    if on == types.none:
        return lambda v, on, i, exist: v
    return lambda v, on, i, exist: lanes_where(on, i, exist, v)


# ---------------------------------------------------------------------------------------------- a run of positions
def share_of(on: Any) -> Any:
    """NONE, SOME or ALL of a run count."""


@overload(share_of)
def _choose_share_of(on) -> Callable[..., Any]:
    return (lambda on: ALL) if on == types.none else (lambda on: _share_of(on))


@inline
def _share_of(on) -> int:
    one, every = np.uint8(0), np.uint8(1)
    for i in range(on.size):
        one, every = np.uint8(one | on[np.uintp(i)]), np.uint8(every & on[np.uintp(i)])
    return int(one) + int(every)


def run_of_rows(on: Any, v: Any, end: Any) -> Any:
    """Whether row v (sample v // S, position v % S) counts, and the first row after it, below `end`, that does otherwise."""


@overload(run_of_rows)
def _choose_run_of_rows(on, v, end) -> Callable[..., Any]:
    return (lambda on, v, end: (True, end)) if on == types.none else (lambda on, v, end: _run_of_rows(on, v, end))


@inline
def _run_of_rows(on, v, end) -> tuple[bool, int]:
    flags = line_of(on, 0, 0, 0, on.size)
    first = flags[np.uintp(v)]
    while v < end and flags[np.uintp(v)] == first:
        v += 1
    return first != 0, v


# ---------------------------------------------------------------------------------------------- all positions
def counts(on: Any, n: Any, s: Any) -> Any:
    """True where position s of sample n counts."""


@overload(counts)
def _choose_counts(on, n, s) -> Callable[..., Any]:
    return (lambda on, n, s: True) if on == types.none else (lambda on, n, s: on[0, n, s] != 0)


def values_of_channel(x: Any, on: Any) -> Any:
    """m, the number of values of a channel, as a float; 1 at least where a mask is given."""


@overload(values_of_channel)
def _choose_values_of_channel(x, on) -> Callable[..., Any]:
    if on == types.none:
        return lambda x, on: np.float64(x.shape[0] * x.shape[2])
    return lambda x, on: max(np.float64(_count(line_of(on, 0, 0, 0, on.size))), 1.0)


@inline
def _count(on) -> int:
    count = 0
    for i in range(on.size):
        count += on[np.uintp(i)]
    return count
