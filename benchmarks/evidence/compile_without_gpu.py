"""What the tests and benchmarks know of Triton's inside, as it is in 3.6, 3.7 and 3.9: the accesses of its interpreter (which
`hw3gpu._cli.interpreter` mends), and its driver.

`count_accesses` reports each load and store that an interpreted kernel makes. `StandIn` is a driver without a device: launches
are specialised and compiled as on the GPU named, and recorded instead of run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import sass

# ---------------------------------------------------------------------------------------------- the interpreter
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

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        seen("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
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
    arch: int | str
    grid: tuple[int, int, int]
    signature: dict[str, str]  # argument -> Triton type, 'constexpr' for constants
    binary: bytes  # the machine code: a cubin, or an hsaco on HIP
    num_warps: int
    shared: int  # bytes of shared memory
    args: tuple[Any, ...]  # as given, constants among them
    metadata: Any  # what the hooks are told
    hooks: tuple[Any, Any]  # before and after


class StandIn:
    """A driver without a device, for one architecture: 80, 90, 100, 120 (CUDA) or 'gfx942' (HIP).

    Inside `with StandIn(90) as device:` kernels launched on tensors of the `meta` device are specialised and compiled, and
    recorded in `device.launches`. Nothing runs and no memory is touched. in_c: launches go to Triton's own launcher over a CUDA
    driver that does nothing, and are not recorded.
    """

    def __init__(self, arch: int | str, in_c: bool = False) -> None:
        from triton.backends.compiler import GPUTarget

        self.in_c = in_c
        hip = isinstance(arch, str)
        self.target = GPUTarget("hip" if hip else "cuda", arch, 64 if hip else 32)
        self.launches: list[Launch] = []

    def __enter__(self) -> StandIn:
        import triton

        from hw3gpu.kernels.gpu import device

        self._previous = triton.runtime.driver._active, device.ABSENT
        triton.runtime.driver.set_active(_driver(self))
        device.ABSENT = part(self.target.arch)
        return self

    def __exit__(self, *error: object) -> None:
        import triton

        from hw3gpu.kernels.gpu import device

        triton.runtime.driver._active, device.ABSENT = self._previous


@contextlib.contextmanager
def one_front_end() -> Iterator[None]:
    """What Triton's front end makes of a kernel for one NVIDIA GPU serves the others: the same module, read from its text.

    It asks which one it is for float8, `tl.dot`, tensor descriptors and `target_info` alone, and no kernel here has these.
    """
    from triton._C.libtriton import ir
    from triton.compiler.compiler import ASTSource

    make_ir, made = ASTSource.make_ir, dict[Any, str]()

    def shared(source: Any, target: Any, options: Any, *rest: Any) -> Any:
        of, context = (source.hash(), target.backend, options.debug, options.sanitize_overflow), rest[-1]
        if of not in made:
            module = make_ir(source, target, options, *rest)
            made[of] = module.str()
            return module
        with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
            file.write(made[of])
            file.flush()
            module = ir.parse_mlir_module(file.name, context)
        module.context = context  # which it keeps alive
        return module

    ASTSource.make_ir = shared
    try:
        yield
    finally:
        ASTSource.make_ir = make_ir


def part(arch: int | str) -> Any:
    """The `Device` that stands for an architecture."""
    from hw3gpu.kernels.gpu.device import A100, B200, H100, RTX_5090, Device

    mi300x = Device("MI300X", 304, 131072, 2048, 64 << 10, 256 << 20, 5.3e12, 24 << 10)
    return {80: A100, 90: H100, 100: B200, 120: RTX_5090, "gfx942": mi300x}[arch]


def _driver(device: StandIn) -> Any:
    import torch
    import triton
    from triton.backends.driver import DriverBase

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.src, self.metadata = src, metadata

        def __call__(
            self, x: int, y: int, z: int, stream: Any, binary: Any, packed: Any, told: Any, enter: Any, leave: Any, *args: Any
        ) -> None:
            signature = {str(name): str(kind) for name, kind in self.src.signature.items()}
            metadata, hooks = self.metadata, (enter, leave)
            # Triton keeps compiled kernels and their launchers: one made under an earlier stand-in records for the present
            present = triton.runtime.driver.active.stand_in
            present.launches.append(
                Launch(
                    self.src.fn.__name__, present.target.arch, (x, y, z), signature, binary, metadata.num_warps,
                    metadata.shared, args, told, hooks,
                )
            )  # fmt: skip

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
            if device.in_c:
                self.launcher_cls = _launcher_in_c(self.utils)

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
            arch = device.target.arch if isinstance(device.target.arch, int) else 942  # one kernel cache an architecture
            return arch + 1000 * device.in_c

        def get_current_stream(self, index: int = 0) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise RuntimeError("there is no device to time on")

    return Driver()


# ---------------------------------------------------------------------------------------------- a CUDA driver of no device
_DRIVER = """
#define NOTHING(name) int name(void) { return 0; }
%s
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
"""


@functools.cache
def _cuda_utils() -> Any:
    """Triton's functions in C over a `libcuda.so.1` that is compiled here, and whose functions do nothing."""
    import triton
    from triton.backends.nvidia import driver

    source = (Path(driver.__file__).parent / "driver.c").read_text()
    names = set(re.findall(r"\bcu[A-Z]\w+(?=\()", source)) - {"cuCtxGetCurrent"} | {"cuLaunchKernelEx"}
    folder = Path(tempfile.mkdtemp(prefix="libcuda-"))
    (folder / "cuda.c").write_text(_DRIVER % "\n".join(f"NOTHING({name})" for name in sorted(names)))
    made = folder / "libcuda.so.1"
    options = ("-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1")
    subprocess.run(["cc", *options, "-o", str(made), str(folder / "cuda.c")], check=True)
    ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
    triton.knobs.nvidia.libcuda_path = str(folder)
    return driver.CudaUtils()


