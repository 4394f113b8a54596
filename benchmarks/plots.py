"""The results of a command of `python -m benchmarks` to look at: tables, and PNG plots where Matplotlib is installed."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .harness import COPY, OURS, Spread

Lines = list[dict[str, Any]]


def time_of(line: dict[str, Any]) -> float | None:
    """Microseconds: the graph's, else as called."""
    return line.get("graph_us") or line.get("called_us")


def by_pass(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """Measurements by (row, pass) and contestant."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in results["measurements"]:
        found.setdefault((line["row"], line.get("pass", "")), {})[line["contestant"]] = line
    return found


# ---------------------------------------------------------------------------------------------- the tables
# of hw3gpu's line: the column's title, and its text; a column that no line has is left out
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "µs, median (quartiles)": lambda line: _spread(line, "graph") or _spread(line, "called"),
    "host µs": lambda line: number(line.get("host_us")),
    "GB/s": lambda line: number(line.get("GB_s")),
    "of a copy": lambda line: number(line.get("share_of_copy"), 2),
    "peak MB": lambda line: number(line.get("peak_MB")),
    "predicted µs": lambda line: number(line.get("predicted_us")),
}


def us_of(line: dict[str, Any], kind: str) -> list[float]:
    return [line[f"{kind}{of}_us"] for of in ("", "_low", "_high")]


def _spread(line: dict[str, Any], kind: str) -> str:
    if not line.get(f"{kind}_us"):
        return ""
    median, low, high = (number(us, 0 if us >= 1000 else 1 if us >= 10 else 2) for us in us_of(line, kind))
    return f"{median} ({low}…{high})"


def report(results: dict[str, Any], console: Any = None) -> None:
    """Prints a line for each pass of each row, where the time goes, and what went wrong or falls short."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    environment = results["environment"]
    if environment.get("pretended"):
        console.print("pretended: nothing ran on a device, and no time below is one of a GPU")
    console.print(", ".join(f"{name} {value}" for name, value in environment.items()), markup=False)
    marked = " (pretended: no times of a GPU)" if environment.get("pretended") else ""
    rows = by_pass(results)
    texts = {title: [text(lines.get(OURS, {})) for lines in rows.values()] for title, text in COLUMNS.items()}
    texts = {title: of for title, of in texts.items() if any(text not in ("", "–") for text in of)}
    others = [
        ", ".join(filter(None, (_other(name, line) for name, line in lines.items() if name != OURS))) for lines in rows.values()
    ]
    if counted := [line for line in results["measurements"] if line.get("passes")]:
        console.print(_counts(counted))
    table = Table("row", "pass", title=f"hw3gpu{marked}")
    for title in texts:
        table.add_column(title, justify="right")
    if any(others):
        table.add_column("others' times over hw3gpu's")
    for at, (row, of) in enumerate(rows):
        table.add_row(row, of, *(column[at] for column in texts.values()), *([others[at]] if any(others) else []))
    if len(counted) < len(results["measurements"]):
        console.print(table)
    if results.get("layers_us"):
        parts = Table("where the time goes", *next(iter(results["layers_us"].values())), title="µs a call")
        for what, layer in results["layers_us"].items():
            parts.add_row(what, *(number(us) for us in layer.values()))
        console.print(parts)
    for name, seconds in results.get("first_calls_s", {}).items():
        console.print(f"first call in a process, {name}: {seconds:.2f} s")
    for note in notes(results):
        console.print(note, markup=False, soft_wrap=True)


def _other(name: str, line: dict[str, Any]) -> str:
    return f"{name} {line['speedup']:.2f}" if line.get("speedup") else ""


def _counts(lines: Lines) -> Any:
    """A line for each row, a column for each thing that is counted, and for whom."""
    from rich.table import Table

    columns = {(line["pass"], line["contestant"]): line.get("least_passes") for line in lines}
    titles = [f"{contestant}: {of}" for of, contestant in columns]
    table = Table("reads and writes of the logits", *titles)
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for line in lines:
        cells.setdefault(line["row"], {})[line["pass"], line["contestant"]] = f"{line['passes']:.2f}"
    for row, found in cells.items():
        table.add_row(row, *(found.get(column, "–") for column in columns))
    table.add_row("the least possible", *(number(least, 0) for least in columns.values()))
    return table


def notes(results: dict[str, Any]) -> list[str]:
    """What failed, was left out or was not reached."""
    said = {(line["row"], line["contestant"], line["note"]): None for line in results["measurements"] if line.get("note")}
    found = [f"{row}, {contestant}: {note}" for row, contestant, note in said]
    for aim in results.get("aims", []):
        if aim["median"] < aim["least"]:
            spread = Spread(aim["median"], aim["low"], aim["high"])
            found.append(
                f"short: {aim['row']}, {aim['pass']}: {aim['of']} takes {spread} × {aim['over']}, aim {aim['least']:.3g}"
            )
    correct = results.get("correctness")
    if correct:
        found.append(f"{correct['passed']} results right, {len(correct['failures'])} wrong")
        if correct["unfinished"]:
            found.append(f"{len(correct['unfinished'])} operations not checked on all inputs in the time (results.json)")
        found += [f"wrong: {failure}" for failure in correct["failures"]]
        found += [f"not available: {what}" for what in correct["unavailable"]]
    found += [f"a process ended: {what}" for what in results.get("ended", [])]
    found += [f"better: {plan}" for plan in results.get("better_plans", [])]
    if results.get("running"):
        found.append(f"not finished: {results['running']}")
    if results.get("not_reached"):
        found.append(f"not reached in the time: {', '.join(results['not_reached'])}")
    return found


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


# ---------------------------------------------------------------------------------------------- plots
def draw(results: dict[str, Any], folder: Path) -> str:
    """Writes the plots that there is something for; '' or why there are none."""
    try:
        import matplotlib
    except ImportError as error:
        return f"no plots: Matplotlib cannot be imported ({error})"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    marked = ", pretended: no times of a GPU" if results.get("environment", {}).get("pretended") else ""
    kinds: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
        "speedup": speedups, "bandwidth": bandwidths, "roofline": roofline, "layers": layers, "passes": passes
    }  # fmt: skip
    environment = results.get("environment", {})
    about = [environment.get("device", ""), *(f"torch {environment[name]}" for name in ("torch",) if name in environment)]
    for name, plot in kinds.items():
        figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
        if plot(axes, results):
            figure.suptitle(f"{axes.get_title()}\n{', '.join(filter(None, about))}{marked}", fontsize=10)
            axes.set_title("")
            figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
    return ""


