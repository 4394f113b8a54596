"""The rows of `python -m benchmarks cpu`: an operation on one shape each, its inputs, and what is promised of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import hw3gpu.functional

TINY = 0.5  # of eager's speed

Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Work:
    """An operation on one shape, and what is promised of it: so many times eager's and the compiled function's speed.

    `passes`: reads and writes of the whole input that the operation cannot do without (kernels/README.md).
    """

    operation: str
    shape: tuple[int, ...]
    passes: float
    eager: float | None = None
    compiled: float | None = None
    dtype: torch.dtype = torch.float32
    soft: bool = False
    channels_last: bool = False
    statistics: str = "of the batch"  # of batch norm; or "evaluation", forward alone, or "frozen", forward and backward

    @property
    def name(self) -> str:
        kind = {"cross_entropy": "cross entropy", "batch_norm": "batch norm", "softmax": "softmax"}[self.operation]
        notes = [n for n, there in (("soft targets", self.soft), ("channels-last", self.channels_last)) if there]
        notes += [self.statistics] if self.statistics != "of the batch" else []
        if self.dtype != torch.float32:
            notes.append(str(self.dtype).removeprefix("torch."))
        return ", ".join([f"{kind} {self.shape}", *notes])

    @property
    def of(self) -> str:
        """Which passes are timed."""
        return "forward" if self.statistics == "evaluation" else "forward and backward"

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def step(self, exact: bool = False) -> Step:
        """The row's inputs; `exact`: the same values in float64."""
        make = {"cross_entropy": _cross_entropy, "batch_norm": _batch_norm, "softmax": _softmax}[self.operation]
        random, dtype = torch.Generator().manual_seed(0), torch.float64 if exact else self.dtype

        def normal() -> torch.Tensor:
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            return torch.randn(self.shape, generator=random).to(self.dtype, memory_format=layout).to(dtype)

        return make(self, normal)


@dataclass(frozen=True)
class Step:
    """Inputs of one row. `call(f)` is `f`'s result on them; `leaves` are what it is differentiated by, from `upstream`."""

    call: Callable[[Function], torch.Tensor]
    ours: Function
    eager: Function
    leaves: tuple[torch.Tensor, ...]
    upstream: torch.Tensor | None = None
    forward_alone: bool = False

    def __call__(self, f: Function) -> torch.Tensor:
        """Forward and backward, into fresh gradients; or the forward pass without a graph."""
        if self.forward_alone:
            with torch.no_grad():
                return self.call(f)
        for leaf in self.leaves:
            leaf.grad = None
        result = self.call(f)
        result.backward(self.upstream)
        return result.detach()


def _cross_entropy(work: Work, normal: Callable[[], torch.Tensor]) -> Step:
    rows, classes = work.shape
    z = normal().requires_grad_()
    target = normal().softmax(1) if work.soft else torch.arange(rows) * 7919 % classes
    return Step(lambda f: f(z, target), hw3gpu.functional.cross_entropy, torch.nn.functional.cross_entropy, (z,))


def _softmax(work: Work, normal: Callable[[], torch.Tensor]) -> Step:
    z, dy = normal().requires_grad_(), normal()
    return Step(lambda f: f(z, 1), hw3gpu.functional.softmax, torch.nn.functional.softmax, (z,), dy)


def _batch_norm(work: Work, normal: Callable[[], torch.Tensor]) -> Step:
    x, dy, C = normal().requires_grad_(), normal(), work.shape[1]
    weight, bias = (torch.linspace(0.5, end, C, dtype=x.dtype).requires_grad_() for end in (1.5, 1.0))
    running_mean, running_var = (torch.linspace(first, 2, C, dtype=x.dtype) for first in (-1, 0.5))
    training = work.statistics == "of the batch"

    def call(f: Function) -> torch.Tensor:
        return f(x, running_mean, running_var, weight, bias, training, 0.1, 1e-5)

    ours, eager = hw3gpu.functional.batch_norm, torch.nn.functional.batch_norm
    return Step(call, ours, eager, (x, weight, bias), dy, forward_alone=work.statistics == "evaluation")


ROWS = (
    Work("cross_entropy", (4096, 1000), 2, 3, 3),
    Work("cross_entropy", (512, 32000), 2, 6, 5),
    Work("cross_entropy", (256, 128256), 2, 6, 5),
    Work("cross_entropy", (2048, 1000), 3, 4, 3, soft=True),
    Work("batch_norm", (32, 64, 56, 56), 5, 2.5, 2),
    Work("batch_norm", (32, 256, 28, 28), 5, 2.5, 2),
    Work("batch_norm", (64, 512, 14, 14), 5, 2, 2),
    Work("batch_norm", (64, 2048, 7, 7), 5, 2, 2),
    Work("batch_norm", (32, 64, 56, 56), 8, 1.5, 1.5, channels_last=True),
    Work("batch_norm", (8, 3, 512, 512), 8, 8, 2, channels_last=True),
    Work("softmax", (4096, 1000), 5, 2, 2),
)
HALVES = tuple(
    tuple(Work("cross_entropy", shape, 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    for shape in ((4096, 1000), (512, 32000), (256, 128256))
)
KNOWN = tuple(
    Work("batch_norm", shape, passes, 1, channels_last=channels_last, statistics=statistics)
    for statistics, passes in (("evaluation", 2), ("frozen", 6))
    for shape, channels_last in (
        ((8, 960, 4, 4), False),
        ((8, 576, 7, 7), False),
        ((32, 256, 14, 14), False),
        ((8, 64, 56, 56), False),
        ((256, 1024), False),
        ((64, 2048, 7, 7), False),
        ((32, 256, 14, 14), True),
    )
)
TINIES = (Work("cross_entropy", (32, 10), 2, TINY), Work("batch_norm", (16, 8, 4, 4), 5, TINY))
