"""`minimize_trace` against numpy.linalg.eigh, torch.linalg.eigh and scipy.linalg.eigh, on the CPU in float64.

The solvers take turns, so that a busy machine slows all of them; each figure is the best of its turns. NumPy and torch compute
all eigenpairs, SciPy and `minimize_trace` the k asked for. Before anything is timed, the result has to be certified and to
agree with NumPy's.
"""

from __future__ import annotations

import argparse
import json
import platform
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

# Seconds after which the threads of the library measured before no longer spin, beside those of the next one.
IDLE = 0.05
OTHERS = ("numpy", "torch", "scipy")
OURS = ("certified", "uncertified")


@dataclass(frozen=True)
class Promise:
    """`solver` takes at most `share` of the time of the fastest of `others`; of its own, "extra" is the certificate's cost."""

    solver: str
    share: float
    others: tuple[str, ...]

    def taken(self, seconds: dict[str, float]) -> float:
        """The share that it does take."""
        ours = seconds["certified"] - seconds["uncertified"] if self.solver == "extra" else seconds[self.solver]
        return ours / min(seconds[other] for other in self.others)

    def describe(self, seconds: dict[str, float]) -> str:
        """The promise beside what was measured."""
        if self.solver == "extra":
            return f"certificate {100 * self.taken(seconds):.0f} % of the solve, promised {100 * self.share:.0f} %"
        what = f"{self.solver}: {1 / self.taken(seconds):.2f} times as fast as {' and '.join(self.others)}"
        return f"{what}, promised {1 / self.share:.2f}"


BOTH = ("numpy", "torch")
FEW = (Promise("certified", 1 / 2, BOTH), Promise("uncertified", 1 / 2.5, BOTH))
MANY = (Promise("uncertified", 1.1, OTHERS),)
STACK = (Promise("certified", 1 / 3, ("torch",)), Promise("uncertified", 1 / 3, ("torch",)))
CERTIFICATE = Promise("extra", 0.25, ("uncertified",))


@dataclass(frozen=True)
class Case:
    """k of the eigenpairs of a matrix (m, m), or of each of a stack (batch, m, m), and what is promised of them."""

    m: int
    k: int
    promises: tuple[Promise, ...]
    batch: int | None = None
    turns: int = 11

    def describe(self) -> str:
        matrix = f"{self.m} x {self.m}"
        return f"{matrix if self.batch is None else f'{self.batch} of {matrix}'}, k = {self.k}"

    def matrices(self) -> np.ndarray:
        """Wishart matrices."""
        x = np.random.default_rng(0).standard_normal((self.batch or 1, 2 * self.m, self.m))
        sigma = x.swapaxes(-1, -2) @ x / (2 * self.m)
        return sigma if self.batch else sigma[0]


CASES = (
    Case(1024, 8, (*FEW, CERTIFICATE)),
    Case(2048, 8, (*FEW, CERTIFICATE), turns=5),
    Case(256, 8, (CERTIFICATE,), turns=15),
    Case(256, 64, (*MANY, CERTIFICATE), turns=15),
    Case(1024, 256, (*MANY, CERTIFICATE)),
    Case(1024, 512, (CERTIFICATE,)),
    Case(1024, 1024, (*MANY, CERTIFICATE)),
    Case(64, 1, STACK, batch=256, turns=15),
)


@dataclass(frozen=True)
class Measurement:
    """Seconds of each of `OTHERS` and `OURS` on a case."""

    case: Case
    seconds: dict[str, float]

    def speedup(self, solver: str) -> float:
        """How many times faster than the faster of NumPy and torch."""
        return min(self.seconds[other] for other in BOTH) / self.seconds[solver]

    def shortfalls(self) -> list[str]:
        """The promises of the case that were not kept."""
        return [promise.describe(self.seconds) for promise in self.case.promises if promise.taken(self.seconds) > promise.share]


def verify(case: Case, sigma: np.ndarray) -> None:
    """AssertionError unless `minimize_trace` certifies its result and NumPy has the same value."""
    result = minimize_trace(sigma, case.k)
    assert np.all(result.certified), f"{case.describe()}: not certified"
    expected = np.linalg.eigvalsh(sigma)[..., : case.k].sum(axis=-1)
    assert np.all(abs(result.value - expected) <= 1e-12 * case.m), f"{case.describe()}: another value than NumPy's"


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
    verify(case, sigma)
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(case.turns + 1):
        for solver, call in calls.items():
            time.sleep(IDLE)
            start = time.perf_counter()
            call()
            if turn:  # the first one warms up
                best[solver] = min(best[solver], time.perf_counter() - start)
    return Measurement(case, best)


def _threads() -> str:
    """Threads of each linear algebra library that is loaded, where threadpoolctl is there to say."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return "threads unknown"
    pools = {f"{pool['internal_api']} {pool['version'] or ''}".strip(): pool["num_threads"] for pool in threadpool_info()}
    return ", ".join(f"{name}: {threads} threads" for name, threads in sorted(pools.items()))


def run(args: argparse.Namespace) -> int:
    """Prints a table of every case and what falls short of the promises; writes seconds to `args.json` where that is given."""
    console = Console()
    versions = f"NumPy {np.__version__}, SciPy {scipy.__version__}, torch {torch.__version__}"
    console.print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {versions}; {_threads()}")
    table = Table(title="minimize_trace in float64, ms (times faster than the faster of NumPy and torch)")
    table.add_column("matrices")
    for column in (*OTHERS, *OURS, "certificate"):
        table.add_column(column, justify="right")
    measurements = [measure(case) for case in CASES]
    for measured in measurements:
        cells = [f"{1e3 * measured.seconds[solver]:.1f} ({measured.speedup(solver):.2f}x)" for solver in (*OTHERS, *OURS)]
        table.add_row(measured.case.describe(), *cells, f"{100 * CERTIFICATE.taken(measured.seconds):.0f} %")
    console.print(table)
    short = [f"{measured.case.describe()}: {what}" for measured in measurements for what in measured.shortfalls()]
    for line in short:
        console.print(f"short: {line}")
    if not short:
        console.print("every promise was kept")
    if args.json:
        found = {measured.case.describe(): measured.seconds for measured in measurements}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0
