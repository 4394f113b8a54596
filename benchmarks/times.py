"""`python -m benchmarks times`: predicted times of the calls, and how far the model is from published times of others' kernels.

Predictions all of them, from evidence.json and others.json; docs/time_model.md has these tables. `--others` compiles Liger's
kernels anew for others.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hw3gpu.kernels.gpu.device import A100, B200, H100, Device

from . import published, time_model
from .call_cases import CALLS, Call
from .evidence.run import FILE, Findings, kernels_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "time_model.md"
DEVICES = (H100, A100, B200)


def mark(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def figures(kernels: Findings) -> list[dict[str, Any]]:
    """A row for each pass of each call whose evidence there is: bytes, launches, and by device microseconds and share."""
    rows = []
    for call in CALLS:
        of = kernels.get(call.label, {})
        arches = {device: str(time_model.CLOCKS[device.name].arch) for device in DEVICES}
        if any(arch not in of for arch in arches.values()):
            continue
        by_device = {device: time_model.passes(of[arch]) for device, arch in arches.items()}
        for which in by_device[H100]:
            row: dict[str, Any] = {"call": call.label, "pass": which, "launches": len(by_device[H100][which])}
            main = max(by_device[H100][which].values(), key=lambda kernel: kernel.get("read", 0))
            row |= {"megabytes": call.least[which][0] / 1e6, "in_flight": main["in_flight"], "programs": main["programs"]}
            for device, found in by_device.items():
                seconds = time_model.seconds(found[which], device)
                row[device.name] = {"predicted_us": seconds * 1e6, "share": share(call, which, device, seconds)}
            rows.append(row)
    return rows


def share(call: Call, which: str, device: Device, seconds: float) -> float:
    """Of the time that the bytes need which any kernel moves."""
    return time_model.least_seconds(*call.least[which], device) / seconds


def call_table(kernels: Findings) -> str:
    """Markdown."""
    rows = figures(kernels)
    lines = [
        "| call | pass | MB | launches | KB in flight, H100 | "
        + " | ".join(f"{d.name}, predicted µs | share" for d in DEVICES)
        + " |",
        "|---" * (5 + 2 * len(DEVICES)) + "|",
    ]
    for row in rows:
        times = " | ".join(f"{row[d.name]['predicted_us']:.0f} | {row[d.name]['share']:.2f}" for d in DEVICES)
        head = f"| {row['call'].replace(', call', '')} | {row['pass']} | {row['megabytes']:.0f} | {row['launches']} "
        lines.append(f"{head}| {row['in_flight'] / 1024:.0f} | {times} |")
    waiting = len(CALLS) - len({row["call"] for row in rows})
    return "\n".join([*lines, *([f"\n{waiting} of {len(CALLS)} calls wait for `make evidence`."] if waiting else [])])


def published_table(others: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| whose kernel | operation | GPU | published µs | predicted µs | predicted / published | by | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sources = list(dict.fromkeys(row.address for row in published.PUBLISHED))
    for row, ratio in published.ratios(others).items():
        by = "its code" if row.compiled else "its bytes, a floor"
        times = f"{row.microseconds:.1f} | {row.microseconds * ratio:.1f} | {ratio:.2f}"
        link = f"[{sources.index(row.address) + 1}]({row.address})"
        lines.append(f"| {row.whose} | {row.label} | {row.gpu.name} | {times} | {by} | {link} |")
    return "\n".join(lines)


def error(others: dict[str, Any]) -> str:
    """What the model's error is, in a paragraph."""
    found = published.ratios(others)
    low, mean, high = published.spread([ratio for row, ratio in found.items() if row.compiled])
    floor = published.spread([ratio for row, ratio in found.items() if not row.compiled])
    count = sum(row.compiled for row in found)
    return (
        f"Of the {count} times of kernels that were compiled, predicted over published lies between {low:.2f} and {high:.2f}, "
        f"with a geometric mean of {mean:.2f}. Of the {len(found) - count} of which only the bytes are known, the floor lies "
        f"between {floor[0]:.2f} and {floor[2]:.2f} of what was published, {floor[1]:.2f} in the mean."
    )


def tables(kernels: Findings, others: dict[str, Any]) -> dict[str, str]:
    """What the page has between its marks."""
    return {"calls": call_table(kernels), "published": published_table(others), "error": error(others)}


def page_with(text: str, kernels: Findings, others: dict[str, Any]) -> str:
    """The text of docs/time_model.md with these tables."""
    for name, table in tables(kernels, others).items():
        begin, end = mark(name)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def run(args: argparse.Namespace) -> int:
    """Prints the tables and writes them into the page, or the figures into `args.json`."""
    if args.others:
        published.FILE.write_text(json.dumps(published.compiled_others()) + "\n")
    kernels, others = kernels_of(json.loads(FILE.read_text())), published.others()
    print(*tables(kernels, others).values(), sep="\n\n")
    if args.json:
        ratios = {f"{row.whose}, {row.label}, {row.gpu.name}": ratio for row, ratio in published.ratios(others).items()}
        Path(args.json).write_text(json.dumps({"calls": figures(kernels), "published": ratios}, indent=1) + "\n")
    else:
        PAGE.write_text(page_with(PAGE.read_text(), kernels, others))
    return 0
