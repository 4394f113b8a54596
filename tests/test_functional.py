"""`hw3gpu.functional`: batch_norm, softmax and cross_entropy, against the answer sheet and `torch.nn.functional`."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hw3gpu.functional as HF
from hw3gpu import reference
from hw3gpu._arrays import requested_backend
from layouts import orders
from measure import close, max_error, ulp

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

drawn = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ACC = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float32, "bfloat16": torch.float32}
SINGLE = {torch.float64: "float64", torch.float32: "float32"}


def tensor(values, dtype, device, grad=False):
    return torch.tensor(np.asarray(values), dtype=getattr(torch, dtype), device=device).requires_grad_(grad)


def values_of(t):
    return None if t is None else t.detach().double().cpu().numpy()


def hold(name, ours, expected, dtype, *theirs):
    """`close`, with the name of the result in the message; PyTorch's error is that of the worst of `theirs`."""
    try:
        close(values_of(ours), expected, max(max_error(values_of(t), expected, dtype) for t in theirs), dtype)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def same(ours, theirs, rtol=1e-12):
    """float64 results of the same function; NaN where PyTorch has NaN."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, equal_nan=True, check_stride=False)


# ---------------------------------------------------------------------------------------------- batch normalisation
BATCHES = {
    "(N, C)": (7, 3),
    "(N, C, L)": (4, 2, 5),
    "7x7 planes": (2, 2, 7, 7),
    "5 axes": (2, 2, 2, 3, 2),
    "spatial size 1": (5, 2, 1, 1),
}


def layout_of(x, layout):
    if layout == "channels-last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
    return x


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("batch", BATCHES, ids=list(BATCHES))
def test_batch_norm_training(device, rng, batch, layout):
    batch_norm_training(device, rng, BATCHES[batch], "float32", layout)


def test_batch_norm_training_of_every_dtype(device, rng, dtype):
    batch_norm_training(device, rng, (3, 2, 5, 5), dtype, "contiguous")


@pytest.mark.parametrize("offset", [1e4, 1e18])
def test_batch_norm_training_far_from_zero(device, rng, offset):
    batch_norm_training(device, rng, (3, 2, 5, 5), "float32", "contiguous", offset, spread=1.0 if offset == 1e4 else 1e17)


def batch_norm_training(device, rng, shape, dtype, layout, offset=0.5, spread=2.0):
    C, acc = shape[1], ACC[dtype]
    stats = SINGLE[acc]
    x = layout_of(tensor(offset + spread * rng.standard_normal(shape), dtype, device), layout).requires_grad_()
    dy = layout_of(tensor(rng.standard_normal(shape), dtype, device), layout)
    weight, bias = (tensor(rng.standard_normal(C), stats, device, grad=True) for _ in range(2))
    start = rng.standard_normal(C), rng.random(C) + 0.5
    running, theirs_running = ([tensor(v, stats, device) for v in start] for _ in range(2))

    y = HF.batch_norm(x, *running, weight, bias, True, 0.25, 1e-3)
    grads = torch.autograd.grad(y, (x, weight, bias), dy)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    runs = []
    for (turn, back), lay in product(orders(x), (torch.clone, torch.Tensor.contiguous)):
        leaf, own = lay(turn(x.detach())).requires_grad_(), [v.clone() for v in theirs_running]
        theirs = F.batch_norm(leaf, *own, weight, bias, True, 0.25, 1e-3)
        dx, dweight, dbias = torch.autograd.grad(theirs, (leaf, weight, bias), turn(dy))
        runs.append((back(theirs), back(dx), dweight, dbias, *own))

    x64, dy64, w64, b64 = map(values_of, (x, dy, weight, bias))
    sheet = reference.batch_norm(x64, w64, b64, eps=1e-3)
    m = x.numel() // C
    grad_sheet = reference.batch_norm_backward(dy64, x64, sheet.mean, sheet.var, w64, eps=1e-3)
    mean, var = (values_of(v) for v in theirs_running)
    expected = {
        "y": (y, sheet.y, dtype),
        "dx": (grads[0], grad_sheet.dx, dtype),
        "dweight": (grads[1], grad_sheet.dgamma, stats),
        "dbias": (grads[2], grad_sheet.dbeta, stats),
        "running_mean": (running[0], 0.75 * mean + 0.25 * sheet.mean, stats),
        "running_var": (running[1], 0.75 * var + 0.25 * sheet.var * m / (m - 1), stats),
    }
    for (name, (ours, value, of)), theirs in zip(expected.items(), zip(*runs, strict=True), strict=True):
        hold(name, ours, value, of, *theirs)


@pytest.mark.parametrize("shape", [(6, 3), (1, 3), (2, 3, 7, 7), (1, 3, 1, 1)], ids=str)
def test_batch_norm_evaluation(device, rng, shape, dtype):
    """By the running statistics: one value per channel is enough, and they stay as they are."""
    C, stats = 3, SINGLE[ACC[dtype]]
    x = tensor(1.0 + rng.standard_normal(shape), dtype, device, grad=True)
    dy = tensor(rng.standard_normal(shape), dtype, device)
    weight, bias = (tensor(rng.standard_normal(C), stats, device, grad=True) for _ in range(2))
    running = tensor(rng.standard_normal(C), stats, device), tensor(rng.random(C) + 0.5, stats, device)
    kept = [v.clone() for v in running]

    y = HF.batch_norm(x, *running, weight, bias)
    theirs = F.batch_norm(x, *running, weight, bias)
    theirs_grads = torch.autograd.grad(theirs, (x, weight, bias), dy)
    for v, k in zip(running, kept, strict=True):
        assert torch.equal(v, k)
        v.fill_(math.nan)  # the backward has what it needs
    grads = torch.autograd.grad(y, (x, weight, bias), dy)

    given = [values_of(v) for v in (x, *kept, weight, bias)]
    hold("y", y, reference.batch_norm_inference(*given, eps=1e-5), dtype, theirs)
    back = reference.batch_norm_inference_backward(values_of(dy), *given[:4], eps=1e-5)
    hold("dx", grads[0], back.dx, dtype, theirs_grads[0])
    hold("dweight", grads[1], back.dgamma, stats, theirs_grads[1])
    hold("dbias", grads[2], back.dbeta, stats, theirs_grads[2])


@drawn
@given(data=st.data())
def test_batch_norm_is_torchs(device, data):
    """Every combination of arguments that PyTorch takes means the same here."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    N, C = data.draw(st.integers(0, 4), "N"), data.draw(st.integers(1, 3), "C")
    shape = (N, C, *data.draw(st.sampled_from([(), (1,), (3,), (2, 3), (1, 2, 2)]), "spatial"))
    training = data.draw(st.booleans(), "training")
    if training and N * math.prod(shape[2:]) == 1:
        shape = (2, *shape[1:])
    tracked = data.draw(st.booleans(), "tracked") or not training
    affine = data.draw(st.sampled_from(["weight and bias", "weight", "bias", "neither"]), "affine")
    eps, momentum = data.draw(st.sampled_from([1e-5, 0.1]), "eps"), data.draw(st.sampled_from([0.0, 0.1, 1.0]), "momentum")
    layout = data.draw(st.sampled_from(["contiguous", "channels-last", "sliced"]), "layout")

    x = layout_of(tensor(rng.standard_normal(shape), "float64", device), layout)
    dy = layout_of(tensor(rng.standard_normal(shape), "float64", device), layout)
    weight = tensor(rng.standard_normal(C), "float64", device) if "weight" in affine else None
    bias = tensor(rng.standard_normal(C), "float64", device) if "bias" in affine else None
    running = [tensor(rng.random(C) + 0.5, "float64", device) if tracked else None for _ in range(2)]

    results = []
    for function in (HF.batch_norm, F.batch_norm):
        own = [None if v is None else v.clone() for v in running]
        leaves = [None if v is None else v.detach().clone().requires_grad_() for v in (x, weight, bias)]
        y = function(leaves[0], *own, leaves[1], leaves[2], training, momentum, eps)
        results.append([y, *own, *torch.autograd.grad(y, [v for v in leaves if v is not None], dy)])
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs)


