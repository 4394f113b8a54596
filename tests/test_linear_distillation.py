"""`hw3gpu.functional.linear_distillation_loss` beside `distillation_loss` of whole logits, on both kinds of kernels."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear
from twins import gradcheck, gradgradcheck, ones, opcheck, same, tensor, values_of

import hw3gpu.functional as HF
from hw3gpu._torch import linear_chunks, linear_distillation
from hw3gpu._torch.distillation import KINDS as EVERY_KIND

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KINDS = pytest.mark.parametrize("kind", EVERY_KIND)


def problem(rng, device, dtype="float64", N=7, D=4, E=3, V=5, bias=True):
    """Student's and teacher's (input, weight, bias)."""
    sides = []
    for features in (D, E):
        x, W = (tensor(rng.standard_normal(shape), dtype, device, grad=True) for shape in ((N, features), (V, features)))
        sides.append((x, W, tensor(rng.standard_normal(V), dtype, device, grad=True) if bias else None))
    return sides


def loss_of(sides, **options):
    (x, W, b), (y, U, c) = sides
    return HF.linear_distillation_loss(x, W, y, U, student_bias=b, teacher_bias=c, **options)


def leaves_of(sides):
    return [v for side in sides for v in side if v is not None]


@KINDS
@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 100])
@pytest.mark.parametrize(
    ("bias", "reduction"),
    [
        (True, "mean"),
        (False, "none"),
        # neither bears on the other
        pytest.param(True, "none", marks=pytest.mark.slow),
        pytest.param(False, "mean", marks=pytest.mark.slow),
    ],
)
def test_chunks_change_nothing(device, rng, bias, chunk_rows, reduction, kind):
    sides = problem(rng, device, bias=bias)
    mask = torch.tensor([1, 0, 1, 1, 1, 1, 0], dtype=torch.bool, device=device)
    options = {"temperature": 0.7, "kind": kind, "beta": 0.3, "mask": mask, "reduction": reduction}
    losses = loss_of(sides, chunk_rows=chunk_rows, **options), HF.distillation_loss(*(linear(*of) for of in sides), **options)
    upstream = torch.randn(losses[0].shape, dtype=torch.float64, device=device)
    found = [torch.autograd.grad(loss, leaves_of(sides), upstream) for loss in losses]
    for ours, theirs in zip((losses[0], *found[0]), (losses[1], *found[1]), strict=True):
        same(ours.detach(), theirs.detach())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_half_precision_is_as_good_as_whole_logits(device, rng, dtype):
    """The logits are rounded to their dtype either way; gradients are sums of as many rounded products."""
    sides = problem(rng, device, dtype, N=64, D=16, V=40)
    loss = loss_of(sides, chunk_rows=9)
    exact = [tuple(v.detach().double().requires_grad_() for v in side) for side in sides]
    whole = HF.distillation_loss(*(linear(*of) for of in exact))
    assert loss.dtype == torch.float32
    eps = torch.finfo(getattr(torch, dtype)).eps
    torch.testing.assert_close(values_of(loss), values_of(whole), rtol=0, atol=24 * eps)
    loss.backward()
    whole.backward()
    for ours, theirs in zip(leaves_of(sides), leaves_of(exact), strict=True):
        assert ours.grad.dtype == ours.dtype
        torch.testing.assert_close(
            values_of(ours.grad), values_of(theirs.grad), rtol=0, atol=24 * eps * theirs.grad.abs().max().item()
        )


def test_only_the_gradients_that_are_asked_for(device, rng):
    student, teacher = problem(rng, device)
    frozen = tuple(v.detach() for v in teacher)
    for v, g in zip(student, torch.autograd.grad(loss_of((student, frozen)), student), strict=True):
        assert g.shape == v.shape
    only = (student[0].detach(), student[1], student[2].detach())
    loss_of((only, frozen)).backward()
    assert student[1].grad.any()
    assert student[0].grad is None
    assert not loss_of(([v.detach() for v in student], frozen)).requires_grad


def test_a_teacher_of_another_precision_and_sequences(device, rng):
    x, W = (tensor(rng.standard_normal(shape), "bfloat16", device) for shape in ((2, 3, 4), (5, 4)))
    y, U = (tensor(rng.standard_normal(shape), "float32", device) for shape in ((2, 3, 6), (5, 6)))
    found = HF.linear_distillation_loss(x, W, y, U, reduction="none", chunk_rows=2)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, HF.distillation_loss(x @ W.t(), y @ U.t(), reduction="none"))


def test_there_is_never_more_than_a_chunk_of_logits(device, rng, monkeypatch):
    """Every product of both passes is of the rows of a chunk."""
    sides = problem(rng, device, N=20)
    held = []
    logits_of = linear_chunks.logits_of

    def counted(part, out):
        held.append((out.shape, part.x.shape[0]))
        return logits_of(part, out)

    monkeypatch.setattr(linear_distillation, "logits_of", counted)
    loss_of(sides, chunk_rows=6).backward()
    of_both = [rows for rows in (6, 6, 6, 2, *[3] * 6, 2) for _ in range(2)]  # logits and dz share a chunk of the backward pass
    assert [rows for _, rows in held] == of_both
    assert {shape for shape, _ in held} == {(6, 5), (3, 5)}


@pytest.mark.parametrize("rows", [None, 20], ids=["few bytes", "asked for"])
def test_logits_of_one_chunk_are_made_once(device, rng, monkeypatch, rows):
    """They are held for the backward pass, which leaves them as they are; they are made again where HELD is nothing."""
    sides = problem(rng, device, N=20)
    leaves = leaves_of(sides)
    made, logits_of = [], linear_chunks.logits_of
    monkeypatch.setattr(linear_distillation, "logits_of", lambda *given: made.append(1) or logits_of(*given))
    loss = loss_of(sides, chunk_rows=rows)
    found = [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]
    assert len(made) == 2
    monkeypatch.setattr(linear_chunks, "HELD", 0)
    if rows is None:
        loss_of(sides, chunk_rows=rows).backward()
        assert len(made) > 4
    for ours, again in zip(*found, strict=True):
        assert torch.equal(ours, again)


@KINDS
def test_derivatives_of_any_order_and_transforms(device, rng, kind):
    sides = problem(rng, device, N=3, D=2, E=2, V=3)

    def function(x, W, b, y, U, c):
        return loss_of(((x, W, b), (y, U, c)), temperature=2.0, kind=kind, chunk_rows=2)

    gradcheck(function, leaves_of(sides))
    gradgradcheck(function, leaves_of(sides))
    expected = torch.autograd.grad(function(*leaves_of(sides)), sides[0][1])[0]
    given = [v.detach() for v in leaves_of(sides)]
    same(torch.func.grad(function, argnums=1)(*given), expected)


def test_the_operators_keep_the_rules_and_compile(device, rng):
    sides = problem(rng, device, "float32")
    opcheck(torch.ops.hw3gpu.linear_divergences.default, (*sides[0], *sides[1], None, "forward", 0.5, 0.7, 3))

    def loss(*leaves):
        return loss_of((leaves[:3], leaves[3:]), chunk_rows=3)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = leaves_of(sides)
    for ours, theirs in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_rows(device):
    x = torch.zeros(0, 3, device=device, requires_grad=True)
    W = torch.ones(5, 3, device=device, requires_grad=True)
    HF.linear_distillation_loss(x, W, x.detach(), W.detach(), reduction="sum").backward()
    assert x.grad.shape == (0, 3)
    assert not W.grad.any()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((ones(2, 3), ones(5, 4), ones(2, 3), ones(5, 3)), {}, ValueError, "student_weight: expected shape"),
        ((ones(2, 3), ones(3), ones(2, 3), ones(5, 3)), {}, ValueError, r"student_weight: expected \(V, D\)"),
        ((ones(2, 3), ones(5, 3), ones(2, 3), ones(4, 3)), {}, ValueError, "teacher_weight: expected 5 classes"),
        ((ones(2, 3), ones(5, 3), ones(3, 3), ones(5, 3)), {}, ValueError, "teacher_input: expected shape"),
        ((ones(2, 3), ones(5, 3).double(), ones(2, 3), ones(5, 3)), {}, TypeError, "student_weight: expected the dtype"),
        (
            (ones(2, 3), ones(5, 3), ones(2, 3).double(), ones(5, 3).double()),
            {},
            TypeError,
            "teacher_input: expected the dtype of student_input",
        ),
        ((ones(2, 3), ones(5, 3), ones(2, 3).long(), ones(5, 3)), {}, TypeError, "teacher_input: expected dtype"),
        ((ones(2, 3), ones(0, 3), ones(2, 3), ones(0, 3)), {}, ValueError, "student_weight: expected at least one class"),
        (
            (ones(2, 3), ones(5, 3), ones(2, 3), ones(5, 3)),
            {"teacher_bias": ones(4)},
            ValueError,
            "teacher_bias: expected shape",
        ),
        ((ones(2, 3), ones(5, 3), ones(2, 3), ones(5, 3)), {"mask": ones(3).bool()}, ValueError, "mask: expected shape"),
        ((ones(2, 3), ones(5, 3), ones(2, 3), ones(5, 3)), {"chunk_rows": 0}, ValueError, "chunk_rows: expected at least 1"),
        ((ones(2, 3), ones(5, 3), ones(2, 3), ones(5, 3)), {"kind": "x"}, ValueError, "kind: expected one of"),
        ((ones(2, 3), ones(5, 3), ones(2, 3), ones(5, 3)), {"reduction": "x"}, ValueError, "reduction: expected one of"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        HF.linear_distillation_loss(*arguments, **options)
