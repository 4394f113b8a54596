"""Batch normalisation where others hold the pen: the compiler, the exporter, tracers, `torch.func`, a second derivative.

Results are held to the eager call's, which `test_functional_batch_norm.py` holds to the answer sheet.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from twins import gradcheck, gradgradcheck, layout_of, opcheck, same, tensor

import hw3gpu.functional as HF
import hw3gpu.nn as HN
from hw3gpu._core.dispatch import requested_backend
from hw3gpu._torch import batch_norm as operators

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def operands(rng, device, shape=(3, 2, 4), dtype="float64", grad=True):
    """x, weight, bias, running_mean and running_var."""
    C = shape[1]
    x, weight, bias = (tensor(rng.standard_normal(s), dtype, device, grad) for s in (shape, (C,), (C,)))
    return x, weight, bias, tensor(rng.standard_normal(C), dtype, device), tensor(rng.random(C) + 0.5, dtype, device)


# ---------------------------------------------------------------------------------------------- operators
@pytest.mark.graphs
@pytest.mark.parametrize(
    ("layout", "dtype"), [("contiguous", "float64"), ("channels-last", "bfloat16"), ("sliced", "float32")], ids=str
)
def test_operators_keep_the_rules_of_torch_library(device, rng, layout, dtype):
    """Schemas say what is written, fakes what comes out (its strides too), and autograd goes through the compiler."""
    x, weight, bias, mean, var = operands(rng, device, (3, 2, 4, 3), dtype)
    x = layout_of(x.detach(), layout).requires_grad_()
    compiled = layout != "sliced"
    opcheck(operators.TRAINING, (x, weight, bias, None, mean, var, 0.1, 1e-5, None), compiled)
    opcheck(operators.EVALUATION, (x, weight, bias, None, mean, var, 0.1, 1e-5, None), compiled)
    _, stats, mask = operators.TRAINING(x, weight, bias, None, None, None, 0.1, 1e-5, None)
    x, weight = x.detach(), weight.detach()
    dy = layout_of(tensor(rng.standard_normal(x.shape), dtype, device), layout)
    for training in (True, False):
        opcheck(operators.BACKWARD, (dy, x, weight, None, None, stats, mask, training, None, False), compiled)


def test_operators_take_no_parameters_and_empty_batches(device, rng):
    x, *_ = operands(rng, device)
    opcheck(operators.TRAINING, (x, None, None, None, None, None, 0.1, 1e-5, None))
    opcheck(operators.TRAINING, (x[:0], None, None, None, None, None, 0.1, 1e-5, None))


# ---------------------------------------------------------------------------------------------- compiled, exported, traced
class Net(nn.Module):
    """Every mode of the modules, in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.plain = HN.BatchNorm2d(4)
        self.batch_alone = HN.BatchNorm2d(4, affine=False, track_running_stats=False)
        self.cumulative = HN.BatchNorm2d(4, momentum=None)
        self.volume = HN.BatchNorm3d(4)
        self.line = HN.BatchNorm1d(4)

    def forward(self, x):
        x = self.cumulative(self.batch_alone(self.plain(self.conv(x)).relu()))
        return self.line(self.volume(x[:, :, None])[:, :, 0].flatten(2))


def net(device):
    torch.manual_seed(0)
    return Net().double().to(device)


