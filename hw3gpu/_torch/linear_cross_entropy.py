"""Linear cross entropy by one of three ways, as `cross_entropy`, and its operators of `torch.library`: see `operators`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import class_range, cross_entropy_formula, linear_token_log_probs, operators
from .autograd import accumulate_dtype, graph_is_needed
from .cross_entropy_formula import NUMBERS, OPTIONS_SCHEMA, CrossEntropyStatistics, Options
from .differentiable_statistics import of_token_log_probs
from .linear_chunks import (
    Found,
    Problem,
    as_given,
    chunk_rows,
    fake_gradients,
    formula,
    formula_gradients,
    run,
    run_backward,
    scaled,
    to_hold,
)
from .row_weights import RowWeights, known_factors, reduced_by


class Rest(NamedTuple):
    """What of a call has no gradient.

    rows: of a chunk, 0 for the library's own number. numbers: how many are kept of every row.
    at_once: the gradients are made in the forward pass. traced: the call goes through the operators.
    """

    options: Options
    rows: int
    numbers: int
    at_once: bool = False
    traced: bool = False
    factors: Tensor | None = None


def linear_cross_entropy(
    problem: Problem, options: Options, gradient: str, stats: bool, rows: int | None, factors: Tensor | None = None
) -> tuple[Tensor, CrossEntropyStatistics | None]:
    """(loss, CrossEntropyStatistics or None), of (N, S) rows; the arguments are checked. factors: of `linear_chunks.run`, where
    nobody traces or transforms."""
    rest, with_graph = Rest(options, rows or 0, NUMBERS if stats else 3, factors=factors), False
    if operators.traced(problem.x):
        found = FORWARD(*problem, rest.rows, rest.numbers, *options)
    elif operators.transformed():
        return formula(problem, options, stats)
    elif with_graph := graph_is_needed(*problem[:4]):
        at_once = gradient != "backward" and options.reduction != "none" and not problem.target.requires_grad
        found = _LinearCrossEntropy.apply(*problem, rest._replace(at_once=at_once))
    else:
        found = run(problem, options, rows or chunk_rows(problem, of_W=False), rest.numbers, factors=factors)
    if not stats:
        return found[0], None
    N, V, S = problem.sizes
    of_rows = cross_entropy_formula.statistics(found[1], (N, S), V, problem.target, options.ignore_index)
    return found[0], cross_entropy_formula.without_derivatives(of_rows, *problem[:4]) if with_graph else of_rows


def with_row_weights(
    problem: Problem, options: Options, gradient: str, stats: bool, differentiable: bool, rows: int | None, by: RowWeights
) -> tuple[Tensor, CrossEntropyStatistics | None]:
    """(loss, CrossEntropyStatistics or None) of (N, S) rows, with weights of rows, or a normaliser."""
    N, _, S = problem.sizes
    of_rows = None if by.token_weight is None else by.token_weight.reshape(N, S)

    def call(asked: Options) -> tuple[Tensor, CrossEntropyStatistics | None]:
        if differentiable:
            return with_differentiable_statistics(problem, asked, rows)
        return linear_cross_entropy(problem, asked, gradient, stats, rows)

    by = by._replace(token_weight=of_rows)
    if not differentiable and operators.eager() and not operators.traced(problem.x):
        like = problem.x.new_empty((N, S), dtype=accumulate_dtype(problem.x))
        known = known_factors(by, options, problem.target, problem.weight, like)
        if known is not None:
            return linear_cross_entropy(problem, options._replace(reduction="sum"), gradient, stats, rows, known)
    return reduced_by(call, options, problem.target, problem.weight, by)


def with_differentiable_statistics(
    problem: Problem, options: Options, rows: int | None
) -> tuple[Tensor, CrossEntropyStatistics | None]:
    """(loss, CrossEntropyStatistics) of (N, S) rows, both with a graph; as of `cross_entropy`, in chunks where by kernels."""
    if problem.target.is_floating_point() or options.label_smoothing or options.softcap is not None or operators.transformed():
        if not (operators.traced(problem.x) or operators.transformed()):
            class_range.check_classes(problem.target, problem.sizes[1], options.ignore_index)
        return formula(problem, options, True)
    temperature = 1.0 / options.logit_scale
    found, sums, predicted = linear_token_log_probs.with_sums(problem, temperature, options.ignore_index, rows, predicts=True)
    assert predicted is not None
    return of_token_log_probs(found, sums[3], problem.target, problem.weight, options, predicted)


# ---------------------------------------------------------------------------------------------- autograd
class _LinearCrossEntropy(torch.autograd.Function):
    """`at_once` makes the gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, rest: Rest
    ) -> tuple[Tensor | None, ...]:
        problem = Problem(x, W, b, target, weight)
        needs = ctx.needs_input_grad[:3] if rest.at_once else (False,) * 3
        ctx.of_sum = rest.options.reduction == "mean" and x.dtype == torch.float16
        logits = [] if rest.traced or rest.at_once else to_hold([problem], rest.rows)
        if rest.traced:
            found = Found(*operators.below_autograd(FORWARD, *problem, rest.rows, rest.numbers, *rest.options))
        else:
            rows = rest.rows or chunk_rows(problem, of_W=needs[1])
            found = run(problem, rest.options, rows, rest.numbers, needs, ctx.of_sum, rest.factors, logits)
        divides = found.denominator if rest.options.reduction == "mean" else None
        held: tuple[Tensor | None, ...] = found.gradients
        if x.dtype != torch.float16:  # whose gradients of the sum meet loss scale / n in float32
            held = as_given(held, problem)
        ctx.save_for_backward(*problem, found.numbers, divides, found.factor, *held, *logits)
        ctx.rest, ctx.handed_out = rest, not rest.at_once
        ctx.mark_non_differentiable(*(v for v in found[1:3] if v is not None))
        ctx.set_materialize_grads(False)
        return found[:3]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        saved, options = ctx.saved_tensors, ctx.rest.options
        problem, (numbers, denominator, factor), held, logits = Problem(*saved[:5]), saved[5:8], saved[8:11], saved[11:]
        needs = ctx.needs_input_grad[:4]
        if upstream is None:
            return None, None, None, None, None, None
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            if ctx.rest.factors is not None:
                upstream, options = upstream * ctx.rest.factors, options._replace(reduction="none")
            return *formula_gradients(upstream, problem, options, needs), None, None
        if ctx.rest.traced:
            found = BACKWARD(upstream, *problem, numbers, denominator, ctx.rest.rows, needs, *options)
            return *(g if needed else None for g, needed in zip(found, needs, strict=True)), None, None
        if ctx.handed_out:
            rows = ctx.rest.rows or chunk_rows(problem, of_W=needs[1])
            found = run_backward(upstream, problem, numbers, denominator, options, rows, needs, ctx.rest.factors, logits)
        else:
            ctx.handed_out = True
            found = (*scaled(held, upstream, denominator if ctx.of_sum else None, factor), None)
        return *as_given(found, problem), None, None


