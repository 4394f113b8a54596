"""`python -m benchmarks gpu [--minutes 8] [--tune] [--pretend]`: everything worth measuring on a GPU, the most valuable first.

In this order, until the time is over: the environment, the speed of a copy, the correctness of every operation (at most a
minute), then each row of `rows`: held to the answer sheet, timed with a cold cache, as it is called and in a CUDA graph,
in turn with eager PyTorch, torch.compile, Liger, cuDNN and CuPy. `--tune` then tries other plans (`gpu_tune`). What fails is a
note in its row. A process of its own measures: where it crashes, or hangs, another goes on (`supervisor`). docs/gpu.md tells
what each column means.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hw3gpu.kernels.gpu.device import A100, B200, H100, H200, RTX_5090, Device, read

from . import gpu_checks, gpu_tune, plots, time_model
from .cuda_clock import Clock, Passes, Step, Timed, Times
from .harness import COLUMNS, INTERRUPTED, Deadline, Results, Spread, environment, rates_of, speedup_of, spread_of, told
from .progress import Progress
from .rows import ROWS, SEED, TABLE, Row, compiled, contestants, inputs, solvers

COPIES = tuple(2**n for n in range(20, 31, 2))  # bytes
ROW_SECONDS, COPY_SECONDS = 3.0, 3.0  # for the turns of a row, and of the copies
PASSES = ("forward", "backward")
EVERY_ROW = "every row"
KNOWN = (A100, B200, H100, H200, RTX_5090)  # to the time model


class DeviceLostError(RuntimeError):
    """The device does not answer any more: this process can measure nothing."""


@dataclass
class Gpu:
    """What is measured on: the device, or what stands for it."""

    cuda: Any
    name: str  # of torch's devices: 'cuda' or 'meta'
    device: Device
    clock: Clock
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    pretended: bool
    copy_rate: float | None = None  # bytes a second
    mark: Callable[[str], None] = lambda contestant: None  # which contestant it is at
    left_out: dict[str, list[str]] = field(default_factory=dict)  # contestants, by row or EVERY_ROW, that ended a process

    def leaves_out(self, row: str, contestant: str) -> bool:
        return contestant in [*self.left_out.get(EVERY_ROW, ()), *self.left_out.get(row, ())]

    def seconds(self, of: float) -> float:
        """For turns and checks; times of nothing need few."""
        return min(of / 50, 1.0) if self.pretended else of


@contextlib.contextmanager
def opened(pretend: bool) -> Iterator[Gpu]:
    """The GPU at hand, or a pretended one."""
    if not pretend:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = read(properties)
        yield Gpu(torch.cuda, "cuda", device, Clock(torch.cuda, "cuda", device.l2), compiled, False)
        return
    from . import pretended
    from .evidence.compile_without_gpu import StandIn

    with StandIn(90):
        device = read(pretended.Cuda.get_device_properties())
        yield Gpu(pretended.Cuda, "meta", device, Clock(pretended.Cuda, "meta", device.l2), pretended.compiled, True)


# ---------------------------------------------------------------------------------------------- a row
@dataclass
class Contestant:
    """What is found of one of them, besides the times."""

    step: Step
    first_call_s: float
    results: tuple[Any, Any] | None  # of forward and backward, until they are checked
    peak: int = 0
    host: tuple[float, float] = (0.0, 0.0)


def measure_row(gpu: Gpu, row: Row, deadline: Deadline) -> list[dict[str, Any]]:
    """The measurements of one row: two passes of each contestant."""
    if row.operation == "minimize_trace":
        return measure_solvers(gpu, row)
    torch.compiler.reset()  # after eight shapes of one function it would compile no more
    given, notes = inputs(row, gpu.name), {}
    found: dict[str, Contestant] = {}
    for name, make in contestants(row, given, gpu.compiled).items():
        if gpu.leaves_out(row.name, name):
            notes[name] = "left out: a process ended while it ran"
            continue
        gpu.mark(name)
        try:
            found[name] = prepared(gpu, make, keep=name in ("hw3gpu", "eager"))
        except Exception as error:
            notes[name] = why(error)
        if name not in found:  # outside the handler, whose error holds what was allocated
            gpu.clock.clear()
    gpu.mark("")
    right = {name: "" for name in found}
    if "hw3gpu" in found and "eager" not in found:
        notes["hw3gpu"] = "not compared: eager PyTorch, whose error is part of the measure, failed"
    elif "hw3gpu" in found and not gpu.pretended:
        wrong = gpu_checks.row_check(row, given, found["hw3gpu"].results, found["eager"].results)
        right["hw3gpu"] = "no" if wrong else "yes"
        if wrong:  # what is wrong is not timed
            notes["hw3gpu"] = f"wrong: {wrong}"
            del found["hw3gpu"]
    for contestant in found.values():
        contestant.results = None
    seconds = gpu.seconds(max(min(ROW_SECONDS, deadline.left / 4), 0.5)) / 4
    called = timed(gpu, found, gpu.clock.called, notes, seconds)
    graph = timed(gpu, found, gpu.clock.captured, notes, seconds)
    return records(gpu, row, found, called, graph, notes, right)


def prepared(gpu: Gpu, make: Callable[[], Step], keep: bool) -> Contestant:
    """A contestant that has run once, with what it needs of memory and of the host; keep: its results, to be checked."""
    start = time.perf_counter()
    step = make()
    result = step.forward()
    results = result, step.backward(result)
    gpu.cuda.synchronize()
    one = Contestant(step, time.perf_counter() - start, results if keep else None)
    one.peak = gpu.clock.peak(step)
    repeats = 1 if gpu.pretended else 5
    passes = gpu.clock.called(step)
    one.host = gpu.clock.host(passes.forward, repeats), gpu.clock.host(passes.backward, repeats)
    return one


def why(error: BaseException) -> str:
    """What an error says to the reader of a row."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"not installed ({error})"
    return told(error)


