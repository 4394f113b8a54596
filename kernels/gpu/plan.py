"""What the plan functions share, and the plan of moments; plans of rows: `row_plan`, of batch normalisation: `channel_plan`.

A plan is a frozen record of block sizes and warps, made by a plain function of (shape, dtype, layout, device). No plan function
asks a device or runs a kernel, so each choice can be read and tested anywhere. The limits are what compiles without a spill on
sm_80 to sm_120 (held by tests/test_evidence.py).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .device import H100, Device

STRIDED, ALIGNED, SHIFTED = 0, 1, 2


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`; 1 for n <= 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def float_and_bits(value: float) -> tuple[float, int]:
    """`value` and its float64 bits. Triton passes a Python float as float32: float64 kernels read the bits."""
    return value, struct.unpack("q", struct.pack("d", value))[0]


def row_mode(
    addresses: list[int], itemsize: int, count: int, stride: int, row_strides: list[tuple[int, ...]], width: int = 16
) -> int:
    """The MODE (`_tile`) of tensors whose rows are read together.

    addresses: of each tensor's first byte. count, stride: of the elements of a row. row_strides: each tensor's strides between
    rows. width: bytes an access.
    """
    group = width // itemsize
    if stride != 1 or any(address % width for address in addresses) or len(set(row_strides)) > 1:
        return STRIDED
    if count % group == 0 and all(step % group == 0 for step in row_strides[0]):
        return ALIGNED
    return SHIFTED if count >= 2 * group else STRIDED  # a shorter row may have no body


def body_lanes(count: int, itemsize: int, mode: int) -> int:
    """The most lanes that the body of a row of `count` elements can have (`_tile`)."""
    return count // (16 // itemsize) * (16 // itemsize) if mode == SHIFTED else count


@dataclass(frozen=True)
class MomentsPlan:
    """Tiles of (BLOCK_M, BLOCK_M) of the scatter matrix; BLOCK_N points are read at a time, GROUP multiplied at a time.

    The points are divided into `runs`, each summed by programs of its own.
    """

    BLOCK_N: int
    GROUP: int
    BLOCK_M: int
    runs: int
    num_warps: int


def plan_moments(B: int, n: int, m: int, device: Device = H100) -> MomentsPlan:
    """The plan for the mean and scatter of B sets of n points of m variables, in float64.

    There are enough runs to fill the device, each of at least max(256, m) points, so that their scatter matrices together are
    no larger than x.
    """
    block_m = 4 if m <= 4 else 16 if m <= 16 else 32
    tiles = cdiv(m, block_m)
    programs = max(B * tiles * (tiles + 1) // 2, 1)
    runs = max(1, min(cdiv(4 * device.multiprocessors, programs), n // max(m, 256)))
    return MomentsPlan(*{4: (128, 128), 16: (64, 8), 32: (64, 4)}[block_m], block_m, runs, 8 if block_m == 32 else 4)


def warps_for(elements: int) -> int:
    """About 16 elements a thread, and at most 16 warps: 32 warps would leave a thread 64 registers."""
    return min(next_power_of_2(elements // 512), 16)
