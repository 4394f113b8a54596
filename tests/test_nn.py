"""`hw3gpu.nn`: modules that stand where PyTorch's stood."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from modules import PAIRS, batch, same, same_state, twins
from torch import nn

import hw3gpu.nn as HN
from hw3gpu import reference

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---------------------------------------------------------------------------------------------- batch normalisation
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in PAIRS]
    + [
        ("2d", o)
        for o in ({"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"affine": False}, {"track_running_stats": False})
    ],
    ids=str,
)
def test_training_and_evaluation_are_torchs(device, name, options):
    """Three training steps, each with its gradients, then evaluation, with its own."""
    ours, theirs, shape = twins(name, device, **options)
    for step in range(4):
        if step == 3:
            ours.eval()
            theirs.eval()
        results = []
        for module in (ours, theirs):
            module.zero_grad()
            x = (1.0 + step + batch(shape, device, step)).requires_grad_()
            y = module(x)
            (y**3).sum().backward()
            results.append([y, x.grad, *(p.grad for p in module.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        same_state(ours, theirs)


def test_the_cumulative_average_is_the_mean_of_the_batches(device):
    module = HN.BatchNorm1d(2, momentum=None, device=device, dtype=torch.float64)
    batches = [batch((5, 2), device, seed) for seed in range(4)]
    for x in batches:
        module(x)
    assert int(module.num_batches_tracked) == 4
    same(module.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    same(module.running_var, torch.stack([x.var(0) for x in batches]).mean(0))


def test_statistics_are_float32_beside_half_precision(device):
    module = HN.BatchNorm2d(3, device=device)
    y = module(batch((4, 3, 5, 5), device, dtype=torch.float16))
    assert y.dtype == torch.float16
    x = batch((4, 3, 5, 5), device, dtype=torch.float16).double().cpu().numpy()
    sheet = reference.batch_norm(x)
    np.testing.assert_allclose(module.running_mean.cpu(), 0.1 * sheet.mean, rtol=0, atol=1e-7)
    np.testing.assert_allclose(module.running_var.cpu(), 0.9 + 0.1 * sheet.var * 100 / 99, rtol=3e-7)


def test_statistics_can_be_taken_away(device):
    """Without buffers a module normalises by the batch in evaluation too, as PyTorch's does."""
    ours, theirs, shape = twins("2d", device)
    for module in (ours, theirs):
        module.eval()
        module.running_mean = module.running_var = module.num_batches_tracked = None
    same(ours(batch(shape, device)), theirs(batch(shape, device)))


def test_one_value_per_channel(device):
    """Refused in training, with the statistics as they were; evaluation takes it."""
    ours, theirs, _ = twins("1d", device)
    before = copy.deepcopy(ours.state_dict())
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            module(batch((1, 3), device))
    same(ours.running_mean, before["running_mean"])
    same(ours.running_var, before["running_var"])
    assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked)
    same(ours.eval()(batch((1, 3), device)), theirs.eval()(batch((1, 3), device)))


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_is_taken_as_torch_takes_it(device, training):
    ours, theirs, _ = twins("2d", device)
    results = []
    for module in (ours, theirs):
        module.train(training)
        x = torch.zeros(0, 3, 4, 4, device=device, dtype=torch.float64, requires_grad=True)
        y = module(x)
        y.sum().backward()
        results.append((y, x.grad, module.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("1d", (2, 3, 4, 4), "expected 2D or 3D input"), ("2d", (2, 3), "expected 4D input"), ("3d", (2, 3, 4), "expected 5D")],
)
def test_the_rank_of_the_input_is_checked(name, shape, message):
    ours, _, _ = twins(name, "cpu")
    with pytest.raises(ValueError, match=message):
        ours(torch.zeros(shape, dtype=torch.float64))


def test_the_channels_of_the_input_are_checked():
    with pytest.raises(ValueError, match=r"running_mean: expected shape \(4,\) .*channel of input\), got \(3,\)"):
        HN.BatchNorm2d(3)(torch.zeros(2, 4, 5, 5))


@pytest.mark.parametrize("name", PAIRS, ids=list(PAIRS))
def test_checkpoints_go_both_ways(device, name):
    ours, theirs, shape = twins(name, device)
    ours(batch(shape, device))
    theirs.load_state_dict(ours.state_dict())
    same_state(ours, theirs)
    fresh = PAIRS[name][0](3, device=device, dtype=torch.float64)
    fresh.load_state_dict(theirs.state_dict())
    same_state(fresh, ours)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)


def test_a_deep_copy_and_a_pickle_are_whole(device, tmp_path):
    ours, _, shape = twins("2d", device)
    torch.save(ours, tmp_path / "module.pt")
    for again in (copy.deepcopy(ours), torch.load(tmp_path / "module.pt", weights_only=False)):
        same(again(batch(shape, device)), copy.deepcopy(ours)(batch(shape, device)))
        assert type(again) is type(ours)


