"""The mean and the sum of squared deviations of a channel, and other sums, in two floats (docs/derivations.md, section 2.5).

A sum is two floats, hi + lo. Values are summed as differences from an origin, the mean of the channel's first tile: the squares
lose to cancellation at most the part that this tile is of the channel. Each lane adds up its own values, with what rounding has
lost (Kahan); the lanes are merged once, at the end. Differences are scaled by alpha, and squares therefore by alpha².
Where a mean is not finite it is what a plain sum gives, ±inf or NaN, with lo = 0 and M2 = NaN.
"""

import triton
import triton.language as tl

from .._tile import STRIDED


@triton.jit
def add_pairs(hi, lo, more_hi, more_lo) -> tuple[tl.tensor, tl.tensor]:
    """(hi, lo) of the sum of two numbers hi + lo (Knuth's two-sum)."""
    total = hi + more_hi
    part = total - hi
    return total, ((hi - (total - part)) + (more_hi - part)) + (lo + more_lo)


@triton.jit
def _add_two_pairs(a, a_lo, b, b_lo, c, c_lo, d, d_lo) -> tuple[tl.tensor, ...]:
    """`add_pairs` for two sums at once, as `tl.reduce` combines them."""
    a, a_lo = add_pairs(a, a_lo, c, c_lo)
    b, b_lo = add_pairs(b, b_lo, d, d_lo)
    return a, a_lo, b, b_lo


@triton.jit
def per_channel(sums) -> tuple[tl.tensor, ...]:
    """Merges two sums (a, a_lo, b, b_lo) over the samples and lanes of a tile: (1, BLOCK_C, 1), scalars for a 1-D tile."""
    a, a_lo, b, b_lo = sums
    if len(a.shape) == 1:
        a, a_lo, b, b_lo = tl.reduce((a, a_lo, b, b_lo), 0, _add_two_pairs)
    elif a.shape[1] == 1:
        lanes = (tl.ravel(a), tl.ravel(a_lo), tl.ravel(b), tl.ravel(b_lo))
        a, a_lo, b, b_lo = tl.reduce(lanes, 0, _add_two_pairs)
        one = tl.zeros([1, 1, 1], a.dtype)
        a, a_lo, b, b_lo = one + a, one + a_lo, one + b, one + b_lo
    else:
        a, a_lo, b, b_lo = tl.reduce((a, a_lo, b, b_lo), 2, _add_two_pairs)
        a, a_lo, b, b_lo = tl.reduce((a, a_lo, b, b_lo), 0, _add_two_pairs)
        a, a_lo, b, b_lo = a[None, :, None], a_lo[None, :, None], b[None, :, None], b_lo[None, :, None]
    return a, a_lo, b, b_lo


