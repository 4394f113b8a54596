"""Predicts how long launches take on a GPU, from what the evidence records of their machine code (docs/time_model.md).

A *prediction*: nothing here was measured by this project.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hw3gpu.kernels.gpu.device import A100, B200, H100, H200, RTX_5090, Device

from .evidence import occupancy
from .evidence.run import FILE, kernels_of

Kernel = Mapping[str, Any]  # what evidence.json says of a launch

LAUNCH = 3e-6  # seconds that each launch takes beside its work
REACHED = 0.92  # of the bandwidth on the data sheet, at most
SATURATED = 0.95  # of that, with the bytes under way that `Device` asks for
MEMORY, CACHE = 400e-9, 175e-9  # seconds until a load that nothing holds up comes from memory, and from L2
CACHE_KEPT = 0.6  # of L2, of what was touched last
CACHE_RATE = 2.0  # of the bandwidth of memory
PORT = 64  # bytes a cycle, that one multiprocessor gets from L2 at most
START = 500  # cycles until the first instruction of a program


@dataclass(frozen=True)
class Clock:
    """What the model knows of a GPU beside `Device`."""

    arch: int
    frequency: float  # Hz: what the data sheet's rate of float32 comes to
    fp32: int = 1  # cycles of a scheduler for a warp's instruction (CUDA C++ Programming Guide, arithmetic instructions)
    fp64: int = 2


CLOCKS = {
    A100.name: Clock(80, 1.41e9, fp32=2, fp64=4),
    H100.name: Clock(90, 1.98e9),
    H200.name: Clock(90, 1.98e9),
    "H100 NVL": Clock(90, 1.78e9),
    "H20": Clock(90, 1.98e9),
    B200.name: Clock(100, 1.96e9),
    RTX_5090.name: Clock(120, 2.41e9, fp64=64),
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
    at_once = max(occupancy.programs(device, clock.arch, kernel["registers"], kernel["warps"], kernel["shared"]), 1)
    of_each = -(-kernel["grid"] // device.multiprocessors)
    full, rest = divmod(of_each, at_once)
    program = _Program(kernel, device, clock, earlier, min(at_once, of_each))
    cycles = (full * program.cycles(at_once) if full else 0.0) + (program.cycles(rest) if rest else 0.0)
    return cycles / clock.frequency


class _Program:
    """A program of a launch, among others on its multiprocessor; times in cycles, bytes of a program."""

    def __init__(self, kernel: Kernel, device: Device, clock: Clock, earlier: int, at_once: int) -> None:
        grid, self.warps, self.clock = kernel["grid"], kernel["warps"], clock
        read, written = kernel.get("read", 0) / grid, kernel.get("written", 0) / grid
        self.parts, again = _with_trips(kernel["parts"], read / self.warps)
        again *= self.warps
        kept = CACHE_KEPT * device.l2
        cached = read * min(kept / (read * grid), 1.0) if earlier and read else 0.0  # what the launch before left in L2
        cached += again * min(kept / (read * device.multiprocessors * at_once), 1.0) if again else 0.0
        share = REACHED * device.bandwidth / clock.frequency  # bytes a cycle, of all
        rate = min(share / min(grid, device.multiprocessors), PORT)
        loaded = (read + again - cached) / rate
        self.memory = loaded + written / rate  # what memory is busy with
        # what the program itself waits for: a store is done when L2 has it, and what is asked for ahead comes meanwhile
        waited = 1 - _share_ahead(self.parts)
        self.transfer = waited * (loaded + cached / rate / CACHE_RATE) + written / rate / CACHE_RATE
        self.issue = sum(trips * _issue(part, clock) for part, trips in self.parts) * self.warps / 4
        self.from_cache = cached / (read + again) if read else 0.0
        # the latency under load: `in_flight` bytes under way give SATURATED of the bandwidth
        saturated = device.in_flight / (SATURATED * share / device.multiprocessors)
        self.queue = max(saturated - MEMORY * clock.frequency, 0.0) * (1 - SATURATED) / SATURATED

    def alone(self, latency: float) -> float:
        """With nobody else on the multiprocessor, where memory answers after `latency` and takes no time to send."""
        total = float(START)
        for part, trips in self.parts:
            busy = max(part["cycles"], _issue(part, self.clock) * self.warps / 4)
            loads, ahead = part.get("loaded", 0), part.get("ahead", 0)
            if part.get("loop") and loads and ahead >= loads:
                total += trips * max(busy, latency * loads / ahead)
            else:
                total += trips * (busy + (latency * loads / part["in_flight"] if loads else 0.0))
        return total

    def cycles(self, count: int) -> float:
        """Until `count` of them, begun together, are done: the largest of what bytes, taking turns and latency ask for."""
        return max(count * self.memory, self._taking_turns(count), self._by_littles_law(count))

    def _taking_turns(self, count: int) -> float:
        """Programs take turns at memory and at the schedulers: mean value analysis of a closed network of queues."""
        think = max(self.alone(self._latency(0.0)) - self.issue, 0.0)
        demand = (self.transfer, self.issue)
        waiting, total = [0.0, 0.0], 0.0
        for n in range(1, count + 1):
            stay = [d * (1 + w) for d, w in zip(demand, waiting, strict=True)]
            total = think + sum(stay)
            waiting = [n * s / total for s in stay]
        return total

    def _by_littles_law(self, count: int) -> float:
        """Bytes under way are bytes a second times latency, and latency grows with the share of the bandwidth in use."""
        need = count * self.memory
        low, high = need, need + self.alone(self._latency(0.999))
        for _ in range(60):
            middle = (low + high) / 2
            if middle < self.alone(self._latency(min(need / middle, 0.999))):
                low = middle
            else:
                high = middle
        return high

    def _latency(self, used: float) -> float:
        """Cycles until a load is answered while the share `used` of the bandwidth is in use."""
        idle = MEMORY + (CACHE - MEMORY) * self.from_cache
        return idle * self.clock.frequency + self.queue * used / (1 - used)


def _share_ahead(parts: list[tuple[Mapping[str, Any], float]]) -> float:
    """Of the bytes that a program loads, those that a loop asks for a trip or more before it needs them."""
    loaded = sum(part.get("loaded", 0) * trips for part, trips in parts)
    ahead = sum(
        part["loaded"] * trips for part, trips in parts if part.get("loop") and part.get("ahead", 0) >= part.get("loaded", 1)
    )
    return ahead / loaded if loaded else 0.0


def _issue(part: Mapping[str, Any], clock: Clock) -> float:
    """Cycles for which a warp's instructions keep its scheduler busy, or the unit that most of them need."""
    fma = clock.fp32 * part.get("fp32", 0) + 2 * part.get("imad", 0)
    cost = {"all": 1, "alu": 2, "fp64": clock.fp64, "xu": 8, "memory": 4}
    return max(fma, *(part.get(unit, 0) * cycles for unit, cycles in cost.items()))


