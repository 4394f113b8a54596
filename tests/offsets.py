"""Whether a product or sum in 32 bits that leads to a global address can leave them: by intervals, on the PTX of one launch.

The arguments of the launch are what they are, a program's number lies in its grid, a thread's in its block, and what is loaded
or goes round a loop is any number of its type. `too_narrow` follows each global address back to these.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.evidence.compile_without_gpu import Launch

Interval = tuple[int, int]
INT32: Interval = (-(2**31), 2**31 - 1)
ANY: dict[int, Interval] = {16: (-(2**15), 2**16 - 1), 32: (-(2**31), 2**32 - 1), 64: (-(2**63), 2**64 - 1)}

_INSTRUCTION = re.compile(r"^\s*(?:\{\s*)?(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;]*);")
_LINE = re.compile(r"^\s*\.loc\s.*//\s*(\S+:\d+)")
_GLOBAL = re.compile(r"\.global")


class Instruction(NamedTuple):
    op: str
    operands: tuple[str, ...]  # what is written comes first
    source: str  # file:line:column of the kernel


def instructions(ptx: str) -> Iterator[Instruction]:
    """Those of a kernel; what is in braces, such as `{ %r1, %r2 }`, counts as operands of their own."""
    source = ""
    for line in ptx.splitlines():
        if where := _LINE.match(line):
            source = where[1]
        elif found := _INSTRUCTION.match(line):
            yield Instruction(found[1], tuple(re.findall(r"%\w+(?:\.\w)?|-?\b0x[0-9a-f]+|-?\b\d+\b|[\w$]+", found[2])), source)


def _bits(register: str) -> int:
    return 64 if register.startswith("%rd") else 16 if register.startswith("%rs") else 32


def _hull(*of: Interval) -> Interval:
    return min(low for low, _ in of), max(high for _, high in of)


def _corners(operation: Callable[[int, int], int], a: Interval, b: Interval) -> Interval:
    found = [operation(x, y) for x in a for y in b]
    return min(found), max(found)


def _divided(a: Interval, b: Interval) -> Interval:
    return _hull((0, 0), _corners(lambda x, y: int(abs(x) // y) * (1 if x >= 0 else -1), a, b)) if b[0] > 0 else ANY[64]


def _masked(a: Interval, b: Interval) -> Interval:
    bounds = [high for low, high in (a, b) if low >= 0]
    return (0, min(bounds)) if bounds else ANY[64]


def _joined(a: Interval, b: Interval) -> Interval:
    """Of `or` and `xor`."""
    return (0, 2 ** max(a[1].bit_length(), b[1].bit_length()) - 1) if a[0] >= 0 and b[0] >= 0 else ANY[64]


# By the instruction's name up to its first dot; of `mad` the third operand is added.
_EXACT: dict[str, Callable[..., Interval]] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "neg": lambda a: (-a[1], -a[0]),
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "mul": lambda a, b: _corners(int.__mul__, a, b),
    "mad": lambda a, b, c: tuple(map(sum, zip(_corners(int.__mul__, a, b), c, strict=True))),
    "shl": lambda a, b: _corners(lambda x, y: x << min(max(y, 0), 64), a, b),
    "shr": lambda a, b: _corners(lambda x, y: x >> min(max(y, 0), 64), a, b) if a[0] >= 0 else ANY[64],
    "div": _divided,
    "rem": lambda a, b: (0 if a[0] >= 0 else 1 - b[1], min(b[1] - 1, max(a[1], 0))) if b[0] > 0 else ANY[64],
    "and": _masked,
    "or": _joined,
    "xor": _joined,
    "min": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "max": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "selp": lambda a, b, _: _hull(a, b),
    "bfe": lambda a, _, length: (0, 2 ** min(length[1], 64) - 1),
}


class Intervals:
    """Of the registers of one launch."""

    def __init__(self, ptx: str, launch: Launch | None) -> None:
        self.defined: dict[str, list[Instruction]] = defaultdict(list)
        self.addresses: set[str] = set()
        for of in instructions(ptx):
            if _GLOBAL.search(of.op):
                self.addresses |= {name for name in of.operands if name.startswith("%rd")}
            for register in of.operands[:1]:
                self.defined[register].append(of)
        self.arguments: dict[str, Interval] = {}
        self.special: dict[str, Interval] = {}
        if launch:
            given = [v for kind, v in zip(launch.signature.values(), launch.args, strict=True) if kind != "constexpr"]
            self.arguments = {f"{launch.name}_param_{i}": (v, v) for i, v in enumerate(given) if isinstance(v, int)}
            self.special = {"%tid.x": (0, 32 * launch.num_warps - 1), "%nctaid.x": (1, launch.grid[0])}
            self.special |= {f"%ctaid.{axis}": (0, n - 1) for axis, n in zip("xyz", launch.grid, strict=True)}
        self.known: dict[str, Interval] = {}
        self.within: set[str] = set()

    def of(self, operand: str) -> Interval:
        """Of a register, or of a number that stands in the text."""
        if not operand.startswith("%"):
            return (int(operand, 0),) * 2 if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", operand) else ANY[64]
        if operand in self.special:
            return self.special[operand]
        if operand not in self.known:
            if operand in self.within:  # round a loop
                return ANY[_bits(operand)]
            self.within.add(operand)
            found = _hull(*(self.result(one) for one in self.defined[operand])) if self.defined[operand] else ANY[64]
            self.within.remove(operand)
            self.known[operand] = found
        return self.known[operand]

    def exact(self, of: Instruction) -> Interval | None:
        """What the operation gives of numbers without end; None if that is not known."""
        kind = of.op.partition(".")[0]
        if of.op.startswith("ld.param"):
            return self.arguments.get(of.operands[1])
        if kind not in _EXACT or re.search(r"\.(f16|f32|f64|bf16|pred|f16x2|bf16x2)\b", of.op):
            return None
        operands = of.operands[1:]
        if (divided := self.remainder(of)) is not None:
            return _EXACT["rem"](*map(self.of, divided))
        if (divided := self.multiple(of)) is not None:
            low, high = self.of(divided[0])
            return (
                (min(max(low, INT32[0]), 0), max(min(high, INT32[1]), 0))
                if self.defined[operands[0]][0].op == "div.s32"
                else (low, high)
            )
        if len(operands) != _EXACT[kind].__code__.co_argcount:  # of `mov` with a pair in braces
            return None
        return _EXACT[kind](*(self.of(operand) for operand in operands))

    def one(self, register: str, kind: str) -> Instruction | None:
        """The one instruction that writes a register, if it is of this kind."""
        of = self.defined.get(register, [])
        return of[0] if len(of) == 1 and of[0].op.startswith(f"{kind}.") else None

    def number(self, operand: str) -> int | None:
        """The one value that an operand has, if there is one."""
        low, high = self.of(operand)
        return low if low == high else None

    def multiple(self, of: Instruction) -> tuple[str, str] | None:
        """(x, d) of x / d · d, which is no further from 0 than x."""
        if not of.op.startswith("mul.lo.") or (quotient := self.one(of.operands[1], "div")) is None:
            return None
        one, other = quotient.operands[2], of.operands[2]
        same = one == other or (self.number(one) == self.number(other) and self.number(one) is not None)
        return quotient.operands[1:] if same else None

    def remainder(self, of: Instruction) -> tuple[str, str] | None:
        """(x, d) of x - x / d · d."""
        if not of.op.startswith("sub.") or (product := self.one(of.operands[2], "mul")) is None:
            return None
        divided = self.multiple(product)
        return divided if divided and divided[0] == of.operands[1] else None

    def result(self, of: Instruction) -> Interval:
        bits, found = _bits(of.operands[0]), self.exact(of)
        if found is None or found[0] < ANY[bits][0] or found[1] > ANY[bits][1]:
            return ANY[bits]
        return (0, ANY[bits][1]) if of.op.startswith("cvt.u64") and found[0] < 0 else found

    def narrow(self, of: Instruction) -> bool:
        """Whether the result may leave the 32 bits that it has: a product, or a sum of what was known."""
        if _bits(of.operands[0]) != 32 or (found := self.exact(of)) is None:
            return False
        kind = of.op.partition(".")[0]
        known = all(self.of(operand) != ANY[32] for operand in of.operands[1:])
        # of the arguments of a function that is called nothing is known: their multiples by a power of two are not told
        products = ("mul", "mad", "shl") if self.arguments else ("mul", "mad")
        counts = kind in products or (kind in ("add", "sub") and known)
        return counts and not (INT32[0] <= found[0] and found[1] <= INT32[1])


def too_narrow(ptx: str, launch: Launch) -> list[str]:
    """The instructions before a global address that may leave 32 bits, each with its place in the kernel's source."""
    # the registers of each function are its own, and of a function that is called any argument may come
    functions = re.split(r"^(?=(?:\.visible )?\.(?:entry|func)\b)", ptx, flags=re.MULTILINE)
    return [one for text in functions for one in _too_narrow(Intervals(text, launch if ".entry" in text[:20] else None))]


def _too_narrow(of: Intervals) -> list[str]:
    seen, found, pending = set(), [], sorted(of.addresses)
    while pending:
        register = pending.pop()
        if register in seen:
            continue
        seen.add(register)
        for one in of.defined[register]:
            if one.op.startswith("ld."):
                continue
            if of.narrow(one):
                found.append(f"{one.source}: {one.op} {', '.join(one.operands)} of {[of.of(x) for x in one.operands[1:]]}")
            pending += [name for name in one.operands[1:] if name.startswith("%")]
    return found
