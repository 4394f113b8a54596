"""Few programs for many rows, on a device of one multiprocessor: rows taken in turn, and upstream gradients looked over."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hw3gpu.kernels.gpu import cross_entropy, device, softmax

pytestmark = pytest.mark.interpreter

OPTIONS = {"ignore_index": -100, "label_smoothing": 0.0}
CASES = [
    pytest.param(8192, torch.float32, id="V=8192 float32"),
    pytest.param(8191, torch.bfloat16, id="V=8191 bfloat16"),
    pytest.param(20000, torch.bfloat16, id="V=20000 bfloat16"),
]


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch):
    monkeypatch.setattr(device, "ABSENT", dataclasses.replace(device.H100, multiprocessors=1))


def logits(N, V, dtype):
    return (3 * torch.randn(N, V, 1, generator=torch.Generator().manual_seed(V))).to(dtype)


def close(x, exact, dtype):
    rtol, atol = (2**-8, 1e-6) if dtype == torch.bfloat16 else (1e-5, 1e-7)
    torch.testing.assert_close(x.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("V", "dtype"), CASES)
def test_softmax(V, dtype):
    z, dy = logits(7, V, dtype), logits(7, V, dtype).flip(0)
    y, dz = torch.empty_like(z), torch.empty_like(z)
    softmax.forward(z, y)
    close(y, torch.softmax(z.double(), 1), dtype)
    softmax.backward(dy, y, dz)
    exact = y.double() * (dy.double() - (y.double() * dy.double()).sum(1, keepdim=True))
    close(dz, exact, dtype)


@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
@pytest.mark.parametrize(("V", "dtype"), CASES)
def test_loss_and_gradient(V, dtype, in_place):
    """A program's rows are of all kinds: ignored, out of range, near p = 1; the gradient may take the place of the logits."""
    z = logits(8, V, dtype)
    z[3, 17] = 200.0
    target = torch.tensor([0, V - 1, -100, 17, V // 2, -100, V, 5])[:, None]
    x = z.double().requires_grad_()
    exact = F.cross_entropy(x[..., 0], target[:, 0].where(target[:, 0] != V, -100), reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum() / 4, x)
    gradient[6], exact = torch.nan, exact.detach().index_fill(0, torch.tensor(6), torch.nan)
    loss, stats, invalid = torch.empty(8, 1), torch.empty(3, 8, 1), torch.full((1,), 8)
    dz = z if in_place else torch.empty_like(z)
    cross_entropy.forward_backward(
        z, target, None, loss, dz, invalid, stats=stats, denominator=torch.full((1,), 4.0), **OPTIONS
    )  # fmt: skip
    assert int(invalid) == 6
    torch.testing.assert_close(loss[:, 0].double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(dz.double(), gradient, rtol=rtol, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("V", [3000, 1001, 10])
def test_rows_with_another_upstream_gradient_are_written_again(V):
    """Eight programs: several rows each, and one that has no other upstream gradient leaves its rows alone."""
    N = 700 if V == 10 else 40
    z, target = logits(N, V, torch.float32), torch.arange(N)[:, None] % V
    upstream = torch.ones(N, 1)
    upstream[[0, 13, N - 1]] = torch.tensor([0.5, 0.0, -2.0])[:, None]
    loss, stats, invalid, dz = torch.empty(N, 1), torch.empty(3, N, 1), torch.full((1,), N), torch.full_like(z, 7.0)
    cross_entropy.forward(z, target, None, loss, stats, invalid, **OPTIONS)
    cross_entropy.backward(z, target, None, stats, upstream, None, dz, unless_one=True, **OPTIONS)
    x = z.double().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(x[..., 0], target[:, 0], reduction="sum"), x)
    exact = torch.where(upstream[:, None] == 1, 7.0, gradient * upstream[:, None].double())
    close(dz, exact, torch.float32)
