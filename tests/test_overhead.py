"""What a call costs above the launchers: the operations of PyTorch that it asks for, which take most of that time.

Counted on the way that CUDA tensors take, on `meta` tensors under a stand-in driver, with launchers that do nothing.
"""

from __future__ import annotations

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hw3gpu.functional as HF
from benchmarks.inside_triton import StandIn
from hw3gpu import _arrays, _ops


@pytest.fixture(autouse=True)
def no_launches(monkeypatch):
    def nothing(*operands, **options):
        """In the place of each launcher."""

    names = ("forward", "backward", "forward_backward", "count", "reduce", "normalize", "inference_backward")
    launchers = types.SimpleNamespace(mask_size=lambda x: 64, **dict.fromkeys(names, nothing))
    monkeypatch.setattr(_arrays, "kernels", lambda room, which: launchers)
    monkeypatch.setattr(_ops, "dispatch_modes", lambda: 0)  # that of these tests is none that traces
    with StandIn(90):
        yield


class Counted(TorchDispatchMode):
    """Keeps the names of the operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation.overloadpacket).removeprefix("aten."))
        return operation(*args, **(kwargs or {}))


def operations(call):
    """The result of `call`, and the operations of PyTorch that it takes."""
    with Counted() as counted:
        return call(), counted.names


def meta(*shape, dtype=torch.float32, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)


def norm(**options):
    C = 16
    x, weight, bias, running = meta(8, C, 6, 6, grad=True), meta(C, grad=True), meta(C, grad=True), (meta(C), meta(C))
    return (x, weight, bias), lambda: HF.batch_norm(x, *running, weight, bias, **options)


def loss(**options):
    z, target = meta(8, 16, grad=True), meta(8, dtype=torch.int64)
    return (z,), lambda: HF.cross_entropy(z, target, **options)


def probabilities(*shape):
    z = meta(*shape, grad=True)
    return (z,), lambda: HF.softmax(z, 1)


# forward and backward; the flag of wrong classes (`full`) is made once for a GPU, and for a result that is kept there is a
# `detach` each way, PyTorch's own
CALLS = {
    "softmax": (probabilities(8, 16), 4, 5),
    "softmax of three axes": (probabilities(8, 16, 5), 2, 2),
    "cross entropy": (loss(), 8, 5),
    "cross entropy, gradient in the forward pass": (loss(gradient="forward"), 10, 5),
    "cross entropy of rows": (loss(reduction="none"), 6, 5),
    "batch norm": (norm(training=True), 6, 7),
    "batch norm, evaluation": (norm(training=False), 8, 7),
    "batch norm and relu": (norm(training=True, activation="relu"), 7, 7),
}


@pytest.mark.parametrize(("made", "forward", "backward"), CALLS.values(), ids=list(CALLS))
def test_no_more_operations_than_today(made, forward, backward):
    inputs, call = made
    result, asked = operations(call)
    assert len(asked) <= forward, asked
    upstream = torch.ones_like(result)
    _, asked = operations(lambda: torch.autograd.grad(result, inputs, upstream))
    assert len(asked) <= backward, asked


def test_an_operation_more_is_seen():
    x = meta(8, 16)
    assert operations(lambda: HF.softmax(x, 1))[1] == ["empty_like", "view", "view"]
    assert operations(lambda: HF.softmax(x, 1) + 1)[1][-1] == "add"
