"""Mean and squared deviations of a channel, and other sums, in two floats (docs/derivations.md, section 2.5).

A mean is two floats, hi + lo. Values are summed about an origin, the mean of the first tile: what the squares lose to
cancellation is at most the part that this tile is of all. Each lane adds up its own values, with what its rounding lost; the
lanes meet once, at the end, as two floats each. Differences from the origin are scaled by alpha, squares thus by its square.
A mean that is no finite number is what a sum gives: infinite, NaN where both infinities or a NaN come; its lo is 0, its M2 NaN.
"""

import triton
import triton.language as tl

from .._tile import STRIDED


@triton.jit
def joined(hi, lo, more_hi, more_lo):
    """The sum of two sums, each hi + lo."""
    total = hi + more_hi
    part = total - hi
    return total, ((hi - (total - part)) + (more_hi - part)) + (lo + more_lo)


@triton.jit
def _both_joined(a, a_lo, b, b_lo, c, c_lo, d, d_lo):
    a, a_lo = joined(a, a_lo, c, c_lo)
    b, b_lo = joined(b, b_lo, d, d_lo)
    return a, a_lo, b, b_lo


@triton.jit
def per_channel(sums):
    """(hi, lo) of each of two sums (a, a_lo, b, b_lo) over samples and lanes of a tile; scalars of a one-dimensional one."""
    a, a_lo, b, b_lo = sums
    if len(a.shape) == 1:
        a, a_lo, b, b_lo = tl.reduce((a, a_lo, b, b_lo), 0, _both_joined)
    elif a.shape[1] == 1:
        lanes = (tl.ravel(a), tl.ravel(a_lo), tl.ravel(b), tl.ravel(b_lo))
        a, a_lo, b, b_lo = tl.reduce(lanes, 0, _both_joined)
        one = tl.zeros([1, 1, 1], a.dtype)
        a, a_lo, b, b_lo = one + a, one + a_lo, one + b, one + b_lo
    else:
        a, a_lo, b, b_lo = tl.reduce((a, a_lo, b, b_lo), 2, _both_joined)
        a, a_lo, b, b_lo = tl.reduce((a, a_lo, b, b_lo), 0, _both_joined)
        a, a_lo, b, b_lo = a[None, :, None], a_lo[None, :, None], b[None, :, None], b_lo[None, :, None]
    return a, a_lo, b, b_lo


