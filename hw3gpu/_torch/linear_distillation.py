"""Divergences of a student's and a teacher's logits x Wᵀ + b, of which there is never more than a chunk of rows on either side.

The chunks and the products are those of `linear_chunks`, the divergences and the gradients by logits `distillation`'s: the
forward pass makes each chunk's logits of both, the backward pass makes them again, and dz. ∂ℓ/∂W and ∂ℓ/∂b are summed over
chunks in float32 (docs/derivations.md, sections 3.7 and 3.9). Logits that are one small chunk are held between both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import dispatch
from . import distillation, linear_chunks, operators
from .autograd import accumulate_dtype, gradients_with_a_graph, graph_is_needed
from .distillation import Divergence
from .linear_chunks import Gradients, Problem, as_given, chunks, fake_gradients, logits_of

Operands = tuple[Tensor, Tensor, Tensor | None]  # x, W and b of one side
Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]  # of the student, then of the teacher


def divergences(student: Operands, teacher: Operands, mask: Tensor | None, options: Divergence, rows: int | None) -> Tensor:
    """The divergence of each of (N,) rows, 0 where the mask leaves it out; student and teacher: (x, W, b), checked."""
    tensors = (*student, *teacher)
    operands = (*tensors, mask, options.kind, options.beta, options.temperature, rows or 0)
    if not operators.traced(student[0]) and operators.transformed():
        return formula(tensors, mask, options.kind, options.beta, options.temperature)
    if any(operators.traced(v) for v in tensors if v is not None):
        return FORWARD(*operands)[0]
    if graph_is_needed(*tensors):
        return _LinearDivergences.apply(*operands[:7], operands[7:], False)[0]
    return run(*operands)[0]


def _problems(tensors: Tensors) -> list[Problem]:
    """Student's and teacher's `Problem`; neither has a target."""
    of = []
    for x, W, b in (tensors[:3], tensors[3:]):
        nothing = torch.zeros((), dtype=torch.int64, device=x.device).expand(x.shape[0], 1)
        of.append(Problem(x, W, b, nothing))
    return of


def _rows(problems: Sequence[Problem], rows: int, of_W: Sequence[bool] = (False, False)) -> int:
    """Rows of a chunk, in which there are two sets of logits, unless the caller says otherwise."""
    most = min(linear_chunks.chunk_rows(p, of_W=False) for p in problems)
    most = max([most, *(linear_chunks.chunk_rows(p) for p, needed in zip(problems, of_W, strict=True) if needed)])
    return rows or linear_chunks.whole_tiles(problems[0], most // 2)


# ---------------------------------------------------------------------------------------------- forward and backward
def run(
    xs: Tensor, Ws: Tensor, bs: Tensor | None, xt: Tensor, Wt: Tensor, bt: Tensor | None, mask: Tensor | None, kind: str,
    beta: float, temperature: float, rows: int, held: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The divergence of every row, and what the backward pass needs, (8, N, 1). held: memory for all logits, or none."""
    problems, N = _problems((xs, Ws, bs, xt, Wt, bt)), xs.shape[0]
    which = dispatch.backend(xs)
    view, kernels = dispatch.kernel_view(which), dispatch.distillation(which)
    loss = xs.new_empty(N, dtype=accumulate_dtype(xs))
    stats = loss.new_empty(8, N, 1)
    rows = N if held else _rows(problems, rows)
    z = held or [linear_chunks.logits_buffer(p, rows) for p in problems]
    for first, last in chunks(problems[0], rows):
        logits = [logits_of(p.chunk(first, last), out) for p, out in zip(problems, z, strict=True)]
        counts = None if mask is None else distillation.of_rows(mask[first:last], (last - first, 1))
        of_chunk = stats.new_empty(8, last - first, 1)
        given = (*logits, counts, loss[first:last, None], of_chunk)
        kernels.forward(*map(view, given), kind=kind, beta=beta, temperature=temperature)
        stats[:, first:last] = of_chunk
    return loss, stats


