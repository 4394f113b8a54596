"""What every benchmark uses: rows that are verified and then timed in turn, and results that outlive a crash.

A command of `python -m benchmarks` gives `bench` its tasks. A task calls `Bench.measure` with a `Row`: what it measures, the
contestants with hw3gpu first, and a check against the answer sheet that comes before the clock. `Results` writes after every
record: JSON and CSV, a line a measurement, with device, versions, commit and seed in each. What a process has begun and not
finished is in the file too, so that the next one can tell that it ended there, and go on after it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import io
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = ".mark.json"
OURS = "hw3gpu"
COPY = "copy"  # the contestant, and the task that comes first, whatever rows are asked for
INTERRUPTED = 130  # the status after Ctrl-C
COLUMNS = (
    "row", "operation", "shape", "dtype", "pass", "contestant", "graph_us", "graph_low_us", "graph_high_us", "called_us",
    "called_low_us", "called_high_us", "host_us", "turns", "speedup", "speedup_low", "speedup_high", "bytes", "GB_s",
    "share_of_copy", "passes", "least_passes", "peak_MB", "predicted_us", "measured_over_predicted", "first_call_s", "right",
    "note",
)  # fmt: skip
PACKAGES = ("numpy", "scipy", "numba", "torch", "triton", "liger-kernel", "cupy-cuda12x", "cupy-cuda13x", "matplotlib")


@dataclass(frozen=True)
class Spread:
    """The median of some figures, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def ratio(cls, numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
        """Of the ratios turn by turn: both were measured in each turn, one after the other."""
        return cls.of([a / b for a, b in zip(numerator, denominator, strict=True) if b > 0] or [float("nan")])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}…{self.high:.2f})"


@dataclass
class Deadline:
    """When to stop: seconds since the epoch, so that a process that goes on for another keeps the same one."""

    at: float
    clock: Callable[[], float] = time.time

    @property
    def left(self) -> float:
        """Seconds; below 0 when it is over."""
        return self.at - self.clock()

    def __str__(self) -> str:
        return f"{minutes(self.left)} left"


def minutes(seconds: float) -> str:
    whole = max(round(seconds), 0)
    return f"{whole // 60}:{whole % 60:02d}"


# ---------------------------------------------------------------------------------------------- where this runs
def environment(device: str, seed: int, **more: Any) -> dict[str, Any]:
    """What each row of a result says of where it comes from."""
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    return {
        "device": device,
        **{name.replace("-", "_"): number for name, number in versions.items() if number},
        "commit": commit(),
        "seed": seed,
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        **more,
    }


def processor() -> str:
    """The name of the CPU."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", file.read_text(), re.MULTILINE) if file.exists() else []
    return (names or [platform.processor() or platform.machine()])[0].strip()


def told(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the checkout, '+' after it where files differ from it; '' where that cannot be told."""
    try:
        say = [("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no")]
        head, changed = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=10).stdout
            for words in say
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.strip() + ("+" if changed.strip() else "")


# ---------------------------------------------------------------------------------------------- what was found
@dataclass
class Results:
    """All that was found, in `folder`: results.json, and measurements.csv with the columns named."""

    folder: Path
    columns: Sequence[str]
    environment: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)  # what is no measurement, by name
    measurements: list[dict[str, Any]] = field(default_factory=list)
    done: list[str] = field(default_factory=list)  # the tasks that were finished, or given up
    running: str | None = None  # the task that was begun and not finished

    @property
    def file(self) -> Path:
        return self.folder / "results.json"

    @classmethod
    def open(cls, folder: Path, columns: Sequence[str]) -> Results:
        """A new one; or, where an earlier process left its results, these."""
        folder.mkdir(parents=True, exist_ok=True)
        results = cls(folder, columns)
        if results.file.exists():
            found = json.loads(results.file.read_text())
            results.environment, results.measurements = found.pop("environment"), found.pop("measurements")
            results.done, results.running = found.pop("done"), found.pop("running")
            results.parts = found
        return results

    @classmethod
    def new(cls, folder: Path, columns: Sequence[str], environment: dict[str, Any]) -> Results:
        """In a folder that is made; ValueError where it has the results of another run."""
        results = cls(folder, columns, environment)
        if results.file.exists():
            raise ValueError(f"expected a folder with no results, got {folder}, which has {results.file.name}")
        folder.mkdir(parents=True, exist_ok=True)
        results.write()
        return results

    def begin(self, task: str) -> None:
        self.running = task
        self.mark()
        self.write()

    def finish(self) -> None:
        """The task begun is done."""
        if self.running is not None:
            self.done.append(self.running)
        self.running = None
        self.write()

    def mark(self, contestant: str = "") -> None:
        """Tells who watches that the task goes on, and which contestant it is at, if at one alone."""
        replace(self.folder / MARK, json.dumps({"at": time.time(), "contestant": contestant}))

    def blamed(self) -> str:
        """The contestant that an earlier process was at when it ended; '' if at none alone."""
        mark = self.folder / MARK
        return json.loads(mark.read_text())["contestant"] if mark.exists() else ""

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Measurements, each with the environment."""
        self.measurements += [{**record, **self.environment} for record in records]
        self.write()

    def write(self) -> None:
        of_task = {"done": self.done, "running": self.running}
        found = {"environment": self.environment, **of_task, **self.parts, "measurements": self.measurements}
        replace(self.file, json.dumps(found, indent=1) + "\n")
        text = io.StringIO()
        table = csv.DictWriter(text, [*self.columns, *self.environment], extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(self.measurements)
        replace(self.folder / "measurements.csv", text.getvalue())


def replace(path: Path, text: str) -> None:
    """Writes a file at once: a process that is killed leaves the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    os.replace(beside, path)


