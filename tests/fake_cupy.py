"""A stand-in for CuPy where there is no GPU: NumPy's arithmetic behind CuPy's interface, and stricter than CuPy.

Every name in `cupy` is one of CuPy's, with CuPy's parameters; tests/test_cupy.py compares the two. As CuPy does, it refuses
NumPy arrays as operands and a conversion to NumPy that is not asked for. What CuPy lets pass, or does in silence, shows:
memory that `empty` leaves is NaN; an operation on an array of another device than the current one is an error;
`linalg.eigh` makes NaN of a zero matrix, `linalg.cholesky` of an indefinite one unless `cupyx.errstate(linalg="raise")` asks
for the error; a negative stride in DLPack, with which torch ends the process, is an error.

`install` makes it what `import cupy` gives, and returns the `Log` of what is run and copied. The memory is the host's, and
`__dlpack_device__` says so: kernels that run on the host read and write it.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np

DTYPES = "?bBhHiIlLqQefdFD"
PLAIN = (bool, int, float, complex, str, slice, range, type, type(None), type(...), np.generic, np.dtype)


# ------------------------------------------------------------------------------------------------- what is recorded
class Run(NamedTuple):
    """One operation: its name, the shape of its first operand, and the device and stream on which it was queued."""

    name: str
    shape: tuple[int, ...] | None
    device: int
    stream: int


class Log:
    """What was asked since `install`: `runs` in their order; `copies`, from a device to the host, by what made them."""

    def __init__(self, devices=1):
        self.devices, self.current, self.linalg = devices, 0, "ignore"
        self.device_stack, self.stream_stack = [], []
        self.streams = [[Stream.null] for _ in range(devices)]
        self.runs: list[Run] = []
        self.copies: list[str] = []

    def ran(self, name, shape=None):
        """Records an operation on the current device and stream."""
        self.runs.append(Run(name, shape, self.current, self.streams[self.current][-1].ptr))


def install(monkeypatch, devices=1):
    """`import cupy` gives the stand-in until the test ends."""
    global log
    log = Log(devices)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupyx", cupyx)
    return log


# ------------------------------------------------------------------------------------------------ devices and streams
class CUDARuntimeError(RuntimeError):
    def __init__(self, status):
        super().__init__(f"CUDA error {status}")


class Device:
    def __init__(self, device=None):
        self.id = log.current if device is None else int(device)

    def __enter__(self):
        if not 0 <= self.id < log.devices:
            raise CUDARuntimeError(101)  # cudaErrorInvalidDevice
        log.device_stack.append(log.current)
        log.current = self.id
        return self

    def __exit__(self, *args):
        log.current = log.device_stack.pop()

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return self.id

    def __repr__(self):
        return f"<CUDA Device {self.id}>"


class Stream:
    _addresses = itertools.count(0xABC0, 16)

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr, self.device_id = (0, -1) if null else (next(self._addresses), log.current)

    @classmethod
    def from_external(cls, obj):
        stream = cls(null=True)
        stream.ptr = obj.__cuda_stream__()[1]
        return stream

    def __enter__(self):
        if self.device_id not in (-1, log.current):
            raise RuntimeError(f"a stream of device {self.device_id} while {log.current} is current")
        log.stream_stack.append(log.current)
        log.streams[log.current].append(self)
        return self

    def __exit__(self, *args):
        log.streams[log.stream_stack.pop()].pop()


@contextlib.contextmanager
def errstate(*, divide=None, over=None, under=None, invalid=None, linalg=None):
    before, log.linalg = log.linalg, linalg or log.linalg
    try:
        yield
    finally:
        log.linalg = before


Stream.null = Stream(null=True)
log = Log()
cupy, cupyx = ModuleType("cupy"), ModuleType("cupyx")
cupyx.errstate = errstate
cupy.cuda = SimpleNamespace(
    Device=Device, Stream=Stream,
    get_current_stream=lambda device_id=-1: log.streams[log.current if device_id == -1 else device_id][-1],
    runtime=SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError, getDevice=lambda: log.current, getDeviceCount=lambda: log.devices
    ),
)  # fmt: skip
cupy.linalg = SimpleNamespace()


# -------------------------------------------------------------------------------------------------- running on NumPy
def host(x):
    """The memory of an operand, checked: one of the current device's, or a Python or NumPy scalar."""
    if isinstance(x, ndarray):
        if x.device.id != log.current:
            raise ValueError(f"an array of device {x.device.id} while {log.current} is current")
        return x._memory
    if isinstance(x, (list, tuple)):
        return type(x)(map(host, x))
    if not isinstance(x, PLAIN):
        raise TypeError(f"Unsupported type {type(x)}")
    return x


