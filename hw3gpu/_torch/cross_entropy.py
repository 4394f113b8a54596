"""Softmax cross entropy in PyTorch, by one of three ways: docs/derivations.md, sections 3.3, 3.4 and 3.6.

Eager: an autograd function around kernels, or kernels alone where no graph is needed. Traced: operators around the same
functions (`operators`). Inside `torch.func` transforms and in forward mode: the formula in PyTorch's operations
(`cross_entropy_formula`). The loss is in the precision of its sums; of every row `NUMBERS` or three numbers are kept.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._core import arrays, dispatch, outputs
from .._core.arrays import Array
from .._core.torch_internals import apply_of
from . import (
    bound_launches,
    class_range,
    cross_entropy_formula,
    differentiable_statistics,
    expected_upstream,
    operators,
    small_calls,
)
from .autograd import accumulate_dtype, empty_of, graph_is_needed
from .bound_launches import Call
from .class_range import judge_targets, refuse_class
from .cross_entropy_formula import (
    NUMBERS,
    OPTIONS_SCHEMA,
    CrossEntropyStatistics,
    Options,
    class_axis,
    loss_shape,
    target_gradient,
    upstream_of_rows,
    without_derivatives,
)
from .row_weights import RowWeights, known_factors, reduced_by


class Rest(NamedTuple):
    """The arguments without a gradient, as one: PyTorch inspects each argument of an autograd function in each call.

    numbers: how many are kept of every row. at_once: the gradient is written in the forward pass. dtype: of the loss of CUDA
    tensors, None for that of its sums. call: the `bound_launches.Call`. traced: the call goes through the operators.
    normalizer: the number that the caller will divide the loss by, () in the precision of the sums. factors: the numbers by
    which the losses of the rows are multiplied before they are added up, on the CPU.
    """

    weight: torch.Tensor | None
    options: Options
    numbers: int = 3
    at_once: bool = False
    dtype: torch.dtype | None = None
    call: Call | None = None
    traced: bool = False
    normalizer: Tensor | None = None
    factors: Tensor | None = None


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, gradient: str, stats: bool,
    dtype: torch.dtype | None = None, call: Call | None = None, normalizer: Tensor | None = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, CrossEntropyStatistics | None]:  # fmt: skip
    """(loss, CrossEntropyStatistics or None); the arguments are checked, weight is in the kernels' dtype.

    dtype: of the loss of CUDA tensors; others have that of its sums. `call`: what `bound_launches` knows of it. normalizer: the
    caller will divide the loss by it, which makes 1 / normalizer the upstream gradient to expect. factors: what the losses of
    the rows are multiplied by before they are added up, where `steps` says so.
    """
    rest = Rest(weight, options, NUMBERS if stats else 3, dtype=dtype, call=call, normalizer=normalizer, factors=factors)
    with_graph = False
    if call is None and operators.traced(logits):
        found = FORWARD(logits, target, weight, rest.numbers, *options)
    elif call is None and operators.transformed():
        return cross_entropy_formula.loss_and_statistics(logits, target, weight, options, stats)
    elif not (with_graph := graph_is_needed(logits, target)):
        found = _small_loss(logits, target, rest, stats) or run(logits, target, rest)
    else:
        found = _eager_with_graph(logits, target, rest, gradient)
    if not stats:
        return found[0], None
    V = logits.shape[class_axis(logits)]
    predicted = cross_entropy_formula.exact_argmax(logits, found[1])
    of_rows = cross_entropy_formula.statistics(found[1], loss_shape(logits), V, target, options.ignore_index, predicted)
    return found[0], without_derivatives(of_rows, logits, target) if with_graph else of_rows


def with_row_weights(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, gradient: str, stats: bool, differentiable: bool,
    by: RowWeights,
) -> tuple[Tensor, CrossEntropyStatistics | None]:  # fmt: skip
    """(loss, CrossEntropyStatistics or None) with weights of rows, or a normaliser."""

    known = None
    if by.token_weight is not None and not differentiable and steps(logits, target, gradient):
        known = known_factors(by, options, target, weight, logits.new_empty(loss_shape(logits), dtype=accumulate_dtype(logits)))

    def call(asked: Options) -> tuple[Tensor, CrossEntropyStatistics | None]:
        if differentiable:
            return differentiable_statistics.loss_and_statistics(logits, target, weight, asked)
        if known is not None:
            return cross_entropy(logits, target, weight, asked._replace(reduction="sum"), gradient, stats, factors=known)
        return cross_entropy(logits, target, weight, asked, gradient, stats, normalizer=by.normalizer)

    return call(options) if known is not None else reduced_by(call, options, target, weight, by)


def steps(logits: Tensor, target: Tensor, gradient: str) -> bool:
    """Whether the gradient of a reduced loss is written with the loss: eager calls on the CPU."""
    if gradient == "backward" or target.requires_grad or not (operators.eager() and graph_is_needed(logits)):
        return False
    return not operators.traced(logits) and dispatch.backend(logits) == "cpu"


def _eager_with_graph(logits: Tensor, target: Tensor, rest: Rest, gradient: str) -> tuple[Tensor, Tensor | None]:
    """The loss, and the numbers of every row where more than three are asked for."""
    differentiated = logits.requires_grad
    if rest.call is not None and rest.call.launches is not None:
        at_once = gradient == "forward" and differentiated
        return _apply_again(logits, target, rest._replace(at_once=True) if at_once else rest)
    at_once = gradient != "backward" and differentiated and not target.requires_grad
    if at_once and rest.options.reduction != "none" and dispatch.backend(logits) == "cpu":
        # a small call costs less than to remember its upstream gradient
        remember = gradient == "auto" and logits.nbytes > small_calls.MOST_BYTES
        expected = expected_upstream.of_caller() if remember else None
        if rest.normalizer is not None:
            expected = expected_upstream.Divided(expected, rest.normalizer)
        return _CrossEntropyStep.apply(logits, target, rest, expected)
    return _CrossEntropy.apply(logits, target, rest._replace(at_once=gradient == "forward" and differentiated))


# ---------------------------------------------------------------------------------------------- autograd
class _CrossEntropy(torch.autograd.Function):
    """Forward reads the logits once and keeps three numbers a row; backward reads them once and writes the gradient.

    `at_once` writes the gradient for an upstream gradient of 1 in the forward pass, and rewrites in backward the rows that have
    another, from the logits: nothing is scaled that has been rounded.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, rest: Rest) -> tuple[Tensor | None, ...]:
        loss, numbers, denominator, dlogits = (_below_autograd if rest.traced else run)(logits, target, rest)
        divides = denominator if rest.options.reduction == "mean" else None
        ctx.save_for_backward(logits, target, rest.weight, numbers, divides, dlogits)
        ctx.options, ctx.traced, ctx.handed_out = rest.options, rest.traced, not rest.at_once
        if rest.traced:  # an operator gives all results
            ctx.mark_non_differentiable(numbers, denominator)
        elif rest.numbers == NUMBERS:
            ctx.mark_non_differentiable(numbers)
        else:
            return loss, None
        ctx.set_materialize_grads(False)
        return (loss, numbers, denominator) if rest.traced else (loss, numbers)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        logits, target, weight, numbers, denominator, dlogits = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if upstream is None:
            return None, None, None
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            return *cross_entropy_formula.gradients(upstream, logits, target, weight, ctx.options, needs), None
        given = (upstream, logits, target, weight, numbers, denominator)
        dtarget = target_gradient(*given, ctx.options) if needs[1] else None
        if not needs[0]:
            return None, dtarget, None
        if ctx.traced:
            return BACKWARD(*given, *ctx.options), dtarget, None
        # with a version count of its own, so that a write into it does not count as one into the saved tensor
        dlogits = None if ctx.handed_out else dlogits.data
        ctx.handed_out = True
        return _eager_backward(*given, ctx.options, dlogits), dtarget, None


