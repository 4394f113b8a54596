"""`convert_batch_norm(model, fuse=True)`: the same numbers as the model has, in fewer passes, and nothing else changed."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from modules import batch
from test_model_tools import Block, plain_net
from torch import nn

import hw3gpu.functional as HF
import hw3gpu.nn as HN

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


class Forms(nn.Module):
    """The ways in which a ReLU and a sum are written."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(7))
        self.act = nn.ReLU()

    def forward(self, x, other):
        n = self.norms
        x = F.relu(n[0](x)) + torch.relu(n[1](other))
        x = n[2](x).relu_()
        x = torch.add(n[3](x), other).relu()
        x = self.act(other + n[4](x))
        y = n[5](x)
        y += x
        y = F.relu(y, inplace=True)
        return y * F.relu(n[6](x).add(y), inplace=False)


class Kept(nn.Module):
    """What must not be fused: results used twice, other sums and activations, a residual written to."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))

    def forward(self, x):
        n = self.norms
        a = n[0](x)
        b = F.relu(a) + a
        c = F.relu(torch.add(n[1](x), b, alpha=2))
        d = c * 1
        d += n[2](c)
        e = F.relu(d) + d
        k = n[3](e) + 1
        return F.relu(k) + F.relu6(n[4](e)) + F.relu(n[5](e) * 2)


class Written(nn.Module):
    """What a batch normalisation reads is written to before the ReLU, by itself or through a view."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = x * 1
        y = self.norm(x)
        x.mul_(2)
        y = F.relu(y + x)
        z = self.norm2(y.view(y.shape))
        y.mul_(2)
        return F.relu(z)


def pair(model, device, **options):
    """Ours fused, and the model."""
    theirs = model.double().to(device)
    return HN.convert_batch_norm(copy.deepcopy(theirs), fuse=True, **options), theirs


def step(model, *args):
    """Output, gradients and buffers of a step of training, and the output of evaluation after it."""
    model.zero_grad()
    leaves = [arg.clone().requires_grad_() for arg in args]
    y = model.train()(*leaves)
    y.square().sum().backward()
    gradients = [leaf.grad for leaf in leaves] + [p.grad for p in model.parameters()]
    return [y, *gradients, *(b.clone() for b in model.buffers()), model.eval()(*args)]


def agree(ours, theirs, *args):
    torch.testing.assert_close(step(ours, *args), step(theirs, *args), rtol=1e-9, atol=1e-9)


def fused_in(monkeypatch):
    """The calls of `functional.batch_norm` that have an activation, by whether they have a residual."""
    calls = []
    plain = HF.batch_norm

    def noted(*args, residual=None, activation=None, **given):
        if activation:
            calls.append(residual is not None)
        return plain(*args, residual=residual, activation=activation, **given)

    monkeypatch.setattr(HF, "batch_norm", noted)
    return calls


def test_a_residual_network(device, monkeypatch, caplog):
    """Every pattern is found and logged; modules, names, parameters and classes stay."""
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Block(4, 5), Block(5, 4))
    with caplog.at_level("INFO", logger="hw3gpu.nn"):
        ours, theirs = pair(theirs, device)
    assert [m for m in caplog.messages if "fused" in m] == [
        "(the module): fused with the activation behind them: 1",
        "3: fused with the activation behind them: bn1, bn2 with a residual",
        "4: fused with the activation behind them: bn1, bn2 with a residual",
    ]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours[3], Block)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert type(ours[3].bn2) is HN.BatchNorm2d
    calls = fused_in(monkeypatch)
    agree(ours, theirs, batch((2, 3, 8, 8), device))
    assert calls == [False, False, True, False, True] * 2


def test_ways_to_write_it(device, monkeypatch):
    ours, theirs = pair(Forms(), device)
    calls = fused_in(monkeypatch)
    agree(ours, theirs, batch((2, 4, 3, 5), device), batch((2, 4, 3, 5), device, 1))
    assert calls == [False, False, False, True, True, True, True] * 2