def gradcheck(function, inputs):
    """With the whole Jacobian; in the interpreter, where each call is slow, along random directions."""
    assert torch.autograd.gradcheck(function, inputs, fast_mode=requested_backend() == "gpu")


def test_batch_norm_gradcheck(device, rng):
    x = tensor(rng.standard_normal((3, 2, 4)), "float64", device, grad=True)
    weight, bias = (tensor(rng.standard_normal(2), "float64", device, grad=True) for _ in range(2))
    mean, var = tensor(rng.standard_normal(2), "float64", device), tensor(rng.random(2) + 0.5, "float64", device)
    gradcheck(lambda *a: HF.batch_norm(a[0], None, None, a[1], a[2], True), (x, weight, bias))
    gradcheck(lambda *a: HF.batch_norm(a[0], mean, var, a[1], a[2]), (x, weight, bias))


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)], ids=str)
def test_batch_norm_gradients_only_where_needed(device, rng, needed):
    """Whoever freezes some of x, weight and bias gets the others' gradients."""
    parts = [tensor(rng.standard_normal(s), "float64", device) for s in ((3, 2, 4), (2,), (2,))]
    leaves = [[p.clone().requires_grad_(bool(n)) for p, n in zip(parts, needed, strict=True)] for _ in range(2)]
    for function, (x, weight, bias) in zip((HF.batch_norm, F.batch_norm), leaves, strict=True):
        (function(x, None, None, weight, bias, True) ** 3).sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            same(ours.grad, theirs.grad, 1e-11)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batch_norm_in_half_precision_throughout(device, rng, dtype):
    """Parameters and running statistics may be halves too; each is rounded once."""
    x = tensor(rng.standard_normal((4, 2, 9)), dtype, device, grad=True)
    weight, bias = (tensor(rng.standard_normal(2), dtype, device, grad=True) for _ in range(2))
    running = [tensor(np.ones(2), dtype, device) for _ in range(2)]
    y = HF.batch_norm(x, *running, weight, bias, True)
    sheet = reference.batch_norm(values_of(x), values_of(weight), values_of(bias))
    close(values_of(y), sheet.y, None, dtype)
    close(values_of(running[0]), 0.9 + 0.1 * sheet.mean, None, dtype)
    close(values_of(running[1]), 0.9 + 0.1 * sheet.var * 36 / 35, None, dtype)
    y.sum().backward()
    assert [v.grad.dtype for v in (x, weight, bias)] == [getattr(torch, dtype)] * 3