def timed(
    gpu: Gpu, found: dict[str, Contestant], how: Callable[[Step], Passes], notes: dict[str, str], seconds: float
) -> tuple[Times, Times]:
    """Times of all forward passes in turn, and of all backward passes."""
    passes: dict[str, Passes] = {}
    for name, contestant in found.items():
        gpu.mark(name)
        try:
            passes[name] = how(contestant.step)
        except Exception as error:
            notes[name] = "; ".join(filter(None, (notes.get(name), why(error))))
        if name not in passes:
            gpu.clock.clear()
    gpu.mark("")
    both = []
    for which in PASSES:
        times = gpu.clock.in_turn({name: getattr(of, which) for name, of in passes.items()}, seconds)
        for name, failure in times.failed.items():
            notes[name] = "; ".join(filter(None, (notes.get(name), failure)))
        both.append(times)
    passes.clear()
    gpu.clock.free()
    return both[0], both[1]


def records(
    gpu: Gpu, row: Row, found: dict[str, Contestant], called: tuple[Times, Times], graph: tuple[Times, Times],
    notes: dict[str, str], right: dict[str, str],
) -> list[dict[str, Any]]:  # fmt: skip
    """A record for each pass of each contestant; one that did not take part has its note alone."""
    lines = []
    predicted, nbytes = predictions(gpu, row), row.nbytes(gpu.device)
    for which, of in enumerate(PASSES):
        for name in [*found, *(name for name in notes if name not in found)]:
            line = head(row, of, name, notes.get(name, ""), right.get(name, ""))
            if name in found:
                one = found[name]
                line |= {"host_us": one.host[which], "peak_MB": one.peak / 1e6, "first_call_s": one.first_call_s}
                line |= spread_of("called", called[which].turns.get(name)) | spread_of("graph", graph[which].turns.get(name))
                line |= speedup(name, graph[which], called[which]) | rates_of(nbytes[of], plots.time_of(line), gpu.copy_rate)
                if name == "hw3gpu" and of in predicted:
                    measured = plots.time_of(line)
                    line["predicted_us"] = predicted[of]
                    line["measured_over_predicted"] = measured and measured / predicted[of]
            lines.append(line)
    return lines


def head(row: Row, of: str, contestant: str, note: str = "", right: str = "") -> dict[str, Any]:
    """What a record says of its row."""
    shape = "x".join(map(str, row.shape))
    return {
        "row": row.name, "operation": row.operation, "shape": shape, "dtype": row.dtype_name, "pass": of,
        "contestant": contestant, "right": right, "note": note,
    }  # fmt: skip


