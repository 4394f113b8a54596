"""`hw3gpu.functional.distillation_loss` of a teacher of whom the largest classes are known, on both kinds of kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from twins import ACC, gradcheck, gradgradcheck, ones, same, tensor, values_of, zeros

import hw3gpu.functional as HF
from hw3gpu import reference
from hw3gpu._torch.distillation import KINDS as EVERY_KIND

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KINDS = pytest.mark.parametrize("kind", EVERY_KIND)


def buckets(z, indices, T):
    """log-probabilities of the classes, and of the rest, by the answer sheet's softmax."""
    p = reference.softmax(np.asarray(z, dtype=np.float64) / T)
    picked = np.take_along_axis(p, indices, -1)
    others = p.copy()
    np.put_along_axis(others, indices, 0.0, -1)
    with np.errstate(divide="ignore"):
        return np.log(np.concatenate([picked, others.sum(-1, keepdims=True)], -1))


def largest(teacher, k):
    return np.argsort(-values_of(teacher), -1, kind="stable")[..., :k]


@KINDS
@pytest.mark.parametrize("dtype", ACC)
@pytest.mark.parametrize(("V", "k"), [(7, 1), (7, 3), (1001, 20), (7, 7)])
def test_is_the_divergence_of_the_classes_and_the_rest(device, rng, V, k, dtype, kind):
    student, teacher = (tensor(2 * rng.standard_normal((4, V)), dtype, device, grad=True) for _ in range(2))
    mask = torch.tensor([True, False, True, True], device=device)
    options = {"temperature": 0.7, "kind": kind, "beta": 0.3, "mask": mask}
    indices = largest(teacher, k)
    loss = HF.distillation_loss(student, teacher, top_k=k, **options)
    of_buckets = [buckets(values_of(z), indices, 0.7) for z in (student, teacher)]
    options["mask"] = mask.cpu().numpy()
    sheet = reference.distillation_loss(*of_buckets, **{**options, "temperature": 1.0})
    np.testing.assert_allclose(values_of(loss), sheet.loss, rtol=1e-12 if dtype == "float64" else 3e-5)

    exact = [z.detach().double().requires_grad_() for z in (student, teacher)]
    logs = [torch.log_softmax(z / 0.7, -1) for z in exact]
    picked = [v.gather(-1, torch.tensor(indices, device=device)) for v in logs]
    rest = [(1 - v.exp().sum(-1, keepdim=True)).clamp(min=1e-300).log() for v in picked]
    log_q, log_p = (torch.cat([v, r], -1) if k < V else v for v, r in zip(picked, rest, strict=True))
    log_m = torch.logaddexp(log_p + np.log(0.3), log_q + np.log(0.7))
    kl = [(a.exp() * (a - b)).sum(-1) for a, b in ((log_p, log_q), (log_q, log_p), (log_p, log_m), (log_q, log_m))]
    rows = {"forward": kl[0], "reverse": kl[1], "jensen_shannon": 0.3 * kl[2] + 0.7 * kl[3]}[kind]
    expected = torch.autograd.grad(rows[mask].mean(), exact)
    rest = 1.0 if k == V else float(min(v[:, -1].exp().min() for v in (log_q, log_p)))  # 1 - Σ p has a rounding of 1
    for ours, theirs in zip(torch.autograd.grad(loss, (student, teacher)), expected, strict=True):
        bound = {"float64": 1e-13, "float32": 1e-7 + 3e-7 / rest}.get(
            dtype, 2 * torch.finfo(ours.dtype).eps * float(theirs.abs().max())
        )
        torch.testing.assert_close(values_of(ours), values_of(theirs), rtol=0, atol=bound)
        assert not ours[1].any()


