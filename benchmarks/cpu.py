"""The CPU kernels against PyTorch and against memory: `python -m benchmarks cpu`.

Every figure goes through `hw3gpu.functional`, autograd and the outputs' memory included, in float32 unless a row says so. The
contestants take turns in one process, so that a busy machine slows all of them; a time is the median of its turns, a
ratio the median and the quartiles of the ratios turn by turn. Before a row is timed its values and gradients are compared
with PyTorch's. The limit is a plain copy, by two threads into warm memory, of as many bytes as the row has to move.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hw3gpu
import hw3gpu.functional
from hw3gpu._core import pool as _pool
from hw3gpu._torch import small_calls
from hw3gpu.kernels.cpu import batch_norm_small, cross_entropy_step

from . import plots
from .cpu_cases import HALVES, KNOWN, ROWS, TINIES, Function, Step, Work
from .harness import Results, Spread, environment

THREADS = 2
OURS = "hw3gpu"
COLUMNS = (
    "row", "operation", "shape", "dtype", "pass", "contestant", "called_us", "called_low_us", "called_high_us", "turns",
    "speedup", "speedup_low", "speedup_high", "bytes", "GB_s", "share_of_copy",
)  # fmt: skip
LIMIT = 1.6  # times the plain copy, for shapes of at least LARGE bytes
LARGE = 16 << 20
HALF_RATE = 0.8  # of float32's elements a second
FIRST_CALL = 0.5  # s, in a process that finds the kernels compiled


# ---------------------------------------------------------------------------------------------- figures
@dataclass(frozen=True)
class Ratio:
    """How one time compares with another, and the number that is promised: at least, or at most."""

    row: str
    to: str
    spread: Spread
    promised: float | None = None
    at_most: bool = False

    @property
    def kept(self) -> bool:
        if self.promised is None:
            return True
        return self.spread.median <= self.promised if self.at_most else self.spread.median >= self.promised

    def __str__(self) -> str:
        if self.promised is None:
            return str(self.spread)
        bound = f"{'≤' if self.at_most else '≥'} {self.promised:g}"
        return f"{self.spread} [{'green' if self.kept else 'red'}]{bound}[/]"


@dataclass
class Result:
    """All that one run found."""

    machine: dict[str, Any]
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    first_calls: dict[str, float] = field(default_factory=dict)
    written: Results | None = None  # where each measurement is kept as it comes

    def note(self, work: Work, seconds: Mapping[str, Sequence[float]]) -> None:
        """Of each contestant its median time, and a line of the results, with the ratios to our time turn by turn."""
        spreads = {name: Spread.of([1e3 * turn for turn in turns]) for name, turns in seconds.items()}
        self.milliseconds[work.name] = {name: spread.median for name, spread in spreads.items()}
        if self.written is None:
            return
        moved = int(work.passes * work.nbytes)
        of = {"row": work.name, "operation": work.operation, "shape": "x".join(map(str, work.shape))}
        of |= {"dtype": str(work.dtype).removeprefix("torch."), "pass": work.of}
        lines = []
        for name, spread in spreads.items():
            times = {"called_us": spread.median, "called_low_us": spread.low, "called_high_us": spread.high}
            line = {**of, "contestant": name, **{of: 1e3 * ms for of, ms in times.items()}, "turns": len(seconds[name])}
            line |= {"bytes": moved, "GB_s": moved / spread.median / 1e6}
            if name != OURS:
                ratio = Spread.ratio(seconds[name], seconds[OURS])
                line |= {"speedup": ratio.median, "speedup_low": ratio.low, "speedup_high": ratio.high}
            elif "copy" in seconds:
                line["share_of_copy"] = Spread.ratio(seconds["copy"], seconds[OURS]).median
            lines.append(line)
        if "copy" in spreads:  # of half the bytes: it reads them and writes as many
            copies = self.written.parts.setdefault("copy_GB_s", {})
            copies[str(moved // 2)] = {"median": moved / spreads["copy"].median / 1e6}
        self.written.add(lines)

    def shortfalls(self) -> list[str]:
        short = [f"{r.row}: {r.spread} × {r.to}, promised {r.promised:g}" for r in self.ratios if not r.kept]
        slow = [f"first call of {k}: {s:.2f} s, promised {FIRST_CALL} s" for k, s in self.first_calls.items() if s > FIRST_CALL]
        return short + slow


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    from numba import __version__ as numba_version

    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba_version,
        "torch": torch.__version__,
    }
    return {"cpu": cpu, "cpus": os.cpu_count(), "threads": THREADS, **versions, "hw3gpu": hw3gpu.__version__}


# ---------------------------------------------------------------------------------------------- taking turns
@contextmanager
def pool(on: bool) -> Iterator[None]:
    before = os.environ.get(_pool.VARIABLE)
    if not on:
        os.environ[_pool.VARIABLE] = "0"
    try:
        yield
    finally:
        os.environ.pop(_pool.VARIABLE, None)
        if before is not None:
            os.environ[_pool.VARIABLE] = before


def in_turn(contestants: Mapping[str, Callable[[], object]], turns: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds a call of every turn of every contestant; those whose name ends in 'pool off' run without the pool."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-1, turns):
        for name, call in contestants.items():
            with pool(on=not name.endswith("pool off")):
                call()  # whoever came before has the caches
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                if turn >= 0:
                    seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def verify(work: Work, step: Step) -> None:
    """AssertionError unless value and gradients lie as near to float64's as PyTorch's do: 1.5 times its error and an ulp."""

    def results(of: Step, f: Function) -> list[torch.Tensor]:
        value = of(f)
        return [value.detach(), *(leaf.grad for leaf in of.leaves if leaf.grad is not None)]

    exact = work.step(exact=True)
    names = ("value", "gradient", "weight's gradient", "bias's gradient")
    found = results(step, step.ours), results(step, step.eager), results(exact, exact.eager)
    for name, ours, theirs, reference in zip(names, *found, strict=False):
        error, pytorch_error = (float((v.double() - reference).abs().max()) for v in (ours, theirs))
        allowed = 1.5 * pytorch_error + torch.finfo(work.dtype).eps * float(reference.abs().max())
        assert error <= allowed, f"{work.name}: {name} has an error of {error:.3g}, PyTorch's has {pytorch_error:.3g}"


def copier(nbytes: float) -> Callable[[], None]:
    """A plain copy that reads and writes `nbytes` in all, by THREADS threads, from warm memory into warm memory."""
    source = np.ones(int(nbytes / 2) // 4, np.float32)
    pieces = list(zip(np.array_split(source, THREADS), np.array_split(np.ones_like(source), THREADS), strict=True))
    helpers = ThreadPoolExecutor(THREADS)

    def copy() -> None:
        rest = [helpers.submit(np.copyto, out, part) for part, out in pieces[1:]]
        np.copyto(pieces[0][1], pieces[0][0])
        for done in rest:
            done.result()

    return copy


# ---------------------------------------------------------------------------------------------- the tables
def measure_rows(result: Result, turns: int) -> None:
    for work in track(ROWS, "rows"):
        step = work.step()
        verify(work, step)
        compiled = torch.compile(step.eager, dynamic=False)
        contestants: dict[str, Callable[[], object]] = {
            "hw3gpu": partial(step, step.ours),
            "hw3gpu, pool off": partial(step, step.ours),
            "eager": partial(step, step.eager),
            "compiled": partial(step, compiled),
            "copy": copier(work.passes * work.nbytes),
        }
        seconds = in_turn(contestants, turns)
        result.note(work, seconds)
        ours, off = seconds["hw3gpu"], seconds["hw3gpu, pool off"]
        large = work.nbytes >= LARGE
        result.ratios += [
            Ratio(work.name, "eager", Spread.ratio(seconds["eager"], ours), work.eager),
            Ratio(work.name, "compiled", Spread.ratio(seconds["compiled"], ours), work.compiled),
            Ratio(work.name, "eager, pool off", Spread.ratio(seconds["eager"], off)),
            Ratio(work.name, "compiled, pool off", Spread.ratio(seconds["compiled"], off)),
            Ratio(work.name, "copy", Spread.ratio(ours, seconds["copy"]), LIMIT if large else None, at_most=True),
        ]
        torch.compiler.reset()


def measure_halves(result: Result, turns: int) -> None:
    for works in track(HALVES, "halves"):
        steps = {work.name: work.step() for work in works}
        for work in works:
            verify(work, steps[work.name])
        seconds = in_turn({name: partial(step, step.ours) for name, step in steps.items()}, turns)
        float32 = seconds[works[0].name]
        for work in works[1:]:
            result.note(work, {OURS: seconds[work.name]})
            result.ratios.append(Ratio(work.name, "float32 rate", Spread.ratio(float32, seconds[work.name]), HALF_RATE))


def measure_known(result: Result, turns: int) -> None:
    """Statistics that are known. Small calls are made several times a turn."""
    for work in track(KNOWN, "evaluation and frozen statistics"):
        step = work.step()
        verify(work, step)
        contestants = {"hw3gpu": partial(step, step.ours), "eager": partial(step, step.eager)}
        seconds = in_turn(contestants, turns, calls=max(1, LARGE // work.nbytes))
        result.note(work, seconds)
        result.ratios.append(Ratio(work.name, "eager", Spread.ratio(seconds["eager"], seconds["hw3gpu"]), work.eager))


def measure_tinies(result: Result, turns: int) -> None:
    for work in TINIES:
        step = work.step()
        verify(work, step)
        contestants = {"hw3gpu": partial(step, step.ours), "eager": partial(step, step.eager)}
        seconds = in_turn(contestants, 4 * turns, calls=200)
        result.note(work, seconds)
        result.ratios.append(Ratio(work.name, "eager", Spread.ratio(seconds["eager"], seconds["hw3gpu"]), work.eager))
        result.layers[work.name] = layers(work, step, turns)


# ---------------------------------------------------------------------------------------------- where a small call's time goes
@dataclass
class _Call:
    """A call to be made again. It keeps the result too: calls below it may have taken its address."""

    function: Callable[..., object]
    args: tuple[Any, ...]
    options: dict[str, Any]
    result: object

    def __call__(self) -> object:
        return self.function(*self.args, **self.options)


@contextmanager
def _noting(module: Any, names: tuple[str, ...], calls: list[_Call]) -> Iterator[None]:
    """Inside, calls of these functions of a module are noted."""
    before = {name: getattr(module, name) for name in names}

    def noting(function: Callable[..., object]) -> Callable[..., object]:
        def noted(*args: Any, **options: Any) -> object:
            result = function(*args, **options)
            calls.append(_Call(function, args, options, result))
            return result

        return noted

    for name, function in before.items():
        setattr(module, name, noting(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


class _Empty(torch.autograd.Function):
    """What autograd itself takes: forward saves its inputs, backward returns gradients, nothing is computed."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
        return torch.empty_like(inputs[0]) if inputs[-1] is True else torch.empty(())

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        saved = list(ctx.saved_tensors)
        return tuple(torch.empty_like(saved.pop(0)) if needed else None for needed in ctx.needs_input_grad)