def test_what_must_not_be_fused(device, monkeypatch):
    calls = fused_in(monkeypatch)
    for model in (Kept(), Written()):
        with pytest.warns(UserWarning, match="fuse=True found no batch normalisation with an activation behind it"):
            ours, theirs = pair(model, device)
        with torch.set_grad_enabled(isinstance(model, Kept)):
            torch.testing.assert_close(ours(batch((2, 4, 3, 5), device)), theirs(batch((2, 4, 3, 5), device)))
    assert calls == []


class OfMode(nn.Module):
    """Another graph in training than in evaluation."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale, self.add = nn.BatchNorm2d(4), 2.0, False

    def forward(self, x):
        y = self.norm(x)
        if self.training:
            y = y + x
        y = F.relu(y)
        return y * self.scale


def test_both_modes_and_attributes_that_change(device, monkeypatch, caplog):
    """`training` may change, and any other attribute ends it."""
    ours, theirs = pair(OfMode(), device)
    calls = fused_in(monkeypatch)
    agree(ours, theirs, batch((2, 4, 3, 5), device))
    assert calls == [True, False]
    with caplog.at_level("INFO", logger="hw3gpu.nn"):
        ours.scale = theirs.scale = 3.0
    assert caplog.messages == ["OfMode: fused no more: its attribute scale was set"]
    agree(ours, theirs, batch((2, 4, 3, 5), device))
    assert calls == [True, False]
    assert type(ours) is OfMode


def test_residuals_of_other_shapes_and_dtypes_are_added_as_before(device):
    ours, theirs = pair(Forms(), device)
    agree(ours, theirs, batch((2, 4, 3, 5), device), batch((1, 4, 3, 5), device, 1).expand(2, 4, 3, 5))
    broadcast = nn.Sequential(Block(4, 4))
    ours, theirs = pair(broadcast, device)
    for model in (ours, theirs):
        model[0].downsample = nn.AdaptiveAvgPool2d(1)
    agree(ours, theirs, batch((2, 4, 3, 5), device))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(x)) if x.sum() > 0 else x


class Optional(Untraceable):
    def forward(self, x, skip=None):
        return F.relu(self.norm(x)) if skip is None else skip


class AsksForTypes(Untraceable):
    def forward(self, x):
        y = self.norm(x)
        return F.relu(y) if isinstance(y, torch.Tensor) else y


class Counts(Untraceable):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return F.relu(self.norm(x))


def test_what_cannot_be_traced_is_named(device):
    model = nn.Sequential(Untraceable(), Optional(), AsksForTypes(), Counts(), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.warns(UserWarning, match=r"torch.fx cannot trace, so not fused: ") as caught:
        ours, theirs = pair(model, device)
    (message,) = (str(w.message) for w in caught)
    for part in (
        "0 (Untraceable): TraceError: symbolically traced variables cannot be used as inputs to control flow",
        "1 (Optional): TraceError: forward has arguments that may be left out",
        "2 (AsksForTypes): TraceError: forward asks for the type of what it has computed",
        "3 (Counts): TraceError: forward changes attributes",
    ):
        assert part in message
    assert ours[3].calls == 0
    assert [type(m) for m in ours[:4]] == [Untraceable, Optional, AsksForTypes, Counts]
    agree(ours, theirs, batch((2, 4, 3, 5), device))


class OfLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(torch.cat(x, 2) if isinstance(x, list) else x))


def test_arguments_that_are_no_tensors_take_the_modules_own_forward(device, monkeypatch):
    ours, theirs = pair(OfLists(), device)
    calls, x = fused_in(monkeypatch), batch((2, 4, 3, 5), device)
    torch.testing.assert_close(ours([x, x]), theirs([x, x]))
    torch.testing.assert_close(ours(x=x), theirs(x))
    assert calls == []
    torch.testing.assert_close(ours(x), theirs(x))
    assert calls == [False]


def test_hooks_see_what_they_saw(device):
    """On a batch normalisation, or on a ReLU: its own result."""
    ours, theirs = pair(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), Block(4, 4)), device)
    seen = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        seen[name] = []
        for module in (model[0], model[1], model[2].bn2):
            module.register_forward_hook(lambda _, args, y, name=name: seen[name].append(y.clone()))
    agree(ours, theirs, batch((2, 4, 3, 5), device))
    assert len(seen["theirs"]) == 6
    torch.testing.assert_close(seen["ours"], seen["theirs"])


def test_copies_pickles_and_the_way_back(device):
    ours, theirs = pair(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), Block(4, 4)), device)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m).__name__ for m in again.modules()] == [type(m).__name__ for m in ours.modules()]
        agree(again, copy.deepcopy(theirs), batch((2, 4, 3, 5), device))
    assert type(ours).__name__ == "FusedSequential"
    sliced = ours[:2]
    torch.testing.assert_close(sliced(batch((2, 4, 3, 5), device)), theirs[:2](batch((2, 4, 3, 5), device)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HN.convert_batch_norm(ours, fuse=True)
    with pytest.raises(TypeError, match="to_torch"):
        torch.jit.script(ours)
    HN.to_torch(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    agree(ours, theirs, batch((2, 4, 3, 5), device))


def test_a_fused_model_is_traced_exported_and_compiled_as_one_that_is_not():
    theirs = plain_net()
    ours, x = HN.convert_batch_norm(copy.deepcopy(theirs), fuse=True).eval(), batch((2, 3, 8, 8), "cpu")
    expected = theirs.eval()(x)
    traced = torch.fx.symbolic_trace(ours)
    assert str(traced.graph) == str(torch.fx.symbolic_trace(theirs).graph)
    torch.testing.assert_close(traced(x), expected)
    exported = torch.export.export(ours, (x,))
    assert not any("hw3gpu" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled.train()(x), theirs.train()(x))


def test_synchronised_modules_are_fused(device, monkeypatch):
    calls = fused_in(monkeypatch)
    ours, theirs = pair(nn.Sequential(Block(4, 4)), device, sync=True)
    assert type(ours[0].bn1) is HN.SyncBatchNorm
    agree(ours, theirs, batch((2, 4, 3, 5), device))
    assert calls == [False, True] * 2


class Activations(nn.Module):
    """SiLU by its function behind a sum, GELU by its module; by tanh it is another function, and stays."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.bn3, self.gelu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.GELU()

    def forward(self, x):
        y = F.silu(self.bn1(self.gelu(self.bn2(x))) + x)
        return F.gelu(self.bn3(y), approximate="tanh")


