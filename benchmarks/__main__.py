"""The command `python -m benchmarks`: `cpu` and `linalg`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What is measured on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cpu = commands.add_parser("cpu", help="the CPU kernels beside PyTorch's and beside a plain copy")
    cpu.add_argument("--turns", type=int, default=15, help="how often every contestant is measured (%(default)s)")
    cpu.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures there too")
    commands.add_parser("linalg", help="minimize_trace beside the eigensolvers of NumPy, torch and SciPy")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the status of the process."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "linalg":
        from . import linalg

        linalg.run()
        return 0
    if options.turns < 2:
        parser.error(f"--turns: expected at least 2, got {options.turns}")
    from . import cpu

    cpu.run(options.turns, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
