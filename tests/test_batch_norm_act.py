"""`nn.BatchNormAct1d/2d/3d` and `SyncBatchNormAct`: no tool that changes a model loses the activation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from modules import batch, same
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import hw3gpu.nn as HN

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KINDS = {
    "1d": (HN.BatchNormAct1d, nn.BatchNorm1d, (6, 3)),
    "1d, with a length": (HN.BatchNormAct1d, nn.BatchNorm1d, (4, 3, 5)),
    "2d": (HN.BatchNormAct2d, nn.BatchNorm2d, (2, 3, 5, 5)),
    "3d": (HN.BatchNormAct3d, nn.BatchNorm3d, (2, 3, 2, 3, 2)),
    "synchronised": (HN.SyncBatchNormAct, nn.BatchNorm2d, (2, 3, 5, 5)),
}


def pair(kind, device="cpu", **options):
    """Our module and PyTorch's of the same state, and the shape of an input."""
    ours, theirs, shape = KINDS[kind]
    ours, theirs = (of(3, momentum=0.3, eps=0.01, device=device, dtype=torch.float64) for of in (ours, theirs))
    with torch.no_grad():
        for v in theirs.state_dict().values():
            v.copy_(0.5 + torch.rand(v.shape, generator=torch.Generator().manual_seed(1)))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, shape


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_torchs_three_operations(device, kind):
    """Training, evaluation, and the state both ways; with a residual and without, with a ReLU and without."""
    ours, theirs, shape = pair(kind, device)
    x, residual = batch(shape, device), batch(shape, device, 1)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        same(ours(x), theirs(x).relu())
        same(ours(x, residual=residual), (theirs(x) + residual).relu())
    ours.activation = None
    same(ours(x, residual), theirs(x) + residual)
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_arguments():
    assert HN.BatchNormAct2d(3, activation=None).activation is None
    assert repr(HN.BatchNormAct2d(3, eps=0.5)) == (
        "BatchNormAct2d(3, eps=0.5, momentum=0.1, affine=True, bias=True, track_running_stats=True, activation='relu')"
    )
    with pytest.raises(ValueError, match="expected 4D input"):
        HN.BatchNormAct2d(3)(torch.ones(2, 3))
    module = HN.BatchNormAct1d(3)
    module.eps = 0.25
    assert module.epsilon == 0.25
    for kind, name in ((HN.BatchNorm2d, "BatchNormAct2d"), (HN.SyncBatchNorm, "SyncBatchNormAct")):
        with pytest.raises(TypeError, match=rf"activation: {kind.__name__} is PyTorch's and has none; use hw3gpu.nn.{name}"):
            kind(3, activation="relu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_and_a_pickle_keep_the_activation(kind):
    ours, theirs, shape = pair(kind)
    x = batch(shape, "cpu")
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is type(ours)
        same(again.eval()(x), theirs.eval()(x).relu())


# ---------------------------------------------------------------------------------------------- tools
def timm_converted(module):
    """`convert_sync_batchnorm` of timm 1.0, for a module whose class it does not know as its own."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        converted = nn.SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine)
        converted.load_state_dict(module.state_dict())
        return converted.train(module.training)
    for name, child in module.named_children():
        module.add_module(name, timm_converted(child))
    return module


class Frozen(nn.Module):
    """Of the constants a module has; torchvision's `FrozenBatchNorm2d`."""

    def __init__(self, module):
        super().__init__()
        self.scale = module.weight * (module.running_var + module.eps).rsqrt()
        self.shift = module.bias - module.running_mean * self.scale

    def forward(self, x):
        return x * self.scale[:, None, None] + self.shift[:, None, None]


def timm_frozen(module):
    """`freeze_batch_norm_2d` of timm 1.0, likewise."""
    if isinstance(module, (nn.modules.batchnorm.BatchNorm2d, nn.modules.batchnorm.SyncBatchNorm)):
        return Frozen(module)
    for name, child in module.named_children():
        module.add_module(name, timm_frozen(child))
    return module


TOOLS = {
    "PyTorch's convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm's convert_sync_batchnorm": timm_converted,
    "timm's freeze_batch_norm_2d": timm_frozen,
    "torch.func.replace_all_batch_norm_modules_": torch.func.replace_all_batch_norm_modules_,
    "ours": lambda model: HN.convert_batch_norm(model),
    "ours, synchronised": lambda model: HN.convert_batch_norm(model, sync=True),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", ["2d", "synchronised"])
def test_what_replaces_batch_normalisations_leaves_the_activation(tool, kind):
    ours, theirs, shape = pair(kind)
    x = batch(shape, "cpu")
    model = TOOLS[tool](nn.Sequential(ours.eval()))
    same(model(x), theirs.eval()(x).relu())
    bare = TOOLS[tool](ours)
    same(bare(x), theirs(x).relu())


def test_what_folds_it_is_refused():
    """By the one attribute that every such tool reads; what the message advises, and docs/training.md, is right."""
    ours, _, shape = pair("2d")
    ours, conv = ours.eval(), nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64).eval()
    message = r"BatchNormAct2d has no `eps`, so that nothing folds it .* load its state_dict into a torch.nn.BatchNorm2d"
    with pytest.raises(AttributeError, match=message):
        fuse_conv_bn_eval(conv, ours)
    with pytest.raises(AttributeError, match="BatchNormAct1d has no `eps`"):
        fuse_linear_bn_eval(nn.Linear(3, 3).eval(), HN.BatchNormAct1d(3).eval())
    assert not hasattr(ours, "eps")
    plain = nn.BatchNorm2d(3, eps=ours.epsilon, dtype=torch.float64)
    plain.load_state_dict(ours.state_dict())
    x = batch(shape, "cpu")
    same(fuse_conv_bn_eval(conv, plain.eval())(x).relu(), ours(conv(x)))


def test_no_tool_takes_it_for_torchs():
    for kind, _, _ in KINDS.values():
        assert not issubclass(kind, (nn.modules.batchnorm._BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        assert "update_bn" in kind.__doc__, "that the tools pass it over is said"
