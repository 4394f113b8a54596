"""How batch normalisation on the CPU is cut into blocks: plain functions of (shape, dtype, strides) that return a frozen plan.

Nothing here looks at elements or at the number of threads, so that every number of threads gives the same bits, and each choice
can be read and tested. Arrays are (N, C, S); x comes first in a `Layout`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ._batch_norm.planes import RUN
from ._numba.simd import LINE as CACHE_LINE

# Blocks of a split: it bounds the memory of partial sums. A block has some 16 KiB or more.
MOST_BLOCKS = 32
BLOCK_BYTES = 1 << 14
# Channels are done whole where there are as many blocks of them, or where one thread does it all.
FEWEST_BLOCKS = 8
SMALL_BYTES = 1 << 18
# A group of channels is a run of so many bytes in memory, and so many bytes over all samples.
RUN_BYTES, GROUP_BYTES = 1 << 13, 1 << 22
# Elements of a line, the fewest of one where channels would be too few for FEWEST_BLOCKS tiles, and the largest plane that is
# done by lines; elements of a channels-last line where sums are taken: it has fewer parameters to keep in the nearest cache,
# and longer lines are fetched ahead.
LINE, SHORT_LINE, SMALL_PLANE, SUM_LINE = 512, 128, 256, 2048
# The same where sums are taken and a result is written of what the nearest caches hold still, and the smallest plane that is
# then a loop of its own.
SUM_AND_RESULT_LINE, PLANE = 1024, 64
# Rows of channels are cut into tiles up to so many bytes of a tile, and rows of a split's block are at least so many: a block
# has two sums a channel.
STRIP_BYTES, BLOCK_ROWS = 1 << 20, 32


class Layout(NamedTuple):
    """Arrays of one shape and dtype that are walked together, as plans see them."""

    shape: tuple[int, ...]  # (N, C, S)
    itemsize: int
    strides: tuple[tuple[int, ...], ...]  # bytes, of x and of each array beside it

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def of_x(self) -> Layout:
        return self._replace(strides=self.strides[:1])


def layout_of(x: np.ndarray, *beside: np.ndarray) -> Layout:
    """The layout of arrays of x's shape and dtype."""
    return Layout(x.shape, x.itemsize, (x.strides, *(a.strides for a in beside)))


@dataclass(frozen=True)
class Pass:
    """One walk over the arrays: which loops, how their work is cut into blocks, and what they are told of that."""

    loops: str  # 'planes', 'lines' or 'tiles', of `_batch_norm`
    blocks: int  # threads share range(blocks)
    told: tuple[int, ...] = ()  # channels of a tile or a block, rows of a line, or the number of blocks
    partial: int = 0  # sums of a channel that are merged in order; 0 where none are taken, or each by one block
    joined: bool = False  # samples and positions are one axis: (N, C, S) is walked as (N S, C, 1)


@dataclass(frozen=True)
class BatchNormPlan:
    """One call: each channel done whole while it is in cache, or `sums` (statistics) first and then `result`."""

    whole: Pass | None = None
    sums: Pass | None = None
    result: Pass | None = None
    fused: bool = False  # with a residual or a mask: the layout of x alone decides
    mask_bytes: int = 0  # what the result's pass uses of a mask


# ---------------------------------------------------------------------------------------------- plans of a call
@functools.lru_cache(1024)
def plan_sums(of: Layout) -> Pass:
    """The sums of x, or of x and dy."""
    return _sums(of)


@functools.lru_cache(1024)
def plan_result(of: Layout, fused: bool) -> BatchNormPlan:
    """The result from known sums: of x and y, or of x, dy and dx."""
    if fused:
        return BatchNormPlan(result=_fused_result(of.of_x), fused=True, mask_bytes=_mask_bytes(of.of_x))
    return BatchNormPlan(result=_result(of))


@functools.lru_cache(1024)
def plan_forward(of: Layout, fused: bool) -> BatchNormPlan:
    """`forward` of x and y."""
    x, mask_bytes = of.of_x, _mask_bytes(of.of_x) if fused else 0
    whole = _fused_whole(x) if fused else _whole(of)
    if whole is not None:
        return BatchNormPlan(whole, fused=fused, mask_bytes=mask_bytes)
    return BatchNormPlan(None, _sums(x), _fused_result(x) if fused else _result(of), fused, mask_bytes)


