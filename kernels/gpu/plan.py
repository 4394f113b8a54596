"""Block sizes and warps: plain functions of (shape, dtype, layout) that return a frozen plan.

Nothing here asks a device or runs a kernel, so that each choice can be read and tested anywhere. The limits are what compiles
without spilling on sm_80 to sm_120 (tests/test_evidence.py holds them).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

STRIDED, ALIGNED, SHIFTED = 0, 1, 2
MULTIPROCESSORS = 132  # an H100's: enough programs for it are enough for the smaller parts


def next_power_of_2(n: int) -> int:
    """The least power of two at or above `n`; 1 for n <= 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def float_and_bits(value: float) -> tuple[float, int]:
    """`value` and its float64 bits: Triton passes a Python float as float32, so float64 kernels read the bits."""
    return value, struct.unpack("q", struct.pack("d", value))[0]


def row_mode(addresses: list[int], itemsize: int, count: int, stride: int, row_strides: list[tuple[int, ...]]) -> int:
    """How tensors that share their rows' layout are accessed: `_tile`'s MODE.

    addresses: each tensor's first byte; stride: between a row's elements; row_strides: each tensor's strides between rows.
    """
    group = 16 // itemsize
    if stride != 1 or any(address % 16 for address in addresses) or len(set(row_strides)) > 1:
        return STRIDED
    if count % group == 0 and all(step % group == 0 for step in row_strides[0]):
        return ALIGNED
    return SHIFTED if count >= 2 * group else STRIDED  # a shorter row is nothing but ragged ends


def body_lanes(count: int, itemsize: int, mode: int) -> int:
    """The most lanes that the body of a row of `count` elements takes (`_tile`)."""
    return count // (16 // itemsize) * (16 // itemsize) if mode == SHIFTED else count


@dataclass(frozen=True)
class RowPlan:
    """Tiles of (BLOCK_R rows, lanes): the first KEEP lanes stay in registers, the rest goes by in tiles of BLOCK_V."""

    BLOCK_R: int
    KEEP: int
    BLOCK_V: int
    FITS: bool
    num_warps: int


def resident_lanes(beside: int, itemsize: int, mode: int) -> int:
    """The most lanes of a row that stay in registers when a kernel keeps `beside` numbers a lane beside exp(z): what compiles
    without a spill.

    beside: 0 softmax, cross entropy of hard targets; 1 softmax backward, soft targets or smoothing, a softcap alone; 2 soft
    targets or smoothing with the rows' statistics or a softcap.
    """
    if mode == STRIDED:
        return 8192 if not beside else 2048 if itemsize == 8 else 4096
    return (32768 >> beside) // (4 if itemsize == 8 else 1)


