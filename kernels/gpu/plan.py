"""Block sizes and warps: plain functions of (shape, dtype, layout, device) that return a frozen plan; those of batch
normalisation are in `channel_plan`.

Nothing here asks a device or runs a kernel, so that each choice can be read and tested anywhere. The limits are what compiles
without spilling on sm_80 to sm_120 (tests/test_evidence.py holds them).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .device import H100, Device

STRIDED, ALIGNED, SHIFTED = 0, 1, 2


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
        return RowPlan(block_r, keep, keep, True, min(warps_for(spread * block_r * keep), most))
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
    return ColumnPlan(block_r, block_v, cdiv(lanes, block_v), warps_for(spread * block_r * block_v))


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
class MomentsPlan:
    """Tiles of (BLOCK_M, BLOCK_M) of the scatter, from BLOCK_N points at a time, GROUP of them multiplied at once.

    The points are in `runs`, which are summed apart.
    """

    BLOCK_N: int
    GROUP: int
    BLOCK_M: int
    runs: int
    num_warps: int


def plan_moments(B: int, n: int, m: int, device: Device = H100) -> MomentsPlan:
    """The plan for the mean and scatter of B sets of n points of m variables, in float64.

    There are runs enough to fill the device, each of at least 256 points and m, so that their scatters hold no more than x.
    """
    block_m = 4 if m <= 4 else 16 if m <= 16 else 32
    tiles = cdiv(m, block_m)
    programs = max(B * tiles * (tiles + 1) // 2, 1)
    runs = max(1, min(cdiv(4 * device.multiprocessors, programs), n // max(m, 256)))
    return MomentsPlan(*{4: (128, 128), 16: (64, 8), 32: (64, 4)}[block_m], block_m, runs, 8 if block_m == 32 else 4)


def warps_for(elements: int) -> int:
    """About sixteen elements a thread, up to 16 warps: 32 leave a thread 64 registers."""
    return min(next_power_of_2(elements // 512), 16)
