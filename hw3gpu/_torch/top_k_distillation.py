"""Divergences of a teacher of whom k classes of every row are known, and the rest as one: docs/derivations.md, section 3.9.

Student's log-probabilities of those classes are their logits over T less log Σ exp of the row, which `token_log_probs`' kernels
read once; the rest has what they leave of 1. What remains is k + 1 numbers a row, for PyTorch's operations. The backward pass
reads the student once and writes its gradient, p g_lse by those kernels and the k classes' own over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import distillation, operators, token_log_probs
from .autograd import accumulate_dtype, graph_is_needed
from .distillation import Divergence

NONE = -100  # as the target of a row that does not count


def divergences(student: Tensor, log_p: Tensor, indices: Tensor, mask: Tensor | None, options: Divergence) -> Tensor:
    """The divergence of every row from the teacher's log-probabilities (…, k, …) of the classes `indices`; all checked."""
    log_q = log_probs(student, indices, mask, options)
    return of_buckets(log_p.to(log_q.dtype), log_q, student.shape[options.dim], mask, options)


def of_largest(student: Tensor, teacher: Tensor, k: int, mask: Tensor | None, options: Divergence) -> Tensor:
    """The divergence of every row from the k classes that the teacher's logits make the largest."""
    indices = teacher.detach().topk(k, options.dim).indices
    return divergences(student, log_probs(teacher, indices, mask, options), indices, mask, options)


def of_buckets(log_p: Tensor, log_q: Tensor, classes: int, mask: Tensor | None, options: Divergence) -> Tensor:
    """The divergences of k classes and their rest, 0 where the mask leaves a row out."""
    if log_p.shape[options.dim] < classes:
        log_p, log_q = (torch.cat((v, _log_rest(v, options.dim)), options.dim) for v in (log_p, log_q))
    rows = distillation.of_logarithms(log_p, log_q, options)
    return rows if mask is None else torch.where(mask, rows, 0.0)


def _log_rest(log_p: Tensor, dim: int) -> Tensor:
    """log(1 - Σ p), of which no more is known than the rounding of that sum."""
    total = torch.logsumexp(log_p, dim, keepdim=True).clamp(max=0.0)
    return (-torch.expm1(total)).clamp(min=torch.finfo(log_p.dtype).eps).log()


# ---------------------------------------------------------------------------------------------- log-probabilities of classes
def log_probs(logits: Tensor, indices: Tensor, mask: Tensor | None, options: Divergence) -> Tensor:
    """log softmax(logits / T) at the classes `indices`, (…, k, …), in the dtype of the sums; 0 in rows that do not count."""
    if operators.traced(logits) or operators.transformed():
        return formula(logits, indices, mask, options)
    if graph_is_needed(logits):
        return _LogProbs.apply(logits, indices, mask, options)
    return run(logits, indices, mask, options)[0]


def _targets(indices: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Class 0 for the rows that count: any will do where the sums alone are asked for."""
    target = torch.zeros_like(indices.select(dim, 0))
    return target if mask is None else target.masked_fill_(~mask, NONE)


def _over_temperature(logits: Tensor, indices: Tensor, lse: Tensor, mask: Tensor | None, options: Divergence) -> Tensor:
    picked = logits.gather(options.dim, indices).to(lse.dtype) / options.temperature
    found = picked - lse.unsqueeze(options.dim)
    return found if mask is None else torch.where(mask.unsqueeze(options.dim), found, 0.0)


def formula(logits: Tensor, indices: Tensor, mask: Tensor | None, options: Divergence) -> Tensor:
    """The log-probabilities by operations that every tracer and transform knows."""
    lse = token_log_probs.token_log_probs(
        logits, _targets(indices, mask, options.dim), options.temperature, NONE, options.dim
    ).lse
    return _over_temperature(logits, indices, lse, mask, options)


def run(logits: Tensor, indices: Tensor, mask: Tensor | None, options: Divergence) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and the sums of every row."""
    target = _targets(indices, mask, options.dim)
    *_, lse, stats = token_log_probs.run(logits, target, options.temperature, NONE, options.dim)
    assert stats is not None
    return _over_temperature(logits, indices, lse, mask, options), stats


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor, mask: Tensor | None, options: Divergence) -> Tensor:
        found, stats = run(logits, indices, mask, options)
        ctx.save_for_backward(logits, indices, mask, stats, found)
        ctx.options = options
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, indices, mask, stats, found = ctx.saved_tensors
        options = ctx.options
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            with torch.enable_grad():
                again = _over_temperature(
                    logits, indices, torch.logsumexp(logits.to(found.dtype) / options.temperature, options.dim), mask, options
                )  # fmt: skip
                return torch.autograd.grad(again, logits, upstream, create_graph=True)[0], None, None, None
        total = -upstream.sum(options.dim)
        target = _targets(indices, mask, options.dim)
        d = token_log_probs.run_backward(
            None, None, total, logits, target, stats, options.temperature, NONE, options.dim
        )  # fmt: skip
        at = (upstream + found.exp() * total.unsqueeze(options.dim)) / options.temperature
        if mask is not None:
            at = torch.where(mask.unsqueeze(options.dim), at, 0.0)
        return d.scatter_(options.dim, indices, at.to(d.dtype)), None, None, None


def as_logarithms(values: Tensor, teacher_is: str, like: Tensor) -> Tensor:
    """The teacher's values as log-probabilities in the dtype of the sums for `like`."""
    values = values.to(accumulate_dtype(like))
    return values.log() if teacher_is == "probabilities" else values
