"""Cross entropy of logits whose classes are divided over processes, in torch's autograd: `vocab_parallel_rows`.

One collective forward, none backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import outputs
from . import operators, vocab_parallel_rows
from .autograd import accumulate_dtype, graph_is_needed, no_second_derivative
from .collectives import gathered
from .cross_entropy_formula import OPTIONS_SCHEMA, Options
from .vocab_parallel_rows import NUMBERS_OF_ROWS, Divided


class Rest(NamedTuple):
    """The arguments without a gradient. start: the number of the shard's first class, -1 where the processes are to find out.

    statistics: the rows' numbers are asked for. differentiable: they have gradients. traced: the call goes through the
    operators.
    """

    options: Options
    start: int
    group: str
    statistics: bool = False
    differentiable: bool = False
    traced: bool = False


def vocab_parallel_cross_entropy(shard: Tensor, target: Tensor, weight: Tensor | None, rest: Rest) -> tuple[Tensor, ...]:
    """(loss, w_t, taken), (N, S) each: a row's loss, the weight of its target, and how many processes have its class; and the
    numbers of `cross_entropy_formula.statistics` and `vocab_parallel_rows.with_gradients`, or none."""
    if operators.traced(shard):
        return FORWARD(shard, target, weight, *rest[1:5], *rest.options)[:5]
    if operators.transformed():
        raise RuntimeError("vocab_parallel_cross_entropy: torch.func transforms do not reach the other processes")
    if graph_is_needed(shard):
        return _VocabParallel.apply(shard, target, weight, rest)
    return _run(shard, target, weight, rest)[:5]


# ---------------------------------------------------------------------------------------------- forward and backward
def _run(
    shard: Tensor, target: Tensor, weight: Tensor | None, rest: Rest
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """loss, w_t, taken, the numbers of statistics and those with gradients; then what `_run_backward` needs: stats (m, s,
    W + 2 ζ lse, q_t here, …), target and weights."""
    z = outputs.fold(shard, _class_axis(shard))
    N, V, S = z.shape
    start = vocab_parallel_rows.first_class(rest.start, V, rest.group, z.device)
    of = Divided(start, weight, rest.options, rest.statistics, rest.differentiable)
    row = vocab_parallel_rows.rows_of(target.reshape(N, S), V, of)
    received = gathered(vocab_parallel_rows.to_send(z, row, of), rest.group)
    found = vocab_parallel_rows.merged(received, row, V, of)
    numbers = found.loss.new_empty((0, N, S)) if found.numbers is None else found.numbers
    of_statistics = vocab_parallel_rows.with_gradients(numbers if rest.differentiable else None, found.loss)
    index = vocab_parallel_rows.index_of(row)
    return found.loss, found.w_t, found.taken, numbers, of_statistics, found.stats, index, found.scaled


def _class_axis(shard: Tensor) -> int:
    return min(shard.dim() - 1, 1)


def _run_backward(
    upstream: Tensor | None, of_statistics: Tensor | None, shard: Tensor, stats: Tensor, index: Tensor,
    scaled: Tensor | None, *options: Any,
) -> Tensor:  # fmt: skip
    """The gradient of the shard, for the upstream gradients (N, S) of every row's loss and (3, N, S) of its statistics."""
    axis = _class_axis(shard)
    dshard, dz = outputs.output_like(shard, axis)
    z, of = outputs.fold(shard, axis), Options(*options)
    vocab_parallel_rows.gradient_with_statistics(upstream, of_statistics, z, dz, None, stats, index, scaled, of)
    return dshard


# ---------------------------------------------------------------------------------------------- autograd
class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, target: Tensor, weight: Tensor | None, rest: Rest) -> tuple[Tensor | None, ...]:
        found = (_below_autograd if rest.traced else _run)(shard, target, weight, rest)
        *_, stats, index, scaled = found
        ctx.save_for_backward(shard, stats, index, scaled if rest.options.label_smoothing else None)
        ctx.rest = rest
        results = found if rest.traced else found[:5]  # an operator gives all
        ctx.mark_non_differentiable(*results[1:4], *results[4 + rest.differentiable :])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @no_second_derivative("vocab_parallel_cross_entropy")
    def backward(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        of_statistics = others[3]
        if upstream is None and of_statistics is None:
            return None, None, None, None
        backward = BACKWARD if ctx.rest.traced else _run_backward
        return backward(upstream, of_statistics, *ctx.saved_tensors, *ctx.rest.options), None, None, None


# ---------------------------------------------------------------------------------------------- operators
def _below_autograd(shard: Tensor, target: Tensor, weight: Tensor | None, rest: Rest) -> Any:
    return operators.below_autograd(FORWARD, shard, target, weight, *rest[1:5], *rest.options)


def _fake(
    shard: Tensor, target: Tensor, weight: Tensor | None, rest: Rest
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    z = shard.flatten(2) if shard.dim() > 2 else shard.reshape(-1, shard.shape[-1], 1)
    N, V, S = z.shape
    loss, w_t, taken = (shard.new_empty((N, S), dtype=accumulate_dtype(shard)) for _ in range(3))
    index = shard.new_empty((N, S), dtype=torch.int64)
    numbers, of_statistics, stats = (
        loss.new_empty((count, N, S))
        for count in (NUMBERS_OF_ROWS * rest.statistics, 3 * rest.differentiable, 6 if rest.differentiable else 4)
    )
    scaled = loss.new_empty(V) if rest.options.label_smoothing else None
    return loss, w_t, taken, numbers, of_statistics, stats, index, scaled


FORWARD = operators.define(
    "vocab_parallel_cross_entropy(Tensor shard, Tensor target, Tensor? weight, int start, str group, bool statistics, "
    f"bool differentiable, {OPTIONS_SCHEMA}) -> (Tensor loss, Tensor w_t, Tensor taken, Tensor numbers_of_rows, "
    "Tensor of_statistics, Tensor stats, Tensor index, Tensor scaled)",
    *(
        lambda shard, target, weight, start, group, statistics, differentiable, *options, f=f: f(
            shard, target, weight, Rest(Options(*options), start, group, statistics, differentiable, traced=True)
        )
        for f in (_run, _fake, _VocabParallel.apply)
    ),
)
BACKWARD = operators.define(
    "vocab_parallel_cross_entropy_backward(Tensor? upstream, Tensor? of_statistics, Tensor shard, Tensor stats, Tensor index, "
    f"Tensor? scaled, {OPTIONS_SCHEMA}) -> Tensor",
    _run_backward,
    lambda upstream, of_statistics, shard, *_: operators.fake_output(shard, _class_axis(shard)),
)
