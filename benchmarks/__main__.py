"""`python -m benchmarks`: what measures. Each command verifies what it times or counts, and writes a folder of results."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "cpu": "the CPU kernels beside PyTorch's and beside a plain copy",
    "traffic": "bytes that cross entropy moves, counted in Triton's interpreter, beside Liger's",
    "evidence": "every plan compiled for every architecture; writes evidence.json",
    "times": "predicted times from the evidence, beside published ones of others' kernels; writes docs/time_model.md",
    "overhead": "what a call on a GPU costs the host, by layer, under a driver that does nothing",
    "gpu": "all that is worth measuring on a GPU, in minutes; --pretend: the same without one",
    "linear": "linear cross entropy on the CPU beside PyTorch's unfused and chunked paths",
    "products": "the products of linear cross entropy at the heads of published models, counted on meta tensors",
    "models": "a training step and an evaluation of whole models on the CPU, batch normalisations fused or not",
    "processors": "every processor that this machine can play: bits, verify and the tests of the CPU kernels",
    "all": "cpu, linear, linalg, models, traffic, overhead and, where there is one, gpu, each into a folder of its own",
    "pictures": "the pictures of the pages, drawn again from their tables and from the imports",
    "compare": "two runs side by side: ratios of medians, marked where their quartiles do not overlap",
    "linalg": "minimize_trace beside the eigensolvers of NumPy, torch and SciPy",
}

HARNESS = ("cpu", "traffic", "linalg", "linear", "overhead", "models", "gpu")
MODULES = {"evidence": "evidence.run", "all": "every"}


def _turns(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, got {text}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 24 * 60:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return minutes


def _gpu(command: argparse.ArgumentParser) -> None:
    command.add_argument("--minutes", type=_minutes, default=8.0, help="when to stop (%(default)g)")
    command.add_argument("--tune", action="store_true", help="try other plans too, and write the best down")
    command.add_argument("--pretend", action="store_true", help="on a driver that does nothing: no time is one of a GPU")
    # of the process that measures: see supervisor.py
    command.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    command.add_argument("--until", type=float, help=argparse.SUPPRESS)
    command.add_argument("--after", default="", help=argparse.SUPPRESS)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if name in ("evidence", "times", "processors", "products"):
            command.add_argument("--json", metavar="FILE", help="write the figures there too")
        if name in (*HARNESS, "all"):
            where = "a new folder for JSON, CSV and plots (benchmarks/results/<command, device and time>)"
            command.add_argument("--output", metavar="DIR", help=where)
        if name in HARNESS:
            command.add_argument("--only", nargs="+", metavar="TEXT", help="the rows whose name has one of these in it")
        if name in (*HARNESS, "all") and name not in ("traffic", "gpu"):
            command.add_argument("--turns", type=_turns, default=15, help="how often each contestant is measured (%(default)s)")
        if name == "times":
            command.add_argument("--others", action="store_true", help="compile Liger's kernels anew: others.json")
        if name == "compare":
            command.add_argument("runs", nargs=2, metavar="RUN", help="its folder, or its results.json")
        if name == "gpu":
            _gpu(command)
        if name == "processors":
            from .processors import TESTS

            command.add_argument("--tests", nargs="*", default=TESTS, metavar="FILE", help="test files to run (%(default)s)")
            command.add_argument("--sample", type=int, metavar="N", help="at most N cases of each test")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "traffic":
        os.environ["TRITON_INTERPRET"] = "1"  # counts only before Triton is imported
    watched = args.command == "gpu" and not args.worker
    module = "supervisor" if watched else MODULES.get(args.command, args.command)
    return importlib.import_module(f"benchmarks.{module}").run(args)


if __name__ == "__main__":
    sys.exit(main())
