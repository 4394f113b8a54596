"""Times on a CUDA device: of a call, of a CUDA graph of it, and of the host, in turn with others and with a cold cache.

`Clock` takes `torch.cuda`, or what stands for it (`pretended.Cuda`), and is the one place that knows CUDA's rules:

- before each timed piece a buffer larger than the L2 cache is *read*: what is left there are clean lines, whose eviction costs
  nothing, and while the device reads them the host has the time to queue what follows;
- an event's time is asked for after a wait, once a turn, so that nothing waits between two contestants;
- a graph is captured on a side stream on which the same calls have run before (kernels are compiled and loaded then), forward
  and backward on the same stream and into the same pool; what a call saves is kept as long as the graph;
- a call that waits for the device cannot be captured: the last call before the capture runs where waiting raises, for a capture
  that fails may leave the default generator of random numbers unusable. Random numbers come from a generator of one's own.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .harness import told

Call = Callable[[], object]
WARM = 3  # calls before a capture, PyTorch's own number


@dataclass(frozen=True)
class Step:
    """Forward and backward of one contestant: `forward()` gives what `backward` differentiates by `leaves`, from `upstream`."""

    forward: Callable[[], torch.Tensor]
    leaves: tuple[torch.Tensor, ...]
    upstream: torch.Tensor

    def backward(self, result: torch.Tensor, retain: bool = False) -> tuple[torch.Tensor, ...]:
        """The gradients; retain: what the forward pass saved is kept."""
        return torch.autograd.grad(result, self.leaves, self.upstream, retain_graph=retain)


@dataclass(frozen=True)
class Timed:
    """A call to be timed, and what comes before it each time, untimed."""

    call: Call
    before: Call = tuple  # nothing


@dataclass
class Passes:
    """The calls to be timed of one contestant, and what has to live as long as they."""

    forward: Timed
    backward: Timed
    held: tuple[Any, ...] = ()


class Backward:
    """Backward passes of a step: `before` makes the forward pass that `call` differentiates."""

    def __init__(self, step: Step) -> None:
        self.step, self.result = step, torch.empty(())

    def before(self) -> None:
        self.result = self.step.forward()

    def call(self) -> tuple[torch.Tensor, ...]:
        return self.step.backward(self.result)


@dataclass
class Times:
    """Microseconds of each turn, by contestant; and what was the matter with those that failed."""

    turns: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Clock:
    """Times calls on the device of `cuda`; `device` is where tensors for it are made, `l2` the bytes of its cache."""

    def __init__(self, cuda: Any, device: str, l2: int) -> None:
        self.cuda, self.device = cuda, device
        self.buffer = torch.zeros(max(4 * l2, 256 << 20) // 4, dtype=torch.float32, device=device)
        self.total = torch.zeros((), dtype=torch.float32, device=device)

    def flush(self) -> None:
        """Fills the cache with lines that nobody wants."""
        torch.sum(self.buffer, 0, out=self.total)

    def _timed(self, of: Timed) -> tuple[Any, Any]:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        of.before()
        self.flush()
        start.record()
        of.call()
        end.record()
        return start, end

    def in_turn(self, calls: Mapping[str, Timed], seconds: float, fewest: int = 5, most: int = 50) -> Times:
        """`most` turns of all calls, or as many as `seconds` allow, after one that does not count.

        Each turn begins with another call: the first one after a wait is at a disadvantage.
        """
        found, calls = Times({name: [] for name in calls}), dict(calls)
        begun = time.perf_counter()
        for turn in range(-1, most):
            events = {}
            order = list(calls.items())
            first = turn % max(len(order), 1)
            for name, call in order[first:] + order[:first]:
                try:
                    events[name] = self._timed(call)
                except Exception as error:  # the others still are measured
                    found.failed[name] = told(error)
                    del calls[name], found.turns[name]
            self.cuda.synchronize()
            if turn >= 0:
                for name, (start, end) in events.items():
                    found.turns[name].append(1e3 * start.elapsed_time(end))
            if turn + 1 >= fewest and time.perf_counter() - begun > seconds:
                break
        return found

    def called(self, step: Step) -> Passes:
        """Forward and backward as they are called; each backward pass is the first one of its own forward pass."""
        again = Backward(step)
        again.before()
        again.call()  # what is compiled at the first call is
        return Passes(Timed(step.forward), Timed(again.call, again.before))

    def captured(self, step: Step) -> Passes:
        """Two graphs. RuntimeError if a call waits for the device."""
        before = self.cuda.current_stream()
        try:
            return self._captured(step)
        except Exception:
            self.cuda.set_stream(before)  # a capture that fails may leave its own behind
            raise

    def _captured(self, step: Step) -> Passes:
        cuda, side = self.cuda, self.cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(WARM - 1):
                step.backward(step.forward())
            self._without_waiting(step)
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        forward, backward = cuda.CUDAGraph(), cuda.CUDAGraph()
        with cuda.graph(forward, stream=side):
            result = step.forward()
        with cuda.graph(backward, pool=forward.pool(), stream=side):
            gradients = step.backward(result, retain=True)
        forward.replay()  # what the backward reads is there
        cuda.synchronize()
        return Passes(Timed(forward.replay), Timed(backward.replay), (result, gradients))

    def _without_waiting(self, step: Step) -> None:
        self.cuda.set_sync_debug_mode("error")
        try:
            step.backward(step.forward())
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            raise RuntimeError(f"no graph: a call waits for the device ({told(error)})") from None
        finally:
            self.cuda.set_sync_debug_mode("default")

    def host(self, of: Timed, repeats: int) -> float:
        """Microseconds of the host a call: the median of ten times `repeats`; after each ten a wait, lest a queue is full."""
        found = []
        for at in range(10 * repeats):
            if at % 10 == 0:
                self.cuda.synchronize()
            of.before()
            start = time.perf_counter()
            of.call()
            found.append(1e6 * (time.perf_counter() - start))
        self.cuda.synchronize()
        return statistics.median(found)

    def peak(self, step: Step) -> int:
        """Bytes that forward and backward hold at most, beside what was there before."""
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        step.backward(step.forward())
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated() - before

    def copies(self, sizes: tuple[int, ...], seconds: float) -> dict[int, list[float]]:
        """Bytes a second, read and written, of copies of so many bytes, turn by turn; what does not fit is left out."""
        rates = {}
        for size in sizes:
            if 3 * size > self.cuda.mem_get_info()[0]:
                continue
            source, target = (torch.zeros(size // 4, dtype=torch.float32, device=self.device) for _ in range(2))
            turns = self.in_turn({"copy": Timed(partial(target.copy_, source))}, seconds / len(sizes)).turns["copy"]
            rates[size] = [2 * size / (1e-6 * us) for us in turns]
        return rates

    def overhead(self) -> float:
        """Microseconds between the two events of a graph of one kernel that has nothing to do."""
        one = torch.zeros((), dtype=torch.float32, device=self.device)
        graph, side = self.cuda.CUDAGraph(), self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):
            one.add_(1)
        self.cuda.current_stream().wait_stream(side)
        with self.cuda.graph(graph, stream=side):
            one.add_(1)
        return statistics.median(self.in_turn({"nothing": Timed(graph.replay)}, 0.2).turns["nothing"])

    def free(self) -> None:
        """Gives back the memory that nothing holds; raises if the device does not answer any more."""
        self.cuda.synchronize()
        self.cuda.empty_cache()

    def clear(self) -> None:
        """As `free`, and what only cycles hold."""
        gc.collect()
        self.free()
