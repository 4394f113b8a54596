"""`hw3gpu verify`: every operation, on every back end that can run here, against the float64 answer sheet."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
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

    Errors are max |error|. `error` is None where NaN or infinity stands in a wrong place or the operation raised, as
    `note` says; `torch_error` is None where PyTorch's result has them in a wrong place.
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


def run(kernels: str, rows: Collection[str]) -> Iterator[Check]:
    """The checks of the operations that answer `rows`, 'S1' to 'S9', for `kernels`, 'cpu', 'gpu' or 'all'.

    The Triton kernels run on CUDA and CuPy arrays where a GPU is found, else on host arrays in Triton's interpreter.
    That has to be asked for before Triton is imported: it runs in a process of its own, beside the Numba kernels.
    """
    import torch

    host = [Place("numpy", "cpu"), Place("torch", "cpu")]
    gpu = kernels in ("gpu", "all")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    apart = gpu and not interpreted and not torch.cuda.is_available()
    with _interpreter(rows) if apart else contextlib.nullcontext() as process:
        if kernels in ("cpu", "all"):
            yield from _checks("cpu", "Numba kernels", host, rows)
        if process is not None:
            yield from _checks_of(process)
        elif gpu and interpreted:
            yield from _checks("gpu", INTERPRETED, host, rows)
        elif gpu:
            kinds = ["torch"] if cupy_refusal() else ["torch", "cupy"]
            yield from _checks("gpu", "Triton kernels", [Place(kind, "cuda") for kind in kinds], rows)


@contextlib.contextmanager
def _interpreter(rows: Collection[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that verifies the Triton kernels in Triton's interpreter; ended with the block."""
    # NumPy, on which the interpreter computes, warns of every exp(-inf) and overflow
    quiet = ["-W", "ignore::RuntimeWarning:triton.runtime.interpreter"]
    command = [sys.executable, *quiet, "-m", "hw3gpu", "verify", "--kernels", "gpu", "--json", "--only", *rows]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _checks_of(process: subprocess.Popen[str]) -> Iterator[Check]:
    output, _ = process.communicate()
    if process.returncode not in (0, 1) or not output:
        raise RuntimeError(f"the process that interprets the Triton kernels ended with status {process.returncode}")
    yield from (Check(**check) for check in json.loads(output)["checks"])


def _checks(backend: str, kernels: str, places: list[Place], rows: Collection[str]) -> Iterator[Check]:
    with _arrays.use_backend(backend):
        for operation in (operation for operation in OPERATIONS if operation.row in rows):
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
def main(kernels: str, rows: Collection[str], as_json: bool) -> int:
    """Run the checks and print them as a table or as JSON; 1 if one failed, else 0."""
    if as_json:
        checks = list(run(kernels, rows))
        passed = all(check.passed for check in checks)
        print(json.dumps({"passed": passed, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        with console.status("verifying") as status:
            checks = list(_announced(run(kernels, rows), status))
        _print(console, checks)
    return 0 if all(check.passed for check in checks) else 1


def _announced(checks: Iterable[Check], status: Any) -> Iterator[Check]:
    for check in checks:
        status.update(f"verifying {check.row} {check.operation}: {check.kernels}, {check.arrays}, {check.dtype}")
        yield check


def _print(console: Any, checks: list[Check]) -> None:
    """One line for each case, that of the output nearest to its tolerance; then what failed, in words."""
    console.print("Against the float64 answer sheet: max |error| of the output that is nearest to its tolerance,")
    console.print("1.5 × PyTorch's max |error| on the same input + 1 ulp of max |reference|", style="dim")
    sections = groupby(checks, key=lambda check: (check.row, check.operation, check.kernels))
    for (row, operation, kernels), section in sections:
        console.print(f"\n[bold]{row} {operation}[/]: {kernels}")
        console.print(_table(list(section)))
    console.print()
    for check in checks:
        if not check.passed:
            found = check.note or f"error {check.error:.2e} above {check.tolerance:.2e}"
            where = ", ".join(filter(None, (*check.case, check.output)))
            console.print(f"[red]failed[/] {where}: {found}", soft_wrap=True)
    failed = sum(not check.passed for check in checks)
    verdict = f"[red]{failed} of {len(checks)} outputs failed[/]" if failed else f"[green]{len(checks)} outputs pass[/]"
    console.print(verdict)
    _print_what_did_not_run(console, checks)


def _table(checks: list[Check]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading, width in (("arrays", 6), ("dtype", 8), ("output", 26)):
        table.add_column(heading, width=width, no_wrap=True, overflow="ellipsis")
    for heading in ("error", "PyTorch", "allowed"):
        table.add_column(heading, width=7, no_wrap=True, justify="right")
    table.add_column("", width=4)
    for _, outputs in groupby(checks, key=lambda check: check.case):
        table.add_row(*_cells(max(outputs, key=lambda check: check.nearness)))
    return table


def _cells(check: Check) -> list[str]:
    numbers = ["-" if value is None else f"{value:.1e}" for value in (check.error, check.torch_error, check.tolerance)]
    return [check.arrays, check.dtype, check.output, *numbers, "[green]pass[/]" if check.passed else "[red]FAIL[/]"]


def _print_what_did_not_run(console: Any, checks: list[Check]) -> None:
    if any(check.kernels == INTERPRETED for check in checks):
        console.print("No GPU was used: Triton's interpreter ran the Triton kernels. It truncates float32 to bfloat16.")
    if "cupy" not in {check.arrays for check in checks}:
        console.print(f"CuPy arrays did not run: {cupy_refusal() or 'they take the Triton kernels on a GPU'}.")
