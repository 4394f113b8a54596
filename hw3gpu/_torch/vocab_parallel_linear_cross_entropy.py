"""Cross entropy of logits x Wᵀ + b whose classes are divided over processes, and of which there are never more than two chunks.

Of each chunk of rows a process makes the logits of its own classes, x W_rᵀ + b_r, and sends the numbers of
`vocab_parallel_rows`; while they are on their way it makes the next chunk's logits. Then dz takes the place of the chunk's:

    ∂ℓ/∂x = Σ_r dz_r W_r,   ∂ℓ/∂W_r = Σ_chunks dz_rᵀ x,   ∂ℓ/∂b_r = Σ_rows dz_r            (docs/derivations.md, section 3.7)

The first is a sum over processes: one collective of N D numbers in the backward pass. A reduced loss makes its gradients in the
forward pass, for an upstream gradient of 1 of the sum, in three products; without a reduction, for a second call of backward,
for statistics that have gradients and under a compiler backward makes the logits again: four products. What a half precision
does about its range is `linear_chunks`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import arrays
from . import float16_scale, operators
from . import vocab_parallel_rows as of_rows
from .autograd import accumulate_dtype, graph_is_needed, no_second_derivative
from .collectives import Gathering, summed
from .cross_entropy_formula import OPTIONS_SCHEMA, Options, never_zero
from .linear_chunks import HALVES, Gradients, Problem, as_given, chunks, fake_gradients, logits_of, scaled
from .vocab_parallel_rows import NUMBERS_OF_ROWS, Divided

# Two chunks of logits are held. Rows of a chunk are the same on every process, whatever its number of classes: a part of all
# rows that keeps both chunks below a tenth of the logits, or, where ∂ℓ/∂W is its own sum, as many as give them W's size.
PARTS, PARTS_OF_HALVES_ON_THE_HOST = 22, 44
LEAST, MOST = 128, 8192


class Rest(NamedTuple):
    """What of a call has no gradient.

    start: the number of the first class here, -1 where the processes are to find out. rows: of a chunk. differentiable: the
    statistics have gradients. at_once: the gradients are made in the forward pass. traced: the call goes through the operators.
    """

    options: Options
    start: int
    group: str
    rows: int
    statistics: bool
    differentiable: bool = False
    at_once: bool = False
    traced: bool = False


class Found(NamedTuple):
    """What the forward pass finds: the loss, the sum of the weights that the mean is divided by, and of every row how many
    processes have its target, its target's weight, the numbers of `statistics` (or none), those that have gradients (or none),
    and what `vocab_parallel_rows` needs for its gradient; the gradients of x (this process's part), W and b of the sum, and a
    factor for each row of the first."""

    loss: Tensor
    denominator: Tensor
    taken: Tensor
    w_t: Tensor
    numbers: Tensor
    of_statistics: Tensor
    stats: Tensor
    at: Tensor
    scaled: Tensor | None
    gradients: tuple[Any, Any, Any] = (None, None, None)
    factor: Tensor | None = None


def chunk_rows(x: Tensor) -> int:
    """Rows of a chunk, unless the caller says otherwise."""
    (N, D), half = x.shape, x.dtype in HALVES
    rows = max(N // (PARTS_OF_HALVES_ON_THE_HOST if half and arrays.on_host(x) else PARTS), 0 if half else D // 2)
    return min(max(rows // LEAST * LEAST, LEAST), MOST)


def vocab_parallel_linear_cross_entropy(problem: Problem, rest: Rest, gradient: str) -> tuple[Tensor, ...]:
    """(loss, taken, w_t, the numbers of `statistics` or none, `vocab_parallel_rows.with_gradients` or none), of (N, 1) rows.

    The arguments are checked.
    """
    if operators.traced(problem.x):
        loss, _, *rows = FORWARD(*problem, *rest[1:6], *rest.options)
        return loss, *rows[:4]
    if operators.transformed():
        raise RuntimeError("vocab_parallel_linear_cross_entropy: torch.func transforms do not reach the other processes")
    if graph_is_needed(*problem[:3]):
        at_once = gradient != "backward" and rest.options.reduction != "none" and not rest.differentiable
        return _VocabParallelLinear.apply(*problem, rest._replace(at_once=at_once))
    return _results(run(problem, rest))


def _results(found: Found) -> tuple[Tensor, ...]:
    return found.loss, found.taken, found.w_t, found.numbers, found.of_statistics


# ---------------------------------------------------------------------------------------------- forward
def run(problem: Problem, rest: Rest, needs: Sequence[bool] = (False, False, False)) -> Found:
    """The loss, and the gradients that `needs` names, of x, W and b."""
    (N, V, _), rows = problem.sizes, rest.rows or chunk_rows(problem.x)
    start = of_rows.first_class(rest.start, V, rest.group, problem.x.device)
    of = Divided(start, problem.weight, rest.options, rest.statistics, rest.differentiable)
    merge = _Merge(problem, of, needs)
    logits = [problem.x.new_empty(min(rows, N), V) for _ in range(2 if any(needs) and rows < N else 1)]
    ahead = None
    for number, (first, last) in enumerate(chunks(problem, rows)):
        part = problem.chunk(first, last)
        z = logits_of(part, logits[number % len(logits)])
        row = of_rows.rows_of(part.target, V, of)
        on_its_way = Gathering(of_rows.to_send(z, row, of), rest.group)
        if ahead is not None:  # what it has sent came while this chunk's logits were made
            merge.add(*ahead)
        ahead = on_its_way, part, z, row, first, last
    if ahead is not None:
        merge.add(*ahead)
    return merge.found()


class _Merge:
    """The rows of all chunks, as what is known of them comes in."""

    def __init__(self, problem: Problem, of: Divided, needs: Sequence[bool]) -> None:
        x, (N, V, S) = problem.x, problem.sizes
        acc = accumulate_dtype(x)
        self.of, self.needed = of, any(needs)
        self.loss, self.w_t, self.taken = (x.new_empty((N, S), dtype=acc) for _ in range(3))
        self.stats = x.new_empty((6 if of.differentiable else 4, N, S), dtype=acc)
        self.numbers = x.new_empty((NUMBERS_OF_ROWS if of.statistics else 0, N, S), dtype=acc)
        self.index = x.new_empty((N, S), dtype=torch.int64)
        self.scaled = x.new_ones(V, dtype=acc) if of.options.label_smoothing else None
        self.gradients = Gradients(problem, needs)
        scales = x.dtype == torch.float16 and self.needed
        self.largest = float16_scale.largest_element(problem.W) if scales else None
        self.factor = x.new_ones((N, 1), dtype=acc) if scales else None

    def add(self, gathering: Gathering, part: Problem, z: Tensor, row: of_rows.Row, first: int, last: int) -> None:
        """The rows first…last, whose logits z become their gradient."""
        found = of_rows.merged(gathering.result(), row, z.shape[1], self.of)
        here, index = slice(first, last), of_rows.index_of(row)
        self.loss[here], self.w_t[here], self.taken[here] = found.loss, found.w_t, found.taken
        self.stats[:, here] = found.stats
        self.index[here] = index
        if found.scaled is not None:
            self.scaled = found.scaled
        if found.numbers is not None:
            self.numbers[:, here] = found.numbers
        if not self.needed:
            return
        shrink = None
        if self.factor is not None and self.largest is not None and z.numel():
            weighed = part._replace(weight=found.scaled if self.of.options.label_smoothing else self.of.weight)
            numbers = torch.stack([*found.stats[:2], found.W])
            shrink = float16_scale.of_chunk(weighed, found.loss, numbers, self.of.options, self.largest)
            self.factor[here] = shrink
        upstream = torch.ones_like(found.loss)
        of_rows.gradient(upstream, z, z, found.stats, index, found.scaled, self.of.options, over=shrink)
        self.gradients.add(part, z, first, last, shrink)

    def found(self) -> Found:
        loss, denominator, options = self.loss, self.w_t.sum().view(1), self.of.options
        if options.reduction != "none":
            loss = loss.sum()
        if options.reduction == "mean":
            loss = loss / never_zero(denominator, options)[0]
        of_statistics = of_rows.with_gradients(self.numbers if self.of.differentiable else None, self.w_t)
        rows = self.taken, self.w_t, self.numbers, of_statistics, self.stats, self.index, self.scaled
        return Found(loss, denominator, *rows, self.gradients.found, self.factor)


# ---------------------------------------------------------------------------------------------- backward
def run_backward(
    upstream: Tensor | None, of_statistics: Tensor | None, problem: Problem, stats: Tensor, index: Tensor,
    weights: Tensor | None, rows: int, needs: Sequence[bool], group: str, options: Options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients that `needs` names, of x, W and b, from logits made again, for upstream gradients (N, S) of the losses of
    the rows and (3, N, S) of their statistics."""
    (N, V, _), rows = problem.sizes, rows or chunk_rows(problem.x)
    gradients, z = Gradients(problem, needs), problem.x.new_empty(min(rows, N), V)
    beside = None if of_statistics is None else torch.empty_like(z)
    for first, last in chunks(problem, rows):
        part, here = problem.chunk(first, last), slice(first, last)
        logits = logits_of(part, z)
        dz = logits if beside is None else beside[: last - first].view_as(logits)
        of_rows.gradient_with_statistics(
            None if upstream is None else upstream[here], None if of_statistics is None else of_statistics[:, here],
            logits, dz, logits, stats[:, here], index[here], weights, options,
        )  # fmt: skip
        gradients.add(part, dz, first, last)
    dx, dW, db = gradients.found
    return None if dx is None else summed(dx.to(stats.dtype), group), dW, db


# ---------------------------------------------------------------------------------------------- autograd
class _VocabParallelLinear(torch.autograd.Function):
    """`at_once` makes the gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, rest: Rest
    ) -> tuple[Tensor | None, ...]:
        problem = Problem(x, W, b, target, weight)
        if rest.traced:
            found = Found(*operators.below_autograd(FORWARD, *problem, *rest[1:6], *rest.options))
        else:
            found = run(problem, rest, ctx.needs_input_grad[:3] if rest.at_once else (False,) * 3)
        divides = found.denominator if rest.options.reduction == "mean" else None
        weights = found.scaled if rest.options.label_smoothing else None
        ctx.save_for_backward(*problem, found.stats, found.at, weights, divides, found.factor, *found.gradients)
        ctx.rest, ctx.handed_out = rest, not rest.at_once
        results = found[:9] if rest.traced else _results(found)  # an operator gives all
        ctx.at_statistics = 5 if rest.traced else 4
        no_gradient = results[1 : ctx.at_statistics], results[ctx.at_statistics + rest.differentiable :]
        ctx.mark_non_differentiable(*(v for part in no_gradient for v in part))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @no_second_derivative("vocab_parallel_linear_cross_entropy")
    def backward(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        of_statistics = others[ctx.at_statistics - 1]
        if upstream is None and of_statistics is None:
            return (None,) * 6
        saved, rest = ctx.saved_tensors, ctx.rest
        problem, (stats, index, weights, denominator, factor, *held) = Problem(*saved[:5]), saved[5:]
        if ctx.handed_out or upstream is None:
            g = upstream if upstream is None or denominator is None else upstream / denominator[0]
            g = None if g is None else g.to(stats.dtype).expand(index.shape)
            backward = BACKWARD if rest.traced else _run_backward
            given = stats, index, weights, rest.rows, ctx.needs_input_grad[:3], rest.group, *rest.options
            found = backward(g, of_statistics, *problem[:4], *given)
        else:
            ctx.handed_out = True
            dx = _summed_over_processes(held[0], upstream, denominator, factor, rest.group)
            found = as_given((dx, *scaled((None, *held[1:]), upstream, denominator, factor)[1:]), problem)
        return *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad[:3], strict=True)), None, None, None


def _summed_over_processes(
    dx: Tensor | None, upstream: Tensor, denominator: Tensor | None, factor: Tensor | None, group: str
) -> Tensor | None:
    """The gradient of x from this process's part of it for an upstream gradient of 1, in the dtype of its sums."""
    if dx is None:
        return None
    scale = upstream if denominator is None else upstream / denominator[0]
    return summed(dx.to(scale.dtype) * (scale if factor is None else scale * factor), group)


# ---------------------------------------------------------------------------------------------- operators
def _rest(start: int, group: str, rows: int, statistics: bool, differentiable: bool, *options: Any) -> Rest:
    return Rest(Options(*options), start, group, rows, statistics, differentiable, traced=True)


def _forward(problem: Problem, rest: Rest) -> tuple[Tensor | None, ...]:
    return run(problem, rest)[:9]


def _fake(problem: Problem, rest: Rest) -> tuple[Tensor | None, ...]:
    x, (N, V, S) = problem.x, problem.sizes
    rows = [x.new_empty(N, S, dtype=accumulate_dtype(x)) for _ in range(3)]
    loss = rows[0] if rest.options.reduction == "none" else rows[0].new_empty(())
    numbers, of_statistics, stats = (
        rows[0].new_empty(count, N, S)
        for count in (NUMBERS_OF_ROWS * rest.statistics, 3 * rest.differentiable, 6 if rest.differentiable else 4)
    )
    index = x.new_empty(N, S, dtype=torch.int64)
    scaled = loss.new_empty(V) if rest.options.label_smoothing else None
    return loss, loss.new_empty(1), rows[1], rows[2], numbers, of_statistics, stats, index, scaled


def _run_backward(
    upstream: Tensor | None, of_statistics: Tensor | None, x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    problem, (stats, index, weights, rows, needs, group, *options) = Problem(x, W, b, target), rest
    given = stats, index, weights, rows, needs, group, Options(*options)
    return as_given(run_backward(upstream, of_statistics, problem, *given), problem)


_PROBLEM = "Tensor x, Tensor W, Tensor? b, Tensor target"
FORWARD = operators.define(
    f"vocab_parallel_linear_cross_entropy({_PROBLEM}, Tensor? weight, int start, str group, int rows, bool statistics, "
    f"bool differentiable, {OPTIONS_SCHEMA}) -> (Tensor loss, Tensor denominator, Tensor taken, Tensor w_t, "
    "Tensor numbers_of_rows, Tensor of_statistics, Tensor stats, Tensor index, Tensor scaled)",
    *(
        lambda x, W, b, target, weight, *options, f=f: f(Problem(x, W, b, target, weight), _rest(*options))
        for f in (_forward, _fake, lambda problem, rest: _VocabParallelLinear.apply(*problem, rest))
    ),
)
BACKWARD = operators.define(
    f"vocab_parallel_linear_cross_entropy_backward(Tensor? upstream, Tensor? of_statistics, {_PROBLEM}, Tensor stats, "
    f"Tensor index, Tensor? scaled, int rows, bool[] needs, str group, {OPTIONS_SCHEMA}) -> (Tensor dx, Tensor dW, Tensor db)",
    _run_backward,
    lambda upstream, of_statistics, x, W, b, *rest: fake_gradients((x, W, b), rest[5]),
)