def test_batch_norm_without_a_graph_gives_the_same_bits(device, rng):
    x = tensor(rng.standard_normal((3, 2, 9)), "float32", device)
    y = HF.batch_norm(x, None, None, training=True)
    again = HF.batch_norm(x.clone().requires_grad_(), None, None, training=True)
    assert not y.requires_grad
    assert again.requires_grad
    assert torch.equal(y, again)
    with torch.no_grad():
        assert not HF.batch_norm(x.clone().requires_grad_(), None, None, training=True).requires_grad


def test_batch_norm_keeps_the_layout(device, rng):
    x = tensor(rng.standard_normal((2, 3, 4, 5)), "float32", device).to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = HF.batch_norm(x, None, None, training=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_backward_takes_any_upstream_gradient(device, rng):
    """An expanded one (of a sum) and a transposed one."""
    x = tensor(rng.standard_normal((4, 3, 4)), "float64", device, grad=True)
    for upstream in (lambda y: y.sum() * 2.0, lambda y: (y.transpose(0, 2).contiguous() * 3.0).transpose(0, 2).pow(2).sum()):
        (ours,) = torch.autograd.grad(upstream(HF.batch_norm(x, None, None, training=True)), x)
        (theirs,) = torch.autograd.grad(upstream(F.batch_norm(x, None, None, training=True)), x)
        same(ours, theirs, 1e-11)


def test_batch_norm_notices_that_its_input_has_changed(device, rng):
    x = tensor(rng.standard_normal((4, 3)), "float32", device, grad=True)
    z = x * 1.0
    y = HF.batch_norm(z, None, None, training=True)
    z.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---------------------------------------------------------------------------------------------- softmax
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("float64", "contiguous"), ("float16", "contiguous"), ("bfloat16", "channels-last"), ("float32", "sliced"),
     ("float32", "channels-last"), ("float32", "contiguous")],
)  # fmt: skip
def test_softmax(device, rng, dim, layout, dtype):
    x = layout_of(tensor(rng.standard_normal((3, 4, 11)), dtype, device), layout).requires_grad_()
    dy = layout_of(tensor(rng.standard_normal((3, 4, 11)), dtype, device), layout)
    y = HF.softmax(x, dim)
    (dx,) = torch.autograd.grad(y, x, dy)
    # PyTorch's own: in the precision of the sums, rounded once
    theirs = F.softmax(x.to(ACC[dtype]), dim)
    rolled = [
        torch._softmax_backward_data(dy.to(ACC[dtype]).roll(k, dim), y.detach().to(ACC[dtype]).roll(k, dim), dim, ACC[dtype])
        .roll(-k, dim).to(x.dtype) for k in (0, 1, 2)
    ]  # fmt: skip
    hold("y", y, reference.softmax(values_of(x), dim), dtype, theirs.to(x.dtype))
    hold("dx", dx, reference.softmax_backward(values_of(dy), values_of(y), dim), dtype, *rolled)


@drawn
@given(data=st.data())
def test_softmax_is_torchs(device, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4), "shape")
    rank = max(len(shape), 1)
    dim = data.draw(st.integers(-rank, rank - 1), "dim")
    start = data.draw(st.sampled_from(["float64", "float32", "int64"]), "dtype")
    dtype = data.draw(st.sampled_from([torch.float64, None]), "dtype=") if start != "int64" else torch.float64
    x = tensor(3 * rng.standard_normal(shape), start, device)
    results = []
    for function in (HF.softmax, F.softmax):
        leaf = x.clone().requires_grad_(start != "int64")
        y = function(leaf, dim, dtype=dtype)
        results.append([y] if start == "int64" else [y, torch.autograd.grad((y**2).sum(), leaf)[0]])
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs, 1e-6 if torch.float32 in (ours.dtype, x.dtype) else 1e-12)


def test_softmax_chooses_a_dim_as_torch_does(device, rng):
    for shape in ((4,), (3, 4), (2, 3, 4), (2, 3, 4, 5)):
        x = tensor(rng.standard_normal(shape), "float64", device)
        with pytest.warns(UserWarning, match="implicit choice"):
            ours = HF.softmax(x)
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            same(ours, F.softmax(x))


def test_softmax_gradcheck(device, rng):
    x = tensor(rng.standard_normal((3, 5, 2)), "float64", device, grad=True)
    gradcheck(lambda x: HF.softmax(x, 1), (x,))


