"""`hw3gpu.functional.token_log_probs` on both kinds of kernels, against the answer sheet."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from twins import ACC, HARD, SINGLE, gradcheck, gradgradcheck, hold, layout_of, ones, opcheck, same, tensor, values_of, zeros

import hw3gpu.functional as HF
from hw3gpu import _error_bounds, reference
from hw3gpu._torch import token_log_probs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAMES = "log_prob", "entropy", "lse"


def rows_shape(shape, dim):
    dim %= len(shape)
    return (*shape[:dim], *shape[dim + 1 :])


def check(device, x, target, dtype, upstream, **options):
    """The three numbers and their gradient, each held to the answer sheet and to PyTorch in the precision of the sums."""
    acc, dim = ACC[dtype], options.get("dim", -1)
    found = HF.token_log_probs(x, target, **options)
    assert type(found) is HF.TokenLogProbs
    asked = [(v, g) for v, g in zip(found, upstream, strict=True) if g is not None]
    (dx,) = torch.autograd.grad([v for v, _ in asked], x, [g for _, g in asked])
    assert (dx.dtype, dx.shape) == (x.dtype, x.shape)
    exact = x.detach().to(acc).requires_grad_()
    theirs = token_log_probs.formula(exact, target, options.get("temperature", 1.0), -100, dim % x.dim())
    (their_dx,) = torch.autograd.grad([v for v, g in zip(theirs, upstream, strict=True) if g is not None], exact,
                                      [g for g in upstream if g is not None])  # fmt: skip
    named = {"axis" if k == "dim" else k: v for k, v in options.items()}
    named["upstream"] = tuple(0.0 if g is None else values_of(g) for g in upstream)
    sheet = reference.token_log_probs(values_of(x), target.cpu().numpy(), **named)
    bound = _error_bounds.token_log_probs(values_of(x), target.cpu().numpy(), **named, dtype=SINGLE[acc])
    for name in NAMES:
        ours = getattr(found, name)
        assert (ours.dtype, ours.shape) == (acc, target.shape)
        hold(name, ours, getattr(sheet, name), SINGLE[acc], getattr(theirs, name), getattr(bound, name))
    hold("dx", dx, sheet.dlogits, dtype, their_dx.to(x.dtype), bound.dlogits)
    return found, dx


SHAPES = {
    "(V,)": ((6,), -1),
    "(N, V)": ((6, 21), -1),
    "(B, T, V)": ((2, 3, 21), -1),
    "classes in the middle": ((2, 5, 3, 2), 1),
    "classes first": ((7, 5), 0),
    "V = 1": ((3, 1), -1),
    "V = 1001": ((2, 1001), -1),
    "beyond one program": ((2, 33333), -1),
}
ALONE = {"log_prob": (1, 0, 0), "entropy": (0, 1, 0), "lse": (0, 0, 1), "together": (1, 1, 1)}


@pytest.mark.parametrize("asked", ALONE.values(), ids=list(ALONE))
@pytest.mark.parametrize(("shape", "dim"), SHAPES.values(), ids=list(SHAPES))
def test_of_every_shape_alone_and_together(device, rng, shape, dim, asked):
    x = tensor(2 * rng.standard_normal(shape), "float32", device, grad=True)
    rows = rows_shape(shape, dim)
    target = torch.tensor(rng.integers(0, shape[dim], rows), device=device)
    upstream = [tensor(rng.standard_normal(rows), "float32", device) if one else None for one in asked]
    check(device, x, target, "float32", upstream, dim=dim)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
@pytest.mark.parametrize("dtype", ACC)
def test_dtypes_layouts_and_temperatures_with_ignored_rows(device, rng, dtype, temperature, layout):
    x = layout_of(tensor(3 * rng.standard_normal((5, 17, 3)), dtype, device), layout).requires_grad_()
    target = torch.tensor(rng.integers(0, 17, (5, 3)), device=device)
    target[1, 2] = target[4, 0] = -100
    upstream = [tensor(rng.standard_normal((5, 3)), SINGLE[ACC[dtype]], device) for _ in range(3)]
    found, dx = check(device, x, target, dtype, upstream, dim=1, temperature=temperature)
    assert all(v[1, 2] == v[4, 0] == 0 for v in found)
    assert not dx[1, :, 2].any()


EXTREME = HARD | {
    "all equal": lambda rng, V: np.full((2, V), 0.25),
    "one finite": lambda rng, V: np.where(np.arange(V) == V - 1, 3.0, -np.inf) * np.ones((2, 1)),
    "one far above": lambda rng, V: np.where(np.arange(V) == 1, 3e4, rng.standard_normal((2, V))),
    "most of the mass far below": lambda rng, V: np.where(np.arange(V) == 0, 6.0, 1e-3 * rng.standard_normal((2, V))),
}


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("case", EXTREME, ids=list(EXTREME))
@pytest.mark.parametrize(("V", "dtype"), [(1001, "float32"), (1001, "bfloat16"), (33333, "float32")])
def test_hard_rows(device, rng, case, V, dtype, temperature):
    x = tensor(EXTREME[case](rng, V), dtype, device, grad=True)
    target = torch.tensor([V - 1, V - 2], device=device)
    upstream = [tensor(rng.standard_normal(2), "float32", device) for _ in range(3)]
    if case == "one finite":
        upstream[0][1] = 0.0  # the log-probability of a class of probability 0 is -inf
    check(device, x, target, dtype, upstream, temperature=temperature)


def test_a_nearly_certain_class_keeps_the_digits_of_both(device):
    """log p near 0, an entropy near 0 and their gradients, as of numbers that are no difference."""
    rest = 2 * math.exp(-30.0)
    x = tensor([[30.0, 0.0, 0.0]], "float32", device, grad=True)
    found = HF.token_log_probs(x, torch.tensor([0], device=device))
    assert float(found.log_prob.detach()) == pytest.approx(-rest, rel=1e-6, abs=0.0)
    assert float(found.entropy.detach()) == pytest.approx(rest * 31.0, rel=1e-6, abs=0.0)
    (dx,) = torch.autograd.grad(found.log_prob, x, retain_graph=True)
    assert dx[0].tolist() == pytest.approx([rest, -rest / 2, -rest / 2], rel=1e-6, abs=0.0)
    (dx,) = torch.autograd.grad(found.entropy, x)
    assert dx[0].tolist() == pytest.approx([-30.0 * rest, 30.0 * rest / 2, 30.0 * rest / 2], rel=1e-6, abs=0.0)


@pytest.mark.parametrize("row", [[math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [-math.inf] * 3], ids=str)
@pytest.mark.parametrize("V", [3, 33333])
def test_what_has_no_softmax_is_nan_and_leaves_other_rows_alone(device, row, V):
    z = np.zeros((2, V))
    z[0, :] = -math.inf if row[1] == -math.inf else 0.0
    z[0, :3] = row
    x = tensor(z, "float32", device, grad=True)
    found = HF.token_log_probs(x, torch.tensor([1, 1], device=device))
    sum(v.sum() for v in found).backward()
    assert found.log_prob[0].isnan()
    assert found.entropy[0].isnan()
    assert x.grad[0].isnan().any()
    assert float(found.entropy[1].detach()) == pytest.approx(math.log(V), rel=1e-6)
    assert x.grad[1].isfinite().all()


def test_upstream_gradients_of_any_strides(device, rng):
    """Of a mean it is one number with strides of 0, of a transposed product a slice."""
    x = tensor(rng.standard_normal((4, 3, 9)), "float32", device, grad=True)
    target = torch.tensor(rng.integers(0, 9, (4, 3)), device=device)
    every = torch.as_tensor(rng.standard_normal((3, 4)), dtype=torch.float32, device=device).T
    check(device, x, target, "float32", [torch.tensor(0.25, device=device).expand(4, 3), every, None])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_rows(device, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    found = HF.token_log_probs(x, torch.zeros(shape[:-1], dtype=torch.int64, device=device))
    assert all(v.shape == shape[:-1] for v in found)
    found.entropy.sum().backward()
    assert x.grad.shape == shape


def test_a_class_out_of_range(device):
    x, target = ones(2, 3).to(device), torch.tensor([1, 3], device=device)
    with pytest.raises(IndexError, match=r"target: expected classes in 0…2 or ignore_index -100, got 3 in row 1"):
        HF.token_log_probs(x, target)


def test_a_class_out_of_range_gives_nan_where_nobody_waits(device, rng, monkeypatch):
    """As on a GPU: the flag is left alone there, and looked at later."""
    monkeypatch.setattr(token_log_probs, "judge_targets", lambda *_: None)
    x = tensor(rng.standard_normal((3, 21)), "float32", device, grad=True)
    target = torch.tensor([1, 21, -100], device=device)
    found = HF.token_log_probs(x, target)
    sum(v.sum() for v in found).backward()
    for v in found:
        assert v.isnan().tolist() == [False, True, False]
    assert x.grad.isnan().any(1).tolist() == [False, True, False]
    assert x.grad.isnan().all(1).tolist() == [False, True, False]


# ---------------------------------------------------------------------------------------------- derivatives and graphs
@pytest.mark.parametrize("asked", [*range(3), None], ids=[*NAMES, "together"])
def test_gradcheck_and_second_derivatives(device, rng, asked):
    x = tensor(rng.standard_normal((3, 5)), "float64", device, grad=True)
    target = torch.tensor([4, -100, 0], device=device)

    def function(x):
        found = HF.token_log_probs(x, target, temperature=0.7)
        return tuple(found) if asked is None else found[asked]

    gradcheck(function, (x,))
    gradgradcheck(function, (x,))


def test_transforms_and_forward_mode(device, rng):
    x = tensor(rng.standard_normal((3, 5)), "float64", device)
    target = torch.tensor([4, 1, 0], device=device)

    def loss(x, target):
        return sum(v.sum() for v in HF.token_log_probs(x, target, temperature=2.0))

    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(given, target), given)
    same(torch.func.grad(loss)(x, target), expected)
    same(torch.func.vmap(torch.func.grad(loss))(x, target), expected)
    _, along = torch.func.jvp(lambda x: loss(x, target), (x,), (torch.ones_like(x),))
    same(along, expected.sum())


def test_no_graph_where_none_is_asked_for(device):
    x, target = ones(2, 3).to(device), torch.zeros(2, dtype=torch.int64, device=device)
    assert not any(v.requires_grad for v in HF.token_log_probs(x, target))
    with torch.no_grad():
        assert not any(v.requires_grad for v in HF.token_log_probs(x.requires_grad_(), target))
    found = HF.token_log_probs(x, target)
    found.log_prob.masked_fill_(torch.tensor([True, False], device=device), 0.0)  # a result may be written into
    (found.log_prob.sum() + found.entropy.sum()).backward()


def test_the_operators_keep_the_rules(device, rng):
    for dim, shape in ((1, (2, 5, 3)), (1, (4, 5))):
        x = tensor(rng.standard_normal(shape), "float32", device, grad=True)
        target = torch.tensor(rng.integers(0, 5, rows_shape(shape, dim)), device=device)
        opcheck(torch.ops.hw3gpu.token_log_probs.default, (x, target, 0.7, -100, dim), compiled=dim == len(shape) - 1)
        *found, stats = torch.ops.hw3gpu.token_log_probs(x.detach(), target, 0.7, -100, dim)
        args = (None, found[1], found[2], x.detach(), target, stats, 0.7, -100, dim)
        opcheck(torch.ops.hw3gpu.token_log_probs_backward.default, args)


def test_compiled_and_exported_without_a_break(device, rng):
    x = tensor(rng.standard_normal((4, 33)), "float32", device, grad=True)
    target = torch.tensor([0, 32, -100, 5], device=device)

    def loss(x, target):
        found = HF.token_log_probs(x, target, temperature=0.7)
        return found.log_prob.sum() - 0.1 * found.entropy.sum()

    (expected,) = torch.autograd.grad(loss(x, target), x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    same(torch.autograd.grad(compiled(x, target), x)[0], expected)
    longer = tensor(rng.standard_normal((7, 65)), "float32", device, grad=True)
    classes = torch.zeros(7, dtype=torch.int64, device=device)
    same(*(torch.autograd.grad(f(longer, classes), longer)[0] for f in (compiled, loss)))

    class Scores(torch.nn.Module):
        def forward(self, x, target):
            return HF.token_log_probs(x, target).entropy

    exact = x.detach().double()  # an exported graph has PyTorch's operations, which round otherwise
    exported = torch.export.export(Scores(), (exact, target)).module()
    same(exported(exact, target), HF.token_log_probs(exact, target).entropy)


# ---------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((np.ones((2, 3)), zeros(2)), {}, TypeError, "logits: expected a torch.Tensor"),
        ((ones(2, 3).long(), zeros(2)), {}, TypeError, "logits: expected dtype"),
        ((torch.tensor(1.0), zeros(1)), {}, ValueError, "logits: expected at least 1 axes"),
        ((ones(2, 0), zeros(2)), {}, ValueError, "logits: expected at least one class"),
        ((ones(2, 3), ones(2)), {}, TypeError, "target: expected integer classes"),
        ((ones(2, 3), zeros(3)), {}, ValueError, "target: expected shape"),
        ((ones(2, 3, 4), zeros(2, 3)), {"dim": 1}, ValueError, "target: expected shape"),
        ((ones(2, 3), zeros(2)), {"dim": 2}, IndexError, "dim: expected an axis of logits"),
        ((ones(2, 3), zeros(2)), {"dim": 1.0}, TypeError, "dim: expected an integer"),
        ((ones(2, 3), zeros(2)), {"ignore_index": 0.5}, TypeError, "ignore_index: expected an integer"),
        ((ones(2, 3), zeros(2)), {"temperature": "1"}, TypeError, "temperature: expected a number"),
        *(
            ((ones(2, 3), zeros(2)), {"temperature": of}, ValueError, "temperature: expected a number from")
            for of in (0.0, -1.0, math.nan, math.inf, 1e-31, 1e31)
        ),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        HF.token_log_probs(*arguments, **options)


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
@pytest.mark.parametrize("V", [5, 9001])
def test_the_ends_of_the_temperatures(device, V, temperature):
    """The largest alone, or all alike."""
    x = torch.linspace(-1.0, 1.0, V, device=device)[None].requires_grad_()
    found = HF.token_log_probs(x, torch.tensor([V - 1], device=device), temperature=temperature)
    sum(v.sum() for v in found[:2]).backward()
    expected = (0.0, 0.0) if temperature < 1 else (-math.log(V), math.log(V))
    assert [float(v.detach()) for v in found[:2]] == pytest.approx(expected, rel=1e-6)
    assert x.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------- statistics of cross entropy
def losses(kind, rng, device, dtype="float64"):
    """(logits, target, options of `cross_entropy`) with a row that is ignored and a class without weight."""
    x = tensor(2 * rng.standard_normal((3, 4, 2)), dtype, device, grad=True)
    target = torch.tensor([[0, -100], [3, 1], [2, 1]], device=device)
    if kind == "probabilities":
        target = torch.softmax(tensor(rng.standard_normal((3, 4, 2)), dtype, device), 1)
    weight = tensor(rng.random(4) + 0.25, dtype, device)
    weight[3] = 0.0
    options = {"plain": {}, "weights and z-loss": {"weight": weight, "z_loss": 0.1}, "softcap": {"softcap": 3.0}}
    return x, target, options.get(kind, {"label_smoothing": 0.1})


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["plain", "weights and z-loss", "softcap", "smoothing", "probabilities"])
def test_differentiable_statistics(device, rng, kind, reduction):
    """Loss and statistics as without a graph; gradients as numbers find them, of the loss and of its statistics together."""
    x, target, options = losses(kind, rng, device)
    loss, stats = HF.cross_entropy(x, target, reduction=reduction, return_stats=True, differentiable=True, **options)
    plain_loss, plain = HF.cross_entropy(x.detach(), target, reduction=reduction, return_stats=True, **options)
    same(loss.detach(), plain_loss)
    for ours, theirs in zip(stats, plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            same(ours.detach(), theirs)

    def function(x):
        loss, stats = HF.cross_entropy(x, target, reduction=reduction, return_stats=True, differentiable=True, **options)
        return loss.sum() + stats.entropy.square().sum() + (0.5 * stats.lse).sum()

    gradcheck(function, (x,))


@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_statistics_without_a_gradient_say_so(device, rng, function):
    x, W = (
        tensor(rng.standard_normal((4, 3)), "float32", device, grad=True),
        tensor(rng.standard_normal((3, 3)), "float32", device),
    )
    target = torch.tensor([0, 1, 2, -100], device=device)
    given = (x, target) if function == "cross_entropy" else (x, W, target)
    loss, stats = getattr(HF, function)(*given, return_stats=True)
    for v in (stats.lse, stats.log_prob, stats.entropy):
        with pytest.raises(RuntimeError, match="they have a gradient where differentiable=True asks for it"):
            torch.autograd.grad(loss + v.sum(), x, retain_graph=True)
    stats.entropy.masked_fill_(target < 0, 0.0)  # a result may be written into
    assert torch.autograd.grad(loss, x)[0].any()
    with pytest.raises(ValueError, match="differentiable: expected return_stats=True"):
        getattr(HF, function)(*given, differentiable=True)
