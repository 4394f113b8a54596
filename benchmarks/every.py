"""`python -m benchmarks all`: one command after the other, each in a process and a folder of its own.

`compare` reads the whole folder as one run. `gpu` takes part where torch finds a CUDA device.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from .harness import INTERRUPTED, ROOT, folder_of, minutes, processor
from .supervisor import device_name

ALL = ("cpu", "linear", "linalg", "models", "traffic", "overhead", "gpu")


def run(args: argparse.Namespace) -> int:
    """The first status that is not 0; after Ctrl-C what is finished is kept, and no other command begins."""
    folder = folder_of(args.output, args.command, processor())
    if folder.exists() and any(folder.iterdir()):
        print(f"all: argument --output: expected a new or an empty folder, got {folder}", file=sys.stderr)
        return 2
    begun, status = time.monotonic(), 0
    for name in ALL:
        if name == "gpu" and device_name(pretend=False) is None:
            print("all: no gpu, for torch finds no CUDA device", flush=True)
            continue
        options = ["--turns", str(args.turns)] if name in ("cpu", "linear", "linalg", "models", "overhead") else []
        words = [sys.executable, "-m", "benchmarks", name, "--output", str((folder / name).resolve()), *options]
        print(f"all: {name}, after {minutes(time.monotonic() - begun)}", flush=True)
        process = subprocess.Popen(words, cwd=ROOT)
        try:
            process.wait()
        except KeyboardInterrupt:  # a terminal has told the other process too
            process.wait()
            return INTERRUPTED
        if process.returncode == INTERRUPTED:
            return INTERRUPTED
        status = status or process.returncode
    print(f"all: {folder}")
    return status
