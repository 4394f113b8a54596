"""Linear cross entropy by one of three ways, as `cross_entropy`, and its operators of `torch.library`: see `operators`."""

from __future__ import annotations

import torch

from . import cross_entropy_formula, linear_token_log_probs, operators
from .autograd import accumulate_dtype, graph_is_needed
from .cross_entropy import of_token_log_probs
from .cross_entropy_formula import NUMBERS, Options
from .linear_chunks import LinearCrossEntropy, Problem, as_given, chunk_rows, formula, formula_gradients, run, run_backward

_PROBLEM = "Tensor x, Tensor W, Tensor? b, Tensor target, Tensor? weight"
_OPTIONS = "str reduction, int ignore_index, float label_smoothing, float z_loss, float? softcap, bool zero_if_ignored"


def linear_cross_entropy(problem, options, gradient, stats, rows):
    """(loss, CrossEntropyStatistics or None), of (N, S) rows; the arguments are checked."""
    numbers, with_graph = NUMBERS if stats else 3, False
    if operators.traced(problem.x):
        found = FORWARD(*problem, rows or 0, numbers, *options)
    elif operators.transformed():
        return formula(problem, options, stats)
    elif with_graph := graph_is_needed(*problem[:4]):
        at_once = gradient != "backward" and options.reduction != "none" and not problem.target.requires_grad
        found = LinearCrossEntropy.apply(*problem, options, rows or chunk_rows(problem), numbers, at_once)
    else:
        found = run(problem, options, rows or chunk_rows(problem), numbers)
    if not stats:
        return found[0], None
    N, V, S = problem.sizes
    of_rows = cross_entropy_formula.statistics(found[1], (N, S), V, problem.target, options.ignore_index)
    return found[0], cross_entropy_formula.without_derivatives(of_rows, *problem[:4]) if with_graph else of_rows


def with_differentiable_statistics(problem, options, rows):
    """(loss, CrossEntropyStatistics) of (N, S) rows, both with a graph; as of `cross_entropy`, in chunks where by kernels."""
    if problem.target.is_floating_point() or options.label_smoothing or options.softcap is not None or operators.transformed():
        return formula(problem, options, True)
    found, sums = linear_token_log_probs.with_sums(problem, 1.0, options.ignore_index, rows)
    return of_token_log_probs(found, sums[3], problem.target, problem.weight, options)


def _run(x, W, b, target, weight, rows, numbers, *options):
    problem = Problem(x, W, b, target, weight)
    found = run(problem, Options(*options), rows or chunk_rows(problem), numbers)
    denominator = found.numbers.new_empty(0) if found.denominator is None else found.denominator
    return found.loss, found.numbers, denominator


def _run_backward(upstream, x, W, b, target, weight, stats, denominator, rows, needs, *options):
    problem, over = Problem(x, W, b, target, weight), denominator if denominator.numel() else None
    found = run_backward(upstream, problem, stats, over, Options(*options), rows or chunk_rows(problem), needs)
    return tuple(x.new_empty(0) if g is None else g for g in as_given(found, problem))


def _fake(x, W, b, target, weight, rows, numbers, *options):
    acc, shape, reduction = accumulate_dtype(x), (x.shape[0], target.shape[-1]), options[0]
    loss = x.new_empty(shape if reduction == "none" else (), dtype=acc)
    return loss, x.new_empty((numbers, *shape), dtype=acc), x.new_empty(1 if reduction == "mean" else 0, dtype=acc)


def _fake_backward(upstream, x, W, b, target, weight, stats, denominator, rows, needs, *options):
    of = (x, W, b, target)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for t, needed in zip(of, needs, strict=True)
    )


class _TracedLinearCrossEntropy(torch.autograd.Function):
    """The operators' autograd: the gradients are made in the backward pass."""

    @staticmethod
    def forward(ctx, x, W, b, target, weight, rows, numbers, *options):
        loss, stats, denominator = operators.below_autograd(FORWARD, x, W, b, target, weight, rows, numbers, *options)
        ctx.save_for_backward(x, W, b, target, weight, stats, denominator)
        ctx.options, ctx.rows = Options(*options), rows
        ctx.mark_non_differentiable(stats, denominator)
        ctx.set_materialize_grads(False)
        return loss, stats, denominator

    @staticmethod
    def backward(ctx, upstream, *_):
        *problem, stats, denominator = ctx.saved_tensors
        needs, rest = ctx.needs_input_grad[:4], (None,) * (3 + len(ctx.options))
        if upstream is None:
            return *(None,) * 4, *rest
        if torch.is_grad_enabled():
            return *formula_gradients(upstream, Problem(*problem), ctx.options, needs), *rest
        found = BACKWARD(upstream, *problem, stats, denominator, ctx.rows, needs, *ctx.options)
        return *(g if needed else None for g, needed in zip(found, needs, strict=True)), *rest


FORWARD = operators.define(
    f"linear_cross_entropy({_PROBLEM}, int rows, int numbers, {_OPTIONS}) -> (Tensor loss, Tensor stats, Tensor denominator)",
    _run,
    _fake,
    _TracedLinearCrossEntropy.apply,
)
BACKWARD = operators.define(
    f"linear_cross_entropy_backward(Tensor upstream, {_PROBLEM}, Tensor stats, Tensor denominator, int rows, bool[] needs, "
    f"{_OPTIONS}) -> (Tensor dx, Tensor dW, Tensor db, Tensor dtarget)",
    _run_backward,
    _fake_backward,
)
