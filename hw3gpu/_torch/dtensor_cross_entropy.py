"""Cross entropy of DTensors, whole losses of the mesh: divided rows stay so, divided classes go to the parallel losses.

Rows: the operators (`sharding_strategies`), and the reduction by PyTorch's operations on DTensors. Classes: the losses over
processes (`vocab_parallel_rows`) of this process's part, among the processes of that axis of the mesh; the rows may be divided
along its other axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .._core import check
from . import cross_entropy as _cross_entropy
from . import (
    cross_entropy_formula,
    differentiable_statistics,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_rows,
)
from . import linear_cross_entropy as _linear_cross_entropy
from .autograd import graph_is_needed
from .cross_entropy_formula import NUMBERS, CrossEntropyStatistics, Options, class_axis, loss_shape
from .dtensor import axis_of_mesh, refuse_this
from .linear_chunks import Problem
from .row_weights import RowWeights, reduced_by
from .token_log_probs import TokenLogProbs

Results = tuple[Any, CrossEntropyStatistics | None]


# ---------------------------------------------------------------------------------------------- cross entropy
def cross_entropy(
    logits: Any, target: Any, weight: Any, options: Options, stats: bool, differentiable: bool, by: RowWeights | None
) -> Results:
    """The loss of DTensors on one mesh, in the precision of its sums, and the statistics if asked for, as DTensors."""

    def call(asked: Options) -> Results:
        axis = axis_of_mesh(logits, class_axis(logits), "input")
        if axis is not None:
            loss, found = _of_divided_classes(logits, target, weight, asked, stats, differentiable, axis)
            return _reduced(loss, target, weight, asked), found
        if differentiable:
            return differentiable_statistics.loss_and_statistics(logits, target, weight, asked)
        return _of_divided_rows(logits, target, weight, asked, stats)

    return call(options) if by is None else reduced_by(call, options, target, weight, by)


def token_log_probs(logits: Any, target: Any, temperature: float, ignore_index: int, dim: int, axis: int) -> TokenLogProbs:
    """Of logits whose classes, along `dim`, are divided along an axis of the mesh, as DTensors."""
    options = Options("none", ignore_index, 0.0, 0.0, None, False, 1.0 / temperature)
    logits = logits.movedim(dim, class_axis(logits))
    return _token_log_probs(_of_divided_classes(logits, target, None, options, True, True, axis))


def _of_divided_rows(logits: Any, target: Any, weight: Any, options: Options, stats: bool) -> Results:
    of_rows, found = options._replace(reduction="none"), None
    loss, numbers, _ = _cross_entropy.FORWARD(logits, target, weight, NUMBERS if stats else 3, *of_rows)
    if stats:
        V = logits.shape[class_axis(logits)]
        predicted = cross_entropy_formula.exact_argmax(logits, numbers)
        found = cross_entropy_formula.statistics(numbers, loss_shape(logits), V, target, options.ignore_index, predicted)
        if graph_is_needed(logits, target):
            found = cross_entropy_formula.without_derivatives(found, logits, target)
    return _reduced(loss, target, weight, options), found


def _of_divided_classes(
    logits: Any, target: Any, weight: Any, options: Options, stats: bool, differentiable: bool, axis: int
) -> Results:
    """The losses of the rows where the classes are divided along an axis of the mesh, and the rows perhaps along others."""
    _classes_alone(target, "input")
    mesh, classes = logits.device_mesh, class_axis(logits)
    placed = [Replicate() if p.is_partial() else p for p in logits.placements]
    rows = [_of_a_row(p, classes) if i != axis else Replicate() for i, p in enumerate(placed)]
    loss, _, taken, *numbers = vocab_parallel_cross_entropy.vocab_parallel_cross_entropy(
        logits.redistribute(mesh, placed).to_local(),
        target.redistribute(mesh, rows).to_local(),
        _classes_here(weight, axis),
        vocab_parallel_cross_entropy.Rest(options, *_divided(logits, classes, axis), stats, differentiable),
    )
    depends_on = () if differentiable else (logits,)
    return _row_results(loss, taken, numbers, target, rows, options, stats, depends_on)


def _row_results(
    loss: Tensor, taken: Tensor, numbers: list[Tensor], target: Any, rows: list[Any], options: Options, stats: bool,
    depends_on: tuple[Any, ...],
) -> Results:  # fmt: skip
    """The losses of rows and their statistics as DTensors, from those of the rows here.

    depends_on: what statistics would have the gradients of, if they have none.
    """
    here = target.redistribute(target.device_mesh, rows).to_local()
    if here.device.type == "cpu" and not torch.compiler.is_compiling():
        vocab_parallel_rows.every_class_exists(taken, here, options.ignore_index)
    if loss.dim():
        loss = _global(loss.reshape(here.shape), target, rows)
    if not stats:
        return loss, None
    of_rows = vocab_parallel_rows.statistics(numbers, here, options.ignore_index)
    found = CrossEntropyStatistics._make(None if v is None else _global(v, target, rows) for v in of_rows)
    return loss, cross_entropy_formula.without_derivatives(found, *depends_on) if graph_is_needed(*depends_on) else found


def _token_log_probs(found: Results) -> TokenLogProbs:
    stats = found[1]
    assert stats is not None
    assert stats.log_prob is not None  # target: classes
    return TokenLogProbs(stats.log_prob, stats.entropy, stats.lse)


def _any(x: Any) -> Any:
    """To the checker of types a DTensor is a plain tensor."""
    return x


def _classes_alone(target: Any, name: str) -> None:
    if target.is_floating_point():
        raise check.DtypeError(
            f"target: expected integer classes where those of {name} are divided, {check.got_dtype(target, 'target')}"
        )


def _of_a_row(placement: Any, classes: int) -> Any:
    """How rows are divided where logits are."""
    return Shard(placement.dim - 1) if placement.is_shard() and placement.dim > classes else placement


def _classes_here(weight: Any, axis: int) -> Tensor | None:
    """The class weights of this process's classes."""
    if weight is None:
        return None
    mesh = weight.device_mesh
    return weight.redistribute(mesh, [Shard(0) if i == axis else Replicate() for i in range(mesh.ndim)]).to_local()


