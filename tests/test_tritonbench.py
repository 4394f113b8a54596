"""The files for tritonbench: registered and run as it does, beside their baselines.

The stand-ins are after tritonbench/utils/triton_op.py and the `operator.py` of the three operators (meta-pytorch/tritonbench).
"""

from __future__ import annotations

import argparse
import enum
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).resolve().parent.parent / "integrations" / "tritonbench"


class Mode(enum.Enum):
    FWD, BWD, FWD_BWD, FWD_NO_GRAD = "fwd", "bwd", "fwd_bwd", "fwd_no_grad"


class Registry:
    """What tritonbench knows of operators: by name, their implementations, baselines, metrics and labels."""

    def __init__(self) -> None:
        self.benchmarks: dict[str, dict[str, dict[str, Any]]] = {}
        self.baselines: dict[str, str] = {}
        self.metrics: dict[str, list[str]] = {}
        self.labels: dict[str, str] = {}

    def register_benchmark(
        self, operator_name=None, func_name=None, baseline=False, enabled=True, fwd_only=False, label=None, tags=None, cls=None
    ):
        def decorator(function):
            operator, name = operator_name or _operator_of(function), func_name or function.__name__
            self.benchmarks.setdefault(operator, {})[name] = {"enabled": enabled, "fwd_only": fwd_only, "tags": tags}
            if baseline:
                self.baselines[operator] = name

            def inner(self, *args, **kwargs):  # as there, without the function's name
                return function(self, *args, **kwargs)

            if cls:
                setattr(cls, name, inner)
            return inner

        return decorator

    def register_metric(self, skip_baseline=False, x_only=False):
        return lambda function: self.metrics.setdefault(_operator_of(function), []).append(function.__name__) or function

    def register_x_val(self, label="x_val"):
        return lambda function: self.labels.__setitem__(_operator_of(function), label) or function


def _operator_of(function: Callable[..., Any]) -> str:
    _, found, rest = function.__module__.partition("tritonbench.operators.")
    assert found, "tritonbench takes an operator's name from the path of its module"
    return rest.partition(".")[0]


