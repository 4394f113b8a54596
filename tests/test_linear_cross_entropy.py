"""`hw3gpu.functional.linear_cross_entropy` against the answer sheet, PyTorch, and the memory it promises not to take."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from twins import ones, same, tensor, values_of, zeros

import hw3gpu.functional as HF
import hw3gpu.nn as HN
from hw3gpu._torch import linear_chunks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

N, D, C = 13, 8, 11


def problem(rng, device, dtype="float64", K=(), kind="classes", bias=True, batched=True):
    """input, linear_weight, linear_bias and target; the first three are leaves."""
    rows = (N,) if batched else ()
    x = tensor(rng.standard_normal((*rows, D)), dtype, device, grad=True)
    W = tensor(rng.standard_normal((C, *K, D)), dtype, device, grad=True)
    b = tensor(rng.standard_normal((C, *K)), dtype, device, grad=True) if bias else None
    if kind == "classes":
        target = torch.tensor(rng.integers(0, C, (*rows, *K)), device=device)
        if batched:
            target[2] = -100
    else:
        y = rng.random((*rows, C, *K)) + 0.01
        target = tensor(y / y.sum(len(rows), keepdims=True), dtype, device)
    return x, W, b, target


def both(x, W, b, target, upstream, z_loss=0.0, softcap=None, **options):
    """(ours, PyTorch's on float64 copies): loss and gradients."""
    ours_options = {k: v for k, v in options.items() if k not in ("gradient", "chunk_rows")}
    leaves = [v for v in (x, W, b) if v is not None]
    loss = HF.linear_cross_entropy(x, W, target, linear_bias=b, z_loss=z_loss, softcap=softcap, **options)
    up = upstream(loss)
    ours = [loss, *torch.autograd.grad(loss, leaves, up.to(loss.dtype))]
    exact = [v.detach().double().requires_grad_() for v in leaves]
    t = target.double() if target.is_floating_point() else target
    if "weight" in ours_options:
        ours_options["weight"] = ours_options["weight"].double()
    bias = exact[2] if b is not None else None
    theirs = F.linear_cross_entropy(exact[0], exact[1], t, linear_bias=bias, **ours_options)
    return ours, [theirs, *torch.autograd.grad(theirs, exact, up.double())]


# K, bias, batched
PROBLEMS = [((), True, True), ((3,), True, True), ((2, 2), False, True), ((), False, False)]
CASES = list(itertools.product(("classes", "probabilities"), ("none", "mean", "sum"), (None, 1, 5, 100), ("auto", "backward")))


@pytest.mark.parametrize(("kind", "reduction", "rows", "gradient"), CASES)
def test_it_is_pytorchs(device, rng, kind, reduction, rows, gradient):
    """Whatever the chunks: to a few units of the sums in float64. Each problem meets every value of every argument."""
    number = CASES.index((kind, reduction, rows, gradient))
    K, bias, batched = PROBLEMS[sum(number // n for n in (24, 8, 2, 1)) % 4]
    weight = tensor(rng.random(C) + 0.25, "float64", device)
    given = problem(rng, device, K=K, kind=kind, bias=bias, batched=batched)
    ours, theirs = both(
        *given, lambda loss: torch.ones_like(loss) * 0.75,
        weight=weight, reduction=reduction, label_smoothing=0.1, gradient=gradient, chunk_rows=rows,
    )  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        same(a, b, 1e-11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_it_is_as_exact_as_pytorchs(device, rng, reduction, kind, dtype):
    """Errors of the loss and of each gradient are at most 1.5 times those of PyTorch's unfused function, and some units."""
    x, W, b, target = problem(rng, device, dtype, kind=kind)
    ours, exact = both(x, W, b, target, lambda loss: torch.ones_like(loss), reduction=reduction, chunk_rows=4)
    theirs = F.linear_cross_entropy(x, W, target, linear_bias=b, reduction=reduction)
    theirs = [theirs, *torch.autograd.grad(theirs, (x, W, b), torch.ones_like(theirs))]
    eps = torch.finfo(getattr(torch, dtype)).eps
    for a, other, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == other.dtype
        error, allowed = (float((v.detach().double() - e).abs().max()) for v in (a, other))
        # products of D terms and of N rows, each rounded once more than PyTorch's
        assert error <= 1.5 * allowed + 4 * eps * float(e.abs().max())


@pytest.mark.parametrize("gradient", ["auto", "backward"])
def test_every_call_of_backward_gives_the_same(device, rng, gradient):
    x, W, b, target = problem(rng, device)
    loss = HF.linear_cross_entropy(x, W, target, linear_bias=b, gradient=gradient, chunk_rows=4)
    found = []
    for _ in range(3):
        gradients = torch.autograd.grad(loss, (x, W, b), torch.tensor(0.5, dtype=x.dtype, device=device), retain_graph=True)
        found.append([g.clone() for g in gradients])
        for g in gradients:
            g.fill_(7.0)
    for again in found[1:]:
        for a, b in zip(again, found[0], strict=True):
            same(a, b)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_only_where_needed(device, rng, needed, reduction):
    *parts, target = problem(rng, device)
    leaves = [[p.detach().clone().requires_grad_(bool(n)) for p, n in zip(parts, needed, strict=True)] for _ in range(2)]
    for function, (x, W, b) in zip((HF.linear_cross_entropy, F.linear_cross_entropy), leaves, strict=True):
        function(x, W, target, linear_bias=b, reduction=reduction).sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            same(ours.grad, theirs.grad, 1e-11)


@pytest.mark.parametrize("K", [(), (3,)], ids=str)
@pytest.mark.parametrize("rows", [3, None])
def test_extras_are_those_of_unfused_logits(device, rng, K, rows):
    x, W, b, target = problem(rng, device, K=K)
    extras = {"z_loss": 0.01, "softcap": 4.0, "logit_scale": 0.7, "return_stats": True}
    loss, stats = HF.linear_cross_entropy(x, W, target, linear_bias=b, chunk_rows=rows, **extras)
    logits = F.linear(x, W.reshape(-1, D), b.reshape(-1)).reshape(N, C, *K)
    whole, expected = HF.cross_entropy(logits, target, **extras)
    same(loss, whole)
    for ours, theirs in zip(stats, expected, strict=True):
        assert ours.shape == theirs.shape == target.shape
        same(ours.double(), theirs.double())
    for ours, theirs in zip(*(torch.autograd.grad(v, (x, W, b)) for v in (loss, whole)), strict=True):
        same(ours, theirs, 1e-11)


def test_the_mean_of_nothing(device, rng):
    x, W, b, _ = problem(rng, device)
    target = torch.full((N,), -100, device=device)
    assert HF.linear_cross_entropy(x, W, target, linear_bias=b).isnan()
    loss = HF.linear_cross_entropy(x, W, target, linear_bias=b, all_ignored="zero")
    assert loss == 0
    for g in torch.autograd.grad(loss, (x, W, b)):
        assert (g == 0).all()


def test_no_rows_and_no_features(device):
    for shape in ((0, D), (3, 0)):
        results = []
        for function in (HF.linear_cross_entropy, F.linear_cross_entropy):
            x, W = (
                torch.zeros(shape, device=device, requires_grad=True),
                torch.zeros(C, shape[1], device=device, requires_grad=True),
            )
            loss = function(x, W, torch.zeros(shape[0], dtype=torch.int64, device=device), reduction="sum")
            results.append([loss, *torch.autograd.grad(loss, (x, W))])
        for ours, theirs in zip(*results, strict=True):
            same(ours, theirs, 1e-6)


def test_float16_keeps_improbable_classes_under_a_loss_scale(device):
    """1/n would make their gradients subnormal; they meet upstream / n in float32."""
    rows = 4096 if device == "cpu" else 256
    x = torch.ones(rows, 1, dtype=torch.float16, device=device, requires_grad=True)
    W = torch.tensor([[9.0], [0.0]], dtype=torch.float16, device=device, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64, device=device)
    with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16, enabled=False):
        loss = HF.linear_cross_entropy(x, W, target)
    (dx,) = torch.autograd.grad(loss, x, torch.full_like(loss, 16384.0))
    p = 1 / (1 + np.exp(9.0))
    np.testing.assert_allclose(values_of(dx), -9 * p * 16384 / rows, rtol=4e-3)


def test_no_input_is_written(device, rng):
    x, W, b, target = problem(rng, device)
    before = [v.detach().clone() for v in (x, W, b, target)]
    HF.linear_cross_entropy(x, W, target, linear_bias=b, chunk_rows=3).backward()
    for now, then in zip((x, W, b, target), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_class_out_of_range_names_the_row_of_the_whole(device, rng, reduction):
    x, W, b, target = problem(rng, device)
    target[9] = C
    with pytest.raises(IndexError, match=rf"target: expected classes in 0…{C - 1} or ignore_index -100, got {C} in row 9"):
        HF.linear_cross_entropy(x, W, target, linear_bias=b, reduction=reduction, chunk_rows=4)


# ---------------------------------------------------------------------------------------------- memory
LOGITS = 2048 * 8000 * 4  # bytes
PEAKS = """
import json, os, torch
import torch.nn.functional as F
import hw3gpu.functional as HF

D, V = 16, 8000
rows = {"float32": 2048, "bfloat16": 4096}  # LOGITS
CALLS = {"ours": HF.linear_cross_entropy, "PyTorch's": F.linear_cross_entropy}

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def step(N, dtype, call):
    x = torch.randn(N, D).to(dtype).requires_grad_()
    W = (torch.randn(V, D) / 8).to(dtype).requires_grad_()
    call(x, W, torch.arange(N) % V).backward()
    return x, W

def beyond(N, dtype, call):
    step(64, dtype, call)  # compiled and imported; a fork has not read their files
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    x, W = step(N, dtype, call)
    owned = sum(v.numel() * v.element_size() for v in (x, W, x.grad, W.grad)) + 4 * W.numel()
    return peak() - before - owned

torch.set_num_threads(1)
cases = [(dtype, whose) for dtype in ("float32", "bfloat16") for whose in CALLS]
for dtype, whose in cases:  # what is compiled here no fork compiles again
    step(64, getattr(torch, dtype), CALLS[whose])
for dtype, whose in cases:
    for N in (rows[dtype], 2 * rows[dtype]):  # each in a fork, which begins with as little memory
        child = os.fork()
        if not child:
            print(json.dumps([dtype, whose, N, beyond(N, getattr(torch, dtype), CALLS[whose])]), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def peaks():
    """The peaks of a process beyond inputs, gradients and one float32 ∂ℓ/∂W, of some rows and of twice as many.

    By dtype and function, in shares of the logits of the first.
    """
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    found = {}
    for dtype, whose, _, beyond in map(json.loads, done.stdout.splitlines()):
        found.setdefault((dtype, whose), []).append(beyond / LOGITS)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_is_below_a_tenth_of_the_logits(peaks, dtype):
    """What grows with the rows is, and all but 8 MB: oneDNN's own buffers with AVX-512 take 4. Unfused it is more than all."""
    (once, twice), (unfused, _) = peaks[dtype, "ours"], peaks[dtype, "PyTorch's"]
    assert twice - once <= 0.1
    assert once <= 0.1 + (8 << 20) / LOGITS
    assert unfused >= 1.0


def test_chunks_of_the_promised_size():
    def rows(N, D, V, dtype):
        x, W = torch.empty(N, D, dtype=dtype, device="meta"), torch.empty(V, D, dtype=dtype, device="meta")
        return linear_chunks.chunk_rows(linear_chunks.Problem(x, W, None, torch.empty(N, 1, device="meta"), None))

    assert rows(8192, 4096, 128256, torch.bfloat16) == 2048  # on a device: as many numbers as W has, up to 512 MiB, whole tiles
    assert rows(1000, 64, 128256, torch.bfloat16) == 88  # an eleventh of the rows, in eights where that is less than a tile
    assert rows(5000, 4096, 128256, torch.bfloat16) == 1792  # three chunks, of alike many rows
    assert rows(1 << 20, 4096, 128256, torch.bfloat16) * 128256 * 2 <= linear_chunks.MOST
    assert rows(1024, 512, 16000, torch.float32) == 512  # as many numbers as W has
    assert rows(4, 512, 100, torch.bfloat16) >= 4  # small ones whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_are_held_in_their_dtype_until_backward(device, rng, dtype):
    """But in float16, whose sums meet the loss scale in float32. A power of two, or a class weight, loses nothing."""
    x, W, b, target = problem(rng, device, dtype)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        loss = HF.linear_cross_entropy(x, W, target, linear_bias=b, chunk_rows=4)
    of_W = [v for v in held if v.shape == W.shape and v.data_ptr() != W.data_ptr()]
    assert [v.dtype for v in of_W] == [torch.float32 if dtype == "float16" else W.dtype]
    for_one = torch.autograd.grad(loss, (x, W, b), torch.ones_like(loss))
    loss = HF.linear_cross_entropy(x, W, target, linear_bias=b, chunk_rows=4)
    for_a_quarter = torch.autograd.grad(loss, (x, W, b), torch.full_like(loss, 0.25))
    for one, quarter in zip(for_one, for_a_quarter, strict=True):
        assert (one.abs() > 1e-3).any()
        assert torch.equal(torch.where(one.abs() > 1e-3, one / 4, 0), torch.where(one.abs() > 1e-3, quarter, 0))


@pytest.mark.parametrize("rows", [None, 100], ids=["few bytes", "asked for"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_logits_of_one_chunk_are_made_once(device, rng, monkeypatch, reduction, rows):
    """They are held for the backward pass, which leaves them as they are; in chunks they are made twice."""
    x, W, b, target = problem(rng, device)
    made, logits_of = [], linear_chunks.logits_of
    monkeypatch.setattr(linear_chunks, "logits_of", lambda *given: made.append(1) or logits_of(*given))
    asked = {"linear_bias": b, "reduction": reduction, "gradient": "backward"}
    loss = HF.linear_cross_entropy(x, W, target, chunk_rows=rows, **asked).sum()
    found = [torch.autograd.grad(loss, (x, W, b), retain_graph=True) for _ in range(2)]
    assert len(made) == 1
    chunked = torch.autograd.grad(HF.linear_cross_entropy(x, W, target, chunk_rows=4, **asked).sum(), (x, W, b))
    assert len(made) > 3
    for ours, again, theirs in zip(*found, chunked, strict=True):
        assert torch.equal(ours, again)
        same(ours, theirs)


# ---------------------------------------------------------------------------------------------- the module
def test_the_module_drops_in(device, rng):
    for out, bias in (((), True), ((3,), False)):
        torch.manual_seed(0)
        theirs = torch.nn.LinearCrossEntropyLoss(D, C, out_features=out, bias=bias, label_smoothing=0.1, dtype=torch.float64)
        ours = HN.LinearCrossEntropyLoss(
            D, C, out_features=out, bias=bias, label_smoothing=0.1, dtype=torch.float64, chunk_rows=4
        )
        ours.load_state_dict(theirs.state_dict())
        ours, theirs = ours.to(device), theirs.to(device)
        x, _, _, target = problem(rng, device, K=out)
        for module in (ours, theirs):
            module(x, target).backward()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            same(a.grad, b.grad, 1e-11)
        assert "chunk_rows=4" in repr(ours)


def test_losses_take_the_extras(device, rng):
    x, W, _, target = problem(rng, device)
    logits = (x @ W.t()).detach()
    loss, stats = HN.CrossEntropyLoss(z_loss=0.1, softcap=3.0, return_stats=True)(logits, target)
    same(loss, HF.cross_entropy(logits, target, z_loss=0.1, softcap=3.0))
    assert stats.correct.shape == target.shape
    with pytest.raises(TypeError, match="unexpected keyword"):
        HN.CrossEntropyLoss(zloss=0.1)


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, r"input: expected a torch.Tensor", (np.ones((2, 4)), ones(5, 4), zeros(2)), {}),
        (TypeError, r"linear_weight: expected the dtype of input, float32, got float64",
         (ones(2, 4), ones(5, 4, dtype=torch.float64), zeros(2)), {}),
        (ValueError, r"target: expected shape \(2, 3\)", (ones(2, 3, 4), ones(5, 4), zeros(2)), {}),
        (ValueError, r"linear_weight: expected \(C, D\) .* got shape \(4,\)", (ones(2, 4), ones(4), zeros(2)), {}),
        (ValueError, r"linear_weight: expected shape \(5, 4\) \(last, the features of input\), got \(5, 3\)",
         (ones(2, 4), ones(5, 3), zeros(2)), {}),
        (ValueError, r"linear_bias: expected shape \(5,\)", (ones(2, 4), ones(5, 4), zeros(2)), {"linear_bias": ones(3)}),
        (ValueError, r"input: expected \(N, D\) with linear_weight", (ones(4), ones(5, 2, 4), zeros(2)), {}),
        (ValueError, r"target: expected shape \(2,\)", (ones(2, 4), ones(5, 4), zeros(3)), {}),
        (ValueError, r"ignore_index: expected None with probabilities", (ones(2, 4), ones(5, 4), ones(2, 5)),
         {"ignore_index": -100}),
        (ValueError, r"reduction: expected one of", (ones(2, 4), ones(5, 4), zeros(2)), {"reduction": "x"}),
        (ValueError, r"chunk_rows: expected at least 1, got 0", (ones(2, 4), ones(5, 4), zeros(2)), {"chunk_rows": 0}),
        (ValueError, r"gradient: expected 'auto' or 'backward' with reduction 'none'", (ones(2, 4), ones(5, 4), zeros(2)),
         {"gradient": "forward", "reduction": "none"}),
    ],
)  # fmt: skip
def test_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=message):
        HF.linear_cross_entropy(*arguments, **options)
    if "chunk_rows" not in options and "gradient" not in options and isinstance(arguments[0], torch.Tensor):
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            F.linear_cross_entropy(*arguments, **options)
        with pytest.raises(theirs.type):
            HF.linear_cross_entropy(*arguments, **options)
