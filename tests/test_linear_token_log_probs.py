"""`hw3gpu.functional.linear_token_log_probs` beside `token_log_probs` of whole logits, on both kinds of kernels."""

from __future__ import annotations

import pytest
import torch
from twins import gradcheck, gradgradcheck, ones, opcheck, same, tensor, values_of, zeros

import hw3gpu.functional as HF
from hw3gpu._torch import linear_chunks, linear_token_log_probs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def problem(rng, device, dtype="float64", N=7, D=4, V=5, bias=True):
    x, W = (tensor(rng.standard_normal(shape), dtype, device, grad=True) for shape in ((N, D), (V, D)))
    b = tensor(rng.standard_normal(V), dtype, device, grad=True) if bias else None
    target = torch.tensor(rng.integers(0, V, N), device=device)
    target[1] = -100
    return x, W, b, target


@pytest.mark.parametrize("asked", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -0.1, 0.5)], ids=str)
@pytest.mark.parametrize(
    ("bias", "chunk_rows"),
    [
        # how rows are divided does not bear on the bias: each with two chunks, the rest with --slow
        pytest.param(bias, rows, marks=[] if bias == (rows in (None, 3)) else pytest.mark.slow)
        for bias in (True, False)
        for rows in (None, 1, 3, 100)
    ],
)
def test_chunks_change_nothing(device, rng, bias, chunk_rows, asked):
    x, W, b, target = problem(rng, device, bias=bias)
    found = HF.linear_token_log_probs(x, W, target, linear_bias=b, temperature=0.7, chunk_rows=chunk_rows)
    whole = HF.token_log_probs(torch.nn.functional.linear(x, W, b), target, temperature=0.7)
    leaves = [v for v in (x, W, b) if v is not None]
    rows = [torch.randn(7, dtype=torch.float64, device=device) * a for a in asked]
    of = [torch.autograd.grad([v for v, a in zip(r, asked, strict=True) if a], leaves, [g for g in rows if g.any()])
          for r in (found, whole)]  # fmt: skip
    for ours, theirs in zip((*found, *of[0]), (*whole, *of[1]), strict=True):
        same(ours.detach(), theirs.detach())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_half_precision_is_as_good_as_whole_logits(device, rng, dtype):
    """The logits are rounded to their dtype either way; gradients are sums of as many rounded products."""
    x, W, b, target = problem(rng, device, dtype, N=64, D=16, V=40)
    found = HF.linear_token_log_probs(x, W, target, linear_bias=b, chunk_rows=9)
    exact = [v.detach().double().requires_grad_() for v in (x, W, b)]
    whole = HF.token_log_probs(torch.nn.functional.linear(*exact), target)
    assert found.log_prob.dtype == torch.float32
    eps = torch.finfo(x.dtype).eps
    for ours, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(values_of(ours), values_of(theirs), rtol=0, atol=24 * eps)
    sum(v.sum() for v in found).backward()
    sum(v.sum() for v in whole).backward()
    for ours, theirs in zip((x, W, b), exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        torch.testing.assert_close(
            values_of(ours.grad), values_of(theirs.grad), rtol=0, atol=24 * eps * theirs.grad.abs().max().item()
        )


@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 0.1}, {"logit_scale": 0.7}, {"softcap": 2.0}, {"label_smoothing": 0.1}], ids=str
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_differentiable_statistics_of_the_linear_loss(device, rng, reduction, options):
    x, W, b, target = problem(rng, device)
    weight = tensor(rng.random(5), "float64", device)
    given = {"weight": weight, "reduction": reduction, "return_stats": True, "differentiable": True, **options}
    found = HF.linear_cross_entropy(x, W, target, linear_bias=b, chunk_rows=3, **given)
    whole = HF.cross_entropy(torch.nn.functional.linear(x, W, b), target, **given)
    of = [torch.autograd.grad(loss.sum() + stats.entropy.sum(), (x, W, b)) for loss, stats in (found, whole)]
    for ours, theirs in zip((found[0], *found[1], *of[0]), (whole[0], *whole[1], *of[1]), strict=True):
        same(ours.detach(), theirs.detach())
    assert torch.equal(found[1].predicted, whole[1].predicted)


