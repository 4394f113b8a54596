"""Tiles of (N, C, S) for the kernels of batch normalisation: (samples, channels, lanes), and the edges of rows (`_tile`).

The kernels pass these tuples on:

    tensor  (pointer, stride_n, stride_c, stride_s)
    walk    (N, C, S, lane_blocks, row_lanes, stride_xn, stride_xc, stride_xs), which all tensors of a kernel share
    tile    (its first sample, its number along the lanes): a loop steps from one tile to the next, since a division in each
            step would take longer than the sum of the tile's values
    at      where a tile's values are: (n, head, offset, hi), its samples, the head of each of their rows, its first lane, and
            how many lanes of each row hold values
    edges   (n, position, mask) of the edges of the rows that begin in a tile: the tile with a row's first lanes reads them

The edges of a single channel are one-dimensional, ROWS times 2 GROUP lanes, and the channel's numbers are scalars
(`scalar_if_one`): with columns of the tile's shape the compiler would give the edges the layout of the body, many lanes in
every thread.

A FLAT tile is one whole channel whose rows would not fit one program if each were padded to a power of two. Each row is cut
into groups of 8 lanes, and the groups of all rows stand one after the other: BLOCK_N groups, LANES = 8. All tensors have the
strides of x, and a channel spans less than 2³⁰ elements. Then at = (the channel's first element, the offset of each group from
it in 32 bits, the first lane of each group in its row, hi).
"""

import triton
import triton.language as tl

from .. import _tile


