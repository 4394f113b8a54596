"""`hw3gpu.functional.distillation_loss` on both kinds of kernels, against the answer sheet."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from twins import ACC, HARD, SINGLE, gradcheck, gradgradcheck, hold, layout_of, ones, opcheck, same, tensor, values_of

import hw3gpu.functional as HF
from hw3gpu import _error_bounds, reference
from hw3gpu._torch import distillation

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KINDS = pytest.mark.parametrize("kind", distillation.KINDS)


def rows_shape(shape, dim):
    dim %= len(shape)
    return (*shape[:dim], *shape[dim + 1 :])


def check(device, student, teacher, dtype, upstream=None, **options):
    """Loss and both gradients, each held to the answer sheet and to PyTorch in the precision of the sums."""
    acc, dim = ACC[dtype], options.get("dim", -1)
    loss = HF.distillation_loss(student, teacher, **options)
    assert loss.dtype == acc
    found = torch.autograd.grad(loss, (student, teacher), upstream)
    exact = [z.detach().to(acc).requires_grad_() for z in (student, teacher)]
    asked = distillation.Divergence(
        options.get("kind", "forward"), options.get("beta", 0.5), options.get("temperature", 1.0), dim % student.dim()
    )
    theirs = distillation.formula(*exact, options.get("mask"), asked)
    theirs = distillation.reduced(theirs, options.get("mask"), options.get("reduction", "mean"))
    their_found = torch.autograd.grad(theirs, exact, upstream)
    named = {{"dim": "axis"}.get(k, k): v.cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    named["upstream"] = values_of(upstream)
    sheet = reference.distillation_loss(values_of(student), values_of(teacher), **named)
    bound = _error_bounds.distillation_loss(values_of(student), values_of(teacher), **named, dtype=SINGLE[acc])
    hold("loss", loss, sheet.loss, SINGLE[acc], theirs, bound.loss)
    for name, z, ours, of in zip(("dstudent", "dteacher"), (student, teacher), found, their_found, strict=True):
        assert (ours.dtype, ours.shape) == (z.dtype, z.shape)
        hold(name, ours, getattr(sheet, name), dtype, of.to(z.dtype), getattr(bound, name))
    return loss, found


SHAPES = {
    "(V,)": ((6,), -1),
    "(N, V)": ((6, 21), -1),
    "(B, T, V)": ((2, 3, 21), -1),
    "classes in the middle": ((2, 5, 3, 2), 1),
    "classes first": ((7, 5), 0),
    "V = 1": ((3, 1), -1),
    "V = 1001": ((2, 1001), -1),
    "beyond one program": ((2, 9001), -1),
}


@KINDS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("shape", "dim"), SHAPES.values(), ids=list(SHAPES))
def test_of_every_shape(device, rng, shape, dim, reduction, kind):
    student, teacher = (tensor(2 * rng.standard_normal(shape), "float32", device, grad=True) for _ in range(2))
    upstream = rng.standard_normal(rows_shape(shape, dim) if reduction == "none" else ())
    check(device, student, teacher, "float32", tensor(upstream, "float32", device), dim=dim, reduction=reduction, kind=kind)


def left_out_cases():
    """Every dtype, layout and kind together, at one temperature each, so that all pairs meet; the rest with `--slow`."""
    layouts = enumerate(("contiguous", "channels-last", "sliced"))
    for dtype, (i, layout), (j, kind) in itertools.product(ACC, layouts, enumerate(distillation.KINDS)):
        for k, temperature in enumerate((1.0, 0.7, 4.0)):
            yield pytest.param(
                dtype, temperature, layout, kind, marks=pytest.mark.slow if (i + j + k + list(ACC).index(dtype)) % 3 else ()
            )


@pytest.mark.parametrize(("dtype", "temperature", "layout", "kind"), left_out_cases())
def test_dtypes_layouts_and_temperatures_with_rows_left_out(device, rng, dtype, temperature, layout, kind):
    student, teacher = (
        layout_of(tensor(3 * rng.standard_normal((5, 17, 3)), dtype, device), layout).requires_grad_() for _ in range(2)
    )
    mask = torch.ones(5, 3, dtype=torch.bool, device=device)
    mask[1, 2] = mask[4, 0] = False
    options = {"dim": 1, "temperature": temperature, "mask": mask, "kind": kind, "beta": 0.3}
    _, found = check(device, student, teacher, dtype, **options)
    assert not any(d[1, :, 2].any() or d[4, :, 0].any() for d in found)


def beside(size):
    """A student that is `size` away from its teacher."""
    return lambda rng, z: z + np.float32(size) * rng.standard_normal(z.shape).astype(np.float32)


def few_far(rng, z):
    return z + np.where(rng.random(z.shape) < 0.02, 3.0, 0.0) + 1e-5 * rng.standard_normal(z.shape)


def first_far(rng, z):
    """What is met first is far away, what counts is not."""
    return z + np.where(np.arange(z.shape[1]) < z.shape[1] // 3, -30.0, 1e-4 * rng.standard_normal(z.shape))


TEACHERS = HARD | {
    "normal": lambda rng, V: 2 * rng.standard_normal((2, V)),
    "all equal": lambda rng, V: np.full((2, V), 0.25),
    "most of the mass far below": lambda rng, V: np.where(np.arange(V) == 0, 6.0, 1e-3 * rng.standard_normal((2, V))),
}
STUDENTS = {
    "nearly equal": beside(1e-6),
    "near": beside(1e-2),
    "other": beside(3.0),
    "few far": few_far,
    "the first far": first_far,
    "shifted": lambda rng, z: z + 100.0,
    "swapped": lambda rng, z: z[::-1].copy(),
}


def hard_rows():
    """Every teacher with every student by KL(teacher‖student), a third of them by the other kinds; the rest with `--slow`."""
    for (i, teacher), (j, student) in itertools.product(enumerate(TEACHERS), enumerate(STUDENTS)):
        for k, kind in enumerate(distillation.KINDS):
            marks = pytest.mark.slow if k and (i + j + k) % 3 else ()
            yield pytest.param(teacher, student, kind, marks=marks)


@pytest.mark.parametrize(("teacher", "student", "kind"), hard_rows())
def test_hard_rows(device, rng, teacher, student, kind):
    V = 5001
    z = np.asarray(TEACHERS[teacher](rng, V), dtype=np.float32)
    x = STUDENTS[student](rng, z)
    if "-inf" in teacher:
        x = np.where(np.isinf(z), -np.inf, x)
    student, teacher = tensor(x, "float32", device, grad=True), tensor(z, "float32", device, grad=True)
    check(device, student, teacher, "float32", reduction="none", upstream=tensor([1.0, 0.5], "float32", device), kind=kind)


@pytest.mark.parametrize("V", [21, 1001, 5001])
@KINDS
def test_nearly_equal_rows_keep_their_digits(device, rng, V, kind):
    """Seven digits of a divergence of 1e-13, and six of its gradients: relative to themselves, whatever the bounds say."""
    z = (2 * rng.standard_normal((3, V))).astype(np.float32)
    x = z + np.float32(1e-6) * rng.standard_normal((3, V)).astype(np.float32)
    student, teacher = (tensor(v, "float32", device, grad=True) for v in (x, z))
    loss = HF.distillation_loss(student, teacher, kind=kind, reduction="none")
    sheet = reference.distillation_loss(x, z, kind=kind, reduction="none")
    assert sheet.loss.max() < 2e-12
    np.testing.assert_allclose(values_of(loss), sheet.loss, rtol=4e-7, atol=0)
    for ours, expected in zip(torch.autograd.grad(loss.sum(), (student, teacher)), sheet[1:], strict=True):
        np.testing.assert_allclose(values_of(ours), expected, rtol=0, atol=1e-6 * abs(expected).max())
    equal = HF.distillation_loss(teacher, teacher, kind=kind, reduction="none")
    assert not equal.any()


@KINDS
@pytest.mark.parametrize("V", [7, 5001])
def test_a_class_without_probability(device, rng, V, kind):
    """In the teacher it adds the student's share, in the student it makes KL(p‖q) infinite, in both it counts for nothing."""
    z = rng.standard_normal((3, V)).astype(np.float32)
    x = rng.standard_normal((3, V)).astype(np.float32)
    z[0, : V // 2], x[1, : V // 2] = -np.inf, -np.inf
    z[2, : V // 2], x[2, : V // 2] = -np.inf, -np.inf
    student, teacher = (tensor(v, "float32", device, grad=True) for v in (x, z))
    loss = HF.distillation_loss(student, teacher, kind=kind, reduction="none")
    sheet = reference.distillation_loss(x, z, kind=kind, reduction="none")
    assert np.isinf(sheet.loss).tolist() == [kind == "reverse", kind == "forward", False]
    np.testing.assert_allclose(values_of(loss), sheet.loss, rtol=2e-6)
    dx, dz = torch.autograd.grad(loss.sum(), (student, teacher))
    for ours, expected in ((dx, sheet.dstudent), (dz, sheet.dteacher)):
        known = np.isfinite(expected).all(1)
        assert known[2]
        np.testing.assert_allclose(values_of(ours)[known], expected[known], rtol=0, atol=2e-6)


@pytest.mark.parametrize("where", ["first", "half", "every other"])
@KINDS
def test_classes_masked_by_a_large_number(device, rng, kind, where):
    """In the row whose probabilities are weights, while the other has all classes: the others' share keeps its digits."""
    V = 5001
    masked = {"first": np.arange(V) < 1, "half": np.arange(V) < V // 2, "every other": np.arange(V) % 2 == 0}[where]
    for low, temperature in itertools.product((-1e4, -1e9, np.finfo(np.float32).min), (1.0, 0.5)):
        other = 2 * rng.standard_normal((2, V)).astype(np.float32)
        base = np.where(masked, np.float32(low), other + rng.standard_normal((2, V)).astype(np.float32))
        x, z = (base, other) if kind == "reverse" else (other, base)
        student, teacher = (tensor(v, "float32", device, grad=True) for v in (x, z))
        options = {"kind": kind, "temperature": temperature, "reduction": "none"}
        loss = HF.distillation_loss(student, teacher, **options)
        sheet = reference.distillation_loss(x, z, **options)
        np.testing.assert_allclose(values_of(loss), sheet.loss, rtol=1e-6)
        for ours, expected in zip(torch.autograd.grad(loss.sum(), (student, teacher)), sheet[1:], strict=True):
            np.testing.assert_allclose(values_of(ours), expected, rtol=0, atol=1e-6 * abs(expected).max())


@KINDS
@pytest.mark.parametrize("V", [3, 5001])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_what_has_no_softmax_is_nan_and_leaves_other_rows_alone(device, where, value, V, kind):
    given = {name: torch.zeros(2, V, device=device) for name in ("student", "teacher")}
    given[where][0, V // 2] = value
    leaves = [z.requires_grad_() for z in given.values()]
    loss = HF.distillation_loss(**given, kind=kind, reduction="none")
    assert loss[0].isnan()
    assert loss[1] == 0
    for d in torch.autograd.grad(loss.sum(), leaves):
        assert d[0].isnan().any()
        assert not d[1].any()


@KINDS
def test_huge_logits_and_subnormal_ones(device, rng, kind):
    for size in (1e4, 1e30, 1e-41):
        x, z = ((size * rng.standard_normal((2, 33))).astype(np.float32) for _ in range(2))
        student, teacher = (tensor(v, "float32", device, grad=True) for v in (x, z))
        loss = HF.distillation_loss(student, teacher, kind=kind, reduction="none")
        sheet = reference.distillation_loss(x, z, kind=kind, reduction="none")
        np.testing.assert_allclose(values_of(loss), sheet.loss, rtol=1e-6, atol=1e-37)
        (d,) = torch.autograd.grad(loss.sum(), student)
        np.testing.assert_allclose(values_of(d), sheet.dstudent, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("beta", [1e-6, 0.01, 0.99, 1 - 1e-6])
def test_mixtures_of_nearly_one_of_both(device, rng, beta):
    student, teacher = (tensor(2 * rng.standard_normal((3, 33)), "float32", device, grad=True) for _ in range(2))
    sheet = reference.distillation_loss(values_of(student), values_of(teacher), kind="jensen_shannon", beta=beta)
    loss = HF.distillation_loss(student, teacher, kind="jensen_shannon", beta=beta)
    np.testing.assert_allclose(values_of(loss), sheet.loss, rtol=1e-5)
    for ours, expected in zip(torch.autograd.grad(loss, (student, teacher)), sheet[1:], strict=True):
        np.testing.assert_allclose(values_of(ours), expected, rtol=0, atol=1e-5 * abs(expected).max())


# ---------------------------------------------------------------------------------------------- how the teacher is given
@KINDS
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_teacher_of_probabilities(device, rng, dtype, temperature, kind):
    student = tensor(rng.standard_normal((4, 9)), dtype, device, grad=True)
    log_p = torch.log_softmax(tensor(rng.standard_normal((4, 9)), "float64", device), -1)
    options = {"temperature": temperature, "kind": kind, "beta": 0.3}
    for teacher_is, teacher in (("probabilities", log_p.exp()), ("log_probabilities", log_p)):
        teacher = teacher.to(student.dtype)
        of = teacher.double().log() if teacher_is == "probabilities" else teacher.double()
        expected = reference.distillation_loss(values_of(student), values_of(of * temperature), **options)
        loss = HF.distillation_loss(student, teacher, teacher_is=teacher_is, **options)
        np.testing.assert_allclose(values_of(loss), expected.loss, rtol=1e-5 if dtype != "float64" else 1e-12)
        (d,) = torch.autograd.grad(loss, student)
        np.testing.assert_allclose(values_of(d), expected.dstudent, atol={"float64": 1e-14, "bfloat16": 1e-3}.get(dtype, 1e-7))


def test_a_teacher_of_another_precision(device, rng):
    student, teacher = (
        tensor(rng.standard_normal((3, 24)), "bfloat16", device),
        tensor(rng.standard_normal((3, 24)), "float32", device),
    )
    for pair in ((student, teacher), (teacher, student)):
        pair = [z.detach().clone().requires_grad_() for z in pair]
        loss = HF.distillation_loss(*pair)
        loss.backward()
        sheet = reference.distillation_loss(*map(values_of, pair))
        np.testing.assert_allclose(values_of(loss), sheet.loss, rtol=1e-6)
        for z, expected in zip(pair, sheet[1:], strict=True):
            assert z.grad.dtype == z.dtype
            np.testing.assert_allclose(values_of(z.grad), expected, rtol=5e-3, atol=1e-7)


# ---------------------------------------------------------------------------------------------- derivatives and graphs
@KINDS
@pytest.mark.parametrize("teacher_is", ["logits", "probabilities"])
def test_gradcheck_and_second_derivatives(device, rng, kind, teacher_is):
    student, teacher = (tensor(rng.standard_normal((3, 5)), "float64", device) for _ in range(2))
    teacher = torch.softmax(teacher, -1) if teacher_is == "probabilities" else teacher
    mask = torch.tensor([True, False, True], device=device)

    def function(student, teacher):
        given = {"temperature": 0.7, "kind": kind, "beta": 0.3, "teacher_is": teacher_is}
        return HF.distillation_loss(student, teacher, mask=mask, **given)

    leaves = student.requires_grad_(), teacher.requires_grad_()
    gradcheck(function, leaves)
    gradgradcheck(function, leaves)


@KINDS
def test_transforms_and_forward_mode(device, rng, kind):
    student, teacher = (tensor(rng.standard_normal((3, 5)), "float64", device) for _ in range(2))

    def loss(student, teacher):
        return HF.distillation_loss(student, teacher, temperature=2.0, kind=kind, reduction="sum")

    given = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(given, teacher), given)
    same(torch.func.grad(loss)(student, teacher), expected)
    same(torch.func.vmap(torch.func.grad(loss))(student, teacher), expected)
    _, along = torch.func.jvp(lambda x: loss(x, teacher), (student,), (torch.ones_like(student),))
    same(along, expected.sum())


def test_only_the_gradients_that_are_asked_for(device, rng):
    student, teacher = (tensor(rng.standard_normal((2, 5)), "float32", device) for _ in range(2))
    assert not HF.distillation_loss(student, teacher).requires_grad
    with torch.no_grad():
        assert not HF.distillation_loss(student.requires_grad_(), teacher).requires_grad
    HF.distillation_loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None
    HF.distillation_loss(student.detach(), teacher.requires_grad_()).backward()
    assert teacher.grad.any()


@KINDS
def test_the_operators_keep_the_rules(device, rng, kind):
    student, teacher = (tensor(rng.standard_normal((2, 5, 3)), "float32", device, grad=True) for _ in range(2))
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)
    options = kind, 0.3, 0.7, 1
    opcheck(torch.ops.hw3gpu.divergences.default, (student, teacher, mask, *options), compiled=kind == "forward")
    loss, stats = torch.ops.hw3gpu.divergences(student.detach(), teacher.detach(), None, *options)
    for needs in ([True, False], [False, True]):
        args = (loss, student.detach(), teacher.detach(), None, stats, *options, needs)
        opcheck(torch.ops.hw3gpu.divergences_backward.default, args)


def test_compiled_and_exported_without_a_break(device, rng):
    student, teacher = (tensor(rng.standard_normal((4, 33)), "float32", device, grad=True) for _ in range(2))

    def loss(student, teacher):
        return HF.distillation_loss(student, teacher, temperature=0.7, kind="reverse")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for ours, expected in zip(
        *(torch.autograd.grad(f(student, teacher), (student, teacher)) for f in (compiled, loss)), strict=True
    ):
        same(ours, expected)
    longer = [tensor(rng.standard_normal((7, 65)), "float32", device, grad=True) for _ in range(2)]
    same(*(torch.autograd.grad(f(*longer), longer[0])[0] for f in (compiled, loss)))

    class Loss(torch.nn.Module):
        def forward(self, student, teacher):
            return HF.distillation_loss(student, teacher)

    # an exported graph has PyTorch's operations, which round otherwise
    exact = student.detach().double(), teacher.detach().double()
    same(torch.export.export(Loss(), exact).module()(*exact), HF.distillation_loss(*exact))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_rows(device, shape):
    student, teacher = torch.zeros(shape, device=device, requires_grad=True), torch.zeros(shape, device=device)
    assert HF.distillation_loss(student, teacher, reduction="none").shape == shape[:-1]
    assert HF.distillation_loss(student, teacher).isnan()
    HF.distillation_loss(student, teacher, reduction="sum").backward()
    assert student.grad.shape == shape


# ---------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((np.ones((2, 3)), ones(2, 3)), {}, TypeError, "student: expected a torch.Tensor"),
        ((ones(2, 3).long(), ones(2, 3)), {}, TypeError, "student: expected dtype"),
        ((torch.tensor(1.0), ones(2, 3)), {}, ValueError, "student: expected at least 1 axes"),
        ((ones(2, 0), ones(2, 0)), {}, ValueError, "student: expected at least one class"),
        ((ones(2, 3), [1.0]), {}, TypeError, "teacher: expected a torch.Tensor"),
        ((ones(2, 3), ones(2, 3).long()), {}, TypeError, "teacher: expected dtype"),
        ((ones(2, 3), ones(2, 4)), {}, ValueError, "teacher: expected the shape of student"),
        ((ones(2, 3), ones(2, 3).double()), {}, TypeError, "teacher: expected the dtype of student"),
        ((ones(2, 3), ones(2, 3)), {"kind": "sideways"}, ValueError, "kind: expected one of forward, reverse, jensen_shannon"),
        ((ones(2, 3), ones(2, 3)), {"kind": 1}, TypeError, "kind: expected one of"),
        ((ones(2, 3), ones(2, 3)), {"beta": "1"}, TypeError, "beta: expected a number"),
        *(
            ((ones(2, 3), ones(2, 3)), {"beta": of}, ValueError, "beta: expected a number between 0 and 1")
            for of in (0.0, 1.0, -1.0, math.nan)
        ),
        ((ones(2, 3), ones(2, 3)), {"teacher_is": "softmax"}, ValueError, "teacher_is: expected one of logits"),
        ((ones(2, 3), ones(2, 3)), {"mask": ones(2)}, TypeError, "mask: expected dtype bool"),
        ((ones(2, 3), ones(2, 3)), {"mask": ones(3).bool()}, ValueError, "mask: expected shape"),
        ((ones(2, 3), ones(2, 3)), {"reduction": "batchmean"}, ValueError, "reduction: expected one of"),
        ((ones(2, 3), ones(2, 3)), {"dim": 2}, IndexError, "dim: expected an axis of student"),
        ((ones(2, 3), ones(2, 3)), {"temperature": 0.0}, ValueError, "temperature: expected a number from"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        HF.distillation_loss(*arguments, **options)
