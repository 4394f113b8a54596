"""Batch normalisation of the positions that count: `mask=` and `lengths=` of `functional.batch_norm` and the modules.

Values that do not count are NaN and infinities in every test here, of x, residual and upstream gradient: none may reach a
result. docs/derivations.md, section 2.6.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from twins import ACC, SINGLE, gradcheck, gradgradcheck, layout_of, opcheck, same, tensor, values_of

import hw3gpu.functional as HF
import hw3gpu.nn as HN
from hw3gpu import reference
from hw3gpu._torch import batch_norm as operators
from hw3gpu._torch.positions import packed, unpacked
from measure import ulp

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MASKS = {
    "half": lambda rng, shape: rng.random(shape) < 0.5,
    "lengths": lambda rng, shape: np.arange(shape[-1]) < rng.integers(0, shape[-1] + 1, shape[0])[:, None],
    "the last third": lambda rng, shape: np.arange(np.prod(shape)).reshape(shape) >= np.prod(shape) * 2 // 3,
    "one": lambda rng, shape: np.arange(np.prod(shape)).reshape(shape) == np.prod(shape) // 2,
    "none": lambda rng, shape: np.zeros(shape, bool),
}


def case(rng, device, shape, dtype="float32", mask="half", layout="contiguous", around=0.0):
    """x, dy and residual, spoilt where nothing counts, the mask, weight and bias, and running statistics."""
    counts = MASKS[mask](rng, (shape[0], *shape[2:]))
    on = np.broadcast_to(counts[:, None], shape)
    spoilt = rng.choice([np.nan, np.inf, -np.inf], shape)
    drawn = [np.where(on, rng.standard_normal(shape) + more, spoilt) for more in (around, 0.0, 0.0)]
    single = SINGLE[ACC[dtype]]
    x, dy, residual = (layout_of(tensor(v, dtype, device), layout) for v in drawn)
    vectors = [tensor(v, single, device) for v in (*rng.standard_normal((3, shape[1])), rng.random(shape[1]) + 0.5)]
    return x, dy, residual, torch.tensor(counts, device=device), *vectors


def expected(x, dy, residual, counts, weight, bias, mean, var, training, relu):
    """Every result by the answer sheet, from the operands in float64, and how large the terms of dx are."""
    x, dy, residual, weight, bias, mean, var = map(values_of, (x, dy, residual, weight, bias, mean, var))
    counts = counts.cpu().numpy()
    n, on = counts.sum(), np.broadcast_to(counts[:, None], x.shape)
    running = [mean, var]
    if training:
        y, of_mean, of_var, *_ = reference.batch_norm(x, weight, bias, mask=counts)
        if n:
            running = [0.9 * mean + 0.1 * of_mean, 0.9 * var + 0.1 * of_var * n / max(n - 1, 1)]
        mean, var, backward = of_mean, of_var, reference.batch_norm_backward
    else:
        y = reference.batch_norm_inference(x, mean, var, weight, bias, mask=counts)
        backward = reference.batch_norm_inference_backward
    if residual is not None:
        y = np.where(on, y + residual, 0)
    dy = np.where(on & (y > 0) if relu else on, dy, 0)
    gradients = backward(dy, x, mean, var, weight, mask=counts)
    results = {"y": np.maximum(y, 0) if relu else y, "running_mean": running[0], "running_var": running[1]}
    results |= {"dx": gradients.dx, "dweight": gradients.dgamma, "dbias": gradients.dbeta}
    terms = np.abs(weight / np.sqrt(var + 1e-5)).max() * np.abs(dy).max()
    return results | ({} if residual is None else {"dresidual": dy}), terms


def holds(x, dy, residual, counts, weight, bias, mean, var, training=True, relu=False, **given):
    """Every result of `functional.batch_norm` within its bound."""
    want, terms = expected(x, dy, residual, counts, weight, bias, mean, var, training, relu)
    leaves = [v.detach().requires_grad_() for v in (x, weight, bias, *([] if residual is None else [residual]))]
    running = [mean.clone(), var.clone()]
    y = HF.batch_norm(
        leaves[0], *running, *leaves[1:3], training, 0.1, 1e-5,
        residual=None if residual is None else leaves[3], activation="relu" if relu else None, **(given or {"mask": counts}),
    )  # fmt: skip
    assert y.dtype == x.dtype
    gradients = torch.autograd.grad(y, leaves, dy)
    of = str(x.dtype).removeprefix("torch.")
    single = SINGLE[ACC[of]]
    for (name, exact), ours in zip(want.items(), (y, *running, *gradients), strict=True):
        most = max(np.abs(exact).max(), terms if name == "dx" else 0.0)
        bound = 40 * ulp(most, single) + ulp(most, of if name in ("y", "dx", "dresidual") else single)
        assert np.abs(values_of(ours) - exact).max() <= bound, name
    nowhere = (~counts).unsqueeze(1).expand(x.shape)
    assert not y[nowhere].any()
    assert not gradients[0][nowhere].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_layout(device, rng, mask, layout):
    x, dy, _, *rest = case(rng, device, (4, 3, 50), mask=mask, layout=layout)
    holds(x, dy, None, *rest)


@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 7, 7), (2, 20, 5, 3, 2)], ids=str)
def test_every_rank(device, rng, shape):
    x, dy, _, *rest = case(rng, device, shape)
    holds(x, dy, None, *rest)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no activation"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_with_a_residual(device, rng, layout, relu, training):
    holds(*case(rng, device, (3, 4, 21), mask="lengths", layout=layout), training=training, relu=relu)


def test_every_dtype(device, rng, dtype):
    holds(*case(rng, device, (3, 2, 35), dtype, "half"), relu=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_a_large_mean_where_the_first_tiles_count_nothing(device, rng, layout):
    """The sums' origin is a mean of values that count, wherever they begin."""
    shape = (2, 1, 9001) if layout == "contiguous" else (2, 5, 1201)
    x, dy, _, *rest = case(rng, device, shape, mask="the last third", layout=layout, around=1e4)
    rest[3] += 1e4  # the running mean
    holds(x, dy, None, *rest)