# ---------------------------------------------------------------------------------------------- what one line of a table is of
@dataclass(frozen=True)
class Aim:
    """`of` is to take at least `least` times as long as `over`."""

    of: str
    least: float
    over: str = OURS


@dataclass
class Row:
    """What is measured together: contestants that take turns. `check` gives '' if hw3gpu's result is right, else the fault."""

    name: str
    operation: str
    shape: Sequence[int]
    dtype: str
    of: str  # 'forward', 'backward', 'forward and backward', 'step', …
    calls: dict[str, Callable[[], object]]  # hw3gpu first
    check: Callable[[], str]
    nbytes: float = 0  # that the operation cannot do without; 0 where nobody has counted them
    repeat: int = 1  # calls a turn
    aims: Sequence[Aim] = ()


def in_turn(
    calls: Mapping[str, Callable[[], object]], turns: int, repeat: int = 1, clock: Callable[[], float] = time.perf_counter,
    around: Callable[[str], contextlib.AbstractContextManager[Any]] = lambda name: contextlib.nullcontext(), warm: int = 1,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds a call of every turn of every contestant, after a turn that does not count.

    Each has `warm` untimed calls first, for whoever came before has the caches; `around` is entered for its whole turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, turns):
        for name, call in calls.items():
            with around(name):
                for _ in range(warm):
                    call()
                start = clock()
                for _ in range(repeat):
                    call()
                if turn >= 0:
                    seconds[name].append((clock() - start) / repeat)
    return seconds


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Bytes that a call holds at most beside what was there before, as Linux counts them; None where it does not."""
    import hw3gpu

    hw3gpu.empty_cache()
    with contextlib.suppress(AttributeError, OSError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)

    def status(name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is None:
            raise OSError(f"no {name} in /proc/self/status")
        return 1024 * int(found[1])

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS")
        call()
        return max(status("VmHWM") - before, 0)
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------- what is written of it
def spread_of(kind: str, turns: Sequence[float] | None) -> dict[str, float]:
    """Median and quartiles of microseconds: `kind` is 'called' or 'graph'."""
    if not turns:
        return {}
    of = Spread.of(turns)
    return {f"{kind}_us": of.median, f"{kind}_low_us": of.low, f"{kind}_high_us": of.high}


def speedup_of(theirs: Sequence[float] | None, ours: Sequence[float] | None) -> dict[str, float]:
    """How many times hw3gpu's time it took, turn by turn."""
    if not theirs or not ours:
        return {}
    of = Spread.ratio(theirs, ours)
    return {"speedup": of.median, "speedup_low": of.low, "speedup_high": of.high}


def rates_of(nbytes: float, us: float | None, copy_rate: float | None) -> dict[str, float]:
    """Bytes, and their speed and its share of a copy's (bytes a second)."""
    if not nbytes or not us:
        return {}
    rate = nbytes / (1e-6 * us)
    return {"bytes": int(nbytes), "GB_s": rate / 1e9} | ({"share_of_copy": rate / copy_rate} if copy_rate else {})