class Latency:
    """Times of several calls, in milliseconds; as a number it is their median."""

    def __init__(self, times: list[float]) -> None:
        self.times = sorted(times)

    def __rtruediv__(self, other: float) -> float:
        return other / self.times[(len(self.times) - 1) // 2]


class PostInit(type):
    def __call__(cls, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        made.available_inputs = sum(1 for _ in made.get_input_iter()) if hasattr(cls, "get_input_iter") else 0
        return made


class BenchmarkOperator(metaclass=PostInit):
    """It counts the inputs when the operator has been made, and marks each function it is given with its name."""

    device = "cpu"
    DEFAULT_PRECISION = "bypass"
    extra_args: tuple[str, ...] = ()

    def __init__(self, tb_args: argparse.Namespace, extra_args: list[str] | None = None) -> None:
        self.mode, self.device, self.extra_args = Mode(tb_args.mode), tb_args.device, extra_args
        self.dtype = getattr(torch, tb_args.precision)

    def backward_of(self, forward: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Callable[[], list]:
        """`get_bwd_fn`: backward again and again over one graph."""
        forward._name = "backward"  # type: ignore[attr-defined]
        y = forward()
        dy = 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)

        def backward() -> list[torch.Tensor]:
            leaves = [t for t in inputs if t.requires_grad]
            for t in leaves:
                t.grad = None
            y.backward(dy, retain_graph=True)
            return [t.grad.clone() for t in leaves]

        return backward


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Modules in the place of tritonbench's."""
    registry = Registry()
    triton_op = ModuleType("tritonbench.utils.triton_op")
    triton_op.__dict__.update(
        Mode=Mode, BenchmarkOperator=BenchmarkOperator, BenchmarkOperatorMetrics=SimpleNamespace,
        register_benchmark=registry.register_benchmark, register_metric=registry.register_metric,
        register_x_val=registry.register_x_val,
    )  # fmt: skip
    for name in ("tritonbench", "tritonbench.utils", "tritonbench.operators"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, triton_op.__name__, triton_op)
    monkeypatch.delitem(sys.modules, "hw3gpu_benchmarks", raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    return registry


def held(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def compare(operator: Any, registry: Registry, name: str, inputs: tuple[torch.Tensor, ...]) -> list[str]:
    """Every implementation that is enabled beside the baseline, forward and twice backward; gives their names."""
    baseline = getattr(operator, registry.baselines[name])(*inputs)
    gradients = operator.backward_of(baseline, inputs)()
    ran = []
    for method, settings in registry.benchmarks[name].items():
        if settings["enabled"] and not method.startswith("torch_compile"):
            forward = getattr(operator, method)(*inputs)
            held(forward(), baseline())
            backward = operator.backward_of(forward, inputs)
            for _ in range(2):
                for got, wanted in zip(backward(), gradients, strict=True):
                    held(got, wanted)
            ran.append(method)
    return ran


# ---------------------------------------------------------------------------------------------- the three methods
def made(*shape: int, device: str, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device).requires_grad_(grad)


BASELINES = {
    "cross_entropy": (lambda self, input, target: lambda: F.cross_entropy(input, target.long())),
    "fused_linear_cross_entropy": (lambda self, x, weight, target: lambda: F.cross_entropy(F.linear(x, weight), target)),
    "softmax": (lambda self, x: lambda: F.softmax(x, dim=1)),
}


@pytest.mark.parametrize("name", BASELINES)
def test_method_is_given_to_its_operator_and_agrees(
    name: str, registry: Registry, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--plugin hw3gpu_benchmarks.register` does it, while the operator is made."""
    module = ModuleType(f"tritonbench.operators.{name}.operator")
    module.Operator = type("Operator", (BenchmarkOperator,), {})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registry.register_benchmark(name, "baseline", baseline=True, cls=module.Operator)(BASELINES[name])
    plugin, _, function = "hw3gpu_benchmarks.register".rpartition(".")
    for _ in range(2):  # once an operator that is made
        getattr(importlib.import_module(plugin), function)()
    assert set(registry.benchmarks) == {name}  # no operator that is not loaded
    target = torch.tensor([3, 0, 7, 1, 7, 2], device=device)
    inputs = {
        "cross_entropy": lambda: (made(6, 9, device=device), target),
        "fused_linear_cross_entropy": lambda: (made(6, 4, device=device), made(9, 4, device=device), target),
        "softmax": lambda: (made(6, 9, device=device),),
    }[name]()
    operator = module.Operator(argparse.Namespace(mode="fwd", device=device, precision="float32"))
    ran = compare(operator, registry, name, inputs)
    assert ran == ["baseline", importlib.import_module(plugin).METHODS[name].__name__]


# ---------------------------------------------------------------------------------------------- the new operator
@pytest.fixture
def batch_norm(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`batch_norm/` where it belongs, in tritonbench/operators."""
    name = "tritonbench.operators.batch_norm"
    spec = importlib.util.spec_from_file_location(
        name, FOLDER / "batch_norm" / "__init__.py", submodule_search_locations=[str(FOLDER / "batch_norm")]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, f"{name}.operator", raising=False)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layout", [[], ["--channels-last"]])
def test_batch_norm_agrees_with_its_baseline(
    batch_norm: ModuleType, registry: Registry, device: str, layout: list[str]
) -> None:
    settings = argparse.Namespace(mode="fwd_bwd", device=device, precision="float32")
    operator = batch_norm.Operator(settings, ["--N", "3", "--C", "4", "--H", "5", *layout])
    (inputs,) = operator.get_input_iter()
    assert operator.get_x_val(inputs) == (3, 4, 5, 5)
    assert inputs[0].is_contiguous(memory_format=torch.channels_last) == bool(layout)
    assert operator.get_grad_to_none(inputs) == list(inputs)
    assert compare(operator, registry, "batch_norm", inputs) == ["torch_batch_norm", "hw3gpu_batch_norm"]
    assert registry.metrics == {"batch_norm": ["gbps"]}
    assert registry.labels == {"batch_norm": "(N, C, H, W)"}
    # 5 passes over 300 numbers of 4 bytes in 6 µs are 1 GB/s
    assert operator.gbps(None, inputs, SimpleNamespace(latency=Latency([6e-3, 5e-3, 9e-3]))) == pytest.approx(1.0)


def test_batch_norm_without_arguments_has_the_shapes_of_resnet_50(batch_norm: ModuleType, registry: Registry) -> None:
    operator = batch_norm.Operator(argparse.Namespace(mode="fwd_no_grad", device="meta", precision="bfloat16"), [])
    inputs = list(operator.get_input_iter())
    assert len(inputs) == operator.available_inputs == 9
    assert inputs[0][0].shape == (128, 64, 112, 112)
    assert not any(t.requires_grad for of in inputs for t in of)
    assert {t.dtype for of in inputs for t in of} == {torch.bfloat16}
    with pytest.raises(ValueError, match="both or neither"):
        batch_norm.Operator(argparse.Namespace(mode="fwd", device="meta", precision="float32"), ["--C", "4"])