@functools.lru_cache(1024)
def plan_backward(of: Layout, fused: bool, masked: bool) -> BatchNormPlan:
    """`backward` of x, dy and dx. masked: dy counts where the mask is set; without a mask sums are taken by the plain loops."""
    x, mask_bytes = of.of_x, _mask_bytes(of.of_x) if masked else 0
    whole = _fused_whole(x) if fused else _whole(of)
    if whole is not None:
        return BatchNormPlan(whole, fused=fused, mask_bytes=mask_bytes)
    sums = _fused_sums(x) if masked else _sums(of._replace(strides=of.strides[:2]))
    return BatchNormPlan(None, sums, _fused_result(x) if fused else _result(of), fused, mask_bytes)


@functools.lru_cache(1024)
def plan_masked_sums(of: Layout) -> Pass:
    """The sums of x and of the dy that a mask lets through."""
    return _fused_sums(of.of_x)


@functools.lru_cache(1024)
def plan_sums_and_result(of: Layout) -> Pass:
    """`inference_backward` of x, dy and dx: no channel has to be done whole, so that it goes in the order of memory."""
    N, C, S = of.shape
    if in_rows(of):
        blocks = _blocks(of)
        return Pass("lines", blocks, (rows_per_line(SUM_AND_RESULT_LINE, of),), blocks)
    if S < PLANE and small_planes(of):
        group, parts = tiles(N, C, S, of.itemsize)
        return Pass("tiles", -(-C // group) * parts, (group,), parts)
    blocks = _blocks(of)
    return Pass("planes", blocks, (), blocks)


# ---------------------------------------------------------------------------------------------- passes
_NOTHING = Pass("planes", 0)  # of arrays without an element


def _sums(of: Layout) -> Pass:
    if not of.nbytes:
        return _NOTHING
    group, parts, joined = _tiled(of)
    if group:
        return Pass("tiles", -(-of.shape[1] // group) * parts, (group,), parts, joined)
    blocks = _blocks(of)
    if in_rows(of):
        return Pass("lines", blocks, (rows_per_line(SUM_LINE, of),), blocks)
    return Pass("planes", blocks, (), blocks)


def _result(of: Layout) -> Pass:
    if not of.nbytes:
        return _NOTHING
    N, C, S = of.shape
    blocks = _blocks(of)
    if in_rows(of):
        return Pass("lines", blocks, (blocks, rows_per_line(LINE, of)))
    if small_planes(of):
        group, parts = tiles(N, C, S, of.itemsize)
        return Pass("tiles", -(-C // group) * parts, (group, parts))
    return Pass("planes", blocks, (blocks,))


def _whole(of: Layout) -> Pass | None:
    """None where channels are not to be done whole."""
    group, parts, joined = _tiled(of)
    if group:
        return Pass("tiles", -(-of.shape[1] // group), (group,), joined=joined) if parts == 1 else None
    return _whole_planes(of)


def _fused_whole(x: Layout) -> Pass | None:
    """As `_whole`; rows are never cut."""
    group = _tile(x)
    if group:
        return Pass("tiles", -(-x.shape[1] // group), (group,))
    return None if small_planes(x) else _whole_planes(x)


def _fused_sums(x: Layout) -> Pass:
    if group := _tile(x):
        return Pass("tiles", -(-x.shape[1] // group), (group,))
    pieces = _pieces(x)
    return Pass("lines", pieces, (rows_of_mask(x.shape[1]),), pieces) if in_rows(x) else Pass("planes", pieces, (), pieces)


def _fused_result(x: Layout) -> Pass:
    pieces = _pieces(x)
    if in_rows(x):
        return Pass("lines", pieces, (pieces, rows_of_mask(x.shape[1])))
    if group := _tile(x):
        return Pass("tiles", -(-x.shape[1] // group), (group,))
    return Pass("planes", pieces, (pieces,))


# ---------------------------------------------------------------------------------------------- layouts
def in_rows(of: Layout) -> bool:
    """True for channels-last: C adjacent in every array, and S not."""
    return all(a[1] == of.itemsize and (of.shape[2] == 1 or a[2] != of.itemsize) for a in of.strides)


def packed(of: Layout) -> bool:
    """True where rows of channels follow one another in memory."""
    N, C, S = of.shape
    return all((S == 1 or a[2] == C * of.itemsize) and (N == 1 or a[0] == S * C * of.itemsize) for a in of.strides)


def rows_per_line(line: int, of: Layout) -> int:
    """Rows that make up a line of some `line` elements: several where rows follow one another in memory, else one."""
    N, C, S = of.shape
    return max(1, min(line // C, N * S)) if packed(of) else 1


def small_planes(of: Layout) -> bool:
    """True where the planes of one sample are small and follow one another in memory."""
    _, C, S = of.shape
    return S <= SMALL_PLANE and all((S == 1 or a[2] == of.itemsize) and (C == 1 or a[1] == S * of.itemsize) for a in of.strides)


# ---------------------------------------------------------------------------------------------- channels of a block
@functools.lru_cache(1024)
def tiles(N: int, C: int, S: int, itemsize: int) -> tuple[int, int]:
    """Channels of a tile, and parts of its samples: one where channels are done whole.

    A tile's line has some LINE elements, or fewer for more tiles, and whole lines of the cache where twice as many suffice.
    """
    group = max(-(-SHORT_LINE // S), min(LINE // S, -(-C // FEWEST_BLOCKS)))
    whole = CACHE_LINE // math.gcd(S * itemsize, CACHE_LINE)
    if whole * S <= 2 * LINE:
        group = -(-group // whole) * whole
    group = min(group, C)
    count = -(-C // group)
    if count >= FEWEST_BLOCKS or N * C * S * itemsize <= SMALL_BYTES:
        return group, 1
    return group, min(N, 2 * FEWEST_BLOCKS // count)


def strip(N: int, C: int, itemsize: int) -> int:
    """Channels of a tile of N rows of C; 0 where rows are not to be cut."""
    group, parts = tiles(N, C, 1, itemsize) if C >= SHORT_LINE else (0, 0)
    return group if parts == 1 and N * group * itemsize <= STRIP_BYTES else 0


def _tiled(of: Layout) -> tuple[int, int, bool]:
    """As `tiles`, and whether samples and positions are joined; no channels where no tiles are cut."""
    N, C, S = of.shape
    if not of.nbytes:
        return 0, 1, False
    if not in_rows(of):
        return *(tiles(N, C, S, of.itemsize) if small_planes(of) else (0, 1)), False
    if S == 1:
        return strip(N, C, of.itemsize), 1, False
    return (strip(N * S, C, of.itemsize), 1, True) if packed(of) else (0, 1, False)


def _tile(x: Layout) -> int:
    """Channels whose small planes are gone through at once; 0 where x has another layout, or they are not done whole."""
    group, parts, _ = (0, 1, False) if in_rows(x) else _tiled(x)
    return group if parts == 1 else 0


def _whole_planes(of: Layout) -> Pass | None:
    """Planes done whole; None where they are to be split."""
    N, C, S = of.shape
    if not of.nbytes or in_rows(of):
        return None
    run_bytes = S * of.itemsize
    group = min(max(1, min(-(-RUN_BYTES // run_bytes), GROUP_BYTES // (N * run_bytes))), C)
    blocks = -(-C // group)
    return Pass("planes", blocks, (group,)) if blocks >= FEWEST_BLOCKS or of.nbytes <= SMALL_BYTES else None


def flat_blocks(nbytes: int, most: int) -> int:
    return max(1, min(MOST_BLOCKS, nbytes // BLOCK_BYTES, most))


def _blocks(of: Layout) -> int:
    """Blocks of a split: of whole rows where x is rows of channels."""
    N, C, S = of.shape
    return flat_blocks(of.nbytes, N * S // BLOCK_ROWS if in_rows(of.of_x) else N * C * S)


def _pieces(x: Layout) -> int:
    """Blocks of a split into whole pieces of the mask."""
    N, C, S = x.shape
    pieces = -(-(N * S) // rows_of_mask(C)) if in_rows(x) else N * -(-S // RUN)
    return flat_blocks(x.nbytes, pieces)


# ---------------------------------------------------------------------------------------------- the mask
def rows_of_mask(C: int) -> int:
    """Rows of a line of `_batch_norm.lines_fused`, whose bits share bytes."""
    return max(1, LINE // max(C, 1))


def mask_size(N: int, C: int, S: int) -> int:
    """Bytes of the mask of (N, C, S): an eighth of a byte a value, and what fills up bytes."""
    N, S = (1, N) if S == 1 else (N, S)
    return max(N * C * _bytes(S), _bytes_of_lines(N * S, rows_of_mask(C), C))


def _mask_bytes(x: Layout) -> int:
    """What the layout of x needs of a mask."""
    N, C, S = x.shape
    return _bytes_of_lines(N * S, rows_of_mask(C), C) if in_rows(x) else N * _bytes_of_lines(C, _tile(x) or 1, S)


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _bytes_of_lines(rows: int, rows_per_line: int, size: int) -> int:
    """Bytes for the bits of rows of `size` values; a line, perhaps the last one a shorter one, has bytes of its own."""
    return rows // rows_per_line * _bytes(rows_per_line * size) + _bytes(rows % rows_per_line * size)