@pytest.mark.parametrize("V", [10, 33333])
def test_softmax_of_rows_of_minus_infinity(device, rng, V):
    x = tensor(rng.standard_normal((3, V)), "float32", device)
    x[0, : V - 3] = -math.inf
    x[1] = -math.inf
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    dy = tensor(rng.standard_normal((3, V)), "float32", device)
    y, theirs = HF.softmax(leaf, 1), F.softmax(other, 1)
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)
    dx, theirs_dx = torch.autograd.grad(y, leaf, dy)[0], torch.autograd.grad(theirs, other, dy)[0]
    torch.testing.assert_close(dx, theirs_dx, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


# ---------------------------------------------------------------------------------------------- cross entropy
def torch_by_hand(x, target, upstream, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """The gradient with PyTorch's softmax, the classes in a few orders: one order's error is a matter of luck."""
    axis = min(x.dim() - 1, 1)
    C = x.shape[axis]
    along = [C if i == axis else 1 for i in range(x.dim())]
    w = torch.ones(along, dtype=x.dtype, device=x.device) if weight is None else weight.reshape(along)
    if target.is_floating_point():
        kept, y, denominator = torch.tensor(True), target, x.numel() / C
    else:
        kept = (target != ignore_index).unsqueeze(axis)
        y = torch.zeros_like(x).scatter(axis, torch.where(kept, target.unsqueeze(axis), 0), 1.0)
        denominator = (w * y * kept).sum()
    q = w * ((1 - label_smoothing) * y + label_smoothing / C)
    g = upstream.unsqueeze(axis) if reduction == "none" else upstream / (denominator if reduction == "mean" else 1)
    for k in (0, 1, 2, 5):
        p = F.softmax(x.roll(k, axis), axis).roll(-k, axis)
        yield torch.where(kept, g * (p * q.sum(axis, keepdim=True) - q), 0.0)


def cross_entropy_and_check(device, x, target, dtype, upstream, **options):
    """Our loss and gradient, each held to the answer sheet and to PyTorch in the precision of the sums, rounded once."""
    acc = ACC[dtype]
    loss = HF.cross_entropy(x, target, **options)
    assert loss.dtype == x.dtype
    (dx,) = torch.autograd.grad(loss, x, upstream)
    x_acc = x.detach().to(acc).requires_grad_()
    target_acc = target.to(acc) if target.is_floating_point() else target
    theirs = F.cross_entropy(x_acc, target_acc, **options)
    (theirs_dx,) = torch.autograd.grad(theirs, x_acc, upstream.to(acc))
    by_hand = torch_by_hand(x_acc.detach(), target_acc, upstream.to(acc), **options)
    sheet = reference.cross_entropy_with_options(
        values_of(x),
        values_of(target) if target.is_floating_point() else target.cpu().numpy(),
        **{k: values_of(v) if k == "weight" else v for k, v in options.items()},
        upstream=values_of(upstream),
    )
    hold("loss", loss, sheet.loss, dtype, theirs.to(x.dtype))
    hold("dx", dx, sheet.dlogits, dtype, *(v.to(x.dtype) for v in (theirs_dx, *by_hand)))
    return loss, dx


def soft(rng, shape):
    y = rng.random(shape) + 0.01
    return y / y.sum(1, keepdims=True)


def loss_shape(shape):
    return (*shape[:1], *shape[2:]) if len(shape) > 1 else ()


LOGITS = {
    "(C,)": (6,),
    "(N, C)": (5, 9),
    "(N, C, L)": (2, 5, 7),
    "(N, C, H, W)": (2, 4, 3, 2),
    "V = 1": (3, 1),
    "V = 1001": (2, 1001),
    "beyond one program": (2, 33333),
    "beyond one program, class axis in the middle": (1, 5000, 3),
}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("shape", LOGITS.values(), ids=list(LOGITS))
def test_cross_entropy(device, rng, shape, kind, reduction):
    if kind == "probabilities" and len(shape) == 1:
        target = tensor(soft(rng, (1, *shape))[0], "float32", device)
    elif kind == "probabilities":
        target = tensor(soft(rng, shape), "float32", device)
    else:
        target = torch.tensor(rng.integers(0, shape[min(len(shape) - 1, 1)], loss_shape(shape)), device=device)
    x = tensor(rng.standard_normal(shape), "float32", device, grad=True)
    upstream = tensor(rng.standard_normal(loss_shape(shape) if reduction == "none" else ()), "float32", device)
    cross_entropy_and_check(device, x, target, "float32", upstream, reduction=reduction)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": True}, {"weight": True, "label_smoothing": 0.3}],
                         ids=["plain", "smoothing", "weight", "weight and smoothing"])  # fmt: skip
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((16, 21), "float64"), ((16, 21), "float32"), ((16, 21), "float16"), ((16, 21), "bfloat16"), ((2, 5, 3), "float32"),
     ((1, 20000), "float32"), ((1, 20000), "bfloat16")], ids=str,
)  # fmt: skip
def test_cross_entropy_of_every_option(device, rng, shape, kind, options, dtype):
    C = shape[1]
    if "weight" in options:
        options = options | {"weight": tensor(rng.random(C) + 0.25, SINGLE[ACC[dtype]], device)}
    if kind == "classes":
        t = rng.integers(0, C, loss_shape(shape))
        if t.size > 1:
            t.reshape(-1)[1] = 3
        target = torch.tensor(t, device=device)
        options = options | {"ignore_index": 3}
    else:
        target = tensor(soft(rng, shape), dtype, device)
    x = tensor(rng.standard_normal(shape), dtype, device, grad=True)
    upstream = tensor(1.0 + rng.random(loss_shape(shape)), dtype, device)
    cross_entropy_and_check(device, x, target, dtype, upstream, reduction="none", **options)
    cross_entropy_and_check(device, x, target, dtype, upstream.reshape(-1)[0], reduction="mean", **options)


