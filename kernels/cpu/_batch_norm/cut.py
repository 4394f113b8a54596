"""How batch normalisation on the CPU is cut into blocks: by shapes and strides alone, so that every number of threads gives the
same bits. Arrays are (N, C, S).
"""

from __future__ import annotations

import functools
import math

import numpy as np

from .._numba.simd import LINE as CACHE_LINE

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


def in_rows(*arrays: np.ndarray) -> bool:
    """True for channels-last: C adjacent in every array, and S not."""
    return all(a.strides[1] == a.itemsize and (a.shape[2] == 1 or a.strides[2] != a.itemsize) for a in arrays)


def packed(*arrays: np.ndarray) -> bool:
    """True where rows of channels follow one another in memory."""
    N, C, S = arrays[0].shape
    return all((S == 1 or a.strides[2] == C * a.itemsize) and (N == 1 or a.strides[0] == S * C * a.itemsize) for a in arrays)


def rows_per_line(line: int, *arrays: np.ndarray) -> int:
    """Rows that make up a line of some `line` elements: several where rows follow one another in memory, else one."""
    N, C, S = arrays[0].shape
    return max(1, min(line // C, N * S)) if packed(*arrays) else 1


def small_planes(*arrays: np.ndarray) -> bool:
    """True where the planes of one sample are small and follow one another in memory."""
    S = arrays[0].shape[2]
    return S <= SMALL_PLANE and all(
        (S == 1 or a.strides[2] == a.itemsize) and (a.shape[1] == 1 or a.strides[1] == S * a.itemsize) for a in arrays
    )


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


def tiled(*arrays: np.ndarray) -> tuple[int, int, tuple[np.ndarray, ...]]:
    """As `tiles`, and the arrays as tiles are cut from them; no channels where they are not."""
    N, C, S = arrays[0].shape
    if not arrays[0].size:
        return 0, 1, arrays
    if not in_rows(*arrays):
        return *(tiles(N, C, S, arrays[0].itemsize) if small_planes(*arrays) else (0, 1)), arrays
    if S == 1:
        return strip(N, C, arrays[0].itemsize), 1, arrays
    if not packed(*arrays):
        return 0, 1, arrays
    return strip(N * S, C, arrays[0].itemsize), 1, tuple(a.transpose(0, 2, 1).reshape(N * S, C, 1) for a in arrays)


def whole_planes(*arrays: np.ndarray) -> int:
    """Channels in a block where planes are done whole; 0 where they are to be split."""
    x = arrays[0]
    N, C, S = x.shape
    if not x.size or in_rows(*arrays):
        return 0
    run_bytes = S * x.itemsize
    group = min(max(1, min(-(-RUN_BYTES // run_bytes), GROUP_BYTES // (N * run_bytes))), C)
    return group if -(-C // group) >= FEWEST_BLOCKS or x.nbytes <= SMALL_BYTES else 0


def whole(*arrays: np.ndarray) -> tuple[int, bool, tuple[np.ndarray, ...]]:
    """Channels in a block where they are done whole, or 0; whether by tiles; the arrays as they are then walked."""
    group, parts, seen = tiled(*arrays)
    if group:
        return group if parts == 1 else 0, True, seen
    return whole_planes(*arrays), False, arrays


def flat_blocks(nbytes: int, most: int) -> int:
    return max(1, min(MOST_BLOCKS, nbytes // BLOCK_BYTES, most))


def blocks(x: np.ndarray) -> int:
    """Blocks of a split: of whole rows where x is rows of channels."""
    return flat_blocks(x.nbytes, x.shape[0] * x.shape[2] // BLOCK_ROWS if in_rows(x) else x.size)
