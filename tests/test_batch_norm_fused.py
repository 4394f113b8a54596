"""An activation of BN(x) + residual in one pass: `residual=` and `activation=` of `functional.batch_norm` and the modules."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from twins import ACC, SINGLE, gradcheck, gradgradcheck, layout_of, opcheck, same, tensor, values_of

import hw3gpu.functional as HF
import hw3gpu.nn as HN
from hw3gpu import _error_bounds, reference
from hw3gpu._core import dispatch
from hw3gpu._torch import batch_norm as operators
from hw3gpu._torch.activation import kept, let_through
from measure import close, ulp

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


FUSED = [(None, True), ("relu", False), ("relu", True), ("silu", True), ("hardswish", False), ("gelu", False)]
NAMES = ["+ residual", "relu", "relu(+ residual)", "silu(+ residual)", "hardswish", "gelu"]
APPLIED = {"relu": torch.relu, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu}


def composed(x, running, weight, bias, training, residual, activation):
    y = F.batch_norm(x, *running, weight, bias, training)
    y = y if residual is None else y + residual
    return y if activation is None else APPLIED[activation](y)


def operands(rng, device, shape, dtype):
    C, single = shape[1], SINGLE[ACC[dtype]]
    x, residual = (tensor(rng.standard_normal(shape), dtype, device) for _ in range(2))
    vectors = [tensor(v, single, device) for v in (rng.standard_normal(C), rng.standard_normal(C))]
    running = [tensor(v, single, device) for v in (rng.standard_normal(C), rng.random(C) + 0.5)]
    return x, residual, *vectors, running


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize(
    ("shape", "activation", "with_residual"),
    [
        # SiLU and what follows it are one function beside ReLU's: of these the images alone, the rest with --slow
        pytest.param(shape, *fused, id=f"{shape}-{name}", marks=[pytest.mark.slow] if i > 2 and len(shape) < 4 else [])
        for shape in [(7, 3), (4, 6, 5), (2, 3, 7, 7)]
        for i, (fused, name) in enumerate(zip(FUSED, NAMES, strict=True))
    ],
)
def test_fused_is_composed(device, rng, shape, layout, activation, with_residual, training):
    fused_is_composed(device, rng, shape, "float32", layout, activation, with_residual, training)


# `test_pairs` has the dtypes of a residual and of ReLU, `test_each_activation_is_the_answer_sheets` those of Hardswish and GELU
@pytest.mark.parametrize(
    ("activation", "with_residual"),
    [pytest.param(*FUSED[i], id=NAMES[i], marks=[pytest.mark.slow] if i < 3 else []) for i in range(4)],
)
def test_fused_of_every_dtype(device, rng, dtype, activation, with_residual):
    fused_is_composed(device, rng, (3, 2, 5, 5), dtype, "contiguous", activation, with_residual, True)


@pytest.mark.parametrize("shape", [(4, 8, 66000), (2100, 512, 4)], ids=["planes", "tiles"])
def test_what_passes_a_large_block_is_computed_again(rng, shape):
    """A block of the CPU kernels keeps what passes an activation for its second pass, up to a megabyte; here it is more."""
    fused_is_composed("cpu", rng, shape, "float32", "contiguous", "silu", True, True)


def fused_is_composed(device, rng, shape, dtype, layout, activation, with_residual, training):
    """Every result against PyTorch's three operations in float64, on the same numbers."""
    x, residual, weight, bias, running = operands(rng, device, shape, dtype)
    dy = tensor(rng.standard_normal(shape), dtype, device)
    x, residual, dy = (layout_of(v, layout) for v in (x, residual, dy))
    results = []
    for double in (False, True):
        leaves = [v.double() if double else v.clone() for v in (x, weight, bias, residual)]
        leaves = [v.detach().requires_grad_() for v in leaves]
        own = [v.double() if double else v.clone() for v in running]
        rest = leaves[3] if with_residual else None
        if double:
            y = composed(leaves[0], own, leaves[1], leaves[2], training, rest, activation)
        else:
            y = HF.batch_norm(leaves[0], *own, leaves[1], leaves[2], training, residual=rest, activation=activation)
            assert y.dtype == x.dtype
            assert torch.equal(leaves[3], residual)
        grads = torch.autograd.grad(y, leaves[: 4 if with_residual else 3], dy.to(y.dtype))
        results.append([y, *own, *grads])
    names = ["y", "running_mean", "running_var", "dx", "dweight", "dbias", "dresidual"]
    single = SINGLE[ACC[dtype]]
    for name, ours, expected in zip(names, *results, strict=False):
        of = dtype if name in ("y", "dx", "dresidual") else single
        expected = values_of(expected)
        most = np.abs(expected).max()
        bound = 40 * ulp(most, single) + ulp(most, of)
        assert np.abs(values_of(ours) - expected).max() <= bound, name


