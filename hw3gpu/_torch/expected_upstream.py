"""The upstream gradient that a reduced loss will probably have: that of the last call from the same place.

Gradient accumulation, a loss scale or a factor multiply a loss by the same number step after step, so that its gradient can be
written in the forward pass for that number. Where the number changes from call to call, nothing is expected.
"""

from __future__ import annotations

import functools
import sys
from types import CodeType, FrameType

import torch
from torch import Tensor

_MOST = 256  # places that are remembered
_OURS = ("hw3gpu", "torch")


class Expected:
    """The upstream gradients of one line so far. Threads that share it may make a guess wrong, but no result."""

    __slots__ = ("last", "misses")

    def __init__(self) -> None:
        self.last, self.misses = 1.0, 0

    def guess(self) -> float | None:
        """The upstream gradient to expect; None after two that each differed from the one before."""
        return self.last if self.misses < 2 else None

    def was(self, upstream: float) -> None:
        """Records an upstream gradient."""
        self.misses = 0 if upstream == self.last else self.misses + 1
        self.last = upstream


class Divided(Expected):
    """`Expected` of a loss that will be divided by `divisor`. `of`: the `Expected` of the quotient, or None."""

    __slots__ = ("divisor", "of")

    def __init__(self, of: Expected | None, divisor: Tensor) -> None:
        self.of, self.divisor = of or Expected(), divisor

    def guess(self) -> float | None:
        upstream = self.of.guess()
        return None if upstream is None else self._over(upstream)

    def was(self, upstream: float) -> None:
        # a quotient does not give back the number that was divided
        self.of.was(self.of.last if upstream == self._over(self.of.last) else upstream * self.divisor.item())

    def _over(self, upstream: float) -> float:
        return (torch.tensor(upstream, dtype=self.divisor.dtype) / self.divisor).item()


@functools.lru_cache(_MOST)
def _of(code: CodeType | None, instruction: int) -> Expected:
    return Expected()


def of_caller() -> Expected:
    """The `Expected` of the caller's line: the innermost one outside this package and torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame = frame.f_back
    return _of(None, 0) if frame is None else _of(frame.f_code, frame.f_lasti)
