"""`minimize_trace` against numpy.linalg.eigh, torch.linalg.eigh and scipy.linalg.eigh, on the CPU in float64.

The solvers take turns, so that a busy machine slows all of them; each figure is the best of its turns. NumPy and torch
compute all eigenpairs, SciPy and `minimize_trace` the k asked for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from rich.console import Console
from rich.table import Table

from hw3gpu import minimize_trace

SOLVERS = ("numpy", "torch", "scipy", "certified", "uncertified")


@dataclass(frozen=True)
class Case:
    """k of the eigenpairs of a matrix (m, m), or of each of a stack (batch, m, m), and what is promised of them.

    `certified` and `uncertified`: how many times faster than the faster of NumPy and torch `minimize_trace` has to be,
    with and without its certificate; None where nothing is promised.
    """

    m: int
    k: int
    batch: int | None = None
    certified: float | None = None
    uncertified: float | None = None
    turns: int = 5

    def describe(self) -> str:
        matrix = f"{self.m} x {self.m}"
        return matrix if self.batch is None else f"{self.batch} of {matrix}"

    def matrices(self) -> np.ndarray:
        """Wishart matrices."""
        x = np.random.default_rng(0).standard_normal((self.batch or 1, 2 * self.m, self.m))
        sigma = x.swapaxes(-1, -2) @ x / (2 * self.m)
        return sigma if self.batch else sigma[0]


CASES = (
    Case(1024, 8, certified=2.0, uncertified=2.5),
    Case(2048, 8, certified=2.0, uncertified=2.5, turns=3),
    Case(1024, 256, uncertified=1 / 1.1),
    Case(1024, 1024, uncertified=1 / 1.1),
    Case(64, 1, batch=256, uncertified=3.0, turns=9),
)


@dataclass(frozen=True)
class Measurement:
    """Seconds of each of `SOLVERS` on a case."""

    case: Case
    seconds: dict[str, float]

    def speedup(self, solver: str) -> float:
        """How many times faster than the faster of NumPy and torch."""
        return min(self.seconds["numpy"], self.seconds["torch"]) / self.seconds[solver]

    def shortfalls(self) -> list[str]:
        """The promises of the case that were not kept."""
        promised = {"certified": self.case.certified, "uncertified": self.case.uncertified}
        return [
            f"{solver} {self.speedup(solver):.2f}x, promised {least:.2f}x"
            for solver, least in promised.items()
            if least is not None and self.speedup(solver) < least
        ]


def measure(case: Case) -> Measurement:
    sigma = case.matrices()
    tensor = torch.from_numpy(sigma)
    stack = sigma[None] if case.batch is None else sigma

    def scipy_range() -> None:
        for matrix in stack:
            scipy.linalg.eigh(matrix, subset_by_index=(0, case.k - 1), check_finite=False)

    calls: dict[str, Callable[[], object]] = {
        "numpy": lambda: np.linalg.eigh(sigma),
        "torch": lambda: torch.linalg.eigh(tensor),
        "scipy": scipy_range,
        "certified": lambda: minimize_trace(sigma, case.k),
        "uncertified": lambda: minimize_trace(sigma, case.k, certify=False),
    }
    best = dict.fromkeys(SOLVERS, float("inf"))
    for turn in range(case.turns + 1):
        for solver, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first one warms up
                best[solver] = min(best[solver], time.perf_counter() - start)
    return Measurement(case, best)


def run(args: argparse.Namespace) -> int:
    """Prints a table of every case and what falls short of the promises; writes seconds to `args.json` where that is given."""
    console = Console()
    table = Table(title="minimize_trace, ms (times faster than the better of NumPy and torch)")
    for column in ("matrices", "k", *SOLVERS):
        table.add_column(column, justify="right")
    measurements = []
    for case in CASES:
        measured = measure(case)
        measurements.append(measured)
        cells = [f"{1e3 * measured.seconds[solver]:.1f} ({measured.speedup(solver):.2f}x)" for solver in SOLVERS]
        table.add_row(case.describe(), str(case.k), *cells)
    console.print(table)
    for measured in measurements:
        for shortfall in measured.shortfalls():
            console.print(f"short: {measured.case.describe()}, k = {measured.case.k}: {shortfall}")
    if args.json:
        found = {f"{m.case.describe()}, k = {m.case.k}": m.seconds for m in measurements}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0