def test_long_channels_of_short_rows(device, rng):
    """The edges of rows off 16 bytes are many of the values that each part of a channel counts."""
    x, dy, _, *rest = case(rng, device, (900, 2, 9), around=3.0)
    holds(x, dy, None, *rest)


@pytest.mark.parametrize(
    ("training", "activation"),
    [(True, "relu"), *(pytest.param(*of, marks=pytest.mark.slow) for of in ((True, "silu"), (False, "gelu")))],
)
def test_gradients_and_theirs(device, rng, training, activation):
    x, _, residual, counts, weight, bias, *running = case(rng, device, (3, 2, 4), "float64")
    x, residual = (torch.where(counts[:, None], v, 7.0) for v in (x, residual))  # finite differences need numbers

    def call(x, weight, bias, residual):
        stats = (None, None) if training else running
        return HF.batch_norm(x, *stats, weight, bias, training, residual=residual, activation=activation, mask=counts)

    leaves = [v.requires_grad_() for v in (x, weight, bias, residual)]
    gradcheck(call, leaves)
    gradgradcheck(call, leaves)


def test_a_mask_of_all_is_none(device, rng):
    x, weight, bias = (tensor(rng.standard_normal(shape), "float32", device) for shape in ((3, 2, 40), 2, 2))
    every = torch.ones(3, 40, dtype=torch.bool, device=device)
    results = []
    for mask in (None, every):
        leaf = x.clone().requires_grad_()
        y = HF.batch_norm(leaf, None, None, weight, bias, True, mask=mask)
        results += [y, *torch.autograd.grad(y, leaf, x.flip(0))]
    if device == "cpu":
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])
    else:  # another plan may add in another order
        torch.testing.assert_close(results[2:], results[:2], rtol=1e-6, atol=1e-6)


def test_lengths_are_a_mask_and_masks_broadcast(device, rng):
    x, dy, _, _, *vectors = case(rng, device, (3, 2, 6))
    x, dy = x.nan_to_num(0.0, 1.0, 1.0), dy.nan_to_num(0.0, 1.0, 1.0)
    lengths = torch.tensor([6, 0, 3], device=device)
    counts = torch.arange(6, device=device) < lengths[:, None]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        holds(x, dy, None, counts, *vectors, lengths=lengths.to(dtype))
    steps = torch.tensor([True, False, True, True, False, True], device=device)
    holds(x, dy, None, steps.expand(3, 6), *vectors, mask=steps)
    samples = torch.tensor([[True], [False], [True]], device=device)
    holds(x, dy, None, samples.expand(3, 6), *vectors, mask=samples)