@pytest.mark.parametrize(
    ("activation", "with_residual", "training"),
    [
        # with running statistics the activation is differentiated as with the batch's: one of them, the rest with --slow
        pytest.param(*fused, training, id=f"{name}-{mode}", marks=[pytest.mark.slow] if i != 2 and not training else [])
        for i, (fused, name) in enumerate(zip(FUSED, NAMES, strict=True))
        for training, mode in ((True, "training"), (False, "evaluation"))
    ],
)
def test_gradients_and_theirs(device, rng, activation, with_residual, training):
    x, residual, weight, bias, running = operands(rng, device, (3, 2, 4), "float64")
    leaves = [v.requires_grad_() for v in (x, weight, bias, *([residual] if with_residual else []))]

    def call(x, weight, bias, residual=None):
        stats = (None, None) if training else running
        return HF.batch_norm(x, *stats, weight, bias, training, residual=residual, activation=activation)

    gradcheck(call, leaves)
    gradgradcheck(call, leaves)


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=2))[:-1], ids=str)
def test_gradients_only_where_needed(device, rng, needed):
    x, residual, weight, bias, _ = operands(rng, device, (3, 2, 4), "float64")
    leaves = [[v.clone().requires_grad_(n) for v, n in zip((x, residual), needed, strict=True)] for _ in range(2)]
    y = HF.batch_norm(leaves[0][0], None, None, weight, bias, True, residual=leaves[0][1], activation="relu")
    y.pow(2).sum().backward()
    composed(leaves[1][0], (None, None), weight, bias, True, leaves[1][1], "relu").pow(2).sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            same(ours.grad, theirs.grad, 1e-11)


def test_what_is_cut_off_stays_cut_off(device):
    """A zero before the activation passes no gradient, as in PyTorch; NaN passes through."""
    x = torch.tensor([[1.0], [-1.0]], device=device, requires_grad=True)
    residual = torch.tensor([[-2.0], [torch.nan]], device=device, requires_grad=True)
    y = HF.batch_norm(x, *(v.to(device) for v in (torch.zeros(1), torch.ones(1))), residual=residual, activation="relu")
    assert y[0] == 0
    assert y[1].isnan()


@pytest.mark.graphs
@pytest.mark.parametrize(("activation", "with_residual"), FUSED[:4], ids=NAMES[:4])
def test_operators(device, rng, activation, with_residual):
    x, residual, weight, bias, running = operands(rng, device, (3, 2, 4, 3), "float32")
    residual = residual if with_residual else None
    for v in (x, weight, bias):
        v.requires_grad_()
    compiled = with_residual and activation is not None
    opcheck(operators.TRAINING, (x, weight, bias, residual, *running, 0.1, 1e-5, activation), compiled)
    opcheck(operators.EVALUATION, (x, weight, bias, residual, *running, 0.1, 1e-5, activation), compiled)
    y, stats, mask = operators.TRAINING(x, weight, bias, residual, None, None, 0.1, 1e-5, activation)
    dy = torch.ones_like(x)
    told_by = kept(dispatch.backend(x), activation, bias, residual, y)
    given = (v if v is None else v.detach() for v in (dy, x, weight, *told_by, stats, mask))
    opcheck(operators.BACKWARD, (*given, True, activation, with_residual), compiled)


