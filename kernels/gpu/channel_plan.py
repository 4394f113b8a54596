"""Block sizes and warps of batch normalisation: plain functions of (shape, dtype, layout, device) that return a frozen plan."""

from __future__ import annotations

from dataclasses import dataclass

from .device import H100, Device
from .plan import SHIFTED, STRIDED, body_lanes, cdiv, next_power_of_2, warps_for


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
    device: Device = H100,
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
        several = max(min(2048 // (block_n * block_l), C // device.multiprocessors, next_power_of_2(C)), 1)
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
    splits = min(tiles, cdiv(4 * device.multiprocessors, channel_blocks)) if channel_blocks < device.multiprocessors else 1
    per_split = cdiv(tiles, splits)
    elements = block_c * block_n * block_l
    spread = (2 if busy else 1) * (2 if itemsize == (2 if channels_last else 8) else 1)
    if 2 * ends * block_n >= elements:
        spread *= 2
    largest = most // 2 if busy and mode == SHIFTED and itemsize == 2 and tiles == 1 else most
    return BatchNormPlan(
        block_c, block_n, block_l, next_power_of_2(N) if flat else block_n, flat, lane_blocks, row_lanes, tiles, per_split,
        cdiv(tiles, per_split), channel_blocks, 8 if elements >= largest else warps_for(elements * spread),
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