def _with_trips(parts: list[Mapping[str, Any]], need: float) -> tuple[list[tuple[Mapping[str, Any], float]], float]:
    """(parts with how often they are gone through, bytes read a second time) of a warp that has to read `need` bytes.

    What straight code asks for ahead is of the loop behind it; a loop after the first that loads reads again, unless it is what
    an unrolled one leaves over. A loop that loads nothing, and those of a launch that reads no whole tensor: once.
    """
    once = sum(part.get("loaded", 0) - part.get("ahead", 0) for part in parts if not part.get("loop"))
    of_trip = next((part["loaded"] for part in parts if part.get("loop") and part.get("loaded")), 0)
    in_loops = max(need - once, 0.0) if of_trip else 0.0
    out, passes, unrolled = [], 0, 0
    for part in parts:
        loads = part.get("loaded", 0) if part.get("loop") else 0
        trips = 1.0
        if loads and need:
            trips = 0.0 if loads < unrolled else in_loops / loads
            passes += trips > 0
        unrolled = loads or (0 if part.get("barriers") else unrolled)
        out.append((part, trips))
    return out, max(passes - 1, 0) * in_loops


# ---------------------------------------------------------------------------------------------- of evidence.json
def passes(kernels: Mapping[str, Kernel]) -> dict[str, dict[str, Kernel]]:
    """The launches of the forward pass and of the backward pass, by their names."""
    found: dict[str, dict[str, Kernel]] = {"forward": {}, "backward": {}}
    for name, kernel in kernels.items():
        found["backward" if "backward" in name else "forward"][name] = kernel
    return {which: launches for which, launches in found.items() if launches}


def predicted(label: str, device: Device = H100) -> dict[str, float]:
    """Microseconds of the forward and the backward pass of a case of evidence.json, predicted for a device.

    The code is that of the device's architecture: an H200's, for one, is compiled from the plans of an H100. Raises KeyError
    where the evidence has no such case, or the model no such device.
    """
    clock = CLOCKS[device.name]
    found = kernels_of(json.loads(FILE.read_text()))[label][str(clock.arch)]
    return {which: seconds(launches, device) * 1e6 for which, launches in passes(found).items()}


def least_seconds(once: int, again: int, device: Device) -> float:
    """What no kernel beats: a launch, and the bytes at REACHED of the bandwidth.

    once: bytes, each once; again: those of them that are needed a second time, where L2 cannot keep them.
    """
    more = again * max(0.0, 1 - CACHE_KEPT * device.l2 / again) if again else 0.0
    return (once + more) / (REACHED * device.bandwidth) + LAUNCH
