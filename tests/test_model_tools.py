"""The tools that people run over a model find in ours what they find in PyTorch's, or say what to do.

The nets have the layers of torchvision's ResNet and MobileNet.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from modules import batch, same
from torch import nn
from torch.fx.experimental.optimization import fuse

import hw3gpu.functional as HF
import hw3gpu.nn as HN

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")


class Block(nn.Module):
    """A residual block as torchvision's, with one ReLU used twice."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


def plain_net(dtype=torch.float64):
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
    net = nn.Sequential(stem, Block(4, 5), Block(5, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4)).to(dtype)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


def nets(dtype=torch.float64, training=False):
    """PyTorch's and ours, of the same numbers."""
    theirs = plain_net(dtype).train(training)
    return theirs, HN.convert_batch_norm(copy.deepcopy(theirs))


class Fused(nn.Module):
    """Fused modules, one with a residual and one without, and a synchronised one."""

    def __init__(self):
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 3, 3, padding=1), HN.BatchNormAct2d(3, eps=0.01)
        self.second, self.third = HN.BatchNormAct2d(3, activation=None), HN.SyncBatchNormAct(3, momentum=0.3)

    def forward(self, x):
        return self.third(self.second(self.first(self.conv(x)), x), residual=x)


def images(dtype=torch.float64, seed=0):
    return batch((2, 3, 8, 8), "cpu", seed, dtype)


def names_of(model):
    return [type(m) for m in model.modules()]


# ---------------------------------------------------------------------------------------------- the way back
def test_to_torch_undoes_the_conversion(caplog):
    """Classes, objects, hooks and what is shared; the attributes of each module are what they were."""
    theirs = plain_net()
    theirs.append(theirs[0][1])
    theirs.append(nn.SyncBatchNorm(4))
    called = []
    handle = theirs[5].register_forward_hook(lambda *_: called.append(1))
    before = [(type(m), m.__dict__.copy()) for m in theirs.modules()]
    objects = {k: id(v) for k, v in theirs.state_dict(keep_vars=True).items()}
    HN.convert_batch_norm(theirs)
    assert sum("hw3gpu" in kind.__module__ for kind in names_of(theirs)) == 9
    with caplog.at_level("INFO", logger="hw3gpu.nn"):
        assert HN.to_torch(theirs) is theirs
    after = [(type(m), m.__dict__.copy()) for m in theirs.modules()]
    assert [kind for kind, _ in after] == [kind for kind, _ in before]
    for (_, a), (_, b) in zip(after, before, strict=True):
        assert {k: v for k, v in a.items() if k != "_modules"} == {k: v for k, v in b.items() if k != "_modules"}
    assert {k: id(v) for k, v in theirs.state_dict(keep_vars=True).items()} == objects
    assert theirs[6] is theirs[0][1]
    assert "0.1: hw3gpu.nn.BatchNorm2d(4) -> torch.nn.BatchNorm2d(4)" in caplog.messages
    assert len(caplog.messages) == 9
    theirs[:6](images())
    handle.remove()
    theirs[:6](images())
    assert called == [1]


@pytest.mark.parametrize("training", [True, False])
def test_to_torch_of_fused_modules(training):
    """BatchNorm, sum and ReLU: the same numbers, statistics, state both ways, and hooks of the whole."""
    ours = Fused().double().train(training)
    seen = []
    handle = ours.first.register_forward_hook(lambda _, args, y: seen.append(y))
    theirs = HN.to_torch(copy.deepcopy(ours))
    assert not any(isinstance(m, (HN.BatchNormAct2d, HN.SyncBatchNormAct)) for m in theirs.modules())
    assert [type(m.norm) for m in theirs.children() if hasattr(m, "norm")] == [nn.BatchNorm2d] * 2 + [nn.SyncBatchNorm]
    same(theirs(images()), ours(images()))
    same(*seen)
    same(list(theirs.state_dict().values()), list(ours.state_dict().values()))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    fresh = HN.to_torch(Fused().double())
    fresh.load_state_dict(ours.state_dict())
    same(fresh.eval()(images()), ours.eval()(images()))
    again = pickle.loads(pickle.dumps(fresh))
    again.load_state_dict(fresh.state_dict())
    same(again(images()), fresh(images()))
    parameters = {id(p) for p in ours.parameters()}
    assert {id(p) for p in HN.to_torch(ours).parameters()} == parameters
    handle.remove()
    assert len(ours.first._forward_hooks) == 0


