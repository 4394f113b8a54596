"""Loads and stores of tiles whose rows begin anywhere, 16 bytes at a time.

A tile row is a run of `count` elements that begins `start` elements after the pointer. Rows of V = 50257 halves begin off a
16-byte boundary, where a plain load falls to one element an access. So the lanes of a row count from its beginning rounded
down to 16 bytes, `shift` elements earlier: every group of GROUP lanes is one aligned access, a mask is constant over each
group that is moved whole, and only the ragged ends go element by element. Lanes lo…hi-1 hold the row.

MODE  STRIDED  a stride between elements, or a pointer off 16 bytes: element by element
      ALIGNED  every row begins and ends on 16 bytes: nothing is ragged
      SHIFTED  unit stride, rows begin anywhere; all SHIFTED tensors of a kernel share their rows' shifts
"""

import triton
import triton.language as tl

STRIDED = tl.constexpr(0)
ALIGNED = tl.constexpr(1)
SHIFTED = tl.constexpr(2)


@triton.jit
def row_shift(start, MODE: tl.constexpr, GROUP: tl.constexpr):
    """Elements between the 16-byte boundary at or below `start` and `start`."""
    if MODE == SHIFTED:
        shift = start % GROUP
    else:
        shift = tl.zeros_like(start)
    return shift


@triton.jit
def span(shift, offset, count, live, LANES: tl.constexpr):
    """(lo, hi): which of the lanes offset…offset+LANES-1 hold elements of each row; none where not `live`."""
    lo = tl.minimum(tl.maximum(shift - offset, 0), LANES).to(tl.int32)
    hi = tl.minimum(tl.maximum(tl.where(live, shift + count - offset, 0), 0), LANES).to(tl.int32)
    return lo, hi


@triton.jit
def lane_zero(start, shift, offset, stride, MODE: tl.constexpr, GROUP: tl.constexpr):
    """The element at which lane `offset` of each row lies; `offset` is a multiple of GROUP."""
    if MODE == STRIDED:
        base = start + (offset - shift) * stride
    else:
        base = start // GROUP * GROUP + offset  # the product shows the compiler the alignment
    return base


@triton.jit
def load(ptr, base, lane, lo, hi, end, stride, other, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr):
    """The rows' elements in ACC, `other` in the lanes that hold none; nothing at or past element `end` is touched."""
    inside = (lane >= lo) & (lane < hi)
    group = lane // GROUP
    if MODE == STRIDED:
        x = tl.load(ptr + (base + lane.to(tl.int64) * stride), mask=inside, other=other).to(ACC)
    elif MODE == ALIGNED:
        x = tl.load(ptr + (base + lane), mask=group < hi // GROUP, other=other).to(ACC)
    else:
        room = tl.minimum(end - base, 1 << 30).to(tl.int32)
        whole = (group * GROUP < hi) & ((group + 1) * GROUP <= room)
        x = tl.load(ptr + (base + lane), mask=whole, other=other).to(ACC)
        if tl.max(tl.ravel(hi - room // GROUP * GROUP), axis=0) > 0:
            last = tl.load(ptr + (base + lane), mask=inside & (whole == 0), other=other).to(ACC)
            x = tl.where(whole, x, last)
        x = tl.where(inside, x, other)
    return x


@triton.jit
def store(ptr, base, lane, lo, hi, x, stride, MODE: tl.constexpr, GROUP: tl.constexpr):
    """Writes the rows' elements and nothing beside them."""
    inside = (lane >= lo) & (lane < hi)
    group = lane // GROUP
    if MODE == STRIDED:
        tl.store(ptr + (base + lane.to(tl.int64) * stride), x, mask=inside)
    elif MODE == ALIGNED:
        tl.store(ptr + (base + lane), x, mask=group < hi // GROUP)
    else:
        whole = (group * GROUP >= lo) & ((group + 1) * GROUP <= hi)
        tl.store(ptr + (base + lane), x, mask=whole)
        tl.store(ptr + (base + lane), x, mask=inside & (whole == 0))