@drawn
@given(data=st.data())
def test_cross_entropy_is_torchs(device, data):
    """Every combination of arguments that PyTorch takes means the same here, NaN included."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    C = data.draw(st.integers(1, 6), "C")
    spatial = data.draw(st.sampled_from([None, (), (3,), (2, 3)]), "spatial")
    shape = (C,) if spatial is None else (data.draw(st.integers(0, 4), "N"), C, *spatial)
    hard = data.draw(st.booleans(), "hard")
    weight = data.draw(st.sampled_from(["none", "random", "some zero", "all zero"]), "weight")
    reduction = data.draw(st.sampled_from(["none", "mean", "sum"]), "reduction")
    smoothing = data.draw(st.sampled_from([0.0, 0.1, 1.0]), "label_smoothing")
    ignore_index = data.draw(st.sampled_from([-100, 0, -1, 255]), "ignore_index") if hard else -100
    ignored = data.draw(st.sampled_from([0.0, 0.5, 1.0]), "share ignored") if hard else 0.0
    layout = data.draw(st.sampled_from(["contiguous", "channels-last", "sliced"]), "layout") if len(shape) > 1 else "contiguous"

    x = layout_of(tensor(2 * rng.standard_normal(shape), "float64", device), layout)
    if hard:
        t = rng.integers(0, C, loss_shape(shape))
        target = torch.tensor(np.where(rng.random(loss_shape(shape)) < ignored, ignore_index, t), device=device)
    else:
        target = layout_of(tensor(rng.random(shape), "float64", device), layout)
    w = None
    if weight != "none":
        w = rng.random(C) + 0.1
        w[rng.random(C) < {"random": 0.0, "some zero": 0.5, "all zero": 1.0}[weight]] = 0.0
        w = tensor(w, "float64", device)
    results = []
    for function in (HF.cross_entropy, F.cross_entropy):
        leaf = x.clone().requires_grad_()
        leaves = [leaf] if hard else [leaf, target.clone().requires_grad_()]
        loss = function(
            leaf, target if hard else leaves[1], w, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
        )
        upstream = tensor(np.random.default_rng(5).standard_normal(tuple(loss.shape)), "float64", device)
        results.append([loss, *torch.autograd.grad(loss, leaves, upstream)])
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs)


@pytest.mark.parametrize(("size_average", "reduce"), [(True, None), (False, None), (None, False), (True, True), (False, False)])
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
def test_cross_entropy_takes_the_old_reductions(device, rng, size_average, reduce):
    x, t = tensor(rng.standard_normal((3, 4)), "float64", device), torch.tensor([0, 3, 1], device=device)
    ours = HF.cross_entropy(x, t, size_average=size_average, reduce=reduce)
    same(ours, F.cross_entropy(x, t, size_average=size_average, reduce=reduce))


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_cross_entropy_gradcheck(device, rng, kind):
    x = tensor(rng.standard_normal((3, 4, 2)), "float64", device, grad=True)
    weight = tensor(rng.random(4) + 0.2, "float64", device)
    options = {"weight": weight, "label_smoothing": 0.2}
    if kind == "classes":
        t = torch.tensor(rng.integers(0, 4, (3, 2)), device=device)
        t[1, 1] = -100
        gradcheck(lambda x: HF.cross_entropy(x, t, **options), (x,))
        gradcheck(lambda x: HF.cross_entropy(x, t, reduction="none", **options), (x,))
    else:
        t = tensor(rng.random((3, 4, 2)), "float64", device, grad=True)
        gradcheck(lambda x, t: HF.cross_entropy(x, t, **options), (x, t))
        gradcheck(lambda x, t: HF.cross_entropy(x, t, reduction="none", **options), (x, t))


def first_tile_minus_infinity(rng, V):
    z = rng.standard_normal((2, V))
    z[:, : V - 300] = -np.inf
    return z


HARD = {
    "first tile all -inf": first_tile_minus_infinity,
    "near -200": lambda rng, V: -200 + rng.standard_normal((2, V)),
    "near +1e4": lambda rng, V: 1e4 + 8 * rng.standard_normal((2, V)),
    "certain": lambda rng, V: np.where(np.arange(V) == V - 1, 90.0, rng.standard_normal((2, V))),
}


@pytest.mark.parametrize("case", HARD, ids=list(HARD))
@pytest.mark.parametrize("V", [1001, 33333])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_of_hard_rows(device, rng, case, V, dtype):
    x = tensor(HARD[case](rng, V), dtype, device, grad=True)
    target = torch.tensor([V - 1, V - 2], device=device)
    upstream = tensor(rng.standard_normal(2), dtype, device)
    cross_entropy_and_check(device, x, target, dtype, upstream, reduction="none")


@pytest.mark.parametrize("gap", [6.0, 9.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gradient_at_a_nearly_certain_target(device, gap, dtype):
    """p - 1 is subtracted in float32: in half precision p itself rounds to 1."""
    x = tensor([[gap, 0.0, 0.0]], dtype, device, grad=True)
    (dx,) = torch.autograd.grad(HF.cross_entropy(x, torch.tensor([0], device=device)), x)
    expected = reference.softmax_cross_entropy(values_of(x), np.array([0])).dz[0, 0]
    assert abs(values_of(dx)[0, 0] - expected) <= ulp(expected, dtype) + 2 * ulp(1.0, "float32")
    assert dx[0, 0] != 0


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("scale", [32768.0, 60000.0])
def test_float16_under_a_large_loss_scale(device, rng, scale, kind):
    """The upstream gradient and 1/n meet p - y in float32, before the one rounding: each element keeps its digits.

    A gradient stored before it is scaled would be a subnormal float16 here. (65536 itself is no float16.)
    """
    N, V = 64, 64
    x = tensor(rng.standard_normal((N, V)), "float16", device, grad=True)
    t = rng.integers(0, V, N) if kind == "classes" else soft(rng, (N, V))
    target = torch.tensor(t, device=device) if kind == "classes" else tensor(t, "float16", device)
    loss = HF.cross_entropy(x, target)
    (dx,) = torch.autograd.grad(loss, x, torch.full_like(loss, scale))
    t = target.cpu().numpy() if kind == "classes" else values_of(target)
    upstream = float(torch.tensor(scale, dtype=torch.float16))
    expected = reference.cross_entropy_with_options(values_of(x), t, upstream=upstream).dlogits
    assert np.abs(expected / scale).max() < 2 / N
    # one float16 rounding of each element, beside float32's error of a row's largest
    bound = np.abs(expected) * 2.0**-11 + 2.0**-25 + 4 * upstream / N * 2.0**-24
    assert (np.abs(values_of(dx) - expected) <= bound).all()
    assert (dx != 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 2, 77, -(2**40)])
def test_all_rows_ignored(device, rng, reduction, smoothing, ignore_index):
    """'mean' is 0/0 = NaN, as PyTorch's; the gradient is exactly 0, NaN in the logits or not."""
    x = tensor(rng.standard_normal((3, 5)), "float32", device)
    x[1] = math.nan
    x.requires_grad_()
    target = torch.full((3,), ignore_index, device=device)
    loss = HF.cross_entropy(x, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert (loss == 0).all()
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert (dx == 0).all()


@pytest.mark.parametrize("ignore_index", [-100, 0, 5000, -1])
def test_ignored_rows_are_as_if_they_were_not_there(device, rng, ignore_index):
    x = tensor(rng.standard_normal((6, 7)), "float32", device)
    target = torch.tensor([1, 2, 3, 4, 5, 6], device=device)
    target[[1, 4]] = ignore_index
    x[[1, 4]] = math.nan
    x.requires_grad_()
    loss = HF.cross_entropy(x, target, ignore_index=ignore_index)
    (dx,) = torch.autograd.grad(loss, x)
    keep = [0, 2, 3, 5]
    alone = x.detach()[keep].requires_grad_()
    expected = F.cross_entropy(alone, target[keep])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(dx[keep], torch.autograd.grad(expected, alone)[0])
    assert (dx[[1, 4]] == 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 2), (2, 5, 0)], ids=str)
