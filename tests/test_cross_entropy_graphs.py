"""Cross entropy and softmax where somebody else holds the pen: the compiler, `torch.func`, a second derivative, autocast.

Results are held to the eager call's, which other files hold to the answer sheet.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jvp, vmap
from twins import gradcheck, gradgradcheck, layout_of, opcheck, same, tensor

import hw3gpu.functional as HF
import hw3gpu.nn as HN
from hw3gpu._torch import cross_entropy as loss_room
from hw3gpu._torch import linear_cross_entropy as linear_room
from hw3gpu._torch import softmax as softmax_room

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAIN = ("mean", -100, 0.0, 0.0, None, False, 1.0)
EVERYTHING = ("none", -100, 0.1, 0.01, 4.0, True, 0.7)


def logits(rng, device, shape=(4, 6), dtype="float64", grad=True):
    return tensor(rng.standard_normal(shape), dtype, device, grad)


def classes(rng, device, shape=(4,), C=6):
    target = torch.tensor(rng.integers(0, C, shape), device=device)
    target.view(-1)[1] = -100
    return target


# ---------------------------------------------------------------------------------------------- operators
COMPILED = ((False, PLAIN, "contiguous", "float64"), (True, EVERYTHING, "channels-last", "bfloat16"))


@pytest.mark.graphs
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
def test_operators_keep_the_rules_of_torch_library(device, rng, soft, options, layout, dtype):
    z = layout_of(logits(rng, device, (3, 6, 4), dtype).detach(), layout).requires_grad_()
    target = z.detach().softmax(1) if soft else classes(rng, device, (3, 4))
    compiled = (soft, options, layout, dtype) in COMPILED
    opcheck(loss_room.FORWARD, (z, target, None, loss_room.NUMBERS, *options), compiled)
    loss, stats, denominator = loss_room.FORWARD(z.detach(), target, None, 3, *options)
    over = denominator if options[0] == "mean" else None
    given = (torch.ones_like(loss), z.detach(), target, None, stats, over)
    opcheck(loss_room.BACKWARD, (*given, *options), compiled)


@pytest.mark.graphs
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
def test_softmax_keeps_the_rules_of_torch_library(device, rng, layout, dim):
    z = layout_of(logits(rng, device, (3, 6, 4)).detach(), layout).requires_grad_()
    compiled = (layout, dim) in (("contiguous", -1), ("channels-last", 1))
    opcheck(softmax_room.FORWARD, (z, dim), compiled)
    opcheck(softmax_room.BACKWARD, (z.detach(), softmax_room.run(z.detach(), dim), dim), compiled)


@pytest.mark.graphs
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_linear_operators_keep_the_rules_of_torch_library(device, rng, options):
    x, W, b = (logits(rng, device, s) for s in ((5, 3), (6, 3), (6,)))
    target = classes(rng, device, (5, 1))
    opcheck(linear_room.FORWARD, (x, W, b, target, None, 2, 3, *options), compiled=True)
    x, W, b = (v.detach() for v in (x, W, b))
    loss, stats, denominator = linear_room.FORWARD(x, W, b, target, None, 2, 3, *options)
    over = denominator if options[0] == "mean" else None
    given = (torch.ones_like(loss), x, W, b, target, None, stats, over, 2, [True, True, True, False])
    opcheck(linear_room.BACKWARD, (*given, *options), compiled=True)


# ---------------------------------------------------------------------------------------------- compiled
CALLS = {
    "cross_entropy": lambda z, t: HF.cross_entropy(z, t),
    "cross_entropy, everything": lambda z, t: HF.cross_entropy(
        z, t, reduction="none", label_smoothing=0.1, z_loss=0.01, softcap=4.0, gradient="forward", return_stats=True
    ),
    "probabilities": lambda z, t: HF.cross_entropy(z, z.detach().softmax(1), reduction="sum"),
    "softmax": lambda z, t: HF.softmax(z, 1),
    "linear_cross_entropy": lambda z, t: HF.linear_cross_entropy(z, z, torch.zeros_like(t), z_loss=0.1),
    "CrossEntropyLoss": lambda z, t: HN.CrossEntropyLoss(z_loss=0.1)(z, t),
}


def results(call, z, target):
    """What the call gives, and the gradient of its first result."""
    leaf = z.detach().clone().requires_grad_()
    found = call(leaf, target)
    loss, stats = found if isinstance(found, tuple) else (found, ())
    (dz,) = torch.autograd.grad((loss.pow(2)).sum(), leaf)
    return [loss, dz, *stats]


@pytest.mark.graphs
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_call_is_the_eager_one(device, rng, name, dynamic):
    """No graph break, at several batch sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (4, 7, 4):
        z, target = logits(rng, device, (n, 6)), classes(rng, device, (n,))
        for a, b in zip(results(compiled, z, target), results(CALLS[name], z, target), strict=True):
            assert a.dtype == b.dtype
            same(a.double(), b.double(), 1e-10)