@pytest.mark.parametrize("activation", APPLIED)
@pytest.mark.parametrize(
    "dtype", ["float32", "float64", pytest.param("bfloat16", marks=pytest.mark.slow)]
)  # computed in float32
def test_each_activation_is_the_answer_sheets(device, dtype, activation):
    """With mean 0, variance 1 and eps 0 what goes in is x itself: small, large, the edges, infinities and NaN, alone."""
    edges = [0.0, -0.0, 3.0, -3.0, 2.999, -2.999, 1e-6, -30.0, -100.0, 1e30, -1e30, np.inf, -np.inf, np.nan]
    numbers = np.concatenate([np.linspace(-13, 13, 200), edges])
    x = tensor(numbers[:, None], dtype, device).requires_grad_()
    y = HF.batch_norm(
        x, *(tensor(v, SINGLE[ACC[dtype]], device) for v in (np.zeros(1), np.ones(1))), eps=0.0, activation=activation
    )
    y.backward(torch.full_like(y, 0.75))
    p, acc = values_of(x), SINGLE[ACC[dtype]]
    bounds = (
        _error_bounds.activation(p, activation, dtype=acc),
        _error_bounds.activation_backward(0.75, p, activation, dtype=acc),
    )
    close(values_of(y), reference.activation(p, activation), None, dtype, bounds[0], "y")
    close(values_of(x.grad), reference.activation_backward(0.75, p, activation), None, dtype, bounds[1], "dx")


@pytest.mark.parametrize("activation", ["silu", "hardswish", "gelu"])
def test_the_slope_of_an_activation_with_a_graph_is_torchs(activation):
    p = torch.linspace(-5, 5, 42, dtype=torch.float64).requires_grad_()
    dy = torch.linspace(1, 2, 42, dtype=torch.float64)
    (theirs,) = torch.autograd.grad(APPLIED[activation](p), p, dy)
    same(let_through(dy, p, activation), theirs)


class Block(nn.Module):
    """The end of a residual block, fused and not."""

    def __init__(self, fused):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first = HN.BatchNormAct2d(4) if fused else HN.BatchNorm2d(4)
        self.last = HN.BatchNormAct2d(4) if fused else HN.BatchNorm2d(4)
        self.fused = fused

    def forward(self, x):
        if self.fused:
            return self.last(self.conv(self.first(x)), x)
        return (self.last(self.conv(self.first(x).relu())) + x).relu()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_modules(device, compiled):
    torch.manual_seed(0)
    plain = Block(fused=False).double().to(device)
    fused = Block(fused=True).double().to(device)
    fused.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    run = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, device=device)
    for function, module in ((run, fused), (plain, plain)):
        module.zero_grad()
        function(x).pow(3).sum().backward()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    same(run.eval()(x), plain.eval()(x), 1e-11)
    assert "activation='relu'" in repr(fused.first)
    assert copy.deepcopy(fused).first.activation == "relu"


def test_transforms(device, rng):
    x, residual, weight, bias, _ = operands(rng, device, (4, 3, 5), "float64")
    xs = torch.stack([x, -x])

    def loss(x, of):
        return of(x, residual).pow(2).sum()

    ours = vmap(
        grad(lambda x: loss(x, lambda x, r: HF.batch_norm(x, None, None, weight, bias, True, residual=r, activation="relu")))
    )
    theirs = vmap(grad(lambda x: loss(x, lambda x, r: composed(x, (None, None), weight, bias, True, r, "relu"))))
    same(ours(xs), theirs(xs), 1e-10)


def test_bad_input(device):
    x = torch.ones(4, 3, device=device)
    call = lambda **options: HF.batch_norm(x, None, None, training=True, **options)  # noqa: E731
    with pytest.raises(ValueError, match="activation: expected one of relu, silu, hardswish, gelu, got 'tanh'"):
        call(activation="tanh")
    with pytest.raises(ValueError, match="activation: expected one of relu, silu, hardswish, gelu, got 'tanh'"):
        HN.BatchNormAct2d(3, activation="tanh")
    with pytest.raises(ValueError, match=r"residual: expected the shape of input, \(4, 3\), got \(4, 1\)"):
        call(residual=torch.ones(4, 1, device=device))
    with pytest.raises(TypeError, match="residual: expected the dtype of input, float32, got float64"):
        call(residual=torch.ones(4, 3, device=device).double())
    with pytest.raises(TypeError, match=r"residual: expected a torch.Tensor, got builtins.float"):
        call(residual=1.0)
    if device == "cpu":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert HF.batch_norm(x.bfloat16(), None, None, training=True, residual=x).dtype == torch.bfloat16
