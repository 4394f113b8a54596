"""`hw3gpu.functional.batch_norm` against the answer sheet and PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from twins import ACC, SINGLE, drawn, gradcheck, hold, layout_of, ones, same, tensor, values_of, zeros

import hw3gpu.functional as HF
import hw3gpu.nn as HN
from hw3gpu import _error_bounds, reference
from hw3gpu._core.dispatch import requested_backend
from measure import close

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


BATCHES = {
    "(N, C)": (7, 3),
    "(N, C, L)": (4, 6, 5),
    "7x7 planes": (2, 2, 7, 7),
    "5 axes": (2, 2, 2, 3, 2),
    "spatial size 1": (5, 2, 1, 1),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("batch", BATCHES, ids=list(BATCHES))
def test_batch_norm_training(device, rng, batch, layout):
    batch_norm_training(device, rng, BATCHES[batch], "float32", layout)


def test_batch_norm_training_of_every_dtype(device, rng, dtype):
    batch_norm_training(device, rng, (3, 2, 5, 5), dtype, "contiguous")


@pytest.mark.parametrize("offset", [1e4, 1e18])
def test_batch_norm_training_far_from_zero(device, rng, offset):
    batch_norm_training(device, rng, (3, 2, 5, 5), "float32", "contiguous", offset, spread=1.0 if offset == 1e4 else 1e17)


def batch_norm_training(device, rng, shape, dtype, layout, offset=0.5, spread=2.0):
    C, acc = shape[1], ACC[dtype]
    stats = SINGLE[acc]
    x = layout_of(tensor(offset + spread * rng.standard_normal(shape), dtype, device), layout).requires_grad_()
    dy = layout_of(tensor(rng.standard_normal(shape), dtype, device), layout)
    weight, bias = (tensor(rng.standard_normal(C), stats, device, grad=True) for _ in range(2))
    start = [rng.standard_normal(C).astype(stats), (rng.random(C) + 0.5).astype(stats)]
    running, theirs_running = ([tensor(v, stats, device) for v in start] for _ in range(2))
    start = [v.astype(np.float64) for v in start]

    y = HF.batch_norm(x, *running, weight, bias, True, 0.25, 1e-3)
    grads = torch.autograd.grad(y, (x, weight, bias), dy)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    leaf = x.detach().clone().requires_grad_()
    theirs_y = F.batch_norm(leaf, *theirs_running, weight, bias, True, 0.25, 1e-3)
    theirs = theirs_y, *torch.autograd.grad(theirs_y, (leaf, weight, bias), dy), *theirs_running

    x64, dy64, w64, b64 = map(values_of, (x, dy, weight, bias))
    sheet = reference.batch_norm(x64, w64, b64, eps=1e-3)
    m = x.numel() // C
    grad_sheet = reference.batch_norm_backward(dy64, x64, sheet.mean, sheet.var, w64, eps=1e-3)
    bound = _error_bounds.batch_norm(x64, w64, b64, eps=1e-3, dtype=stats)
    given = dy64, x64, sheet.mean, sheet.var, w64
    grad_bound = _error_bounds.batch_norm_backward(*given, eps=1e-3, dtype=stats, own_statistics=True)
    u = _error_bounds.unit_roundoff(stats)
    of_mean, of_var = 0.25 * bound.mean, 0.25 * bound.var * m / (m - 1)  # and three roundings of either
    mean, var = 0.25 * sheet.mean, 0.25 * sheet.var * m / (m - 1)
    expected = {
        "y": (y, sheet.y, dtype, bound.y),
        "dx": (grads[0], grad_sheet.dx, dtype, grad_bound.dx),
        "dweight": (grads[1], grad_sheet.dgamma, stats, grad_bound.dgamma),
        "dbias": (grads[2], grad_sheet.dbeta, stats, grad_bound.dbeta),
        "running_mean": (running[0], 0.75 * start[0] + mean, stats, of_mean + 3 * u * abs(0.75 * start[0]) + 3 * u * abs(mean)),
        "running_var": (running[1], 0.75 * start[1] + var, stats, of_var + 3 * u * (0.75 * start[1] + var)),
    }
    for (name, (ours, value, of, allowed)), by_torch in zip(expected.items(), theirs, strict=True):
        hold(name, ours, value, of, by_torch, allowed)


# where in a channel of m values, and what
SPOILT = (
    lambda m: {m // 2: math.inf},
    lambda m: {m - 1: -math.inf},
    lambda m: {0: math.inf},
    lambda m: {0: math.inf, m - 1: -math.inf},
    lambda m: {1: math.nan, 2: math.inf},
    lambda m: dict.fromkeys(range(m), math.inf),
    lambda m: {},
)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "processors"),
    [((9, 7), "contiguous", "float64", 132), ((4, 7, 3, 5), "channels-last", "float32", 132),
     ((4, 7, 3, 5), "sliced", "float32", 132), ((2, 7, 9000), "contiguous", "float16", 132),
     ((2, 7, 9000), "contiguous", "float16", 1)],
    ids=["(N, C)", "channels-last", "sliced", "split", "looped"],
)  # fmt: skip
def test_batch_norm_of_infinities_is_torchs(device, rng, monkeypatch, shape, layout, dtype, processors):
    """A mean is infinite where its values are, and NaN where both infinities or a NaN are; so are running statistics."""
    if requested_backend() == "gpu":
        from hw3gpu.kernels.gpu.device import H100

        small = replace(H100, multiprocessors=processors)
        monkeypatch.setattr("hw3gpu.kernels.gpu.batch_norm.device_of", lambda x: small)
    values = rng.standard_normal((shape[1], math.prod(shape) // shape[1]))
    for channel, spoilt in zip(values, SPOILT, strict=True):
        for at, value in spoilt(channel.size).items():
            channel[at] = value
    values = values.reshape(shape[1], shape[0], *shape[2:]).swapaxes(0, 1)
    x = layout_of(tensor(values, dtype, device), layout)
    kinds = SINGLE[ACC[dtype]], "float64"
    running, theirs_running = ([tensor(v, of, device) for v in (np.zeros(7), np.ones(7))] for of in kinds)
    y = HF.batch_norm(x, *running, training=True)
    theirs = F.batch_norm(x.double(), *theirs_running, training=True)
    for ours, expected, bound in zip((*running, y), (*theirs_running, theirs), (1e-6, 1e-6, 1e-2), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("shape", [(6, 3), (1, 3), (2, 3, 7, 7), (1, 3, 1, 1)], ids=str)
def test_batch_norm_evaluation(device, rng, shape, dtype):
    """By the running statistics: one value per channel is enough, and they stay as they are."""
    C, stats = 3, SINGLE[ACC[dtype]]
    x = tensor(1.0 + rng.standard_normal(shape), dtype, device, grad=True)
    dy = tensor(rng.standard_normal(shape), dtype, device)
    weight, bias = (tensor(rng.standard_normal(C), stats, device, grad=True) for _ in range(2))
    running = tensor(rng.standard_normal(C), stats, device), tensor(rng.random(C) + 0.5, stats, device)
    kept = [v.clone() for v in running]

    y = HF.batch_norm(x, *running, weight, bias)
    theirs = F.batch_norm(x, *running, weight, bias)
    theirs_grads = torch.autograd.grad(theirs, (x, weight, bias), dy)
    for v, k in zip(running, kept, strict=True):
        assert torch.equal(v, k)
        v.fill_(math.nan)  # the backward has what it needs
    grads = torch.autograd.grad(y, (x, weight, bias), dy)

    given = [values_of(v) for v in (x, *kept, weight, bias)]
    bound = _error_bounds.batch_norm_inference(*given, eps=1e-5, dtype=stats)
    hold("y", y, reference.batch_norm_inference(*given, eps=1e-5), dtype, theirs, bound)
    back = reference.batch_norm_inference_backward(values_of(dy), *given[:4], eps=1e-5)
    bounds = _error_bounds.batch_norm_inference_backward(values_of(dy), *given[:4], eps=1e-5, dtype=stats)
    hold("dx", grads[0], back.dx, dtype, theirs_grads[0], bounds.dx)
    hold("dweight", grads[1], back.dgamma, stats, theirs_grads[1], bounds.dgamma)
    hold("dbias", grads[2], back.dbeta, stats, theirs_grads[2], bounds.dbeta)


@drawn
@given(data=st.data())
def test_batch_norm_is_torchs(device, data):
    """Every combination of arguments that PyTorch takes means the same here."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    N, C = data.draw(st.integers(0, 4), "N"), data.draw(st.integers(1, 3), "C")
    shape = (N, C, *data.draw(st.sampled_from([(), (1,), (3,), (2, 3), (1, 2, 2)]), "spatial"))
    training = data.draw(st.booleans(), "training")
    if training and N * math.prod(shape[2:]) == 1:
        shape = (2, *shape[1:])
    tracked = data.draw(st.booleans(), "tracked") or not training
    affine = data.draw(st.sampled_from(["weight and bias", "weight", "bias", "neither"]), "affine")
    eps, momentum = data.draw(st.sampled_from([1e-5, 0.1]), "eps"), data.draw(st.sampled_from([0.0, 0.1, 1.0]), "momentum")
    layout = data.draw(st.sampled_from(["contiguous", "channels-last", "sliced"]), "layout")

    x = layout_of(tensor(rng.standard_normal(shape), "float64", device), layout)
    dy = layout_of(tensor(rng.standard_normal(shape), "float64", device), layout)
    weight = tensor(rng.standard_normal(C), "float64", device) if "weight" in affine else None
    bias = tensor(rng.standard_normal(C), "float64", device) if "bias" in affine else None
    running = [tensor(rng.random(C) + 0.5, "float64", device) if tracked else None for _ in range(2)]

    results = []
    for function in (HF.batch_norm, F.batch_norm):
        own = [None if v is None else v.clone() for v in running]
        leaves = [None if v is None else v.detach().clone().requires_grad_() for v in (x, weight, bias)]
        y = function(leaves[0], *own, leaves[1], leaves[2], training, momentum, eps)
        results.append([y, *own, *torch.autograd.grad(y, [v for v in leaves if v is not None], dy)])
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs)


