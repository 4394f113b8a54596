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

from ._numba.simd import LINE as CACHE_LINE

# Blocks of a split: it bounds the memory of partial sums. A block has some 16 KiB or more.
MOST_BLOCKS = 32
BLOCK_BYTES = 1 << 14
# Channels are done whole where there are as many blocks of them, or where one thread does it all.
FEWEST_BLOCKS = 8
SMALL_BYTES = 1 << 18
# A group of channels is a run of so many bytes in memory, and at most GROUP_BYTES over all samples. Where MOST_BLOCKS are left
# it is up to LONG_RUN_BYTES and SHARED_BYTES over all samples, which the second cache holds of each array: memory that is in no
# cache is read faster by long runs.
RUN_BYTES, GROUP_BYTES = 1 << 13, 1 << 22
LONG_RUN_BYTES, SHARED_BYTES = 1 << 15, 1 << 18
# Elements of a line, the fewest of one where channels would be too few for FEWEST_BLOCKS tiles, and the largest plane that is
# done by lines; elements of a channels-last line where sums are taken: a block adds them up for each channel at its end.
LINE, SHORT_LINE, SMALL_PLANE, SUM_LINE = 512, 128, 256, 256
# The smallest plane that is a loop of its own where sums are taken and a result is written while the nearest caches hold it.
PLANE = 64
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
    """The layout of arrays of x's shape; strides of another dtype are those that x's elements would have there."""
    return Layout(x.shape, x.itemsize, (x.strides, *(a.strides if a.itemsize == x.itemsize else _as_if(a, x) for a in beside)))


def _as_if(a: np.ndarray, x: np.ndarray) -> tuple[int, ...]:
    return tuple(stride // a.itemsize * x.itemsize for stride in a.strides)


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


# ---------------------------------------------------------------------------------------------- plans of a call
# masked: only some positions count. `tiles` take no mask, `planes` and `lines` do what is theirs then.
@functools.lru_cache(1024)
def plan_sums(of: Layout, masked: bool = False) -> Pass:
    """The sums of x, or of x and dy."""
    if not of.nbytes:
        return _NOTHING
    group, parts, joined = _tiled(of, masked)
    if group:
        return Pass("tiles", -(-of.shape[1] // group) * parts, (group,), parts, joined)
    blocks = _blocks(of)
    if in_rows(of):
        return Pass("lines", blocks, (rows_per_line(SUM_LINE, of),), blocks)
    return Pass("planes", blocks, (), blocks)


@functools.lru_cache(1024)
def plan_result(of: Layout, masked: bool = False) -> Pass:
    """The result from known sums: of x and y, or of x, dy and dx."""
    if not of.nbytes:
        return _NOTHING
    N, C, S = of.shape
    blocks = _blocks(of)
    if in_rows(of):
        return Pass("lines", blocks, (blocks, rows_per_line(LINE, of)))
    if small_planes(of) and not masked:
        group, parts = tiles(N, C, S, of.itemsize)
        return Pass("tiles", -(-C // group) * parts, (group, parts))
    return Pass("planes", blocks, (blocks,))


@functools.lru_cache(1024)
def plan_forward(of: Layout, masked: bool = False) -> BatchNormPlan:
    """`forward` of x and y."""
    return _plan(of, of.of_x, masked)


@functools.lru_cache(1024)
def plan_backward(of: Layout, masked: bool = False) -> BatchNormPlan:
    """`backward` of x, dy and dx."""
    return _plan(of, of._replace(strides=of.strides[:2]), masked)


@functools.lru_cache(1024)
def plan_sums_and_result(of: Layout, masked: bool = False) -> Pass:
    """`inference_backward` of x, dy and dx: no channel has to be done whole, so that it goes in the order of memory."""
    N, C, S = of.shape
    if in_rows(of):
        blocks = _blocks(of)
        return Pass("lines", blocks, (rows_per_line(LINE, of),), blocks)
    if S < PLANE and small_planes(of) and not masked:
        group, parts = tiles(N, C, S, of.itemsize)
        return Pass("tiles", -(-C // group) * parts, (group,), parts)
    blocks = _blocks(of)
    return Pass("planes", blocks, (), blocks)


_NOTHING = Pass("planes", 0)  # of arrays without an element


def _plan(of: Layout, summed: Layout, masked: bool) -> BatchNormPlan:
    """summed: the layout of what is read for the sums."""
    whole = _whole(of, masked)
    return BatchNormPlan(whole) if whole else BatchNormPlan(None, plan_sums(summed, masked), plan_result(of, masked))


def _whole(of: Layout, masked: bool) -> Pass | None:
    """None where channels are not to be done whole."""
    group, parts, joined = _tiled(of, masked)
    planes = _whole_planes(of)
    if not group or (planes and _long_runs(of)):
        return planes
    return Pass("tiles", -(-of.shape[1] // group), (group,), joined=joined) if parts == 1 else None


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
def _long_runs(of: Layout) -> bool:
    """True for planes that are worth a loop of their own where there are few samples and many channels."""
    N, C, S = of.shape
    return S >= SHORT_LINE and N * LONG_RUN_BYTES <= SHARED_BYTES and C * S * of.itemsize >= MOST_BLOCKS * RUN_BYTES


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


def _tiled(of: Layout, masked: bool) -> tuple[int, int, bool]:
    """As `tiles`, and whether samples and positions are joined; no channels where no tiles are cut."""
    N, C, S = of.shape
    if not of.nbytes or masked:
        return 0, 1, False
    if not in_rows(of):
        return *(tiles(N, C, S, of.itemsize) if small_planes(of) else (0, 1)), False
    if S == 1:
        return strip(N, C, of.itemsize), 1, False
    return (strip(N * S, C, of.itemsize), 1, True) if packed(of) else (0, 1, False)


def _whole_planes(of: Layout) -> Pass | None:
    """Planes done whole; None where they are to be split."""
    N, C, S = of.shape
    if not of.nbytes or in_rows(of):
        return None
    run_bytes = S * of.itemsize
    long = min(C // MOST_BLOCKS, min(LONG_RUN_BYTES, SHARED_BYTES // N) // run_bytes)
    group = min(max(1, long, min(-(-RUN_BYTES // run_bytes), GROUP_BYTES // (N * run_bytes))), C)
    blocks = -(-C // group)
    return Pass("planes", blocks, (group,)) if blocks >= FEWEST_BLOCKS or of.nbytes <= SMALL_BYTES else None


def flat_blocks(nbytes: int, most: int) -> int:
    return max(1, min(MOST_BLOCKS, nbytes // BLOCK_BYTES, most))


def _blocks(of: Layout) -> int:
    """Blocks of a split: of whole rows where x is rows of channels."""
    N, C, S = of.shape
    return flat_blocks(of.nbytes, N * S // BLOCK_ROWS if in_rows(of.of_x) else N * C * S)
