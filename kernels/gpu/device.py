"""The numbers of a device that plans depend on: constants for six GPUs, and those of the GPU that is there.

Bytes in flight: a multiprocessor reaches its share of the bandwidth when about bandwidth x latency bytes have been requested
and have not yet arrived. The numbers for A100, H100, H200 and B200 are those by which NVIDIA's CUB tunes its kernels: that
share times 1.1 to 1.3 us.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

LATENCY = 1.2e-6  # seconds, as follows from CUB's numbers


@dataclass(frozen=True)
class Device:
    """What a plan knows of a GPU."""

    name: str
    multiprocessors: int
    registers: int  # 32-bit registers of a multiprocessor
    threads: int  # the most threads of a multiprocessor
    shared_memory: int  # bytes, of a multiprocessor
    l2: int  # bytes
    bandwidth: float  # bytes a second
    in_flight: int  # bytes in flight that a multiprocessor needs

    @property
    def short_of_instructions(self) -> bool:
        """Whether a multiprocessor gets so many bytes (a B200: 54 GB/s, an H100: 25) that instructions are the limit sooner."""
        return self.bandwidth / self.multiprocessors > 45e9


A100 = Device("A100", 108, 65536, 2048, 164 << 10, 40 << 20, 1.555e12, 16 << 10)
H100 = Device("H100", 132, 65536, 2048, 228 << 10, 50 << 20, 3.35e12, 32 << 10)
H200 = Device("H200", 132, 65536, 2048, 228 << 10, 50 << 20, 4.8e12, 48 << 10)
B200 = Device("B200", 148, 65536, 2048, 228 << 10, 126 << 20, 8.0e12, 64 << 10)
RTX_4090 = Device("RTX 4090", 128, 65536, 1536, 100 << 10, 72 << 20, 1.008e12, 12 << 10)
RTX_5090 = Device("RTX 5090", 170, 65536, 1536, 100 << 10, 96 << 20, 1.792e12, 16 << 10)

ABSENT = H100  # for tensors that are on no GPU: in the interpreter, and where kernels are compiled without a device


def in_flight(bandwidth: float, multiprocessors: int) -> int:
    """Bytes in flight that a multiprocessor needs, from its share of the bandwidth, in units of 4 KiB."""
    return max(math.ceil(bandwidth * LATENCY / multiprocessors / 4096) * 4096, 8192)


def read(properties: Any) -> Device:
    """The device of `torch.cuda.get_device_properties`; what an older PyTorch does not report is taken from an H100."""
    multiprocessors = properties.multi_processor_count
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)  # kHz, bits
    # two transfers a clock; where no clock is reported, an H100's bandwidth a multiprocessor
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
    """The device of a torch tensor; ABSENT where it is on no GPU."""
    return _of_index(x.device.index) if x.is_cuda else ABSENT