BAR = 0.16  # inches
NO_PEERS = (OURS, COPY)
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:gray")


def speedups(axes: Any, results: dict[str, Any]) -> bool:
    """Bars by row, one for each other contestant: how many times hw3gpu's time it took; the quartiles as lines."""
    rows = {
        key: {
            name: line
            for name, line in lines.items()
            if name not in NO_PEERS and math.isfinite(line.get("speedup") or math.nan)
        }
        for key, lines in by_pass(results).items()
    }
    rows = {key: lines for key, lines in rows.items() if lines}
    if not rows:
        return False
    names = list(dict.fromkeys(name for lines in rows.values() for name in lines))
    at, ticks, labels = 0.0, [], []
    per_row = {row: [of for name, of in rows if name == row] for row, _ in rows}
    for (row, of), lines in rows.items():
        ticks.append(at + (len(lines) - 1) / 2)
        labels.append(f"{row}, {of}" if len(per_row[row]) > 1 else row)
        for name, line in lines.items():
            middle = line["speedup"]
            error = [[max(middle - line["speedup_low"], 0.0)], [max(line["speedup_high"] - middle, 0.0)]]
            axes.barh(at, middle - 1, left=1, xerr=error, height=0.85, color=COLOURS[names.index(name) % len(COLOURS)],
                      error_kw={"elinewidth": 1})  # fmt: skip
            axes.annotate(f"{middle:.2f}", (max(line["speedup_high"], 1.0), at), (3, 0), textcoords="offset points",
                          fontsize=6, va="center")  # fmt: skip
            at += 1
        at += 0.8
    axes.figure.set_size_inches(11, max(2.2 + BAR * at, 3.2))
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_ylim(at - 0.3, -2.6)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, 1.25 * high)
    grid = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low <= tick <= 1.25 * high]
    axes.set_xticks(grid, [f"{tick:g}×" for tick in grid])
    axes.minorticks_off()
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.axvline(1.0, color="black", linewidth=1)
    handles = [axes.barh(0, 0, color=COLOURS[at % len(COLOURS)], label=name) for at, name in enumerate(names)]
    axes.legend(handles=handles, fontsize=8, ncol=len(names), loc="upper right", frameon=True)
    axes.set_xlabel("time over hw3gpu's time: right of 1× hw3gpu is faster. Median, and quartiles as lines")
    axes.set_title("How many times hw3gpu's time others take")
    return True


