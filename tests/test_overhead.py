"""What a call costs beside its launches: the operations of PyTorch that it asks for, which take most of that time.

Counted on the way that CUDA tensors take, on `meta` tensors under a stand-in driver: in a first call, and in those after it,
whose launches are kept.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hw3gpu.functional as HF
from benchmarks.evidence.compile_without_gpu import StandIn
from hw3gpu._torch import bound_launches, operators


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    monkeypatch.setattr(operators, "dispatch_modes", lambda: 0)  # that of these tests is none that traces
    monkeypatch.setattr(bound_launches, "_kept", {})
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


def loss(dtype=torch.float32, **options):
    z, target = meta(8, 16, dtype=dtype, grad=True), meta(8, dtype=torch.int64)
    return (z,), lambda: HF.cross_entropy(z, target, **options)


def probabilities(*shape):
    z = meta(*shape, grad=True)
    return (z,), lambda: HF.softmax(z, 1)


# forward and backward, of a first call and of those after it; the flag of wrong classes (`full`) is made once for a GPU, and
# for a result that is kept there is a `detach` each way, PyTorch's own
CALLS = {
    "softmax": (probabilities(8, 16), (7, 9), (2, 2)),
    "softmax of three axes": (probabilities(8, 16, 5), (3, 3), (2, 2)),
    "cross entropy": (loss(), (14, 10), (6, 1)),
    "cross entropy, gradient in the forward pass": (loss(gradient="forward"), (16, 10), (7, 2)),
    "cross entropy of halves": (loss(dtype=torch.bfloat16), (13, 10), (6, 1)),
    "cross entropy of rows": (loss(reduction="none"), (9, 10), (4, 1)),
    "batch norm": (norm(training=True), (7, 8), (2, 3)),
    "batch norm, evaluation": (norm(training=False), (9, 9), (5, 4)),
    "batch norm and relu": (norm(training=True, activation="relu"), (8, 8), (3, 3)),
}


@pytest.mark.parametrize(("made", "first", "later"), CALLS.values(), ids=list(CALLS))
def test_no_more_operations_than_today(made, first, later):
    inputs, call = made
    for forward, backward in (first, later):
        result, asked = operations(call)
        assert len(asked) <= forward, asked
        upstream = torch.ones_like(result)
        _, asked = operations(lambda: torch.autograd.grad(result, inputs, upstream))  # noqa: B023
        assert len(asked) <= backward, asked


def test_an_operation_more_is_seen():
    x = meta(8, 16)
    HF.softmax(x, 1)
    assert operations(lambda: HF.softmax(x, 1))[1] == ["empty_like"]
    assert operations(lambda: HF.softmax(x, 1) + 1)[1] == ["empty_like", "add"]
