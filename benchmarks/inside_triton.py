"""The one file that knows Triton's inside: its interpreter and its driver, as they are in 3.6, 3.7 and 3.9.

`mend_the_interpreter` mends its casts, loops and masks, `patch_the_language_once` its speed.
`count_accesses` reports each load and store that an interpreted kernel makes. `StandIn` is a driver without a device: launches
are specialised and compiled as on the GPU named, and recorded instead of run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# ---------------------------------------------------------------------------------------------- the interpreter
_QUIET_NAN = np.uint16(0x7FC0)  # NVIDIA's and PyTorch's casts give different NaNs; any quiet one is right


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, uint16, of float32 values rounded to nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    # the carry out of the upper half moves to the next exponent, and from the largest number to infinity
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), _QUIET_NAN, rounded.astype(np.uint16))


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def mend_the_interpreter() -> None:
    """Let it compute what a GPU does, in this process."""
    _round_as_a_gpu()
    _count_with_tensors()
    _splat_booleans()


def _round_as_a_gpu() -> None:
    """Replace the casts between float32 and bfloat16, which truncate and spoil subnormals."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float
    if hasattr(original, "__wrapped__"):
        return
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ

    @functools.wraps(original)
    def convert(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        # the callers view the result as the target's NumPy dtype; these arrays already have its width
        if source == tl.float32 and target == tl.bfloat16 and rounding_mode != toward_zero:
            return float32_to_bfloat16(np.ascontiguousarray(values).view(np.float32)).reshape(values.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return bfloat16_to_float32(np.ascontiguousarray(values).view(np.uint16)).reshape(values.shape)
        return original(values, source, target, rounding_mode)

    interpreter._convert_float = convert


def _count_with_tensors() -> None:
    """Let a tensor of one element be a loop's bound where NumPy refuses to make an integer of it (Triton 3.6)."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _splat_booleans() -> None:
    """Let a comparison of numbers, spread over a block, be a mask still (Triton 3.9 refuses the integers that it becomes)."""
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_splat
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def splat(self: Any, of: Any, value: Any) -> Any:
        result = original(self, of, value)
        if value.data.dtype == np.bool_:
            result.data = result.data.astype(np.bool_)
        return result

    interpreter.InterpreterBuilder.create_splat = splat


def patch_the_language_once() -> None:
    """Spare the interpreter half its time: it looks through triton.language anew at each call of a device function."""
    from triton.runtime import interpreter

    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    if hasattr(call, "__wrapped__"):
        return
    patched: set[tuple[int, ...]] = set()

    @functools.wraps(patch)
    def patch_new(fn: Any) -> Any:
        languages = tuple(
            id(value)
            for value in fn.__globals__.values()
            if inspect.ismodule(value) and value in (interpreter.tl, interpreter.tl.core)
        )
        if languages in patched:
            return None
        patched.add(languages)
        return patch(fn)

    @functools.wraps(call)
    def call_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return call(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, call_anew


Observer = Callable[[str, str, np.ndarray, int], None]


@contextlib.contextmanager
def count_accesses(observe: Observer, launched: Callable[[str], Any]) -> Iterator[None]:
    """Calls observe(kernel, 'load' | 'store', addresses, bytes of an element) for each access of an interpreted kernel, and
    launched(kernel) for each launch.

    The addresses are those of the lanes that the mask lets through.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    running = [""]

    def seen(kind: str, pointers: Any, mask: Any) -> None:
        itemsize = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        observe(
            running[0], kind, np.asarray(pointers.data)[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)], itemsize
        )

    def counted_load(self, pointers, mask, *rest):
        seen("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        seen("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_call(self, *args, **kwargs):
        running[0] = self.fn.__name__
        launched(running[0])
        return call(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = counted_load, counted_store, counted_call
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call


# ---------------------------------------------------------------------------------------------- the driver and the compiler
@dataclass(frozen=True)
class Launch:
    """One launch that a `StandIn` recorded."""

    name: str
    grid: tuple[int, int, int]
    signature: dict[str, str]  # argument -> Triton type, 'constexpr' for constants
    binary: bytes  # the machine code: a cubin, or an hsaco on HIP
    num_warps: int
    shared: int  # bytes of shared memory


class StandIn:
    """A driver without a device, for one architecture: 80, 90, 100, 120 (CUDA) or 'gfx942' (HIP).

    Inside `with StandIn(90) as device:` kernels launched on tensors of the `meta` device are specialised and compiled, and
    recorded in `device.launches`. Nothing runs and no memory is touched.
    """

    def __init__(self, arch: int | str):
        from triton.backends.compiler import GPUTarget

        hip = isinstance(arch, str)
        self.target = GPUTarget("hip" if hip else "cuda", arch, 64 if hip else 32)
        self.launches: list[Launch] = []

    def __enter__(self) -> StandIn:
        import triton

        self._previous = triton.runtime.driver._active
        triton.runtime.driver.set_active(_driver(self))
        return self

    def __exit__(self, *error: object) -> None:
        import triton

        triton.runtime.driver._active = self._previous


def _driver(device: StandIn) -> Any:
    import torch
    import triton
    from triton.backends.driver import DriverBase

    class Launcher:
        def __init__(self, src: Any, metadata: Any):
            self.src, self.metadata = src, metadata

        def __call__(self, x, y, z, stream, binary, *rest: Any) -> None:
            signature = {str(name): str(kind) for name, kind in self.src.signature.items()}
            metadata = self.metadata
            # Triton keeps compiled kernels and their launchers: one made under an earlier stand-in records for the present
            triton.runtime.driver.active.stand_in.launches.append(
                Launch(self.src.fn.__name__, (x, y, z), signature, binary, metadata.num_warps, metadata.shared)
            )

    class Utils:
        def get_device_properties(self, index: int) -> dict[str, int]:
            return {
                "max_shared_mem": 232448,
                "max_num_regs": 65536,
                "multiprocessor_count": 132,
                "warpSize": device.target.warp_size,
                "sm_clock_rate": 1755000,
                "mem_clock_rate": 2619000,
                "mem_bus_width": 5120,
            }

        def load_binary(self, name: str, binary: Any, shared: int, index: int) -> tuple[Any, Any, int, int, int]:
            return name, bytes(binary), 0, 0, 1024

        def unload_module(self, module: Any) -> None:
            """Nothing was loaded."""

    class Driver(DriverBase):
        def __init__(self) -> None:
            self.utils, self.launcher_cls, self.stand_in = Utils(), Launcher, device

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return device.target

        def get_active_torch_device(self) -> torch.device:
            return torch.device("meta")

        def get_current_device(self) -> int:
            return device.target.arch if isinstance(device.target.arch, int) else 942  # one kernel cache an architecture

        def get_current_stream(self, index: int = 0) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise RuntimeError("there is no device to time on")

    return Driver()


# ---------------------------------------------------------------------------------------------- compiled code
@dataclass(frozen=True)
class MachineCode:
    """What a cubin says of itself."""

    registers: int  # a thread
    stack: int  # bytes a thread: where spilled registers go
    local: int  # bytes of local memory a thread
    wide: int  # global accesses of 128 bits
    narrow: int  # and of fewer
    doubles: int  # instructions on float64


_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_GLOBAL = re.compile(r"\b(?:LDG|STG)(\.\S+)")
_DOUBLE = re.compile(r"\b(?:D(?:ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64\w*|[FI]2[FI]\.\S*F64\S*)\b")


def machine_code(cubin: bytes) -> MachineCode:
    """Resources and instructions of a compiled CUDA kernel, as cuobjdump and nvdisasm of the Triton wheel read them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([_tool(name), *flags, file.name], capture_output=True, text=True, check=True).stdout
            for name, flags in (("cuobjdump", ("-res-usage",)), ("nvdisasm", ("-ndf",)))  # without an analysis of data flow
        )
    found = _USAGE.search(usage)
    assert found, "cuobjdump printed no resource usage"
    widths = ["128" in access for access in _GLOBAL.findall(sass)]
    registers, stack, local = map(int, found.groups())
    return MachineCode(registers, stack, local, sum(widths), len(widths) - sum(widths), len(_DOUBLE.findall(sass)))


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)
