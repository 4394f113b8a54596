"""`hw3gpu.functional.cross_entropy` against the answer sheet and `torch.nn.functional`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from twins import ACC, HARD, SINGLE, drawn, gradcheck, hold, layout_of, ones, same, tensor, values_of, zeros

import hw3gpu.functional as HF
from hw3gpu import _error_bounds, reference
from measure import ulp

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---------------------------------------------------------------------------------------------- cross entropy
def cross_entropy_and_check(device, x, target, dtype, upstream, **options):
    """Our loss and gradient, each held to the answer sheet and to PyTorch in the precision of the sums, rounded once."""
    acc = ACC[dtype]
    loss = HF.cross_entropy(x, target, **options)
    assert loss.dtype == (torch.promote_types(x.dtype, target.dtype) if target.is_floating_point() else x.dtype)
    (dx,) = torch.autograd.grad(loss, x, upstream)
    x_acc = x.detach().to(acc).requires_grad_()
    target_acc = target.to(acc) if target.is_floating_point() else target
    theirs = F.cross_entropy(x_acc, target_acc, **options)
    (theirs_dx,) = torch.autograd.grad(theirs, x_acc, upstream.to(acc))
    given = values_of(x), values_of(target) if target.is_floating_point() else target.cpu().numpy()
    values = {k: values_of(v) if k == "weight" else v for k, v in options.items()} | {"upstream": values_of(upstream)}
    sheet = reference.cross_entropy_with_options(*given, **values)
    bound = _error_bounds.cross_entropy_with_options(*given, **values, dtype=SINGLE[acc])
    hold("loss", loss, sheet.loss, str(loss.dtype).removeprefix("torch."), theirs.to(loss.dtype), bound.loss)
    hold("dx", dx, sheet.dlogits, dtype, theirs_dx.to(x.dtype), bound.dlogits)
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


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize(
    ("shape", "reduction"),
    [
        # a sum is a mean of another upstream: of rows beyond one program with --slow
        pytest.param(shape, how, id=f"{name}-{how}", marks=pytest.mark.slow if "beyond" in name and how == "sum" else [])
        for name, shape in LOGITS.items()
        for how in ("none", "mean", "sum")
    ],
)
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


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": True},
    "weight and smoothing": {"weight": True, "label_smoothing": 0.3},
}
PLACES = [((16, 21), "float64"), ((16, 21), "float32"), ((16, 21), "bfloat16"), ((2, 5, 3), "float32"),
          ((1, 20000), "float32"), ((1, 20000), "bfloat16")]  # fmt: skip


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        # of long rows of bfloat16 both options at once; each alone with --slow
        pytest.param(
            *place, options, id=f"{place}-{name}", marks=pytest.mark.slow if place is PLACES[-1] and len(options) == 1 else []
        )
        for place in PLACES
        for name, options in OPTIONS.items()
    ],
)
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


@pytest.mark.parametrize("name", [*HARD, "+inf", "NaN", "subnormal loss"])
@pytest.mark.parametrize(("V", "dtype"), [(8200, "bfloat16"), (8203, "float32")], ids=str)
def test_hard_values_of_a_long_row_whose_gradient_comes_later(device, rng, name, V, dtype):
    """The row's end is in a tile that is not full; the target is the maximum, whose loss has the digits of the other terms."""
    z = np.linspace(-110.0, -95.0, V)
    z[V // 5] = {"+inf": np.inf, "NaN": np.nan}.get(name, 0.0)
    z = HARD[name](rng, V) if name in HARD else np.stack([z, z])
    x = tensor(z, dtype, device, grad=True)
    target = x.detach().nan_to_num(-np.inf, posinf=1e30).argmax(1)
    cross_entropy_and_check(device, x, target, dtype, tensor(np.ones(2), dtype, device), reduction="none")


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


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("C", [4, 12, 20, 1004])
def test_probabilities_wider_than_the_logits(device, rng, C, layout):
    """16 bytes are eight logits and four probabilities: where rows of these end on 16 bytes, half a group of logits may end."""
    x = layout_of(tensor(rng.standard_normal((3, C)), "bfloat16", device), layout).requires_grad_()
    target = tensor(soft(rng, (3, C)), "float32", device)
    upstream = tensor(rng.standard_normal(3), "float32", device)
    cross_entropy_and_check(device, x, target, "bfloat16", upstream, reduction="none")


def test_cross_entropy_needs_no_gradient(device, rng):
    x = tensor(rng.standard_normal((3, 5)), "float32", device)
    t = torch.tensor([0, 4, 2], device=device)
    loss = HF.cross_entropy(x, t)
    assert not loss.requires_grad
    assert torch.equal(loss, HF.cross_entropy(x.clone().requires_grad_(), t).detach())
    y = tensor(soft(rng, (3, 5)), "float32", device, grad=True)
    (dy,) = torch.autograd.grad(HF.cross_entropy(x, y), y)
    torch.testing.assert_close(dy, -F.log_softmax(x, 1) / 3)


# ---------------------------------------------------------------------------------------------- bad input
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