def test_to_torch_of_losses():
    """Where PyTorch has what they were given; the way of computing does not count."""
    weight = torch.tensor([1.0, 2, 3])
    model = nn.ModuleList([HN.CrossEntropyLoss(weight, label_smoothing=0.1, gradient="backward", z_loss=0.0)])
    model.append(HN.LinearCrossEntropyLoss(4, 3, chunk_rows=2))
    logits, hidden, target = torch.randn(5, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    expected = model[0](logits, target), model[1](hidden, target)
    HN.to_torch(model)
    assert names_of(model)[1:3] == [nn.CrossEntropyLoss, nn.LinearCrossEntropyLoss]
    assert vars(model[0]).keys() == vars(nn.CrossEntropyLoss()).keys()
    torch.testing.assert_close((model[0](logits, target), model[1](hidden, target)), expected)


def test_to_torch_refuses_what_pytorch_has_not():
    """Before anything is replaced."""
    model = nn.Sequential(HN.BatchNorm2d(3), HN.CrossEntropyLoss(z_loss=1e-4, softcap=30.0, gradient="forward"))
    model.append(type("Own", (HN.BatchNorm2d,), {})(3))
    message = r"no equal of 1: CrossEntropyLoss with z_loss=0.0001, softcap=30.0; 2: \S+\.Own, a subclass of ours"
    with pytest.raises(ValueError, match=message):
        HN.to_torch(model)
    assert type(model[0]) is HN.BatchNorm2d
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got builtins.list"):
        HN.to_torch([])
    bare = HN.BatchNorm3d(3, eps=0.1)
    assert type(HN.to_torch(bare)) is nn.BatchNorm3d
    assert HN.to_torch(bare).eps == 0.1


# ---------------------------------------------------------------------------------------------- torch.fx
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace_records_what_it_records_of_pytorchs(training):
    """Our modules are leaves; the graph trains and evaluates on our kernels, and has the model's state."""
    theirs, ours = nets(training=training)
    expected = torch.fx.symbolic_trace(theirs)
    traced = torch.fx.symbolic_trace(ours)
    assert str(traced.graph) == str(expected.graph)
    assert type(traced.get_submodule("1.bn2")) is HN.BatchNorm2d
    same(traced(images()), theirs(images()))
    same(list(traced.state_dict().values()), list(theirs.state_dict().values()))
    again = torch.fx.symbolic_trace(traced)
    same(again(images()), theirs(images()))


class Ends(nn.Module):
    """A convolution of (B, W, H, C) at one end, a loss at the other."""

    def __init__(self):
        super().__init__()
        self.conv, self.criterion = HN.Conv2D(3, 4, (3, 2)), HN.CrossEntropyLoss(z_loss=0.1)

    def forward(self, x, target):
        return self.criterion(self.conv(x).flatten(1), target)


def test_symbolic_trace_of_fused_modules_losses_and_convolutions():
    for model, args in (
        (Fused(), (images(torch.float32),)),
        (Ends(), (images(torch.float32).permute(0, 2, 3, 1), torch.tensor([3, 1]))),
    ):
        traced = torch.fx.symbolic_trace(model)
        called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        assert called == [name for name, _ in model.named_children()]
        same(traced(*args), model(*args))


def test_fx_fusion_after_to_torch():
    """`fuse` and FX quantisation look for PyTorch's classes: the modules of `to_torch` are these."""
    theirs, ours = nets()
    fused = fuse(HN.to_torch(ours))
    assert not any("BatchNorm2d" in kind.__name__ for kind in names_of(fused))
    same(fused(images()), theirs(images()))


def quantised(model, x):
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    return quantize_fx.convert_fx(prepared)


def test_quantisation_after_to_torch():
    """FX's, and `fuse_modules`: what PyTorch's model gives, bit by bit. Without `to_torch` FX quantises around ours."""
    from torch.ao.quantization import fuse_modules

    x = images(torch.float32)
    theirs, ours = nets(torch.float32)
    assert torch.equal(quantised(HN.to_torch(copy.deepcopy(ours)), x)(x), quantised(theirs, x)(x))
    assert sum(type(m) is HN.BatchNorm2d for m in quantised(ours, x).modules()) == 7
    for listed in (["conv1", "bn1", "relu"], ["conv2", "bn2"]):
        fused = fuse_modules(HN.to_torch(copy.deepcopy(ours))[1], [listed])
        assert torch.equal(fused(theirs[0](x)), fuse_modules(theirs[1], [listed])(theirs[0](x)))


# ---------------------------------------------------------------------------------------------- TorchScript
def test_script_says_that_it_needs_to_torch():
    for model in (nets()[1], Fused(), HN.CrossEntropyLoss()):
        with pytest.raises(TypeError, match=r"torch.jit.script: \w+ runs this library's kernels.*hw3gpu.nn.to_torch"):
            torch.jit.script(model)


def test_script_after_to_torch():
    theirs, ours = nets()
    same(torch.jit.script(HN.to_torch(ours))(images()), theirs(images()))
    fused = Fused().double()
    fused.third = HN.BatchNormAct2d(3).double()  # PyTorch's own SyncBatchNorm is not scripted
    scripted = torch.jit.script(HN.to_torch(copy.deepcopy(fused)))
    same(scripted(images()), fused(images()))


# ---------------------------------------------------------------------------------------------- torch.export
class Losses(nn.Module):
    """Every function that has an operator of ours, but those of several processes."""

    def forward(self, z, target, hidden, weight):
        mean = HF.cross_entropy(z, target, label_smoothing=0.1, z_loss=0.01)
        rows, stats = HF.cross_entropy(z, z.softmax(1), reduction="none", softcap=3.0, return_stats=True)
        linear = HF.linear_cross_entropy(hidden, weight, target, chunk_rows=2)
        found = HF.token_log_probs(z, target, temperature=2.0)
        chunked = HF.linear_token_log_probs(hidden, weight, target)
        return mean, rows, stats.entropy, linear, *found, *chunked, HF.softmax(z, 1)


def losses_arguments():
    return batch((5, 4), "cpu", 1), torch.tensor([0, 3, 2, 1, 1]), batch((5, 6), "cpu", 2), batch((4, 6), "cpu", 3)


def operators_of(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("which", ["losses", "fused modules", "converted"])
def test_an_exported_graph_has_pytorchs_operations_alone(which):
    """A runtime without this library runs it; `run_decompositions` takes it down to core ATen."""
    model = {"losses": Losses(), "fused modules": Fused().double().eval(), "converted": nets()[1]}[which]
    args = losses_arguments() if which == "losses" else (images(),)
    program = torch.export.export(model, args, strict=which == "fused modules")
    for stage in (program, program.run_decompositions()):
        assert [name for name in operators_of(stage) if not name.startswith(("aten.", "<built-in"))] == []
        torch.testing.assert_close(stage.module()(*args), model(*args), rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------- ONNX
def onnx_of(model, args, dynamo):
    """The model's graph, and its results by ONNX's own evaluator."""
    onnx = pytest.importorskip("onnx", reason="ONNX export needs the package onnx")
    from onnx.reference import ReferenceEvaluator

    if dynamo:
        pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs the package onnxscript")
        proto = torch.onnx.export(model, args, dynamo=True, verbose=False, optimize=False).model_proto
    else:
        file = io.BytesIO()
        kept = torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(model, args, file, dynamo=False, training=kept, do_constant_folding=False)
        proto = onnx.load_from_string(file.getvalue())
    evaluator = ReferenceEvaluator(proto)
    names = [value.name for value in proto.graph.input]
    fed = {name: value.numpy() for name, value in zip(names, args, strict=True)}
    return proto, [torch.as_tensor(v) for v in evaluator.run(None, fed)]


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript exporter", "torch.export exporter"])
def test_onnx_has_its_own_batch_normalization(dynamo):
    """One for each of ours in evaluation, none of our operators, and the numbers of the model."""
    for model in (nets(torch.float32)[1], Fused().eval()):
        proto, (y,) = onnx_of(model, (images(torch.float32),), dynamo)
        ours = [m for m in model.modules() if hasattr(m, "running_mean")]
        assert sum(node.op_type == "BatchNormalization" for node in proto.graph.node) == len(ours)
        assert {node.domain for node in proto.graph.node} <= {"", "pkg.onnxscript.torch_lib.common"}
        torch.testing.assert_close(y, model(images(torch.float32)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript exporter", "torch.export exporter"])
def test_onnx_of_training_and_losses(dynamo):
    """Batch statistics and the loss become ONNX's operations: the numbers of the model."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.criterion = HN.BatchNormAct2d(3), HN.CrossEntropyLoss(z_loss=0.1, label_smoothing=0.1)

        def forward(self, x, target):
            return self.criterion(self.norm(x).flatten(1), target)

    args, step = (images(torch.float32), torch.tensor([3, 1])), Step()
    proto, (loss,) = onnx_of(copy.deepcopy(step), args, dynamo)
    assert not any("hw3gpu" in node.domain for node in proto.graph.node)
    torch.testing.assert_close(loss, step(*args), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- pt2e
def test_pt2e_quantises_it_as_pytorchs():
    """Prepared, calibrated and converted: the graph of PyTorch's model, and its numbers bit by bit."""
    ao = "pt2e quantisation needs the package torchao"
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason=ao, exc_type=ImportError)
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", reason=ao, exc_type=ImportError)
    x, found = images(torch.float32), []
    for model in nets(torch.float32):
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(torch.export.export(model[0], (x,)).module(), quantizer)
        prepared(x)
        converted = pt2e.convert_pt2e(prepared)
        found.append((str(converted.graph), converted(x)))
    assert "quantize_per_tensor" in found[0][0]
    assert "batch_norm" not in found[0][0].partition("conv2d")[2].partition("relu6")[0]
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
