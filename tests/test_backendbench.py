"""The directory for BackendBench: loaded as its DirectoryBackend does, and beside the operators of PyTorch that it replaces."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

OPERATORS = Path(__file__).resolve().parent.parent / "integrations" / "backendbench"
NAMES = ["_softmax", "_log_softmax", "native_batch_norm"]
BACKWARDS = ["_softmax_backward_data", "_log_softmax_backward_data", "native_batch_norm_backward"]


def implementation_of(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """What BackendBench's DirectoryBackend finds for `aten.add.Tensor` in `add__Tensor/add__Tensor_implementation*.py`."""
    folder = str(op).removeprefix("aten.").replace(".", "__")
    path = min((OPERATORS / folder).glob(f"{folder}_implementation*.py"))
    spec = importlib.util.spec_from_file_location(f"op_{folder}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, f"{folder}_kernel_impl")


@pytest.fixture
def place(device: str) -> str:
    if os.environ.get("HW3GPU_BACKEND") != "gpu":
        pytest.skip("Triton kernels alone: run by '--kernels gpu'")
    return device


def test_directory_has_each_operator_and_nothing_else() -> None:
    folders = {path.name for path in OPERATORS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {f"{name}__default" for name in NAMES + BACKWARDS}


@pytest.mark.parametrize("name", NAMES + BACKWARDS)
def test_implementation_has_the_operators_arguments(name: str) -> None:
    """Without Triton, which the CPU leg must not import: from the source."""
    op = getattr(torch.ops.aten, name).default
    folder = f"{name}__default"
    (path,) = (OPERATORS / folder).glob(f"{folder}_implementation*.py")
    (function,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    assert function.name == f"{folder}_kernel_impl"
    assert [a.arg for a in function.args.args] == [a.name for a in op._schema.arguments]


def close(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    """Within a few roundings of the dtype; BackendBench itself allows 0.01."""
    u = torch.finfo(dtype).eps
    for a, b in zip(found, wanted, strict=True):
        if b is None:
            assert a is None
        else:
            largest = b.abs().max().item() if b.numel() else 0.0
            torch.testing.assert_close(a.cpu(), b.to(a.dtype).cpu(), rtol=4 * u, atol=16 * u * max(1.0, largest))


def values(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device) * 2


def both(name: str, *args: Any, dtype: torch.dtype) -> Any:
    """The operator in float64 by PyTorch on the CPU, and here: held to each other; gives what was found here."""
    op = getattr(torch.ops.aten, name).default
    exact = [a.detach().double().cpu() if isinstance(a, torch.Tensor) else torch.float64 if a is dtype else a for a in args]
    found, wanted = implementation_of(op)(*args), op(*exact)
    close(found if isinstance(found, tuple) else (found,), wanted if isinstance(wanted, tuple) else (wanted,), dtype)
    return found


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("log", ["_softmax", "_log_softmax"])
@pytest.mark.parametrize(("shape", "dim"), [((3, 21), -1), ((2, 7, 3), 1), ((), 0), ((0, 4), 1)])
def test_softmax_and_its_backward(place: str, dtype: torch.dtype, log: str, shape: tuple[int, ...], dim: int) -> None:
    z, dy = values(shape, dtype, place), values(shape, dtype, place, 1)
    y = both(log, z, dim, False, dtype=dtype)
    assert y.dtype == dtype
    dz = both(f"{log}_backward_data", dy, y, dim, dtype, dtype=dtype)
    assert dz.dtype == dtype


@pytest.mark.parametrize("log", ["_softmax", "_log_softmax"])
def test_halves_to_float(place: str, log: str) -> None:
    """PyTorch has this on CUDA alone: float32 out of bfloat16, and the gradient back in bfloat16."""
    z, dy = values((3, 11), torch.bfloat16, place), values((3, 11), torch.float32, place, 1)
    op, backward = (implementation_of(getattr(torch.ops.aten, name).default) for name in (log, f"{log}_backward_data"))
    y = op(z, 1, True)
    assert y.dtype == torch.float32
    close((y,), (getattr(torch.ops.aten, log).default(z.double(), 1, False),), torch.float32)
    dz = backward(dy, y, 1, torch.bfloat16)
    assert dz.dtype == torch.bfloat16
    wanted = getattr(torch.ops.aten, f"{log}_backward_data").default(dy.double(), y.double(), 1, torch.float64)
    close((dz,), (wanted,), torch.bfloat16)


def test_log_softmax_keeps_digits_far_from_zero(place: str) -> None:
    """A lse near 1e6 in float32 would leave log p to 0.06."""
    z = values((2, 9), torch.float32, place) + 1e6
    found = implementation_of(torch.ops.aten._log_softmax.default)(z, 1, False)
    torch.testing.assert_close(found.double(), torch.log_softmax(z.double(), 1), rtol=1e-6, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4, 5), "channels-last"])
def test_batch_norm_and_its_backward(place: str, dtype: torch.dtype, training: bool, shape: Any) -> None:
    size = (2, 3, 4, 5) if shape == "channels-last" else shape
    x, dy = values(size, dtype, place), values(size, dtype, place, 1)
    if shape == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    acc = torch.float64 if dtype is torch.float64 else torch.float32
    weight, bias, mean = (values((3,), acc, place, seed) for seed in (2, 3, 4))
    running = mean.clone(), mean.abs() + 1
    exact = [t.double().cpu() for t in running]
    forward, backward = (torch.ops.aten.native_batch_norm.default, torch.ops.aten.native_batch_norm_backward.default)

    found = implementation_of(forward)(x, weight, bias, *running, training, 0.3, 1e-5)
    wide = [t.double().cpu() for t in (x, weight, bias)]
    y, *saved = forward(*wide, *exact, training, 0.3, 1e-5)
    if not training:  # as on CUDA; on the CPU PyTorch gives none
        saved = [exact[0], (exact[1] + 1e-5).rsqrt()]
    close(found, (y, *saved), dtype)
    close(running, exact, acc)
    assert found[0].dtype == dtype
    assert found[1].dtype == found[2].dtype == acc
    assert found[0].stride() == x.stride()

    for mask in ([True, True, True], [True, False, False]):
        wanted = backward(dy.double().cpu(), wide[0], wide[1], *exact, *saved, training, 1e-5, mask)
        got = implementation_of(backward)(dy, x, weight, *running, *found[1:], training, 1e-5, mask)
        close(got, wanted, dtype)


def test_no_implementation_names_a_stream() -> None:
    """BackendBench scores a function 0 where its source does."""
    assert not [path for path in OPERATORS.rglob("*.py") if "Stream" in path.read_text()]
