"""What `hw3gpu.functional.cross_entropy` has beyond PyTorch's arguments, on both kinds of kernels, against the answer sheet."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from twins import ACC, HARD, SINGLE, hold, layout_of, ones, same, tensor, values_of, zeros

import hw3gpu
import hw3gpu.functional as HF
from hw3gpu import _error_bounds, reference
from hw3gpu._core.dispatch import requested_backend
from hw3gpu._torch import class_range

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EXTRAS = {
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "all": {"z_loss": 1e-3, "softcap": 20.0, "logit_scale": 0.37},
}


def loss_shape(shape):
    return (*shape[:1], *shape[2:]) if len(shape) > 1 else ()


def soft(rng, shape):
    y = rng.random(shape) + 0.01
    return y / y.sum(min(len(shape) - 1, 1), keepdims=True)


def theirs(x, target, upstream, z_loss=0.0, softcap=None, logit_scale=1.0, reduction="mean", weight=None, label_smoothing=0.0):
    """The loss in PyTorch's operations, and its gradient."""
    axis = min(x.dim() - 1, 1)
    hard = not target.is_floating_point()
    x = x.detach().requires_grad_()
    z = logit_scale * x
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    w = torch.ones_like(x).reshape(-1)[: x.shape[axis]] if weight is None else weight
    kept = target != -100 if hard else torch.ones(loss_shape(x.shape), dtype=torch.bool, device=x.device)
    losses = F.cross_entropy(z, target, weight=w, reduction="none", label_smoothing=label_smoothing)
    losses = losses + torch.where(kept, z_loss * torch.logsumexp(z, axis) ** 2, 0.0)
    counted = torch.where(kept, w[torch.where(kept, target, 0)], 0.0) if hard else kept.to(x.dtype)
    loss = losses if reduction == "none" else losses.sum() / (counted.sum() if reduction == "mean" else 1.0)
    return loss.detach(), *torch.autograd.grad(loss, x, upstream)


