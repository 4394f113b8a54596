"""A stand-in for `torch.cuda` that does nothing, and keeps CUDA's rules: `python -m benchmarks gpu --pretend`.

Tensors are on the `meta` device, kernels are compiled and not run (`inside_triton.StandIn`), times are those of the host. What
CUDA would refuse raises here: the time of an event that has not happened, waiting while a graph is captured, a capture on the
default stream, the pool of a graph that is not captured; and a capture that it gives up leaves its stream behind.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch


class RefusedError(RuntimeError):
    """What CUDA would not have done."""


class Stream:
    """Work in order; nothing runs, so that there is nothing to wait for."""

    def wait_stream(self, stream: Stream) -> None:
        """Asked of CUDA before work moves from one stream to another."""


class Event:
    """Its time is the host's when it was recorded, and is had after the next `synchronize`."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing, self.at, self.happened = enable_timing, 0.0, False

    def record(self, stream: Stream | None = None) -> None:
        Cuda.refuse_while_capturing("recording a timed event")
        self.at, self.happened = time.perf_counter(), False
        Cuda.recorded.append(self)

    def elapsed_time(self, end: Event) -> float:
        if not (self.timing and end.timing):
            raise RefusedError("the time of an event without timing")
        if not (self.happened and end.happened):
            raise RefusedError("the time of an event that has not happened: nobody has waited for it")
        return 1e3 * (end.at - self.at)


class CUDAGraph:
    """Captured once, replayed at will."""

    def __init__(self) -> None:
        self.captured = False

    def pool(self) -> CUDAGraph:
        return self

    def replay(self) -> None:
        if not self.captured or Cuda.capturing:
            raise RefusedError("the replay of a graph that is not captured, or inside a capture")


class Cuda:
    """The part of `torch.cuda` that the clock uses; one device, all of it of the class."""

    default = Stream()
    capturing: CUDAGraph | None = None
    recorded: ClassVar[list[Event]] = []
    current = default

    @classmethod
    def refuse_while_capturing(cls, what: str) -> None:
        if cls.capturing is not None:
            raise RefusedError(f"{what}, while a graph is captured")

    @classmethod
    def current_stream(cls) -> Stream:
        return cls.current

    @classmethod
    def set_stream(cls, stream: Stream) -> None:
        cls.current = stream

    @classmethod
    @contextlib.contextmanager
    def stream(cls, stream: Stream) -> Iterator[None]:
        before, cls.current = cls.current, stream
        try:
            yield
        finally:
            cls.current = before

    @classmethod
    @contextlib.contextmanager
    def graph(cls, graph: CUDAGraph, pool: CUDAGraph | None = None, stream: Stream | None = None) -> Iterator[None]:
        side = Stream() if stream is None else stream
        if side is cls.default:
            raise RefusedError("a capture on the default stream")
        if pool is not None and not pool.captured:
            raise RefusedError("the pool of a graph that is not captured")
        cls.synchronize()
        before, cls.current, cls.capturing = cls.current, side, graph
        try:
            yield
            graph.captured = True
            cls.current = before
        except RefusedError:  # the end of a capture that CUDA has given up raises before torch.cuda.graph restores the stream
            raise
        except Exception:
            cls.current = before
            raise
        finally:
            cls.capturing = None

    @classmethod
    def synchronize(cls) -> None:
        cls.refuse_while_capturing("waiting for the device")
        for event in cls.recorded:
            event.happened = True
        cls.recorded.clear()

    @classmethod
    def set_sync_debug_mode(cls, debug_mode: str) -> None:
        """Of a `meta` tensor nothing can be waited for: what would wait raises anyway."""

    @classmethod
    def empty_cache(cls) -> None:
        cls.refuse_while_capturing("giving memory back")

    @classmethod
    def mem_get_info(cls) -> tuple[int, int]:
        return 70 << 30, 80 << 30

    @classmethod
    def reset_peak_memory_stats(cls) -> None:
        """No memory is counted."""

    @classmethod
    def memory_allocated(cls) -> int:
        return 0

    @classmethod
    def max_memory_allocated(cls) -> int:
        return 0

    @classmethod
    def get_device_properties(cls, device: Any = None) -> Any:
        """As `torch.cuda.get_device_properties` says them of an H100."""
        return SimpleNamespace(
            name="pretended H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
            L2_cache_size=50 << 20, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
            shared_memory_per_multiprocessor=228 << 10, memory_clock_rate=2619000, memory_bus_width=5120,
        )  # fmt: skip


for _name in (Stream, Event, CUDAGraph):
    setattr(Cuda, _name.__name__, _name)


def compiled(function: Any) -> Any:
    """`torch.compile` as far as its graph: what Inductor would make of it needs a device."""
    return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)
