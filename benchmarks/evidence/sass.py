"""What NVIDIA's machine code says of the time it takes: instructions, barriers and bytes under way, counted from a disassembly.

An instruction of sm_70 and later has 128 bits, and its upper ones tell the hardware when it may be issued: after how many
cycles the next one follows, which of six scoreboards it sets and which it waits for (Z. Jia, M. Maggioni, B. Staiger,
D. P. Scarpazza, "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018, arXiv:1804.06826).
A load sets one, and the first instruction that needs what it loads waits for it: what was asked for until then is under way at
once.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

WARP = 32
BYTES = 16  # of an instruction
# cycles until a result is there that sets a scoreboard: shared memory 10 to 20 ns (docs/time_model.md), the others assumed; of
# global memory the time model knows more
LATENCY = {"LDS": 30, "LDSM": 33, "SHFL": 24, "BAR": 22}
OTHERWISE = 22
IN_A_LOOP = 16  # trips, to tell which accesses are many
# which unit of a scheduler takes an instruction; the others are the arithmetic and logic unit's ("alu"), or "uniform"
PIPES = {
    "fp32": ("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2", "FADD2", "FMUL2", "FFMA2"),
    "imad": ("IMAD",),
    "fp64": ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"),
    "xu": ("MUFU", "F2I", "I2F", "F2F", "FRND", "POPC"),
    "memory": ("LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "STSM", "SHFL", "REDUX", "ATOMG", "RED"),
}
_PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names}

_FIRST = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_PREDICATE = re.compile(r"^@!?U?P[T\d]+ ")
_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)\b")
_TARGET = re.compile(r"\b0x([0-9a-f]+)$")
_GROUPS = re.compile(r"SB\d,\s*0x([0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction, with what it tells the scheduler."""

    text: str
    opcode: str  # LDG.E.128
    name: str  # LDG
    stall: int  # cycles until the next one of the warp
    sets: int  # the scoreboard that its result sets; 7: none
    frees: int  # the scoreboard that says its operands were read; 7: none
    waits: int  # mask of the scoreboards it waits for
    width: int  # bytes a thread of an access
    target: int | None  # the instruction of its kernel that a branch goes to

    @property
    def loads(self) -> bool:
        return self.name in ("LDG", "LDGSTS")


