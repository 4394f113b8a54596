"""Plans of batch normalisation's kernels: block sizes, splits, warps.

Plain functions of (shape, dtype, layout, device) that return a frozen plan. kernels/README.md says why each plan is as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from .device import H100, Device
from .plan import SHIFTED, STRIDED, body_lanes, cdiv, next_power_of_2, warps_for
from .tuned import as_vector, tunable


@dataclass(frozen=True)
class BatchNormPlan:
    """Tiles of (BLOCK_C channels, BLOCK_N samples, LANES positions), and how programs share them.

    A channel block is BLOCK_C channels. Its `tiles` are divided among `splits` programs, `per_split` tiles each.
    """

    BLOCK_C: int
    BLOCK_N: int
    LANES: int
    ROWS: int  # samples of a tile, rounded up to a power of two
    flat: bool  # a FLAT tile (`_batch_norm.tiles`): rows of `row_lanes` lanes end to end, BLOCK_N groups of 8 lanes
    halvings: int  # a thread adds 2^halvings values plainly before each Kahan step (`_batch_norm.statistics.halved_lanes`)
    lane_blocks: int  # tiles along the positions of one sample
    row_lanes: int
    tiles: int
    per_split: int
    splits: int
    channel_blocks: int
    num_warps: int
    stages: int  # num_stages of the loop over tiles

    @property
    def split(self) -> tuple[int, int]:
        """(per_split, splits), arguments of the kernels whose channels may have several splits."""
        return self.per_split, self.splits


@tunable(as_vector)
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
    sums: bool = False,
    masked: bool = False,
    active: bool = False,
    device: Device = H100,
) -> BatchNormPlan:
    """The plan for a pass over (N, C, S). Long channels are split among several programs, to fill the device.

    operands: how many tensors are read at each position (1 forward, 2 backward, 3 where an activation's gradient needs a
    residual). whole: the kernel needs whole channels: one that fits is one tile, and several small ones share a program; one
    that does not fit has more than one tile, and the caller takes other kernels. may_be_flat: all tensors have the strides of
    x. busy: there is a residual or a mask. sums: the pass adds values up. masked: not all positions count, and which do takes
    registers. active: SiLU, Hardswish or GELU is computed of each value, which takes registers too; such a pass is busy.
    """
    streams = min(operands, 2)
    most = 16384 // (2 if itemsize == 8 else 1)
    lanes = body_lanes(S, itemsize, mode)
    row_lanes = cdiv(lanes, 8) * 8  # a byte of the mask has the bits of 8 lanes
    # a pointer a lane takes registers, and so do the rows' edges, with two operands or many rows
    crowded = mode == STRIDED or (mode == SHIFTED and (busy or (streams == 2 and itemsize != 2)))
    edges = 32 // itemsize if mode == SHIFTED else 0  # lanes for the edges of a row
    many = busy or itemsize * streams >= 8 or (masked and streams == 2)
    most_rows = most // (8 if many else 4) // edges if edges else most
    fewer = active and itemsize != 2 and streams == 2  # more would spill
    resident = most // 2 if crowded or fewer else most
    if active and mode == SHIFTED:
        resident = most // 4  # what the arithmetic takes leaves loads too few registers
    side_by_side = most // 2 if fewer else most  # channels-last
    passes = LONG_CHANNELS_LAST if channels_last else LONG_ACTIVE if active else LONG
    values_a_thread, num_warps, registers, stages = passes[sums, streams][itemsize]
    if channels_last and C * itemsize % 16:
        values_a_thread = min(values_a_thread, 16)  # each value has an address of its own
    elif channels_last and busy and itemsize == 8 and not sums:
        values_a_thread = 4
    elif channels_last and active and itemsize == 4 and not sums:
        values_a_thread = 8
    if masked and streams == 1:
        stages = 1
        if mode == SHIFTED and not sums:
            num_warps = 8  # fewer would spill with the edges
    long = values_a_thread * 32 * num_warps
    # 64-bit addresses would spill with two operands and many edges: a FLAT tile has 32-bit ones
    short_of_registers = mode == SHIFTED and itemsize != 8 and streams == 2 and may_be_flat
    flat, fits = False, True
    if whole and channels_last and next_power_of_2(S) * min(next_power_of_2(C), 32 // itemsize) <= side_by_side:
        block_c, block_n, block_l = min(next_power_of_2(C), 64), 1, next_power_of_2(S)
        while block_l * block_c > side_by_side:
            block_c //= 2
    elif (
        not channels_last and most_rows >= N
        and next_power_of_2(N) * next_power_of_2(lanes) <= (resident // (2 if short_of_registers else 1) if whole else long)
    ):  # fmt: skip
        block_n, block_l = next_power_of_2(N), next_power_of_2(lanes)
        several = max(min(2048 // (block_n * block_l), C // device.multiprocessors, next_power_of_2(C)), 1)
        block_c = next_power_of_2(several + 1) // 2
    elif (
        whole and not channels_last and may_be_flat and most_rows >= N
        and N * row_lanes <= (resident if mode == STRIDED else most)
    ):  # fmt: skip
        flat, block_c, block_n, block_l = True, 1, next_power_of_2(N * row_lanes // 8), 8
    else:
        fits = False
        block_c, block_n, block_l = _long_tile(N, C, lanes, channels_last, long)
        if edges:  # at most 8 lanes of edges a thread, half with two operands, and half where not all positions count
            block_n = max(min(block_n, (4 if masked else 8) // streams * 32 * num_warps // edges), 1)
    elements = block_c * block_n * block_l
    lane_blocks = 1 if flat else max(cdiv(lanes, block_l), 1)
    tiles = 1 if flat else max(cdiv(N, block_n), 1) * lane_blocks
    channel_blocks = max(cdiv(C, block_c), 1)
    if fits and not whole:
        splits, stages = 1, 1
        num_warps = warps_for(elements * (2 if busy else 1) * (2 if 2 * edges * block_n >= elements or itemsize == 8 else 1))
    elif fits:
        splits, stages = 1, 1
        of_each = cdiv(channel_blocks, device.multiprocessors)  # programs a multiprocessor
        many_edges = 2 * edges * (next_power_of_2(N) if flat else block_n) >= elements
        num_warps = _resident_warps(elements, many_edges, itemsize, mode, channels_last, streams, busy, of_each)
        if active and not (mode == STRIDED or itemsize == 8):
            num_warps = _active_warps(elements, streams, operands + masked > 2)
        elif masked and mode == SHIFTED and streams == 1 and elements >= 16384:
            num_warps = 16
    else:
        if not edges:
            num_warps = max(min(elements // (32 * values_a_thread), num_warps), 1)
        splits = _splits(tiles, channel_blocks, device.multiprocessors * (device.registers // (registers * 32 * num_warps)))
    per_split = cdiv(tiles, splits)
    accesses = elements * itemsize // (16 * 32 * num_warps)
    halvings = _halvings(accesses, S, block_l, itemsize, mode, channels_last, streams, flat)
    if mode == SHIFTED and elements >= most:
        halvings = min(halvings, 1)  # more of them would spill with the edges
    return BatchNormPlan(
        block_c, block_n, block_l, next_power_of_2(N) if flat else block_n, flat, halvings, lane_blocks, row_lanes, tiles,
        per_split, cdiv(tiles, per_split), channel_blocks, num_warps, stages,
    )  # fmt: skip


def _resident_warps(
    elements: int, many_edges: bool, itemsize: int, mode: int, channels_last: bool, operands: int, busy: bool, of_each: int
) -> int:
    """Warps of a program that keeps a tile: the more programs a multiprocessor has, the fewer warps each, up to 64 values a
    thread, so that while some wait for their sums others load and store."""
    if mode == STRIDED or itemsize == 8 or busy or many_edges:
        spread = (2 if busy else 1) * (2 if itemsize == (2 if channels_last else 8) else 1) * (2 if many_edges else 1)
        largest = 16384 // (2 if itemsize == 8 or (busy and mode == SHIFTED) else 1)
        return 8 if elements >= largest else warps_for(elements * spread)
    least = 4 if mode == SHIFTED and itemsize * operands == 8 else 1  # two operands of float32 and their edges take registers
    values_a_thread = 64 if of_each >= 4 else 32 if of_each >= 2 else 16
    return min(max(elements // (32 * values_a_thread), least), 8 if elements >= 16384 else 16)


def _active_warps(elements: int, streams: int, more: bool) -> int:
    """Warps of a program that keeps a tile and computes an activation: 32 values a thread, or 16 with their gradients, and no
    fewer warps than two for each tensor.

    more: there is a residual beside dy and x, or not all positions count.
    """
    most = 16 if streams == 1 or more or elements >= 16384 else 8
    return min(max(elements * streams // 1024, 2 * streams), max(elements // 256, 1), most)


def _halvings(
    accesses: int, S: int, block_l: int, itemsize: int, mode: int, channels_last: bool, operands: int, flat: bool
) -> int:
    """How often a thread halves its values before a Kahan step; it has `accesses` of 16 bytes.

    Two plain roundings, or three of half-precision values of one operand. Channels-last the values of one channel that a thread
    has come from several accesses.
    """
    if itemsize == 8:
        return 0
    if mode != STRIDED:
        return 0 if not accesses or (block_l < 64 and not flat) else 3 if itemsize == 2 and operands == 1 and S % 8 == 0 else 2
    return 2 if channels_last and accesses >= 4 else 0


# (values a thread, warps, registers a thread, num_stages) by itemsize, for a pass over long channels, by (sums, operands).
# Registers are what the compiler takes: from them follows how many programs fill a device. Found with the time model of an
# H100.
LONG = {
    (True, 1): {2: (32, 2, 80, 2), 4: (16, 4, 64, 2), 8: (4, 8, 64, 1)},
    (True, 2): {2: (16, 8, 64, 2), 4: (16, 4, 64, 2), 8: (4, 8, 64, 1)},
    (False, 1): {2: (16, 2, 40, 1), 4: (16, 4, 40, 1), 8: (8, 8, 64, 1)},
    (False, 2): {2: (16, 8, 40, 1), 4: (16, 8, 48, 1), 8: (8, 8, 64, 1)},
}
# a program of fewer warps, of which a multiprocessor has more: some load while others compute
LONG_ACTIVE = LONG | {
    (True, 2): {2: (8, 4, 64, 2), 4: (16, 4, 64, 2), 8: (4, 8, 64, 1)},
    (False, 2): {2: (16, 4, 64, 1), 4: (16, 4, 64, 1), 8: (8, 8, 64, 1)},
}
# a thread has 8 channels of 2 bytes, or 4 of 4 bytes, and keeps the numbers of each
LONG_CHANNELS_LAST = {
    (True, 1): {2: (32, 4, 128, 2), 4: (16, 4, 64, 1), 8: (4, 8, 64, 1)},
    (True, 2): {2: (32, 4, 128, 2), 4: (16, 8, 64, 2), 8: (4, 8, 64, 1)},
    (False, 1): {2: (16, 4, 80, 1), 4: (16, 8, 80, 1), 8: (8, 8, 64, 1)},
    (False, 2): {2: (8, 4, 80, 1), 4: (8, 8, 64, 1), 8: (8, 8, 64, 1)},
}


def _long_tile(N: int, C: int, lanes: int, channels_last: bool, elements: int) -> tuple[int, int, int]:
    """(BLOCK_C, BLOCK_N, LANES) for long channels."""
    if channels_last:
        block_c = min(next_power_of_2(C), 64)
        return block_c, 1, min(elements // block_c, next_power_of_2(lanes))
    # few empty lanes, and long runs
    block_l = min((2**i for i in range(6, 13) if 2**i <= elements), key=lambda b: (cdiv(lanes, b) * (512 + b), -b))
    block_l = min(block_l, next_power_of_2(lanes))
    return 1, max(min(elements // block_l, next_power_of_2(N)), 1), block_l


def _splits(tiles: int, channel_blocks: int, slots: int) -> int:
    """How many programs share a channel block, so that all programs fill the `slots` of the device evenly.

    A program's time is taken as its tiles and one more, for its start and end.
    """
    counts = {min(max(k * slots // channel_blocks, 1), tiles, 1024) for k in (1, 2, 3, 4)}
    return min(sorted(counts), key=lambda s: cdiv(channel_blocks * s, slots) * (cdiv(tiles, s) + 1))


def plan_channels(C: int, splits: int) -> tuple[int, int]:
    """(BLOCK_C, programs) for the merge of `splits` results a channel."""
    block = max(min(next_power_of_2(C), 32, 1024 // next_power_of_2(splits)), 1)
    return block, cdiv(C, block)