def test_cross_entropy_of_no_rows(device, shape, reduction):
    results = []
    for function in (HF.cross_entropy, F.cross_entropy):
        x = torch.zeros(shape, device=device, requires_grad=True)
        target = torch.zeros(loss_shape(shape), dtype=torch.int64, device=device)
        loss = function(x, target, reduction=reduction)
        results.append((loss, torch.autograd.grad(loss.sum(), x)[0]))
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs)


def test_vectors_that_do_not_sum_to_one(device, rng):
    x = tensor(rng.standard_normal((3, 9)), "float32", device, grad=True)
    target = tensor(rng.random((3, 9)) * np.array([[0.0], [0.5], [4.0]]), "float32", device)
    cross_entropy_and_check(device, x, target, "float32", tensor(rng.standard_normal(3), "float32", device), reduction="none")


@pytest.mark.parametrize("layout", ["sliced", "channels-last"])
def test_strided_logits_and_targets(device, rng, layout):
    x = layout_of(tensor(rng.standard_normal((3, 5, 4)), "float32", device), layout).requires_grad_()
    target = torch.tensor(rng.integers(0, 5, (3, 8)), device=device)[:, ::2]
    upstream = tensor(rng.standard_normal((3, 8)), "float32", device)[:, 1::2]
    _, dx = cross_entropy_and_check(device, x, target, "float32", upstream, reduction="none")
    assert dx.shape == x.shape
    target = layout_of(tensor(soft(rng, (3, 5, 4)), "float32", device), layout)
    cross_entropy_and_check(device, x, target, "float32", upstream, reduction="none")
    expanded = tensor(1.5, "float32", device).expand(3, 4)
    cross_entropy_and_check(device, x, target, "float32", expanded, reduction="none")


