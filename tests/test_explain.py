"""`hw3gpu.explain`: what a call does, said by what does it."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import json

import numpy as np
import pytest
import torch

import hw3gpu
import hw3gpu.functional as HF
from benchmarks.ledger import ledger
from hw3gpu import _explain, explain, use_backend
from hw3gpu.__main__ import main
from hw3gpu._cli.standard_calls import standard_calls
from hw3gpu._core import arrays, dispatch, record
from hw3gpu._torch import batch_norm, bound_launches
from hw3gpu.kernels.cpu import batch_norm as cpu_batch_norm
from hw3gpu.kernels.cpu import channel_plan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CALLS = standard_calls(images=(4, 8, 6, 6), logits=(12, 40), m=8)
WITHOUT_KERNELS = {
    "hw3gpu.conv2d_output_shape", "hw3gpu.conv2d_padding_for", "hw3gpu.conv_transpose2d_output_shape",
    "hw3gpu.cross_entropy", "hw3gpu.empty_cache", "hw3gpu.explain", "hw3gpu.minimize_trace", "hw3gpu.minor_components",
    "hw3gpu.patch_transformers", "hw3gpu.points_with_moments", "hw3gpu.use_backend", "hw3gpu.functional.check_targets",
    "hw3gpu.functional.minimize_trace",
}  # fmt: skip


def name_of(call):
    module = "hw3gpu.functional" if getattr(HF, call.function.__name__, None) is call.function else "hw3gpu"
    return f"{module}.{call.function.__name__}"


def placed(x, device):
    """An array on the device of the leg: NumPy's are tensors there."""
    if device == "cpu" or not isinstance(x, (np.ndarray, torch.Tensor)):
        return x
    return torch.as_tensor(x, device=device)


# ---------------------------------------------------------------------------------------------- every function
def test_every_public_function_has_a_standard_call():
    public = {
        f"{module.__name__}.{name}"
        for module in (hw3gpu, HF)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    }
    assert {name_of(call) for call in CALLS} == public


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_every_public_function_is_explained(call, device):
    args = [placed(x, device) for x in call.args]
    found = explain(call.function, *args, **{name: placed(x, device) for name, x in call.kwargs.items()})
    engine = dispatch.requested_backend()
    assert found.function == name_of(call)
    assert found.path
    assert f"{found}".startswith(f"{found.function}: ")
    json.dumps(dataclasses.asdict(found))
    if found.function in WITHOUT_KERNELS:
        assert (found.engine, found.launches, found.bytes_read) == (None, (), 0)
        assert "nothing chooses an engine" in str(found)
        return
    assert found.engine == engine
    assert found.why == f"use_backend({engine!r})"
    assert found.launches
    assert all(launch.kernel.startswith(f"{engine}.") for launch in found.launches)
    assert all(launch.plan is not None for launch in found.launches) or engine == "cpu"
    # at least what comes in is read and what comes out is written
    largest = max(x.nbytes for x in args if isinstance(x, (np.ndarray, torch.Tensor)))
    assert found.bytes_read >= (0 if "linear" in found.function else largest)
    assert found.bytes_written > 0
    assert found.copies == ()


# ---------------------------------------------------------------------------------------------- it is what runs
def test_the_plan_is_the_one_that_runs(monkeypatch):
    """Another plan for the launcher is another one in the explanation: the same object."""
    other = channel_plan.BatchNormPlan(channel_plan.Pass("planes", 2, (4,)))
    monkeypatch.setattr(channel_plan, "plan_forward", lambda *layout: other)
    x = np.random.default_rng(0).standard_normal((4, 8, 6, 6))
    (launch,) = explain(hw3gpu.batch_norm, x).launches
    assert launch.plan is other.whole
    assert launch.kernel == "cpu._batch_norm.planes.forward"
    assert (launch.grid.blocks, launch.grid.threads) == (2, 1)


def test_the_call_runs_once_with_what_it_does():
    x, mean, var = torch.randn(4, 8, 6, 6), torch.zeros(8), torch.ones(8)
    explain(HF.batch_norm, x, mean, var, training=True, momentum=0.5)
    torch.testing.assert_close(mean, 0.5 * x.mean((0, 2, 3)))


def test_threads_are_those_that_run(monkeypatch):
    monkeypatch.setattr(dispatch.threads, "_setting", 3)
    (launch,) = explain(hw3gpu.softmax, np.zeros((1024, 1024), np.float32)).launches
    assert (launch.grid.blocks, launch.grid.threads, launch.grid.pieces) == (1024, 3, 12)
    assert "1024 blocks on 3 threads, in 12 pieces" in str(launch)


