"""Triton's interpreter, which reads and writes wherever a pointer points, held to the memory of a launch's arguments.

On a GPU a mask left out is a read of what is not ours, or a fault. The interpreter reads the process's own memory there, and
the result is right as long as the lane is masked later: no value shows it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np


def guard_the_interpreter() -> None:
    """From now on, in this process, a load or a store beside every argument of its launch raises."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    to_host, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    if hasattr(load, "__wrapped__"):
        return
    spans: list[tuple[int, int]] = []

    @functools.wraps(to_host)
    def noted(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = to_host(self, args, kwargs)
        spans[:] = _spans((*on_host[0], *on_host[1].values()))
        return on_host

    def check(ptrs: Any, mask: Any) -> None:
        at, size = ptrs.data, np.uint64(ptrs.get_element_ty().primitive_bitwidth // 8)
        if not _within_one(spans, at, size):
            at = at[np.broadcast_to(mask.data, at.shape)]
            if at.size and not _within_one(spans, at, size) and not all(_within_one(spans, one, size) for one in at):
                raise IndexError(f"{[int(one) for one in at if not _within_one(spans, one, size)][:4]} in none of {spans}")

    @functools.wraps(load)
    def load_within(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    @functools.wraps(store)
    def store_within(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    executor._init_args_hst, builder.create_masked_load, builder.create_masked_store = noted, load_within, store_within


def _spans(args: Any) -> Iterator[tuple[int, int]]:
    """The addresses of the first byte and of that after the last of each tensor."""
    for x in args:
        if isinstance(x, tuple):
            yield from _spans(x)
        elif hasattr(x, "data_ptr"):
            x = getattr(x, "base", x)
            if x.numel():
                last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
                yield x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _within_one(spans: list[tuple[int, int]], at: Any, size: Any) -> bool:
    first, last = int(at.min()), int(at.max()) + int(size)
    return any(start <= first and last <= end for start, end in spans)