def test_bits(device, rng):
    for shape in ((3, 5), (4, 4), (1, 1), (2, 3, 7)):
        mask = torch.tensor(rng.random(shape) < 0.5, device=device)
        bits, n = packed(mask)
        assert torch.equal(unpacked(bits, mask.unsqueeze(1)), mask.unsqueeze(1))
        assert n.item() == mask.sum().item()
        assert bits.numel() <= mask.numel() // 8 + 2


def test_operators(device, rng):
    x, dy, residual, counts, weight, bias, *running = case(rng, device, (3, 2, 4, 3))
    x, dy, residual = (v.nan_to_num(0.0, 1.0, 1.0) for v in (x, dy, residual))
    positions = packed(counts)
    for v in (x, weight, bias):
        v.requires_grad_()
    opcheck(operators.TRAINING, (x, weight, bias, residual, *running, 0.1, 1e-5, "silu", *positions), True)
    opcheck(operators.EVALUATION, (x, weight, bias, residual, *running, 0.1, 1e-5, None, *positions))
    _, stats, bits = operators.TRAINING(x, weight, bias, residual, None, None, 0.1, 1e-5, None, *positions)
    opcheck(operators.BACKWARD, (dy, x.detach(), weight.detach(), None, None, stats, bits, True, None, True, *positions))


class Net(torch.nn.Module):
    """Padded sequences through a convolution, normalised where they have steps."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv1d(3, 4, 3, padding=1), kind(4)

    def forward(self, x, lengths):
        return self.norm(self.conv(x), lengths=lengths)


@pytest.mark.parametrize("kind", [HN.BatchNorm1d, HN.BatchNormAct1d, HN.SyncBatchNorm])
def test_modules_and_compile(device, kind):
    """Padding changes nothing: the steps of two sequences as one batch without it, compiled and eager."""
    torch.manual_seed(0)
    net = Net(kind).double().to(device)
    x, lengths = torch.randn(2, 3, 6, dtype=torch.float64, device=device), torch.tensor([6, 4], device=device)
    for training in (True, False):
        net.train(training)
        torch._dynamo.reset()
        values = net.conv(x)
        steps = torch.cat([values[0, :, :6].T, values[1, :, :4].T])
        same(HF.batch_norm(steps, None, None, training=True).mean(0), torch.zeros(4, dtype=torch.float64, device=device))
        mean, var = net.norm.running_mean.clone(), net.norm.running_var.clone()
        want = HF.batch_norm(steps, mean, var, training=training, activation="relu" if "Act" in kind.__name__ else None)
        compiled = kind is HN.BatchNormAct1d  # the others are traced alike
        y = (torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net)(x, lengths)
        same(torch.cat([y[0].T, y[1, :, :4].T]), want)
        assert not y[1, :, 4:].any()
        same(net.norm.running_var, var)


def test_bad_input(device):
    x = torch.ones(4, 3, 5, device=device)

    def call(x=x, **options):
        return HF.batch_norm(x, None, None, training=True, **options)

    every = torch.ones(4, 5, dtype=torch.bool, device=device)
    with pytest.raises(TypeError, match=r"mask: expected a torch.Tensor, got builtins.list"):
        call(mask=[True])
    with pytest.raises(TypeError, match=r"mask: expected dtype bool, True where a value counts, got float32"):
        call(mask=every.float())
    with pytest.raises(ValueError, match=r"mask: expected shape \(4, 5\), input's without its channels, .* got \(4, 1, 5\)"):
        call(mask=every[:, None])
    with pytest.raises(ValueError, match=r"mask: expected shape \(4, 5\), .* got \(3, 5\)"):
        call(mask=every[:3])
    with pytest.raises(ValueError, match=r"mask and lengths: expected one of them, got both"):
        call(mask=every, lengths=torch.ones(4, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match=r"lengths: expected an integer dtype \(.*\), got float32"):
        call(lengths=torch.ones(4, device=device))
    with pytest.raises(ValueError, match=r"lengths: expected shape \(4,\) \(one length per sample of input\), got \(3,\)"):
        call(lengths=torch.ones(3, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"lengths: expected input of shape \(N, C, L\) beside it, got \(4, 3\)"):
        call(x[..., 0], lengths=torch.ones(4, dtype=torch.int64, device=device))
    if x.is_cpu:
        with pytest.raises(ValueError, match=r"lengths: expected numbers from 0 to 5, got 6 for sample 1"):
            call(lengths=torch.tensor([0, 6, 2, 2]))
