"""NumPy, CuPy and torch arrays in and out, and the choice of kernels.

A public function asks here three things: what kind of array it was given (`kind`), which kernels run for it (`backend`),
and how those kernels see it (`kernel_view`). The GPU kernels take torch tensors, the CPU kernels NumPy arrays; every
view shares the caller's memory. NumPy has no arithmetic on bfloat16 and Numba none on float16, so the CPU kernels take
the bits: bfloat16 as `uint16`, float16 as `int16`.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from . import _pool
from ._check import dtype_name

Array = Any

BACKENDS = ("auto", "gpu", "cpu")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("hw3gpu_backend", default=None)
_ACCUMULATE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


class BackendError(RuntimeError):
    """The kernels that `HW3GPU_BACKEND` or `use_backend` ask for cannot run on the arrays given."""


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
    from ._torch_internals import wrapped_by_functorch

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
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor) or type(x) in (torch.Tensor, torch.nn.Parameter):
        return x
    return x.as_subclass(torch.Tensor) if type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ else x


def is_torch(x: Any) -> bool:
    """True for torch tensors; imports nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_cupy(x: Any) -> bool:
    """True for CuPy arrays; imports nothing."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


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


# ---------------------------------------------------------------------------------------------- which kernels run
@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the kernels inside a `with` block: 'gpu' (Triton), 'cpu' (Numba) or 'auto' (by where the array lives).

    Overrides the environment variable HW3GPU_BACKEND, for this thread and context only. Raises ValueError for another
    name; a choice that the arrays of a call cannot honour raises `BackendError` in that call.
    """
    token = _forced.set(_known_backend(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def _known_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# What `os.environ` keeps its names in, and how: to ask itself for one that is not there costs it two exceptions.
_ENVIRONMENT = getattr(os.environ, "_data", os.environ)
_ASKED = os.environ.encodekey("HW3GPU_BACKEND") if hasattr(os.environ, "_data") else "HW3GPU_BACKEND"


def requested_backend() -> str:
    """What `use_backend` or HW3GPU_BACKEND asks for; 'auto' when neither does."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if _ASKED not in _ENVIRONMENT:
        return "auto"
    name = os.environ["HW3GPU_BACKEND"]
    return _known_backend(name, "HW3GPU_BACKEND") if name else "auto"


def check_threads() -> None:
    """ValueError if HW3GPU_NUM_THREADS, which the CPU kernels read when they are imported, is no number of at least 1."""
    text = os.environ.get("HW3GPU_NUM_THREADS", "")
    first = text.partition(",")[0].strip()
    if text and not (first.isdecimal() and int(first) > 0):
        raise ValueError(f"HW3GPU_NUM_THREADS: expected a number of threads of at least 1, got {text!r}")


def on_host(x: Array) -> bool:
    """True for NumPy arrays and torch CPU tensors."""
    return isinstance(x, np.ndarray) or (hasattr(x, "is_cpu") and x.is_cpu)


def backend(x: Array) -> str:
    """'gpu' or 'cpu': which kernels run for `x`. A forced choice that cannot be honoured raises `BackendError`."""
    requested = requested_backend()
    host = on_host(x)
    if requested == "auto":
        return "cpu" if host else "gpu"
    if requested == "cpu" and not host:
        raise BackendError("backend 'cpu' was asked for, but the array lives on a GPU: copy it to the host first")
    if requested == "gpu":
        why_not = gpu_refusal("cpu" if host else "cuda")
        if why_not:
            raise BackendError(f"backend 'gpu' was asked for, but {why_not}")
    return requested


def triton_refusal() -> str | None:
    """Why Triton cannot be imported, or None when it can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


def gpu_refusal(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on arrays of this device type ('cpu', 'cuda'), or None when they can."""
    missing = triton_refusal()
    if missing:
        return missing
    triton = sys.modules["triton"]
    if triton.knobs.runtime.interpret:
        return "a meta tensor has no elements for the interpreter" if device_type == "meta" else None
    try:
        device = triton.runtime.driver.active.get_active_torch_device()
    except RuntimeError as error:
        return f"Triton finds no GPU driver ({error}), and TRITON_INTERPRET=1 was not set before Triton was imported"
    if device.type != device_type:
        return f"the active Triton driver launches on '{device.type}' arrays and this array is on '{device_type}'"
    return None


@functools.cache
def kernels(room: str, which: str) -> ModuleType:
    """The module `hw3gpu.kernels.<which>.<room>`, imported when first asked for.

    Triton launches on the current device: each Triton launcher runs with the device of its first tensor as that.
    """
    if which == "cpu":
        check_threads()
    module = importlib.import_module(f"hw3gpu.kernels.{which}.{room}")
    if which == "cpu":
        return module
    launchers = ModuleType(module.__name__, module.__doc__)
    for name, value in vars(module).items():
        own = inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        setattr(launchers, name, _on_its_device(value) if own else value)
    return launchers


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(launcher)
    def launch(x: Array, *operands: Any, **options: Any) -> Any:
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return launcher(x, *operands, **options)
        with torch.cuda.device(x.device):
            return launcher(x, *operands, **options)

    return launch


def launch(room: str, name: str, like: Array, *operands: Array | None, **options: Any) -> None:
    """Runs the launcher `name` of `kernels(room)` where `like` lives, on views of the operands."""
    which = backend(like)
    views = map(viewer(which), operands)
    if which == "cpu":
        getattr(kernels(room, which), name)(*views, **options)
    else:
        with launch_scope(like):
            getattr(kernels(room, which), name)(*views, **options)


@contextlib.contextmanager
def launch_scope(x: Array) -> Iterator[None]:
    """Launches inside run on the stream on which the caller of a CuPy array queues its work; nothing else changes."""
    if not is_cupy(x):
        yield
        return
    import cupy
    import torch

    stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream(x.device.id).ptr, device=x.device.id)
    with torch.cuda.stream(stream):
        yield


def device_scope(x: Array) -> contextlib.AbstractContextManager[Any]:
    """Inside it the device of a CuPy array is CuPy's current one, which its functions need; nothing else changes."""
    return x.device if is_cupy(x) else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------- views and outputs
def kernel_view(x: Array, which: str) -> Array:
    """`x` as the `which` kernels take it: a torch tensor ('gpu') or a NumPy array, halves as bits ('cpu'); None as None."""
    return _host_view(x) if which == "cpu" else _torch_view(x)


def viewer(which: str) -> Callable[[Array], Array]:
    """`kernel_view` for the `which` kernels alone."""
    return _host_view if which == "cpu" else _torch_view


# How the CPU kernels see NumPy's float16 and the bfloat16 that ml_dtypes adds, by the dtype's char.
_HALVES = {"e": np.int16, "E": np.uint16}


def _host_view(x: Array) -> Array:
    if x is None:
        return None
    if not isinstance(x, np.ndarray):
        if x.dtype is sys.modules["torch"].bfloat16:
            return x.detach().resolve_neg().view(sys.modules["torch"].uint16).numpy()
        if x.requires_grad:
            x = x.detach()
        x = x.resolve_neg().numpy() if x.is_neg() else x.numpy()  # on the host no copy but for that lazy sign
    elif not x.flags.aligned:
        x = x.copy()  # an argument: outputs are aligned. For such memory Numba would compile each kernel anew
    bits = _HALVES.get(x.dtype.char)
    return x if bits is None else x.view(bits)


def _torch_view(x: Array) -> Array:
    if x is None:
        return None
    if hasattr(x, "is_neg"):  # flags first: one operation of PyTorch's takes longer than all that is asked here
        if x.requires_grad and sys.modules["torch"].is_grad_enabled():
            x = x.detach()
        return x.resolve_neg() if x.is_neg() else x
    import torch

    if isinstance(x, np.ndarray):
        # torch has neither read-only memory nor strides that are negative or no number of elements
        plain = x.flags.writeable and all(stride >= 0 and stride % x.itemsize == 0 for stride in x.strides)
        x = x if plain else x.copy()
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16) if x.dtype.char == "E" else torch.from_numpy(x)
    # with a negative stride torch ends the process
    return torch.from_dlpack(x if all(stride >= 0 for stride in x.strides) else x.copy())


_BITS = {
    name: np.dtype(bits)
    for name, bits in (("float16", np.int16), ("bfloat16", np.uint16), ("float32", np.float32), ("float64", np.float64))
}


def vector_view(x: Array, which: str) -> Array:
    """`kernel_view` of a torch vector with unit stride (a copy where it has none), for as long as the caller holds `x`.

    NumPy's view of a tensor makes its storage one that can no longer be resized, and FSDP resizes the storage of parameters to
    nothing between their uses. This view leaves it as it is.
    """
    if which != "cpu":
        return _torch_view(x if x is None or x.is_contiguous() else x.detach().contiguous())
    if x is None or not x.is_contiguous() or x.is_neg() or not x.numel():
        return kernel_view(x if x is None or x.is_contiguous() else x.detach().contiguous(), which)
    memory = (ctypes.c_char * (x.numel() * x.element_size())).from_address(x.data_ptr())
    return np.frombuffer(memory, _BITS[dtype_name(x)])


def fold(x: Array, axis: int | None) -> Array:
    """`x` as (outer, x.shape[axis], inner), the axes before and after `axis` merged; (1, 1, size) for `axis=None`.

    A view wherever one stride can describe the merged axes (contiguous, channels-last, slices of the outermost axis or
    of `axis`); otherwise a contiguous copy.
    """
    if axis is None:
        return x.reshape(1, 1, math.prod(x.shape))
    shape = x.shape
    if axis == 1 and len(shape) == 3:
        return x
    try:
        sizes = _folded_sizes(shape, axis)
    except TypeError:  # symbolic sizes have no hash
        sizes = _folded_sizes.__wrapped__(shape, axis)
    return x.view(sizes) if hasattr(x, "is_cpu") and x.is_contiguous() else x.reshape(sizes)


@functools.lru_cache(1024)
def _folded_sizes(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    axis %= len(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def folded(x: Array, axis: int, which: str) -> Array:
    """The `fold` of `x` as the `which` kernels see it."""
    # outside of autograd a view of a tensor has no graph to be detached from; NumPy's views are the cheaper ones
    return fold(_host_view(x), axis) if which == "cpu" else _torch_view(fold(x, axis))


def output_like(x: Array, axis: int | None) -> tuple[Array, Array]:
    """An uninitialised array of `x`'s kind, dtype, device and layout, and its `fold` about `axis`, a view of it."""
    return output(x, axis, lambda out: out)


def output(x: Array, axis: int | None, view: Callable[[Array], Array]) -> tuple[Array, Array]:
    """As `output_like`, with the `fold` of what `view`, a `viewer`, makes of the output."""
    out = empty_like(x)
    seen = view(out)
    folded = fold(seen, axis)
    if not _is_contiguous(out) and _address(folded) != _address(seen):
        out = empty(tuple(x.shape), dtype_name(x), x)
        folded = fold(view(out), axis)
    return out, folded


def _is_contiguous(x: Array) -> bool:
    """False also where it is dear to say."""
    return x.is_contiguous() if hasattr(x, "is_cpu") else isinstance(x, np.ndarray) and x.flags.c_contiguous


def empty_like(x: Array) -> Array:
    """An uninitialised array of `x`'s kind, dtype, device and layout, in recycled memory where it is large."""
    if x.nbytes >= _pool.SMALLEST and on_host(x):
        xp = namespace(x)
        # where the array module would put the elements; none of these touches memory
        if xp is np:
            like = np.empty_like(x)
        else:
            like = x if x.is_contiguous() else xp.empty_like(x, device="meta")
        out = _pooled(like.shape, like.strides if xp is np else like.stride(), dtype_name(x), x)
        if out is not None:
            return out
    return sys.modules["torch"].empty_like(x) if hasattr(x, "is_cpu") else namespace(x).empty_like(x)


def _pooled(shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: str, like: Array) -> Array | None:
    """An uninitialised array of `like`'s kind in recycled memory, `strides` in the kind's own units (None: contiguous).

    None where that is not to be: on a GPU, for small arrays, with the pool off, and beside a subclass of the plain array.
    """
    if type(like) is np.ndarray:
        memory = _pool.empty(shape, np.dtype(dtype), strides)
        return None if memory is None else np.ndarray(shape, dtype, memory, strides=strides)
    torch = sys.modules.get("torch")
    if torch is None or type(like) not in (torch.Tensor, torch.nn.Parameter) or not like.is_cpu:
        return None
    bits = _BITS.get(dtype) or np.dtype(dtype)
    memory = _pool.empty(shape, bits, None if strides is None else [stride * bits.itemsize for stride in strides])
    if memory is None:
        return None
    out = torch.from_numpy(memory)
    of = getattr(torch, dtype)
    # `set_` and no view in another dtype, so that the result is nobody's view to autograd
    return out if out.dtype is of else torch.empty(0, dtype=of).set_(out.untyped_storage(), 0, out.shape, out.stride())


def namespace(x: Array) -> ModuleType:
    """numpy, cupy or torch: the module whose functions take `x`."""
    found = _kind(x)
    assert found is not None
    return sys.modules[found]


def _address(x: Array) -> int:
    return (
        x.data_ptr()
        if hasattr(x, "data_ptr")
        else x.__array_interface__["data"][0]
        if isinstance(x, np.ndarray)
        else x.data.ptr
    )


def empty(shape: tuple[int, ...], dtype: str, like: Array) -> Array:
    """An uninitialised array of `like`'s kind and device."""
    out = _pooled(shape, None, dtype, like)
    if out is not None:
        return out
    xp = namespace(like)
    if hasattr(like, "is_cpu"):
        return xp.empty(shape, dtype=getattr(xp, dtype), device=like.device)
    return xp.empty(shape, dtype)


def cast(x: Array, dtype: str) -> Array:
    """`x` in another dtype, without its graph; a view of it where it has that dtype already."""
    if hasattr(x, "is_cpu"):
        return x.detach().to(getattr(namespace(x), dtype))
    return x if dtype_name(x) == dtype else x.astype(dtype)


def contiguous(x: Array) -> Array:
    """`x` in one run of memory; itself where it is."""
    return x.contiguous() if hasattr(x, "is_cpu") else namespace(x).ascontiguousarray(x)
