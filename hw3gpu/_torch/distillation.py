"""Divergences of a student's and a teacher's distributions, with gradients of both: docs/derivations.md, section 3.9.

A call takes one of three ways. Eager: `_Divergences`, or `run` alone where no graph is needed. Traced: the operators below,
around the same functions. Inside `torch.func` transforms, in forward mode, and where a gradient is to be differentiated again:
the formula in PyTorch's operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import dispatch, outputs
from . import operators
from .autograd import accumulate_dtype, as_dtype, gradients_with_a_graph, graph_is_needed

KINDS = ("forward", "reverse", "jensen_shannon")
TEACHERS = ("logits", "probabilities", "log_probabilities")


class Divergence(NamedTuple):
    """Which divergence, β of the mixture, the temperature of both softmaxes, and the axis of the classes, from the front."""

    kind: str
    beta: float
    temperature: float
    dim: int

    @property
    def of_rows(self) -> dict[str, float | str]:
        """What the kernels take."""
        return {"kind": self.kind, "beta": self.beta, "temperature": self.temperature}


def divergences(student: Tensor, teacher: Tensor, mask: Tensor | None, options: Divergence) -> Tensor:
    """The divergence of every row, 0 where the mask leaves it out; the arguments are checked."""
    if not operators.traced(student) and operators.transformed():
        return formula(student, teacher, mask, options)
    if operators.traced(student) or operators.traced(teacher):
        return FORWARD(student, teacher, mask, *options)[0]
    if graph_is_needed(student, teacher):
        return _Divergences.apply(student, teacher, mask, (options, run, run_backward))[0]
    kind, beta, temperature, dim = options
    return run(student, teacher, mask, kind, beta, temperature, dim, save=False)[0]


def as_logits(teacher: Tensor, teacher_is: str, temperature: float) -> Tensor:
    """What has the teacher's distribution at this temperature as its softmax."""
    if teacher_is == "logits":
        return teacher
    log_p = teacher if teacher_is == "log_probabilities" else as_dtype(teacher, accumulate_dtype(teacher)).log()
    return log_p if temperature == 1.0 else as_dtype(log_p, accumulate_dtype(log_p)) * temperature


