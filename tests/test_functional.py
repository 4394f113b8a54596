"""What holds for every function of `hw3gpu.functional`."""

from __future__ import annotations

import pytest
import torch
from twins import tensor

import hw3gpu.functional as HF

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def call(name, x):
    if name == "batch_norm":
        return HF.batch_norm(x, None, None, training=True)
    if name == "softmax":
        return HF.softmax(x, 1)
    return HF.cross_entropy(x, torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), reduction="none")


FUNCTIONS = ["batch_norm", "softmax", "cross_entropy"]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitwise_repeatable(device, rng, name, dtype):
    x = tensor(rng.standard_normal((67, 5)), dtype, device, grad=True)
    first, again = (call(name, x) for _ in range(2))
    assert torch.equal(first, again)
    dy = torch.randn_like(first)
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (first, again)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_backward_over_the_same_graph_gives_the_same(device, rng, name):
    x = tensor(rng.standard_normal((5, 7)), "float32", device, grad=True)
    y = call(name, x)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(y, x, dy)[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_and_subclasses_are_tensors(device, rng, name):
    x = tensor(rng.standard_normal((5, 7)), "float32", device)

    class Named(torch.Tensor):
        pass

    expected = call(name, x)
    assert torch.equal(call(name, torch.nn.Parameter(x.clone())), expected)
    assert torch.equal(call(name, x.clone().as_subclass(Named)).as_subclass(torch.Tensor), expected)


SPARSE = {
    "sparse_coo": lambda: torch.eye(3).to_sparse(),
    "_mkldnn": lambda: torch.eye(3).to_mkldnn(),
    "nested": lambda: torch.nested.as_nested_tensor(torch.ones(1, 3, 3)),
}


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.filterwarnings("ignore:.*(Sparse|nested):UserWarning")
def test_only_dense_tensors_are_taken(layout):
    x, target = SPARSE[layout](), torch.arange(3)
    calls = (
        lambda: HF.batch_norm(x, None, None, training=True),
        lambda: HF.softmax(x, 1),
        lambda: HF.cross_entropy(x, target),
        lambda: HF.linear_cross_entropy(x, torch.ones(3, 3), target),
    )
    for call in calls:
        with pytest.raises(TypeError, match=f"input: expected a dense tensor, got one of layout {layout}"):
            call()