@pytest.mark.parametrize("V", [40, 40000])
@pytest.mark.interpreter
def test_bytes_are_what_the_triton_kernels_ask_for(V, device):
    """What the interpreter counts, of rows that fit one program and of rows that do not."""
    z, target = torch.randn(3, V), torch.randint(V, (3,))
    with ledger(z=z) as book:
        found = explain(HF.softmax, z, 1)
    assert sum(book.asked.values()) == found.bytes_read
    assert found.bytes_written == z.nbytes
    assert (found.bytes_read > z.nbytes) == (V > 32768)
    with ledger(z=z, target=target) as book:
        found = explain(HF.token_log_probs, z, target)
    assert sum(book.asked.values()) == found.bytes_read + 3 * 4  # and each row's logit of its class


@pytest.mark.parametrize("shape", [(4, 8, 6, 6), (2, 3, 120, 120)])
@pytest.mark.interpreter
def test_bytes_of_batch_normalisation_are_what_the_triton_kernels_ask_for(shape, device):
    x, dy = torch.randn(shape), torch.randn(shape)
    with ledger(x=x, dy=dy) as book:
        found = explain(HF.batch_norm, x, None, None, training=True, residual=dy)
    # and a value of each tile, about which it is summed
    assert found.bytes_read <= sum(book.asked.values()) <= 1.01 * found.bytes_read
    assert found.bytes_written == x.nbytes


@pytest.mark.interpreter
@pytest.mark.parametrize("m", [12, 40])
def test_bytes_of_moments_are_what_the_triton_kernels_ask_for(m, device):
    """Twice for the rows and twice for the columns of each tile of the triangle of the covariance."""
    x = torch.randn(30, m, dtype=torch.float64)
    with ledger(x=x) as book:
        found = explain(hw3gpu.moments, x)
    assert sum(book.asked.values()) == sum(nbytes for name, nbytes, _ in found.launches[0].reads if name == "x")


def test_the_example_of_the_docstring_is_what_is_printed():
    found = doctest.DocTestFinder().find(explain, globs={"np": np, "hw3gpu": hw3gpu})
    assert [doctest.DocTestRunner().run(example) for example in found] == [doctest.TestResults(0, 2)]


# ---------------------------------------------------------------------------------------------- why
def test_who_chose_the_engine(monkeypatch):
    z = np.zeros((2, 3))
    monkeypatch.delenv("HW3GPU_BACKEND", raising=False)
    assert explain(hw3gpu.softmax, z).why == "by where the arrays live"
    with use_backend("cpu"):
        assert explain(hw3gpu.softmax, z).why == "use_backend('cpu')"
    monkeypatch.setenv("HW3GPU_BACKEND", "cpu")
    assert explain(hw3gpu.softmax, z).why == "HW3GPU_BACKEND=cpu"


def test_copies_are_named():
    x = np.random.default_rng(0).standard_normal((4, 5, 6, 7)).astype(np.float32)
    assert explain(hw3gpu.softmax, x, 1).copies == ()
    assert explain(hw3gpu.softmax, x[:, ::2], 1).copies == ()
    folded = explain(hw3gpu.softmax, x.swapaxes(2, 3), 1)  # no one stride walks its two inner axes
    assert folded.copies == ("z 3.3 KiB for cpu.softmax._forward_rows",)
    assert "z 3.3 KiB (a copy)" in str(folded)
    cast = explain(HF.softmax, torch.zeros(3, 4), 1, dtype=torch.float64)
    assert cast.copies == ("z 96 B for cpu.softmax._forward_rows",)


# ---------------------------------------------------------------------------------------------- paths
def test_small_calls_by_address():
    found = explain(HF.batch_norm, torch.randn(4, 8, 6, 6), None, None, training=True)
    assert found.path == ("kernels by address, without views: a plain float32 call on the host",)
    assert [(launch.kernel, launch.reads) for launch in found.launches] == [
        ("cpu.batch_norm_small._forward", (("x", 4608, "argument input"),))
    ]
    z = torch.randn(8, 10, requires_grad=True)
    loss = explain(HF.cross_entropy, z, torch.arange(8))
    assert loss.path == found.path
    assert loss.bytes_read == loss.bytes_written == 320


def test_transforms_take_the_formula():
    seen = []

    def function(z):
        seen.append(explain(HF.softmax, z, 0))
        return HF.softmax(z, 0).sum()

    torch.func.grad(function)(torch.randn(5))
    (found,) = seen
    assert found.launches == ()
    assert found.path[0].startswith("the formula in PyTorch's operations")


