"""What every benchmark needs: spreads, ratios turn by turn, a time limit that is kept, and results that outlive a crash.

`Results` writes after every record: JSON and CSV, a row a measurement, with device, versions, commit and seed in each. What a
process has begun and not finished is in the file too, so that the next one can tell that it ended there, and go on after it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = ".mark.json"
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
        seconds = max(round(self.left), 0)
        return f"{seconds // 60}:{seconds % 60:02d} left"


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