def test_other_activations(device, monkeypatch):
    ours, theirs = pair(Activations(), device)
    calls = fused_in(monkeypatch)
    agree(ours, theirs, batch((2, 4, 3, 5), device))
    assert calls == [False, True] * 2
    assert type(HN.to_torch(ours)) is Activations


def test_fuse_is_a_bool():
    with pytest.raises(TypeError, match=r"fuse: expected a bool, got builtins.str"):
        HN.convert_batch_norm(nn.BatchNorm2d(3), fuse="relu")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_without_a_graph_gives_the_bits_of_one_with(device, dtype, layout):
    """It keeps no mask; NaN passes the ReLU, the residual is not written to."""
    x, residual = (batch((3, 4, 5, 6), device, seed, dtype).contiguous(memory_format=layout) for seed in (0, 1))
    x[0, 0, 0, 0] = residual[0, 1, 0, 0] = torch.nan
    norm, before = HN.BatchNormAct2d(4, device=device).eval(), residual.clone()
    for added in (None, residual):
        expected = norm(x, added).detach()
        with torch.no_grad():
            y = norm(x, added)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        assert y.stride() == expected.stride()
        assert int(y.isnan().sum()) == (1 if added is None else 2)
    torch.testing.assert_close(residual, before, rtol=0, atol=0, equal_nan=True)
