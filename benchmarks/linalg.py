"""`python -m benchmarks linalg`: `minimize_trace` against the eigensolvers of NumPy, torch and SciPy, on the CPU in float64.

NumPy and torch compute all eigenpairs, SciPy and `minimize_trace` the k asked for. Before anything is timed, the result has to
be certified and to lie within the answer sheet's bound.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.linalg
import torch

from hw3gpu import _error_bounds, minimize_trace, reference

from .harness import OURS, Aim, Bench, Row, Task, bench

# Seconds after which the threads of the library measured before no longer spin, beside those of the next one.
IDLE = 0.05
SEED = 0
UNCERTIFIED = "hw3gpu, not certified"
# the times of others over ours; the certificate may take a quarter of the solve
FEW = (Aim("NumPy", 2), Aim("torch", 2), Aim("NumPy", 2.5, UNCERTIFIED), Aim("torch", 2.5, UNCERTIFIED))
MANY = tuple(Aim(other, 1 / 1.1, UNCERTIFIED) for other in ("NumPy", "torch", "SciPy"))
STACK = (Aim("torch", 3), Aim("torch", 3, UNCERTIFIED))
CERTIFICATE = Aim(UNCERTIFIED, 1 / 1.25)


@dataclass(frozen=True)
class Case:
    """k of the eigenpairs of a matrix (m, m), or of each of a stack (batch, m, m), and what is aimed at."""

    m: int
    k: int
    aims: tuple[Aim, ...]
    batch: int | None = None
    turns: int = 11

    @property
    def name(self) -> str:
        matrix = f"{self.m}x{self.m}"
        return f"minimize_trace {matrix if self.batch is None else f'{self.batch}x{matrix}'}, k = {self.k}"

    def matrices(self) -> np.ndarray:
        """Wishart matrices."""
        x = np.random.default_rng(SEED).standard_normal((self.batch or 1, 2 * self.m, self.m))
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


def check(case: Case, sigma: np.ndarray) -> str:
    """'' if the minimum is certified and has the answer sheet's value, within the bound of its rounding."""
    found = minimize_trace(sigma, case.k)
    if not np.all(found.certified):
        return "not certified"
    stack, values = sigma.reshape(-1, case.m, case.m), np.ravel(found.value)
    for matrix, value in zip(stack, values, strict=True):
        bound, _ = _error_bounds.minimize_trace(matrix, case.k, dtype="float64")
        error = abs(float(value) - float(reference.minimize_trace(matrix, case.k).value))
        if not error <= bound:
            return f"the value is off the answer sheet's by {error:.3g}, allowed {bound:.3g}"
    return ""


@contextmanager
def _idle(name: str) -> Iterator[None]:
    time.sleep(IDLE)
    yield


def measure(case: Case, run: Bench) -> None:
    sigma = case.matrices()
    tensor = torch.from_numpy(sigma)
    stack = sigma[None] if case.batch is None else sigma

    def scipy_range() -> None:
        for matrix in stack:
            scipy.linalg.eigh(matrix, subset_by_index=(0, case.k - 1), check_finite=False)

    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: minimize_trace(sigma, case.k),
        UNCERTIFIED: lambda: minimize_trace(sigma, case.k, certify=False),
        "NumPy": lambda: np.linalg.eigh(sigma),
        "torch": lambda: torch.linalg.eigh(tensor),
        "SciPy": scipy_range,
    }
    row = Row(
        case.name, "minimize_trace", sigma.shape, "float64", "forward", calls, partial(check, case, sigma), aims=case.aims
    )
    run.measure(row, turns=min(run.turns, case.turns), around=_idle, warm=0)


def _threads() -> str:
    """Threads of each linear algebra library that is loaded, where threadpoolctl is there to say."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return "unknown"
    pools = {f"{pool['internal_api']} {pool['version'] or ''}".strip(): pool["num_threads"] for pool in threadpool_info()}
    return ", ".join(f"{name}: {threads}" for name, threads in sorted(pools.items()))


def tasks() -> list[Task]:
    return [(case.name, partial(measure, case)) for case in CASES]


def run(args: argparse.Namespace) -> int:
    return bench(args, tasks(), SEED, threads=_threads())
