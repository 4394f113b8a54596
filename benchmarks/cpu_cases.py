"""The rows of `python -m benchmarks cpu`, and what is aimed at: so many times eager's and the compiled function's speed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .rows import BF16, F16, Row

TINY = 0.5  # of eager's speed


@dataclass(frozen=True)
class Work:
    """A row, how often whole inputs are read or written that it cannot do without (kernels/README.md), and the aims.

    passes: 0 where products decide. others: contestants beside eager and compiled PyTorch.
    """

    row: Row
    passes: float
    eager: float | None = None
    compiled: float | None = None
    others: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the input."""
        return math.prod(self.row.shape) * self.row.dtype.itemsize

    @property
    def of(self) -> str:
        """Which passes are timed."""
        return "forward" if self.row.statistics == "evaluation" else "forward and backward"


def _cross_entropy(*shape: int, **options: Any) -> Row:
    return Row("cross entropy", shape, gradient="auto", **options)


def _norm(*shape: int, **options: Any) -> Row:
    return Row("batch norm", shape, **options)


ROWS = (
    Work(_cross_entropy(4096, 1000), 2, 3, 3),
    Work(_cross_entropy(512, 32000), 2, 6, 5),
    Work(_cross_entropy(256, 128256), 2, 6, 5),
    Work(_cross_entropy(2048, 1000, soft=True), 3, 4, 3),
    Work(_norm(32, 64, 56, 56), 5, 2.5, 2),
    Work(_norm(32, 256, 28, 28), 5, 2.5, 2),
    Work(_norm(64, 512, 14, 14), 5, 2, 2),
    Work(_norm(64, 2048, 7, 7), 5, 2, 2),
    Work(_norm(32, 64, 56, 56, channels_last=True), 8, 1.5, 1.5),
    Work(_norm(8, 3, 512, 512, channels_last=True), 8, 8, 2),
    Work(Row("softmax", (4096, 1000)), 5, 2, 2),
    Work(Row("token log-probabilities", (512, 32000)), 3, 4, 3, ("TRL", "verl")),
    Work(Row("distillation", (512, 32000), kind="forward"), 5, 3, 1.5),
    Work(Row("distillation", (512, 32000), kind="jensen_shannon"), 5, 6, 2),
    Work(Row("linear token log-probabilities", (512, 256, 8192)), 0, others=("TRL", "verl")),
    Work(Row("linear distillation", (512, 256, 8192), kind="jensen_shannon"), 0),
)
HALVES = tuple(
    Work(_cross_entropy(*shape, dtype=dtype), 2)
    for shape in ((4096, 1000), (512, 32000), (256, 128256))
    for dtype in (BF16, F16)
)  # fmt: skip
KNOWN = tuple(
    Work(_norm(*shape, channels_last=channels_last, statistics=statistics), passes, 1)
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
TINIES = (Work(_cross_entropy(32, 10), 2, TINY), Work(_norm(16, 8, 4, 4), 5, TINY))
