"""Checks of the distillation losses' arguments, before anything is allocated or written."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core import arrays, check
from .arguments import REDUCTIONS, Operands, axis, features, floating_tensor, like_input, number, same_device, scale, tensor
from .distillation import KINDS, TEACHERS, Divergence


def distillation(
    student: Tensor, teacher: Tensor | tuple[Tensor, Tensor], temperature: float, kind: str, beta: float, top_k: int | None,
    teacher_is: str, mask: Tensor | None, reduction: str, dim: int,
) -> Divergence:  # fmt: skip
    """Checks every argument; their `Divergence`."""
    floating_tensor(student, "student")
    check.rank_at_least(student, "student", 1, "…, V")
    options = divergence(student, temperature, kind, beta, dim)
    if student.shape[options.dim] == 0:
        raise ValueError(f"student: expected at least one class, got shape {check.shape_of(student)}")
    check.one_of(teacher_is, "teacher_is", TEACHERS)
    classes = student.shape[options.dim]
    if isinstance(teacher, tuple):
        _top_k_teacher(teacher, student, options.dim, top_k, teacher_is)
    else:
        floating_tensor(teacher, "teacher")
        check.same_shape(teacher, "teacher", student, "student")
        _teacher_dtype(teacher, "teacher", student, "student")
        same_device(teacher, "teacher", student, "student")
        if top_k is not None and not 1 <= check.integer_value(top_k, "top_k") <= classes:
            raise ValueError(f"top_k: expected a number of classes from 1 to {classes}, got {top_k}")
    rows_that_count(mask, (*student.shape[: options.dim], *student.shape[options.dim + 1 :]), student)
    check.one_of(reduction, "reduction", REDUCTIONS)
    return options


def _top_k_teacher(teacher: tuple[Tensor, Tensor], student: Tensor, dim: int, top_k: int | None, teacher_is: str) -> None:
    """Checks (values, indices) of k classes of every row."""
    if len(teacher) != 2:
        raise ValueError(f"teacher: expected a tensor or a pair (values, indices), got {len(teacher)} of them")
    if top_k is not None:
        raise ValueError("top_k: expected None with a pair (values, indices) as teacher, whose classes are given")
    if teacher_is == "logits":
        raise ValueError(
            "teacher_is: expected 'probabilities' or 'log_probabilities' with a pair (values, indices) as teacher, "
            "got 'logits', which do not say what the other classes have"
        )
    values, indices = teacher
    floating_tensor(values, "teacher")
    tensor(indices, "teacher")
    if indices.dtype != torch.int64:
        raise check.DtypeError(f"teacher: expected indices of dtype int64, {check.got_dtype(indices, 'indices')}")
    shape, classes = list(student.shape), student.shape[dim]
    shape[dim] = values.shape[dim] if values.dim() == student.dim() else -1
    check.shape(values, "teacher", tuple(shape), "student's rows, k values each")
    check.shape(indices, "teacher", tuple(shape), "an index for each value")
    if not 1 <= shape[dim] <= classes:
        raise check.ShapeError(f"teacher: expected 1 to {classes} values a row, got {shape[dim]}")
    for v in teacher:
        same_device(v, "teacher", student, "student")
    if arrays.on_host(indices) and indices.numel() and not (indices.min() >= 0 and indices.max() < classes):
        raise IndexError(f"teacher: expected indices of classes in 0…{classes - 1}, got {indices.min()}…{indices.max()}")


def divergence(z: Tensor, temperature: float, kind: str, beta: float, dim: int) -> Divergence:
    """`Divergence` of logits like `z`, its parts checked."""
    check.one_of(kind, "kind", KINDS)
    beta = number(beta, "beta")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta: expected a number between 0 and 1, got {beta}; at its ends the divergence is 0")
    return Divergence(kind, beta, scale(temperature, "temperature"), axis(dim, z, "student"))


def _teacher_dtype(teacher: Tensor, name: str, student: Tensor, of: str) -> None:
    """Checks that a float64 tensor comes with no other dtype."""
    if torch.float64 in (teacher.dtype, student.dtype):
        check.same_dtype(teacher, name, student, of)


def rows_that_count(mask: Tensor | None, rows: tuple[int, ...], z: Tensor) -> None:
    """Checks a mask of rows, or None."""
    if mask is None:
        return
    tensor(mask, "mask")
    if mask.dtype != torch.bool:
        raise check.DtypeError(f"mask: expected dtype bool, True for the rows that count, {check.got_dtype(mask, 'mask')}")
    check.shape(mask, "mask", rows, "one bool per row of student")
    same_device(mask, "mask", z, "student")


def linear_distillation(
    student: Operands, teacher: Operands, temperature: float, kind: str, beta: float, mask: Tensor | None, reduction: str
) -> Divergence:
    """Checks every argument but chunk_rows; student and teacher are (input, weight, bias). Their `Divergence`."""
    for side, (x, W, b) in (("student", student), ("teacher", teacher)):
        names = f"{side}_input", f"{side}_weight", f"{side}_bias"
        floating_tensor(x, names[0])
        floating_tensor(W, names[1])
        features(x, W, "(V, D)", names)
        like_input(x, W, b, names)
    x, W = student[:2]
    if len(W) == 0:
        raise ValueError(f"student_weight: expected at least one class, got shape {check.shape_of(W)}")
    if len(teacher[1]) != len(W):
        raise check.ShapeError(f"teacher_weight: expected {len(W)} classes, as student_weight has, got {len(teacher[1])}")
    if teacher[0].shape[:-1] != x.shape[:-1]:
        expected = (*x.shape[:-1], teacher[0].shape[-1])
        check.shape(teacher[0], "teacher_input", expected, "rows as student_input has")
    _teacher_dtype(teacher[0], "teacher_input", x, "student_input")
    same_device(teacher[0], "teacher_input", x, "student_input")
    rows_that_count(mask, tuple(x.shape[:-1]), x)
    check.one_of(reduction, "reduction", REDUCTIONS)
    return divergence(x, temperature, kind, beta, -1)
