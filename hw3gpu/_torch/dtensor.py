"""DTensors as arguments: which arguments are DTensors, on which mesh, and the message for those that cannot be handled.

The operators run on them by `sharding_strategies`, the losses of classes by `dtensor_cross_entropy`.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from torch import Tensor

from .._core import check
from .._core.torch_internals import not_looked_into
from .autograd import PLAIN


def is_dtensor(x: Any) -> bool:
    """Whether `x` is a DTensor; a plain tensor is answered by its type alone."""
    if type(x) in PLAIN or x is None:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # without it there is no DTensor
    if module is None or not isinstance(x, module.DTensor):
        return False
    _register()
    return True


@not_looked_into
def _register() -> None:
    """Registers the sharding strategies once. A compiler calls this function too, and does not trace it."""
    from . import sharding_strategies

    sharding_strategies.register()


def refuse(x: Any, name: str) -> None:
    """TypeError where x is a DTensor."""
    if is_dtensor(x):
        refuse_this(x, name)


def refuse_this(x: Any, name: str) -> NoReturn:
    """TypeError for a DTensor that cannot be handled."""
    raise TypeError(
        f"{name}: expected a tensor of this process, got a DTensor of shape {check.shape_of(x)} with placements "
        f"{tuple(x.placements)}: give its `full_tensor()`, or call this in the forward of a module that is under `fully_shard` "
        "and has it as parameter; classes that are divided are for `hw3gpu.distributed.vocab_parallel_cross_entropy`"
    )


def any_of(*tensors: Any) -> bool:
    """True where one of them is a DTensor."""
    for x in tensors:  # noqa: SIM110  a generator would cost a small call what it saves
        if not (type(x) in PLAIN or x is None) and is_dtensor(x):
            return True
    return False


def beside(x: Any, name: str, **others: Any) -> tuple[Any, ...]:
    """The `others` as DTensors on the mesh of x; plain ones are the same on every process. TypeError where x is none."""
    from torch.distributed.tensor import DTensor, Replicate

    found = []
    for of, other in others.items():
        if not is_dtensor(x):
            refuse(other, of)
        elif is_dtensor(other):
            if other.device_mesh != x.device_mesh:
                raise TypeError(f"{of}: expected a DTensor on the mesh of {name}, {x.device_mesh}, got {other.device_mesh}")
        elif isinstance(other, Tensor):
            other = DTensor.from_local(other, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)
        found.append(other)
    return tuple(found)


def refuse_divided(x: Any, dim: int, name: str) -> None:
    """TypeError where x is divided along `dim`, the classes."""
    if axis_of_mesh(x, dim, name) is not None:
        refuse_this(x, name)


def axis_of_mesh(x: Any, dim: int, name: str) -> int | None:
    """The axis of the mesh along which the axis `dim` of the DTensor x is divided, or None; several are refused."""
    axes = [axis for axis, placement in enumerate(x.placements) if getattr(placement, "dim", None) == dim % x.dim()]
    if len(axes) > 1 or (axes and not x.placements[axes[0]].is_shard()):
        refuse_this(x, name)
    return axes[0] if axes else None