def plan_rows(V: int, S: int, itemsize: int, mode: int, unit_s: bool, beside: int = 0, dense: bool = False) -> RowPlan:
    """The plan for rows of V values, S of them neighbours.

    unit_s: neighbouring rows lie side by side and V does not (the class axis in the middle). beside: as `resident_lanes`.
    dense: soft targets or smoothing, a q for every lane.
    """
    lanes, neighbours = body_lanes(V, itemsize, mode), unit_s and S > 1
    # what a thread keeps beside a lane costs registers, as do ends of rows and strides: fewer lanes to a thread
    spread = 1 if mode == ALIGNED and not beside else 4 if mode != ALIGNED and beside > 1 else 2
    spread = min(spread, itemsize)  # and at least 16 bytes a thread
    if neighbours:
        # neighbours fill a line of 128 bytes where that leaves room for their rows, and at least a sector of 32
        resident = 2048 // (2 if itemsize == 8 else 1)
        room = resident // next_power_of_2(lanes) * itemsize
        width = min(room, 128) if room >= 32 else min(32 * itemsize, 128)
        block_r = min(next_power_of_2(S), width // itemsize)
        resident, spread = resident // block_r, 4
    else:
        tile = 4096 >> ((beside > 1) + (mode == STRIDED or itemsize == 8))
        block_r = max(1, min(next_power_of_2(S), tile // next_power_of_2(lanes)))
        resident = resident_lanes(beside, itemsize, mode)
    if lanes <= resident:
        keep = next_power_of_2(lanes)
        most = 8 if mode == STRIDED and not neighbours else 16
        return RowPlan(block_r, keep, keep, True, min(_warps(spread * block_r * keep), most))
    # the loop over the rest keeps strides, or the ends of float64, beside the lanes: more registers a thread
    if neighbours:
        keep, block_v, num_warps = max(resident // 4, 1), max(resident // 4, 1), 16 if beside > 1 else 8
    elif itemsize == 8:
        keep, block_v, num_warps = resident // 2, 1024 if mode == ALIGNED else 2048, 16 if beside or mode == STRIDED else 8
    elif beside > 1:
        keep, block_v, num_warps = min(resident, 4096), 1024 * itemsize, 16 if mode == ALIGNED and itemsize == 4 else 8
    elif dense:
        keep, block_v, num_warps = min(resident, 8192), 16384 // itemsize, 16
    else:
        keep, block_v, num_warps = resident, 4096 if mode == STRIDED else 32768 // itemsize, 16
    return RowPlan(block_r, keep, max(min(keep, block_v), 1), False, num_warps)


@dataclass(frozen=True)
class ColumnPlan:
    """Tiles of (BLOCK_R rows, BLOCK_V lanes), `columns` of them to a row, for passes that need no sum over the row."""

    BLOCK_R: int
    BLOCK_V: int
    columns: int
    num_warps: int


def plan_columns(V: int, S: int, itemsize: int, mode: int, unit_s: bool) -> ColumnPlan:
    """The plan for an elementwise pass over rows of V values, S of them neighbours; arguments as in `plan_rows`."""
    lanes = body_lanes(V, itemsize, mode)
    crowded = mode == STRIDED or itemsize == 8
    tile = 2048 if crowded else 4096
    if unit_s and S > 1:
        block_r = min(next_power_of_2(S), 128 // itemsize)
    else:
        block_r = max(1, min(next_power_of_2(S), tile // next_power_of_2(lanes)))
    block_v = min(next_power_of_2(lanes), tile // block_r)
    spread = 2 if crowded or (mode == ALIGNED and itemsize == 4) else 1
    return ColumnPlan(block_r, block_v, cdiv(lanes, block_v), _warps(spread * block_r * block_v))


@dataclass(frozen=True)
class ReducePlan:
    """`programs` programs sum `per_program` rows each; one more sums their MERGE or fewer results."""

    programs: int
    per_program: int
    BLOCK: int
    MERGE: int


def plan_reduce(rows: int) -> ReducePlan:
    """The plan for the sum of one number a row."""
    programs = min(max(cdiv(rows, 8192), 1), 1024)
    per_program = cdiv(cdiv(rows, programs), 1024) * 1024
    return ReducePlan(programs, per_program, 1024, next_power_of_2(programs))


@dataclass(frozen=True)
class BatchNormPlan:
    """Tiles of (BLOCK_C channels, BLOCK_N samples, LANES positions); each split of a channel block has `per_split` tiles."""

    BLOCK_C: int
    BLOCK_N: int
    LANES: int
    ROWS: int  # samples of a tile, rounded up to a power of two
    flat: bool  # one channel's rows end to end, `row_lanes` lanes each: BLOCK_N counts eights of lanes
    lane_blocks: int  # tiles along the positions of one sample
    row_lanes: int
    tiles: int
    per_split: int
    splits: int
    channel_blocks: int
    num_warps: int

    @property
    def split(self) -> tuple[int, int]:
        """(per_split, splits), as the kernels that split a channel take them."""
        return self.per_split, self.splits


def plan_batch_norm(
    N: int,
    C: int,
    S: int,
    itemsize: int,
    mode: int,
    channels_last: bool,
    operands: int,
    whole: bool,
    may_be_flat: bool = True,
    busy: bool = False,
) -> BatchNormPlan:
    """The plan for the statistics and sums of C channels with N runs of S values each.

    operands: tensors read at each position (1 forward, 2 backward). whole: the kernel can own whole channels. may_be_flat: all
    tensors have the strides of x. busy: a residual or a mask takes part. Few long channels are split over enough programs to
    fill the device; a channel that fits is one tile; of many small ones, several share a program.
    """
    most = 16384 // (2 if itemsize == 8 else 1)
    long = most // 2 // operands
    lanes = body_lanes(S, itemsize, mode)
    row_lanes = cdiv(lanes, 8) * 8  # bits of a mask go by eight
    # a pointer to each lane takes registers too, and so do the rows' ends, beside two operands and where there are many
    crowded = mode == STRIDED or (mode == SHIFTED and (busy or (operands == 2 and itemsize != 2)))
    ends = 32 // itemsize if mode == SHIFTED else 0  # lanes for the ends of a row
    most_rows = most // (8 if busy or itemsize * operands >= 8 else 4) // ends if ends else most
    resident = long if not whole else most // 2 if crowded else most
    flat = False
    if channels_last:
        block_c, block_l = _channels_last_tile(C, S, itemsize, most if whole else long, long)
        block_n = 1
    elif most_rows >= N and next_power_of_2(N) * next_power_of_2(lanes) <= resident:
        block_n, block_l = next_power_of_2(N), next_power_of_2(lanes)
        several = max(min(2048 // (block_n * block_l), C // MULTIPROCESSORS, next_power_of_2(C)), 1)
        block_c = next_power_of_2(several + 1) // 2
    elif whole and may_be_flat and most_rows >= N and N * row_lanes <= (resident if mode == STRIDED else most):
        flat, block_c, block_n, block_l = True, 1, next_power_of_2(N * row_lanes // 8), 8
    else:
        block_c = 1
        block_l = min((2**i for i in range(9, 13) if 2**i <= long), key=lambda b: (cdiv(lanes, b) * b, -b))
        block_l = min(block_l, next_power_of_2(lanes))
        block_n = min(max(long // block_l, 1), next_power_of_2(N), most // 8 // max(ends, 1)) if block_l >= lanes else 1
    lane_blocks = 1 if flat else max(cdiv(lanes, block_l), 1)
    tiles = 1 if flat else max(cdiv(N, block_n), 1) * lane_blocks
    channel_blocks = max(cdiv(C, block_c), 1)
    splits = min(tiles, cdiv(4 * MULTIPROCESSORS, channel_blocks)) if channel_blocks < MULTIPROCESSORS else 1
    per_split = cdiv(tiles, splits)
    elements = block_c * block_n * block_l
    spread = (2 if busy else 1) * (2 if itemsize == (2 if channels_last else 8) else 1)
    if 2 * ends * block_n >= elements:
        spread *= 2
    largest = most // 2 if busy and mode == SHIFTED and itemsize == 2 and tiles == 1 else most
    return BatchNormPlan(
        block_c, block_n, block_l, next_power_of_2(N) if flat else block_n, flat, lane_blocks, row_lanes, tiles, per_split,
        cdiv(tiles, per_split), channel_blocks, 8 if elements >= largest else _warps(elements * spread),
    )  # fmt: skip


def _channels_last_tile(C: int, S: int, itemsize: int, resident: int, long: int) -> tuple[int, int]:
    """(channels, positions) of a tile: all positions of a sector's worth of channels or more where they fit."""
    block_c = min(next_power_of_2(C), 64)
    while block_c > 32 // itemsize and next_power_of_2(S) * block_c > resident:
        block_c //= 2
    if next_power_of_2(S) * block_c <= resident:
        return block_c, next_power_of_2(S)
    block_c = min(next_power_of_2(C), 64)
    return block_c, max(long // (2 * block_c), 1)


def plan_channels(C: int, splits: int) -> tuple[int, int]:
    """(BLOCK_C, programs) for the merge of `splits` results a channel."""
    block = max(min(next_power_of_2(C), 32, 1024 // next_power_of_2(splits)), 1)
    return block, cdiv(C, block)


@dataclass(frozen=True)
class MomentsPlan:
    """Tiles of (BLOCK_M, BLOCK_M) of the scatter, from BLOCK_N points at a time, GROUP of them multiplied at once.

    The points are in `runs`, which are summed apart.
    """

    BLOCK_N: int
    GROUP: int
    BLOCK_M: int
    runs: int
    num_warps: int


def plan_moments(B: int, n: int, m: int) -> MomentsPlan:
    """The plan for the mean and scatter of B sets of n points of m variables, in float64.

    There are runs enough to fill the device, each of at least 256 points and m, so that their scatters hold no more than x.
    """
    block_m = 4 if m <= 4 else 16 if m <= 16 else 32
    tiles = cdiv(m, block_m)
    programs = max(B * tiles * (tiles + 1) // 2, 1)
    runs = max(1, min(cdiv(4 * MULTIPROCESSORS, programs), n // max(m, 256)))
    return MomentsPlan(*{4: (128, 128), 16: (64, 8), 32: (64, 4)}[block_m], block_m, runs, 8 if block_m == 32 else 4)


def _warps(elements: int) -> int:
    """About sixteen elements a thread, up to 16 warps: 32 leave a thread 64 registers."""
    return min(next_power_of_2(elements // 512), 16)
