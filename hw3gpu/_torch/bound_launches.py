"""The launches of earlier calls, kept for later equal calls: of all calls on a GPU, of small calls on the host.

Shapes, strides, dtypes, options, the device, and the distance of each pointer from a multiple of 16 bytes decide which kernels
a call launches, and how: these are the key of the call. Memory that a call allocates begins at such a multiple. A later call
with the same key skips checks, plan and views: it allocates and launches. Nothing is kept in Triton's interpreter, for calls
that copy an argument, and for operands that overlap. On the host a call is kept if its launchers only launch (`of_host`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .._core import arrays, dispatch, record
from . import operators
from .autograd import PLAIN

MOST_BYTES = 1 << 16  # of the first operand on the host: most of the time of a larger call is its kernels'
MOST = 1024  # calls that are kept; one more, and all are forgotten

_kept: dict[tuple[Any, ...], Any] = {}
_NOTHING = contextlib.nullcontext()


class Call(NamedTuple):
    """A call that may be kept."""

    key: tuple[Any, ...]
    launches: Any  # `launch.Bound`, of an earlier call with this key; None where there was none
    on_host: bool = False


def of(options: tuple[Any, ...], x: torch.Tensor, *beside: torch.Tensor | None) -> Call | None:
    """The call with these options and tensors. None where nothing is kept: on the host, under a compiler or a transform, for
    subclasses of tensors, and for tensors on another device than the current one."""
    if arrays.on_host(x) or not operators.eager() or dispatch.requested_backend() == "cpu":
        return None
    if x.is_meta and dispatch.gpu_refusal("meta") is not None:
        return None
    launch = dispatch.gpu_launch
    if not launch.BINDS:
        return None
    device = launch.device()
    if x.is_cuda and x.get_device() != device:
        return None
    key = [options, device]
    try:
        for t in (x, *beside):
            if t is None:
                key.append(None)
            elif type(t) in PLAIN and not t.is_neg():  # a lazy negation: memory holds the negated values
                key += t.shape, t.stride(), t.dtype, t.data_ptr() & 15, t.get_device()
            else:
                return None
    except RuntimeError:  # tensors without strides or memory
        return None
    found = tuple(key)
    return Call(found, _launches_of(found, "gpu"))


def of_host(options: tuple[Any, ...], x: torch.Tensor, *beside: torch.Tensor) -> Call | None:
    """As `of`, for a small call on the host. `use_backend` and compilers are asked each time: they are not in the key."""
    # who traces first: Dynamo follows no context variable, which `requested_backend` asks
    if not x.is_cpu or x.layout is not torch.strided or not operators.eager() or dispatch.requested_backend() == "gpu":
        return None
    key: list[Any] = [options]
    for t in (x, *beside):
        if type(t) not in PLAIN or not t.is_cpu or t.layout is not torch.strided or t.is_nested or t.is_neg():
            return None
        if t.data_ptr() & 7 and t.data_ptr() % t.element_size():  # the kernels of aligned elements are not for these
            return None
        key += t.shape, t.stride(), t.dtype
    if not 0 < x.nbytes <= MOST_BYTES:
        return None
    found = tuple(key)
    return Call(found, _launches_of(found, "cpu"), on_host=True)


def _launches_of(key: tuple[Any, ...], which: str) -> Any:
    launches = _kept.get(key)
    if launches is not None:
        record.note("bound launches: those of an earlier call of the same shapes, strides, dtypes and options", which)
    return launches


def forget() -> None:
    """Drops every call that is kept: plans may have changed."""
    _kept.clear()


def noted(
    call: Call | None, operands: tuple[torch.Tensor | None, ...], *like: torch.Tensor
) -> contextlib.AbstractContextManager[None]:
    """Keeps the launches made inside, on `operands`, for later calls with the key of `call`; nothing if that is None.

    like: those operands that a later call allocates as `torch.empty_like` of the first one.
    """
    if call is None or operands[0] is None:
        return _NOTHING
    layout = torch.empty_like(operands[0], device="meta").stride()
    return _noted(call, operands) if all(x.stride() == layout for x in like) else _NOTHING


@contextlib.contextmanager
def _noted(call: Call, operands: tuple[torch.Tensor | None, ...]) -> Iterator[None]:
    launch: Any = dispatch.cpu_launch if call.on_host else dispatch.gpu_launch
    with launch.Recording(operands) as recording:
        yield
    bound = recording.bound()
    if bound is not None:
        if len(_kept) >= MOST:
            _kept.clear()
        _kept[call.key] = bound
