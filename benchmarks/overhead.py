"""`python -m benchmarks overhead`: what a call on a GPU costs the host, by layer, under a driver that does nothing.

Host tensors stand for those on a GPU: `meta` tensors would not do, many of whose operations are Python. Triton's own launcher
runs over a CUDA driver whose functions return at once; what a GPU's driver takes comes on top. Times are of this thread's
processor time: the median of `--turns` turns, in which the layers take turns. Nothing is computed, so that no result can be
held to the answer sheet: what is checked is that the call launches kernels. `gpu` verifies the same calls.

    an empty autograd function   with the call's inputs, saved tensors and outputs: what eager autograd asks of any call
    bare launches                the call's kernels with these arguments, through the compiled kernel's launcher
    checks, choices, ...         what is left of the call without the empty function and its bare launches
    launches                     for comparison: the same kernels through Triton's `kernel[grid](...)`, which is not used
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hw3gpu.functional as HF
from hw3gpu._core import arrays
from hw3gpu._torch import batch_norm as _batch_norm
from hw3gpu._torch import class_range

from .evidence.compile_without_gpu import StandIn
from .harness import OURS, Bench, Row, Task, bench

CALLS = 100  # in each turn


def zeros(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_(grad)


@dataclass(frozen=True)
class Case:
    """A call, the tensors with gradients, and shapes: of its result, of what it allocates and saves, of what backward makes."""

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    result: tuple[int, ...]
    allocated: tuple[tuple[int, ...], ...] = ()


def softmax(N: int, V: int) -> Case:
    z = zeros(N, V, grad=True)
    return Case(lambda: HF.softmax(z, 1), (z,), (N, V))


def cross_entropy(N: int, V: int, **options: Any) -> Case:
    z, target = zeros(N, V, grad=True), zeros(N, dtype=torch.int64)
    kept = ((N, V),) if options else ()
    return Case(lambda: HF.cross_entropy(z, target, **options), (z,), (), ((3, N), *kept))


def batch_norm(*shape: int) -> Case:
    x, weight, bias = zeros(*shape, grad=True), zeros(shape[1], grad=True), zeros(shape[1], grad=True)
    running = zeros(shape[1]), zeros(shape[1])
    return Case(lambda: HF.batch_norm(x, *running, weight, bias, training=True), (x, weight, bias), shape, ((4, shape[1]),))


CASES = {
    "softmax": softmax(64, 1000),
    "cross entropy, mean": cross_entropy(64, 1000),
    "cross entropy, mean, gradient='forward'": cross_entropy(64, 1000, gradient="forward"),
    "batch norm, training, 14x14": batch_norm(32, 8, 14, 14),
    "batch norm, training, 56x56": batch_norm(32, 2, 56, 56),
}


class _Empty(torch.autograd.Function):
    """Allocates and saves what the call does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, case: Case, *leaves: Tensor) -> Tensor:
        made = [leaves[0].new_empty(shape) for shape in (case.result, *case.allocated)]
        ctx.save_for_backward(*leaves, *made)
        return made[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        leaves = ctx.saved_tensors[: len(ctx.needs_input_grad) - 1]
        return None, *(leaf.new_empty(leaf.shape) for leaf in leaves)


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](*args, **options)`, and the same through what that compiled, of which Triton asks for each argument."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Any:
        return self.kernel[self.grid](*self.args, **self.options)

    def bare(self) -> Callable[[], Any]:
        compiled = self()
        bound = self.kernel.signature.bind(*self.args, **{k: v for k, v in self.options.items() if k in self.kernel.arg_names})
        args = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in bound.arguments.values()]
        grid = (*self.grid, 1, 1)[:3]
        return lambda: compiled.run(*grid, 0, compiled.function, compiled.packed_metadata, None, None, None, *args)


def launches_of(call: Callable[[], Any]) -> tuple[Any, list[Launch]]:
    """The result of `call`, and the launches that it makes through Triton."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []
    run = JITFunction.run

    def noted(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        found.append(Launch(kernel, grid, args, dict(options)))
        return run(kernel, *args, grid=grid, warmup=warmup, **options)

    with mock.patch.object(JITFunction, "run", noted):
        return call(), found


EMPTY, LAUNCHES, BARE = "an empty autograd function", "launches", "bare launches"
REST = "checks, choices and bound arguments"


def contestants(case: Case) -> dict[str, tuple[dict[str, Callable[[], Any]], int]]:
    """What is timed forward and backward, the whole call first; and how many launches there are."""
    result, forward = launches_of(case.call)
    empty, upstream = _Empty.apply(case, *case.leaves), torch.ones_like(result)

    def gradients(of: Tensor) -> Any:
        return torch.autograd.grad(of, case.leaves, upstream, retain_graph=True)

    _, backward = launches_of(lambda: gradients(result))
    whole = {
        "forward": (case.call, lambda: _Empty.apply(case, *case.leaves), forward),
        "backward": (lambda: gradients(result), lambda: gradients(empty), backward),
    }
    return {
        of: (
            {
                OURS: call,
                EMPTY: nothing,
                LAUNCHES: partial(_each, launches),
                BARE: partial(_each, [launch.bare() for launch in launches]),
            },
            len(launches),
        )
        for of, (call, nothing, launches) in whole.items()
    }


def _each(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def _no(*args: Any) -> None:
    """Neither on the host nor a call of a small tensor there; sooner than a mock says so."""


@functools.cache
def _the_flag(x: Tensor, rows: int) -> Tensor:
    """Made once, as on a GPU; there a call also asks whether its last copy has arrived, and starts another: CUDA's time."""
    return torch.full((1,), rows, dtype=torch.int64)


@contextlib.contextmanager
def on_a_gpu() -> Iterator[None]:
    """Inside, calls of host tensors launch what they would for tensors on an H100."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(StandIn(90, in_c=True))
        stack.enter_context(mock.patch.object(arrays, "on_host", _no))
        stack.enter_context(mock.patch.object(_batch_norm, "by_address", _no))
        stack.enter_context(mock.patch.object(class_range, "flag", _the_flag))
        yield


def measure(name: str, case: Case, run: Bench) -> None:
    """Each layer, and what is left of the call without an empty function and its launches."""
    with on_a_gpu():
        for of, (calls, count) in contestants(case).items():
            check = lambda count=count: "" if count else "no kernel is launched"  # noqa: E731
            shape, dtype = case.leaves[0].shape, str(case.leaves[0].dtype).removeprefix("torch.")
            row = Row(name, name.partition(",")[0], shape, dtype, of, calls, check, repeat=CALLS)
            seconds = run.measure(row, clock=time.thread_time, peers=False, warm=0)
            us = {layer: 1e6 * statistics.median(turns) for layer, turns in seconds.items()}
            if us:
                parts = {EMPTY: us[EMPTY], BARE: us[BARE], REST: us[OURS] - us[EMPTY] - us[BARE]}
                run.results.parts.setdefault("layers_us", {})[f"{name}, {of}"] = {"all": us[OURS], **parts}
                run.results.parts.setdefault("launches", {})[f"{name}, {of}"] = count


def tasks() -> list[Task]:
    return [(name, partial(measure, name, case)) for name, case in CASES.items()]


def run(args: argparse.Namespace) -> int:
    return bench(args, tasks(), clock="processor time of one thread")
