"""Log-probability, entropy and lse of logits x Wᵀ + b, of which there is never more than a chunk of rows.

The chunks and the products are those of `linear_chunks`, the three numbers and dz `token_log_probs`': the forward pass
makes each chunk's logits, the backward pass makes them again, and dz, and ∂ℓ/∂W and ∂ℓ/∂b are summed over chunks in float32:
four products (docs/derivations.md, sections 3.7 and 3.8). Logits that are one small chunk are held between both: three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import dispatch
from . import linear_chunks, operators, token_log_probs
from .autograd import accumulate_dtype, gradients_with_a_graph, graph_is_needed
from .linear_chunks import Gradients, Problem, as_given, chunks, logits_of
from .token_log_probs import TokenLogProbs


def linear_token_log_probs(problem: Problem, temperature: float, ignore_index: int, rows: int | None) -> TokenLogProbs:
    """`TokenLogProbs` of (N, S) rows; the arguments are checked."""
    if not operators.traced(problem.x) and operators.transformed():
        return formula(problem, temperature, ignore_index)
    return with_sums(problem, temperature, ignore_index, rows)[0]


def with_sums(
    problem: Problem, temperature: float, ignore_index: int, rows: int | None, predicts: bool = False
) -> tuple[TokenLogProbs, Tensor, Tensor | None]:
    """`TokenLogProbs`, the sums of every row by kernels, and the class of its largest logit if `predicts`; outside of
    transforms."""
    options = temperature, ignore_index, rows or 0, predicts
    if operators.traced(problem.x):
        *found, sums, predicted = FORWARD(*problem[:4], *options)
    elif graph_is_needed(*problem[:3]):
        *found, sums, predicted = _LinearTokenLogProbs.apply(*problem[:4], options, False)
    else:
        *found, sums, predicted = run(problem, *options)
    return TokenLogProbs(*found), sums, predicted


# ---------------------------------------------------------------------------------------------- forward and backward
def run(
    problem: Problem, temperature: float, ignore_index: int, rows: int, predicts: bool, held: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The three numbers of every row, what the backward pass needs, (4, N, S), and the class of the largest logit, by one more
    read of a chunk's, if `predicts`. held: memory for all logits, or none."""
    x, (N, _, S) = problem.x, problem.sizes
    which = dispatch.backend(x)
    view, kernels = dispatch.kernel_view(which), dispatch.token_log_probs(which)
    found = [x.new_empty((N, S), dtype=accumulate_dtype(x)) for _ in range(3)]
    sums = found[0].new_empty(4, N, S)
    predicted = torch.empty_like(problem.target, dtype=torch.int64) if predicts else None
    rows = len(x) if held else rows or linear_chunks.chunk_rows(problem, of_W=False)
    z = held[0] if held else linear_chunks.logits_buffer(problem, rows)
    invalid = linear_chunks.judge_targets(problem, ignore_index)
    for first, last in chunks(problem, rows):
        part, of_chunk = problem.chunk(first, last), sums.new_empty(4, last - first, S)
        logits = logits_of(part, z)
        given = (logits, part.target, *(v[first:last] for v in found), of_chunk, invalid)
        kernels.forward(*map(view, given), ignore_index=ignore_index, temperature=temperature)
        sums[:, first:last] = of_chunk
        if predicted is not None:
            predicted[first:last] = logits.argmax(1)
    log_prob, entropy, lse = found
    return log_prob, entropy, lse, sums, predicted


