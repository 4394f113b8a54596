"""The launches of earlier calls on a GPU, and of small ones on the host, kept for later ones like them.

What a call launches depends on shapes, strides, dtypes, options and the device, and on how far its pointers are off 16 bytes:
its key. Memory that a call allocates itself lies on 16 bytes. A later call of the same key neither checks its arguments nor
plans nor makes views: it allocates and launches. Nothing is kept in Triton's interpreter, for calls that copy an argument, and
for operands that overlap. On the host calls are kept whose launchers do nothing beside their launches (`of_host`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .._core import arrays, dispatch, record
from . import operators
from .autograd import PLAIN

MOST_BYTES = 1 << 16  # of a first operand on the host; beyond, what a call takes beside its kernels hardly counts
MOST = 1024  # calls that are kept; beyond, all are forgotten and found anew

_kept: dict[tuple[Any, ...], Any] = {}
_NOTHING = contextlib.nullcontext()


class Call(NamedTuple):
    """A call that may be kept."""

    key: tuple[Any, ...]
    launches: Any  # `launch.Bound`, of an earlier call with this key; None where there was none
    on_host: bool = False


def of(options: tuple[Any, ...], x: torch.Tensor, *beside: torch.Tensor | None) -> Call | None:
    """The call of `options` for these tensors; None on the host, where somebody traces or transforms, and for tensors that are
    no plain ones, or on another device than the current one."""
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
            elif type(t) in PLAIN and not t.is_neg():  # memory then holds the values with the other sign
                key += t.shape, t.stride(), t.dtype, t.data_ptr() & 15, t.get_device()
            else:
                return None
    except RuntimeError:  # tensors without strides or memory
        return None
    found = tuple(key)
    return Call(found, _launches_of(found, "gpu"))


def of_host(options: tuple[Any, ...], x: torch.Tensor, *beside: torch.Tensor) -> Call | None:
    """As `of` for a small call on the host. `use_backend` and who traces are asked each time: the key does not hold them."""
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
    """Every call is found anew: plans may be others now."""
    _kept.clear()


def noted(
    call: Call | None, operands: tuple[torch.Tensor | None, ...], *like: torch.Tensor
) -> contextlib.AbstractContextManager[None]:
    """Keeps what is launched inside on `operands` for later calls with the key of `call`, if there is one. like: those of them
    that later calls allocate as `torch.empty_like` of the first."""
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
