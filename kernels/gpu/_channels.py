"""How the batch normalisation kernels walk (N, C, S): tiles of (samples, channels, lanes), and the ends of rows (`_tile`).

A tile is `at` = (n, head, offset, hi): its samples, the head of each of their rows, its first lane and how many lanes hold
values. The tile of a row's first lanes answers for the row's ends as well: `ends` = (n, position, whether there is one).
"""

import triton
import triton.language as tl

from . import _tile


@triton.jit
def place(c, tile, N, C, S, lane_blocks, stride_n, stride_c,
          BLOCK_N: tl.constexpr, LANES: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """`at` of one tile of the channels c."""
    n = ((tile // lane_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
    offset = (tile % lane_blocks) * LANES
    head = _tile.head_of(n * stride_n + c * stride_c, MODE, GROUP)
    return n, head, offset, _tile.reach(head, offset, S, (n < N) & (c < C), LANES, MODE, GROUP)


@triton.jit
def ends_of(c, at, N, C, S, GROUP: tl.constexpr):
    """`ends` of the rows that begin in the tile; none where none begins."""
    n, head, offset, _ = at
    position, inside = _tile.ends(head, S, (n < tl.where(offset == 0, N, 0)) & (c < C), GROUP)
    return n, position, inside


@triton.jit
def fetch(ptr, c, at, stride_n, stride_c, stride_s,
          LANES: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The tile's values in ACC, 0 in the lanes that hold none."""
    n, head, offset, hi = at
    lane = tl.arange(0, LANES)[None, None, :]
    return _tile.load(ptr, n * stride_n + c * stride_c, head, offset, lane, hi, stride_s, 0.0, MODE, GROUP, ACC)


@triton.jit
def put(ptr, x, c, at, stride_n, stride_c, stride_s,
        LANES: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    n, head, offset, hi = at
    lane = tl.arange(0, LANES)[None, None, :]
    _tile.store(ptr, n * stride_n + c * stride_c, head, offset, lane, hi, x, stride_s, MODE, GROUP)


@triton.jit
def fetch_ends(ptr, c, ends, stride_n, stride_c, stride_s, ACC: tl.constexpr):
    n, position, inside = ends
    return tl.load(ptr + (n * stride_n + c * stride_c + position * stride_s), mask=inside, other=0.0).to(ACC)


@triton.jit
def put_ends(ptr, x, c, ends, stride_n, stride_c, stride_s):
    n, position, inside = ends
    tl.store(ptr + (n * stride_n + c * stride_c + position * stride_s), x, mask=inside)


@triton.jit
def inside_of(at, LANES: tl.constexpr):
    """Which lanes of the tile hold values."""
    _, _, _, hi = at
    return tl.arange(0, LANES)[None, None, :] < hi


@triton.jit
def count_of(at):
    """How many values the tile has of each channel."""
    _, _, _, hi = at
    return tl.sum(tl.sum(hi, axis=2), axis=0)[None, :, None]


@triton.jit
def count_ends(c, at, N, C, S, GROUP: tl.constexpr):
    """How many values `ends_of` has of each channel."""
    n, head, offset, _ = at
    more = tl.where((n < tl.where(offset == 0, N, 0)) & (c < C), S - _tile.body_of(head, S, _tile.SHIFTED, GROUP), 0)
    return tl.sum(tl.sum(more.to(tl.float32), axis=2), axis=0)[None, :, None]


@triton.jit
def line(x):
    """(1, BLOCK_C, 1) as (BLOCK_C,)."""
    return tl.reshape(x, [x.shape[1]])


@triton.jit
def vector(ptr, channel, C, default: tl.constexpr, ACC: tl.constexpr):
    """One number a channel, `default` where there is none, read one-dimensionally: as a tile every thread would read it."""
    if ptr is None:
        v = tl.full(channel.shape, default, ACC)
    else:
        v = tl.load(ptr + channel, mask=channel < C, other=0.0).to(ACC)
    return v[None, :, None]