def run_backward(
    upstream: Sequence[Tensor | None], problem: Problem, sums: Tensor, options: tuple[float, int], rows: int,
    needs: Sequence[bool], held: Sequence[Tensor] = (),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients that `needs` names, of x, W and b, from logits held or made again; W's and b's in the sums' dtype.

    options: temperature and ignore_index.
    """
    x, (N, V, S), (temperature, ignore_index) = problem.x, problem.sizes, options
    which = dispatch.backend(x)
    view, kernels = dispatch.kernel_view(which), dispatch.token_log_probs(which)
    of_both = (rows or linear_chunks.chunk_rows(problem, of_W=needs[1])) // 2  # logits and dz share a chunk
    rows = N if held else linear_chunks.whole_tiles(problem, of_both)
    gradients = Gradients(problem, needs)
    dz = linear_chunks.logits_buffer(problem, rows)
    z = held[0] if held else linear_chunks.logits_buffer(problem, rows)
    for first, last in chunks(problem, rows):
        part, out = problem.chunk(first, last), dz[: last - first].view(last - first, V, S)
        g = [None if of is None else of[first:last] for of in upstream]
        logits = z.view(N, V, S) if held else logits_of(part, z)
        given = (logits, part.target, sums[:, first:last].contiguous(), *g, out)
        kernels.backward(*map(view, given), ignore_index=ignore_index, temperature=temperature)
        gradients.add(part, out, first, last)
    return gradients.found


# ---------------------------------------------------------------------------------------------- in PyTorch's operations
def formula(problem: Problem, temperature: float, ignore_index: int) -> TokenLogProbs:
    """`TokenLogProbs` in PyTorch's operations, which hold all logits."""
    logits = F.linear(problem.x, problem.W, problem.b).view(problem.sizes)
    return token_log_probs.formula(logits, problem.target, temperature, ignore_index, 1)


# ---------------------------------------------------------------------------------------------- autograd
class _LinearTokenLogProbs(torch.autograd.Function):
    """Forward keeps four numbers a row, and few logits or none; backward makes those again. `traced`: it goes through the
    operators, which keep none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, options: tuple[float, int, int, bool], traced: bool
    ) -> tuple[Tensor | None, ...]:
        problem = Problem(x, W, b, target)
        held = [] if traced else linear_chunks.to_hold([problem], options[2])
        found = operators.below_autograd(FORWARD, *problem[:4], *options) if traced else run(problem, *options, held)
        *found, sums, predicted = found
        ctx.save_for_backward(x, W, b, target, sums, *held)
        ctx.options, ctx.traced = options[:3], traced
        ctx.mark_non_differentiable(*(v for v in (sums, predicted) if v is not None))
        ctx.set_materialize_grads(False)
        return *found, sums, predicted

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, b, target, sums, *held = ctx.saved_tensors
        problem = Problem(x, W, b, target)
        upstream, needs = upstream[:3], ctx.needs_input_grad[:3]
        if all(g is None for g in upstream):
            return (None,) * 6
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            found = gradients_with_a_graph(lambda: formula(problem, *ctx.options[:2]), problem[:3], upstream, needs)
            return *found, *[None] * 3
        given: tuple[Any, ...] = (*upstream, *problem[:4], sums, *ctx.options, needs)
        found = BACKWARD(*given) if ctx.traced else _run_backward(*given, held=held)
        return *(g if needed else None for g, needed in zip(found, needs, strict=True)), *[None] * 3


def _run(
    x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return run(Problem(x, W, b, target), *options)


def _fake(
    x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, temperature: float, ignore_index: int, rows: int, predicts: bool
) -> tuple[Tensor | None, ...]:
    like = x.new_empty(target.shape, dtype=accumulate_dtype(x))
    predicted = torch.empty_like(like, dtype=torch.int64) if predicts else None
    return *(torch.empty_like(like) for _ in range(3)), like.new_empty((4, *target.shape)), predicted


def _run_backward(
    g_log_prob: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None, x: Tensor, W: Tensor, b: Tensor | None,
    target: Tensor, sums: Tensor, temperature: float, ignore_index: int, rows: int, needs: Sequence[bool],
    *, held: Sequence[Tensor] = (),
) -> tuple[Tensor | None, ...]:  # fmt: skip
    problem, upstream = Problem(x, W, b, target), (g_log_prob, g_entropy, g_lse)
    found = run_backward(upstream, problem, sums, (temperature, ignore_index), rows, needs, held)
    return as_given(found, problem)


_PROBLEM, _OPTIONS = "Tensor x, Tensor W, Tensor? b, Tensor target", "float temperature, int ignore_index, int rows"
BACKWARD = operators.define(
    f"linear_token_log_probs_backward(Tensor? g_log_prob, Tensor? g_entropy, Tensor? g_lse, {_PROBLEM}, Tensor sums, "
    f"{_OPTIONS}, bool[] needs) -> (Tensor dx, Tensor dW, Tensor db)",
    _run_backward,
    lambda g_log_prob, g_entropy, g_lse, x, W, b, *rest: linear_chunks.fake_gradients((x, W, b), rest[-1]),
)
FORWARD = operators.define(
    f"linear_token_log_probs({_PROBLEM}, {_OPTIONS}, bool predicts) -> (Tensor log_prob, Tensor entropy, Tensor lse, "
    "Tensor sums, Tensor predicted)",
    _run,
    _fake,
    lambda *operands: _LinearTokenLogProbs.apply(*operands[:4], operands[4:], True),
)
