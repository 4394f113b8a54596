"""`hw3gpu verify --report FILE`: one HTML page that needs nothing else: a plot, and a table that sorts and prints."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from html import escape
from typing import Any

COLUMNS = (
    "passed", "row", "operation", "kernels", "arrays", "dtype", "output", "error", "allowed by PyTorch's", "of its bound",
    "held by", "note",
)  # fmt: skip
COLORS = ("#1f77b4", "#d95f02", "#4d9221", "#7b3294")
LEAST = 1e-4  # of the bound: what is less is drawn here
LINE, LEFT, WIDTH = 16, 360, 560  # pixels of the plot: height of an operation's line, where its axis begins, and how long it is

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 1.5rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; width: 100%; }
th, td { text-align: left; padding: 2px 8px; border-bottom: 1px solid #8884; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
td.number { text-align: right; }
tr.failed { background: #d9000033; font-weight: 600; }
svg { max-width: none; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; }
dd { margin: 0; }
@media print {
  body { max-width: none; margin: 0; font-size: 10px; }
  .wide { overflow: visible; }
  table { font-size: 7px; }
  th, td { padding: 1px 3px; white-space: normal; }
  thead { display: table-header-group; }
  tr { break-inside: avoid; }
  svg { width: 100%; height: auto; }
}
"""

SCRIPT = """
for (const head of document.querySelectorAll("th")) head.firstChild.onclick = () => {
  const body = document.querySelector("tbody"), up = head.ariaSort !== "ascending", i = head.cellIndex;
  const key = row => row.cells[i].dataset.value ?? row.cells[i].textContent;
  const compare = (a, b) => isNaN(a) || isNaN(b) || a === "" || b === "" ? a.localeCompare(b) : a - b;
  const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(key(a), key(b)));
  document.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.ariaSort = up ? "ascending" : "descending";
  body.append(...rows);
};
"""


def page(checks: Sequence[Any], versions: dict[str, Any]) -> str:
    """The page for some `Check`s, in their order; `versions`: what to say of where they were run."""
    failed = sum(not check.passed for check in checks)
    verdict = f"{failed} of {len(checks)} outputs failed" if failed else f"{len(checks)} outputs pass"
    facts = {"run": time.strftime("%Y-%m-%d %H:%M:%S %z")} | {k: v for k, v in versions.items() if v}
    said = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>hw3gpu verify: {verdict}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>hw3gpu verify: {verdict}</h1>
<p>Each output against the answer sheet. It passes where its largest error is at most 1.5 times PyTorch's on the same input and
one unit in the last place of the largest value, or where the error of each element is at most what rounding may do to it, its
bound.</p>
<dl>{said}</dl>
<h2>Error over its bound</h2>
<p>A mark is an output: the largest share, over its elements, of an error in its bound. Right of 1 PyTorch's error has to allow
it. Results that are exact, or below {LEAST:g}, are at the left end; results that are not finite at the right end.</p>
<div class="wide">{_plot(checks)}</div>
<h2>All outputs</h2>
<p>A click on a heading sorts.</p>
<div class="wide"><table>
<thead><tr>{"".join(f'<th scope="col"><button>{escape(name)}</button></th>' for name in COLUMNS)}</tr></thead>
<tbody>
{"".join(map(_row, checks))}</tbody>
</table></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _row(check: Any) -> str:
    words = ("yes" if check.passed else "no", *check.case, check.output)
    numbers = "".join(map(_number, (check.error, check.tolerance, check.of_bound)))
    before, after = ("".join(f"<td>{escape(word)}</td>" for word in of) for of in (words, (check.held_by, check.note)))
    return f"<tr{'' if check.passed else ' class=failed'}>{before}{numbers}{after}</tr>\n"


def _number(value: float | None) -> str:
    """What is not finite sorts last."""
    if value is None or not math.isfinite(value):
        return '<td class="number" data-value="1e999">–</td>'
    return f'<td class="number" data-value="{value!r}">{value:.2e}</td>'


def _plot(checks: Sequence[Any]) -> str:
    """SVG: a line for each operation and engine, a mark for each output."""
    lines = list(dict.fromkeys((check.operation, check.kernels) for check in checks))
    engines = list(dict.fromkeys(kernels for _, kernels in lines))
    shares = [_share(check) for check in checks]
    most = max(10.0, *(share for share in shares if share < math.inf)) * 2
    height = LINE * (len(lines) + 2)

    def x(share: float) -> float:
        return LEFT + WIDTH * math.log(min(share, most) / LEAST) / math.log(most / LEAST)

    ticks = [10.0**n for n in range(round(math.log10(LEAST)), math.ceil(math.log10(most)))]
    drawn = [
        f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="0" y2="{height - 1.5 * LINE:.0f}" stroke="currentColor" '
        f'stroke-width="{1.5 if t == 1 else 0.3}"/><text x="{x(t):.1f}" y="{height - 4}" text-anchor="middle">{t:g}</text>'
        for t in ticks
    ]
    for i, (operation, kernels) in enumerate(lines):
        label = f"{escape(operation)}: {escape(kernels)}"
        drawn.append(f'<text x="{LEFT - 12}" y="{LINE * i + 12}" text-anchor="end">{label}</text>')
    for check, share in zip(checks, shares, strict=True):
        y, color = LINE * lines.index((check.operation, check.kernels)) + 8, COLORS[engines.index(check.kernels) % len(COLORS)]
        what = escape(f"{check.arrays}, {check.dtype}, {check.output}: {share:.2g} of the bound")
        mark = f'r="3" fill="{color}" fill-opacity="0.5"' if check.passed else 'r="5" fill="#d90000"'
        drawn.append(f'<circle cx="{x(share):.1f}" cy="{y}" {mark}><title>{what}</title></circle>')
    size = f'width="{LEFT + WIDTH + 30}" height="{height}" viewBox="0 0 {LEFT + WIDTH + 30} {height}"'
    return f'<svg {size} role="img" aria-label="error over its bound, by operation and kernels">{"".join(drawn)}</svg>'


def _share(check: Any) -> float:
    """At least LEAST; infinite where there is no finite error."""
    return math.inf if check.of_bound is None else max(check.of_bound, LEAST)
