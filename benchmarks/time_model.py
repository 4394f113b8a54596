"""Predicts how long launches take on a GPU, from what the evidence records of their machine code (docs/time_model.md).

A *prediction*: nothing here was measured by this project.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hw3gpu.kernels.gpu.device import A100, B200, H100, H200, RTX_5090, Device

from . import occupancy
from .evidence import FILE, kernels_of

Kernel = Mapping[str, Any]  # what evidence.json says of a launch

LAUNCH = 3e-6  # seconds that each launch takes beside its work
SATURATED = 0.9  # of the bandwidth, with the bytes under way that `Device` asks for
CACHE_KEPT = 0.6  # of L2, of what was touched last
CACHE_RATE = 2.0  # of the bandwidth of memory
PORT = 64  # bytes a cycle, that one multiprocessor gets from L2 at most
START = 500  # cycles until the first instruction of a program


@dataclass(frozen=True)
class Clock:
    """What the model knows of a GPU beside `Device`."""

    arch: int
    frequency: float  # Hz
    memory: int  # cycles until a load that nothing holds up comes from memory
    cache: int  # and from L2
    fp32: int = 1  # cycles of a scheduler for a warp's instruction
    fp64: int = 2


CLOCKS = {
    A100.name: Clock(80, 1.41e9, 466, 262, fp32=2, fp64=4),
    H100.name: Clock(90, 1.98e9, 479, 262),
    H200.name: Clock(90, 1.98e9, 479, 262),
    B200.name: Clock(100, 1.965e9, 479, 262),
    RTX_5090.name: Clock(120, 2.41e9, 541, 273, fp64=64),
}


def seconds(kernels: Mapping[str, Kernel], device: Device) -> float:
    """Of launches that follow each other, `kernels` by name in their order; 3 us each, and what `kernel_seconds` says."""
    total, earlier = 0.0, 0
    for kernel in kernels.values():
        total += LAUNCH + kernel_seconds(kernel, device, earlier)
        earlier = kernel.get("read", 0) or earlier
    return total


def kernel_seconds(kernel: Kernel, device: Device, earlier: int = 0) -> float:
    """Of one launch's work. earlier: bytes that the launch before it read, of the same tensors, 0 if there was none."""
    clock = CLOCKS[device.name]
    program = _Program(kernel, device, clock, earlier)
    at_once = max(
        occupancy.programs(device, clock.arch, kernel["registers"], kernel["warps"], kernel["shared"]), 1
    )  # fmt: skip
    full, rest = divmod(-(-kernel["grid"] // device.multiprocessors), at_once)
    cycles = (full * program.cycles(at_once) if full else 0.0) + (program.cycles(rest) if rest else 0.0)
    return cycles / clock.frequency


class _Program:
    """A program of a launch, among others on its multiprocessor; times in cycles, bytes of a program."""

    def __init__(self, kernel: Kernel, device: Device, clock: Clock, earlier: int):
        grid, warps = kernel["grid"], kernel["warps"]
        read, written = kernel.get("read", 0), kernel.get("written", 0)
        kept = CACHE_KEPT * device.l2
        hit = min(kept / read, 1.0) if earlier and read else 0.0
        parts, again = _with_trips(kernel["parts"], read / grid / warps)
        self.again = again * warps  # bytes that the program reads a second time
        at_once = self.again and read / grid * device.multiprocessors
        again_hit = min(kept / at_once, 1.0) if at_once else 0.0
        from_memory = read / grid * (1 - hit) + self.again * (1 - again_hit) + written / grid
        from_cache = read / grid * hit + self.again * again_hit
        self.rate = min(device.bandwidth / min(grid, device.multiprocessors) / clock.frequency, PORT)
        self.memory = (from_memory + from_cache / CACHE_RATE) / self.rate
        self.issue = sum(trips * _issue(part, clock) for part, trips in parts) * warps / 4
        self.parts, self.clock = parts, clock
        # the latency under load: so that `in_flight` bytes under way give SATURATED of the bandwidth
        saturated = device.in_flight / (SATURATED * device.bandwidth / device.multiprocessors) * clock.frequency
        self.queue = max(saturated - clock.memory, 0) * (1 - SATURATED) / SATURATED
        self.in_memory = from_memory / (from_memory + from_cache) if from_memory else 0.0
        self.warps = warps

    def alone(self, latency: float) -> float:
        """With nobody else on the multiprocessor, where memory answers after `latency` and takes no time to send."""
        total = float(START)
        for part, trips in self.parts:
            busy = max(part["cycles"], _issue(part, self.clock) * self.warps / 4)
            loads = part.get("loaded", 0)
            if not loads:
                total += trips * busy
            elif part.get("loop") and part["in_flight"] >= loads:  # loads of other trips are under way too
                total += trips * max(busy, (busy + latency) * loads / part["in_flight"])
            else:
                total += trips * (busy + latency * loads / max(part["in_flight"], 1))
        return total

    def cycles(self, count: int) -> float:
        """Until `count` of them, begun together, are done: the larger of what taking turns and what waiting leave."""
        return max(self._in_turn(count), self._by_littles_law(count))

    def _in_turn(self, count: int) -> float:
        """Programs take turns at memory and at the schedulers: mean value analysis of a closed network of queues."""
        think = max(self.alone(self._latency(0.0)) - self.issue, 0.0)
        waiting = {"memory": 0.0, "issue": 0.0}
        demand = {"memory": self.memory, "issue": self.issue}
        total = 0.0
        for n in range(1, count + 1):
            stay = {name: demand[name] * (1 + waiting[name]) for name in demand}
            total = think + sum(stay.values())
            waiting = {name: n * stay[name] / total for name in demand}
        return total

    def _by_littles_law(self, count: int) -> float:
        """Bytes under way are bytes a second times latency, and latency grows with the share of the bandwidth in use."""
        need = count * self.memory
        low, high = need, max(need, self.alone(self._latency(0.0))) * 1000
        for _ in range(60):
            middle = (low + high) / 2
            if middle < self.alone(self._latency(min(need / middle, 0.999))):
                low = middle
            else:
                high = middle
        return high

    def _latency(self, used: float) -> float:
        """Cycles until a load is answered while the share `used` of the bandwidth is in use."""
        idle = self.clock.memory * self.in_memory + self.clock.cache * (1 - self.in_memory)
        return idle + self.queue * used / (1 - used)


def _issue(part: Mapping[str, Any], clock: Clock) -> float:
    """Cycles for which a warp's instructions keep its scheduler busy, or the pipe that most of them need."""
    cost = {"all": 1, "int": 2, "fp32": clock.fp32, "fp64": clock.fp64, "xu": 8, "memory": 4}
    return max(part.get(pipe, 0) * cycles for pipe, cycles in cost.items())


def _with_trips(parts: list[Mapping[str, Any]], need: float) -> tuple[list[tuple[Mapping[str, Any], float]], float]:
    """(parts with how often they are gone through, bytes read a second time) of a warp that has to read `need` bytes.

    A loop after the first that loads reads again; a loop that loads nothing and one of a launch without whole tensors: once.
    """
    once = sum(part.get("loaded", 0) for part in parts if not part.get("loop"))
    of_trip = next((part["loaded"] for part in parts if part.get("loop") and part.get("loaded")), 0)
    trips = max((need - once) / of_trip, 0.0) if of_trip and need else 1.0
    out, loops = [], 0
    for part in parts:
        loop = bool(part.get("loop"))
        loops += loop and bool(part.get("loaded"))
        out.append((part, trips if loop else 1.0))
    return out, (loops - 1) * trips * of_trip if loops > 1 and need else 0.0


# ---------------------------------------------------------------------------------------------- of evidence.json
def passes(kernels: Mapping[str, Kernel]) -> dict[str, dict[str, Kernel]]:
    """The launches of the forward pass and of the backward pass, by their names."""
    found: dict[str, dict[str, Kernel]] = {"forward": {}, "backward": {}}
    for name, kernel in kernels.items():
        found["backward" if "backward" in name else "forward"][name] = kernel
    return {which: launches for which, launches in found.items() if launches}


def predicted(label: str, device: Device = H100) -> dict[str, float]:
    """Microseconds of the forward and the backward pass of a case of evidence.json, predicted for a device.

    Raises KeyError where the evidence has no such case, or the model no such device.
    """
    clock = CLOCKS[device.name]
    found = kernels_of(json.loads(FILE.read_text()))[label][str(clock.arch)]
    return {which: seconds(launches, device) * 1e6 for which, launches in passes(found).items()}


def least_seconds(once: int, again: int, device: Device) -> float:
    """What no kernel beats: a launch, and the bytes at SATURATED of the bandwidth.

    once: bytes, each once; again: those of them that are needed a second time, where L2 cannot keep them.
    """
    more = again * max(0.0, 1 - CACHE_KEPT * device.l2 / again) if again else 0.0
    return (once + more) / (SATURATED * device.bandwidth) + LAUNCH
