"""Evidence step 3b, enough in flight: each launch keeps what its device needs under way, or `ALLOWED` says why not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hw3gpu.kernels.gpu.device import Device

from .inside_triton import part

UNIT = 4096  # bytes: `Device` rounds its need up to these

# what of "label, kernel, architecture" matches -> (share of the need that it keeps at least, why it may keep less than all)
ALLOWED: dict[str, tuple[float, str]] = {}


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


def complaints(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """What is wrong: launches that keep too little under way without a reason, and reasons that no launch needs."""
    wrong, used = [], set()
    for launch, has, least in thin(found):
        reasons = {pattern for pattern, (share, _) in ALLOWED.items() if re.search(pattern, launch) and has >= share * least}
        used |= reasons
        if not reasons:
            wrong.append(f"{launch}: {has / 1024:.0f} KB under way a multiprocessor, {least / 1024:.0f} are needed")
    return wrong + [f"no launch needs to be allowed by {pattern!r}" for pattern in ALLOWED if pattern not in used]
