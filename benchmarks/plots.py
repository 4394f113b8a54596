"""The results of `python -m benchmarks gpu` and `cpu` to look at: a table, and PNG plots where Matplotlib is installed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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


# ---------------------------------------------------------------------------------------------- the table
def report(results: dict[str, Any], console: Any = None) -> None:
    """Prints a line for each pass of each row, and what went wrong."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    environment = results["environment"]
    if environment.get("pretended"):
        console.print("pretended: nothing ran on a device, and no time below is one of a GPU")
    console.print(", ".join(f"{name} {value}" for name, value in environment.items()))
    marked = " (pretended: no times of a GPU)" if environment.get("pretended") else ""
    title = f"hw3gpu's times, in a CUDA graph with a cold cache, and how many times as long others took{marked}"
    table = Table("row", "pass", "µs", "host µs", "of a copy", "predicted µs", "others' times over hw3gpu's", title=title)
    for (row, of), lines in by_pass(results).items():
        ours = lines.get("hw3gpu", {})
        others = [f"{name} {line['speedup']:.2f}" for name, line in lines.items() if name != "hw3gpu" and line.get("speedup")]
        cells = (number(time_of(ours)), number(ours.get("host_us")), number(ours.get("share_of_copy"), 2))
        table.add_row(row, of, *cells, number(ours.get("predicted_us")), ", ".join(others))
    console.print(table)
    for note in notes(results):
        console.print(note, markup=False, soft_wrap=True)


def notes(results: dict[str, Any]) -> list[str]:
    """What failed, was left out or was not reached."""
    said = {(line["row"], line["contestant"], line["note"]): None for line in results["measurements"] if line.get("note")}
    found = [f"{row}, {contestant}: {note}" for row, contestant, note in said]
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
        "speedup": speedups, "bandwidth": bandwidths, "roofline": roofline
    }  # fmt: skip
    for name, plot in kinds.items():
        figure, axes = plt.subplots(figsize=(9, 6))
        if plot(axes, results):
            axes.set_title(f"{results['environment'].get('device', '')}{marked}", fontsize=9)
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
    return ""


def speedups(axes: Any, results: dict[str, Any]) -> bool:
    """Bars: how many times hw3gpu's time each other took; the quartiles as lines."""
    bars = [
        (f"{row}, {of}: {name}", line["speedup"], line["speedup_low"], line["speedup_high"])
        for (row, of), lines in by_pass(results).items()
        for name, line in lines.items()
        if name != "hw3gpu" and line.get("speedup") and math.isfinite(line["speedup"])
    ]
    if not bars:
        return False
    axes.figure.set_size_inches(10, 1.5 + 0.16 * len(bars))
    at = range(len(bars))
    middles = [bar[1] for bar in bars]
    errors = [[max(m - bar[2], 0.0) for m, bar in zip(middles, bars, strict=True)],
              [max(bar[3] - m, 0.0) for m, bar in zip(middles, bars, strict=True)]]  # fmt: skip
    axes.barh(at, middles, xerr=errors, color=["tab:green" if m >= 1 else "tab:red" for m in middles], height=0.7)
    axes.set_yticks(at, [bar[0] for bar in bars], fontsize=5)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time over hw3gpu's time, median and quartiles")
    return True


def ours_with_bytes(results: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return (
        (of, lines["hw3gpu"]) for (_, of), lines in by_pass(results).items() if lines.get("hw3gpu", {}).get("GB_s")
    )  # fmt: skip


def bandwidths(axes: Any, results: dict[str, Any]) -> bool:
    """GB/s of hw3gpu's passes over their bytes, and the copy's line."""
    copies = sorted((int(size), of["median"]) for size, of in results.get("copy_GB_s", {}).items())
    points = list(ours_with_bytes(results))
    if not copies and not points:
        return False
    if copies:
        axes.plot([2 * size for size, _ in copies], [rate for _, rate in copies], "k-", label="a copy")
    for operation in dict.fromkeys(line["operation"] for _, line in points):
        mine = [line for _, line in points if line["operation"] == operation]
        axes.plot([line["bytes"] for line in mine], [line["GB_s"] for line in mine], "o", label=operation, markersize=4)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes that the operation cannot do without")
    axes.set_ylabel("GB/s")
    axes.legend()
    return True


def roofline(axes: Any, results: dict[str, Any]) -> bool:
    """Values a second over values a byte; the roof is the copy's speed."""
    copies = results.get("copy_GB_s", {})
    rate = copies[max(copies, key=int)]["median"] if copies else 0.0
    points = [
        (math.prod(map(int, line["shape"].split("x"))) / line["bytes"], line) for _, line in ours_with_bytes(results)
    ]  # fmt: skip
    if not rate or not points:
        return False
    ends = [min(x for x, _ in points) / 1.5, max(x for x, _ in points) * 1.5]
    axes.plot(ends, [rate * x for x in ends], "k-", label="a copy's speed")
    for of, mark in zip(dict.fromkeys(line["pass"] for _, line in points), "os^", strict=False):
        mine = [(x, line) for x, line in points if line["pass"] == of]
        axes.plot([x for x, _ in mine], [x * line["GB_s"] for x, line in mine], mark, label=of, markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("values of the input a byte moved")
    axes.set_ylabel("10⁹ values a second")
    axes.legend()
    return True