def predictions(gpu: Gpu, row: Row) -> dict[str, float]:
    """Microseconds of hw3gpu's passes by the time model, where it knows the device and the evidence has the row."""
    names = gpu.device.name.replace("-", " ").split()
    known = next((device for device in KNOWN if device.name in gpu.device.name and device.name.split()[-1] in names), None)
    try:
        return time_model.predicted(row.call.label, known) if row.call and known else {}
    except Exception:  # of evidence that is not there, or of another time: a row is worth measuring without
        return {}


def speedup(name: str, graph: Times, called: Times) -> dict[str, float]:
    """In the graphs where both have one, else as called."""
    return next(filter(None, (speedup_of(times.turns.get(name), times.turns.get("hw3gpu")) for times in (graph, called))), {})


def measure_solvers(gpu: Gpu, row: Row) -> list[dict[str, Any]]:
    """A row of minimize_trace: no backward, no graph."""
    given = inputs(row, gpu.name)
    calls: dict[str, Timed] = {}
    notes, right = {}, {}
    for name, call in solvers(row, given).items():
        if gpu.leaves_out(row.name, name):
            notes[name] = "left out: a process ended while it ran"
            continue
        gpu.mark(name)
        try:
            call()
            if name == "hw3gpu" and not gpu.pretended:
                wrong = gpu_checks.solver_check(row, given)
                right[name] = "no" if wrong else "yes"
                if wrong:  # what is wrong is not timed
                    notes[name] = f"wrong: {wrong}"
                    continue
            calls[name] = Timed(call)
        except Exception as error:
            notes[name] = why(error)
    gpu.mark("")
    times = gpu.clock.in_turn(calls, gpu.seconds(ROW_SECONDS), most=15)
    notes |= times.failed
    lines = []
    for name in [*times.turns, *(name for name in notes if name not in times.turns)]:
        line = head(row, "forward", name, notes.get(name, ""), right.get(name, ""))
        lines.append(line | spread_of("called", times.turns.get(name)) | speedup(name, Times(), times))
    return lines


# ---------------------------------------------------------------------------------------------- what comes before the rows
def of_device(gpu: Gpu) -> dict[str, Any]:
    """What the environment says of the device besides its name."""
    found = {"multiprocessors": gpu.device.multiprocessors, "l2_MB": gpu.device.l2 / 2**20, "cuda": torch.version.cuda}
    if gpu.pretended:
        return found
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    say = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        values = subprocess.run(say, capture_output=True, text=True, check=True, timeout=20).stdout.strip().split(", ")
        found |= dict(zip(fields.split(","), values, strict=False))
    return found | {"cudnn": torch.backends.cudnn.version()}


def copy_speed(gpu: Gpu, results: Results) -> None:
    """The line that every row is held to, and what a launch takes that does nothing."""
    rates = gpu.clock.copies(COPIES, gpu.seconds(COPY_SECONDS))
    results.parts["copy_GB_s"] = {str(size): asdict(Spread.of([rate / 1e9 for rate in of])) for size, of in rates.items()}
    results.parts["empty_graph_us"] = gpu.clock.overhead()


def copy_rate(results: Results) -> float | None:
    """Bytes a second of the largest copy; what smaller ones write may stay in L2."""
    found = results.parts.get("copy_GB_s", {})
    return 1e9 * found[max(found, key=int)]["median"] if found else None


def correctness(gpu: Gpu, results: Results, seconds: float, progress: Progress) -> None:
    """Every operation, as far as the time goes; pretended: on the host, with its kernels.

    It begins anew where an earlier time was too short: what was compiled then is there now.
    """
    earlier = results.parts.get("correctness")
    if earlier is not None and not earlier["unfinished"]:
        return
    until = Deadline(time.time() + gpu.seconds(seconds))

    def announce(operation: str) -> None:
        progress.announce(operation)
        gpu.mark("")

    found = gpu_checks.verify("cpu" if gpu.pretended else "cuda", until, announce, gpu.cuda.synchronize)
    if earlier is None or found.passed > earlier["passed"]:
        results.parts["correctness"] = asdict(found)
    for failure in found.failures:
        progress.say(f"wrong: {failure}")


