"""docs/derivations.md, and the list of the tests that prove its equations."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import sympy as sp

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "derivations.md").read_text(encoding="utf-8")
TAGS = re.findall(r"\\tag\{([\d.]+)\}", DOCUMENT)

PROVED: dict[str, Callable[..., None]] = {}


def proves(*tags: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(test: Callable[..., None]) -> Callable[..., None]:
        for tag in tags:
            assert tag not in PROVED, f"({tag}) has two tests"
            PROVED[tag] = test
        return test

    return register


def exact_moments(points: sp.Matrix) -> tuple[sp.Matrix, sp.Matrix]:
    """(4.1) as it stands: sums of single points."""
    n, m = points.shape
    mean = sp.Matrix(m, 1, lambda j, _: sum(points[i, j] for i in range(n)) / sp.Integer(n))
    deviations = [points[i, :].T - mean for i in range(n)]
    return mean.expand(), sum((d * d.T for d in deviations), sp.zeros(m, m)).expand() / n
