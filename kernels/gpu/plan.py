"""Block sizes and warps: plain functions of (shape, dtype, layout, device) that return a frozen plan; those of rows
are in `row_plan`, those of batch normalisation in `channel_plan`.

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


def row_mode(
    addresses: list[int], itemsize: int, count: int, stride: int, row_strides: list[tuple[int, ...]], width: int = 16
) -> int:
    """How tensors that share their rows' layout are accessed: `_tile`'s MODE.

    addresses: each tensor's first byte; stride: between a row's elements; row_strides: each tensor's strides between rows.
    width: bytes of an access.
    """
    group = width // itemsize
    if stride != 1 or any(address % width for address in addresses) or len(set(row_strides)) > 1:
        return STRIDED
    if count % group == 0 and all(step % group == 0 for step in row_strides[0]):
        return ALIGNED
    return SHIFTED if count >= 2 * group else STRIDED  # a shorter row is nothing but ragged ends


def body_lanes(count: int, itemsize: int, mode: int) -> int:
    """The most lanes that the body of a row of `count` elements takes (`_tile`)."""
    return count // (16 // itemsize) * (16 // itemsize) if mode == SHIFTED else count


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
