"""`python -m benchmarks compare A B`: the measurements of two runs side by side.

A run is a folder that a command of `python -m benchmarks` has written; `all` writes one of such folders. A ratio is B's median
over A's: below 1, B is faster, or moves less. It is marked where the quartiles of the two do not overlap; what is not marked
may be noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .harness import Spread

Key = tuple[str, str, str]  # row, pass, contestant


@dataclass(frozen=True)
class Pair:
    """One measurement of both runs: microseconds, or passes over the input."""

    key: Key
    a: Spread
    b: Spread

    @property
    def ratio(self) -> float:
        return self.b.median / self.a.median

    @property
    def mark(self) -> str:
        """'less' or 'more' where B's quartiles lie wholly on one side of A's; else ''."""
        return "less" if self.b.high < self.a.low else "more" if self.b.low > self.a.high else ""


def read(run: Path) -> dict[str, Any]:
    """The results of a run; ValueError where there are none. Those of `all` are one, with the command before each row."""
    if run.is_dir() and not (run / "results.json").exists() and (parts := sorted(run.glob("*/results.json"))):
        every = {part.parent.name: read(part) for part in parts}
        measurements = [{**m, "row": f"{name}: {m['row']}"} for name, found in every.items() for m in found["measurements"]]
        return {"environment": next(iter(every.values()))["environment"], "measurements": measurements}
    file = run / "results.json" if run.is_dir() else run
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{run}: expected the folder of a run or its results.json: {error}") from None
    if not isinstance(found, dict) or "measurements" not in found:
        raise ValueError(f"{run}: expected the results of a command of `benchmarks`, got JSON without 'measurements'")
    return found


def spreads(results: dict[str, Any]) -> dict[Key, Spread]:
    """What was measured of each line: its time in a CUDA graph where it was taken, else as called, else its passes."""
    found = {}
    for line in results["measurements"]:
        key = line["row"], line.get("pass", ""), line["contestant"]
        for kind in ("graph", "called"):
            if line.get(f"{kind}_us"):
                found[key] = Spread(*(line[f"{kind}{of}_us"] for of in ("", "_low", "_high")))
                break
        else:
            if line.get("passes"):
                found[key] = Spread.of([line["passes"]])
    return found


def pairs(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Pair], list[Key], list[Key]]:
    """What both runs have, what A alone has, and what B alone has."""
    of_a, of_b = spreads(a), spreads(b)
    both = [Pair(key, spread, of_b[key]) for key, spread in of_a.items() if key in of_b]
    return both, [key for key in of_a if key not in of_b], [key for key in of_b if key not in of_a]


def run(args: argparse.Namespace) -> int:
    """Prints where the runs differ, the table, and what one of them lacks; 2 where one cannot be read."""
    try:
        a, b = (read(Path(run)) for run in args.runs)
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    both, only_a, only_b = pairs(a, b)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for name in dict.fromkeys([*a["environment"], *b["environment"]]):
        ours, theirs = (of["environment"].get(name, "–") for of in (a, b))
        console.print(f"{name}: {ours}" if ours == theirs else f"{name}: A {ours}, B {theirs}", markup=False)
    table = Table(
        "row", "pass", "contestant", title="µs, or passes: median (quartiles); a mark where the quartiles do not overlap"
    )
    for column in ("A", "B", "B over A", "B is"):
        table.add_column(column, justify="right")
    for pair in both:
        color = {"less": "green", "more": "red", "": "default"}[pair.mark]
        table.add_row(*pair.key, str(pair.a), str(pair.b), f"{pair.ratio:.2f}", f"[{color}]{pair.mark}[/]")
    console.print(table)
    for name, keys in (("A", only_a), ("B", only_b)):
        for key in keys:
            console.print(f"only in {name}: {', '.join(filter(None, key))}", markup=False)
    marks = [pair.mark for pair in both]
    console.print(f"{len(both)} in both: B takes less in {marks.count('less')}, more in {marks.count('more')}")
    return 0
