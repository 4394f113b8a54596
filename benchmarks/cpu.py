"""`python -m benchmarks cpu`: the CPU kernels against PyTorch and against memory.

Every figure goes through `hw3gpu.functional`, autograd and the outputs' memory included, in float32 unless a row says so.
Values and gradients are held to the answer sheet first, at four rows or channels. The contestants take turns in one process, so
that a busy machine slows all of them; a time is the median of its turns, a ratio the median and the quartiles of the ratios
turn by turn. The limit is a plain copy, by two threads into warm memory, of as many bytes as the row has to move.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch

from hw3gpu._core import pool as _pool
from hw3gpu._torch import small_calls
from hw3gpu.kernels.cpu import batch_norm_small, cross_entropy_small

from . import gpu_checks
from .cpu_cases import HALVES, KNOWN, ROWS, TINIES, Work
from .cuda_clock import Step
from .harness import COPY, OURS, Aim, Bench, Row, Spread, Task, bench, in_turn
from .rows import F32, SEED, Inputs, compiled, contestants, inputs

THREADS = 2
LIMIT = 1.6  # times the plain copy, for shapes of at least LARGE bytes
LARGE = 16 << 20
HALF_RATE = 0.8  # of float32's elements a second
FIRST_CALL = 0.5  # s, in a process that finds the kernels compiled
COPIES = tuple(2**n for n in range(18, 29, 2))  # bytes that are read, and as many that are written


# ---------------------------------------------------------------------------------------------- the contestants
@contextmanager
def pool(name: str) -> Iterator[None]:
    """Without the pool for contestants whose name ends in 'pool off'."""
    before = os.environ.get(_pool.VARIABLE)
    if name.endswith("pool off"):
        os.environ[_pool.VARIABLE] = "0"
    try:
        yield
    finally:
        os.environ.pop(_pool.VARIABLE, None)
        if before is not None:
            os.environ[_pool.VARIABLE] = before


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many of PyTorch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def copier(nbytes: float) -> Callable[[], None]:
    """A plain copy that reads and writes `nbytes` in all, by THREADS threads, from warm memory into warm memory."""
    source = np.ones(int(nbytes / 2) // 4, np.float32)
    pieces = list(zip(np.array_split(source, THREADS), np.array_split(np.ones_like(source), THREADS), strict=True))
    helpers = ThreadPoolExecutor(THREADS)

    def copy() -> None:
        rest = [helpers.submit(np.copyto, out, part) for part, out in pieces[1:]]
        np.copyto(pieces[0][1], pieces[0][0])
        for done in rest:
            done.result()

    return copy


def steps_of(work: Work, names: Sequence[str]) -> tuple[Inputs, dict[str, Step]]:
    """The row's inputs, and the contestants named: 'hw3gpu', 'eager', 'compiled'."""
    given = inputs(work.row, "cpu")
    made = contestants(work.row, given, compiled)
    return given, {name: made[name]() for name in names}


def results_of(work: Work, step: Step) -> tuple[Any, ...]:
    """Value and gradients; in evaluation there are none."""
    if work.of == "forward":
        with torch.no_grad():
            return step.forward(), ()
    value = step.forward()
    return value.detach(), step.backward(value)


def row_of(
    work: Work, given: Inputs, calls: Mapping[str, Callable[[], object]], steps: Mapping[str, Step], **more: Any
) -> Row:  # fmt: skip
    """The harness's row, verified by the results of hw3gpu and of eager PyTorch."""

    def check() -> str:
        return gpu_checks.row_check(work.row, given, *(results_of(work, steps[name]) for name in (OURS, "eager")))

    row = work.row
    of_row = (row.name, row.operation, row.shape, row.dtype_name, work.of)
    return Row(*of_row, dict(calls), check, work.passes * work.nbytes, **more)


# ---------------------------------------------------------------------------------------------- the rows
def measure_copies(run: Bench) -> None:
    """The line that bandwidths are shown beside."""
    seconds = in_turn({str(size): copier(2 * size) for size in COPIES}, run.turns)
    rates = {size: Spread.of([2 * int(size) / s / 1e9 for s in of]) for size, of in seconds.items()}
    run.results.parts["copy_GB_s"] = {size: asdict(rate) for size, rate in rates.items()}


def measure_row(run: Bench, work: Work) -> None:
    given, steps = steps_of(work, (OURS, "eager", "compiled", *work.others))
    calls: dict[str, Callable[[], object]] = {name: partial(results_of, work, step) for name, step in steps.items()}
    calls = {OURS: calls[OURS], f"{OURS}, pool off": calls[OURS], **calls}
    if work.passes:
        calls[COPY] = copier(work.passes * work.nbytes)
    aims = [Aim(name, least) for name, least in (("eager", work.eager), ("compiled", work.compiled)) if least]
    aims += [Aim(COPY, 1 / LIMIT)] if work.passes and work.nbytes >= LARGE else []
    run.measure(row_of(work, given, calls, steps, aims=aims), copy=COPY if work.passes else None, around=pool)
    torch.compiler.reset()


def measure_half(run: Bench, work: Work) -> None:
    """Beside float32 of as many elements."""
    given, steps = steps_of(work, (OURS, "eager"))
    _, of_float32 = steps_of(replace(work, row=replace(work.row, dtype=F32)), (OURS,))
    named = {**steps, "hw3gpu, float32": of_float32[OURS]}
    calls = {name: partial(results_of, work, step) for name, step in named.items()}
    run.measure(row_of(work, given, calls, steps, aims=[Aim("hw3gpu, float32", HALF_RATE)]))