# ---------------------------------------------------------------------------------------------- cross entropy
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.2}, {"ignore_index": 1}, {"weight": True}],
    ids=str,
)
def test_cross_entropy_loss(device, options):
    if "weight" in options:
        options = {"weight": torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64, device=device)}
    target = torch.tensor([[0, 1, 3], [2, 1, 1]], device=device)
    results = []
    for kind in (HN.CrossEntropyLoss, nn.CrossEntropyLoss):
        x = batch((2, 4, 3), device).requires_grad_()
        loss = kind(**options)(x, target)
        results.append((loss, torch.autograd.grad(loss.sum(), x)[0]))
    for a, b in zip(*results, strict=True):
        same(a, b)
    assert isinstance(HN.CrossEntropyLoss(**options), nn.CrossEntropyLoss)
    assert list(HN.CrossEntropyLoss(**options).state_dict()) == list(nn.CrossEntropyLoss(**options).state_dict())


def test_cross_entropy_loss_moves_its_weight(device):
    """The weight is a buffer: `.to` and `.double` take it along."""
    loss = HN.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])).to(device).double()
    assert loss.weight.dtype == torch.float64
    x, t = batch((3, 2), device), torch.tensor([0, 1, 1], device=device)
    same(loss(x, t), nn.CrossEntropyLoss(weight=loss.weight)(x, t))


# ---------------------------------------------------------------------------------------------- Conv2D
# W, H, kernel, stride, padding, dilation: no two numbers of a row are the same
CONVOLUTIONS = [
    (23, 29, (3, 5), (2, 1), (4, 0), (1, 1)),
    (17, 31, (2, 7), (3, 4), (1, 6), (5, 1)),
    (13, 37, (5, 1), (1, 3), (0, 2), (1, 4)),
    (19, 11, (4, 3), (2, 5), (7, 1), (1, 1)),
]


def torch_conv(k, s, p, d, groups=1, **options):
    """PyTorch's convolution of (B, C, H, W) for arguments that are given (W, H)."""
    return nn.Conv2d(4, 6, k[::-1], s[::-1], p[::-1], d[::-1], groups, dtype=torch.float64, **options)


@pytest.mark.parametrize(("W", "H", "k", "s", "p", "d"), CONVOLUTIONS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"groups": 2}, {"padding_mode": "circular"}], ids=str)
def test_conv2d_from_torch(W, H, k, s, p, d, options):
    conv = torch_conv(k, s, p, d, **options)
    ours = HN.Conv2D.from_torch(conv)
    x = batch((2, W, H, 4), "cpu")
    y = ours(x)
    expected = conv(x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
    same(y, expected)
    assert tuple(y.shape) == ours.output_shape((2, W, H, 4)) == reference.conv2d_output_shape((2, W, H, 4), 6, k, s, p, d)
    assert tuple(ours.weight.shape) == (6, 4 // options.get("groups", 1), *k)
    assert (ours.kernel_size, ours.stride, ours.padding, ours.dilation) == (k, s, p, d)


@pytest.mark.parametrize(("W", "H", "k", "s", "p", "d"), CONVOLUTIONS)
def test_conv2d_is_the_sum_it_is_defined_by(W, H, k, s, p, d):
    """y[b, w', h', o] = bias + Σ x[b, w' s1 - p1 + i d1, h' s2 - p2 + j d2, c] weight[o, c, i, j], zero outside."""
    conv = HN.Conv2D(2, 3, k, s, p, d, dtype=torch.float64)
    x = batch((1, W, H, 2), "cpu")
    padded = np.pad(x.numpy(), ((0, 0), (p[0],) * 2, (p[1],) * 2, (0, 0)))
    _, w_out, h_out, _ = conv.output_shape((1, W, H, 2))
    expected = np.zeros((1, w_out, h_out, 3)) + conv.bias.detach().numpy()
    weight = conv.weight.detach().numpy()
    for i in range(k[0]):
        for j in range(k[1]):
            rows = i * d[0] + s[0] * np.arange(w_out)
            columns = j * d[1] + s[1] * np.arange(h_out)
            expected += padded[:, rows][:, :, columns] @ weight[:, :, i, j].T
    same(conv(x).detach(), torch.from_numpy(expected))


def test_conv2d_gradients_are_torchs():
    conv = torch_conv((3, 2), (2, 1), (1, 0), (1, 1))
    ours = HN.Conv2D.from_torch(conv)
    x = batch((2, 7, 9, 4), "cpu").requires_grad_()
    x_t = x.detach().clone().requires_grad_()
    (ours(x) ** 2).sum().backward()
    (conv(x_t.permute(0, 3, 2, 1)) ** 2).sum().backward()
    same(x.grad, x_t.grad)
    same(ours.weight.grad, conv.weight.grad.transpose(2, 3))
    same(ours.bias.grad, conv.bias.grad)


def test_conv2d_from_torch_copies():
    conv = torch_conv((3, 2), (2, 1), (1, 0), (1, 1)).eval()
    ours = HN.Conv2D.from_torch(conv)
    assert not ours.training
    with torch.no_grad():
        conv.weight.fill_(math.nan)
    assert ours.weight.isfinite().all()
    assert ours.weight.requires_grad


def test_conv2d_checkpoints():
    """Its own go in and out, in a model too; a torch Conv2d's is refused, even where the shapes agree."""
    ours, again = (nn.Sequential(HN.Conv2D(3, 4, (3, 3)), nn.ReLU()) for _ in range(2))
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again[0].weight, ours[0].weight)
    theirs = nn.Sequential(nn.Conv2d(3, 4, (3, 3)), nn.ReLU())
    before = ours[0].weight.clone()
    with pytest.raises(RuntimeError, match=r"0\.weight: expected a checkpoint of hw3gpu.nn.Conv2D.*Conv2D.from_torch"):
        ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours[0].weight, before), "a refused checkpoint was loaded"
    with pytest.raises(RuntimeError, match="_extra_state"):
        theirs.load_state_dict(ours.state_dict())


