"""Mean and squared deviations of a channel, gathered tile by tile (docs/derivations.md, section 2.5).

A mean is two floats, hi + lo. Each tile is summed about the mean of those before it: since they are at least as many as the
tile, the squares about so near a value lose no more than a factor of two to cancellation. M2 is scaled by alpha squared.
"""

import triton
import triton.language as tl


@triton.jit
def per_channel(x):
    """Σ over samples and lanes, one number a channel."""
    return tl.sum(tl.sum(x, axis=2), axis=0)[None, :, None]


@triton.jit
def first_moments(x, inside, origin, alpha):
    """(hi, lo, M2, count) of the first tile. `origin`, a value of each channel, makes a constant channel exact."""
    count = per_channel(tl.where(inside, 1.0, 0.0).to(x.dtype))
    safe = tl.maximum(count, 1.0)
    centre = origin + per_channel(tl.where(inside, x - origin, 0.0)) / safe
    d = tl.where(inside, x - centre, 0.0)
    lo = per_channel(d) / safe
    M2 = per_channel((alpha * d) * (alpha * d)) - safe * (alpha * lo) * (alpha * lo)
    hi = centre + lo
    return hi, lo - (hi - centre), M2, count


@triton.jit
def next_moments(hi, lo, M2, count, x, inside, alpha):
    """The moments after one more tile, summed about the mean so far."""
    d = tl.where(inside, x - hi, 0.0)
    total = count + per_channel(tl.where(inside, 1.0, 0.0).to(x.dtype))
    u = (count * lo + per_channel(d)) / tl.maximum(total, 1.0)
    M2 += count * (alpha * lo) * (alpha * lo) + per_channel((alpha * d) * (alpha * d)) - total * (alpha * u) * (alpha * u)
    moved = hi + u
    return moved, u - (moved - hi), M2, total
