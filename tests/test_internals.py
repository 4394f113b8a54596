"""What is used of Numba and PyTorch beyond their documented interfaces: in one module each, and all of it still there.

A failure here names what a release has moved, before anything fails for a reason that is harder to see.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from hw3gpu.kernels.cpu._numba import compile
from hw3gpu.kernels.cpu._numba import internals as _numba

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in ("hw3gpu", "kernels", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]

# what is called, with arguments that it has to take
NUMBA = {
    "numba.core.base.BaseContext.add_linking_libs": ("libs",),
    "numba.core.base.BaseContext.call_internal_no_propagate": ("builder", "fndesc", "sig", "args"),
    "numba.core.caching.FunctionCache.load_overload": ("sig", "target_context"),
    "numba.core.caching.FunctionCache.save_overload": ("sig", "data"),
    "numba.core.caching.FunctionCache._index_key": ("sig", "codegen"),
    "numba.core.caching.FunctionCache._impl_class._locator_classes": (),
    "numba.core.caching._CacheLocator.ensure_cache_path": (),
    "numba.core.caching._CacheLocator.from_function": ("py_func", "py_file"),
    "numba.core.caching._CacheLocator.get_cache_path": (),
    "numba.core.caching._CacheLocator.get_disambiguator": (),
    "numba.core.caching._CacheLocator.get_source_stamp": (),
    "numba.core.callconv.CPUCallConv.return_user_exc": ("builder", "exc", "exc_args"),
    "numba.core.cgutils.alloca_once": ("builder", "ty"),
    "numba.core.cgutils.alloca_once_value": ("builder", "value"),
    "numba.core.cgutils.for_range": ("builder", "count"),
    "numba.core.cgutils.gep_inbounds": ("builder", "ptr"),
    "numba.core.cgutils.get_item_pointer": ("context", "builder", "aryty", "ary", "inds", "wraparound"),
    "numba.core.cgutils.get_null_value": (),
    "numba.core.cgutils.get_or_insert_function": ("module", "fnty", "name"),
    "numba.core.cgutils.if_unlikely": ("builder", "pred"),
    "numba.core.cgutils.is_not_null": ("builder", "val"),
    "numba.core.cgutils.is_null": ("builder", "val"),
    "numba.core.cgutils.pack_array": ("builder", "values"),
    "numba.core.cgutils.pack_struct": ("builder", "values"),
    "numba.core.cgutils.unpack_tuple": ("builder", "tup", "count"),
    "numba.core.codegen.CPUCodegen.magic_tuple": (),
    "numba.core.codegen.JITCodeLibrary._finalize_dynamic_globals": (),
    "numba.core.codegen.JITCodeLibrary._get_module_for_linking": (),
    "numba.core.codegen.JITCodeLibrary._raise_if_finalized": (),
    "numba.core.codegen.JITCodeLibrary.get_pointer_to_function": ("name",),
    "numba.core.compiler.Compiler": ("typingctx", "targetctx", "library", "args", "return_type", "flags", "locals"),
    "numba.core.config.CACHE_DIR": (),
    "numba.core.config.CPU_FEATURES": (),
    "numba.core.config.CPU_NAME": (),
    "numba.core.datamodel.models.PrimitiveModel": ("dmm", "fe_type", "be_type"),
    "numba.core.dispatcher.Dispatcher._insert": (),
    "numba.core.dispatcher.Dispatcher.get_compile_result": ("sig",),
    "numba.core.dispatcher.Dispatcher.typeof_pyval": ("val",),
    "numba.core.registry.CPUDispatcher._compile_for_args": (),
    "numba.core.targetconfig.TargetConfig._values": (),
    "numba.core.types.Dispatcher.dispatcher": (),
    "numba.core.types.Dispatcher.get_call_type": ("context", "args", "kws"),
    "numba.np.arrayobj.load_item": ("context", "builder", "arrayty", "ptr"),
    "numba.np.arrayobj.make_array": ("array_type",),
    "numba.np.arrayobj.store_item": ("context", "builder", "arrayty", "val", "ptr"),
}
# the members of an array in compiled code
ARRAY = {"meminfo", "parent", "nitems", "itemsize", "data", "shape", "strides"}

PYTORCH = [
    "torch._C.DisableTorchFunctionSubclass",
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._are_functorch_transforms_active",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._get_tracing_state",
    "torch._C._len_torch_dispatch_stack",
    "torch._softmax_backward_data",
    "torch.autograd.forward_ad._current_level",
    "torch.nn._reduction.legacy_get_string",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.conv._ConvNd",
    "torch.distributed.distributed_c10d._resolve_process_group",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_map",
]


TRITON = [
    "triton.compiler.CompiledKernel.launch_metadata",
    "triton.compiler.CompiledKernel.run",
    "triton.knobs.runtime.interpret",
    "triton.knobs.runtime.launch_enter_hook",
    "triton.knobs.runtime.launch_exit_hook",
    "triton.runtime.driver.active",
    "triton.runtime.jit.JITFunction.run",
]


def found(name: str) -> object:
    """What a dotted name stands for; the failure says from where on it is gone."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:k]))
            break
        except ImportError:
            continue
    for i in range(k, len(parts)):
        assert hasattr(value, parts[i]), f"{name} has moved: {'.'.join(parts[:i])} has no {parts[i]!r}"
        value = getattr(value, parts[i])
    return value