def run_backward(
    upstream: Tensor, xs: Tensor, Ws: Tensor, bs: Tensor | None, xt: Tensor, Wt: Tensor, bt: Tensor | None,
    mask: Tensor | None, stats: Tensor, kind: str, beta: float, temperature: float, rows: int, needs: Sequence[bool],
    *, held: Sequence[Tensor] = (),
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients that `needs` names, of x, W and b of the student and of the teacher, from logits held or made again."""
    problems = _problems((xs, Ws, bs, xt, Wt, bt))
    which = dispatch.backend(xs)
    view, kernels = dispatch.kernel_view(which), dispatch.distillation(which)
    rows = _rows(problems, rows, (needs[1], needs[4])) // 2  # of logits and their gradients
    rows = len(xs) if held else linear_chunks.whole_tiles(problems[0], rows)
    sides = [Gradients(p, needed) for p, needed in zip(problems, (needs[:3], needs[3:]), strict=True)]
    z = held or [linear_chunks.logits_buffer(p, rows) for p in problems]
    asked = zip(problems, (needs[:3], needs[3:]), strict=True)
    dz = [linear_chunks.logits_buffer(p, rows) if any(needed) else None for p, needed in asked]
    for first, last in chunks(problems[0], rows):
        parts = [p.chunk(first, last) for p in problems]
        logits = [v[:, :, None] if held else logits_of(part, v) for part, v in zip(parts, z, strict=True)]
        counts = None if mask is None else distillation.of_rows(mask[first:last], (last - first, 1))
        out = [None if d is None else d[: last - first, :, None] for d in dz]
        given = (*logits, counts, stats[:, first:last].contiguous(), upstream[first:last, None], *out)
        kernels.backward(*map(view, given), kind=kind, beta=beta, temperature=temperature)
        for side, part, d in zip(sides, parts, out, strict=True):
            if d is not None:
                side.add(part, d, first, last)
    found = (*sides[0].found, *sides[1].found)
    return as_given(found, (xs, Ws, bs, xt, Wt, bt))


# ---------------------------------------------------------------------------------------------- in PyTorch's operations
def formula(tensors: Tensors, mask: Tensor | None, kind: str, beta: float, temperature: float) -> Tensor:
    """The divergences in PyTorch's operations, which hold all logits."""
    logits = (F.linear(*tensors[:3]), F.linear(*tensors[3:]))
    return distillation.formula(*logits, mask, Divergence(kind, beta, temperature, 1))


# ---------------------------------------------------------------------------------------------- autograd
class _LinearDivergences(torch.autograd.Function):
    """Forward keeps eight numbers a row, and few logits or none; backward makes those again. `traced`: it goes through the
    operators, which keep none."""

    @staticmethod
    def forward(
        ctx: Any, xs: Tensor, Ws: Tensor, bs: Tensor | None, xt: Tensor, Wt: Tensor, bt: Tensor | None, mask: Tensor | None,
        options: tuple[str, float, float, int], traced: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tensors = xs, Ws, bs, xt, Wt, bt
        held = [] if traced else linear_chunks.to_hold(_problems(tensors), options[3])
        given = *tensors, mask, *options
        loss, stats = operators.below_autograd(FORWARD, *given) if traced else run(*given, held)
        ctx.save_for_backward(*tensors, mask, stats, *held)
        ctx.options, ctx.traced = options, traced
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        *tensors, mask, stats = ctx.saved_tensors[:8]
        needs = ctx.needs_input_grad[:6]
        if upstream is None:
            return (None,) * 9
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            found = gradients_with_a_graph(lambda: (formula(tensors, mask, *ctx.options[:3]),), tensors, (upstream,), needs)
        else:
            given: tuple[Any, ...] = (upstream, *tensors, mask, stats, *ctx.options, list(needs))
            found = BACKWARD(*given) if ctx.traced else run_backward(*given, held=ctx.saved_tensors[8:])
        return *(g if needed else None for g, needed in zip(found, needs, strict=True)), *[None] * 3


def _fake(xs: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss = xs.new_empty(xs.shape[:1], dtype=accumulate_dtype(xs))
    return loss, loss.new_empty((8, xs.shape[0], 1))


_OPERANDS = "Tensor xs, Tensor Ws, Tensor? bs, Tensor xt, Tensor Wt, Tensor? bt, Tensor? mask"
_OPTIONS = "str kind, float beta, float temperature, int rows"
BACKWARD = operators.define(
    f"linear_divergences_backward(Tensor upstream, {_OPERANDS}, Tensor stats, {_OPTIONS}, bool[] needs) "
    "-> (Tensor dxs, Tensor dWs, Tensor dbs, Tensor dxt, Tensor dWt, Tensor dbt)",
    run_backward,
    lambda upstream, xs, Ws, bs, xt, Wt, bt, *rest: fake_gradients((xs, Ws, bs, xt, Wt, bt), rest[-1]),
)
FORWARD = operators.define(
    f"linear_divergences({_OPERANDS}, {_OPTIONS}) -> (Tensor loss, Tensor stats)",
    run,
    _fake,
    lambda *operands: _LinearDivergences.apply(*operands[:7], operands[7:], True),
)
