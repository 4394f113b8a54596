"""`python -m benchmarks pictures`: the pictures of the pages, drawn from what is committed.

docs/cpu.svg has the bars of the first table of docs/cpu.md, and docs/architecture.md the graph of the imports.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

from . import architecture

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE, PICTURE = DOCS / "cpu.md", DOCS / "cpu.svg"
COLUMNS = {"eager PyTorch": "× eager, pool off", "torch.compile": "× compiled, pool off"}
COLOURS = ("#1f77b4", "#ff9f40")
TICKS = (0.5, 1, 2, 4, 8, 16, 32)

# pixels
WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 860, 300, 50, 84, 36, 12


class Row(NamedTuple):
    work: str
    speedups: tuple[float, ...]  # one for each of COLUMNS


def rows(page: str) -> list[Row]:
    """The medians of the first table of docs/cpu.md."""
    header, _, *lines = re.findall(
        r"^\|.*\|$", page[page.index("| forward and backward, float32") :].split("\n\n")[0], re.MULTILINE
    )
    names = [cell.strip() for cell in header.strip("|").split("|")]
    cells = [dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]
    return [Row(cell[names[0]], tuple(float(cell[name].split()[0]) for name in COLUMNS.values())) for cell in cells]


def processor(page: str) -> str:
    """What docs/cpu.md says that its figures were measured on."""
    return ". ".join(re.search(rf"^\| {name} \| (.*?) \|$", page, re.MULTILINE)[1] for name in ("processor", "versions"))  # type: ignore[index]


def _x(speedup: float) -> float:
    """Pixels from the left: the axis is logarithmic."""
    low, high = math.log(TICKS[0]), math.log(TICKS[-1])
    return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(speedup) - low) / (high - low)


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12, colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'


def _drawn(page: str) -> Iterator[str]:
    found = rows(page)
    bottom = TOP + ROW * len(found)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom + 50}" '
        f'viewBox="0 0 {WIDTH} {bottom + 50}" font-family="sans-serif">'
    )
    yield '<rect width="100%" height="100%" fill="white"/>'
    yield _text(16, 26, "hw3gpu's speed over PyTorch's: forward and backward on a CPU, float32", size=15)
    yield _text(16, 46, f"{processor(page)}. Memory pool off.", colour="#666", size=11)
    for k, name in enumerate(COLUMNS):
        yield f'<rect x="{LEFT + 160 * k}" y="58" width="12" height="12" fill="{COLOURS[k]}"/>'
        yield _text(LEFT + 160 * k + 18, 68, f"over {name}")
    for tick in TICKS:
        line = ' stroke="#222"' if tick == 1 else ' stroke="#ddd"'
        yield f'<line x1="{_x(tick):.1f}" x2="{_x(tick):.1f}" y1="{TOP - 4}" y2="{bottom}"{line}/>'
        yield _text(_x(tick), bottom + 16, f"{tick:g}×", "middle", 11, "#666")
    yield _text(
        _x(1), bottom + 36, "1×: as fast as PyTorch; right of it hw3gpu is faster (logarithmic axis)", size=11, colour="#666"
    )
    for n, row in enumerate(found):
        y = TOP + ROW * n + (ROW - 2 * BAR) / 2
        yield _text(LEFT - 10, y + BAR + 4, row.work, "end")
        for k, speedup in enumerate(row.speedups):
            begin, end = sorted((_x(1), _x(speedup)))
            top = y + BAR * k
            yield f'<rect x="{begin:.1f}" y="{top:.1f}" width="{end - begin:.1f}" height="{BAR - 1}" fill="{COLOURS[k]}"/>'
            yield _text(max(end, _x(1)) + 4, top + BAR - 2, f"{speedup:.2f}", size=10)
    yield "</svg>\n"


def bars(page: str) -> str:
    """The text of docs/cpu.svg, of the text of docs/cpu.md."""
    return "\n".join(_drawn(page))


def run(args: argparse.Namespace) -> int:
    """Writes both."""
    PICTURE.write_text(bars(TABLE.read_text()))
    architecture.PAGE.write_text(architecture.page_with(architecture.PAGE.read_text()))
    return 0