@dataclass
class Part:
    """Straight code, or one trip through the body of a loop: of a warp."""

    loop: bool
    instructions: Counter = field(default_factory=Counter)  # by pipe; 'all' of them
    cycles: int = 0  # of a warp alone, where memory answers at once
    barriers: int = 0
    loaded: int = 0  # bytes
    stored: int = 0
    in_flight: int = 0  # the most bytes asked for and not waited for
    ahead: int = 0  # and those at its end, which a later trip waits for

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is 0 is left out."""
        values = {key: getattr(self, key) for key in ("loop", "cycles", "barriers", "loaded", "stored", "in_flight", "ahead")}
        return {key: value for key, value in values.items() if value} | dict(sorted(self.instructions.items()))


def disassembled(text: str, counts: Sequence[int]) -> list[list[Instruction]]:
    """What `nvdisasm -hex -b` printed of kernels that lie end to end: the instructions of each, so many as `counts` says."""
    rows: list[tuple[str, int]] = []
    first = None
    for line in text.splitlines():
        if found := _FIRST.match(line):
            first = found[1]
        elif first and (found := _SECOND.match(line)):
            rows.append((first, int(found[1], 16)))
            first = None
    starts = [0, *itertools.accumulate(counts)]
    assert len(rows) == starts[-1], f"{starts[-1]} instructions, {len(rows)} were printed"
    return [[_instruction(*row, start) for row in rows[start:end]] for start, end in itertools.pairwise(starts)]


def _instruction(text: str, upper: int, start: int) -> Instruction:
    opcode = _PREDICATE.sub("", text).split()[0]
    name = opcode.split(".")[0]
    width = _WIDTH.search(opcode)
    target = _TARGET.search(text) if name == "BRA" else None
    control = upper >> 41
    return Instruction(
        text, opcode, name, max(control & 15, 1), control >> 5 & 7, control >> 8 & 7, control >> 11 & 63,
        int(width[1]) // 8 if width else 4, int(target[1], 16) // BYTES - start if target else None,
    )  # fmt: skip


def parts(code: Sequence[Instruction]) -> list[Part]:
    """Straight code and loops, in their order; a branch over instructions is not taken.

    What lies behind the last EXIT is left out: slow paths, of divisions and of warps whose threads part.
    """
    end = max((i for i, x in enumerate(code) if x.text.split()[0] == "EXIT"), default=len(code) - 1)
    code = code[: end + 1]
    spans = [(x.target, i) for i, x in enumerate(code) if x.target is not None and x.target <= i]
    weights = [1 + IN_A_LOOP * any(a <= i <= b for a, b in spans) for i in range(len(code))]
    of = {load: [(x.width, w) for x, w in zip(code, weights, strict=True) if (x.loads if load else x.name == "STG")]
          for load in (True, False)}  # fmt: skip
    least = {load: _least_width(accesses) for load, accesses in of.items()}
    state, found, at = _State(least), [], 0
    for first, last in _loops(code, spans, least[True]):
        found += [_walked(state, code[at:first], False), _walked(state, code[first : last + 1], True)]
        at = last + 1
    return [part for part in [*found, _walked(state, code[at:], False)] if part.instructions]


def _least_width(accesses: Iterable[tuple[int, int]]) -> int:
    """Accesses of this width and more are counted: 16 bytes where there are such, else the width that moves most.

    The narrower ones are ends of rows, and a number a row. accesses: (width, how often about) of each.
    """
    moved: Counter = Counter()
    for width, times in accesses:
        moved[width] += width * times
    return 16 if max(moved, default=0) >= 16 else max(moved, key=lambda width: (moved[width], width), default=1)


def _loops(code: Sequence[Instruction], spans: Sequence[tuple[int, int]], least: int) -> list[tuple[int, int]]:
    """(first, last) of the innermost loops that load or store what is counted."""
    spans = [(a, b) for a, b in spans if any((x.loads and x.width >= least) or x.name == "STG" for x in code[a : b + 1])]
    loops: list[tuple[int, int]] = []
    for a, b in sorted(spans, key=lambda span: span[1] - span[0]):
        if not any(a <= last and first <= b for first, last in loops):
            loops.append((a, b))
    return sorted(loops)


class _State:
    """What a warp waits for, as it goes through its code."""

    def __init__(self, least: dict[bool, int]) -> None:
        self.least = least
        self.clock = 0
        self.ready = [0] * 8
        self.pending = [0] * 8  # bytes by scoreboard
        self.groups: list[int] = []  # bytes by group of copies into shared memory
        self.group = 0

    def step(self, x: Instruction, part: Part) -> None:
        """Issues an instruction, and counts it."""
        for board in range(6):
            if x.waits >> board & 1:
                self.clock, self.pending[board] = max(self.clock, self.ready[board]), 0
        part.instructions["all"] += 1
        part.instructions[_PIPE_OF.get(x.name, "uniform" if x.name[0] == "U" else "alu")] += 1
        size = x.width * WARP if (x.loads or x.name == "STG") and x.width >= self.least[x.loads] else 0
        if x.name == "LDG":
            self.pending[x.sets] += size
        elif x.name == "LDGSTS":
            self.group += size
        elif x.name == "LDGDEPBAR":
            self.groups.append(self.group)
            self.group = 0
        elif x.name == "DEPBAR":
            kept = _GROUPS.search(x.text)
            self.groups = self.groups[len(self.groups) - min(int(kept[1], 16) if kept else 0, len(self.groups)) :]
        elif x.name == "BAR":
            part.barriers += 1
            self.clock += LATENCY["BAR"]
        part.loaded += size * x.loads
        part.stored += size * (x.name == "STG")
        self.ready[x.sets] = self.clock + (0 if x.loads else LATENCY.get(x.name, OTHERWISE))
        self.ready[x.frees] = max(self.ready[x.frees], self.clock + OTHERWISE)
        self.clock += x.stall
        part.ahead = sum(self.pending[:6]) + sum(self.groups) + self.group
        part.in_flight = max(part.in_flight, part.ahead)


def _walked(state: _State, code: Sequence[Instruction], loop: bool) -> Part:
    """The part that a stretch of code is; a loop is gone through twice, and its second trip counted."""
    for _ in range(1 + loop):
        part, began = Part(loop), state.clock
        for x in code:
            state.step(x, part)
        part.cycles = state.clock - began
    return part


def barriers_a_tile(found: Sequence[Part]) -> int:
    """Barriers of the loop that loads most, or of the whole code where there is no loop."""
    loops = [part for part in found if part.loop]
    return max(loops, key=lambda part: part.loaded).barriers if loops else sum(part.barriers for part in found)


def instructions_an_access(found: Sequence[Part]) -> float:
    """Instructions of a warp for each 16 bytes that a thread loads or stores, in loops where there are any."""
    found = [part for part in found if part.loop] or found
    accesses = sum(part.loaded + part.stored for part in found) / (16 * WARP)
    return round(sum(part.instructions["all"] for part in found) / accesses, 1) if accesses else 0.0