def on_device(x, where=None):
    """What NumPy returned, as arrays of the device `where`; scalars have 0 axes there."""
    if isinstance(x, tuple):
        return tuple(on_device(part, where) for part in x)
    if not isinstance(x, (np.ndarray, np.generic)):
        return x
    if x.dtype.char not in DTYPES or not x.dtype.isnative:
        raise ValueError(f"Unsupported dtype {x.dtype}")
    made = object.__new__(ndarray)
    made._memory, made.device = np.asarray(x), Device(where)
    return made


def run(name, function, *args, **kwargs):
    """`function` of the operands' memory, queued on the current stream."""
    out = kwargs.get("out")
    args, kwargs = [host(a) for a in args], {key: host(a) for key, a in kwargs.items()}
    log.ran(name, next((a.shape for a in args if isinstance(a, np.ndarray)), None))
    with np.errstate(all="ignore"):
        result = function(*args, **kwargs)
    return on_device(result) if out is None else out


def parse(spec):
    """("f", its signature) for "f(x, axis=None)"."""
    name, _, parameters = spec.partition("(")
    return name, inspect.signature(eval(f"lambda {parameters.rpartition(')')[0]}: None"))


def function(spec, on_numpy=None):
    """CuPy's function `spec`, computed by `on_numpy`, or by NumPy's function of that name."""
    name, signature = parse(spec)

    def call(*args, **kwargs):
        given = signature.bind(*args, **kwargs)  # TypeError for what CuPy does not take
        return run(name, on_numpy or getattr(np, name), *given.args, **given.kwargs)

    call.__name__, call.__signature__ = name, signature
    return call