def layers(work: Work, step: Step, turns: int) -> dict[str, float]:
    """Microseconds of one small forward and backward, by layer."""
    room: ModuleType
    names: tuple[str, ...]
    kernel_names: tuple[str, ...]
    if work.operation == "batch_norm":
        names = ("batch_norm_forward", "batch_norm_backward")
        room, kernel_names = batch_norm_small, ("_forward", "_backward")
        empty = Step(lambda f: f(*step.leaves, True), _Empty.apply, _Empty.apply, step.leaves, step.upstream)
    else:
        names, room, kernel_names = ("cross_entropy_step",), cross_entropy_step, ("_at_addresses",)
        empty = Step(lambda f: f(*step.leaves, None), _Empty.apply, _Empty.apply, step.leaves)
    with_outputs: list[_Call] = []
    kernels: list[_Call] = []
    with _noting(small_calls, names, with_outputs), _noting(room, kernel_names, kernels):
        step(step.ours)
    contestants: dict[str, Callable[[], object]] = {
        "all": partial(step, step.ours),
        "eager": partial(step, step.eager),
        "an empty autograd function": partial(empty, empty.ours),
        "outputs and addresses": lambda: [call() for call in with_outputs],
        "kernels": lambda: [call() for call in kernels],
    }
    seconds = in_turn(contestants, 4 * turns, calls=200)
    found = {name: 1e6 * statistics.median(s) for name, s in seconds.items()}
    found["outputs and addresses"] -= found["kernels"]
    parts = ("an empty autograd function", "outputs and addresses", "kernels")
    found["checks and choices"] = found["all"] - sum(found[part] for part in parts)
    return found


