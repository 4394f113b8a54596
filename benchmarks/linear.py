"""`python -m benchmarks linear`: linear cross entropy on the CPU beside PyTorch's unfused and chunked paths.

A step is forward and backward, into fresh gradients. The contestants take turns in one process; a time is the median of its
turns, a ratio the median and the quartiles of the ratios turn by turn. Before anything is timed, loss and gradients are
held to PyTorch's in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import hw3gpu.functional as HF
from hw3gpu._torch.linear_chunks import Problem, chunk_rows

from .cpu import THREADS, Ratio, Spread, in_turn, machine

ROWS, FEATURES, CLASSES = 1024, 512, 16000
OURS = "hw3gpu"

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def contestants() -> dict[str, Loss]:
    """Each path as a function of input, linear_weight and target."""

    def chunked(**options: Any) -> Loss:
        return lambda x, W, t: F.linear_cross_entropy(x, W, t, options=torch.nn.LinearCrossEntropyOptions(**options))

    return {
        OURS: HF.linear_cross_entropy,
        "hw3gpu, a tenth": lambda x, W, t: HF.linear_cross_entropy(x, W, t, chunk_rows=ROWS // 11),
        "hw3gpu, 'backward'": lambda x, W, t: HF.linear_cross_entropy(x, W, t, gradient="backward"),
        "PyTorch, unfused": F.linear_cross_entropy,
        "PyTorch, options=()": chunked(),
        "PyTorch, chunks of 128": chunked(chunking_method=None, batch_chunk_size=128),
        "PyTorch, chunks of 256": chunked(chunking_method=None, batch_chunk_size=256),
        "PyTorch, chunks of 512": chunked(chunking_method=None, batch_chunk_size=512),
    }


def _step(loss: Loss, x: torch.Tensor, W: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    x.grad = W.grad = None
    result = loss(x, W, t)
    result.backward()
    return result.detach()


def verify(loss: Loss, name: str, x: torch.Tensor, W: torch.Tensor, t: torch.Tensor) -> None:
    """AssertionError unless loss and gradients are those of float64 to float32's rounding of sums of these lengths."""
    results = [_step(loss, x, W, t), x.grad, W.grad]
    exact = [v.detach().double().requires_grad_() for v in (x, W)]
    expected = [_step(F.linear_cross_entropy, exact[0], exact[1], t), exact[0].grad, exact[1].grad]
    for what, ours, right in zip(("loss", "input's gradient", "weight's gradient"), results, expected, strict=True):
        assert ours is not None
        assert right is not None
        error = float((ours.double() - right).abs().max() / right.abs().max())
        assert error <= 1e-5, f"{name}: {what} has a relative error of {error:.3g}"


def measure(turns: int) -> tuple[dict[str, float], list[Ratio]]:
    """Milliseconds a step, and our ratios to each path of PyTorch's."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=random).requires_grad_()
    W = (torch.randn(CLASSES, FEATURES, generator=random) / 16).requires_grad_()
    t = torch.arange(ROWS) * 7919 % CLASSES
    losses = contestants()
    for name, loss in losses.items():
        verify(loss, name, x, W, t)
    seconds = in_turn({name: partial(_step, loss, x, W, t) for name, loss in losses.items()}, turns)
    ratios = [
        Ratio(OURS, name, Spread.of([a / b for a, b in zip(theirs, seconds[OURS], strict=True)]), 1.0)
        for name, theirs in seconds.items()
        if name.startswith("PyTorch")
    ]
    return {name: 1e3 * statistics.median(s) for name, s in seconds.items()}, ratios


def run(args: argparse.Namespace) -> int:
    """Prints times and ratios; writes them to `args.json` where that is given."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        milliseconds, ratios = measure(args.turns)
    finally:
        torch.set_num_threads(before)
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    x, W = torch.empty(ROWS, FEATURES), torch.empty(CLASSES, FEATURES)
    rows = chunk_rows(Problem(x, W, None, torch.empty(ROWS, 1), None))
    title = f"({ROWS}, {FEATURES}) x {CLASSES} float32, forward and backward; hw3gpu by itself takes chunks of {rows} rows"
    table = Table("path", "ms", "times our time, median (quartiles)", title=title)
    by_name = {ratio.to: ratio for ratio in ratios}
    for name, ms in milliseconds.items():
        table.add_row(name, f"{ms:.0f}", str(by_name.get(name, "")))
    console.print(table)
    if args.json:
        found = {"machine": machine(), "milliseconds": milliseconds, "ratios": [asdict(ratio) for ratio in ratios]}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0