@pytest.mark.parametrize("name", NUMBA)
def test_numba_has_what_the_kernels_use(name: str) -> None:
    value = found(name)
    if NUMBA[name]:
        taken = inspect.signature(value).parameters
        missing = set(NUMBA[name]) - set(taken)
        assert not missing or any(p.kind is p.VAR_POSITIONAL for p in taken.values()), f"{name} takes no {missing} any more"


def test_numba_has_the_options_and_the_members_of_arrays() -> None:
    for option, value in (compile._OPTIONS | compile._INLINE).items():
        numba.njit(**{option: value})(lambda: 0)  # KeyError names one that is not known
    model = importlib.import_module("numba.core.datamodel").default_manager[numba.types.float32[::1]]
    assert set(model._fields) >= ARRAY
    assert isinstance(numba.njit(lambda: 0), _numba.Dispatcher)


@pytest.mark.parametrize("name", PYTORCH)
def test_pytorch_has_what_the_library_uses(name: str) -> None:
    found(name)


@pytest.mark.parametrize("name", [name for name in TRITON if not name.endswith(".active")])  # which asks for a GPU
def test_triton_has_what_the_launches_use(name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    found(name)


def test_a_compiled_kernel_is_launched_as_triton_launches_it() -> None:
    """The call of `JITFunction.run` that `_triton.run` repeats, word by word."""
    jit = pytest.importorskip("triton.runtime.jit", reason="Triton is not installed")
    call = re.search(r"kernel\.run\(.*?bound_args\.values\(\)\)", inspect.getsource(jit.JITFunction.run), re.DOTALL)
    assert call
    assert "".join(call[0].split()) == (
        "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
        "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())"
    )


@pytest.mark.parametrize(
    ("owner", "name", "module", "says"),
    [
        ("numba.core.caching", "_CacheLocator", "hw3gpu.kernels.cpu.softmax", r"made for Numba .* lacks .*_CacheLocator"),
        ("torch._C", "_get_tracing_state", "hw3gpu.functional", r"made for PyTorch .* lacks .*_get_tracing_state"),
        ("torch.autograd.forward_ad", "_current_level", "hw3gpu.functional", r"made for PyTorch .* lacks .*_current_level"),
    ],
)
def test_the_import_says_what_is_gone(owner: str, name: str, module: str, says: str) -> None:
    code = f"import torch, {owner} as owner; del owner.{name}; import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(says, done.stderr.splitlines()[-1])


def _private(path: Path) -> list[str]:
    """Names of Numba's and PyTorch's that are not documented, as the file writes them."""
    uses = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            uses += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            uses += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            uses.append(ast.unparse(node))
    return sorted({use for use in uses if re.match(r"numba\.(core|np|cpython)\b|torch\.([\w.]+\.)?_[a-zA-Z]", use)})


def test_one_module_for_each_library_holds_its_internals() -> None:
    inside = {path.relative_to(ROOT).as_posix() for path in SOURCES if _private(path)}
    assert inside == {"kernels/cpu/_numba/internals.py", "hw3gpu/_core/torch_internals.py"}
    used = _private(ROOT / "hw3gpu/_core/torch_internals.py")
    unlisted = [use for use in used if not any(f"{name}.".startswith(f"{use}.") for name in PYTORCH)]
    assert not unlisted, "not in this file's table"


def test_the_versions_that_are_known_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    internals = importlib.import_module("hw3gpu._core.torch_internals")
    for package, known in (("numba", _numba.KNOWN), ("torch", internals.KNOWN)):
        assert f'"{package}>={known.partition(" ")[0]}"' in project