def measure_known(run: Bench, work: Work) -> None:
    """Statistics that are known. Small calls are made several times a turn."""
    given, steps = steps_of(work, (OURS, "eager"))
    calls = {name: partial(results_of, work, step) for name, step in steps.items()}
    aims = [Aim("eager", work.eager or 1)]
    run.measure(row_of(work, given, calls, steps, aims=aims, repeat=max(1, LARGE // work.nbytes)))


def measure_tiny(run: Bench, work: Work) -> None:
    given, steps = steps_of(work, (OURS, "eager"))
    calls = {name: partial(results_of, work, step) for name, step in steps.items()}
    aims = [Aim("eager", work.eager or 1)]
    run.measure(row_of(work, given, calls, steps, aims=aims, repeat=200), turns=4 * run.turns)
    layers_us = run.results.parts.setdefault("layers_us", {})
    layers_us[work.row.name] = layers(work, given, steps, run.turns)


# ---------------------------------------------------------------------------------------------- where a small call's time goes
@dataclass
class _Call:
    """A call to be made again. It keeps the result too: calls below it may have taken its address."""

    function: Callable[..., object]
    args: tuple[Any, ...]
    options: dict[str, Any]
    result: object

    def __call__(self) -> object:
        return self.function(*self.args, **self.options)


@contextmanager
def _noting(module: Any, names: tuple[str, ...], calls: list[_Call]) -> Iterator[None]:
    """Inside, calls of these functions of a module are noted."""
    before = {name: getattr(module, name) for name in names}

    def noting(function: Callable[..., object]) -> Callable[..., object]:
        def noted(*args: Any, **options: Any) -> object:
            result = function(*args, **options)
            calls.append(_Call(function, args, options, result))
            return result

        return noted

    for name, function in before.items():
        setattr(module, name, noting(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


class _Empty(torch.autograd.Function):
    """What autograd itself takes: forward saves its inputs, backward returns gradients, nothing is computed."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
        return torch.empty_like(inputs[0]) if inputs[-1] is True else torch.empty(())

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        saved = list(ctx.saved_tensors)
        return tuple(torch.empty_like(saved.pop(0)) if needed else None for needed in ctx.needs_input_grad)


def layers(work: Work, given: Inputs, steps: Mapping[str, Step], turns: int) -> dict[str, float]:
    """Microseconds of one small forward and backward, by layer."""
    module: ModuleType
    names: tuple[str, ...]
    kernel_names: tuple[str, ...]
    if work.row.operation == "batch norm":
        names = ("batch_norm_forward", "batch_norm_backward")
        module, kernel_names, last = batch_norm_small, ("_forward", "_backward"), True
    else:
        names, last = ("cross_entropy_step",), None
        module, kernel_names = cross_entropy_small, ("_at_addresses",)
    empty = Step(lambda: _Empty.apply(*given.leaves, last), given.leaves, given.upstream)
    with_outputs: list[_Call] = []
    kernels: list[_Call] = []
    with _noting(small_calls, names, with_outputs), _noting(module, kernel_names, kernels):
        results_of(work, steps[OURS])
    contestants: dict[str, Callable[[], object]] = {
        "all": partial(results_of, work, steps[OURS]),
        "eager": partial(results_of, work, steps["eager"]),
        "an empty autograd function": partial(results_of, work, empty),
        "outputs and addresses": lambda: [call() for call in with_outputs],
        "kernels": lambda: [call() for call in kernels],
    }
    seconds = in_turn(contestants, 4 * turns, repeat=200)
    found = {name: 1e6 * statistics.median(s) for name, s in seconds.items()}
    found["outputs and addresses"] -= found["kernels"]
    parts = ("an empty autograd function", "outputs and addresses", "kernels")
    found["checks and choices"] = found["all"] - sum(found[part] for part in parts)
    return found


# ---------------------------------------------------------------------------------------------- the first call in a process
FIRST_CALLS = {
    "cross entropy": "z = torch.zeros(32, 10, requires_grad=True); hw3gpu.functional.cross_entropy(z, z.argmax(1)).backward()",
    "softmax": "z = torch.zeros(32, 10, requires_grad=True); hw3gpu.functional.softmax(z, 1).sum().backward()",
    "batch norm": "x = torch.zeros(8, 3, 4, 4, requires_grad=True); "
    "hw3gpu.functional.batch_norm(x, None, None, training=True).sum().backward()",
}
FIRST_CALL_CODE = """
import time, torch, numba, hw3gpu.functional
start = time.perf_counter()
{}
print(time.perf_counter() - start)
"""


def measure_first_calls(run: Bench) -> None:
    """Forward and backward in a process of its own, imports done, after another process has compiled what they need."""
    found = run.results.parts.setdefault("first_calls_s", {})
    for name, call in FIRST_CALLS.items():
        command = [sys.executable, "-c", FIRST_CALL_CODE.format(call)]
        times = [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(4)]
        found[name] = statistics.median(times[1:])


# ---------------------------------------------------------------------------------------------- the command
def tasks() -> list[Task]:
    kinds = ((measure_row, ROWS), (measure_half, HALVES), (measure_known, KNOWN), (measure_tiny, TINIES))
    rows = [(work.row.name, partial(_measured, measure, work)) for measure, works in kinds for work in works]
    return [(COPY, measure_copies), *rows, ("first calls", measure_first_calls)]


def _measured(measure: Callable[[Bench, Work], None], work: Work, run: Bench) -> None:
    measure(run, work)


def run(args: argparse.Namespace) -> int:
    """Verifies and measures everything `args.turns` times; the status is that of `bench`."""
    with threads(THREADS):
        return bench(args, tasks(), SEED, threads=THREADS)