def test_cross_entropy_needs_no_gradient(device, rng):
    x = tensor(rng.standard_normal((3, 5)), "float32", device)
    t = torch.tensor([0, 4, 2], device=device)
    loss = HF.cross_entropy(x, t)
    assert not loss.requires_grad
    assert torch.equal(loss, HF.cross_entropy(x.clone().requires_grad_(), t).detach())
    y = tensor(soft(rng, (3, 5)), "float32", device, grad=True)
    (dy,) = torch.autograd.grad(HF.cross_entropy(x, y), y)
    torch.testing.assert_close(dy, -F.log_softmax(x, 1) / 3)


# ---------------------------------------------------------------------------------------------- every function
def call(name, x):
    if name == "batch_norm":
        return HF.batch_norm(x, None, None, training=True)
    if name == "softmax":
        return HF.softmax(x, 1)
    return HF.cross_entropy(x, torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), reduction="none")


FUNCTIONS = ["batch_norm", "softmax", "cross_entropy"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_is_refused(device, rng, name):
    x = tensor(rng.standard_normal((4, 3)), "float64", device, grad=True)
    (dx,) = torch.autograd.grad(call(name, x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: a second derivative was asked for"):
        dx.sum().backward()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitwise_repeatable(device, rng, name, dtype):
    x = tensor(rng.standard_normal((67, 5)), dtype, device, grad=True)
    first, again = (call(name, x) for _ in range(2))
    assert torch.equal(first, again)
    dy = torch.randn_like(first)
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (first, again)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_backward_over_the_same_graph_gives_the_same(device, rng, name):
    x = tensor(rng.standard_normal((5, 7)), "float32", device, grad=True)
    y = call(name, x)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(y, x, dy)[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_and_subclasses_are_tensors(device, rng, name):
    x = tensor(rng.standard_normal((5, 7)), "float32", device)

    class Named(torch.Tensor):
        pass

    expected = call(name, x)
    assert torch.equal(call(name, torch.nn.Parameter(x.clone())), expected)
    assert torch.equal(call(name, x.clone().as_subclass(Named)).as_subclass(torch.Tensor), expected)


# ---------------------------------------------------------------------------------------------- bad input
def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, r"input: expected a torch.Tensor, got numpy.ndarray", (np.ones((2, 3)), None, None), {"training": True}),
        (TypeError, r"input: expected dtype float16, bfloat16, float32, float64, got int64", (zeros(2, 3), None, None),
         {"training": True}),
        (TypeError, r"weight: expected a torch.Tensor, got builtins.list", (ones(2, 3), None, None, [1.0]), {"training": True}),
        (TypeError, r"bias: expected dtype .* got int64", (ones(2, 3), None, None, None, zeros(3)), {"training": True}),
        (ValueError, r"input: expected \(N, C, …\), at least 2 axes, got shape \(3,\)", (ones(3), None, None),
         {"training": True}),
        (ValueError, r"weight: expected shape \(3,\) \(one number per channel of input\), got \(2,\)",
         (ones(2, 3), None, None, ones(2)), {"training": True}),
        (ValueError, r"running_mean: expected shape \(3,\) .* got \(4,\)", (ones(2, 3), ones(4), ones(3)), {}),
        (ValueError, r"running_var: expected shape \(3,\) .* got \(3, 1\)", (ones(2, 3), ones(3), ones(3, 1)), {}),
        (ValueError, r"running_mean and running_var: expected both in evaluation \(training=False\), got None",
         (ones(2, 3), None, None), {}),
        (ValueError, r"running_mean and running_var: expected both in evaluation", (ones(2, 3), ones(3), None), {}),
        (ValueError, r"eps: expected a number of at least 0, got -1.0", (ones(2, 3), ones(3), ones(3)), {"eps": -1.0}),
        (ValueError, r"input: expected more than 1 value per channel when training, got shape \(1, 3\)",
         (ones(1, 3), None, None), {"training": True}),
        (ValueError, r"input: expected more than 1 value per channel when training, got shape \(1, 3, 1, 1\)",
         (ones(1, 3, 1, 1), None, None), {"training": True}),
    ],
)  # fmt: skip
def test_batch_norm_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=message):
        HF.batch_norm(*arguments, **options)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (2, 4)], ids=str)
