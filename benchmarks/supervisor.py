"""Runs a measuring process, and another where it ends before its time: a crash or a hang costs the row it happened in.

A kernel that faults leaves its process without a device, and one that never ends cannot be stopped from inside. The results say
which task was begun; the next process writes that one off and goes on. Meanwhile this one draws.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .harness import INTERRUPTED, MARK, ROOT, Deadline, folder_of

GO_ON = 75  # the status of a measuring process that lost its device
STILL_SECONDS = 120.0  # without a mark, after which a process is taken for hung
GRACE = 10.0  # seconds to end in, after the time is over or an interrupt
RESTARTS = 8
PLOT_SECONDS = 10.0  # between two drawings


def found(folder: Path) -> dict[str, Any]:
    """What the measuring process has written."""
    file = folder / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}


def device_name(pretend: bool) -> str | None:
    """The GPU's, for the folder's name; None where there is none. This process stays off the device."""
    if pretend:
        return "pretended"
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        say = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(say, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "gpu"


class Watch:
    """One measuring process after another."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.deadline = args, folder, Deadline(time.time() + 60 * args.minutes)
        self.drawn, self.marked, self.since = 0, "", time.time()
        self.ended = ""  # why this process ended the other
        self.next_plots = time.time() + PLOT_SECONDS

    def start(self, after: str) -> subprocess.Popen[bytes]:
        given = self.args
        flags = [f"--{name}" for name in ("tune", "pretend") if getattr(given, name)]
        flags += ["--only", *given.only] if given.only else []
        hidden = ["--output", str(self.folder.resolve()), "--until", str(self.deadline.at), "--after", after, "--worker"]
        self.since = time.time()
        return subprocess.Popen([sys.executable, "-m", "benchmarks", "gpu", *flags, *hidden], cwd=ROOT)

    def draw(self) -> None:
        """Plots of what is done by now."""
        results = found(self.folder)
        if results and len(results["done"]) != self.drawn and time.time() > self.next_plots:
            self.drawn, self.next_plots = len(results["done"]), time.time() + PLOT_SECONDS
            drawn(results, self.folder)

    def look(self) -> str:
        """Why the process has to be ended, or ''."""
        mark = self.folder / MARK
        marked = mark.read_text() if mark.exists() else ""
        if marked != self.marked:
            self.marked, self.since = marked, time.time()
        if time.time() - self.since > STILL_SECONDS:
            return f"it hung for {STILL_SECONDS:.0f} s"
        return "the time is over" if self.deadline.left < -GRACE else ""

    def wait(self, process: subprocess.Popen[bytes]) -> str:
        """'' when it has ended by itself with status 0, else why it ended."""
        while process.poll() is None:
            self.draw()
            self.ended = self.look()
            if self.ended:
                end(process)
                return self.ended
            time.sleep(0.2)
        return f"status {process.returncode}" if process.returncode else ""

    def run(self) -> int:
        """The status of the whole."""
        after = "not begun"
        for _ in range(RESTARTS + 1):
            process = self.start(after)
            try:
                after = self.wait(process)
            except KeyboardInterrupt:  # a terminal has told the other process too
                with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                    process.wait(GRACE)
                return INTERRUPTED
            finally:
                end(process)
            if process.returncode == INTERRUPTED and not self.ended:
                return INTERRUPTED
            if not after or self.deadline.left <= 0:
                return 0
            state = found(self.folder)
            if state.get("running") is None and process.returncode != GO_ON:
                return process.returncode or 1  # it began nothing: another would not either
            print(f"the measuring process ended ({after}) at {state.get('running')}: another goes on", flush=True)
        return 1


def drawn(results: dict[str, Any], folder: Path) -> str:
    """'' when there are plots, else why not: no plot is worth a measurement."""
    from . import plots

    try:
        return plots.draw(results, folder)
    except Exception as error:
        return f"no plots: {type(error).__name__}: {error}"


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks a process to end, if it has not, and ends it if it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # what waits for a driver is not waited for
            process.wait(GRACE)


def run(args: argparse.Namespace) -> int:
    """Measures, and says where the results are; status 0 when all was done or the time is over, 130 when it was interrupted, 2
    where there is no GPU."""
    from . import plots

    if os.environ.get("TRITON_INTERPRET") == "1":
        print("python -m benchmarks gpu: TRITON_INTERPRET=1 is set, which keeps Triton's kernels off the GPU", file=sys.stderr)
        return 2
    device = device_name(args.pretend)
    if device is None:
        print("python -m benchmarks gpu: torch finds no CUDA device; --pretend runs it all without one", file=sys.stderr)
        return 2
    folder = folder_of(args.output, args.command, device)
    folder.mkdir(parents=True, exist_ok=True)
    status = Watch(args, folder).run()
    results = found(folder)
    if results:
        plots.report(results)
        print(drawn(results, folder) or f"plots in {folder}")
        print(f"{folder / 'results.json'} and measurements.csv")
    return status
