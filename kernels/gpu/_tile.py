"""Loads and stores of tiles whose rows begin anywhere, 16 bytes at a time.

A tile row is a run of `count` elements that begins `start` elements after the pointer. Rows of V = 50257 halves begin off a
16-byte boundary, where a plain load falls to one element an access. So a row is its body, the whole groups of GROUP
elements that lie on 16 bytes, and its ends: the fewer than GROUP elements before the body (the head) and after it. Lanes
count from the body's first element, `head` elements into the row; `reach` of them hold elements. The ends are a small tile
of their own, (rows, 2 GROUP), read and written one by one.

MODE  STRIDED  a stride between elements, or a pointer off 16 bytes: the body is the row, element by element
      ALIGNED  every row begins and ends on 16 bytes: the body is the row
      SHIFTED  unit stride, rows begin anywhere; all SHIFTED tensors of a kernel share their rows' heads
"""

import triton
import triton.language as tl

STRIDED = tl.constexpr(0)
ALIGNED = tl.constexpr(1)
SHIFTED = tl.constexpr(2)


@triton.jit
def head_of(start, MODE: tl.constexpr, GROUP: tl.constexpr):
    """Elements of each row before its body; a SHIFTED row has more than these."""
    if MODE == SHIFTED:
        head = ((GROUP - start % GROUP) % GROUP).to(tl.int32)
    else:
        head = tl.zeros_like(start).to(tl.int32)
    return head


@triton.jit
def body_of(head, count, MODE: tl.constexpr, GROUP: tl.constexpr):
    """Elements of each row's body."""
    body = count - head
    if MODE == SHIFTED:
        body = body // GROUP * GROUP
    return body


@triton.jit
def reach(head, offset, count, live, LANES: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr):
    """How many of the lanes offset…offset+LANES-1 hold elements of each row's body; none where not `live`."""
    body = body_of(head, count, MODE, GROUP)
    return tl.minimum(tl.maximum(tl.where(live, body - offset, 0), 0), LANES).to(tl.int32)


@triton.jit
def ends(head, count, live, GROUP: tl.constexpr):
    """(element of the row, whether there is one) of each lane of the tile of a SHIFTED row's ends."""
    k = tl.arange(0, 2 * GROUP)
    for _ in tl.static_range(len(head.shape) - 1):
        k = k[None]
    return end_of(k, head, count, live, GROUP)


@triton.jit
def end_of(k, head, count, live, GROUP: tl.constexpr):
    """(element of the row, whether there is one) of lane k of a SHIFTED row's ends."""
    after = head + body_of(head, count, SHIFTED, GROUP) + (k - GROUP)
    inside = ((k < GROUP) & (k < head)) | ((k >= GROUP) & (after < count))
    return tl.where(k < GROUP, k, after), live & inside


@triton.jit
def lone(x):
    """A column of rows, (R, 1), as it is; that of one row as a scalar.

    The ends of one row are a one-dimensional tile, one lane a thread. Tied to the body through two-dimensional columns, the
    compiler lays them out as the body, eight lanes of them in every thread.
    """
    if x.shape[0] == 1:
        if x.dtype == tl.int1:
            x = tl.max(tl.ravel(x).to(tl.int32), axis=0) > 0
        else:
            x = tl.max(tl.ravel(x), axis=0)
    return x


@triton.jit
def _sum_ends(x):
    """The sum of each row's ends, as `lone` of a column."""
    if len(x.shape) == 1:
        total = tl.sum(x, axis=0)
    else:
        total = tl.sum(x, axis=1)[:, None]
    return total


@triton.jit
def _max_ends(x):
    """The maximum of each row's ends, as `lone` of a column."""
    if len(x.shape) == 1:
        top = tl.max(x, axis=0)
    else:
        top = tl.max(x, axis=1)[:, None]
    return top


@triton.jit
def plus_sum(start, x, x_ends):
    """A column of rows, (R, 1), plus the sums of a tile's rows and of their ends, either of which may be None."""
    if x is not None:
        start += tl.sum(x, axis=1)[:, None]
    if x_ends is not None:
        start += _sum_ends(x_ends)
    return start


@triton.jit
def max_with(start, x, x_ends):
    """The maximum of a column of rows and of what `plus_sum` adds."""
    if x is not None:
        start = tl.maximum(start, tl.max(x, axis=1)[:, None])
    if x_ends is not None:
        start = tl.maximum(start, _max_ends(x_ends))
    return start


@triton.jit
def _pointers(ptr, start, head, offset, lane, stride, MODE: tl.constexpr, GROUP: tl.constexpr):
    if MODE == STRIDED:
        at = ptr + (start + (head + offset) * stride + lane.to(tl.int64) * stride)
    else:
        at = ptr + ((start + head) // GROUP * GROUP + offset + lane)  # the product shows the compiler the alignment
    return at


@triton.jit
def inside(lane, hi, MODE: tl.constexpr, GROUP: tl.constexpr):
    if MODE == STRIDED:
        inside = lane < hi
    else:
        inside = lane < hi // GROUP * GROUP  # one answer for each access, as the product shows the compiler
    return inside


@triton.jit
def load(ptr, start, head, offset, lane, hi, stride, other, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr):
    """The body's elements at lanes offset + lane in ACC, `other` in the lanes from `hi` on; `offset` is a multiple of GROUP."""
    at = _pointers(ptr, start, head, offset, lane, stride, MODE, GROUP)
    return tl.load(at, mask=inside(lane, hi, MODE, GROUP), other=other).to(ACC)


@triton.jit
def store(ptr, start, head, offset, lane, hi, x, stride, MODE: tl.constexpr, GROUP: tl.constexpr):
    """Writes the body's elements at lanes offset + lane below offset + hi."""
    at = _pointers(ptr, start, head, offset, lane, stride, MODE, GROUP)
    tl.store(at, x, mask=inside(lane, hi, MODE, GROUP))
