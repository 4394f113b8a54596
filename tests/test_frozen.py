"""`FrozenBatchNorm2d`, `freeze`, and the modules of timm and torchvision.

Those are stand-ins of the same interface: their wheels do not load beside every build of PyTorch.
"""

from __future__ import annotations

import copy
import pickle
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from modules import batch, same
from torch import nn

import hw3gpu.nn as HN
from hw3gpu._nn.torch_modules import activation_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's."""

    def __init__(self, num_features, act=None, drop=None):
        super().__init__(num_features, eps=0.01)
        self.drop, self.act = drop or nn.Identity(), act or nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNorm2d(nn.Module):
    """torchvision's."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(num_features))

    def forward(self, x):
        w, b, rv, rm = (v.reshape(1, -1, 1, 1) for v in (self.weight, self.bias, self.running_var, self.running_mean))
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


BatchNormAct2d.__module__, FrozenBatchNorm2d.__module__ = "timm.layers.norm_act", "torchvision.ops.misc"


@pytest.fixture
def importable(monkeypatch):
    """The stand-ins under the names by which pickles ask for them."""
    for cls in (BatchNormAct2d, FrozenBatchNorm2d):
        found = ModuleType(cls.__module__)
        setattr(found, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, cls.__module__.partition(".")[0], found)
        monkeypatch.setitem(sys.modules, cls.__module__, found)


def x_of(device, seed=0):
    return batch((3, 4, 5, 6), device, seed)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.Identity(), "hooked"], ids=str)
def test_timms_batch_norm_act(device, act, importable, monkeypatch):
    """Training, its gradients, evaluation; the ReLU in the same pass; the way back; copies and pickles."""
    theirs = BatchNormAct2d(4, nn.ReLU() if act == "hooked" else act).double().to(device)
    seen, fused = [], []
    if act == "hooked":
        theirs.act.register_forward_hook(lambda *_: seen.append(1))
    net = HN.convert_batch_norm(nn.Sequential(copy.deepcopy(theirs)))
    ours = net[0]
    assert isinstance(ours, BatchNormAct2d)
    assert "hw3gpu.nn.TimmBatchNormAct2d" in str(type(ours))
    plain = HN.BatchNorm2d._forward
    note = lambda self, x, eps, **given: fused.append(given) or plain(self, x, eps, **given)  # noqa: E731
    monkeypatch.setattr(type(ours), "_forward", note, raising=False)
    for training in (True, False):
        x, z = (x_of(device).requires_grad_() for _ in range(2))
        y, expected = net.train(training)(x), theirs.train(training)(z)
        y.square().sum().backward()
        expected.square().sum().backward()
        same((y, x.grad, ours.weight.grad), (expected, z.grad, theirs.weight.grad))
    assert fused == [{} if activation_of(act) is None else {"activation": activation_of(act)}] * 2
    assert bool(seen) == (act == "hooked")
    same(list(ours.state_dict().values()), list(theirs.state_dict().values()))
    if act != "hooked":
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(again) is type(ours)
            same(again(x_of(device)), theirs(x_of(device)))
    assert HN.convert_batch_norm(net)[0] is ours
    back = HN.to_torch(net)[0]
    assert type(back) is BatchNormAct2d
    assert vars(back).keys() == vars(theirs).keys()


def test_timms_is_named_where_it_is_not_synchronised():
    with pytest.warns(UserWarning, match=r"not synchronised: 0 \(timm.layers.norm_act.BatchNormAct2d\)"):
        HN.convert_batch_norm(nn.Sequential(BatchNormAct2d(3)), sync=True)


def test_torchvisions_frozen_batch_norm(device, importable):
    theirs = FrozenBatchNorm2d(4).double().to(device)
    ours = HN.convert_batch_norm(copy.deepcopy(theirs))
    assert isinstance(ours, FrozenBatchNorm2d)
    x, z = (x_of(device).requires_grad_() for _ in range(2))
    same(ours(x), theirs(z))
    ours(x).square().sum().backward()
    theirs(z).square().sum().backward()
    same(x.grad, z.grad)
    assert type(pickle.loads(pickle.dumps(ours))) is type(ours)
    traced = torch.fx.symbolic_trace(nn.Sequential(ours))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert type(HN.to_torch(ours)) is FrozenBatchNorm2d


def test_frozen_batch_norm(device):
    """Of a batch normalisation's checkpoint: its evaluation, whatever the mode; nothing in it is trained."""
    plain = nn.BatchNorm2d(4).double().to(device)
    plain(x_of(device, 1))
    ours = HN.FrozenBatchNorm2d(4).double().to(device)
    ours.load_state_dict(plain.state_dict())
    assert list(ours.parameters()) == []
    assert list(ours.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    same(ours.train()(x_of(device)), plain.eval()(x_of(device)))
    assert repr(ours) == "FrozenBatchNorm2d(4, eps=1e-05)"
    with pytest.raises(TypeError, match=r"hw3gpu\.nn\.to_torch"):
        torch.jit.script(ours)
    same(torch.jit.script(HN.to_torch(ours))(x_of(device)), plain(x_of(device)))


def test_freeze_outlives_train(device):
    """Evaluation for good: statistics, weight and bias stay, the gradient of x is that of known statistics."""
    net = nn.Sequential(HN.BatchNorm2d(4), HN.BatchNormAct2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)).double().to(device)
    net(x_of(device, 1))
    before = copy.deepcopy(net[:2].state_dict())
    assert HN.freeze_batch_norm(net) is net
    net.train()
    assert [m.training for m in net] == [False, False, True, True]
    x = x_of(device).requires_grad_()
    y = net[:2](x)
    expected = x
    for m, eps in ((net[0], net[0].eps), (net[1], net[1].epsilon)):
        expected = F.batch_norm(expected, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, eps)
    same(y, expected.relu())
    net(x).sum().backward()
    same(list(net[:2].state_dict().values()), list(before.values()))
    assert all(p.grad is None for p in net[:2].parameters())
    assert copy.deepcopy(net).train()[0].training is False
    for module in net[:2]:
        module.unfreeze()
    assert [m.training for m in net] == [True] * 4
    assert all(p.requires_grad for p in net.parameters())
    back = HN.to_torch(HN.BatchNorm2d(3).freeze())
    assert vars(back).keys() == vars(nn.BatchNorm2d(3)).keys()
    assert not back.training


def test_freeze_needs_something_to_freeze():
    with pytest.raises(ValueError, match=r"module: expected batch normalisations of hw3gpu.nn in it, got none"):
        HN.freeze_batch_norm(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got builtins.str"):
        HN.freeze_batch_norm("model")
