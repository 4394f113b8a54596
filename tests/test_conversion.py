"""`convert_batch_norm`: PyTorch's modules replaced in a model, and what of them stays."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from modules import batch, same, same_state
from torch import nn

import hw3gpu.nn as HN

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None), nn.ReLU())
        self.missing = None

    def forward(self, x):
        return x + self.body(self.norm(x))


class OwnBatchNorm(nn.BatchNorm2d):
    pass


def model():
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(4)
    deep = nn.Sequential(nn.Sequential(shared))
    plain = nn.BatchNorm2d(4, affine=False)
    return nn.Sequential(nn.Conv2d(3, 4, 3), shared, Residual(), deep, plain, nn.Flatten(2), nn.BatchNorm1d(4))


def test_conversion_finds_every_module_and_changes_no_number(device):
    theirs = model().double().to(device)
    ours = HN.convert_batch_norm(copy.deepcopy(theirs))
    kinds = [type(m).__module__ for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(kinds) == 5
    assert set(kinds) == {"hw3gpu.nn"}
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for step in range(3):
        if step == 2:
            ours.eval()
            theirs.eval()
        x = batch((2, 3, 6, 6), device, step)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    same_state(ours, theirs)


def test_conversion_keeps_the_objects_that_others_hold(device):
    """Parameters, buffers, flags and hooks: an optimizer made before goes on working."""
    net = model().to(device)
    net[2].norm.eval()
    net[1].weight.requires_grad_(False)
    calls = []
    net[1].register_forward_hook(lambda *_: calls.append(1))
    parameters = [id(p) for p in net.parameters()]
    buffers = [id(b) for b in net.buffers()]
    flags = [m.training for m in net.modules()]
    converted = HN.convert_batch_norm(net)
    assert converted is net
    assert [id(p) for p in net.parameters()] == parameters
    assert [id(b) for b in net.buffers()] == buffers
    assert [m.training for m in net.modules()] == flags
    assert not net[1].weight.requires_grad
    net(batch((2, 3, 6, 6), device, dtype=torch.float32))
    assert calls == [1, 1]


def test_conversion_keeps_a_shared_module_shared():
    net = HN.convert_batch_norm(model())
    assert net[1] is net[3][0][0]
    assert type(net[1]) is HN.BatchNorm2d


def test_conversion_of_a_single_module():
    theirs = nn.BatchNorm3d(5, eps=0.5, momentum=0.2)
    ours = HN.convert_batch_norm(theirs)
    assert type(ours) is HN.BatchNorm3d
    assert (ours.num_features, ours.eps, ours.momentum, ours.affine) == (5, 0.5, 0.2, True)
    assert ours.weight is theirs.weight
    assert type(theirs) is nn.BatchNorm3d


def test_conversion_leaves_alone_what_is_not_torchs_own():
    """A subclass may do anything in its forward; ours are ours already; other norms are other norms."""
    net = nn.Sequential(OwnBatchNorm(3), HN.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(3))
    before = list(net)
    assert all(a is b for a, b in zip(HN.convert_batch_norm(net), before, strict=True))


def test_conversion_says_what_it_replaced(caplog):
    """One line a layer, a shared one once, with the name that it goes by in the model; and what it left alone."""
    net = nn.Sequential(model(), OwnBatchNorm(3), HN.BatchNorm2d(2), nn.SyncBatchNorm(5))
    with caplog.at_level("INFO", logger="hw3gpu.nn"):
        HN.convert_batch_norm(net)
    assert [record.getMessage() for record in caplog.records] == [
        "0.1: torch.nn.BatchNorm2d(4) -> hw3gpu.nn.BatchNorm2d(4)",
        "0.2.norm: torch.nn.BatchNorm2d(4) -> hw3gpu.nn.BatchNorm2d(4)",
        "0.2.body.1: torch.nn.BatchNorm2d(4) -> hw3gpu.nn.BatchNorm2d(4)",
        "0.4: torch.nn.BatchNorm2d(4) -> hw3gpu.nn.BatchNorm2d(4)",
        "0.6: torch.nn.BatchNorm1d(4) -> hw3gpu.nn.BatchNorm1d(4)",
        "1: test_conversion.OwnBatchNorm(3) left alone: only PyTorch's own classes are replaced",
        "3: torch.nn.SyncBatchNorm(5) -> hw3gpu.nn.SyncBatchNorm(5)",
    ]
    assert type(net[3]) is HN.SyncBatchNorm


def test_conversion_to_synchronised(caplog):
    """Every batch normalisation, our own too; parameters, shared modules and flags as they were."""
    net = nn.Sequential(model(), HN.BatchNormAct2d(2), nn.SyncBatchNorm(5)).eval()
    state = {name: id(v) for name, v in net.state_dict(keep_vars=True).items()}
    with caplog.at_level("INFO", logger="hw3gpu.nn"):
        assert HN.SyncBatchNorm.convert_sync_batchnorm(net) is net
    assert {name: id(v) for name, v in net.state_dict(keep_vars=True).items()} == state
    norms = [m for m in net.modules() if hasattr(m, "running_mean")]
    assert [type(m) for m in norms].count(HN.SyncBatchNorm) == 6
    assert len(norms) == len(caplog.records) == 7
    assert all(m.process_group is None and not m.training for m in norms)
    assert type(net[1]) is HN.SyncBatchNormAct
    assert net[0][1] is net[0][3][0][0]
    assert net[1].activation == "relu"
    assert "0.1: torch.nn.BatchNorm2d(4) -> hw3gpu.nn.SyncBatchNorm(4)" in caplog.messages


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def test_conversion_to_synchronised_warns_of_what_it_leaves():
    """Subclasses, of ours too, lazy and parametrised modules, by their names; and of nothing else."""
    parametrised = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(parametrised, "weight", Doubled())
    own = type("OwnOfOurs", (HN.BatchNorm2d,), {})(3)
    net = nn.Sequential(nn.BatchNorm2d(3), OwnBatchNorm(3), nn.LazyBatchNorm2d(), nn.Sequential(parametrised, own), nn.ReLU())
    before = list(net)
    with pytest.warns(UserWarning, match="convert_batch_norm: left alone, and not synchronised: ") as caught:
        HN.convert_batch_norm(net, sync=True)
    names = ("1 (test_conversion.OwnBatchNorm)", "2 (torch.nn.modules.batchnorm.LazyBatchNorm2d)",
             "3.0 (torch.nn.utils.parametrize.ParametrizedBatchNorm2d)", "3.1 (test_conversion.OwnOfOurs)")  # fmt: skip
    assert str(caught[0].message).endswith(": " + ", ".join(names))
    assert len(caught) == 1
    assert type(net[0]) is HN.SyncBatchNorm
    assert list(net)[1:] == before[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HN.convert_batch_norm(net[:1], sync=True)
        HN.convert_batch_norm(nn.Sequential(OwnBatchNorm(3)))


def test_conversion_of_what_is_synchronised_already():
    """The same module; its group stays."""
    theirs = nn.SyncBatchNorm(3, process_group=1)
    net = nn.Sequential(HN.SyncBatchNorm(3, process_group="a group"), HN.SyncBatchNormAct(3), theirs)
    before = list(net)
    HN.convert_batch_norm(net, sync=True)
    assert [net[0], net[1]] == before[:2]
    assert [m.process_group for m in net] == ["a group", None, 1]
    assert type(net[2]) is HN.SyncBatchNorm


def test_conversion_to_a_group_that_is_none():
    with pytest.raises(TypeError, match=r"sync: expected a bool or a process group, got builtins.str"):
        HN.convert_batch_norm(model(), sync="all")


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 4, 4), (2, 3, 2, 3, 2)], ids=str)
def test_synchronised_without_processes_is_batch_normalisation(device, shape):
    """Training, evaluation, and a checkpoint both ways with PyTorch's module."""
    theirs = nn.BatchNorm1d(3, momentum=0.3, eps=0.01).double().to(device)
    theirs._check_input_dim = lambda _: None
    ours = HN.SyncBatchNorm(3, momentum=0.3, eps=0.01).double().to(device)
    ours.load_state_dict(nn.SyncBatchNorm(3).state_dict())
    for training in (True, False):
        x = batch(shape, device, int(training))
        same(ours.train(training)(x), theirs.train(training)(x))
    same_state(ours, theirs)
    nn.SyncBatchNorm(3).load_state_dict(ours.state_dict())
    same(copy.deepcopy(ours)(x), ours(x))


def test_synchronised_checks_its_input():
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        HN.SyncBatchNorm(3)(torch.ones(3))
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        HN.SyncBatchNorm(0)(torch.ones(3, 0))
    assert HN.SyncBatchNorm(3, bias=False).bias is None
    assert HN.SyncBatchNorm(3, affine=False, track_running_stats=False).state_dict() == {}


def test_conversion_of_something_else():
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got builtins.dict"):
        HN.convert_batch_norm({})
