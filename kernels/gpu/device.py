"""What plans depend on of a device: constants of six GPUs, and one read from the GPU at hand.

Bytes in flight: a multiprocessor reaches its share of the bandwidth when about bandwidth x latency bytes are asked for and not
yet there. CUB tunes its kernels by the numbers given here for A100, H100, H200 and B200: 1.1 to 1.3 us times that share.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

LATENCY = 1.2e-6  # seconds: what CUB's numbers come to


@dataclass(frozen=True)
class Device:
    """A GPU as plans see it."""

    name: str
    multiprocessors: int
    registers: int  # of 32 bits, of a multiprocessor
    threads: int  # that a multiprocessor holds at most
    shared_memory: int  # bytes, of a multiprocessor
    l2: int  # bytes
    bandwidth: float  # bytes a second
    in_flight: int  # bytes that a multiprocessor needs under way


A100 = Device("A100", 108, 65536, 2048, 164 << 10, 40 << 20, 1.555e12, 16 << 10)
H100 = Device("H100", 132, 65536, 2048, 228 << 10, 50 << 20, 3.35e12, 32 << 10)
H200 = Device("H200", 132, 65536, 2048, 228 << 10, 50 << 20, 4.8e12, 48 << 10)
B200 = Device("B200", 148, 65536, 2048, 228 << 10, 126 << 20, 8.0e12, 64 << 10)
RTX_4090 = Device("RTX 4090", 128, 65536, 1536, 100 << 10, 72 << 20, 1.008e12, 12 << 10)
RTX_5090 = Device("RTX 5090", 170, 65536, 1536, 100 << 10, 96 << 20, 1.792e12, 16 << 10)

ABSENT = H100  # where tensors are on no GPU: the interpreter, and compilers without a device


def in_flight(bandwidth: float, multiprocessors: int) -> int:
    """Bytes a multiprocessor needs under way, by its share of the bandwidth, in units of 4 KiB."""
    return max(math.ceil(bandwidth * LATENCY / multiprocessors / 4096) * 4096, 8192)


def read(properties: Any) -> Device:
    """The device of `torch.cuda.get_device_properties`; what an older PyTorch does not say is as on an H100."""
    multiprocessors = properties.multi_processor_count
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)  # kHz, bits
    # two transfers a cycle; without a clock, an H100's share a multiprocessor
    bandwidth = 2e3 * clock * width / 8 or H100.bandwidth / H100.multiprocessors * multiprocessors
    return Device(
        properties.name,
        multiprocessors,
        getattr(properties, "regs_per_multiprocessor", 0) or H100.registers,
        properties.max_threads_per_multi_processor,
        getattr(properties, "shared_memory_per_multiprocessor", 0) or H100.shared_memory,
        getattr(properties, "L2_cache_size", 0) or H100.l2,
        bandwidth,
        next((d.in_flight for d in (A100, H100, H200, B200) if _is(d, properties.name)), in_flight(bandwidth, multiprocessors)),
    )


def _is(device: Device, name: str) -> bool:
    return device.name in name.replace("-", " ").split()


@functools.cache
def _of_index(index: int) -> Device:
    import torch

    return read(torch.cuda.get_device_properties(index))


def device_of(x: Any) -> Device:
    """The device that a torch tensor is on; ABSENT where that is no GPU."""
    return _of_index(x.device.index) if x.is_cuda else ABSENT
