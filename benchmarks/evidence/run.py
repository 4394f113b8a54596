"""Evidence step 3: every plan compiled ahead of time, for parts that need not be there, and what the machine code says.

`make evidence` compiles all of `evidence_cases` whose kernels, launches or compiler have changed since, writes evidence.json
and the tables of docs/evidence.md and docs/time_model.md. It may be interrupted, and goes on where it was. `make test` holds
these files to the kernels and compiles a few of the heaviest cases again, `make test-all` all of these.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from . import in_flight
from .case import OPERATIONS, Case
from .cases import cases
from .compile_without_gpu import Launch, MachineCode, StandIn, machine_codes, one_front_end, part
from .keys import key
from .occupancy import programs, waves
from .sass import barriers_a_tile, instructions_an_access

SCHEMA = 3  # of what is recorded of a launch: evidence of another one is stale
ARCHITECTURES: tuple[int | str, ...] = (80, 90, 100, 120, "gfx942")
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
REGISTER_FILE = 65536
FILE = Path(__file__).with_name("evidence.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
CODES: dict[bytes, MachineCode] = {}  # by binary
Findings = dict[str, dict[str, dict[str, Any]]]  # by label, architecture and kernel
Examined = tuple[dict[str, dict[str, Any]], list[str]]  # findings by kernel, and complaints
AT_ONCE = 4  # cases that a process examines together, which an interruption may lose
BEGIN, END = "<!-- evidence: begin -->", "<!-- evidence: end -->"


def compiled(case: Case, arch: int | str) -> list[Launch]:
    """The launches of `case`, compiled for `arch`."""
    with StandIn(arch) as device:
        case.run()
    return device.launches


def _code(launch: Launch) -> MachineCode:
    if launch.binary not in CODES:
        _read([launch])
    return CODES[launch.binary]


def _read(launches: list[Launch]) -> None:
    """Disassembles what is not yet known of these launches of one architecture, all at once."""
    new = {launch.binary: launch for launch in launches if launch.binary not in CODES}
    if new:
        CODES.update(zip(new, machine_codes([*new.values()]), strict=True))


def findings(
    launch: Launch, arch: int | str, dtype: torch.dtype, moved: tuple[int, int] = (0, 0)
) -> tuple[dict[str, Any], list[str]]:
    """What the machine code of a launch that reads and writes `moved` bytes says, and what is wrong with it."""
    wrong = []
    if launch.shared > SHARED_LIMIT[arch]:
        wrong.append(f"{launch.shared} bytes of shared memory, {SHARED_LIMIT[arch]} there are")
    grid = math.prod(launch.grid)
    found: dict[str, Any] = {"grid": grid, "warps": launch.num_warps, "shared": launch.shared}
    found |= {name: size for name, size in zip(("read", "written"), moved, strict=True) if size}
    if isinstance(arch, str):
        return found, wrong
    code = _code(launch)
    if code.stack or code.local:
        wrong.append(f"spills: {code.stack} bytes of stack, {code.local} of local memory")
    if code.registers * launch.num_warps * 32 > REGISTER_FILE:
        wrong.append(f"{code.registers} registers x {launch.num_warps} warps")
    if code.doubles and dtype != torch.float64:
        wrong.append(f"{code.doubles} float64 instructions in a kernel for {dtype}")
    for name in ("registers", "stack", "local", "wide", "narrow", "doubles"):
        found[name] = getattr(code, name)
    return found | _under_way(launch, arch, code, grid, moved[0]), wrong


def _under_way(launch: Launch, arch: int, code: MachineCode, grid: int, read: int) -> dict[str, Any]:
    """How a launch fills its device: programs and bytes under way a multiprocessor, waves, and what a tile costs."""
    device = part(arch)
    at_once = max(programs(device, arch, code.registers, launch.num_warps, launch.shared), 1)
    here = min(at_once, -(-grid // device.multiprocessors))
    of_program = max((stretch.in_flight for stretch in code.parts), default=0) * launch.num_warps
    count, last = waves(device, grid, at_once)
    return {
        "programs": at_once,
        "in_flight": here * min(of_program, -(-read // grid) if read else of_program),
        "waves": round(count, 2),
        "tail": round(last, 2),
        "barriers": barriers_a_tile(code.parts),
        "per_access": instructions_an_access(code.parts),
        "parts": [stretch.as_dict() for stretch in code.parts],
    }


def examined(case: Case, arch: int | str) -> Examined:
    """(findings by kernel, complaints) of a case; a kernel that it launches again is `_name 2`."""
    return examined_together([case], arch)[0]


def examined_together(chosen: list[Case], arch: int | str) -> list[Examined]:
    """`examined` of each case, sooner than one by one."""
    launched = [compiled(case, arch) for case in chosen]
    if isinstance(arch, int):
        _read([launch for launches in launched for launch in launches])
    return [_examined(case, arch, launches) for case, launches in zip(chosen, launched, strict=True)]


def _examined(case: Case, arch: int | str, launches: list[Launch]) -> Examined:
    found: dict[str, dict[str, Any]] = {}
    complaints, times = [], Counter[str]()
    for launch in launches:
        times[launch.name] += 1
        name = launch.name if times[launch.name] == 1 else f"{launch.name} {times[launch.name]}"
        found[name], wrong = findings(launch, arch, case.dtype, case.moves.get(launch.name, (0, 0)))
        complaints += [f"{case.label}, {name}, {arch}: {complaint}" for complaint in wrong]
    return found, complaints


@functools.cache
def keys_of(operation: str) -> dict[str, str]:
    """What decides the evidence of each case of an operation (`keys.py`), by label."""
    return {case.label: key(case, ARCHITECTURES, SCHEMA) for case in cases() if case.operation == operation}


def waiting(operation: str, evidence: dict[str, Any]) -> list[str]:
    """Labels of the cases whose evidence is missing, or is of other kernels or launches, whatever compiler it is of."""
    kept = evidence.get(operation, {}).get("keys", {})
    return [label for label, of in keys_of(operation).items() if kept.get(label) != of]


def kernels_of(evidence: dict[str, Any]) -> Findings:
    """The findings of all operations by label."""
    return {label: found for operation in evidence.values() for label, found in operation["kernels"].items()}


def as_text(evidence: dict[str, Any]) -> str:
    """JSON with a case a line: what changed is seen in a diff."""
    operations = []
    for operation, of in evidence.items():
        head = json.dumps({name: value for name, value in of.items() if name not in ("keys", "kernels")})[:-1]
        parts = (
            f'"{name}": {{\n'
            + ",\n".join(f"{json.dumps(label)}: {json.dumps(found)}" for label, found in of[name].items())
            + "\n}"
            for name in ("keys", "kernels")
        )
        operations.append(f"{json.dumps(operation)}: {head}, {', '.join(parts)}}}")
    return "{\n" + ",\n".join(operations) + "\n}\n"


def _examine(labels: list[str]) -> list[tuple[str, dict[str, dict[str, Any]], list[str]]]:
    """(label, findings by architecture and kernel, complaints) of each of these cases."""
    chosen = [case for case in cases() if case.label in labels]
    with one_front_end():
        of_case = [*zip(*(examined_together(chosen, arch) for arch in ARCHITECTURES), strict=True)]
    return [
        (
            case.label,
            {str(arch): found for arch, (found, _) in zip(ARCHITECTURES, of, strict=True)},
            [complaint for _, wrong in of for complaint in wrong],
        )
        for case, of in zip(chosen, of_case, strict=True)
    ]


def add(of: dict[str, Any], its_key: str, label: str, found: dict[str, dict[str, Any]], complaints: list[str]) -> None:
    """Puts what `_examine` gave of a case into the evidence of an operation."""
    of["keys"][label], of["kernels"][label] = its_key, found
    of["complaints"] += complaints


def begin(operation: str, evidence: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Evidence without what is stale, and the labels of the cases to be compiled: all of them for another compiler."""
    of = evidence.get(operation, {})
    if of.get("triton") != triton.__version__:
        of = {"triton": triton.__version__, "complaints": [], "keys": {}, "kernels": {}}
    stale = waiting(operation, {operation: of})
    current = keys_of(operation).keys() - {*stale}
    for name in ("keys", "kernels"):
        of[name] = {label: found for label, found in of[name].items() if label in current}
    of["complaints"] = [complaint for complaint in of["complaints"] if complaint.partition(", _")[0] in current]
    return of, stale


