"""`python -m benchmarks`: what measures. Each command verifies what it times or counts."""

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
    "overhead": "what a call on a GPU costs the host, by layer, under a driver that does nothing",
    "linear": "linear cross entropy on the CPU beside PyTorch's unfused and chunked paths",
    "processors": "every processor that this machine can play: bits, verify and the tests of the CPU kernels",
    "linalg": "minimize_trace beside the eigensolvers of NumPy, torch and SciPy",
}


def _turns(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, got {text}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--json", metavar="FILE", help="write the figures there too")
        if name in ("cpu", "linear", "overhead"):
            command.add_argument("--turns", type=_turns, default=15, help="how often each contestant is measured (%(default)s)")
        if name == "processors":
            from .processors import TESTS

            command.add_argument("--tests", nargs="*", default=TESTS, metavar="FILE", help="test files to run (%(default)s)")
            command.add_argument("--sample", type=int, metavar="N", help="at most N cases of each test")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "traffic":
        os.environ["TRITON_INTERPRET"] = "1"  # counts only before Triton is imported
    return importlib.import_module(f"benchmarks.{args.command}").run(args)


if __name__ == "__main__":
    sys.exit(main())
