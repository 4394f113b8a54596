"""`explain`: which engine, path, kernels and plans a call takes, why, and the bytes that it moves.

The call runs, and the code that runs reports what it does (`_core.record`): launchers report plans and operands, and the code
before them reports the path. Nothing here repeats a decision.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._core import arrays, dispatch
from ._core.record import Record, record

__all__ = ["Explanation", "Launch", "explain"]


@dataclass(frozen=True)
class Launch:
    """One kernel that ran.

    Attributes:
        kernel: its module in `kernels/` and its function, "cpu.softmax._forward_rows".
        grid: programs on the GPU; on the CPU blocks, the threads that share them, and in how many pieces.
        plan: the frozen plan that decided how it ran; None where only a grid is chosen.
        reads, writes: (operand, bytes, owner of the memory) of each whole operand; the owner is None for writes and for reads
            of bound launches.
    """

    kernel: str
    grid: Any
    plan: Any
    reads: tuple[tuple[str, int, str | None], ...]
    writes: tuple[tuple[str, int, str | None], ...]

    def __str__(self) -> str:
        lines = [f"{self.kernel}, {_grid(self.grid)}"]
        for verb, moved in (("reads", self.reads), ("writes", self.writes)):
            of = [
                f"{name} {_size(nbytes)}" + (f" ({owner or 'a copy'})" if owner is not None else "")
                for name, nbytes, owner in moved
            ]
            if of:
                lines.append(f"  {verb} {', '.join(of)}")
        if self.plan is not None:
            lines.append(f"  plan {self.plan}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """What one call did; `str` of it is a text of a few lines.

    Attributes:
        function: the function's name.
        engine: "cpu" (Numba kernels) or "gpu" (Triton kernels); None where no kernel of the library ran.
        why: what chose the engine.
        path: the path from the arguments to the kernels, or without kernels.
        launches: the kernels that ran, in order.
        copies: operands that kernels read from memory that belongs to no argument and no earlier kernel: copies and casts.
        bytes_read, bytes_written: of whole operands, those read twice counted twice, without vectors that have one number per
            channel or class.
    """

    function: str
    engine: str | None
    why: str
    path: tuple[str, ...]
    launches: tuple[Launch, ...]
    copies: tuple[str, ...]
    bytes_read: int
    bytes_written: int

    def __str__(self) -> str:
        engine = {"cpu": "on the CPU (Numba kernels)", "gpu": "on the GPU engine (Triton kernels)", None: "without a kernel"}
        lines = [f"{self.function}: {engine[self.engine]}, {self.why}"]
        lines += [f"  path: {path}" for path in self.path]
        for i, launch in enumerate(self.launches, 1):
            lines += [f"  {i}. {launch}".replace("\n", "\n     ")]
        if self.launches:
            lines.append(f"  copies: {'; '.join(self.copies) or 'none'}")
            lines.append(f"  moves: {_size(self.bytes_read)} read, {_size(self.bytes_written)} written")
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What `function(*args, **kwargs)` does: which engine runs, why, with which kernels, plans and grids, and what it moves.

    The call really runs, once, with all that it does (running statistics are updated); its result is dropped, and its gradients
    are not computed. A later call may take another path: launches on a GPU are kept from the second one on.

    function: a public function of `hw3gpu` or `hw3gpu.functional`. args, kwargs: its arguments.

        >>> z = np.zeros((16, 1000), np.float32)
        >>> print(hw3gpu.explain(hw3gpu.softmax, z))
        hw3gpu.softmax: on the CPU (Numba kernels), by where the arrays live
          path: launchers on views of the arrays
          1. cpu.softmax._forward_rows, 16 blocks on 1 thread
               reads z 62.5 KiB (argument z)
               writes y 62.5 KiB
          copies: none
          moves: 62.5 KiB read, 62.5 KiB written

    Raises TypeError for anything but a public function, and whatever the function raises for its arguments.
    """
    name = _public_name(function)
    given = _arrays_of(function, args, kwargs)
    requested, source = dispatch.requested_backend(), dispatch.request_source()
    _load_engines(requested, given)
    with record(given) as found:
        function(*args, **kwargs)
    return _explanation(name, found, requested, source)


def _public_name(function: Any) -> str:
    names: dict[Any, str] = {}
    for module in ("hw3gpu.functional", "hw3gpu"):
        public = vars(sys.modules[module]) if module in sys.modules else {"__all__": []}
        names |= {public[of]: f"{module}.{of}" for of in public["__all__"] if inspect.isfunction(public.get(of))}
    package, of = sys.modules["hw3gpu"], function.__name__ if inspect.isfunction(function) else ""
    if of in package.__all__ and getattr(package, of) is function:  # also one that is imported on first use
        return f"hw3gpu.{of}"
    try:
        return names[function]
    except (KeyError, TypeError):
        text = f"{function!r:.80}" if not callable(function) else getattr(function, "__qualname__", repr(function))
        raise TypeError(
            "function: expected a public function of hw3gpu or hw3gpu.functional, such as hw3gpu.softmax, got "
            f"{text} ({type(function).__name__})"
        ) from None


def _arrays_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arrays among the arguments, by name; none where the arguments do not fit, which the call will say."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:
        return {}
    return {
        name: x for name, x in bound.items() if hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, np.generic)
    }


def _load_engines(requested: str, given: dict[str, Any]) -> None:
    """Loads the engines that the call may run, so that they can be observed."""
    on_host = all(arrays.on_host(x) or not (arrays.is_torch(x) or arrays.is_cupy(x)) for x in given.values())
    if (requested == "gpu" or not on_host) and dispatch.triton_refusal() is None:
        _ = dispatch.gpu_launch
    if requested != "gpu" or on_host:
        _ = dispatch.threads


def _explanation(name: str, found: Record, requested: str, source: str) -> Explanation:
    launches = tuple(Launch(of.kernel, of.grid, of.plan, of.reads, of.writes) for of in found.launches)
    engine = found.engines[0] if found.engines else launches[0].kernel.partition(".")[0] if launches else None
    of_kernels = "launchers on views of the arrays"
    path = tuple(found.paths) or (of_kernels if launches else "no kernel: plain Python and the array library's own functions",)
    copies = tuple(
        dict.fromkeys(
            f"{of} {_size(nbytes)} for {one.kernel}" for one in launches for of, nbytes, owner in one.reads if owner == ""
        )
    )
    return Explanation(
        name, engine, _why(engine, requested, source), path, launches, copies,
        sum(nbytes for one in launches for _, nbytes, _ in one.reads),
        sum(nbytes for one in launches for _, nbytes, _ in one.writes),
    )  # fmt: skip


def _why(engine: str | None, requested: str, source: str) -> str:
    if engine is None:
        return "nothing chooses an engine"
    if requested == "auto":
        return "by where the arrays live"
    return f"use_backend({requested!r})" if source == "use_backend" else f"{source}={requested}"


def _grid(grid: Any) -> str:
    if isinstance(grid, int):
        return f"{grid} program{'s' * (grid != 1)}"
    pieces = f", in {grid.pieces} pieces" if grid.threads > 1 else ""
    return f"{grid.blocks} block{'s' * (grid.blocks != 1)} on {grid.threads} thread{'s' * (grid.threads != 1)}{pieces}"


def _size(nbytes: int) -> str:
    unit = min(max(nbytes.bit_length() - 1, 0) // 10, 3)  # the power of 1024
    return f"{nbytes / 1024**unit:.1f} {'KMG'[unit - 1]}iB" if unit else f"{nbytes} B"