# ---------------------------------------------------------------------------------------------- the first call in a process
FIRST_CALLS = {
    "cross entropy": "z = torch.zeros(32, 10, requires_grad=True); hw3gpu.functional.cross_entropy(z, z.argmax(1)).backward()",
    "softmax": "z = torch.zeros(32, 10, requires_grad=True); hw3gpu.functional.softmax(z, 1).sum().backward()",
    "batch norm": "x = torch.zeros(8, 3, 4, 4, requires_grad=True); "
    "hw3gpu.functional.batch_norm(x, None, None, training=True).sum().backward()",
}
FIRST_CALL_CODE = """
import time, torch, numba, hw3gpu.functional
start = time.perf_counter()
{}
print(time.perf_counter() - start)
"""


def measure_first_calls(result: Result) -> None:
    """Forward and backward in a process of its own, imports done, after another process has compiled what they need."""
    for name, call in FIRST_CALLS.items():
        command = [sys.executable, "-c", FIRST_CALL_CODE.format(call)]
        times = [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(4)]
        result.first_calls[name] = statistics.median(times[1:])


# ---------------------------------------------------------------------------------------------- the command
def _print(result: Result, console: Console) -> None:
    """What was measured: a run that was interrupted has less."""
    by_row = {(ratio.row, ratio.to): ratio for ratio in result.ratios}
    console.print(", ".join(f"{name} {value}" for name, value in result.machine.items()))
    table = Table(title="Times PyTorch's speed, median (quartiles) and what is promised; last, times a plain copy's time")
    for column in ("work", "ms", "× eager, pool off", "× compiled, pool off", "× eager", "× compiled", "× copy"):
        table.add_column(column, justify="left" if column == "work" else "right")
    rows = [work.name for work in ROWS if work.name in result.milliseconds]
    for row in rows:
        to = ("eager, pool off", "compiled, pool off", "eager", "compiled", "copy")
        table.add_row(row, f"{result.milliseconds[row][OURS]:.2f}", *(str(by_row[row, name]) for name in to))
    console.print(table)
    rest = Table("work", "compared with", "ratio")
    for ratio in result.ratios:
        if ratio.row not in rows:
            rest.add_row(ratio.row, ratio.to, str(ratio))
    for name, seconds in result.first_calls.items():
        rest.add_row(f"first call in a process, {name}", "seconds", f"{seconds:.2f} ≤ {FIRST_CALL}")
    console.print(rest)
    if result.layers:
        parts = Table("microseconds a call", *result.layers)
        for layer in next(iter(result.layers.values())):
            parts.add_row(layer, *(f"{of[layer]:.1f}" for of in result.layers.values()))
        console.print(parts)
    for shortfall in result.shortfalls():
        console.print(f"short: {shortfall}")