@pytest.mark.graphs
@pytest.mark.parametrize("name", ["cross_entropy", "softmax", "linear_cross_entropy"])
def test_a_call_goes_through_the_whole_compiler(device, rng, name):
    torch._dynamo.reset()
    z, target = logits(rng, device), classes(rng, device)
    for a, b in zip(
        results(torch.compile(CALLS[name], fullgraph=True), z, target), results(CALLS[name], z, target), strict=True
    ):
        same(a, b, 1e-10)


# ---------------------------------------------------------------------------------------------- derivatives
OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "everything": {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.05, "softcap": 3.0},
    "forward": {"gradient": "forward", "z_loss": 0.05},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_first_and_second_derivatives(device, rng, options):
    z, target = logits(rng, device, (3, 4)), torch.tensor([0, -100, 3], device=device)
    weight = torch.rand(4, dtype=torch.float64, device=device) + 0.5
    y = torch.rand(3, 4, dtype=torch.float64, device=device, requires_grad=True)

    def of_classes(z):
        return HF.cross_entropy(z, target, weight, **options)

    def of_probabilities(z, y):
        return HF.cross_entropy(z, y, weight, **options)

    for check in (gradcheck, gradgradcheck):
        check(of_classes, (z,))
        check(of_probabilities, (z, y))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_of_linear_cross_entropy(device, rng, reduction):
    x, W, b = (logits(rng, device, s) for s in ((3, 2), (4, 2), (4,)))
    target = torch.tensor([0, -100, 3], device=device)

    def loss(x, W, b):
        return HF.linear_cross_entropy(x, W, target, linear_bias=b, reduction=reduction, z_loss=0.05, softcap=4.0, chunk_rows=2)

    for check in (gradcheck, gradgradcheck):
        check(loss, (x, W, b))


def test_softmax_has_second_derivatives(device, rng):
    z = logits(rng, device, (3, 4))
    for check in (gradcheck, gradgradcheck):
        check(lambda z: HF.softmax(z, 1), (z,))


def penalty(function, z, target):
    """A gradient penalty, as those who differentiate twice write it."""
    leaf = z.detach().clone().requires_grad_()
    (dz,) = torch.autograd.grad(function(leaf, target), leaf, create_graph=True)
    dz.pow(2).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("gradient", ["auto", "forward", "backward"])
def test_a_gradient_penalty_is_pytorchs(device, rng, gradient):
    z, target = logits(rng, device), classes(rng, device)
    ours = penalty(lambda z, t: HF.cross_entropy(z, t, gradient=gradient), z, target)
    same(ours, penalty(F.cross_entropy, z, target))


PAIRS = {
    "cross_entropy": (HF.cross_entropy, F.cross_entropy),
    "softmax": (lambda z, t: HF.softmax(z, 1).pow(2).sum(), lambda z, t: F.softmax(z, 1).pow(2).sum()),
}


@pytest.mark.parametrize("name", PAIRS)
def test_transforms(device, rng, name):
    z, target = logits(rng, device, grad=False), classes(rng, device)
    tangent, stacked = torch.ones_like(z).cumsum(1), torch.stack([z, -z])

    def of(function):
        def loss(z):
            return function(z, target)

        return [*jvp(loss, (z,), (tangent,)), hessian(loss)(z), vmap(grad(loss))(stacked)]

    for ours, theirs in zip(*map(of, PAIRS[name]), strict=True):
        same(ours, theirs)


def test_statistics_under_transforms(device, rng):
    z, target = logits(rng, device, grad=False), classes(rng, device)
    _, expected = HF.cross_entropy(z, target, return_stats=True, softcap=3.0)
    stats = vmap(lambda z: HF.cross_entropy(z, target, return_stats=True, softcap=3.0)[1])(z[None])
    for ours, theirs in zip(stats, expected, strict=True):
        same(ours[0].double(), theirs.double())


def test_linear_cross_entropy_under_transforms(device, rng):
    x, W = logits(rng, device, (4, 3), grad=False), logits(rng, device, (6, 3), grad=False)
    target = classes(rng, device)
    ours, theirs = (hessian(lambda W, f=f: f(x, W, target))(W) for f in (HF.linear_cross_entropy, F.linear_cross_entropy))
    same(ours, theirs)


# ---------------------------------------------------------------------------------------------- autocast
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_autocast_gives_pytorchs_dtypes(device, dtype):
    z = torch.ones(2, 3, dtype=dtype, device=device, requires_grad=True)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    with torch.autocast(device, torch.bfloat16):
        for ours, theirs in (
            (HF.cross_entropy(z, target), F.cross_entropy(z, target)),
            (HF.cross_entropy(z, z.detach()), F.cross_entropy(z, z.detach())),
            (HF.softmax(z, 1), F.softmax(z, 1)),
            (HF.linear_cross_entropy(z, z, target), F.linear_cross_entropy(z, z, target)),
        ):
            assert ours.dtype == theirs.dtype
            assert torch.autograd.grad(ours.sum(), z)[0].dtype == dtype