# ---------------------------------------------------------------------------------------------- a command
class Bench:
    """One run of a command: where its measurements go, and how many turns each contestant has."""

    def __init__(self, results: Results, turns: int, say: Callable[[str], None] = print) -> None:
        self.results, self.turns, self.say = results, turns, say
        self.wrong = 0

    def measure(
        self, row: Row, turns: int | None = None, copy: str | None = None, peers: bool = True, **how: Any
    ) -> dict[str, list[float]]:  # fmt: skip
        """Verifies a row, times it (`how`: of `in_turn`) and writes it down; what is wrong is not timed.

        copy: the contestant that copies as many bytes. peers: others do what hw3gpu does, and are not parts of it. Returns the
        seconds of each turn, by contestant.
        """
        head = {"row": row.name, "operation": row.operation, "shape": "x".join(map(str, row.shape))}
        head |= {"dtype": row.dtype, "pass": row.of}
        wrong = row.check()
        if wrong:
            self.wrong += 1
            self.say(f"wrong: {row.name}: {wrong}")
            self.results.add([{**head, "contestant": OURS, "right": "no", "note": f"wrong: {wrong}"}])
            return {}
        around = how.get("around", lambda name: contextlib.nullcontext())
        calls, notes = self._able(row, around)
        seconds = in_turn(calls, turns or self.turns, row.repeat, **how)
        rate = row.nbytes / statistics.median(seconds[copy]) if copy else self.copy_rate(row.nbytes)
        lines = []
        for name, of in seconds.items():
            us = [1e6 * s for s in of]
            line: dict[str, Any] = {**head, "contestant": name, "turns": len(us), "right": "yes" if name == OURS else ""}
            line |= spread_of("called", us) | rates_of(row.nbytes, statistics.median(us), rate)
            line |= speedup_of(of, seconds[OURS]) if peers and name != OURS else {}
            if peers and name != copy:
                with around(name):
                    most = peak_bytes(row.calls[name])
                line |= {} if most is None else {"peak_MB": most / 1e6}
            lines.append(line)
        self._aims(row, seconds)
        self.results.add([*lines, *({**head, "contestant": name, "note": note} for name, note in notes.items())])
        return seconds

    def _able(
        self, row: Row, around: Callable[[str], contextlib.AbstractContextManager[Any]]
    ) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
        """The contestants that can be called, and of the others why not; raises where hw3gpu cannot."""
        calls, notes = dict(row.calls), {}
        for name, call in row.calls.items():
            try:
                with around(name):
                    call()
            except Exception as error:
                if name == OURS:
                    raise
                notes[name] = told(error)
                del calls[name]
        return calls, notes

    def copy_rate(self, nbytes: float) -> float | None:
        """Bytes a second of the copy whose size is nearest, where copies were timed."""
        sizes = self.results.parts.get("copy_GB_s", {})
        if not sizes or not nbytes:
            return None
        nearest = min(sizes, key=lambda size: abs(math.log(2 * int(size) / nbytes)))
        return 1e9 * sizes[nearest]["median"]

    def _aims(self, row: Row, seconds: Mapping[str, Sequence[float]]) -> None:
        for aim in row.aims:
            if aim.of not in seconds or aim.over not in seconds:
                continue
            spread = Spread.ratio(seconds[aim.of], seconds[aim.over])
            found = {"row": row.name, "pass": row.of, "of": aim.of, "over": aim.over, "least": aim.least}
            self.results.parts.setdefault("aims", []).append({**found, **vars(spread)})


Task = tuple[str, Callable[[Bench], None]]


def folder_of(output: str | None, command: str, device: str) -> Path:
    """The folder asked for, or benchmarks/results/<command, device and time>."""
    if output:
        return Path(output)
    name = re.sub(r"[^a-z0-9]+", "-", f"{command} {device}".lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def bench(args: argparse.Namespace, tasks: Sequence[Task], seed: int = 0, **where: Any) -> int:
    """Does the tasks in their order, prints the tables, and writes results.json, measurements.csv and the plots.

    Status 0; 1 if a result was wrong or a task failed; 130 after Ctrl-C, with what was finished; 2 where the folder is another
    run's.
    """
    from . import plots
    from .progress import Progress

    device = processor()
    try:
        options = [f" --turns {args.turns}"] if hasattr(args, "turns") else []
        options += [f" --only {' '.join(map(repr, args.only))}"] if getattr(args, "only", None) else []
        command = f"python -m benchmarks {args.command}{''.join(options)}"
        about = environment(device, seed, command=command, cpus=os.cpu_count(), **where)
        results = Results.new(folder_of(args.output, args.command, device), COLUMNS, about)
    except (OSError, ValueError) as error:
        print(f"{args.command}: argument --output: {error}", file=sys.stderr)
        return 2
    only = getattr(args, "only", None)
    todo = [task for task in tasks if not only or task[0] == COPY or any(text in task[0] for text in only)]
    status = 0
    with Progress() as progress:
        run = Bench(results, getattr(args, "turns", 1), progress.say)
        progress.total(len(todo))
        try:
            for name, task in todo:
                progress.announce(name)
                results.running = name
                try:
                    task(run)
                except Exception as error:  # the other rows still are measured
                    run.wrong += 1
                    progress.say(f"failed: {name}: {told(error)}")
                    results.add([{"row": name, "contestant": OURS, "note": told(error)}])
                results.finish()
                progress.advance(name)
        except KeyboardInterrupt:
            print("interrupted: what is finished is kept", file=sys.stderr)
            status = INTERRUPTED
    results.write()
    found = json.loads(results.file.read_text())
    plots.report(found)
    print(plots.draw(found, results.folder) or f"plots in {results.folder}")
    print(f"{results.file} and measurements.csv")
    return status or int(run.wrong > 0)
