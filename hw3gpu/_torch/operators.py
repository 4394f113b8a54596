"""The kernels as operators of `torch.library`, for `torch.compile`, `torch.export` and whatever else reads a graph.

An eager call goes from an autograd function straight to a launcher: an operator costs several times as much. Under a compiler
or tracer (`traced`) the call goes through `torch.ops.hw3gpu.*` instead, which stays in the graph as one opaque node. An
operator has a schema, which marks the tensors that are written (`Tensor(a!)`); `run`, the function of an eager call; `fake`,
which makes outputs without elements; and `autograd`, which calls the autograd function of eager calls with `traced` set.
Outputs never share memory with inputs, and an output that is None is an empty tensor.

Registering the launchers themselves, which write into given outputs, would take less code but makes worse graphs (PyTorch
2.13): a graph that `torch.export` records has no gradients, and without inductor every output is copied once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .._core import dispatch, record
from .._core.torch_internals import BelowAutograd, dispatch_modes, in_a_dual_level, in_a_functorch_transform, tracing_state
from .autograd import PLAIN

__all__ = ["below_autograd", "define", "eager", "exporting", "fake_output", "traced", "transformed"]

_LIBRARY = torch.library.Library("hw3gpu", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any] | None = None) -> Any:
    """Registers `hw3gpu::name(…) -> …` and returns it. Without `autograd` a graph through it is refused by PyTorch."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _without_none(run), device)
    torch.library.register_fake(f"hw3gpu::{name}", _without_none(fake), lib=_LIBRARY)
    if autograd is not None:
        _LIBRARY.impl(name, autograd, "Autograd")
    return getattr(torch.ops.hw3gpu, name).default


def _without_none(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with an empty tensor for a result that is None: an operator gives a tensor for every result."""

    def run(*args: Any) -> Any:
        results = function(*args)
        if not isinstance(results, tuple) or all(r is not None for r in results):
            return results
        like = next(a for a in args if isinstance(a, torch.Tensor))
        return tuple(like.new_empty(0) if r is None else r for r in results)

    return run


def below_autograd(op: Any, *args: Any) -> Any:
    """The operator without its `autograd`: for the forward of the autograd function that `autograd` calls."""
    with BelowAutograd():
        return op(*args)


def traced(x: torch.Tensor) -> bool:
    """True where a call for `x` is to be an operator: under a compiler, tracer or dispatch mode, for fake and meta tensors."""
    found = (
        not exporting()
        if _somebody_traces()
        else type(x) not in PLAIN or (x.is_meta and dispatch.gpu_refusal("meta") is not None)
    )
    if found and not torch.compiler.is_compiling():  # the compiler need not look into notes
        record.note("operators of torch.library: a tracer, a dispatch mode or a tensor's subclass looks on")
    return found


def eager() -> bool:
    """True without a compiler, tracer or transform: then `traced` is False for plain tensors with memory, and so is
    `transformed`."""
    # `_somebody_traces`, spelt out: every call asks
    return not (
        torch.compiler.is_compiling()
        or dispatch_modes() > 0
        or tracing_state() is not None
        or in_a_functorch_transform()
        or in_a_dual_level()
    )


def _somebody_traces() -> bool:
    return torch.compiler.is_compiling() or dispatch_modes() > 0 or tracing_state() is not None


def transformed() -> bool:
    """True where the formula in PyTorch's operations is asked for: `torch.func` transforms, forward mode, `exporting`."""
    found = in_a_functorch_transform() or in_a_dual_level() or exporting()
    if found and not torch.compiler.is_compiling():
        record.note("the formula in PyTorch's operations: torch.func, forward-mode differentiation or an export asks for it")
    return found


def exporting() -> bool:
    """True under `torch.export` and `torch.onnx.export`: who gets the graph may not have this library."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return tracing_state() is not None and torch.onnx.is_in_onnx_export()


def fake_output(x: torch.Tensor, axis: int) -> torch.Tensor:
    """What `outputs.output` makes for `x`, without its elements: its layout, or a contiguous one where that does not fold."""
    out = torch.empty_like(x)
    axis %= x.dim()
    outer, inner = x.shape[:axis], x.shape[axis + 1 :]
    try:
        out.view(math.prod(outer), x.shape[axis], math.prod(inner))
    except (RuntimeError, ValueError):  # of tensors, of fakes
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out
