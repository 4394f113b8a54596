"""What follows batch normalisation, in one pass: a residual is added, then a ReLU with its mask, one bit a value.

    finish         y = values + residual; with a mask y = relu(y), and the bit of a value is set where it is above 0 or NaN
    let_through    out = dy where the bit is set, else 0

Arrays are (1, 1, size), their values adjacent and in one order. The mask is bytes, in pieces: each stands for RUN values that
follow one another, the last for what is left. Bit j of byte i of a piece of B bytes is value j B + i: a byte gathers values
that lie B apart, so that packing and unpacking are loops over whole vectors of neighbours. A residual, a mask or a y that is
not given is empty.
"""

from __future__ import annotations

import numpy as np

from .._numba.compile import inline, kernel
from .._numba.elements import load, store
from .._numba.views import line_of

# Values of a piece.
RUN = 512


def pieces(size: int) -> int:
    return -(-size // RUN)


def mask_size(size: int) -> int:
    """Bytes of the mask of so many values."""
    return (size + 7) // 8


@inline
def _bits_of(mask, piece, size) -> np.ndarray:
    return line_of(mask, 0, 0, piece * (RUN // 8), (size + 7) // 8)


@inline
def _put_bits(on, size, bits) -> None:
    """on[:size], 0 or 1 each, as bits; `on` holds 8 a byte."""
    B = bits.size
    for p in range(size, 8 * B):
        on[p] = 0
    for i in range(B):
        low = on[i] | (on[B + i] << 1) | (on[2 * B + i] << 2) | (on[3 * B + i] << 3)
        high = on[4 * B + i] | (on[5 * B + i] << 1) | (on[6 * B + i] << 2) | (on[7 * B + i] << 3)
        bits[i] = low | (high << 4)


@inline
def _add(values, residual) -> None:
    for i in range(values.size):
        store(values, i, load(values, i) + load(residual, i))


@inline
def _add_relu(values, residual, zero, on) -> None:
    """NaN passes, as in PyTorch."""
    for i in range(values.size):
        value = load(values, i) + load(residual, i)
        passes = not value <= zero
        on[i] = passes
        store(values, i, value if passes else zero)


@kernel
def finish(first, last, values, residual, mask, zero, y) -> None:
    """Pieces first…last-1 of `values` in place, then rounded to y where it is given."""
    on, none = np.empty(RUN, np.uint8), np.zeros((1, 1, 0 if residual.size else RUN), residual.dtype)
    for piece in range(first, last):
        size = min(RUN, values.size - piece * RUN)
        line = line_of(values, 0, 0, piece * RUN, size)
        added = line_of(residual, 0, 0, piece * RUN, size) if residual.size else line_of(none, 0, 0, 0, size)
        if mask.size:
            _add_relu(line, added, zero, on)
            _put_bits(on, size, _bits_of(mask, piece, size))
        else:
            _add(line, added)
        if y.size:
            rounded = line_of(y, 0, 0, piece * RUN, size)
            for i in range(size):
                store(rounded, i, load(line, i))


@inline
def _masked(dy, bits, out) -> None:
    B, zero = bits.size, dy.dtype.type(0)
    for j in range(8):
        bit, start = np.uint8(1 << j), j * B
        for i in range(min(B, dy.size - start)):
            p = np.uintp(start + i)  # unsigned: a signed one is asked each time whether it counts from the end
            value = dy[p]
            out[p] = value if bits[i] & bit != 0 else zero


@kernel
def let_through(first, last, dy, mask, out) -> None:
    """Pieces first…last-1."""
    for piece in range(first, last):
        size = min(RUN, dy.size - piece * RUN)
        dy_line, out_line = line_of(dy, 0, 0, piece * RUN, size), line_of(out, 0, 0, piece * RUN, size)
        _masked(dy_line, _bits_of(mask, piece, size), out_line)