def step(model, x):
    """The output, and every gradient and buffer after a training step."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.pow(3).sum().backward()
    return [y, leaf.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.graphs
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiled_model_is_the_eager_one(device, dynamic):
    """No graph break; training steps at several batch sizes, each with its gradients and running statistics; evaluation."""
    eager = net(device)
    ours = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for i, n in enumerate((3, 7, 4) if requested_backend() != "gpu" else (3, 4)):
        x = torch.randn(n, 2, 6, 5, dtype=torch.float64, device=device)
        with torch._dynamo.config.patch(error_on_recompile=dynamic and i > 0):
            for a, b in zip(step(compiled, x), step(eager, x), strict=True):
                same(a, b, 1e-9)
    same(compiled.eval()(x), eager.eval()(x), 1e-9)


def test_a_model_goes_through_the_whole_compiler(device):
    eager = net(device)
    ours = copy.deepcopy(eager)
    torch._dynamo.reset()
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, device=device).to(memory_format=torch.channels_last)
    for a, b in zip(step(torch.compile(ours, fullgraph=True), x), step(eager, x), strict=True):
        same(a, b, 1e-9)


@pytest.mark.graphs
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_model_is_the_eager_one(device, strict):
    model = net(device).eval()
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, device=device)
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(model, (x,), strict=strict, dynamic_shapes=(batch,))
    more = torch.cat([x, -x, x])
    same(exported.module()(more), model(more))


class Fused(nn.Module):
    """Modules of each class that can be moved between training and evaluation."""

    def __init__(self, **options):
        super().__init__()
        self.act, self.plain = HN.BatchNormAct2d(2, **options), HN.BatchNorm2d(2, **options)
        self.synchronised = HN.SyncBatchNormAct(2, **options)

    def forward(self, x):
        return self.synchronised(self.plain(self.act(x, x)), x)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}], ids=str)
def test_an_exported_model_can_be_moved_between_training_and_evaluation(options):
    """The tools for that (torchao's `move_exported_model_to_eval`) look for `aten.batch_norm`, and pass over all else."""
    torch.manual_seed(0)
    model = Fused(**options).double()
    for buffer in model.buffers():
        buffer.fill_(1) if buffer.dim() == 0 else buffer.copy_(0.5 + torch.rand(2))
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    for training in (True, False):
        graph = torch.export.export(copy.deepcopy(model).train(training), (x,)).module()
        same(graph(x), copy.deepcopy(model).train(training)(x))
        graph = torch.export.export(copy.deepcopy(model).train(training), (x,)).module()
        found = [node for node in graph.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
        assert len(found) == 3
        for node in found:
            assert node.args[5] is training
            node.args = (*node.args[:5], not training, *node.args[6:])
        graph.recompile()
        same(graph(x), copy.deepcopy(model).train(not training)(x))


def test_tracers_see_an_operator(device, rng):
    """Under `make_fx` and `torch.jit.trace`; what they recorded is right for other inputs."""
    x, weight, bias, mean, var = operands(rng, device, grad=False)
    functions = {
        "training": lambda x: HF.batch_norm(x, None, None, weight, bias, True),
        "evaluation": lambda x: HF.batch_norm(x, mean, var, weight, bias),
    }
    for name, function in functions.items():
        graph = make_fx(function)(x)
        assert f"hw3gpu.batch_norm_{name}.default" in {str(node.target) for node in graph.graph.nodes}
        same(graph(2 * x - 1), function(2 * x - 1))
        with pytest.warns(torch.jit.TracerWarning):
            traced = torch.jit.trace(function, (x,))
        same(traced(2 * x - 1), function(2 * x - 1))


def test_shapes_alone(device, rng):
    """Fake and meta tensors: nothing runs, layouts are those of a real call."""
    x = operands(rng, device, (3, 2, 4, 5), grad=False)[0].to(memory_format=torch.channels_last)
    y = HF.batch_norm(x.to("meta"), None, None, training=True)
    assert y.is_meta
    assert (y.shape, y.stride()) == (x.shape, x.stride())
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x).requires_grad_()
        HF.batch_norm(fake, None, None, training=True).sum().backward()
    assert fake.grad.stride() == x.stride()


# ---------------------------------------------------------------------------------------------- derivatives of derivatives
CALLS = {
    "training": lambda f, o: lambda x, w, b: f(x, None, None, w, b, True),
    "evaluation": lambda f, o: lambda x, w, b: f(x, *o, w, b),
    "no parameters": lambda f, o: lambda x, w, b: f(x, None, None, None, None, True),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients_have_gradients(device, rng, name):
    *leaves, mean, var = operands(rng, device)
    if name == "no parameters":
        leaves = [leaves[0], *(v.detach() for v in leaves[1:])]
    ours, theirs = (CALLS[name](f, (mean, var)) for f in (HF.batch_norm, F.batch_norm))
    gradcheck(ours, leaves)
    gradgradcheck(ours, leaves)
    penalties = []
    for function in (ours, theirs):
        asking = [v for v in leaves if v.requires_grad]
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), asking, create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.square().sum() for g in first), asking))
    for a, b in zip(*penalties, strict=True):
        same(a, b, 1e-8)