@triton.jit
def tile_at(number, layout, BLOCK_N: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The tile with this number; tiles of the same samples follow each other."""
    number = number.to(tl.int32)
    return (number // layout[3]).to(tl.int64) * BLOCK_N, (number % layout[3]).to(tl.int32)


@triton.jit
def tile_after(tile, layout, BLOCK_N: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The next tile."""
    n, block = tile
    last = block + 1 == layout[3]
    return tl.where(last, n + BLOCK_N, n), tl.where(last, 0, block + 1)


@triton.jit
def tile_before(tile, layout, BLOCK_N: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The tile before."""
    n, block = tile
    first = block == 0
    return tl.where(first, n - BLOCK_N, n), tl.where(first, layout[3] - 1, block - 1).to(tl.int32)


@triton.jit
def address_of(c, tile, layout, BLOCK_N: tl.constexpr, LANES: tl.constexpr, FLAT: tl.constexpr,
          MODE: tl.constexpr, GROUP: tl.constexpr) -> tuple[tl.tensor, ...]:  # fmt: skip
    """`at` of a tile of the channels c."""
    N, C, S, _, row_lanes, stride_n, stride_c, stride_s = layout
    if FLAT:
        n, offset = groups_of_8(tile[1], row_lanes, BLOCK_N)
        n, offset = n[:, None, None], 8 * offset[:, None, None]
        start, row = c * stride_c, n * stride_n
        if MODE == _tile.SHIFTED:
            row += (start % GROUP).to(tl.int32)
        head = _tile.head_of(row, MODE, GROUP)
        if MODE == _tile.STRIDED:
            element = row + offset * stride_s
        else:
            start = start // GROUP * GROUP
            element = (row + head) // GROUP * GROUP + offset
        at = start, element, offset, _tile.count_in_tile(head, offset, S, n < N, LANES, MODE, GROUP)
    else:
        n = (tile[0] + tl.arange(0, BLOCK_N).to(tl.int64))[:, None, None]
        offset = tl.cast(tile[1], tl.int64) * LANES
        head = _tile.head_of(n * stride_n + c * stride_c, MODE, GROUP)
        at = n, head, offset, _tile.count_in_tile(head, offset, S, (n < N) & (c < C), LANES, MODE, GROUP)
    return at


@triton.jit
def groups_of_8(tile, row_lanes, BLOCK_N: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(row, number in the row) of each group of 8 lanes of a FLAT tile. A channel is one such tile, so `tile` is 0."""
    eight = tile + tl.arange(0, BLOCK_N)
    n = eight // (row_lanes // 8)
    return n, eight - n * (row_lanes // 8)


@triton.jit
def scalar_if_one(x) -> tl.tensor:
    """Numbers a channel: (1, BLOCK_C, 1) unchanged, and (1, 1, 1) as a scalar."""
    if x.shape[1] == 1:
        x = tl.max(tl.ravel(x), axis=0)
    return x


@triton.jit
def rows_of_tile(
    tile, layout, ROWS: tl.constexpr, WIDTH: tl.constexpr, ONE_CHANNEL: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(n, mask of the rows that begin in the tile, k) of WIDTH lanes k a row of the tile; one-dimensional where ONE_CHANNEL."""
    if ONE_CHANNEL:
        k = tl.arange(0, ROWS * WIDTH)
        n, k = tile[0] + (k // WIDTH).to(tl.int64), k % WIDTH
    else:
        n, k = (tile[0] + tl.arange(0, ROWS).to(tl.int64))[:, None, None], tl.arange(0, WIDTH)[None, None, :]
    return n, n < tl.where(tile[1] == 0, layout[0], 0), k


@triton.jit
def edges_of(c, tile, layout, ROWS: tl.constexpr, GROUP: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """`edges` of the rows that begin in the tile; the mask is false for the others."""
    n, begins, k = rows_of_tile(tile, layout, ROWS, 2 * GROUP, c.shape[1] == 1)
    c = scalar_if_one(c)
    head = _tile.head_of(n * layout[5] + c * layout[6], _tile.SHIFTED, GROUP)
    position, inside = _tile.edge_of(k, head, layout[2], begins & (c < layout[1]), GROUP)
    return n, position, inside


@triton.jit
def _flat(x, at, LANES: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(pointers, mask) of the values of a FLAT tile."""
    ptr, _, _, stride_s = x
    start, element, _, hi = at
    lane = tl.arange(0, LANES)[None, None, :]
    step = lane * stride_s if MODE == _tile.STRIDED else lane
    return ptr + start + (element + step), _tile.inside(lane, hi, MODE, GROUP)


@triton.jit
def load_tile(
    x, c, at, other, LANES: tl.constexpr, FLAT: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr
) -> tl.tensor:
    """Loads a tile in the dtype ACC, `other` in lanes without a value."""
    ptr, stride_n, stride_c, stride_s = x
    if FLAT:
        where, inside = _flat(x, at, LANES, MODE, GROUP)
        values = tl.load(where, mask=inside, other=other).to(ACC)
    else:
        n, head, offset, hi = at
        lane = tl.arange(0, LANES)[None, None, :]
        values = _tile.load(ptr, n * stride_n + c * stride_c, head, offset, lane, hi, stride_s, other, MODE, GROUP, ACC)
    return values


@triton.jit
def store_tile(x, values, c, at, LANES: tl.constexpr, FLAT: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr) -> None:
    """Stores a tile."""
    ptr, stride_n, stride_c, stride_s = x
    if FLAT:
        where, inside = _flat(x, at, LANES, MODE, GROUP)
        tl.store(where, values, mask=inside)
    else:
        n, head, offset, hi = at
        lane = tl.arange(0, LANES)[None, None, :]
        _tile.store(ptr, n * stride_n + c * stride_c, head, offset, lane, hi, values, stride_s, MODE, GROUP)


@triton.jit
def load_edges(x, c, edges, other, ACC: tl.constexpr) -> tl.tensor:
    """Loads the rows' edges in the dtype ACC, `other` in lanes without a value."""
    ptr, stride_n, stride_c, stride_s = x
    n, position, inside = edges
    return tl.load(ptr + (n * stride_n + scalar_if_one(c) * stride_c + position * stride_s), mask=inside, other=other).to(ACC)


@triton.jit
def store_edges(x, values, c, edges) -> None:
    """Stores the rows' edges."""
    ptr, stride_n, stride_c, stride_s = x
    n, position, inside = edges
    tl.store(ptr + (n * stride_n + scalar_if_one(c) * stride_c + position * stride_s), values, mask=inside)


@triton.jit
def inside_of(at, LANES: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """Mask of the lanes of a tile that hold values."""
    _, _, _, hi = at
    return _tile.inside(tl.arange(0, LANES)[None, None, :], hi, MODE, GROUP)


@triton.jit
def count_between(first, stop, c, layout, BLOCK_N: tl.constexpr, LANES: tl.constexpr, FLAT: tl.constexpr,
                  MODE: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:  # fmt: skip
    """How many values each channel has in the tiles from `first` up to but not `stop`, edges included: (1, BLOCK_C, 1)."""
    N, _, S, lane_blocks, _, _, _, _ = layout
    if FLAT:
        count = tl.zeros(c.shape, tl.int64) + N * S
    else:
        count = tl.zeros(c.shape, tl.int64) + (tl.minimum(stop[0], N) - tl.minimum(first[0], N)) * S
        if lane_blocks > 1:
            count += _begun(stop, c, layout, BLOCK_N, LANES, MODE, GROUP) - _begun(
                first, c, layout, BLOCK_N, LANES, MODE, GROUP
            )
    return count


@triton.jit
def _begun(tile, c, layout, BLOCK_N: tl.constexpr, LANES: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """How many values of a tile's rows lie in the tiles before it: whole tiles of the rows' bodies, and all their edges."""
    N, _, S, _, _, stride_n, stride_c, _ = layout
    n, block = tile[0] + tl.arange(0, BLOCK_N).to(tl.int64)[:, None, None], tl.cast(tile[1], tl.int64)
    head = _tile.head_of(n * stride_n + c * stride_c, MODE, GROUP)
    of_row = block * LANES + (S - _tile.body_of(head, S, MODE, GROUP))
    return tl.sum(tl.sum(tl.where((n < N) & (block > 0), of_row, 0), axis=2), axis=0)[None, :, None]


@triton.jit
def line(x) -> tl.tensor:
    """(1, BLOCK_C, 1) as (BLOCK_C,)."""
    return tl.reshape(x, [x.shape[1]])


@triton.jit
def vector(ptr, channel, C, default: tl.constexpr, ACC: tl.constexpr) -> tl.tensor:
    """One number a channel as (1, BLOCK_C, 1); `default` where ptr is None. Read as (BLOCK_C,): in the tile's shape every
    thread would read it."""
    if ptr is None:
        v = tl.full(channel.shape, default, ACC)
    else:
        v = tl.load(ptr + channel, mask=channel < C, other=0.0).to(ACC)
    return v[None, :, None]
