"""`python -m benchmarks linear`: linear cross entropy on the CPU beside PyTorch's unfused and chunked paths.

A step is forward and backward. Before anything is timed, loss and gradients of each path are held to PyTorch's in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import hw3gpu.functional as HF
from hw3gpu._torch.linear_chunks import Problem, chunk_rows

from . import gpu_checks
from .cpu import THREADS, threads
from .cuda_clock import Step
from .harness import OURS, Aim, Bench, Task, bench
from .harness import Row as Measured
from .rows import SEED, Row, inputs

ROWS, FEATURES, CLASSES = 1024, 512, 16000

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def contestants() -> dict[str, Loss]:
    """Each path as a function of input, linear_weight and target."""

    def chunked(**options: Any) -> Loss:
        return lambda x, W, t: F.linear_cross_entropy(x, W, t, options=torch.nn.LinearCrossEntropyOptions(**options))

    return {
        OURS: HF.linear_cross_entropy,
        "hw3gpu, a tenth": lambda x, W, t: HF.linear_cross_entropy(x, W, t, chunk_rows=ROWS // 11),
        "hw3gpu, 'backward'": lambda x, W, t: HF.linear_cross_entropy(x, W, t, gradient="backward"),
        "eager": F.linear_cross_entropy,
        "PyTorch, options=()": chunked(),
        "PyTorch, chunks of 128": chunked(chunking_method=None, batch_chunk_size=128),
        "PyTorch, chunks of 256": chunked(chunking_method=None, batch_chunk_size=256),
        "PyTorch, chunks of 512": chunked(chunking_method=None, batch_chunk_size=512),
    }


def _step(step: Step) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    result = step.forward()
    return result.detach(), step.backward(result)


def measure(run: Bench, shape: tuple[int, int, int]) -> None:
    """All paths at (rows, features, classes)."""
    row = Row("linear cross entropy", shape)
    given = inputs(row, "cpu")
    assert given.weight is not None
    steps = {
        name: Step(partial(loss, given.x, given.weight, given.target), given.leaves, given.upstream)  # type: ignore[arg-type]
        for name, loss in contestants().items()
    }

    def check() -> str:
        eager = _step(steps["eager"])
        wrong = {name: gpu_checks.row_check(row, given, _step(step), eager) for name, step in steps.items() if OURS in name}
        return "; ".join(f"{name}: {what}" for name, what in wrong.items() if what)

    calls: dict[str, Callable[[], object]] = {name: partial(_step, step) for name, step in steps.items()}
    aims = [Aim(name, 1.0) for name in calls if OURS not in name]
    of_row = (row.name, row.operation, row.shape, row.dtype_name, "forward and backward")
    run.measure(Measured(*of_row, calls, check, aims=aims), warm=0)
    weightless = Problem(given.x.detach(), given.weight.detach(), None, torch.empty(shape[0], 1), None)
    run.results.parts.setdefault("chunk_rows", {})[row.name] = chunk_rows(weightless)


def tasks() -> list[Task]:
    shape = (ROWS, FEATURES, CLASSES)
    return [(Row("linear cross entropy", shape).name, lambda run: measure(run, shape))]


def run(args: argparse.Namespace) -> int:
    with threads(THREADS):
        return bench(args, tasks(), SEED, threads=THREADS)
