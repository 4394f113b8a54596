"""Arrays of other libraries in and out, through DLPack and without a copy.

An array with `__dlpack__` and the array API standard's `__array_namespace__` is taken as a view of its memory, and the results
are arrays of its namespace. DLPack orders the streams: the kernels read an argument after the work that the caller has queued
on it, and work that the caller queues on a result runs after the kernels have written it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from . import arrays as _arrays
from . import dispatch

Function = TypeVar("Function", bound=Callable[..., Any])

# kDLCPU and the host's memory that a GPU reaches; the same for GPUs: CUDA, ROCm, CUDA's managed memory
_HOST, _GPU = (1, 3, 11), (2, 10, 13)

# Types of arguments that pass unchanged; torch's are added once torch is known to be loaded.
_ordinary: set[type] = {np.ndarray, bool, int, float, str, type(None)}


def _torch_is_loaded() -> bool:
    return hasattr(sys.modules.get("torch"), "Tensor")


# What torch.compiler.assume_constant_result sets: the compiler calls the function instead of walking all of sys.modules, which
# fails where another thread imports meanwhile.
_torch_is_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def interchange(function: Function) -> Function:
    """The array function, for arrays of every namespace that exchanges them.

    NumPy, CuPy and torch arrays pass as they are, those of a subclass that adds nothing as their base class. The device of CuPy
    arrays is the current one while the function runs.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _torch_is_loaded():
            import torch

            if torch.compiler.is_compiling():
                from .outside_graphs import eagerly

                return eagerly(call, *args, **kwargs)
        if _ordinary.issuperset(map(type, args)) and (not kwargs or _ordinary.issuperset(map(type, kwargs.values()))):
            return function(*args, **kwargs)
        first: Any = next(filter(_is_array, (*args, *kwargs.values())), None)
        if is_foreign(first):
            given = inspect.signature(function).bind(*args, **kwargs)
            given.arguments.update(_all_taken({name: x for name, x in given.arguments.items() if is_foreign(x)}))
            return given_back(function(*given.args, **given.kwargs), first.__array_namespace__())
        if _arrays.is_torch(first):
            _ordinary.update({sys.modules["torch"].Tensor, sys.modules["torch"].nn.Parameter})
        with _arrays.device_scope(first):
            return function(*map(_arrays.base_class, args), **{name: _arrays.base_class(x) for name, x in kwargs.items()})

    return call  # type: ignore[return-value]


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) or _arrays.is_torch(x) or _arrays.is_cupy(x) or is_foreign(x)


def is_foreign(x: Any) -> bool:
    """True for arrays of libraries other than NumPy, CuPy and torch, which DLPack can exchange."""
    of = type(x)
    if of is np.ndarray or not hasattr(of, "__array_namespace__") or not hasattr(of, "__dlpack__"):
        return False
    return not (isinstance(x, np.ndarray) or _arrays.is_cupy(x))


def taken(x: Any, name: str) -> Any:
    """`x`, the argument `name`, as one of our own kinds; see `_all_taken`."""
    return _all_taken({name: x})[name] if is_foreign(x) else _arrays.base_class(x)


def _all_taken(arrays: dict[str, Any]) -> dict[str, Any]:
    """Foreign arrays by argument, all as NumPy arrays (host) or all as torch tensors (GPUs; dtypes that NumPy has not).

    Raises TypeError for arrays on other devices than these, ValueError unless all are on one.
    """
    (first, x), *_ = arrays.items()
    place = x.__dlpack_device__()
    for name, other in arrays.items():
        there = other.__dlpack_device__()
        if there[0] not in _HOST + _GPU:
            raise TypeError(f"{name}: expected an array on the CPU or a CUDA device, got one on DLPack's device {tuple(there)}")
        if tuple(there) != tuple(place):
            raise ValueError(f"{name}: expected the device of {first}, DLPack's {tuple(place)}, got {tuple(there)}")
    if place[0] in _HOST:
        with contextlib.suppress(BufferError, RuntimeError):  # bfloat16
            return {name: np.from_dlpack(x) for name, x in arrays.items()}
    import torch

    if place[0] in _GPU and not torch.cuda.is_available():
        raise dispatch.BackendError(f"{first}: the array is on a GPU, and torch, which passes it to the kernels, finds none")
    return {name: torch.from_dlpack(x) for name, x in arrays.items()}


def given_back(result: Any, xp: Any) -> Any:
    """A result with its arrays as arrays of the namespace `xp`; other values are not changed."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        fields = {field.name: given_back(getattr(result, field.name), xp) for field in dataclasses.fields(result)}
        return dataclasses.replace(result, **fields)
    if isinstance(result, tuple):
        values = [given_back(value, xp) for value in result]
        return type(result)(*values) if hasattr(result, "_fields") else tuple(values)
    if isinstance(result, np.ndarray):
        return xp.from_dlpack(result) if result.dtype.kind in "biufc" else result
    return xp.from_dlpack(result) if _arrays.is_torch(result) else result
