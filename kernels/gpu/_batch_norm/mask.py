"""The mask of the activation: one bit for each value of (N, C, S), set where relu let it through.

Each row has its own bytes: one for every 8 lanes of its body, least bit first, then two for its edges (`_tile`). A mask is
(pointer, stride_n, stride_c, stride_b); stride_b is between the bytes of a row. It must be read with the strides and address of
the x that it was written with: they decide where the body of a row begins.
"""

import triton
import triton.language as tl

from .tiles import groups_of_8, rows_of_tile, scalar_if_one


@triton.jit
def _bytes_at(mask, c, at, layout, LANES: tl.constexpr, FLAT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(pointers, mask) of a tile's bytes: (samples, channels, bytes)."""
    ptr, stride_n, stride_c, stride_b = mask
    n, _, offset, hi = at
    b = tl.arange(0, (LANES + 7) // 8)[None, None, :]
    there = 8 * b < hi
    if FLAT:
        n, b = groups_of_8(0, layout[4], hi.shape[0])
        n, b = n[:, None, None].to(tl.int64), b[:, None, None]
    else:
        b += offset // 8
    return ptr + (n * stride_n + c * stride_c + b * stride_b), there


@triton.jit
def _packed(on, WIDTH: tl.constexpr) -> tl.tensor:
    """Packs each WIDTH booleans along the last axis into a byte."""
    if len(on.shape) == 1:
        bits = tl.reshape(on.to(tl.int32), [on.shape[0] // WIDTH, WIDTH])
        packed = tl.sum(bits << tl.arange(0, WIDTH)[None, :], axis=1)
    else:
        bits = tl.reshape(on.to(tl.int32), [on.shape[0], on.shape[1], on.shape[2] // WIDTH, WIDTH])
        packed = tl.sum(bits << tl.arange(0, WIDTH)[None, None, None, :], axis=3)
    return packed.to(tl.uint8)


@triton.jit
def unpacked(packed, WIDTH: tl.constexpr) -> tl.tensor:
    """Unpacks each byte into WIDTH booleans along the last axis."""
    packed = packed.to(tl.int32)
    if len(packed.shape) == 1:
        bits = (packed[:, None] >> tl.arange(0, WIDTH)[None, :]) & 1
        bits = tl.reshape(bits, [packed.shape[0] * WIDTH])
    else:
        bits = (packed[:, :, :, None] >> tl.arange(0, WIDTH)[None, None, None, :]) & 1
        bits = tl.reshape(bits, [packed.shape[0], packed.shape[1], packed.shape[2] * WIDTH])
    return bits != 0


@triton.jit
def store_bits(mask, on, c, at, layout, LANES: tl.constexpr, FLAT: tl.constexpr) -> None:
    """Stores the bits of a tile."""
    where, there = _bytes_at(mask, c, at, layout, LANES, FLAT)
    tl.store(where, _packed(on, 8 if LANES >= 8 else LANES), mask=there)


@triton.jit
def load_bits(mask, c, at, layout, LANES: tl.constexpr, FLAT: tl.constexpr) -> tl.tensor:
    """Loads the bits of a tile as booleans."""
    where, there = _bytes_at(mask, c, at, layout, LANES, FLAT)
    return unpacked(tl.load(where, mask=there, other=0), 8 if LANES >= 8 else LANES)


@triton.jit
def _edge_bytes_at(mask, c, tile, layout, ROWS: tl.constexpr, GROUP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(pointers, mask) of the bytes for the edges of the rows that begin in a tile."""
    ptr, stride_n, stride_c, stride_b = mask
    n, begins, b = rows_of_tile(tile, layout, ROWS, (2 * GROUP + 7) // 8, c.shape[1] == 1)
    c = scalar_if_one(c)
    return ptr + (n * stride_n + c * stride_c + ((layout[2] + 7) // 8 + b) * stride_b), begins & (c < layout[1])


@triton.jit
def store_edge_bits(mask, on, c, tile, layout, ROWS: tl.constexpr, GROUP: tl.constexpr) -> None:
    """Stores the bits of the rows' edges."""
    where, there = _edge_bytes_at(mask, c, tile, layout, ROWS, GROUP)
    tl.store(where, _packed(on, 8 if GROUP >= 4 else 2 * GROUP), mask=there)


@triton.jit
def load_edge_bits(mask, c, tile, layout, ROWS: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """Loads the bits of the rows' edges as booleans."""
    where, there = _edge_bytes_at(mask, c, tile, layout, ROWS, GROUP)
    return unpacked(tl.load(where, mask=there, other=0), 8 if GROUP >= 4 else 2 * GROUP)
