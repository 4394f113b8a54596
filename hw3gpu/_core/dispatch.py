"""Which kernels run for an array, and the views of arrays that they take.

This module tells a public function which kernels run (`backend`), gives it their launchers (`batch_norm(which)`,
`softmax(which)`, …: the Protocols of `protocols.py`), and makes the views of its arrays (`kernel_view`). The GPU kernels take
torch tensors, the CPU kernels NumPy arrays; every view shares the caller's memory. NumPy has no arithmetic on bfloat16 and
Numba none on float16, so the CPU kernels take the bits: bfloat16 as `uint16`, float16 as `int16`.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from . import arrays, record
from .arrays import Array, is_cupy
from .check import ChoiceError, dtype_name

if TYPE_CHECKING:
    from .protocols import (
        BatchNormKernels,
        CrossEntropyKernels,
        DistillationKernels,
        MomentsKernels,
        SoftmaxKernels,
        TokenLogProbsKernels,
    )

BACKENDS = ("auto", "gpu", "cpu")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("hw3gpu_backend", default=None)


class BackendError(RuntimeError):
    """The kernels that `HW3GPU_BACKEND` or `use_backend` ask for cannot run on the arrays given."""


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
    if not isinstance(name, str):
        raise ChoiceError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r} ({type(name).__name__})")
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# The dict inside `os.environ`, and its key: to ask `os.environ` itself for a missing name raises two exceptions.
_ENVIRONMENT = getattr(os.environ, "_data", os.environ)
_ASKED = os.environ.encodekey("HW3GPU_BACKEND") if hasattr(os.environ, "_data") else "HW3GPU_BACKEND"


def requested_backend() -> str:
    """The choice of `use_backend` or HW3GPU_BACKEND; 'auto' without either."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if _ASKED not in _ENVIRONMENT:
        return "auto"
    name = os.environ["HW3GPU_BACKEND"]
    return _known_backend(name, "HW3GPU_BACKEND") if name else "auto"


def request_source() -> str:
    """Where `requested_backend` comes from: 'use_backend', 'HW3GPU_BACKEND', or '' for neither."""
    return "use_backend" if _forced.get() is not None else "HW3GPU_BACKEND" if os.environ.get("HW3GPU_BACKEND") else ""


def check_threads() -> None:
    """ValueError if HW3GPU_NUM_THREADS, which the CPU kernels read when they are imported, is no number of at least 1."""
    text = os.environ.get("HW3GPU_NUM_THREADS", "")
    first = text.partition(",")[0].strip()
    if text and not (first.isdecimal() and int(first) > 0):
        raise ValueError(f"HW3GPU_NUM_THREADS: expected a number of threads of at least 1, got {text!r}")


def backend(x: Array) -> str:
    """'gpu' or 'cpu': which kernels run for `x`. Raises `BackendError` where the kernels that were asked for cannot run."""
    requested = requested_backend()
    host = arrays.on_host(x)
    if requested == "auto":
        requested = "cpu" if host else "gpu"
        record.note_engine(requested)
        return requested
    if requested == "cpu" and not host:
        raise BackendError("backend 'cpu' was asked for, but the array lives on a GPU: copy it to the host first")
    if requested == "gpu":
        why_not = gpu_refusal("cpu" if host else "cuda")
        if why_not:
            raise BackendError(f"backend 'gpu' was asked for, but {why_not}")
    record.note_engine(requested)
    return requested


def triton_refusal() -> str | None:
    """Why Triton cannot be imported, or None when it can."""
    try:
        triton = importlib.import_module("triton")
        _ = triton.knobs.runtime.interpret, triton.runtime.driver
    except AttributeError as error:
        version = getattr(sys.modules.get("triton"), "__version__", "without a version")
        return f"this Triton, {version}, is not the one that the kernels are written for, 3.6 or later ({error})"
    except Exception as error:  # also what a library that cannot be loaded raises
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


# ---------------------------------------------------------------------------------------------- kernels by operation
@functools.cache
def batch_norm(which: str) -> BatchNormKernels:
    """The launchers of batch normalisation on the engine `which`, 'gpu' or 'cpu'; loaded when first asked for."""
    if which == "cpu":
        check_threads()
        from ..kernels.cpu import batch_norm as cpu

        return cpu
    from ..kernels.gpu import batch_norm as gpu

    return _on_their_devices(gpu)


@functools.cache
def softmax(which: str) -> SoftmaxKernels:
    """The launchers of softmax, as `batch_norm`."""
    if which == "cpu":
        check_threads()
        from ..kernels.cpu import softmax as cpu

        return cpu
    from ..kernels.gpu import softmax as gpu

    return _on_their_devices(gpu)


@functools.cache
def cross_entropy(which: str) -> CrossEntropyKernels:
    """The launchers of cross entropy, as `batch_norm`."""
    if which == "cpu":
        check_threads()
        from ..kernels.cpu import cross_entropy as cpu

        return cpu
    from ..kernels.gpu import cross_entropy as gpu

    return _on_their_devices(gpu)


