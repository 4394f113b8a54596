"""One bit for each value of (N, C, S), set where an activation let it through.

A mask is bytes, in pieces: each piece stands for values that one loop goes through, up to 8 for each of its B bytes. Bit j of
byte i is value j B + i: a byte gathers values that lie B apart, so that packing and unpacking are loops over whole vectors
of neighbours. `planes_fused.py` and `lines_fused.py` say which values make up a piece.
"""

from __future__ import annotations

import numpy as np

from .._numba.compile import inline
from .._numba.views import line_of


@inline
def bytes_for(size):
    return (size + 7) // 8


@inline
def bits_at(mask, at, size):
    """The bytes of a piece of `size` values. mask (1, 1, bytes)."""
    return line_of(mask, 0, 0, at, bytes_for(size))


@inline
def put_bits(on, size, bits):
    """on[:size], 0 or 1 each, as bits; `on` has room for 8 a byte."""
    B = bits.size
    for p in range(size, 8 * B):
        on[p] = 0
    for i in range(B):
        low = on[i] | (on[B + i] << 1) | (on[2 * B + i] << 2) | (on[3 * B + i] << 3)
        high = on[4 * B + i] | (on[5 * B + i] << 1) | (on[6 * B + i] << 2) | (on[7 * B + i] << 3)
        bits[i] = low | (high << 4)


@inline
def let_through(dy, bits, out):
    """out = dy where its bit is set, else 0."""
    B, none = bits.size, dy.dtype.type(0)
    for j in range(8):
        bit, start = np.uint8(1 << j), j * B
        for i in range(min(B, dy.size - start)):
            p = np.uintp(start + i)  # unsigned: a signed one is asked each time whether it counts from the end
            value = dy[p]
            out[p] = value if bits[i] & bit != 0 else none