def _launcher_in_c(utils: Any) -> Any:
    from triton.backends.nvidia.driver import CudaLauncher

    for name in ("launch", "build_signature_metadata"):
        setattr(utils, name, getattr(_cuda_utils(), name))
    utils.load_binary = lambda name, binary, shared, index: (1, 1, 0, 0, 1024)
    return CudaLauncher


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
    parts: list[sass.Part]  # straight code and loops


_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_DOUBLE = re.compile(r"(?:D(?:ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64\w*|[FI]2[FI]\.\S*F64\S*)\b")


def machine_codes(launches: Sequence[Launch]) -> list[MachineCode]:
    """Resources and instructions of kernels compiled for one architecture, as tools of the Triton wheel read them."""
    return [_machine_code(launch, code) for launch, code in zip(launches, _disassembled(launches), strict=True)]


def _machine_code(launch: Launch, code: list[sass.Instruction]) -> MachineCode:
    found = _USAGE.search(_tool_says("cuobjdump", launch.binary, "-res-usage"))
    assert found, "cuobjdump printed no resource usage"
    wide = [x.width >= 16 for x in code if x.name in ("LDG", "STG")]
    doubles = sum(bool(_DOUBLE.match(x.opcode)) for x in code)
    registers, stack, local = map(int, found.groups())
    return MachineCode(registers, stack, local, sum(wide), len(wide) - sum(wide), doubles, sass.parts(code))


def copies_ahead(launch: Launch) -> list[str]:
    """The kinds of the copies into shared memory that nobody waits for, such as `LDGSTS.E.BYPASS.128`."""
    return [opcode for opcode in opcodes(launch) if opcode.startswith("LDGSTS")]


def opcodes(launch: Launch) -> list[str]:
    """The instructions in their order, without operands."""
    return [x.opcode for x in _disassembled([launch])[0]]


def _disassembled(launches: Sequence[Launch]) -> list[list[sass.Instruction]]:
    """The instructions of each launch's kernel, all of one architecture.

    nvdisasm takes a quarter of a second to begin, and hundredths for a kernel: it is called once, on all of them end to end.
    """
    arch, codes = launches[0].arch, [_instructions_of(launch.binary) for launch in launches]
    raw = f"SM{arch}{'a' * (int(arch) >= 90)}"  # as Triton names it to ptxas
    text = _tool_says("nvdisasm", b"".join(codes), "-ndf", "-hex", "-b", raw)  # without an analysis of data flow
    return sass.disassembled(text, [len(code) // sass.BYTES for code in codes])


def _instructions_of(cubin: bytes) -> bytes:
    """The section of an ELF file whose name begins with .text."""
    (sections,), (count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 60)
    found = [struct.unpack_from("<I20xQQ", cubin, sections + 64 * i) for i in range(count)]  # name, offset, size
    (code,) = (cubin[at : at + size] for name, at, size in found if cubin.startswith(b".text.", found[names][1] + name))
    return code


def _tool_says(name: str, given: bytes, *options: str) -> str:
    """What a tool of the Triton wheel prints of a file of these bytes."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(given)
        file.flush()
        return subprocess.run([str(tool), *options, file.name], capture_output=True, text=True, check=True).stdout