@functools.cache
def token_log_probs(which: str) -> TokenLogProbsKernels:
    """The launchers of a class's log-probability, as `batch_norm`."""
    if which == "cpu":
        check_threads()
        from ..kernels.cpu import token_log_probs as cpu

        return cpu
    from ..kernels.gpu import token_log_probs as gpu

    return _on_their_devices(gpu)


@functools.cache
def distillation(which: str) -> DistillationKernels:
    """The launchers of divergences, as `batch_norm`."""
    if which == "cpu":
        check_threads()
        from ..kernels.cpu import distillation as cpu

        return cpu
    from ..kernels.gpu import distillation as gpu

    return _on_their_devices(gpu)


@functools.cache
def moments(which: str) -> MomentsKernels:
    """The launchers of moments, as `batch_norm`."""
    if which == "cpu":
        check_threads()
        from ..kernels.cpu import moments as cpu

        return cpu
    from ..kernels.gpu import moments as gpu

    return _on_their_devices(gpu)


# Modules of one engine alone, as attributes of this one: `dispatch.eigh.smallest(...)`.
if TYPE_CHECKING:
    from ..kernels.cpu import batch_norm_small as batch_norm_small
    from ..kernels.cpu import cross_entropy as cpu_cross_entropy  # noqa: F401
    from ..kernels.cpu import cross_entropy_small as cross_entropy_small
    from ..kernels.cpu import eigh as eigh
    from ..kernels.cpu import launch as cpu_launch  # noqa: F401
    from ..kernels.cpu._numba import blas as blas
    from ..kernels.cpu._numba import compile as compile_cache  # noqa: F401
    from ..kernels.cpu._numba import threads as threads
    from ..kernels.gpu import launch as gpu_launch  # noqa: F401

_OF_ONE_ENGINE = {
    "batch_norm_small": "cpu.batch_norm_small",
    "blas": "cpu._numba.blas",
    "compile_cache": "cpu._numba.compile",
    "cpu_launch": "cpu.launch",
    "cpu_cross_entropy": "cpu.cross_entropy",
    "cross_entropy_small": "cpu.cross_entropy_small",
    "eigh": "cpu.eigh",
    "gpu_launch": "gpu.launch",
    "threads": "cpu._numba.threads",
}


def __getattr__(name: str) -> ModuleType:
    """Loads a module of `_OF_ONE_ENGINE` when it is first asked for; it is a plain attribute after that."""
    if name not in _OF_ONE_ENGINE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _OF_ONE_ENGINE[name].startswith("cpu"):
        check_threads()
    module = globals()[name] = importlib.import_module(f"hw3gpu.kernels.{_OF_ONE_ENGINE[name]}")
    return module


_Launchers = TypeVar("_Launchers")


def _on_their_devices(launchers: _Launchers) -> _Launchers:
    """A copy of a module of `kernels/gpu` whose launchers run with the device of their first tensor as the current one.

    Triton launches on the current device.
    """
    module: Any = launchers
    copy = ModuleType(module.__name__, module.__doc__)
    for name, value in vars(module).items():
        own = inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        setattr(copy, name, _on_its_device(value) if own else value)
    return cast(Any, copy)


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(launcher)
    def launch(x: Array, *operands: Any, **options: Any) -> Any:
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return launcher(x, *operands, **options)
        with torch.cuda.device(x.device):
            return launcher(x, *operands, **options)

    return launch


def launch_scope(x: Array) -> contextlib.AbstractContextManager[None]:
    """Launches inside run on the stream on which the caller of a CuPy array queues its work; nothing else changes."""
    return _on_stream_of(x) if is_cupy(x) else contextlib.nullcontext()


@contextlib.contextmanager
def _on_stream_of(x: Array) -> Iterator[None]:
    import cupy
    import torch

    stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream(x.device.id).ptr, device=x.device.id)
    with torch.cuda.stream(stream):
        yield


# ---------------------------------------------------------------------------------------------- views and outputs
def kernel_view(which: str) -> Callable[[Array], Array]:
    """The function that gives an array as the `which` kernels take it: a torch tensor ("gpu") or a NumPy array, halves as bits
    ("cpu"); of None it gives None."""
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
        x = x.resolve_neg().numpy() if x.is_neg() else x.numpy()  # no copy on the host, but for a lazy negation
    elif not x.flags.aligned:
        x = x.copy()  # an argument: outputs are aligned. For such memory Numba would compile each kernel anew
    bits = _HALVES.get(x.dtype.char)
    return x if bits is None else x.view(bits)


def _torch_view(x: Array) -> Array:
    if x is None:
        return None
    if hasattr(x, "is_neg"):  # flags first: one PyTorch operation takes longer than all these questions
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
        return _host_view(x if x is None or x.is_contiguous() else x.detach().contiguous())
    memory = (ctypes.c_char * (x.numel() * x.element_size())).from_address(x.data_ptr())
    return np.frombuffer(memory, _BITS[dtype_name(x)])
