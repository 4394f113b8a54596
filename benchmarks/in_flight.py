"""Evidence step 3b, enough in flight: each launch keeps what its device needs under way, or `ALLOWED` says why not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hw3gpu.kernels.gpu.device import Device

from .inside_triton import part

UNIT = 4096  # bytes: `Device` rounds its need up to these

# what of "label, kernel, architecture" matches -> why it may keep less under way
ALLOWED: dict[str, str] = {}


def need(kernel: Mapping[str, Any], device: Device) -> float:
    """Bytes that a launch needs under way on a multiprocessor: what the device asks for, or all it reads where that is less."""
    return min(device.in_flight, kernel.get("read", 0) / device.multiprocessors)


def thin(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[str, str]]:
    """(launch, what it lacks) of each that keeps too little under way; found: findings by label, architecture and kernel."""
    for label, of in found.items():
        for arch, kernels in of.items():
            if not arch.isdigit():
                continue
            for name, kernel in kernels.items():
                least = need(kernel, part(int(arch)))
                if kernel["in_flight"] <= least - UNIT:
                    what = f"{kernel['in_flight'] / 1024:.0f} KB under way a multiprocessor, {least / 1024:.0f} are needed"
                    yield f"{label}, {name}, {arch}", what


def complaints(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """What is wrong: launches that keep too little under way without a reason, and reasons that no launch needs."""
    wrong, used = [], set()
    for launch, what in thin(found):
        reasons = {pattern for pattern in ALLOWED if re.search(pattern, launch)}
        used |= reasons
        if not reasons:
            wrong.append(f"{launch}: {what}")
    return wrong + [f"no launch needs to be allowed by {pattern!r}" for pattern in ALLOWED if pattern not in used]
