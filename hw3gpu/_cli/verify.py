"""`hw3gpu verify`: every operation, on every back end that can run here, against the float64 answer sheet."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from .. import _arrays
from .arrays import Place, cupy_refusal, to_numpy
from .measure import max_error, tolerance
from .operations import OPERATIONS, Operation, Output

INTERPRETED = "Triton kernels, interpreted"


@dataclass(frozen=True)
class Check:
    """One output of one operation on one back end, array kind and dtype.

    Errors are max |error|. `error` is None where NaN or infinity stands in a wrong place or the operation raised (`note`
    says which), `torch_error` where that is so of PyTorch's result.
    """

    row: str
    operation: str
    kernels: str
    arrays: str
    dtype: str
    output: str
    error: float | None
    torch_error: float | None
    tolerance: float
    passed: bool
    note: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        """What the outputs of one call have in common."""
        return self.row, self.operation, self.kernels, self.arrays, self.dtype

    @property
    def nearness(self) -> float:
        """The error in units of the tolerance."""
        return math.inf if self.error is None else self.error / self.tolerance


def run(kernels: str) -> Iterator[Check]:
    """The checks for `kernels`, 'cpu', 'gpu' or 'all'.

    The Triton kernels run on CUDA and CuPy arrays where a GPU is found, else on host arrays in Triton's interpreter.
    That has to be asked for before Triton is imported, and runs in a process of its own.
    """
    host = [Place("numpy", "cpu"), Place("torch", "cpu")]
    if kernels in ("cpu", "all"):
        yield from _checks("cpu", "Numba kernels", host)
    if kernels in ("gpu", "all"):
        import torch

        if os.environ.get("TRITON_INTERPRET") == "1":
            yield from _checks("gpu", INTERPRETED, host)
        elif torch.cuda.is_available():
            kinds = ["torch"] if cupy_refusal() else ["torch", "cupy"]
            yield from _checks("gpu", "Triton kernels", [Place(kind, "cuda") for kind in kinds])
        else:
            yield from _in_interpreter()


def _in_interpreter() -> Iterator[Check]:
    """The checks of the Triton kernels from a process in which Triton interprets."""
    command = [sys.executable, "-m", "hw3gpu", "verify", "--kernels", "gpu", "--json"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"the process that interprets the Triton kernels ended with status {done.returncode}")
    yield from (Check(**check) for check in json.loads(done.stdout)["checks"])


def _checks(backend: str, kernels: str, places: list[Place]) -> Iterator[Check]:
    with _arrays.use_backend(backend):
        for operation in OPERATIONS:
            for place in (place for place in places if place.kind in operation.kinds):
                for dtype in (dtype for dtype in operation.dtypes if dtype in place.dtypes):
                    yield from _check(operation, kernels, place, dtype)


def _check(operation: Operation, kernels: str, place: Place, dtype: str) -> Iterator[Check]:
    case = (operation.row, operation.name, kernels, place.kind, dtype)
    try:
        for output in operation.run(place, dtype):
            yield Check(*case, output.name.strip(), *_measure(output))
    except Exception as error:  # a broken operation is a failed check, and the others are still run
        yield Check(*case, "", None, None, 0.0, False, f"{type(error).__name__}: {error}")


def _measure(output: Output) -> tuple[float | None, float | None, float, bool, str]:
    """The error, PyTorch's, the tolerance, whether the output passes, and a note."""
    dtype = output.dtype or _arrays.dtype_name(output.actual)
    ours, theirs = (max_error(to_numpy(x), output.expected, dtype) for x in (output.actual, output.torch))
    theirs_or_none = theirs if math.isfinite(theirs) else None
    bound = tolerance(output.expected, dtype, theirs_or_none)
    if math.isfinite(ours):
        return ours, theirs_or_none, bound, ours <= bound, ""
    return None, theirs_or_none, bound, False, "NaN or infinity in a wrong place"


# ---------------------------------------------------------------------------------------------- the command
def main(kernels: str, as_json: bool) -> int:
    """Run the checks and print them as a table or as JSON; 1 if one failed, else 0."""
    if as_json:
        checks = list(run(kernels))
        passed = all(check.passed for check in checks)
        print(json.dumps({"passed": passed, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        with console.status("verifying") as status:
            checks = list(_announced(run(kernels), status))
        _print(console, checks)
    return 0 if all(check.passed for check in checks) else 1


def _announced(checks: Iterable[Check], status: Any) -> Iterator[Check]:
    for check in checks:
        status.update(f"verifying {check.row} {check.operation}: {check.kernels}, {check.arrays}, {check.dtype}")
        yield check


def _print(console: Any, checks: list[Check]) -> None:
    """A table with one line for each case, that of the output nearest to its tolerance; then what failed, in words."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="Against the float64 answer sheet: max |error|")
    table.add_column("arrays")
    table.add_column("dtype")
    table.add_column("output nearest its tolerance", no_wrap=True, overflow="ellipsis")
    for heading in ("error", "PyTorch's", "tolerance", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    section = None
    for case, group in groupby(checks, key=lambda check: check.case):
        if case[:3] != section:
            section = case[:3]
            table.add_section()
            table.add_row(f"[bold]{section[0]}[/]", "", f"[bold]{section[1]}: {section[2]}[/]")
        table.add_row(*_cells(max(group, key=lambda check: check.nearness)))
    console.print(table)
    console.print("tolerance = 1.5 × PyTorch's max |error| on the same input + 1 ulp of max |reference|")
    for check in checks:
        if not check.passed:
            found = check.note or f"error {check.error:.2e} above {check.tolerance:.2e}"
            console.print(
                f"[red]failed[/] {', '.join(filter(None, check.case))}, {check.output}: {found}", soft_wrap=True
            )
    failed = sum(not check.passed for check in checks)
    console.print(
        f"[red]{failed} of {len(checks)} outputs failed[/]" if failed else f"[green]{len(checks)} outputs pass[/]"
    )
    _print_what_did_not_run(console, checks)


def _cells(check: Check) -> list[str]:
    numbers = ["-" if value is None else f"{value:.1e}" for value in (check.error, check.torch_error, check.tolerance)]
    return [check.arrays, check.dtype, check.output, *numbers, "[green]pass[/]" if check.passed else "[red]FAIL[/]"]


def _print_what_did_not_run(console: Any, checks: list[Check]) -> None:
    if any(check.kernels == INTERPRETED for check in checks):
        console.print("No GPU was used: Triton's interpreter ran the Triton kernels. It truncates float32 to bfloat16.")
    if "cupy" not in {check.arrays for check in checks}:
        console.print(f"CuPy arrays did not run: {cupy_refusal() or 'they take the Triton kernels on a GPU'}.")