@triton.jit
def _narrow(sums, WIDTH: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Two sums (a, a_lo, b, b_lo) merged within each thread, WIDTH numbers each."""
    a, a_lo, b, b_lo = sums
    SHAPE: tl.constexpr = [a.numel // WIDTH, WIDTH]
    parts = (tl.reshape(a, SHAPE), tl.reshape(a_lo, SHAPE), tl.reshape(b, SHAPE), tl.reshape(b_lo, SHAPE))
    return tl.reduce(parts, 0, _add_two_pairs)


@triton.jit
def per_channel_with_edges(sums, edges) -> tuple[tl.tensor, ...]:
    """`per_channel` of a tile's sums and of the sums over the rows' edges, which are one-dimensional for a single channel."""
    WIDTH: tl.constexpr = min(min(sums[0].numel, edges[0].numel), 128)
    if len(edges[0].shape) == 1 and WIDTH >= 32:  # one reduction of both
        a, a_lo, b, b_lo = _narrow(sums, WIDTH)
        c, c_lo, d, d_lo = _narrow(edges, WIDTH)
        a, a_lo, b, b_lo = tl.reduce(_add_two_pairs(a, a_lo, b, b_lo, c, c_lo, d, d_lo), 0, _add_two_pairs)
        one = tl.zeros([1, 1, 1], a.dtype)
        a, a_lo, b, b_lo = one + a, one + a_lo, one + b, one + b_lo
    else:
        a, a_lo, b, b_lo = per_channel(sums)
        c, c_lo, d, d_lo = per_channel(edges)
        a, a_lo, b, b_lo = _add_two_pairs(a, a_lo, b, b_lo, c, c_lo, d, d_lo)
    return a, a_lo, b, b_lo


@triton.jit
def splits_of(partial_ptr, channel, C, splits, SPLITS: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Loads what the splits of the channels (BLOCK_C,) have written: four of (SPLITS, BLOCK_C), of one channel (SPLITS,)."""
    split = tl.arange(0, SPLITS)
    if channel.shape[0] == 1:
        at = split * C + tl.max(channel, axis=0)
        there = split < splits
    else:
        at = split[:, None] * C + channel[None, :]
        there = (split < splits)[:, None] & (channel < C)[None, :]
    step = splits.to(tl.int64) * C
    a = tl.load(partial_ptr + at, mask=there, other=0.0)
    b = tl.load(partial_ptr + (at + step), mask=there, other=0.0)
    c = tl.load(partial_ptr + (at + 2 * step), mask=there, other=0.0)
    return a, b, c, tl.load(partial_ptr + (at + 3 * step), mask=there, other=0.0)


@triton.jit
def over_splits(a, a_lo, b, b_lo) -> tuple[tl.tensor, ...]:
    """Merges two sums over the splits: (BLOCK_C,), of one channel scalars."""
    return tl.reduce((a, a_lo, b, b_lo), 0, _add_two_pairs)


@triton.jit
def as_vector(x, channel) -> tl.tensor:
    """(BLOCK_C,) of what `over_splits` gives, which is a scalar for one channel."""
    return tl.zeros(channel.shape, x.dtype) + x


@triton.jit
def plain_sum(x) -> tl.tensor:
    """Σ over the samples and lanes of a tile, a plain tree of additions: (1, BLOCK_C, 1), a scalar for a 1-D tile."""
    if len(x.shape) == 1:
        total = tl.sum(x, axis=0)
    elif x.shape[1] == 1:
        total = tl.zeros([1, 1, 1], x.dtype) + tl.sum(tl.ravel(x), axis=0)
    else:
        total = tl.sum(tl.sum(x, axis=2), axis=0)[None, :, None]
    return total


@triton.jit
def plain_sum_with_edges(x, edges) -> tl.tensor:
    """`plain_sum` of a tile and of its rows' edges together."""
    WIDTH: tl.constexpr = min(min(x.numel, edges.numel), 128)
    if len(edges.shape) == 1 and WIDTH >= 32:
        x = tl.sum(tl.reshape(x, [x.numel // WIDTH, WIDTH]), axis=0)
        x += tl.sum(tl.reshape(edges, [edges.numel // WIDTH, WIDTH]), axis=0)
        total = plain_sum(x)
    else:
        total = plain_sum(x) + plain_sum(edges)
    return total


@triton.jit
def halved_lanes(x, HALVINGS: tl.constexpr, MODE: tl.constexpr) -> tl.tensor:
    """A tile with its lanes halved HALVINGS times, two values added each time: values of one thread, so that none waits.

    They are neighbours along the lanes, or, where lanes are strided (channels-last), half a tile apart.
    """
    for _ in tl.static_range(HALVINGS):
        if MODE == STRIDED:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], 2, x.shape[2] // 2]), axis=2)
        else:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]), axis=3)
    return x


@triton.jit
def compensated_add(total, lost, x) -> tuple[tl.tensor, tl.tensor]:
    """Kahan's step in each lane: (total + x, what rounding has lost so far, to be subtracted from the next x)."""
    x = x - lost
    new = total + x
    return new, (new - total) - x


@triton.jit
def finite_or_zero(x) -> tl.tensor:
    """x, and 0 where it is infinite or NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def renewed(hi, lo) -> tuple[tl.tensor, tl.tensor]:
    """(hi, lo) of hi + lo, with |lo| at most half a unit of hi; where hi is not finite it stays, with lo = 0."""
    total = hi + tl.where(tl.abs(hi) < float("inf"), lo, 0.0)
    return total, tl.where(tl.abs(total) < float("inf"), lo - (total - hi), 0.0)


@triton.jit
def first_mean(x, inside, edges, edges_inside, count, first) -> tl.tensor:
    """A finite number near the mean of the `count` values of each channel in a tile and its rows' edges.

    first: a value of each channel. Values are summed as differences from it, so that a constant channel's mean is exact. edges:
    None where there are none.
    """
    first = finite_or_zero(first)
    x = tl.where(inside, x - first, 0.0)
    if edges is None:
        total = plain_sum(x)
    else:
        one = first if len(edges.shape) > 1 else tl.max(tl.ravel(first), axis=0)
        total = plain_sum_with_edges(x, tl.where(edges_inside, edges - one, 0.0))
    return finite_or_zero(first + total / tl.maximum(count, 1.0))


@triton.jit
def started(d, HALVINGS: tl.constexpr, MODE: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The sums of a first tile of differences d, lane by lane: (Σ d, its lost part, Σ d², its lost part)."""
    total, squares = halved_lanes(d, HALVINGS, MODE), halved_lanes(d * d, HALVINGS, MODE)
    return total, tl.zeros_like(total), squares, tl.zeros_like(squares)


@triton.jit
def continued(sums, d, HALVINGS: tl.constexpr, MODE: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The sums after one more tile of differences d. The lost part of Σ d is kept apart: infinities make it NaN."""
    total, lost, squares, lost_squares = sums
    more = halved_lanes(d, HALVINGS, MODE)
    total, lost = add_pairs(total, lost, more, 0.0)
    squares, lost_squares = compensated_add(squares, lost_squares, halved_lanes(d * d, HALVINGS, MODE))
    return total, lost, squares, lost_squares


@triton.jit
def moments(sums, count, origin, alpha) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(mean hi, mean lo, alpha² M2) of `count` values; sums: of alpha (x - origin) and of its square. M2 = Σ (x - mean)²."""
    hi, lo, squares, squares_lo = sums
    lo = tl.where(tl.abs(hi) < float("inf"), lo, 0.0)
    count = tl.maximum(count, 1.0)
    u = hi / count
    rest = tl.fma(-u, count, hi)  # hi = u count + rest
    product = u * hi
    M2 = (squares - product) + (squares_lo - tl.fma(u, hi, -product) - u * (rest + 2.0 * lo))
    u_lo = ((rest + lo) / count) / alpha
    u /= alpha
    moved = origin + u
    hi, lo = renewed(moved, (u - (moved - origin)) + u_lo)
    return hi, lo, M2
