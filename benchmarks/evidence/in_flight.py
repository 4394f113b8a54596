"""Evidence step 3b, enough in flight: each launch keeps what its device needs under way, or `ALLOWED` says why not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hw3gpu.kernels.gpu.device import Device

from .compile_without_gpu import part

UNIT = 4096  # bytes: `Device` rounds its need up to these

# what of "label, kernel, architecture" matches -> (KB that it keeps at least, why it may keep less than its device needs)
ALLOWED: dict[str, tuple[int, str]] = {
    r" 8x(128|1000)x512 ": (
        2, "the class axis in the middle: 128 or 256 programs of accesses of 2 or 4 bytes, one or two a multiprocessor"
    ),
    r", strided ": (6, "a stride between a row's numbers: accesses of 2, 4 or 8 bytes, and a pointer for each takes registers"),
    r" float64,": (8, "arithmetic takes longer than bytes, and numbers twice the registers"),
    r"^cross entropy.*, (soft|more|softcap|smoothing|all)\b": (
        4, "what options keep beside each lane takes the registers of loads"
    ),
    r"^cross entropy at once, hard, all 4096x1001x1 bfloat16,": (
        3, "two short rows with all options: with the registers for a second program on a multiprocessor a thread spills"
    ),
    r" \d+x(1001|8195|16387|16391|32771|32775|50257)x1 ": (15, "rows off 16 bytes: their ends take registers"),
    r"^cross entropy in two steps, hard 4096x100[01]x1 .*, _forward_kernel": (
        13, "short rows of halves: the sum of all losses, which the last program makes, takes 15 to 30 registers of each"
    ),
    r"^token log probs 4096x100[01]x1 .*_backward_kernel": (
        8, "short rows: a tile of several, each with its class's logit and three upstream gradients, takes registers"
    ),
    r"^cross entropy at once, hard 256x65536x1 b?float16, _forward_kernel, 100$": (
        16, "256 rows are two small programs a multiprocessor, which has room for nine: predicted 22 us, of one large each 23"
    ),
    r"^distillation .* 4096x100[01]x1 .*, _(divergence|jensen_shannon|backward)_kernel": (
        8, "short rows: the sums of a divergence, and the logarithms of a mixture, take the registers of loads"
    ),
    r"^batch norm.*x(4|9|25|49|783|1023) ": (8, "planes off 16 bytes: their ends take registers"),
    r"^batch norm.* 8x3x262144 channels-last": (6, "three channels side by side: an address for each access, none of 16 bytes"),
    r"^batch norm.*, (fused|masked)": (20, "a residual, a mask or which positions count takes the registers of loads"),
    r"^batch norm.*, (silu|hardswish|gelu) ": (
        16, "an activation takes the registers of loads, and 20 to 60 instructions a value: plans of more warps are slower"
    ),
    r", 100$": (24, "a B200 asks for 64 KB, and plans were weighed by an H100's time; full of threads they keep 24 to 60"),
}  # fmt: skip


def need(kernel: Mapping[str, Any], device: Device) -> float:
    """Bytes that a launch needs under way on a multiprocessor: what the device asks for, or all it reads where that is less."""
    return min(device.in_flight, kernel.get("read", 0) / device.multiprocessors)


def thin(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[str, int, float]]:
    """(launch, bytes under way, bytes that it needs) of each that keeps too few; found: by label, architecture and kernel."""
    for label, of in found.items():
        for arch, kernels in of.items():
            for name, kernel in kernels.items() if arch.isdigit() else ():
                least = need(kernel, part(int(arch)))
                if kernel["in_flight"] <= least - UNIT:
                    yield f"{label}, {name}, {arch}", kernel["in_flight"], least


def too_thin(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Launches that keep too little under way and have no reason, as complaints."""
    return [
        f"{launch}: {has / 1024:.0f} KB under way a multiprocessor, {least / 1024:.0f} are needed"
        for launch, has, least in thin(found)
        if not _reasons(launch, has)
    ]


def unneeded(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Reasons that no launch needs, as complaints; of the findings of all cases."""
    used = {pattern for launch, has, _ in thin(found) for pattern in _reasons(launch, has)}
    return [f"no launch needs to be allowed by {pattern!r}" for pattern in ALLOWED if pattern not in used]


def _reasons(launch: str, has: int) -> list[str]:
    return [pattern for pattern, (kilobytes, _) in ALLOWED.items() if re.search(pattern, launch) and has >= kilobytes << 10]
