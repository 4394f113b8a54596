"""NumPy, CuPy and torch arrays: the kind of an array (`kind`), and functions that work on each kind."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from .check import dtype_name

Array = Any

_ACCUMULATE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


# ---------------------------------------------------------------------------------------------- kinds and dtypes
def kind(x: Array, name: str) -> str:
    """'numpy', 'cupy' or 'torch'; imports none of them.

    TypeError, naming the argument, for anything else, and for what means more, or has other memory, than its elements in
    their order: subclasses such as masked arrays and matrices, sparse and nested tensors, tensors inside a transform.
    """
    if type(x) is np.ndarray:
        return "numpy"
    found = _kind(x)
    if found is None:
        raise TypeError(f"{name}: expected a NumPy, CuPy or torch array, got {_qualified(x)}{_advice(x, name)}")
    unlike = _UNLIKE[found](x, name)
    if unlike:
        raise TypeError(f"{name}: expected a plain {_LIBRARY[found]}, got {unlike}")
    return found


def _kind(x: Any) -> str | None:
    return "numpy" if isinstance(x, np.ndarray) else "torch" if is_torch(x) else "cupy" if is_cupy(x) else None


def _qualified(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


def _advice(x: Any, name: str) -> str:
    """How to make an array of `x`, where NumPy or CuPy can."""
    if hasattr(x, "__cuda_array_interface__"):
        return f": cupy.asarray({name}) makes one of it"
    converts = (hasattr(x, "__array__") or hasattr(x, "__array_interface__")) and not isinstance(x, np.generic)
    return f": numpy.asarray({name}) makes one of it" if converts else ""


@functools.cache
def _wrapped_by_functorch() -> Callable[[Any], bool]:
    from .torch_internals import wrapped_by_functorch

    return wrapped_by_functorch


# What is not plain about an array, and how to make one that is; nothing if it is plain.
def _unlike_numpy(x: np.ndarray, name: str) -> str:
    if type(x) in _PLAIN_NUMPY:
        return ""
    if isinstance(x, np.ma.MaskedArray):
        return f"a masked array, whose mask would be ignored: {name}.filled(value) makes one"
    return f"{_qualified(x)}, whose own meaning would be ignored: numpy.asarray({name}) makes one"


def _unlike_cupy(x: Any, name: str) -> str:
    if type(x) is sys.modules["cupy"].ndarray:
        return ""
    return f"{_qualified(x)}, whose own meaning would be ignored: cupy.asarray({name}) makes one"


def _unlike_torch(x: Any, name: str) -> str:
    torch = sys.modules["torch"]
    if x.is_nested:
        return f"a nested tensor: torch.nested.to_padded_tensor({name}, value) makes one"
    if x.layout is not torch.strided:
        return f"one of layout {x.layout}: {name}.to_dense() makes one"
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"{_qualified(x)}, which has arithmetic of its own"
    if _wrapped_by_functorch()(x):
        return "one inside a torch.func transform: those of hw3gpu.functional can be transformed"
    return "" if x.is_cpu or x.is_cuda else f"one on {x.device}: there are kernels for CPU and CUDA devices"


_PLAIN_NUMPY = (np.ndarray, np.memmap, np.recarray)
_UNLIKE: dict[str, Callable[[Any, str], str]] = {"numpy": _unlike_numpy, "torch": _unlike_torch, "cupy": _unlike_cupy}
_LIBRARY = {"numpy": "NumPy array", "torch": "tensor", "cupy": "CuPy array"}


def base_class(x: Any) -> Any:
    """An array of a subclass that adds nothing to its elements (np.memmap, …) as one of NumPy's or torch's own class."""
    if type(x) in _PLAIN_NUMPY[1:]:
        return x.view(np.ndarray)
    if not is_torch(x):
        return x
    torch = sys.modules["torch"]
    if type(x) in (torch.Tensor, torch.nn.Parameter):
        return x
    return x.as_subclass(torch.Tensor) if type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ else x


def is_torch(x: Any) -> bool:
    """True for torch tensors; imports nothing."""
    return isinstance(
        x, getattr(sys.modules.get("torch"), "Tensor", ())
    )  # an empty module is one half installed or half loaded


def is_cupy(x: Any) -> bool:
    """True for CuPy arrays; imports nothing."""
    return isinstance(x, getattr(sys.modules.get("cupy"), "ndarray", ()))


def same_kind(x: Array, name: str, other: Array, other_name: str) -> None:
    """TypeError unless both are NumPy, both CuPy or both torch arrays; ValueError unless they are on one device."""
    got, expected = kind(x, name), kind(other, other_name)
    if got != expected:
        raise TypeError(f"{name}: expected a {expected} array, as {other_name} is, got a {got} array")
    if got != "numpy" and x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {x.device}")


def accumulate_dtype(x: Array) -> str:
    """The dtype in which the kernels accumulate for `x` and keep its statistics: float32, or float64 for float64."""
    return _ACCUMULATE[dtype_name(x)]


# ---------------------------------------------------------------------------------------------- where they live
def on_host(x: Array) -> bool:
    """True for NumPy arrays and torch CPU tensors."""
    return isinstance(x, np.ndarray) or (hasattr(x, "is_cpu") and x.is_cpu)


def device_scope(x: Array) -> contextlib.AbstractContextManager[Any]:
    """Inside it the device of a CuPy array is CuPy's current one, which its functions need; nothing else changes."""
    return x.device if is_cupy(x) else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------- by its own functions
def namespace(x: Array) -> ModuleType:
    """numpy, cupy or torch: the module whose functions take `x`."""
    found = _kind(x)
    assert found is not None
    return sys.modules[found]


def cast(x: Array, dtype: str) -> Array:
    """`x` in another dtype, without its graph; a view of it where it has that dtype already."""
    if hasattr(x, "is_cpu"):
        return x.detach().to(getattr(namespace(x), dtype))
    return x if dtype_name(x) == dtype else x.astype(dtype)


def contiguous(x: Array) -> Array:
    """`x` in one run of memory; itself where it is."""
    return x.contiguous() if hasattr(x, "is_cpu") else namespace(x).ascontiguousarray(x)