# ---------------------------------------------------------------------------------------------- the table of docs/evidence.md
# label of a case -> the plan it stands for; dtype float32
PLANS = {
    "softmax 4096x10x1": "many rows a program",
    "softmax 4096x1001x1": "a row off 16 bytes",
    "softmax 512x32768x1": "the longest row that stays (backward: 16384 lanes, the rest read twice)",
    "softmax 256x65536x1": "32768 lanes stay (backward: 16384)",
    "softmax 8x1000x512": "class axis in the middle",
    "cross entropy at once, hard 4096x1000x1": "hard targets, several rows a program",
    "cross entropy at once, hard 512x32771x1": "hard targets, the longest row that stays",
    "cross entropy at once, hard 256x65536x1": "hard targets, 32768 lanes stay",
    "cross entropy at once, hard, smoothing 512x16387x1": "smoothing, the longest row that stays",
    "cross entropy at once, soft 512x16387x1": "soft targets, the longest row that stays",
    "cross entropy at once, soft 512x50257x1": "soft targets, 8192 lanes stay",
    "cross entropy at once, soft, all 512x8195x1": "soft targets, all options, the longest row that stays",
    "cross entropy in two steps, hard 512x50257x1": "hard targets, any upstream gradient",
    "cross entropy in two steps, soft, all 512x50257x1": "soft targets, all options, any upstream gradient",
    "cross entropy, hard, reduction": "sum of the rows' losses",
    "batch norm training 16x3000x4": "many channels a program",
    "batch norm training 64x2048x49": "7x7 planes, a channel a program",
    "batch norm training 16x256x1024": "16384 values, a channel a program",
    "batch norm training, fused 16x256x1024": "the same with residual, ReLU and mask",
    "batch norm training 20x256x784": "a channel a program, its rows end to end",
    "batch norm training 32x256x3136": "many long channels, split",
    "batch norm training 8x3x262144": "few long channels, split",
    "batch norm training 32x64x3136 channels-last": "channels-last, split",
}


