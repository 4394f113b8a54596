"""The positions that count where a mask is given: bit n S + s of the bytes at `valid`, least bit first, for all channels.

A row of x may begin at any bit, and its body at any lane (`_tile`): the bits of 8 lanes come from two neighbouring bytes. One
byte follows the last. Lanes beyond a row's end have no bit set, so that the bits stand for `inside_of` too. No FLAT tiles.
"""

import triton
import triton.language as tl

from .. import _tile
from .mask import unpacked
from .statistics import plain_sum
from .tiles import address_of, tile_after, tile_at


@triton.jit
def count_of(m, ACC: tl.constexpr) -> tl.tensor:
    """How many values a channel has: m, or the number at m where that is a pointer, because some do not count."""
    if m.dtype.is_ptr():
        m = tl.load(m)
    return tl.cast(m, ACC)


@triton.jit
def divisor_of(m, ACC: tl.constexpr) -> tl.tensor:
    """`count_of`, and 1 where no value counts."""
    count = count_of(m, ACC)
    if m.dtype.is_ptr():
        count = tl.maximum(count, 1.0)
    return count


@triton.jit
def _bit_is_set(valid, bit, there) -> tl.tensor:
    """The bits with these numbers as booleans; False where `there` is."""
    byte = tl.load(valid + (bit >> 3), mask=there, other=0).to(tl.int32)
    return ((byte >> (bit & 7).to(tl.int32)) & 1) != 0


@triton.jit
def load_valid_bytes(valid, at, layout, LANES: tl.constexpr, MODE: tl.constexpr) -> tl.tensor:
    """Loads the bits of a tile, 8 lanes a byte: (samples, channels or 1, bytes) int32. Of rows that all begin alike the
    channels share them."""
    n, head, offset, hi = at
    b = 8 * tl.arange(0, (LANES + 7) // 8)[None, None, :]
    if MODE == _tile.SHIFTED:
        start = n * layout[2] + (head + offset)
    else:
        start = n * layout[2] + offset
        hi = tl.minimum(tl.maximum(tl.where(n < layout[0], layout[2] - offset, 0), 0), LANES).to(tl.int32)
    bit = start + b
    skipped, lanes = (bit & 7).to(tl.int32), tl.minimum(tl.maximum(hi - b, 0), 8)
    low = tl.load(valid + (bit >> 3), mask=lanes > 0, other=0).to(tl.int32)
    high = tl.load(valid + ((bit >> 3) + 1), mask=skipped + lanes > 8, other=0).to(tl.int32)
    return ((low | (high << 8)) >> skipped) & ((1 << lanes) - 1)


@triton.jit
def load_valid(valid, at, layout, LANES: tl.constexpr, FLAT: tl.constexpr, MODE: tl.constexpr) -> tl.tensor:
    """Loads the bits of a tile as booleans, as they broadcast against it."""
    tl.static_assert(not FLAT)
    return unpacked(load_valid_bytes(valid, at, layout, LANES, MODE), 8 if LANES >= 8 else LANES)


@triton.jit
def load_valid_edges(valid, edges, layout) -> tl.tensor:
    """Loads the bits of rows' edges as booleans."""
    n, position, inside = edges
    return _bit_is_set(valid, n * layout[2] + position, inside)


@triton.jit
def chosen(valid, values, other, at, layout, LANES: tl.constexpr, FLAT: tl.constexpr, MODE: tl.constexpr) -> tl.tensor:
    """A tile's values, `other` where a position does not count; as they are where `valid` is None."""
    if valid is not None:
        values = tl.where(load_valid(valid, at, layout, LANES, FLAT, MODE), values, other)
    return values


@triton.jit
def chosen_edges(valid, values, other, edges, layout) -> tl.tensor:
    """`chosen` for the values of rows' edges."""
    if valid is not None:
        values = tl.where(load_valid_edges(valid, edges, layout), values, other)
    return values


@triton.jit
def bits_set(packed) -> tl.tensor:
    """How many bits of each byte are set."""
    packed = packed - ((packed >> 1) & 0x55)
    packed = (packed & 0x33) + ((packed >> 2) & 0x33)
    return (packed + (packed >> 4)) & 0xF


@triton.jit
def total_of(counted, counted_edges, c, ACC: tl.constexpr) -> tl.tensor:
    """The number of values of each channel (1, BLOCK_C, 1) from numbers lane by lane; counted_edges: None where there are
    none."""
    total = tl.zeros(c.shape, ACC) + plain_sum(counted).to(ACC)
    if counted_edges is not None:
        total += plain_sum(counted_edges).to(ACC)
    return total


@triton.jit
def first_is_valid(valid, tile, layout, LANES: tl.constexpr) -> tl.tensor:
    """True where the first position of a tile counts."""
    position = tl.minimum(tile[1].to(tl.int64) * LANES, layout[2] - 1)
    return _bit_is_set(valid, tile[0] * layout[2] + position, True)


@triton.jit
def fullest_tile(
    valid, c, first, stop, layout, BLOCK_N: tl.constexpr, LANES: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr
) -> tl.tensor:
    """The first tile of first…stop-1 of whose lanes half count, else the one in which most do.

    Its mean is the origin of the sums: that of a few values could be far from the others, and squares would lose their digits.
    """
    number = first.to(tl.int32)
    best, most = number, tl.zeros([], tl.int32) - 1
    while (number < stop) & (2 * most < BLOCK_N * LANES):
        at = address_of(c, tile_at(number, layout, BLOCK_N), layout, BLOCK_N, LANES, False, MODE, GROUP)
        count = tl.sum(tl.ravel(bits_set(load_valid_bytes(valid, at, layout, LANES, MODE))), axis=0)
        best = tl.where(count > most, number, best)
        most = tl.maximum(count, most)
        number += 1
    return best


@triton.jit
def tile_around(tile, number, first, stop, layout, BLOCK_N: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(sample, number along the lanes) of the tile after tile `number`, which of the last is `first`; and its number."""
    n, block = tile_after(tile, layout, BLOCK_N)
    first_n, first_block = tile_at(first, layout, BLOCK_N)
    last = number + 1 == stop
    return tl.where(last, first_n, n), tl.where(last, first_block, block), tl.where(last, first, number + 1).to(tl.int32)