def reduced(rows: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """The reduction of the divergences of all rows; the mean is that of the rows that count."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.mean() if mask is None else rows.sum() / mask.sum()


# ---------------------------------------------------------------------------------------------- forward and backward
def of_rows(mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """A mask as the kernels take it, (N, S) of uint8, or None."""
    return None if mask is None else mask.reshape(shape).view(torch.uint8)


def run(
    student: Tensor, teacher: Tensor, mask: Tensor | None, kind: str, beta: float, temperature: float, dim: int,
    save: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The divergence of every row, and what the backward pass needs if `save`, else None."""
    which = dispatch.backend(student)
    view = dispatch.kernel_view(which)
    s, t = (outputs.folded(z, dim, which) for z in (student, teacher))
    rows = s.shape[0], s.shape[2]
    shape = (*student.shape[:dim], *student.shape[dim + 1 :])
    loss = student.new_empty(shape, dtype=accumulate_dtype(student))
    stats = loss.new_empty(8, *rows) if save else None
    dispatch.distillation(which).forward(
        s, t, view(of_rows(mask, rows)), view(loss.view(rows)), view(stats), kind=kind, beta=beta, temperature=temperature
    )
    return loss, stats


def run_backward(
    upstream: Tensor, student: Tensor, teacher: Tensor, mask: Tensor | None, stats: Tensor, kind: str, beta: float,
    temperature: float, dim: int, needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of student and teacher that `needs` names, else None."""
    which = dispatch.backend(student)
    view = dispatch.kernel_view(which)
    s, t = (outputs.folded(z, dim, which) for z in (student, teacher))
    rows = s.shape[0], s.shape[2]
    found = [
        outputs.output(z, dim, view) if needed else (None, None) for z, needed in zip((student, teacher), needs, strict=True)
    ]
    dispatch.distillation(which).backward(
        s, t, view(of_rows(mask, rows)), view(stats), view(upstream.reshape(rows)), *(operand for _, operand in found),
        kind=kind, beta=beta, temperature=temperature,
    )  # fmt: skip
    return tuple(d for d, _ in found)


# ---------------------------------------------------------------------------------------------- in PyTorch's operations
def formula(student: Tensor, teacher: Tensor, mask: Tensor | None, options: Divergence) -> Tensor:
    """The divergences in PyTorch's operations, which have derivatives of every order and go through every transform."""
    log_q, log_p = (torch.log_softmax(z.to(accumulate_dtype(z)) / options.temperature, options.dim) for z in (student, teacher))
    rows = of_logarithms(log_p, log_q, options)
    return rows if mask is None else torch.where(mask, rows, 0.0)


def of_logarithms(log_p: Tensor, log_q: Tensor, options: Divergence) -> Tensor:
    """The divergences of distributions given by their logarithms."""
    kind, beta, _, dim = options
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    log_q, log_p = (torch.where(neither, -math.inf, v) for v in (log_q, log_p))
    if kind == "jensen_shannon":
        mixed = (torch.where(neither, 0.0, v) for v in (log_p + math.log(beta), log_q + math.log1p(-beta)))
        log_m = torch.logaddexp(*mixed)
        return beta * _relative_entropy(log_p, log_m, dim) + (1 - beta) * _relative_entropy(log_q, log_m, dim)
    pair = (log_p, log_q) if kind == "forward" else (log_q, log_p)
    return _relative_entropy(*pair, dim)


def _relative_entropy(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """Σ p (log p - log q); a class without probability adds nothing, nor to the gradient."""
    none = log_p == -math.inf
    ratio = torch.where(none, 0.0, log_p) - torch.where(none, 0.0, log_q)
    return (log_p.exp() * ratio).sum(dim)


# ---------------------------------------------------------------------------------------------- autograd
class _Divergences(torch.autograd.Function):
    """Forward reads both once and keeps eight numbers a row; backward reads them once and writes the gradients asked for.

    `rest` has the functions that run: the kernels, or under a tracer the operators around them.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None,
        rest: tuple[Divergence, Callable[..., Any], Callable[..., Any]],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        options, forward, backward = rest
        loss, stats = forward(student, teacher, mask, *options)
        ctx.save_for_backward(student, teacher, mask, stats)
        ctx.options, ctx.backward = options, backward
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        student, teacher, mask, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if upstream is None:
            return (None,) * 4
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            found = gradients_with_a_graph(
                lambda: (formula(student, teacher, mask, ctx.options),), (student, teacher), (upstream,), needs
            )
        else:
            found = ctx.backward(upstream, student, teacher, mask, stats, *ctx.options, needs)
        return *(d if needed else None for d, needed in zip(found, needs, strict=True)), None, None


def _fake(
    student: Tensor, teacher: Tensor, mask: Tensor | None, kind: str, beta: float, temperature: float, dim: int
) -> tuple[Tensor, Tensor]:
    outer, inner = student.shape[:dim], student.shape[dim + 1 :]
    loss = student.new_empty((*outer, *inner), dtype=accumulate_dtype(student))
    return loss, loss.new_empty((8, math.prod(outer), math.prod(inner)))


def _fake_backward(upstream: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    *_, dim, needs = rest
    of = zip((student, teacher), needs, strict=True)
    return tuple(operators.fake_output(z, dim) if needed else None for z, needed in of)


_OPERANDS, _OPTIONS = "Tensor student, Tensor teacher, Tensor? mask", "str kind, float beta, float temperature, int dim"
BACKWARD = operators.define(
    f"divergences_backward(Tensor upstream, {_OPERANDS}, Tensor stats, {_OPTIONS}, bool[] needs) "
    "-> (Tensor dstudent, Tensor dteacher)",
    run_backward,
    _fake_backward,
)
FORWARD: Any = operators.define(
    f"divergences({_OPERANDS}, {_OPTIONS}) -> (Tensor loss, Tensor stats)",
    run,
    _fake,
    lambda student, teacher, mask, *options: _Divergences.apply(
        student, teacher, mask, (Divergence(*options), partial(operators.below_autograd, FORWARD), BACKWARD)
    ),
)