def test_conv2d_checkpoint_is_not_let_through_by_strict_false():
    ours, theirs = HN.Conv2D(3, 4, 3), nn.Conv2d(3, 4, 3)
    before = ours.weight.clone()
    with pytest.raises(RuntimeError, match=r"Conv2D\.from_torch"):
        ours.load_state_dict(theirs.state_dict(), strict=False)
    assert torch.equal(ours.weight, before), "a refused checkpoint was loaded"


def test_conv2d_checkpoint_through_a_file(tmp_path):
    ours = HN.Conv2D(2, 3, (2, 3))
    torch.save(ours.state_dict(), tmp_path / "conv.pt")
    again = HN.Conv2D(2, 3, (2, 3))
    again.load_state_dict(torch.load(tmp_path / "conv.pt", weights_only=True))
    assert torch.equal(again.weight, ours.weight)


def test_conv2d_with_a_foreign_mark():
    ours = HN.Conv2D(2, 3, (2, 3))
    state = ours.state_dict() | {"_extra_state": torch.tensor([72, 87], dtype=torch.uint8)}
    before = ours.weight.clone()
    with pytest.raises(RuntimeError, match=r"weight: expected a checkpoint of hw3gpu.nn.Conv2D, whose kernels are \(W, H\)"):
        ours.load_state_dict({name: value + 1 for name, value in state.items()})
    assert torch.equal(ours.weight, before)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8, 9), r"input: expected \(B, W, H, 3\), got shape \(2, 8, 9\)"),
        ((2, 3, 8, 9), r"input: expected \(B, W, H, 3\), got shape \(2, 3, 8, 9\)"),
        ((2, 2, 9, 3), r"W"),
        ((2, 9, 4, 3), r"H"),
    ],
)
def test_conv2d_bad_input(shape, message):
    """Rank, channels, and an output that would be empty: the axis and its numbers are named."""
    conv = HN.Conv2D(3, 4, (3, 5))
    with pytest.raises(ValueError, match=message):
        conv(torch.zeros(shape))
    if message in "WH":
        with pytest.raises(ValueError, match=rf"\b{message}\b.*{shape['_WH'.index(message)]}"):
            conv.output_shape(shape)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv2d_padding_by_name(padding):
    theirs = nn.Conv2d(3, 4, (5, 3), padding=padding, dtype=torch.float64)
    ours = HN.Conv2D.from_torch(theirs)
    x = batch((2, 8, 9, 3), "cpu")
    same(ours(x), theirs(x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1))
    assert ours.output_shape((2, 8, 9, 3)) == tuple(ours(x).shape)


def test_conv2d_from_something_else():
    for conv in (nn.Conv1d(2, 3, 1), HN.Conv2D(2, 3, 1), None):
        with pytest.raises(TypeError, match=r"conv: expected a torch.nn.Conv2d, got"):
            HN.Conv2D.from_torch(conv)


def test_a_small_net_trains_as_torchs_does(device):
    """Conv2D, BatchNorm and CrossEntropyLoss together: the same losses, step by step."""
    torch.manual_seed(3)
    theirs = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3))
    theirs = theirs.double().to(device)
    ours = HN.convert_batch_norm(copy.deepcopy(theirs))
    x, t = batch((6, 1, 5, 5), device), torch.tensor([0, 1, 2, 2, 1, 0], device=device)
    losses = []
    for net, loss in ((ours, HN.CrossEntropyLoss()), (theirs, nn.CrossEntropyLoss())):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        curve = []
        for _ in range(4):
            optimizer.zero_grad()
            value = loss(net(x), t)
            value.backward()
            optimizer.step()
            curve.append(value.item())
        losses.append(curve)
    np.testing.assert_allclose(*losses, rtol=1e-10)
    assert losses[0][-1] < losses[0][0]
