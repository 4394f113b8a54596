"""`hw3gpu verify`: every operation, on every back end that can run here, against the answer sheet: docs/errors.md."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .._core import arrays as _arrays
from .._core import dispatch, pool
from . import report
from .arrays import DTYPES, KINDS, Place, cupy_refusal, to_numpy
from .files import why_not_written
from .info import collect
from .interpreter import mend_the_interpreter
from .losses import LOSSES
from .measure import max_error, share_of_bound, tolerance
from .operations import OPERATIONS as OF_EACH_ROW
from .operations import Operation, Output

OPERATIONS = tuple(sorted((*OF_EACH_ROW, *LOSSES), key=lambda operation: operation.row))
INTERPRETED = "Triton kernels, interpreted"
# Where nothing is cached, the Numba kernels are compiled first, which takes most of the time. Each dtype has its own kernels:
# two processes with two dtypes each compile nothing twice. For few rows a second process does not pay.
BESIDE, FEW_ROWS = ("float64", "bfloat16"), 2


@dataclass(frozen=True)
class Check:
    """One output of one operation on one back end, array kind and dtype.

    Errors are max |error|. `error` is None where NaN or infinity is in a wrong place or the operation raised, as
    `note` says; `torch_error` is None where PyTorch's result has them in a wrong place. `tolerance` is what PyTorch's error
    allows; `of_bound` the largest share, over the elements, that an error has of the bound that error analysis gives.
    `held_by` says which of the two the result keeps: 'both', 'PyTorch', 'bound' or 'neither'.
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
    of_bound: float | None
    held_by: str
    passed: bool
    note: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        """What the outputs of one call have in common."""
        return self.row, self.operation, self.kernels, self.arrays, self.dtype

    @property
    def nearness(self) -> float:
        """1 where the result would just pass: the error in units of what the kinder of the two measures allows."""
        if self.error is None or self.of_bound is None:
            return math.inf
        return min(self.error / self.tolerance, self.of_bound)


def run(kernels: str, rows: Collection[str], dtypes: Collection[str] = DTYPES) -> Iterator[Check]:
    """The checks of the operations that answer `rows`, 'S1' to 'S9', for `kernels`, 'cpu', 'gpu' or 'all', on `dtypes`.

    The Triton kernels run on CUDA and CuPy arrays where a GPU is found, else on host arrays in Triton's interpreter.
    The interpreter has to be chosen before Triton is imported, so it runs in another process, at the same time as the Numba
    kernels.
    """
    import torch

    host = [Place("numpy", "cpu"), Place("torch", "cpu")]
    gpu = kernels in ("gpu", "all") and not _without_triton()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    apart = gpu and not interpreted and not torch.cuda.is_available()
    with contextlib.ExitStack() as processes:
        # NumPy, on which the interpreter computes, warns of every exp(-inf) and overflow
        quiet = ("-W", "ignore::RuntimeWarning:triton.runtime.interpreter")
        interpreter = processes.enter_context(_process("gpu", rows, dtypes, quiet, TRITON_INTERPRET="1")) if apart else None
        if kernels in ("cpu", "all"):
            here, there = ([dtype for dtype in dtypes if (dtype in BESIDE) is beside] for beside in (False, True))
            shared = bool(here and there) and len(rows) > FEW_ROWS
            beside = processes.enter_context(_process("cpu", rows, there)) if shared else None
            yield from _checks("cpu", "Numba kernels", host, rows, here if shared else dtypes)
            if beside is not None:
                yield from _checks_of(beside)
        if interpreter is not None:
            yield from _checks_of(interpreter)
        elif gpu and interpreted:
            mend_the_interpreter()
            yield from _checks("gpu", INTERPRETED, host, rows, dtypes)
        elif gpu:
            kinds = ["torch"] if cupy_refusal() else ["torch", "cupy"]
            yield from _checks("gpu", "Triton kernels", [Place(kind, "cuda") for kind in kinds], rows, dtypes)


def _without_triton() -> bool:
    """True where Triton is not installed, as on macOS and Windows; does not import it."""
    return importlib.util.find_spec("triton") is None