# ---------------------------------------------------------------------------------------------- the command
Task = tuple[str, Callable[[], Any]]


def tasks(gpu: Gpu, results: Results, deadline: Deadline, progress: Progress, args: argparse.Namespace) -> list[Task]:
    """What is to be done, in its order: names, and what adds to the results."""

    def row_task(row: Row) -> Task:
        return row.name, lambda: results.add(measure_row(gpu, row, deadline))

    def tune_task(row: Row) -> Task:
        return f"tune {row.name}", lambda: gpu_tune.tune_row(gpu, row, results, deadline)

    rows = [row for row in ROWS if not args.only or any(text in row.name for text in args.only)]
    first = [row for row in rows if row in TABLE] or rows
    to_tune = [row for row in first if row.operation in ("batch norm", "cross entropy", "softmax")] if args.tune else []
    return [
        ("copy", lambda: copy_speed(gpu, results)),
        ("correctness", lambda: correctness(gpu, results, min(60.0, deadline.left / 5), progress)),
        *map(row_task, first),
        *map(tune_task, to_tune),
        *(row_task(row) for row in rows if row not in first),
        ("correctness, all of it", lambda: correctness(gpu, results, deadline.left - 5.0, progress)),
    ]


def resume(results: Results, after: str) -> None:
    """Goes on after a process that ended in a task: without the contestant it was at, or without the task if it was at none."""
    blamed, task = results.blamed(), str(results.running)
    if blamed:
        of = task if blamed == "hw3gpu" else EVERY_ROW
        results.parts.setdefault("left_out", {}).setdefault(of, []).append(blamed)
        results.parts.setdefault("ended", []).append(f"{task}, at {blamed}: {after}")
        results.running = None
    else:
        results.add(
            [{"row": task, "contestant": "hw3gpu", "note": f"given up: the process that measured this ended ({after})"}]
        )
        results.finish()


def attempt(gpu: Gpu, results: Results, name: str, task: Callable[[], Any]) -> None:
    """One task; DeviceLostError, and the task not done, where the device does not answer after it."""
    results.begin(name)
    failed = ""
    try:
        task()
    except Exception as error:
        failed = why(error)
    try:
        gpu.clock.clear()
    except Exception as error:
        raise DeviceLostError(f"{told(error)}; {failed}") from error
    if failed:
        results.add([{"row": name, "contestant": "hw3gpu", "note": failed}])
    results.finish()


@contextlib.contextmanager
def collected_by_hand() -> Iterator[None]:
    """Garbage is collected between two tasks alone: what is freed in the middle of a capture may spoil it."""
    gc.freeze()  # modules, which no row leaves behind, are not looked through each time
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def work(args: argparse.Namespace) -> None:
    """Does what an earlier process of this run has not done. DeviceLostError where another one has to go on."""
    results, deadline = Results.open(Path(args.output), COLUMNS), Deadline(args.until)
    with contextlib.suppress(Exception):  # where it fails, torch.compile says so in its place
        importlib.import_module("torch._dynamo")
    with collected_by_hand(), opened(args.pretend) as gpu, Progress(deadline, gpu.pretended) as progress:
        results.environment = environment(gpu.device.name, SEED, pretended=gpu.pretended, **of_device(gpu))
        if results.running is not None:
            resume(results, args.after)
        gpu.mark, gpu.left_out = results.mark, results.parts.get("left_out", {})
        todo = tasks(gpu, results, deadline, progress, args)
        progress.total(len(todo))
        took = [2.0]
        for name, task in todo:
            if name in results.done:
                continue
            if deadline.left < statistics.median(took):  # it would hardly be finished
                results.parts.setdefault("not_reached", []).append(name)
                continue
            gpu.copy_rate = copy_rate(results)
            progress.announce(name)
            start = time.time()
            attempt(gpu, results, name, task)
            took.append(time.time() - start)
            progress.advance(name)
        results.write()


def run(args: argparse.Namespace) -> int:
    """A measuring process, which `supervisor` starts; its status is 0 when all was done or the time is over."""
    from . import supervisor

    try:
        work(args)
    except DeviceLostError as error:
        print(f"the device does not answer any more: {error}", flush=True)
        return supervisor.GO_ON
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