def test_batch_norm_writes_nothing_on_an_error(device, shape):
    """The running statistics are as they were when a training batch is refused."""
    mean, var = torch.full((3,), 0.25, device=device), torch.full((3,), 4.0, device=device)
    with pytest.raises(ValueError, match="expected"):
        HF.batch_norm(torch.ones(shape, device=device), mean, var, training=True)
    assert (mean == 0.25).all()
    assert (var == 4.0).all()


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, r"input: expected a torch.Tensor, got builtins.list", ([1.0], 0), {}),
        (TypeError, r"input: expected dtype .* got int64", (zeros(3), 0), {}),
        (TypeError, r"input: expected dtype .* got int32", (ones(3), 0), {"dtype": torch.int32}),
        (IndexError, r"dim: expected an axis of input with shape \(2, 3\), got 2", (ones(2, 3), 2), {}),
        (IndexError, r"dim: expected an axis of input with shape \(2, 3\), got -3", (ones(2, 3), -3), {}),
        (IndexError, r"dim: expected an axis of input with shape .* got 1", (ones(), 1), {}),
    ],
)
def test_softmax_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=message):
        HF.softmax(*arguments, **options)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, r"input: expected a torch.Tensor, got numpy.ndarray", (np.ones((2, 3)), zeros(2)), {}),
        (TypeError, r"target: expected a torch.Tensor, got builtins.list", (ones(2, 3), [0, 1]), {}),
        (TypeError, r"input: expected dtype .* got int64", (zeros(2, 3), zeros(2)), {}),
        (TypeError, r"target: expected integer classes .* got bool", (ones(2, 3), ones(2, dtype=torch.bool)), {}),
        (TypeError, r"weight: expected a torch.Tensor, got builtins.list", (ones(2, 3), zeros(2), [1.0, 1.0, 1.0]), {}),
        (TypeError, r"weight: expected dtype .* got int64", (ones(2, 3), zeros(2), zeros(3)), {}),
        (ValueError, r"input: expected \(C,\), \(N, C\) or \(N, C, d1, …\), got shape \(\)", (ones(), zeros()), {}),
        (ValueError, r"target: expected shape \(2,\) \(one class per row of input\), got \(3,\)", (ones(2, 3), zeros(3)), {}),
        (ValueError, r"target: expected shape \(2, 4\) .* got \(2,\)", (ones(2, 3, 4), zeros(2)), {}),
        (ValueError, r"target: expected shape \(2,\) .* got \(2, 3\)", (ones(2, 3), zeros(2, 3)), {}),
        (ValueError, r"target: expected the shape of input, \(2, 3\), got \(2,\)", (ones(2, 3), ones(2)), {}),
        (ValueError, r"target: expected the shape of input, \(2, 3\), got \(2, 4\)", (ones(2, 3), ones(2, 4)), {}),
        (ValueError, r"weight: expected shape \(3,\) \(one weight per class\), got \(2,\)",
         (ones(2, 3), zeros(2), ones(2)), {}),
        (ValueError, r"reduction: expected one of none, mean, sum, got 'avg'", (ones(2, 3), zeros(2)), {"reduction": "avg"}),
        (ValueError, r"label_smoothing: expected a number from 0 to 1, got 1.5", (ones(2, 3), zeros(2)),
         {"label_smoothing": 1.5}),
        (ValueError, r"label_smoothing: expected a number from 0 to 1, got -0.1", (ones(2, 3), zeros(2)),
         {"label_smoothing": -0.1}),
        (ValueError, r"label_smoothing: expected a number from 0 to 1, got nan", (ones(2, 3), zeros(2)),
         {"label_smoothing": math.nan}),
    ],
)  # fmt: skip
def test_cross_entropy_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=message):
        HF.cross_entropy(*arguments, **options)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("bad", [-1, 5, 2**33, -(2**33), -100], ids=str)
def test_a_class_out_of_range(device, rng, bad, reduction):
    """On the host an error that names it; on a GPU, where nothing waits for the device, NaN."""
    x = tensor(rng.standard_normal((4, 5, 2)), "float32", device, grad=True)
    target = torch.tensor(rng.integers(0, 5, (4, 2)), device=device)
    target[2, 1] = bad
    ignore = -7
    if device == "cpu":
        with pytest.raises(IndexError, match=rf"target: expected classes in 0…4 or ignore_index -7, got {bad} in row 5"):
            HF.cross_entropy(x, target, ignore_index=ignore, reduction=reduction)
    else:
        loss = HF.cross_entropy(x, target, ignore_index=ignore, reduction=reduction)
        (dx,) = torch.autograd.grad(loss.sum(), x)
        assert dx[2, :, 1].isnan().all()
        assert dx[0].isfinite().all() or reduction == "mean"


def test_probabilities_have_no_index_to_ignore(device):
    """PyTorch refuses an `ignore_index` of 0 or more beside probabilities; a silent one would be worse."""
    x, y = torch.ones(2, 3, device=device), torch.full((2, 3), 1 / 3, device=device)
    with pytest.raises(RuntimeError, match="ignore_index"):
        F.cross_entropy(x, y, ignore_index=1)
    with pytest.raises(ValueError, match="ignore_index: expected"):
        HF.cross_entropy(x, y, ignore_index=1)
