"""What the checks of `distributed_checks.py` share: their list, the process they run in, and how results are compared."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

CHECKS: dict[str, Callable[[Rank], None]] = {}


@dataclass(frozen=True)
class Rank:
    rank: int
    size: int
    backend: str


def check(function: Callable[[Rank], None]) -> Callable[[Rank], None]:
    CHECKS[function.__name__] = function
    return function


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(ours: torch.Tensor | None, theirs: torch.Tensor | None, tolerance: float = 1e-10, what: str = "") -> None:
    assert (ours is None) == (theirs is None), what
    if ours is not None:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def refuses(error: type[Exception], message: str, function: Callable[[], object]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function()