@pytest.mark.parametrize("name", CALLS)
def test_transforms_of_torch_func(device, rng, name):
    *_, weight, bias, mean, var = operands(rng, device, grad=False)
    xs = tensor(rng.standard_normal((3, 4, 2, 3)), "float64", device)
    ours, theirs = (CALLS[name](f, (mean, var)) for f in (HF.batch_norm, F.batch_norm))
    transformed = {
        "vmap": lambda f: vmap(lambda x: f(x, weight, bias))(xs),
        "per-sample gradients": lambda f: vmap(grad(lambda x: f(x, weight, bias).pow(3).sum()))(xs),
        "ensemble": lambda f: vmap(grad(lambda w: f(xs[0], w, bias).pow(3).sum()))(torch.stack([weight, bias])),
        "jvp": lambda f: jvp(lambda x: f(x, weight, bias), (xs[0],), (xs[1],))[1],
        "hessian": lambda f: hessian(lambda x: f(x, weight, bias).pow(3).sum())(xs[0]),
    }
    for what, run in transformed.items():
        if what == "ensemble" and name == "no parameters":
            continue
        torch.testing.assert_close(run(ours), run(theirs), rtol=1e-9, atol=1e-9, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode(device, rng, name):
    x, weight, bias, mean, var = operands(rng, device, grad=False)
    tangent = tensor(rng.standard_normal(x.shape), "float64", device)
    results = []
    for function in (HF.batch_norm, F.batch_norm):
        with forward_ad.dual_level():
            y = CALLS[name](function, (mean, var))(forward_ad.make_dual(x, tangent), weight, bias)
            results.append(forward_ad.unpack_dual(y).tangent)
    same(*results, 1e-10)


@pytest.mark.parametrize("transform", ["jvp", "vmap"])
def test_running_statistics_under_transforms(device, rng, transform):
    """An argument of the transformed function is updated as by a plain call; what is captured PyTorch refuses to write to."""
    x, *_, mean, var = operands(rng, device, (4, 2, 3), grad=False)
    plain = mean.clone(), var.clone()
    HF.batch_norm(x, *plain, training=True)
    over = {
        "jvp": lambda f, *args: jvp(lambda x: f(x, *args[1:]), (args[0],), (args[0],)),
        "vmap": lambda f, *args: vmap(f)(*(torch.stack([v, v]) for v in args)),
    }[transform]
    captured = vmap(lambda x: HF.batch_norm(x, mean, var, training=True))
    with pytest.raises(RuntimeError, match=r"running_mean and running_var: training writes to them, .* one of each for every"):
        captured(torch.stack([x, x]))

    def updated(x, mean, var):
        mean, var = mean.clone(), var.clone()
        HF.batch_norm(x, mean, var, training=True)
        return mean, var

    results = over(lambda x, *running: updated(x + 0, *(v + 0 * x.sum() for v in running)), x, mean, var)
    results = results[0] if transform == "jvp" else tuple(v[1] for v in results)
    for a, b in zip(results, plain, strict=True):
        same(a, b)


def test_the_formula_keeps_the_digits_of_a_far_mean(device, rng):
    """Second derivatives of float32 at a mean of 1e4 are those of float64."""
    values = 1e4 + rng.standard_normal((6, 2, 5)).astype(np.float32).astype(np.float64)
    results = []
    for dtype in ("float32", "float64"):
        x = tensor(values, dtype, device, grad=True)
        (dx,) = torch.autograd.grad(HF.batch_norm(x, None, None, training=True).pow(3).sum(), x, create_graph=True)
        results.append([dx.detach().double(), torch.autograd.grad(dx.square().sum(), x)[0].double()])
    for single, double in zip(*results, strict=True):
        torch.testing.assert_close(single, double, rtol=0, atol=2e-3 * double.abs().max().item())