def table(kernels: Findings) -> str:
    """Registers a thread of each plan's kernels, as Markdown."""
    lines = [
        "| plan, float32 | shape | kernel | warps | registers on sm_80 | 90 | 100 | 120 | spilled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, plan in PLANS.items():
        found = kernels.get(f"{label} float32", {})  # none while the case waits for `make evidence`
        for kernel in found.get("90", ()):
            codes = [found[str(arch)][kernel] for arch in ARCHITECTURES if isinstance(arch, int)]
            registers = " | ".join(str(code["registers"]) for code in codes)
            spilled = max(code["stack"] + code["local"] for code in codes)
            shape = next(word for word in reversed(label.split()) if word[0].isdigit() or word == "reduction")
            layout = ", channels-last" if "channels-last" in label else ""
            shape = "100000" if shape == "reduction" else shape.replace("x", " × ") + layout
            lines.append(f"| {plan} | {shape} | `{kernel}` | {codes[0]['warps']} | {registers} | {spilled} |")
    return "\n".join(lines)


def page_with(text: str, kernels: Findings) -> str:
    """The text of docs/evidence.md with the table of these findings between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(kernels)}\n{END}{after}"


def run(args: argparse.Namespace) -> int:
    """Compiles the cases of every operation that changed, writes evidence.json and the tables; 1 if anything is wrong."""
    from rich.console import Console
    from rich.progress import track

    console, file = Console(), Path(args.json or FILE)
    evidence: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    begun = {operation: begin(operation, evidence) for operation in OPERATIONS}
    evidence = {operation: of for operation, (of, _) in begun.items()}
    tasks = [(name, stale[i : i + AT_ONCE]) for name, (_, stale) in begun.items() for i in range(0, len(stale), AT_ONCE)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = track(pool.map(_examine, [labels for _, labels in tasks]), total=len(tasks), console=console)
        for (operation, _), found in zip(tasks, results, strict=True):
            for of_case in found:
                add(evidence[operation], keys_of(operation)[of_case[0]], *of_case)
            file.write_text(as_text(evidence))
    if not args.json:
        from .. import published, times

        PAGE.write_text(page_with(PAGE.read_text(), kernels_of(evidence)))
        times.PAGE.write_text(times.page_with(times.PAGE.read_text(), kernels_of(evidence), published.others()))
    wrong = [complaint for operation in OPERATIONS for complaint in evidence[operation]["complaints"]]
    wrong += in_flight.too_thin(kernels_of(evidence)) + in_flight.unneeded(kernels_of(evidence))
    console.print(*wrong, f"{len(kernels_of(evidence))} cases on {len(ARCHITECTURES)} architectures: {file.name}", sep="\n")
    return 1 if wrong else 0
