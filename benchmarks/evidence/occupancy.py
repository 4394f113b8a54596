"""How many programs a multiprocessor holds at once, and how evenly a grid fills a device: the arithmetic of NVIDIA's occupancy
calculator (CUDA C++ Programming Guide, "Compute Capabilities", technical specifications per compute capability)."""

from __future__ import annotations

from hw3gpu.kernels.gpu.device import Device

REGISTERS_AT_ONCE = 256  # of a warp: the unit in which registers are given
WARPS_AT_ONCE = 4  # of a multiprocessor, one of each of its four schedulers
SHARED_AT_ONCE = 128  # bytes
SHARED_OF_SYSTEM = 1024  # bytes of shared memory that each program takes beside its own
PROGRAMS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}  # that a multiprocessor holds at most


def programs(device: Device, arch: int, registers: int, warps: int, shared: int) -> int:
    """Programs of `warps` warps, `registers` registers a thread and `shared` bytes that a multiprocessor holds at once."""
    of_warp = -(-registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    by_registers = device.registers // of_warp // WARPS_AT_ONCE * WARPS_AT_ONCE // warps
    by_warps = device.threads // 32 // warps
    taken = -(-shared // SHARED_AT_ONCE) * SHARED_AT_ONCE + SHARED_OF_SYSTEM
    return min(by_registers, by_warps, device.shared_memory // taken, PROGRAMS[arch])


def waves(device: Device, grid: int, at_once: int) -> tuple[float, float]:
    """(waves in which `grid` programs pass through the device, share of the last one that is filled)."""
    slots = at_once * device.multiprocessors
    return grid / slots, (grid % slots or slots) / slots