def test_batch_norm_gradcheck(device, rng):
    x = tensor(rng.standard_normal((3, 2, 4)), "float64", device, grad=True)
    weight, bias = (tensor(rng.standard_normal(2), "float64", device, grad=True) for _ in range(2))
    mean, var = tensor(rng.standard_normal(2), "float64", device), tensor(rng.random(2) + 0.5, "float64", device)
    gradcheck(lambda *a: HF.batch_norm(a[0], None, None, a[1], a[2], True), (x, weight, bias))
    gradcheck(lambda *a: HF.batch_norm(a[0], mean, var, a[1], a[2]), (x, weight, bias))


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)], ids=str)
def test_batch_norm_gradients_only_where_needed(device, rng, needed):
    """Whoever freezes some of x, weight and bias gets the others' gradients."""
    parts = [tensor(rng.standard_normal(s), "float64", device) for s in ((3, 2, 4), (2,), (2,))]
    leaves = [[p.clone().requires_grad_(bool(n)) for p, n in zip(parts, needed, strict=True)] for _ in range(2)]
    for function, (x, weight, bias) in zip((HF.batch_norm, F.batch_norm), leaves, strict=True):
        (function(x, None, None, weight, bias, True) ** 3).sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            same(ours.grad, theirs.grad, 1e-11)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batch_norm_in_half_precision_throughout(device, rng, dtype):
    """Parameters and running statistics may be halves too; each is rounded once."""
    x = tensor(rng.standard_normal((4, 2, 9)), dtype, device, grad=True)
    weight, bias = (tensor(rng.standard_normal(2), dtype, device, grad=True) for _ in range(2))
    running = [tensor(np.ones(2), dtype, device) for _ in range(2)]
    y = HF.batch_norm(x, *running, weight, bias, True)
    sheet = reference.batch_norm(values_of(x), values_of(weight), values_of(bias))
    close(values_of(y), sheet.y, None, dtype)
    close(values_of(running[0]), 0.9 + 0.1 * sheet.mean, None, dtype)
    close(values_of(running[1]), 0.9 + 0.1 * sheet.var * 36 / 35, None, dtype)
    y.sum().backward()
    assert [v.grad.dtype for v in (x, weight, bias)] == [getattr(torch, dtype)] * 3


