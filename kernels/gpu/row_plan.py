"""Plans of the kernels of rows (softmax, cross entropy, token log-probabilities): block sizes, warps, registers.

Plain functions of (shape, dtype, layout, device) that return a frozen plan. kernels/README.md says why each plan is as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from .device import H100, Device
from .plan import ALIGNED, SHIFTED, STRIDED, body_lanes, cdiv, next_power_of_2, warps_for
from .tuned import of_rows, tunable


@dataclass(frozen=True)
class RowPlan:
    """A program owns BLOCK_R rows. Their first KEEP lanes stay in registers, the tail is read in tiles of BLOCK_V lanes.

    FITS: rows have no tail. STAGES: the loads of a loop are issued STAGES - 1 turns ahead, into shared memory.
    """

    BLOCK_R: int
    KEEP: int
    BLOCK_V: int
    FITS: bool
    num_warps: int
    STAGES: int = 1
    programs: int = 0  # persistent programs, as many as the device holds at once; 0: a program a tile
    registers: int | None = None  # maxnreg: the most registers of a thread, so that a multiprocessor holds enough programs

    def grid(self, tiles: int) -> int:
        """How many programs run for this many tiles."""
        return min(tiles, self.programs or tiles)

    def again(self, V: int) -> float:
        """The part of a row of V values that a kernel reads twice: its tail."""
        return 0.0 if self.FITS else max(V - self.KEEP, 0) / V


def resident_lanes(extra_per_lane: int, itemsize: int, mode: int) -> int:
    """The most lanes of a row that can stay in registers without a spill.

    extra_per_lane: how many numbers a lane the kernel keeps in addition to exp(z): 0 softmax, cross entropy of hard targets; 1
    softmax backward, soft targets or smoothing, a softcap, or the rows' statistics with a gradient; 2 soft targets or smoothing
    with the rows' statistics or a softcap; 3 a divergence of two rows.
    """
    if mode == STRIDED:
        return 8192 if not extra_per_lane else 2048 if itemsize == 8 else 4096
    return (32768 >> extra_per_lane) // (4 if itemsize == 8 else 1)


@tunable(of_rows)
def plan_rows(
    V: int,
    S: int,
    itemsize: int,
    mode: int,
    unit_s: bool,
    extra_per_lane: int = 0,
    dense: bool = False,
    tensors: int = 1,
    row_reused: bool = True,
    rows_ahead: int = 2,
    device: Device = H100,
) -> RowPlan:
    """The plan for rows of V values, S of them neighbours.

    unit_s: neighbouring rows are adjacent in memory and classes are not (the class axis in the middle). extra_per_lane: as
    in `resident_lanes`. dense: soft targets or smoothing, a q for every lane. tensors: how many tensors are read. row_reused:
    the row is needed again after the first pass. rows_ahead: how many rows may be loaded ahead by a persistent program, as its
    registers allow; 0: no persistent programs.
    """
    lanes, neighbours = body_lanes(V, itemsize, mode), unit_s and S > 1
    # extra numbers of a lane, edges of rows and strides cost registers: fewer lanes a thread
    spread = 1 if mode == ALIGNED and not extra_per_lane else 4 if mode != ALIGNED and extra_per_lane > 1 else 2
    spread = min(spread, itemsize)  # and at least 16 bytes a thread
    if neighbours:
        # neighbouring rows fill a line of 128 bytes where their lanes still fit, and at least a sector of 32
        resident = 2048 // (2 if itemsize == 8 else 1)
        available = resident // next_power_of_2(lanes) * itemsize
        width = min(available, 128) if available >= 32 else min(32 * itemsize, 128)
        block_r = min(next_power_of_2(S), width // itemsize)
        resident, spread = resident // block_r, 4
    else:
        tile = 4096 >> ((extra_per_lane > 1) + (extra_per_lane > 2) + (mode == STRIDED or itemsize == 8))
        block_r = max(1, min(next_power_of_2(S), tile // next_power_of_2(lanes)))
        resident = resident_lanes(extra_per_lane, itemsize, mode)
        if lanes > 4096 and (not row_reused or extra_per_lane > 2):
            return _streaming(itemsize, mode, extra_per_lane, row_reused, rows_ahead > 0)
    if lanes <= resident:
        keep = next_power_of_2(lanes)
        plain = mode != STRIDED and itemsize < 8 and not neighbours and extra_per_lane == tensors - 1
        # the rows' edges take registers, and the code for a B200 spills 40 bytes
        crowded = rows_ahead < 2 and keep > 16384 and (mode == SHIFTED or device.in_flight >= 64 << 10)
        in_turn = (
            _persistent(keep, itemsize, tensors, rows_ahead, device)
            if keep > 4096 and plain and rows_ahead and not crowded
            else None
        )
        if in_turn:
            return in_turn
        num_warps = min(warps_for(spread * block_r * keep), 8 if mode == STRIDED and not neighbours else 16)
        if not row_reused and not neighbours:  # a program reads, reduces and ends: smaller ones, and more of them
            while block_r > 1 and num_warps > 4:
                block_r, num_warps = block_r // 2, num_warps // 2
            plain = rows_ahead > 0 and not extra_per_lane and itemsize < 8 and mode != STRIDED
            if plain:  # a loss without options: 64 values a thread
                num_warps = cdiv(block_r * keep, 2048)
        registers = _registers_of_one_tile(itemsize, mode, extra_per_lane, keep, num_warps, row_reused and not rows_ahead)
        return RowPlan(block_r, keep, keep, True, num_warps, registers=registers)
    plain = mode != STRIDED and itemsize < 8 and not neighbours and not dense
    if plain and (not extra_per_lane or (extra_per_lane == 1 and tensors == 2 and itemsize == 2)):
        return _plain_long_row(V, itemsize, block_r, resident, tensors, extra_per_lane, rows_ahead, device)
    keep, block_v, num_warps = _tiles_of_a_long_row(resident, itemsize, mode, neighbours, extra_per_lane, dense)
    in_turn_or_on_16 = row_reused and (rows_ahead > 0 or mode == ALIGNED)
    # of neighbours as many as 16 warps may have: with this limit ptxas does not spill
    of_neighbours = 128 if extra_per_lane > 1 else None
    registers = (
        of_neighbours if neighbours else _registers_of_tiles(itemsize, mode, extra_per_lane, num_warps, in_turn_or_on_16)
    )
    return RowPlan(block_r, keep, max(min(keep, block_v), 1), False, num_warps, registers=registers)


def _plain_long_row(
    V: int, itemsize: int, block_r: int, resident: int, tensors: int, extra_per_lane: int, rows_ahead: int, device: Device
) -> RowPlan:
    """A row without options of which a part stays, and the rest is read again: from the cache, if it holds the rows of all
    programs."""
    two_cached = 2 * V * itemsize * device.multiprocessors <= 0.6 * device.l2
    if two_cached and device.short_of_instructions and rows_ahead == 1 and not extra_per_lane:
        return RowPlan(block_r, 2048 * itemsize, 4096, False, 4, 2)
    ahead = min(64 << 10, device.shared_memory // 2) // (8192 * itemsize * tensors)
    if itemsize == 2 and (extra_per_lane or (rows_ahead != 1 and ahead == 4 and not device.short_of_instructions)):
        # of two tensors, and of a softmax where it does not spill (as on a B200 and an RTX 5090), fewer lanes stay: one of
        # two programs computes while the other waits
        return RowPlan(block_r, 8192, 8192, False, 16, min(1 + ahead, 5), registers=64)
    if itemsize == 2:
        return RowPlan(block_r, resident, 16384, False, 16, 4 if rows_ahead == 1 and ahead == 4 else 2)
    return RowPlan(block_r, resident, 8192, False, 16, 1 + ahead)


def _tiles_of_a_long_row(
    resident: int, itemsize: int, mode: int, neighbours: bool, extra_per_lane: int, dense: bool
) -> tuple[int, int, int]:
    """(KEEP, BLOCK_V, warps). The loop over the tail also keeps strides, or float64's edges: more registers."""
    if neighbours:
        return max(resident // 4, 1), max(resident // 4, 1), 16 if extra_per_lane > 1 else 8
    if itemsize == 8:
        return resident // 2, 512 << (mode != SHIFTED or extra_per_lane > 0), 16 if extra_per_lane or mode == STRIDED else 8
    if extra_per_lane > 1:
        block_v = 2048 if mode == STRIDED else 1024 * itemsize  # and offsets of 64 bits
        return min(resident, 4096), block_v, 16 if mode == ALIGNED and itemsize == 4 else 8
    if dense:
        return min(resident, 8192), 16384 // itemsize, 16
    return resident, 4096 if mode == STRIDED else 8192, 16


# Where the compiler would spill 8 to 64 bytes to fit one more program a multiprocessor, maxnreg allows a thread more registers.
def _registers_of_one_tile(
    itemsize: int, mode: int, extra_per_lane: int, keep: int, num_warps: int, with_all: bool
) -> int | None:  # fmt: skip
    """maxnreg of rows without a tail. with_all: a loss with all options, whose row stays."""
    if extra_per_lane > 2:
        return 248 if itemsize == 8 and num_warps <= 8 else 128
    if mode == STRIDED and keep == 4096 and itemsize == 2 and extra_per_lane == 1:
        return 96  # 16 lanes a thread of two tensors, each with its offset in 64 bits: left to choose, ptxas spills for a B200
    if mode == SHIFTED and keep == 1024 and itemsize == 2 and extra_per_lane == 2:
        return 168  # with 128, which ptxas takes by itself, it spills for a B200 and an RTX 5090
    if mode == STRIDED:
        return None if keep <= 4096 else 248 if itemsize == 8 else 168
    return 80 if with_all and not extra_per_lane and itemsize < 8 and keep == 16384 else None


def _registers_of_tiles(itemsize: int, mode: int, extra_per_lane: int, num_warps: int, in_turn_or_on_16: bool) -> int | None:
    """maxnreg of rows with a tail. in_turn_or_on_16: the row stays, and programs may be persistent or rows are ALIGNED."""
    if num_warps == 8:
        return 248 if extra_per_lane > 1 else 128 if itemsize == 8 and not extra_per_lane and in_turn_or_on_16 else None
    return 128 if mode == STRIDED else None


def _streaming(itemsize: int, mode: int, extra_per_lane: int, row_reused: bool, in_groups: bool) -> RowPlan:
    """Long rows of which nothing stays, or one tile: many small programs, whose threads meet at the end of the row.

    in_groups: the lanes of an access have one maximum and one sum (a loss without options), which leaves registers.
    """
    if in_groups and not extra_per_lane and mode != STRIDED and itemsize == 2:
        return RowPlan(1, 0, 4096, False, 2, 2)
    block_v = (1024 if extra_per_lane else 2048) // (2 if itemsize == 8 else 1)
    registers = 128 if extra_per_lane > 1 else 200 if itemsize == 8 and not extra_per_lane else None
    if extra_per_lane > 2:
        registers = 168 if itemsize < 8 and mode == ALIGNED else 248
    stages = 1 if mode == STRIDED else 4 if extra_per_lane > 2 and itemsize == 2 else 3
    return RowPlan(1, block_v * row_reused, block_v, False, 4, stages, registers=registers)


def _persistent(keep: int, itemsize: int, tensors: int, rows_ahead: int, device: Device) -> RowPlan | None:
    """Persistent programs: they load the next row into shared memory while they compute and write one of `keep` lanes.

    None where a multiprocessor cannot hold two such programs, nor one with two rows ahead.
    """
    num_warps = 16 if keep * tensors > 16384 else 8
    threads, row = 32 * num_warps, keep * itemsize * tensors
    registers = 80 if keep * tensors <= 32 * threads else 128  # a thread holds 32 numbers, or 64
    for programs in range(min(device.registers // registers, device.threads) // threads, 0, -1):
        rows = min((device.shared_memory // programs - 2048) // row, rows_ahead if programs > 1 else 2)
        if rows >= (1 if programs > 1 else 2):
            registers = min(device.registers // (threads * programs) // 8 * 8, 248)
            return RowPlan(1, keep, keep, True, num_warps, rows + 1, programs * device.multiprocessors, registers)
    return None


@dataclass(frozen=True)
class ColumnPlan:
    """Tiles of (BLOCK_R rows, BLOCK_V lanes), `columns` of them to a row, for elementwise passes: no sum over the row."""

    BLOCK_R: int
    BLOCK_V: int
    columns: int
    num_warps: int


def plan_columns(
    V: int, S: int, itemsize: int, mode: int, unit_s: bool, tensors: int = 1, light: bool = False, device: Device = H100
) -> ColumnPlan:
    """The plan for an elementwise pass over rows of V values, S of them neighbours; arguments as in `plan_rows`.

    light: there are few other numbers for each value: no q, no softcap.
    """
    lanes = body_lanes(V, itemsize, mode)
    crowded = mode == STRIDED or itemsize == 8 or tensors > 1
    tile = 2048 if crowded or itemsize == 4 else 4096
    if unit_s and S > 1:
        block_r = min(next_power_of_2(S), 128 // itemsize)
    else:
        block_r = max(1, min(next_power_of_2(S), tile // next_power_of_2(lanes)))
    block_v = min(next_power_of_2(lanes), tile // block_r)
    if crowded:
        num_warps = warps_for(2 * block_r * block_v)
    else:  # what a thread does once a row and once an access is shared by its values
        bytes_a_thread = 64
        if light and itemsize == 2 and block_r == 1:
            bytes_a_thread = 128 if device.short_of_instructions else 32 if mode == ALIGNED else 64
        num_warps = max(block_r * block_v * itemsize // (32 * bytes_a_thread), 1)
    return ColumnPlan(block_r, block_v, cdiv(lanes, block_v), num_warps)


@dataclass(frozen=True)
class ReducePlan:
    """`programs` programs sum `per_program` rows each; the last one to end adds up their results, at most MERGE."""

    programs: int
    per_program: int
    MERGE: int


SUMMED = 512  # rows that a program adds up at a time, a lane each


def plan_reduce(rows: int) -> ReducePlan:
    """The plan for the sum of one number a row."""
    programs = min(max(cdiv(rows, 8192), 1), 1024)
    per_program = cdiv(cdiv(rows, programs), SUMMED) * SUMMED
    return ReducePlan(programs, per_program, next_power_of_2(programs))