def test_tracers_take_the_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Looks():
        found = explain(HF.softmax, torch.randn(4, 5), 1)
    assert found.path[0].startswith("operators of torch.library")
    assert [launch.kernel for launch in found.launches] == ["cpu.softmax._forward_rows"]


def test_a_later_call_on_a_gpu_has_bound_launches(monkeypatch):
    """Host tensors stand for those on a GPU, under a driver that launches nothing."""
    from benchmarks.evidence.compile_without_gpu import StandIn

    monkeypatch.setattr(arrays, "on_host", lambda x: False)
    monkeypatch.setattr(batch_norm, "by_address", lambda *args: None)
    monkeypatch.setattr(bound_launches, "_kept", {})
    x = torch.zeros(8, 64, 16, 16)
    with StandIn(90):
        first, later = (explain(HF.batch_norm, x, None, None, training=True) for _ in range(2))
    assert first.path == ("launchers on views of the arrays",)
    assert later.path == ("bound launches: those of an earlier call of the same shapes, strides, dtypes and options",)
    assert first.launches[0].plan is later.launches[0].plan is not None
    assert (first.bytes_read, first.bytes_written) == (later.bytes_read, later.bytes_written) == (x.nbytes, x.nbytes)
    assert first.launches[0].reads == (("x", x.nbytes, "argument input"),)
    assert later.launches[0].reads == (("x", x.nbytes, None),)
    assert later.engine == "gpu"


def test_a_later_small_call_on_the_host_has_bound_launches(monkeypatch):
    monkeypatch.setattr(bound_launches, "_kept", {})
    z, other = torch.zeros(32, 10), torch.ones(32, 10)
    first, later = explain(HF.softmax, z, 1), explain(HF.softmax, other, 1)
    assert first.path == ("launchers on views of the arrays",)
    assert later.path == ("bound launches: those of an earlier call of the same shapes, strides, dtypes and options",)
    assert first.launches == later.launches
    assert later.launches[0].reads == (("z", z.nbytes, "argument input"),)
    assert later.engine == "cpu"


# ---------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("function", "got"),
    [(3, r"3 \(int\)"), ("softmax", r"'softmax' \(str\)"), (torch.relu, r"relu \(builtin"), (len, r"len \(builtin"),
     ([], r"\[\] \(list\)"), (cpu_batch_norm.forward, r"forward \(function\)"), (hw3gpu.BatchNorm, r"BatchNorm \(type\)")],
)  # fmt: skip
def test_what_is_no_public_function_is_refused(function, got):
    with pytest.raises(
        TypeError, match=rf"^function: expected a public function of hw3gpu or hw3gpu.functional, .*got .*{got}"
    ):
        explain(function)


def test_a_functions_own_errors_pass_and_nothing_stays_behind():
    with pytest.raises(TypeError, match="z: expected a NumPy, CuPy or torch array"):
        explain(hw3gpu.softmax, [1.0])
    with pytest.raises(TypeError, match=r"softmax\(\) missing 1 required positional argument: 'z'"):
        explain(hw3gpu.softmax)
    with pytest.raises(IndexError, match="dim: expected an axis"):
        explain(HF.softmax, torch.zeros(3), 7)
    explain(hw3gpu.softmax, np.zeros(3))
    assert record._open.get() is None
    assert dispatch.threads.observer.get() is None


def test_the_memory_of_a_tensor_is_its_storage():
    """Also where NumPy cannot look at it, for its dtype or its gradient."""
    for x in (torch.zeros(8, dtype=torch.bfloat16), torch.zeros(4, requires_grad=True)):
        assert record._span(x[1:3]) == record._span(x) == (x.data_ptr(), x.data_ptr() + 16)


def test_sizes_are_said_in_the_largest_unit_that_they_fill():
    sizes = {1023: "1023 B", 1024: "1.0 KiB", 1 << 20: "1.0 MiB", (1 << 30) - 1: "1024.0 MiB", 3 << 29: "1.5 GiB"}
    assert {n: _explain._size(n) for n in sizes} == sizes


# ---------------------------------------------------------------------------------------------- the command
def test_info_explains_every_function(capsys):
    assert main(["info", "--json", "--explain"]) == 0
    found = json.loads(capsys.readouterr().out)["explain"]
    assert set(found) == {name_of(call) for call in CALLS}
    assert found["hw3gpu.softmax"]["launches"][0]["kernel"] == "cpu.softmax._forward_rows"