_apply_again = apply_of(_CrossEntropy)


class _CrossEntropyStep(torch.autograd.Function):
    """A reduced loss on the CPU: forward writes the gradient at once, for the upstream gradient expected, or 1, while it
    has the logits in cache.

    Backward hands that out, and computes it anew for another upstream gradient, where none was expected, and for a second call:
    the caller may have written into what it got. The bits are the same each way.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, rest: Rest, expected: expected_upstream.Expected | None
    ) -> tuple[Tensor, Tensor | None]:
        weight, options, kept = rest.weight, rest.options, rest.numbers
        numbers: Tensor | None
        dlogits: Tensor | None
        ctx.upstream, ctx.expected = 1.0 if expected is None else expected.guess(), expected
        if ctx.upstream is None:
            asked = options if rest.factors is None else options._replace(reduction="none")
            loss, numbers, _, dlogits = run(logits, target, Rest(weight, asked, kept))
            if rest.factors is not None:
                loss = cross_entropy_formula.multiplied(loss, rest.factors).sum()
        else:
            stats = kept == NUMBERS
            loss, numbers, dlogits = _run_step(logits, target, weight, ctx.upstream, options, None, stats, rest.factors)
        ctx.save_for_backward(logits, target, weight, dlogits, rest.factors)
        ctx.options, ctx.handed_out = options, dlogits is None
        if kept != NUMBERS:
            return loss, None
        ctx.mark_non_differentiable(numbers)
        ctx.set_materialize_grads(False)
        return loss, numbers

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        logits, target, weight, dlogits, factors = ctx.saved_tensors
        if upstream is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            needs = ctx.needs_input_grad[:2]
            if factors is not None:
                upstream, ctx.options = upstream * factors, ctx.options._replace(reduction="none")
            return *cross_entropy_formula.gradients(upstream, logits, target, weight, ctx.options, needs), None, None
        number = upstream.item()
        if ctx.expected is not None:
            ctx.expected.was(number)
        dlogits = None if ctx.handed_out else dlogits.data
        ctx.handed_out = True
        if dlogits is None or number != ctx.upstream:
            _, _, dlogits = _run_step(logits, target, weight, number, ctx.options, dlogits, factors=factors)
        return dlogits, None, None, None


# ---------------------------------------------------------------------------------------------- forward and backward
def rows_of(logits: Tensor, target: Tensor, which: str) -> tuple[Array, Array]:
    """Logits (N, V, S) and targets (N, S) or (N, V, S) as operands of the kernels of `which`."""
    axis = class_axis(logits)
    z = outputs.folded(logits, axis, which)
    if target.ndim == logits.ndim:
        return z, outputs.folded(target, axis, which)
    rows = z.shape[0], z.shape[2]
    return z, dispatch.kernel_view(which)(target.view(rows) if target.is_contiguous() else target.reshape(rows))


def call_of(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, gradient: str, stats: bool,
    dtype: torch.dtype | None,
) -> Call | None:  # fmt: skip
    """The `bound_launches.Call` of a call of `functional.cross_entropy`, of which only the kinds of the first two arguments are
    checked; None where it is not kept."""
    if not (type(options.ignore_index) is int and type(options.label_smoothing) is float):
        return None
    if not type(options.z_loss) is type(options.logit_scale) is float:
        return None
    if options.softcap is not None and type(options.softcap) is not float:
        return None
    if weight is not None and not (getattr(weight, "dtype", None) is accumulate_dtype(logits) and weight.is_contiguous()):
        return None
    if arrays.on_host(logits):
        plain = not stats and gradient != "forward" and not options.label_smoothing
        return _call_on_host(("cross entropy", dtype), options, logits, target, weight) if plain else None
    at_once = gradient == "forward" and logits.requires_grad and torch.is_grad_enabled()
    return bound_launches.of(("cross entropy", options, at_once, NUMBERS if stats else 3, dtype), logits, target, weight)


def _call_on_host(
    asked: tuple[Any, ...], options: Options, logits: Tensor, target: Tensor, weight: Tensor | None, *beside: Tensor
) -> Call | None:
    """The `bound_launches.Call` of a small call whose launcher does nothing but launch; None for others."""
    if options.reduction != "none" or options.z_loss or options.softcap is not None or options.logit_scale != 1.0:
        return None
    if target.dtype is not torch.int64 and not target.is_floating_point():  # the launcher would convert it
        return None
    given = (target, *beside) if weight is None else (target, *beside, weight)
    return bound_launches.of_host((*asked, options, weight is None), logits, *given)


IN_ONE_LAUNCH = 8192  # rows that are added up where their losses are made (`row_plan.plan_reduce`)


def run(logits: Tensor, target: Tensor, rest: Rest) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The reduced loss, `numbers` of every row, what the gradient is divided by (None for 1), and the gradient if `at_once`."""
    weight, options, numbers, at_once, dtype, call, *_ = rest
    again = None if call is None else call.launches
    which = dispatch.backend(logits) if call is None or again is None else "cpu" if call.on_host else "gpu"
    N, S = rows_shape(logits)
    if which == "cpu" or (N * S > IN_ONE_LAUNCH and options.reduction != "none"):
        dtype = None  # the caller casts it
    acc = accumulate_dtype(logits)
    stats = empty_of(logits, acc, numbers, N, S)
    invalid = class_range.flag(logits, N * S)
    total, denominator = None, None
    if options.reduction == "none":
        loss = empty_of(stats, dtype or acc, N, S)
    else:
        loss = stats.new_empty(2, -(-N * S // 4) * 4)  # and the rows' weights, on 16 bytes too
        total = empty_of(stats, dtype or acc)
        if options.reduction == "mean":
            denominator = stats.new_empty(())
    if again is not None:
        dlogits = torch.empty_like(logits) if at_once else None
        again(logits, target, weight, loss, stats, invalid, total, denominator, dlogits)
    else:
        dlogits, dz = outputs.output(logits, class_axis(logits), dispatch.kernel_view(which)) if at_once else (None, None)
        operands = (logits, target, weight, loss, stats, invalid, total, denominator, dlogits)
        with bound_launches.noted(call, operands, *(() if dlogits is None else (dlogits,))):
            _launch_forward(which, *operands, dz, options)
    if not target.is_floating_point():
        judge_targets(logits, target, invalid, logits.shape[class_axis(logits)], options.ignore_index)
    return loss.reshape(loss_shape(logits)) if total is None else total, stats, denominator, dlogits


def _launch_forward(
    which: str, logits: Tensor, target: Tensor, weight: Tensor | None, loss: Tensor, stats: Tensor, invalid: Tensor,
    total: Tensor | None, denominator: Tensor | None, dlogits: Tensor | None, dz: Array | None, options: Options,
) -> None:  # fmt: skip
    view, kernels = dispatch.kernel_view(which), dispatch.cross_entropy(which)
    z, t = rows_of(logits, target, which)
    weight, stats, invalid = view(weight), view(stats), view(invalid)
    total, denominator = cell(total, which), cell(denominator, which)
    row_weights: Tensor | None = None
    if total is not None:
        loss, row_weights = loss.unbind()
        loss = loss[: stats.shape[1] * stats.shape[2]].view(stats.shape[1:])
    loss = view(loss)
    mean, zero = options.reduction == "mean", options.zero_if_ignored
    reduced: dict[str, Any] = {"total": total, "denominator": denominator, "mean": mean, "zero_if_ignored": zero}
    if dz is None:
        kernels.forward(z, t, weight, loss, stats, invalid, row_weights=row_weights, **reduced, **options.of_rows)
        return
    if mean and t.ndim == 2:
        kernels.count(t, weight, denominator, ignore_index=options.ignore_index, zero_if_ignored=zero)
    kernels.forward_backward(z, t, weight, loss, dz, invalid, stats=stats, **reduced, **options.of_rows)


def cell(number: Tensor | None, which: str) -> Array | None:
    """A tensor of one number as an operand of the kernels of `which`: (1,) on the CPU."""
    return number if which != "cpu" or number is None else number.numpy().reshape(1)


def rows_shape(logits: Tensor) -> tuple[int, int]:
    """(N, S) of logits (C,), (N, C, …)."""
    return (logits.shape[0], math.prod(logits.shape[2:])) if logits.dim() > 1 else (1, 1)


def _eager_backward(
    upstream: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, numbers: Tensor, denominator: Tensor | None,
    options: Options, dlogits: Tensor | None,
) -> Tensor:  # fmt: skip
    call = None
    if arrays.on_host(logits):
        upstream = upstream.contiguous()  # else the launcher copies it, and the call is not kept
        if dlogits is None and denominator is None:
            call = _call_on_host(("cross entropy, backward",), options, logits, target, weight, upstream, numbers)
    else:
        call = bound_launches.of(
            ("cross entropy, backward", options, dlogits is None),
            logits, target, weight, upstream, numbers, denominator, dlogits,
        )  # fmt: skip
    return run_backward(upstream, logits, target, weight, numbers, denominator, options, dlogits, call)


def run_backward(
    upstream: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, numbers: Tensor, denominator: Tensor | None,
    options: Options, dlogits: Tensor | None = None, call: Call | None = None,
) -> Tensor:  # fmt: skip
    """∂loss/∂logits; where `dlogits` holds it for an upstream gradient of 1, in place and for the rows that have another."""
    operands = logits, target, weight, upstream, numbers, denominator
    if call is not None and call.launches is not None:
        dlogits = torch.empty_like(logits) if dlogits is None else dlogits
        call.launches(*operands, dlogits)
        return dlogits
    which = dispatch.backend(logits)
    view, kernels = dispatch.kernel_view(which), dispatch.cross_entropy(which)
    z, t = rows_of(logits, target, which)
    unless_one = dlogits is not None
    if dlogits is not None:
        dz = outputs.folded(dlogits, class_axis(logits), which)
    else:
        dlogits, dz = outputs.output(logits, class_axis(logits), view)
    upstream = view(upstream_of_rows(upstream, numbers, options))
    over = cell(denominator, which)
    with bound_launches.noted(call, (*operands, dlogits), *(() if unless_one else (dlogits,))):
        kernels.backward(z, t, view(weight), view(numbers), upstream, over, dz, unless_one=unless_one, **options.of_rows)
    return dlogits


def _run_step(
    logits: Tensor, target: Tensor, weight: Tensor | None, upstream: float, options: Options, dlogits: Tensor | None = None,
    stats: bool = False, factors: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """On the CPU: the reduced loss, the numbers of every row if `stats`, and the gradient for an upstream number."""
    found = None if stats or factors is not None else _small_step(logits, target, weight, upstream, options, dlogits)
    if found:
        return found[0], None, found[1]
    view = dispatch.kernel_view("cpu")
    z, t = rows_of(logits, target, "cpu")
    N, _, S = z.shape
    if dlogits is None:
        dlogits, dz = outputs.output(logits, class_axis(logits), view)
    else:
        dz = outputs.fold(view(dlogits), class_axis(logits))
    acc = accumulate_dtype(logits)
    # a tensor on NumPy's memory: sooner made than NumPy's view of a tensor
    result, invalid = np.empty(1, np.float64 if acc is torch.float64 else np.float32), np.array((N * S,))
    numbers = torch.empty((NUMBERS, N, S), dtype=acc) if stats else None
    if factors is not None:
        loss = torch.empty((N, S), dtype=acc)
        dispatch.cross_entropy("cpu").forward_backward(
            z, t, view(weight), view(loss), dz, invalid, stats=view(numbers), upstream=view(factors.reshape(N, S) * upstream),
            **options.of_rows,
        )  # fmt: skip
        result[0] = cross_entropy_formula.multiplied(loss, factors.reshape(N, S)).sum().item()
    else:
        dispatch.cpu_cross_entropy.forward_backward_reduced(
            z, t, view(weight), result, dz, invalid, stats=view(numbers), upstream=upstream,
            mean=options.reduction == "mean", zero_if_ignored=options.zero_if_ignored, **options.of_rows,
        )  # fmt: skip
    if invalid[0] < N * S:
        refuse_class(target, int(invalid[0]), logits.shape[class_axis(logits)], options.ignore_index)
    return torch.from_numpy(result.reshape(())), numbers, dlogits


def _small_loss(logits: Tensor, target: Tensor, rest: Rest, stats: bool) -> tuple[Tensor, Tensor] | None:
    """The reduced loss of a small call on the CPU, else None. It also computes a gradient, in a quarter of `run`'s time."""
    if stats or rest.options.reduction == "none" or dispatch.backend(logits) != "cpu":
        return None
    return _small_step(logits, target, rest.weight, 1.0, rest.options)


def _small_step(
    logits: Tensor, target: Tensor, weight: Tensor | None, upstream: float, options: Options, dlogits: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """The reduced loss and the gradient for an upstream number; None where `small_calls` does not take the call."""
    found = small_calls.cross_entropy_step(logits, target, weight, upstream, options, dlogits)
    if found is None:
        return None
    loss, dlogits, row = found
    if row < target.numel():
        refuse_class(target, row, logits.shape[class_axis(logits)], options.ignore_index)
    return loss, dlogits


# ---------------------------------------------------------------------------------------------- operators
def _below_autograd(logits: Tensor, target: Tensor, rest: Rest) -> tuple[Any, ...]:
    return *operators.below_autograd(FORWARD, logits, target, rest.weight, rest.numbers, *rest.options), None


def _forward(logits: Tensor, target: Tensor, rest: Rest) -> tuple[Tensor, Tensor, Tensor | None]:
    loss, stats, denominator, _ = run(logits, target, rest)
    return loss, stats, None if denominator is None else denominator.view(1)


def _fake(logits: Tensor, target: Tensor, rest: Rest) -> tuple[Tensor, Tensor, Tensor | None]:
    acc, reduction = accumulate_dtype(logits), rest.options.reduction
    loss = logits.new_empty(loss_shape(logits) if reduction == "none" else (), dtype=acc)
    stats = loss.new_empty((rest.numbers, *rows_shape(logits)))
    return loss, stats, loss.new_empty(1) if reduction == "mean" else None


FORWARD = operators.define(
    f"cross_entropy(Tensor logits, Tensor target, Tensor? weight, int numbers, {OPTIONS_SCHEMA}) "
    "-> (Tensor loss, Tensor stats, Tensor denominator)",
    *(
        lambda logits, target, weight, numbers, *options, f=f: f(
            logits, target, Rest(weight, Options(*options), numbers, traced=True)
        )
        for f in (_forward, _fake, _CrossEntropy.apply)
    ),
)
BACKWARD = operators.define(
    "cross_entropy_backward(Tensor upstream, Tensor logits, Tensor target, Tensor? weight, Tensor stats, "
    f"Tensor? denominator, {OPTIONS_SCHEMA}) -> Tensor",
    lambda upstream, logits, target, weight, stats, denominator, *options: run_backward(
        upstream, logits, target, weight, stats, denominator, Options(*options)
    ),
    lambda upstream, logits, *_: operators.fake_output(logits, class_axis(logits)),
)
