"""Loads and stores of tiles whose rows may begin at any address, 16 bytes at a time.

A tile row has `count` elements and begins `start` elements after the pointer. Rows of V = 50257 halves begin between two
16-byte boundaries, where a plain load moves one element an access. So each row is divided into

    body    the whole groups of GROUP elements that begin on 16 bytes; lane 0 is `head` elements into the row
    edges   the fewer than GROUP elements before the body (the head) and after it: a small tile of its own, (rows, 2 GROUP)

The body is moved 16 bytes at a time, the edges one element at a time. `count_in_tile` says how many lanes of a tile hold
elements.

MODE  STRIDED  the elements have a stride, or the pointer is not on 16 bytes: the body is the whole row, one element at a time
      ALIGNED  every row begins and ends on 16 bytes: the body is the whole row
      SHIFTED  unit stride, rows begin anywhere; all SHIFTED tensors of a kernel have equal heads, row by row
"""

import triton
import triton.language as tl

STRIDED = tl.constexpr(0)
ALIGNED = tl.constexpr(1)
SHIFTED = tl.constexpr(2)


@triton.jit
def head_of(start, MODE: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """How many elements of each row lie before its body; a SHIFTED row has more than these."""
    if MODE == SHIFTED:
        head = ((GROUP - start % GROUP) % GROUP).to(tl.int32)
    else:
        head = tl.zeros_like(start).to(tl.int32)
    return head


@triton.jit
def body_of(head, count, MODE: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """How many elements each row's body has."""
    body = count - head
    if MODE == SHIFTED:
        body = body // GROUP * GROUP
    return body


@triton.jit
def count_in_tile(head, offset, count, live, LANES: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """How many of the LANES lanes from `offset` on hold elements of each row's body; 0 for rows that are not `live`."""
    body = body_of(head, count, MODE, GROUP)
    return tl.minimum(tl.maximum(tl.where(live, body - offset, 0), 0), LANES).to(tl.int32)


@triton.jit
def edges(head, count, live, GROUP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """For the 2 GROUP lanes of a SHIFTED row's edges: (number of the element in its row, mask of the lanes that have one)."""
    k = tl.arange(0, 2 * GROUP)
    for _ in tl.static_range(len(head.shape) - 1):
        k = k[None]
    return edge_of(k, head, count, live, GROUP)


@triton.jit
def edge_of(k, head, count, live, GROUP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """`edges` for the lanes k: lanes below GROUP are the head, the others follow the body."""
    after = head + body_of(head, count, SHIFTED, GROUP) + (k - GROUP)
    inside = ((k < GROUP) & (k < head)) | ((k >= GROUP) & (after < count))
    return tl.where(k < GROUP, k, after).to(tl.int64), live & inside  # its product with a stride may need 64 bits


@triton.jit
def scalar_if_one(x) -> tl.tensor:
    """A column of numbers, one a row: (R, 1) unchanged, and (1, 1) as a scalar.

    With a scalar, the edges of a single row are a one-dimensional tile of their own, one lane a thread. With a (1, 1) column
    the compiler gives them the layout of the body, eight lanes in every thread, most of them unused.
    """
    if x.shape[0] == 1:
        if x.dtype == tl.int1:
            x = tl.max(tl.ravel(x).to(tl.int32), axis=0) > 0
        else:
            x = tl.max(tl.ravel(x), axis=0)
    return x


@triton.jit
def _sum_edges(x) -> tl.tensor:
    """The sum of each row's edges, in the shape that `scalar_if_one` gives a column."""
    if len(x.shape) == 1:
        total = tl.sum(x, axis=0)
    else:
        total = tl.sum(x, axis=1)[:, None]
    return total


@triton.jit
def _max_edges(x) -> tl.tensor:
    """The maximum of each row's edges, in the shape that `scalar_if_one` gives a column."""
    if len(x.shape) == 1:
        top = tl.max(x, axis=0)
    else:
        top = tl.max(x, axis=1)[:, None]
    return top


@triton.jit
def add_row_sums(start, x, x_edges) -> tl.tensor:
    """`start` (R, 1) plus the sums of the rows of a tile x and of their edges; x or x_edges may be None."""
    if x is not None:
        start += tl.sum(x, axis=1)[:, None]
    if x_edges is not None:
        start += _sum_edges(x_edges)
    return start


@triton.jit
def max_with_rows(start, x, x_edges) -> tl.tensor:
    """The maximum of `start` (R, 1), the rows of a tile x and their edges; x or x_edges may be None."""
    if x is not None:
        start = tl.maximum(start, tl.max(x, axis=1)[:, None])
    if x_edges is not None:
        start = tl.maximum(start, _max_edges(x_edges))
    return start


@triton.jit
def min_with_rows(start, x, x_edges) -> tl.tensor:
    """The minimum of `start` (R, 1), the rows of a tile x and their edges; x or x_edges may be None."""
    if x is not None:
        start = tl.minimum(start, tl.min(x, axis=1)[:, None])
    if x_edges is not None:
        start = tl.minimum(start, -_max_edges(-x_edges))
    return start


@triton.jit
def _pointers(ptr, start, head, offset, lane, stride, MODE: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    if MODE == STRIDED:
        at = ptr + start + ((head + offset).to(tl.int64) + lane) * stride
    else:
        at = ptr + ((start + head) // GROUP * GROUP + offset + lane)  # // and * show the compiler the alignment
    return at


@triton.jit
def inside(lane, hi, MODE: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """Mask of the lanes below `hi`, a number from `count_in_tile`."""
    if MODE == STRIDED:
        inside = lane < hi
    else:
        inside = lane < hi // GROUP * GROUP  # // and * show the compiler that one access has one answer
    return inside


@triton.jit
def load(
    ptr, start, head, offset, lane, hi, stride, other, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr
) -> tl.tensor:
    """The body's elements offset + lane in the dtype ACC, `other` in the lanes from `hi` on. `offset`: a multiple of GROUP."""
    at = _pointers(ptr, start, head, offset, lane, stride, MODE, GROUP)
    return tl.load(at, mask=inside(lane, hi, MODE, GROUP), other=other).to(ACC)


@triton.jit
def store(ptr, start, head, offset, lane, hi, x, stride, MODE: tl.constexpr, GROUP: tl.constexpr) -> None:
    """Writes x to the body's elements offset + lane, for the lanes below `hi`."""
    at = _pointers(ptr, start, head, offset, lane, stride, MODE, GROUP)
    tl.store(at, x, mask=inside(lane, hi, MODE, GROUP))
