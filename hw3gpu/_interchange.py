"""Arrays of other libraries in and out, through DLPack and without a copy.

An array that has `__dlpack__` and, of the array API standard, `__array_namespace__` goes in as a view of its memory and what
comes out is of its namespace. DLPack carries the streams: what the caller has queued for the argument comes before the kernels
read it, and what the caller queues for the result comes after they have written it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from . import _arrays

Function = TypeVar("Function", bound=Callable[..., Any])

_HOST = 1  # kDLCPU


def interchange(function: Function) -> Function:
    """The array function, for arrays of every namespace that exchanges them; NumPy, CuPy and torch arrays pass unchanged.

    The device of CuPy arrays is the current one while the function runs.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first: Any = next(filter(_is_array, (*args, *kwargs.values())), None)
        if not is_foreign(first):
            with _arrays.device_scope(first):
                return function(*args, **kwargs)
        result = function(*map(taken, args), **{name: taken(value) for name, value in kwargs.items()})
        return given_back(result, first.__array_namespace__())

    return call  # type: ignore[return-value]


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) or _arrays.is_torch(x) or _arrays.is_cupy(x) or is_foreign(x)


def is_foreign(x: Any) -> bool:
    """True for arrays of libraries other than NumPy, CuPy and torch, which DLPack can exchange."""
    of = type(x)
    if of is np.ndarray or not hasattr(of, "__array_namespace__") or not hasattr(of, "__dlpack__"):
        return False
    return not (isinstance(x, np.ndarray) or _arrays.is_cupy(x))


def taken(x: Any) -> Any:
    """`x` as a NumPy array (host) or torch tensor (GPUs; dtypes that NumPy has not); itself where it is no foreign array."""
    if not is_foreign(x):
        return x
    if x.__dlpack_device__()[0] == _HOST:
        try:
            return np.from_dlpack(x)
        except (BufferError, RuntimeError):  # bfloat16
            pass
    import torch

    return torch.from_dlpack(x)


def given_back(result: Any, xp: Any) -> Any:
    """The arrays of a result, as arrays of the namespace `xp`; what is no array stays as it is."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        fields = {field.name: given_back(getattr(result, field.name), xp) for field in dataclasses.fields(result)}
        return dataclasses.replace(result, **fields)
    if isinstance(result, tuple):
        values = [given_back(value, xp) for value in result]
        return type(result)(*values) if hasattr(result, "_fields") else tuple(values)
    if isinstance(result, np.ndarray):
        return xp.from_dlpack(result) if result.dtype.kind in "biufc" else result
    return xp.from_dlpack(result) if _arrays.is_torch(result) else result