@contextlib.contextmanager
def _process(
    kernels: str, rows: Collection[str], dtypes: Collection[str], options: Sequence[str] = (), **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A process that verifies these kernels; ended with the block."""
    command = [sys.executable, *options, "-m", "hw3gpu", "verify", "--kernels", kernels, "--json"]
    command += ["--only", *rows, "--dtypes", *dtypes]
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _checks_of(process: subprocess.Popen[str]) -> Iterator[Check]:
    output, _ = process.communicate()
    if process.returncode not in (0, 1) or not output:
        raise RuntimeError(f"a process that verifies a part ended with status {process.returncode}: {process.args!r}")
    yield from (Check(**check) for check in json.loads(output)["checks"])


def _checks(backend: str, kernels: str, places: list[Place], rows: Collection[str], dtypes: Collection[str]) -> Iterator[Check]:
    with dispatch.use_backend(backend):
        for operation in (operation for operation in OPERATIONS if operation.row in rows):
            for place in (place for place in places if place.kind in operation.kinds):
                # in the interpreter, which is slow, NumPy arrays, which reach the kernels as tensors, show that they do so
                only = ("float32",) if kernels == INTERPRETED and place.kind == "numpy" else place.dtypes
                for dtype in (dtype for dtype in operation.dtypes if dtype in only and dtype in dtypes):
                    yield from check(operation, kernels, place, dtype)


def check(operation: Operation, kernels: str, place: Place, dtype: str) -> Iterator[Check]:
    """Each output of one operation on one kind of array, as it is computed; one check that failed where it raises."""
    case = (operation.row, operation.name, kernels, place.kind, dtype)
    try:
        for output in operation.run(place, dtype):
            yield Check(*case, output.name.strip(), **_measure(output))
    except Exception as error:  # a broken operation is a failed check, and the others are still run
        yield Check(*case, "", None, None, 0.0, None, "neither", False, f"{type(error).__name__}: {error}")


def _measure(output: Output) -> dict[str, Any]:
    """The fields of a `Check` that tell what was found."""
    dtype = output.dtype or _arrays.dtype_name(output.actual)
    actual, theirs = to_numpy(output.actual), max_error(to_numpy(output.torch), output.expected, dtype)
    error = max_error(actual, output.expected, dtype)
    torch_error = theirs if math.isfinite(theirs) else None
    allowed = tolerance(output.expected, dtype, torch_error)
    if math.isfinite(error):
        share, note = share_of_bound(actual, output.expected, dtype, output.bound), ""
    else:
        share, note = math.inf, "NaN or infinity in a wrong place"
    by_torch, by_bound = error <= allowed, share <= 1.0
    return {
        "error": None if note else error,
        "torch_error": torch_error,
        "tolerance": allowed,
        "of_bound": None if note else share,
        "held_by": "both" if by_torch and by_bound else "PyTorch" if by_torch else "bound" if by_bound else "neither",
        "passed": by_torch or by_bound,
        "note": note,
    }


# ---------------------------------------------------------------------------------------------- the command
def main(kernels: str, rows: Collection[str], dtypes: Collection[str], as_json: bool, page: Path | None = None) -> int:
    """Run the checks and print them as a table or as JSON, and write them to `page`; 1 if one failed, else 0."""
    try:
        dispatch.requested_backend()
        dispatch.check_threads()
        pool.limit()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if kernels == "gpu" and _without_triton():
        print(f"hw3gpu verify: the Triton kernels cannot run: {dispatch.triton_refusal()}", file=sys.stderr)
        return 2
    if page is not None and (refusal := why_not_written(page)):
        print(f"hw3gpu verify: argument --report: {refusal}", file=sys.stderr)
        return 2
    if as_json:
        checks = _in_order(run(kernels, rows, dtypes))
        passed = all(check.passed for check in checks)
        print(json.dumps({"passed": passed, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        with console.status("verifying") as status:
            checks = _in_order(_announced(run(kernels, rows, dtypes), status))
        _print(console, checks)
    if page is not None:
        page.write_text(report.page(checks, collect()["versions"]), encoding="utf-8")
        print(f"report: {page.resolve()}", file=sys.stderr)
    return 0 if all(check.passed for check in checks) else 1


def _in_order(checks: Iterable[Check]) -> list[Check]:
    """By kernels, operation, kind of array and dtype, whichever process they come from."""
    found = list(checks)
    order = list(dict.fromkeys(check.kernels for check in found)), [operation.name for operation in OPERATIONS], KINDS, DTYPES
    return sorted(
        found,
        key=lambda check: tuple(
            names.index(name)
            for names, name in zip(order, (check.kernels, check.operation, check.arrays, check.dtype), strict=True)
        ),
    )


def _announced(checks: Iterable[Check], status: Any) -> Iterator[Check]:
    for check in checks:
        status.update(f"verifying {check.row} {check.operation}: {check.kernels}, {check.arrays}, {check.dtype}")
        yield check


def _print(console: Any, checks: list[Check]) -> None:
    """One line for each case, that of the output nearest to what is allowed; then what failed, in words."""
    console.print("Each result against the answer sheet; of every case, the output that is nearest to what is allowed.")
    console.print(
        "PyTorch: 1.5 × its max |error| on the same input + 1 ulp of max |reference|.\n"
        "bound: the largest share of what rounding may do to an element; up to 1 passes (docs/errors.md).",
        style="dim",
    )
    sections = groupby(checks, key=lambda check: (check.row, check.operation, check.kernels))
    for (row, operation, kernels), section in sections:
        console.print(f"\n[bold]{row} {operation}[/]: {kernels}")
        console.print(_table(list(section), console.width))
    console.print()
    for check in checks:
        if not check.passed:
            console.print(f"[red]failed[/] {_failure(check)}", soft_wrap=True)
    failed = sum(not check.passed for check in checks)
    verdict = f"[red]{failed} of {len(checks)} outputs failed[/]" if failed else f"[green]{len(checks)} outputs pass[/]"
    console.print(verdict)
    _print_what_did_not_run(console, checks)


def _failure(check: Check) -> str:
    where = ", ".join(filter(None, (*check.case, check.output)))
    if check.note:
        return f"{where}: {check.note}"
    return f"{where}: error {check.error:.2e} above {check.tolerance:.2e}, and {check.of_bound:.2g} of its bound"


def _table(checks: list[Check], width: int) -> Any:
    """At most `width` columns, of at least 60: the outputs' names are cut, and nothing else."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 0), pad_edge=False, show_edge=False)
    columns = {"arrays": 6, "dtype": 8, "output": 0, "error": 7, "PyTorch": 7, "bound": 5, "held by": 7}
    columns["output"] = min(max(width - sum(columns.values()) - len(columns) + 1, 14), 40)
    for heading, of in columns.items():
        number = heading in ("error", "PyTorch", "bound")
        table.add_column(heading, width=of, no_wrap=True, overflow="ellipsis", justify="right" if number else "left")
    for _, outputs in groupby(checks, key=lambda check: check.case):
        table.add_row(*_cells(max(outputs, key=lambda check: check.nearness)))
    return table


def _cells(check: Check) -> list[str]:
    error = "-" if check.error is None else f"{check.error:.1e}"
    share = "-" if check.of_bound is None else f"{check.of_bound:.2f}" if check.of_bound < 10 else "≥ 10"
    held_by = f"[green]{check.held_by}[/]" if check.passed else f"[red]{check.held_by}[/]"
    return [check.arrays, check.dtype, check.output, error, f"{check.tolerance:.1e}", share, held_by]


def _print_what_did_not_run(console: Any, checks: list[Check]) -> None:
    if any(check.kernels == INTERPRETED for check in checks):
        console.print("No GPU was used: Triton's interpreter ran the Triton kernels.")
    if _without_triton():
        console.print(f"The Triton kernels did not run: {dispatch.triton_refusal()}.", soft_wrap=True)
    if "cupy" not in {check.arrays for check in checks}:
        console.print(f"CuPy arrays did not run: {cupy_refusal() or 'they take the Triton kernels on a GPU'}.")