def test_batch_norm_without_a_graph_gives_the_same_bits(device, rng):
    x = tensor(rng.standard_normal((3, 2, 9)), "float32", device)
    y = HF.batch_norm(x, None, None, training=True)
    again = HF.batch_norm(x.clone().requires_grad_(), None, None, training=True)
    assert not y.requires_grad
    assert again.requires_grad
    assert torch.equal(y, again)
    with torch.no_grad():
        assert not HF.batch_norm(x.clone().requires_grad_(), None, None, training=True).requires_grad


def test_batch_norm_keeps_the_layout(device, rng):
    x = tensor(rng.standard_normal((2, 3, 4, 5)), "float32", device).to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = HF.batch_norm(x, None, None, training=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_backward_takes_any_upstream_gradient(device, rng):
    """An expanded one (of a sum) and a transposed one."""
    x = tensor(rng.standard_normal((4, 3, 4)), "float64", device, grad=True)
    for upstream in (lambda y: y.sum() * 2.0, lambda y: (y.transpose(0, 2).contiguous() * 3.0).transpose(0, 2).pow(2).sum()):
        (ours,) = torch.autograd.grad(upstream(HF.batch_norm(x, None, None, training=True)), x)
        (theirs,) = torch.autograd.grad(upstream(F.batch_norm(x, None, None, training=True)), x)
        same(ours, theirs, 1e-11)


def test_batch_norm_notices_that_its_input_has_changed(device, rng):
    x = tensor(rng.standard_normal((4, 3)), "float32", device, grad=True)
    z = x * 1.0
    y = HF.batch_norm(z, None, None, training=True)
    z.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, r"input: expected a torch.Tensor, got numpy.ndarray", (np.ones((2, 3)), None, None), {"training": True}),
        (TypeError, r"input: expected dtype float16, bfloat16, float32, float64, got int64", (zeros(2, 3), None, None),
         {"training": True}),
        (TypeError, r"weight: expected a torch.Tensor, got builtins.list", (ones(2, 3), None, None, [1.0]), {"training": True}),
        (TypeError, r"bias: expected dtype .* got int64", (ones(2, 3), None, None, None, zeros(3)), {"training": True}),
        (ValueError, r"input: expected at least 2 axes \(N, C, …\), got shape \(3,\)", (ones(3), None, None),
         {"training": True}),
        (ValueError, r"weight: expected shape \(3,\) \(one number per channel of input\), got \(2,\)",
         (ones(2, 3), None, None, ones(2)), {"training": True}),
        (ValueError, r"running_mean: expected shape \(3,\) .* got \(4,\)", (ones(2, 3), ones(4), ones(3)), {}),
        (ValueError, r"running_var: expected shape \(3,\) .* got \(3, 1\)", (ones(2, 3), ones(3), ones(3, 1)), {}),
        (ValueError, r"running_mean and running_var: expected both in evaluation \(training=False\), got None",
         (ones(2, 3), None, None), {}),
        (ValueError, r"running_mean and running_var: expected both in evaluation", (ones(2, 3), ones(3), None), {}),
        (ValueError, r"eps: expected a number of at least 0, got -1.0", (ones(2, 3), ones(3), ones(3)), {"eps": -1.0}),
        (ValueError, r"input: expected more than 1 value per channel when training, got shape \(1, 3\)",
         (ones(1, 3), None, None), {"training": True}),
        (ValueError, r"input: expected more than 1 value per channel when training, got shape \(1, 3, 1, 1\)",
         (ones(1, 3, 1, 1), None, None), {"training": True}),
    ],
)  # fmt: skip
def test_batch_norm_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=message):
        HF.batch_norm(*arguments, **options)