def check(device, x, target, upstream, dtype, gradient="auto", **options):
    """Loss, gradient and statistics, each held to the answer sheet and to PyTorch in the precision of the sums."""
    acc = ACC[dtype]
    loss, stats = HF.cross_entropy(x, target, gradient=gradient, return_stats=True, **options)
    (dx,) = torch.autograd.grad(loss, x, upstream)
    values = {k: values_of(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    t = values_of(target) if target.is_floating_point() else target.cpu().numpy()
    sheet = reference.cross_entropy_with_options(values_of(x), t, upstream=values_of(upstream), **values)
    bound = _error_bounds.cross_entropy_with_options(
        values_of(x), t, upstream=values_of(upstream), **values, dtype=SINGLE[acc]
    )  # fmt: skip
    by_torch = theirs(x.to(acc), target.to(acc) if target.is_floating_point() else target, upstream.to(acc), **options)
    hold("loss", loss, sheet.loss, dtype, by_torch[0].to(x.dtype), bound.loss)
    hold("dx", dx, sheet.dlogits, dtype, by_torch[1].to(x.dtype), bound.dlogits)
    check_statistics(x, t, stats, options.get("softcap"), options.get("logit_scale", 1.0))
    plain = HF.cross_entropy(x.detach(), target, **options)
    assert torch.equal(plain, loss.detach()) or torch.allclose(plain, loss.detach(), rtol=1e-6, atol=0, equal_nan=True)
    return dx


def check_statistics(x, t, stats, softcap=None, logit_scale=1.0):
    """Errors of a few units of the largest lse: what the maximum and the logarithm make together."""
    sheet = reference.cross_entropy_statistics(values_of(x), t, softcap=softcap, logit_scale=logit_scale)
    acc = ACC[str(x.dtype).removeprefix("torch.")]
    bound = 8 * torch.finfo(acc).eps
    for name in ("lse", "entropy", "log_prob"):
        ours, expected = getattr(stats, name), getattr(sheet, name)
        if expected is None:
            assert ours is None
        else:
            assert ours.dtype == acc
            if ours.requires_grad:
                with pytest.raises(RuntimeError, match="they have a gradient where differentiable=True asks for it"):
                    ours.sum().backward()
            np.testing.assert_allclose(
                values_of(ours), expected, rtol=bound, atol=bound * (1 + np.abs(sheet.lse).max(initial=0))
            )
    z = logit_scale * np.moveaxis(values_of(x), min(x.dim() - 1, 1), -1)
    z = z if softcap is None else softcap * np.tanh(z / softcap)
    predicted = stats.predicted.cpu().numpy()
    assert stats.predicted.dtype == torch.int64
    if softcap is None and logit_scale == 1.0:
        np.testing.assert_array_equal(predicted, sheet.predicted)
    else:  # logits whose difference is rounded away tie, and the first of them is taken
        chosen = np.take_along_axis(z, np.where(predicted < 0, 0, predicted)[..., None], -1)[..., 0]
        assert ((predicted == -1) == (sheet.predicted == -1)).all()
        assert (chosen >= z.max(-1) - bound * np.abs(z.max(-1)))[predicted >= 0].all()
    if sheet.correct is None:
        assert stats.correct is None
    else:
        assert stats.correct.dtype == torch.bool
        correct = stats.correct.cpu().numpy()
        if softcap is None:
            np.testing.assert_array_equal(correct, sheet.correct)
        else:  # logits whose difference the cap takes away tie
            nearly = np.take_along_axis(z, np.where(t < 0, 0, t)[..., None], -1)[..., 0] >= z.max(-1) - bound * softcap
            assert (correct >= sheet.correct).all()
            assert (correct <= nearly).all()


SHAPES = {
    "(C,)": (6,),
    "(N, C)": (6, 21),
    "(N, C, H, W)": (2, 5, 3, 2),
    "V = 1": (3, 1),
    "V = 1001": (2, 1001),
    "beyond one program": (2, 33333),
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=list(EXTRAS))
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_loss_gradient_and_statistics_of_every_shape(device, rng, shape, kind, extras):
    x = tensor(2 * rng.standard_normal(shape), "float32", device, grad=True)
    if kind == "classes":
        target = torch.tensor(rng.integers(0, shape[min(len(shape) - 1, 1)], loss_shape(shape)), device=device)
    else:
        target = tensor(soft(rng, shape), "float32", device)
    upstream = tensor(rng.standard_normal(loss_shape(shape)), "float32", device)
    check(device, x, target, upstream, "float32", reduction="none", **extras)


DTYPES, KINDS = ("float64", "float32", "bfloat16", "float16"), ("classes", "probabilities")
CASES = list(itertools.product(DTYPES, KINDS, EXTRAS, ("forward", "backward")))
REDUCED = [("none", None), ("mean", 0.75), ("sum", 1.0), ("mean", 1.0), ("sum", 0.75)]  # and the upstream gradient


@pytest.mark.parametrize(("dtype", "kind", "extra", "gradient"), CASES)
def test_with_weights_smoothing_and_ignored_rows(device, rng, dtype, kind, extra, gradient):
    """Three of the five reductions a combination, one in the interpreter, which is slow; each meets every value of the rest."""
    N, C, L = 5, 17, 3
    number, extras = CASES.index((dtype, kind, extra, gradient)), EXTRAS[extra]
    x = layout_of(tensor(3 * rng.standard_normal((N, C, L)), dtype, device), "channels-last").requires_grad_()
    if kind == "classes":
        target = torch.tensor(rng.integers(0, C, (N, L)), device=device)
        target[1, 2] = target[4, 0] = -100
    else:
        target = tensor(soft(rng, (N, C, L)), dtype, device)
    options = {"weight": tensor(rng.random(C) + 0.25, str(ACC[dtype]).removeprefix("torch."), device), "label_smoothing": 0.2}
    rows = tensor(1.0 + rng.random((N, L)), dtype, device)
    rows[0] = 1.0
    for k in range(1 if requested_backend() == "gpu" else 3):
        reduction, one = REDUCED[(number + 2 * k) % 5]
        upstream = rows if one is None else tensor(one, dtype, device)
        check(device, x, target, upstream, dtype, gradient, reduction=reduction, **options, **extras)


EXTREME = HARD | {"all equal": lambda rng, V: np.full((2, V), 0.25)}


@pytest.mark.parametrize("softcap", [None, 15.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize("case", EXTREME, ids=list(EXTREME))
@pytest.mark.parametrize(("V", "dtype"), [(1001, "float32"), (1001, "bfloat16"), (33333, "float32")])
def test_hard_rows(device, rng, case, V, dtype, softcap):
    """-inf is -τ under a cap, which takes part in the sums; a row's end must not."""
    x = tensor(EXTREME[case](rng, V), dtype, device, grad=True)
    target = torch.tensor([V - 1, V - 2], device=device)
    upstream = tensor(rng.standard_normal(2), dtype, device)
    z_loss = 0.0 if case == "near +1e4" else 1e-3
    logit_scale = 1.0 if softcap is None else 0.7
    check(device, x, target, upstream, dtype, reduction="none", z_loss=z_loss, softcap=softcap, logit_scale=logit_scale)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_cap_keeps_its_digits_near_0_and_far_out(device, softcap, dtype):
    z = np.concatenate([[0.0, -0.0], np.logspace(-30, 4, 200), -np.logspace(-30, 4, 200)])[None]
    x = tensor(z, dtype, device, grad=True)
    for t in (5, 150, 390):
        target = torch.tensor([t], device=device)
        check(device, x, target, tensor([1.0], dtype, device), dtype, reduction="none", softcap=softcap)


# ---------------------------------------------------------------------------------------------- statistics
def test_correct_means_that_no_class_is_above_the_target(device):
    """As `torch.argmax` may choose any of the largest, a tie counts."""
    x = torch.tensor([[1.0, 3.0, 3.0], [3.0, 3.0, 3.0], [0.0, 1.0, 2.0], [5.0, 0.0, 0.0]], device=device)
    target = torch.tensor([2, 0, 1, -100], device=device)
    _, stats = HF.cross_entropy(x, target, return_stats=True)
    assert stats.correct.tolist() == [True, True, False, False]
    assert stats.predicted.tolist() == [1, 0, 2, -1]
    assert stats.lse[3] == stats.entropy[3] == stats.log_prob[3] == 0


def test_predicted_beyond_the_integers_that_float32_holds():
    V = 2**24
    x, target = torch.zeros(1, V + 5), torch.tensor([V + 1])
    x[0, V + 1] = 1.0
    with hw3gpu.use_backend("cpu"):
        _, stats = HF.cross_entropy(x, target, return_stats=True)
    assert stats.predicted.tolist() == [V + 1]
    assert stats.correct.all()
    with pytest.raises(ValueError, match=f"return_stats: expected at most {V} classes, .* or differentiable=True, got {V + 1}"):
        HF.linear_cross_entropy(ones(1, 1), ones(1, 1).expand(V + 1, 1), target, return_stats=True)


@pytest.mark.parametrize("ignore_index", [-7, 2])
@pytest.mark.parametrize("options", EXTRAS.values(), ids=EXTRAS)
def test_what_is_no_class(device, rng, options, ignore_index):
    """A row of `ignore_index`, which may be a class, has a loss and a gradient of 0; one of another number is refused."""
    x = tensor(rng.standard_normal((3, 5)), "float32", device, grad=True)
    target = torch.tensor([1, ignore_index, 4], device=device)
    loss = HF.cross_entropy(x, target, ignore_index=ignore_index, reduction="none", **options)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert loss[1] == 0
    assert (dx[1] == 0).all()
    assert (loss[::2] > 0).all()
    target[2] = 5
    if device == "cpu":
        with pytest.raises(IndexError, match=rf"or ignore_index {ignore_index}, got 5 in row 2"):
            HF.cross_entropy(x, target, ignore_index=ignore_index, **options)
    else:
        assert HF.cross_entropy(x, target, ignore_index=ignore_index, reduction="none", **options)[2].isnan()


def test_the_log_probability_of_a_certain_class_keeps_its_digits(device):
    x = tensor([[12.0, 0.0, 0.0]], "float32", device)
    _, stats = HF.cross_entropy(x, torch.tensor([0], device=device), return_stats=True)
    assert float(stats.log_prob) == pytest.approx(-math.log1p(2 * math.exp(-12.0)), rel=1e-6)


class LooksOn(TorchDispatchMode):
    """Calls inside are operators of `torch.library`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_statistics_change_no_loss_and_no_gradient(device, rng, reduction, kind):
    x = tensor(rng.standard_normal((4, 9)), "float64", device, grad=True)
    target = torch.tensor([0, 8, -100, 2], device=device) if kind == "classes" else tensor(soft(rng, (4, 9)), "float64", device)
    alone = HF.cross_entropy(x, target, reduction=reduction)
    loss, _ = HF.cross_entropy(x, target, reduction=reduction, return_stats=True)
    same(loss, alone)
    same(*(torch.autograd.grad(v.sum() * 0.5, x)[0] for v in (loss, alone)))
    with LooksOn():
        _, of_operators = HF.cross_entropy(x, target, reduction=reduction, return_stats=True)
    assert not any(v is not None and v.requires_grad for v in of_operators)


@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0)], ids=str)
def test_statistics_of_no_rows(device, shape):
    x, target = torch.zeros(shape, device=device), torch.zeros(loss_shape(shape), dtype=torch.int64, device=device)
    _, stats = HF.cross_entropy(x, target, return_stats=True, z_loss=0.1)
    assert all(tuple(v.shape) == loss_shape(shape) for v in stats)


# ---------------------------------------------------------------------------------------------- when the gradient is computed
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_mode_gives_the_same_gradient_every_time(device, rng, reduction, kind):
    """Whatever the caller did to the last one: the gradient that was handed out is computed anew."""
    x = tensor(rng.standard_normal((6, 33)), "float32", device, grad=True)
    target = (
        torch.tensor(rng.integers(0, 33, 6), device=device)
        if kind == "classes"
        else tensor(soft(rng, (6, 33)), "float32", device)
    )
    upstream = (
        torch.tensor([1.0, 0.5, 1.0, -2.0, 0.0, 1.0], device=device)
        if reduction == "none"
        else torch.tensor(0.5, device=device)
    )
    found = []
    for gradient in ("forward", "backward", "auto"):
        loss = HF.cross_entropy(x, target, reduction=reduction, gradient=gradient)
        for _ in range(3):
            (dx,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
            found.append(dx.clone())
            dx.fill_(7.0)
    for dx in found[1:]:
        torch.testing.assert_close(dx, found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gradient", ["forward", "backward", "auto"])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_float16_under_a_loss_scale_of_65536(device, rng, kind, gradient):
    """What autocast and a gradient scaler make: a float32 loss of float16 logits. Each element of dx is rounded once."""
    N, V = 64, 64
    x = tensor(rng.standard_normal((N, V)), "float16", device, grad=True)
    target = (
        torch.tensor(rng.integers(0, V, N), device=device)
        if kind == "classes"
        else tensor(soft(rng, (N, V)), "float16", device)
    )
    with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
        loss = HF.cross_entropy(x, target, gradient=gradient)
    assert loss.dtype == torch.float32
    (dx,) = torch.autograd.grad(loss * 65536.0, x)
    t = target.cpu().numpy() if kind == "classes" else values_of(target)
    expected = reference.cross_entropy_with_options(values_of(x), t, upstream=65536.0).dlogits
    bound = np.abs(expected) * 2.0**-11 + 2.0**-25 + 4 * 65536.0 / N * 2.0**-24
    assert (np.abs(values_of(dx) - expected) <= bound).all()
    assert (dx != 0).all()


@pytest.mark.parametrize("gradient", ["forward", "backward", "auto"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_of_nothing_can_be_zero(device, rng, gradient, weighted):
    x = tensor(rng.standard_normal((3, 4)), "float32", device, grad=True)
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device) if weighted else None
    target = torch.tensor([1, 2, -100] if weighted else [-100] * 3, device=device)
    assert HF.cross_entropy(x, target, weight, gradient=gradient).isnan()
    loss = HF.cross_entropy(x, target, weight, gradient=gradient, all_ignored="zero", z_loss=0.1)
    assert loss == 0
    assert (torch.autograd.grad(loss * 3.0, x)[0] == 0).all()
    assert HF.cross_entropy(x.detach(), target, weight, all_ignored="zero") == 0
    some = torch.tensor([0, 1, 2], device=device)
    assert torch.equal(HF.cross_entropy(x, some, weight, all_ignored="zero"), HF.cross_entropy(x, some, weight))


# ---------------------------------------------------------------------------------------------- classes out of range
class Event:
    """A stand-in for a CUDA event, which says when the copy before it has arrived."""

    done = False

    def record(self):
        pass

    def query(self):
        return Event.done


@pytest.fixture
def watch(monkeypatch):
    """A watch whose flag is on the host, and whose copies arrive when `Event.done` says so."""
    full = torch.full
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "full", lambda *args, pin_memory=False, **options: full(*args, **options))
    monkeypatch.setattr(Event, "done", False)
    return class_range.Watch(torch.device("cpu"))


def test_a_wrong_class_is_reported_by_a_later_call_that_does_not_wait(watch, monkeypatch):
    watch.look()
    watch.flag.fill_(17)  # as the kernels do
    watch.send()
    watch.look()  # still on its way
    monkeypatch.setattr(Event, "done", True)
    with pytest.raises(IndexError, match=r"got another in row 17 of an earlier call"):
        watch.look()
    watch.send()
    watch.look()  # once


def test_a_copy_on_its_way_is_not_overwritten(watch, monkeypatch):
    watch.send()
    watch.flag.fill_(3)
    watch.send()
    monkeypatch.setattr(Event, "done", True)
    watch.look()  # what was sent first was in order
    watch.send()
    with pytest.raises(IndexError, match="row 3 "):
        watch.look()


def test_whoever_asks_waits(watch):
    watch.wait()
    watch.flag.fill_(5)
    with pytest.raises(IndexError, match="row 5 "):
        watch.wait()
    watch.wait()


@pytest.mark.gpu
def test_a_wrong_class_is_reported_on_a_gpu():
    x, target = torch.zeros(3, 5, device="cuda"), torch.tensor([0, 5, 1], device="cuda")
    HF.check_targets()
    assert HF.cross_entropy(x, target).isnan()
    with pytest.raises(IndexError, match="row 1 "):
        HF.check_targets()
    HF.cross_entropy(x, target)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="row 1 "):
        HF.cross_entropy(x, target)


def test_on_the_host_there_is_nothing_to_ask_for():
    HF.check_targets("cpu")
    HF.check_targets()


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"z_loss: expected a finite number of at least 0, got -0.1", {"z_loss": -0.1}),
        (ValueError, r"z_loss: expected a finite number of at least 0, got inf", {"z_loss": math.inf}),
        (ValueError, r"z_loss: expected a finite number of at least 0, got nan", {"z_loss": math.nan}),
        (TypeError, r"z_loss: expected a number, got None", {"z_loss": None}),
        (ValueError, r"softcap: expected a number from 1e-30 to 1e30, got 0", {"softcap": 0}),
        (ValueError, r"softcap: expected a number from 1e-30 to 1e30, got inf", {"softcap": math.inf}),
        (ValueError, r"softcap: expected a number from 1e-30 to 1e30, got 1e\+39", {"softcap": 1e39}),  # gave NaN
        (TypeError, r"softcap: expected a number, got '30'", {"softcap": "30"}),
        (ValueError, r"logit_scale: expected a number from 1e-30 to 1e30, got -1.0", {"logit_scale": -1.0}),
        (ValueError, r"logit_scale: expected a number from 1e-30 to 1e30, got inf", {"logit_scale": math.inf}),
        (TypeError, r"logit_scale: expected a number, got tensor", {"logit_scale": torch.ones((), requires_grad=True)}),
        (ValueError, r"gradient: expected one of auto, forward, backward, got 'now'", {"gradient": "now"}),
        (ValueError, r"all_ignored: expected one of nan, zero, got 0", {"all_ignored": 0}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        HF.cross_entropy(ones(2, 3), zeros(2), **options)