def run(args: argparse.Namespace) -> int:
    """Verifies and measures everything `args.turns` times, prints the tables and what falls short; JSON to `args.json`.

    With `args.output`, a folder: results.json, measurements.csv and the plots. Ctrl-C keeps what is finished, with status 130.
    """
    result = Result(machine())
    if args.output:
        where = environment(result.machine["cpu"], seed=0, cpus=os.cpu_count(), threads=THREADS)
        try:
            result.written = Results.new(Path(args.output), COLUMNS, where)
        except (OSError, ValueError) as error:
            print(f"cpu: argument --output: {error}", file=sys.stderr)
            return 2
    before, status = torch.get_num_threads(), 0
    torch.set_num_threads(THREADS)
    try:
        measure_rows(result, args.turns)
        measure_halves(result, args.turns)
        measure_known(result, args.turns)
        measure_tinies(result, args.turns)
        measure_first_calls(result)
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept", file=sys.stderr)
        status = 130
    finally:
        torch.set_num_threads(before)
    _print(result, Console(width=None if sys.stdout.isatty() else 200))
    found = {name: of for name, of in asdict(replace(result, written=None)).items() if name != "written"}
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    if result.written is not None:
        result.written.parts |= {"layers_us": result.layers, "first_calls_s": result.first_calls}
        result.written.parts["short"] = result.shortfalls()
        result.written.write()
        print(plots.draw(json.loads(result.written.file.read_text()), result.written.folder) or f"results: {args.output}")
    return status
