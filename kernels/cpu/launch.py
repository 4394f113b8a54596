"""The launches of a small call, kept for later calls like it: the same kernels, blocks and arguments, with other addresses.

As in `kernels/gpu/launch.py`: a `Recording` of a call notes its launches, and makes a `Bound` of them. It notes launches
alone: a call may be recorded only if its launchers do nothing else, no operation of NumPy for example.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np

from ._numba.by_address import at_addresses
from ._numba.threads import BYTES_PER_THREAD, Share, observer, recording, tell

__all__ = ["Bound", "Recording"]


class Bound:
    """The launches of a call, ready to run on other memory, on the calling thread."""

    __slots__ = ("_launches", "_seen")

    def __init__(self, launches: list[tuple[Any, tuple[Any, ...], list[tuple[int, int]]]], seen: list[tuple[Any, ...]]) -> None:
        """launches: of each the function, its first arguments, and for each array (which operand it lies in, bytes from there).

        seen: of each launch its kernel, plan and moves, for an observer.
        """
        self._launches, self._seen = launches, seen

    def __call__(self, *operands: Any) -> None:
        """operands: torch tensors, as in the recording."""
        if observer.get() is not None:
            self._tell(operands)
        for function, args, places in self._launches:
            function(*args, *[operands[which].data_ptr() + offset for which, offset in places])

    def _tell(self, operands: tuple[Any, ...]) -> None:
        for (_, args, places), (kernel, plan, moves) in zip(self._launches, self._seen, strict=True):
            arrays = [a for a in args if isinstance(a, np.ndarray)]
            at = {id(a): operands[which].data_ptr() + beyond for a, (which, beyond) in zip(arrays, places, strict=True)}
            tell(kernel, args, Share(args[1], 1, 1), plan, moves, at)


class Recording:
    """Notes the launches inside its `with` block, on these tensors (or None)."""

    def __init__(self, operands: tuple[Any, ...]) -> None:
        self._memory = [None if x is None else _span_of_tensor(x) for x in operands]
        self._noted: list[Any] = []

    def __enter__(self) -> Recording:
        self._token = recording.set(self._noted)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: types.TracebackType | None) -> None:
        recording.reset(self._token)

    def bound(self) -> Bound | None:
        """The launches noted; None where an array is in the memory of no operand or of two, and for several threads' work."""
        launches, seen = [], []
        for kernel, blocks, cost, args, plan, moves in self._noted:
            buffers = [self._address_and_size(a) for a in args if isinstance(a, np.ndarray)]
            known = [buffer for buffer in buffers if buffer is not None]
            if cost >= 2 * BYTES_PER_THREAD or len(known) < len(buffers):
                return None
            given = [_without_elements(a) if isinstance(a, np.ndarray) else a for a in args]
            launches.append((at_addresses(kernel), (0, blocks, *given), known))
            seen.append((kernel, plan, moves))
        return Bound(launches, seen) if launches else None

    def _address_and_size(self, x: np.ndarray) -> tuple[int, int] | None:
        if not x.size:
            return 0, 0  # never read
        start = x.__array_interface__["data"][0]
        fits = [
            (which, start - memory[0])
            for which, memory in enumerate(self._memory)
            if memory is not None and memory[0] <= start < memory[1]
        ]
        return fits[0] if len(fits) == 1 else None


def _span_of_tensor(x: Any) -> tuple[int, int]:
    """The addresses of the first byte and of that after the last of a tensor's memory."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _without_elements(x: np.ndarray) -> np.ndarray:
    """An array of the same dtype, shape and strides that has no memory to speak of."""
    return np.lib.stride_tricks.as_strided(np.empty(1, x.dtype), x.shape, x.strides) if x.size else np.empty(x.shape, x.dtype)