@KINDS
@pytest.mark.parametrize("teacher_is", ["probabilities", "log_probabilities"])
def test_values_and_indices(device, rng, teacher_is, kind):
    """What was kept of a teacher, classes along any axis; the same as with the whole of it."""
    student, teacher = (tensor(rng.standard_normal((3, 9, 2)), "float64", device) for _ in range(2))
    values, indices = torch.log_softmax(teacher / 2.0, 1).topk(4, 1)
    values = values.exp() if teacher_is == "probabilities" else values
    options = {"temperature": 2.0, "kind": kind, "dim": 1, "reduction": "none"}
    found = HF.distillation_loss(student, (values, indices), teacher_is=teacher_is, **options)
    same(found, HF.distillation_loss(student, teacher, top_k=4, **options))
    assert (
        HF.distillation_loss(student.float(), (values.half(), indices), teacher_is=teacher_is, **options).dtype == torch.float32
    )


@KINDS
def test_derivatives_of_any_order_transforms_and_graphs(device, rng, kind):
    student, teacher = (tensor(rng.standard_normal((3, 6)), "float64", device, grad=True) for _ in range(2))

    def function(student, teacher):
        return HF.distillation_loss(student, teacher, top_k=2, temperature=0.7, kind=kind, beta=0.3)

    gradcheck(function, (student, teacher))
    gradgradcheck(function, (student, teacher))
    given = student.detach(), teacher.detach()
    expected = torch.autograd.grad(function(student, teacher), student)[0]
    same(torch.func.grad(function)(*given), expected)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    same(torch.autograd.grad(compiled(student, teacher), student)[0], expected)


def test_a_student_who_is_certain_has_a_finite_loss(device):
    student = torch.tensor([[60.0, 0.0, 0.0, 0.0]], device=device, requires_grad=True)
    teacher = torch.tensor([[2.0, 0.0, 0.0, 0.0]], device=device)
    for kind in EVERY_KIND:
        loss = HF.distillation_loss(student, teacher, top_k=1, kind=kind)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, student)[0].isfinite().all()
        assert HF.distillation_loss(teacher, student.detach(), top_k=1, kind=kind).isfinite()


PAIR = ones(2, 2) / 4, zeros(2, 2)


@pytest.mark.parametrize(
    ("teacher", "options", "error", "message"),
    [
        (ones(2, 3), {"top_k": 0}, ValueError, "top_k: expected a number of classes from 1 to 3, got 0"),
        (ones(2, 3), {"top_k": 4}, ValueError, "top_k: expected a number of classes from 1 to 3, got 4"),
        (ones(2, 3), {"top_k": 1.0}, TypeError, "top_k: expected an integer"),
        (PAIR, {}, ValueError, "teacher_is: expected 'probabilities' or 'log_probabilities'"),
        (PAIR, {"teacher_is": "probabilities", "top_k": 2}, ValueError, "top_k: expected None with a pair"),
        (PAIR[:1], {"teacher_is": "probabilities"}, ValueError, "teacher: expected a tensor or a pair"),
        ((ones(2, 2), ones(2, 2)), {"teacher_is": "probabilities"}, TypeError, "teacher: expected indices of dtype int64"),
        ((ones(3, 2), zeros(3, 2)), {"teacher_is": "probabilities"}, ValueError, "teacher: expected shape"),
        ((ones(2, 2), zeros(2, 1)), {"teacher_is": "probabilities"}, ValueError, "teacher: expected shape"),
        (
            (ones(2, 4), zeros(2, 4)),
            {"teacher_is": "probabilities"},
            ValueError,
            "teacher: expected 1 to 3 values a row, got 4",
        ),
        ((ones(2), zeros(2)), {"teacher_is": "probabilities"}, ValueError, "teacher: expected shape"),
        (
            (ones(2, 1), zeros(2, 1) + 3),
            {"teacher_is": "probabilities"},
            IndexError,
            "teacher: expected indices of classes in 0…2",
        ),
    ],
)
def test_bad_arguments(teacher, options, error, message):
    with pytest.raises(error, match=message):
        HF.distillation_loss(ones(2, 3), teacher, **options)