# ---------------------------------------------------------------------------------------------- operators
def _forward(problem: Problem, rest: Rest) -> tuple[Tensor, Tensor, Tensor | None]:
    return run(problem, rest.options, rest.rows or chunk_rows(problem, of_W=False), rest.numbers)[:3]


def _fake(problem: Problem, rest: Rest) -> tuple[Tensor, Tensor, Tensor | None]:
    x, target = problem.x, problem.target
    shape, reduction = (x.shape[0], target.shape[-1]), rest.options.reduction
    loss = x.new_empty(shape if reduction == "none" else (), dtype=accumulate_dtype(x))
    return loss, loss.new_empty((rest.numbers, *shape)), loss.new_empty(1) if reduction == "mean" else None


def _backward(
    upstream: Tensor, x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, numbers: Tensor,
    denominator: Tensor | None, rows: int, needs: Sequence[bool], *options: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    problem = Problem(x, W, b, target, weight)
    rows = rows or chunk_rows(problem, of_W=needs[1])
    found = run_backward(upstream, problem, numbers, denominator, Options(*options), rows, needs)
    return as_given(found, problem)


_PROBLEM = "Tensor x, Tensor W, Tensor? b, Tensor target, Tensor? weight"
FORWARD = operators.define(
    f"linear_cross_entropy({_PROBLEM}, int rows, int numbers, {OPTIONS_SCHEMA}) "
    "-> (Tensor loss, Tensor numbers_of_rows, Tensor denominator)",
    *(
        lambda x, W, b, target, weight, rows, numbers, *options, f=f: f(
            Problem(x, W, b, target, weight), Rest(Options(*options), rows, numbers, traced=True)
        )
        for f in (_forward, _fake, lambda problem, rest: _LinearCrossEntropy.apply(*problem, rest))
    ),
)
BACKWARD = operators.define(
    f"linear_cross_entropy_backward(Tensor upstream, {_PROBLEM}, Tensor numbers_of_rows, Tensor? denominator, int rows, "
    f"bool[] needs, {OPTIONS_SCHEMA}) -> (Tensor dx, Tensor dW, Tensor db, Tensor dtarget)",
    _backward,
    lambda upstream, x, W, b, target, weight, numbers, denominator, rows, needs, *_: fake_gradients((x, W, b, target), needs),
)