def test_batch_norm_takes_numbers_as_torch_does(device):
    """Of NumPy, and in a tensor () that asks for no gradient."""
    x = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 6.0]], device=device)
    results = []
    for number in (float, np.float32, np.float64, torch.tensor):
        running = torch.zeros(2, device=device), torch.ones(2, device=device)
        results.append([HF.batch_norm(x, *running, training=True, momentum=number(0.25), eps=number(0.5)), *running])
        module = HN.BatchNorm1d(2, eps=number(0.5), momentum=number(0.25), device=device)
        same(module(x), results[-1][0])
        same(module.running_mean, running[0])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    for wrong in (torch.tensor([0.1]), torch.tensor(0.1, requires_grad=True), "x"):
        with pytest.raises(TypeError, match="momentum: expected a number, got"):
            HF.batch_norm(x, None, None, training=True, momentum=wrong)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (2, 4)], ids=str)
def test_batch_norm_writes_nothing_on_an_error(device, shape):
    """The running statistics are as they were when a training batch is refused."""
    mean, var = torch.full((3,), 0.25, device=device), torch.full((3,), 4.0, device=device)
    with pytest.raises(ValueError, match="expected"):
        HF.batch_norm(torch.ones(shape, device=device), mean, var, training=True)
    assert (mean == 0.25).all()
    assert (var == 4.0).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 3, 0)], ids=str)
@pytest.mark.parametrize(
    ("of", "running", "affine"),
    [
        ("float64", "float32", "float64"),
        ("float64", "float32", "float32"),
        ("float32", "float64", None),
        ("float32", None, None),
    ],
)
def test_batch_norm_of_no_element_takes_what_pytorchs_takes(device, training, shape, of, running, affine):
    results = []
    for function in (HF.batch_norm, F.batch_norm):
        x = torch.empty(shape, dtype=getattr(torch, of), device=device, requires_grad=True)
        stats = [None] * 2 if running is None else [tensor(np.full(3, v), running, device) for v in (0.5, 2.0)]
        vectors = [None] * 2 if affine is None else [tensor(np.full(3, v), affine, device, grad=True) for v in (0.5, 2.0)]
        y = function(x, *stats, *vectors, training)
        y.sum().backward()
        results.append([y, x.grad, *stats, *vectors, *(None if v is None else v.grad for v in vectors)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            same(ours, theirs)


def test_what_no_element_allows_is_refused_of_one(device):
    x, wide = torch.ones(2, 3, dtype=torch.float64, device=device), torch.ones(3, device=device)
    with pytest.raises(TypeError, match="running_mean: expected dtype float64, got float32"):
        HF.batch_norm(x, wide, wide, training=False)
    with pytest.raises(ValueError, match="input: expected at least 2 axes"):
        HF.batch_norm(x[0], None, None, training=True)
    with pytest.raises(ValueError, match="expected both in evaluation"):
        HF.batch_norm(x, None, None)