def _divided(x: Any, dim: int, axis: int) -> tuple[int, str]:
    """The number of the first class here, and the group of processes that share the classes."""
    mesh = x.device_mesh
    step = -(-x.shape[dim] // mesh.size(axis))  # the parts are torch.chunk's
    return min(mesh.get_local_rank(axis) * step, x.shape[dim]), mesh.get_group(axis).group_name


def _global(x: Tensor, like: Any, placements: list[Any]) -> Any:
    """The DTensor of `like`'s shape of which x is this process's part."""
    shape = like.shape
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _reduced(loss: Any, target: Any, weight: Any, options: Options) -> Tensor:
    if options.reduction == "none" or target.is_floating_point():
        return cross_entropy_formula.reduced(loss, loss, target, weight, options)
    target = target.long()  # in fewer bits PyTorch wraps the number that it is compared with
    return cross_entropy_formula.reduced(loss, target != options.ignore_index, target, weight, options)


# ---------------------------------------------------------------------------------------------- linear cross entropy
def linear_cross_entropy(
    problem: Problem, options: Options, gradient: str, stats: bool, differentiable: bool, rows: int | None,
    by: RowWeights | None,
) -> Results:  # fmt: skip
    """As of `cross_entropy`, of (N, S) rows."""

    def call(asked: Options) -> Results:
        axis = axis_of_mesh(problem.W, 0, "linear_weight")
        if axis is not None:
            return _of_divided_weight(problem, asked, gradient, stats, differentiable, rows or 0, axis)
        if differentiable:
            return _linear_cross_entropy.with_differentiable_statistics(problem, asked, rows)
        return _of_whole_weight(problem, asked, stats, rows)

    if by is None:
        return call(options)
    if by.token_weight is not None:
        by = by._replace(token_weight=by.token_weight.reshape(problem.target.shape))
    return reduced_by(call, options, problem.target, problem.weight, by)


def linear_token_log_probs(
    problem: Problem, temperature: float, ignore_index: int, rows: int | None, axis: int
) -> TokenLogProbs:
    """Of (N, 1) rows, where those of W, the classes, are divided along an axis of the mesh."""
    options = Options("none", ignore_index, 0.0, 0.0, None, False, 1.0 / temperature)
    return _token_log_probs(_of_divided_weight(problem, options, "backward", True, True, rows or 0, axis))


def _of_whole_weight(problem: Problem, options: Options, stats: bool, rows: int | None) -> Results:
    x, W, b, target, weight = problem
    of_rows = options._replace(reduction="none")
    loss, numbers, _ = _linear_cross_entropy.FORWARD(x, W, b, target, weight, rows or 0, NUMBERS if stats else 3, *of_rows)
    found = None
    if stats:
        N, V, S = problem.sizes
        found = cross_entropy_formula.statistics(numbers, (N, S), V, target, options.ignore_index)
        if graph_is_needed(x, W, b, target):
            found = cross_entropy_formula.without_derivatives(found, x, W, b, target)
    return _reduced(loss, target, weight, options), found


def _of_divided_weight(
    problem: Problem, options: Options, gradient: str, stats: bool, differentiable: bool, rows: int, axis: int
) -> Results:
    """The same where the rows of W, the classes, are divided along an axis of the mesh, and those of x perhaps along others."""
    x, W, b, target, weight = (_any(v) for v in problem)
    _classes_alone(target, "linear_weight")
    mesh = W.device_mesh
    if problem.sizes[2] != 1:
        refuse_this(W, "linear_weight")
    of_x = [Shard(0) if i != axis and p.is_shard(0) else Replicate() for i, p in enumerate(x.placements)]
    of_W = [Shard(0) if i == axis else Replicate() for i in range(mesh.ndim)]
    dW = [p if i == axis or not of_x[i].is_shard() else Partial() for i, p in enumerate(of_W)]
    start, group = _divided(W, 0, axis)
    local = Problem(
        x.redistribute(mesh, of_x).to_local(grad_placements=of_x),
        W.redistribute(mesh, of_W).to_local(grad_placements=dW),
        None if b is None else b.redistribute(mesh, of_W).to_local(grad_placements=dW),
        target.redistribute(mesh, of_x).to_local(),
        _classes_here(weight, axis),
    )
    reduction = "none" if options.reduction == "none" else "sum"
    asked = options._replace(reduction=reduction)
    rest = vocab_parallel_linear_cross_entropy.Rest(asked, start, group, rows, stats, differentiable)
    found = vocab_parallel_linear_cross_entropy.vocab_parallel_linear_cross_entropy(local, rest, gradient)
    loss, taken, _, *numbers = found
    depends_on = () if differentiable else (x, W, b)
    loss, of_rows = _row_results(loss, taken, numbers, target, of_x, options, stats, depends_on)
    if options.reduction == "none":
        return loss, of_rows
    loss = DTensor.from_local(loss, mesh, [Partial() if p.is_shard() else p for p in of_x], run_check=False)
    return _reduced(loss, target, weight, options), of_rows