def method(spec, view):
    """CuPy's method `spec`, computed by NumPy's; one that makes a `view` touches no device unless it has to copy."""
    name, signature = parse(spec)
    on_numpy = getattr(np.ndarray, name)

    def call(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        if view:
            seen = on_numpy(self._memory, *given.args[1:], **given.kwargs)
            if not seen.size or np.may_share_memory(seen, self._memory):
                return on_device(seen, self.device)
        return run(name, on_numpy, *given.args, **given.kwargs)

    call.__name__, call.__signature__ = name, signature
    return call


def operator(name, swapped=False, in_place=False):
    def call(self, *other):
        operands = (*other, self) if swapped else (self, *other)
        return run(name, getattr(np, name), *operands, **({"out": self} if in_place else {}))

    return call


def copied(name, convert):
    def call(self):
        log.copies.append(name)
        return convert(self._memory)

    return call


# --------------------------------------------------------------------------------------------------------- the array
class ndarray:  # noqa: N801
    __module__ = "cupy"
    __hash__ = None

    T = property(lambda self: on_device(self._memory.T, self.device))
    real = property(lambda self: on_device(self._memory.real, self.device))
    imag = property(lambda self: on_device(self._memory.imag, self.device))
    data = property(lambda self: SimpleNamespace(ptr=self._memory.ctypes.data))
    __cuda_array_interface__ = property(lambda self: self._memory.__array_interface__)

    @property
    def flags(self):
        return SimpleNamespace(
            **{name: getattr(self._memory.flags, name) for name in ("c_contiguous", "f_contiguous", "owndata")}
        )

    def get(self, stream=None, order="C", out=None, blocking=True):
        log.copies.append("get")
        return self._memory.copy(order)

    item, __bool__ = copied("item", np.ndarray.item), copied("bool", bool)
    __int__, __float__ = copied("int", int), copied("float", float)

    def __array__(self, dtype=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        ours = getattr(cupy, ufunc.__name__, None)
        if method != "__call__" or ours is None:
            raise TypeError(f"NumPy's {ufunc.__name__} ({method}) of CuPy arrays")
        return ours(*inputs, **kwargs)

    def __array_function__(self, func, types, args, kwargs):
        raise TypeError(f"NumPy's {func.__name__} of CuPy arrays: call CuPy's")

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if any(stride < 0 for stride in self.strides):
            raise BufferError("a negative stride, with which torch ends the process")
        return self._memory.__dlpack__(max_version=max_version, copy=copy)

    def __dlpack_device__(self):
        return self._memory.__dlpack_device__()

    def __iter__(self):
        return (self[i] for i in range(len(self._memory)))

    def __getitem__(self, slices):
        each = slices if isinstance(slices, tuple) else (slices,)
        if all(i is None or i is ... or isinstance(i, (int, np.integer, slice)) for i in each):
            more = () if any(i is ... for i in each) else (...,)
            return on_device(self._memory[(*each, *more)], self.device)  # a view, of a single element too
        return run("getitem", lambda a, i: a[tuple(i)], self, list(each))

    def __setitem__(self, slices, value):
        each = list(slices) if isinstance(slices, tuple) else [slices]
        run("setitem", lambda a, i, v: a.__setitem__(tuple(i), v), self, each, value)


VIEWS = (
    "reshape(self, *shape, order='C', copy=None)", "ravel(self, order='C')", "swapaxes(self, axis1, axis2)",
    "diagonal(self, offset=0, axis1=0, axis2=1)", "view(self, dtype=None, type=None)",
    "astype(self, dtype, order='K', casting=None, subok=None, copy=True)",
)  # fmt: skip
METHODS = (
    "copy(self, order='C')", "conj(self)", "sum(self, axis=None, dtype=None, out=None, keepdims=False)",
    "mean(self, axis=None, dtype=None, out=None, keepdims=False)", "max(self, axis=None, out=None, keepdims=False)",
    "min(self, axis=None, out=None, keepdims=False)", "all(self, axis=None, out=None, keepdims=False)",
    "any(self, axis=None, out=None, keepdims=False)", "argmax(self, axis=None, out=None, dtype=None, keepdims=False)",
    "cumsum(self, axis=None, dtype=None, out=None)",
)  # fmt: skip
BINARY = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide", "pow": "power",
    "matmul": "matmul", "and": "bitwise_and", "or": "bitwise_or",
}  # fmt: skip
OTHERS = {
    "neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert", "lt": "less", "le": "less_equal",
    "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
}  # fmt: skip
for name in ("shape", "strides", "dtype", "size", "ndim", "nbytes", "itemsize"):
    setattr(ndarray, name, property(lambda self, name=name: getattr(self._memory, name)))
for spec in VIEWS + METHODS:
    setattr(ndarray, parse(spec)[0], method(spec, view=spec in VIEWS))
for name, ufunc in BINARY.items():
    setattr(ndarray, f"__{name}__", operator(ufunc))
    setattr(ndarray, f"__r{name}__", operator(ufunc, swapped=True))
    setattr(ndarray, f"__i{name}__", operator(ufunc, in_place=True))
for name, ufunc in OTHERS.items():
    setattr(ndarray, f"__{name}__", operator(ufunc))
cupy.ndarray = ndarray


# ----------------------------------------------------------------------------------------------------- the functions
UFUNCS = (
    "absolute", "add", "bitwise_and", "bitwise_or", "equal", "exp", "frexp", "greater", "greater_equal", "invert", "isfinite",
    "ldexp", "less", "less_equal", "log", "maximum", "minimum", "multiply", "negative", "not_equal", "positive", "power",
    "sqrt", "subtract", "true_divide",
)  # fmt: skip
FUNCTIONS = (
    "zeros(shape, dtype=float, order='C')", "ones(shape, dtype=float, order='C')",
    "zeros_like(a, dtype=None, order='K', subok=None, shape=None)",
    "ones_like(a, dtype=None, order='K', subok=None, shape=None)",
    "full(shape, fill_value, dtype=None, order='C')", "arange(start, stop=None, step=1, dtype=None)",
    "eye(N, M=None, k=0, dtype=float, order='C')", "diag(v, k=0)", "where(condition, x=None, y=None)",
    "clip(a, a_min, a_max, out=None)", "any(a, axis=None, out=None, keepdims=False)",
    "argmax(a, axis=None, dtype=None, out=None, keepdims=False)", "count_nonzero(a, axis=None)",
    "take_along_axis(a, indices, axis)", "concatenate(tup, axis=0, out=None, *, dtype=None, casting='same_kind')",
    "stack(tup, axis=0, out=None, *, dtype=None, casting='same_kind')", "einsum(*operands, **kwargs)",
)  # fmt: skip
for name in UFUNCS:
    inputs = "x" if getattr(np, name).nin == 1 else "x1, x2"
    setattr(cupy, name, function(f"{name}({inputs}, /, out=None, *, casting='same_kind', dtype=None)"))
for spec in FUNCTIONS:
    setattr(cupy, parse(spec)[0], function(spec))


def in_cupy(spec, where=cupy):
    """Gives the decorated function, of NumPy arrays, to `where` under CuPy's name and parameters."""
    return lambda on_numpy: setattr(where, parse(spec)[0], function(spec, on_numpy)) or on_numpy


@in_cupy("empty(shape, dtype=float, order='C')")
def uninitialised(shape, dtype=float, order="C"):
    dtype = np.dtype(dtype)
    return np.full(shape, np.nan if dtype.kind in "fc" else 1 if dtype.kind == "b" else np.iinfo(dtype).max, dtype, order)


@in_cupy("empty_like(prototype, dtype=None, order='K', subok=None, shape=None)")
def uninitialised_like(prototype, **options):
    made = np.empty_like(prototype, **options)
    made[...] = uninitialised((), made.dtype)
    return made


@in_cupy("eigh(a, UPLO='L')", cupy.linalg)
def eigh(a, *uplo):
    values, vectors = np.linalg.eigh(a, *uplo)
    zero = ~a.any(axis=(-2, -1))
    values[zero], vectors[zero] = np.nan, np.nan
    return values, vectors


@in_cupy("cholesky(a)", cupy.linalg)
def cholesky(a):
    factors = np.full_like(a, np.nan)
    for i in np.ndindex(a.shape[:-2]):
        try:
            factors[i] = np.linalg.cholesky(a[i])
        except np.linalg.LinAlgError:
            if log.linalg == "raise":
                raise
    return factors


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get(order=order) if isinstance(a, ndarray) else np.asarray(a, order=order)


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    if not isinstance(a, ndarray):
        return on_device(np.array(a, dtype=dtype, order=order or "K"))
    return a if dtype in (None, a.dtype) and not copy else run("asarray", np.array, a, dtype=dtype)


def ascontiguousarray(a, dtype=None):
    a = asarray(a, dtype)
    return a if a.flags.c_contiguous else a.copy()


cupy.linalg.svd = function("svd(a, full_matrices=True, compute_uv=True)", np.linalg.svd)
cupy.asnumpy, cupy.asarray, cupy.ascontiguousarray = asnumpy, asarray, ascontiguousarray