def test_hidden_states_of_a_batch_of_sequences(device, rng):
    x, W = tensor(rng.standard_normal((2, 3, 4)), "float32", device), tensor(rng.standard_normal((5, 4)), "float32", device)
    target = torch.tensor(rng.integers(0, 5, (2, 3)), device=device)
    found = HF.linear_token_log_probs(x, W, target)
    assert found.entropy.shape == (2, 3)
    for ours, theirs in zip(found, HF.token_log_probs(x @ W.t(), target), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_there_is_never_more_than_a_chunk_of_logits(device, rng, monkeypatch):
    """Every product of both passes is of the rows of a chunk."""
    x, W, b, target = problem(rng, device, N=20)
    held = []
    logits_of = linear_chunks.logits_of

    def counted(part, out):
        held.append((out.shape, part.x.shape[0]))
        return logits_of(part, out)

    monkeypatch.setattr(linear_token_log_probs, "logits_of", counted)
    HF.linear_token_log_probs(x, W, target, linear_bias=b, chunk_rows=6).entropy.sum().backward()
    assert [rows for _, rows in held] == [6, 6, 6, 2, *[3] * 6, 2]  # logits and dz share a chunk of the backward pass
    assert {shape for shape, _ in held} == {(6, 5), (3, 5)}


@pytest.mark.parametrize("rows", [None, 20], ids=["few bytes", "asked for"])
def test_logits_of_one_chunk_are_made_once(device, rng, monkeypatch, rows):
    """They are held for the backward pass, which leaves them as they are; they are made again where HELD is nothing."""
    x, W, b, target = problem(rng, device, N=20)
    leaves = x, W, b
    made, logits_of = [], linear_chunks.logits_of
    monkeypatch.setattr(linear_token_log_probs, "logits_of", lambda *given: made.append(1) or logits_of(*given))
    loss = HF.linear_token_log_probs(x, W, target, linear_bias=b, chunk_rows=rows).entropy.sum()
    found = [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]
    assert len(made) == 1
    monkeypatch.setattr(linear_chunks, "HELD", 0)
    if rows is None:
        HF.linear_token_log_probs(x, W, target, linear_bias=b, chunk_rows=rows).entropy.sum().backward()
        assert len(made) > 2
    for ours, again in zip(*found, strict=True):
        assert torch.equal(ours, again)


def test_derivatives_of_any_order_and_transforms(device, rng):
    x, W, b, target = problem(rng, device, N=3, D=2, V=3)

    def function(x, W, b):
        return tuple(HF.linear_token_log_probs(x, W, target, linear_bias=b, temperature=2.0, chunk_rows=2))

    gradcheck(function, (x, W, b))
    gradgradcheck(function, (x, W, b))
    expected = torch.autograd.grad(function(x, W, b)[1].sum(), W)[0]
    same(torch.func.grad(lambda W: function(x.detach(), W, b.detach())[1].sum())(W.detach()), expected)


def test_the_operators_keep_the_rules_and_compile(device, rng):
    x, W, b, target = problem(rng, device, "float32")
    opcheck(torch.ops.hw3gpu.linear_token_log_probs.default, (x, W, b, target[:, None], 0.7, -100, 3, True))

    def loss(x, W, b):
        found = HF.linear_token_log_probs(x, W, target, linear_bias=b, chunk_rows=3)
        return found.log_prob.sum() - 0.1 * found.entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(x, W, b), (x, W, b)) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((ones(2, 3), ones(5, 4), zeros(2)), {}, ValueError, "linear_weight: expected shape"),
        ((ones(2, 3), ones(3), zeros(2)), {}, ValueError, r"linear_weight: expected \(V, D\)"),
        ((ones(2, 3), ones(5, 3).double(), zeros(2)), {}, TypeError, "linear_weight: expected the dtype of input"),
        ((ones(2, 3), ones(5, 3), zeros(3)), {}, ValueError, "target: expected shape"),
        ((ones(2, 3), ones(5, 3), ones(2)), {}, TypeError, "target: expected integer classes"),
        ((ones(2, 3), ones(5, 3), zeros(2)), {"linear_bias": ones(4)}, ValueError, "linear_bias: expected shape"),
        ((ones(2, 3), ones(5, 3), zeros(2)), {"chunk_rows": 0}, ValueError, "chunk_rows: expected at least 1"),
        ((ones(2, 3), ones(5, 3), zeros(2)), {"temperature": 0.0}, ValueError, "temperature: expected a number from"),
        ((ones(2, 3), ones(0, 3), zeros(2)), {}, ValueError, "linear_weight: expected at least one class"),
        ((ones(2, 3), ones(5, 3), zeros(2) + 5), {}, IndexError, "target: expected classes in 0…4"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        HF.linear_token_log_probs(*arguments, **options)
