"""`python -m benchmarks`: what measures. Each command verifies what it times or counts."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "traffic": "bytes that cross entropy moves, counted in Triton's interpreter, beside Liger's",
    "evidence": "every plan compiled for every architecture; writes evidence.json",
    "linalg": "trace minimisation beside NumPy's and PyTorch's eigensolvers",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what, description=what).add_argument("--json", metavar="FILE", help="write the figures")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "traffic":
        os.environ["TRITON_INTERPRET"] = "1"  # counts only before Triton is imported
    return importlib.import_module(f"benchmarks.{args.command}").run(args)


if __name__ == "__main__":
    sys.exit(main())