def ours_with_bytes(results: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return ((of, lines[OURS]) for (_, of), lines in by_pass(results).items() if lines.get(OURS, {}).get("GB_s"))


def _points(axes: Any, points: list[tuple[float, float, dict[str, Any]]]) -> None:
    """A colour for each operation, a mark for each pass."""
    kinds = list(dict.fromkeys((line["operation"], line["pass"]) for *_, line in points))
    operations, passes = (list(dict.fromkeys(kind[at] for kind in kinds)) for at in (0, 1))
    for operation, of in kinds:
        mine = [(x, y) for x, y, line in points if (line["operation"], line["pass"]) == (operation, of)]
        label = operation if len(passes) == 1 else f"{operation}, {of}"
        axes.plot(*zip(*mine, strict=True), "os^v"[passes.index(of) % 4], color=COLOURS[operations.index(operation) % 9],
                  label=label, markersize=5)  # fmt: skip


def bandwidths(axes: Any, results: dict[str, Any]) -> bool:
    """GB/s of hw3gpu's passes over their bytes, and the copy's line."""
    copies = sorted((2 * int(size), of["median"]) for size, of in results.get("copy_GB_s", {}).items())
    points = [(line["bytes"], line["GB_s"], line) for _, line in ours_with_bytes(results)]
    if not points:
        return False
    from matplotlib.ticker import EngFormatter

    if copies:
        axes.plot(*zip(*copies, strict=True), "k.-", label="a plain copy of as many bytes", zorder=1)
    _points(axes, points)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes that the operation cannot do without")
    axes.set_ylabel("GB/s of these bytes")
    axes.set_title("hw3gpu's bandwidth beside a plain copy's")
    axes.grid(linewidth=0.4)
    axes.legend(fontsize=8)
    return True


SMALL = 1 << 20  # bytes below which a call's own cost is most of its time


def roofline(axes: Any, results: dict[str, Any]) -> bool:
    """Values a second over values a byte; the roof is the largest copy's speed. Small calls are left out: they have no roof."""
    copies = results.get("copy_GB_s", {})
    rate = copies[max(copies, key=int)]["median"] if copies else 0.0
    points = []
    for _, line in ours_with_bytes(results):
        x = math.prod(map(int, line["shape"].split("x"))) / line["bytes"]
        if line["bytes"] >= SMALL:
            points.append((x, x * line["GB_s"], line))
    if not rate or not points:
        return False
    ends = [min(x for x, *_ in points) / 1.5, max(x for x, *_ in points) * 1.5]
    axes.plot(ends, [rate * x for x in ends], "k-", label="the roof: the largest copy's speed", zorder=1)
    _points(axes, points)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:.2g}")
        axis.set_tick_params(which="minor", labelsize=7)
    axes.set_xlabel("values of the input for each byte that has to be moved")
    axes.set_ylabel("10⁹ values of the input a second")
    axes.set_title("hw3gpu under the roof of memory; points above it stay in caches")
    axes.grid(linewidth=0.4, which="both")
    axes.legend(fontsize=8)
    return True


def layers(axes: Any, results: dict[str, Any]) -> bool:
    """Bars of where the time of a call goes, one part after the other."""
    found = results.get("layers_us")
    if not found:
        return False
    names = [name for name in next(iter(found.values())) if name not in ("all", "eager")]
    biggest = max(of["all"] for of in found.values())
    unit, scale = ("ms", 1e3) if biggest > 1e4 else ("µs", 1.0)
    for at, of in enumerate(found.values()):
        left = 0.0
        for colour, name in zip(COLOURS, names, strict=False):
            width = max(of.get(name, 0.0), 0.0) / scale
            axes.barh(at, width, left=left, color=colour, label=name if at == 0 else None)
            left += width
        axes.annotate(f"{left:.0f}", (left, at), (3, 0), textcoords="offset points", fontsize=7, va="center")
    axes.figure.set_size_inches(10, max(2.2 + 0.28 * len(found), 3.2))
    axes.set_yticks(range(len(found)), list(found), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} a call")
    axes.legend(fontsize=8)
    axes.set_title("Where the time of a call goes")
    return True


def passes(axes: Any, results: dict[str, Any]) -> bool:
    """A panel for each thing that is counted: how often the logits are read or written over the row's length, and the least."""
    counted = [line for line in results["measurements"] if line.get("passes")]
    if not counted:
        return False
    kinds = list(dict.fromkeys(line["pass"] for line in counted))
    figure, columns = axes.figure, 3
    figure.set_size_inches(11, 1.2 + 2.6 * -(-len(kinds) // columns))
    axes.axis("off")
    for at, kind in enumerate(kinds):
        panel = figure.add_subplot(-(-len(kinds) // columns), columns, at + 1)
        mine = sorted((line for line in counted if line["pass"] == kind), key=lambda line: int(line["shape"].split("x")[-1]))
        for name, style in zip(dict.fromkeys(line["contestant"] for line in mine), ("o-", "s-", "^-"), strict=False):
            by_length: dict[int, list[float]] = {}
            for line in mine:
                if line["contestant"] == name:
                    by_length.setdefault(int(line["shape"].split("x")[-1]), []).append(line["passes"])
            panel.plot(list(by_length), [statistics.mean(of) for of in by_length.values()], style, markersize=4, label=name)
        panel.axhline(mine[0]["least_passes"], color="gray", linestyle="--", linewidth=1, label="the least")
        panel.set(xscale="log", ylim=(0, 5.6))
        panel.set_title(kind, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(linewidth=0.4)
        panel.legend(fontsize=7, loc="lower right")
    figure.supxlabel("classes in a row", fontsize=9)
    figure.supylabel("reads and writes of the logits' bytes", fontsize=9)
    axes.set_title("Bytes asked for, in units of the logits")
    return True