@triton.jit
def _narrow(sums, WIDTH: tl.constexpr):
    """Two sums (a, a_lo, b, b_lo) of the values that a thread holds, WIDTH of them."""
    a, a_lo, b, b_lo = sums
    SHAPE: tl.constexpr = [a.numel // WIDTH, WIDTH]
    parts = (tl.reshape(a, SHAPE), tl.reshape(a_lo, SHAPE), tl.reshape(b, SHAPE), tl.reshape(b_lo, SHAPE))
    return tl.reduce(parts, 0, _both_joined)


@triton.jit
def per_channel_with_ends(sums, ends):
    """As `per_channel`, with the sums over the ends of rows (`tiles`), which are one-dimensional for one channel."""
    WIDTH: tl.constexpr = min(min(sums[0].numel, ends[0].numel), 128)
    if len(ends[0].shape) == 1 and WIDTH >= 32:  # one reduction of both
        a, a_lo, b, b_lo = _narrow(sums, WIDTH)
        c, c_lo, d, d_lo = _narrow(ends, WIDTH)
        a, a_lo, b, b_lo = tl.reduce(_both_joined(a, a_lo, b, b_lo, c, c_lo, d, d_lo), 0, _both_joined)
        one = tl.zeros([1, 1, 1], a.dtype)
        a, a_lo, b, b_lo = one + a, one + a_lo, one + b, one + b_lo
    else:
        a, a_lo, b, b_lo = per_channel(sums)
        c, c_lo, d, d_lo = per_channel(ends)
        a, a_lo, b, b_lo = _both_joined(a, a_lo, b, b_lo, c, c_lo, d, d_lo)
    return a, a_lo, b, b_lo


@triton.jit
def splits_of(partial_ptr, channel, C, splits, SPLITS: tl.constexpr):
    """What the splits of channels (one-dimensional) left, four numbers each, (SPLITS, BLOCK_C); of one channel (SPLITS,)."""
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
def over_splits(a, a_lo, b, b_lo):
    """(hi, lo) of each of two sums over the splits: (BLOCK_C,), of one channel a scalar."""
    return tl.reduce((a, a_lo, b, b_lo), 0, _both_joined)


@triton.jit
def of_channels(x, channel):
    """What is a scalar for one channel as (BLOCK_C,)."""
    return tl.zeros(channel.shape, x.dtype) + x


@triton.jit
def plain_sum(x):
    """Σ over samples and lanes of a tile by a tree, a scalar of a one-dimensional one: enough where no term cancels another."""
    if len(x.shape) == 1:
        total = tl.sum(x, axis=0)
    elif x.shape[1] == 1:
        total = tl.zeros([1, 1, 1], x.dtype) + tl.sum(tl.ravel(x), axis=0)
    else:
        total = tl.sum(tl.sum(x, axis=2), axis=0)[None, :, None]
    return total


@triton.jit
def plain_sum_with_ends(x, ends):
    """`plain_sum` of a tile and of the ends of its rows."""
    WIDTH: tl.constexpr = min(min(x.numel, ends.numel), 128)
    if len(ends.shape) == 1 and WIDTH >= 32:
        x = tl.sum(tl.reshape(x, [x.numel // WIDTH, WIDTH]), axis=0)
        x += tl.sum(tl.reshape(ends, [ends.numel // WIDTH, WIDTH]), axis=0)
        total = plain_sum(x)
    else:
        total = plain_sum(x) + plain_sum(ends)
    return total


@triton.jit
def held(x, HALVINGS: tl.constexpr, MODE: tl.constexpr):
    """Sums of the 2^HALVINGS values of a tile that a thread holds, of two and two: no thread waits for another.

    They are neighbours along the lanes, or, where lanes are strided (channels-last), far apart.
    """
    for _ in tl.static_range(HALVINGS):
        if MODE == STRIDED:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], 2, x.shape[2] // 2]), axis=2)
        else:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]), axis=3)
    return x


@triton.jit
def compensated_add(total, lost, x):
    """(total + x, what rounding has lost so far): Kahan's step in each lane."""
    x = x - lost
    new = total + x
    return new, (new - total) - x


@triton.jit
def finite_or_zero(x):
    """x, 0 where it is infinite or NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def renewed(hi, lo):
    """hi + lo as (hi, lo) again, lo at most a rounding of hi; what has no finite hi keeps it, with lo 0."""
    total = hi + tl.where(tl.abs(hi) < float("inf"), lo, 0.0)
    return total, tl.where(tl.abs(total) < float("inf"), lo - (total - hi), 0.0)


@triton.jit
def first_mean(x, inside, ends, ends_inside, count, first):
    """About the mean of the `count` values of each channel that a tile and the ends of its rows have; a finite number.

    `first`, a value of each channel, makes that of a constant channel exact. ends: None where there are none.
    """
    first = finite_or_zero(first)
    x = tl.where(inside, x - first, 0.0)
    if ends is None:
        total = plain_sum(x)
    else:
        one = first if len(ends.shape) > 1 else tl.max(tl.ravel(first), axis=0)
        total = plain_sum_with_ends(x, tl.where(ends_inside, ends - one, 0.0))
    return finite_or_zero(first + total / tl.maximum(count, 1.0))


@triton.jit
def started(d, HALVINGS: tl.constexpr, MODE: tl.constexpr):
    """The sums of a first tile of differences d, lane by lane: Σ d and what it lost, Σ d² and what that lost."""
    total, squares = held(d, HALVINGS, MODE), held(d * d, HALVINGS, MODE)
    return total, tl.zeros_like(total), squares, tl.zeros_like(squares)


@triton.jit
def continued(sums, d, HALVINGS: tl.constexpr, MODE: tl.constexpr):
    """The sums after one more tile of differences; Σ d is not touched by what it lost, which infinities make NaN."""
    total, lost, squares, lost_squares = sums
    more = held(d, HALVINGS, MODE)
    total, lost = joined(total, lost, more, 0.0)
    squares, lost_squares = compensated_add(squares, lost_squares, held(d * d, HALVINGS, MODE))
    return total, lost, squares, lost_squares


@triton.jit
def moments(sums, count, origin, alpha):
    """(mean hi, mean lo, scaled M2) of `count` values with these sums of alpha times their differences from the origin."""
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
