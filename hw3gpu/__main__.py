"""The command `hw3gpu`: `info`, `verify` and `train`; also `python -m hw3gpu`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from ._cli.arrays import DTYPES

# of the table of operations, in README.md
ROWS = tuple(f"S{i}" for i in range(1, 10))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hw3gpu",
        description="Batch normalisation, softmax cross entropy, exact point sets and trace minimisation.",
    )
    parser.add_argument("--version", action="version", version=f"hw3gpu {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, devices, and which kernels run for which arrays, and why")
    info.add_argument("--json", action="store_true", help="print JSON instead of tables")
    info.add_argument(
        "--explain", action="store_true", help="also what a standard call of each function does: kernels, plans, bytes"
    )

    verify = commands.add_parser("verify", help="every operation against the float64 answer sheet; status 1 on a failure")
    verify.add_argument("--kernels", choices=("all", "cpu", "gpu"), default="all", help="which kernels to verify (all)")
    verify.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help="S1 to S9 (all of them)")
    verify.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE", help="float64 … bfloat16 (all)")
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verify.add_argument("--report", type=Path, metavar="FILE", help="write one HTML page with all outputs and a plot there too")

    train = commands.add_parser("train", help="train a small net on handwritten digits, and the same net of PyTorch's layers")
    train.add_argument("--epochs", type=_positive, default=10, help="passes over the training set (%(default)s)")
    train.add_argument("--seed", type=_seed, default=0, help="of the weights, the split and the batches (%(default)s)")
    train.add_argument("--output", type=Path, default=Path("out/train.png"), help="the PNG of the curves (%(default)s)")
    train.add_argument("--device", default=None, help="torch device (a CUDA device where there is one, else cpu)")
    return parser


def _positive(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _seed(text: str) -> int:
    value = _integer(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"expected 0 to 2^32 - 1, got {value}")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the status of the process: 130 where it is interrupted (Ctrl-C)."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print(f"\nhw3gpu {options.command}: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    if options.command == "info":
        from ._cli import info

        return info.main(options.json, options.explain)
    if options.command == "verify":
        from ._cli import verify

        return verify.main(options.kernels, options.only, options.dtypes, options.json, options.report)
    from ._cli import train

    return train.main(options.epochs, options.seed, options.output, options.device)


if __name__ == "__main__":
    sys.exit(main())
